"""Streaming generation: against `transformers`, in batches, with sampling, with edits, as text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

from monosemy.llm import generate as generate_module
from monosemy.llm.generate import Piece, TextStream, generate, generate_text
from monosemy.llm.llama import Llama
from monosemy.llm.sampling import SamplingSettings
from monosemy.llm.sites import POINTS, Site, Taps
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

GREEDY = SamplingSettings(max_new_tokens=12, temperature=0)
PROMPTS = [[5, 900, 77, 31, 8], [40, 41], [9, 8, 7, 6, 5, 4, 3, 2000]]


def run(
    model: Llama, prompts: list[list[int]], settings: SamplingSettings, taps: Taps | None = None
) -> list[list[int]]:
    steps = list(generate(model, prompts, settings, taps))
    return [[token for step in steps if (token := step[row]) is not None] for row in range(len(prompts))]


def test_greedy_equals_transformers(
    smollm2: Llama, transformers_smollm2: Any, speeches: list[str], monkeypatch: pytest.MonkeyPatch
):
    """128 tokens of 20 prompts, which differ in length. Each token is the likeliest that `transformers` sees after
    those before it, so it would have gone the same way; only where it sees a tie, ours may be the other."""
    monkeypatch.setattr(smollm2.tokenizer, "stops", frozenset())
    prompts = [smollm2.tokenizer.encode(text)[: 4 + number] for number, text in enumerate(speeches[::12][:20])]
    continuations = run(smollm2, prompts, SamplingSettings(max_new_tokens=128, temperature=0))
    for prompt, continuation in zip(prompts, continuations, strict=True):
        assert len(continuation) == 128
        with torch.inference_mode():
            logits = transformers_smollm2(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(128), continuation]
        assert behind.max() < 1e-3


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


@pytest.mark.parametrize("seed", range(4))
def test_edits_at_random_sites_with_and_without_cache(tiny_llama: Llama, seed: int):
    random = torch.Generator().manual_seed(seed)

    def random_edit():
        matrix, shift = (torch.randn(*shape, generator=random) for shape in ((32, 32), (32,)))
        return lambda hidden, _: hidden + 0.1 * hidden @ matrix + shift

    sites = [Site(layer, point) for layer in (0, 1) for point in POINTS]
    chosen = torch.randperm(len(sites), generator=random)[:3].tolist()
    taps = Taps(edits={sites[number]: random_edit() for number in chosen})
    for prompt, continuation in zip(PROMPTS, run(tiny_llama, PROMPTS, GREEDY, taps), strict=True):
        logits = tiny_llama(torch.tensor([prompt + continuation]), taps=taps)[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == continuation


def test_the_repetition_penalty_is_that_of_transformers(tiny_llama: Llama, tiny_llama_folder: Path):
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    settings = SamplingSettings(max_new_tokens=12, temperature=0, repetition_penalty=1.4)
    continuations = run(tiny_llama, PROMPTS, settings)
    assert continuations != run(tiny_llama, PROMPTS, GREEDY)
    for prompt, continuation in zip(PROMPTS, continuations, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.4, pad_token_id=0
        )
        assert output[0, len(prompt) :].tolist() == continuation


def test_long_prompts_are_read_in_pieces(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch):
    whole = run(tiny_llama, PROMPTS, GREEDY)
    monkeypatch.setattr(generate_module, "READ_TOGETHER", 9)  # three positions of three prompts
    shapes = spy_on_passes(tiny_llama, monkeypatch)
    assert run(tiny_llama, PROMPTS, GREEDY) == whole
    assert shapes[:4] == [(3, 3), (3, 3), (3, 2), (3, 1)]


def spy_on_passes(model: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(row, position) of every forward pass from now on."""
    shapes: list[tuple[int, ...]] = []
    run_layers = model.run_layers

    def spy(hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(hidden.shape[:2]))
        return run_layers(hidden, **options)

    monkeypatch.setattr(model, "run_layers", spy)
    return shapes


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that end before others
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def first_ends(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> int:
    """A token stops the first of `PROMPTS`, continued greedily, after so many; the others go on."""
    plain = run(tiny_llama, PROMPTS, GREEDY)
    stop = next(token for token in plain[0][2:] if token not in [*plain[1], *plain[2]])
    monkeypatch.setattr(tiny_llama.tokenizer, "stops", frozenset({stop}))
    return plain[0].index(stop)


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(12, temperature=0, repetition_penalty=1.0001)])
def test_they_leave_the_batch(
    tiny_llama: Llama, first_ends: int, settings: SamplingSettings, monkeypatch: pytest.MonkeyPatch
):
    alone = [run(tiny_llama, [prompt], settings)[0] for prompt in PROMPTS]
    assert list(map(len, alone)) == [first_ends, 12, 12]
    shapes = spy_on_passes(tiny_llama, monkeypatch)
    assert run(tiny_llama, PROMPTS, settings) == alone
    assert shapes == [(3, 8)] + first_ends * [(3, 1)] + (11 - first_ends) * [(2, 1)]


def test_edits_and_reads_still_find_every_prompt_in_its_row(tiny_llama: Llama, first_ends: int):
    site, read = Site(0, "mlp_out"), Site(1, "resid_post")
    directions = 0.01 * torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0))
    alone = []
    for prompt, direction in zip(PROMPTS, directions, strict=True):
        taps = Taps(reads={read}, edits={site: lambda hidden, _, direction=direction: hidden + direction})
        steps = generate(tiny_llama, [prompt], GREEDY, taps)
        alone.append([(token, taps.values[read][0, -1]) for [token] in steps])
    assert list(map(len, alone)) == [first_ends, 12, 12]

    masks = []

    def edit(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        masks.append(mask)
        return hidden + directions

    taps = Taps(reads={read}, edits={site: edit})
    for number, step in enumerate(generate(tiny_llama, PROMPTS, GREEDY, taps)):
        for row, token in enumerate(step):
            if number < len(alone[row]):
                assert token == alone[row][number][0]
                torch.testing.assert_close(taps.values[read][row, -1], alone[row][number][1], rtol=1e-4, atol=1e-4)
            else:
                assert token is None
    assert taps.values[read].shape == (3, 1, 32)
    assert masks[-1].tolist() == [[False], [True], [True]]
    assert taps.mask is not None
    assert torch.equal(taps.mask, masks[-1])


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


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def text_of(model: Llama, prompts: list[str], settings: SamplingSettings) -> list[list[Piece]]:
    steps = list(generate_text(model, prompts, settings))
    return [[piece for piece in column if piece is not None] for column in zip(*steps, strict=True)]


TEXTS = ["The delegates gathered", "In 1945", "We the"]
DRAWN = SamplingSettings(max_new_tokens=12, temperature=4, seed=1)


def test_pieces_join_to_the_text_of_the_tokens(tiny_llama: Llama):
    tokenizer = tiny_llama.tokenizer
    continuations = run(tiny_llama, [tokenizer.encode(text) for text in TEXTS], DRAWN)
    for pieces, continuation in zip(text_of(tiny_llama, TEXTS, DRAWN), continuations, strict=True):
        assert [piece.token for piece in pieces] == continuation
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(continuation)
        assert [piece.finish for piece in pieces] == [None] * 11 + ["length"]


def test_a_token_of_the_model_ends_the_text(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch):
    [plain] = text_of(tiny_llama, TEXTS[:1], DRAWN)
    tokens = [piece.token for piece in plain]
    last = next(number for number in range(3, 12) if tokens[number] not in tokens[:number])
    monkeypatch.setattr(tiny_llama.tokenizer, "stops", frozenset({tokens[last]}))
    [pieces] = text_of(tiny_llama, TEXTS[:1], DRAWN)
    assert [piece.token for piece in pieces] == [*tokens[:last], None]
    assert [piece.finish for piece in pieces] == [None] * last + ["stop"]
    assert pieces[last].text == ""


def test_a_stop_string_ends_one_prompt_and_not_the_others(tiny_llama: Llama):
    plain = text_of(tiny_llama, TEXTS, DRAWN)
    whole = ["".join(piece.text for piece in pieces) for pieces in plain]
    middle = len("".join(piece.text for piece in plain[0][:4]))
    stop = whole[0][middle - 1 : middle + 2]  # begins inside a token and ends in another
    assert not any(stop in text for text in whole[1:])
    settings = SamplingSettings(12, temperature=4, seed=1, stop=("never written", stop))
    pieces = text_of(tiny_llama, TEXTS, settings)
    assert ["".join(piece.text for piece in row) for row in pieces] == [whole[0][: whole[0].index(stop)], *whole[1:]]
    assert [row[-1].finish for row in pieces] == ["stop", "length", "length"]
    # `generate` gives the tokens up to the one that completes the stop string.
    ids = run(tiny_llama, [tiny_llama.tokenizer.encode(text) for text in TEXTS], settings)
    assert ids == [[piece.token for piece in row] for row in pieces]
    assert len(ids[0]) < len(ids[1]) == 12
    assert stop in tiny_llama.tokenizer.decode(ids[0])


def test_what_was_held_back_is_shown_in_the_end(tiny_llama: Llama):
    [plain] = text_of(tiny_llama, TEXTS[:1], DRAWN)
    written = "".join(piece.text for piece in plain)
    settings = SamplingSettings(12, temperature=4, seed=1, stop=(written[-4:] + "and more",))
    [pieces] = text_of(tiny_llama, TEXTS[:1], settings)
    assert "".join(piece.text for piece in pieces) == written
    assert pieces[-1].text.endswith(written[-4:])
    assert pieces[-1].finish == "length"


def test_text_stream(smollm2_tokenizer: Tokenizer):
    text, stream = "né 日本語 🎉🎊 done", TextStream(smollm2_tokenizer)
    parts = [stream.add(id) for id in smollm2_tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\ufffd" in part for part in parts)
    half = TextStream(smollm2_tokenizer)
    assert half.add(smollm2_tokenizer.encode("語")[0]) == ""
    assert half.finish() == "\ufffd"


WORDS = strategies.text("ab\n語", min_size=1, max_size=4)


@given(strategies.lists(WORDS, max_size=12), strategies.lists(WORDS, min_size=1, max_size=3))
@hypothesis_settings(deadline=None, max_examples=150)
def test_stop_strings_however_the_text_is_cut(smollm2_tokenizer: Tokenizer, words: list[str], stop: list[str]):
    text = "".join(words)
    ends = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    expected = text[: min(ends)[1]] if ends else text
    stream, shown, written = TextStream(smollm2_tokenizer, stop), "", ""
    for word in words:
        for id in smollm2_tokenizer.encode(word):
            shown += stream.add(id)
        written += word
        if not stream.stopped:
            held = written.removeprefix(shown)
            assert shown + held == written
            assert held == "" or any(string.startswith(held) for string in stop), "no more is held than could be a stop"
    assert stream.stopped == bool(ends)
    assert expected.startswith(shown)
    assert shown + stream.finish() == expected


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


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", r"prompts is one text; expected a list of texts: \[prompt\]"),
        ([], "there is no prompt"),
        (["Hello", ""], "prompt 1 is empty"),
        (["caf\udce9"], "prompt 0 is not valid Unicode .surrogates not allowed.: give it in UTF-8"),
        (["word " * 501], "prompt 0 has .* tokens and 12 more are asked for"),
    ],
)
def test_texts_that_cannot_be_continued(tiny_llama: Llama, prompts: Any, message: str):
    with pytest.raises(InputError, match=message):
        generate_text(tiny_llama, prompts, GREEDY)


def test_an_edit_that_blows_the_model_up_is_named(tiny_llama: Llama):
    taps = Taps(edits={Site(1, "resid_post"): lambda hidden, _: hidden * float("inf")})
    with pytest.raises(InputError, match="logits are not finite: its edits are too strong"):
        list(generate(tiny_llama, PROMPTS, GREEDY, taps))
