"""How several texts lie side by side in one forward pass, and what attention must know of it.

- Padded: (text, position), with a mask. It is what a cache of keys and values needs.
- Packed: one row, (1, token), with the length of each text. Nothing but attention ever computes on padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosemy.runtime import InputError

RotaryTables = Callable[[int], tuple[Tensor, Tensor]]
"""Cosines and signed sines, (position, 1, head_dim), of at least so many positions."""


class KeyValueCache:
    """Keys and values of the tokens so far, so that each new token costs one position.

    Every layer writes at `length`; the model moves `length` on once the last layer is done.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        """`shape`: layers, texts, key-value heads, positions, head_dim."""
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.real = torch.ones(shape[1], shape[3], device=device, dtype=torch.bool)
        """Which positions hold a token rather than padding."""
        self.padded = False
        self.length = 0
        self.weights: Any = None
        """`decode.Weights` of the model, once it has decoded a token."""

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of `layer`; return all of its keys and values so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Int[Tensor, " text"]) -> None:
        """Keep only the texts `rows`, in that order; the others cost nothing more."""
        for stored in (self.keys, self.values):
            stored[:, : len(rows), :, : self.length] = stored[:, rows, :, : self.length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.real = self.real[rows]
        self.padded = not bool(self.real.all())


def ranges(starts: Int[Tensor, " range"], lengths: Int[Tensor, " range"]) -> Int[Tensor, " place"]:
    """start, start + 1, ..., start + length - 1 of each range, one after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) + (starts - before).repeat_interleave(lengths)


class Packing:
    """Texts one after the other in one row, and how to lay them out as a padded batch, which attention wants."""

    def __init__(self, lengths: Int[Tensor, " text"], device: torch.device) -> None:
        self.texts, self.longest, self.tokens = len(lengths), int(lengths.max()), int(lengths.sum())
        lengths = lengths.to(device)
        self.position = ranges(torch.zeros_like(lengths), lengths)
        """(token,): place of each token in its text."""
        self.place = ranges(torch.arange(self.texts, device=device) * self.longest, lengths)
        """(token,): where it lies in the padded batch, flattened."""
        self.full = self.tokens == self.texts * self.longest

    def pad(self, tokens: Float[Tensor, "1 token *rest"]) -> Float[Tensor, "text position *rest"]:
        """The padded batch; zeros where no token is."""
        rest = tokens.shape[2:]
        if self.full:
            return tokens.view(self.texts, self.longest, *rest)
        padded = tokens.new_zeros(self.texts * self.longest, *rest).index_copy(0, self.place, tokens[0])
        return padded.view(self.texts, self.longest, *rest)

    def unpad(self, padded: Float[Tensor, "text position *rest"]) -> Float[Tensor, "1 token *rest"]:
        """Its tokens alone, in one row again."""
        flat = padded.reshape(1, self.texts * self.longest, *padded.shape[2:])
        return flat if self.full else flat[:, self.place]


@dataclass(frozen=True)
class Positions:
    """What attention must know about where the tokens stand; the same for every layer."""

    cosine: Tensor
    """(batch or 1, position, 1, head_dim)"""
    sine: Tensor
    """(batch or 1, position, 1, head_dim), its first half negated."""
    causal: bool
    """No padding and nothing before: the plain causal triangle."""
    visible: Tensor | None
    """(batch or 1, 1, position, key position), bool; None: every key, or the causal triangle."""
    packing: Packing | None = None
    """Where several texts share one row."""


def padded_positions(
    hidden: Float[Tensor, "text position d_model"],
    mask: Tensor | None,
    cache: KeyValueCache | None,
    window: int | None,
    tables: RotaryTables,
) -> Positions:
    """Rotary angles and visibility for the new positions of `hidden`, after those in `cache`."""
    length, before, device = hidden.shape[1], 0 if cache is None else cache.length, hidden.device
    end = before + length
    if cache is not None:
        if end > cache.capacity:
            raise InputError(f"{end} tokens do not fit in a cache of {cache.capacity}: make a larger one")
        if mask is not None:
            cache.real[:, before:end] = mask.to(device)
            cache.padded |= not bool(mask.all())
        mask = cache.real[:, :end] if cache.padded else None
    cosine, sine = tables(end)
    if mask is None and (window is None or end <= window) and (before == 0 or length == 1):
        return Positions(cosine[None, before:end], sine[None, before:end], before == 0 and length > 1, None)
    visible = causal_triangle(before, end, window, device)
    if mask is None:
        return Positions(cosine[None, before:end], sine[None, before:end], False, visible)
    mask = mask.to(device)
    # Padding has no position of its own; it counts as the first, and sees itself, so that no row is empty.
    counted = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, before:]
    itself = torch.eye(end, device=device, dtype=torch.bool)[before:]
    return Positions(cosine[counted], sine[counted], False, (visible & mask[:, None, None, :]) | itself)


def packed_positions(
    hidden: Float[Tensor, "row token d_model"], lengths: Int[Tensor, " text"], window: int | None, tables: RotaryTables
) -> Positions:
    """Rotary angles and layout of the texts packed in the one row of `hidden`. Errors as in `pack`."""
    packing, visible = pack(hidden, lengths), None
    cosine, sine = tables(packing.longest)
    if window is not None and packing.longest > window:
        visible = causal_triangle(0, packing.longest, window, hidden.device)
    cosine, sine = cosine[packing.position][None], sine[packing.position][None]
    return Positions(cosine, sine, visible is None, visible, packing)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise `InputError` unless `ids` are (text, position) and, as far as the CPU can see, tokens of the vocabulary."""
    if ids.dim() != 2 or 0 in ids.shape:
        raise InputError(f"the ids have shape {tuple(ids.shape)}; expected (text, position), with one token at least")
    if ids.device.type == "cpu" and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise InputError(f"the ids run from {int(ids.min())} to {int(ids.max())}; tokens are 0 to {vocabulary - 1}")


def pack(hidden: Float[Tensor, "row token d_model"], lengths: Int[Tensor, " text"]) -> Packing:
    """The layout of texts of these `lengths` in the one row of `hidden`. Raises `InputError` if they do not fill it."""
    lengths = torch.as_tensor(lengths)
    if hidden.shape[0] != 1 or not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum()) != hidden.shape[1]:
        raise InputError(
            f"the lengths of packed texts sum to {int(lengths.sum())} and the input has shape "
            f"{tuple(hidden.shape[:2])}: expected one row of just those texts, none of them empty"
        )
    return Packing(lengths, hidden.device)


def causal_triangle(
    before: int, end: int, window: int | None, device: torch.device
) -> Bool[Tensor, "1 1 position key"]:
    """Which of `end` keys each position from `before` on may see: itself and those before it, `window` in all."""
    keys = torch.arange(end, device=device)
    queries = keys[before:, None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible[None, None]
