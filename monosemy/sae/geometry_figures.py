"""What the geometry of dictionaries is told in: the figures, the reader of `geometry.json`, and rows for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monosemy.artifact import read_manifest
from monosemy.sae.neighbours import Agreement, Family, MaxCosines, Splitting

GEOMETRY = "geometry.json"

NEAR_DUPLICATE = 0.9
"""A latent with a neighbour of this cosine, or of a larger one, is a near duplicate."""


@dataclass(frozen=True)
class Within:
    """How close the latents of one SAE lie to each other; the threshold is `NEAR_DUPLICATE`."""

    site: str
    """Where the decoder directions lie."""
    latents: int
    """All latents, of which"""
    dead: int | None
    """so many were dead when training ended and are left out; None: it is not recorded, and all count."""
    decoder: MaxCosines
    encoder: MaxCosines
    chance: MaxCosines
    """Of as many random directions of the same width."""


@dataclass(frozen=True)
class Descent:
    """How the latents of a wider SAE descend from those of a narrower one."""

    narrow: int
    """Number of the narrower SAE, in the order given, from 0."""
    wide: int
    found: Splitting
    chance: Splitting
    """Of random directions."""
    families: list[Family]
    """The largest families."""


@dataclass(frozen=True)
class Pair:
    """Two SAEs; thresholds are that of the config."""

    first: int
    """Number of the first SAE, in the order given, from 0."""
    second: int
    found: Agreement
    chance: Agreement
    """Of random directions."""
    descent: Descent | None
    """None where both have equally many latents."""


@dataclass(frozen=True)
class Geometry:
    """What `geometry.json` holds."""

    threshold: float
    saes: list[Within]
    pairs: list[Pair]


def load_geometry(path: Path) -> Geometry:
    """The figures in the artifact folder `path`."""
    read_manifest(path, "geometry")
    content = json.loads((path / GEOMETRY).read_text(encoding="utf-8"))
    saes = [Within(**_read(MaxCosines, within, "decoder", "encoder", "chance")) for within in content["saes"]]
    return Geometry(content["threshold"], saes, [_read_pair(pair) for pair in content["pairs"]])


def _read_pair(content: dict[str, Any]) -> Pair:
    for name in ("found", "chance"):
        content[name] = Agreement(**_read(MaxCosines, content[name], "forward", "backward"))
    if (descent := content["descent"]) is not None:
        descent["families"] = [Family(**family) for family in descent["families"]]
        content["descent"] = Descent(**_read(Splitting, descent, "found", "chance"))
    return Pair(**content)


def _read(kind: type, content: dict[str, Any], *names: str) -> dict[str, Any]:
    """`content` with the objects called `names` made into instances of `kind`."""
    return content | {name: kind(**content[name]) for name in names}


def within_summary(number: int, within: Within) -> list[tuple[str, ...]]:
    """Rows (SAE, latents, dead, directions, mean, median, near duplicates) for people."""
    dead = "not known" if within.dead is None else f"{within.dead:,}"
    rows = []
    for title in ("decoder", "encoder", "chance"):
        of: MaxCosines = getattr(within, title)
        figures = (title, f"{of.mean:.3f}", f"{of.median:.3f}", f"{of.share_above:.2%}")
        rows.append((*((str(number), f"{within.latents:,}", dead) if not rows else ("", "", "")), *figures))
    return rows


def pair_summary(pair: Pair, threshold: float) -> list[tuple[str, str, str]]:
    """Rows (figure, measured, by chance) for people."""
    a, b = pair.first, pair.second
    agreements = {
        f"mean largest cosine, {a} in {b}": lambda x: f"{x.forward.mean:.3f}",
        f"mean largest cosine, {b} in {a}": lambda x: f"{x.backward.mean:.3f}",
        f"cosine >= {threshold:g}, {a} in {b}": lambda x: f"{x.forward.share_above:.2%}",
        f"cosine >= {threshold:g}, {b} in {a}": lambda x: f"{x.backward.share_above:.2%}",
        "mutual nearest neighbours": lambda x: f"{x.mutual:,} ({x.mutual_share:.2%})",
        f"of these, cosine >= {threshold:g}": lambda x: f"{x.mutual_above:,} ({x.mutual_above_share:.2%})",
    }
    rows = [(title, tell(pair.found), tell(pair.chance)) for title, tell in agreements.items()]
    if (descent := pair.descent) is None:
        return rows
    splittings = {
        f"latents of {descent.narrow} that split": lambda x: f"{x.split:,} ({x.split_share:.2%})",
        f"latents of {descent.narrow} with one child": lambda x: f"{x.kept:,}",
        f"latents of {descent.narrow} that are lost": lambda x: f"{x.lost:,} ({x.lost_share:.2%})",
        f"latents of {descent.wide} that are new": lambda x: f"{x.new:,} ({x.new_share:.2%})",
        "children in the largest family": lambda x: f"{x.largest:,}",
    }
    return rows + [(title, tell(descent.found), tell(descent.chance)) for title, tell in splittings.items()]


def families_line(pair: Pair) -> str | None:
    """The largest families in a line, or None where nothing has split."""
    if pair.descent is None or not pair.descent.families:
        return None
    named = ", ".join(f"{family.narrow_latent} ({family.size})" for family in pair.descent.families)
    return f"largest families, latent of {pair.descent.narrow} (children): {named}"
