"""Labels of latents on disk: written by whatever explains them, read by whatever shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from monosemy.artifact import Draft, read_manifest, write_table
from monosemy.runtime import InputError

TABLE = "labels.parquet"


class Label(NamedTuple):
    """What a latent is taken to mean."""

    latent: int
    label: str
    """Empty for a latent that never fires."""
    certainty: float
    """0 (a guess) to 1."""
    evidence: dict[str, Any]
    """Why: what the label covers, how specific it is, and what else was seen. JSON."""


def write_labels(draft: Draft, labels: list[Label]) -> None:
    """Write `labels.parquet`, ascending by latent, into the draft."""
    import pyarrow

    columns = {
        "latent": pyarrow.array([label.latent for label in labels], pyarrow.int32()),
        "label": pyarrow.array([label.label for label in labels], pyarrow.string()),
        "certainty": pyarrow.array([label.certainty for label in labels], pyarrow.float32()),
        "evidence": pyarrow.array(
            [json.dumps(label.evidence, ensure_ascii=False, sort_keys=True) for label in labels], pyarrow.string()
        ),
    }
    write_table(draft.file(TABLE), pyarrow.table(columns))


def open_labels(
    path: Path | str, index_digest: str | None = None, verify: bool = False, sae_digest: str | None = None
) -> list[Label]:
    """The labels in folder `path`, one per latent, in order.

    Raises `InputError` if it holds none, or those of another index than `index_digest`, or SAE than `sae_digest`.
    """
    from pyarrow import parquet

    path = Path(path)
    manifest = read_manifest(path, "labels", verify)
    if index_digest is not None and manifest.parents["index"] != index_digest:
        raise InputError(f"{path} explains another index than the one given: run `monosemy explain` on this one")
    if sae_digest is not None and manifest.parents["sae"] != sae_digest:
        raise InputError(
            f"{path} labels the latents of another SAE than the one given: run `monosemy explain` on its index"
        )
    rows = parquet.read_table(path / TABLE).to_pylist()
    return [Label(**row | {"evidence": json.loads(row["evidence"])}) for row in rows]
