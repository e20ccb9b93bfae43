"""Accuracy, balanced accuracy and AUROC of a probe, and how they would vary with other documents.

Sentences of one document are alike, so as many independent ones as there are sentences would promise too much. Test
documents are drawn again with replacement, as many of each class as there are, and every sentence counts as often as
its document was drawn; 95% of the results lie between `low` and `high` (percentile bootstrap over clusters: Efron and
Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from monosemy.runtime import random_stream

METRICS = ("accuracy", "balanced_accuracy", "auroc")

RESAMPLE = 11
"""The random stream of the resamples."""
WEIGHED_AT_ONCE = 1 << 22
"""Resamples times sentences whose weights are held at once."""


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that 95% of its resamples lie in."""

    value: float
    low: float
    high: float


class Figures(NamedTuple):
    """What a probe scored; one that was made several times from other draws has a column for each."""

    points: Float64[np.ndarray, "metric draw"]
    resamples: Float64[np.ndarray, "metric draw resample"]

    def interval(self, metric: str) -> Interval:
        """The mean over draws; the interval covers documents and draws."""
        number = METRICS.index(metric)
        low, high = np.quantile(self.resamples[number], (0.025, 0.975))
        return Interval(float(self.points[number].mean()), float(low), float(high))


def joined(figures: list[Figures]) -> Figures:
    """The same probe from several draws."""
    return Figures(*(np.concatenate(column, axis=1) for column in zip(*figures, strict=True)))


def macro_mean(figures: list[Figures]) -> Figures:
    """Mean over classes, resample by resample: classes share their test documents."""
    return Figures(*(np.mean(column, axis=0) for column in zip(*figures, strict=True)))


class Resamples:
    """Test sentences with the weights that resampled documents give them."""

    def __init__(
        self, document: Int[np.ndarray, " test"], label: Int[np.ndarray, " test"], n_resamples: int, seed: int
    ) -> None:
        documents, first, self.owner = np.unique(document, return_index=True, return_inverse=True)
        self.counts = np.zeros((n_resamples, len(documents)), np.int32)
        stream = random_stream(seed, RESAMPLE)
        for number in np.unique(label):
            members = np.flatnonzero(label[first] == number)
            share = np.full(len(members), 1 / len(members))
            self.counts[:, members] = stream.multinomial(len(members), share, size=n_resamples)

    def figures(self, scores: Float64[np.ndarray, " test"], positive: Bool[np.ndarray, " test"]) -> Figures:
        """What log-odds `scores` are worth for telling the `positive` from the rest."""
        step = max(1, WEIGHED_AT_ONCE // len(scores))
        parts = [self.counts[start : start + step, self.owner] for start in range(0, len(self.counts), step)]
        resamples = np.concatenate([measure(scores, positive, part.astype(np.float64)) for part in parts], axis=1)
        return Figures(measure(scores, positive, np.ones((1, len(scores)))), resamples[:, None])


def measure(
    scores: Float64[np.ndarray, " test"],
    positive: Bool[np.ndarray, " test"],
    weights: Float64[np.ndarray, "resample test"],
) -> Float64[np.ndarray, "metric resample"]:
    """`METRICS` with every sentence counted as often as its weight says; both classes must have some."""
    right = (scores > 0) == positive
    found, rejected = weights @ (right & positive), weights @ (right & ~positive)
    n_positive, n_negative = weights @ positive, weights @ ~positive
    accuracy = (found + rejected) / (n_positive + n_negative)
    return np.stack([accuracy, (found / n_positive + rejected / n_negative) / 2, auroc(scores, positive, weights)])


def auroc(
    scores: Float64[np.ndarray, " test"],
    positive: Bool[np.ndarray, " test"],
    weights: Float64[np.ndarray, "resample test"],
) -> Float64[np.ndarray, " resample"]:
    """How often a positive one scores above a negative one; a tie is half of a win."""
    order = np.argsort(scores, kind="stable")
    groups = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where a new score begins
    weights = weights[:, order]
    wins = np.add.reduceat(weights * positive[order], groups, axis=1)
    losses = np.add.reduceat(weights * ~positive[order], groups, axis=1)
    below = losses.cumsum(axis=1) - losses
    return (wins * (below + losses / 2)).sum(axis=1) / (wins.sum(axis=1) * losses.sum(axis=1))
