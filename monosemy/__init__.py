"""monosemy: an open-weight Llama as a dictionary of named, tested, steerable features.

The public names are imported when they are first used, so that `import monosemy` is instant.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monosemy.activations.store import open_activations
    from monosemy.corpus import open_tokens
    from monosemy.latents.labels import open_labels
    from monosemy.latents.record import open_index
    from monosemy.llm.checkpoint import load_model
    from monosemy.llm.generate import Piece, generate, generate_text
    from monosemy.llm.sampling import SamplingSettings
    from monosemy.llm.sites import Site, Taps
    from monosemy.runtime import InputError
    from monosemy.sae.autoencoder import SAE
    from monosemy.sae.foreign import load_sae
    from monosemy.steer import Addition, steering

try:
    __version__ = version("monosemy")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.1.0.dev0"

_HOMES = {
    "Addition": "steer",
    "InputError": "runtime",
    "Piece": "llm.generate",
    "SAE": "sae.autoencoder",
    "SamplingSettings": "llm.sampling",
    "Site": "llm.sites",
    "Taps": "llm.sites",
    "generate": "llm.generate",
    "generate_text": "llm.generate",
    "load_model": "llm.checkpoint",
    "load_sae": "sae.foreign",
    "open_activations": "activations.store",
    "open_index": "latents.record",
    "open_labels": "latents.labels",
    "open_tokens": "corpus",
    "steering": "steer",
}

__all__ = [
    "SAE", "Addition", "InputError", "Piece", "SamplingSettings", "Site", "Taps", "generate", "generate_text",
    "load_model", "load_sae", "open_activations", "open_index", "open_labels", "open_tokens", "steering",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'monosemy' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"monosemy.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
