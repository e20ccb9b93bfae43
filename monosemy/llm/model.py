"""What every stage may ask of the model under study, whoever implements it.

1. `llama.Llama`: our own Llama.
2. `hugging_face.HuggingFaceModel`: any other decoder, run by `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from monosemy.llm.sites import Site, Taps
from monosemy.llm.tokenizer import Tokenizer


@runtime_checkable
class ModelShape(Protocol):
    """What the stages ask of a model's configuration."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def context_length(self) -> int: ...


@runtime_checkable
class LanguageModel(Protocol):
    """A decoder on a residual stream; `llama.Llama` documents what the methods take and give."""

    tokenizer: Tokenizer
    name: str
    fingerprint: str

    @property
    def config(self) -> ModelShape: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        ...

    @property
    def unembedding(self) -> Any:
        """Its `weight` is (token, d_model)."""
        ...

    def __call__(
        self,
        ids: Int[Tensor, "batch position"],
        taps: Taps | None = None,
        mask: Bool[Tensor, "batch position"] | None = None,
        cache: Any = None,
        lengths: Int[Tensor, " text"] | None = None,
    ) -> Float[Tensor, "batch position vocabulary"]: ...

    def embed(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_model"]: ...

    def run_layers(
        self,
        hidden: Float[Tensor, "batch position d_model"],
        start: int = 0,
        end: int | None = None,
        taps: Taps | None = None,
        mask: Bool[Tensor, "batch position"] | None = None,
        cache: Any = None,
        lengths: Int[Tensor, " text"] | None = None,
    ) -> Float[Tensor, "batch position d_model"]: ...

    def unembed(
        self, hidden: Float[Tensor, "batch position d_model"]
    ) -> Float[Tensor, "batch position vocabulary"]: ...

    def make_cache(self, batch: int, capacity: int) -> Any:
        """For `run_layers` of the same model; `length` counts its positions, and `select(rows)` keeps some texts."""
        ...


Config = TypeVar("Config")


def resolved(config: Config, model: LanguageModel) -> Config:
    """A stage's `config` with the dtype that `auto` became: it decides the numbers, so it is recorded."""
    return replace(config, dtype=str(model.dtype).removeprefix("torch."))  # type: ignore[type-var]


def check_sites(model: LanguageModel, sites: Iterable[Site]) -> None:
    """Raise `InputError` unless `model` has all of `sites`."""
    # A pass refuses what it does not have before it runs anything, and this one has nothing to run.
    model.run_layers(model.embed(torch.zeros(1, 1, dtype=torch.long)), end=0, taps=Taps(reads=sites))
