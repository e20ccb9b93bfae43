"""Text to ids and back, and chat."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from monosemy.llm.checkpoint import find_source, load_tokenizer
from monosemy.llm.gguf_file import GGUFFile
from monosemy.llm.tokenizer import Tokenizer, from_gguf, pre_tokenizer
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

TEXTS = [
    "In 1945, the United Nations  met.\n\n1. First",
    "né 日本語 🎉🎊👩‍👩‍👧 <|im_start|>user\n  1234 x",
    "a\r\n\tb ¼½ ①②٣४",
    "",
]


def test_ids_equal_transformers_on_the_addresses(smollm2_tokenizer: Tokenizer, speeches: list[str]):
    from transformers import AutoTokenizer

    path = find_source("smollm2").path
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers does not read `tokenizer.ggml.pre`, so it leaves out the first of the two splits that SmolLM2's own
    # tokenizer.json (and llama.cpp) make: single digits. It differs where several spaces precede a digit.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    texts = speeches[::10] + TEXTS
    ids = smollm2_tokenizer.encode_batch(texts)
    assert ids == theirs(texts, add_special_tokens=False)["input_ids"]
    assert sum(map(len, ids)) > 200_000


def test_digits_stand_alone(smollm2_tokenizer: Tokenizer):
    pieces = smollm2_tokenizer.pieces(smollm2_tokenizer.encode("The 100 dollars\n\n1."))
    assert pieces == ["The", " ", "1", "0", "0", " dollars", "\n\n", "1", "."]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(smollm2_tokenizer: Tokenizer, text: str):
    ids = smollm2_tokenizer.encode(text)
    pieces = smollm2_tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == smollm2_tokenizer.decode(ids) == text
    assert smollm2_tokenizer.encode_batch([text, text]) == [ids, ids]


def test_pieces_of_broken_characters(smollm2_tokenizer: Tokenizer):
    ids = smollm2_tokenizer.encode("日本語 🎉 text")
    for start in range(len(ids)):
        for end in range(start, len(ids) + 1):
            part = ids[start:end]
            expected = smollm2_tokenizer.inner.decode(part, skip_special_tokens=False)
            assert "".join(smollm2_tokenizer.pieces(part)) == smollm2_tokenizer.decode(part) == expected


def test_properties(smollm2_tokenizer: Tokenizer):
    assert smollm2_tokenizer.size == 49152
    assert (smollm2_tokenizer.bos, smollm2_tokenizer.eos, smollm2_tokenizer.stops) == (1, 2, frozenset({0, 2}))
    assert smollm2_tokenizer.fingerprint == load_tokenizer("smollm2").fingerprint
    with pytest.raises(InputError, match="49152 is not a token: the vocabulary has ids 0 to 49151"):
        smollm2_tokenizer.pieces([49152])


def test_folder_gives_the_same_tokenizer(tiny_llama_folder: Path, smollm2_tokenizer: Tokenizer):
    ours = load_tokenizer(tiny_llama_folder)
    assert ours.encode_batch(TEXTS) == smollm2_tokenizer.encode_batch(TEXTS)
    assert (ours.bos, ours.eos, ours.stops, ours.fingerprint) == (
        1,
        2,
        frozenset({0, 2}),
        smollm2_tokenizer.fingerprint,
    )
    assert ours.chat([{"role": "user", "content": "hi"}]) == smollm2_tokenizer.chat([{"role": "user", "content": "hi"}])


# ---------------------------------------------------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------------------------------------------------


def test_chat(smollm2_tokenizer: Tokenizer):
    text = smollm2_tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(tokenizer.inner, bos=tokenizer.bos, eos=tokenizer.eos, chat_template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% for %}", "chat template refuses"),
        ("{{ ''.__class__.__mro__ }}", "chat template refuses .*unsafe"),
        ("{{ messages.append(1) }}", "chat template refuses .*unsafe"),
        ("{{ messages[7].role }}", "chat template refuses"),
        ("{{ 1 / 0 }}", "chat template refuses .*division by zero"),
    ],
)
def test_templates_that_fail(smollm2_tokenizer: Tokenizer, template: str | None, message: str):
    with pytest.raises(InputError, match=message):
        with_template(smollm2_tokenizer, template).chat([{"role": "user", "content": "Hi"}])


def test_template_sees_what_hugging_face_gives_it(smollm2_tokenizer: Tokenizer):
    template = "{{ bos_token }}{{ eos_token }}{{ messages[0] | tojson }}{{ add_generation_prompt }}"
    text = with_template(smollm2_tokenizer, template).chat([{"role": "user", "content": "é"}])
    assert text == '<|im_start|><|im_end|>{"role": "user", "content": "é"}True'


def test_malformed_message(smollm2_tokenizer: Tokenizer):
    with pytest.raises(InputError, match=r"\{'role': 'user'\} needs the texts 'role' and 'content'"):
        smollm2_tokenizer.chat([{"role": "user"}])


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def test_other_splits():
    text = "It's 12345  end"

    def cut(name: str) -> list[str]:
        return [part for part, _ in pre_tokenizer(name, "x").pre_tokenize_str(text)]

    assert cut("gpt-2") == ["It", "'s", "Ġ12345", "Ġ", "Ġend"]
    assert cut("llama-bpe") == ["It", "'s", "Ġ", "123", "45", "Ġ", "Ġend"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer type 'llama' is not implemented; expected 'gpt2'"),
        ({"tokenizer.ggml.pre": "tekken"}, "split by 'tekken'; implemented are smollm, gpt-2 and llama-bpe"),
        ({"tokenizer.ggml.tokens": None}, "holds no vocabulary"),
        ({"tokenizer.ggml.merges": ["no such"]}, "vocabulary and merges do not fit"),
    ],
)
def test_gguf_vocabularies_that_cannot_be_used(change: dict, message: str):
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
    inner = LibraryTokenizer(models.BPE({"a": 0}, []))
    inner.decoder = decoders.Metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="decoder is Metaspace; only byte-level"):
        load_tokenizer(tmp_path).pieces([0])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"tokenizer_config\.json holds a list; expected an object"):
        load_tokenizer(tmp_path)
