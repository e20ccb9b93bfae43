"""Text <-> token ids, and messages -> the text a chat model was trained on.

`Tokenizer` wraps one of the `tokenizers` library and adds what that lacks:

1. Building one from a GGUF file's own vocabulary (byte-level BPE).
2. The bytes of each token, so that `pieces` of a text join to the text even where a character spans tokens.
3. The chat template, rendered in a sandbox: it is a program that came with the weights.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from monosemy.runtime import InputError

LLAMA_BPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging."""

CONTROL, USER_DEFINED = 3, 4
"""Token types of a GGUF vocabulary that are never split."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
"""Control tokens that end a turn or a text, whatever the file's metadata says."""


class Tokenizer:
    """A vocabulary and how text becomes ids of it."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        bos: int | None = None,
        eos: int | None = None,
        stops: frozenset[int] = frozenset(),
        chat_template: str | None = None,
    ) -> None:
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self.bos, self.eos, self.chat_template = bos, eos, chat_template
        known_ends = {inner.token_to_id(token) for token in END_TOKENS} | {eos}
        self.stops = frozenset(stops | {id for id in known_ends if id is not None})
        """Ids that end generation."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Identifies vocabulary, merges and splitting: 16 hex digits of SHA-256."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added. Control tokens written out in the text become their ids."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [item.ids for item in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included; bytes that are no character become U+FFFD."""
        return b"".join([self.bytes_of(id) for id in ids]).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One string per token; they join to `decode(ids)`. A character split over tokens goes to the last of them."""
        reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [reader.decode(self.bytes_of(id)) for id in ids]
        if pieces:
            pieces[-1] += reader.decode(b"", final=True)
        return pieces

    def bytes_of(self, id: int) -> bytes:
        """What token `id` contributes to the text. Raises `InputError` if there is no such token."""
        if 0 <= id < len(self._token_bytes):
            return self._token_bytes[id]
        raise InputError(f"{id} is not a token: the vocabulary has ids 0 to {self.size - 1}")

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        decoder = self.inner.decoder
        if not isinstance(decoder, decoders.ByteLevel):
            raise InputError(
                f"the tokenizer's decoder is {type(decoder).__name__}; only byte-level vocabularies "
                "(GPT-2, Llama 3, SmolLM2) are implemented: use such a model"
            )
        table = {ord(character): byte for byte, character in enumerate(byte_characters())}
        added = self.inner.get_added_tokens_decoder()
        token_bytes = [b""] * self.size
        for token, id in self.inner.get_vocab(with_added_tokens=True).items():
            # An added token is itself, not byte characters.
            token_bytes[id] = token.encode() if id in added else token.translate(table).encode("latin-1")
        return token_bytes

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that asks a chat model for its next message.

        Args:
            messages: each with `role` and `content`, oldest first.

        Raises:
            InputError: no chat template, a malformed message, or a template that fails or refuses.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template, so it cannot chat: give a plain prompt")
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"the message {dict(message)!r} needs the texts 'role' and 'content'")
        return render_chat(self.chat_template, messages, self._token_text(self.bos), self._token_text(self.eos))

    def _token_text(self, id: int | None) -> str:
        return "" if id is None else self.inner.id_to_token(id) or ""


def byte_characters() -> list[str]:
    """The printable character by which byte-level BPE writes each of the 256 bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters, shifted = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return characters


# ---------------------------------------------------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------------------------------------------------


def render_chat(template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str) -> str:
    """Render a Hugging Face chat template, with the generation prompt at the end."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> NoReturn:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata; `source` names the file in errors."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise InputError(
            f"{source}: tokenizer type {kind!r} is not implemented; expected 'gpt2' (byte-level BPE). "
            "Use the model's Hugging Face folder instead"
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise InputError(f"{source} holds no vocabulary (tokenizer.ggml.tokens and .merges): use another file")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{source}: its vocabulary and merges do not fit each other ({error})") from error
    inner.pre_tokenizer = pre_tokenizer(split, source)
    inner.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
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
    )


def pre_tokenizer(split: str, source: str) -> Any:
    """How text is cut before merging, by the name a GGUF file gives it."""
    match split:
        case "smollm":
            return pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        case "gpt-2":
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "llama-bpe":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA_BPE), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
    raise InputError(
        f"{source}: its text is split by {split!r}; implemented are smollm, gpt-2 and llama-bpe. "
        "Use the model's Hugging Face folder instead"
    )


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json and what the files beside it say."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json: save the tokenizer there with save_pretrained")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} cannot be read ({error}): download it again") from error
    settings = read_json(folder / "tokenizer_config.json")
    eos = _special_id(inner, settings.get("eos_token"))
    stops = read_json(folder / "generation_config.json").get("eos_token_id")
    return Tokenizer(
        inner,
        bos=_special_id(inner, settings.get("bos_token")),
        eos=eos,
        stops=frozenset(stops if isinstance(stops, list) else [] if stops is None else [stops]),
        chat_template=_chat_template(folder, settings),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file. Raises `InputError` if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected an object: download it again")
    return content


def _special_id(inner: tokenizers.Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else inner.token_to_id(text)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template
