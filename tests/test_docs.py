"""What the README says is generated, exists, and is a command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from monosemy.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_the_result_files_say():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str):
    assert (ROOT / link).exists()


def test_every_command_is_in_the_table():
    listed = re.findall(r"^\| `(\S+)", README, re.M)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("line", re.findall(rf"^monosemy (?:{'|'.join(COMMANDS)}) .*", README, re.M))
def test_command_lines_are_understood(line: str):
    """Every option in the README exists; what it names need not."""
    import importlib

    import tyro

    _, name, *arguments = shlex.split(line)
    command = COMMANDS[name]
    config = getattr(importlib.import_module(f"monosemy.{command.module}"), command.config)
    tyro.cli(config, args=arguments)


def test_python_example_runs(tiny_run: Path, tiny_llama_folder: Path):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    source = code[1].replace('"smollm2"', f'"{tiny_llama_folder}"').replace("runs/demo", str(tiny_run))
    source = re.sub(r"Addition\(\d+", "Addition(7", source.replace("L24.resid_post", "L1.resid_post"))
    names: dict = {}
    exec(source, names)
    assert names["logits"].shape[:2] == names["ids"].shape
    assert names["reconstruction"].shape == names["rows"].shape


def test_tree_names_what_there_is():
    named = re.findall(r"^  (\w+(?:\.py|/))", README, re.M)
    package = ROOT / "monosemy"
    for name in named:
        assert (package / name).exists(), name
    rooms = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert rooms <= {name.rstrip("/") for name in named}
