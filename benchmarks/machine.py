"""Where a figure comes from: processor, memory, versions and commit, for every file in benchmarks/results."""

import os
import platform
import subprocess
from pathlib import Path

from monosemy.artifact import software_versions


def describe() -> dict[str, object]:
    """The machine, the packages and the commit that a result belongs to."""
    return {
        "machine": machine(),
        "software": software_versions() | {"python": platform.python_version()},
        "commit": commit(),
    }


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    kept = ("avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": facts.get("model name", platform.processor()),
        "family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "features": [name for name in kept if name in facts.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def commit() -> str:
    """The commit of the working tree, with + if it has changes beside the results themselves."""
    here = Path(__file__).parents[1]
    run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()  # noqa: E731
    changes = run("status", "--porcelain", ".", ":!benchmarks/results", ":!README.md")
    return run("rev-parse", "--short", "HEAD") + ("+" if changes else "")
