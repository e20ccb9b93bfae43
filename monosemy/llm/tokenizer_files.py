"""Makes a `Tokenizer` from the files beside a model's weights.

1. `from_folder`: tokenizer.json of a Hugging Face folder, and what the files beside it say.
2. `from_gguf`: the vocabulary in a GGUF file, byte-level BPE or SentencePiece. The latter ranks tokens, not merges; so
   does (3): every way to merge two tokens into a third becomes a merge, with the rank of the third.
3. `from_meta`: tokenizer.model of Meta's Llama 3, a file of byte strings with ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from monosemy.llm.tokenizer import Tokenizer, byte_characters, read_json
from monosemy.runtime import InputError, require

LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging."""
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Mistral Nemo does."""
LLAMA_BPE_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
WHOLE_WORDS_FIRST = (*LLAMA_BPE_NAMES, "tekken")
"""Splits after which a word that is a token is not put together from merges."""

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Types of the tokens of a GGUF vocabulary, other than 1, normal."""

RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(248)]
LLAMA3_CONTROL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *RESERVED[:2],
    "<|finetune_right_pad_id|>",
    RESERVED[2],
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *RESERVED[3:],
]
"""The 256 that follow the ranked tokens of a tokenizer.model, named as in Meta's Hugging Face folders."""
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folder
# ---------------------------------------------------------------------------------------------------------------------


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json: save the tokenizer there with save_pretrained")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} cannot be read ({error}): download it again") from error
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    ids = read_json(folder / "config.json") | read_json(folder / "generation_config.json")
    stops = ids.get("eos_token_id")
    bos = _special_id(inner, settings.get("bos_token"), ids.get("bos_token_id"))
    return Tokenizer(
        inner,
        bos=bos,
        eos=_special_id(inner, settings.get("eos_token"), stops[0] if isinstance(stops, list) and stops else stops),
        stops=frozenset(stops if isinstance(stops, list) else [] if stops is None else [stops]),
        chat_template=_chat_template(folder, settings),
        adds_bos=bool(settings.get("add_bos_token")) or inner.encode("a").ids[:1] == [bos],
    )


def _special_id(inner: tokenizers.Tokenizer, token: str | dict[str, Any] | None, otherwise: Any) -> int | None:
    """The id of the token that the tokenizer's files name, or what the model's own say: `otherwise`."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
        return inner.token_to_id(text)
    return otherwise if isinstance(otherwise, int) and inner.id_to_token(otherwise) is not None else None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 ({error}): download it again") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


# ---------------------------------------------------------------------------------------------------------------------
# GGUF
# ---------------------------------------------------------------------------------------------------------------------


def from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata; `source` names the file in errors."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise InputError(f"{source} holds no vocabulary (tokenizer.ggml.tokens): use another file")
    types = metadata.get("tokenizer.ggml.token_type", [])
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            inner = _byte_level(metadata, tokens, source)
        case "llama":
            inner = _sentence_piece(metadata, tokens, types, source)
        case kind:
            raise InputError(
                f"{source}: tokenizer type {kind!r} is not implemented; expected 'gpt2' (byte-level BPE) or 'llama' "
                "(SentencePiece). Use the model's Hugging Face folder instead"
            )
    for type, special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [token for token, its_type in zip(tokens, types, strict=False) if its_type == type]
        inner.add_tokens([AddedToken(token, special=special, normalized=False) for token in whole])
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    return Tokenizer(
        inner,
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        eos=metadata.get("tokenizer.ggml.eos_token_id"),
        stops=frozenset(id for id in ends if id is not None),
        chat_template=metadata.get("tokenizer.chat_template"),
        adds_bos=_adds_bos(metadata),
    )


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """What the file says; where it does not, what llama.cpp takes for granted."""
    usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(metadata.get("tokenizer.ggml.add_bos_token", usual))


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> tokenizers.Tokenizer:
    split, merges = metadata.get("tokenizer.ggml.pre", "default"), metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise InputError(f"{source} holds no vocabulary (tokenizer.ggml.merges): use another file")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    inner = _merging(tokens, pairs, source, ignore_merges=split in WHOLE_WORDS_FIRST)
    inner.pre_tokenizer = pre_tokenizer(split, source)
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], source: str
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores", [])
    if not len(tokens) == len(scores) == len(types):
        raise InputError(
            f"{source} has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types of them: it is damaged"
        )
    text = [id for id, type in enumerate(types) if type not in (UNKNOWN, CONTROL, UNUSED, BYTE)]
    ranked = [tokens[id] for id in sorted(text, key=lambda id: -scores[id])]
    unknown = tokens[min(metadata.get("tokenizer.ggml.unknown_token_id", 0), len(tokens) - 1)]
    inner = _merging(tokens, all_merges(ranked), source, byte_fallback=True, unk_token=unknown, fuse_unk=True)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] * prefix
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] * prefix
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _merging(tokens: Iterable[str], merges: list[Any], source: str, **options: Any) -> tokenizers.Tokenizer:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{source}: its vocabulary and merges do not fit each other ({error})") from error


def all_merges(ranked: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to put one token together from two others, the best-ranked token first."""
    known = set(ranked)
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def pre_tokenizer(split: str, source: str) -> Any:
    """How text is cut before merging, by the name a GGUF file gives it."""
    if split == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if split in ("gpt-2", "phi-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in (*LLAMA_BPE_NAMES, "dbrx", "smaug-bpe"):
        return _cut_by(LLAMA_BPE)
    if split == "tekken":
        return _cut_by(TEKKEN)
    raise InputError(
        f"{source}: its text is split by {split!r}; implemented are smollm, gpt-2, llama-bpe and tekken. "
        "Use the model's Hugging Face folder instead"
    )


def _cut_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Meta's format
# ---------------------------------------------------------------------------------------------------------------------


def from_meta(folder: Path) -> Tokenizer:
    """The tokenizer of a Llama 3 in Meta's format, with a minimal chat template of Llama 3."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.model: download it there")
    ranks = _read_ranks(path)
    spelling = str.maketrans({chr(byte): character for byte, character in enumerate(byte_characters())})
    ranked = [token.decode("latin-1").translate(spelling) for token in sorted(ranks, key=ranks.__getitem__)]
    inner = _merging(ranked, all_merges(ranked), str(path), ignore_merges=True)
    inner.pre_tokenizer, inner.decoder = _cut_by(LLAMA_BPE), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA3_CONTROL_TOKENS])
    return Tokenizer(
        inner,
        bos=inner.token_to_id("<|begin_of_text|>"),
        eos=inner.token_to_id("<|end_of_text|>"),
        chat_template=LLAMA3_CHAT,
        adds_bos=True,
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    require("tiktoken", "meta")
    from tiktoken.load import load_tiktoken_bpe

    # Without a hash, the library gives what it found under this path the first time.
    file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        ranks = load_tiktoken_bpe(str(path), file_hash)
    except ValueError as error:
        raise InputError(
            f"{path} is not a vocabulary of Llama 3; SentencePiece ones (Llama 1 and 2) are not read: "
            "use the model's Hugging Face folder instead"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise InputError(f"{path}: its {len(ranks)} ranks are not 0, 1, 2, ...: download it again")
    return ranks
