"""The values that the kernels exchange: parameters, their Adam moments, a sparse code, what one step reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor


class TopK(NamedTuple):
    """The k largest positive latent activations of every row, in no particular order.

    A slot whose value is 0 is unused: fewer than k latents were positive there. Its index is 0.
    """

    values: Float[Tensor, "row k"]
    indices: Int32[Tensor, "row k"]


class Parameters(NamedTuple):
    """The weights of one sparse autoencoder, float32. Row i of both matrices belongs to latent i."""

    W_enc: Float[Tensor, "latent d_model"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent d_model"]
    """Decoder directions, of unit norm."""
    b_pre: Float[Tensor, " d_model"]
    """Subtracted before the encoder, added after the decoder."""

    def zeros_like(self) -> Parameters:
        return Parameters(*(torch.zeros_like(tensor) for tensor in self))


class Moments(NamedTuple):
    """Adam's running means of the gradient (`first`) and of its square (`second`)."""

    first: Parameters
    second: Parameters


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from one training step to the next."""

    k: int
    """Latents that may be active on a row."""
    k_aux: int
    """Dead latents that the auxiliary loss may use on a row."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 6.25e-10


class StepResult(NamedTuple):
    """What one training step saw, before it changed the parameters."""

    loss: float
    """Mean squared error of the reconstruction, per element."""
    fvu: float
    """Fraction of the batch's variance that the reconstruction leaves unexplained."""
    aux_loss: float
    """Mean squared error of the dead latents' reconstruction of the residual, per element; 0 if none is dead."""
    fired: Bool[Tensor, " latent"]
    """Which latents were active on any row."""
    l0: float
    """Mean number of active latents on a row."""
