"""Running sums behind the figures of an evaluation: exact over all rows, in one pass, in bounded memory.

1. Every row adds to the sums of its group of documents, in float64. A figure is a function of sums, never a mean of
   the figures of batches.
2. Weights over the groups give the figure of any part of the rows: all ones for all, one for a single group, and the
   counts of a sample with replacement for the bootstrap. Documents are sampled, not rows: rows of one document are
   alike, and intervals from rows would be too narrow (Efron and Tibshirani 1993, chapter 8).

docs/metrics.md has every formula.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosemy.runtime import InputError, random_stream
from monosemy.sae.autoencoder import EPSILON, SAE, SparseCode

MOST_GROUPS = 128
"""Documents share so many groups: what memory the intervals cost does not grow with the text."""

SAMPLES = 1000
"""Of the bootstrap."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

FREQUENCY_EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the histogram of activation frequencies."""

Interval = tuple[float, float]
"""Where 95% of the bootstrap's figures lie."""


@dataclass(frozen=True)
class Reconstruction:
    """How well rows are reconstructed."""

    rows: int
    fvu: float
    explained_variance: float
    fvu_normalized: float
    """FVU of the normalised rows, the space in which the SAE is trained."""
    mse: float
    """Mean squared error per element."""
    cosine: float
    """Mean cosine between row and reconstruction."""
    norm_ratio: float
    """Mean norm of a reconstruction over the norm of its row."""
    relative_bias: float
    """Sum of |reconstruction|^2 over sum of row . reconstruction: below 1, activations are too small."""
    l0: float
    """Mean number of active latents."""
    l0_quantiles: tuple[float, ...]
    """Active latents on a row: 5%, 25%, 50%, 75% and 95% of the rows have no more."""
    dead: float
    """Share of latents that never fired on these rows."""
    dense_1_percent: float
    """Share of latents that fired on more than 1% of them."""
    dense_10_percent: float
    frequencies: tuple[int, ...]
    """Latents that fired on a share of the rows above 0, 1e-6, 1e-5, ..., 0.1 and up to the next of these."""
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Behaviour:
    """Next-token cross-entropy of the model, nats per token, with something in place of the rows at the site."""

    tokens: int
    original: float
    reconstructed: float
    zero_ablated: float
    mean_ablated: float
    """With the mean row of the text in place of all."""
    loss_recovered: float
    """(zero - reconstructed) / (zero - original)"""
    loss_recovered_mean: float
    """The same with the mean in place of zero: a stricter baseline."""
    delta_loss: float
    """reconstructed - original (Llama Scope's Delta LM loss)."""
    kl: float
    """KL divergence of the next-token distribution with the reconstruction from the original one, nats."""
    kl_zero_ablated: float
    intervals: dict[str, Interval] = field(default_factory=dict)


class PositionFigures(NamedTuple):
    """Rows at positions `first` to `last` of their sentence, from 0."""

    first: int
    last: int
    rows: int
    fvu: float
    """About the mean of these rows."""
    cosine: float
    l0: float


def without_nan(value: Any) -> Any:
    """`value`, of dataclasses, dictionaries and sequences, for JSON: a figure that does not exist (0 / 0) is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return without_nan(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {name: without_nan(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(value: Any) -> Any:
    """What `without_nan` was given, but for dataclasses; sequences become tuples."""
    if isinstance(value, dict):
        return {name: with_nan(of) for name, of in value.items()}
    if isinstance(value, list):
        return tuple(map(with_nan, value))
    return math.nan if value is None else value


def loss_recovered(original: float, reconstructed: float, ablated: float) -> float:
    """The share of the damage done by ablation that the reconstruction avoids; 1 is perfect, NaN if there was none."""
    return (ablated - reconstructed) / (ablated - original) if ablated != original else math.nan


def resampled(n_groups: int, seed: int) -> Float[Tensor, "sample group"]:
    """How often each group is in each of the bootstrap's samples."""
    counts = random_stream(seed, n_groups).multinomial(n_groups, [1 / n_groups] * n_groups, SAMPLES)
    return torch.from_numpy(counts).double()


def interval(figures: Float[Tensor, " sample"]) -> Interval:
    """The middle 95%."""
    low, high = torch.nanquantile(figures, torch.tensor([0.025, 0.975], dtype=figures.dtype)).tolist()
    return low, high


class RowSums:
    """Sums over rows and their reconstructions, for each of several groups."""

    NAMES = ("rows", "error", "squared", "reconstructed", "product", "cosine", "norm_ratio", "active")

    def __init__(self, n_groups: int, width: int) -> None:
        self.sums = torch.zeros(n_groups, len(self.NAMES), dtype=torch.float64)
        self.total = torch.zeros(n_groups, width, dtype=torch.float64)

    def add(
        self,
        rows: Float[Tensor, "row d_model"],
        reconstruction: Float[Tensor, "row d_model"],
        active: Int[Tensor, " row"],
        group: Int[Tensor, " row"],
    ) -> None:
        x, y = rows.double(), reconstruction.double()
        squared, reconstructed, product = x.square().sum(dim=1), y.square().sum(dim=1), (x * y).sum(dim=1)
        norms, norms_of = squared.sqrt(), reconstructed.sqrt()
        columns = (
            torch.ones_like(squared), (y - x).square().sum(dim=1), squared, reconstructed, product,
            product / (norms * norms_of).clamp(min=1e-30), norms_of / norms.clamp(min=1e-30), active.double(),
        )  # fmt: skip
        self.sums.index_add_(0, group, torch.stack(columns, dim=1))
        self.total.index_add_(0, group, x)

    def figures(self, weights: Float[Tensor, "part group"]) -> dict[str, Float[Tensor, " part"]]:
        """Of the rows that each line of `weights` is made of."""
        rows, error, squared, reconstructed, product, cosine, norm_ratio, active = (weights @ self.sums).T
        deviations = squared - (weights @ self.total).square().sum(dim=1) / rows
        fvu = torch.where(deviations > 1e-12 * squared, error / deviations, math.nan)
        return {
            "rows": rows, "fvu": fvu, "explained_variance": 1 - fvu, "mse": error / rows / self.total.shape[1],
            "cosine": cosine / rows, "norm_ratio": norm_ratio / rows, "relative_bias": reconstructed / product,
            "l0": active / rows,
        }  # fmt: skip


class ReconstructionSums:
    """What `Reconstruction` is made of."""

    def __init__(self, sae: SAE, n_groups: int = 1, seed: int = 0) -> None:
        self.sae, self.seed = sae, seed
        self.raw, self.normalized = (RowSums(n_groups, sae.config.d_model) for _ in range(2))
        self.fired = torch.zeros(sae.config.n_latents, dtype=torch.int64)
        self.active = torch.zeros(sae.config.n_latents + 1, dtype=torch.int64)
        """Number of rows with so many active latents."""

    def add(
        self,
        rows: Float[Tensor, "row d_model"],
        code: SparseCode,
        wanted: Float[Tensor, "row d_model"] | None = None,
        group: Int[Tensor, " row"] | None = None,
    ) -> None:
        """`wanted`: what is to be reconstructed from `rows`; None: themselves. `group`: of each row's document."""
        wanted = (rows if wanted is None else wanted).float()
        group = torch.zeros(len(rows), dtype=torch.int64) if group is None else group
        reconstruction, scale = self.sae.decode(code, rows), code.scale.clamp(min=EPSILON)
        active = (code.values > 0).sum(dim=1)
        self.raw.add(wanted, reconstruction, active, group)
        self.normalized.add((wanted - code.center) / scale, (reconstruction - code.center) / scale, active, group)
        self.fired += torch.bincount(code.indices[code.values > 0].long(), minlength=len(self.fired))
        self.active += torch.bincount(active, minlength=len(self.active))

    def result(self) -> Reconstruction:
        """Raises `InputError` if no row was added."""
        n_groups = len(self.raw.sums)
        everything = torch.ones(1, n_groups, dtype=torch.float64)
        figures = {name: values.item() for name, values in self.raw.figures(everything).items()}
        n = int(figures.pop("rows"))
        if n == 0:
            raise InputError("no row is left to evaluate: every row is an attention sink")
        frequency = self.fired.double() / n
        edges = torch.tensor(FREQUENCY_EDGES, dtype=torch.float64)
        bins = torch.bucketize(frequency[frequency > 0], edges[1:-1])
        rows_up_to = self.active.cumsum(0)
        return Reconstruction(
            rows=n,
            **figures,
            fvu_normalized=self.normalized.figures(everything)["fvu"].item(),
            l0_quantiles=tuple(float(torch.searchsorted(rows_up_to, math.ceil(q * n))) for q in QUANTILES),
            dead=(self.fired == 0).double().mean().item(),
            dense_1_percent=(frequency > 0.01).double().mean().item(),
            dense_10_percent=(frequency > 0.1).double().mean().item(),
            frequencies=tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()),
            intervals=self._intervals(n_groups),
        )

    def _intervals(self, n_groups: int) -> dict[str, Interval]:
        if n_groups < 2:  # one document says nothing about others
            return {}
        found = self.raw.figures(weights := resampled(n_groups, self.seed))
        found["fvu_normalized"] = self.normalized.figures(weights)["fvu"]
        return {name: interval(values) for name, values in found.items() if name != "rows"}


class PositionSums:
    """Figures by the position of rows in their sentence: 0, 1, 2-3, 4-7, ..."""

    def __init__(self, sae: SAE, most: int = 1 << 20) -> None:
        self.sae, self.sums = sae, RowSums(most.bit_length() + 1, sae.config.d_model)

    def add(self, rows: Tensor, code: SparseCode, wanted: Tensor, position: Int[Tensor, " row"]) -> None:
        active = (code.values > 0).sum(dim=1)
        bucket = torch.where(position > 0, position.clamp(min=1).double().log2().floor().long() + 1, 0)
        self.sums.add(wanted.float(), self.sae.decode(code, rows), active, bucket)

    def result(self) -> list[PositionFigures]:
        figures = self.sums.figures(torch.eye(len(self.sums.sums), dtype=torch.float64))
        found = []
        for bucket, rows in enumerate(figures["rows"].tolist()):
            if rows > 1:
                first, last = (0, 0) if bucket == 0 else (1 << (bucket - 1), (1 << bucket) - 1)
                fvu, cosine, l0 = (figures[name][bucket].item() for name in ("fvu", "cosine", "l0"))
                found.append(PositionFigures(first, last, int(rows), fvu, cosine, l0))
        return found


class BehaviourSums:
    """What `Behaviour` is made of: sums over predictions, for each group of documents."""

    VARIANTS = ("original", "reconstructed", "zero", "mean")

    def __init__(self, n_groups: int = 1, seed: int = 0) -> None:
        self.seed = seed
        self.sums = torch.zeros(n_groups, len(self.VARIANTS) + 3, dtype=torch.float64)

    def add(
        self, losses: dict[str, Float[Tensor, " prediction"]], divergences: dict[str, Tensor], group: Tensor
    ) -> None:
        """Cross-entropies by variant, and KL divergences of `reconstructed` and `zero`, of the same predictions."""
        columns = [torch.ones(len(group), dtype=torch.float64)]
        columns += [losses[name].double() for name in self.VARIANTS]
        columns += [divergences[name].double() for name in ("reconstructed", "zero")]
        self.sums.index_add_(0, group, torch.stack(columns, dim=1))

    def result(self) -> Behaviour:
        """Raises `InputError` if nothing was predicted."""
        n_groups = len(self.sums)
        figures = {name: of.item() for name, of in self._figures(torch.ones(1, n_groups, dtype=torch.float64)).items()}
        if not (tokens := int(figures.pop("tokens"))):
            raise InputError("no sentence has two tokens, so nothing is predicted: give more text")
        intervals = {}
        if n_groups > 1:
            found = self._figures(resampled(n_groups, self.seed))
            intervals = {name: interval(values) for name, values in found.items() if name != "tokens"}
        return Behaviour(tokens=tokens, **figures, intervals=intervals)

    def _figures(self, weights: Tensor) -> dict[str, Tensor]:
        tokens, *sums = (weights @ self.sums).T
        original, reconstructed, zero, mean, kl, kl_zero = (of / tokens for of in sums)
        return {
            "tokens": tokens, "original": original, "reconstructed": reconstructed, "zero_ablated": zero,
            "mean_ablated": mean, "loss_recovered": (zero - reconstructed) / (zero - original),
            "loss_recovered_mean": (mean - reconstructed) / (mean - original), "delta_loss": reconstructed - original,
            "kl": kl, "kl_zero_ablated": kl_zero,
        }  # fmt: skip
