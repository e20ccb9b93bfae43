"""Put the tables of benchmarks/results into README.md, between the marks `NAME-table` and `/NAME-table`.

python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path

import demo

ROOT = Path(__file__).parents[1]


def with_tables(readme: str) -> str:
    """The README's text with every table made anew from its result file."""
    result = json.loads(demo.RESULT.read_text(encoding="utf-8"))
    machine = result["machine"]
    rows = "\n".join(f"| {what} | {asked} | {measured} |" for what, asked, measured in demo.table(result))
    source = (
        f"`benchmarks/demo.py` on {machine['cores']} cores ({machine['processor']}, "
        f"{', '.join(machine['features'])}, {machine['memory_gib']:.0f} GiB), commit {result['commit']}."
    )
    table = f"| the demo | aim | measured |\n|---|---|---|\n{rows}\n\n{source}"
    return re.sub(r"(?s)(<!-- demo-table -->\n).*?(<!-- /demo-table -->)", rf"\g<1>{table}\n\g<2>", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_tables(old)
    if "--check" in sys.argv and new != old:
        sys.exit("README.md is not what the result files say: python benchmarks/readme.py")
    path.write_text(new, encoding="utf-8")
