"""Several processes train the SAE that one would: latents shared, or rows, and whoever dies on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from monosemy import options
from monosemy.activations.store import open_activations
from monosemy.artifact import Draft, read_manifest, recorded_config
from monosemy.runtime import InputError, Ranks
from monosemy.sae import train
from monosemy.sae.autoencoder import open_sae
from monosemy.sae.settings import TrainConfig
from monosemy.sae.sharding import place_and_exchange
from monosemy.sae.tracking import read_history

DYING = """
import os, signal, sys
from pathlib import Path
from monosemy import kernels
from monosemy.__main__ import main

train_step, mark = kernels.train_step, Path(sys.argv.pop(1))

def dying(*arguments):
    if arguments[6] == 15 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*arguments)

kernels.train_step = dying
sys.exit(main(sys.argv[1:]))
"""
"""Rank 1 is killed in step 15, the first time."""


def run_under_torchrun(config: TrainConfig, *program: str, restarts: int = 0) -> str:
    """Two ranks run the `train` command with the options of `config`; what they said."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command += [*(program or ("-m", "monosemy")), "train"]
    defaults = {name: field.default for name, field in options.options(TrainConfig).items()}
    for name, value in options.values(config).items():
        if value != defaults[name]:
            command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    # As many threads as here: means and products differ with their number in the last bits.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_alike(ours: Path, theirs: Path) -> None:
    """The same training up to the rounding of sums in another order."""
    one, other = open_sae(ours), open_sae(theirs)
    torch.testing.assert_close(one.threshold, other.threshold, rtol=0.01, atol=0)  # or None, both
    for name, tensor in one.parameters.named().items():
        assert (tensor - getattr(other.parameters, name)).abs().mean() < 1e-3 * tensor.abs().mean(), name
    for mine, their in zip(read_history(ours), read_history(theirs), strict=True):
        assert mine.keys() == their.keys()
        for name in {"loss", "fvu", "l0", "learning_rate", "validation_fvu"} & mine.keys():
            assert mine[name] == pytest.approx(their[name], rel=1e-3), (mine["step"], name)
        assert [mine[name] for name in ("step", "tokens")] == [their[name] for name in ("step", "tokens")]
    mine, their = (parquet.read_table(folder / "activity.parquet") for folder in (ours, theirs))
    for name in ("interval", "tokens", "latent"):
        assert mine.column(name).equals(their.column(name))
    fired = [torch.tensor(table.column("fired").to_numpy().copy()).double() for table in (mine, their)]
    assert (fired[0] - fired[1]).abs().sum() < 2e-3 * fired[0].sum()


@pytest.fixture
def config(training_config: TrainConfig) -> TrainConfig:
    """An odd number of latents, so that shards differ in size; some latents die and are revived."""
    changes = {"n_latents": 63, "log_every": 1, "dead_after_tokens": 1500, "learning_rate": 5e-3, "device": "cpu"}
    return options.replaced(training_config, **changes)


@pytest.mark.slow
def test_shared_latents_and_a_rank_that_is_killed(config: TrainConfig, tmp_path: Path):
    """A grid, so that several SAEs talk in turn."""
    grid = options.replaced(config, grid=("activation=topk,batch_topk",))
    train.train_all(grid)
    two = options.replaced(grid, out=tmp_path / "two")
    said = run_under_torchrun(two)
    assert said.count("train: ") == 1  # one rank speaks for all
    for alone, shared in zip(grid.members(), two.members(), strict=True):
        assert_alike(shared.out, alone.out)
        assert recorded_config(alone) == read_manifest(shared.out, "sae", verify=True).config

    mark, program = tmp_path / "died", tmp_path / "dying.py"
    program.write_text(DYING)
    killed = options.replaced(config, out=tmp_path / "killed")
    run_under_torchrun(killed, str(program), str(mark), restarts=1)
    assert mark.exists()
    undisturbed = read_manifest(tmp_path / "two" / "activation=topk", "sae")
    assert read_manifest(killed.out, "sae").digest == undisturbed.digest


@pytest.mark.slow
def test_shared_rows_straight_from_the_model(config: TrainConfig, tiny_llama_folder: Path, tiny_run: Path):
    """Both ranks run the model, and remember what they saw of it."""
    source = {"model": str(tiny_llama_folder), "tokens": tiny_run / "tokens", "site": "L1.resid_post"}
    live = options.replaced(config, activations=None, prefixes=(10, 30), **source)
    train.run(live)
    replicas = options.replaced(live, out=live.out.with_name("replicas"), latent_shards=1)
    run_under_torchrun(replicas)
    assert_alike(replicas.out, live.out)
    files = sorted(read_manifest(replicas.out, "sae").files)
    assert files == ["activity.parquet", "history.jsonl", "sae.json", "sae.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be shared
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "shards", "message"),
    [
        (Ranks(0, 1), 2, "latent_shards is 2, but there is one rank: start torchrun with as many"),
        (Ranks(0, 4), 3, "latent_shards is 3; expected a divisor of the 4 ranks"),
        (Ranks(0, 4), 8, "latent_shards is 8; expected a divisor of the 4 ranks"),
        (Ranks(0, 64), 0, "latent_shards is 64, more than the 10 latents"),
    ],
)
def test_bad_shards(ranks: Ranks, shards: int, message: str):
    with pytest.raises(InputError, match=message):
        place_and_exchange(10, ranks, shards, torch.device("cpu"))


def test_one_process_holds_everything(config: TrainConfig):
    place, _ = place_and_exchange(10, Ranks(0, 1), 1, torch.device("cpu"))
    assert (place.replica, place.n_replicas, place.first_latent, place.end_latent) == (0, 1, 0, 10)
    with pytest.raises(InputError, match="latent_shards is 2, but there is one rank"):
        train.run(options.replaced(config, latent_shards=2))
    assert not config.out.with_name("sae.partial").exists()


def test_relu_is_not_shared(config: TrainConfig):
    relu, device = options.replaced(config, activation="relu", l1=0.1), torch.device("cpu")
    source = open_activations(str(config.activations))
    draft, feed = Draft(config.out, "sae", relu, {}), train.Feed(source, source.sites[0], relu, device)
    with pytest.raises(InputError, match="relu is trained densely, by one process: start it without torchrun"):
        train.Training(relu, draft, feed, Ranks(0, 2), device)
