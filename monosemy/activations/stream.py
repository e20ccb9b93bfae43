"""Shuffled batches of activations, the same for the same (seed, epoch, step) on every run.

1. An epoch visits the shards in an order drawn from (seed, epoch), in windows of about `window_rows` rows.
2. Within a window, rows are shuffled by (seed, epoch, window): a true shuffle of the window, nothing carried over.
3. The windows' rows, one after another, are cut into batches; the last, incomplete batch of an epoch is left out.
4. Rank r of n takes the r-th of n equal parts of a batch, so together they see what one alone would see.

So a batch is a function of one integer, its step: `Stream.batch(step)` seeks without reading what came before. Rows
come from disk (`store.Activations`) or straight from the model (`live.LiveActivations`, which must run the model over
what came before in the first epoch, unless an earlier run left its sink flags). While a batch is used, another thread
gathers the next.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosemy.activations.store import RowTable, StoredRows, gather
from monosemy.llm.sites import Site
from monosemy.runtime import InputError, random_stream


@runtime_checkable
class ShardSource(Protocol):
    """Where a stream finds its rows."""

    path: Path
    """For people."""
    n_shards: int
    d_model: int

    def split_sizes(self, validation: bool) -> Int[np.ndarray, " shard"]: ...
    def table(self, shard: int) -> RowTable: ...
    def shard(self, site: Site, shard: int) -> StoredRows: ...
    def sinks(self, site: Site, shard: int) -> Bool[Tensor, " row"] | None:
        """Sink flags; None where only running the model would tell."""
        ...


class Window(NamedTuple):
    """Rows that are shuffled together."""

    shards: dict[Site, dict[int, StoredRows]]
    shard: Int[np.ndarray, " row"]
    """Shard number of each row, in shuffled order."""
    row: Int[np.ndarray, " row"]
    """Its row in that shard."""


class Share(NamedTuple):
    """One rank's part of a batch."""

    step: int
    rank: int
    count: int


class Stream:
    """Batches of one site's rows, shuffled. Sink rows are left out unless asked for."""

    def __init__(
        self,
        source: ShardSource,
        site: Site,
        batch_size: int,
        seed: int,
        validation: bool = False,
        with_sinks: bool = False,
        window_rows: int = 1 << 20,
        epochs: int | None = None,
        target_site: Site | None = None,
    ) -> None:
        """A stream that ends after `epochs`, or never. A window is held in memory where rows are not mapped.

        With a `target_site`, `batches` gives the rows there as well, of the same tokens; tokens that are a sink at
        either site are left out.
        """
        self.source, self.site, self.batch_size, self.seed = source, site, batch_size, seed
        self.sites = [site] if target_site is None else [site, target_site]
        self.validation, self.with_sinks, self.window_rows, self.epochs = validation, with_sinks, window_rows, epochs
        self.split_sizes = source.split_sizes(validation)
        self.counts: dict[int, int] = {}
        """Rows that a shard gives in an epoch, as far as known."""
        self._window = lru_cache(maxsize=2)(self._make_window)
        self._windows = lru_cache(maxsize=2)(self._plan_windows)
        self._size = lru_cache(maxsize=None)(self._count)  # every batch asks for those of all windows
        self._thread = ThreadPoolExecutor(1, "stream")
        self._ahead: tuple[Share, Future[tuple[list[Tensor], bool]]] | None = None
        self._locate(0)

    @property
    def d_model(self) -> int:
        return self.source.d_model

    @property
    def n_rows(self) -> int:
        """Rows in an epoch."""
        return sum(self._size(0, number) for number in range(len(self._windows(0))))

    @property
    def steps_per_epoch(self) -> int:
        return self.n_rows // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch in which training step `step` lies, from 0."""
        return self._locate(step)[0]

    def batch(self, step: int, rank: int = 0, count: int = 1) -> Float[Tensor, "row d_model"]:
        """The batch of training step `step`, counted from 0 over all epochs, float32; or the part that `rank` of
        `count` takes.

        Raises `InputError` past the last epoch, and if the ranks cannot share a batch evenly.
        """
        return self.batches(step, rank, count)[0]

    def batches(self, step: int, rank: int = 0, count: int = 1) -> list[Float[Tensor, "row d_model"]]:
        """`batch` at every site: the rows at the stream's own, and those at its target site if it has one."""
        if self.batch_size % count:
            raise InputError(f"a batch of {self.batch_size} rows cannot be shared evenly by {count} ranks")
        share = Share(step, rank, count)
        if self._ahead is not None and self._ahead[0] == share:
            work = self._ahead[1]
        else:
            work = self._thread.submit(self._gather, share)
        rows, is_next_near = work.result()
        following = share._replace(step=step + 1)
        self._ahead = (following, self._thread.submit(self._gather, following)) if is_next_near else None
        return rows

    def first_rows(self, n_rows: int) -> list[Float[Tensor, "row d_model"]]:
        """Up to `n_rows` rows of the first window, at every site."""
        window = self._window(0, 0)
        return self._rows_of(window, slice(0, n_rows))

    def _rows_of(self, window: Window, rows: slice) -> list[Tensor]:
        places = (window.shard[rows], window.row[rows])
        return [gather(window.shards[site].__getitem__, *places) for site in self.sites]

    def _gather(self, share: Share) -> tuple[list[Tensor], bool]:
        """The rows of a share, and whether the next batch needs no further window (which may take long)."""
        epoch, batch_start = self._locate(share.step)
        size = self.batch_size // share.count
        start = batch_start + share.rank * size
        stop, first, last, parts = start + size, 0, 0, []
        for number in range(len(self._windows(epoch))):
            last = first + self._size(epoch, number)
            if start < last and first < stop:
                rows = slice(max(start, first) - first, min(stop, last) - first)
                parts.append(self._rows_of(self._window(epoch, number), rows))
            if stop <= last:
                break
            first = last
        joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]
        return joined, batch_start + 2 * self.batch_size <= last

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of `step`, and the row in it at which its batch starts."""
        if step < 0:
            raise InputError(f"step {step} was asked for; steps count from 0")
        start, size = step * self.batch_size, 0
        for number in range(len(self._windows(0))):
            size += self._size(0, number)
            if start + self.batch_size <= size:
                return 0, start
        if size < self.batch_size:
            split = "validation" if self.validation else "training"
            raise InputError(
                f"{self.source.path} has {size} {split} rows at {self.site}, fewer than one batch of "
                f"{self.batch_size}: give more text, or a smaller --batch-size"
            )
        steps = size // self.batch_size
        epoch, step_in_epoch = divmod(step, steps)
        if self.epochs is not None and epoch >= self.epochs:
            raise InputError(
                f"step {step} is past the end of the stream: {self.epochs} epochs of {steps} steps; "
                "ask for a step before, or for more epochs"
            )
        return epoch, step_in_epoch * self.batch_size

    def _plan_windows(self, epoch: int) -> list[Int[np.ndarray, " shard"]]:
        """The shards of each window. Sinks count here, so that windows are known before the model has run."""
        order = random_stream(self.seed, epoch).permutation(self.source.n_shards)
        ends = self.split_sizes[order].cumsum()
        return np.split(order, np.flatnonzero(np.diff((ends - 1) // self.window_rows)) + 1)

    def _count(self, epoch: int, number: int) -> int:
        """Rows that a window gives."""
        members = self._windows(epoch)[number].tolist()
        for member in members:
            if member not in self.counts and (sink := self._sinks(member)) is not None:
                self.counts[member] = len(self._eligible(member, sink))
        if not all(member in self.counts for member in members):
            self._window(epoch, number)
        return sum(self.counts[member] for member in members)

    def _make_window(self, epoch: int, number: int) -> Window:
        shards: dict[Site, dict[int, StoredRows]] = {site: {} for site in self.sites}
        eligible, members = [], self._windows(epoch)[number].tolist()
        for member in members:
            for site in self.sites:
                shards[site][member] = self.source.shard(site, member)
            sink = self._sinks(member)
            assert sink is not None, "they are known once the shard is"
            eligible.append(self._eligible(member, sink))
            self.counts[member] = len(eligible[-1])
        shard = np.repeat(np.array(members, dtype=np.int32), [len(rows) for rows in eligible])
        order = random_stream(self.seed, epoch, number).permutation(len(shard))
        return Window(shards, shard[order], np.concatenate(eligible)[order])

    def _sinks(self, shard: int) -> Bool[Tensor, " row"] | None:
        """Rows of the shard that are sinks at one of the sites; None if only running the model would tell."""
        flags = [self.source.sinks(site, shard) for site in self.sites]
        known = [flag for flag in flags if flag is not None]
        return torch.stack(known).any(dim=0) if len(known) == len(flags) else None

    def _eligible(self, shard: int, sink: Bool[Tensor, " row"]) -> Int[np.ndarray, " given"]:
        """Numbers of the rows that the stream gives."""
        wanted = self.source.table(shard).validation == self.validation
        return (wanted if self.with_sinks else wanted & ~sink).nonzero().squeeze(1).int().numpy()
