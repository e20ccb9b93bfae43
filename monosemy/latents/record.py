"""Reads an index: what is known about each latent, without the model.

Small tables are read when first asked for and kept; examples are read one latent at a time (one row group or two of
`examples.parquet`), or all at once with `example_table`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from monosemy.artifact import Manifest, read_manifest, read_tensors
from monosemy.runtime import InputError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

Aggregation = Literal["max", "mean", "last"]

EXAMPLES_PER_GROUP = 2400
"""Rows per row group of `examples.parquet`: 16 latents with 50 examples under each aggregation."""


class Statistics(NamedTuple):
    """One number per latent; see `LatentRecord`."""

    density: Float64[np.ndarray, " latent"]
    n_fired: Int64[np.ndarray, " latent"]
    n_sentences: Int64[np.ndarray, " latent"]
    mean: Float32[np.ndarray, " latent"]
    max: Float32[np.ndarray, " latent"]
    first_share: Float32[np.ndarray, " latent"]
    last_share: Float32[np.ndarray, " latent"]
    histogram: Int64[np.ndarray, "latent bin"]


class LatentRecord(NamedTuple):
    """How a latent fires."""

    latent: int
    density: float
    """Share of the rows that are not sinks on which it fires."""
    n_fired: int
    """Rows on which it fires."""
    n_sentences: int
    """Sentences in which it fires."""
    mean: float
    """Mean activation over the rows on which it fires; 0 if it never does."""
    max: float
    """Largest activation."""
    first_share: float
    """Share of its firing that is on a sentence's first token that is not a sink."""
    last_share: float
    """Share of its firing that is on a sentence's last token."""
    histogram: Int64[np.ndarray, " bin"]
    """Activations per bin; see `tally.BINS_PER_OCTAVE`."""


class Example(NamedTuple):
    """A sentence in which a latent fires."""

    sentence: int
    document: int
    score: float
    """Under the aggregation it was asked for."""
    ids: Int32[np.ndarray, " token"]
    pieces: list[str]
    """The text of each token; they join to the sentence."""
    activations: Float32[np.ndarray, " token"]


class TokenEffect(NamedTuple):
    """A token whose logit a latent moves."""

    token: int
    piece: str
    value: float
    """Its effect on the logit, in standard deviations of all latents' effects on that token."""


class Logits(NamedTuple):
    """The tokens a latent moves most, strongest first."""

    promoted: list[TokenEffect]
    suppressed: list[TokenEffect]


class SentenceTable(NamedTuple):
    """The sentences an index holds, by ascending number."""

    number: Int64[np.ndarray, " sentence"]
    starts: Int64[np.ndarray, " sentence_boundary"]
    ids: Int32[np.ndarray, " token"]
    document: Int32[np.ndarray, " sentence"]
    background: Bool[np.ndarray, " sentence"]
    """Whether it belongs to the random sample of the text."""


class ExampleTable(NamedTuple):
    """The examples of all latents under one aggregation, sorted by latent and rank."""

    latent: Int32[np.ndarray, " example"]
    sentence: Int64[np.ndarray, " example"]
    score: Float32[np.ndarray, " example"]
    starts: Int64[np.ndarray, " example_boundary"]
    """Example i has entries starts[i] to starts[i + 1] of the next two."""
    positions: Int32[np.ndarray, " entry"]
    activations: Float32[np.ndarray, " entry"]


class Index:
    """An open index."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.n_latents: int = manifest.rows["latents"]
        self.model_name: str = manifest.facts["model"]
        self.site: str = manifest.facts["site"]

    def check_latent(self, latent: int) -> int:
        """`latent`, or `InputError` if there is none of that number."""
        if not 0 <= latent < self.n_latents:
            raise InputError(f"latent {latent} does not exist: {self.path} has latents 0 to {self.n_latents - 1}")
        return latent

    @cached_property
    def statistics(self) -> Statistics:
        """All latents' statistics."""
        columns = {name: self._latents.column(name) for name in Statistics._fields if name != "histogram"}
        histogram = self._latents.column("histogram").combine_chunks().flatten().to_numpy().reshape(self.n_latents, -1)
        return Statistics(**{name: column.to_numpy() for name, column in columns.items()}, histogram=histogram)

    def latent(self, latent: int) -> LatentRecord:
        """How `latent` fires."""
        self.check_latent(latent)
        values = {name: column[latent] for name, column in self.statistics._asdict().items()}
        numbers = {name: value.item() for name, value in values.items() if name != "histogram"}
        return LatentRecord(latent, **numbers, histogram=values["histogram"])

    def examples(self, latent: int, aggregation: Aggregation = "max", limit: int | None = None) -> list[Example]:
        """The best sentences of `latent` under `aggregation`, best first, at most `limit`."""
        start = self._latents.column("examples_start")[self.check_latent(latent)].as_py()
        stop = start + self._latents.column("n_examples")[latent].as_py()
        if start == stop:
            return []
        first, last = start // EXAMPLES_PER_GROUP, (stop - 1) // EXAMPLES_PER_GROUP
        table = self._examples.read_row_groups(list(range(first, last + 1)))
        table = _only(table.slice(start - first * EXAMPLES_PER_GROUP, stop - start), aggregation)
        return [self._example(row) for row in table.slice(0, limit).to_pylist()]

    def logits(self, latent: int) -> Logits:
        """The tokens `latent` promotes and suppresses most."""
        row = self._logits.slice(self.check_latent(latent), 1).to_pylist()[0]

        def effects(kind: str) -> list[TokenEffect]:
            pairs = zip(row[kind], row[f"{kind}_by"], strict=True)
            return [TokenEffect(token, self.pieces([token])[0], value) for token, value in pairs]

        return Logits(effects("promoted"), effects("suppressed"))

    def pieces(self, ids: Sequence[int] | Int32[np.ndarray, " token"]) -> list[str]:
        """The text of each token; they join to the text. A character split over tokens goes to the last of them."""
        reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [reader.decode(self.token_bytes[token]) for token in ids]
        if pieces:
            pieces[-1] += reader.decode(b"", final=True)
        return pieces

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each token of the vocabulary contributes to a text."""
        return self._read("vocabulary.parquet").column("bytes").to_pylist()

    @cached_property
    def token_counts(self) -> Int64[np.ndarray, " token"]:
        """How often each token of the vocabulary occurs in the whole token file."""
        return self._read("vocabulary.parquet").column("count").to_numpy()

    @cached_property
    def sentences(self) -> SentenceTable:
        """The tokens of every sentence that is an example, and of the background."""
        tensors = read_tensors(self.path / "sentences.safetensors")
        return SentenceTable(**{name: tensor.numpy() for name, tensor in tensors.items()})

    def promoted(self) -> Int32[np.ndarray, "latent rank"]:
        """The tokens every latent promotes most."""
        return self._logits.column("promoted").combine_chunks().flatten().to_numpy().reshape(self.n_latents, -1)

    def example_table(self, aggregation: Aggregation = "max") -> ExampleTable:
        """The examples of all latents under `aggregation`."""
        names = ["latent", "aggregation", "sentence", "score", "positions", "activations"]
        table = _only(self._examples.read(names), aggregation).combine_chunks()
        positions, activations = (table.column(name).combine_chunks() for name in ("positions", "activations"))
        offsets = positions.offsets.to_numpy().astype(np.int64)
        return ExampleTable(
            *(table.column(name).to_numpy() for name in ("latent", "sentence", "score")),
            starts=offsets - offsets[:1],
            positions=positions.flatten().to_numpy(),
            activations=activations.flatten().to_numpy(),
        )

    @cached_property
    def _latents(self) -> pyarrow.Table:
        return self._read("latents.parquet")

    @cached_property
    def _logits(self) -> pyarrow.Table:
        return self._read("logits.parquet")

    @cached_property
    def _examples(self) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self.path / "examples.parquet")

    def _read(self, name: str) -> pyarrow.Table:
        from pyarrow import parquet

        return parquet.read_table(self.path / name)

    def _example(self, row: dict) -> Example:
        table = self.sentences
        place = int(np.searchsorted(table.number, row["sentence"]))
        ids = table.ids[table.starts[place] : table.starts[place + 1]]
        activations = np.zeros(len(ids), np.float32)
        activations[row["positions"]] = row["activations"]
        return Example(row["sentence"], row["document"], row["score"], ids, self.pieces(ids), activations)


def _only(table: pyarrow.Table, aggregation: str) -> pyarrow.Table:
    """The rows of that aggregation."""
    import pyarrow

    return table.filter(pyarrow.array(table.column("aggregation").to_numpy() == aggregation))


def open_index(path: Path | str, verify: bool = False) -> Index:
    """Open the index in folder `path`. Raises `InputError` if it is none or is damaged."""
    path = Path(path)
    return Index(path, read_manifest(path, "index", verify))
