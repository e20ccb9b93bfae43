"""Compressed files, standard input, chats and datasets; plain files and archives are in test_corpus.py."""

import gzip
import io
import json
import re
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from monosemy.documents import Document, read_documents
from monosemy.runtime import InputError

LINES = b'{"text": "One.", "year": 1}\n{"text": null}\n{"text": "Three."}\n'
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(*sources: Path | str, column: str = "text") -> list[Document]:
    return list(read_documents(map(str, sources), column))


def texts(*sources: Path | str, column: str = "text") -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in read(*sources, column=column)]


def refused(message: str, *sources: Path | str, column: str = "text") -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(*sources, column=column)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with compressed files."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]))
    (folder / "b.jsonl.zst").write_bytes(zstd(LINES))
    (folder / "c.TXT.gz").write_bytes(gzip.compress("Grüße".encode("latin-1")))
    (folder / "d.md.zst").write_bytes(zstd(b"# Title"))
    (folder / "e.gz").write_bytes(gzip.compress(b"of no known kind"))
    with zipfile.ZipFile(folder / "f.zip", "w") as archive:
        archive.writestr("g.txt.gz", gzip.compress(b"G"))
    return folder


class TestCompressed:
    def test_a_folder_of_them(self, folder: Path):
        lines = [("1", "One."), ("2", ""), ("3", "Three.")]
        assert texts(folder) == [
            *((f"in/a.jsonl.gz:{line}", text) for line, text in lines),
            *((f"in/b.jsonl.zst:{line}", text) for line, text in lines),
            ("in/c.TXT.gz", "Gr\ufffd\ufffde"),
            ("in/d.md.zst", "# Title"),
            ("in/f.zip/g.txt.gz", "G"),
        ]
        assert read(folder / "c.TXT.gz")[0].undecodable == 2
        assert read(folder / "b.jsonl.zst")[0].metadata == {"year": 1}

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl.zst", "d.md.zst"])
    def test_cut_off(self, folder: Path, name: str):
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
        refused(f"{name} cannot be read (Truncated compressed stream): check the file", folder / name)

    def test_not_compressed_at_all(self, folder: Path):
        (folder / "a.jsonl.gz").write_bytes(LINES)
        refused("a.jsonl.gz cannot be read (zlib inflate failed", folder / "a.jsonl.gz")

    def test_of_no_known_kind(self, folder: Path):
        refused("e.gz is of no known kind of text: expected a name ending in .txt", folder / "e.gz")

    def test_an_archive_in_an_archive(self, folder: Path):
        with zipfile.ZipFile(folder / "h.zip", "w") as archive:
            archive.write(folder / "f.zip", "deep/f.zip")
        refused("h.zip holds another archive, deep/f.zip: unpack it into a folder", folder / "h.zip")

    def test_a_source_that_is_not_there_is_refused_before_any_is_read(self, folder: Path):
        (folder / "b.jsonl.zst").write_bytes(b"damaged")
        refused("nowhere.txt does not exist", folder, "nowhere.txt")


class TestStandardInput:
    @pytest.fixture(autouse=True)
    def piped(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES)))

    def test_plain_text(self):
        assert texts("-") == [("stdin.txt", LINES.decode())]

    def test_lines(self):
        assert texts("stdin:jsonl") == [("stdin.jsonl:1", "One."), ("stdin.jsonl:2", ""), ("stdin.jsonl:3", "Three.")]

    def test_what_cannot_be_read_piece_by_piece(self, monkeypatch):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["A"]}), sink)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sink.getvalue())))
        assert texts("stdin:.parquet") == [("stdin.parquet:1", "A")]

    def test_compressed_and_cut_off(self, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(LINES)[:-3])))
        refused("standard input cannot be read (Truncated compressed stream): check what writes it", "stdin:jsonl.gz")

    def test_refusals(self):
        refused("'stdin:pdf' names no known kind of text: expected - or one such as stdin:jsonl", "stdin:pdf")
        refused("standard input was given twice, but it can be read only once", "-", "stdin:jsonl")


class TestChats:
    EXPECTED = '[{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}]'

    def test_in_lines(self, tmp_path: Path):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT, "id": 3}) + '\n{"messages": []}\n')
        first, second = read(tmp_path / "a.jsonl", column="messages")
        assert first == Document("a.jsonl:1", self.EXPECTED, {"id": 3}, is_chat=True)
        assert second.text == ""

    def test_in_a_table(self, tmp_path: Path):
        rows = [CHAT, [{"role": "user", "content": "Bye", "name": "Ann"}], None]
        pyarrow.parquet.write_table(pyarrow.table({"messages": rows, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
        first, second, third = read(tmp_path / "a.parquet", column="messages")
        assert (first.text, first.is_chat, first.metadata) == (self.EXPECTED, True, {"text": "a"})
        assert json.loads(second.text) == [{"role": "user", "content": "Bye", "name": "Ann"}]
        assert third.text == ""


class TestDatasets:
    """Real ones, in a local folder."""

    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch: pytest.MonkeyPatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Path:
        folder = tmp_path / "set"
        folder.mkdir()
        table = pyarrow.table({"text": ["a", "b", None], "n": [1, 2, 3], "messages": [CHAT, CHAT, None]})
        pyarrow.parquet.write_table(table, folder / "train.parquet")
        pyarrow.parquet.write_table(table.slice(1), folder / "validation.parquet")
        return folder

    def test_streamed(self, dataset: Path):
        assert read(f"hf:{dataset}") == [
            Document("set@train:1", "a", {"n": 1}),
            Document("set@train:2", "b", {"n": 2}),
            Document("set@train:3", "", {"n": 3}),
        ]
        assert texts(f"hf:{dataset}:default@validation#1") == [("set@validation:1", "b")]
        assert read(f"hf:{dataset}#1", column="messages")[0].text == TestChats.EXPECTED

    @pytest.mark.parametrize(
        ("suffix", "message"),
        [
            ("@test", "cannot be read (Bad split: test. Available splits: ['train', 'validation']): check its name"),
            (":german", "cannot be read (BuilderConfig 'german' not found. Available: ['default']): check its name"),
            ("/nowhere", "there is no folder"),
            ("#0", "names no dataset; expected hf:NAME, or as much as hf:NAME:CONFIG@SPLIT#DOCUMENTS"),
        ],
    )
    def test_refusals(self, dataset: Path, suffix: str, message: str):
        refused(message, f"hf:{dataset}{suffix}")

    def test_another_column(self, dataset: Path):
        refused(
            "row 1 has no text in 'body'; it has: text, n, messages. Set --text-column", f"hf:{dataset}", column="body"
        )
        refused("row 1: 'n' holds a number; expected text, or a list of", f"hf:{dataset}", column="n")

    def test_without_a_network(self):
        refused("hf:org/name cannot be read (", "hf:org/name")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        refused("this needs the package 'datasets', which is not installed: pip install 'monosemy[hf]'", "hf:org/name")
