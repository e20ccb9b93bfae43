"""GGUF files: headers, every quantisation, and models that have what SmolLM2's file does not."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter

from monosemy.llm import checkpoint
from monosemy.llm.checkpoint import find_source, load_tokenizer
from monosemy.llm.gguf_file import NAMES, GGUFFile
from monosemy.llm.llama import Llama, LlamaConfig, random_llama
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

load_model = partial(checkpoint.load_model, device="cpu")

IDS = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(1))
CONFIG = LlamaConfig(
    d_model=36,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=10,
    d_mlp=56,
    vocabulary=400,
    context_length=256,
    rope_theta=500.0,
    norm_epsilon=2.0**-17,
    tied_embeddings=False,
)
"""Odd in every number."""


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_header_equals_the_gguf_library_s(tmp_path: Path):
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "日本", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_float64("half", 0.5)
    writer.add_bool("yes", True)
    writer.add_tensor("m", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("h", np.arange(5, dtype=np.float16))
    writer.add_tensor("d", np.arange(6, dtype=np.float64).reshape(1, 2, 3))
    finish(writer)
    ours, theirs = GGUFFile(path), GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents()
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensor(tensor.name).numpy(), tensor.data)


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation
# ---------------------------------------------------------------------------------------------------------------------

DEQUANTIZED = [kind for kind in Kind if kind in gguf.quants._type_traits]
"""All that the library can undo."""


def random_blocks(kind: Kind, random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Rows of that kind: quantised where the library can, or else any bytes that are finite."""
    try:
        return gguf.quants.quantize(random.normal(size=(rows, columns)).astype(np.float32), kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # Below 0x3C, no byte makes a half-precision scale infinite.
        return random.integers(0, 0x3C, (rows, columns // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_quantisations(tmp_path: Path, kind: Kind):
    blocks = random_blocks(kind, np.random.default_rng(kind), 5, 512)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    finish(writer)
    tensor = GGUFFile(tmp_path / "x.gguf").tensor("x")
    assert tensor.shape == (5, 512)
    assert np.array_equal(tensor.float().numpy(), gguf.quants.dequantize(blocks, kind))
    assert tensor.isfinite().all()


def test_the_grid_of_quantisations_is_whole():
    names = {kind.name for kind in DEQUANTIZED}
    assert names >= {"BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}


def test_a_quantisation_that_cannot_be_undone(tmp_path: Path):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", np.zeros((1, 292), np.uint8), raw_dtype=Kind.Q8_K)
    finish(writer)
    with pytest.raises(InputError, match="tensor x is quantised as Q8_K, which cannot be undone here: use another"):
        GGUFFile(tmp_path / "x.gguf").tensor("x")


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter orders the rows of queries and keys."""
    return rows.view(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def write_model(path: Path, model: Llama, kind: Kind = Kind.F32, **metadata: Any) -> Path:
    """`model` as a GGUF file with the first tokens of SmolLM2's vocabulary."""
    config, words = model.config, {theirs: ours for ours, theirs in NAMES.items()}
    smollm2 = GGUFFile(find_source("smollm2").path).metadata
    tokens = smollm2["tokenizer.ggml.tokens"][: config.vocabulary]
    merges = [merge for merge in smollm2["tokenizer.ggml.merges"][:400] if merge.replace(" ", "") in tokens]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    for key, value in metadata.items():
        key = "llama." + key.replace("__", ".")
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key, value)
    if config.rope_divisors is not None and "rope__scaling__type" not in metadata:
        writer.add_tensor("rope_freqs.weight", np.array(config.rope_divisors, dtype=np.float32))
    for name, weight in model.named_weights().items():
        parts = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert parts is not None
        layer, part, which = parts.groups()
        heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}.get(part)
        data = (interleaved(weight, heads) if heads else weight).contiguous().numpy()
        prefix = "" if layer is None else f"blk.{layer}."
        stored = kind if data.ndim == 2 else Kind.F32
        writer.add_tensor(f"{prefix}{words[part]}.{which}", gguf.quants.quantize(data, stored), raw_dtype=stored)
    finish(writer)
    return path


def variant(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG.__dict__, **changes})


@pytest.mark.parametrize(
    ("changes", "metadata"),
    [
        ({}, {}),
        ({"rope_divisors": (1.0, 1.0, 2.0, 5.0, 8.0)}, {}),
        ({"rope_divisors": (4.0,) * 5}, {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
        ({"rope_divisors": (4.0,) * 5}, {"rope__scaling__type": "linear", "rope__scale_linear": 4.0}),
        ({"attention_bias": True, "mlp_bias": True}, {}),
        ({"sliding_window": 3, "tied_embeddings": True}, {"attention__sliding_window": 3}),
    ],
    ids=["plain", "llama3", "linear", "old-linear", "biases", "mistral-tied"],
)
def test_models(tmp_path: Path, changes: dict[str, Any], metadata: dict[str, Any]):
    model = random_llama(variant(**changes))
    ours = load_model(write_model(tmp_path / "odd.gguf", model, **metadata), dtype="float32")
    assert ours.config == model.config
    assert ours.name == "odd"
    torch.testing.assert_close(ours(IDS), model(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "error"), [(Kind.F16, 1e-3), (Kind.BF16, 1e-2), (Kind.Q8_0, 0.03), (Kind.Q4_0, 0.4)])
def test_stored_dtypes(tmp_path: Path, kind: Kind, error: float):
    model = random_llama(variant(d_model=64, head_dim=16, d_mlp=96))
    ours = load_model(write_model(tmp_path / "x.gguf", model, kind), dtype="float32")
    assert 0 < (ours(IDS) - model(IDS)).norm() < error * model(IDS).norm()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, "rope scaling 'yarn' is not implemented"),
        ({"expert_count": 8}, r"llama\.expert_count = 8 is not implemented; use a model without it"),
        ({"vocab_size": 500}, r"embed_tokens\.weight has shape \(400, 36\); the configuration says \(500, 36\)"),
    ],
)
def test_models_that_are_not_implemented(tmp_path: Path, metadata: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        load_model(write_model(tmp_path / "x.gguf", random_llama(CONFIG), **metadata))


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma", {}, "architecture 'gemma' is not implemented; expected 'llama'"),
        ("llama", {"embedding_length": 64}, r"does not say llama\.attention\.head_count"),
        ("llama", {"embedding_length": 64, "attention.head_count": 4, "rope.dimension_count": 8}, "= 8 .* expected 16"),
        ("llama", {"embedding_length": [64, 64]}, r"embedding_length = \[64, 64\]; expected a whole number"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, architecture: str, metadata: dict[str, Any], message: str):
    writer = GGUFWriter(tmp_path / "x.gguf", architecture)
    for key, value in metadata.items():
        writer.add_array(f"llama.{key}", value) if isinstance(value, list) else writer.add_uint32(f"llama.{key}", value)
    finish(writer)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "x.gguf")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 100_000, 30_000_000])
def test_truncated(tmp_path: Path, size: int):
    path = tmp_path / "cut.gguf"
    with find_source("smollm2").path.open("rb") as file:
        path.write_bytes(file.read(size))
    message = "its header breaks off" if size < 1_000_000 else r"is truncated: tensor .* but the file has 30,000,000"
    with pytest.raises(InputError, match=f"{message}; download it again"):
        load_model(path)


def test_not_a_gguf(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load_tokenizer(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little"))
    with pytest.raises(InputError, match="has GGUF version 9; expected 2 or 3"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load_tokenizer(path)
