"""How often every latent fired while the SAE was trained: which died, which came back, which fire all the time.

The run is cut into intervals. At the end of each, a file has a row per latent: on how many rows it fired in the
interval, and after how many rows of the run it last did. At the end of the run they become one table,
`activity.parquet`, sorted by interval and latent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from jaxtyping import Bool
from pyarrow import compute, parquet
from torch import Tensor

from monosemy.artifact import write_table
from monosemy.runtime import InputError

PARTS, TABLE = "activity", "activity.parquet"

DENSE = 0.1
"""A latent that fires on a larger share of an interval's rows is dense."""


class Interval(NamedTuple):
    """What the latents did in a part of the run."""

    tokens: int
    """Rows seen by its end."""
    dead: int
    """Latents that had not fired for `dead_after_tokens` rows, or ever, at its end."""
    revived: int
    """Latents that were dead at the end of the interval before, and fired in this one."""
    dense: int
    """Latents that fired on more than a tenth of its rows."""


def write_interval(folder: Path, interval: int, tokens: int, first: int, fired: Tensor, last_fired: Tensor) -> None:
    """Keep what the latents from `first` on did, until `collect`."""
    (folder / PARTS).mkdir(exist_ok=True)
    n = len(fired)
    table = pyarrow.table(
        {
            "interval": pyarrow.array(np.full(n, interval, np.int32)),
            "tokens": pyarrow.array(np.full(n, tokens, np.int64)),
            "latent": pyarrow.array(np.arange(first, first + n, dtype=np.int32)),
            "fired": pyarrow.array(fired.cpu().numpy()),
            "last_fired": pyarrow.array(last_fired.cpu().numpy()),
        }
    )
    write_table(folder / PARTS / f"{interval:06}-{first:09}.parquet", table)


def collect(folder: Path, n_intervals: int) -> None:
    """Join the parts of the first `n_intervals` to one table."""
    parts = [file for file in sorted((folder / PARTS).glob("*.parquet")) if int(file.name[:6]) < n_intervals]
    write_table(folder / TABLE, pyarrow.concat_tables(parquet.read_table(part) for part in parts))
    shutil.rmtree(folder / PARTS)


def read_intervals(sae: Path, dead_after_tokens: int) -> list[Interval]:
    """What the latents of the SAE artifact in folder `sae` did, interval by interval."""
    path = sae / TABLE
    if not path.exists():
        raise InputError(f"{path} is missing: this SAE was trained before activity was kept; train it again")
    table = parquet.read_table(path)
    columns = {name: table.column(name).to_numpy() for name in ("interval", "tokens", "fired", "last_fired")}
    n_intervals = int(columns["interval"].max()) + 1
    tokens, fired, last_fired = (columns[name].reshape(n_intervals, -1) for name in ("tokens", "fired", "last_fired"))
    found, were_dead, before = [], np.zeros(fired.shape[1], bool), 0
    for number in range(n_intervals):
        seen = int(tokens[number, 0])
        dead = seen - last_fired[number] > dead_after_tokens
        revived = were_dead & (fired[number] > 0)
        dense = fired[number] > DENSE * (seen - before)
        found.append(Interval(seen, int(dead.sum()), int(revived.sum()), int(dense.sum())))
        were_dead, before = dead, seen
    return found


def dead_latents(sae: Path, dead_after_tokens: int) -> Bool[np.ndarray, " latent"]:
    """Which latents of the SAE artifact in folder `sae` were dead when its training ended."""
    table = parquet.read_table(sae / TABLE, columns=["interval", "tokens", "last_fired"])
    last = table.filter(compute.equal(table["interval"], compute.max(table["interval"])))  # pyright: ignore
    return last["tokens"].to_numpy() - last["last_fired"].to_numpy() > dead_after_tokens
