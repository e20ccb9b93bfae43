"""Chooses the next token from the model's logits.

In the order of `transformers`: repetition penalty, temperature, top-k, top-p, min-p; then one random number decides.

Papers: repetition penalty (CTRL, arXiv 1909.05858), top-k (1805.04833), top-p (1904.09751), min-p (2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosemy.runtime import InputError, one_thread


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose the next token, and when to stop."""

    max_new_tokens: int = 128
    """Tokens to write, at most."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability; 1: all."""
    seed: int = 0
    """Equal seeds give equal text."""
    top_k: int = 0
    """Draw only from so many of the likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Draw only from tokens at least this many times as probable as the likeliest one; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the text has already are divided (below 0: multiplied) by it; 1: none."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not shown."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or more, for example 0.8")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected 0 or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 (all tokens) or more, for example 40")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}; expected 0 to 1, for example 0.05")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected 0.01 to 100, for example 1.1")
        if isinstance(self.stop, str):
            raise InputError(f"stop is {self.stop!r}; expected several strings: ({self.stop!r},)")
        if "" in self.stop:
            raise InputError("a stop string is empty: leave it out, or say what should end the text")


@one_thread()
def choose(
    logits: Float[Tensor, "prompt vocabulary"],
    settings: SamplingSettings,
    streams: Sequence[np.random.Generator],
    seen: Bool[Tensor, "prompt vocabulary"] | None = None,
) -> list[int]:
    """The next token of each prompt.

    Args:
        logits: of the token to come.
        streams: each prompt's random numbers.
        seen: which tokens each text has already; needed for a repetition penalty.

    Raises:
        InputError: a prompt whose largest logit is not a finite number.
    """
    if settings.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty must know what was written"
        logits = penalize(logits, seen, settings.repetition_penalty)
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise InputError(
            "the model's logits are not finite: its edits are too strong (lower them), or its numbers too large for "
            "its dtype (load it as float32)"
        )
    if settings.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    return [_draw(*candidates(row, settings), stream) for row, stream in zip(logits.cpu(), streams, strict=True)]


def penalize(
    logits: Float[Tensor, "prompt vocabulary"], seen: Bool[Tensor, "prompt vocabulary"], penalty: float
) -> Float[Tensor, "prompt vocabulary"]:
    """Logits with the tokens of `seen` made less likely (for a penalty above 1)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


NUCLEUS = 256
"""Likeliest tokens that are looked at first for `top_p`; sorting a whole vocabulary costs more than the model."""


def candidates(
    logits: Float[Tensor, " vocabulary"], settings: SamplingSettings
) -> tuple[Float[Tensor, " candidate"], Int[Tensor, " candidate"] | None]:
    """Tokens that may be drawn, and their weights: 1 for the likeliest, 0 for those that settings forbid.

    Likeliest first where `top_k` or `top_p` is set; otherwise all in order of their ids, and the tokens are None.
    """
    # Less the maximum first: a tiny temperature must not overflow.
    weights, tokens = ((logits - logits.max()).double() / settings.temperature).exp(), None
    if settings.top_k:
        weights, tokens = weights.topk(min(settings.top_k, len(weights)))
    if settings.top_p < 1:
        mass = settings.top_p * weights.sum()
        if tokens is None:
            likeliest = weights.topk(min(NUCLEUS, len(weights)))
            enough = bool(likeliest.values.sum() >= mass)
            weights, tokens = likeliest if enough else weights.sort(descending=True, stable=True)
        weights = weights.masked_fill(weights.cumsum(dim=0) - weights >= mass, 0.0)
    return weights.masked_fill(weights < settings.min_p, 0.0), tokens


def _draw(
    weights: Float[Tensor, " candidate"], tokens: Int[Tensor, " candidate"] | None, stream: np.random.Generator
) -> int:
    """The token at which the running sum of `weights` first exceeds a random share of the total."""
    reached = weights.cumsum(dim=0)
    # `right`: a token of weight 0 has the same sum as the one before it, and must not be drawn.
    place = int(torch.searchsorted(reached, stream.random() * reached[-1:], right=True))
    return place if tokens is None else int(tokens[place])
