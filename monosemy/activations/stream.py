"""Shuffled batches of activations, the same for the same (seed, epoch, step) on every run.

1. An epoch visits the shards in an order drawn from (seed, epoch), in windows of `window_rows` rows.
2. Within a window, rows are shuffled by (seed, epoch, window): a true shuffle of the window, nothing carried over.
3. The windows' rows, one after another, are cut into batches; the last, incomplete batch of an epoch is left out.

So a batch is a function of one integer, its step: `Stream.batch(step)` seeks without reading what came before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from monosemy.activations.store import Activations
from monosemy.llm.sites import Site
from monosemy.runtime import InputError, random_stream


class Window(NamedTuple):
    """Rows that are shuffled together."""

    shard: np.ndarray
    """Shard number of each row, in shuffled order."""
    row: np.ndarray
    """Its row in that shard."""


class Stream:
    """Batches of one site's rows, shuffled. Sink rows are left out unless asked for."""

    def __init__(
        self,
        activations: Activations,
        site: Site,
        batch_size: int,
        seed: int,
        validation: bool = False,
        with_sinks: bool = False,
        window_rows: int = 1 << 20,
    ) -> None:
        self.activations, self.site, self.batch_size, self.seed = activations, site, batch_size, seed
        self.window_rows = window_rows
        shards = [activations.shard(site, number) for number in range(activations.n_shards)]
        self.rows = [shard.rows for shard in shards]
        self.eligible = []
        for number, shard in enumerate(shards):
            wanted = activations.table(number).validation == validation
            self.eligible.append((wanted if with_sinks else wanted & ~shard.sink).nonzero().squeeze(1).numpy())
        self.n_rows = sum(map(len, self.eligible))
        self.steps_per_epoch = self.n_rows // batch_size
        if self.steps_per_epoch == 0:
            split = "validation" if validation else "training"
            raise InputError(
                f"{activations.path} has {self.n_rows} {split} rows at {site}, fewer than one batch of {batch_size}: "
                "give more text, or a smaller --batch-size"
            )
        self._window = lru_cache(maxsize=2)(self._make_window)

    def batch(self, step: int) -> Float[Tensor, "row d_model"]:
        """The batch of training step `step`, counted from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.batch_size
        parts, wanted = [], self.batch_size
        for number, (first, last) in enumerate(self._window_bounds(epoch)):
            if first <= start < last and wanted:
                stop = min(last, start + wanted)
                parts.append(self._gather(self._window(epoch, number), start - first, stop - first))
                wanted -= stop - start
                start = stop
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _gather(self, window: Window, start: int, stop: int) -> Tensor:
        shard, row = window.shard[start:stop], torch.from_numpy(window.row[start:stop])
        out = torch.empty(stop - start, self.activations.d_model, dtype=self.rows[0].dtype)
        for number in np.unique(shard):
            places = torch.from_numpy(np.flatnonzero(shard == number))
            out[places] = self.rows[number][row[places]]
        return out

    def _windows(self, epoch: int) -> list[np.ndarray]:
        """The shards of each window."""
        order = random_stream(self.seed, epoch).permutation(len(self.eligible))
        ends = np.cumsum([len(self.eligible[number]) for number in order])
        return np.split(order, np.flatnonzero(np.diff((ends - 1) // self.window_rows)) + 1)

    def _window_bounds(self, epoch: int) -> list[tuple[int, int]]:
        sizes = [sum(len(self.eligible[number]) for number in window) for window in self._windows(epoch)]
        ends = np.cumsum(sizes).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _make_window(self, epoch: int, number: int) -> Window:
        members = self._windows(epoch)[number]
        shard = np.concatenate([np.full(len(self.eligible[member]), member) for member in members])
        row = np.concatenate([self.eligible[member] for member in members])
        order = random_stream(self.seed, epoch, number).permutation(len(row))
        return Window(shard[order], row[order])
