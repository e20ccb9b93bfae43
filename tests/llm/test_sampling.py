"""Choosing tokens: against the classes of `transformers`, and as draws."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from monosemy.llm.sampling import NUCLEUS, SamplingSettings, candidates, choose, penalize
from monosemy.runtime import InputError, random_stream

VOCABULARY = 2000


def logits(sharpness: float) -> torch.Tensor:
    return sharpness * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))


def by_transformers(scores: torch.Tensor, written: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Probabilities, in the order in which `GenerationMixin` sets its processors."""
    from transformers.generation import logits_process as processors

    chain = processors.LogitsProcessorList()
    chain.append(processors.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    chain.append(processors.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        chain.append(processors.TopKLogitsWarper(settings.top_k))
    chain.append(processors.TopPLogitsWarper(settings.top_p))
    chain.append(processors.MinPLogitsWarper(settings.min_p))
    return chain(written, scores.double()).softmax(dim=-1)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(temperature=0.6),
        SamplingSettings(top_k=1),
        SamplingSettings(top_k=40),
        SamplingSettings(top_k=10 * VOCABULARY),
        SamplingSettings(top_p=0.01),
        SamplingSettings(top_p=0.8),
        SamplingSettings(min_p=0.1),
        SamplingSettings(min_p=1.0),
        SamplingSettings(repetition_penalty=1.7),
        SamplingSettings(repetition_penalty=0.4),
        SamplingSettings(temperature=0.8, top_k=100, top_p=0.7, min_p=0.3, repetition_penalty=1.3),
        SamplingSettings(temperature=2.5, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
    ],
    ids=lambda settings: ",".join(f"{f.name}={v}" for f in fields(settings) if (v := getattr(settings, f.name))),
)
def test_weights_are_those_of_transformers(settings: SamplingSettings, sharpness: float):
    scores = logits(sharpness)
    written = torch.randint(VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(2))
    written[:, 0] = scores.argmax(dim=-1)
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter_(1, written, True)
    expected = by_transformers(scores, written, settings)
    for row, its_expected in zip(penalize(scores, seen, settings.repetition_penalty), expected, strict=True):
        weights, tokens = candidates(row, settings)
        found = torch.zeros(VOCABULARY, dtype=torch.float64)
        found[torch.arange(VOCABULARY) if tokens is None else tokens] = weights / weights.sum()
        assert (found > 0).tolist() == (its_expected > 0).tolist()
        torch.testing.assert_close(found, its_expected, rtol=1e-5, atol=1e-12)


def test_a_flat_distribution_has_a_nucleus_beyond_the_first_look():
    weights, _ = candidates(logits(0.3)[0], SamplingSettings(top_p=0.95))
    assert int((weights > 0).sum()) > NUCLEUS


def test_greedy_honours_the_repetition_penalty():
    scores, seen = torch.tensor([[2.0, 1.5, -1.0], [-3.0, -1.0, -1.5]]), torch.tensor([[1, 0, 0], [0, 1, 0]]).bool()
    assert choose(scores, SamplingSettings(temperature=0), []) == [0, 1]
    assert choose(scores, SamplingSettings(temperature=0, repetition_penalty=2.0), [], seen) == [1, 2]


def test_draws_follow_the_distribution():
    weights = torch.tensor([[0.1, 0.2, 0.4, 0.3]])
    streams = [random_stream(0)]

    def frequencies(settings: SamplingSettings) -> torch.Tensor:
        drawn = [choose(weights.log(), settings, streams)[0] for _ in range(1500)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 1500

    torch.testing.assert_close(frequencies(SamplingSettings()), weights[0], atol=0.04, rtol=0)
    squared = weights[0] ** 2 / (weights**2).sum()
    torch.testing.assert_close(frequencies(SamplingSettings(temperature=0.5)), squared, atol=0.04, rtol=0)
    kept = torch.tensor([0.0, 0.0, 4 / 7, 3 / 7])
    for settings in (SamplingSettings(top_p=0.6), SamplingSettings(top_k=2), SamplingSettings(min_p=0.6)):
        torch.testing.assert_close(frequencies(settings), kept, atol=0.04, rtol=0)


def test_settings_at_their_limits_are_greedy():
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()
    limits: tuple[dict[str, Any], ...] = ({"top_p": 1e-9}, {"temperature": 1e-300}, {"top_k": 1}, {"min_p": 1.0})
    for change in limits:
        assert {choose(scores, SamplingSettings(**change), [random_stream(seed)])[0] for seed in range(20)} == {2}


def test_tokens_of_no_probability_are_never_drawn():
    scores = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert {choose(scores, SamplingSettings(), [random_stream(seed)])[0] for seed in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float):
    with pytest.raises(InputError, match="logits are not finite: its edits are too strong .* as float32"):
        choose(torch.tensor([[0.0, value]]), SamplingSettings(temperature=temperature), [random_stream(0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -1.0}, r"temperature is -1\.0; expected 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0; expected more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"top_k": -1}, "top_k is -1; expected 0 .all tokens. or more"),
        ({"min_p": -0.1}, r"min_p is -0\.1; expected 0 to 1"),
        ({"min_p": 1.1}, r"min_p is 1\.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0; expected 0\.01 to 100"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"stop": ("END", "")}, "a stop string is empty: leave it out"),
    ],
)
def test_settings_that_make_no_sense(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        SamplingSettings(**change)
