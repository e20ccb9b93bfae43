"""The activity of every latent adds up to what the training saw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from monosemy import kernels, options
from monosemy.runtime import InputError
from monosemy.sae import train
from monosemy.sae.activity import Interval, collect, read_intervals, write_interval
from monosemy.sae.settings import TrainConfig
from monosemy.sae.tracking import read_history


def columns(sae: Path, n_intervals: int) -> dict[str, np.ndarray]:
    """Column -> (interval, latent)."""
    table = parquet.read_table(sae / "activity.parquet")
    return {name: np.array(table.column(name)).reshape(n_intervals, -1) for name in table.column_names}


def test_counts_are_what_the_steps_counted(training_config: TrainConfig, monkeypatch):
    counts, train_step = [], kernels.train_step

    def count(*arguments):
        result = train_step(*arguments)
        counts.append(result.counts.numpy())
        return result

    monkeypatch.setattr(kernels, "train_step", count)
    train.run(options.replaced(training_config, activity_intervals=4, log_every=1))
    table = columns(training_config.out, 4)
    ends = [10, 20, 29, 39]
    assert (table["interval"] == np.arange(4)[:, None]).all()
    assert (table["latent"] == np.arange(64)).all()
    assert (table["tokens"] == 256 * np.array(ends)[:, None]).all()
    last, start = np.zeros(64, int), 0
    for number, end in enumerate(ends):
        assert (table["fired"][number] == sum(counts[start:end])).all()
        for step in range(start, end):
            last[counts[step] > 0] = 256 * (step + 1)
        assert (table["last_fired"][number] == last).all()
        start = end
    l0 = [line["l0"] for line in read_history(training_config.out)]
    assert table["fired"].sum() == pytest.approx(256 * sum(l0))
    assert 3 < np.mean(l0) <= 4
    dead = [line["dead"] for line in read_history(training_config.out)]
    assert len(dead) == 39


def test_a_short_run_has_an_interval_per_step(training_config: TrainConfig):
    train.run(options.replaced(training_config, train_tokens=3 * 256))
    assert columns(training_config.out, 3)["tokens"][:, 0].tolist() == [256, 512, 768]


def test_a_run_that_stops_early_ends_in_a_shorter_interval(training_config: TrainConfig, monkeypatch):
    monkeypatch.setattr(kernels, "fvu", lambda *_: 0.5)  # nothing gets better
    config = options.replaced(training_config, patience=2, validations=13, activity_intervals=5)
    train.run(config)
    assert read_history(config.out)[-1]["step"] == 9
    assert columns(config.out, 2)["tokens"][:, 0].tolist() == [8 * 256, 9 * 256]


def test_dead_revived_and_dense_latents_are_told(tmp_path: Path):
    told = [
        # tokens, fired, last fired
        (100, [60, 0, 5, 10], [100, 0, 90, 100]),
        (200, [2, 3, 0, 11], [200, 150, 90, 200]),
        (300, [0, 0, 80, 0], [200, 150, 300, 200]),
    ]
    for interval, (tokens, fired, last) in enumerate(told):
        for first in (0, 2):  # two shards
            shard = slice(first, first + 2)
            write_interval(tmp_path, interval, tokens, first, torch.tensor(fired)[shard], torch.tensor(last)[shard])
    write_interval(tmp_path, 3, 400, 0, torch.zeros(4).long(), torch.zeros(4).long())  # of a run that went further
    collect(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["activity.parquet"]
    assert read_intervals(tmp_path, 99) == [
        Interval(100, dead=1, revived=0, dense=1),  # the second is dead; the fourth fires on a tenth, and no more
        Interval(200, dead=1, revived=1, dense=1),  # the second came back, the third died
        Interval(300, dead=3, revived=1, dense=1),  # the third came back and fires on most rows
    ]
    assert [interval.dead for interval in read_intervals(tmp_path, 100)] == [0, 1, 1]


def test_an_sae_without_activity(tmp_path: Path):
    with pytest.raises(InputError, match=r"activity.parquet is missing: this SAE was trained before activity was kept"):
        read_intervals(tmp_path, 100)


def test_latents_that_are_dead_are_those_that_have_not_fired_for_long(training_config: TrainConfig, monkeypatch):
    """What the step is told to revive is what the table says."""
    told, train_step = {}, kernels.train_step

    def watch(*arguments):
        told[arguments[6]] = int(arguments[3].sum())
        return train_step(*arguments)

    monkeypatch.setattr(kernels, "train_step", watch)
    config = options.replaced(training_config, dead_after_tokens=256, activity_intervals=39, k=1, k_aux=0, log_every=1)
    train.run(config)
    assert [line["dead"] for line in read_history(config.out)] == list(told.values())
    intervals = read_intervals(config.out, 256)
    assert sum(interval.dead for interval in intervals) > 0
    # A step's own rows are not known before it: it takes as dead what had not fired a batch more before.
    last = columns(config.out, 39)["last_fired"]
    for step in range(2, 40):
        assert told[step] == (256 * step - last[step - 2] > 256).sum()
