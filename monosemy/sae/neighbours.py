"""Which directions lie close to each other: nearest neighbours by cosine, and what they say about dictionaries.

1. Cosines are computed block by block, in float32. A block serves its rows and its columns alike, so a pair of
   directions is multiplied once, and no more than a block is ever held.
2. Every direction keeps the few largest of its cosines; of equal ones those to the lowest latents.
3. Figures from these: how close the nearest neighbour is (`MaxCosines`), how far two dictionaries agree (`Agreement`),
   and how the latents of a narrow one become those of a wide one (`Splitting`).

A maximum over many directions is large by chance alone: compare every figure with that of `random_directions`.

Sources: Bricken et al. 2023, "Towards Monosemanticity" (feature splitting); Leask et al. 2025, arXiv 2502.04878
(stitching: which latents of a wider dictionary are novel); He et al. 2024, arXiv 2410.20526 (dictionaries of several
widths); Paulo and Belrose 2025, arXiv 2501.16615 (agreement between seeds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from monosemy.compiled import compiled
from monosemy.runtime import random_stream

BLOCK = 2048
"""Rows and columns of a block of cosines: 16 MiB."""

N_BINS = 100
"""Bins of a histogram of cosines, of equal width from -1 to 1."""


class Neighbours(NamedTuple):
    """The nearest neighbours of every latent, nearest first."""

    latents: Int32[np.ndarray, "latent rank"]
    cosines: Float32[np.ndarray, "latent rank"]


@dataclass(frozen=True)
class MaxCosines:
    """How close the nearest neighbour is, over the latents that have one."""

    latents: int
    mean: float
    """Mean of the largest cosine."""
    median: float
    share_above: float
    """Share of latents whose largest cosine is at least the threshold."""
    histogram: list[int]
    """Latents by largest cosine, in bins of equal width from -1 to 1."""


@dataclass(frozen=True)
class Agreement:
    """How far two dictionaries have the same directions.

    Paulo and Belrose assign latents one to one (Hungarian algorithm, cubic in their number). Mutual nearest neighbours
    are a bound that costs nothing: they are one to one too, so the most pairs with a cosine of at least the threshold
    that any assignment has are no fewer than `mutual_above`, and no more than the latents of either side that reach it.
    Without the threshold they say little: of random directions, n of each, half are mutual.
    """

    forward: MaxCosines
    """Of the first one's latents to the second one's."""
    backward: MaxCosines
    """Of the second one's latents to the first one's."""
    mutual: int
    """Pairs of latents, each the nearest of the other."""
    mutual_above: int
    """Those whose cosine is at least the threshold."""
    mutual_share: float
    """`mutual` over the latents of the dictionary that has fewer, and"""
    mutual_above_share: float
    """`mutual_above` over the same."""


@dataclass(frozen=True)
class Family:
    """A narrow latent and the wide latents whose parent it is."""

    narrow_latent: int
    size: int
    mean_cosine: float


@dataclass(frozen=True)
class Splitting:
    """How a wide dictionary's latents descend from a narrow one's: a forest, one edge at most per wide latent."""

    split: int
    """Narrow latents with two children or more."""
    kept: int
    """Narrow latents with one child."""
    lost: int
    """Narrow latents without a child."""
    new: int
    """Wide latents without a parent: no narrow latent's cosine reaches the threshold."""
    split_share: float
    """`split` over all narrow latents, and"""
    lost_share: float
    """`lost` over the same."""
    new_share: float
    """`new` over all wide latents."""
    largest: int
    """Children of the latent that has most."""
    sizes: list[int]
    """How many narrow latents have 0, 1, 2, ... children."""


# ---------------------------------------------------------------------------------------------------------------------
# Nearest neighbours
# ---------------------------------------------------------------------------------------------------------------------


def unit(directions: Float[Tensor, "latent d_model"]) -> Float32[Tensor, "latent d_model"]:
    """Directions of norm 1. One of zeros stays so: its cosine with every other is 0."""
    directions = directions.float()
    return directions / directions.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def random_directions(n_latents: int, d_model: int, *key: int) -> Float32[Tensor, "latent d_model"]:
    """Unit vectors, uniform on the sphere, that depend on nothing but `key`."""
    return unit(torch.from_numpy(random_stream(*key).standard_normal((n_latents, d_model), np.float32)))


def nearest_within(
    directions: Float32[Tensor, "latent d_model"],
    n: int,
    block: int = BLOCK,
    advance: Callable[[int], None] = lambda _: None,
) -> Neighbours:
    """For each unit vector the `n` nearest of the others, or all where there are fewer. `advance` is told how many more
    pairs have been compared."""
    best = Best(len(directions), min(n, len(directions) - 1))
    parts = directions.split(block)
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts[i:], i):
            cosines = rows @ columns.T
            if i == j:
                cosines.fill_diagonal_(-torch.inf)  # none is its own neighbour
            else:
                best.offer_to_columns(cosines, i * block, j * block)
            best.offer_to_rows(cosines, i * block, j * block)
            advance(len(rows) * (len(rows) - 1) // 2 if i == j else cosines.numel())
    return best.result()


def nearest_across(
    first: Float32[Tensor, "latent d_model"],
    second: Float32[Tensor, "other d_model"],
    n: int,
    block: int = BLOCK,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Neighbours, Neighbours]:
    """For each unit vector of `first` the `n` nearest in `second`, and the other way round."""
    forward, backward = Best(len(first), min(n, len(second))), Best(len(second), min(n, len(first)))
    for i, rows in enumerate(first.split(block)):
        for j, columns in enumerate(second.split(block)):
            cosines = rows @ columns.T
            forward.offer_to_rows(cosines, i * block, j * block)
            backward.offer_to_columns(cosines, i * block, j * block)
            advance(cosines.numel())
    return forward.result(), backward.result()


class Best:
    """The largest cosines so far of every latent. Blocks come in such an order that each latent is offered the others
    from the lowest on, so of equal cosines the lowest latents stay."""

    def __init__(self, n_latents: int, n: int) -> None:
        self.cosines = np.full((n, n_latents), -np.inf, np.float32)  # by rank first: the least ones lie side by side
        self.latents = np.zeros((n, n_latents), np.int32)

    def offer_to_rows(self, block: Float32[Tensor, "row column"], row: int, column: int) -> None:
        """`block` begins at latent `row` of ours and at `column` of the others."""
        part = slice(row, row + len(block))
        _offer_to_rows(block.numpy(), column, self.cosines[:, part], self.latents[:, part])

    def offer_to_columns(self, block: Float32[Tensor, "row column"], row: int, column: int) -> None:
        """`block` begins at `row` of the others and at latent `column` of ours."""
        part = slice(column, column + block.shape[1])
        _offer_to_columns(block.numpy(), row, self.cosines[:, part], self.latents[:, part])

    def result(self) -> Neighbours:
        cosines = np.clip(self.cosines, -1, 1)  # rounding leaves 1.0000001
        return Neighbours(np.ascontiguousarray(self.latents.T), np.ascontiguousarray(cosines.T))


@compiled
@no_type_check
def _insert(value, other, latent, cosines, others):
    """Put `value` in its place among the largest of `latent`, behind those that equal it."""
    rank = cosines.shape[0] - 1
    while rank > 0 and value > cosines[rank - 1, latent]:
        cosines[rank, latent], others[rank, latent] = cosines[rank - 1, latent], others[rank - 1, latent]
        rank -= 1
    cosines[rank, latent], others[rank, latent] = value, other


@compiled
@no_type_check
def _offer_to_rows(block, first_column, cosines, others):
    last = cosines.shape[0] - 1
    for row in range(block.shape[0]):
        for column in range(block.shape[1]):
            if block[row, column] > cosines[last, row]:
                _insert(block[row, column], first_column + column, row, cosines, others)


@compiled
@no_type_check
def _offer_to_columns(block, first_row, cosines, others):
    last = cosines.shape[0] - 1
    for row in range(block.shape[0]):
        for column in range(block.shape[1]):
            if block[row, column] > cosines[last, column]:
                _insert(block[row, column], first_row + row, column, cosines, others)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def max_cosines(neighbours: Neighbours, threshold: float) -> MaxCosines:
    """How close the nearest neighbours are."""
    largest = neighbours.cosines[:, 0]
    return MaxCosines(
        latents=len(largest),
        mean=largest.mean(dtype=np.float64).item(),
        median=np.median(largest).item(),
        share_above=(largest >= threshold).mean().item(),
        histogram=np.histogram(largest, N_BINS, (-1, 1))[0].tolist(),
    )


def agreement(forward: Neighbours, backward: Neighbours, threshold: float) -> Agreement:
    """How far two dictionaries agree, from the neighbours of the first in the second and those of the second in the
    first."""
    mutual = mutual_nearest(forward, backward)
    n_mutual, n_above = int(mutual.sum()), int((mutual & (forward.cosines[:, 0] >= threshold)).sum())
    smaller = min(len(forward.latents), len(backward.latents))
    return Agreement(
        forward=max_cosines(forward, threshold),
        backward=max_cosines(backward, threshold),
        mutual=n_mutual,
        mutual_above=n_above,
        mutual_share=n_mutual / smaller,
        mutual_above_share=n_above / smaller,
    )


def mutual_nearest(forward: Neighbours, backward: Neighbours) -> Bool[np.ndarray, " latent"]:
    """Which latents of the first dictionary are the nearest of their nearest in the second."""
    return backward.latents[forward.latents[:, 0], 0] == np.arange(len(forward.latents))


def parents(wide_in_narrow: Neighbours, threshold: float) -> Int[np.ndarray, " wide_latent"]:
    """For each wide latent the most similar narrow one, or -1 where their cosine is below `threshold`."""
    return np.where(wide_in_narrow.cosines[:, 0] >= threshold, wide_in_narrow.latents[:, 0], -1)


def splitting(parent: Int[np.ndarray, " wide_latent"], n_narrow: int) -> Splitting:
    """What became of `n_narrow` latents, given the parent of every wide one, -1 for none."""
    children = np.bincount(parent[parent >= 0], minlength=n_narrow)
    split, lost, new = int((children > 1).sum()), int((children == 0).sum()), int((parent < 0).sum())
    return Splitting(
        split=split,
        kept=n_narrow - split - lost,
        lost=lost,
        new=new,
        split_share=split / n_narrow,
        lost_share=lost / n_narrow,
        new_share=new / len(parent),
        largest=int(children.max()),
        sizes=np.bincount(children).tolist(),
    )


def largest_families(
    parent: Int[np.ndarray, " wide_latent"], cosine: Float32[np.ndarray, " wide_latent"], n_narrow: int, n: int
) -> list[Family]:
    """The `n` narrow latents with most children, of those that have two or more; of equal ones the lowest first."""
    of_a_family = parent >= 0
    children = np.bincount(parent[of_a_family], minlength=n_narrow)
    total = np.bincount(parent[of_a_family], cosine[of_a_family], n_narrow)
    order = np.argsort(-children, kind="stable")[:n]
    return [Family(int(i), int(children[i]), float(total[i] / children[i])) for i in order if children[i] > 1]
