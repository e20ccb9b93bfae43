"""Text <-> token ids, and messages -> the text a chat model was trained on.

`Tokenizer` wraps one of the `tokenizers` library and adds what that lacks:

1. The bytes of each token, so that `pieces` of a text join to the text even where a character spans tokens. They are
   written in one of two ways (`Spelling`): that of byte-level BPE (Llama 3) or of SentencePiece (Llama 2, Mistral).
2. The chat template, rendered in a sandbox: it is a program that came with the weights.

`tokenizer_files.py` makes one from the files beside the weights.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tokenizers

from monosemy.runtime import InputError

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
"""Control tokens that end a turn or a text, whatever the file's metadata says."""


class Spelling(NamedTuple):
    """How a vocabulary writes bytes."""

    byte_level: bool = False
    """Each byte is a printable character (`byte_characters`)."""
    replaced: tuple[tuple[str, str], ...] = ()
    """Otherwise: strings to replace in each token, such as '▁' by a space."""
    byte_tokens: bool = False
    """Whether tokens such as <0x0A> are single bytes."""
    leading_space: bool = False
    """Whether a space that begins a text is not part of it: the encoder put it there."""


class Tokenizer:
    """A vocabulary and how text becomes ids of it."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        bos: int | None = None,
        eos: int | None = None,
        stops: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        adds_bos: bool = False,
    ) -> None:
        """`adds_bos`: whether the model was trained on texts that begin with BOS, so that prompts want it."""
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self.bos, self.eos, self.chat_template, self.adds_bos = bos, eos, chat_template, adds_bos and bos is not None
        known_ends = {inner.token_to_id(token) for token in END_TOKENS} | {eos}
        self.stops = frozenset(stops | {id for id in known_ends if id is not None})
        """Ids that end generation."""

    @cached_property
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

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text` as the model expects a text to begin: after BOS, if it was trained so."""
        ids = self.encode(text)
        return [self.bos, *ids] if self.adds_bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return [item.ids for item in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included; bytes that are no character become U+FFFD."""
        return b"".join(self._contributions(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One string per token; they join to `decode(ids)`. A character split over tokens goes to the last of them."""
        reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [reader.decode(part) for part in self._contributions(ids)]
        if pieces:
            pieces[-1] += reader.decode(b"", final=True)
        return pieces

    def bytes_of(self, id: int) -> bytes:
        """What token `id` contributes to a text, unless it begins it. Raises `InputError` if there is no such token."""
        if 0 <= id < len(self._token_bytes):
            return self._token_bytes[id]
        raise InputError(f"{id} is not a token: the vocabulary has ids 0 to {self.size - 1}")

    def _contributions(self, ids: Sequence[int]) -> list[bytes]:
        """What each of `ids` contributes to their text."""
        parts = [self.bytes_of(id) for id in ids]
        if self._spelling.leading_space:
            first = next((number for number, part in enumerate(parts) if part), 0)
            parts[first : first + 1] = [part.removeprefix(b" ") for part in parts[first : first + 1]]
        return parts

    @cached_property
    def _spelling(self) -> Spelling:
        decoder = self.inner.decoder
        return read_spelling(json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"})

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        spelling, added = self._spelling, self.inner.get_added_tokens_decoder()
        table = {ord(character): byte for byte, character in enumerate(byte_characters())}
        token_bytes = [b""] * self.size
        for token, id in self.inner.get_vocab(with_added_tokens=True).items():
            if not spelling.byte_level:
                token_bytes[id] = _spelled_out(token, spelling)
            else:  # an added token is itself, not byte characters
                token_bytes[id] = token.encode() if id in added else token.translate(table).encode("latin-1")
        return token_bytes

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that asks a chat model for its next message, or that holds `messages` and no more.

        Args:
            messages: each with `role` and `content`, oldest first.
            add_generation_prompt: whether the text ends where the model's answer begins.

        Raises:
            InputError: no chat template, a malformed message, or a template that fails or refuses.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template, so it cannot chat: give a plain prompt")
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"the message {dict(message)!r} needs the texts 'role' and 'content': correct it")
        bos, eos = self._token_text(self.bos), self._token_text(self.eos)
        return render_chat(self.chat_template, messages, bos, eos, add_generation_prompt)

    def _token_text(self, id: int | None) -> str:
        return "" if id is None else self.inner.id_to_token(id) or ""


def read_spelling(decoder: Mapping[str, Any]) -> Spelling:
    """What a decoder of the `tokenizers` library, as its JSON describes it, does to tokens."""
    spelling = Spelling()
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                spelling = spelling._replace(byte_level=True)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                spelling = spelling._replace(replaced=(*spelling.replaced, (old, new)))
            case {"type": "ByteFallback"}:
                spelling = spelling._replace(byte_tokens=True)
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                spelling = spelling._replace(leading_space=True)
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
                replaced = (*spelling.replaced, (old, " "))
                spelling = spelling._replace(replaced=replaced, leading_space=scheme != "never")
            case {"type": "Fuse"}:
                pass
            case _:
                raise InputError(
                    f"the tokenizer's decoder {step['type']} is not implemented; expected that of a byte-level "
                    "(GPT-2, Llama 3, SmolLM2) or SentencePiece (Llama 2, Mistral) vocabulary: use such a model"
                )
    return spelling


def _spelled_out(token: str, spelling: Spelling) -> bytes:
    if spelling.byte_tokens and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
        return bytes.fromhex(byte[1])
    for old, new in spelling.replaced:
        token = token.replace(old, new)
    return token.encode()


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


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str, add_generation_prompt: bool = True
) -> str:
    """Render a Hugging Face chat template, with or without the generation prompt at the end."""
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
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error


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
