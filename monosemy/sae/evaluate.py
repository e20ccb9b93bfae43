"""How much of the activations does an SAE explain, and how much of the model's behaviour survives it?

1. Held-out sentences go through the model up to the SAE's site; rows are reconstructed and compared.
2. On some of them the model runs on, with other rows at the site: its own, the reconstruction, zeros, and the mean row;
   the latter three once everywhere and once sparing the attention sinks.
3. On request, the same on text of another kind than the SAE was trained on: longer contexts, and chat messages.

Sums are exact over the whole set (`metrics`), docs/metrics.md has the formulas. Figures come twice, over all rows and
without sinks: see `activations.store` for what a sink is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosemy.activations.capture import PackedBatch, check_tokenizer, length_batches
from monosemy.artifact import Draft, Manifest, read_manifest, to_json, unrecorded, write_text
from monosemy.corpus import TokenFile, open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.model import LanguageModel, check_sites, resolved
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import DtypeName, InputError, Progress, random_stream
from monosemy.sae.autoencoder import SAE, SparseCode, open_sae
from monosemy.sae.metrics import (
    MOST_GROUPS,
    Behaviour,
    BehaviourSums,
    Interval,
    PositionFigures,
    PositionSums,
    Reconstruction,
    ReconstructionSums,
    with_nan,
    without_nan,
)
from monosemy.sae.texts import chat_messages, contexts

METRICS = "metrics.json"
BATCH_TOKENS = 1024
LOGIT_ROWS = 128
"""Predictions whose logits are held at once."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure an SAE on held-out text."""

    sae: Path = unrecorded()
    """SAE, made by `monosemy train` or `monosemy convert`."""
    tokens: Path = unrecorded()
    """Token file."""
    out: Path = unrecorded()
    """Folder for the metrics."""
    model: str = unrecorded("smollm2")
    """The model the SAE was trained on."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    split: Literal["validation", "all"] = "validation"
    """Which documents: those held out, or all, for text that the SAE was not trained on anyway."""
    max_tokens: int = 50_000
    """Tokens to reconstruct, at most."""
    loss_tokens: int = 8192
    """Of these, tokens on which the model's cross-entropies are measured, at most."""
    context_lengths: tuple[int, ...] = ()
    """Measure again on contexts of exactly so many tokens, cut from whole documents; for example 64 256 1024."""
    chat: bool = False
    """Measure again on the sentences as a user's messages, in the model's chat template."""
    seed: int = 0
    """Seed of the choice of sentences, and of the intervals."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "loss_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if any(length < 2 for length in self.context_lengths):
            raise InputError(f"context_lengths are {self.context_lengths}; expected at least 2 tokens each")


class Beyond(NamedTuple):
    """Text of another kind, without sinks."""

    name: str
    """For example `context of 256` or `chat`."""
    reconstruction: Reconstruction
    behaviour: Behaviour


@dataclass(frozen=True)
class Metrics:
    """What `metrics.json` holds."""

    without_sinks: Reconstruction
    with_sinks: Reconstruction
    behaviour_without_sinks: Behaviour
    """Sinks keep their own activation; predictions made at sinks are not counted."""
    behaviour_with_sinks: Behaviour
    by_position: list[PositionFigures]
    """Without sinks."""
    beyond: list[Beyond]


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
        write_text(draft.path / METRICS, to_json(without_nan(metrics)))
        return draft.commit({"tokens": metrics.with_sinks.rows})


def load_metrics(path: Path) -> Metrics:
    """The metrics in the artifact folder `path`."""
    read_manifest(path, "metrics")
    content = with_nan(json.loads((path / METRICS).read_text(encoding="utf-8")))
    return Metrics(
        without_sinks=Reconstruction(**content["without_sinks"]),
        with_sinks=Reconstruction(**content["with_sinks"]),
        behaviour_without_sinks=Behaviour(**content["behaviour_without_sinks"]),
        behaviour_with_sinks=Behaviour(**content["behaviour_with_sinks"]),
        by_position=[PositionFigures(*figures) for figures in content["by_position"]],
        beyond=[Beyond(name, Reconstruction(**found), Behaviour(**of)) for name, found, of in content["beyond"]],
    )


def check_fits(sae: SAE, model: LanguageModel) -> None:
    """Raise `InputError` unless the SAE's site and width are the model's."""
    check_sites(model, [Site.parse(sae.config.site), Site.parse(sae.config.output_site)])
    if sae.config.d_model != model.config.d_model:
        raise InputError(
            f"the SAE was trained on width {sae.config.d_model} ({sae.config.model}), "
            f"but {model.name} has width {model.config.d_model}: give the model it was trained on"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(sae: SAE, model: LanguageModel, tokens: TokenFile, config: EvaluateConfig) -> Metrics:
    """All metrics of `sae` on the chosen documents of `tokens`."""
    sentences = choose_sentences(tokens, config)
    found = measure(sae, model, tokens, sentences, config, "evaluate")
    beyond = []
    for name, other in _other_texts(tokens, model, sentences, config):
        order = _first_sentences(other, np.arange(other.n_sentences), config.max_tokens)
        of = measure(sae, model, other, order, config, f"evaluate, {name}")
        beyond.append(Beyond(name, of.without_sinks, of.behaviour_without_sinks))
    return replace(found, beyond=beyond)


def measure(
    sae: SAE, model: LanguageModel, tokens: TokenFile, sentences: np.ndarray, config: EvaluateConfig, title: str
) -> Metrics:
    """The metrics of `sae` on `sentences` of `tokens`, of which the first are for the cross-entropies."""
    documents, number = np.unique(tokens.document.numpy()[sentences], return_inverse=True)
    n_groups = min(len(documents), MOST_GROUPS)
    group_of = dict(zip(sentences.tolist(), (number % n_groups).tolist(), strict=True))
    without, every = (ReconstructionSums(sae, n_groups, config.seed) for _ in range(2))
    losses_without, losses = (BehaviourSums(n_groups, config.seed) for _ in range(2))
    positions, patched = PositionSums(sae), PatchedModel(sae, model)
    measured = _first_sentences(tokens, sentences, config.loss_tokens)

    def add(batch: PackedBatch, rows: Tensor, wanted: Tensor) -> Tensor:
        """Count the rows of a batch; returns the group of each."""
        code, sink, lengths = sae.encode(rows), sae.is_sink(rows), batch.lengths
        group = torch.repeat_interleave(torch.tensor([group_of[int(n)] for n in batch.sentences]), lengths)
        position = torch.cat([torch.arange(int(length)) for length in lengths])
        every.add(rows, code, wanted, group)
        spared = SparseCode(*(part[~sink] for part in code))
        without.add(rows[~sink], spared, wanted[~sink], group[~sink])
        positions.add(rows[~sink], spared, wanted[~sink], position[~sink])
        return group

    with Progress(title, int(tokens.lengths[sentences].sum()), "token") as progress:
        for batch in length_batches(tokens, sentences[len(measured) :], BATCH_TOKENS):
            add(batch, *patched.rows_at_sites(batch))
            progress.advance(int(batch.lengths.sum()))
        mean = _mean_row(without, patched, tokens, measured)
        for batch in length_batches(tokens, measured, BATCH_TOKENS):
            rows, wanted, runs = patched.run(batch, mean)
            group = add(batch, rows, wanted)[runs.predicts]
            losses.add(runs.losses, runs.divergences, group)
            kept = ~sae.is_sink(rows)[runs.predicts]
            spared, of = ({name: part[kept] for name, part in found.items()} for found in runs.sparing)
            losses_without.add(spared, of, group[kept])
            progress.advance(int(batch.lengths.sum()))
    return Metrics(
        without_sinks=without.result(),
        with_sinks=every.result(),
        behaviour_without_sinks=losses_without.result(),
        behaviour_with_sinks=losses.result(),
        by_position=positions.result(),
        beyond=[],
    )


def _mean_row(
    without: ReconstructionSums, patched: PatchedModel, tokens: TokenFile, measured: np.ndarray
) -> Float[Tensor, " d_model"]:
    """The mean of what is reconstructed, sinks left out: of the rows seen so far, or else of those to come."""
    sums = without.raw
    total, n = sums.total.sum(dim=0), sums.sums[:, 0].sum()
    if n == 0:
        for batch in length_batches(tokens, measured, BATCH_TOKENS):
            rows, wanted = patched.rows_at_sites(batch)
            kept = wanted[~patched.sae.is_sink(rows)].double()
            total, n = total + kept.sum(dim=0), n + len(kept)
    return (total / n.clamp(min=1)).float()


def choose_sentences(tokens: TokenFile, config: EvaluateConfig) -> np.ndarray:
    """Sentences to measure, in a random order. Raises `InputError` if there are none."""
    chosen = np.arange(tokens.n_sentences)
    if config.split == "validation":
        chosen = tokens.validation.nonzero().squeeze(1).numpy()
    if len(chosen) == 0:
        raise InputError(
            "the token file has no validation documents: tokenize with --validation-fraction above 0, or give --split "
            "all if the SAE was trained on other text"
        )
    return _first_sentences(tokens, random_stream(config.seed).permutation(chosen), config.max_tokens)


def _first_sentences(tokens: TokenFile, sentences: np.ndarray, max_tokens: int) -> np.ndarray:
    return sentences[: max(1, int((tokens.lengths[sentences].cumsum(0) <= max_tokens).sum()))]


# ---------------------------------------------------------------------------------------------------------------------
# Text of another kind
# ---------------------------------------------------------------------------------------------------------------------


def _other_texts(
    tokens: TokenFile, model: LanguageModel, sentences: np.ndarray, config: EvaluateConfig
) -> Iterator[tuple[str, TokenFile]]:
    """Names of the texts that were asked for, and the texts."""
    most = model.config.context_length
    for length in config.context_lengths:
        if length > most:
            raise InputError(f"context_lengths holds {length}; {model.name} reads at most {most} tokens")
        yield f"context of {length:,}", contexts(tokens, length, config.split, config.seed)
    if config.chat:
        yield "chat", chat_messages(tokens, model, sentences)


# ---------------------------------------------------------------------------------------------------------------------
# The model with other rows
# ---------------------------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Predictions of one batch, with everything replaced, and sparing the sinks."""

    predicts: Bool[Tensor, " row"]
    """Rows that a token follows."""
    losses: dict[str, Float[Tensor, " prediction"]]
    """Cross-entropies by what is at the site: `original`, `reconstructed`, `zero`, `mean`."""
    divergences: dict[str, Float[Tensor, " prediction"]]
    """KL divergences from the original prediction, of `reconstructed` and `zero`."""
    sparing: tuple[dict[str, Tensor], dict[str, Tensor]]
    """Both, where sinks keep their own row."""


class PatchedModel:
    """The model, with its rows at the SAE's site left, reconstructed, or replaced by a constant."""

    def __init__(self, sae: SAE, model: LanguageModel) -> None:
        self.sae, self.model = sae, model
        self.site, self.output_site = Site.parse(sae.config.site), Site.parse(sae.config.output_site)

    def rows_at_sites(self, batch: PackedBatch) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """The rows at the SAE's site, and those that it is to reconstruct."""
        return self._read(self._before_site(batch), batch)

    def run(
        self, batch: PackedBatch, mean: Float[Tensor, " d_model"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"], Runs]:
        """The rows as `rows_at_sites` gives them, and what the model predicts with each replacement."""
        before = self._before_site(batch)
        rows, wanted = self._read(before, batch)
        sink = self.sae.is_sink(rows)
        replacements = {
            "reconstructed": self.sae(rows).to(wanted.dtype),
            "zero": torch.zeros_like(wanted),
            "mean": mean.to(wanted.dtype).expand_as(wanted),
        }
        predicts = torch.ones(len(rows), dtype=torch.bool)
        predicts[batch.lengths.cumsum(0) - 1] = False  # nothing follows the last token of a sentence
        targets = batch.ids[0, 1:][predicts[:-1]]
        hidden = {"original": self._run_on(before, wanted, batch)[predicts]}
        sparing = {"original": hidden["original"]}
        for name, replacement in replacements.items():
            hidden[name] = self._run_on(before, replacement, batch)[predicts]
            spared = torch.where(sink[:, None], wanted, replacement)
            sparing[name] = self._run_on(before, spared, batch)[predicts] if sink.any() else hidden[name]
        everywhere = self._predictions(hidden, targets)
        return (
            rows,
            wanted,
            Runs(predicts, *everywhere, self._predictions(sparing, targets) if sink.any() else everywhere),
        )

    @property
    def _first_layer(self) -> int:
        return min(self.site.layer, self.output_site.layer)

    def _before_site(self, batch: PackedBatch) -> Float[Tensor, "1 token d_model"]:
        return self.model.run_layers(self.model.embed(batch.ids), end=self._first_layer, lengths=batch.lengths)

    def _read(self, before: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        taps, last = Taps(reads={self.site, self.output_site}), max(self.site.layer, self.output_site.layer)
        self.model.run_layers(before, start=self._first_layer, end=last + 1, taps=taps, lengths=batch.lengths)
        return taps.values[self.site][0], taps.values[self.output_site][0]

    def _run_on(self, before: Tensor, rows: Tensor, batch: PackedBatch) -> Float[Tensor, "token d_model"]:
        """What leaves the last layer, with `rows` in place of those at the output site."""
        taps = Taps(edits={self.output_site: lambda *_: rows[None]})
        return self.model.run_layers(before, start=self._first_layer, taps=taps, lengths=batch.lengths)[0]

    def _predictions(
        self, hidden: dict[str, Float[Tensor, "prediction d_model"]], targets: Int[Tensor, " prediction"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cross-entropies, and KL divergences from the original, for some predictions at a time: logits of a whole
        vocabulary are large."""
        losses, divergences = ({name: [] for name in hidden} for _ in range(2))
        for start in range(0, len(targets), LOGIT_ROWS):
            part, wanted = slice(start, start + LOGIT_ROWS), targets[start : start + LOGIT_ROWS, None]
            probabilities = entropy = None
            for name, of in hidden.items():
                logits = self.model.unembed(of[None, part])[0]
                normalizer = logits.logsumexp(dim=1)
                losses[name].append(normalizer - logits.gather(1, wanted)[:, 0])
                if probabilities is None:
                    probabilities = (logits - normalizer[:, None]).exp_()
                    entropy = normalizer - torch.linalg.vecdot(probabilities, logits)
                cross_entropy = normalizer - torch.linalg.vecdot(probabilities, logits)
                divergences[name].append(cross_entropy - entropy)
        joined = [{name: torch.cat(of) for name, of in found.items()} for found in (losses, divergences)]
        return joined[0], joined[1]


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------

SHOWN = {
    "FVU": ("fvu", ".3f"), "explained variance": ("explained_variance", ".3f"),
    "FVU of normalised rows": ("fvu_normalized", ".3f"), "mean squared error": ("mse", ".4g"),
    "cosine": ("cosine", ".3f"), "norm ratio": ("norm_ratio", ".3f"),
    "relative reconstruction bias": ("relative_bias", ".3f"), "L0": ("l0", ".1f"), "dead latents": ("dead", ".2%"),
    "dense latents (> 1%)": ("dense_1_percent", ".2%"), "dense latents (> 10%)": ("dense_10_percent", ".2%"),
    "cross-entropy, original": ("original", ".3f"), "cross-entropy, reconstructed": ("reconstructed", ".3f"),
    "cross-entropy, zero-ablated": ("zero_ablated", ".3f"), "cross-entropy, mean-ablated": ("mean_ablated", ".3f"),
    "loss recovered": ("loss_recovered", ".3f"), "loss recovered, against the mean": ("loss_recovered_mean", ".3f"),
    "delta LM loss": ("delta_loss", ".3f"), "KL divergence": ("kl", ".3f"), "rows": ("rows", ",d"),
}  # fmt: skip


def summary(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Rows (name, without sinks, with sinks) for people; intervals are of 95%."""
    pairs = (
        (metrics.without_sinks, metrics.behaviour_without_sinks),
        (metrics.with_sinks, metrics.behaviour_with_sinks),
    )
    a, b = (asdict(found) | asdict(losses) for found, losses in pairs)
    bounds_a, bounds_b = (found.intervals | losses.intervals for found, losses in pairs)
    return [
        (title, _shown(a[name], bounds_a.get(name), how), _shown(b[name], bounds_b.get(name), how))
        for title, (name, how) in SHOWN.items()
    ]


def _shown(value: float, bounds: Interval | None, how: str) -> str:
    return format(value, how) if bounds is None else f"{value:{how}} ({bounds[0]:{how}} to {bounds[1]:{how}})"


def run_and_print(config: EvaluateConfig) -> None:
    """What the command does: make the metrics and show them as tables."""
    from rich.console import Console
    from rich.table import Table

    run(config)
    metrics, console = load_metrics(config.out), Console()
    table = Table("metric", "without sinks", "with sinks", title=str(config.out / METRICS))
    for row in summary(metrics):
        table.add_row(*row)
    console.print(table)
    positions = Table("position", "rows", "FVU", "cosine", "L0", title="by position in the sentence, without sinks")
    for of in metrics.by_position:
        place = str(of.first) if of.first == of.last else f"{of.first}-{of.last}"
        positions.add_row(place, f"{of.rows:,}", f"{of.fvu:.3f}", f"{of.cosine:.3f}", f"{of.l0:.1f}")
    console.print(positions)
    if metrics.beyond:
        columns = ("text", "rows", "FVU", "L0", "loss recovered", "delta LM loss")
        beyond, first = Table(*columns, title="text of another kind, without sinks"), metrics
        as_trained = Beyond("sentences", first.without_sinks, first.behaviour_without_sinks)
        for name, of, losses in [as_trained, *metrics.beyond]:
            figures = (f"{of.rows:,}", f"{of.fvu:.3f}", f"{of.l0:.1f}", f"{losses.loss_recovered:.3f}")
            beyond.add_row(name, *figures, f"{losses.delta_loss:.3f}")
        console.print(beyond)
