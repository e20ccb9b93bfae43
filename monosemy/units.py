"""Documents become rows of tokens: sentences, whole documents, or a stream that is packed into contexts.

1. `RowTokenizer.tokenize` makes the rows of one document, in the unit that was asked for.
2. `tokenize_all` does so for many, on all cores, in order: the result is the same for any number of processes.

The house calls a row of the token file a sentence, whatever its unit.

Sentences are found by Punkt (Kiss and Strunk 2006, "Unsupervised Multilingual Sentence Boundary Detection").
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32

from monosemy.documents import Document
from monosemy.runtime import InputError, cpu_count

if TYPE_CHECKING:
    from nupunkt import PunktSentenceTokenizer

    from monosemy.llm.tokenizer import Tokenizer

Unit = Literal["sentence", "document", "context"]
Key = TypeVar("Key")

SENTENCES_PER_CALL = 8192
"""Sentences given to the tokenizer at once."""
BATCH_CHARACTERS = 250_000
"""Characters of the documents given to a process at once, about 0.1 s of work."""
FEW_CHARACTERS = 16_000_000
"""Up to here, starting processes takes longer than doing their work."""


class TokenizedDocument(NamedTuple):
    """One document's rows."""

    ids: Int32[np.ndarray, "token"]
    lengths: Int32[np.ndarray, "sentence"]
    """Tokens of each row; they sum to the number of `ids`."""
    too_long: int
    """Sentences left out for their length; of unit `document`, 1 if it was cut."""


def split_sentences(text: str, punkt: PunktSentenceTokenizer) -> Iterator[str]:
    """The sentences of `text`, none of them empty, each on one line.

    A blank line ends a sentence, so that a heading does not become the beginning of what follows it; a line break or
    run of spaces within a sentence becomes one space.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in punkt.tokenize(paragraph):
            if speaks(sentence):
                yield " ".join(sentence.split())


def speaks(text: str) -> bool:
    """Whether there is a letter or a digit: a line of asterisks is no sentence."""
    return any(map(str.isalnum, text))


@dataclass(frozen=True)
class RowTokenizer:
    """How a document becomes rows."""

    tokenizer: Tokenizer
    unit: Unit
    longest: int
    """Most tokens of a row, BOS included."""
    bos: bool
    """Whether every row begins with BOS."""

    @cached_property
    def punkt(self) -> PunktSentenceTokenizer:
        import nupunkt

        return nupunkt.load("default")

    def tokenize(self, document: Document) -> TokenizedDocument:
        """The rows of `document`; of unit `context` a single one, ended by the separator, however long it is: contexts
        are packed from these when it is known which documents are held out.

        Raises `InputError` for a chat that the model's template refuses, or whose unit is `sentence`.
        """
        if self.unit == "sentence":
            return self._sentences(document)
        text = self._text(document)
        ids = self.tokenizer.encode_batch([text])[0] if speaks(text) else []
        if self.bos and ids[:1] == [self.tokenizer.bos]:  # some chat templates write it
            ids = ids[1:]
        if self.unit == "context":
            ids = [*ids, self.separator] if ids else []
            return _rows([ids] if ids else [], 0)
        begin = self._begin()
        most = self.longest - len(begin)
        rows = [begin + ids[start : start + most] for start in range(0, len(ids), most)]
        return _rows(rows, int(len(rows) > 1))

    @property
    def separator(self) -> int | None:
        """The token that ends a document in a context: EOS, or BOS where the tokenizer has none."""
        return self.tokenizer.bos if self.tokenizer.eos is None else self.tokenizer.eos

    def _begin(self) -> list[int]:
        return [self.tokenizer.bos] if self.bos and self.tokenizer.bos is not None else []

    def _sentences(self, document: Document) -> TokenizedDocument:
        if document.is_chat:
            raise InputError(f"{document.name} is a chat, which has no sentences: set --unit to document or context")
        begin = self._begin()
        rows, too_long = [], 0
        sentences = split_sentences(document.text, self.punkt)
        while batch := list(islice(sentences, SENTENCES_PER_CALL)):
            encoded = self.tokenizer.encode_batch(batch)
            fitting = [array("i", begin + row) for row in encoded if len(begin) + len(row) <= self.longest]
            too_long += len(encoded) - len(fitting)
            rows += fitting
        return _rows(rows, too_long)

    def _text(self, document: Document) -> str:
        if not document.is_chat or not document.text:
            return document.text.strip()
        try:
            return self.tokenizer.chat(json.loads(document.text), add_generation_prompt=False)
        except InputError as error:
            raise InputError(f"{document.name}: {error}") from error


def _rows(rows: list[list[int]] | list[array[int]], too_long: int) -> TokenizedDocument:
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return TokenizedDocument(ids, lengths, too_long)


# ---------------------------------------------------------------------------------------------------------------------
# Many documents, on all cores
# ---------------------------------------------------------------------------------------------------------------------


def tokenize_all(
    documents: Iterable[tuple[Key, Document]], tokenizer: RowTokenizer, workers: int = 0
) -> Iterator[tuple[Key, TokenizedDocument]]:
    """The rows of each document under its key, in order, by `workers` processes.

    0 workers are one for each core, as soon as there is enough text to be worth starting them; 1 is this process
    itself. Only as many texts are held as all workers have before them.
    """
    batches = _batches(documents)
    alone = FEW_CHARACTERS if workers == 0 else 0
    workers = workers or cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on one machine share it
    for batch in batches:
        if workers > 1 and alone <= 0:
            yield from _in_processes(chain([batch], batches), tokenizer, workers)
            return
        yield from ((key, tokenizer.tokenize(document)) for key, document in batch)
        alone -= sum(len(document.text) for _, document in batch)


def _batches(documents: Iterable[tuple[Key, Document]]) -> Iterator[list[tuple[Key, Document]]]:
    batch, characters = [], 0
    for item in documents:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _in_processes(
    batches: Iterable[list[tuple[Key, Document]]], tokenizer: RowTokenizer, workers: int
) -> Iterator[tuple[Key, TokenizedDocument]]:
    # Not forked: a copy of a process whose tokenizer or torch runs threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (replace(tokenizer),))  # without what it has cached
    pending: deque[tuple[list[Key], Future[list[TokenizedDocument]]]] = deque()
    try:
        for batch in batches:
            keys, texts = zip(*batch, strict=True)
            pending.append((list(keys), pool.submit(_tokenize_batch, list(texts))))
            if len(pending) > 2 * workers:
                yield from _await(pending)
        while pending:
            yield from _await(pending)
    except (BrokenProcessPool, MemoryError) as error:
        raise InputError(
            "a tokenizing process died, most likely for lack of memory: give fewer --workers, or shorter documents"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _await(
    pending: deque[tuple[list[Key], Future[list[TokenizedDocument]]]],
) -> Iterator[tuple[Key, TokenizedDocument]]:
    keys, future = pending.popleft()
    yield from zip(keys, future.result(), strict=True)


def _start_worker(tokenizer: RowTokenizer) -> None:
    """Runs once in every new process."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Ends this process when the one that started it was killed and could not."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _tokenize_batch(documents: list[Document]) -> list[TokenizedDocument]:
    return [_tokenizer.tokenize(document) for document in documents]
