"""What `step.Kernels` asks of a device, on the CPU. Only the encoder product is dense; everything else is k rows.

Encode, for a part of the rows at a time, so that a thread's product stays in cache:

1. A product in low precision: int8 where the processor multiplies bytes, else bfloat16 or float32. Every row of either
   factor is scaled by its own largest element.
2. The k + MARGIN largest of the row. The m-th largest of the maxima of disjoint blocks bounds the m-th largest element
   from below (m blocks hold at least m elements that large), so only blocks that reach it are searched.
3. The activations of those candidates in float32, and of these the k largest. So the rounding of step 1 matters only if
   it moves a latent by more than MARGIN places; docs/log.md has how often that happens.

Every latent and every row is handled by one thread and in a fixed order, so results do not depend on the number of
threads. Compiled by numba, with no toolchain on the user's machine; threads are Python's, since the kernels release
the interpreter lock, and each multiplies on its own: the threads of one shared product would spin while others select.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from monosemy.kernels import loops
from monosemy.kernels.step import AdamNumbers, Contributions, DenseRows
from monosemy.kernels.types import Entries, Moments, Parameters, TopK
from monosemy.runtime import cpu_count, keep_freed_memory

PRODUCT_BYTES = 16 << 20
"""Size of a thread's buffer for the encoder product: small enough for the last-level cache."""

FEWEST_ROWS = 128
"""Rows of such a product, at least: every product reads and rearranges all of W_enc."""

MARGIN = 8
"""Candidates beyond k of which the exact activation is computed when the product is of low precision."""

LATENT_COST = 8
"""What the update of a latent costs beside its entries, in entries."""

Precision = Literal["int8", "bfloat16", "float32"]


def fastest_precision() -> Precision:
    """The cheapest product that this processor has instructions for."""
    has = torch.cpu.get_capabilities()
    if has.get("avx512_vnni") or has.get("amx_int8"):
        return "int8"
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


@cache
def _pool() -> ThreadPoolExecutor:
    keep_freed_memory()
    return ThreadPoolExecutor(cpu_count(), "kernels", initializer=lambda: torch.set_num_threads(1))


def _in_parallel(kernel: Callable[..., object], bounds: Int[np.ndarray, " bound"], *arguments: object) -> None:
    """Run kernel(start, stop, *arguments) for every range between neighbouring bounds, one per thread."""
    jobs = [_pool().submit(kernel, int(a), int(b), *arguments) for a, b in itertools.pairwise(bounds) if b > a]
    for job in jobs:
        job.result()


def _even(n: int) -> Int[np.ndarray, " bound"]:
    return np.linspace(0, n, cpu_count() + 1).astype(int)


class Workspace:
    """What survives from one step to the next: W_enc in the precision of the product that chooses candidates."""

    def __init__(self, precision: Precision | None = None) -> None:
        """`precision` None: the fastest."""
        self.precision: Precision = precision or fastest_precision()
        self.W_enc: Tensor | None = None
        """int8, bfloat16, or the float32 weights themselves."""
        self.scales: Float[np.ndarray, " latent"] | None = None

    def refresh(self, W_enc: Float[Tensor, "latent d_in"]) -> None:
        """Take over `W_enc`; `update_latents` keeps up with it from then on."""
        bounds = _even(len(W_enc))
        if W_enc.shape[1] < 4:
            self.precision = "float32"  # torch's product of bytes is wrong at width 1, and nothing is gained
        match self.precision:
            case "float32":
                self.W_enc, self.scales = W_enc, np.ones(len(W_enc), np.float32)
            case "bfloat16":
                if self.W_enc is None:
                    self.W_enc = torch.empty_like(W_enc, dtype=torch.bfloat16)
                    self.scales = np.ones(len(W_enc), np.float32)
                _in_parallel(loops.round_rows_to_bfloat16, bounds, W_enc.numpy(), _bits(self.W_enc))
            case "int8":
                if self.W_enc is None:
                    self.W_enc = torch.empty_like(W_enc, dtype=torch.int8)
                    self.scales = np.empty(len(W_enc), np.float32)
                _in_parallel(loops.quantize_rows, bounds, W_enc.numpy(), self.W_enc.numpy(), self.scales)

    def copies(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes, their scales, bfloat16) that follow the weights; what is not in use has no rows."""
        no_bytes, no_bits = np.empty((0, 0), np.int8), np.empty((0, 0), np.uint16)
        if self.W_enc is None or self.scales is None or self.precision == "float32":
            return no_bytes, np.empty(0, np.float32), no_bits
        if self.precision == "int8":
            return self.W_enc.numpy(), self.scales, no_bits
        return no_bytes, self.scales, _bits(self.W_enc)


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def encode_topk(
    centred: Float[Tensor, "row d_in"],
    W_enc: Float[Tensor, "latent d_in"],
    b_enc: Float[Tensor, " latent"],
    k: int,
    norms: Float[Tensor, " latent"] | None = None,
    workspace: Workspace | None = None,
) -> TopK:
    """The k largest latent activations of every row: see `reference.encode_topk`. Without a `workspace`, selected in
    float32."""
    workspace = workspace or Workspace("float32")
    if workspace.W_enc is None:
        workspace.refresh(W_enc)
    assert workspace.W_enc is not None
    assert workspace.scales is not None
    n_rows, n_latents = len(centred), len(W_enc)
    n_candidates = min(k + (MARGIN if workspace.precision != "float32" else 0), n_latents)
    norms_ = np.ones(n_latents, np.float32) if norms is None else norms.numpy()
    scale, bias = workspace.scales * norms_, b_enc.numpy() * norms_
    values, indices = torch.empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.int32)
    weights = workspace.W_enc

    def encode(start: int, stop: int) -> None:
        rows = centred[start:stop]
        candidates = np.empty((len(rows), n_candidates), np.int32)
        match workspace.precision:
            case "int8":
                codes, row_scales = torch.empty_like(rows, dtype=torch.int8), np.empty(len(rows), np.float32)
                loops.quantize_rows(0, len(rows), rows.numpy(), codes.numpy(), row_scales)
                product = torch._int_mm(codes, weights.T)  # pyright: ignore
                loops.select_int32(product.numpy(), row_scales, scale, bias, n_candidates, candidates)
            case "bfloat16":
                product = torch.mm(rows.bfloat16(), weights.T)
                loops.select_bfloat16(_bits(product), scale, bias, n_candidates, candidates)
            case "float32":
                product = torch.mm(rows, weights.T)
                loops.select_float32(product.numpy(), scale, bias, n_candidates, candidates)
        exact = (rows.numpy(), W_enc.numpy(), b_enc.numpy(), norms_, candidates)
        loops.values_of_chosen(*exact, indices[start:stop].numpy(), values[start:stop].numpy())

    itemsize = 2 if workspace.precision == "bfloat16" else 4
    n_part = min(max(PRODUCT_BYTES // (n_latents * itemsize), FEWEST_ROWS), max(1, -(-n_rows // cpu_count())))
    starts = range(0, n_rows, n_part)
    for job in [_pool().submit(encode, start, min(start + n_part, n_rows)) for start in starts]:
        job.result()
    return TopK(values, indices)


def decode(
    code: TopK, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "row d_out"]:
    """The reconstruction: see `reference.decode`."""
    out = torch.empty(len(code.values), W_dec.shape[1])
    arrays = (code.values.numpy(), code.indices.numpy(), W_dec.numpy(), bias.numpy(), out.numpy())
    _in_parallel(loops.decode_rows, _even(len(out)), *arrays)
    return out


def decode_prefixes(
    entries: Entries, W_dec: Float[Tensor, "latent d_out"], group: Int32[Tensor, " latent"], n_groups: int
) -> Float[Tensor, "row group d_out"]:
    """See `step.Kernels`."""
    out = torch.empty(len(entries.row_starts) - 1, n_groups, W_dec.shape[1])
    arrays = (*(field.numpy() for field in entries), W_dec.numpy(), group.numpy(), out.numpy())
    _in_parallel(loops.decode_prefixes, _even(len(out)), *arrays)
    return out


def value_gradients(
    entries: Entries,
    errors: Float[Tensor, "row group d_out"],
    W_dec: Float[Tensor, "latent d_out"],
    group: Int32[Tensor, " latent"],
) -> Float[Tensor, " entry"]:
    """See `step.Kernels`."""
    out = torch.empty_like(entries.values)
    arrays = (entries.row_starts, entries.latents, errors.contiguous(), W_dec, group, out)
    _in_parallel(loops.value_gradients, _even(len(errors)), *(array.numpy() for array in arrays))
    return out


def errors_and_gradients(
    entries: Entries,
    W_dec: Float[Tensor, "latent d_out"],
    group: Int32[Tensor, " latent"],
    n_groups: int,
    base: Float[Tensor, "row d_out"],
    scale: float,
) -> tuple[Float[Tensor, "row group d_out"], Float[Tensor, "row group"], Float[Tensor, " entry"]]:
    """See `loops.errors_and_gradients`."""
    errors = torch.empty(len(base), n_groups, base.shape[1])
    squared, gradients = torch.empty(len(base), n_groups), torch.empty_like(entries.values)
    arrays = (*(field.numpy() for field in entries), W_dec.numpy(), group.numpy(), base.numpy(), np.float32(scale))
    _in_parallel(
        loops.errors_and_gradients, _even(len(base)), *arrays, errors.numpy(), squared.numpy(), gradients.numpy()
    )
    return errors, squared, gradients


def sort_by_latent(
    contributions: Contributions, n_latents: int
) -> tuple[Int[Tensor, " latent_and_end"], Contributions]:
    """See `step.Kernels`."""
    starts, order = loops.order_by_latent(contributions.latents.numpy(), n_latents)
    order = torch.from_numpy(order)
    return torch.from_numpy(starts), Contributions(*(field[order] for field in contributions))


def update_latents(
    parameters: Parameters,
    moments: Moments,
    starts: Int[Tensor, " latent_and_end"],
    contributions: Contributions,
    inputs: Float[Tensor, "input d_in"],
    errors: Float[Tensor, "error d_out"],
    known: DenseRows,
    adam: AdamNumbers,
    unit: bool,
    workspace: Workspace,
) -> None:
    """See `step.Kernels`."""
    first, second = moments
    entries = (starts, *contributions[1:], inputs.contiguous(), errors.contiguous(), *known)
    weights = (parameters.W_enc, parameters.W_dec, first.W_enc, second.W_enc, first.W_dec, second.W_dec)
    numbers = (np.float32(number) for number in adam)
    work = starts.numpy() + LATENT_COST * np.arange(len(starts))  # how much there is before each latent
    bounds = np.searchsorted(work, np.linspace(0, work[-1], cpu_count() + 1))
    bounds[-1] = len(starts) - 1
    arrays = (tensor.numpy() for tensor in (*entries, *weights))
    _in_parallel(loops.update_latents, bounds, *arrays, *numbers, unit, *workspace.copies())
