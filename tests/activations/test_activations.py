"""Capture puts the model's own activations on disk; the stream gives each of them once an epoch."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from monosemy.activations import capture, store
from monosemy.activations.capture import CaptureConfig, length_batches, plan_shards
from monosemy.activations.stream import Stream
from monosemy.corpus import open_tokens
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import InputError

SITE = Site.parse("L1.resid_post")


@pytest.fixture
def config(tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path) -> CaptureConfig:
    return CaptureConfig(
        tokens=tiny_run / "tokens",
        out=tmp_path / "activations",
        model=str(tiny_llama_folder),
        dtype="float32",
        sites=("L0.resid_mid", "L1.mlp_out"),
        stored_as="float32",
        shard_tokens=1000,
        batch_tokens=256,
    )


def test_rows_are_what_the_model_computes(config: CaptureConfig, tiny_llama: Llama):
    capture.run(config)
    tokens, activations = open_tokens(config.tokens), store.open_activations(config.out)
    seen = 0
    for number in range(activations.n_shards):
        table = activations.table(number)
        for name in config.sites:
            site = Site.parse(name)
            shard = activations.shard(site, number)
            sentence = int(table.sentence[0])
            rows = table.sentence == sentence
            taps = Taps(reads={site})
            with torch.inference_mode():
                tiny_llama(tokens.sentence(sentence)[None].long(), taps=taps)
            torch.testing.assert_close(shard.rows[rows], taps.values[site][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(shard.norm, shard.rows.norm(dim=1))
        assert torch.equal(table.token[rows], tokens.sentence(sentence))
        assert table.position[rows].tolist() == list(range(int(rows.sum())))
        assert bool(table.validation[0]) == bool(tokens.validation[sentence])
        seen += len(table.token)
    assert seen == tokens.n_tokens == activations.n_rows


def test_mean_leaves_out_sinks_and_validation(config: CaptureConfig):
    capture.run(config)
    activations = store.open_activations(config.out)
    site = Site.parse("L1.mlp_out")
    kept = []
    for number in range(activations.n_shards):
        shard, table = activations.shard(site, number), activations.table(number)
        assert torch.equal(shard.sink, shard.norm > activations.sink_norm(site))
        kept.append(shard.rows[~shard.sink & ~table.validation].double())
    torch.testing.assert_close(activations.mean(site), torch.cat(kept).mean(dim=0).float())


def test_a_row_of_huge_norm_is_a_sink():
    rows = torch.randn(50, 8)
    rows[7] *= 100
    shard = store.site_shard(rows, torch.zeros(50, dtype=torch.bool), store.sink_norm_of(rows))
    assert shard.sink.nonzero().flatten().tolist() == [7]
    assert int(shard.count) == 49
    torch.testing.assert_close(shard.mean, rows[~shard.sink].double().mean(dim=0))


def test_merged_moments_equal_those_of_all_rows():
    rows = torch.randn(100, 5, dtype=torch.float64) + 1000
    merged = store.Moments(0, torch.zeros(5, dtype=torch.float64))
    for part in rows.split([1, 0, 60, 39]):
        mean = part.mean(dim=0) if len(part) else torch.zeros(5, dtype=torch.float64)
        merged = merged.merge(store.Moments(len(part), mean))
    assert merged.count == 100
    torch.testing.assert_close(merged.mean, rows.mean(dim=0), atol=1e-10, rtol=0)


def test_interrupted_capture_goes_on_and_ends_in_the_same_bytes(config: CaptureConfig, tmp_path: Path, monkeypatch):
    whole = capture.run(config)
    write, written = capture._write_shard, []

    def stop_in_the_third(draft, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write(draft, number, *rest)

    again = replace(config, out=tmp_path / "again")
    monkeypatch.setattr(capture, "_write_shard", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        capture.run(again)
    monkeypatch.setattr(capture, "_write_shard", lambda d, n, *rest: (written.append(n), write(d, n, *rest)))
    resumed = capture.run(again)
    assert written == list(range(whole.rows["shards"]))  # nothing twice
    assert resumed.digest == whole.digest


def test_shards_hold_every_sentence_once(tiny_run: Path):
    tokens = open_tokens(tiny_run / "tokens")
    shards = plan_shards(tokens, 300, seed=1)
    assert sorted(np.concatenate(shards).tolist()) == list(range(tokens.n_sentences))
    sizes = [int(tokens.lengths[shard].sum()) for shard in shards]
    longest = int(tokens.lengths.max())
    assert all(300 - longest <= size <= 300 + longest for size in sizes[:-1])


def test_batches_hold_every_sentence_once(tiny_run: Path):
    tokens = open_tokens(tiny_run / "tokens")
    sentences = np.arange(0, tokens.n_sentences, 2)
    seen = []
    for batch in length_batches(tokens, sentences, 200):
        assert batch.ids.numel() <= max(200, int(batch.lengths.max()))
        for ids, sentence in zip(batch.ids[0].split(batch.lengths.tolist()), batch.sentences, strict=True):
            assert torch.equal(ids.int(), tokens.sentence(int(sentence)))
        seen += batch.sentences.tolist()
    assert sorted(seen) == sentences.tolist()


def make_stream(tiny_run: Path, **options) -> Stream:
    return Stream(store.open_activations(tiny_run / "activations"), SITE, 100, seed=5, **options)


@pytest.mark.parametrize("window_rows", [1 << 20, 700])
def test_an_epoch_gives_every_row_at_most_once(tiny_run: Path, window_rows: int):
    stream = make_stream(tiny_run, window_rows=window_rows)
    batches = [stream.batch(step) for step in range(stream.steps_per_epoch)]
    assert all(batch.shape == (100, 32) for batch in batches)
    rows = torch.cat(batches)
    eligible = torch.cat([stream.rows[shard][stream.eligible[shard]] for shard in range(len(stream.rows))])
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


def test_stream_leaves_out_validation_and_sinks(tiny_run: Path):
    activations = store.open_activations(tiny_run / "activations")
    training, validation = make_stream(tiny_run), make_stream(tiny_run, validation=True)
    assert training.n_rows + validation.n_rows + count_sinks(activations) == activations.n_rows
    everything = make_stream(tiny_run, with_sinks=True)
    assert everything.n_rows >= training.n_rows


def count_sinks(activations: store.Activations) -> int:
    return sum(int(activations.shard(SITE, number).sink.sum()) for number in range(activations.n_shards))


def test_errors(config: CaptureConfig, tiny_run: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"'L1.nonsense' is not a site: expected L<layer>.<point>"):
        replace(config, sites=("L1.nonsense",))
    with pytest.raises(InputError, match="names a site twice"):
        replace(config, sites=("L1.resid_post", "L1R"))
    with pytest.raises(InputError, match="no site was given"):
        replace(config, sites=())
    with pytest.raises(InputError, match=r"L7.resid_post: .* has layers 0 to 1"):
        capture.run(replace(config, sites=("L7.resid_post",)))
    foreign = tmp_path / "foreign"
    shutil.copytree(config.tokens, foreign)
    manifest = (foreign / "manifest.json").read_text()
    tokenizer = open_tokens(config.tokens).manifest.parents["tokenizer"]
    (foreign / "manifest.json").write_text(manifest.replace(tokenizer, "0" * len(tokenizer)))
    with pytest.raises(InputError, match="was tokenized for another model"):
        capture.run(replace(config, tokens=foreign))
    activations = store.open_activations(tiny_run / "activations")
    with pytest.raises(InputError, match=r"holds no L0.resid_pre; it holds L1.resid_post"):
        activations.only_site("L0.resid_pre")
    with pytest.raises(InputError, match=r"fewer than one batch of 1000000: give more text, or a smaller --batch-size"):
        Stream(activations, SITE, 1_000_000, seed=0)


def test_nan_activations_are_refused(config: CaptureConfig, tiny_llama: Llama, monkeypatch):
    def broken(model, batch, sites):
        return {site: torch.full((int(batch.lengths.sum()), 32), float("nan")) for site in sites}

    monkeypatch.setattr(capture, "read_sites", broken)
    with pytest.raises(InputError, match="holds NaN or infinite activations"):
        capture.run(config)
    assert not config.out.exists()
