"""Per-latent statistics and best sentences, gathered from sparse codes one batch of whole sentences after another.

1. A counting sort brings the entries of one latent together, in the order of rows.
2. One visit per latent: its counters, and, per sentence it fires in, the scores under each aggregation.
3. A score that is good enough goes into the latent's list of the best. Lists are ordered by score, then by lowest
   sentence number: what is kept does not depend on how sentences were batched, nor on their order.
4. The activations of a kept sentence stay in a pool that the lists point into. The pool grows by every batch and is
   cut back to what is pointed at, so memory is bounded by latents x examples, whatever the number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

AGGREGATIONS = ("max", "mean", "last")
"""A sentence's score: the largest activation, the mean over all of its tokens, or the activation on its last token."""

BINS = 64
BINS_PER_OCTAVE = 4
"""Bin b of a histogram counts activations from 2**((b - 32) / 4) up to 2**((b - 31) / 4); the outermost bins count
what lies beyond, too."""

POOL_SLACK = 1 << 22
"""Entries the pool may hold beyond twice what was pointed at."""

compiled = numba.njit(nogil=True, cache=True)


class Batch(NamedTuple):
    """Whole sentences, their rows one after another."""

    sentences: Int64[np.ndarray, " sentence"]
    """Sentence numbers."""
    lengths: Int64[np.ndarray, " sentence"]
    values: Float32[np.ndarray, "row k"]
    """Activations; 0 marks an unused slot."""
    indices: Int32[np.ndarray, "row k"]
    sink: Bool[np.ndarray, " row"]
    """Rows on which nothing counts as firing."""


class Counters(NamedTuple):
    """One number per latent."""

    n_fired: Int64[np.ndarray, " latent"]
    n_first: Int64[np.ndarray, " latent"]
    """Of these, on the first token of a sentence that is not a sink."""
    n_last: Int64[np.ndarray, " latent"]
    """Of these, on the last token of a sentence."""
    n_sentences: Int64[np.ndarray, " latent"]
    """Sentences it fires in."""
    total: np.ndarray
    """Sum of activations, float64."""
    largest: Float32[np.ndarray, " latent"]
    histogram: Int64[np.ndarray, "latent bin"]


class Best(NamedTuple):
    """The best sentences per latent, aggregation and rank; a score of 0 marks an empty place."""

    score: Float32[np.ndarray, "latent aggregation rank"]
    sentence: Int64[np.ndarray, "latent aggregation rank"]
    start: Int64[np.ndarray, "latent aggregation rank"]
    """Where in the pool its activations begin, and"""
    length: Int32[np.ndarray, "latent aggregation rank"]
    """how many they are."""


class Tally:
    """What has been gathered so far."""

    def __init__(self, n_latents: int, n_examples: int) -> None:
        integers = [np.zeros(n_latents, np.int64) for _ in range(4)]
        self.counters = Counters(
            *integers,
            total=np.zeros(n_latents),
            largest=np.zeros(n_latents, np.float32),
            histogram=np.zeros((n_latents, BINS), np.int64),
        )
        shape = (n_latents, len(AGGREGATIONS), n_examples)
        self.best = Best(
            np.zeros(shape, np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int32)
        )
        self.pool: list[tuple[np.ndarray, np.ndarray]] = []
        self.pool_size = self.pointed_at = 0
        self.n_rows = self.n_sinks = 0

    @property
    def n_latents(self) -> int:
        return len(self.counters.n_fired)

    def add(self, batch: Batch) -> None:
        """Count the sentences of `batch`."""
        ends = batch.lengths.cumsum()
        assert ends[-1] == len(batch.values) == len(batch.sink), "rows and sentence lengths must agree"
        values = np.where(batch.sink[:, None], np.float32(0), batch.values)
        starts, rows, sorted_values = sort_by_latent(values, batch.indices, self.n_latents)
        sentence_of_row = np.repeat(np.arange(len(ends)), batch.lengths)
        first_row = first_rows(batch.sink, ends)
        visit(
            starts, rows, sorted_values, sentence_of_row, first_row, ends, batch.sentences, self.pool_size,
            self.counters, self.best,
        )  # fmt: skip
        positions = rows - (ends - batch.lengths)[sentence_of_row[rows]]
        self.pool.append((positions.astype(np.int32), sorted_values))
        self.pool_size += len(rows)
        self.n_rows += len(values)
        self.n_sinks += int(batch.sink.sum())
        if self.pool_size > 2 * self.pointed_at + POOL_SLACK:
            self.compact()

    def compact(self) -> tuple[Int32[np.ndarray, " entry"], Float32[np.ndarray, " entry"]]:
        """Cut the pool back to what the lists point at; returns its positions and activations."""
        positions, values = (np.concatenate(columns) for columns in zip(*self.pool, strict=True))
        kept = self.best.length > 0
        old, first, which = np.unique(self.best.start[kept], return_index=True, return_inverse=True)
        lengths = self.best.length[kept][first].astype(np.int64)
        new = lengths.cumsum() - lengths
        self.best.start[kept] = new[which]
        gather = np.repeat(old - new, lengths) + np.arange(lengths.sum())
        self.pool = [(positions[gather], values[gather])]
        self.pool_size = self.pointed_at = len(gather)
        return self.pool[0]


@compiled
@no_type_check
def sort_by_latent(values, indices, n_latents):
    """Entries above 0 in the order of (latent, row): starts per latent, and the rows and values of the entries."""
    starts = np.zeros(n_latents + 1, np.int64)
    for row in range(values.shape[0]):
        for slot in range(values.shape[1]):
            if values[row, slot] > 0:
                starts[indices[row, slot] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    place = starts[:-1].copy()
    rows = np.empty(starts[-1], np.int64)
    sorted_values = np.empty(starts[-1], np.float32)
    for row in range(values.shape[0]):
        for slot in range(values.shape[1]):
            if values[row, slot] > 0:
                entry = place[indices[row, slot]]
                rows[entry], sorted_values[entry] = row, values[row, slot]
                place[indices[row, slot]] += 1
    return starts, rows, sorted_values


@compiled
@no_type_check
def first_rows(sink, ends):
    """The first row of each sentence that is not a sink, -1 where there is none."""
    first = np.full(len(ends), -1, np.int64)
    row = 0
    for sentence in range(len(ends)):
        while row < ends[sentence]:
            if not sink[row] and first[sentence] < 0:
                first[sentence] = row
            row += 1
    return first


@compiled
@no_type_check
def visit(starts, rows, values, sentence_of_row, first_row, ends, numbers, pool_size, counters, best):
    """Add the sorted entries of one batch to `counters` and `best`."""
    for latent in range(len(starts) - 1):
        entry = starts[latent]
        while entry < starts[latent + 1]:
            begin = entry
            sentence = sentence_of_row[rows[begin]]
            largest, total = np.float32(0), 0.0
            while entry < starts[latent + 1] and sentence_of_row[rows[entry]] == sentence:
                largest = max(largest, values[entry])
                total += values[entry]
                octaves = np.floor(np.log2(values[entry]) * BINS_PER_OCTAVE)
                counters.histogram[latent, int(min(max(octaves + BINS // 2, 0), BINS - 1))] += 1
                entry += 1
            on_last = rows[entry - 1] == ends[sentence] - 1
            counters.n_fired[latent] += entry - begin
            counters.n_first[latent] += rows[begin] == first_row[sentence]
            counters.n_last[latent] += on_last
            counters.n_sentences[latent] += 1
            counters.total[latent] += total
            counters.largest[latent] = max(counters.largest[latent], largest)
            length = ends[sentence] - (ends[sentence - 1] if sentence > 0 else 0)
            last = values[entry - 1] if on_last else np.float32(0)
            for aggregation, score in enumerate((largest, np.float32(total / length), last)):
                _insert(best, latent, aggregation, score, numbers[sentence], pool_size + begin, entry - begin)


@compiled
@no_type_check
def _insert(best, latent, aggregation, score, sentence, start, length):
    """Put a sentence at its rank, if it has one; the worst falls off the end."""
    scores, sentences = best.score[latent, aggregation], best.sentence[latent, aggregation]
    place = len(scores)
    while place > 0 and (
        score > scores[place - 1] or (score == scores[place - 1] and score > 0 and sentence < sentences[place - 1])
    ):
        place -= 1
    if place == len(scores):
        return
    for rank in range(len(scores) - 1, place, -1):
        scores[rank], sentences[rank] = scores[rank - 1], sentences[rank - 1]
        best.start[latent, aggregation, rank] = best.start[latent, aggregation, rank - 1]
        best.length[latent, aggregation, rank] = best.length[latent, aggregation, rank - 1]
    scores[place], sentences[place] = score, sentence
    best.start[latent, aggregation, place] = start
    best.length[latent, aggregation, place] = length
