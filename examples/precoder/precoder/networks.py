"""Networks that map (channel, weights) to a precoder, equivariant to a unitary rotation of the antennas and to a
permutation of the users.

They work on G = H^H H and give coefficients C of V = H C. A rotation of the antennas does not change G, so this
equivariance is exact, the cost does not depend on N, and N may be one that was not trained. User phases (h_k to h_k
e^{j phi_k}, which turns column k of V alike) leave the rate as it is, too; `PhaseLayer` is equivariant to them,
`PlainLayer` and `LiteralLayer` are not.

Complex K x K matrices are kept as real ones: a pair [2, B, K, K], or stacked as [B, 2K, K] for products.
Row i is the user whose channel is used, column j the stream.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precoder.channel import Channels, gram
from precoder.edge_layer import EdgeLayer


class Problem(NamedTuple):
    """What does not change from layer to layer."""

    gram: Tensor  # [B, 2K, 2K], the real form of G
    cosine: Tensor  # g_ij = G_ij / (|h_i| |h_j|), [2, B, K, K]
    inverse_norm: Tensor  # 1 / |h_i|, [B, K]
    alpha: Tensor  # [B, K]


class Point(NamedTuple):
    """A precoder of unit power: its coefficients C and G C, both [B, 2K, K]."""

    c: Tensor
    received: Tensor


def _pair(stacked: Tensor) -> Tensor:
    """[B, 2K, K] as a pair [2, B, K, K]."""
    users = stacked.shape[-1]
    return stacked.view(-1, 2, users, users).transpose(0, 1)


def _stack(pair: Tensor) -> Tensor:
    return torch.cat([pair[0], pair[1]], 1)


def _real_form(pair: Tensor) -> Tensor:
    """The real [B, 2K, 2K] that multiplies stacked matrices as the complex one multiplies complex ones."""
    return torch.cat([_stack(pair), torch.cat([-pair[1], pair[0]], 1)], 2)


def _to_unit_power(problem: Problem, c: Tensor) -> Point:
    received = problem.gram @ c
    scale = (c * received).sum((1, 2), keepdim=True).rsqrt()
    return Point(c * scale, received * scale)


def _matched_filter(problem: Problem) -> Point:
    """The start of all networks, C = diag(1 / (|h_k| sqrt K))."""
    real = torch.diag_embed(problem.inverse_norm / math.sqrt(problem.alpha.shape[-1]))
    c = torch.cat([real, torch.zeros_like(real)], 1)
    return Point(c, problem.gram @ c)


def _gains(point: Point) -> Tensor:
    """Received powers |G C|^2, [B, K, K]."""
    return _pair(point.received).square().sum(0)


class GramLayer(nn.Module):
    """One update of C: features of (G C, G, alpha) -> two EdgeLayers -> combination weights -> new C.

    Subclasses say which features, and how the outputs of the last linear map, [outputs, B, K, K], combine G and C.
    """

    features: int
    outputs: int
    carries = True  # the edges' state goes on to the next layer

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        carried = width if self.carries and not first else 0
        self.inner = EdgeLayer(self.features + carried, width)
        self.outer = EdgeLayer(width, width)
        self.head = nn.Parameter(torch.randn(self.outputs, width) * (0.1 / math.sqrt(width)))
        self.head_bias = nn.Parameter(torch.zeros(self.outputs, 1))

    def forward(self, problem: Problem, point: Point, state: Tensor | None) -> tuple[Point, Tensor | None]:
        """The next point, and the state [B, K, K, width] to carry."""
        batch, users = problem.alpha.shape
        received = _pair(point.received)
        features = self.edge_features(problem, received)
        z = features.view(self.features, -1).t().contiguous().view(batch, users, users, self.features)
        if state is not None:
            z = torch.cat([z, state], -1)
        y = F.silu(self.inner(z))
        y = y + F.silu(self.outer(y))
        # Transposed, so that each output is one contiguous K x K array per sample.
        outputs = torch.addmm(self.head_bias, self.head, y.view(-1, y.shape[-1]).t()).view(-1, batch, users, users)
        if self.carries:
            state = y if state is None else state + y
        return _to_unit_power(problem, self.combine(problem, point, received, outputs)), state

    def edge_features(self, problem: Problem, received: Tensor) -> Tensor:
        """[features, B, K, K] from G C as a pair."""
        raise NotImplementedError

    def combine(self, problem: Problem, point: Point, received: Tensor, outputs: Tensor) -> Tensor:
        """The new C, stacked, of any power."""
        raise NotImplementedError


class PhaseLayer(GramLayer):
    """Features without phase, and gains that multiply g and e, which carry it: equivariant to user phases, too.

    Multiplied by g and e rather than by g/|g| and e/|e|, the update is smooth where they vanish.
    """

    features = 9
    outputs = 10  # complex: gains of g and e in A, of g and e in M, and of the diagonal

    def edge_features(self, problem: Problem, received: Tensor) -> Tensor:
        """|e|^2, alpha |e|^2, |g|^2, e conj(g), and the levels of row i."""
        cosine, alpha = problem.cosine, problem.alpha[:, :, None]
        power = received.square().sum(0)
        total = power.sum(-1, keepdim=True) + 1
        inverse = total.rsqrt()
        relative = power / total
        e = received * inverse
        like = power.shape
        return torch.stack(
            [
                relative,
                alpha * relative,
                cosine.square().sum(0),
                (e * cosine).sum(0),
                e[1] * cosine[0] - e[0] * cosine[1],
                0.3 * torch.log1p(power),
                alpha.expand(like),
                (-0.5 * problem.inverse_norm.log())[:, :, None].expand(like),
                (0.5 * total.log()).expand(like),
            ]
        )

    def combine(self, problem: Problem, point: Point, received: Tensor, outputs: Tensor) -> Tensor:
        """C diag(1 + d) + diag(1 / |h|) A + C M, with A and M from g and e."""
        batch, users = problem.alpha.shape
        inverse = (received.square().sum((0, 3)) + 1).rsqrt()
        bases = torch.stack([problem.cosine, received * inverse[:, :, None]], 1)  # (re, im), (g, e)
        gains = outputs[:8].view(2, 2, 2, batch, users, users)  # (A, M), (re, im), (g, e)
        real = (gains[:, 0] * bases[0] - gains[:, 1] * bases[1]).sum(1)
        imaginary = (gains[:, 0] * bases[1] + gains[:, 1] * bases[0]).sum(1)
        return _update(problem, point, torch.stack([real, imaginary], 1), outputs[8:])


class PlainLayer(GramLayer):
    """Free complex outputs for A and M: without the equivariance to user phases."""

    features = 10
    outputs = 6

    def edge_features(self, problem: Problem, received: Tensor) -> Tensor:
        """e, alpha e and g as they are, |e|^2, and the levels of row i."""
        alpha = problem.alpha[:, :, None]
        power = received.square().sum(0)
        total = power.sum(-1, keepdim=True) + 1
        e = received * total.rsqrt()
        like = power.shape
        levels = [
            power / total,
            alpha.expand(like),
            (-0.5 * problem.inverse_norm.log())[:, :, None].expand(like),
            (0.5 * total.log()).expand(like),
        ]
        return torch.cat([e, alpha * e, problem.cosine, torch.stack(levels)])

    def combine(self, problem: Problem, point: Point, received: Tensor, outputs: Tensor) -> Tensor:
        """C diag(1 + d) + diag(1 / |h|) A + C M, with A and M the outputs themselves."""
        return _update(problem, point, outputs[:4].view(2, 2, *outputs.shape[1:]), outputs[4:])


class LiteralLayer(GramLayer):
    """The closest reading of the abstract: combination weights from h_i^H x_j and alpha_i h_i^H x_j only, X = H A."""

    features = 4
    outputs = 2
    carries = False

    def edge_features(self, problem: Problem, received: Tensor) -> Tensor:
        """The two inner products."""
        return 0.3 * torch.cat([received, problem.alpha[:, :, None] * received])

    def combine(self, problem: Problem, point: Point, received: Tensor, outputs: Tensor) -> Tensor:
        """diag(1 / |h|) A."""
        return _stack(outputs * problem.inverse_norm[:, :, None])


def _update(problem: Problem, point: Point, matrices: Tensor, diagonal: Tensor) -> Tensor:
    """C diag(1 + d) + diag(1 / |h|) A + C M.

    `matrices` [2, 2, B, K, K] are (A, M), (re, im); d is on the diagonal of `diagonal` [2, B, K, K].
    """
    own = diagonal.diagonal(0, 2, 3)
    factor = torch.cat([matrices[1, 0] + torch.diag_embed(1 + own[0]), matrices[1, 1] + torch.diag_embed(own[1])], 1)
    added = _stack(matrices[0] * problem.inverse_norm[:, :, None])
    return torch.baddbmm(added, _real_form(_pair(point.c)), factor)


class GramNetwork(nn.Module):
    """`depth` GramLayers after a matched filter. `forward` gives received powers, `precoder` the precoder."""

    def __init__(self, layer: type[GramLayer], width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(width, first=index == 0) for index in range(depth))

    def forward(self, channels: Channels) -> Tensor:
        """Received powers |h_i^H v_j|^2, [B, K, K]."""
        return _gains(self._last_point(channels))

    def precoder(self, channels: Channels) -> Tensor:
        """V = H C of power 1, complex [B, N, K]."""
        v = channels.h @ self.coefficients(channels)
        return v / torch.linalg.matrix_norm(v, keepdim=True)

    def coefficients(self, channels: Channels) -> Tensor:
        """C, complex [B, K, K]."""
        return torch.complex(*_pair(self._last_point(channels).c).unbind(0))

    def _last_point(self, channels: Channels) -> Point:
        g = gram(channels.h)
        inverse_norm = g.diagonal(0, 1, 2).real.rsqrt()
        pair = torch.stack([g.real, g.imag])
        cosine = pair * (inverse_norm[:, :, None] * inverse_norm[:, None, :])
        problem = Problem(_real_form(pair), cosine, inverse_norm, channels.alpha)
        point, state = _matched_filter(problem), None
        for layer in self.layers:
            point, state = layer(problem, point, state)
        return point
