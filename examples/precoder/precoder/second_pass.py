"""The network a second time, without the users to whom it gives next to no power.

A precoder that leaves a user out is one for the other users alone. The network does not know that: a user left out
still takes part in its means over users. With K > N most users are left out, and the others' precoders suffer; the
second pass, with fewer users, is nearer to what was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from precoder.channel import Channels, gram
from precoder.networks import GramNetwork
from precoder.wmmse import rate, to_unit_power

SERVED = 1e-3  # of an equal share of the power


def two_passes(network: GramNetwork, channels: Channels) -> Tensor:
    """Coefficients C of power 1, complex128 [B, K, K]: each sample's better pass. `channels` in float64."""
    g = gram(channels.h)
    first = _coefficients(network, channels, g)
    power = (first.conj() * (g @ first)).real.sum(1)
    served = power > SERVED / power.shape[1]
    second = torch.zeros_like(first)
    counts = served.sum(1)
    for count in counts.unique().tolist():  # one number of users in a batch, so nothing is padded
        samples = (counts == count).nonzero()[:, 0]
        users = served[samples].nonzero()[:, 1].view(-1, count)
        fewer = _only(users, Channels(channels.h[samples], channels.alpha[samples]))
        at = (samples[:, None, None], users[:, :, None], users[:, None, :])
        second[at] = _coefficients(network, fewer, gram(fewer.h))
    better = rate(second, g, channels.alpha) > rate(first, g, channels.alpha)
    return torch.where(better[:, None, None], second, first)


def _only(users: Tensor, channels: Channels) -> Channels:
    """The channels of the given users [B, count], weights scaled to sum count."""
    h = channels.h.gather(2, users[:, None, :].expand(-1, channels.h.shape[1], -1))
    alpha = channels.alpha.gather(1, users)
    return Channels(h, alpha * (users.shape[1] / alpha.sum(1, keepdim=True)))


def _coefficients(network: GramNetwork, channels: Channels, g: Tensor) -> Tensor:
    """In the network's precision, then scaled to power 1 in float64."""
    precision = next(network.parameters()).dtype
    return to_unit_power(network.coefficients(channels.to(precision)).to(torch.complex128), g)
