"""The layer that all equivariant networks here are made of: K x K edges, equivariant to one permutation of both axes.

Its backward is written by hand. Most of a training step is spent in this layer, and autograd would keep and add
several arrays of the size of the edges for each of the six terms; here each direction is two matrix products over
all edges, one over all nodes, and a few passes over the edges.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _EdgeLinear(torch.autograd.Function):
    """y_ij = We z_ij + Wt z_ji + r_i + c_j + g + [i=j] d_i: node terms r, c, d and graph term g from pools of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, edge: Tensor, node: Tensor, graph: Tensor, bias: Tensor) -> Tensor:
        batch, users, _, width = z.shape
        out = edge.shape[1] // 2
        products = (z.view(-1, width) @ edge).view(batch, users, users, 2 * out)
        y = products[..., :out] + products[..., out:].transpose(1, 2)
        rows = z.mean(2)
        pools = torch.cat([rows, z.mean(1), z.diagonal(0, 1, 2).transpose(1, 2)], -1)
        terms = (pools.view(-1, 3 * width) @ node).view(batch, users, 3 * out)
        mean = rows.mean(1)
        y += (terms[..., :out] + torch.addmm(bias, mean, graph)[:, None])[:, :, None]
        y += terms[:, None, :, out : 2 * out]
        y.diagonal(0, 1, 2).transpose(1, 2).add_(terms[..., 2 * out :])
        ctx.save_for_backward(z, edge, node, graph, pools, mean)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        z, edge, node, graph, pools, mean = ctx.saved_tensors
        batch, users, _, width = z.shape
        dproducts = dy.new_empty(batch, users, users, 2 * dy.shape[-1])
        dproducts[..., : dy.shape[-1]] = dy
        dproducts[..., dy.shape[-1] :] = dy.transpose(1, 2)
        dproducts = dproducts.view(batch * users * users, -1)
        drows = dy.sum(2)
        dterms = torch.cat([drows, dy.sum(1), dy.diagonal(0, 1, 2).transpose(1, 2)], -1).view(batch * users, -1)
        dbias = drows.sum(1)
        dpools = (dterms @ node.t()).view(batch, users, 3 * width)
        dz = None
        if ctx.needs_input_grad[0]:
            dz = (dproducts @ edge.t()).view_as(z)
            drow = torch.add((dbias @ graph.t())[:, None] / users, dpools[..., :width]) / users
            dz += drow[:, :, None]
            dz += (dpools[:, None, :, width : 2 * width]) / users
            dz.diagonal(0, 1, 2).transpose(1, 2).add_(dpools[..., 2 * width :])
        dedge = z.view(-1, width).t() @ dproducts
        dnode = pools.view(-1, 3 * width).t() @ dterms
        return dz, dedge, dnode, mean.t() @ dbias, dbias.sum(0)


class EdgeLayer(nn.Module):
    """Linear map of edges z [B, K, K, fi] to [B, K, K, fo] that commutes with a permutation of the users.

    y_ij = We z_ij + Wt z_ji + Wr n_i + Wc n_j + Wg mean(z) + b + [i=j] Wd n_i, with the node's pools
    n_i = [mean_j z_ij, mean_j z_ji, z_ii]. Means, not sums: the layer is used with numbers of users that it was not
    trained for.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.edge = nn.Parameter(torch.randn(inputs, 2 * outputs) / math.sqrt(2 * inputs))
        self.node = nn.Parameter(torch.randn(3 * inputs, 3 * outputs) / math.sqrt(12 * inputs))
        self.graph = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(4 * inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, z: Tensor) -> Tensor:
        """[B, K, K, inputs] to [B, K, K, outputs]."""
        return _EdgeLinear.apply(z, self.edge, self.node, self.graph, self.bias)
