"""How well other SAE libraries train, each through its own code: held-out FVU of TopK SAEs by learning rate.

python benchmarks/peer_quality.py export --activations DIR --out FOLDER        in the project's environment
python benchmarks/peer_quality.py train LIBRARY --data FOLDER --learning-rate X --out FILE.json       in the peers'

**Data.** All see the same rows in the same order, attention sinks included: each row normalised to mean 0 and standard
deviation 1, which is what monosemy trains on. A run that needs more rows than there are starts again from the first.

**Settings.** Every library keeps its own initialisation, loss, clipping, handling of the decoder norm and auxiliary
loss. The default schedules are made for far longer runs, so the warm-up is 5% of the steps for all, and the learning
rate falls linearly to 0 over the last half; only sparsify's Adam falls from the end of the warm-up on, as in its own
trainer (`sparsify-late-decay` has the schedule of the others). The defaults by which a latent counts as dead are also
made for longer runs, and would leave the auxiliary losses idle here: `--dead-after` gives another number of rows.

Peers' environment: pip install torch sae-lens natsort simple-parsing schedulefree nnsight umap-learn; then
pip install --no-deps eai-sparsify dictionary-learning
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""
DECAY = 0.5
"""Share of the steps, at the end, over which it falls to 0."""
EVALUATE_EVERY = 25
EVALUATION_ROWS = 2000
"""Rows that are reconstructed together."""
HELD_OUT_ROWS = 20_000


class Settings(NamedTuple):
    learning_rate: float
    steps: int
    batch: int
    latents: int
    k: int
    seed: int
    threads: int
    dead_after: int | None
    """Rows without firing after which a latent counts as dead; None: the library's default."""

    @property
    def warmup_steps(self) -> int:
        return max(round(WARMUP * self.steps), 1)

    @property
    def decay_steps(self) -> int:
        return max(round(DECAY * self.steps), 1)


class Peer(NamedTuple):
    """An SAE of another library, and its trainer."""

    step: Callable[[Tensor], object]
    """Train on a batch."""
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]]
    """As at inference: the reconstruction of rows, and their activations (row, latent), dense."""


# ---------------------------------------------------------------------------------------------------------------------
# Libraries
# ---------------------------------------------------------------------------------------------------------------------


def sparsify(width: int, settings: Settings, optimizer_name: str = "adam", late_decay: bool = False) -> Peer:
    """What `sparsify.Trainer.fit` does at each step; it has no auxiliary loss by default."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    sae = SparseCoder(width, SparseCoderConfig(num_latents=settings.latents, k=settings.k), dtype=torch.float32)
    is_started, schedule = False, None
    if optimizer_name == "adam":
        optimizer = torch.optim.Adam(sae.parameters(), lr=settings.learning_rate)
        if late_decay:
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min(1, step / settings.warmup_steps, (settings.steps - step) / settings.decay_steps),
            )
        else:
            schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=settings.learning_rate), momentum=0.95)
        optimizer.train()

    def step(batch: Tensor) -> None:
        nonlocal is_started
        if not is_started:
            sae.b_dec.data = batch.mean(0)
            is_started = True
        sae.set_decoder_norm_to_unit_norm()
        sae(batch).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        if schedule is None:  # schedule-free: the averaged weights
            optimizer.eval()
        values, indices, pre_activations = sae.encode(rows)
        reconstruction = sae.decode(values, indices)
        if schedule is None:
            optimizer.train()
        return reconstruction, torch.zeros_like(pre_activations).scatter_(1, indices, values)

    return Peer(step, reconstruct)


def dictionary_learning(width: int, settings: Settings) -> Peer:
    """Its TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=settings.steps, activation_dim=width, dict_size=settings.latents, k=settings.k, layer=0, lm_name="none",
        lr=settings.learning_rate, warmup_steps=settings.warmup_steps,
        decay_start=settings.steps - settings.decay_steps, seed=settings.seed, device="cpu",
    )  # fmt: skip
    if settings.dead_after is not None:
        trainer.dead_feature_threshold = settings.dead_after
    count = iter(range(settings.steps))
    return Peer(lambda batch: trainer.update(next(count), batch), lambda rows: trainer.ae(rows, output_features=True))


def saelens(width: int, settings: Settings, autocast: bool = False) -> Peer:
    """Its TopK SAE through its SAETrainer."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=width, d_sae=settings.latents, k=settings.k, device="cpu", dtype="float32")
    )
    config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch, train_batch_size_samples=settings.batch,
        lr=settings.learning_rate, lr_end=settings.learning_rate, lr_warm_up_steps=settings.warmup_steps,
        lr_decay_steps=settings.decay_steps, device="cpu", autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    if settings.dead_after is not None:
        config.dead_feature_window = math.ceil(settings.dead_after / settings.batch)
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(batch: Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        sae.eval()
        activations = sae.encode(rows)
        return sae.decode(activations), activations

    return Peer(step, reconstruct)


LIBRARIES: dict[str, tuple[str, Callable[[int, Settings], Peer]]] = {
    "sparsify": ("eai-sparsify", sparsify),
    "sparsify-late-decay": ("eai-sparsify", lambda *size: sparsify(*size, late_decay=True)),
    "sparsify-default": ("eai-sparsify", lambda *size: sparsify(*size, optimizer_name="signum")),
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
    "saelens": ("sae-lens", saelens),
    "saelens-bf16": ("sae-lens", lambda *size: saelens(*size, autocast=True)),
}
"""By name: the package, and what makes the peer. `sparsify-default` has its default optimizer, schedule-free Signum;
`saelens-bf16` its autocast."""


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(peer: Peer, held_out: Tensor) -> dict[str, float]:
    """FVU, L0, and the share of latents that are silent on all rows."""
    residual, active, ever_active = 0.0, 0, None
    for rows in held_out.split(EVALUATION_ROWS):
        reconstruction, activations = peer.reconstruct(rows)
        is_active = activations > 0
        residual += (rows - reconstruction).square().sum(dtype=torch.float64).item()
        active += int(is_active.sum())
        ever_active = is_active.any(0) if ever_active is None else ever_active | is_active.any(0)
    variance = (held_out - held_out.mean(0)).square().sum(dtype=torch.float64).item()
    silent = 1 - ever_active.float().mean().item()
    return {"fvu": residual / variance, "l0": active / len(held_out), "dead": silent}


def train(library: str, data: Path, settings: Settings) -> dict[str, Any]:
    """Train one peer. Seconds are those of training alone, by the wall clock, so a pause of the process counts."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rows = np.load(data / "train.npy", mmap_mode="r")
    held_out = torch.from_numpy(np.load(data / "heldout.npy"))
    package, make = LIBRARIES[library]
    peer = make(rows.shape[1], settings)
    curve, times = [], []
    for step in range(1, settings.steps + 1):
        places = np.arange((step - 1) * settings.batch, step * settings.batch) % len(rows)
        batch = torch.from_numpy(rows[places])
        start = time.perf_counter()
        peer.step(batch)
        times.append(time.perf_counter() - start)
        if step % EVALUATE_EVERY == 0 or step == settings.steps:
            known = evaluate(peer, held_out)
            curve.append({"step": step, "seconds": round(sum(times), 2), **known})
            print(f"{library} {settings.learning_rate:g} {curve[-1]}", flush=True)
    final = curve[-1]
    return {
        "library": library, "package": package, "version": version(package), "torch": torch.__version__,
        "settings": settings._asdict(), "training_rows": len(rows), "held_out_rows": len(held_out), "curve": curve,
        "fvu": final["fvu"], "dead": final["dead"], "l0": final["l0"], "seconds": final["seconds"],
        "ms_per_step": round(statistics.median(times) * 1e3, 1),
    }  # fmt: skip


def best(folder: Path) -> dict[str, dict[str, Any]]:
    """By library and `--dead-after`: its best run; and every run, by learning rate."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        dead_after = run["settings"]["dead_after"]
        name = run["library"] if dead_after is None else f"{run['library']} --dead-after {dead_after}"
        runs.setdefault(name, []).append(run)
    return {library: _best_of(found) for library, found in runs.items()}


def _best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rate = lambda run: run["settings"]["learning_rate"]  # noqa: E731
    winner = min(runs, key=lambda run: run["fvu"] if math.isfinite(run["fvu"]) else math.inf)
    kept = ("fvu", "dead", "l0", "ms_per_step")
    return {
        "learning_rate": rate(winner),
        **{name: winner[name] for name in ("version", *kept, "curve")},
        "runs": {rate(run): {name: run[name] for name in kept} for run in sorted(runs, key=rate)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def export(activations: Path, folder: Path, seed: int = 0) -> None:
    """Write train.npy and heldout.npy: normalised rows, float32, shuffled."""
    from monosemy.activations.store import open_activations
    from monosemy.runtime import random_stream
    from monosemy.sae.autoencoder import normalize_rows

    source = open_activations(activations)
    site = source.only_site(None)
    validation = torch.cat([source.table(number).validation for number in range(source.n_shards)]).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted, limit in (("heldout", validation, HELD_OUT_ROWS), ("train", ~validation, None)):
        places = random_stream(seed, int(name == "train")).permutation(np.flatnonzero(wanted))[:limit]
        rows, _, _ = normalize_rows(source.rows(site, places), "token")
        _save(folder / f"{name}.npy", lambda file, rows=rows: np.save(file, rows.numpy()))
        print(f"{name}: {len(rows)} rows of width {rows.shape[1]}")


def _save(path: Path, write: Callable[[Any], object]) -> None:
    """Write `path` in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("--activations", type=Path, required=True)
    exporting.add_argument("--out", type=Path, required=True)
    training = commands.add_parser("train")
    training.add_argument("library", choices=LIBRARIES)
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--learning-rate", type=float, required=True)
    training.add_argument("--out", type=Path, required=True)
    for name, default in {"steps": 500, "batch": 2048, "latents": 8192, "k": 32, "seed": 0, "threads": 2}.items():
        training.add_argument(f"--{name}", type=int, default=default)
    training.add_argument("--dead-after", type=int)
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments.activations, arguments.out)
        return
    settings = Settings(**{name: getattr(arguments, name) for name in Settings._fields})
    result = train(arguments.library, arguments.data, settings)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    _save(arguments.out, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
