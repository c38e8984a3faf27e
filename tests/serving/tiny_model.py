"""A model of random weights, small enough for tests, and a plain forward pass that shares no code with xccl."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "vocab_size": 257,
    "hidden": 32,
    "num_layers": 3,
    "num_dense_layers": 1,
    "dense_ffn": 48,
    "num_experts": 6,
    "num_topk": 2,
    "expert_ffn": 16,
    "shared_ffn": 24,
    "num_heads": 2,
    "qk_nope_dim": 8,
    "qk_rope_dim": 4,
    "v_dim": 10,
    "kv_latent": 12,
    "rope_theta": 10000.0,
    "max_context": 256,
    "norm_eps": 1e-6,
    "eot_token": 0,
    "routed_scale": 1.5,
}


def byte_tokenizer() -> Tokenizer:
    """Byte-level without merges: a token is a byte, end of text is 0."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={"<eot>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_model(folder: Path, seed: int = 0) -> Path:
    """Write a model folder: config.json, model.safetensors with random weights, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_tensors(np.random.default_rng(seed)), folder / "model.safetensors")
    return folder


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    c = CONFIG
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int, scale: float = 1.0) -> None:
        tensors[name] = (rng.standard_normal(shape) * scale * shape[-2] ** -0.5).astype(np.float16)

    def norm(name: str, width: int) -> None:
        tensors[name] = (1 + 0.1 * rng.standard_normal(width)).astype(np.float16)

    def swiglu(prefix: str, *lead: int, width: int) -> None:
        matrix(f"{prefix}.gate.weight", *lead, c["hidden"], width)
        matrix(f"{prefix}.up.weight", *lead, c["hidden"], width)
        matrix(f"{prefix}.down.weight", *lead, width, c["hidden"])

    def block(prefix: str, dense: bool) -> None:
        d, heads = c["hidden"], c["num_heads"]
        norm(f"{prefix}.attn_norm.weight", d)
        norm(f"{prefix}.ffn_norm.weight", d)
        matrix(f"{prefix}.attn.q.weight", d, heads * (c["qk_nope_dim"] + c["qk_rope_dim"]))
        matrix(f"{prefix}.attn.kv_down.weight", d, c["kv_latent"] + c["qk_rope_dim"])
        norm(f"{prefix}.attn.kv_norm.weight", c["kv_latent"])
        matrix(f"{prefix}.attn.k_up.weight", c["kv_latent"], heads * c["qk_nope_dim"])
        matrix(f"{prefix}.attn.v_up.weight", c["kv_latent"], heads * c["v_dim"])
        matrix(f"{prefix}.attn.o.weight", heads * c["v_dim"], d)
        if dense:
            swiglu(f"{prefix}.ffn", width=c["dense_ffn"])
        else:
            matrix(f"{prefix}.router.weight", d, c["num_experts"], scale=2.0)
            tensors[f"{prefix}.router.bias"] = (0.05 * rng.standard_normal(c["num_experts"])).astype(np.float32)
            swiglu(f"{prefix}.experts", c["num_experts"], width=c["expert_ffn"])
            swiglu(f"{prefix}.shared", width=c["shared_ffn"])

    matrix("embed.weight", c["vocab_size"], c["hidden"], scale=c["vocab_size"] ** 0.5)
    matrix("head.weight", c["hidden"], c["vocab_size"], scale=3.0)
    norm("final_norm.weight", c["hidden"])
    for i in range(c["num_layers"]):
        block(f"layers.{i}", dense=i < c["num_dense_layers"])
    block("mtp.block", dense=False)
    for name in ("h_norm", "e_norm", "final_norm"):
        norm(f"mtp.{name}.weight", c["hidden"])
    matrix("mtp.proj.weight", 2 * c["hidden"], c["hidden"])
    return tensors


class PlainModel:
    """The same model written down naively in float64: dense cache, no absorption, one expert at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        self.w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
        self.c = json.loads((folder / "config.json").read_text())

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """Last layer's output [n, hidden] of one sequence."""
        x = self.w["embed.weight"][tokens]
        for i in range(self.c["num_layers"]):
            x = self.block(f"layers.{i}", x)
        return x

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self.norm(x, "final_norm") @ self.w["head.weight"]

    def mtp_logits(self, x: np.ndarray, next_tokens: np.ndarray) -> np.ndarray:
        embedded = self.w["embed.weight"][next_tokens]
        joined = np.concatenate([self.norm(x, "mtp.h_norm"), self.norm(embedded, "mtp.e_norm")], axis=1)
        y = self.block("mtp.block", joined @ self.w["mtp.proj.weight"])
        return self.norm(y, "mtp.final_norm") @ self.w["head.weight"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["norm_eps"]) * self.w[f"{name}.weight"]

    def block(self, prefix: str, x: np.ndarray) -> np.ndarray:
        x = x + self.attention(f"{prefix}.attn", self.norm(x, f"{prefix}.attn_norm"))
        h = self.norm(x, f"{prefix}.ffn_norm")
        if f"{prefix}.ffn.gate.weight" in self.w:
            return x + self.swiglu(h, *(self.w[f"{prefix}.ffn.{m}.weight"] for m in ("gate", "up", "down")))
        return x + self.moe(prefix, h)

    def swiglu(self, x, gate, up, down) -> np.ndarray:
        g = x @ gate
        return (g / (1 + np.exp(-g)) * (x @ up)) @ down

    def moe(self, prefix: str, x: np.ndarray) -> np.ndarray:
        out = self.swiglu(x, *(self.w[f"{prefix}.shared.{m}.weight"] for m in ("gate", "up", "down")))
        s = 1 / (1 + np.exp(-(x @ self.w[f"{prefix}.router.weight"])))
        ranking = np.argsort(-(s + self.w[f"{prefix}.router.bias"]), axis=1, kind="stable")
        experts = [self.w[f"{prefix}.experts.{m}.weight"] for m in ("gate", "up", "down")]
        for t in range(len(x)):
            chosen = ranking[t, : self.c["num_topk"]]
            weights = s[t, chosen] / s[t, chosen].sum() * self.c["routed_scale"]
            for e, weight in zip(chosen, weights, strict=True):
                out[t] += weight * self.swiglu(x[t], *(m[e] for m in experts))
        return out

    def attention(self, prefix: str, x: np.ndarray) -> np.ndarray:
        c, n = self.c, len(x)
        heads, nope, rope = c["num_heads"], c["qk_nope_dim"], c["qk_rope_dim"]
        q = (x @ self.w[f"{prefix}.q.weight"]).reshape(n, heads, nope + rope)
        kv = x @ self.w[f"{prefix}.kv_down.weight"]
        latent = self.norm(kv[:, : c["kv_latent"]], f"{prefix}.kv_norm")
        k = (latent @ self.w[f"{prefix}.k_up.weight"]).reshape(n, heads, nope)
        v = (latent @ self.w[f"{prefix}.v_up.weight"]).reshape(n, heads, c["v_dim"])
        k_rope = self.rotate(kv[:, None, c["kv_latent"] :])
        q_rope = self.rotate(q[..., nope:])
        scores = np.einsum("qhn,khn->hqk", q[..., :nope], k) + np.einsum("qhr,kr->hqk", q_rope, k_rope[:, 0])
        scores = scores / np.sqrt(nope + rope) + np.where(np.tri(n, dtype=bool), 0, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return np.einsum("hqk,khv->qhv", p, v).reshape(n, -1) @ self.w[f"{prefix}.o.weight"]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        n, dim = x.shape[0], x.shape[-1]
        angle = np.outer(np.arange(n), self.c["rope_theta"] ** (-np.arange(0, dim, 2) / dim))[:, None]
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        turned = pairs * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
