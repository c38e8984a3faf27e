"""The second pass: the network on fewer users, never worse than the first, with the same equivariances."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra xccl[precoder] is not installed")

from precoder.channel import Channels, Scenario, draw, generator, gram  # noqa: E402
from precoder.registry import build  # noqa: E402
from precoder.second_pass import two_passes  # noqa: E402
from precoder.wmmse import rate, to_unit_power  # noqa: E402

USERS, ANTENNAS, COUNT = 5, 3, 40


class Selective(torch.nn.Module):
    """A network with known choices: it gives power only to users of more weight than 0.8 of the mean of those it
    sees, and it precodes them the better the fewer they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = build("upe-phase", ANTENNAS).double()

    def coefficients(self, channels: Channels) -> torch.Tensor:
        served = channels.alpha > 0.8 * channels.alpha.mean(1, keepdim=True)
        return self.network.coefficients(channels) * served[:, None, :]


def channels_of(users: int = USERS) -> Channels:
    return draw(Scenario(users, ANTENNAS, (0, 20)), COUNT, generator(0, 0))


def passes(channels: Channels) -> torch.Tensor:
    with torch.no_grad():
        return two_passes(Selective(), channels)


def first_pass(channels: Channels) -> torch.Tensor:
    with torch.no_grad():
        return to_unit_power(Selective().coefficients(channels), gram(channels.h))


def test_it_is_the_better_of_the_network_on_all_and_on_the_users_served() -> None:
    channels = channels_of()
    found, first = passes(channels), first_pass(channels)
    seconds = 0
    for b in range(COUNT):
        users = (first[b].abs().sum(0) > 0).nonzero()[:, 0]
        h, alpha = channels.h[b : b + 1], channels.alpha[b : b + 1]
        fewer = Channels(h[:, :, users], alpha[:, users] * (len(users) / alpha[:, users].sum()))
        second = torch.zeros(USERS, USERS, dtype=torch.complex128)
        second[users[:, None], users] = first_pass(fewer)[0]
        both = torch.stack([first[b], second])
        best = rate(both, gram(h), alpha).argmax()
        torch.testing.assert_close(found[b], both[best])
        seconds += int(best)
    assert 0 < seconds < COUNT


def test_power_is_one() -> None:
    channels = channels_of()
    assert ((channels.h @ passes(channels)).abs().square().sum((1, 2)) - 1).abs().max() < 1e-12


def test_one_user() -> None:
    channels = channels_of(users=1)
    torch.testing.assert_close(passes(channels).abs(), first_pass(channels).abs())


def test_equivariances() -> None:
    channels, order = channels_of(), torch.tensor([2, 4, 0, 3, 1])
    v = channels.h @ passes(channels)
    permuted = Channels(channels.h[:, :, order], channels.alpha[:, order])
    assert (permuted.h @ passes(permuted) - v[:, :, order]).abs().max() < 1e-10
    u = torch.linalg.qr(torch.randn(COUNT, ANTENNAS, ANTENNAS, dtype=torch.complex128))[0]
    rotated = Channels(u @ channels.h, channels.alpha)
    assert (rotated.h @ passes(rotated) - u @ v).abs().max() < 1e-10
    phases = torch.exp(1j * torch.rand(COUNT, 1, USERS, dtype=torch.float64) * 6.28)
    turned = Channels(channels.h * phases, channels.alpha)
    assert (turned.h @ passes(turned) - v * phases).abs().max() < 1e-10
