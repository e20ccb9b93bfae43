"""`monosemy generate` as a person uses it: prompts from everywhere, a conversation, and what it refuses."""

import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from monosemy.__main__ import main
from monosemy.app import terminal
from monosemy.llm.generate import generate_text
from monosemy.llm.llama import Llama
from monosemy.llm.sampling import SamplingSettings

Generate = Callable[..., int]


@pytest.fixture
def command(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs `monosemy generate` on the tiny Llama; `typed` is its standard input."""
    monkeypatch.setattr(terminal, "load_model", lambda *_: tiny_llama)

    def run(*arguments: str, typed: str = "", on_terminal: bool = False) -> int:
        stdin = io.StringIO(typed)
        stdin.isatty = lambda: on_terminal
        monkeypatch.setattr(sys, "stdin", stdin)
        return main(["generate", *arguments])

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that the model is given from now on."""
    prompts: list[str] = []

    def spy(model: Llama, texts: Sequence[str], *rest: Any) -> Any:
        prompts.extend(texts)
        return generate_text(model, texts, *rest)

    monkeypatch.setattr(terminal, "generate_text", spy)
    return prompts


def completion(model: Llama, prompts: list[str], settings: SamplingSettings) -> list[str]:
    steps = generate_text(model, prompts, settings)
    return ["".join(piece.text for piece in column if piece is not None) for column in zip(*steps, strict=True)]


def test_one_prompt_and_several(command: Generate, tiny_llama: Llama, capsys):
    options = ["--max-new-tokens", "6", "--temperature", "4", "--top-k", "500", "--min-p", "0.01"]
    options += ["--repetition-penalty", "1.2", "--top-p", "0.9", "--seed", "3"]
    settings = SamplingSettings(6, 4, top_k=500, min_p=0.01, repetition_penalty=1.2, top_p=0.9, seed=3)
    hello, we = completion(tiny_llama, ["Hello", "We the"], settings)
    assert command("Hello", *options) == 0
    assert capsys.readouterr().out == f"Hello{hello}\n"
    assert command("Hello", "We the", *options) == 0
    assert capsys.readouterr().out == f"Hello{hello}\n\nWe the{we}\n\n"


def test_stop_strings(command: Generate, tiny_llama: Llama, capsys):
    [whole] = completion(tiny_llama, ["Hello"], SamplingSettings(8, 4))
    stop = whole[5:7]
    options = ["--max-new-tokens", "8", "--temperature", "4", "--top-p", "1", "--seed", "0"]
    assert command("Hello", "--stop", "?!?", "--stop", stop, *options) == 0
    assert capsys.readouterr().out == f"Hello{whole[: whole.index(stop)]}\n"


def test_a_prompt_from_standard_input(command: Generate, asked: list[str]):
    assert command("First", "-", "--max-new-tokens", "2", typed="Second\nof two lines\n") == 0
    assert asked == ["First", "Second\nof two lines"]


def test_the_system_s_message(command: Generate, asked: list[str], tiny_llama: Llama):
    assert command("Hello", "--chat", "--system", "Be brief.", "--max-new-tokens", "2") == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert asked == [tiny_llama.tokenizer.chat(messages)]


def test_a_conversation_knows_what_was_said(command: Generate, asked: list[str], tiny_llama: Llama, capsys):
    assert command("--chat", "--max-new-tokens", "5", "--temperature", "0", typed="One\n\nTwo\n") == 0
    chat, settings = tiny_llama.tokenizer.chat, SamplingSettings(5, temperature=0)
    one, two = ({"role": "user", "content": text} for text in ("One", "Two"))
    [first] = completion(tiny_llama, [chat([one])], settings)
    longer = chat([one, {"role": "assistant", "content": first}, two])
    [second] = completion(tiny_llama, [longer], settings)
    assert asked == [chat([one]), longer]
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_conversation_forgets_its_oldest_turns(command: Generate, asked: list[str], tiny_llama: Llama, capsys):
    messages = [f"message {number} {'word ' * 80}" for number in range(8)]
    assert command("--chat", "--system", "Be brief.", "--max-new-tokens", "8", typed="\n".join(messages)) == 0
    assert len(asked) == 8
    for number, prompt in enumerate(asked):
        assert len(tiny_llama.tokenizer.encode(prompt)) + 8 <= tiny_llama.config.context_length
        assert "Be brief." in prompt
        assert messages[number] in prompt
    assert messages[0] in asked[2]
    assert messages[0] not in asked[7]
    assert messages[6] in asked[7]
    told = capsys.readouterr().err
    assert told.count("reads at most 512 tokens: from now on it forgets the oldest turns") == 1
    assert told.count("cut after 8 tokens: more with --max-new-tokens") == 8


def test_ctrl_c_ends_the_reply_and_not_the_conversation(command: Generate, monkeypatch: pytest.MonkeyPatch, capsys):
    prompts = []

    def interrupted(model: Llama, texts: Sequence[str], *rest: Any) -> Any:
        prompts.extend(texts)
        for number, step in enumerate(generate_text(model, texts, *rest)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(terminal, "generate_text", interrupted)
    assert command("--chat", "--max-new-tokens", "50", "--temperature", "0", typed="One\nTwo\n", on_terminal=True) == 0
    out = capsys.readouterr()
    assert "Ctrl-C ends a reply, Ctrl-D the conversation." in out.err
    assert len(prompts) == 2
    assert "One" in prompts[1]
    assert out.out.count("> ") == 3


def test_a_message_that_is_too_long(command: Generate, asked: list[str], capsys):
    typed = f"One\n{'word ' * 600}\nTwo\n"
    options = ["--chat", "--max-new-tokens", "4"]
    assert command(*options, typed=typed, on_terminal=True) == 0
    assert "prompt 0 has 6" in capsys.readouterr().err
    assert "One" in asked[2], "the conversation goes on as if it had not been said"
    assert "word word" not in asked[2]
    assert command(*options, typed=typed) == 2
    assert "reads at most 512: shorten the prompt" in capsys.readouterr().err


def test_a_conversation_explains_every_reply(command: Generate, tiny_run: Path, capsys):
    arguments = ["--chat", "--sae", str(tiny_run / "sae"), "--explain", "--max-new-tokens", "3"]
    assert command(*arguments, typed="One\nTwo\n") == 0
    assert capsys.readouterr().out.count("latents that fire most") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt was given: monosemy generate .* or --chat"),
        (["-", "-"], "the prompt - is given twice, but standard input can be read only once"),
        (["Hello", "--system", "Be brief."], "--system is for --chat: give both"),
        (["Hello", "--stop", ""], "a stop string is empty"),
        (["Hello", "--top-k", "-3"], "top_k is -3; expected 0"),
        (["Hello", "--min-p", "2"], r"min_p is 2\.0; expected 0 to 1"),
        (["Hello", "--repetition-penalty", "0"], r"repetition_penalty is 0\.0; expected 0\.01 to 100"),
        (["-"], "prompt 0 is empty"),
        (["caf\udce9"], "prompt 0 is not valid Unicode"),
        (["Hello", "--max-new-tokens", "600"], "reads at most 512: shorten the prompt, or lower max_new_tokens"),
    ],
)
def test_what_is_refused(command: Generate, arguments: list[str], message: str, capsys):
    try:
        code = command(*arguments)
    except SystemExit as stop:  # an option's own value: tyro prints the message in a box
        code = stop.code
    shown = capsys.readouterr()
    error = " ".join(shown.err.replace("│", "").split())
    assert code == 2
    assert re.search(message, error), error
    assert shown.out == ""


def test_standard_input_that_is_not_text(command: Generate, capsys):
    for arguments in (["-"], ["--chat"]):
        assert command(*arguments, typed="caf\udce9\n") == 2
        assert "standard input is not UTF-8 text" in capsys.readouterr().err


def test_a_model_without_a_chat_template(command: Generate, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", None)
    assert command("--chat", typed="Hello\n", on_terminal=True) == 2
    assert "this model has no chat template, so it cannot chat" in capsys.readouterr().err
