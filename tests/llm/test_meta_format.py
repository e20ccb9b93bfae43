"""Meta's original format: models converted to it from `transformers`, in one piece and in several."""

import base64
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from monosemy.llm import checkpoint
from monosemy.llm.checkpoint import find_source, fingerprint, load_tokenizer
from monosemy.llm.gguf_file import GGUFFile
from monosemy.llm.llama import Llama, rotary_frequencies
from monosemy.llm.meta_format import NAMES
from monosemy.llm.tokenizer import byte_characters
from monosemy.llm.tokenizer_files import LLAMA3_CONTROL_TOKENS, LLAMA_BPE
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

load_model = partial(checkpoint.load_model, device="cpu")

IDS = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 12, "ffn_dim_multiplier": 1.3}
PARAMS |= {"norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 512, "use_scaled_rope": True}


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """The bytes, then the first merged tokens of SmolLM2, 256 in all: with the control tokens, 512."""
    table = {character: byte for byte, character in enumerate(byte_characters())}
    tokens = GGUFFile(find_source("smollm2").path).metadata["tokenizer.ggml.tokens"][17:]
    merged = [bytes(table[character] for character in token) for token in tokens if len(token) > 1]
    return {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + merged)}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


def reference(tied: bool = False, factor: float = 8.0) -> Any:
    """The model that `PARAMS` describes, of random weights, in `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=120,  # int(1.3 * int(8 * 32 / 3)) = 110, rounded up to a multiple of 12
            vocab_size=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters=rope,
        )
    )
    for name, parameter in model.named_parameters():
        parameter.data.mul_(5.0 if "norm" not in name else 1.1)
    return model.eval()


def metas_names(model: Any) -> dict[str, torch.Tensor]:
    """Its weights under Meta's names, rotary pairs side by side, tied embeddings twice."""
    words, weights = {theirs: ours for ours, theirs in NAMES.items()}, {}
    for name, weight in model.state_dict().items():
        part = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape)  # heads of 8
            weights[f"layers.{layer}.{words[part]}.weight"] = weight
        else:
            weights[f"{words[part]}.weight"] = weight
    return weights


def write_folder(
    folder: Path, weights: dict[str, torch.Tensor], ranks: dict[bytes, int], pieces: int = 1, **params: Any
) -> Path:
    folder.mkdir()
    for number in range(pieces):
        piece = {}
        for name, weight in weights.items():
            cut_columns = name.endswith((".wo.weight", ".w2.weight"))
            whole = name.endswith("norm.weight")
            piece[name] = weight if whole else weight.chunk(pieces, int(cut_columns))[number].clone()
        torch.save(piece, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    write_ranks(folder / "tokenizer.model", dict(list(ranks.items())[:256]))
    return folder


@pytest.fixture
def folder(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    return write_folder(tmp_path / "llama", metas_names(reference()), ranks)


def agrees(folder: Path, model: Any) -> Llama:
    ours = load_model(folder, dtype="float32")
    assert isinstance(ours, Llama)
    frequencies = rotary_frequencies(ours.config).float()
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq, atol=0, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, atol=2e-5, rtol=1e-4)
    return ours


@pytest.mark.parametrize("pieces", [1, 2])
def test_logits_equal_transformers(tmp_path: Path, ranks: dict[bytes, int], pieces: int):
    model = reference()
    folder = write_folder(tmp_path / "llama", metas_names(model), ranks, pieces)
    ours = agrees(folder, model)
    assert (ours.name, ours.fingerprint) == ("llama", fingerprint(folder))
    assert (ours.config.context_length, ours.config.tied_embeddings) == (131072, False)
    assert ours.tokenizer.size == ours.config.vocabulary == 512


def test_llama_3_2_ties_and_scales_more(tmp_path: Path, ranks: dict[bytes, int], capsys: pytest.CaptureFixture[str]):
    model = reference(tied=True, factor=32.0)
    weights = metas_names(model)
    ours = agrees(write_folder(tmp_path / "twice", weights, ranks, 2), model)
    assert ours.config.tied_embeddings
    assert "does not say rope_scaling_factor: 32, as in Llama 3.2" in capsys.readouterr().err
    del weights["output.weight"]
    agrees(write_folder(tmp_path / "once", weights, ranks), model)
    agrees(write_folder(tmp_path / "said", weights, ranks, rope_scaling_factor=8.0), reference(tied=True))


def test_embeddings_cut_by_columns(tmp_path: Path, ranks: dict[bytes, int]):
    """As in Llama 1 and 2, whose params.json does not say the vocabulary, and whose files hold the frequencies."""
    model = reference()
    weights = metas_names(model)
    folder = write_folder(tmp_path / "llama", weights, ranks, 2, vocab_size=-1, n_kv_heads=2)
    for number, columns in enumerate(weights["tok_embeddings.weight"].chunk(2, 1)):
        piece = torch.load(folder / f"consolidated.{number:02}.pth")
        torch.save(piece | {"tok_embeddings.weight": columns.clone(), "rope.freqs": torch.ones(4)}, folder / "x")
        (folder / "x").rename(folder / f"consolidated.{number:02}.pth")
    agrees(folder, model)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def test_ids_equal_tiktoken_s(tmp_path: Path, ranks: dict[bytes, int], speeches: list[str]):
    specials = {token: len(ranks) + number for number, token in enumerate(LLAMA3_CONTROL_TOKENS)}
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA_BPE, mergeable_ranks=ranks, special_tokens=specials)
    (tmp_path / "params.json").write_text("{}")
    write_ranks(tmp_path / "tokenizer.model", ranks)
    ours = load_tokenizer(tmp_path)
    texts = [
        *speeches[::12],
        "né 日本語 🎉👩‍👩‍👧 aaaaaaaaaa",
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    ]
    ids = ours.encode_batch(texts)
    assert ids == [theirs.encode(text, allowed_special="all") for text in texts]
    assert sum(map(len, ids)) > 150_000
    assert [ours.decode(item) for item in ids] == texts


def test_control_tokens_and_chat(folder: Path):
    tokenizer = load_tokenizer(folder)
    assert len(set(LLAMA3_CONTROL_TOKENS)) == 256
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos) == (512, 256, 257)
    assert tokenizer.stops == {257, 256 + 8, 256 + 9}
    assert tokenizer.decode([256 + 4, 256 + 11, 511]) == (
        "<|finetune_right_pad_id|><|reserved_special_token_3|><|reserved_special_token_247|>"
    )
    text = tokenizer.chat([{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}])
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.encode(text)[:2] == [256, 256 + 6]


def test_a_changed_vocabulary_is_read_again(tmp_path: Path, ranks: dict[bytes, int]):
    (tmp_path / "params.json").write_text("{}")
    for size in (300, 280):
        write_ranks(tmp_path / "tokenizer.model", dict(list(ranks.items())[:size]))
        assert load_tokenizer(tmp_path).size == size + 256


def test_other_vocabularies(folder: Path, ranks: dict[bytes, int]):
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>")
    with pytest.raises(InputError, match=r"SentencePiece ones \(Llama 1 and 2\) are not read: use the model's Hugging"):
        load_model(folder)
    write_ranks(folder / "tokenizer.model", {b"a": 0, b"b": 2})
    with pytest.raises(InputError, match=r"its 2 ranks are not 0, 1, 2"):
        load_model(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.model"):
        load_model(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, "does not say dim"),
        ({"n_heads": "4"}, "n_heads = '4'; expected a whole number"),
        ({"multiple_of": 256}, r"mlp\.gate_proj\.weight has shape \(120, 32\); the configuration says \(256, 32\)"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args = .* is not implemented"),
        ({"vision_chunk_size": 448}, "vision_chunk_size = 448 is not implemented"),
        ({"n_layers": 3}, r"lacks tensors \(model\.layers\.2\..* and 4 more\)"),
        ({"n_layers": 1}, r"has superfluous tensors \(model\.layers\.1\."),
    ],
)
def test_parameters_that_do_not_fit(folder: Path, params: dict[str, Any], message: str):
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    with pytest.raises(InputError, match=message):
        load_model(folder)


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("harm-done"),)  # type: ignore[return-value]


def test_pickles_that_are_not_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    path = folder / "consolidated.00.pth"
    torch.save({"tok_embeddings.weight": Harmful()}, path)
    with pytest.raises(
        InputError, match=r"consolidated\.00\.pth is a pickle of more than weights, which could run any"
    ):
        load_model(folder)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(InputError, match="is not a complete file of PyTorch weights"):
        load_model(folder)
    assert not (folder / "harm-done").exists()
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="does not hold tensors by name"):
        load_model(folder)
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"lacks the matrix tok_embeddings\.weight"):
        load_model(folder)


def test_damaged_files(folder: Path):
    path = folder / "consolidated.00.pth"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(InputError, match=r"consolidated\.00\.pth is not a complete file of PyTorch weights"):
        load_model(folder)
    path.rename(folder / "consolidated.01.pth")
    with pytest.raises(InputError, match=r"has no consolidated\.00\.pth: download"):
        load_model(folder)
    path.write_bytes(content)
    piece = torch.load(path)
    for other in (
        {"tok_embeddings.weight": torch.ones(2, 2)},
        piece | {"layers.1.attention.wo.weight": torch.ones(9, 9)},
    ):
        torch.save(other, folder / "consolidated.01.pth")
        with pytest.raises(InputError, match=r"consolidated\.01\.pth holds other tensors than consolidated\.00\.pth"):
            load_model(folder)


def test_not_finite(tmp_path: Path, ranks: dict[bytes, int]):
    weights = metas_names(reference())
    weights["layers.1.attention.wo.weight"][3, 3] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj\.weight holds values that are not finite"):
        load_model(write_folder(tmp_path / "llama", weights, ranks))
