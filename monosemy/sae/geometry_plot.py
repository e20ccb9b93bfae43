"""The picture of a geometry: how close nearest neighbours lie within and across SAEs, and how large families are.

Chance, random directions of the same shapes, is grey. In many dimensions its largest cosines lie close together, so its
histogram is high and narrow: it is cut off where it would press the others flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from monosemy.artifact import atomic
from monosemy.sae.geometry_figures import NEAR_DUPLICATE, Descent, Geometry, Pair, Within
from monosemy.sae.neighbours import N_BINS, MaxCosines

BLUE, PALE_BLUE, ORANGE, GREY, TEXT = "#2166ac", "#92c5de", "#d6604d", "#c9ccd1", "#3b3f46"

LONGEST_BARS = 10
"""Family sizes that have a bar of their own at most; larger ones share the last."""


def write_plot(path: Path, geometry: Geometry) -> None:
    """Draw `geometry` to the PNG file `path`. Equal figures give equal bytes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = _panels(geometry)
    n_columns = min(len(panels), 3 if len(panels) != 4 else 2)
    n_rows = -(-len(panels) // n_columns)
    settings: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": TEXT,
        "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "axes.titlepad": 20,
        "axes.titlelocation": "left", "axes.titlesize": 10, "axes.titleweight": "bold",
    }  # fmt: skip
    with pyplot.rc_context(settings):
        size = (4.6 * n_columns, 3.2 * n_rows)
        figure, grid = pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # pyright: ignore
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, draw in zip(grid.flat, panels, strict=False):
            draw(axes)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    pyplot.close(figure)


def _panels(geometry: Geometry) -> list[Callable[[Any], None]]:
    """What draws each part, in reading order."""
    pairs = [partial(_draw_pair, pair=pair, threshold=geometry.threshold) for pair in geometry.pairs]
    descents = [pair.descent for pair in geometry.pairs if pair.descent is not None]
    return [
        *(partial(_draw_within, number=number, within=within) for number, within in enumerate(geometry.saes)),
        *pairs,
        *(partial(_draw_families, descent=descent) for descent in descents),
    ]


def _draw_within(axes: Any, number: int, within: Within) -> None:
    axes.set_title(f"Within SAE {number}: {within.latents - (within.dead or 0):,} latents")
    _draw_histograms(axes, [("decoder", within.decoder), ("encoder", within.encoder)], [within.chance], NEAR_DUPLICATE)
    axes.set(xlabel="largest cosine with another latent", ylabel="share of latents")


def _draw_pair(axes: Any, pair: Pair, threshold: float) -> None:
    first, second = pair.first, pair.second
    axes.set_title(f"Between SAE {first} and SAE {second}")
    found, chance = pair.found, pair.chance
    shown = [(f"{first} in {second}", found.forward), (f"{second} in {first}", found.backward)]
    _draw_histograms(axes, shown, [chance.forward, chance.backward], threshold)
    axes.set(xlabel="largest cosine with a latent of the other", ylabel="share of latents")


def _draw_histograms(
    axes: Any, shown: Sequence[tuple[str, MaxCosines]], chance: Sequence[MaxCosines], threshold: float
) -> None:
    """Each of `shown` as a line, `chance` as a grey area, and the threshold with the share beyond it."""
    from matplotlib.ticker import MaxNLocator

    edges = np.linspace(-1, 1, N_BINS + 1)
    for number, of in enumerate(chance):
        axes.stairs(_shares(of), edges, fill=True, color=GREY, alpha=0.75, label="" if number else "chance")
    for (name, of), colour in zip(shown, (BLUE, ORANGE), strict=True):
        filled = np.flatnonzero(of.histogram)
        bins = slice(filled[0], filled[-1] + 1)
        shares, own_edges = _shares(of)[bins], edges[bins.start : bins.stop + 1]
        axes.stairs(shares, own_edges, color=colour, fill=True, alpha=0.13)
        axes.stairs(
            shares, own_edges, color=colour, linewidth=1.6, label=f"{name}: {of.share_above:.1%} ≥ {threshold:g}"
        )
    axes.axvline(threshold, color=TEXT, linewidth=0.9, linestyle=(0, (4, 3)))
    every = np.sum([of.histogram for of in [*chance, *(of for _, of in shown)]], axis=0)
    top = 1.15 * max(_shares(of).max() for _, of in shown)
    axes.set(xlim=(min(0.0, edges[np.flatnonzero(every)[0]]), 1.005), ylim=(0, min(top, 1.05)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _add_legend(axes, 3)


def _add_legend(axes: Any, n_columns: int, **settings: Any) -> None:
    """Between the title and the drawing, where it hides nothing."""
    legend = axes.legend(
        frameon=False, fontsize=7.5, ncols=n_columns, loc="lower left", bbox_to_anchor=(-0.02, 0.99), borderaxespad=0,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.2, **settings,
    )  # fmt: skip
    legend.set_in_layout(False)  # a long one may reach beyond the axes, but is not to make them narrower


def _shares(of: MaxCosines) -> np.ndarray:
    return np.array(of.histogram) / of.latents


def _draw_families(axes: Any, descent: Descent) -> None:
    """How many narrow latents have 0, 1, 2, ... children, coloured by what became of them."""
    from matplotlib.patches import Patch

    narrow, wide, found = descent.narrow, descent.wide, descent.found
    axes.set_title(f"From SAE {narrow} to SAE {wide}: {found.new_share:.1%} of SAE {wide} is new")
    longest = max(len(found.sizes), len(descent.chance.sizes))
    n_bars = min(max(longest, 4), LONGEST_BARS + 1)
    place, heights = np.arange(n_bars), _bars(found.sizes, n_bars)
    axes.bar(place + 0.2, _bars(descent.chance.sizes, n_bars), width=0.4, color=GREY)
    bars = axes.bar(place - 0.2, heights, width=0.4, color=[ORANGE, PALE_BLUE, *[BLUE] * (n_bars - 2)])
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in heights], fontsize=7, padding=1.5)
    axes.set_xticks(place, [*map(str, place[:-1]), f"{n_bars - 1}+" if longest > n_bars else str(n_bars - 1)])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 3 * max(*found.sizes, *descent.chance.sizes))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.set(xlabel=f"children in SAE {wide}", ylabel=f"latents of SAE {narrow}")
    fates = {f"lost: {found.lost:,}": ORANGE, f"kept: {found.kept:,}": PALE_BLUE, f"split: {found.split:,}": BLUE}
    _add_legend(
        axes, 4, handles=[Patch(color=colour, label=name) for name, colour in (fates | {"chance": GREY}).items()]
    )


def _bars(sizes: Sequence[int], n: int) -> list[int]:
    """How many families have 0, 1, ..., and `n` - 1 or more members."""
    padded = [*sizes, *[0] * n]
    return [*padded[: n - 1], sum(padded[n - 1 :])]
