"""`probe.png`: AUROC against the number of latents, and beside it the latents, or the classes if there are several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monosemy.artifact import atomic
from monosemy.sae.probe_result import MACRO_MEAN, ProbeResult, ProbeRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHOSEN, AGAINST, DENSE, RANDOM, LENGTH = "#1f5fa8", "#8a5a9e", "#d9861a", "#858b94", "#3f8f6b"
FAINT, QUIET = "#c4c8ce", "#6a7078"
STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a8",
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 10, "xtick.color": "#3c4148",
    "ytick.color": "#3c4148", "axes.labelcolor": "#3c4148", "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
UNITS = ("sentences", "documents")
LONGEST_NAME = 28
"""Characters of a class's name that are shown."""


def draw(result: ProbeResult, path: Path) -> None:
    """Draw `result` to the PNG file `path`; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    target = result.targets[-1]
    several = target == MACRO_MEAN
    n_lines = len(result.classes) if several else len(result.of(target, "latents")[-1].latents)
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10.4, max(4.6, 1.7 + 0.27 * n_lines)), width_ratios=(1.25, 1), layout="constrained"
        )
        draw_auroc(left, result, target)
        if several:
            draw_classes(right, result)
        else:
            draw_latents(right, result, target)
        figure.suptitle(_title(result), x=0.012, ha="left", fontsize=12.5, fontweight="bold")
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        pyplot.close(figure)


def _title(result: ProbeResult) -> str:
    names = [shortened(each.name) for each in result.classes]
    if len(names) > 2:
        return f"{result.label}: {len(names)} classes, each against the rest"
    return f"{names[1]} or {names[0]}?" if result.label in names[0] else f"{result.label}: {names[1]} or {names[0]}?"


def shortened(name: str) -> str:
    """`name`, or as much of it as there is room for."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def draw_auroc(axes: Axes, result: ProbeResult, target: str) -> None:
    """AUROC against k: the chosen latents, random ones, and what does without latents as lines across."""
    from matplotlib.patheffects import withStroke

    chosen, random = result.of(target, "latents"), result.of(target, "random latents")
    (dense,), (length,) = result.of(target, "activations"), result.of(target, "sentence length")
    every = [*chosen, *result.of(target, "all latents")]
    axes.axhline(0.5, color=FAINT, linewidth=1, zorder=0)
    axes.axhspan(dense.auroc.low, dense.auroc.high, color=DENSE, alpha=0.09, linewidth=0)
    _line(axes, every, CHOSEN, -0.04, marker="o", linewidth=2.2, markersize=6, label="chosen latents")
    _line(axes, random, RANDOM, 0.04, marker="s", linewidth=1.5, markersize=4.5, linestyle="--", label="random latents")
    axes.axhline(dense.auroc.value, color=DENSE, linewidth=1.8, label=f"activations, all {dense.k:,} dimensions")
    axes.axhline(length.auroc.value, color=LENGTH, linewidth=1.3, linestyle=":", label="sentence length")
    for place, row in enumerate(every):
        text = axes.annotate(
            f"{row.auroc.value:.2f}", (place - 0.04, row.auroc.value), (-7, 5), textcoords="offset points",
            ha="right", color=CHOSEN, fontsize=9.5, fontweight="bold", zorder=4,
        )  # fmt: skip
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_xticks(range(len(every)), [*(str(row.k) for row in chosen), f"all {every[-1].k:,}"])
    axes.set_xlim(-0.5, len(every) - 0.7)
    sentences, documents = (sum(getattr(each, f"test_{unit}") for each in result.classes) for unit in UNITS)
    of = "mean over classes, " if target == MACRO_MEAN else ""
    axes.set_xlabel(
        f"latents that the probe reads\n{of}{sentences:,} test sentences of {documents} documents\n"
        "bars and band: 95% of resampled documents"
    )
    axes.set_ylabel("AUROC on held-out documents")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.6)


def _line(axes: Axes, rows: Sequence[ProbeRow], color: str, shift: float, **style: Any) -> None:
    """AUROC by the number of the row, with whiskers; two lines are shifted, so that whiskers do not hide others."""
    values = [row.auroc.value for row in rows]
    # A mean of draws may lie outside of an interval of single ones.
    reach = [[max(0.0, row.auroc.value - row.auroc.low) for row in rows],
             [max(0.0, row.auroc.high - row.auroc.value) for row in rows]]  # fmt: skip
    places = [place + shift for place in range(len(rows))]
    axes.errorbar(places, values, reach, color=color, elinewidth=1.1, capsize=2.5, zorder=3, **style)


def draw_latents(axes: Axes, result: ProbeResult, target: str) -> None:
    """Coefficients of the latents that the largest sparse probe reads."""
    latents = result.of(target, "latents")[-1].latents
    coefficients = [each.coefficient for each in latents]
    axes.barh(range(len(latents)), coefficients, 0.68, color=[CHOSEN if each > 0 else AGAINST for each in coefficients])
    axes.set_yticks(range(len(latents)), [str(each.latent) for each in latents])
    axes.set_ylim(len(latents) - 0.4, -1.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color="#9aa0a8", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    reach = 1.12 * max(map(abs, coefficients))
    axes.set_xlim(-reach, reach)
    other, this = (shortened(each.name) for each in result.classes)
    axes.text(-0.03 * reach, -1, f"← {other}", color=AGAINST, ha="right", va="center")
    axes.text(0.03 * reach, -1, f"{this} →", color=CHOSEN, ha="left", va="center")
    axes.set_xlabel("log-odds per standard deviation of the latent")
    axes.set_title(f"chosen latents of k = {len(latents)}, best first", color=QUIET)


def draw_classes(axes: Axes, result: ProbeResult) -> None:
    """AUROC of every class with the fewest latents, the most, and the activations; the easiest class first."""

    def figures(name: str) -> tuple[ProbeRow, ProbeRow, ProbeRow]:
        sparse = result.of(name, "latents")
        return sparse[0], sparse[-1], result.of(name, "activations")[0]

    rows = sorted((figures(each.name) for each in result.classes), key=lambda three: -three[1].auroc.value)
    for place, (few, many, dense) in enumerate(rows):
        axes.plot([few.auroc.value, many.auroc.value], [place, place], color=CHOSEN, alpha=0.35, linewidth=2, zorder=1)
        axes.plot(dense.auroc.value, place, "|", color=DENSE, markersize=13, markeredgewidth=2.4, zorder=2)
        axes.plot(few.auroc.value, place, "o", markerfacecolor="white", color=CHOSEN, markersize=6, zorder=3)
        axes.plot(many.auroc.value, place, "o", color=CHOSEN, markersize=6.5, zorder=3)
    axes.axvline(0.5, color=FAINT, linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [shortened(few.target) for few, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#eceef1")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"AUROC   ○ k = {rows[0][0].k}   ● k = {rows[0][1].k}   | activations")
    axes.set_title("by class, easiest first", color=QUIET)
