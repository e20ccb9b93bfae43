"""Put the tables of benchmarks/results into README.md, between the marks `NAME-table` and `/NAME-table`.

python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import demo
from pairs import RESULTS

ROOT = Path(__file__).parents[1]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(*names: str) -> str:
    """Which programs, machine and commit the figures are from."""
    results = [load(name) for name in names]
    machine, programs = results[0]["machine"], ", ".join(f"`benchmarks/{name}.py`" for name in names)
    commits = ", ".join(dict.fromkeys(result["commit"] for result in results))
    return (
        f"{programs} on {machine['cores']} cores ({machine['processor']}, "
        f"{', '.join(machine['features'])}, {machine['memory_gib']:.0f} GiB), commit {commits}."
    )


def demo_table() -> str:
    rows = "\n".join(f"| {what} | {asked} | {measured} |" for what, asked, measured in demo.table(load("demo")))
    return f"| the demo | aim | measured |\n|---|---|---|\n{rows}\n\n{source('demo')}"


def speed_table() -> str:
    """Pairs run in turn against `transformers`."""
    capture, generate = load("capture"), load("generate")
    rows = ["| SmolLM2, tokens per second | monosemy | transformers | ratio |", "|---|---|---|---|"]
    for dtype in ("float32", "bfloat16"):
        pair = capture[f"transformers_{dtype}"]
        rows.append(
            f"| activations at L24, bfloat16 against {dtype} | {pair['ours']:,.0f} | {pair['theirs']:,.0f} | "
            f"{pair['ratio']:.1f} |"
        )
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            pair = generate[f"{dtype}_{batch}"]
            what = f"greedy generation, {dtype}, {batch} prompt{'s' * (batch > 1)}"
            rows.append(f"| {what} | {pair['ours']:.0f} | {pair['theirs']:.0f} | {pair['ratio']:.1f} |")
    share = capture["bound"]["share"]
    bound = f"Capture reaches {share:.0%} of what this machine's matrix products alone would allow. "
    return "\n".join(rows) + f"\n\n{bound}{source('capture', 'generate')}"


def store_table() -> str:
    """What storage costs and changes."""
    result = load("store")
    rows = ["| activations stored as | bytes per row | FVU of an SAE trained on them | stream |", "|---|---|---|---|"]
    for stored_as in ("float32", "bfloat16", "int8"):
        of = result[stored_as]
        rows.append(f"| {stored_as} | {of['bytes_per_row']:.0f} | {of['fvu']:.4f} | {of['stream_gb_per_s']:.1f} GB/s |")
    return "\n".join(rows) + f"\n\nThe same small SAE from each, on the same held-out float32 rows. {source('store')}"


def train_table() -> str:
    """Speed and quality against other libraries."""
    step, quality, memory = load("train_step"), load("train_quality"), load("train_memory")
    rows = ["| one training step, 4096 rows | monosemy | other | times as fast |", "|---|---|---|---|"]
    for name, of in step["peers"].items():
        library, n_latents = name.split()
        own = step["ours"][n_latents]
        rows.append(
            f"| {int(n_latents):,} latents, {library} | {own['ms_per_step']:.0f} ms | {of['ms_per_step']:.0f} ms | "
            f"{of['ratio']:.1f} |"
        )
    own = min(quality["ours"], key=lambda run: abs(run["learning_rate"] - quality["default_learning_rate"]))
    rows += [
        "",
        "| 1.02M rows, 8192 latents, k = 32 | held-out FVU | silent latents | time to its FVU |",
        "|---|---|---|---|",
    ]
    rows.append(f"| monosemy, as it comes | {own['fvu']:.4f} | {own['dead']:.1%} | |")
    for name, of in quality["peers"].items():
        reached = f"{of['time_ratio']:.1f} times ours" if of["time_ratio"] else "not reached"
        rows.append(f"| {name}, lr {of['learning_rate']:g} | {of['fvu']:.4f} | {of['dead']:.1%} | {reached} |")
    share = step["ours"]["16384"]["share_of_bound"]
    text = (
        f"Each library at its best learning rate of those tried, on the same batches. With 16,384 latents, a bfloat16 "
        f"product of the encoder alone takes {share:.0%} of the time of our whole step (it multiplies bytes). "
        f"{memory['latents']:,} latents of width {memory['width']} train in {memory['peak_bytes'] / 2**30:.1f} GiB "
        f"(formula: {memory['formula_bytes'] / 2**30:.1f}). "
    )
    return "\n".join(rows) + f"\n\n{text}{source('train_step', 'train_quality', 'train_memory')}"


TABLES = {"demo": demo_table, "speed": speed_table, "store": store_table, "train": train_table}


def with_tables(readme: str) -> str:
    """The README's text with every table made anew from its result file."""
    for name, table in TABLES.items():
        marks = rf"(?s)(<!-- {name}-table -->\n).*?(<!-- /{name}-table -->)"
        readme = re.sub(marks, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", readme)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_tables(old)
    if "--check" in sys.argv and new != old:
        sys.exit("README.md is not what the result files say: python benchmarks/readme.py")
    path.write_text(new, encoding="utf-8")
