"""The model gives the logits of `transformers`, over the whole grid of options that a Llama or Mistral may have; with a
cache, padded or packed, it gives what it gives without."""

import copy
import json
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from monosemy.llm import checkpoint
from monosemy.llm.hugging_face_folder import config_from_folder
from monosemy.llm.llama import Llama
from monosemy.llm.model import LanguageModel
from monosemy.runtime import InputError

load_model = partial(checkpoint.load_model, device="cpu")

VOCABULARY, LENGTH = 97, 23
IDS = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 300.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

OPTIONS = some.fixed_dictionaries(
    {
        "kind": some.sampled_from(["llama", "llama", "mistral"]),
        "num_key_value_heads": some.sampled_from([1, 2, 4]),
        "head_dim": some.sampled_from([None, 10]),
        "tie_word_embeddings": some.booleans(),
        "attention_bias": some.booleans(),
        "mlp_bias": some.booleans(),
        "sliding_window": some.sampled_from([5, 22, 40, None]),
        "rope": some.sampled_from(list(ROPES)),
        "dtype": some.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    }
)


def reference(options: dict[str, Any]) -> Any:
    """A random model of `transformers` with those options, float32, rounded to the dtype that it is stored in."""
    import transformers

    options = dict(options)
    kind, dtype = options.pop("kind"), options.pop("dtype")
    names = ("sliding_window",) if kind == "llama" else ("attention_bias", "mlp_bias")
    rope = dict(ROPES[options.pop("rope")])
    options = {name: value for name, value in options.items() if name not in names} | {"rope_parameters": rope}
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
    name = kind.capitalize()
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, rms_norm_eps=1e-5, **shape, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        else:
            weight.data.normal_(std=0.3)
        weight.data = weight.data.to(dtype).float()
    return model.eval()


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # a copy: it rounds the rotary frequencies, too
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(OPTIONS)
def test_logits_over_the_grid(options: dict[str, Any]):
    model = reference(options)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours = load_model(save(model, Path(folder), options["dtype"]), dtype="float32")
        assert isinstance(ours, Llama)
        assert_close(ours(IDS), model(IDS).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Caches, padding, packing
# ---------------------------------------------------------------------------------------------------------------------

WAYS = {
    "plain": {"kind": "llama", "attention_bias": True, "mlp_bias": True},
    "window": {"kind": "mistral", "sliding_window": 5},
    "llama3": {"kind": "llama", "rope": "llama3", "tie_word_embeddings": True},
}


@cache
def loaded(way: str) -> LanguageModel:
    options = {"num_key_value_heads": 2, "rope": "default", "dtype": torch.float32} | WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        return load_model(save(reference(options), Path(folder)), dtype="float32")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [[LENGTH - 1, 1], [1] * LENGTH, [9, 1, 1, 7, 5]], ids=str)
def test_a_cache_changes_nothing(way: str, steps: list[int]):
    model = loaded(way)
    kept, done, logits = model.make_cache(len(IDS), LENGTH), 0, []
    for step in steps:
        logits.append(model(IDS[:, done : done + step], cache=kept))
        done += step
    assert_close(torch.cat(logits, dim=1), model(IDS))


@pytest.mark.parametrize("way", WAYS)
def test_padding_changes_nothing(way: str):
    model, lengths = loaded(way), (LENGTH, 9, 1)
    alone = [model(IDS[number : number + 1, :length])[0] for number, length in enumerate(lengths)]
    right, left = torch.zeros_like(IDS), torch.zeros_like(IDS)
    mask = torch.zeros_like(IDS, dtype=torch.bool)
    for number, length in enumerate(lengths):
        right[number, :length] = left[number, LENGTH - length :] = IDS[number, :length]
        mask[number, LENGTH - length :] = True
    after, before, cached = model(right), model(left, mask=mask), model.make_cache(len(IDS), LENGTH)
    model(left[:, :-4], mask=mask[:, :-4], cache=cached)
    last = model(left[:, -4:], mask=mask[:, -4:], cache=cached)
    packed = model(
        torch.cat([IDS[number, :length] for number, length in enumerate(lengths)])[None], lengths=torch.tensor(lengths)
    )
    for number, (length, expected) in enumerate(zip(lengths, alone, strict=True)):
        assert_close(after[number, :length], expected)
        assert_close(before[number, LENGTH - length :], expected)
        assert_close(last[number, -min(4, length) :], expected[-4:])
        start = sum(lengths[:number])
        assert_close(packed[0, start : start + length], expected)


# ---------------------------------------------------------------------------------------------------------------------
# What config.json leaves out, and dtypes that `transformers` does not write
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mistral_slides_unless_told_otherwise(tmp_path: Path):
    options = {"kind": "mistral", "num_key_value_heads": 2, "sliding_window": 7, "rope": "default"}
    folder = save(reference(options | {"dtype": torch.float32}), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    assert config_from_folder(folder).sliding_window == 4096
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert config_from_folder(folder).sliding_window is None
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention", "sliding_attention"]}))
    with pytest.raises(InputError, match="layer_types full_attention with sliding_window = 4096 are not implemented"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_on_disk(tmp_path: Path, dtype: torch.dtype):
    model = reference({"kind": "llama", "rope": "default", "dtype": torch.float32})
    model.load_state_dict({name: weight.to(dtype).float() for name, weight in model.state_dict().items()})
    folder = save(model, tmp_path)
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert_close(load_model(folder, dtype="float32")(IDS), model(IDS).logits)
