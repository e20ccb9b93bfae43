"""The stream gives each row once an epoch, from disk or from the model, to any number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from monosemy import options
from monosemy.activations import capture, live, store
from monosemy.activations.capture import CaptureConfig, ShardMaker
from monosemy.activations.live import LiveActivations
from monosemy.activations.store import ShardFolder
from monosemy.activations.stream import Stream
from monosemy.corpus import open_tokens
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae import train

SITE = Site.parse("L1.resid_post")


def make_stream(tiny_run: Path, **options) -> Stream:
    return Stream(store.open_activations(tiny_run / "activations"), SITE, 100, seed=5, **options)


def eligible_rows(activations: store.Activations) -> torch.Tensor:
    """Training rows that are not sinks."""
    parts = []
    for number in range(activations.n_shards):
        kept = ~activations.table(number).validation & ~activations.sinks(SITE, number)
        parts.append(activations.shard(SITE, number).rows[kept])
    return torch.cat(parts)


@pytest.mark.parametrize("window_rows", [1 << 20, 700])
def test_an_epoch_gives_every_row_at_most_once(tiny_run: Path, window_rows: int):
    stream = make_stream(tiny_run, window_rows=window_rows)
    batches = [stream.batch(step) for step in range(stream.steps_per_epoch)]
    assert all(batch.shape == (100, 32) for batch in batches)
    rows, eligible = torch.cat(batches), eligible_rows(store.open_activations(tiny_run / "activations"))
    # The same token in the same context has the same row, so compare how often each value occurs.
    fingerprint = torch.randn(32, generator=torch.Generator().manual_seed(0))
    available, given = (values @ fingerprint for values in (eligible, rows))
    values, given_counts = given.round(decimals=3).unique(return_counts=True)
    all_values, all_counts = available.round(decimals=3).unique(return_counts=True)
    places = torch.searchsorted(all_values, values)
    assert torch.equal(all_values[places], values)
    assert (given_counts <= all_counts[places]).all()
    assert len(rows) > len(eligible) - 100


def test_a_batch_depends_on_its_step_alone(tiny_run: Path):
    forward = make_stream(tiny_run, window_rows=700)
    batches = [forward.batch(step) for step in range(2 * forward.steps_per_epoch)]
    backward = make_stream(tiny_run, window_rows=700)
    for step in reversed(range(len(batches))):
        assert torch.equal(backward.batch(step), batches[step])
    first, second = batches[0], batches[forward.steps_per_epoch]
    assert not torch.equal(first, second)  # epochs are shuffled anew
    assert [forward.epoch(step) for step in (0, forward.steps_per_epoch - 1, forward.steps_per_epoch)] == [0, 0, 1]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("window_rows", [1 << 20, 700])
def test_ranks_share_the_batch_of_one(tiny_run: Path, count: int, window_rows: int):
    alone = make_stream(tiny_run, window_rows=window_rows)
    ranks = [make_stream(tiny_run, window_rows=window_rows) for _ in range(count)]
    for step in (0, 1, 6, 7, 2 * alone.steps_per_epoch):
        parts = [stream.batch(step, rank, count) for rank, stream in enumerate(ranks)]
        assert torch.equal(torch.cat(parts), alone.batch(step))


def test_a_window_is_shuffled_and_no_more_than_it(tiny_run: Path):
    """With windows of one shard, rows come shard by shard, and within a shard in no order."""
    activations = store.open_activations(tiny_run / "activations")
    stream = make_stream(tiny_run, window_rows=1)
    window = stream._window(0, 0)
    assert list(window.shards) == [SITE]
    assert sorted(window.row.tolist()) != window.row.tolist()
    [member] = window.shards[SITE]
    kept = ~activations.table(member).validation & ~activations.sinks(SITE, member)
    assert sorted(window.row.tolist()) == kept.nonzero().flatten().tolist()
    assert torch.equal(stream.batch(0), activations.shard(SITE, member).decoded()[window.row[:100]])


def test_stream_leaves_out_validation_and_sinks(tiny_run: Path):
    activations = store.open_activations(tiny_run / "activations")
    training, validation = make_stream(tiny_run), make_stream(tiny_run, validation=True)
    n_sinks = sum(int(activations.sinks(SITE, number).sum()) for number in range(activations.n_shards))
    assert training.n_rows + validation.n_rows + n_sinks == activations.n_rows
    everything = make_stream(tiny_run, with_sinks=True)
    assert everything.n_rows >= training.n_rows


def test_pairs_are_rows_of_the_same_tokens(config: CaptureConfig, monkeypatch):
    """What is a sink at either site is left out at both."""
    sites = Site.parse("L1.resid_post"), Site.parse("L0.mlp_in")
    capture.run(replace(config, sites=tuple(map(str, sites)), stored_as="float32"))
    activations = store.open_activations(config.out)
    flags = lambda site, shard: torch.arange(len(activations.table(shard).token)) % 7 == sites.index(site)  # noqa: E731
    monkeypatch.setattr(activations, "sinks", flags)
    known: dict[tuple, set[tuple]] = {}
    n_rows = 0
    for number in range(activations.n_shards):
        kept = ~activations.table(number).validation & ~flags(sites[0], number) & ~flags(sites[1], number)
        n_rows += int(kept.sum())
        first, second = (activations.shard(site, number).decoded()[kept].tolist() for site in sites)
        for row, target in zip(first, second, strict=True):
            known.setdefault(tuple(row), set()).add(tuple(target))
    pairs = Stream(activations, sites[0], 100, seed=5, window_rows=1500, target_site=sites[1])
    assert pairs.n_rows == n_rows
    for step in range(2 * pairs.steps_per_epoch):
        rows, targets = pairs.batches(step)
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
            assert tuple(target) in known[tuple(row)]
        assert torch.equal(rows, pairs.batch(step))
    halves = [pairs.batches(3, rank, 2) for rank in range(2)]
    for whole, *parts in zip(pairs.batches(3), *halves, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert [torch.equal(a, b[:50]) for a, b in zip(pairs.first_rows(50), pairs.batches(0), strict=True)] == [True, True]


def test_past_the_end(tiny_run: Path):
    stream = make_stream(tiny_run, epochs=2)
    last = 2 * stream.steps_per_epoch - 1
    assert stream.batch(last).shape == (100, 32)
    with pytest.raises(InputError, match=rf"step {last + 1} is past the end of the stream: 2 epochs of \d+ steps"):
        stream.batch(last + 1)
    with pytest.raises(InputError, match="step -1 was asked for; steps count from 0"):
        stream.batch(-1)
    assert make_stream(tiny_run).batch(100 * last).shape == (100, 32)  # without an end there is none


def test_batches_that_cannot_be(tiny_run: Path):
    with pytest.raises(InputError, match="a batch of 100 rows cannot be shared evenly by 3 ranks"):
        make_stream(tiny_run).batch(0, 0, 3)
    activations = store.open_activations(tiny_run / "activations")
    with pytest.raises(InputError, match=r"fewer than one batch of 1000000: give more text, or a smaller --batch-size"):
        Stream(activations, SITE, 1_000_000, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Straight from the model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(capture_config: CaptureConfig) -> CaptureConfig:
    return replace(capture_config, shard_tokens=700)


class CountingMaker(ShardMaker):
    """Remembers which shards the model was run on."""

    def compute(self, number: int, *rest) -> capture.RawShard:
        self.computed = [*getattr(self, "computed", []), number]
        return super().compute(number, *rest)


def batches(stream: Stream, steps: range) -> Iterator[torch.Tensor]:
    return (stream.batch(step) for step in steps)


@pytest.mark.parametrize("stored_as", ["bfloat16", "int8"])
def test_live_batches_are_those_from_disk(config: CaptureConfig, tiny_llama: Llama, stored_as):
    config = replace(config, stored_as=stored_as)
    capture.run(config)
    stored = store.open_activations(config.out)
    disk = Stream(stored, SITE, 100, seed=5, window_rows=1500)
    maker = CountingMaker(tiny_llama, open_tokens(config.tokens), config)
    source = LiveActivations(maker)
    stream = Stream(source, SITE, 100, seed=5, window_rows=1500)
    n_windows = len(stream._windows(0))
    assert n_windows > 2
    assert len(maker.computed) < source.n_shards  # the first batch needs the first window alone
    steps = range(2 * disk.steps_per_epoch)
    for mine, theirs in zip(batches(stream, steps), batches(disk, steps), strict=True):
        assert torch.equal(mine, theirs)
    assert len(maker.computed) <= 2 * source.n_shards  # once an epoch
    assert stream.n_rows == disk.n_rows
    assert source.sink_norm(SITE) == stored.sink_norm(SITE)


def test_live_seeks_with_what_it_remembers(config: CaptureConfig, tiny_llama: Llama, tmp_path: Path):
    def remembering() -> tuple[CountingMaker, Stream]:
        maker = CountingMaker(tiny_llama, open_tokens(config.tokens), config)
        maker.computed = []
        identity = {"kind": "sae", "format_version": 0, "config": {}, "parents": maker.parents}
        folder = ShardFolder((tmp_path / "live").joinpath, identity)
        return maker, Stream(LiveActivations(maker, folder), SITE, 100, seed=5, window_rows=700)

    _, first = remembering()
    late = list(batches(first, range(first.steps_per_epoch)))[-1]
    maker, second = remembering()
    assert maker.computed == []
    assert torch.equal(second.batch(first.steps_per_epoch - 1), late)
    assert len(maker.computed) <= 2  # its own window, not those before


@pytest.fixture
def training(tmp_path: Path) -> dict[str, Any]:
    sizes = {"n_latents": 64, "k": 4, "train_tokens": 6000, "batch_size": 200, "dead_after_tokens": 2000, "k_aux": 8}
    return {"out": tmp_path / "sae", **sizes}


def test_training_on_the_fly_is_training_from_disk(
    tiny_run: Path, tiny_llama_folder: Path, training: dict[str, Any], tmp_path: Path, monkeypatch
):  # fmt: skip
    model, tokens = str(tiny_llama_folder), tiny_run / "tokens"
    capture.run(CaptureConfig(tokens=tokens, out=tmp_path / "stored", model=model, sites=("L1.resid_post",)))
    stored = options.build(train.TrainConfig, training | {"activations": tmp_path / "stored"})
    source: dict[str, Any] = {"model": model, "tokens": tokens, "site": "L1.resid_post", "out": tmp_path / "live"}
    on_the_fly = options.build(train.TrainConfig, training | source)
    train.run(stored)
    with monkeypatch.context() as patch:
        patch.setattr(live.LiveActivations, "_compute", _stopping(live.LiveActivations._compute))
        with pytest.raises(KeyboardInterrupt):
            train.run(on_the_fly)
    manifest = train.run(on_the_fly)
    assert sorted(manifest.files) == ["activity.parquet", "history.jsonl", "sae.json", "sae.safetensors"]
    assert manifest.parents.keys() == {"model", "tokens", "dtype"}
    for name in manifest.files:
        assert (on_the_fly.out / name).read_bytes() == (stored.out / name).read_bytes()


def _stopping(compute):
    def stop(*arguments):
        compute(*arguments)
        raise KeyboardInterrupt

    return stop


def test_training_needs_one_source(training: dict[str, Any], tmp_path: Path):
    message = "give either --activations, or all of --model, --tokens and --site"
    both: dict[str, Any] = {"activations": tmp_path, "model": "m", "tokens": tmp_path, "site": "L0R"}
    for names in ((), ("model",), ("model", "tokens"), tuple(both)):
        with pytest.raises(InputError, match=message):
            options.build(train.TrainConfig, training | {name: both[name] for name in names})
