"""What a model's configuration file says, read with a refusal for whatever is missing or of the wrong kind.

1. `ConfigFile` reads single values.
2. `rotary_divisors` turns what a file says of rotary scaling into `LlamaConfig.rope_divisors`.
3. `halves_together` turns the rotary order of Meta's and GGUF's rows into Hugging Face's, which is ours.

Papers: Llama 3 (arXiv 2407.21783, scaling of the rotary frequencies), position interpolation (2306.15595, 'linear').
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from monosemy.runtime import InputError


class ConfigFile:
    """Values by name. One that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def get(self, key: str, default: Any = None) -> Any:
        """Whatever `key` says."""
        found = self.values.get(self.prefix + key)
        return default if found is None else found

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 1."""
        found = self._required(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise InputError(f"{self.source}: {self.prefix}{key} = {found!r}; expected a whole number of at least 1")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        found = self._required(key, default)
        if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < math.inf:
            raise InputError(f"{self.source}: {self.prefix}{key} = {found!r}; expected a positive number")
        return float(found)

    def flag(self, key: str) -> bool:
        """True or false; false if missing."""
        found = self.get(key, False)
        if not isinstance(found, bool):
            raise InputError(f"{self.source}: {self.prefix}{key} = {found!r}; expected true or false")
        return found

    def refuse(self, key: str, accepted: Any = None) -> None:
        """Raise `InputError` if `key` asks for something else than `accepted`; missing and false ask for nothing."""
        found = self.get(key)
        if found and found != accepted:
            expected = "use a model without it" if accepted is None else f"expected {accepted!r}"
            raise InputError(f"{self.source}: {self.prefix}{key} = {found!r} is not implemented; {expected}")

    def _required(self, key: str, default: Any) -> Any:
        if (found := self.get(key, default)) is None:
            raise InputError(f"{self.source} does not say {self.prefix}{key}: it is not complete; download it again")
        return found


def rotary_divisors(rope: ConfigFile, kind: str, head_dim: int, theta: float) -> tuple[float, ...] | None:
    """What each rotary frequency is divided by.

    Args:
        rope: holds `factor` and, for Llama 3's scaling, what else that needs.
        kind: `default`; `linear`, which divides all by `factor`; or `llama3`, which divides the slow ones, that is,
            those that turn less than `low_freq_factor` times within the original context, and keeps the fast ones.
    """
    if kind == "default":
        return None
    if kind == "linear":
        return (rope.number("factor"),) * (head_dim // 2)
    if kind != "llama3":
        raise InputError(
            f"{rope.source}: rope scaling {kind!r} is not implemented; expected none, 'linear' or 'llama3'"
        )
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope.count("original_max_position_embeddings")
    if not low < high:
        raise InputError(f"{rope.source}: low_freq_factor {low} must be below high_freq_factor {high}")
    divisors = []
    for pair in range(head_dim // 2):
        turns = context / (2 * math.pi * theta ** (2 * pair / head_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / factor + kept))
    return tuple(divisors)


def halves_together(rows: Shaped[Tensor, "row *column"], heads: int) -> Shaped[Tensor, "row *column"]:
    """Of the rows of each head, those of rotary pairs (2 i, 2 i + 1) move to (i, i + half)."""
    if len(rows) % (2 * heads):
        return rows  # another shape than the configuration says, which is reported where it is copied
    return rows.view(heads, len(rows) // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
