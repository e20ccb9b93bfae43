"""The sparse autoencoder: a few active latents per activation row, out of many.

    x_hat = W_dec^T f + b_pre,    f = ReLU(TopK(W_enc (x - b_pre) + b_enc))

where x is a row normalised to mean 0 and standard deviation 1 over its own elements, which makes attention sinks and
deep layers comparable with the rest (reference: Gao et al. 2024, arXiv 2406.04093). Latents stay sparse everywhere:
`SparseCode` holds, per row, the k values and which latents they belong to.

Instead of the k largest, a latent may be active where it exceeds its threshold (`jumprelu`: Rajamanoharan et al. 2024,
arXiv 2407.14435; one threshold for all, found after training, is that of He et al. 2024, arXiv 2410.20526) or where it
is positive (`relu`). A transcoder reconstructs another site: it has a bias `b_dec` of its own, and maybe a linear path
`W_skip`.

Whatever it was trained with, an SAE of ours has decoder directions of norm 1, and its input is normalised per token or
not at all: other norms and scales are folded into the weights. One that another library trained keeps its own norms
(`readers`).

On disk: `sae.safetensors` with the tensors, `sae.json` with the config.
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

Normalization = Literal["token", "constant_norm", "none"]

DENSE_ELEMENTS = 1 << 24
"""Dense pre-activations that are held at once."""

EPSILON = 1e-5
"""Added to a row's standard deviation, so that a constant row is not divided by 0."""


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What an SAE is, apart from its weights."""

    d_model: int
    """Width of the activations."""
    n_latents: int
    """Number of latents."""
    k: int
    """Latents that may be active on a row; with thresholds, on a row on average, or all where that is not known."""
    site: str
    """Where in the model the activations were read, for example L24.resid_post."""
    model: str
    """Name of the model."""
    normalize: Normalization = "token"
    """`token`: every row to mean 0 and standard deviation 1; `constant_norm`: to the norm sqrt(d_model); `none`: as it
    is."""
    sink_norm: float | None = None
    """Rows of a larger norm are attention sinks, left out of training; None if none were."""
    activation: Literal["topk", "jumprelu", "relu"] = "topk"
    """Which positive latents are active: the k largest of a row, those above their threshold, or all."""
    target_site: str | None = None
    """The site that a transcoder reconstructs from the rows at `site`; None: `site` itself."""

    @property
    def output_site(self) -> str:
        """The site of what is reconstructed."""
        return self.target_site or self.site

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

    def dense(self, n_latents: int) -> Float[Tensor, "row latent"]:
        """All activations, zeros included."""
        out = torch.zeros(len(self.values), n_latents)
        return out.scatter_add_(1, self.indices.long(), self.values)  # an unused slot adds 0 to latent 0


class SAE:
    """A trained sparse autoencoder. Rows are raw activations of the model; it normalises them itself."""

    def __init__(
        self, config: SAEConfig, parameters: kernels.Parameters, threshold: Float[Tensor, " latent"] | None = None
    ) -> None:
        """`threshold`: with `jumprelu`, what the activation of each latent must exceed; at least 0."""
        self.config, self.parameters, self.threshold = config, parameters, threshold
        shape = (config.n_latents, config.d_model)
        expected = {"W_enc": shape, "W_dec": shape, "b_enc": shape[:1], "b_pre": shape[1:], "b_dec": shape[1:]}
        expected |= {"W_skip": (config.d_model, config.d_model), "threshold": shape[:1]}
        for name, tensor in self.named().items():
            if tuple(tensor.shape) != expected[name]:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}; expected {expected[name]} for {shape[0]} latents of "
                    f"width {shape[1]}"
                )
        if (threshold is None) != (config.activation != "jumprelu"):
            raise InputError(
                f"activation is {config.activation}, and there are {'no ' if threshold is None else ''}thresholds: "
                "jumprelu needs one for each latent, and nothing else has any"
            )

    def named(self) -> dict[str, Tensor]:
        """Name -> tensor of all that there are."""
        return self.parameters.named() | ({} if self.threshold is None else {"threshold": self.threshold})

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
        centred = normalized - self.parameters.b_pre
        if self.config.activation == "topk":
            code = kernels.encode_topk(centred, self.parameters.W_enc, self.parameters.b_enc, self.config.k)
        else:
            code = self._above_threshold(centred)
        return SparseCode(*code, center, scale)

    def _above_threshold(self, centred: Float[Tensor, "row d_model"]) -> kernels.TopK:
        """All activations above the threshold, in as many slots as the fullest row needs."""
        threshold = 0.0 if self.threshold is None else self.threshold
        parts = []
        for rows in centred.split(max(1, DENSE_ELEMENTS // self.config.n_latents)):
            pre = torch.addmm(self.parameters.b_enc, rows, self.parameters.W_enc.T)
            pre = torch.where(pre > threshold, pre, 0.0)
            found = pre.topk(max(1, int((pre > 0).sum(dim=1).amax()) if len(pre) else 1), dim=1)
            parts.append((found.values, torch.where(found.values > 0, found.indices, 0).int()))
        width = max((values.shape[1] for values, _ in parts), default=1)
        values, indices = (
            [torch.nn.functional.pad(part[which], (0, width - part[which].shape[1])) for part in parts]
            for which in (0, 1)
        )
        if not parts:
            return kernels.TopK(torch.zeros(0, width), torch.zeros(0, width, dtype=torch.int32))
        return kernels.TopK(torch.cat(values), torch.cat(indices))

    def decode(
        self, code: SparseCode, x: Float[Tensor, "row d_model"] | None = None, h_bias: Tensor | None = None
    ) -> Float[Tensor, "row d_model"]:
        """Raw rows from latent activations; with `h_bias` (latent,), as if every latent were that much more active on
        every row (reference system A's control for steering). A transcoder with a skip path needs the raw rows `x`."""
        of = self.parameters
        out = kernels.decode(kernels.TopK(code.values, code.indices), of.W_dec, of.output_bias)
        if of.W_skip is not None:
            if x is None:
                raise InputError("this transcoder has a skip path: decode(code, x) needs the rows x that were encoded")
            out = out + (self.normalize(x)[0] - of.b_pre) @ of.W_skip.T
        if h_bias is not None:
            out = out + h_bias @ of.W_dec
        return out * code.scale + code.center

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The reconstruction of raw rows `x` (a transcoder's: of the rows at its target site)."""
        return self.decode(self.encode(x), x)

    def to_jumprelu(self, x: Float[Tensor, "row d_model"]) -> SAE:
        """This SAE with one threshold in place of the choice of the k largest: the one that keeps k latents per row of
        `x` on average. Latents do not compete any more, so one can be read without computing the others."""
        centred = self.normalize(x)[0] - self.parameters.b_pre
        arguments = (centred, self.parameters.W_enc, self.parameters.b_enc)
        n_candidates = min(4 * self.config.k, self.config.n_latents)
        while True:
            values = kernels.encode_topk(*arguments, n_candidates).values
            n_kept = min(self.config.k * len(x), values.numel())
            kept = values.flatten().topk(min(n_kept + 1, values.numel())).values
            threshold = kept[-1].item()  # of the first one that is not kept: what is kept exceeds it
            if n_candidates == self.config.n_latents or bool((values.min(dim=1).values < threshold).all()):
                break
            n_candidates = min(2 * n_candidates, self.config.n_latents)
        thresholds = torch.full((self.config.n_latents,), threshold)
        return SAE(dataclasses.replace(self.config, activation="jumprelu"), self.parameters, thresholds)

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
        write_tensors(folder / "sae.safetensors", self.named())
        write_text(folder / "sae.json", to_json(self.config))


def normalize_rows(
    x: Float[Tensor, "row d_model"], how: Normalization
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row 1"], Float[Tensor, "row 1"]]:
    """(rows, centers, scales) with x = rows * scales + centers, up to `EPSILON`, in float32.

    `token` is layer normalisation as Gao et al. (2024) and SAELens have it: x - mean over standard deviation + 1e-5,
    the variance being a sum over d_model - 1.
    """
    x = x.float()
    zeros = torch.zeros(len(x), 1, device=x.device)
    match how:
        case "none":
            return x, zeros, torch.ones_like(zeros)
        case "constant_norm":
            scale = x.norm(dim=1, keepdim=True) / math.sqrt(x.shape[1])
            return x / scale.clamp(min=EPSILON), zeros, scale
        case "token":
            center = x.mean(dim=1, keepdim=True)
            centred = x - center
            scale = (centred.square().sum(dim=1, keepdim=True) / max(x.shape[1] - 1, 1)).sqrt()
            return centred / (scale + EPSILON), center, scale


def open_sae(path: Path | str, verify: bool = False) -> SAE:
    """The SAE in the artifact folder `path`, ready to encode and decode. Raises `InputError` if it is none.
    (`foreign.load_sae` also reads those of other libraries, and the Hub.)"""
    folder = Path(path)
    read_manifest(folder, "sae", verify)
    content = json.loads((folder / "sae.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(SAEConfig)}
    if unknown := sorted(set(content) - known):
        raise InputError(f"{folder / 'sae.json'} has {', '.join(unknown)}, unknown to this monosemy: train it again")
    tensors = read_tensors(folder / "sae.safetensors")
    threshold = tensors.pop("threshold", None)
    parameters = kernels.Parameters(*(tensors.get(name) for name in kernels.Parameters._fields))  # pyright: ignore
    return SAE(SAEConfig(**content), parameters, threshold)


def folded(parameters: kernels.Parameters, input_scale: float = 1.0, output_scale: float = 1.0) -> kernels.Parameters:
    """The parameters that do to x what the given ones do to input_scale * x, with a result that is output_scale times
    as large; decoder directions of norm 1, so activations are in units of the (raw) output."""
    norms = parameters.W_dec.norm(dim=1)
    gain = norms / output_scale
    return kernels.Parameters(
        W_enc=parameters.W_enc * (gain * input_scale)[:, None],
        b_enc=parameters.b_enc * gain,
        W_dec=parameters.W_dec / norms[:, None],
        b_pre=parameters.b_pre / input_scale,
        b_dec=None if parameters.b_dec is None else parameters.b_dec / output_scale,
        W_skip=None if parameters.W_skip is None else parameters.W_skip * (input_scale / output_scale),
    )
