"""Continues prompts, one token per prompt and step, streaming.

1. Prompts of unlike length are padded on the left, so that all of them end at the same position.
2. Forward passes over the prompts fill the key-value cache; then each step runs one position.
3. Each prompt samples from its own random stream, so its text does not depend on what else is in the batch.
4. A prompt that has ended leaves the batch and the cache: it costs nothing more.
5. Text is shown as soon as it is sure: whole characters that cannot be the beginning of a stop string.

Edits (`sites.Taps`) act on the prompt and on every new token alike.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosemy.llm.model import LanguageModel, check_sites
from monosemy.llm.sampling import SamplingSettings, choose
from monosemy.llm.sites import Edit, Taps
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError, random_stream

READ_TOGETHER = 4096
"""Tokens of the prompts in one forward pass, padding included: what bounds its memory."""


class Piece(NamedTuple):
    """What one step adds to the completion of one prompt."""

    text: str
    """What can be shown now; often a word, sometimes nothing."""
    token: int | None
    """None: the model ended the text here."""
    finish: Literal["stop", "length"] | None
    """Why this piece is the last: the model or a stop string ended the text, or `max_new_tokens` did."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    taps: Taps | None = None,
    streams: Sequence[np.random.Generator] | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompts` (token ids), yielding per step one new token for each.

    None stands for a prompt that has ended: one of the tokenizer's `stops` was drawn (and is not shown), or the token
    before completed a stop string. The stream ends when all have ended, or after `max_new_tokens`.

    Args:
        taps: sites to read and edit. Edits and `taps.values` have one row per prompt at every step; those that have
            ended are padding. Each step's forward pass is of one position; long prompts are read in several passes.
        streams: each prompt's random numbers, where they must not come from `prompt_streams`.

    Raises:
        InputError: at once, if a prompt is empty, is too long for the model, or has ids that it does not know, or if
            the model lacks a site of `taps`. In the stream: logits that are not finite.
    """
    _check(model, prompts, settings, taps)
    readers = [TextStream(model.tokenizer if settings.stop else None, settings.stop) for _ in prompts]
    steps = _stream(model, prompts, settings, taps, streams or prompt_streams(prompts, settings.seed), readers)
    tokens = ([None if piece is None else piece.token for piece in step] for step in steps)
    return (step for step in tokens if any(token is not None for token in step))


def generate_text(
    model: LanguageModel,
    prompts: Sequence[str],
    settings: SamplingSettings,
    taps: Taps | None = None,
    streams: Sequence[np.random.Generator] | None = None,
) -> Iterator[list[Piece | None]]:
    """Continue the texts `prompts`, yielding per step one piece for each; None for those that have ended.

    for [piece] in generate_text(model, ["The delegates"], settings):
        print(piece.text, end="", flush=True)

    Nothing of a stop string is ever shown: text is held back while it could still become one. Arguments and errors as
    in `generate`; `model.tokenizer.chat` makes a prompt from messages.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one text; expected a list of texts: [prompt]")
    ids = [_encode(model.tokenizer, number, prompt) for number, prompt in enumerate(prompts)]
    _check(model, ids, settings, taps)
    readers = [TextStream(model.tokenizer, settings.stop) for _ in ids]
    return _stream(model, ids, settings, taps, streams or prompt_streams(ids, settings.seed), readers)


def _encode(tokenizer: Tokenizer, number: int, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt {number} is not valid Unicode ({error.reason}): give it in UTF-8") from error
    return tokenizer.encode_prompt(prompt)


def _check(
    model: LanguageModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings, taps: Taps | None
) -> None:
    if not prompts:
        raise InputError("there is no prompt: give at least one")
    limit = model.config.context_length
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {number} is empty: give at least one token")
        if len(prompt) + settings.max_new_tokens > limit:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens and {settings.max_new_tokens} more are asked for, but "
                f"{model.name} reads at most {limit}: shorten the prompt, or lower max_new_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= model.config.vocabulary:
            raise InputError(f"prompt {number} has ids beyond the vocabulary, 0 to {model.config.vocabulary - 1}")
    if taps is not None:
        check_sites(model, taps.sites)


@torch.inference_mode()
def _stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    taps: Taps | None,
    streams: Sequence[np.random.Generator],
    readers: Sequence[TextStream],
) -> Iterator[list[Piece | None]]:
    cache = model.make_cache(len(prompts), max(map(len, prompts)) + settings.max_new_tokens)
    seen = _seen(model, prompts) if settings.repetition_penalty != 1 else None
    hidden = _read(model, prompts, taps, cache)
    rows = list(range(len(prompts)))  # the prompts that go on
    for left in reversed(range(settings.max_new_tokens)):
        chosen = choose(model.unembed(hidden)[:, 0], settings, [streams[row] for row in rows], seen)
        pieces = {
            row: _piece(token, model.tokenizer, readers[row], last=left == 0)
            for row, token in zip(rows, chosen, strict=True)
        }
        yield [pieces.get(row) for row in range(len(prompts))]
        going = [place for place, row in enumerate(rows) if pieces[row].finish is None]
        if not going:
            return
        if len(going) < len(rows):
            rows, chosen = [rows[place] for place in going], [chosen[place] for place in going]
            seen = None if seen is None else seen[going]
            cache.select(torch.tensor(going))
        ids = torch.tensor(chosen, device=model.device)[:, None]
        if seen is not None:
            seen.scatter_(1, ids, True)
        hidden = _step(model, ids, taps, cache, torch.tensor(rows, device=model.device), len(prompts))


def _read(
    model: LanguageModel, prompts: Sequence[Sequence[int]], taps: Taps | None, cache: Any
) -> Float[Tensor, "prompt 1 d_model"]:
    """Fill `cache` with the prompts; the residual stream at their last position."""
    ids, mask = pad_left(prompts)
    together = max(1, READ_TOGETHER // len(prompts))
    parts = ids.split(together, dim=1)
    masks = [None] * len(parts) if mask is None else mask.split(together, dim=1)
    for part, real in zip(parts, masks, strict=True):
        hidden = model.run_layers(model.embed(part), taps=taps, mask=real, cache=cache)
    return hidden[:, -1:]


def _step(
    model: LanguageModel, ids: Tensor, taps: Taps | None, cache: Any, rows: Tensor, n_prompts: int
) -> Float[Tensor, "row 1 d_model"]:
    """One position of the prompts `rows` of `n_prompts`: the residual stream there."""
    if taps is None or len(rows) == n_prompts:
        return model.run_layers(model.embed(ids), taps=taps, cache=cache)

    def spread(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(n_prompts, *tensor.shape[1:]).index_copy(0, rows, tensor)

    def as_if_whole(edit: Edit) -> Edit:
        # An edit may differ from prompt to prompt, so it finds them all in their old places.
        return lambda hidden, mask: edit(spread(hidden), spread(mask))[rows]

    inner = Taps(reads=taps.reads, edits={site: as_if_whole(edit) for site, edit in taps.edits.items()})
    hidden = model.run_layers(model.embed(ids), taps=inner, cache=cache)
    taps.values = {site: spread(value) for site, value in inner.values.items()}
    taps.mask = None if inner.mask is None else spread(inner.mask)
    return hidden


def _seen(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> Bool[Tensor, "prompt vocabulary"]:
    """Which tokens each prompt has."""
    seen = torch.zeros(len(prompts), model.config.vocabulary, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen.to(model.device)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Ids and mask (prompt, position); the mask is None where all prompts are equally long."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, None if bool(mask.all()) else mask


def prompt_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[np.random.Generator]:
    """A random stream per prompt. It depends on the seed and on the prompt alone, and for copies of one prompt on how
    many came before."""
    seen: dict[tuple[int, ...], int] = {}
    streams = []
    for prompt in map(tuple, prompts):
        seen[prompt] = seen.get(prompt, 0) + 1
        streams.append(random_stream(seed, seen[prompt], *prompt))
    return streams


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _piece(token: int, tokenizer: Tokenizer, reader: TextStream, last: bool) -> Piece:
    """What drawing `token` adds; `last`: no more tokens may follow."""
    if token in tokenizer.stops:
        return Piece(reader.finish(), None, "stop")
    text = reader.add(token)
    if reader.stopped:
        return Piece(text, token, "stop")
    return Piece(text + reader.finish(), token, "length") if last else Piece(text, token, None)


class TextStream:
    """Turns tokens that arrive one at a time into text, holding back what is not sure yet: a character until all of its
    bytes are there, and what could be the beginning of a stop string. What comes out does not depend on how the text
    is cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        """Without a tokenizer no text comes out."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.stopped = False
        """Whether a stop string was written: no more text will come."""

    def add(self, id: int) -> str:
        """The text that token `id` makes sure; often a word, sometimes nothing."""
        return self._take("" if self.tokenizer is None else self.reader.decode(self.tokenizer.bytes_of(id)))

    def finish(self) -> str:
        """What is still held back, now that no more tokens come; half a character becomes U+FFFD."""
        text = self._take(self.reader.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        ends = [(place + len(stop), place) for stop in self.stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)[1]]  # of several stop strings, the one that was complete first
        unsure = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        sure = len(text) - max(unsure, default=0)
        self.held = text[sure:]
        return text[:sure]
