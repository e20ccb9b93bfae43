"""The house has floors, and imports only go down.

Every import of every module is read from its source: deferred, relative and type-only ones too. docs/architecture.md
draws the same floors.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "monosemy"
FLOORS = (
    ("runtime", "options", "artifact", "compiled"),
    ("kernels",),
    ("llm",),
    ("corpus", "documents", "selection", "spool", "units"),
    ("activations",),
    ("sae",),
    ("steer",),
    ("latents",),
    ("explain",),
    ("app", "report", "verify"),
    ("recipe",),
    ("__main__",),
)
"""Bottom up. The package's own `__init__` is the doorway: all may import it, and it may import all."""
LONGEST_FILE = 450
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

Sources = Mapping[str, str]
"""Path below monosemy/ -> source, for example {"sae/train.py": "from monosemy.kernels import encode"}."""


def problems(sources: Sources) -> list[str]:
    """What is wrong with the house that `sources` describes, one line each."""
    imports = {path: sorted(_imports(path, source, sources)) for path, source in sources.items()}
    return [
        *_unplaced(sources),
        *_upward(imports),
        *_cycles(imports),
        *_kernel_users(imports),
        *_bad_files(sources),
    ]


def _imports(path: str, source: str, sources: Sources) -> Iterator[str]:
    """The files of the house that `path` imports."""
    package = ["monosemy", *Path(path).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _files(name.name.split("."), sources)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = start + (node.module.split(".") if node.module else [])
            for name in node.names:
                yield from _files([*module, name.name], sources)


def _files(module: list[str], sources: Sources) -> Iterator[str]:
    """The file that a dotted name leads to: a module, or the module that holds the name."""
    if module[0] != "monosemy":
        return
    stem = "/".join(module[1:])
    for candidate in (f"{stem}.py", f"{stem}/__init__.py", f"{'/'.join(module[1:-1])}.py"):
        if candidate in sources:
            yield candidate
            return
    room = "/".join(module[1:-1])
    yield f"{room}/__init__.py" if room else "__init__.py"


def _room(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def _floor(path: str) -> int:
    return next((number for number, rooms in enumerate(FLOORS) if _room(path) in rooms), -1)


def _unplaced(sources: Sources) -> list[str]:
    strangers = {path for path in sources if _floor(path) < 0 and path != "__init__.py"}
    return [f"{path} is on no floor: place it in FLOORS and docs/architecture.md" for path in sorted(strangers)]


def _upward(imports: Mapping[str, list[str]]) -> list[str]:
    edges = [(path, target) for path, targets in imports.items() for target in targets if path != "__init__.py"]
    return [f"{path} imports {target}, a higher floor" for path, target in edges if _floor(target) > _floor(path)]


def _cycles(imports: Mapping[str, list[str]]) -> list[str]:
    try:
        graph = {path: set(targets) - {path, "__init__.py"} for path, targets in imports.items()}
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"cycle: {' imports '.join(reversed(error.args[1]))}"]
    return []


def _kernel_users(imports: Mapping[str, list[str]]) -> list[str]:
    return [
        f"{path} imports {target}: only sae imports kernels"
        for path, targets in imports.items()
        for target in targets
        if _room(target) == "kernels" and _room(path) not in ("sae", "kernels")
    ]


def _bad_files(sources: Sources) -> list[str]:
    found, stems = [], {}
    for path, source in sources.items():
        stem = Path(path).stem
        if stem in FORBIDDEN_NAMES:
            found.append(f"{path}: the name says nothing")
        if stem in stems and stem != "__init__":
            found.append(f"{path} and {stems[stem]} have the same name")
        stems.setdefault(stem, path)
        if (lines := source.count("\n")) > LONGEST_FILE:
            found.append(f"{path} has {lines} lines; at most {LONGEST_FILE}")
    return found


def test_the_house_is_in_order():
    sources = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert "runtime.py" in sources
    assert problems(sources) == []


def test_the_floors_are_those_of_the_documentation():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = page.split("## Floors")[1].split("```")[1]
    drawn = [line[:40].replace("/", "").replace(",", " ").split() for line in drawing.strip().splitlines()]
    assert [set(rooms) for rooms in reversed(drawn)] == [set(rooms) for rooms in FLOORS]


HOUSE = {
    "__init__.py": "from monosemy.report import write",
    "runtime.py": "",
    "artifact.py": "import json\nfrom monosemy.runtime import InputError",
    "kernels/__init__.py": "from .reference import encode",
    "kernels/reference.py": "import torch",
    "llm/__init__.py": "",
    "llm/llama.py": "from monosemy.runtime import InputError",
    "sae/__init__.py": "",
    "sae/autoencoder.py": "from monosemy import kernels, __version__",
    "sae/train.py": "from monosemy.sae.autoencoder import SAE\nfrom monosemy.llm import llama",
    "latents/__init__.py": "",
    "latents/index.py": "import monosemy.sae.autoencoder",
    "explain/__init__.py": "",
    "explain/explainer.py": "from monosemy.latents.index import open_index",
    "report.py": "from monosemy.explain.explainer import label",
    "__main__.py": "def main():\n    from monosemy.report import write",
}


def test_a_house_in_order_passes():
    assert problems(HOUSE) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("runtime.py", "import monosemy.llm.llama", "runtime.py imports llm/llama.py, a higher floor"),
        ("llm/llama.py", "from monosemy.sae import train", "llm/llama.py imports sae/train.py, a higher floor"),
        ("llm/llama.py", "from monosemy.sae.train import run", "llm/llama.py imports sae/train.py, a higher floor"),
        ("llm/llama.py", "from ..sae.train import run", "llm/llama.py imports sae/train.py, a higher floor"),
        ("llm/llama.py", "from ..sae import train", "llm/llama.py imports sae/train.py, a higher floor"),
        ("llm/llama.py", "from .. import report", "llm/llama.py imports report.py, a higher floor"),
        ("llm/llama.py", "from monosemy import report", "llm/llama.py imports report.py, a higher floor"),
        ("llm/llama.py", "from monosemy import sae", "llm/llama.py imports sae/__init__.py, a higher floor"),
        ("llm/llama.py", "from monosemy.sae import SAE", "llm/llama.py imports sae/__init__.py, a higher floor"),
        ("llm/llama.py", "def f():\n    from monosemy.report import x", "imports report.py, a higher floor"),
        ("explain/explainer.py", "from monosemy import report", "imports report.py, a higher floor"),
        (
            "llm/llama.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from monosemy.sae.train import Config",
            "llm/llama.py imports sae/train.py, a higher floor",
        ),
        ("sae/autoencoder.py", "from monosemy.sae.train import run", "cycle: "),
        ("runtime.py", "from monosemy import artifact", "cycle: "),
        ("latents/index.py", "from monosemy.kernels import encode", "only sae imports kernels"),
        ("latents/index.py", "from monosemy.kernels.reference import encode", "only sae imports kernels"),
        ("sae/llama.py", "", "have the same name"),
        ("sae/utils.py", "", "sae/utils.py: the name says nothing"),
        ("common.py", "", "common.py is on no floor"),
        ("steering/add.py", "", "steering/add.py is on no floor"),
        ("sae/objective.py", "x = 1\n" * 451, "sae/objective.py has 451 lines; at most 450"),
    ],
)
def test_a_violation_is_found(path: str, source: str, message: str):
    assert any(message in problem for problem in problems({**HOUSE, path: source}))
