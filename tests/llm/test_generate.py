"""Streaming generation: against `transformers`, in batches, with sampling and with edits."""

import math
from typing import Any

import pytest
import torch

from monosemy.llm.generate import SamplingSettings, TextStream, choose, generate
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError, random_stream

pytest_plugins = ["llm_references"]

GREEDY = SamplingSettings(max_new_tokens=12, temperature=0)
PROMPTS = [[5, 900, 77, 31, 8], [40, 41], [9, 8, 7, 6, 5, 4, 3, 2000]]


def run(
    model: Llama, prompts: list[list[int]], settings: SamplingSettings, taps: Taps | None = None
) -> list[list[int]]:
    steps = list(generate(model, prompts, settings, taps))
    return [[token for step in steps if (token := step[row]) is not None] for row in range(len(prompts))]


def test_greedy_equals_transformers(smollm2: Llama, transformers_smollm2: Any):
    texts = ["The delegates gathered at the", "In 1945", "My fellow citizens, I"]
    prompts = [smollm2.tokenizer.encode(text) for text in texts]
    for prompt, continuation in zip(prompts, run(smollm2, prompts, SamplingSettings(16, temperature=0)), strict=True):
        assert len(continuation) == 16
        # Each token is the likeliest after those before it, so `transformers` would have gone the same way.
        with torch.inference_mode():
            logits = transformers_smollm2(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(12, temperature=0.9, top_p=0.8, seed=3)])
def test_a_batch_gives_what_one_at_a_time_gives(tiny_llama: Llama, settings: SamplingSettings):
    alone = [run(tiny_llama, [prompt], settings)[0] for prompt in PROMPTS]
    assert run(tiny_llama, PROMPTS, settings) == alone
    assert run(tiny_llama, PROMPTS[::-1], settings) == alone[::-1]


def test_every_token_is_what_a_pass_without_cache_gives(tiny_llama: Llama):
    for prompt, continuation in zip(PROMPTS, run(tiny_llama, PROMPTS, GREEDY), strict=True):
        logits = tiny_llama(torch.tensor([prompt + continuation]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == continuation


def test_edits_act_on_the_prompt_and_on_every_new_token(tiny_llama: Llama):
    site, direction = Site(0, "resid_post"), 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    taps = Taps(edits={site: lambda hidden, _: hidden + direction})
    steered = run(tiny_llama, PROMPTS, GREEDY, taps)
    assert steered != run(tiny_llama, PROMPTS, GREEDY)
    for prompt, continuation in zip(PROMPTS, steered, strict=True):
        logits = tiny_llama(torch.tensor([prompt + continuation]), taps=taps)[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == continuation


def test_seeds(tiny_llama: Llama):
    def sample(seed: int, prompts: list[list[int]]) -> list[list[int]]:
        return run(tiny_llama, prompts, SamplingSettings(12, seed=seed))

    assert sample(0, PROMPTS) == sample(0, PROMPTS) != sample(1, PROMPTS)
    first, second = sample(0, [PROMPTS[0]] * 2)
    assert first != second, "copies of a prompt differ"
    assert [first] == sample(0, PROMPTS[:1]), "the first is as if alone"


def test_it_stops_at_the_tokenizer_s_stops(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch):
    plain = run(tiny_llama, PROMPTS, GREEDY)
    monkeypatch.setattr(tiny_llama.tokenizer, "stops", frozenset({plain[0][4]}))
    steps = list(generate(tiny_llama, PROMPTS, GREEDY))
    cut = plain[0].index(plain[0][4])
    assert [step[0] for step in steps] == plain[0][:cut] + [None] * (len(steps) - cut)
    monkeypatch.setattr(tiny_llama.tokenizer, "stops", frozenset({continuation[0] for continuation in plain}))
    assert list(generate(tiny_llama, PROMPTS, GREEDY)) == []


def test_it_streams(tiny_llama: Llama):
    stream = generate(tiny_llama, PROMPTS, SamplingSettings(max_new_tokens=500, temperature=0))
    assert len(next(stream)) == 3


def test_draws_follow_the_distribution():
    weights = torch.tensor([[0.1, 0.2, 0.4, 0.3]])
    streams = [random_stream(0)]

    def frequencies(settings: SamplingSettings) -> torch.Tensor:
        drawn = [choose(weights.log(), settings, streams)[0] for _ in range(2000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 2000

    torch.testing.assert_close(frequencies(SamplingSettings()), weights[0], atol=0.04, rtol=0)
    squared = weights[0] ** 2 / (weights**2).sum()
    torch.testing.assert_close(frequencies(SamplingSettings(temperature=0.5)), squared, atol=0.04, rtol=0)
    kept = torch.tensor([0.0, 0.0, 4 / 7, 3 / 7])
    torch.testing.assert_close(frequencies(SamplingSettings(top_p=0.6)), kept, atol=0.04, rtol=0)
    assert frequencies(SamplingSettings(top_p=1e-9)).tolist() == [0, 0, 1, 0]
    assert frequencies(SamplingSettings(temperature=1e-300)).tolist() == [0, 0, 1, 0]


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert {choose(logits, SamplingSettings(), [random_stream(seed)])[0] for seed in range(50)} == {1}


def test_text_stream(smollm2_tokenizer: Tokenizer):
    text, stream = "né 日本語 🎉🎊 done", TextStream(smollm2_tokenizer)
    parts = [stream.add(id) for id in smollm2_tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\ufffd" in part for part in parts)
    half = TextStream(smollm2_tokenizer)
    assert half.add(smollm2_tokenizer.encode("語")[0]) == ""
    assert half.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -1.0}, r"temperature is -1\.0; expected 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0; expected more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        SamplingSettings(**change)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [7] * 501], r"prompt 1 has 501 tokens and 12 more are asked for, but .* reads at most 512: shorten"),
        ([[49152]], "prompt 0 has ids beyond the vocabulary, 0 to 49151"),
    ],
)
def test_prompts_that_cannot_be_continued(tiny_llama: Llama, prompts: list[list[int]], message: str):
    with pytest.raises(InputError, match=message):
        generate(tiny_llama, prompts, GREEDY)  # at once, before anything is asked of the stream


def test_sites_beyond_the_model_are_refused_at_once(tiny_llama: Llama):
    with pytest.raises(InputError, match=r"L9\.resid_post: .* has layers 0 to 1"):
        generate(tiny_llama, PROMPTS, GREEDY, Taps(edits={Site(9, "resid_post"): lambda hidden, _: hidden}))
