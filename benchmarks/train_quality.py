"""Trains monosemy on the rows that other libraries were trained on, and compares what they reach and how fast.

    python benchmarks/peer_quality.py export --activations DIR --out DATA
    PYTHON benchmarks/peer_quality.py train LIBRARY --data DATA --learning-rate X --out results/peers/LIBRARY-X.json ...
    python benchmarks/train_quality.py --data DATA --peers PYTHON SCRIPT

All see the same batches: 2048 rows x 500 steps, 8192 latents, k = 32, attention sinks included. Every library has its
best of the learning rates that were tried. FVU and the share of silent latents are of 20,000 held-out rows.
Seconds of the others are their steps times the time of a step, measured by SCRIPT (see train_step.py) in this same run,
in turn with ours: their training need not have run on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import RESULTS, keep
from peer_quality import best
from train_step import last_line

from monosemy import kernels, options
from monosemy.sae.settings import TrainConfig
from monosemy.sae.training_state import Latents, initial_state

RATES = (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)
STEPS, BATCH = 500, 2048

TIMED = ("sparsify", "dictionary_learning", "saelens-bf16", "saelens")
"""What SCRIPT can time."""


def train(rows: np.ndarray, held_out: torch.Tensor, learning_rate: float, n_latents: int = 8192) -> dict[str, Any]:
    """One run with monosemy's defaults but for the learning rate; seconds are without evaluation."""
    shape = {"n_latents": n_latents, "k": 32, "batch_size": BATCH, "train_tokens": STEPS * BATCH}
    config = options.build(TrainConfig, {"activations": Path(), "out": Path(), "learning_rate": learning_rate, **shape})
    start_rows = torch.from_numpy(np.array(rows[: 1 << 15]))
    state = initial_state(config, [start_rows], Latents(0, config.n_latents), torch.device("cpu"))
    workspace, seconds, curve = kernels.make_workspace(state.parameters), 0.0, []
    for step in range(1, STEPS + 1):
        places = np.arange((step - 1) * BATCH, step * BATCH) % len(rows)
        batch = torch.from_numpy(rows[places])
        seen = step * BATCH
        start = time.perf_counter()
        dead = seen - state.last_fired > config.dead_after
        result = kernels.train_step(
            state.parameters, state.moments, batch, dead, config.step_settings(step), config.learning_rate(step), step,
            workspace,
        )  # fmt: skip
        state.last_fired[result.counts > 0] = seen
        seconds += time.perf_counter() - start
        if step % 25 == 0:
            curve.append({"step": step, "seconds": seconds, **held_out_figures(state.parameters, held_out, config.k)})
    return {"learning_rate": learning_rate, "ms_per_step": 1e3 * seconds / STEPS, "curve": curve, **curve[-1]}


def held_out_figures(parameters: kernels.Parameters, rows: torch.Tensor, k: int) -> dict[str, float]:
    """FVU, L0 and the share of latents that never fire."""
    code = kernels.encode_topk(rows - parameters.b_pre, parameters.W_enc, parameters.b_enc, k)
    error = kernels.decode(code, parameters.W_dec, parameters.b_pre) - rows
    used = code.values > 0
    fired = torch.bincount(code.indices[used].long(), minlength=len(parameters.b_enc)) > 0
    variance = (rows - rows.mean(dim=0)).double().square().sum()
    return {
        "fvu": (error.double().square().sum() / variance).item(),
        "l0": used.sum().item() / len(rows),
        "dead": 1 - fired.double().mean().item(),
    }


def seconds_to_reach(curve: list[dict[str, float]], fvu: float) -> float:
    """Seconds until the held-out FVU is no higher, between two measurements by interpolation."""
    for before, after in zip([{"seconds": 0.0, "fvu": float("inf")}, *curve], curve, strict=False):
        if after["fvu"] <= fvu:
            if before["seconds"] == 0:
                return after["seconds"]
            part = (before["fvu"] - fvu) / (before["fvu"] - after["fvu"])
            return before["seconds"] + part * (after["seconds"] - before["seconds"])
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what peer_quality.py exported")
    parser.add_argument("--peers", nargs=2, metavar=("PYTHON", "SCRIPT"), required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    arguments = parser.parse_args()
    rows = np.load(arguments.data / "train.npy", mmap_mode="r")
    held_out = torch.from_numpy(np.load(arguments.data / "heldout.npy"))
    ours = [train(rows, held_out, rate) for rate in arguments.rates]
    default = TrainConfig(out=Path(), activations=Path()).peak_learning_rate
    chosen = min(ours, key=lambda run: run["fvu"])
    at_default = min(ours, key=lambda run: abs(run["learning_rate"] - default))

    peers = best(RESULTS / "peers")
    sizes = ["--width", "576", "--latents", "8192", "--k", "32", "--batch", str(BATCH), "--steps", "4"]
    own = [sys.executable, str(Path(__file__).parent / "train_step.py"), *sizes, "--json"]
    python, script = arguments.peers
    found: dict[str, Any] = {"ours": ours, "default_learning_rate": default, "peers": {}}
    for name, peer in peers.items():
        library = next(known for known in TIMED if name.startswith(known))
        pairs = [(last_line(own), last_line([python, script, library, *sizes])) for _ in range(3)]
        ratio = statistics.median(theirs["ms_per_step"] / mine["ms_per_step"] for mine, theirs in pairs)
        reached = seconds_to_reach(at_default["curve"], peer["fvu"]) / at_default["seconds"] * STEPS
        found["peers"][name] = {
            "learning_rate": peer["learning_rate"], "fvu": peer["fvu"], "dead": peer["dead"],
            "tried": {str(rate): run["fvu"] for rate, run in peer["runs"].items()},
            "step_ratio": ratio, "our_steps_to_its_fvu": reached, "time_ratio": ratio * STEPS / reached,
        }  # fmt: skip
    table = [("library", "learning rate", "FVU", "silent latents", "time, in units of what we need to its FVU")]
    for title, run in (("monosemy, default", at_default), ("monosemy, best", chosen)):
        table.append((title, f"{run['learning_rate']:g}", f"{run['fvu']:.4f}", f"{run['dead']:.2%}", ""))
    for name, of in found["peers"].items():
        time_ratio = f"{of['time_ratio']:.1f}"
        table.append((name, f"{of['learning_rate']:g}", f"{of['fvu']:.4f}", f"{of['dead']:.2%}", time_ratio))
    keep("train_quality", found, table)


if __name__ == "__main__":
    main()
