"""Times one training step, alone or in turn with other libraries, and against the product that bounds it.

    python benchmarks/train_step.py --width 576 --latents 16384 --k 32 --batch 4096 --steps 10 --json
    python benchmarks/train_step.py --peers PYTHON SCRIPT --rounds 3

The first form times the step and prints one JSON line with the keys of SCRIPT, a program that times a library's step as
`SCRIPT LIBRARY --width ... --steps ...`. The second runs both in turn, each in a process of its own (PYTHON is the
interpreter of the libraries' environment), and writes results/train_step.json. Batches are Gaussian: a step's time does
not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pairs import keep

from monosemy import kernels

PEERS = {16384: ("sparsify", "dictionary_learning", "saelens", "saelens-bf16"), 65536: ("sparsify",)}
"""Number of latents -> the libraries that are timed with so many."""


def step_times(width: int, n_latents: int, k: int, batch: int, steps: int) -> tuple[list[float], list[float]]:
    """(seconds per step, seconds per bfloat16 product of the encoder), measured in turn, after one that does not
    count."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_latents, width, generator=random), dim=1)
    parameters = kernels.Parameters(directions / 4, torch.zeros(n_latents), directions.clone(), torch.zeros(width))
    moments = kernels.Moments(parameters.zeros_like(), parameters.zeros_like())
    data = torch.randn(4 * batch, width, generator=random)
    dead, settings = torch.zeros(n_latents, dtype=torch.bool), kernels.StepSettings(k, 256)
    workspace = kernels.make_workspace(parameters)
    rows, weights = data[:batch].bfloat16(), directions.bfloat16()
    part = max(1, min(batch, (16 << 20) // (2 * n_latents)))  # rows whose product stays in cache
    buffer = torch.empty(part, n_latents, dtype=torch.bfloat16)
    times, bounds = [], []
    for number in range(1, steps + 2):
        start = time.perf_counter()
        kernels.train_step(
            parameters, moments, data[number % 4 * batch :][:batch], dead, settings, 1e-3, number, workspace
        )
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        for first in range(0, batch, part):
            torch.mm(rows[first : first + part], weights.T, out=buffer[: min(part, batch - first)])
        bounds.append(time.perf_counter() - start)
    return times[1:], bounds[1:]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The step's median, as a line of the other libraries' program, and the share of it that is the product alone."""
    times, bounds = step_times(arguments.width, arguments.latents, arguments.k, arguments.batch, arguments.steps)
    median = statistics.median(times)
    return {
        "library": "monosemy", "width": arguments.width, "latents": arguments.latents, "k": arguments.k,
        "batch": arguments.batch, "ms_per_step": round(median * 1e3, 1),
        "tokens_per_second": round(arguments.batch / median),
        "bfloat16_product_ms": round(statistics.median(bounds) * 1e3, 1),
        "share_of_bound": round(statistics.median(b / t for b, t in zip(bounds, times, strict=True)), 3),
    }  # fmt: skip


def last_line(command: list[str]) -> dict[str, Any]:
    """The JSON line that a program prints last."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(arguments: argparse.Namespace) -> None:
    """Ours and theirs in turn, in pairs; ratios are medians of the pairs' own."""
    python, script = arguments.peers
    found: dict[str, Any] = {
        "k": arguments.k,
        "width": arguments.width,
        "batch": arguments.batch,
        "ours": {},
        "peers": {},
    }
    for n_latents, libraries in PEERS.items():
        options = ["--width", arguments.width, "--latents", n_latents, "--k", arguments.k, "--batch", arguments.batch]
        own = [sys.executable, __file__, *map(str, options), "--steps", str(arguments.steps), "--json"]
        ours = []
        for library in libraries:
            pairs = []
            for _ in range(arguments.rounds):
                mine = last_line(own)
                theirs = last_line([python, script, library, *map(str, options), "--steps", "3"])
                print(mine["ms_per_step"], library, theirs["ms_per_step"], file=sys.stderr)
                pairs.append((mine, theirs))
            ours += [mine for mine, _ in pairs]
            found["peers"][f"{library} {n_latents}"] = {
                "ms_per_step": statistics.median(theirs["ms_per_step"] for _, theirs in pairs),
                "ratio": statistics.median(theirs["ms_per_step"] / mine["ms_per_step"] for mine, theirs in pairs),
            }
        names = ("ms_per_step", "tokens_per_second", "bfloat16_product_ms", "share_of_bound")
        found["ours"][str(n_latents)] = {name: statistics.median(mine[name] for mine in ours) for name in names}
    table = [("latents", "library", "ms per step", "times as long")]
    for n_latents in PEERS:
        own = found["ours"][str(n_latents)]
        table.append((f"{n_latents:,}", "monosemy", f"{own['ms_per_step']:.0f}", "1"))
        for name, of in found["peers"].items():
            library, size = name.split()
            if int(size) == n_latents:
                table.append((f"{n_latents:,}", library, f"{of['ms_per_step']:.0f}", f"{of['ratio']:.1f}"))
    keep("train_step", found, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--peers", nargs=2, metavar=("PYTHON", "SCRIPT"), help="time other libraries in turn")
    parser.add_argument("--rounds", type=int, default=3, help="pairs per library")
    arguments = parser.parse_args()
    if arguments.peers:
        compare(arguments)
        return
    result = measure(arguments)
    if not arguments.json:
        print(f"{result['ms_per_step']} ms per step; the bfloat16 product alone {result['bfloat16_product_ms']} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
