"""Text and chat in the terminal: plain or steered, and which latents fired on which token.

1. Prompts are taken as they are, or as a user's message by the model's own chat template (`--chat`).
2. One prompt streams word by word; several are continued together and printed one after another.
3. `--chat` without a prompt converses: every line of standard input is a message, and the history goes along, without
   its oldest turns once it is longer than the model can read.
4. `--explain` reads each completion once more, without steering, and lists its strongest latents with their labels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from monosemy.artifact import read_manifest
from monosemy.latents.labels import open_labels
from monosemy.llm.checkpoint import load_model
from monosemy.llm.generate import Piece, generate_text
from monosemy.llm.model import LanguageModel
from monosemy.llm.sampling import SamplingSettings
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import DtypeName, InputError, say
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.evaluate import check_fits
from monosemy.steer import Addition, steering

Message = dict[str, str]
"""Its `role` (system, user or assistant) and `content`."""

USUAL = SamplingSettings(temperature=0.7, top_p=0.9, seed=42)


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts or chat, steered by latents if asked; prints to standard output."""

    prompts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT...")] = ()
    """Texts to continue, all at once; `-` reads one from standard input. None, with --chat: a conversation."""
    model: str = "smollm2"
    """Model: `smollm2`, a folder, a .gguf file, or a Hub id: org/name, org/name@revision, org/name:file.gguf."""
    sae: Path | None = None
    """SAE, made by `monosemy train`; needed to steer or explain."""
    steer: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="LATENT=STRENGTH")] = ()
    """What to add to which latent, in units of its activation, for example 896=+20; may be given several times."""
    explain: bool = False
    """List the latents that fire most on each token of the completion."""
    labels: Path | None = None
    """Labels, made by `monosemy explain`, to show with --explain."""
    chat: bool = False
    """Send each prompt as a user's message, by the model's chat template."""
    system: str | None = None
    """With --chat: what the model is told before the first message."""
    sampling: OmitArgPrefixes[UseAppendAction[SamplingSettings]] = USUAL
    """How to choose the next token, and when to stop."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""

    def __post_init__(self) -> None:
        if not self.prompts and not self.chat:
            raise InputError('no prompt was given: monosemy generate "The delegates gathered at the", or --chat')
        if self.prompts.count("-") > 1:
            raise InputError("the prompt - is given twice, but standard input can be read only once")
        if self.system is not None and not self.chat:
            raise InputError("--system is for --chat: give both")
        if self.sae is None and (self.steer or self.explain):
            raise InputError("--steer and --explain need an SAE: give --sae DIR, made by `monosemy train`")
        if self.labels is not None and not self.explain:
            raise InputError("--labels are shown by --explain: give both")
        for text in self.steer:
            Addition.parse(text)


def run(config: GenerateConfig) -> None:
    """Print the completions."""
    prompts = [read_prompt() if prompt == "-" else prompt for prompt in config.prompts]
    writer = Writer(config)
    if prompts:
        writer.complete(prompts)
    else:
        writer.converse()


@contextmanager
def standard_input() -> Iterator[None]:
    """Errors of reading it as a person is told them."""
    try:
        yield
    except UnicodeError as error:
        raise InputError(f"standard input is not UTF-8 text ({error}): convert it") from error


def read_prompt() -> str:
    """All of standard input, less the line end that closes it."""
    with standard_input():
        text = sys.stdin.read().removesuffix("\n")
        text.encode()  # fails on the stand-ins for bytes that are no UTF-8
        return text


def read_messages() -> Iterator[str]:
    """What the user says, line by line, until the input ends; empty lines are skipped."""
    with standard_input():
        for line in typed_lines() if sys.stdin.isatty() else sys.stdin:
            line.encode()
            if line.strip():
                yield line.removesuffix("\n")


def typed_lines() -> Iterator[str]:
    """Lines typed at a prompt, until Ctrl-D; Ctrl-C takes back what was typed."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history for `input`)
    say("Ctrl-C ends a reply, Ctrl-D the conversation.")
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class Writer:
    """Completes prompts with one model, steered and explained as the command says, and prints as it goes."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.sae = open_sae(config.sae) if config.sae is not None else None
        self.names = read_labels(config.labels, config.sae)
        self.taps: Taps | None = None
        if self.sae is not None and config.steer:
            self.taps = steering(self.sae, [Addition.parse(text) for text in config.steer])
        self.model = load_model(config.model, config.dtype)
        if self.sae is not None:
            check_fits(self.sae, self.model)

    def complete(self, prompts: Sequence[str]) -> None:
        """Print every prompt with its completion; a single one as it is written."""
        chat = self.config.chat
        texts = [self.chat_text([message("user", prompt)]) for prompt in prompts] if chat else prompts
        steps = generate_text(self.model, texts, self.config.sampling, self.taps)
        if len(prompts) == 1:
            show("" if chat else prompts[0])
            completions = [list(streamed(steps))]
            show("\n")
        else:
            columns = zip(*steps, strict=True)
            completions = [[piece for piece in column if piece is not None] for column in columns]
            for prompt, pieces in zip(prompts, completions, strict=True):
                show((f"> {prompt}\n" if chat else prompt) + joined(pieces) + "\n\n")
        for text, pieces in zip(texts, completions, strict=True):
            self.explain(text, pieces)

    def converse(self) -> None:
        """Answer every message of standard input, knowing those before it; Ctrl-C ends a reply."""
        turns: list[Message] = []
        forgetful = False
        for said in read_messages():
            asked = [*turns, message("user", said)]
            kept = self.fit(asked)
            prompt = self.chat_text(kept)
            try:
                pieces = self.answer(prompt)
            except InputError as error:  # too long, even alone
                if not sys.stdin.isatty():
                    raise
                say(str(error))
                continue
            if len(kept) < len(asked) and not forgetful:
                forgetful = True
                limit = self.model.config.context_length
                say(f"({self.model.name} reads at most {limit} tokens: from now on it forgets the oldest turns)")
            self.explain(prompt, pieces)
            turns = [*kept, message("assistant", joined(pieces))]

    def answer(self, prompt: str) -> list[Piece]:
        """Print the reply as it is written, or as much as there is when Ctrl-C is pressed."""
        pieces: list[Piece] = []
        steps = generate_text(self.model, [prompt], self.config.sampling, self.taps)
        with suppress(KeyboardInterrupt):
            for piece in streamed(steps):
                pieces.append(piece)
        show("\n")
        if pieces and pieces[-1].finish == "length":
            say(f"(cut after {len(pieces)} tokens: more with --max-new-tokens)")
        return pieces

    def fit(self, turns: list[Message]) -> list[Message]:
        """`turns` without as many of the oldest, always a user's and its reply, as leaves room for the next reply."""
        room = self.model.config.context_length - self.config.sampling.max_new_tokens
        while len(turns) > 1 and len(self.model.tokenizer.encode(self.chat_text(turns))) > room:
            turns = turns[2:]
        return turns

    def chat_text(self, turns: Sequence[Message]) -> str:
        """The prompt that asks for a reply to `turns`."""
        system = [] if self.config.system is None else [message("system", self.config.system)]
        return self.model.tokenizer.chat([*system, *turns])

    def explain(self, prompt: str, pieces: Sequence[Piece]) -> None:
        """Print which latents fired on each token, if asked."""
        if self.config.explain and self.sae is not None:
            from rich.console import Console

            completion = [piece.token for piece in pieces if piece.token is not None]
            ids = self.model.tokenizer.encode_prompt(prompt)
            table = explanation_table(self.model, self.sae, self.names, ids, completion)
            Console(highlight=False).print(table)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def show(text: str) -> None:
    print(text, end="", flush=True)


def streamed(steps: Iterator[list[Piece | None]]) -> Iterator[Piece]:
    """The pieces of a single prompt, each shown as it comes."""
    for [piece] in steps:
        assert piece is not None, "a single prompt's stream ends with it"
        show(piece.text)
        yield piece


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def read_labels(path: Path | None, sae: Path | None) -> dict[int, str]:
    """Latent -> label; empty without a path. Raises `InputError` for the labels of another SAE."""
    if path is None:
        return {}
    digest = None if sae is None else read_manifest(sae, "sae").digest
    return {label.latent: label.label for label in open_labels(path, sae_digest=digest)}


class Firing(NamedTuple):
    """One latent on one token."""

    latent: int
    activation: float


def strongest_latents(model: LanguageModel, sae: SAE, ids: Sequence[int], n: int = 3) -> list[list[Firing]]:
    """The `n` strongest latents of every token of `ids`, read without steering; none on attention sinks."""
    import torch

    site = Site.parse(sae.config.site)
    taps = Taps(reads={site})
    with torch.inference_mode():
        model.run_layers(model.embed(torch.tensor([list(ids)])), end=site.layer + 1, taps=taps)
        rows = taps.values[site][0]
        code, sink = sae.encode(rows), sae.is_sink(rows)
    firings = []
    for values, indices, is_sink in zip(code.values, code.indices, sink, strict=True):
        order = values.argsort(descending=True)[: 0 if is_sink else n]
        firings.append([Firing(int(indices[i]), float(values[i])) for i in order if values[i] > 0])
    return firings


def explanation_table(model: LanguageModel, sae: SAE, names: dict[int, str], prompt: list[int], completion: list[int]):
    """A table of the completion's tokens with their strongest latents."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("token", "latents that fire most: id, activation, label", title="read without steering")
    pieces = model.tokenizer.pieces(completion)
    firings = strongest_latents(model, sae, [*prompt, *completion])[len(prompt) :]
    for piece, strongest in zip(pieces, firings, strict=True):
        described = [f"[bold]{f.latent}[/] {f.activation:.1f} {escape(names.get(f.latent, ''))}" for f in strongest]
        table.add_row(escape(repr(piece)[1:-1]), "  ·  ".join(described))
    return table
