"""Descriptions a latent's firing could have, and how well each fits.

A hypothesis is a set of conditions on a word and its surroundings: "the word is `nations`, the one before it
`united`"; "the word is a year"; "the sentence speaks of `iraq`". It is measured on the latent's examples and on the
background:

    coverage     the share of the latent's activation, on its examples, that falls on words that meet the conditions
    precision    P(fires | conditions): the estimated number of firings on such words, over how many such words the
                 text has
    specificity  log(precision / density) / log(1 / density): the share of the information "it fires here" that the
                 conditions give; 1 if it always fires on them, 0 if they tell nothing
    support      n / (n + 2) for n sentences in which it fires: two sentences are no pattern

    certainty  = coverage * specificity * support

The density is that of firing words. The number of firings on such words is extrapolated from the examples, which
are all there is for a latent that fires in no more sentences than are kept, and the strongest for the others.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from monosemy.explain.lexicon import Lexicon

Kind = Literal["form", "family", "class", "piece", "theme"]


class Condition(NamedTuple):
    """One thing asked of a word: that the word `offset` places further on has this form, family or class, that the
    word contains this token (piece), or that the word's sentence has this family earlier on or later (theme)."""

    kind: Kind
    offset: int
    value: int


Hypothesis = tuple[Condition, ...]
"""All conditions must be met."""


class Firing(NamedTuple):
    """The words on which a latent fires in its examples."""

    words: Int64[np.ndarray, " firing"]
    pieces: Int64[np.ndarray, " firing"]
    """The token of the word on which it fires most."""
    weights: Float[np.ndarray, " firing"]
    """Activations, divided by their sum."""
    n_sentences: int
    """Sentences of the whole text in which it fires."""
    n_fired: float
    """Words of the whole text on which it fires, estimated."""
    density: float
    """Of these among all words."""


class Fit(NamedTuple):
    """How well a description, one hypothesis or the union of several, fits."""

    coverage: float
    precision: float
    specificity: float
    certainty: float
    lift: float
    """Precision over density."""


class Corpus:
    """Counts hypotheses in the background."""

    def __init__(self, lexicon: Lexicon, n_words: float) -> None:
        self.lexicon = lexicon
        self.n_words = n_words
        """Words in the whole text, estimated."""
        self.scale = n_words / max(lexicon.n_background, 1)
        words = lexicon.background.nonzero()[0]
        self.words_by = {"form": _Inverted(words, lexicon.form), "family": _Inverted(words, lexicon.family)}
        parts = (lexicon.word_of_token >= 0).nonzero()[0]
        order = parts[np.argsort(lexicon.piece_of_token[parts], kind="stable")]
        self.with_piece = _Inverted(lexicon.word_of_token[order], lexicon.piece_of_token[order], direct=True)
        self.class_counts = lexicon.classes[words].sum(axis=0)
        self.words = words
        self.known: dict[Hypothesis, float] = {}
        self.n_sentences = len(lexicon.starts) - 1
        every = lexicon.real_words
        themes = np.unique(lexicon.sentence[every] * len(lexicon.forms) + lexicon.family[every])
        self.sentences_with = _Inverted(themes // len(lexicon.forms), themes % len(lexicon.forms), direct=True)
        self.lengths = np.bincount(lexicon.sentence[words], minlength=self.n_sentences)

    def count(self, hypothesis: Hypothesis) -> float:
        """How many words of the whole text meet all conditions, estimated."""
        if hypothesis not in self.known:
            self.known[hypothesis] = self.scale * self._count(hypothesis)
        return self.known[hypothesis]

    def _count(self, hypothesis: Hypothesis) -> int:
        sizes = [(self._size(condition), condition) for condition in hypothesis]
        _, rarest = min(sizes)
        rest = [condition for condition in hypothesis if condition != rarest]
        if not rest:
            return min(sizes)[0]
        words = self._words(rarest)
        met = np.ones(len(words), bool)
        for condition in rest:
            met &= self.meets(words, condition)
        return int(met.sum())

    def _size(self, condition: Condition) -> int:
        if condition.kind == "theme":
            return int(self.lengths[self.sentences_with.of(condition.value)].sum())
        if condition.kind == "class":
            return int(self.class_counts[condition.value])
        if condition.kind == "piece":
            return int(self.lexicon.background[np.unique(self.with_piece.of(condition.value))].sum())
        if condition.value == 0:  # a boundary: one word per sentence is beside it
            return int((self.lengths > 0).sum())
        return len(self.words_by[condition.kind].of(condition.value))

    def _words(self, condition: Condition) -> Int64[np.ndarray, " word"]:
        """The background words that meet `condition`."""
        if condition.kind in ("form", "family") and condition.value != 0:
            words = self.words_by[condition.kind].of(condition.value) - condition.offset
            return words[self.lexicon.form[words] != 0]
        return self.words[self.meets(self.words, condition)]

    def meets(self, words: Int64[np.ndarray, " word"], condition: Condition) -> Bool[np.ndarray, " word"]:
        """Which of `words` meet `condition`."""
        lexicon = self.lexicon
        match condition.kind:
            case "form":
                return lexicon.form[words + condition.offset] == condition.value
            case "family":
                return lexicon.family[words + condition.offset] == condition.value
            case "class":
                return lexicon.classes[words + condition.offset, condition.value]
            case "piece":
                return np.isin(words, self.with_piece.of(condition.value))
            case "theme":
                has = np.zeros(self.n_sentences, bool)
                has[self.sentences_with.of(condition.value)] = True
                return has[lexicon.sentence[words]]


class _Inverted:
    """Value -> the items that have it, ascending."""

    def __init__(self, items: np.ndarray, values: np.ndarray, direct: bool = False) -> None:
        keys = values if direct else values[items]
        order = np.argsort(keys, kind="stable")
        self.items = items[order]
        self.starts = np.searchsorted(keys[order], np.arange((keys.max() if len(keys) else 0) + 2))

    def of(self, value: int) -> np.ndarray:
        if value + 1 >= len(self.starts):
            return self.items[:0]
        return self.items[self.starts[value] : self.starts[value + 1]]


def fit(firing: Firing, met: Bool[np.ndarray, " firing"], n_words: float) -> Fit:
    """How well a description fits that `met` words of the examples meet, and `n_words` of the whole text."""
    coverage = float(firing.weights[met].sum())
    fired = firing.n_fired * float(met.mean())
    precision = min(1.0, fired / max(n_words, fired, 1e-9))
    specificity = 0.0
    if precision > firing.density:
        specificity = math.log(precision / firing.density) / math.log(1 / firing.density)
    support = firing.n_sentences / (firing.n_sentences + 2)
    certainty = coverage * specificity * support
    return Fit(coverage, precision, specificity, certainty, precision / firing.density)
