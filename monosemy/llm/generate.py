"""Continues prompts, one token per prompt and step, streaming.

1. Prompts of unlike length are padded on the left, so that all of them end at the same position.
2. One forward pass over the prompts fills the key-value cache; then each step runs one position.
3. Each prompt samples from its own random stream, so its text does not depend on what else is in the batch.

Edits (`sites.Taps`) act on the prompt and on every new token alike.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from monosemy.llm.llama import Llama
from monosemy.llm.sites import Taps
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError, random_stream


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose the next token."""

    max_new_tokens: int = 128
    """Stop after this many tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability are drawn from; 1: all."""
    seed: int = 0
    """Equal seeds give equal text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or more, for example 0.8")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected 0 or more")


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    taps: Taps | None = None,
    streams: Sequence[np.random.Generator] | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompts` (token ids), yielding per step one new token for each.

    None stands for a prompt that has ended: one of the tokenizer's `stops` was drawn (and is not shown). The stream
    ends when all have ended, or after `max_new_tokens`. `streams`: each prompt's random numbers, where they must not
    come from `prompt_streams`.

    Raises:
        InputError: at once, if a prompt is empty, is too long for the model, or has ids that it does not know, or if
            a site of `taps` lies beyond the model.
    """
    _check(model, prompts, settings)
    if taps is not None:
        taps.check(model.config.n_layers, model.name)
    return _stream(model, prompts, settings, taps, streams or prompt_streams(prompts, settings.seed))


def _check(model: Llama, prompts: Sequence[Sequence[int]], settings: SamplingSettings) -> None:
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


@torch.inference_mode()
def _stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    taps: Taps | None,
    streams: Sequence[np.random.Generator],
) -> Iterator[list[int | None]]:
    length = max(map(len, prompts))
    ids, mask = pad_left(prompts)
    cache = model.make_cache(len(prompts), length + settings.max_new_tokens)
    ended = [False] * len(prompts)
    for _ in range(settings.max_new_tokens):
        hidden = model.run_layers(model.embed(ids), taps=taps, mask=mask, cache=cache)
        chosen = choose(model.unembed(hidden[:, -1:])[:, 0], settings, streams)
        ended = [end or token in model.tokenizer.stops for end, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if end else token for end, token in zip(ended, chosen, strict=True)]
        ids, mask = torch.tensor(chosen)[:, None], None


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


NUCLEUS = 256
"""Likeliest tokens that are looked at first for `top_p`; sorting a whole vocabulary costs more than the model."""


def choose(
    logits: Float[Tensor, "prompt vocabulary"], settings: SamplingSettings, streams: Sequence[np.random.Generator]
) -> list[int]:
    """The next token of each prompt."""
    if settings.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    # Less the maximum first: a tiny temperature must not overflow.
    logits = (logits - logits.max(dim=-1, keepdim=True).values).double() / settings.temperature
    numbers = [stream.random() for stream in streams]
    if settings.top_p == 1:
        return [_draw(row.softmax(dim=-1), number) for row, number in zip(logits, numbers, strict=True)]
    total = logits.logsumexp(dim=-1, keepdim=True)
    top = logits.topk(min(NUCLEUS, logits.shape[-1]), dim=-1)
    probabilities = (top.values - total).exp()
    chosen = []
    for row, number in enumerate(numbers):
        likeliest, tokens = probabilities[row], top.indices[row]
        if likeliest.sum() < settings.top_p:
            likeliest, tokens = (logits[row] - total[row]).exp().sort(descending=True, stable=True)
        before = likeliest.cumsum(dim=-1) - likeliest
        chosen.append(int(tokens[_draw(likeliest.masked_fill(before >= settings.top_p, 0.0), number)]))
    return chosen


def _draw(weights: Float[Tensor, " token"], number: float) -> int:
    """The place at which the running sum of `weights` first exceeds `number`, 0 to 1, of its total."""
    reached = weights.cumsum(dim=-1)
    # `right`: a token of weight 0 has the same sum as the one before it, and must not be drawn.
    return int(torch.searchsorted(reached, number * reached[-1:], right=True))


class TextStream:
    """Turns tokens that arrive one at a time into text, holding a character back until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reader = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """The text that token `id` completes; often a word, sometimes nothing."""
        return self.reader.decode(self.tokenizer.bytes_of(id))

    def finish(self) -> str:
        """What is left of a character that was never completed."""
        return self.reader.decode(b"", final=True)
