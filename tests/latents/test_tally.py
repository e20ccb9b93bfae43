"""The tally agrees with looking at a dense matrix of activations, however the sentences were batched."""

import numpy as np
import pytest

from monosemy.latents import tally
from monosemy.latents.tally import AGGREGATIONS, BINS, BINS_PER_OCTAVE, Batch, Tally

N_LATENTS, N_SENTENCES, K, N_EXAMPLES = 12, 40, 4, 5


@pytest.fixture
def corpus() -> Batch:
    """Random sentences; few distinct activations, so that many scores are tied."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 9, N_SENTENCES)
    n_rows = int(lengths.sum())
    values = random.integers(0, 4, (n_rows, K)).astype(np.float32)
    indices = np.stack([random.permutation(N_LATENTS - 1)[:K] for _ in range(n_rows)]).astype(np.int32)
    sink = random.random(n_rows) < 0.2
    return Batch(np.arange(N_SENTENCES) * 3, lengths, values, indices, sink)


def pick(corpus: Batch, chosen: np.ndarray) -> Batch:
    """The sentences of `corpus` at places `chosen`, in that order."""
    ends = corpus.lengths.cumsum()
    rows = np.concatenate([np.arange(int(ends[i] - corpus.lengths[i]), int(ends[i])) for i in chosen])
    return Batch(corpus.sentences[chosen], corpus.lengths[chosen], *(field[rows] for field in corpus[2:]))


def dense_sentences(corpus: Batch) -> list[np.ndarray]:
    """Per sentence the activations (token, latent), 0 on sinks."""
    dense = np.zeros((len(corpus.values), N_LATENTS), np.float32)
    np.put_along_axis(dense, corpus.indices.astype(np.int64), corpus.values, axis=1)
    dense[corpus.sink] = 0
    return np.split(dense, corpus.lengths.cumsum()[:-1])


@pytest.mark.parametrize("batch_size", [1, 7, N_SENTENCES])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_best_sentences_are_those_of_a_dense_search(corpus, batch_size, order, monkeypatch):
    monkeypatch.setattr(tally, "POOL_SLACK", 0)
    places = np.arange(N_SENTENCES) if order == "ascending" else np.random.default_rng(1).permutation(N_SENTENCES)
    counted = Tally(N_LATENTS, N_EXAMPLES)
    for start in range(0, N_SENTENCES, batch_size):
        counted.add(pick(corpus, places[start : start + batch_size]))
    positions, activations = counted.compact()
    sentences = dense_sentences(corpus)
    scorers = {"max": lambda a: a.max(), "mean": lambda a: np.float32(a.sum() / len(a)), "last": lambda a: a[-1]}
    for latent in range(N_LATENTS):
        for number, aggregation in enumerate(AGGREGATIONS):
            scores = [scorers[aggregation](dense[:, latent]) for dense in sentences]
            expected = sorted((-score, place) for place, score in enumerate(scores) if score > 0)[:N_EXAMPLES]
            kept = counted.best.score[latent, number] > 0
            assert counted.best.sentence[latent, number][kept].tolist() == [3 * place for _, place in expected]
            np.testing.assert_allclose(counted.best.score[latent, number][kept], [-score for score, _ in expected])
            for rank, (_, place) in enumerate(expected):
                start, length = counted.best.start[latent, number, rank], counted.best.length[latent, number, rank]
                found = np.zeros(len(sentences[place]), np.float32)
                found[positions[start : start + length]] = activations[start : start + length]
                np.testing.assert_array_equal(found, sentences[place][:, latent])


def test_counters_are_those_of_a_dense_matrix(corpus):
    counted = Tally(N_LATENTS, N_EXAMPLES)
    counted.add(pick(corpus, np.arange(20)))
    counted.add(pick(corpus, np.arange(20, N_SENTENCES)))
    sentences = dense_sentences(corpus)
    sinks = np.split(corpus.sink, corpus.lengths.cumsum()[:-1])
    dense = np.concatenate(sentences)
    first = [s[np.flatnonzero(~sink)[0]] > 0 for s, sink in zip(sentences, sinks, strict=True) if not sink.all()]
    assert counted.counters.n_fired.tolist() == (dense > 0).sum(0).tolist()
    assert counted.counters.n_first.tolist() == np.sum(first, axis=0).tolist()
    assert counted.counters.n_last.tolist() == np.sum([s[-1] > 0 for s in sentences], axis=0).tolist()
    assert counted.counters.n_sentences.tolist() == np.sum([s.max(0) > 0 for s in sentences], axis=0).tolist()
    np.testing.assert_allclose(counted.counters.total, dense.sum(0))
    np.testing.assert_array_equal(counted.counters.largest, dense.max(0))
    assert (counted.n_rows, counted.n_sinks) == (len(dense), int(corpus.sink.sum()))
    ones = (dense == 1).sum(0)
    np.testing.assert_array_equal(counted.counters.histogram[:, BINS // 2], ones)
    np.testing.assert_array_equal(counted.counters.histogram[:, BINS // 2 + BINS_PER_OCTAVE], (dense == 2).sum(0))
    assert counted.counters.histogram.sum() == (dense > 0).sum()


def test_the_pool_holds_no_more_than_what_is_pointed_at(corpus, monkeypatch):
    monkeypatch.setattr(tally, "POOL_SLACK", 0)
    counted = Tally(N_LATENTS, 1)
    for repeat in range(50):
        counted.add(corpus._replace(sentences=corpus.sentences + 1000 * repeat))
    one_batch = int((corpus.values[~corpus.sink] > 0).sum())
    assert counted.pool_size <= 2 * N_LATENTS * 3 * 8 + one_batch
