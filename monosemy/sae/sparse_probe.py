"""How well does a linear probe on k latents tell a class from the rest?

1. Latents are ranked on the training side by how far their means in the class and in the rest lie apart, in standard
   deviations of the latent: the ranking by |correlation| with the label.
2. Logistic regression on the first k, each divided by its standard deviation; class and rest count the same.
3. The same on k random latents, several times; on all latents; and on the mean raw activation, standardised. With so
   many features the penalty matters: it is chosen on the training side, by documents held out of that.
4. And on the number of tokens alone: in a longer sentence more latents fire, and higher, whatever they mean.
5. All are scored on the test side (`resampled`).

k-sparse probing: Gurnee et al. 2023, arXiv 2305.01610; of SAE latents: Karvonen et al. 2025 (SAEBench), arXiv
2503.09532.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from monosemy.runtime import InputError, random_stream
from monosemy.sae.resampled import Figures, Resamples, joined

Features = Literal["latents", "random latents", "all latents", "activations", "sentence length", "majority class"]

INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Logistic regression's C, among which that of probes on many features is chosen."""
SPARSE_INVERSE_PENALTY = 1.0
"""That of probes on k features, too few to overfit: scikit-learn's default, as in SAEBench."""
FOLDS = 3
"""Parts of the training documents, each held out once to choose the penalty."""
MAX_ITERATIONS = 2000

RANDOM_LATENTS, FOLD = 12, 13
"""Which random stream is for what."""


class Examples(NamedTuple):
    """The sentences that probes see."""

    latents: Any
    """(sentence, latent), a scipy.sparse.csr_array of float64."""
    activations: Float[np.ndarray, "sentence d_model"]
    tokens: Int[np.ndarray, " sentence"]
    """How many there are, at least 1."""
    document: Int[np.ndarray, " sentence"]
    label: Int[np.ndarray, " sentence"]
    """Number of the class."""
    test: Bool[np.ndarray, " sentence"]


@dataclass(frozen=True)
class ChosenLatent:
    """A latent that a probe reads."""

    latent: int
    coefficient: float
    """What one standard deviation more of it adds to the log-odds of the class."""
    difference: float
    """Mean in the class minus mean in the rest, in standard deviations, on the training side."""


@dataclass(frozen=True)
class Probe:
    """A probe of one class, and what it scored on the test side."""

    features: Features
    k: int
    """How many features."""
    figures: Figures
    inverse_penalty: float | None = None
    latents: tuple[ChosenLatent, ...] = ()
    """Those of `latents`, from the farthest apart."""


class Fit(NamedTuple):
    """A fitted probe."""

    scores: Float64[np.ndarray, " test"]
    """Log-odds of the class."""
    coefficients: Float64[np.ndarray, " feature"]


class ClassProbes:
    """The probes of class `number` against the rest."""

    def __init__(self, examples: Examples, number: int, resamples: Resamples, seed: int) -> None:
        self.number, self.resamples, self.seed = number, resamples, seed
        self.positive, self.test = examples.label == number, examples.test
        self.activations, self.document = examples.activations, examples.document
        self.tokens = examples.tokens
        train = examples.latents[np.flatnonzero(~self.test)]
        self.differences, deviations = standardized_differences(train, self.positive[~self.test])
        self.firing = np.flatnonzero(deviations > 0)
        """Latents that tell one training sentence from another."""
        self.ranked = self.firing[np.argsort(-np.abs(self.differences[self.firing]), kind="stable")]
        inverse = np.divide(1, deviations, out=np.zeros_like(deviations), where=deviations > 0)
        self.scaled = (examples.latents * inverse).tocsc()

    def all(self, k: tuple[int, ...], draws: int) -> Iterator[Probe]:
        """Every probe; of random latents `draws` for each k."""
        if max(k) > len(self.firing):
            raise InputError(
                f"k is {max(k)}, but only {len(self.firing)} latents fire in the sentences to fit on: choose a smaller "
                "--k, or raise --max-sentences"
            )
        for each in k:
            yield self.on_chosen(each)
            yield self.on_random(each, draws)
        yield self.on_many("all latents", self.scaled[:, self.firing].tocsr())
        yield self.on_many("activations", standardized(self.activations, ~self.test))
        yield self.on_length()
        yield self.majority()

    def on_chosen(self, k: int) -> Probe:
        """The first k of the ranking."""
        chosen = self.ranked[:k]
        fitted = self._fit_latents(chosen)
        columns = chosen.tolist(), fitted.coefficients.tolist(), self.differences[chosen].tolist()
        latents = tuple(ChosenLatent(*each) for each in zip(*columns, strict=True))
        return Probe("latents", k, self._score(fitted), SPARSE_INVERSE_PENALTY, latents)

    def on_random(self, k: int, draws: int) -> Probe:
        """k latents of those that fire, whatever they mean."""
        streams = [random_stream(self.seed, RANDOM_LATENTS, self.number, k, draw) for draw in range(draws)]
        fits = [self._fit_latents(stream.choice(self.firing, k, replace=False)) for stream in streams]
        return Probe("random latents", k, joined([self._score(each) for each in fits]), SPARSE_INVERSE_PENALTY)

    def on_many(self, name: Features, columns: Any) -> Probe:
        """All `columns` (sentence, feature), with the penalty that serves them best."""
        train = ~self.test
        sides = columns[np.flatnonzero(train)], self.positive[train], self.document[train]
        penalty = choose_inverse_penalty(*sides, self.seed)
        fitted = fit(columns, self.positive, self.test, penalty)
        return Probe(name, columns.shape[1], self._score(fitted), penalty)

    def on_length(self) -> Probe:
        """The logarithm of the number of tokens."""
        length = standardized(np.log(self.tokens)[:, None], ~self.test)
        fitted = fit(length, self.positive, self.test, SPARSE_INVERSE_PENALTY)
        return Probe("sentence length", 1, self._score(fitted), SPARSE_INVERSE_PENALTY)

    def majority(self) -> Probe:
        """The same answer always: the one that is right more often on the training side."""
        answer = 1.0 if self.positive[~self.test].mean() > 0.5 else -1.0
        return Probe("majority class", 0, self._score(Fit(np.full(int(self.test.sum()), answer), np.zeros(0))))

    def _fit_latents(self, latents: Int[np.ndarray, " k"]) -> Fit:
        return fit(self.scaled[:, latents].toarray(), self.positive, self.test, SPARSE_INVERSE_PENALTY)

    def _score(self, fitted: Fit) -> Figures:
        return self.resamples.figures(fitted.scores, self.positive[self.test])


def standardized_differences(
    latents: Any, positive: Bool[np.ndarray, " sentence"]
) -> tuple[Float64[np.ndarray, " latent"], Float64[np.ndarray, " latent"]]:
    """Per column of a sparse matrix: (mean where `positive` minus mean elsewhere, in standard deviations of the column;
    that standard deviation). Both are 0 for a column that does not vary."""
    mean, mean_square = latents.mean(axis=0), latents.multiply(latents).mean(axis=0)
    deviation = np.sqrt(np.maximum(mean_square - mean**2, 0))
    deviation[deviation <= 1e-6 * np.sqrt(mean_square)] = 0  # a constant, but for rounding
    apart = latents[np.flatnonzero(positive)].mean(axis=0) - latents[np.flatnonzero(~positive)].mean(axis=0)
    return np.divide(apart, deviation, out=np.zeros_like(apart), where=deviation > 0), deviation


def standardized(
    x: Float[np.ndarray, "sentence d_model"], train: Bool[np.ndarray, " sentence"]
) -> Float64[np.ndarray, "sentence d_model"]:
    """Every column to mean 0 and standard deviation 1 on the training side."""
    x = x.astype(np.float64)
    deviation = x[train].std(axis=0)
    return (x - x[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def fit(
    columns: Any, positive: Bool[np.ndarray, " sentence"], test: Bool[np.ndarray, " sentence"], inverse_penalty: float
) -> Fit:
    """Logistic regression on `columns` (sentence, feature) where not `test`, and its log-odds where `test`."""
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=MAX_ITERATIONS)
    regression.fit(columns[np.flatnonzero(~test)], positive[~test])
    return Fit(regression.decision_function(columns[np.flatnonzero(test)]), regression.coef_[0])


def choose_inverse_penalty(
    columns: Any, positive: Bool[np.ndarray, " sentence"], document: Int[np.ndarray, " sentence"], seed: int
) -> float:
    """The C whose probes have the best mean AUROC on documents that they were not fitted on. Where class or rest has
    only one document nothing can be held out, and the strongest penalty is the safest."""
    from sklearn.metrics import roc_auc_score

    parts = fold_documents(positive, document, seed)
    if parts is None:
        return INVERSE_PENALTIES[0]

    def held_out_auroc(inverse_penalty: float) -> float:
        held_out = [parts == number for number in range(parts.max() + 1)]
        fits = [fit(columns, positive, each, inverse_penalty) for each in held_out]
        return np.mean([roc_auc_score(positive[h], f.scores) for h, f in zip(held_out, fits, strict=True)]).item()

    return max(INVERSE_PENALTIES, key=held_out_auroc)


def fold_documents(
    positive: Bool[np.ndarray, " sentence"], document: Int[np.ndarray, " sentence"], seed: int
) -> Int[np.ndarray, " sentence"] | None:
    """A fold for every sentence, that of its document; documents of class and rest are in each. None: too few."""
    sides = [np.unique(document[positive == side]) for side in (True, False)]
    n_folds = min(FOLDS, *map(len, sides))
    if n_folds < 2:
        return None
    fold = np.zeros(document.max() + 1, np.int64)
    for number, members in enumerate(sides):
        fold[random_stream(seed, FOLD, number).permutation(members)] = np.arange(len(members)) % n_folds
    return fold[document]
