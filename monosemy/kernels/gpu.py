"""What `step.Kernels` asks of a device, on a GPU, in Triton. Only the encoder product is dense; all else is k rows.

Encode, without ever holding the pre-activations of all latents:

1. The product with every STRIDE-th latent, and the n-th largest number of each row in it. n latents of the sample are
   as large, so the n-th largest of all is no smaller: a threshold that loses nothing.
2. The product with all latents, whose tiles meet the thresholds while they are in registers. What reaches them, about
   STRIDE x n latents of a row, joins the row's candidates: their order is an accident of timing, the set is not. A row
   with more than there is room for is done again by `reference.encode_topk`.
3. Of the candidates, the n = k + MARGIN largest: bit by bit, the largest number that n of them reach. A candidate is
   one integer, pre-activation above latent: no two are equal, and of equal pre-activations the lowest latents win.
4. The activations of those in float32, and of these the k largest. So the rounding of the product matters only if it
   moves a latent by more than MARGIN places.

Rows of weights, inputs and errors are wanted in no order, k at a time: too much for the GPU's memory, not for its
cache. So programs do a few columns of everything, which fit there, then the next few. The sums over columns that this
cuts in pieces are put together afterwards.

Update: a program has some columns of a latent. Its projection needs the sum over all columns of gradient x direction.
The gradient of direction w is the sum of f_e error_e over entries e, so this is the sum of f_e (error_e . w), and
error_e . w is the gradient of activation f_e, which is known. The new norm needs all columns, too: programs leave sums
of squares, and the matrix is divided by their roots at the end. No sum depends on the order in which programs happen
to run: results are the same bits every time.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from monosemy.kernels import reference
from monosemy.kernels.step import AdamNumbers, Contributions, DenseRows
from monosemy.kernels.types import Entries, Moments, Parameters, TopK

STRIDE = 8  # One latent in so many gives the threshold: fewer make more candidates, more a longer product.
MARGIN = 8  # Candidates beyond k of which the exact activation is computed.
LONGEST = 1 << 14  # Numbers of a row that a program can hold, to find the n-th largest.
BUFFER = 1 << 26  # Numbers of a sampled product, and candidates, that are held at once.
TOGETHER = tl.constexpr(16)  # Tiles of rows that meet a tile of latents in turn, while it is in the cache.
GROUPS = tl.constexpr(8)  # Of a tile's latents: all of a row's in a group are one thread's, in Hopper's products.
LOW_BITS = tl.constexpr(0x7FFFFFFF)  # A candidate's latent, counted down from here: the lower, the larger.
ENTRIES = tl.constexpr(16)  # Rows of weights, inputs or errors that a program asks for at once.
ROW_COLUMNS = tl.constexpr(128)  # Of a program that has a row of the batch: so many of 65,536 latents are 32 MB.
LATENT_COLUMNS = tl.constexpr(512)  # Of a program that has a latent: so many of 8,192 rows are 16 MB.
SMALLEST = torch.finfo(torch.float32).tiny
FUSED = {"enable_fp_fusion": True}  # Multiply and add in one instruction: Triton's default, which it wants to be told.

Precision = Literal["bfloat16", "float32"]
kernel: Any = triton.jit  # Triton's types know nothing of how kernels are launched.


class Tile(NamedTuple):
    """How the encoder product is cut up."""

    rows: int
    latents: int
    columns: int
    warps: int
    stages: int  # Steps along the columns that are under way at once.


TILES: dict[Precision, Tile] = {"bfloat16": Tile(128, 256, 64, 8, 4), "float32": Tile(64, 128, 16, 8, 3)}


class Workspace:
    """What survives from one step to the next: W_enc in the precision of the product that chooses candidates."""

    def __init__(self, precision: Precision = "bfloat16") -> None:
        self.precision: Precision = precision
        self.W_enc: Float[Tensor, "latent padded"] | None = None

    def copy_of(self, W_enc: Float[Tensor, "latent d_in"]) -> Float[Tensor, "latent padded"]:
        """The copy of `W_enc` as it was at the last `refresh`."""
        if self.W_enc is None:
            self.W_enc = padded(W_enc, getattr(torch, self.precision))
        return self.W_enc

    def refresh(self, W_enc: Float[Tensor, "latent d_in"]) -> None:
        """Follow a change of `W_enc`."""
        self.copy_of(W_enc)[:, : W_enc.shape[1]] = W_enc


def padded(rows: Float[Tensor, "row width"], dtype: torch.dtype) -> Float[Tensor, "row padded"]:
    """A copy of `rows`, filled up with zeros to a multiple of 32 bytes, as the engine that copies tiles wants them."""
    copy = rows.new_zeros(len(rows), triton.cdiv(rows.shape[1], 16) * 16, dtype=dtype)
    copy[:, : rows.shape[1]] = rows
    return copy


@kernel
@no_type_check
def encode_kernel(
    rows_tiles, weights_tiles, bias, norms, sample, thresholds, counts, candidates,
    n_rows, n_latents, width, stride, capacity, ROWS: tl.constexpr, LATENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pre-activations (x norm) of a tile. They go to `sample`; where that is None, those that reach the row's threshold
    join its candidates. The weights are those of every stride-th latent, `n_latents` of them."""
    n_tiles, tile = tl.cdiv(n_latents, LATENTS), tl.program_id(0)
    row_tile, latent_tile = tl.swizzle2d(tile // n_tiles, tile % n_tiles, tl.cdiv(n_rows, ROWS), n_tiles, TOGETHER)
    product = tl.zeros([ROWS, LATENTS], tl.float32)
    for column in range(0, width, COLUMNS):
        rows_part = rows_tiles.load([row_tile * ROWS, column])
        weights_part = weights_tiles.load([latent_tile * LATENTS, column])
        product = tl.dot(rows_part, weights_part.T, product, input_precision="ieee")

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    places = latent_tile * LATENTS + tl.arange(0, LATENTS)
    is_latent = places < n_latents
    pre = product + tl.load(bias + places * stride, mask=is_latent, other=float("-inf"))[None, :]
    if norms is not None:
        pre *= tl.load(norms + places * stride, mask=is_latent, other=1.0)[None, :]
    if sample is not None:
        where = rows.to(tl.int64)[:, None] * n_latents + places[None, :]
        tl.store(sample + where, pre, mask=(rows < n_rows)[:, None] & is_latent[None, :])
    else:
        # Which latent of its group a number belongs to is written into its last bits, too low to matter. So the
        # largest of a group says which it is, and a pass over the tile finds a candidate of every group. A few will do.
        MEMBERS: tl.constexpr = LATENTS // GROUPS
        threshold = tl.load(thresholds + rows, mask=rows < n_rows, other=float("inf"))
        reaches = pre >= threshold[:, None]
        member = ~(tl.arange(0, LATENTS) // GROUPS) & (MEMBERS - 1)  # Counted down: the lower, the larger.
        numbers = tl.where(reaches, pre.to(tl.int32, bitcast=True) & -MEMBERS | member[None, :], 0)
        numbers = tl.reshape(numbers, [ROWS, MEMBERS, GROUPS])
        n_reaching = tl.sum(tl.reshape(reaches, [ROWS, MEMBERS, GROUPS]).to(tl.int32), axis=1)
        count = tl.broadcast_to((counts + rows)[:, None], [ROWS, GROUPS])
        slots = tl.atomic_add(count, n_reaching, mask=n_reaching > 0, sem="relaxed")
        where = candidates + rows.to(tl.int64)[:, None] * capacity + slots
        number = tl.full([ROWS, GROUPS], LOW_BITS, tl.int32)
        for nth in range(tl.max(n_reaching)):
            number = tl.max(tl.where(numbers < number[:, None, :], numbers, 0), axis=1)
            place = (~number & (MEMBERS - 1)) * GROUPS + tl.arange(0, GROUPS)[None, :]
            candidate = (number.to(tl.int64) << 32) | ((latent_tile * LATENTS + place) ^ LOW_BITS)
            tl.store(where + nth, candidate, mask=(number > 0) & (slots + nth < capacity))


@kernel
@no_type_check
def nth_largest(numbers, n, HIGHEST_BIT: tl.constexpr, N_BITS: tl.constexpr):
    """The largest number of N_BITS bits, then zeros, that n of a row's numbers reach; 0 if fewer are positive."""
    found = n * 0
    for bit in range(N_BITS):
        larger = found | ((n * 0 + 1) << (HIGHEST_BIT - bit))
        n_reaching = tl.sum((numbers >= larger[:, None]).to(n.dtype), axis=1)
        found = tl.where(n_reaching >= n, larger, found)
    return found


@kernel
@no_type_check
def threshold_kernel(sample, thresholds, n, least, length, n_rows, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """A number that n of the row's sample reach, and few more, but at least `least`."""
    rows, slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
    there = (rows < n_rows)[:, None] & (slots < length)[None, :]
    pre = tl.load(sample + rows.to(tl.int64)[:, None] * length + slots[None, :], mask=there, other=0.0)
    bits = tl.where(pre > 0, pre.to(tl.int32, bitcast=True), 0)
    threshold = nth_largest(bits, tl.full([ROWS], n, tl.int32), 30, 20).to(tl.float32, bitcast=True)
    tl.store(thresholds + rows, tl.maximum(threshold, least), mask=rows < n_rows)


@kernel
@no_type_check
def select_kernel(candidates, counts, chosen, n, capacity, n_rows, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """chosen[row, :] = the slots of the row's n largest candidates, as they come; untouched where there are fewer."""
    rows, slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
    length = tl.minimum(tl.load(counts + rows, mask=rows < n_rows, other=0), capacity)
    where = rows.to(tl.int64)[:, None] * capacity + slots[None, :]
    candidate = tl.load(candidates + where, mask=slots[None, :] < length[:, None], other=0)
    nth = nth_largest(candidate, tl.full([ROWS], n, tl.int64), 62, 63)
    kept = (candidate >= nth[:, None]) & (candidate > 0)
    where = rows.to(tl.int64)[:, None] * n + tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(chosen + where, tl.broadcast_to(slots[None, :], [ROWS, SLOTS]).to(tl.int64), mask=kept)


def encode_topk(
    centred: Float[Tensor, "row d_in"], W_enc: Float[Tensor, "latent d_in"], b_enc: Float[Tensor, " latent"], k: int,
    norms: Float[Tensor, " latent"] | None = None, workspace: Workspace | None = None,
) -> TopK:  # fmt: skip
    """The k largest latent activations of every row: see `reference.encode_topk`. Without a `workspace`, candidates are
    chosen in float32 as well."""
    workspace = workspace or Workspace("float32")
    n = min(k + MARGIN, len(W_enc))
    stride, capacity = sampling(n, len(W_enc))
    n_held = max(capacity, triton.cdiv(len(W_enc), stride))
    if min(k, len(centred)) == 0 or n_held > LONGEST:
        return _encode_densely(centred, W_enc, b_enc, k, norms)
    given = (W_enc, b_enc, k, norms, workspace.copy_of(W_enc), TILES[workspace.precision], n, stride, capacity)
    return _joined([_encode_part(rows, *given) for rows in centred.split(max(1, BUFFER // n_held))])


def sampling(n: int, n_latents: int) -> tuple[int, int]:
    """(stride of the sample, candidates that a row may have). Where latents are in no order, the n-th largest of the
    sample is about the (stride x n)-th of all, with a standard deviation of stride x sqrt(n): there is room for six."""
    stride = max(min(STRIDE, n_latents // n), triton.cdiv(n_latents, LONGEST))
    return stride, triton.next_power_of_2(min(round(stride * (n + 6 * n**0.5)), n_latents))


def _encode_densely(centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, norms: Tensor | None) -> TopK:
    n_part = max(1, reference.ROWS_TIMES_LATENTS // len(W_enc))
    return _joined([reference.encode_topk(rows, W_enc, b_enc, k, norms) for rows in centred.split(n_part)])


def _joined(parts: list[TopK]) -> TopK:
    return TopK(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _encode_part(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, norms: Tensor | None, copy: Tensor, tile: Tile,
    n: int, stride: int, capacity: int,
) -> TopK:  # fmt: skip
    n_rows, rows, sampled = len(centred), padded(centred, copy.dtype), copy[::stride]

    def multiply(weights: Tensor, stride: int, *to: Tensor | None) -> None:
        encode_kernel[(triton.cdiv(n_rows, tile.rows) * triton.cdiv(len(weights), tile.latents),)](
            TensorDescriptor.from_tensor(rows, [tile.rows, tile.columns]),
            TensorDescriptor.from_tensor(weights, [tile.latents, tile.columns]),
            b_enc, norms, *to, n_rows, len(weights), rows.shape[1], stride, capacity, *tile[:3],
            num_warps=tile.warps, num_stages=tile.stages, **FUSED,
        )  # fmt: skip

    sample = centred.new_empty(n_rows, len(sampled))
    multiply(sampled, stride, sample, None, None, None)
    thresholds = centred.new_empty(n_rows)
    _by_rows(threshold_kernel, sample, thresholds, n, SMALLEST)
    counts = torch.zeros(n_rows, dtype=torch.int32, device=centred.device)
    candidates = counts.new_empty(n_rows, capacity, dtype=torch.int64)
    multiply(copy, 1, None, thresholds, counts, candidates)
    code = _largest_exactly(centred, W_enc, b_enc, k, norms, candidates, counts, n)
    # Fewer than n of them: never, unless the two products should differ in the last bit.
    again = ((counts > capacity) | ((counts < n) & (thresholds > SMALLEST))).nonzero().squeeze(1)
    if len(again):
        for field, dense in zip(code, _encode_densely(centred[again], W_enc, b_enc, k, norms), strict=True):
            field[again] = dense
    return code


def _largest_exactly(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, norms: Tensor | None,
    candidates: Int64[Tensor, "row slot"], counts: Int32[Tensor, " row"], n: int,
) -> TopK:  # fmt: skip
    """Steps 3 and 4."""
    n_latents, low_bits, chosen = len(W_enc), LOW_BITS.value, _chosen(candidates, counts, n)
    latents = low_bits - (candidates.gather(1, chosen.clamp(min=0)) & low_bits)
    latents = torch.where(chosen < 0, n_latents, latents).int().sort(dim=1).values
    missing = latents == n_latents
    latents = latents.masked_fill(missing, 0)
    row_starts = torch.arange(len(centred) + 1, device=centred.device) * n
    products = _products(row_starts, latents.flatten(), centred[:, None], W_enc, None)
    values = products.view(-1, n) + b_enc[latents]
    ranked = (values if norms is None else values * norms[latents]).masked_fill(missing, 0).clamp(min=0)
    exact = (ranked.view(torch.int32).long() << 32) | (low_bits - latents)
    chosen = _chosen(torch.where(ranked > 0, exact, 0), torch.full_like(counts, n), k)
    used, chosen = chosen >= 0, chosen.clamp(min=0)
    return TopK(torch.where(used, values.gather(1, chosen), 0.0), torch.where(used, latents.gather(1, chosen), 0))


def _chosen(candidates: Tensor, counts: Tensor, n: int) -> Int64[Tensor, "row n"]:
    """The slots of the n largest candidates, -1 where there are fewer."""
    chosen = candidates.new_full((len(candidates), n), -1)
    _by_rows(select_kernel, candidates, counts, chosen, n)
    return chosen


def _by_rows(kernel: Any, numbers: Tensor, *arguments: Tensor | float) -> None:
    """Run a kernel whose programs hold whole rows of `numbers`."""
    n_rows, length = numbers.shape
    slots = triton.next_power_of_2(length)
    rows, warps = max(1, 1024 // slots), min(max(slots // 1024, 4), 16)
    kernel[(triton.cdiv(n_rows, rows),)](numbers, *arguments, length, n_rows, rows, slots, num_warps=warps, **FUSED)


@kernel
@no_type_check
def decode_kernel(row_starts, latents, values, weights, group, out, n_groups, width):
    """out[row, group, :] = sum of value x weights[latent] over the row's entries in that group (None: all)."""
    row, wanted = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.program_id(2) * ROW_COLUMNS + tl.arange(0, ROW_COLUMNS)
    is_column = columns < width
    end = tl.load(row_starts + row + 1)
    total = tl.zeros([ROW_COLUMNS], tl.float32)
    for first in range(tl.load(row_starts + row), end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        value = tl.load(values + entries, mask=entries < end, other=0.0)
        used = value != 0
        latent = tl.load(latents + entries, mask=used, other=0).to(tl.int64)
        if group is not None:
            used &= tl.load(group + latent, mask=used, other=0) == wanted
        where = latent[:, None] * width + columns[None, :]
        part = tl.load(weights + where, mask=used[:, None] & is_column[None, :], other=0.0)
        total += tl.sum(value[:, None] * part, axis=0)
    tl.store(out + (row * n_groups + wanted) * width + columns, total, mask=is_column)


@kernel
@no_type_check
def products_kernel(row_starts, latents, vectors, weights, group, parts, n_entries, n_groups, width):
    """parts[column block, entry] = vectors[row, group of latent] . weights[latent], over a block of columns."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = block * ROW_COLUMNS + tl.arange(0, ROW_COLUMNS)
    is_column = columns < width
    if group is None:
        vector = tl.load(vectors + row * width + columns, mask=is_column, other=0.0)[None, :]
    end = tl.load(row_starts + row + 1)
    for first in range(tl.load(row_starts + row), end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        there = entries < end
        inside = there[:, None] & is_column[None, :]
        latent = tl.load(latents + entries, mask=there, other=0).to(tl.int64)
        if group is not None:
            vector_row = row * n_groups + tl.load(group + latent, mask=there, other=0)
            vector = tl.load(vectors + vector_row[:, None] * width + columns[None, :], mask=inside, other=0.0)
        part = tl.load(weights + latent[:, None] * width + columns[None, :], mask=inside, other=0.0)
        tl.store(parts + block * n_entries + entries, tl.sum(part * vector, axis=1), mask=there)


def decode(
    code: TopK, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "row d_out"]:
    """The reconstruction: see `reference.decode`."""
    row_starts = torch.arange(len(code.indices) + 1, device=bias.device) * code.indices.shape[1]
    entries = Entries(row_starts, code.indices.flatten(), code.values.flatten())
    return decode_prefixes(entries, W_dec, code.indices.new_zeros(len(W_dec)), 1)[:, 0] + bias


def decode_prefixes(
    entries: Entries, W_dec: Float[Tensor, "latent d_out"], group: Int32[Tensor, " latent"], n_groups: int
) -> Float[Tensor, "row group d_out"]:
    """See `step.Kernels`."""
    n_rows, width = len(entries.row_starts) - 1, W_dec.shape[1]
    out = W_dec.new_empty(n_rows, n_groups, width)
    decode_kernel[(n_rows, n_groups, triton.cdiv(width, ROW_COLUMNS.value))](
        *entries, W_dec, None if n_groups == 1 else group, out, n_groups, width, num_warps=1, **FUSED
    )
    return out


def value_gradients(
    entries: Entries, errors: Float[Tensor, "row group d_out"], W_dec: Float[Tensor, "latent d_out"],
    group: Int32[Tensor, " latent"],
) -> Float[Tensor, " entry"]:  # fmt: skip
    """See `step.Kernels`."""
    return _products(entries.row_starts, entries.latents, errors, W_dec, None if errors.shape[1] == 1 else group)


def _products(
    row_starts: Tensor, latents: Tensor, vectors: Float[Tensor, "row group width"],
    weights: Float[Tensor, "latent width"], group: Tensor | None,
) -> Float[Tensor, " entry"]:  # fmt: skip
    (n_rows, n_groups, width), n_entries = vectors.shape, len(latents)
    n_blocks = triton.cdiv(width, ROW_COLUMNS.value)
    parts = weights.new_empty(n_blocks, n_entries)
    products_kernel[(n_rows, n_blocks)](
        row_starts,
        latents,
        vectors.contiguous(),
        weights,
        group,
        parts,
        n_entries,
        n_groups,
        width,
        num_warps=1,
        **FUSED,
    )
    return parts.sum(dim=0)


def sort_by_latent(
    contributions: Contributions, n_latents: int
) -> tuple[Int[Tensor, " latent_and_end"], Contributions]:
    """See `step.Kernels`."""
    latents, order = contributions.latents.sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(n_latents + 1, dtype=torch.int32, device=latents.device))
    return starts, Contributions(latents, *(field[order] for field in contributions[1:]))


@kernel
@no_type_check
def update_kernel(
    order, starts, vector_rows, coefficients, vectors, slots, known, gradients,
    weights, first_moments, second_moments, copy, squares, n_latents, width, copy_width,
    new1, beta2, new2, rate, root_correction, epsilon, keep,
):  # fmt: skip
    """AdamW for some columns of a latent's row. Its gradient is known[slot] + the sum over its entries of coefficient x
    vector, without the part of that sum along the row if `gradients` are given. `copy` gets the new row as well."""
    latent, block = tl.load(order + tl.program_id(0)), tl.program_id(1).to(tl.int64)
    columns = block * LATENT_COLUMNS + tl.arange(0, LATENT_COLUMNS)
    is_column = columns < width
    here = latent * width + columns
    weight = tl.load(weights + here, mask=is_column, other=0.0)
    first_moment = tl.load(first_moments + here, mask=is_column, other=0.0)
    second_moment = tl.load(second_moments + here, mask=is_column, other=0.0)
    slot = tl.load(slots + latent).to(tl.int64)
    gradient = tl.load(known + slot * width + columns, mask=columns < tl.where(slot < 0, 0, width), other=0.0)
    along = tl.zeros([ENTRIES], tl.float32)
    end = tl.load(starts + latent + 1)
    for first in range(tl.load(starts + latent), end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        there = entries < end
        coefficient = tl.load(coefficients + entries, mask=there, other=0.0)
        row = tl.load(vector_rows + entries, mask=there, other=0).to(tl.int64)
        inside = there[:, None] & is_column[None, :]
        vector = tl.load(vectors + row[:, None] * width + columns[None, :], mask=inside, other=0.0)
        gradient += tl.sum(coefficient[:, None] * vector, axis=0)
        if gradients is not None:
            along += coefficient * tl.load(gradients + entries, mask=there, other=0.0)

    if gradients is not None:
        gradient -= tl.sum(along, axis=0) * weight
    first_moment += (gradient - first_moment) * new1
    second_moment = second_moment * beta2 + gradient * gradient * new2
    weight = weight * keep - rate * first_moment / (tl.sqrt(second_moment) / root_correction + epsilon)
    tl.store(weights + here, weight, mask=is_column)
    tl.store(first_moments + here, first_moment, mask=is_column)
    tl.store(second_moments + here, second_moment, mask=is_column)
    if copy is not None:
        tl.store(copy + latent * copy_width + columns, weight.to(copy.dtype.element_ty), mask=is_column)
    if squares is not None:
        tl.store(squares + block * n_latents + latent, tl.sum(weight * weight, axis=0))


def update_latents(
    parameters: Parameters, moments: Moments, starts: Int[Tensor, " latent_and_end"], contributions: Contributions,
    inputs: Float[Tensor, "input d_in"], errors: Float[Tensor, "error d_out"], known: DenseRows, adam: AdamNumbers,
    unit: bool, workspace: Workspace,
) -> None:  # fmt: skip
    """See `step.Kernels`; contributions.gradients must be errors[error_rows] . W_dec[latents]."""
    W_enc, W_dec, copy = parameters.W_enc, parameters.W_dec, workspace.copy_of(parameters.W_enc)
    n_latents, known_W_dec = len(W_enc), known.W_dec
    if unit:
        directions = W_dec[known.slots.argsort()[n_latents - len(known_W_dec) :]]  # those without a slot come first
        known_W_dec = known_W_dec - (known_W_dec * directions).sum(dim=1, keepdim=True) * directions
    order = starts.diff().argsort(descending=True, stable=True)  # the longest first: all would wait for one at the end
    squares = W_dec.new_empty(triton.cdiv(W_dec.shape[1], LATENT_COLUMNS.value), n_latents) if unit else None
    _, input_rows, error_rows, values, gradients = contributions
    encoder = (input_rows, gradients, inputs.contiguous(), known.slots, known.W_enc, None,
               W_enc, moments.first.W_enc, moments.second.W_enc, copy, None)  # fmt: skip
    decoder = (error_rows, values, errors.contiguous(), known.slots, known_W_dec, gradients if unit else None,
               W_dec, moments.first.W_dec, moments.second.W_dec, None, squares)  # fmt: skip
    for arguments, width in ((encoder, W_enc.shape[1]), (decoder, W_dec.shape[1])):
        update_kernel[(n_latents, triton.cdiv(width, LATENT_COLUMNS.value))](
            order, starts, *arguments, n_latents, width, copy.shape[1], *adam, num_warps=4, **FUSED
        )
    if squares is not None:
        W_dec.mul_(squares.sum(dim=0).rsqrt_()[:, None])
