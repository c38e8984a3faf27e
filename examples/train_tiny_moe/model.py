"""The model in PyTorch: MLA attention, a mixture of experts and one multi-token-prediction (MTP) module.

Parameter names and layouts are those of the exported file: every matrix is stored [in, out], y = x @ W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """The shape of the model, as written to config.json."""

    vocab_size: int = 2048
    hidden: int = 128
    num_layers: int = 4
    num_dense_layers: int = 1
    dense_ffn: int = 256
    num_experts: int = 32
    num_topk: int = 4
    expert_ffn: int = 32
    shared_ffn: int = 64
    num_heads: int = 4
    qk_nope_dim: int = 16
    qk_rope_dim: int = 16
    v_dim: int = 32
    kv_latent: int = 48
    rope_theta: float = 10000.0
    max_context: int = 256
    norm_eps: float = 1e-6
    eot_token: int = 0
    routed_scale: float = 1.0


class Matrix(nn.Module):
    """A weight [..., in, out]; 1/sqrt(in) keeps the size of activations at the start."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * shape[-2] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [..., T, size] at positions 0 to T-1: pairs are neighbours (2j, 2j+1)."""
    length, size = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention: a token's keys and values come from one latent and one shared rope key."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = self.config = config
        self.q = Matrix(c.hidden, c.num_heads * (c.qk_nope_dim + c.qk_rope_dim))
        self.kv_down = Matrix(c.hidden, c.kv_latent + c.qk_rope_dim)
        self.kv_norm = Norm(c.kv_latent, c.norm_eps)
        self.k_up = Matrix(c.kv_latent, c.num_heads * c.qk_nope_dim)
        self.v_up = Matrix(c.kv_latent, c.num_heads * c.v_dim)
        self.o = Matrix(c.num_heads * c.v_dim, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (c.num_heads, -1)).transpose(1, 2)

        q_nope, q_rope = heads(self.q(x)).split([c.qk_nope_dim, c.qk_rope_dim], -1)
        latent, k_rope = self.kv_down(x).split([c.kv_latent, c.qk_rope_dim], -1)
        latent = self.kv_norm(latent)
        k_rope = rotate(k_rope, c.rope_theta)[:, None].expand(-1, c.num_heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, c.rope_theta)), -1)
        k = torch.cat((heads(self.k_up(latent)), k_rope), -1)
        out = F.scaled_dot_product_attention(q, k, heads(self.v_up(latent)), is_causal=True)
        return self.o(out.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = Matrix(hidden, width)
        self.up = Matrix(hidden, width)
        self.down = Matrix(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GroupedMatmul(torch.autograd.Function):
    """Rows in expert order times their expert's matrix.

    One autograd node, not one an expert: at these sizes the graph's overhead would exceed the arithmetic.
    float32, as counts change at every step and bfloat16 kernels are built anew for each new shape.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        out = rows.new_empty(rows.shape[0], weight.shape[-1])
        for x, w, y in zip(rows.split(counts), weight, out.split(counts), strict=True):
            torch.mm(x, w, out=y)
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        slices = (t.split(ctx.counts) for t in (rows, grad.contiguous(), grad_rows))
        for x, dy, dx, w, dw in zip(*slices, weight, grad_weight, strict=True):
            torch.mm(dy, w.T, out=dx)
            torch.mm(x.T, dy, out=dw)
        return grad_rows, grad_weight, None


class Permute(torch.autograd.Function):
    """Rows in another order; the gradient is the inverse permutation, not a scatter-add."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[order]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad[order.argsort()], None


class Router(nn.Module):
    """Sigmoid scores; the bias steers the choice of experts only, never their weights."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.hidden, config.num_experts) * config.hidden**-0.5)
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return experts [N, k] and their weights [N, k] for x [N, hidden]."""
        # float32 also under autocast: rounding would flip close choices.
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(x.float() @ self.weight)
        chosen = (scores.detach() + self.bias).topk(self.config.num_topk, -1).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.config.routed_scale


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = Norm(config.hidden, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = Norm(config.hidden, config.norm_eps)

    def feed_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class DenseBlock(Block):
    """A block whose feed-forward is one SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ffn = SwiGLU(config.hidden, config.dense_ffn)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


class MoEBlock(Block):
    """A block whose feed-forward is a set of routed experts plus one shared expert."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.router = Router(c)
        self.experts = nn.ModuleDict(
            {
                "gate": Matrix(c.num_experts, c.hidden, c.expert_ffn),
                "up": Matrix(c.num_experts, c.hidden, c.expert_ffn),
                "down": Matrix(c.num_experts, c.expert_ffn, c.hidden),
            }
        )
        self.shared = SwiGLU(c.hidden, c.shared_ffn)
        # The last forward's choice [B, T, k]: training moves the bias by it, evaluation counts the load.
        self.chosen = torch.empty(0, dtype=torch.long)

    def feed_forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, weights = self.router(flat)
        self.chosen = chosen.view(*x.shape[:2], -1)
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.config.num_experts).tolist()
        gate_up = torch.cat((self.experts["gate"].weight, self.experts["up"].weight), -1)
        # Each row k times, then permuted: the gradient is a sum and a permutation instead of a slow scatter.
        rows = Permute.apply(flat[:, None].expand(-1, chosen.shape[1], -1).flatten(0, 1), order)
        gate, up = GroupedMatmul.apply(rows, gate_up, counts).chunk(2, -1)
        rows = GroupedMatmul.apply(F.silu(gate) * up, self.experts["down"].weight, counts)
        slots = Permute.apply(rows, order.argsort()).view(*chosen.shape, -1)
        routed = (slots * weights[..., None]).sum(1)
        return self.shared(x) + routed.view_as(x)


class MTP(nn.Module):
    """From the last layer's output at i and the embedding of token i+1, the state that predicts token i+2."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.h_norm = Norm(config.hidden, config.norm_eps)
        self.e_norm = Norm(config.hidden, config.norm_eps)
        self.proj = Matrix(2 * config.hidden, config.hidden)
        self.block = MoEBlock(config)
        self.final_norm = Norm(config.hidden, config.norm_eps)

    def forward(self, h: Tensor, next_embedding: Tensor) -> Tensor:
        joined = torch.cat((self.h_norm(h), self.e_norm(next_embedding)), -1)
        return self.final_norm(self.block(self.proj(joined)))


class TinyMoE(nn.Module):
    """The language model; embedding and head are not tied."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(
            DenseBlock(config) if i < config.num_dense_layers else MoEBlock(config) for i in range(config.num_layers)
        )
        self.final_norm = Norm(config.hidden, config.norm_eps)
        self.head = Matrix(config.hidden, config.vocab_size)
        self.mtp = MTP(config)

    def forward(self, tokens: Tensor, next_tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits for token i+1 and, given the tokens at i+1, MTP's logits for token i+2.

        `tokens` and `next_tokens` are [B, T]; logits are [B, T, vocabulary].
        """
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        logits = self.head(self.final_norm(h))
        if next_tokens is None:
            return logits, None
        return logits, self.head(self.mtp(h, self.embed(next_tokens)))

    def moe_blocks(self) -> dict[str, MoEBlock]:
        """The MoE blocks by name, MTP's last."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoEBlock)}
