"""The sparse autoencoder: a few active latents per activation row, out of many.

    x_hat = W_dec^T f + b_pre,    f = ReLU(TopK(W_enc (x - b_pre) + b_enc))

where x is a row normalised to mean 0 and standard deviation 1 over its own elements, which makes attention sinks and
deep layers comparable with the rest (reference: Gao et al. 2024, arXiv 2406.04093). Latents stay sparse everywhere:
`SparseCode` holds, per row, the k values and which latents they belong to.

On disk: `sae.safetensors` with the four tensors, `sae.json` with the config.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from monosemy import kernels
from monosemy.artifact import read_manifest, read_tensors, to_json, write_tensors, write_text
from monosemy.runtime import InputError

Normalization = Literal["token", "none"]

EPSILON = 1e-6
"""Added to a row's standard deviation, so that a constant row is not divided by 0."""


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, apart from its weights."""

    d_model: int
    """Width of the activations."""
    n_latents: int
    """Number of latents."""
    k: int
    """Latents that may be active on a row."""
    site: str
    """Where in the model the activations were read, for example L24.resid_post."""
    model: str
    """Name of the model."""
    normalize: Normalization = "token"
    """`token`: every row to mean 0 and standard deviation 1; `none`: as it is."""
    sink_norm: float | None = None
    """Rows of a larger norm are attention sinks, left out of training; None if none were."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents", "k"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.k > self.n_latents:
            raise InputError(
                f"k is {self.k}, but there are only {self.n_latents} latents: choose k <= n-latents (32 is usual)"
            )


class SparseCode(NamedTuple):
    """Which latents are active on each row, and how strongly. A slot whose value is 0 is unused."""

    values: Float[Tensor, "row k"]
    indices: Int32[Tensor, "row k"]
    center: Float[Tensor, "row 1"]
    """The row's mean, and"""
    scale: Float[Tensor, "row 1"]
    """its standard deviation, both removed before encoding and put back by `decode`."""


class SAE:
    """A trained sparse autoencoder. Rows are raw activations of the model; it normalises them itself."""

    def __init__(self, config: SAEConfig, parameters: kernels.Parameters) -> None:
        shape = (config.n_latents, config.d_model)
        for name, expected in (("W_enc", shape), ("W_dec", shape), ("b_enc", shape[:1]), ("b_pre", shape[1:])):
            found = tuple(getattr(parameters, name).shape)
            if found != expected:
                raise InputError(
                    f"{name} has shape {found}; expected {expected} for {shape[0]} latents of width {shape[1]}"
                )
        self.config = config
        self.parameters = parameters

    @property
    def W_dec(self) -> Float[Tensor, "latent d_model"]:
        """Decoder directions, in normalised space."""
        return self.parameters.W_dec

    def normalize(
        self, x: Float[Tensor, "row d_model"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row 1"], Float[Tensor, "row 1"]]:
        """(normalised rows, their means, their standard deviations), float32."""
        return normalize_rows(x, self.config.normalize)

    def encode(self, x: Float[Tensor, "row d_model"]) -> SparseCode:
        """The latent activations of raw rows `x`; computed and selected in float32."""
        if x.shape[1] != self.config.d_model:
            raise InputError(f"rows have width {x.shape[1]}; this SAE was trained on width {self.config.d_model}")
        normalized, center, scale = self.normalize(x)
        W_enc, b_enc, _, b_pre = self.parameters
        values, indices = kernels.encode_topk(normalized, W_enc, b_enc, b_pre, self.config.k)
        return SparseCode(values, indices, center, scale)

    def decode(self, code: SparseCode) -> Float[Tensor, "row d_model"]:
        """Raw rows from latent activations."""
        sparse = kernels.TopK(code.values, code.indices)
        return kernels.decode(sparse, self.parameters.W_dec, self.parameters.b_pre) * code.scale + code.center

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The reconstruction of raw rows `x`."""
        return self.decode(self.encode(x))

    def is_sink(self, x: Float[Tensor, "row d_model"]) -> Bool[Tensor, " row"]:
        """Which of the raw rows `x` are attention sinks, unknown to this SAE."""
        norm = x.float().norm(dim=1)
        return norm > (math.inf if self.config.sink_norm is None else self.config.sink_norm)

    def direction(self, latent: int, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What one more unit of `latent` adds to each of the raw rows `x`."""
        _, _, scale = self.normalize(x)
        return scale * self.W_dec[self.check_latent(latent)]

    def check_latent(self, latent: int) -> int:
        """`latent`, or `InputError` if this SAE does not have it."""
        if not 0 <= latent < self.config.n_latents:
            raise InputError(f"latent {latent} does not exist: this SAE has latents 0 to {self.config.n_latents - 1}")
        return latent

    def save(self, folder: Path) -> None:
        """Write `sae.safetensors` and `sae.json` into `folder`."""
        write_tensors(folder / "sae.safetensors", self.parameters._asdict())
        write_text(folder / "sae.json", to_json(self.config))


def normalize_rows(
    x: Float[Tensor, "row d_model"], how: Normalization
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row 1"], Float[Tensor, "row 1"]]:
    """(rows, centers, scales) with x = rows * scales + centers, in float32."""
    x = x.float()
    if how == "none":
        return x, torch.zeros(len(x), 1), torch.ones(len(x), 1)
    center = x.mean(dim=1, keepdim=True)
    centred = x - center
    scale = centred.square().mean(dim=1, keepdim=True).sqrt() + EPSILON
    return centred / scale, center, scale


def load_sae(path: Path | str, verify: bool = False) -> SAE:
    """The SAE in the artifact folder `path`, ready to encode and decode. Raises `InputError` if it is none."""
    folder = Path(path)
    read_manifest(folder, "sae", verify)
    config = SAEConfig(**json.loads((folder / "sae.json").read_text(encoding="utf-8")))
    tensors = read_tensors(folder / "sae.safetensors")
    return SAE(config, kernels.Parameters(*(tensors[name] for name in kernels.Parameters._fields)))
