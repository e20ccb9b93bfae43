"""Text to ids and back, and chat."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from monosemy.llm.checkpoint import find_source, load_tokenizer
from monosemy.llm.tokenizer import Tokenizer
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
# SentencePiece's way to write bytes
# ---------------------------------------------------------------------------------------------------------------------

FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "llama-2": decoders.Sequence([*FALLBACK, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(FALLBACK),
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}


@pytest.fixture(scope="module")
def trained(speeches: list[str]) -> LibraryTokenizer:
    """A small vocabulary of byte-fallback BPE, trained on addresses."""
    inner = LibraryTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    inner.train_from_iterator(speeches[:4], trainer)
    return inner


@pytest.fixture(scope="module", params=DECODERS)
def sentence_piece(request: pytest.FixtureRequest, trained: LibraryTokenizer) -> Tokenizer:
    inner = LibraryTokenizer.from_str(trained.to_str())
    inner.decoder = DECODERS[request.param]
    return Tokenizer(inner, bos=1, eos=2)


@pytest.mark.parametrize(
    "text", ["Fellow citizens, a  b", "né 日本語 🎉👩‍👩‍👧\n1945.", " led by spaces", "<s>Amen</s>", ""]
)
def test_sentence_piece_decodes_as_the_library_does(sentence_piece: Tokenizer, text: str):
    ids = sentence_piece.encode(text)
    expected = sentence_piece.inner.decode(ids, skip_special_tokens=False)
    assert sentence_piece.decode(ids) == "".join(sentence_piece.pieces(ids)) == expected
    assert expected.replace(" ", "") == text.replace(" ", "")
    assert len(sentence_piece.pieces(ids)) == len(ids)


def test_sentence_piece_on_a_whole_address(sentence_piece: Tokenizer, speeches: list[str]):
    ids = sentence_piece.encode(speeches[9])
    assert sentence_piece.decode(ids) == sentence_piece.inner.decode(ids, skip_special_tokens=False)
    middle = ids[1000:1400]
    assert "".join(sentence_piece.pieces(middle)) == sentence_piece.inner.decode(middle, skip_special_tokens=False)


def test_bytes_of_sentence_piece(sentence_piece: Tokenizer):
    id_of = sentence_piece.inner.get_vocab().__getitem__
    assert sentence_piece.bytes_of(id_of("<0xE6>")) == b"\xe6"
    assert sentence_piece.bytes_of(id_of("▁the")) == b" the"
    ids = [id_of(f"<0x{byte:02X}>") for byte in "é日".encode()] + [id_of("▁the")]
    assert sentence_piece.pieces(ids) == ["", "é", "", "", "日", " the"]
    assert sentence_piece.pieces(ids[:3]) == ["", "é", "�"]


def test_decoders_that_are_not_implemented(trained: LibraryTokenizer):
    for decoder in (decoders.WordPiece(), decoders.Sequence([decoders.CTC()]), decoders.Strip("x", 1, 0)):
        inner = LibraryTokenizer.from_str(trained.to_str())
        inner.decoder = decoder
        with pytest.raises(
            InputError, match="decoder (WordPiece|CTC|Strip) is not implemented; expected that of a byte"
        ):
            Tokenizer(inner).pieces([300])
    with pytest.raises(InputError, match="decoder none is not implemented"):
        Tokenizer(LibraryTokenizer(models.BPE({"a": 0}, []))).bytes_of(0)


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
