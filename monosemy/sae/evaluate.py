"""How much of the activations does an SAE explain, and how much of the model's behaviour survives it?

1. Held-out sentences go through the model up to the SAE's site; rows are reconstructed and compared.
2. On some of them the model runs on, five times: with its own activations, with the reconstruction in their place, and
   with zeros, the latter two once everywhere and once sparing the attention sinks.
3. Sums are exact over the whole set (no mean of batch means), in float64 and in one pass.

FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2 over raw rows; explained variance = 1 - FVU.
Loss recovered = (zero - reconstructed) / (zero - original) of the next-token cross-entropies.
Every figure comes twice, over all rows and without sinks: see `activations.store` for what a sink is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from monosemy.activations.capture import PackedBatch, check_tokenizer, length_batches
from monosemy.activations.store import Moments
from monosemy.artifact import Draft, Manifest, read_manifest, to_json, unrecorded, write_text
from monosemy.corpus import TokenFile, open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.model import LanguageModel, check_sites, resolved
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import DtypeName, InputError, Progress, random_stream
from monosemy.sae.autoencoder import EPSILON, SAE, SparseCode, open_sae

METRICS = "metrics.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure an SAE on held-out text."""

    sae: Path = unrecorded()
    """SAE, made by `monosemy train`."""
    tokens: Path = unrecorded()
    """Token file; its validation documents are used."""
    out: Path = unrecorded()
    """Folder for the metrics."""
    model: str = unrecorded("smollm2")
    """The model the SAE was trained on."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    max_tokens: int = 50_000
    """Held-out tokens to reconstruct, at most."""
    loss_tokens: int = 8192
    """Of these, tokens on which the model's cross-entropies are measured, at most."""
    seed: int = 0
    """Seed of the choice of sentences."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "loss_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Reconstruction:
    """How well rows are reconstructed."""

    rows: int
    fvu: float
    explained_variance: float
    fvu_normalized: float
    """FVU of the normalised rows, the space in which the SAE is trained."""
    cosine: float
    """Mean cosine between row and reconstruction."""
    l0: float
    """Mean number of active latents."""
    dead: float
    """Share of latents that never fired on these rows."""
    dense_1_percent: float
    """Share of latents that fired on more than 1% of them."""
    dense_10_percent: float


@dataclass(frozen=True)
class Behaviour:
    """Next-token cross-entropy of the model, nats per token."""

    tokens: int
    original: float
    reconstructed: float
    zero_ablated: float
    loss_recovered: float


@dataclass(frozen=True)
class Metrics:
    """What `metrics.json` holds."""

    without_sinks: Reconstruction
    with_sinks: Reconstruction
    behaviour_without_sinks: Behaviour
    """Sinks keep their own activation; predictions made at sinks are not counted."""
    behaviour_with_sinks: Behaviour


def run(config: EvaluateConfig) -> Manifest:
    """Make the metrics artifact `config.out`."""
    sae = open_sae(config.sae)
    tokens = open_tokens(config.tokens)
    model = load_model(config.model, config.dtype)
    config = resolved(config, model)
    check_tokenizer(tokens, model, config.tokens)
    check_fits(sae, model)
    parents = {
        "sae": read_manifest(config.sae, "sae").digest,
        "tokens": tokens.manifest.digest,
        "model": model.fingerprint,
    }
    with Draft(config.out, "metrics", config, parents) as draft:
        if draft.complete:
            return read_manifest(config.out, "metrics")
        metrics = evaluate(sae, model, tokens, config)
        write_text(draft.path / METRICS, to_json(metrics))
        return draft.commit({"tokens": metrics.with_sinks.rows})


def load_metrics(path: Path) -> Metrics:
    """The metrics in the artifact folder `path`."""
    import json

    read_manifest(path, "metrics")
    content = json.loads((path / METRICS).read_text(encoding="utf-8"))
    return Metrics(
        without_sinks=Reconstruction(**content["without_sinks"]),
        with_sinks=Reconstruction(**content["with_sinks"]),
        behaviour_without_sinks=Behaviour(**content["behaviour_without_sinks"]),
        behaviour_with_sinks=Behaviour(**content["behaviour_with_sinks"]),
    )


def check_fits(sae: SAE, model: LanguageModel) -> None:
    """Raise `InputError` unless the SAE's site and width are the model's."""
    check_sites(model, [Site.parse(sae.config.site), Site.parse(sae.config.output_site)])
    if sae.config.d_model != model.config.d_model:
        raise InputError(
            f"the SAE was trained on width {sae.config.d_model} ({sae.config.model}), "
            f"but {model.name} has width {model.config.d_model}: give the model it was trained on"
        )


@torch.inference_mode()
def evaluate(sae: SAE, model: LanguageModel, tokens: TokenFile, config: EvaluateConfig) -> Metrics:
    """All metrics of `sae` on the validation documents of `tokens`."""
    sentences = _validation_sentences(tokens, config)
    without, every = ReconstructionSums(sae), ReconstructionSums(sae)
    losses = LossSums(sae, model)
    loss_sentences = _first_sentences(tokens, sentences, config.loss_tokens)
    total = int(tokens.lengths[sentences].sum())
    with Progress("evaluate", total, "token") as progress:
        for measured, part in ((True, loss_sentences), (False, sentences[len(loss_sentences) :])):
            for batch in length_batches(tokens, part, batch_tokens=1024):
                rows, wanted = losses.add(batch) if measured else losses.rows_at_sites(batch)
                code = sae.encode(rows)
                sink = sae.is_sink(rows)
                every.add(rows, code, wanted)
                without.add(rows[~sink], SparseCode(*(field[~sink] for field in code)), wanted[~sink])
                progress.advance(int(batch.lengths.sum()))
    return Metrics(
        without_sinks=without.result(),
        with_sinks=every.result(),
        behaviour_without_sinks=losses.result(sparing_sinks=True),
        behaviour_with_sinks=losses.result(sparing_sinks=False),
    )


def _validation_sentences(tokens: TokenFile, config: EvaluateConfig) -> np.ndarray:
    held_out = tokens.validation.nonzero().squeeze(1).numpy()
    if len(held_out) == 0:
        raise InputError("the token file has no validation documents: tokenize with --validation-fraction above 0")
    return _first_sentences(tokens, random_stream(config.seed).permutation(held_out), config.max_tokens)


def _first_sentences(tokens: TokenFile, sentences: np.ndarray, max_tokens: int) -> np.ndarray:
    return sentences[: max(1, int((tokens.lengths[sentences].cumsum(0) <= max_tokens).sum()))]


class ReconstructionSums:
    """Running sums behind `Reconstruction`."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.raw, self.normalized = VarianceSums(sae.config.d_model), VarianceSums(sae.config.d_model)
        self.fired = torch.zeros(sae.config.n_latents, dtype=torch.int64)
        self.cosine = 0.0

    def add(
        self, rows: Float[Tensor, "row d_model"], code: SparseCode, wanted: Float[Tensor, "row d_model"] | None = None
    ) -> None:
        """`wanted`: what is to be reconstructed from `rows`; None: themselves."""
        if len(rows) == 0:
            return
        wanted = (rows if wanted is None else wanted).float()
        reconstruction = self.sae.decode(code, rows)
        self.raw.add(wanted, reconstruction - wanted)
        scale = code.scale.clamp(min=EPSILON)
        self.normalized.add((wanted - code.center) / scale, (reconstruction - wanted) / scale)
        self.cosine += torch.cosine_similarity(wanted, reconstruction).double().sum().item()
        self.fired += torch.bincount(code.indices[code.values > 0].long(), minlength=len(self.fired))

    def result(self) -> Reconstruction:
        n = self.raw.moments.count
        if n == 0:
            raise InputError("no row is left to evaluate: every held-out row is an attention sink")
        frequency = self.fired.double() / n
        return Reconstruction(
            rows=n,
            fvu=self.raw.fvu,
            explained_variance=1 - self.raw.fvu,
            fvu_normalized=self.normalized.fvu,
            cosine=self.cosine / n,
            l0=frequency.sum().item(),
            dead=(self.fired == 0).double().mean().item(),
            dense_1_percent=(frequency > 0.01).double().mean().item(),
            dense_10_percent=(frequency > 0.1).double().mean().item(),
        )


class VarianceSums:
    """Total variance of rows about their mean, and total squared error, both exact over all rows seen."""

    def __init__(self, width: int) -> None:
        self.moments = Moments.of(torch.zeros(0, width))
        self.error = 0.0

    def add(self, rows: Tensor, error: Tensor) -> None:
        self.moments = self.moments.merge(Moments.of(rows))
        self.error += error.double().square().sum().item()

    @property
    def fvu(self) -> float:
        return self.error / self.moments.deviations if self.moments.deviations > 0 else float("nan")


class LossSums:
    """Cross-entropies of the model with the rows at the SAE's site left, reconstructed, or set to zero."""

    VARIANTS = ("original", "reconstructed", "zero", "reconstructed_sparing", "zero_sparing")

    def __init__(self, sae: SAE, model: LanguageModel) -> None:
        self.sae, self.model = sae, model
        self.site, self.output_site = Site.parse(sae.config.site), Site.parse(sae.config.output_site)
        self.every: dict[str, float] = dict.fromkeys(self.VARIANTS, 0.0)
        self.sparing: dict[str, float] = dict.fromkeys(self.VARIANTS, 0.0)
        self.n_every = self.n_sparing = 0

    def rows_at_sites(self, batch: PackedBatch) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """The rows at the SAE's site, and those that it is to reconstruct."""
        return self._read(self._before_site(batch), batch)

    def add(self, batch: PackedBatch) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """Measure every variant on `batch`, and give its rows as `rows_at_sites` does."""
        before = self._before_site(batch)
        rows, wanted = self._read(before, batch)
        sink = self.sae.is_sink(rows)
        reconstruction = self.sae(rows).to(rows.dtype)
        predicts = torch.ones(len(rows), dtype=torch.bool)
        predicts[batch.lengths.cumsum(0) - 1] = False  # nothing follows the last token of a sentence
        counted = ~sink[predicts]
        replacements = {
            "original": wanted,
            "reconstructed": reconstruction,
            "zero": torch.zeros_like(wanted),
            "reconstructed_sparing": torch.where(sink[:, None], wanted, reconstruction),
            "zero_sparing": torch.where(sink[:, None], wanted, 0.0),
        }
        for name, replacement in replacements.items():
            loss = self._loss(before, replacement, batch, predicts).double()
            self.every[name] += loss.sum().item()
            self.sparing[name] += loss[counted].sum().item()
        self.n_every += int(predicts.sum())
        self.n_sparing += int(counted.sum())
        return rows, wanted

    @property
    def _first_layer(self) -> int:
        return min(self.site.layer, self.output_site.layer)

    def _before_site(self, batch: PackedBatch) -> Float[Tensor, "1 token d_model"]:
        return self.model.run_layers(self.model.embed(batch.ids), end=self._first_layer, lengths=batch.lengths)

    def _read(self, before: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        taps, last = Taps(reads={self.site, self.output_site}), max(self.site.layer, self.output_site.layer)
        self.model.run_layers(before, start=self._first_layer, end=last + 1, taps=taps, lengths=batch.lengths)
        return taps.values[self.site][0], taps.values[self.output_site][0]

    def _loss(self, before: Tensor, rows: Tensor, batch: PackedBatch, predicts: Tensor) -> Float[Tensor, " prediction"]:
        """The cross-entropy of every next token, with `rows` in place of those at the output site."""
        taps = Taps(edits={self.output_site: lambda *_: rows[None]})
        hidden = self.model.run_layers(before, start=self._first_layer, taps=taps, lengths=batch.lengths)
        logits = self.model.unembed(hidden[:, predicts])[0]
        targets = batch.ids[0, 1:][predicts[:-1]]
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def result(self, sparing_sinks: bool) -> Behaviour:
        sums, n = (self.sparing, self.n_sparing) if sparing_sinks else (self.every, self.n_every)
        if n == 0:
            raise InputError("no held-out sentence has two tokens, so nothing is predicted: give more text")
        suffix = "_sparing" if sparing_sinks else ""
        original, zero = sums["original"] / n, sums["zero" + suffix] / n
        reconstructed = sums["reconstructed" + suffix] / n
        return Behaviour(n, original, reconstructed, zero, loss_recovered(original, reconstructed, zero))


def loss_recovered(original: float, reconstructed: float, ablated: float) -> float:
    """The share of the damage done by ablation that the reconstruction avoids; 1 is perfect, NaN if there was none."""
    return (ablated - reconstructed) / (ablated - original) if ablated != original else float("nan")


def summary(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Rows (name, without sinks, with sinks) for people."""
    a, b = asdict(metrics.without_sinks), asdict(metrics.with_sinks)
    a |= asdict(metrics.behaviour_without_sinks)
    b |= asdict(metrics.behaviour_with_sinks)
    shown = {
        "FVU": ("fvu", ".3f"), "explained variance": ("explained_variance", ".3f"),
        "FVU of normalised rows": ("fvu_normalized", ".3f"), "L0": ("l0", ".1f"), "dead latents": ("dead", ".2%"),
        "dense latents (> 1%)": ("dense_1_percent", ".2%"), "dense latents (> 10%)": ("dense_10_percent", ".2%"),
        "cross-entropy, original": ("original", ".3f"), "cross-entropy, reconstructed": ("reconstructed", ".3f"),
        "cross-entropy, zero-ablated": ("zero_ablated", ".3f"), "loss recovered": ("loss_recovered", ".3f"),
        "rows": ("rows", ",d"),
    }  # fmt: skip
    return [(title, format(a[name], how), format(b[name], how)) for title, (name, how) in shown.items()]


def run_and_print(config: EvaluateConfig) -> None:
    """What the command does: make the metrics and show them as a table."""
    from rich.console import Console
    from rich.table import Table

    run(config)
    table = Table("metric", "without sinks", "with sinks", title=str(config.out / METRICS))
    for row in summary(load_metrics(config.out)):
        table.add_row(*row)
    Console().print(table)
