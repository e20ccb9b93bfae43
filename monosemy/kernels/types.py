"""The values that the kernels exchange: parameters, Adam's moments, sparse codes, what a step asks and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

Activation = Literal["topk", "batch_topk", "relu"]
Decoder = Literal["unit", "free"]


class TopK(NamedTuple):
    """The k largest positive latent activations of every row, in ascending order of latent.

    A slot whose value is 0 is unused: fewer than k latents were positive there. Its index is 0.
    """

    values: Float[Tensor, "row k"]
    indices: Int32[Tensor, "row k"]


class Entries(NamedTuple):
    """A sparse code with as many latents per row as there are: those of row r are row_starts[r]:row_starts[r + 1]."""

    row_starts: Int[Tensor, " row_and_end"]
    latents: Int32[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    """All positive."""

    @property
    def rows(self) -> Int[Tensor, " entry"]:
        """The row of every entry."""
        numbers = torch.arange(len(self.row_starts) - 1, device=self.values.device)
        return torch.repeat_interleave(numbers, self.row_starts.diff(), output_size=len(self.latents))


class Parameters(NamedTuple):
    """The weights of one sparse autoencoder or transcoder, float32. Row i of both matrices belongs to latent i."""

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d_out"]
    """Decoder directions; of unit norm, unless the decoder is free."""
    b_pre: Float[Tensor, " d_in"]
    """Subtracted before the encoder."""
    b_dec: Float[Tensor, " d_out"] | None = None
    """Added after the decoder (a transcoder's); None: `b_pre` is (an autoencoder's)."""
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    """A linear path around the latents, applied to x - b_pre; None: there is none."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Parameters:
        """`function` of every tensor that is there."""
        return Parameters(*(None if tensor is None else function(tensor) for tensor in self))  # pyright: ignore

    def zeros_like(self) -> Parameters:
        return self.map(torch.zeros_like)

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor of those that are there."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    @property
    def output_bias(self) -> Float[Tensor, " d_out"]:
        return self.b_pre if self.b_dec is None else self.b_dec


class Moments(NamedTuple):
    """Adam's running means of the gradient (`first`) and of its square (`second`)."""

    first: Parameters
    second: Parameters


@dataclass(frozen=True)
class StepSettings:
    """The objective and the optimiser of a training step; docs/objective.md has the formulas."""

    k: int
    """Latents that may be active on a row; with `batch_topk`, on a row on average."""
    k_aux: int
    """Dead latents that the auxiliary loss may use on a row."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    activation: Activation = "topk"
    """Which latents are active: the k largest of a row, the k x rows largest of a batch, or all that are positive."""
    decoder: Decoder = "unit"
    """`unit`: decoder directions of norm 1. `free`: any norm, and latents are ranked by activation x norm."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: sizes of the nested dictionaries, ascending, the last one all latents. Empty: all latents, once."""
    l1: float = 0.0
    """Weight of the sum of a row's activations x decoder norms, beside its squared error (with `relu`)."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 6.25e-10
    weight_decay: float = 0.0
    """AdamW's: weights shrink by learning rate x this at every step."""


class StepResult(NamedTuple):
    """What one training step saw, before it changed the parameters."""

    loss: float
    """Mean squared error of the reconstruction, per element; with `prefixes`, the mean over them."""
    fvu: float
    """Fraction of the batch's variance that the reconstruction by all latents leaves unexplained."""
    aux_loss: float
    """Mean squared error of the dead latents' reconstruction of the residual, per element; 0 if none is dead."""
    counts: Int[Tensor, " latent"]
    """On how many rows each latent was active."""
    l0: float
    """Mean number of active latents on a row."""


@runtime_checkable
class Exchange(Protocol):
    """What ranks tell each other inside a step. Each holds a shard of the latents, and a replica of it works on other
    rows; all ranks of a replica see the same rows."""

    shard: int
    """Number of this shard."""
    first_latent: int
    """Number of its first latent among all."""

    def sum_shards(self, tensor: Tensor) -> Tensor:
        """The sum over all shards, the same bits on all; may change `tensor`."""
        ...

    def gather_shards(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` of every shard, in the order of latents."""
        ...

    def gather_replicas(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` of every replica, in the order of rows; they may differ in length along dimension 0."""
        ...


class Alone:
    """The exchange of a single process."""

    shard = 0
    first_latent = 0

    def sum_shards(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_shards(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def gather_replicas(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


ALONE = Alone()
