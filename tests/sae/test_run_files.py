"""What a run leaves behind and goes on from: checkpoints, the activity of latents, figures elsewhere."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from monosemy import options
from monosemy.activations import capture
from monosemy.activations.store import open_activations
from monosemy.activations.stream import Stream
from monosemy.artifact import read_manifest
from monosemy.llm.sites import Site
from monosemy.sae import train
from monosemy.sae.activity import Interval, read_intervals, write_interval
from monosemy.sae.activity import collect as collect_activity
from monosemy.sae.settings import TrainConfig
from monosemy.sae.tracking import read_history
from monosemy.sae.training_state import checkpoints

SITE = Site.parse("L1.resid_post")


@pytest.fixture
def config(tiny_run: Path, tmp_path: Path) -> TrainConfig:
    sizes = {"n_latents": 64, "k": 4, "train_tokens": 10_000, "batch_size": 256, "k_aux": 8, "checkpoint_every": 7}
    paths = {"activations": tiny_run / "activations", "out": tmp_path / "sae"}
    return options.build(TrainConfig, sizes | paths)


def training_rows(tiny_run: Path) -> torch.Tensor:
    activations = open_activations(tiny_run / "activations")
    return Stream(activations, SITE, 1, 0).first_rows(1 << 15)[0]


@pytest.fixture(scope="module")
def mlp_run(tiny_run: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of what an MLP reads and writes, and of a residual."""
    out = tmp_path_factory.mktemp("mlp") / "activations"
    capture.run(
        capture.CaptureConfig(
            tokens=tiny_run / "tokens", out=out, model=str(tiny_llama_folder), dtype="float32", stored_as="float32",
            sites=("L1.mlp_in", "L1.mlp_out", "L1.resid_post"), shard_tokens=1000, batch_tokens=256,
        )
    )  # fmt: skip
    return out


def test_streams_of_two_sites_give_the_same_tokens(mlp_run: Path):
    activations = open_activations(mlp_run)
    pair = Stream(activations, Site.parse("L1.mlp_in"), 100, 3, target_site=Site.parse("L1.mlp_out"))
    alone = Stream(activations, Site.parse("L1.mlp_in"), 100, 3)
    for step in (0, 4, 40):
        rows, wanted = pair.batches(step)
        assert rows.shape == wanted.shape
        if pair.n_rows == alone.n_rows:
            assert torch.equal(rows, alone.batch(step))
    residual = Stream(activations, Site.parse("L1.resid_post"), 100, 3, target_site=Site.parse("L1.resid_post"))
    rows, same = residual.batches(2)
    assert torch.equal(rows, same)


def test_a_killed_training_ends_in_the_same_bytes(config: TrainConfig, tiny_run: Path, tmp_path: Path):
    """SIGKILL, at whatever moment it comes after the first checkpoint."""
    changes = {"train_tokens": 60_000, "checkpoint_every": 5, "ema": 0.9, "activation": "batch_topk"}
    whole = train.run(options.replaced(config, **changes))
    command = [
        sys.executable, "-m", "monosemy", "train", "--activations", str(tiny_run / "activations"), "--out",
        str(tmp_path / "again"), "--n-latents", "64", "--k", "4", "--train-tokens", "60000", "--batch-size", "256",
        "--k-aux", "8", "--checkpoint-every", "5", "--ema", "0.9", "--activation", "batch_topk",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    partial = tmp_path / "again.partial"
    while process.poll() is None and not checkpoints(partial):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(checkpoints(partial)) <= 2
    (partial / "checkpoint-000000999.partial").mkdir(exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert read_manifest(tmp_path / "again", "sae").digest == whole.digest
    steps = [line["step"] for line in read_history(tmp_path / "again")]
    assert steps == sorted(set(steps))


def test_activity_counts_what_fired(config: TrainConfig):
    train.run(options.replaced(config, activity_intervals=4, log_every=1))
    table = parquet.read_table(config.out / "activity.parquet")
    assert table.num_rows == 4 * 64
    l0 = [line["l0"] for line in read_history(config.out) if "l0" in line]
    assert sum(table.column("fired").to_pylist()) == pytest.approx(256 * sum(l0))
    fired, last = (np.array(table.column(name)).reshape(4, 64) for name in ("fired", "last_fired"))
    ends = [256 * round(part * 39 / 4) for part in range(1, 5)]
    assert sorted(set(table.column("tokens").to_pylist())) == ends
    for number in range(1, 4):
        assert ((last[number] > ends[number - 1]) == (fired[number] > 0)).all()


def test_dead_revived_and_dense_latents_are_told(tmp_path: Path):
    columns = [
        (0, 100, [60, 0, 5], [100, 0, 90]),
        (1, 200, [2, 3, 0], [200, 150, 90]),
        (2, 300, [0, 0, 80], [200, 150, 300]),
    ]
    for interval, tokens, fired, last in columns:
        for first in (0, 2):  # two shards
            part = slice(first, first + 2)
            write_interval(tmp_path, interval, tokens, first, torch.tensor(fired)[part], torch.tensor(last)[part])
    collect_activity(tmp_path, 3)
    assert read_intervals(tmp_path, 99) == [Interval(100, 1, 0, 1), Interval(200, 1, 1, 0), Interval(300, 2, 1, 1)]


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline_and_tensorboard(config: TrainConfig, tmp_path: Path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    train.run(options.replaced(config, wandb="monosemy-test", tensorboard=tmp_path / "board"))
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [log] = run.glob("run-*.wandb")
    content = log.read_bytes()
    assert b"validation_fvu" in content
    assert b"tokens_per_second" in content
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board" / "sae"))
    board.Reload()
    logged = {event.step: event.value for event in board.Scalars("fvu")}
    expected = {line["step"]: line["fvu"] for line in read_history(config.out) if "fvu" in line}
    assert logged == pytest.approx(expected, rel=1e-6)


def test_checkpoints_can_be_read_by_another_number_of_shards(config: TrainConfig, tmp_path: Path):
    from monosemy.runtime import ALONE
    from monosemy.sae.training_state import Latents, initial_state, load_checkpoint, save_checkpoint

    rows, device = [torch.randn(50, 32)], torch.device("cpu")
    whole = initial_state(config, rows, Latents(0, 64), device)
    for first, end in ((0, 20), (20, 64)):
        part = initial_state(config, rows, Latents(first, end), device)
        assert torch.equal(part.parameters.W_enc, whole.parameters.W_enc[first:end])
    whole.moments.first.W_dec.copy_(torch.randn(64, 32))
    save_checkpoint(tmp_path, 3, whole, {"step": 3}, Latents(0, 64), ALONE, True, 2)
    half = initial_state(config, [torch.zeros(50, 32)], Latents(20, 64), device)
    assert load_checkpoint(checkpoints(tmp_path)[0], half, Latents(20, 64)) == {"step": 3}
    assert torch.equal(half.moments.first.W_dec, whole.moments.first.W_dec[20:])
    assert torch.equal(half.parameters.b_pre, whole.parameters.b_pre)
    assert json.loads((checkpoints(tmp_path)[0] / "progress.json").read_text()) == {"step": 3}
