"""Any SAE: ours, or one that another library wrote, from a folder, a file or the Hugging Face Hub.

1. A Hub id becomes a folder: only the files that some format consists of are fetched.
2. The names of the files tell the format; `readers` knows what its tensors mean.
3. Pickles (`.pt`) are read with `weights_only`: one that wants to run code is refused.

    sae = load_sae("EleutherAI/sae-llama-3-8b-32x:layers.10")
    code = sae.encode(x)
    y = sae.decode(code)
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from monosemy.artifact import MANIFEST, read_tensors
from monosemy.llm.hub import fetch_files
from monosemy.llm.sites import Site
from monosemy.runtime import InputError, say
from monosemy.sae import readers
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.readers import Tensors

Format = Literal[
    "monosemy", "saelens", "sparsify", "dictionary_learning", "llamascopium", "llama_scope", "openai", "gemma_scope"
]

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?(?::(?P<place>[^:]+))?")
"""`org/name`, and where needed `@revision` and `:folder/in/it` or `:file/in/it`."""

FILES = {
    MANIFEST: "monosemy",
    "sae_weights.safetensors": "saelens",  # or llamascopium's, which has config.json rather than cfg.json
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
    "hyperparams.json": "llama_scope",
    "sae_weights.pt": "llamascopium",
    "params.npz": "gemma_scope",
}
"""The file that tells the format of a folder, in the order in which they are looked for."""

CONFIGS = ("cfg.json", "config.json", "sae.json", "activation_scaler.json")
WEIGHTS = ("checkpoints/final.safetensors",)
OURS = ("history.jsonl", "activity.parquet")
"""What else the manifest of an SAE names."""


def load_sae(source: str | Path, site: str | None = None, model: str | None = None) -> SAE:
    """The SAE at `source`, ready to encode and decode raw activations.

    Args:
        source: a folder or file of any of the formats in `Format`, or a Hub id such as `org/name`,
            `org/name:folder/in/it` or `org/name@revision:folder`.
        site: where in the model its activations are from, for formats that do not say; None: as the files say.
        model: the same for the model's name.

    Raises:
        InputError: there is no SAE, it is damaged or contradicts its config, or is of an architecture that monosemy
            does not know.
    """
    path = _local(str(source))
    try:
        sae = _read(path)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    changes = {"site": None if site is None else str(Site.parse(site)), "model": model}
    changes = {name: value for name, value in changes.items() if value is not None}
    return SAE(replace(sae.config, **changes), sae.parameters, sae.threshold)


def format_of(path: Path) -> Format:
    """Which format the folder or file at `path` is in. Raises `InputError` if it is none."""
    if path.is_dir():
        for name, known in FILES.items():
            if (path / name).exists():
                is_llamascopium = name == "sae_weights.safetensors" and not (path / "cfg.json").exists()
                return "llamascopium" if is_llamascopium else known  # pyright: ignore
        within = sorted({str(file.parent.relative_to(path)) for name in FILES for file in path.glob(f"*/{name}")})
        remedy = f"it has folders that hold one: {', '.join(within[:8])}" if within else "check the path"
        raise InputError(f"there is no SAE in this folder, none of {', '.join(FILES)}; {remedy}")
    match path.suffix:
        case ".npz":
            return "gemma_scope"
        case ".safetensors" if path.parent.name != "checkpoints":
            return format_of(path.parent)
        case ".safetensors":
            return "llama_scope"
        case ".pt" if _config_beside(path) is not None:
            return "dictionary_learning" if "trainer" in (_config_beside(path) or {}) else "llamascopium"
        case ".pt":
            return "openai"
    raise InputError(f"it ends in {path.suffix or 'nothing'}; an SAE's file ends in .safetensors, .pt or .npz")


def fingerprint(sae: SAE) -> str:
    """Identifies the weights of `sae`."""
    found = hashlib.sha256()
    for name, tensor in sae.named().items():
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _local(source: str) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    match = HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "/", "~")):
        raise InputError(f"there is no {source}: give a folder, a file, or a Hub id such as org/name:folder")
    repository, revision, place = match["repository"], match["revision"], match["place"]
    wanted = [*FILES, *CONFIGS, *WEIGHTS, *OURS]
    if place is not None:  # what is there, and what the folders above say about it
        place = Path(place.strip("/"))
        above = [str(folder / name) for folder in place.parents for name in (*CONFIGS, "hyperparams.json")]
        wanted = [str(place), *(str(place / name) for name in wanted), *above]
    folder = fetch_files(source, repository, revision, wanted, "SAE")
    found = folder if place is None else folder / place
    if not found.exists():
        raise InputError(f"{repository} has no {place} that an SAE could be read from: see its files on the Hub")
    return found


def _read(path: Path) -> SAE:
    if not path.exists():
        raise InputError("there is no such file or folder")
    known = format_of(path)
    folder = path if path.is_dir() else path.parent
    match known:
        case "monosemy":
            return open_sae(folder)
        case "saelens":
            scaler = _json(folder / "activation_scaler.json", {})
            tensors = Tensors(read_tensors(folder / "sae_weights.safetensors"))
            return readers.read_saelens(tensors, _json(folder / "cfg.json"), scaler.get("scaling_factor"))
        case "sparsify":
            tensors = Tensors(read_tensors(folder / "sae.safetensors"))
            run = _json(folder.parent / "config.json", {})
            return readers.read_sparsify(tensors, _json(folder / "cfg.json"), folder.resolve().name, run)
        case "dictionary_learning":
            return _read_dictionary_learning(path / "ae.pt" if path.is_dir() else path)
        case "llama_scope":
            folder = folder.parent if folder.name == "checkpoints" else folder
            config = _json(folder / "hyperparams.json")
            return readers.read_llama_scope(Tensors(read_tensors(folder / WEIGHTS[0])), config)
        case "llamascopium":
            return _read_llamascopium(folder)
        case "openai":
            return _read_openai(path)
        case "gemma_scope":
            return _read_gemma_scope(path / "params.npz" if path.is_dir() else path)


# ---------------------------------------------------------------------------------------------------------------------
# Formats that need a look at their content
# ---------------------------------------------------------------------------------------------------------------------


def _read_dictionary_learning(file: Path) -> SAE:
    content, config = read_pickle(file), _config_beside(file)
    if config is None:
        raise InputError("there is no config.json beside it that says what kind of dictionary it is")
    norm_factor = 1.0
    if "ae" in content:
        say(f"{file}: the backup of a training that was interrupted at step {content.get('step')}")
        norm_factor = float(content.get("norm_factor") or 1.0)
        content = content["ae"]
    return readers.read_dictionary_learning(Tensors(_only_tensors(content)), config, norm_factor)


def _read_llamascopium(folder: Path) -> SAE:
    file, config = folder / "sae_weights.safetensors", _json(folder / "config.json")
    content = read_tensors(file) if file.exists() else read_pickle(folder / "sae_weights.pt").get("sae")
    tensors = Tensors(_only_tensors(content or {}))
    if "encoder.weight" in tensors:  # Llama Scope R1-Distill
        return readers.read_llama_scope(tensors, config)
    return readers.read_llamascopium(tensors, config)


def _read_openai(file: Path) -> SAE:
    content = read_pickle(file)
    activation = str(content.pop("activation", "ReLU"))
    prefix = "activation_state_dict."
    state = content.pop("activation_state_dict", {}) or {}
    state |= {name.removeprefix(prefix): content.pop(name) for name in list(content) if name.startswith(prefix)}
    postact = str(state.get("postact_fn", "")).rsplit(".", 1)[-1].rstrip("'>()")
    k = state.get("k")
    return readers.read_openai(Tensors(_only_tensors(content)), activation, None if k is None else int(k), postact)


def _read_gemma_scope(file: Path) -> SAE:
    try:
        with np.load(file, allow_pickle=False) as content:
            tensors = {name: torch.from_numpy(content[name]) for name in content.files}
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file.name} is not a whole .npz file of numbers ({error}): download it again") from error
    layer = re.search(r"layer_(\d+)", str(file))
    return readers.read_gemma_scope(Tensors(tensors), f"layer {layer[1]}" if layer else "unknown")


def read_pickle(file: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file. Raises `InputError` if it is none, or would have to run code to be read."""
    import pickle
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a kind of pickle that torch does not write itself
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file.name} is a pickle that wants to run code, or is damaged, and was not read: save its tensors alone, "
            "with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file.name} is not a whole PyTorch file ({reason}): save or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file.name} holds a {type(content).__name__}; expected a dictionary of tensors")
    return content


def _only_tensors(content: Any) -> dict[str, Tensor]:
    """Raises `InputError` unless `content` maps names to tensors."""
    if not isinstance(content, dict):
        raise InputError(f"it holds a {type(content).__name__}; expected a dictionary of tensors")
    others = sorted(name for name, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise InputError(f"beside tensors it holds {', '.join(map(str, others))}: this is not a format monosemy knows")
    return content


def _config_beside(file: Path) -> dict[str, Any] | None:
    """The config.json beside `file`, or one folder up if it is among checkpoints."""
    for folder in (file.parent, file.parent.parent) if file.parent.name == "checkpoints" else (file.parent,):
        if (folder / "config.json").exists():
            return _json(folder / "config.json")
    return None


def _json(file: Path, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in `file`; `otherwise` if there is no such file and it may be missing."""
    if otherwise is not None and not file.exists():
        return otherwise
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file.name} cannot be read ({error}): it has to say what the tensors are") from error
    if not isinstance(content, dict):
        raise InputError(f"{file.name} holds a {type(content).__name__}; expected an object with the config")
    return content


assert {*FILES.values(), "openai"} == set(get_args(Format))
