"""Run the default recipe in an empty folder, as `make demo` does, and keep what it took and what it reached.

    python benchmarks/demo.py [--out FOLDER | --finished RUN]

Prints a table and writes benchmarks/results/demo.json; `python benchmarks/readme.py` puts it into the README.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

from monosemy.explain.dose import load_choice
from monosemy.latents.labels import open_labels
from monosemy.runtime import duration
from monosemy.sae.evaluate import load_metrics

RESULT = Path(__file__).parent / "results" / "demo.json"


def measure(out: Path) -> dict[str, float]:
    """Wall time in seconds, and peak memory in GiB, of `monosemy run smollm2-sotu`."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "monosemy", "run", "smollm2-sotu", "--out", str(out)], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": round(time.monotonic() - start, 1), "peak_gib": round(peak, 2)}


def found(out: Path) -> dict[str, object]:
    """What the run in `out` reached."""
    metrics, choice = load_metrics(out / "metrics"), load_choice(out / "dose")
    labels = [label for label in open_labels(out / "labels") if label.label]
    return {
        "fvu": metrics.without_sinks.fvu,
        "loss_recovered": metrics.behaviour_without_sinks.loss_recovered,
        "dead": metrics.without_sinks.dead,
        "held_out_rows": metrics.without_sinks.rows,
        "labels": len(labels),
        "labels_certainty_half": sum(label.certainty >= 0.5 for label in labels),
        "steered_label": choice.chosen.label,
        "steering_effect": choice.chosen.effect,
        "plain_effect": choice.chosen.plain_effect,
        "stages": stage_times(out),
    }


def stage_times(out: Path) -> dict[str, float]:
    """Seconds that each stage of the run in `out` took."""
    return json.loads((out / "timings.json").read_text())


def table(result: dict) -> list[tuple[str, str, str]]:
    """Rows (what, asked, measured)."""
    steered = (
        f"{result['steering_effect']:.0%} of texts (plain {result['plain_effect']:.0%}), “{result['steered_label']}”"
    )
    named = f"{result['labels_certainty_half']:,} of {result['labels']:,}"
    return [
        ("time of the pipeline, 2 cores, no GPU", "< 6 min", duration(result["seconds"])),
        *([("peak memory", "< 6 GB", f"{result['peak_gib'] * 2**30 / 1e9:.1f} GB")] if "peak_gib" in result else []),
        ("held-out FVU, 8192 latents, k = 32", "≤ 0.19", f"{result['fvu']:.3f}"),
        ("loss recovered", "≥ 0.90", f"{result['loss_recovered']:.3f}"),
        ("latents silent on held-out text", "≤ 3%", f"{result['dead']:.1%}"),
        ("labels of certainty ≥ 0.5", "", named),
        ("texts that name the steered concept", "", steered),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="an empty folder to keep the run in")
    parser.add_argument("--finished", type=Path, help="a run that is there already: its stages' times, memory unknown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.finished or arguments.out or Path(scratch) / "demo"
        measured = {"seconds": round(sum(stage_times(out).values()), 1)} if arguments.finished else measure(out)
        result = {"benchmark": "demo", **describe(), **measured, **found(out)}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for row in table(result):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
