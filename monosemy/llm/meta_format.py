"""Reads a Llama in Meta's original format: params.json and consolidated.NN.pth.

1. Each file is one of the equal pieces into which tensor parallelism cut the model. Pickles are read by PyTorch's own
   reader for weights only, which runs nothing, and stay mapped.
2. The pieces of a tensor are joined: matrices that are read by rows along their rows, those that add to the stream
   along their columns; norms are the same in every piece.
3. params.json does not say everything; `META_...` below are what Meta's models have in common.

Source of the layout: https://github.com/meta-llama/llama-models
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from monosemy.llm.config_file import ConfigFile, halves_together, rotary_divisors
from monosemy.llm.llama import LlamaConfig
from monosemy.llm.tokenizer import read_json
from monosemy.runtime import InputError, say

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
"""Meta's words -> Hugging Face's."""
EMBEDDING, UNEMBEDDING = "tok_embeddings.weight", "output.weight"

META_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
META_FACTOR, META_FACTOR_TIED = 8.0, 32.0
"""Of Llama 3.1; of Llama 3.2's 1B and 3B, which alone tie the embeddings. As in Meta's Hugging Face folders."""
META_CONTEXT, META_CONTEXT_3, META_CONTEXT_SCALED = 4096, 8192, 131072
"""Of Llama 2; of Llama 3, known by its larger rope_theta; of Llama 3.1 and later."""


class MetaCheckpoint:
    """A folder in Meta's format: `params`, and the `pieces` of the model (name -> mapped tensor)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "params.json"
        self.params = ConfigFile(read_json(self.path), str(self.path))
        paths = piece_files(folder)
        self.pieces = [_load(path) for path in paths]
        shapes = [{name: tensor.shape for name, tensor in piece.items()} for piece in self.pieces]
        for path, its_shapes in zip(paths, shapes, strict=True):
            if its_shapes != shapes[0]:
                raise InputError(f"{path} holds other tensors than {paths[0].name}: they are of different models")

    def config(self) -> LlamaConfig:
        """The model's shape. Refuses by name what `llama.py` does not compute."""
        params = self.params
        for key in ("quantization_args", "lora_args", "moe_args", "vision_chunk_size", "vision_model"):
            params.refuse(key, -1)
        d_model, n_heads = params.count("dim"), params.count("n_heads")
        theta, scaled, tied = params.number("rope_theta", 10000.0), params.flag("use_scaled_rope"), self._tied()
        context = META_CONTEXT_SCALED if scaled else META_CONTEXT_3 if theta > 10000.0 else META_CONTEXT
        return LlamaConfig(
            d_model=d_model,
            n_layers=params.count("n_layers"),
            n_heads=n_heads,
            n_kv_heads=params.count("n_kv_heads", n_heads),
            head_dim=max(1, d_model // n_heads),
            d_mlp=self._d_mlp(),
            vocabulary=self._vocabulary(d_model),
            context_length=params.count("max_seq_len", context),
            rope_theta=theta,
            norm_epsilon=params.number("norm_eps", 1e-5),
            tied_embeddings=tied,
            rope_divisors=self._divisors(d_model // n_heads, theta, tied) if scaled else None,
        )

    def weights(self, config: LlamaConfig) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every tensor under its Hugging Face name, but those that others determine."""
        for name in self.pieces[0]:
            if name != "rope.freqs" and not (config.tied_embeddings and name == UNEMBEDDING):
                yield hugging_face_name(name), partial(self._joined, name, config)

    def _joined(self, name: str, config: LlamaConfig) -> Tensor:
        pieces = [piece[name] for piece in self.pieces]
        if name.endswith("norm.weight"):
            return pieces[0]
        by_column = name.endswith((".wo.weight", ".w2.weight")) or (
            name == EMBEDDING and pieces[0].shape[1] < config.d_model
        )
        tensor = torch.cat(pieces, dim=int(by_column)) if len(pieces) > 1 else pieces[0]
        heads = config.n_heads if ".wq." in name else config.n_kv_heads if ".wk." in name else 0
        return halves_together(tensor, heads) if heads else tensor

    def _tied(self) -> bool:
        """Meta stores tied embeddings twice."""
        return all(
            UNEMBEDDING not in piece or torch.equal(piece[UNEMBEDDING], piece[EMBEDDING]) for piece in self.pieces
        )

    def _vocabulary(self, d_model: int) -> int:
        """From the embedding, as old files do not say it. Llama 1 and 2 cut it by columns, Llama 3 by rows."""
        rows, columns = self.pieces[0][EMBEDDING].shape
        return rows if columns < d_model else rows * len(self.pieces)

    def _d_mlp(self) -> int:
        """Two thirds of 4 dim, times a factor, rounded up."""
        params = self.params
        size = int(params.number("ffn_dim_multiplier", 1.0) * int(8 * params.count("dim") / 3))
        multiple = params.count("multiple_of", 256)
        return -(-size // multiple) * multiple

    def _divisors(self, head_dim: int, theta: float, tied: bool) -> tuple[float, ...] | None:
        factor = self.params.get("rope_scaling_factor")
        if factor is None:
            factor = META_FACTOR_TIED if tied else META_FACTOR
            say(f"{self.path} does not say rope_scaling_factor: {factor:g}, as in Llama 3.{2 if tied else 1}")
        rope = ConfigFile(META_SCALING | {"factor": factor}, str(self.path))
        return rotary_divisors(rope, "llama3", head_dim, theta)


def piece_files(folder: Path) -> list[Path]:
    """The consolidated.NN.pth files of a folder, in order. Raises `InputError` if one is missing."""
    found = sorted(folder.glob("consolidated.*.pth"))
    for number in range(max(1, len(found))):
        if not (folder / f"consolidated.{number:02}.pth").is_file():
            raise InputError(f"{folder} has no consolidated.{number:02}.pth: download all of the model's files there")
    return found


def hugging_face_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; names not known stay as they are."""
    parts = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
    if parts is None or parts[2] not in NAMES:
        return name
    return (f"model.layers.{parts[1]}." if parts[1] else "") + f"{NAMES[parts[2]]}.weight"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        piece = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{path} is a pickle of more than weights, which could run anything, so it is not read: "
            "download it from Meta, or use the model's Hugging Face folder"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path} is not a complete file of PyTorch weights ({reason}): download it again") from error
    if not isinstance(piece, dict) or not all(isinstance(tensor, Tensor) for tensor in piece.values()):
        raise InputError(f"{path} does not hold tensors by name: it is not part of a model in Meta's format")
    if getattr(piece.get(EMBEDDING), "ndim", 0) != 2:
        raise InputError(f"{path} lacks the matrix {EMBEDDING}: it is not part of a model in Meta's format")
    return piece
