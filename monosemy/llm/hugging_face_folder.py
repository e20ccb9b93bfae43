"""Reads a Llama or Mistral from a Hugging Face folder: config.json and safetensors files, one or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from monosemy.llm.config_file import ConfigFile, rotary_divisors
from monosemy.llm.llama import LlamaConfig
from monosemy.llm.tokenizer import read_json
from monosemy.runtime import InputError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""What `llama.py` implements: `model_type` -> its one architecture."""

LLAMA_CONTEXT, MISTRAL_CONTEXT, MISTRAL_WINDOW = 2048, 131072, 4096
"""What a config.json means that does not say so, as in `transformers`."""


def is_llama(folder: Path) -> bool:
    """Whether `llama.py` implements the model in `folder`."""
    config = read_json(folder / "config.json")
    architecture = ARCHITECTURES.get(str(config.get("model_type", "llama")))
    return architecture is not None and config.get("architectures") in (None, [], [architecture])


def config_from_folder(folder: Path) -> LlamaConfig:
    """The model's shape, from config.json. Refuses by name what `llama.py` does not compute."""
    path = folder / "config.json"
    config = ConfigFile(read_json(path), str(path))
    mistral = config.get("model_type") == "mistral"
    config.refuse("quantization_config")
    config.refuse("hidden_act", "silu")
    d_model, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    head_dim = config.count("head_dim", max(1, d_model // n_heads))
    rope = _rope(config)
    theta = rope.number("rope_theta", 10000.0)
    return LlamaConfig(
        d_model=d_model,
        n_layers=config.count("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=config.count("num_key_value_heads", None if mistral else n_heads),
        head_dim=head_dim,
        d_mlp=config.count("intermediate_size"),
        vocabulary=config.count("vocab_size"),
        context_length=config.count("max_position_embeddings", MISTRAL_CONTEXT if mistral else LLAMA_CONTEXT),
        rope_theta=theta,
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        tied_embeddings=config.flag("tie_word_embeddings"),
        rope_divisors=rotary_divisors(rope, rope.get("rope_type", rope.get("type", "default")), head_dim, theta),
        attention_bias=not mistral and config.flag("attention_bias"),
        mlp_bias=not mistral and config.flag("mlp_bias"),
        sliding_window=_sliding_window(config, mistral),
    )


def _rope(config: ConfigFile) -> ConfigFile:
    """What config.json says of rotary positions: it has done so in three ways."""
    inner: Any = config.get("rope_scaling") or config.get("rope_parameters", {})
    if not isinstance(inner, dict):
        raise InputError(f"{config.source}: rope parameters {inner!r}; expected an object")
    said = {"rope_theta": config.get("rope_theta"), "partial_rotary_factor": config.get("partial_rotary_factor")}
    said |= {"original_max_position_embeddings": config.get("max_position_embeddings")}
    rope = ConfigFile(said | inner, config.source)
    rope.refuse("partial_rotary_factor", 1.0)
    return rope


def _sliding_window(config: ConfigFile, mistral: bool) -> int | None:
    """`transformers` slides in a Mistral, always, and never in a Llama; what says otherwise is refused."""
    if not mistral:
        config.refuse("sliding_window")
    no_window = not mistral or config.values.get("sliding_window", MISTRAL_WINDOW) is None
    window = None if no_window else config.count("sliding_window", MISTRAL_WINDOW)
    expected = "full_attention" if window is None else "sliding_attention"
    if other := set(config.get("layer_types", [])) - {expected}:
        raise InputError(
            f"{config.source}: layer_types {', '.join(map(str, sorted(other)))} with sliding_window = {window} "
            f"are not implemented; expected {expected} in every layer"
        )
    return window


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order. Raises `InputError` if one is missing."""
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder} has no {shard}: download the model's safetensors files there")
    return [folder / shard for shard in shards]


def folder_weights(folder: Path, tied: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every tensor of a folder's safetensors files, still in the mapped file; but those that others determine."""
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    determined = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
                    if not determined:
                        yield name, lambda file=file, name=name: file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path} is not a complete safetensors file ({error}): download it again") from error
