"""Reads a GGUF file: metadata and tensors.

1. The header is parsed here, not by the `gguf` library, whose reader spends seconds on a vocabulary.
2. Tensors stay in the mapped file until asked for; then the `gguf` library undoes their quantisation.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monosemy.runtime import InputError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a metadata value -> its `struct` code."""
STRING, ARRAY = 8, 9
ALIGNMENT = 32
"""Of the tensors, unless the metadata says otherwise."""
MOST_DIMENSIONS = 4


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

    def tensor(self, name: str) -> np.ndarray:
        """Tensor `name` as float32 (float16 where it is stored so), its quantisation undone."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        stored = self.tensors[name]
        rows = np.frombuffer(self.data, np.uint8, stored.size, stored.start)
        kind = GGMLQuantizationType(stored.kind)
        if kind == GGMLQuantizationType.F16:
            return rows.view(np.float16).reshape(stored.shape)
        try:
            return dequantize(rows.reshape(*stored.shape[:-1], -1), kind).reshape(stored.shape)
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
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
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

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, length = self._scalar("I"), self._scalar("Q")
            if item in SCALARS:
                return list(self._scalars(SCALARS[item], length))
            return [self._value(item) for _ in range(length)]
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
        size = int(np.prod(shape)) // block * block_bytes
        if start + size > len(self.data):
            raise InputError(
                f"{self.path} is truncated: tensor {name} ends at byte {start + size:,}, "
                f"but the file has {len(self.data):,}; download it again"
            )
        return StoredTensor(shape, kind, start, size)
