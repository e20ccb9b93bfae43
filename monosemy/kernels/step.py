"""One training step, the same on every device: what `reference` defines, with its gradients written down by hand.

1. Encode: the candidates of every row, of which the objective keeps some. Dense products select; all else is sparse.
2. Decode: one reconstruction per nested dictionary, errors, and d(loss)/d(activation) of every active latent.
3. Auxiliary loss: the residual, reconstructed by dead latents. Few of them are small dense products; many are sparse.
4. Update: what rows ask of latents is sorted by latent, and every latent is visited once: its two gradient rows are
   summed, the decoder's is projected, AdamW moves both with exact dense semantics (moments of silent latents decay
   too), the direction returns to unit norm. No dense gradient exists.

Latents may be sharded over ranks, and rows over replicas (`Exchange`). Shards merge their candidates to the exact
global choice and add up their partial reconstructions; replicas exchange rows and errors, not gradients, which are
larger. So every rank ends a step with the same shared parameters, bit for bit.

`Kernels` lists what a device must provide; `cpu` and `gpu` do.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from monosemy.kernels.reference import aux_scale, fraction_unexplained, group_of_latents
from monosemy.kernels.types import ALONE, Entries, Exchange, Moments, Parameters, StepResult, StepSettings, TopK
from monosemy.runtime import InputError

FEW_DEAD = 1024
"""Up to so many dead latents, the auxiliary loss is faster as dense products."""


class Contributions(NamedTuple):
    """What rows ask of latents: entry e adds gradients[e] x inputs[input_rows[e]] to the gradient of its latent's
    encoder row, and values[e] x errors[error_rows[e]] to that of its decoder row."""

    latents: Int32[Tensor, " entry"]
    input_rows: Int32[Tensor, " entry"]
    error_rows: Int32[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    gradients: Float[Tensor, " entry"]


class DenseRows(NamedTuple):
    """Gradient rows of a few latents that are known already."""

    slots: Int32[Tensor, " latent"]
    """Which of the rows below is this latent's; -1: none."""
    W_enc: Float[Tensor, "slot d_in"]
    W_dec: Float[Tensor, "slot d_out"]


class AdamNumbers(NamedTuple):
    """Adam at one step: first += new1 (g - first); second = beta2 second + new2 g^2;
    weight = keep weight - rate first / (sqrt(second) / root_correction + epsilon)."""

    new1: float
    beta2: float
    new2: float
    rate: float
    root_correction: float
    epsilon: float
    keep: float

    @classmethod
    def at(cls, settings: StepSettings, learning_rate: float, step: int) -> AdamNumbers:
        beta1, beta2 = settings.beta1, settings.beta2
        rate, root_correction = learning_rate / (1 - beta1**step), (1 - beta2**step) ** 0.5
        keep = 1 - learning_rate * settings.weight_decay
        return cls(1 - beta1, beta2, 1 - beta2, rate, root_correction, settings.epsilon, keep)


@runtime_checkable
class Kernels(Protocol):
    """What a device provides."""

    def encode_topk(
        self, centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, norms: Tensor | None = None, workspace: Any = None
    ) -> TopK:
        """`reference.encode_topk`; with a `workspace`, a product of lower precision chooses the candidates."""
        ...

    def decode_prefixes(
        self, entries: Entries, W_dec: Tensor, group: Int32[Tensor, " latent"], n_groups: int
    ) -> Float[Tensor, "row group d_out"]:
        """Per row and group of latents, the sum of values x decoder rows of its entries in that group."""
        ...

    def value_gradients(
        self, entries: Entries, errors: Float[Tensor, "row group d_out"], W_dec: Tensor, group: Int32[Tensor, " latent"]
    ) -> Float[Tensor, " entry"]:
        """Per entry, errors[its row, its latent's group] . W_dec[its latent]."""
        ...

    # A device may also have `errors_and_gradients`: see `cpu`.

    def sort_by_latent(
        self, contributions: Contributions, n_latents: int
    ) -> tuple[Int[Tensor, " latent_and_end"], Contributions]:
        """(starts, contributions in order of latent, else as they came): latent i has starts[i]:starts[i + 1]."""
        ...

    def update_latents(
        self, parameters: Parameters, moments: Moments, starts: Int[Tensor, " latent_and_end"],
        contributions: Contributions, inputs: Float[Tensor, "input d_in"], errors: Float[Tensor, "error d_out"],
        known: DenseRows, adam: AdamNumbers, unit: bool, workspace: Any,
    ) -> None:  # fmt: skip
        """Step 4 for W_enc and W_dec; `unit`: project the decoder's gradient and renormalise its row. The workspace's
        low-precision copy of W_enc follows."""
        ...


class Auxiliary(NamedTuple):
    """The auxiliary loss and what it asks of dead latents."""

    loss: float
    known: DenseRows
    """Few dead: their gradient rows, and"""
    b_enc: Float[Tensor, " latent"]
    """the gradient of b_enc."""
    entries: Entries | None = None
    """Many dead: their activations,"""
    gradients: Tensor | None = None
    """d(loss)/d(activation) of each, and"""
    errors: Float[Tensor, "row d_out"] | None = None
    """d(loss)/d(reconstruction)."""


def train_step(
    kernels: Kernels,
    parameters: Parameters,
    moments: Moments,
    x: Float[Tensor, "row d_in"],
    dead: Bool[Tensor, " latent"],
    settings: StepSettings,
    learning_rate: float,
    step: int,
    workspace: Any,
    target: Float[Tensor, "row d_out"] | None = None,
    exchange: Exchange = ALONE,
) -> StepResult:
    """`reference.train_step`, up to the rounding of float32 and of the product that chooses candidates."""
    x = x.float().contiguous()
    target = x if target is None else target.float().contiguous()
    norms = parameters.W_dec.norm(dim=1) if settings.decoder == "free" else None
    n_latents, n_groups = len(parameters.b_enc), max(1, len(settings.prefixes))
    group = group_of_latents(n_latents, settings, x.device, exchange.first_latent)

    centred = x - parameters.b_pre
    entries = _active_entries(kernels, parameters, centred, norms, settings, workspace, exchange)
    wanted = _joined(exchange.gather_replicas(target))
    scale = 2 / wanted.numel() / n_groups
    errors, squared, gradients = _errors_and_gradients(
        kernels, parameters, entries, centred, target, group, n_groups, scale, exchange
    )
    squared_error = _joined(exchange.gather_replicas(squared)).double().sum(dim=0)
    auxiliary = _auxiliary(
        kernels, parameters, centred, errors[:, -1], 1 / scale, dead, norms, settings, wanted.numel(), exchange
    )

    centred = _joined(exchange.gather_replicas(centred))
    errors = _joined(exchange.gather_replicas(errors))
    entries, gradients = _gathered(entries, gradients, exchange)
    counts = torch.bincount(entries.latents, minlength=n_latents)
    asked = _contributions(entries, gradients, group, n_groups)
    error_rows = errors.flatten(0, 1)
    if auxiliary.entries is not None:
        error_rows, asked = _with_auxiliary(auxiliary, error_rows, asked, exchange)
    starts, asked = kernels.sort_by_latent(asked, n_latents)

    b_enc_gradient = torch.segment_reduce(asked.gradients, "sum", offsets=starts, initial=0) + auxiliary.b_enc
    total_error = errors[:, 0].sum(dim=0)
    # b_pre is subtracted before the encoder, where every pre-activation (and the skip path) sees it.
    b_pre_gradient = -exchange.sum_shards(b_enc_gradient @ parameters.W_enc)
    if parameters.W_skip is not None:
        b_pre_gradient -= total_error @ parameters.W_skip
    small = {"b_enc": b_enc_gradient, "b_pre": b_pre_gradient}
    if parameters.b_dec is None:
        small["b_pre"] = b_pre_gradient + total_error
    else:
        small["b_dec"] = total_error
    if parameters.W_skip is not None:
        small["W_skip"] = errors[:, 0].T @ centred

    adam = AdamNumbers.at(settings, learning_rate, step)
    unit = settings.decoder == "unit"
    kernels.update_latents(
        parameters, moments, starts, asked, centred, error_rows, auxiliary.known, adam, unit, workspace
    )
    for name, gradient in small.items():
        _adam(getattr(parameters, name), getattr(moments.first, name), getattr(moments.second, name), gradient, adam)

    n_active = exchange.sum_shards(counts.sum())
    return StepResult(
        loss=squared_error.mean().item() / wanted.numel(),
        fvu=fraction_unexplained(squared_error[-1].item(), wanted),
        aux_loss=auxiliary.loss,
        counts=counts,
        l0=n_active.item() / len(wanted),
    )


def squared_error(
    kernels: Kernels,
    parameters: Parameters,
    x: Float[Tensor, "row d_in"],
    settings: StepSettings,
    workspace: Any,
    target: Float[Tensor, "row d_out"] | None = None,
    exchange: Exchange = ALONE,
) -> float:
    """The squared error of the reconstruction by all latents, summed over rows that all ranks give alike."""
    x = x.float().contiguous()
    target = x if target is None else target.float().contiguous()
    norms = parameters.W_dec.norm(dim=1) if settings.decoder == "free" else None
    centred = x - parameters.b_pre
    entries = _active_entries(kernels, parameters, centred, norms, settings, workspace, exchange)
    one_group = torch.zeros_like(parameters.b_enc, dtype=torch.int32)
    partial = kernels.decode_prefixes(entries, parameters.W_dec, one_group, 1)
    return _errors(exchange.sum_shards(partial), centred, target, parameters).double().square().sum().item()


def check_finite(x: Tensor, target: Tensor) -> None:
    """Raise `InputError` for rows that hold NaN or infinity."""
    for rows in (x,) if target is x else (x, target):
        bad = int((~torch.linalg.vector_norm(rows, dim=1).isfinite()).sum())
        if bad:
            raise InputError(f"{bad} of {len(rows)} rows hold NaN or infinity: capture them again, or leave them out")


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _active_entries(
    kernels: Kernels, parameters: Parameters, centred: Tensor, norms: Tensor | None, settings: StepSettings,
    workspace: Any, exchange: Exchange,
) -> Entries:  # fmt: skip
    """The latents that are active on each row, of this shard."""
    n_latents = len(parameters.b_enc)
    arguments = (centred, parameters.W_enc, parameters.b_enc)
    if settings.activation == "topk":
        found = kernels.encode_topk(*arguments, min(settings.k, n_latents), norms, workspace)
        return compact(keep_largest(found, norms, settings.k, exchange))
    n_candidates = min(4 * settings.k, n_latents)
    while True:  # a row may hold more of the batch's largest than were looked at: then look at more
        found = kernels.encode_topk(*arguments, n_candidates, norms, workspace)
        ranked = ranking(found, norms)
        threshold = batch_threshold(ranked, settings.k, exchange)
        full = (ranked.min(dim=1).values >= threshold).any() & (n_candidates < n_latents)
        if not any(bool(other > 0) for other in exchange.gather_replicas(exchange.sum_shards(full.int()))):
            return compact(TopK(torch.where(ranked >= threshold, found.values, 0.0), found.indices))
        n_candidates = min(2 * n_candidates, n_latents)


def ranking(code: TopK, norms: Float[Tensor, " latent"] | None) -> Float[Tensor, "row k"]:
    """What latents are ranked by: activation, or activation x decoder norm."""
    return code.values if norms is None else code.values * norms[code.indices.long()]


def batch_threshold(ranked: Float[Tensor, "row k"], k: int, exchange: Exchange) -> float:
    """The (k x rows)-th largest number of the batch; where fewer are positive, one below all of them."""
    every = _joined(exchange.gather_replicas(torch.cat(exchange.gather_shards(ranked), dim=1)))
    flat = every.flatten()
    n_kept = min(k * len(every), len(flat))
    return max(flat.kthvalue(len(flat) - n_kept + 1).values.item(), torch.finfo(torch.float32).tiny)


def keep_largest(code: TopK, norms: Float[Tensor, " latent"] | None, k: int, exchange: Exchange) -> TopK:
    """Of the k largest per row of every shard, those of this shard that are among the k largest of all."""
    ranked = ranking(code, norms)
    shards = exchange.gather_shards(ranked)
    if len(shards) == 1:
        return code
    every = torch.cat(shards, dim=1)
    kept = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(every, dtype=torch.bool).scatter_(1, kept, True)
    own = mask.split([part.shape[1] for part in shards], dim=1)[exchange.shard]
    return TopK(torch.where(own, code.values, 0.0), code.indices)


def compact(code: TopK) -> Entries:
    """The slots of `code` that are used."""
    used = code.values > 0
    row_starts = torch.zeros(len(used) + 1, dtype=torch.int64, device=used.device)
    torch.cumsum(used.sum(dim=1), dim=0, out=row_starts[1:])
    return Entries(row_starts, code.indices[used], code.values[used])


def _errors_and_gradients(
    kernels: Kernels, parameters: Parameters, entries: Entries, centred: Tensor, target: Tensor, group: Tensor,
    n_groups: int, scale: float, exchange: Exchange,
) -> tuple[Float[Tensor, "row group d_out"], Float[Tensor, "row group"], Float[Tensor, " entry"]]:  # fmt: skip
    """d(loss)/d(reconstruction) as latents of each group see it, the squared error by each of the nested dictionaries,
    and d(loss)/d(activation)."""
    fused = getattr(kernels, "errors_and_gradients", None)
    if fused is not None and exchange is ALONE:  # in one visit per row, while its decoder rows are in cache
        base = _base(centred, target, parameters)
        return fused(entries, parameters.W_dec, group, n_groups, base, scale)
    partial = kernels.decode_prefixes(entries, parameters.W_dec, group, n_groups)
    errors = _errors(exchange.sum_shards(partial), centred, target, parameters)
    squared = torch.linalg.vector_norm(errors, dim=2).square_()
    errors.mul_(scale)
    if n_groups > 1:  # a latent of group j is in dictionary j and all larger ones
        errors = errors.flip(1).cumsum(dim=1).flip(1).contiguous()
    return errors, squared, kernels.value_gradients(entries, errors, parameters.W_dec, group)


def _base(centred: Tensor, target: Tensor, parameters: Parameters) -> Float[Tensor, "row d_out"]:
    """What the latents have to reconstruct."""
    base = target - parameters.output_bias
    if parameters.W_skip is not None:
        base -= centred @ parameters.W_skip.T
    return base


def _errors(
    partial: Float[Tensor, "row group d_out"], centred: Tensor, target: Tensor, parameters: Parameters
) -> Float[Tensor, "row group d_out"]:
    """Reconstruction - target, by each of the nested dictionaries. `partial` is changed."""
    if partial.shape[1] > 1:
        torch.cumsum(partial, dim=1, out=partial)
    return partial.sub_(_base(centred, target, parameters)[:, None])


def _auxiliary(
    kernels: Kernels, parameters: Parameters, centred: Tensor, error: Tensor, unscale: float, dead: Tensor,
    norms: Tensor | None, settings: StepSettings, n_elements: int, exchange: Exchange,
) -> Auxiliary:  # fmt: skip
    """The auxiliary loss on this replica's rows; their residual is -`error` x `unscale`, and `n_elements` are those of
    the whole batch."""
    nobody = DenseRows(torch.full_like(parameters.b_enc, -1, dtype=torch.int32), centred[:0], error[:0])
    nothing = Auxiliary(0.0, nobody, torch.zeros_like(parameters.b_enc))
    n_dead = int(exchange.sum_shards(dead.sum()).item())
    if n_dead == 0 or settings.k_aux == 0:
        return nothing
    rows = dead.nonzero().squeeze(1)
    dead_norms = None if norms is None else norms[rows]
    weight = settings.aux_weight * aux_scale(n_dead, settings)
    make = _few_dead if n_dead <= FEW_DEAD else _many_dead
    squared, found = make(kernels, parameters, centred, error * -unscale, rows, dead_norms, settings.k_aux, weight,
                          n_elements, exchange, nothing)  # fmt: skip
    loss = torch.stack(exchange.gather_replicas(squared)).sum().item() / n_elements
    return found._replace(loss=loss)


def _few_dead(
    kernels: Kernels, parameters: Parameters, centred: Tensor, residual: Tensor, rows: Tensor, norms: Tensor | None,
    k_aux: int, weight: float, n_elements: int, exchange: Exchange, nothing: Auxiliary,
) -> tuple[Tensor, Auxiliary]:  # fmt: skip
    """(squared error, gradients) by dense products with the dead latents' rows."""
    encoder, directions = parameters.W_enc[rows], parameters.W_dec[rows]
    pre = torch.addmm(parameters.b_enc[rows], centred, encoder.T)
    active = pre.relu() * _chosen_dead(pre if norms is None else pre * norms, k_aux, exchange)
    error = exchange.sum_shards(active @ directions).sub_(residual)
    squared = error.square().sum()
    error *= 2 * weight / n_elements
    to_active = (error @ directions.T) * (active > 0)
    error, active, to_active, centred = (
        _joined(exchange.gather_replicas(part)) for part in (error, active, to_active, centred)
    )
    slots, b_enc = nothing.known.slots.clone(), nothing.b_enc.clone()
    slots[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    b_enc[rows] = to_active.sum(dim=0)
    known = DenseRows(slots, to_active.T @ centred, active.T @ error)
    return squared, Auxiliary(0.0, known, b_enc)


def _chosen_dead(ranked: Float[Tensor, "row dead"], k_aux: int, exchange: Exchange) -> Bool[Tensor, "row dead"]:
    """Which dead latents are among the row's k_aux largest."""
    shards = exchange.gather_shards(ranked)
    every = torch.cat(shards, dim=1)
    if every.shape[1] <= k_aux:
        return torch.ones_like(ranked, dtype=torch.bool)
    chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(1, every.topk(k_aux, dim=1).indices, True)
    return chosen.split([part.shape[1] for part in shards], dim=1)[exchange.shard]


def _many_dead(
    kernels: Kernels, parameters: Parameters, centred: Tensor, residual: Tensor, rows: Tensor, norms: Tensor | None,
    k_aux: int, weight: float, n_elements: int, exchange: Exchange, nothing: Auxiliary,
) -> tuple[Tensor, Auxiliary]:  # fmt: skip
    """(squared error, entries and their gradients), sparse as the main objective is."""
    k = min(k_aux, len(rows))
    arguments = (centred, parameters.W_enc[rows], parameters.b_enc[rows], k, norms)
    found = kernels.encode_topk(*arguments) if k else TopK(centred[:, :0], centred[:, :0].int())
    local = compact(keep_largest(found, norms, k_aux, exchange))
    entries = local._replace(latents=rows[local.latents.long()].int())
    one_group = torch.zeros_like(parameters.b_enc, dtype=torch.int32)
    partial = kernels.decode_prefixes(entries, parameters.W_dec, one_group, 1)
    error = exchange.sum_shards(partial).sub_(residual[:, None])
    squared = error.square().sum()
    error *= 2 * weight / n_elements
    gradients = kernels.value_gradients(entries, error, parameters.W_dec, one_group)
    return squared, nothing._replace(entries=entries, gradients=gradients, errors=error[:, 0])


def _gathered(entries: Entries, gradients: Tensor, exchange: Exchange) -> tuple[Entries, Tensor]:
    """Entries and their gradients of all replicas."""
    lengths = _joined(exchange.gather_replicas(entries.row_starts.diff()))
    row_starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
    latents, values, gradients = (
        _joined(exchange.gather_replicas(part)) for part in (entries.latents, entries.values, gradients)
    )
    return Entries(row_starts, latents, values), gradients


def _contributions(entries: Entries, gradients: Tensor, group: Tensor, n_groups: int) -> Contributions:
    rows = entries.rows
    error_rows = rows if n_groups == 1 else rows * n_groups + group[entries.latents.long()]
    return Contributions(entries.latents, rows.int(), error_rows.int(), entries.values, gradients)


def _with_auxiliary(
    auxiliary: Auxiliary, error_rows: Tensor, asked: Contributions, exchange: Exchange
) -> tuple[Tensor, Contributions]:
    """(rows of errors, contributions), the auxiliary ones behind the main ones."""
    assert auxiliary.entries is not None
    assert auxiliary.gradients is not None
    assert auxiliary.errors is not None
    entries, gradients = _gathered(auxiliary.entries, auxiliary.gradients, exchange)
    rows = entries.rows
    more = Contributions(entries.latents, rows.int(), (rows + len(error_rows)).int(), entries.values, gradients)
    joined = Contributions(*(torch.cat(pair) for pair in zip(asked, more, strict=True)))
    return torch.cat([error_rows, *exchange.gather_replicas(auxiliary.errors)]), joined


def _adam(weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor, adam: AdamNumbers) -> None:
    """AdamW for a small parameter, in place."""
    first.lerp_(gradient, adam.new1)
    second.mul_(adam.beta2).addcmul_(gradient, gradient, value=adam.new2)
    weight.mul_(adam.keep).addcdiv_(
        first, second.sqrt().div_(adam.root_correction).add_(adam.epsilon), value=-adam.rate
    )
