"""A training that was stopped, however it was, goes on and ends in the same bytes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from monosemy import kernels, options
from monosemy.artifact import write_tensors
from monosemy.kernels import Moments, Parameters
from monosemy.runtime import ALONE
from monosemy.sae import train
from monosemy.sae.settings import TrainConfig
from monosemy.sae.tracking import read_history
from monosemy.sae.training_state import (
    BLOCK,
    Latents,
    TrainState,
    checkpoints,
    collect_parameters,
    initial_state,
    load_checkpoint,
    save_checkpoint,
    write_parameters,
)  # fmt: skip

CPU = torch.device("cpu")


def partial(config: TrainConfig) -> Path:
    return config.out.with_name(config.out.name + ".partial")


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------

EVERYTHING = {"activation": "batch_topk", "decoder": "free", "start_k": 12, "anneal": 0.6, "prefixes": (8,), "ema": 0.9}


@pytest.mark.parametrize(
    ("stops", "changes"),
    [((3, 7, 8, 20, 39), {}), ((12, 28), EVERYTHING)],
    ids=["topk", "most"],
)
def test_interrupted_training_ends_in_the_same_bytes(
    training_config: TrainConfig, tmp_path: Path, monkeypatch, interrupted_training, stops, changes
):
    config = options.replaced(training_config, log_every=3, **changes)
    whole, train_step = train.run(config), kernels.train_step
    for stop_at in stops:
        again = options.replaced(config, out=tmp_path / f"again-{stop_at}")
        interrupted_training(again, stop_at)
        taken = []
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "train_step", lambda *a, taken=taken: (taken.append(a[6]), train_step(*a))[1])
            resumed = train.run(again)
        assert taken == list(range(7 * ((stop_at - 1) // 7) + 1, 40))  # went on from the last checkpoint
        assert resumed.digest == whole.digest
    steps = [line["step"] for line in read_history(config.out)]
    assert steps == sorted(set(steps))


def test_an_interrupted_grid_ends_in_the_same_bytes(training_config: TrainConfig, tmp_path: Path, interrupted_training):
    """Also between two of its SAEs, and when one of them is complete."""
    grid = options.replaced(training_config, grid=("k=2,4",), train_tokens=2560)
    whole = train.train_all(grid)
    for stop_at in (15, 20):
        again = options.replaced(grid, out=tmp_path / f"again-{stop_at}")
        interrupted_training(again, stop_at)
        assert [m.digest for m in train.train_all(again)] == [m.digest for m in whole]
    shutil.rmtree(again.out / "k=2")
    assert [m.digest for m in train.train_all(again)] == [m.digest for m in whole]


def test_a_run_may_be_stopped_again_before_it_has_done_anything(
    training_config: TrainConfig, tmp_path: Path, monkeypatch, interrupted_training
):
    """Nothing is only in memory: what a first run left, history too, survives a second that is killed at once."""
    config = options.replaced(training_config, log_every=1, checkpoint_every=10)
    whole = train.run(config)
    again = options.replaced(config, out=tmp_path / "again")
    interrupted_training(again, 26)
    kept = (partial(again) / "history.jsonl").read_text().splitlines(keepends=True)[:20]

    def killed(*_):
        found.append((partial(again) / "history.jsonl").read_text())  # what a power cut would leave
        raise KeyboardInterrupt

    found: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(again)
    assert found == ["".join(kept)]  # lines after the checkpoint are gone, those before are not
    assert train.run(again).digest == whole.digest


def test_a_half_written_line_of_history_is_cut_off(training_config: TrainConfig, tmp_path: Path, interrupted_training):
    whole = train.run(training_config)
    again = options.replaced(training_config, out=tmp_path / "again")
    interrupted_training(again, 22)
    with (partial(again) / "history.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert train.run(again).digest == whole.digest


def test_a_real_kill(training_config: TrainConfig, tiny_run: Path, tmp_path: Path):
    """SIGKILL, at whatever moment it comes after some checkpoints."""
    config = options.replaced(training_config, train_tokens=150 * 256, checkpoint_every=5, device="cpu")
    whole = train.run(config)
    again = options.replaced(config, out=tmp_path / "again")
    command = [sys.executable, "-m", "monosemy", "train", "--out", str(again.out)]
    for name in ("activations", "n_latents", "k", "train_tokens", "batch_size", "dead_after_tokens", "k_aux", "device"):
        command += [f"--{name.replace('_', '-')}", str(options.values(config)[name])]
    # As many threads as here: means and products differ with their number in the last bits.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([*command, "--checkpoint-every", "5"], stderr=subprocess.PIPE, env=environment)
    while process.poll() is None and not (partial(again) / "checkpoint-000000015").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert 1 <= len(checkpoints(partial(again))) <= 3  # the third is there for a moment, before the first is dropped
    assert train.run(again).digest == whole.digest


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_checkpoints_are_rotated_and_gone_at_the_end(training_config: TrainConfig, monkeypatch, keep: int):
    config, seen, train_step = options.replaced(training_config, keep_checkpoints=keep), [], kernels.train_step

    def watch(*arguments):
        seen.append([path.name for path in checkpoints(partial(config))])
        return train_step(*arguments)

    monkeypatch.setattr(kernels, "train_step", watch)
    manifest = train.run(config)
    names = [f"checkpoint-{step:09}" for step in range(7, 39, 7)]
    for step, found in enumerate(seen, 1):
        assert found == names[: (step - 1) // 7][-keep:]
    assert sorted(manifest.files) == ["activity.parquet", "history.jsonl", "sae.json", "sae.safetensors"]
    assert {path.name for path in config.out.iterdir()} == {*manifest.files, "manifest.json"}


def test_a_half_written_checkpoint_is_ignored(training_config: TrainConfig, tmp_path: Path, interrupted_training):
    whole = train.run(training_config)
    again = options.replaced(training_config, out=tmp_path / "again")
    interrupted_training(again, 18)
    half = partial(again) / "checkpoint-000000021.partial"  # the next one: the run will write it again
    half.mkdir()
    (half / "000000000-000000064.safetensors").write_bytes(b"half")
    (half / "000000000-000000032.safetensors").write_bytes(b"of a run with two shards")
    (partial(again) / "checkpoint-000000099.partial").mkdir()
    assert [path.name for path in checkpoints(partial(again))] == ["checkpoint-000000007", "checkpoint-000000014"]
    assert train.run(again).digest == whole.digest


def random_state(config: TrainConfig, latents: Latents, seed: int = 0) -> TrainState:
    """Every tensor a function of (seed, latent), so that a shard's is a part of the whole's."""
    rows = [torch.ones(3, 32), torch.ones(3, 32)]
    random = torch.Generator().manual_seed(seed)
    whole = initial_state(config, rows, Latents(0, 64), CPU)
    shard = initial_state(config, rows, latents, CPU)
    by_latent = ("W_enc", "b_enc", "W_dec", "last_fired", "fired")
    for (name, tensor), part in zip(whole.named().items(), shard.named().values(), strict=True):
        drawn = (100 * torch.rand(tensor.shape, generator=random)).to(tensor.dtype)
        part.copy_(drawn[latents.first : latents.end] if name.split(".")[-1] in by_latent else drawn)
    return shard


@pytest.mark.parametrize("before", [(0, 64), (0, 21, 64), (0, 16, 32, 48, 64)], ids=str)
@pytest.mark.parametrize("after", [(0, 64), (0, 32, 64), (0, 5, 64)], ids=str)
def test_checkpoints_are_read_by_any_number_of_shards(training_config: TrainConfig, tmp_path: Path, before, after):
    changes = {"ema": 0.5, "target_site": "L1.mlp_out", "normalize": "none", "skip": True}
    config = options.replaced(training_config, **changes)
    for first, end in itertools.pairwise(before):
        shard = Latents(first, end)
        folder = tmp_path / "whole"
        folder.mkdir(exist_ok=True)
        save_checkpoint(tmp_path / f"{first}", 3, random_state(config, shard), {"step": 3}, shard, ALONE, True, 2)
        for file in (tmp_path / f"{first}" / "checkpoint-000000003").iterdir():  # what ranks write side by side
            shutil.copy(file, folder)
    for first, end in itertools.pairwise(after):
        wanted = random_state(config, Latents(first, end))
        found = random_state(config, Latents(first, end), seed=1)
        assert load_checkpoint(folder, found, Latents(first, end)) == {"step": 3}
        assert found.named().keys() == wanted.named().keys()
        for name, tensor in wanted.named().items():
            assert torch.equal(found.named()[name], tensor), name


def test_progress_survives_with_infinities(training_config: TrainConfig, tmp_path: Path):
    latents = Latents(0, 64)
    progress = {"step": 4, "validations": train.Validations(float("inf"), 0, 0), "ended": False}
    save_checkpoint(tmp_path, 4, random_state(training_config, latents), progress, latents, ALONE, True, 1)
    [path] = checkpoints(tmp_path)
    found = load_checkpoint(path, random_state(training_config, latents), latents)
    assert found == json.loads(json.dumps(progress))
    assert train.Validations(*found["validations"]) == progress["validations"]


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of all ranks
# ---------------------------------------------------------------------------------------------------------------------


def parameters(value: float, latents: Latents) -> Parameters:
    n = latents.end - latents.first
    number = torch.arange(latents.first, latents.end).float()
    return Parameters(
        torch.full((n, 3), value), number, torch.full((n, 2), value), torch.full((3,), value), torch.full((2,), value)
    )


def test_parameters_are_collected_from_all_shards(tmp_path: Path):
    for shard in (Latents(0, 4), Latents(4, 5), Latents(5, 10)):
        write_parameters(tmp_path, "best", parameters(1.0, shard), shard)
    found = collect_parameters(tmp_path, "best")
    for name, tensor in parameters(1.0, Latents(0, 10)).named().items():
        assert torch.equal(getattr(found, name), tensor)
    assert found.W_skip is None
    assert list(tmp_path.iterdir()) == []


def test_shards_of_an_earlier_run_are_replaced(tmp_path: Path):
    """A run that goes on with another number of ranks writes other files."""
    for shards in ((Latents(0, 10),), (Latents(0, 5), Latents(5, 10)), (Latents(0, 3), Latents(3, 6), Latents(6, 10))):
        for shard in shards:
            write_parameters(tmp_path, "best", parameters(float(len(shards)), shard), shard)
        assert len(list(tmp_path.iterdir())) == len(shards)
    write_tensors(tmp_path / "other-000000000-000000010.safetensors", {"x": torch.ones(1)})
    found = collect_parameters(tmp_path, "best")
    assert torch.equal(found.b_enc, torch.arange(10).float())
    assert (found.W_enc == 3).all()
    assert [path.name for path in tmp_path.iterdir()] == ["other-000000000-000000010.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# The start
# ---------------------------------------------------------------------------------------------------------------------


def test_a_shard_starts_as_its_part_of_the_whole(training_config: TrainConfig):
    config = options.replaced(training_config, n_latents=BLOCK + 100)
    rows = [torch.randn(50, 32)]
    whole = initial_state(config, rows, Latents(0, BLOCK + 100), CPU).parameters
    for shard in (Latents(0, 7), Latents(BLOCK - 5, BLOCK + 5), Latents(BLOCK + 1, BLOCK + 100)):
        part = initial_state(config, rows, shard, CPU)
        for name in ("W_enc", "b_enc", "W_dec"):
            assert torch.equal(getattr(part.parameters, name), getattr(whole, name)[shard.first : shard.end])
        assert len(part.last_fired) == len(part.fired) == shard.end - shard.first
    torch.testing.assert_close(whole.W_dec.norm(dim=1), torch.ones(BLOCK + 100))
    assert len(whole.W_dec.unique(dim=0)) == BLOCK + 100  # blocks are drawn anew
    other = initial_state(options.replaced(config, seed=1), rows, Latents(0, 7), CPU).parameters
    assert not torch.equal(other.W_dec, whole.W_dec[:7])


def test_moments_and_average_start_apart_from_the_weights(training_config: TrainConfig):
    state = initial_state(options.replaced(training_config, ema=0.9), [torch.ones(3, 32)], Latents(0, 64), CPU)
    assert isinstance(state.moments, Moments)
    state.parameters.W_dec.zero_()
    assert state.average is not None
    torch.testing.assert_close(state.average.W_dec.norm(dim=1), torch.ones(64))
    assert all(not tensor.any() for moment in state.moments for tensor in moment.named().values())
    assert len({tensor.data_ptr() for tensor in state.named().values()}) == len(state.named())
