"""Reads a GGUF file: metadata and tensors, and the Llama or Mistral that they make.

1. The header is parsed here, not by the `gguf` library, whose reader spends seconds on a vocabulary.
2. Tensors stay in the mapped file until asked for; then the `gguf` library undoes their quantisation.
3. Metadata become a `LlamaConfig`, and tensors get their Hugging Face names and order of rows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monosemy.llm.config_file import ConfigFile, halves_together, rotary_divisors
from monosemy.llm.llama import LlamaConfig
from monosemy.runtime import InputError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's words -> Hugging Face's."""
ROTARY_FREQUENCIES = "rope_freqs.weight"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a metadata value -> its `struct` code."""
STRING, ARRAY = 8, 9
ALIGNMENT = 32
"""Of the tensors, unless the metadata says otherwise."""
MOST_DIMENSIONS = 4
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Number of a kind of tensor that needs no undoing -> its dtype."""
MOST_BLOCKS = 512
"""The `gguf` library undoes 16 rows at a time; rows of so many blocks make that three times as fast as short ones."""


class StoredTensor(NamedTuple):
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """As PyTorch counts it: rows first."""
    kind: int
    """Number of its quantisation."""
    start: int
    """First byte in the file."""
    size: int
    """In bytes."""


class GGUFFile:
    """An open GGUF file: `metadata` (name -> value) and `tensors` (name -> where it lies)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file (it does not begin with 'GGUF'): check the path")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # PyTorch wants writable memory
        self.position = 4
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is truncated or damaged: its header breaks off; download it again") from error

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, its quantisation undone (float32), or as it is stored, in the mapped file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        stored = self.tensors[name]
        stored_bytes = np.frombuffer(self.data, np.uint8, stored.size, stored.start)
        if stored.kind in PLAIN:
            return torch.from_numpy(stored_bytes).view(PLAIN[stored.kind]).view(stored.shape)
        kind = GGMLQuantizationType(stored.kind)
        block_bytes = GGML_QUANT_SIZES[kind][1]
        row_bytes = block_bytes * math.gcd(stored.size // block_bytes, MOST_BLOCKS)
        try:
            return torch.from_numpy(dequantize(stored_bytes.reshape(-1, row_bytes), kind)).view(stored.shape)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: tensor {name} is quantised as {kind.name}, which cannot be undone here: "
                "use another quantisation of the model, for example Q8_0 or F16"
            ) from None

    def _read_header(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise InputError(f"{self.path} has GGUF version {version}; expected 2 or 3 (little-endian)")
        n_tensors, n_values = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {self._string(): self._value(self._scalar("I")) for _ in range(n_values)}
        headers = [self._tensor_header() for _ in range(n_tensors)]
        alignment = ConfigFile(self.metadata, str(self.path)).count("general.alignment", ALIGNMENT)
        start = -(-self.position // alignment) * alignment
        self.tensors: dict[str, StoredTensor] = {
            name: self._place(name, shape, kind, start + offset) for name, shape, kind, offset in headers
        }

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def _bytes(self) -> bytes:
        (length,) = struct.unpack_from("<Q", self.data, self.position)
        start = self.position + 8
        self.position = start + length
        if self.position > len(self.data):
            raise struct.error("a string reaches beyond the file")
        return self.data[start : self.position]

    def _string(self) -> str:
        return self._bytes().decode("utf-8")

    def _strings(self, length: int) -> list[str]:
        """As `_string`, many times: a vocabulary, where half of the time to read a header goes."""
        data, position, strings, unpack = self.data, self.position, [], struct.Struct("<Q").unpack_from
        for _ in range(length):
            start = position + 8
            position = start + unpack(data, position)[0]
            strings.append(data[start:position].decode("utf-8"))
        self.position = position
        if position > len(data):
            raise struct.error("strings reach beyond the file")
        return strings

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, length = self._scalar("I"), self._scalar("Q")
            if item in SCALARS:
                return list(self._scalars(SCALARS[item], length))
            return self._strings(length) if item == STRING else [self._value(item) for _ in range(length)]
        if kind not in SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return self._scalar(SCALARS[kind])

    def _scalars(self, code: str, length: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * length
        if self.position + size > len(self.data):
            raise struct.error("an array reaches beyond the file")
        values = struct.unpack_from(f"<{length}{code}", self.data, self.position)
        self.position += size
        return values

    def _tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dimensions = self._string(), self._scalar("I")
        if n_dimensions > MOST_DIMENSIONS:
            raise struct.error(f"a tensor of {n_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(n_dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            raise InputError(f"{self.path}: tensor {name} has the unknown quantisation type {kind}") from None
        if shape and shape[-1] % block:
            raise InputError(
                f"{self.path}: tensor {name} has rows of {shape[-1]}, no multiple of {block}: it is damaged"
            )
        size = math.prod(shape) // block * block_bytes
        if start + size > len(self.data):
            raise InputError(
                f"{self.path} is truncated: tensor {name} ends at byte {start + size:,}, "
                f"but the file has {len(self.data):,}; download it again"
            )
        return StoredTensor(shape, kind, start, size)


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """The model's shape. Refuses by name what `llama.py` does not compute."""
    metadata, source = file.metadata, str(file.path)
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise InputError(f"{source}: architecture {architecture!r} is not implemented; expected 'llama'")
    config = ConfigFile(metadata, source, "llama.")
    config.refuse("expert_count")  # mixtures of experts
    d_model, n_heads = config.count("embedding_length"), config.count("attention.head_count")
    head_dim = config.count("attention.key_length", max(1, d_model // n_heads))
    config.refuse("rope.dimension_count", head_dim)
    config.refuse("attention.value_length", head_dim)
    window = config.get("attention.sliding_window")
    return LlamaConfig(
        d_model=d_model,
        n_layers=config.count("block_count"),
        n_heads=n_heads,
        n_kv_heads=config.count("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        d_mlp=config.count("feed_forward_length"),
        vocabulary=config.count("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [])) or None),
        context_length=config.count("context_length"),
        rope_theta=config.number("rope.freq_base", 10000.0),
        norm_epsilon=config.number("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.tensors,
        rope_divisors=_rotary_divisors(file, config, head_dim),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        sliding_window=config.count("attention.sliding_window") if window else None,
    )


def _rotary_divisors(file: GGUFFile, config: ConfigFile, head_dim: int) -> tuple[float, ...] | None:
    """Linear scaling is in the metadata; Llama 3's is a tensor of divisors. llama.cpp multiplies the two."""
    factor = config.get("rope.scaling.factor", config.get("rope.scale_linear"))
    kind = config.get("rope.scaling.type", "linear" if factor else "none")
    scaling = ConfigFile({"factor": factor}, config.source)
    linear = rotary_divisors(scaling, "default" if kind == "none" else kind, head_dim, 1.0)
    if ROTARY_FREQUENCIES not in file.tensors:
        return linear
    divisors = file.tensor(ROTARY_FREQUENCIES).float()
    return tuple((divisors * (1.0 if linear is None else linear[0])).tolist())


def gguf_weights(file: GGUFFile, config: LlamaConfig) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every tensor of a GGUF file under its Hugging Face name."""

    def read(name: str) -> Tensor:
        heads = config.n_heads if ".attn_q." in name else config.n_kv_heads if ".attn_k." in name else 0
        return halves_together(file.tensor(name), heads) if heads else file.tensor(name)

    for name in file.tensors:
        if name != ROTARY_FREQUENCIES:
            yield hugging_face_name(name), partial(read, name)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; names it does not know stay as they are."""
    *layer, part, kind = name.split(".") if "." in name else (name, "")
    prefix = f"model.layers.{layer[1]}." if layer[:1] == ["blk"] and len(layer) == 2 else ""
    return f"{prefix}{NAMES[part]}.{kind}" if part in NAMES else name
