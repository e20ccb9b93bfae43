"""What a run found, on one self-contained HTML page: no script, no network, plots as inline SVG.

Every part of the page is made from an artifact of the run that is there; a part whose artifact is missing is left out.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from monosemy.artifact import MANIFEST, read_manifest, unrecorded, write_text
from monosemy.corpus import open_tokens
from monosemy.explain.dose import Choice, Dose, load_choice
from monosemy.latents.labels import Label, open_labels
from monosemy.latents.record import Example, Index, open_index
from monosemy.runtime import InputError, count, require
from monosemy.sae.activity import read_intervals
from monosemy.sae.autoencoder import open_sae
from monosemy.sae.evaluate import load_metrics, summary
from monosemy.sae.settings import dead_after
from monosemy.sae.tracking import read_history

THEME = "talk of "
"""How the local explainer begins the label of a latent that follows a topic."""

EXCERPT_TOKENS = 28
"""Tokens shown around the place where a latent fires most."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a run."""

    run: Path = unrecorded()
    """Folder of the run."""
    out: Path = unrecorded()
    """The page to write."""
    n_latents: int = 24
    """Latents to show: certain labels that are themes or lists."""
    n_examples: int = 5
    """Sentences per latent."""


def run(config: ReportConfig) -> None:
    """Write the page."""
    require("matplotlib", "report")
    if not config.run.is_dir():
        raise InputError(f"{config.run} is not a folder; expected a run, made by `monosemy run`")
    source = (files("monosemy") / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    write_text(config.out, environment.from_string(source).render(page=_page(config)))


class ShownToken(NamedTuple):
    """A token of an example, and how strongly the latent fires on it, 0 to 100."""

    piece: str
    percent: int


class ShownLatent(NamedTuple):
    """A latent on the page."""

    latent: int
    label: str
    certainty: str
    density: str
    maximum: str
    promoted: str
    examples: list[list[ShownToken]]


class Page(NamedTuple):
    """What the template shows; an empty list, text or None leaves a part out."""

    title: str
    summary: list[tuple[str, list[tuple[str, str]]]]
    metrics: list[tuple[str, str, str]]
    training_plot: str
    density_plot: str
    dose_plot: str
    choice: Choice | None
    latents: list[ShownLatent]
    settings: list[tuple[str, str]]


def _page(config: ReportConfig) -> Page:
    folder = config.run
    choice = load_choice(folder / "dose") if _has(folder, "dose") else None
    return Page(
        title=_title(folder),
        summary=summary_rows(folder),
        metrics=summary(load_metrics(folder / "metrics")) if _has(folder, "metrics") else [],
        training_plot=training_plot(folder / "sae") if _has(folder, "sae") else "",
        density_plot=density_plot(open_index(folder / "index")) if _has(folder, "index") else "",
        dose_plot=dose_plot(choice) if choice else "",
        choice=choice,
        latents=_shown_latents(config) if _has(folder, "index") and _has(folder, "labels") else [],
        settings=_settings(folder),
    )


def _has(folder: Path, name: str) -> bool:
    return (folder / name / MANIFEST).exists()


def _title(folder: Path) -> str:
    import tomllib

    copy = folder / "recipe.toml"
    recipe = tomllib.loads(copy.read_text(encoding="utf-8")) if copy.exists() else {}
    return recipe.get("title", f"Run {folder.name}")


def summary_rows(folder: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the run in `folder` found, as (section, rows of (name, value)); the terminal shows the same."""
    sections = []
    if _has(folder, "tokens"):
        tokens = open_tokens(folder / "tokens")
        rows = tokens.manifest.rows
        held_out = f"{rows['validation_documents']} documents, {count(rows['validation_tokens'])} tokens"
        text = f"{rows['documents']} documents, {rows['sentences']:,} sentences, {rows['tokens']:,} tokens"
        sections.append(("text", [("read", text), ("held out", held_out)]))
    if _has(folder, "sae"):
        sae = open_sae(folder / "sae").config
        trained = read_manifest(folder / "sae", "sae").rows["tokens"]
        text = f"{sae.n_latents:,} latents, k = {sae.k}, at {sae.site} of {sae.model}"
        sections.append(("SAE", [("shape", text), ("trained on", f"{count(trained)} tokens")]))
    if _has(folder, "metrics"):
        metrics = load_metrics(folder / "metrics")
        kept = ("FVU", "L0", "dead latents", "loss recovered")
        shown = [(name, f"{a}  (with sinks {b})") for name, a, b in summary(metrics) if name in kept]
        sections.append(("held-out text, without sinks", shown))
    if _has(folder, "labels"):
        labels = [label for label in open_labels(folder / "labels") if label.label]
        certain = sum(label.certainty >= 0.5 for label in labels)
        best = ", ".join(f"{x.latent} {x.label}" for x in best_labels(labels, 3))
        sections.append(
            ("labels", [("named", f"{len(labels):,}, {certain:,} with certainty ≥ 0.5"), ("such as", best)])
        )
    if _has(folder, "dose"):
        sections.append(("steering", steering_rows(load_choice(folder / "dose"))))
    return sections


def steering_rows(choice: Choice) -> list[tuple[str, str]]:
    dose = choice.chosen
    effect = (
        f"{dose.effect:.0%} of texts name it, plain {dose.plain_effect:.0%}; "
        f"cross-entropy {dose.loss_rise:+.2f} nats{'' if choice.fluent else ' (no dose was fluent)'}"
    )
    example = next((each for each in choice.examples if each.mentions), choice.examples[0])
    rows = [("latent", f"{dose.latent}={dose.strength:+.1f}  {dose.label}"), ("effect", effect)]
    return [
        *rows,
        ("plain", _one_line(example.prompt + example.plain)),
        ("steered", _one_line(example.prompt + example.steered)),
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def best_labels(labels: list[Label], n: int) -> list[Label]:
    """The `n` labels most like a concept: certain, and themes or lists rather than one word. No text twice."""

    def rank(label: Label) -> tuple[float, int]:
        breadth = 3 if label.label.startswith(THEME) else min(len(label.evidence["items"]), 3)
        return -label.certainty * breadth, label.latent

    chosen: dict[str, Label] = {}
    for label in sorted((label for label in labels if label.label), key=rank):
        chosen.setdefault(label.label.lower(), label)
    return list(chosen.values())[:n]


def _shown_latents(config: ReportConfig) -> list[ShownLatent]:
    index = open_index(config.run / "index")
    shown = []
    for label in best_labels(open_labels(config.run / "labels"), config.n_latents):
        record = index.latent(label.latent)
        promoted = [effect.piece.strip() for effect in index.logits(label.latent).promoted]
        shown.append(
            ShownLatent(
                latent=label.latent,
                label=label.label,
                certainty=f"{label.certainty:.2f}",
                density=f"{record.density:.3%}",
                maximum=f"{record.max:.1f}",
                promoted=", ".join(dict.fromkeys(piece for piece in promoted if piece)),
                examples=[excerpt(x) for x in index.examples(label.latent, "max", config.n_examples)],
            )
        )
    return shown


def excerpt(example: Example) -> list[ShownToken]:
    """The tokens around the one on which the latent fires most."""
    peak = int(example.activations.argmax())
    start = max(0, min(peak - EXCERPT_TOKENS // 2, len(example.pieces) - EXCERPT_TOKENS))
    stop = start + EXCERPT_TOKENS
    percent = np.rint(100 * example.activations / max(float(example.activations.max()), 1e-9)).astype(int)
    tokens = [ShownToken(p, int(x)) for p, x in zip(example.pieces[start:stop], percent[start:stop], strict=True)]
    before = [ShownToken("…", 0)] if start > 0 else []
    return [*before, *tokens, *([ShownToken("…", 0)] if stop < len(example.pieces) else [])]


def _settings(folder: Path) -> list[tuple[str, str]]:
    rows = []
    for name in ("tokens", "activations", "sae", "metrics", "index", "labels", "dose"):
        if _has(folder, name):
            manifest = json.loads((folder / name / MANIFEST).read_text(encoding="utf-8"))
            text = ", ".join(f"{key} = {json.dumps(value)}" for key, value in manifest["config"].items())
            rows.append((name, text))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def training_plot(sae: Path) -> str:
    """FVU, and dead, revived and dense latents, against tokens, of an SAE artifact, as SVG."""
    history = [line for line in read_history(sae) if "fvu" in line]
    columns = {name: np.array([line[name] for line in history]) for name in ("tokens", "fvu", "aux_loss")}
    validations = [(line["tokens"], line["validation_fvu"]) for line in read_history(sae) if "validation_fvu" in line]
    config = read_manifest(sae, "sae").config
    intervals = read_intervals(
        sae, dead_after(config["dead_after_tokens"], config["train_tokens"], config["batch_size"])
    )
    figure, (left, right) = _figure(2)
    left.plot(columns["tokens"], columns["fvu"], color="C0", label="FVU of the batch")
    if validations:
        left.plot(*zip(*validations, strict=True), color="C2", marker="o", markersize=3, label="FVU of held-out rows")
    if columns["aux_loss"].max() > 0:
        left.plot(columns["tokens"], columns["aux_loss"], color="C1", label="auxiliary loss")
    left.set(
        xlabel="training tokens", ylabel="fraction of variance unexplained", ylim=(0, min(1, columns["fvu"].max()))
    )
    left.legend(frameon=False)
    tokens = [interval.tokens for interval in intervals]
    for name, colour in (("dead", "C3"), ("revived", "C2"), ("dense", "C4")):
        right.plot(tokens, [getattr(interval, name) for interval in intervals], color=colour, label=name)
    right.set(xlabel="training tokens", ylabel="latents", ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
    return _svg(figure)


def density_plot(index: Index) -> str:
    """Histogram of log10 density over the latents, as SVG."""
    density = index.statistics.density
    alive = density[density > 0]
    figure, (axes,) = _figure(1)
    axes.hist(np.log10(alive), bins=50, color="C0")
    axes.set(xlabel="density: share of tokens on which a latent fires (log10)", ylabel="latents")
    axes.set_title(f"{len(alive):,} of {len(density):,} latents fire", fontsize=10)
    return _svg(figure)


def dose_plot(choice: Choice) -> str:
    """Effect and loss of fluency against strength, the chosen latent in colour, as SVG."""
    figure, (left, right) = _figure(2)
    for latent in dict.fromkeys(dose.latent for dose in choice.doses):
        doses = [dose for dose in choice.doses if dose.latent == latent]
        _draw_doses(left, right, doses, chosen=latent == choice.chosen.latent)
    left.set(xlabel="strength / largest activation", ylabel="texts that name the concept", ylim=(-0.03, 1.03))
    right.set(xlabel="strength / largest activation", ylabel="cross-entropy above plain text, nats")
    return _svg(figure)


def _draw_doses(left, right, doses: list[Dose], chosen: bool) -> None:
    style = {"color": "C3" if chosen else "0.6", "zorder": 2 if chosen else 1, "marker": "o", "markersize": 3}
    fractions = [0.0, *(dose.fraction for dose in doses)]
    left.plot(fractions, [doses[0].plain_effect, *(dose.effect for dose in doses)], **style)
    right.plot(fractions, [0.0, *(dose.loss_rise for dose in doses)], **style)


def _figure(n_axes: int):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "monosemy", "font.size": 9, "axes.spines.top": False,
        "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(1, n_axes, figsize=(4.2 * n_axes, 2.8), squeeze=False, layout="constrained")
    return figure, axes[0]


def _svg(figure) -> str:
    """The figure as SVG text in the page's own text colour, without date, so that equal runs give equal pages."""
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "monosemy"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")
