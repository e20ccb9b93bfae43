"""The sparse autoencoder's arithmetic: defined in `reference`; `step` puts a training step together from what `cpu` or
`gpu` provide. Here the device chooses once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from monosemy.kernels import cpu, reference, step
from monosemy.kernels.types import (
    ALONE,
    Activation,
    Decoder,
    Exchange,
    Moments,
    Parameters,
    StepResult,
    StepSettings,
    TopK,
)  # fmt: skip
from monosemy.runtime import one_thread

if TYPE_CHECKING:
    from monosemy.kernels.step import Kernels

__all__ = [
    "ALONE", "Activation", "Decoder", "Exchange", "Moments", "Parameters", "StepResult", "StepSettings", "TopK",
    "decode", "encode_topk", "fvu", "make_workspace", "train_step",
]  # fmt: skip


def kernels_for(tensor: Tensor) -> Kernels:
    """The kernels of the device that `tensor` is on."""
    if tensor.device.type == "cpu":
        return cpu
    from monosemy.kernels import gpu

    return gpu


def make_workspace(parameters: Parameters) -> Any:
    """What `train_step` keeps between steps of these parameters."""
    return kernels_for(parameters.W_enc).Workspace()  # pyright: ignore


def encode_topk(centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, norms: Tensor | None = None) -> TopK:
    """`reference.encode_topk`."""
    return kernels_for(W_enc).encode_topk(centred, W_enc, b_enc, k, norms)


def decode(code: TopK, W_dec: Tensor, bias: Tensor) -> Tensor:
    """`reference.decode`."""
    return kernels_for(W_dec).decode(code, W_dec, bias)  # pyright: ignore


def train_step(
    parameters: Parameters,
    moments: Moments,
    x: Tensor,
    dead: Tensor,
    settings: StepSettings,
    learning_rate: float,
    number: int,
    workspace: Any,
    target: Tensor | None = None,
    exchange: Exchange = ALONE,
) -> StepResult:
    """One training step, number `number` from 1. `relu` is not sparse before it is trained: it is trained densely.

    Raises `InputError` for rows that are not finite, before anything is changed.
    """
    step.check_finite(x, x if target is None else target)
    if settings.activation == "relu":
        return reference.train_step(parameters, moments, x, dead, settings, learning_rate, number, target)
    kernels = kernels_for(parameters.W_enc)
    with one_thread() if kernels is cpu else nullcontext():  # PyTorch's threads would spin where ours work
        return step.train_step(
            kernels, parameters, moments, x, dead, settings, learning_rate, number, workspace, target, exchange
        )


def fvu(
    parameters: Parameters,
    x: Tensor,
    settings: StepSettings,
    workspace: Any,
    target: Tensor | None = None,
    exchange: Exchange = ALONE,
) -> float:
    """Fraction of the variance of rows that their reconstruction leaves unexplained, as training would see it; all
    ranks give the same rows."""
    wanted = x if target is None else target
    if settings.activation == "relu":
        error = reference.squared_error(parameters, x, wanted, settings)
    else:
        kernels = kernels_for(parameters.W_enc)
        with one_thread() if kernels is cpu else nullcontext():
            error = step.squared_error(kernels, parameters, x, settings, workspace, target, exchange)
    return reference.fraction_unexplained(error, wanted)
