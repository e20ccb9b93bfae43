"""Which documents a token file takes, and which of them it holds out.

1. Every document draws a number for each purpose, from the seed and its name alone (`draw`).
2. `choose_taken`: whole documents in ascending order of one, up to `max_tokens`, and to each source's share of them.
3. `choose_validation`: whole documents in ascending order of another, until their tokens reach the asked fraction.

So the choice depends neither on the order in which documents are tokenized nor on who does it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Int, UInt64


def draw(seed: int, purpose: str, name: str) -> int:
    """A number drawn for the document `name`: it depends on nothing but the seed, the purpose and the name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {name}".encode()).digest()[:8], "big")


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Of each source, the share of all tokens; without weights, all sources are one."""
    total = sum(map(Fraction, weights))
    return [Fraction(weight) / total for weight in weights] or [Fraction(1)]


def choose_taken(
    sources: Int[np.ndarray, "document"],
    tokens: Int[np.ndarray, "document"],
    draws: UInt64[np.ndarray, "document"],
    shares: Sequence[Fraction],
    max_tokens: int,
) -> Bool[np.ndarray, "document"]:
    """Which documents are taken: of each source those first drawn, up to the one that reaches its share of the whole.

    The whole is `max_tokens` (0: no limit), or less where a source has not enough for its share.
    """
    taken = np.ones(len(tokens), bool)
    if len(shares) == 1 and not max_tokens:
        return taken
    available = [int(tokens[sources == source].sum()) / share for source, share in enumerate(shares)]
    whole = min([*available, max_tokens] if max_tokens else available)
    for source, share in enumerate(shares):
        own = np.flatnonzero(sources == source)
        own = own[np.argsort(draws[own], kind="stable")]
        before = np.cumsum(tokens[own]) - tokens[own]
        taken[own] = before < math.ceil(whole * share)
    return taken


class Limit:
    """Spares the work on documents of a source that `choose_taken` will not take."""

    def __init__(self, share: Fraction, max_tokens: int) -> None:
        self.most = math.ceil(share * max_tokens) if max_tokens else math.inf
        self.first: list[tuple[int, int]] = []
        """A heap of (-draw, tokens): the last of them on top."""
        self.total = 0

    def excludes(self, draw: int) -> bool:
        """Whether the documents that were added, and come before this one, have tokens enough."""
        return self.total >= self.most and draw > -self.first[0][0]

    def add(self, draw: int, tokens: int) -> None:
        """Count a document."""
        if math.isinf(self.most):
            return
        heapq.heappush(self.first, (-draw, tokens))
        self.total += tokens
        while self.total - self.first[0][1] >= self.most:
            self.total -= heapq.heappop(self.first)[1]


def choose_validation(
    tokens: Int[np.ndarray, "document"], draws: UInt64[np.ndarray, "document"], fraction: float
) -> Bool[np.ndarray, "document"]:
    """Which documents are held out: in the order of `draws`, each that brings their tokens nearer `fraction`.

    At least one where there are two or more and `fraction` is above 0, and never all.
    """
    held_out = np.zeros(len(tokens), bool)
    if fraction == 0 or len(tokens) < 2:
        return held_out
    wanted, left = fraction * tokens.sum(), len(tokens) - 1
    for number in np.argsort(draws, kind="stable"):
        if tokens[number] < 2 * wanted and left:
            held_out[number] = True
            wanted -= tokens[number]
            left -= 1
    if not held_out.any():
        held_out[tokens.argmin()] = True
    return held_out
