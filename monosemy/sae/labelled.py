"""Sentences with a label, divided into what probes are fitted on and what they are tested on.

1. The label is a field of the documents' metadata. A number is cut in two by `at`; `decade` is made of `year`.
2. Of several classes, those with fewer than two documents are left out, and named.
3. Of each class, some documents are held out. A sentence goes where its document goes: sentences of one speech share
   names, topics and style, and with some of them on either side a probe is praised for knowing the speech.
4. From every class and side the same number of sentences is drawn, as far as there are so many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from monosemy.corpus import DocumentRecord, TokenFile
from monosemy.runtime import InputError, random_stream

FEWEST_DOCUMENTS = 2
"""Of a class: one to fit on, and one to test on."""
FEWEST_SENTENCES = 10
"""That may be drawn per class."""
MOST_NUMBERS = 20
"""A number that has more values than this is no set of classes: it must be cut, or made a decade."""

SPLIT, DRAW = 1, 2
"""Which random stream is for what."""


class Labelled(NamedTuple):
    """Some sentences of a token file, and the class of each."""

    classes: tuple[str, ...]
    """Their names, in order of their text, or (below, at or above) the cut."""
    left_out: tuple[str, ...]
    """Classes with too few documents."""
    unlabelled: int
    """Documents that do not have the field."""
    sentences: Int[np.ndarray, " sentence"]
    """Numbers in the token file, rising."""
    document: Int[np.ndarray, " sentence"]
    label: Int[np.ndarray, " sentence"]
    """Number of the class."""
    test: Bool[np.ndarray, " sentence"]
    """Whether its document is held out."""


def label_sentences(
    tokens: TokenFile, label: str, at: float | None, max_sentences: int, test_fraction: float, seed: int
) -> Labelled:
    """At most about `max_sentences` sentences with the class that their document has in field `label`.

    Raises `InputError` where that field does not make two classes of two documents each.
    """
    if tokens.manifest.config["unit"] == "context":
        raise InputError(
            "the rows of this token file (unit context) run on from one document into the next, so they have no label: "
            "tokenize with --unit sentence or --unit document"
        )
    names = document_classes(tokens.documents, label, at)
    classes, left_out = usable_classes(names, label)
    if max_sentences < (fewest := FEWEST_SENTENCES * len(classes)):
        raise InputError(
            f"max_sentences is {max_sentences} for {len(classes)} classes; expected at least {fewest}, "
            f"{FEWEST_SENTENCES} for each"
        )
    class_of = np.array([classes.index(name) if name in classes else -1 for name in names])
    held_out = hold_out_documents(class_of, test_fraction, seed)
    document = tokens.document.numpy()
    sentences = _draw(class_of[document], held_out[document], max_sentences / len(classes), test_fraction, seed)
    of = document[sentences]
    return Labelled(classes, left_out, names.count(None), sentences, of, class_of[of], held_out[of])


def document_classes(documents: Sequence[DocumentRecord], label: str, at: float | None) -> list[str | None]:
    """The class of each document; None for those that do not say."""
    found = [_value(document.metadata, label) for document in documents]
    values = [value for value in found if value is not None]
    if not values:
        raise InputError(f"no document has the field {label!r}; there are {_fields(documents)}: choose one of them")
    texts = [value for value in values if isinstance(value, str)]
    if at is not None:
        if texts:
            raise InputError(f"--at {at:g} cuts numbers, but {label} holds text, such as {texts[0]!r}: leave it out")
        sides = {False: f"{label} < {at:g}", True: f"{label} >= {at:g}"}
        return [None if value is None else sides[float(value) >= at] for value in found]
    if not texts and len(set(values)) > MOST_NUMBERS:
        middle = sorted(map(float, values))[len(values) // 2]
        raise InputError(
            f"{label} is a number with {len(set(values))} values; expected at most {MOST_NUMBERS} without a cut: "
            f"cut it in two, for example --at {middle:g}"
        )
    return [None if value is None else str(value) for value in found]


def _value(metadata: dict[str, Any], label: str) -> str | float | None:
    """What a document says of itself in field `label`. An empty text says nothing."""
    value = metadata.get(label)
    if label == "decade" and value is None and isinstance(metadata.get("year"), int | float):
        value = f"{int(metadata['year']) // 10 * 10}s"
    return str(value).lower() if isinstance(value, bool) else None if value == "" else value


def _fields(documents: Sequence[DocumentRecord]) -> str:
    """The fields that documents have, for people."""
    names = {name: None for document in documents for name in document.metadata}
    derived = ["decade (from year)"] if "year" in names and "decade" not in names else []
    return ", ".join([*sorted(names), *derived]) or "no fields at all (give .jsonl or .parquet with some)"


def usable_classes(names: Sequence[str | None], label: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(classes that can be told apart, those left out for want of documents)."""
    documents = Counter(name for name in names if name is not None)
    if len(documents) < 2:
        raise InputError(
            f"{label} has one class, {next(iter(documents))!r}, in all {documents.total()} documents; expected two at "
            "least: tokenize text of both sides, or choose another --label or --at"
        )
    few = sorted(name for name, number in documents.items() if number < FEWEST_DOCUMENTS)
    classes = sorted(set(documents) - set(few))
    if len(classes) < 2:
        shown = ", ".join(map(repr, few[:5])) + (", ..." if len(few) > 5 else "")
        raise InputError(
            f"too few documents in {len(few)} of the {len(documents)} classes of {label}: {shown}; expected "
            f"{FEWEST_DOCUMENTS} in each of two classes, one to fit on and one to test on: tokenize more text"
        )
    return tuple(classes), tuple(few)


def hold_out_documents(
    class_of: Int[np.ndarray, " document"], test_fraction: float, seed: int
) -> Bool[np.ndarray, " document"]:
    """Which documents are for testing: that fraction of each class, but one at least, and one at least is not."""
    held_out = np.zeros(len(class_of), bool)
    for number in range(class_of.max() + 1):
        members = random_stream(seed, SPLIT, number).permutation(np.flatnonzero(class_of == number))
        held_out[members[: min(max(1, round(test_fraction * len(members))), len(members) - 1)]] = True
    return held_out


def _draw(
    label: Int[np.ndarray, " sentence"],
    held_out: Bool[np.ndarray, " sentence"],
    per_class: float,
    test_fraction: float,
    seed: int,
) -> Int[np.ndarray, " drawn"]:
    """Numbers of sentences, rising: of each class `per_class`, `test_fraction` of them held out."""
    drawn = []
    for number in range(label.max() + 1):
        for side, share in ((False, 1 - test_fraction), (True, test_fraction)):
            candidates = np.flatnonzero((label == number) & (held_out == side))
            order = random_stream(seed, DRAW, number, int(side)).permutation(candidates)
            drawn.append(order[: max(1, round(per_class * share))])
    return np.sort(np.concatenate(drawn))
