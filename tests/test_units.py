"""Rows of a document in every unit, and the same rows by any number of processes."""

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator

import numpy as np
import nupunkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monosemy import units
from monosemy.documents import Document
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError
from monosemy.units import RowTokenizer, split_sentences, tokenize_all

CHAT = Document(
    "c", '[{"content": "Who are you?", "role": "user"}, {"content": "I am.", "role": "assistant"}]', {}, 0, True
)


class TestSentences:
    PUNKT = nupunkt.load("default")

    def split(self, text: str) -> list[str]:
        return list(split_sentences(text, self.PUNKT))

    def test_abbreviations_do_not_end_a_sentence(self):
        assert self.split("Mr. Smith met Dr. Jones. They spoke.") == ["Mr. Smith met Dr. Jones.", "They spoke."]

    def test_a_heading_is_not_the_beginning_of_what_follows(self):
        assert self.split("To the Congress:\r\n\r\nA quarter century\nago  it was.") == [
            "To the Congress:",
            "A quarter century ago it was.",
        ]

    def test_an_ornament_is_no_sentence(self):
        assert self.split("One.\n\n* * *\n\nTwo.") == ["One.", "Two."]

    @given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
    def test_no_letter_is_lost(self, text: str):
        found = self.split(text)
        assert [c for c in "".join(found) if c.isalnum()] == [c for c in text if c.isalnum()]
        assert all(sentence == " ".join(sentence.split()) != "" for sentence in found)


class TestUnits:
    def rows(self, tokenizer: RowTokenizer, document: Document) -> list[list[int]]:
        made = tokenizer.tokenize(document)
        return [row.tolist() for row in np.split(made.ids, np.cumsum(made.lengths))[:-1]]

    def test_a_document_is_one_row_or_cut_into_several(self, smollm2_tokenizer: Tokenizer):
        text = "One sentence.\n\nAnd another, with  spaces."
        ids = smollm2_tokenizer.encode(text)
        whole = RowTokenizer(smollm2_tokenizer, "document", 100, False)
        assert self.rows(whole, Document("a", f"\n{text}  ", {})) == [ids]
        assert whole.tokenize(Document("a", text, {})).too_long == 0
        cut = RowTokenizer(smollm2_tokenizer, "document", 5, True)
        found = self.rows(cut, Document("a", text, {}))
        assert found == [[smollm2_tokenizer.bos, *ids[start : start + 4]] for start in range(0, len(ids), 4)]
        assert cut.tokenize(Document("a", text, {})).too_long == 1

    @pytest.mark.parametrize("unit", ["sentence", "document", "context"])
    def test_nothing_said_is_no_row(self, smollm2_tokenizer: Tokenizer, unit: units.Unit):
        for text in ("", " \n", "* * *"):
            assert self.rows(RowTokenizer(smollm2_tokenizer, unit, 9, True), Document("a", text, {})) == []

    def test_a_document_of_a_context_ends_with_the_separator(self, smollm2_tokenizer: Tokenizer):
        row = RowTokenizer(smollm2_tokenizer, "context", 4, True)
        ids = smollm2_tokenizer.encode("A text longer than the context.")
        assert self.rows(row, Document("a", "A text longer than the context.", {})) == [[*ids, smollm2_tokenizer.eos]]

    def test_a_chat_is_rendered_without_a_generation_prompt(self, smollm2_tokenizer: Tokenizer):
        [row] = self.rows(RowTokenizer(smollm2_tokenizer, "document", 200, False), CHAT)
        text = smollm2_tokenizer.decode(row)
        assert text.endswith("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am.<|im_end|>\n")
        [with_bos] = self.rows(RowTokenizer(smollm2_tokenizer, "document", 200, True), CHAT)
        assert row[0] == smollm2_tokenizer.bos  # this template begins with it
        assert with_bos == row  # once

    def test_a_chat_that_is_none(self, smollm2_tokenizer: Tokenizer):
        strange = CHAT._replace(text='[{"from": "human", "value": "Hello"}]', name="d.jsonl:7")
        with pytest.raises(InputError, match=re.escape("d.jsonl:7: the message {'from': 'human', 'value': 'Hello'}")):
            RowTokenizer(smollm2_tokenizer, "document", 200, False).tokenize(strange)
        with pytest.raises(InputError, match="c is a chat, which has no sentences: set --unit to document or context"):
            RowTokenizer(smollm2_tokenizer, "sentence", 200, False).tokenize(CHAT)


class Failing:
    """A tokenizer for which there is too little memory."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        raise MemoryError


class TestProcesses:
    TEXTS = tuple(Document(f"d{n}", f"Text {n} says so. " * (1 + n % 7), {}) for n in range(40))

    @pytest.fixture(autouse=True)
    def small_batches(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(units, "BATCH_CHARACTERS", 300)

    def test_three_give_what_one_gives_in_order(self, smollm2_tokenizer: Tokenizer):
        tokenizer = RowTokenizer(smollm2_tokenizer, "sentence", 100, False)
        alone, together = (list(tokenize_all(enumerate(self.TEXTS), tokenizer, workers)) for workers in (1, 3))
        assert [key for key, _ in together] == list(range(40))
        for (_, one), (_, other) in zip(alone, together, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert one.lengths.tolist() == other.lengths.tolist()

    def test_a_process_that_is_killed_is_told(self, smollm2_tokenizer: Tokenizer):
        def documents() -> Iterator[tuple[int, Document]]:
            for number, text in enumerate(self.TEXTS * 20):
                if number == 30:
                    killed = multiprocessing.active_children()[0].pid
                    assert killed is not None
                    os.kill(killed, signal.SIGKILL)
                yield number, text

        with pytest.raises(InputError, match="a tokenizing process died, most likely for lack of memory: give fewer"):
            list(tokenize_all(documents(), RowTokenizer(smollm2_tokenizer, "document", 100, False), 2))
        assert not multiprocessing.active_children()

    def test_too_little_memory_is_told(self):
        with pytest.raises(InputError, match="a tokenizing process died"):
            list(tokenize_all(enumerate(self.TEXTS), RowTokenizer(Failing(), "context", 9, False), 2))  # pyright: ignore[reportArgumentType]

    def test_processes_are_started_when_there_is_much_text(self, smollm2_tokenizer: Tokenizer, monkeypatch):
        started = []

        def note(batches, tokenizer: RowTokenizer, workers: int) -> Iterator:
            started.append(workers)
            for batch in batches:
                yield from ((key, tokenizer.tokenize(document)) for key, document in batch)

        monkeypatch.setattr(units, "_in_processes", note)
        monkeypatch.setattr(units, "cpu_count", lambda: 8)
        tokenizer = RowTokenizer(smollm2_tokenizer, "document", 100, False)
        assert len(list(tokenize_all(enumerate(self.TEXTS), tokenizer))) == 40
        assert started == []
        monkeypatch.setattr(units, "FEW_CHARACTERS", 1000)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert len(list(tokenize_all(enumerate(self.TEXTS), tokenizer))) == 40
        assert started == [4]
