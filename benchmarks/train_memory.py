"""Peak memory of training many latents, against what the formula of docs/objective.md says.

python benchmarks/train_memory.py --latents 262144 --width 576 --k 32 --batch 2048
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import torch
from pairs import keep

from monosemy import kernels, options
from monosemy.kernels import cpu
from monosemy.runtime import cpu_count
from monosemy.sae.settings import TrainConfig
from monosemy.sae.training_state import Latents, initial_state


def formula(n_latents: int, width: int, k: int, k_aux: int, batch: int, n_dead: int) -> float:
    """Bytes: weights, two moments, the copy in bytes; per row a few vectors and the entries of both losses; a product
    of the encoder per thread; the encoder rows of dead latents, side by side."""
    per_latent = 6 * 4 * width + width + 64
    per_row = 4 * (4 * width + 8 * k + 10 * k_aux)
    product = max(cpu.PRODUCT_BYTES, 4 * cpu.FEWEST_ROWS * n_latents)
    return n_latents * per_latent + batch * per_row + cpu_count() * product + 4 * n_dead * width


def peak() -> float:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"latents": 1 << 18, "width": 576, "k": 32, "batch": 2048, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    n_latents, width, k, batch = arguments.latents, arguments.width, arguments.k, arguments.batch
    config = options.build(
        TrainConfig,
        {"activations": Path(), "out": Path(), "n_latents": n_latents, "k": k, "batch_size": batch},
    )
    warm(config, width)
    before = peak()
    rows = torch.randn(4 * batch, width, generator=torch.Generator().manual_seed(0))
    state = initial_state(config, [rows], Latents(0, n_latents), torch.device("cpu"))
    workspace = kernels.make_workspace(state.parameters)
    dead = torch.zeros(n_latents, dtype=torch.bool)
    for step in range(1, arguments.steps + 1):
        if step == arguments.steps:
            dead[: n_latents // 2] = True  # the auxiliary loss at its most expensive
        kernels.train_step(
            state.parameters, state.moments, rows[(step % 4) * batch :][:batch], dead, config.step_settings(step), 1e-3,
            step, workspace,
        )  # fmt: skip
    found, expected = peak() - before, formula(n_latents, width, k, config.optimizer.k_aux, batch, n_latents // 2)
    result = {"latents": n_latents, "width": width, "k": k, "batch": batch, "formula_bytes": expected,
              "peak_bytes": found}  # fmt: skip
    table = [("latents", "width", "formula", "measured"),
             (f"{n_latents:,}", str(width), f"{expected / 2**30:.2f} GiB", f"{found / 2**30:.2f} GiB")]  # fmt: skip
    keep("train_memory", result, table)


def warm(config: TrainConfig, width: int) -> None:
    """Load what every training loads: compiled kernels, threads, libraries."""
    small = options.replaced(config, n_latents=2048)
    rows = torch.randn(64, width)
    state = initial_state(small, [rows], Latents(0, 2048), torch.device("cpu"))
    dead = torch.zeros(2048, dtype=torch.bool)
    workspace = kernels.make_workspace(state.parameters)
    kernels.train_step(state.parameters, state.moments, rows, dead, small.step_settings(1), 1e-3, 1, workspace)


if __name__ == "__main__":
    main()
