"""Networks with less built in, to compare with: Edge-GNN, Model-GNN and a graph transformer.

All three are equivariant to a permutation of the users. None of them is equivariant to rotations of the antennas
(the graph networks: only to permutations), so they see H itself, not G, and their cost depends on N. The names are
those of the literature; sizes, features and details are this project's own reading.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precoder.channel import Channels


class AntennaNetwork(nn.Module):
    """A network that gives the precoder itself. Subclasses give it in real form, of any power."""

    def forward(self, channels: Channels) -> Tensor:
        """Received powers |h_i^H v_j|^2, [B, K, K]."""
        received = channels.h.mH @ self.precoder(channels)
        return received.real.square() + received.imag.square()

    def precoder(self, channels: Channels) -> Tensor:
        """V of power 1, complex [B, N, K]."""
        norms = torch.linalg.vector_norm(channels.h, dim=1)
        direction = channels.h / norms[:, None]
        v = self.raw(direction, norms.log(), channels.alpha)
        return v / torch.linalg.matrix_norm(v, keepdim=True)

    def raw(self, direction: Tensor, level: Tensor, alpha: Tensor) -> Tensor:
        """[B, N, K] from the channels' directions h / |h|, log |h| [B, K] and alpha [B, K]."""
        raise NotImplementedError


class _AntennaLayer(nn.Module):
    """z + silu(W1 z + W2 mean over antennas + W3 mean over users), z [B, K, N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.antennas = nn.Linear(width, width, bias=False)
        self.users = nn.Linear(width, width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        mixed = self.own(z) + self.antennas(z.mean(2, keepdim=True)) + self.users(z.mean(1, keepdim=True))
        return z + F.silu(mixed)


def _edge_features(direction: Tensor, level: Tensor, alpha: Tensor) -> Tensor:
    """[B, K, N, 4]: the channel scaled to elements of size 1, its level, the weight."""
    scaled = direction.mT * math.sqrt(direction.shape[1])
    like = scaled.real.shape
    return torch.stack([scaled.real, scaled.imag, level[:, :, None].expand(like), alpha[:, :, None].expand(like)], -1)


class EdgeGNN(AntennaNetwork):
    """States on the edges between users and antennas, linear parameter sharing, permutations of users and antennas."""

    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.inward = nn.Linear(4, width)
        self.layers = nn.ModuleList(_AntennaLayer(width) for _ in range(depth))
        self.outward = nn.Linear(width, 2)

    def raw(self, direction: Tensor, level: Tensor, alpha: Tensor) -> Tensor:
        """The precoder read off the edges, added to the matched filter."""
        z = self.inward(_edge_features(direction, level, alpha))
        for layer in self.layers:
            z = layer(z)
        return direction + torch.view_as_complex(self.outward(z).contiguous()).mT


class ModelGNN(AntennaNetwork):
    """Edge-GNN layers with the step of an iterative pseudo-inverse between them.

    Each layer keeps `channels` complex candidates D [N, K]. X = D and Y = D (H^H D), the two terms of the
    Newton-Schulz iteration 2 D - D H^H D for the pseudo-inverse of H^H, join the edges' state, which says with which
    complex gains they are added to D.
    """

    def __init__(self, width: int = 48, depth: int = 5, candidates: int = 4) -> None:
        super().__init__()
        self.candidates = candidates
        self.inward = nn.Linear(4, width)
        self.joined = nn.ModuleList(nn.Linear(4 * candidates, width) for _ in range(depth))
        self.layers = nn.ModuleList(_AntennaLayer(width) for _ in range(depth))
        self.mixes = nn.ParameterList(_mix(candidates) for _ in range(depth))
        self.updates = nn.ModuleList(_small_linear(width, 2 * candidates) for _ in range(depth))
        self.outward = nn.Parameter(torch.full((candidates,), 1 / candidates))

    def raw(self, direction: Tensor, level: Tensor, alpha: Tensor) -> Tensor:
        """The sum of the candidates after the last layer."""
        z = self.inward(_edge_features(direction, level, alpha))
        d = direction[:, None].expand(-1, self.candidates, -1, -1)
        inverse = direction[:, None].mH
        for joined, layer, mix, update in zip(self.joined, self.layers, self.mixes, self.updates, strict=True):
            terms = torch.cat([d, d @ (inverse @ d)], 1)
            edges = torch.view_as_real(terms.permute(0, 3, 2, 1).contiguous()).flatten(-2)
            z = layer(z + joined(edges * math.sqrt(direction.shape[1])))
            free = torch.view_as_complex(update(z).unflatten(-1, (-1, 2)).contiguous())
            d = torch.einsum("ct,btnk->bcnk", mix.to(terms.dtype), terms) + free.permute(0, 3, 2, 1)
        return torch.einsum("c,bcnk->bnk", self.outward.to(d.dtype), d)


def _mix(candidates: int) -> nn.Parameter:
    """D + 0.1 (D - D H^H D) plus noise: a short step of the iteration, which converges from anywhere near."""
    own = torch.cat([1.1 * torch.eye(candidates), -0.1 * torch.eye(candidates)], 1)
    return nn.Parameter(own + 0.02 * torch.randn(candidates, 2 * candidates))


def _small_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=0.1 / math.sqrt(inputs))
    nn.init.zeros_(linear.bias)
    return linear


class GraphTransformer(AntennaNetwork):
    """Users are tokens, with all their antennas as features: permutations of users only, one number of antennas."""

    def __init__(self, antennas: int, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.antennas = antennas
        self.inward = nn.Linear(2 * antennas + 2, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.outward = _small_linear(width, 2 * antennas)

    def raw(self, direction: Tensor, level: Tensor, alpha: Tensor) -> Tensor:
        """A correction of each user's matched filter."""
        if direction.shape[1] != self.antennas:
            raise ValueError(f"this network is for {self.antennas} antennas, got channels of {direction.shape[1]}")
        scaled = torch.view_as_real(direction.mT.contiguous()).flatten(-2) * math.sqrt(self.antennas)
        tokens = self.inward(torch.cat([scaled, level[:, :, None], alpha[:, :, None]], -1))
        for layer in self.layers:
            tokens = layer(tokens)
        correction = self.outward(self.norm(tokens)).unflatten(-1, (-1, 2))
        return direction + torch.view_as_complex(correction.contiguous()).mT
