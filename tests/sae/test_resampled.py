"""Figures of probes against scikit-learn's, and intervals against closed forms."""

import numpy as np
import pytest

from monosemy.sae.resampled import Resamples, auroc, measure


def test_figures_are_those_of_scikit_learn_on_repeated_sentences():
    """With ties, which sparse latents make; and a weight of 3 is the sentence three times."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

    random = np.random.default_rng(0)
    positive = random.random(200) < 0.3
    scores = np.round(random.standard_normal(200) + positive, 1)
    weights = random.integers(0, 4, (5, 200))
    found = measure(scores, positive, weights.astype(np.float64))
    for number, repeats in enumerate(weights):
        truth, guess = positive.repeat(repeats), scores.repeat(repeats)
        expected = accuracy_score(truth, guess > 0), balanced_accuracy_score(truth, guess > 0)
        np.testing.assert_allclose(found[:, number], [*expected, roc_auc_score(truth, guess)])


def test_a_probe_that_always_says_the_same_is_at_chance():
    positive = np.array([True, False, False, False])
    np.testing.assert_allclose(measure(np.full(4, -1.0), positive, np.ones((1, 4)))[:, 0], [0.75, 0.5, 0.5])
    assert auroc(np.array([2.0, 1.0, 0.0, 0.0]), positive, np.ones((1, 4))) == 1


def test_documents_are_resampled_and_not_sentences():
    """Every sentence of a document has one weight, and a class keeps its number of documents."""
    document, label = np.repeat(np.arange(12), 5), np.repeat(np.arange(12) % 2, 5)
    resamples = Resamples(document, label, 50, seed=0)
    weights = resamples.counts[:, resamples.owner]
    assert (weights.reshape(50, 12, 5) == weights.reshape(50, 12, 5)[:, :, :1]).all()
    assert (weights[:, label == 1].sum(axis=1) == 30).all()
    assert len(np.unique(resamples.counts, axis=0)) > 40


def test_the_interval_is_as_wide_as_the_documents_are_few():
    """All sentences of a document right or wrong together: accuracy is a mean of 50 coins, whatever their sentences."""
    right = np.random.default_rng(0).random(100) < 0.5
    for per_document in (1, 20):
        document = np.arange(100).repeat(per_document)
        positive = document % 2 == 0
        scores = np.where(right[document], 1.0, -1.0) * np.where(positive, 1, -1)
        accuracy = Resamples(document, positive.astype(int), 2000, 0).figures(scores, positive).interval("accuracy")
        assert accuracy.value == pytest.approx(right.mean())
        assert (accuracy.high - accuracy.low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 100), rel=0.15)
