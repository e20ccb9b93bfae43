"""Turns hypotheses into words a person would use."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from monosemy.explain.hypotheses import Condition, Firing, Hypothesis
from monosemy.explain.lexicon import BOUNDARY, CLASSES, GENERIC, MARGIN, MARKS, Lexicon

SAME = 0.7
"""A neighbour shared by this share of the activation belongs to the phrase."""


class Text(NamedTuple):
    """A hypothesis in words."""

    text: str
    quoted: bool
    """Whether `text` is a quotation from the sentences rather than a description."""


def describe(lexicon: Lexicon, firing: Firing, met: Bool[np.ndarray, " firing"], hypothesis: Hypothesis) -> Text:
    """`hypothesis` in words, spelled as in the examples that meet it."""
    words, weights = firing.words[met], firing.weights[met]
    by_place = {condition.offset: condition for condition in hypothesis if condition.kind != "theme"}
    themes = [
        _name(lexicon, _in_sentences(lexicon, words, condition))
        for condition in hypothesis
        if condition.kind == "theme"
    ]
    about = f" in sentences that mention ‘{'’, ‘'.join(themes)}’" if themes else ""
    if not by_place:
        return Text(f"talk of {' and '.join(themes)}", False)
    here = by_place.get(0)
    if here is None:
        return Text(_around(lexicon, words, weights, by_place) + about, False)
    if here.kind == "piece":
        return Text(_part(lexicon, words, here), False)
    if here.kind == "class":
        return Text(CLASSES[here.value] + _context(lexicon, words, weights, by_place) + about, False)
    return _word(lexicon, words, weights, by_place, about)


def _word(lexicon: Lexicon, words, weights, by_place: dict[int, Condition], about: str) -> Text:
    """A word, as part of the phrase it always stands in."""
    here = common(lexicon, words, weights)
    before, after = by_place.get(-1), by_place.get(1)
    ends = ""
    if before is not None and before.value == BOUNDARY and before.kind == "form":
        ends = "first word "
    if after is not None and after.value == BOUNDARY and after.kind == "form":
        ends = "last word "
    if here in MARKS:
        context = {offset: condition for offset, condition in by_place.items() if offset}
        return Text(MARKS[here] + _context(lexicon, words, weights, context) + about, False)
    phrase = _phrase(lexicon, words, weights, by_place)
    if about or ends:
        return Text(f"{ends}‘{phrase}’{about}", False)
    return Text(phrase, True)


def _part(lexicon: Lexicon, words, condition: Condition) -> str:
    """A token that is part of words."""
    text = lexicon.pieces[condition.value]
    if text.isdigit():
        return f"numbers with the digit {text}" if len(text) == 1 else f"numbers with {text}"
    if text in MARKS:
        return f"{MARKS[text]} inside words"
    forms = [lexicon.forms[form] for form in lexicon.form[words]]
    if np.mean([form == text for form in forms]) >= 0.5:
        return f"‘{text}’ and words that contain it"
    for name, share in (
        ("beginning with", np.mean([form.startswith(text) for form in forms])),
        ("ending in", np.mean([form.endswith(text) for form in forms])),
    ):
        if share >= SAME:
            return f"words {name} ‘{text}’"
    return f"words with ‘{text}’"


def _phrase(lexicon: Lexicon, words, weights, by_place: dict[int, Condition]) -> str:
    """The word with the neighbours that are asked for, and those that are nearly always there."""
    parts = [common(lexicon, words, weights)]
    for step in (-1, 1):
        offset = step
        while abs(offset) < MARGIN:
            surface, share = _most_common(lexicon.surface[words + offset], weights)
            text = lexicon.surfaces[surface]
            asked = offset in by_place
            if not text or not (asked or (len(words) > 2 and share >= SAME and _is_content(text))):
                break
            parts = [text, *parts] if step < 0 else [*parts, text]
            offset += step
    return _join(parts)


def _join(parts: list[str]) -> str:
    text = " ".join(parts)
    for mark in (",", ".", "?", "!", ";", ":", "%"):
        text = text.replace(f" {mark}", mark)
    return text


def _context(lexicon: Lexicon, words, weights, by_place: dict[int, Condition]) -> str:
    """after ..., before ... for the conditions on neighbours."""
    text = ""
    for offset, name in ((-1, "after"), (1, "before")):
        condition = by_place.get(offset)
        if condition is None:
            continue
        if condition.kind == "form" and condition.value == BOUNDARY:
            text += " at the beginning of a sentence" if offset < 0 else " at the end of a sentence"
        elif condition.kind == "class":
            text += f" {name} {CLASSES[condition.value]}"
        else:
            text += f" {name} ‘{common(lexicon, words + offset, weights)}’"
    return text


def _around(lexicon: Lexicon, words, weights, by_place: dict[int, Condition]) -> str:
    """Only the neighbours are known."""
    if all(condition.kind == "form" and condition.value == BOUNDARY for condition in by_place.values()):
        return "first words of a sentence" if -1 in by_place else "last words of a sentence"
    before = [common(lexicon, words + offset, weights) for offset in (-2, -1) if offset in by_place]
    if before:
        rest = {offset: condition for offset, condition in by_place.items() if offset > 0}
        return f"what follows ‘{_join(before)}’" + _context(lexicon, words, weights, rest)
    return f"just{_context(lexicon, words, weights, by_place)}"


def _is_content(text: str) -> bool:
    return text.lower() not in GENERIC and text[:1].isalnum()


def _in_sentences(lexicon: Lexicon, words, condition: Condition) -> Int64[np.ndarray, " word"]:
    """The words of that family in the sentences of `words`."""
    found = [lexicon.words_of_sentence(sentence) for sentence in np.unique(lexicon.sentence[words]).tolist()]
    every = np.concatenate(found)
    return every[lexicon.family[every] == condition.value]


def _name(lexicon: Lexicon, words) -> str:
    return common(lexicon, words, np.ones(len(words)))


def common(lexicon: Lexicon, words, weights) -> str:
    """How the words are written most often; a capital at a sentence's beginning is no reason to write one."""
    inside = lexicon.form[words - 1] != BOUNDARY
    if inside.any():
        words, weights = words[inside], weights[inside]
    return lexicon.surfaces[_most_common(lexicon.surface[words], weights)[0]]


def _most_common(values: np.ndarray, weights: np.ndarray) -> tuple[int, float]:
    totals: Counter[int] = Counter()
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        totals[value] += weight
    value, total = totals.most_common(1)[0]
    return value, total / max(float(weights.sum()), 1e-12)
