"""Tokenized documents on disk, while it is still open which of them are taken and held out.

1. Every rank appends its documents to files of its own: `Spool`.
2. `read_spools` puts the documents of all ranks back into the order of the sources, as one table.
3. `lay_sentences` or `pack_contexts` copies the rows of those that were chosen to where the token file wants them.

Nothing here is held in memory but a few numbers, a name and the metadata for each document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc
from jaxtyping import Bool, Int32, Int64

from monosemy.units import TokenizedDocument

SCHEMA = pyarrow.schema(
    {
        "number": pyarrow.int64(),  # in the order of the sources
        "source": pyarrow.int32(),  # whose share it counts towards
        "name": pyarrow.string(),
        "metadata": pyarrow.large_string(),  # JSON
        "tokens": pyarrow.int64(),
        "sentences": pyarrow.int64(),
        "too_long": pyarrow.int64(),
        "take": pyarrow.uint64(),  # drawn: documents are taken, and held out, in ascending order of these
        "hold_out": pyarrow.uint64(),
    }
)
ROWS_AT_ONCE = 4096


class SpooledDocument(NamedTuple):
    """What is known of a document before it is tokenized; the fields are columns of `SCHEMA`."""

    number: int
    source: int
    name: str
    metadata: str
    take: int
    hold_out: int


class Spool:
    """The documents of one rank, in folder `folder`, which all ranks share."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.ids, self.lengths = (folder / f"{rank}.{name}" for name in ("ids", "lengths"))
        self.table = folder / f"{rank}.arrow"
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Spool:
        self.open_ids, self.open_lengths = self.ids.open("wb"), self.lengths.open("wb")
        self.open_table = pyarrow.ipc.new_file(self.table, SCHEMA)
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for file in (self.open_ids, self.open_lengths, self.open_table):
            file.close()

    def add(self, document: SpooledDocument, tokenized: TokenizedDocument) -> None:
        """Append one document, of which only the rows may be large."""
        tokenized.ids.tofile(self.open_ids)
        tokenized.lengths.tofile(self.open_lengths)
        sizes = {"tokens": len(tokenized.ids), "sentences": len(tokenized.lengths), "too_long": tokenized.too_long}
        self.rows.append(document._asdict() | sizes)
        if len(self.rows) == ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self.open_table.write_table(pyarrow.Table.from_pylist(self.rows, SCHEMA))
        self.rows = []


class Spooled(NamedTuple):
    """The documents of all ranks, in the order of the sources."""

    table: pyarrow.Table
    """Columns of `SCHEMA`, and where the rows are: `rank`, `first_token` and `first_sentence` in that rank's files."""
    ids: list[Int32[np.ndarray, "token"]]
    """Of each rank."""
    lengths: list[Int32[np.ndarray, "sentence"]]

    def column(self, name: str) -> np.ndarray:
        """The numbers in column `name`."""
        return self.table[name].to_numpy()

    def rows(self) -> Iterator[tuple[Int32[np.ndarray, "token"], Int32[np.ndarray, "sentence"]]]:
        """The ids of each document, and the lengths of its rows."""
        names = ("rank", "first_token", "tokens", "first_sentence", "sentences")
        for rank, token, tokens, sentence, sentences in zip(*(self.column(n).tolist() for n in names), strict=True):
            yield self.ids[rank][token : token + tokens], self.lengths[rank][sentence : sentence + sentences]

    def filter(self, mask: Bool[np.ndarray, "document"]) -> Spooled:
        """The documents where `mask` is true."""
        return self if mask.all() else self._replace(table=self.table.filter(pyarrow.array(mask)))


def read_spools(folder: Path, ranks: int) -> Spooled:
    """What ranks 0 to `ranks` - 1 have written to `folder`."""
    spools = [Spool(folder, rank) for rank in range(ranks)]
    table = pyarrow.concat_tables([_read_table(spool, rank) for rank, spool in enumerate(spools)])
    if ranks > 1:
        table = table.sort_by("number")
    return Spooled(table, [_map(spool.ids) for spool in spools], [_map(spool.lengths) for spool in spools])


def _read_table(spool: Spool, rank: int) -> pyarrow.Table:
    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(spool.table))).read_all()
    for name in ("token", "sentence"):
        sizes = table[f"{name}s"].to_numpy()
        table = table.append_column(f"first_{name}", pyarrow.array(np.cumsum(sizes) - sizes))
    return table.append_column("rank", pyarrow.array(np.full(len(table), rank)))


def _map(path: Path) -> Int32[np.ndarray, "number"]:
    return np.memmap(path, np.int32, "r") if path.stat().st_size else np.zeros(0, np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The token file's rows
# ---------------------------------------------------------------------------------------------------------------------


class Laid(NamedTuple):
    """The tensors of a token file, and what each document has in it."""

    ids: Int32[np.ndarray, "token"]
    """Memory-mapped."""
    starts: Int64[np.ndarray, "sentence_boundary"]
    document: Int32[np.ndarray, "sentence"]
    """The document it is from, or begins in."""
    sentences: Int64[np.ndarray, "document"]
    tokens: Int64[np.ndarray, "document"]


def _reserve(path: Path, tokens: int) -> Int32[np.ndarray, "token"]:
    """A new file of so many ids, memory-mapped; it takes its room on the disk at once: later it could not say no."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * tokens)
    return np.memmap(path, np.int32, "r+", shape=(tokens,))


def lay_sentences(documents: Spooled, scratch: Path) -> Laid:
    """One document's rows after the other's; the ids are written to file `scratch`."""
    tokens, sentences = documents.column("tokens"), documents.column("sentences")
    ids = _reserve(scratch, int(tokens.sum()))
    starts = np.zeros(sentences.sum() + 1, np.int64)
    token = sentence = 0
    for document_ids, lengths in documents.rows():
        ids[token : token + len(document_ids)] = document_ids
        starts[sentence + 1 : sentence + 1 + len(lengths)] = lengths
        token, sentence = token + len(document_ids), sentence + len(lengths)
    np.cumsum(starts, out=starts)
    return Laid(ids, starts, np.repeat(np.arange(len(tokens), dtype=np.int32), sentences), sentences, tokens)


def pack_contexts(
    documents: Spooled, held_out: Bool[np.ndarray, "document"], length: int, bos: int | None, scratch: Path
) -> Laid:
    """Rows of `length` tokens, cut from all training documents in a row, then from all that are held out.

    The last row of each of the two may be shorter. With `bos`, each row begins with it, and has one token less of the
    documents; it counts as one of the document's that the row begins in.
    """
    tokens = documents.column("tokens")
    begin, payload = (0, length) if bos is None else (1, length - 1)
    splits = [np.flatnonzero(held_out == value) for value in (False, True)]
    totals = np.array([tokens[split].sum() for split in splits])
    rows = -(-totals // payload)
    ids = _reserve(scratch, int((totals + begin * rows).sum()))
    starts, owners, base = [], [], 0
    for value, split, total, n_rows in zip((False, True), splits, totals, rows, strict=True):
        starts.append(base + np.arange(n_rows) * length)
        ends = np.cumsum(tokens[split])
        owners.append(split[np.searchsorted(ends, np.arange(n_rows) * payload, side="right")])
        position = 0
        for document_ids, _ in documents.filter(held_out == value).rows():
            places = np.arange(position, position := position + len(document_ids))
            ids[base + places + begin * (places // payload + 1)] = document_ids
        base += int(total + begin * n_rows)
    first = np.concatenate([*starts, [base]])
    if bos is not None:
        ids[first[:-1]] = bos
    document = np.concatenate(owners).astype(np.int32)
    sentences = np.bincount(document, minlength=len(tokens))
    return Laid(ids, first, document, sentences, tokens + begin * sentences)
