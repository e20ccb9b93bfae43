"""What `monosemy probe` found: `probe.json`, and its tables for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monosemy.artifact import read_manifest
from monosemy.sae.pooled import Pool
from monosemy.sae.resampled import METRICS, Interval
from monosemy.sae.sparse_probe import ChosenLatent, Features

RESULT = "probe.json"

MACRO_MEAN = "macro mean"
"""Stands for a class in rows that are means over all of them."""


@dataclass(frozen=True)
class ClassCounts:
    """How much text a class has."""

    name: str
    train_documents: int
    test_documents: int
    train_sentences: int
    test_sentences: int


@dataclass(frozen=True)
class ProbeRow:
    """What one probe scored on the test side."""

    target: str
    """The class that is told from the rest, or `MACRO_MEAN`."""
    features: Features
    k: int
    """How many features."""
    accuracy: Interval
    balanced_accuracy: Interval
    auroc: Interval
    inverse_penalty: float | None
    """Logistic regression's C."""
    latents: tuple[ChosenLatent, ...]


@dataclass(frozen=True)
class ProbeResult:
    """What `probe.json` holds."""

    label: str
    pool: Pool
    classes: tuple[ClassCounts, ...]
    left_out: tuple[str, ...]
    """Classes with too few documents."""
    documents_unlabelled: int
    sentences_of_sinks: int
    """Drawn sentences that hold nothing but attention sinks: probes do not see them."""
    rows: tuple[ProbeRow, ...]

    @property
    def targets(self) -> list[str]:
        """The classes that were probed, and maybe `MACRO_MEAN` as the last."""
        return list(dict.fromkeys(row.target for row in self.rows))

    def of(self, target: str, features: Features) -> list[ProbeRow]:
        """The rows of a class and a kind of probe, by k."""
        return [row for row in self.rows if row.target == target and row.features == features]


def load_probe(path: Path) -> ProbeResult:
    """The results in the artifact folder `path`."""
    read_manifest(path, "probe")
    content = json.loads((path / RESULT).read_text(encoding="utf-8"))
    rows = tuple(_row_from_json(row) for row in content.pop("rows"))
    classes = tuple(ClassCounts(**each) for each in content.pop("classes"))
    return ProbeResult(**content | {"left_out": tuple(content["left_out"])}, classes=classes, rows=rows)


def _row_from_json(row: dict[str, Any]) -> ProbeRow:
    typed: dict[str, Any] = {name: Interval(**row[name]) for name in METRICS}
    typed["latents"] = tuple(ChosenLatent(**each) for each in row["latents"])
    return ProbeRow(**row | typed)


def tables(result: ProbeResult, title: str) -> list[Any]:
    """For people: every probe of the class, or of the mean over classes, and then AUROC by class too."""
    from rich.table import Table

    target = result.targets[-1]
    named = f"the mean over {len(result.classes)} classes" if target == MACRO_MEAN else repr(target)
    table = Table("features", "k", "accuracy", "balanced accuracy", "AUROC (95% interval)", "latents: coefficient",
                  title=f"{title}\n{result.label}: {named}")  # fmt: skip
    for row in [row for row in result.rows if row.target == target]:
        auroc = f"{row.auroc.value:.3f} ({row.auroc.low:.3f}–{row.auroc.high:.3f})"
        figures = f"{row.accuracy.value:.3f}", f"{row.balanced_accuracy.value:.3f}", auroc
        table.add_row(row.features, str(row.k or ""), *figures, shown_latents(row, 3))
    return [table, *([_class_table(result)] if target == MACRO_MEAN else [])]


def _class_table(result: ProbeResult) -> Any:
    """AUROC on the test side, a row per class."""
    from rich.table import Table

    ks = [f"k = {row.k}" for row in result.of(MACRO_MEAN, "latents")]
    reads = f"{ks[0]} reads: coefficient"
    table = Table("class", "test documents", *ks, "all latents", "activations", reads,
                  title=f"{result.label}: AUROC of each class against the rest")  # fmt: skip
    for each in result.classes:
        rows = [row for kind in ("latents", "all latents", "activations") for row in result.of(each.name, kind)]
        aurocs = (f"{row.auroc.value:.3f}" for row in rows)
        table.add_row(each.name, str(each.test_documents), *aurocs, shown_latents(rows[0], 3))
    return table


def shown_latents(row: ProbeRow, most: int) -> str:
    """The first latents of a probe with their coefficients."""
    shown = ", ".join(f"{each.latent}: {each.coefficient:+.2f}" for each in row.latents[:most])
    return shown + (", ..." if len(row.latents) > most else "")
