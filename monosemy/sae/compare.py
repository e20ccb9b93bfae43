"""Sparsity against fidelity: a set of SAEs, ours and others', measured on the same rows.

1. All SAEs are at one site of one model, and are measured by `evaluate.measure` on the same sentences.
2. One rule says for all which rows are sinks: the largest `sink_norm` that any of them knows. Otherwise an SAE that
   never heard of sinks would be measured on other rows.
3. An SAE is on the front if no other has both as few active latents and as low an FVU.

On disk: `compare.json` and `pareto.png`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from monosemy.activations.capture import check_tokenizer
from monosemy.artifact import Draft, Manifest, atomic, read_manifest, to_json, unrecorded, write_text
from monosemy.corpus import TokenFile, open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.model import LanguageModel, resolved
from monosemy.runtime import DtypeName, InputError, require
from monosemy.sae.autoencoder import SAE
from monosemy.sae.evaluate import EvaluateConfig, check_fits, choose_sentences, measure
from monosemy.sae.foreign import fingerprint, load_sae
from monosemy.sae.metrics import Interval, with_nan, without_nan

RESULT, PLOT = "compare.json", "pareto.png"
UNKNOWN: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class CompareConfig:
    """Sparsity against fidelity of several SAEs, on the same held-out text."""

    saes: tuple[str, ...] = unrecorded()
    """SAEs of one site: folders of ours or of other libraries, files, or Hub ids, as `monosemy convert` takes them."""
    tokens: Path = unrecorded()
    """Token file."""
    out: Path = unrecorded()
    """Folder for compare.json and pareto.png."""
    model: str = unrecorded("smollm2")
    """The model they were trained on."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    split: Literal["validation", "all"] = "validation"
    """Which documents: those held out, or all, for text that no SAE was trained on."""
    max_tokens: int = 50_000
    """Tokens to reconstruct, at most."""
    loss_tokens: int = 8192
    """Of these, tokens on which the model's cross-entropies are measured, at most."""
    seed: int = 0
    """Seed of the choice of sentences, and of the intervals."""

    def __post_init__(self) -> None:
        if len(self.saes) < 2:
            raise InputError(
                f"{len(self.saes)} SAEs were given; expected two or more: `monosemy evaluate` measures one"
            )
        EvaluateConfig(sae=Path(), tokens=self.tokens, out=self.out, max_tokens=self.max_tokens,
                       loss_tokens=self.loss_tokens)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One SAE, measured without sinks; intervals are of 95%, NaN where the text is a single document."""

    name: str
    n_latents: int
    activation: str
    l0: float
    fvu: float
    fvu_interval: Interval
    loss_recovered: float
    loss_recovered_interval: Interval
    delta_loss: float
    dead: float

    def beats(self, other: Point) -> bool:
        """Whether it is at least as sparse and as faithful as `other`, and more in one of them."""
        mine, theirs = (self.l0, self.fvu), (other.l0, other.fvu)
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def run(config: CompareConfig) -> Manifest:
    """Make the artifact `config.out`. Raises `InputError` for SAEs that cannot be compared."""
    require("matplotlib", "report")
    saes = dict(zip(distinct_names(config.saes), map(load_sae, config.saes), strict=True))
    sites = {sae.config.output_site for sae in saes.values()}
    if len(sites) > 1:
        raise InputError(f"the SAEs are of {', '.join(sorted(sites))}: compare those of one site")
    tokens, model = open_tokens(config.tokens), load_model(config.model, config.dtype)
    config = resolved(config, model)
    check_tokenizer(tokens, model, config.tokens)
    for sae in saes.values():
        check_fits(sae, model)
    parents = {name: fingerprint(sae) for name, sae in saes.items()}
    parents |= {"tokens": tokens.manifest.digest, "model": model.fingerprint}
    with Draft(config.out, "compare", config, parents) as draft:
        if draft.complete:
            return read_manifest(config.out, "compare")
        points = compare(saes, model, tokens, config)
        write_text(draft.file(RESULT), to_json(without_nan(points)))
        draw(points, draft.file(PLOT))
        return draft.commit({"saes": len(points)})


def compare(saes: dict[str, SAE], model: LanguageModel, tokens: TokenFile, config: CompareConfig) -> list[Point]:
    """Every SAE on the same sentences."""
    names = ("tokens", "out", "split", "max_tokens", "loss_tokens", "seed")
    settings = EvaluateConfig(sae=Path(), **{name: getattr(config, name) for name in names})
    sentences, points = choose_sentences(tokens, settings), []
    for name, sae in with_one_rule_for_sinks(saes).items():
        found = measure(sae, model, tokens, sentences, settings, f"compare, {name}")
        of, losses = found.without_sinks, found.behaviour_without_sinks
        points.append(
            Point(
                name=name, n_latents=sae.config.n_latents, activation=sae.config.activation, l0=of.l0, fvu=of.fvu,
                fvu_interval=of.intervals.get("fvu", UNKNOWN), loss_recovered=losses.loss_recovered,
                loss_recovered_interval=losses.intervals.get("loss_recovered", UNKNOWN), delta_loss=losses.delta_loss,
                dead=of.dead,
            )
        )  # fmt: skip
    return points


def with_one_rule_for_sinks(saes: dict[str, SAE]) -> dict[str, SAE]:
    """The SAEs, all with the largest norm that any calls one of no sink; none has one if none knew."""
    norms = [sae.config.sink_norm for sae in saes.values() if sae.config.sink_norm is not None]
    rule = max(norms, default=None)
    return {name: SAE(replace(sae.config, sink_norm=rule), sae.parameters, sae.threshold) for name, sae in saes.items()}


def distinct_names(sources: tuple[str, ...]) -> list[str]:
    """As much of each path's end as tells it from the others."""
    if len(set(sources)) < len(sources):
        raise InputError(f"an SAE was given twice: {' '.join(sources)}")
    parts = [source.rstrip("/").split("/") for source in sources]
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(sources)


def front(points: list[Point]) -> list[Point]:
    """Those that no other beats, from sparse to dense."""
    return sorted((p for p in points if not any(q.beats(p) for q in points)), key=lambda point: point.l0)


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------

TEXT, GREY, COLOURS = "#3b3f46", "#b7bcc4", ("#2166ac", "#d6604d", "#1b7837", "#7b3294", "#b35806", "#01665e")


def draw(points: list[Point], path: Path) -> None:
    """L0 against FVU, and against loss recovered, one point per SAE, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": TEXT,
        "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    }  # fmt: skip
    with pyplot.rc_context(settings):
        height = 3.4 + 0.22 * len(points)
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, height), layout="constrained")
        for number, point in enumerate(points):
            colour = COLOURS[number % len(COLOURS)]
            of = ((left, point.fvu, point.fvu_interval), (right, point.loss_recovered, point.loss_recovered_interval))
            for axes, value, bounds in of:
                below, above = (
                    0.0 if math.isnan(of) else max(of, 0.0) for of in (value - bounds[0], bounds[1] - value)
                )
                label = f"{point.name}: {point.n_latents:,} latents, {point.activation}, {point.dead:.1%} dead"
                axes.errorbar(
                    point.l0, value, yerr=[[below], [above]], fmt="os^Dv<"[number // 6 % 6],
                    color=colour, markersize=6, capsize=3, elinewidth=1, label=label if axes is left else None,
                )  # fmt: skip
        best = front(points)
        left.plot([p.l0 for p in best], [p.fvu for p in best], color=GREY, zorder=0, linestyle="--")
        left.set(xlabel="L0, active latents per token", ylabel="fraction of variance unexplained")
        right.set(xlabel="L0, active latents per token", ylabel="loss recovered")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(f"{value:g}")[0] in "25" else "")
            axes.margins(0.15)
        figure.legend(loc="outside lower left", frameon=False)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    pyplot.close(figure)


def load_comparison(path: Path) -> list[Point]:
    """The points in the artifact folder `path`."""
    read_manifest(path, "compare")
    content = json.loads((path / RESULT).read_text(encoding="utf-8"))
    return [Point(**point) for point in with_nan(content)]


def run_and_print(config: CompareConfig) -> None:
    """What the command does: compare, and show a table."""
    from rich.console import Console
    from rich.table import Table

    run(config)
    points, title = load_comparison(config.out), str(config.out / PLOT)
    table = Table("SAE", "latents", "L0", "FVU", "loss recovered", "delta LM loss", "dead", "front", title=title)
    best = front(points)
    for of in sorted(points, key=lambda point: point.l0):
        figures = (
            f"{of.l0:.1f}",
            f"{of.fvu:.4f}",
            f"{of.loss_recovered:.4f}",
            f"{of.delta_loss:.4f}",
            f"{of.dead:.2%}",
        )
        table.add_row(of.name, f"{of.n_latents:,}", *figures, "yes" if of in best else "")
    Console().print(table)
