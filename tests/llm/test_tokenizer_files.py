"""Tokenizers from the files beside the weights: GGUF vocabularies of both kinds, and Hugging Face folders."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, processors

from monosemy.llm.checkpoint import find_source, load_tokenizer
from monosemy.llm.gguf_file import GGUFFile
from monosemy.llm.tokenizer import Tokenizer
from monosemy.llm.tokenizer_files import from_folder, from_gguf, pre_tokenizer
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]


def test_splits():
    text = "It's 12345  end SomeWORD"

    def cut(name: str) -> list[str]:
        return [part for part, _ in pre_tokenizer(name, "x").pre_tokenize_str(text)]

    assert cut("gpt-2") == ["It", "'s", "Ġ12345", "Ġ", "Ġend", "ĠSomeWORD"]
    assert cut("llama-bpe") == cut("smaug-bpe") == ["It", "'s", "Ġ", "123", "45", "Ġ", "Ġend", "ĠSomeWORD"]
    assert cut("tekken") == ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġend", "ĠSome", "WORD"]


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece in a GGUF file
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(speeches: list[str]) -> sentencepiece.SentencePieceProcessor:
    """A vocabulary like Llama 2's, but small: BPE with byte fallback."""
    model = io.BytesIO()
    lines = (line for speech in speeches[::20] for line in speech.splitlines() if 0 < len(line) < 2000)
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|turn|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())  # type: ignore[call-arg]


def gguf_metadata(trained: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of such a vocabulary."""
    types = []
    for id in range(trained.vocab_size()):
        byte, control, unknown = trained.IsByte(id), trained.IsControl(id), trained.IsUnknown(id)
        types.append(6 if byte else 3 if control else 2 if unknown else 4 if trained.IdToPiece(id) == "<|turn|>" else 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [trained.IdToPiece(id) for id in range(trained.vocab_size())],
        "tokenizer.ggml.scores": [trained.GetScore(id) for id in range(trained.vocab_size())],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def ours(trained: Any) -> Tokenizer:
    return from_gguf(gguf_metadata(trained), "model.gguf")


def test_ids_equal_sentencepiece_s(trained: Any, ours: Tokenizer, speeches: list[str]):
    texts = [*speeches[5::60], "né 日本語 🎉👩‍👩‍👧", "  two  spaces ", "1945\n\n a\tb", "Thé"]
    theirs = trained.Encode(texts)
    assert ours.encode_batch(texts) == theirs
    assert sum(map(len, theirs)) > 50_000
    assert [ours.decode(ids) for ids in theirs] == texts
    assert [trained.Decode(ids) for ids in theirs[:4]] == texts[:4]


def test_control_tokens_of_sentence_piece(ours: Tokenizer, trained: Any):
    assert (ours.bos, ours.eos, ours.stops, ours.size) == (1, 2, {2}, 1500)
    ids = ours.encode("<s>Hi<|turn|>")
    assert ids[0] == 1
    assert ids[-1] == trained.PieceToId("<|turn|>")
    assert ours.decode(ids) == "<s> Hi<|turn|>"


def test_a_prompt_begins_as_the_model_was_trained(ours: Tokenizer, trained: Any, tmp_path: Path):
    assert ours.encode_prompt("Hi") == [1, *ours.encode("Hi")]
    assert ours.encode_prompt("<s>Hi") == ours.encode("<s>Hi")  # a chat template has written it
    without = from_gguf(gguf_metadata(trained) | {"tokenizer.ggml.add_bos_token": False}, "model.gguf")
    assert without.encode_prompt("Hi") == without.encode("Hi")
    smollm2 = load_tokenizer("smollm2")
    assert smollm2.encode_prompt("Hi") == smollm2.encode("Hi")

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    library = LibraryTokenizer.from_str(smollm2.inner.to_str())
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    assert from_folder(tmp_path).encode_prompt("Hi") == [1, *smollm2.encode("Hi")]


def test_sentence_piece_without_a_space_before(trained: Any):
    tokenizer = from_gguf(gguf_metadata(trained) | {"tokenizer.ggml.add_space_prefix": False}, "model.gguf")
    assert tokenizer.decode(tokenizer.encode("the people")) == "the people"
    assert tokenizer.pieces(tokenizer.encode("the people"))[-1] == " people"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer type 't5' is not implemented; expected 'gpt2' .* or 'llama'"),
        ({"tokenizer.ggml.pre": "viking"}, "split by 'viking'; implemented are smollm, gpt-2, llama-bpe and tekken"),
        ({"tokenizer.ggml.tokens": None}, "holds no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "holds no vocabulary"),
        ({"tokenizer.ggml.merges": ["no such"]}, "vocabulary and merges do not fit"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]},
            "has 49152 tokens, 1 scores and 49152 types of them: it is damaged",
        ),
    ],
)
def test_gguf_vocabularies_that_cannot_be_used(change: dict[str, Any], message: str):
    metadata = GGUFFile(find_source("smollm2").path).metadata
    with pytest.raises(InputError, match=f"^model.gguf.*{message}"):
        from_gguf(metadata | change, "model.gguf")


def test_folders_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    LibraryTokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"tokenizer_config\.json holds a list; expected an object"):
        load_tokenizer(tmp_path)


def test_what_a_folder_says_of_special_tokens(tmp_path: Path):
    inner = LibraryTokenizer(models.BPE({"a": 0, "<s>": 1, "</s>": 2, "<end>": 3}, []))
    inner.decoder = decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "a"}))
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": templates}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (1, 2, {2, 3})
    assert tokenizer.chat([]) == "</s>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stops == {0, 2, 3}
    assert tokenizer.chat([]) == "<s>"
