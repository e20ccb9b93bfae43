"""The learning rate that is best at each number of latents: held-out FVU over a grid, behind the default's rule.

    python benchmarks/peer_quality.py export --activations DIR --out DATA
    python benchmarks/train_rates.py --data DATA

2048 rows x 500 steps, k = 32, attention sinks included, monosemy's defaults but for the rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from pairs import keep
from train_quality import train

from monosemy.sae.settings import TrainConfig

SIZES = (2048, 8192, 32768)
RATES = (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what peer_quality.py exported")
    data = parser.parse_args().data
    rows = np.load(data / "train.npy", mmap_mode="r")
    held_out = torch.from_numpy(np.load(data / "heldout.npy"))
    found = {}
    table = [("latents", *(f"{rate:g}" for rate in RATES), "the rule says")]
    for size in SIZES:
        runs = found[str(size)] = {}
        for rate in RATES:
            of = train(rows, held_out, rate, size)
            runs[str(rate)] = {"fvu": of["fvu"], "dead": of["dead"]}
            print(f"{size} latents, {rate:g}: FVU {of['fvu']:.4f}, silent {of['dead']:.2%}", flush=True)
        rule = TrainConfig(out=Path(), activations=Path(), n_latents=size).peak_learning_rate
        cells = (f"{run['fvu']:.4f} ({run['dead']:.1%})" for run in runs.values())
        table.append((f"{size:,}", *cells, f"{rule:g}"))
    keep("train_rates", found, table)


if __name__ == "__main__":
    main()
