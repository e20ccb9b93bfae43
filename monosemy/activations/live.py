"""Activations straight from the model: the shards that `capture` would store, without the disk.

1. The plan of shards, their batches and their rounding are `capture.ShardMaker`'s, so every row is the one that a
   stored artifact holds, and an SAE trained on the fly is the one trained from disk.
2. A shard is computed when it is asked for, and kept by who asked: a `Stream` keeps its window.
3. One pass of the model serves all its sites, where they are read in step.
4. Which rows are sinks is remembered, in a folder if one is given: a run that goes on need not run the model to know.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from threading import Lock

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from monosemy.activations.capture import CaptureConfig, RawShard, ShardMaker, rank_device
from monosemy.activations.store import RowTable, ShardFolder, SiteStatistics, StoredRows
from monosemy.corpus import open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.model import resolved
from monosemy.llm.sites import Site


class LiveActivations:
    """What a `Stream` asks of `store.Activations`, computed when it is needed."""

    def __init__(self, maker: ShardMaker, memory: ShardFolder | None = None) -> None:
        """`memory`: where sink flags are remembered beyond this process."""
        self.maker, self.memory = maker, memory
        self.path = maker.config.tokens
        self.sites, self.n_shards = maker.sites, len(maker.plan)
        self.d_model, self.model_name = maker.model.config.d_model, maker.model.name
        self._first: RawShard | None = None
        self._last: int | None = None
        self._finished = lru_cache(1)(self._compute)
        self._lock = Lock()
        self._waiting: dict[tuple[Site, int], StoredRows] = {}
        """Rows of other sites of shards that were computed; several streams in step ask for them soon."""

    def split_sizes(self, validation: bool) -> Int[np.ndarray, " shard"]:
        """Rows of each shard that are held out, or those that are not; sinks are counted."""
        tokens = self.maker.tokens
        lengths = (tokens.lengths * (tokens.validation == validation)).numpy()
        return np.array([lengths[sentences].sum() for sentences in self.maker.plan])

    def table(self, shard: int) -> RowTable:
        return self.maker.table(shard)

    def shard(self, site: Site, shard: int) -> StoredRows:
        """The rows of a shard. Those at the model's other sites are kept until they are asked for, once."""
        with self._lock:
            if (site, shard) in self._waiting:
                return self._waiting.pop((site, shard))
            finished = self._finished(shard)
            self._waiting |= {(other, shard): finished[other][0] for other in self.sites if other != site}
            return finished[site][0]

    def sinks(self, site: Site, shard: int) -> Bool[Tensor, " row"] | None:
        """Which rows of the shard are sinks; None if only running the model would tell."""
        if shard == self._last:
            return self._finished(shard)[site][1].sink
        if self.memory is not None and self.memory.has(shard):
            return self.memory.statistics(site, shard).sink
        return None

    def sink_norm(self, site: Site) -> float:
        return self._sink_norms[site]

    @cached_property
    def _sink_norms(self) -> dict[Site, float]:
        if self.memory is not None and self.memory.has(0):
            return {site: self.memory.statistics(site, 0).sink_norm for site in self.sites}
        self._first = self.maker.compute(0)  # kept: the first window that holds it would compute it again
        return self.maker.sink_norms(self._first)

    def _compute(self, shard: int) -> dict[Site, tuple[StoredRows, SiteStatistics]]:
        sink_norms = self._sink_norms
        raw = self._first if shard == 0 and self._first is not None else self.maker.compute(shard)
        finished = self.maker.finish(raw, sink_norms)
        if self.memory is not None and not self.memory.has(shard):
            self.memory.write_table(shard, raw.table, {site: known for site, (_, known) in finished.items()})
        self._last = shard
        return finished


def open_live(config: CaptureConfig) -> LiveActivations:
    """The activations that `capture` would store with `config`. Raises `InputError` as `capture` does."""
    model = load_model(config.model, config.dtype, rank_device(config.device))
    return LiveActivations(ShardMaker(model, open_tokens(config.tokens), resolved(config, model)))
