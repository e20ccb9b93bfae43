"""The kernels of `reference`, compiled for the CPU. Only the encoder product is dense; everything else is k rows.

1. Encode: a bfloat16 product in chunks of rows, into one buffer that is used again and again. Per row, the k-th
   largest of the maxima of blocks of 16 latents bounds the k-th largest activation from below (k blocks hold at least
   k entries that large), so only blocks that reach it are searched. The chosen values are computed anew in float32.
2. Forward: reconstruction, error, and d(loss)/d(activation) while the row's k decoder directions are in cache.
3. A counting sort brings the (row, slot) entries of one latent together.
4. Update: every latent is visited once. Its two gradient rows are summed from its entries, the decoder's is projected,
   Adam moves both with exact dense semantics (the moments of silent latents decay too), the direction returns to unit
   norm, and the bfloat16 copy for the next product is written. No dense gradient exists.

The auxiliary loss works on the dead latents' rows alone, as small dense products.

Every latent and every row is handled by one thread and in a fixed order, so results do not depend on the number of
threads. Compiled by numba, with no toolchain on the user's machine; threads are Python's, since the kernels release
the interpreter lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosemy.kernels import loops, reference
from monosemy.kernels.types import Moments, Parameters, StepResult, StepSettings, TopK
from monosemy.runtime import cpu_count

CHUNK_BYTES = 16 << 20
"""Size of the buffer that receives the encoder product: small enough for the last-level cache."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cpu_count())


def _in_parallel(kernel: Callable[..., object], n: int, *arguments: object) -> None:
    """Run kernel(start, stop, *arguments) over [0, n), one range of rows or latents per thread."""
    bounds = np.linspace(0, n, cpu_count() + 1).astype(int)
    jobs = [_pool().submit(kernel, int(a), int(b), *arguments) for a, b in itertools.pairwise(bounds) if b > a]
    for job in jobs:
        job.result()


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


class Workspace:
    """Buffers that survive from one call to the next, so that no step waits for fresh pages of memory."""

    def __init__(self) -> None:
        self.product: Tensor | None = None
        self.W_enc_bfloat16: Tensor | None = None

    def product_buffer(self, n_rows: int, n_latents: int, dtype: torch.dtype) -> Tensor:
        rows = max(1, min(n_rows, CHUNK_BYTES // (n_latents * dtype.itemsize)))
        buffer = self.product
        if buffer is None or buffer.shape[1] != n_latents or buffer.dtype != dtype or len(buffer) < rows:
            self.product = buffer = torch.empty(rows, n_latents, dtype=dtype)
        return buffer


def encode_topk(
    x: Float[Tensor, "row d_model"],
    W_enc: Float[Tensor, "latent d_model"],
    b_enc: Float[Tensor, " latent"],
    b_pre: Float[Tensor, " d_model"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> TopK:
    """The k largest latent activations of every row, negative ones as 0: see `reference.encode_topk`."""
    return _encode((x - b_pre).float().contiguous(), W_enc, W_enc.to(dtype), b_enc, k, Workspace())


def _encode(centred: Tensor, W_enc: Tensor, W_selecting: Tensor, b_enc: Tensor, k: int, workspace: Workspace) -> TopK:
    """`centred` is x - b_pre; `W_selecting` is W_enc in the precision of the product that selects."""
    n_rows, n_latents = len(centred), len(W_enc)
    chosen = torch.empty(n_rows, k, dtype=torch.int32)
    values = torch.empty(n_rows, k)
    buffer = workspace.product_buffer(n_rows, n_latents, W_selecting.dtype)
    for start in range(0, n_rows, len(buffer)):
        rows = slice(start, min(start + len(buffer), n_rows))
        product = buffer[: rows.stop - rows.start]
        torch.mm(centred[rows].to(W_selecting.dtype), W_selecting.T, out=product)
        select, numbers = loops.select_float32, product
        if product.dtype == torch.bfloat16:
            select, numbers = loops.select_bfloat16, _bits(product)
        _in_parallel(select, len(product), np.asarray(numbers), b_enc.numpy(), k, chosen[rows].numpy())
    arrays = (centred.numpy(), W_enc.numpy(), b_enc.numpy(), chosen.numpy(), values.numpy())
    _in_parallel(loops.values_of_chosen, n_rows, *arrays)
    return TopK(values, chosen)


def decode(
    code: TopK, W_dec: Float[Tensor, "latent d_model"], b_pre: Float[Tensor, " d_model"]
) -> Float[Tensor, "row d_model"]:
    """The reconstruction: see `reference.decode`."""
    out = torch.empty(len(code.values), W_dec.shape[1])
    arrays = (code.values.numpy(), code.indices.numpy(), W_dec.numpy(), b_pre.numpy(), out.numpy())
    _in_parallel(loops.decode_rows, len(out), *arrays)
    return out


class DeadGradient:
    """The auxiliary loss and its gradient, which touches the dead latents' rows only (and b_enc, b_pre)."""

    def __init__(
        self,
        parameters: Parameters,
        centred: Tensor,
        residual: Tensor,
        dead: Bool[Tensor, " latent"],
        settings: StepSettings,
    ) -> None:
        width = centred.shape[1]
        self.rows = dead.nonzero().squeeze(1) if settings.k_aux else torch.empty(0, dtype=torch.long)
        self.slot = torch.full((len(dead),), -1, dtype=torch.int32)
        self.loss, self.W_enc, self.W_dec = 0.0, torch.empty(0, width), torch.empty(0, width)
        self.b_enc = torch.zeros(len(dead))
        if len(self.rows) == 0:
            return
        self.slot[self.rows] = torch.arange(len(self.rows), dtype=torch.int32)
        encoder, directions = parameters.W_enc[self.rows], parameters.W_dec[self.rows]
        active = torch.addmm(parameters.b_enc[self.rows], centred, encoder.T)
        if len(self.rows) > settings.k_aux:
            kth = active.kthvalue(len(self.rows) - settings.k_aux + 1, dim=1, keepdim=True).values
            active = torch.where(active >= kth, active, 0.0)
        active = active.relu_()
        error = torch.addmm(residual, active, directions, beta=-1)
        self.loss = error.square().mean().item()
        weight = settings.aux_weight * reference.aux_scale(dead, settings)
        error *= 2 * weight / error.numel()
        to_active = (error @ directions.T) * (active > 0)
        self.W_dec = active.T @ error
        self.W_enc = to_active.T @ centred
        self.b_enc[self.rows] = to_active.sum(dim=0)


def _adam_numbers(settings: StepSettings, learning_rate: float, step: int) -> tuple[np.float32, ...]:
    beta1, beta2 = settings.beta1, settings.beta2
    rate = learning_rate / (1 - beta1**step)
    numbers = (1 - beta1, beta2, 1 - beta2, rate, (1 - beta2**step) ** 0.5, settings.epsilon)
    return tuple(np.float32(number) for number in numbers)


def train_step(
    parameters: Parameters,
    moments: Moments,
    x: Float[Tensor, "row d_model"],
    dead: Bool[Tensor, " latent"],
    settings: StepSettings,
    learning_rate: float,
    step: int,
    workspace: Workspace | None = None,
) -> StepResult:
    """One training step, as `reference.train_step`; a `workspace` kept between calls saves time.

    Of equal activations at the k-th place the lowest latents are taken, and selection rounds the product to bfloat16;
    otherwise the result is the reference's within float32 rounding.
    """
    workspace = workspace or Workspace()
    W_enc, b_enc, W_dec, b_pre = parameters
    if workspace.W_enc_bfloat16 is None:
        workspace.W_enc_bfloat16 = W_enc.bfloat16()
    x = x.float().contiguous()
    centred = x - b_pre
    values, indices = _encode(centred, W_enc, workspace.W_enc_bfloat16, b_enc, settings.k, workspace)
    error, value_gradient = torch.empty_like(x), torch.empty_like(values)
    code = (values.numpy(), indices.numpy())
    _in_parallel(
        loops.error_and_value_gradient, len(x),
        x.numpy(), *code, W_dec.numpy(), b_pre.numpy(), error.numpy(), value_gradient.numpy(),
    )  # fmt: skip
    auxiliary = DeadGradient(parameters, centred, -error, dead, settings)
    starts, entries = loops.sort_by_latent(*code, len(b_enc))

    squared_error = error.square().sum().item()
    variance = (x - x.mean(dim=0)).square().sum().item()
    result = StepResult(
        loss=squared_error / x.numel(),
        fvu=squared_error / variance if variance else float("nan"),
        aux_loss=auxiliary.loss,
        fired=torch.from_numpy(np.diff(starts) > 0),
        l0=len(entries) / len(x),
    )
    scale = 2 / x.numel()
    reconstruction_gradient = scale * error.sum(dim=0)
    activity = torch.bincount(indices.flatten(), weights=value_gradient.flatten(), minlength=len(b_enc))
    b_enc_gradient = auxiliary.b_enc + scale * activity
    # b_pre enters as -b_pre before the encoder, where every pre-activation sees it, and as +b_pre after the decoder.
    b_pre_gradient = reconstruction_gradient - b_enc_gradient @ W_enc
    adam = _adam_numbers(settings, learning_rate, step)
    first, second = moments
    _in_parallel(
        loops.update_latents, len(b_enc),
        starts, entries, settings.k, values.numpy(), value_gradient.numpy(), centred.numpy(), error.numpy(),
        np.float32(scale), auxiliary.slot.numpy(), auxiliary.W_enc.numpy(), auxiliary.W_dec.numpy(),
        W_enc.numpy(), W_dec.numpy(), first.W_enc.numpy(), second.W_enc.numpy(), first.W_dec.numpy(),
        second.W_dec.numpy(), *adam, _bits(workspace.W_enc_bfloat16),
    )  # fmt: skip
    for weight, gradient, m, v in (
        (b_enc, b_enc_gradient, first.b_enc, second.b_enc),
        (b_pre, b_pre_gradient, first.b_pre, second.b_pre),
    ):
        loops.adam(weight.numpy(), m.numpy(), v.numpy(), gradient.numpy(), *adam)
    return result
