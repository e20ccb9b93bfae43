"""Room 5: a label for every latent, with the evidence for it and how sure it is. No key, no other model.

1. The index's sentences become words (`lexicon`), and each latent's examples a list of the words it fires on.
2. Frequent words, neighbours, classes and themes of these suggest hypotheses, alone and in pairs (`hypotheses`).
3. Each is measured on the examples and on the background. The label is the one of highest certainty, less what its kind
   is worse to read; or a list that begins with the best word and grows ("tax, revenue, budget") while that pays.
4. `describe` puts it into words. Where nothing explains most of the firing, the label says "mixed".

A latent that never fires has the label "" and certainty 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from monosemy.artifact import Draft, Manifest, read_manifest, unrecorded
from monosemy.explain.describe import Text, common, describe
from monosemy.explain.hypotheses import Condition, Corpus, Firing, Fit, Hypothesis, fit
from monosemy.explain.lexicon import BOUNDARY, GENERIC, MARKS, Lexicon
from monosemy.latents.index import Index, open_index
from monosemy.latents.labels import Label, open_labels, write_labels
from monosemy.latents.record import Aggregation, ExampleTable
from monosemy.runtime import InputError, Progress

__all__ = ["ExplainConfig", "Label", "open_labels", "run"]

COMPLICATED = {"word": 0.0, "phrase": 0.0, "class": 0.03, "piece": 0.05, "context": 0.08, "theme": 0.1}
"""What a description must be better by to be preferred to a plain word."""
GAIN = 0.05
"""What another item in a list must add to the certainty."""
ITEM = 0.02
"""What each further item makes a list worse."""
MIXED = 0.2
"""Below this certainty a label says that it is none."""


@dataclass(frozen=True)
class ExplainConfig:
    """Label every latent of an index."""

    index: Path = unrecorded()
    """Index, made by `monosemy index`."""
    out: Path = unrecorded()
    """Folder for the labels."""
    provider: Literal["local"] = "local"
    """Who explains: `local` needs no key and no network."""
    aggregation: Aggregation = "max"
    """Whose best sentences are the evidence."""
    n_items: int = 4
    """Words or phrases in a label, at most."""

    def __post_init__(self) -> None:
        if self.n_items < 1:
            raise InputError(f"n_items is {self.n_items}; expected at least 1")


def run(config: ExplainConfig) -> Manifest:
    """Make the labels artifact `config.out`."""
    index = open_index(config.index)
    parents = {"index": index.manifest.digest, "sae": index.manifest.parents["sae"]}
    with Draft(config.out, "labels", config, parents) as draft:
        if draft.complete:
            return read_manifest(config.out, "labels")
        labels = list(explain(index, config))
        write_labels(draft, labels)
        return draft.commit({"latents": len(labels), "labelled": sum(bool(label.label) for label in labels)})


def explain(index: Index, config: ExplainConfig) -> Iterator[Label]:
    """A label for each latent, in order."""
    lexicon = Lexicon(index)
    examples = index.example_table(config.aggregation)
    n_background = np.diff(index.sentences.starts)[index.sentences.background].sum()
    corpus = Corpus(lexicon, lexicon.n_background * index.manifest.rows["tokens"] / max(n_background, 1))
    first = np.searchsorted(examples.latent, np.arange(index.n_latents + 1))
    promoted = _promoted_words(index)
    with Progress("explain", index.n_latents, "latent") as progress:
        for latent in range(index.n_latents):
            rows = slice(int(first[latent]), int(first[latent + 1]))
            firing = firing_of(latent, index, lexicon, examples, rows, corpus)
            if firing is None:
                yield Label(latent, "", 0.0, {})
            else:
                yield label_of(latent, firing, corpus, promoted[latent], config)
            progress.advance(1)


def _promoted_words(index: Index) -> list[list[str]]:
    """Per latent, the promoted tokens that the text has a few times, stripped."""
    known = index.token_counts >= 3
    pieces = [piece.decode(errors="replace").strip() for piece in index.token_bytes]
    return [
        list(dict.fromkeys(pieces[token] for token in tokens if known[token] and pieces[token]))[:8]
        for tokens in index.promoted().tolist()
    ]


def firing_of(
    latent: int, index: Index, lexicon: Lexicon, examples: ExampleTable, rows: slice, corpus: Corpus
) -> Firing | None:
    """The words on which `latent` fires in its examples, those `rows` of the table; None if it never fires."""
    start, stop = examples.starts[rows.start], examples.starts[rows.stop]
    sentences = np.searchsorted(index.sentences.number, examples.sentence[rows])
    lengths = np.diff(examples.starts[rows.start : rows.stop + 1])
    tokens = np.repeat(index.sentences.starts[sentences], lengths) + examples.positions[start:stop]
    words, activations = lexicon.word_of_token[tokens], examples.activations[start:stop]
    tokens, activations, words = tokens[words >= 0], activations[words >= 0], words[words >= 0]
    if len(words) == 0:
        return None
    order = np.lexsort((tokens, -activations, words))  # each word's strongest token first
    words, first = np.unique(words[order], return_index=True)
    weights, pieces = activations[order][first].astype(float), lexicon.piece_of_token[tokens[order][first]]
    n_fired = float(index.statistics.n_fired[latent]) * len(words) / int(stop - start)
    density = min(max(n_fired / corpus.n_words, 1e-9), 0.5)
    return Firing(words, pieces, weights / weights.sum(), int(index.statistics.n_sentences[latent]), n_fired, density)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Hypotheses
# ---------------------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A hypothesis, measured."""

    hypothesis: Hypothesis
    kind: str
    """A key of `COMPLICATED`."""
    met: Bool[np.ndarray, " firing"]
    n_words: float
    fit: Fit

    @property
    def merit(self) -> float:
        return self.fit.certainty - COMPLICATED[self.kind]


def candidates(firing: Firing, corpus: Corpus) -> list[Candidate]:
    """Every hypothesis worth a look, the best first."""
    lexicon, found = corpus.lexicon, []
    words = [
        *_frequent(firing, lexicon.form[firing.words], "form", 0, 8, 0.04),
        *_frequent(firing, lexicon.family[firing.words], "family", 0, 8, 0.04),
    ]
    classes = _frequent_classes(firing, lexicon, 0)
    neighbours = [
        condition
        for offset in (-1, 1)
        for condition in _frequent(firing, lexicon.form[firing.words + offset], "form", offset, 3, 0.1)
    ]
    beside = [condition for offset in (-1, 1) for condition in _frequent_classes(firing, lexicon, offset)]
    before = [condition for condition in neighbours if condition.offset == -1 and condition.value != BOUNDARY]
    joined = [condition for condition in neighbours if lexicon.forms[condition.value] not in MARKS]
    pieces = _parts(firing, corpus)
    themes = _themes(firing, corpus)
    second = _frequent(firing, lexicon.form[firing.words - 2], "form", -2, 2, 0.25)
    second = [condition for condition in second if condition.value != BOUNDARY]
    for kind, groups in (
        ("word", [words]),
        ("class", [classes]),
        ("piece", [pieces]),
        ("context", [neighbours]),
        ("theme", [themes]),
        ("phrase", [words, joined]),
        ("class", [classes, neighbours]),
        ("class", [classes, beside]),
        ("context", [before, second]),
        ("phrase", [words, before, second]),
        ("theme", [words, themes]),
        ("theme", [classes, themes]),
    ):
        found += _measure(firing, corpus, kind, groups)
    return sorted(found, key=lambda candidate: -candidate.merit)


def _measure(firing: Firing, corpus: Corpus, kind: str, groups: list[list[Condition]]) -> Iterator[Candidate]:
    """Each combination of one condition per group that covers enough."""
    if len(groups) == 1:
        combinations = [((condition,), corpus.meets(firing.words, condition)) for condition in groups[0]]
    else:
        combinations = []
        meets = [[(condition, corpus.meets(firing.words, condition)) for condition in group] for group in groups]
        partial: list = [((), np.ones(len(firing.words), bool))]
        for group in meets:
            partial = [
                ((*conditions, condition), both)
                for conditions, met in partial
                for condition, more in group
                if firing.weights[both := met & more].sum() >= 0.08
            ]
        combinations = partial
    for hypothesis, met in combinations:
        n_words = corpus.count(hypothesis)
        yield Candidate(hypothesis, kind, met, n_words, fit(firing, met, n_words))


def _frequent(
    firing: Firing, values: Int64[np.ndarray, " firing"], kind: Any, offset: int, n: int, share: float
) -> list[Condition]:
    """Conditions on the `n` values with most weight, if at least `share`."""
    distinct, which = np.unique(values, return_inverse=True)
    totals = np.bincount(which, weights=firing.weights)
    best = np.argsort(-totals, kind="stable")[:n]
    keep = [value for rank, value in enumerate(best) if totals[value] >= share or (offset == 0 and rank < 2)]
    return [Condition(kind, offset, int(distinct[value])) for value in keep]


def _parts(firing: Firing, corpus: Corpus) -> list[Condition]:
    """Tokens that are only a part of the words they fire on."""
    lexicon = corpus.lexicon
    whole = np.array([lexicon.pieces[piece] for piece in firing.pieces]) == np.array(
        [lexicon.forms[form] for form in lexicon.form[firing.words]]
    )
    if firing.weights[~whole].sum() < 0.3:
        return []
    return _frequent(firing, firing.pieces, "piece", 0, 3, 0.2)


def _frequent_classes(firing: Firing, lexicon: Lexicon, offset: int) -> list[Condition]:
    shares = firing.weights @ lexicon.classes[firing.words + offset]
    return [Condition("class", offset, int(number)) for number in np.argsort(-shares)[:6] if shares[number] >= 0.3]


def _themes(firing: Firing, corpus: Corpus) -> list[Condition]:
    """Families that many of the sentences share, and few others have."""
    lexicon = corpus.lexicon
    sentences, which = np.unique(lexicon.sentence[firing.words], return_inverse=True)
    weights = np.bincount(which, weights=firing.weights)
    lengths = lexicon.starts[sentences + 1] - lexicon.starts[sentences]
    begins = lengths.cumsum() - lengths
    every = np.repeat(lexicon.starts[sentences] - begins, lengths) + np.arange(lengths.sum())
    forms = lexicon.family[lexicon.real_words[every]]
    pairs = np.unique(np.repeat(np.arange(len(sentences)), lengths) * len(lexicon.forms) + forms)
    families, which = np.unique(pairs % len(lexicon.forms), return_inverse=True)
    shares = np.bincount(which, weights=weights[pairs // len(lexicon.forms)])
    usable = (shares >= 0.25) & ~lexicon.generic_form[families]
    best = np.argsort(-shares[usable], kind="stable")[:4]
    return [Condition("theme", 0, int(family)) for family in families[usable][best]]


# ---------------------------------------------------------------------------------------------------------------------
# 3. The label
# ---------------------------------------------------------------------------------------------------------------------


def label_of(latent: int, firing: Firing, corpus: Corpus, promoted: list[str], config: ExplainConfig) -> Label:
    """The best label for what `firing` shows."""
    ranked = candidates(firing, corpus)
    chosen, whole = _choose(ranked, firing, config.n_items)
    texts = [describe(corpus.lexicon, firing, item.met, item.hypothesis) for item in chosen]
    text = _compose(texts, chosen)
    if whole.certainty < MIXED:
        text = _mixed(firing, corpus, ranked)
    evidence = {
        "coverage": round(whole.coverage, 3),
        "precision": round(whole.precision, 4),
        "specificity": round(whole.specificity, 3),
        "lift": float(f"{whole.lift:.3g}"),
        "items": [
            {
                "text": item.text,
                "coverage": round(candidate.fit.coverage, 3),
                "lift": float(f"{candidate.fit.lift:.3g}"),
            }
            for item, candidate in zip(texts, chosen, strict=True)
        ],
        "words": _top_words(firing, corpus),
        "promotes": promoted,
    }
    return Label(latent, text, round(whole.certainty, 4), evidence)


def _choose(ranked: list[Candidate], firing: Firing, n_items: int) -> tuple[list[Candidate], Fit]:
    """The best single description, or the list of words that begins with the best word: whichever has more merit."""
    best = ranked[0]
    word = next(item for item in ranked if item.kind in ("word", "phrase"))
    listed, whole = _extend(word, ranked, firing, n_items)
    if whole.certainty - ITEM * (len(listed) - 1) >= best.merit:
        return listed, whole
    return [best], best.fit


def _extend(first: Candidate, ranked: list[Candidate], firing: Firing, n_items: int) -> tuple[list[Candidate], Fit]:
    """A list of words and phrases that do not overlap, each of which raises the certainty by `GAIN`."""
    chosen, whole = [first], first.fit
    alike = [item for item in ranked if item.kind == "word" or (item.kind == "phrase" and item.met.sum() > 1)]
    while len(chosen) < n_items:
        met = np.any([item.met for item in chosen], axis=0)
        n_words = sum(item.n_words for item in chosen)
        free = [item for item in alike if not (item.met & met).any()]
        options = [(fit(firing, met | item.met, n_words + item.n_words), item) for item in free]
        best = max(options, key=lambda option: option[0].certainty, default=None)
        if best is None or best[0].certainty < whole.certainty + GAIN:
            break
        whole = best[0]
        chosen.append(best[1])
    return chosen, whole


def _compose(texts: list[Text], chosen: list[Candidate]) -> str:
    """One line out of the items."""
    if len(texts) == 1 and texts[0].quoted:
        text = texts[0].text
        if " " in text:
            return text if any(word[:1].isupper() for word in text.split()[1:]) else f"‘{text}’"
        name = text[:1].isupper() and text != "I"
        return text if name or not text[:1].isalpha() else f"the word ‘{text}’"
    shown: list[str] = []
    for item in texts:
        if not any(_alike(item.text, other) for other in shown):
            shown.append(item.text)
    if all(item.quoted and all(word.lower() in GENERIC for word in item.text.split()) for item in texts):
        shown = [f"‘{text}’" for text in shown]
    return ", ".join(shown)


def _alike(text: str, other: str) -> bool:
    """Whether `text` adds little to `other`: it contains it, or differs by its ending (compete, competition)."""
    text, other = text.lower(), other.lower()
    if set(other.split()) <= set(text.split()):
        return True
    short = min(len(text), len(other))
    return short >= 3 and other not in GENERIC and text[: max(4, short - 2)] == other[: max(4, short - 2)]


def _top_words(firing: Firing, corpus: Corpus) -> list[dict[str, Any]]:
    lexicon = corpus.lexicon
    top = _frequent(firing, lexicon.family[firing.words], "family", 0, 6, 0.02)
    found = []
    for condition in top:
        met = corpus.meets(firing.words, condition)
        text = common(lexicon, firing.words[met], firing.weights[met])
        measured = fit(firing, met, corpus.count((condition,)))
        found.append({"word": text, "share": round(measured.coverage, 3), "lift": float(f"{measured.lift:.3g}")})
    return found


def _mixed(firing: Firing, corpus: Corpus, ranked: list[Candidate]) -> str:
    """What it fires on most, telling words before common ones."""
    words = [item for item in ranked if item.kind == "word"]
    words.sort(key=lambda item: -item.fit.certainty)
    texts = [common(corpus.lexicon, firing.words[item.met], firing.weights[item.met]) for item in words]
    shown: list[str] = []
    for text in texts:
        if not any(_alike(text, other) for other in shown):
            shown.append(text)
    return "mixed: " + ", ".join(MARKS.get(text, text) for text in shown[:3])
