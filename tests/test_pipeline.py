"""The whole house by one recipe, on a tiny model: killed, resumed, and ending in the same bytes and one page."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from monosemy.__main__ import main
from monosemy.artifact import MANIFEST
from monosemy.recipe import plan_stages, read_recipe
from monosemy.report import ReportConfig
from monosemy.report import run as write_report
from monosemy.runtime import InputError

STAGES = ("tokens", "activations", "sae", "metrics", "index", "labels", "dose")


@pytest.fixture(scope="module")
def recipe(tiny_run: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = json.dumps([str(path) for path in sorted(tiny_run.glob("*.txt"))])
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        f"""
        title = "A tiny run <&>"
        model = "{tiny_llama_folder}"
        text = {texts}
        [tokenize]
        validation_fraction = 0.2
        [capture]
        sites = ["L1.resid_post"]
        dtype = "float32"
        shard_tokens = 500
        [train]
        n_latents = 48
        k = 4
        train_tokens = 12_800
        batch_size = 128
        dead_after_tokens = 2000
        checkpoint_every = 10
        [evaluate]
        dtype = "float32"
        loss_tokens = 200
        [index]
        dtype = "float32"
        [explain]
        [steer-sweep]
        latents = [0, 1, 2]
        strengths = [1.0]
        prompts = ["We must"]
        max_new_tokens = 4
        dtype = "float32"
        [report]
        """.replace("latents = [0, 1, 2]", "latents = LATENTS")
    )
    text = path.read_text()
    # The latents to steer must fire: take those of the same training run, made once here.
    head = text[: text.index("[steer-sweep]")]
    path.write_text(head)
    assert main(["run", str(path), "--out", str(path.parent / "probe")]) == 0
    from monosemy.latents.record import open_index

    living = open_index(path.parent / "probe" / "index").statistics.n_fired.argsort()[-2:].tolist()
    path.write_text(text.replace("LATENTS", str(living)))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "finished"
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    return out


def test_every_stage_leaves_a_whole_artifact(finished: Path, capsys):
    assert main(["verify", str(finished)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(STAGES)
    assert not list(finished.glob("*.partial"))


def test_a_second_run_does_nothing_again(finished: Path, recipe: Path, capsys):
    before = {name: (finished / name / MANIFEST).stat().st_mtime_ns for name in STAGES}
    assert main(["run", str(recipe), "--out", str(finished)]) == 0
    assert {name: (finished / name / MANIFEST).stat().st_mtime_ns for name in STAGES} == before
    captured = capsys.readouterr()
    assert captured.err.count("is complete") == len(STAGES)
    assert "summary" in captured.out
    assert "FVU" in captured.out


@pytest.mark.parametrize("delay", [0.4, 2.0, 5.0])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(finished: Path, recipe: Path, tmp_path: Path, delay: float):
    """SIGKILL `delay` seconds after the run's folder appears, wherever it then is."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "monosemy", "run", str(recipe), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not out.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    for name in STAGES:
        assert (out / name / MANIFEST).read_bytes() == (finished / name / MANIFEST).read_bytes(), name
    assert (out / "report.html").read_bytes() == (finished / "report.html").read_bytes()


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and whether tags are balanced."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.foreign: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.foreign += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]
        self.foreign += [tag] if tag in ("script", "iframe", "link") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.foreign += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_one_self_contained_page(finished: Path):
    source = (finished / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert page.open == []
    assert page.foreign == []
    assert "A tiny run <&>" in page.text  # escaped in the source
    assert "A tiny run <&>" not in source
    for part in ("plain", "steered", "loss recovered", "Training", "How often latents fire", "Settings"):
        assert part in page.text
    assert source.count("<svg") == 3


def test_report_of_a_part_of_a_run(finished: Path, tmp_path: Path):
    import shutil

    shutil.copytree(finished / "tokens", tmp_path / "part" / "tokens")
    write_report(ReportConfig(run=tmp_path / "part", out=tmp_path / "page.html"))
    source = (tmp_path / "page.html").read_text()
    assert "Run part" in source
    assert "<svg" not in source
    with pytest.raises(InputError, match="is not a folder; expected a run"):
        write_report(ReportConfig(run=tmp_path / "nosuch", out=tmp_path / "page.html"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "is not valid TOML"),
        ('model = "smollm2"\ntext = []\n[trian]', r"has 'trian', which is no stage; did you mean 'train'\?"),
        (
            'model = "smollm2"\ntext = ["a"]\n[tokenize]\nmax_token = 3',
            "no option 'max_token'; did you mean 'max_tokens'",
        ),
        ("[tokenize]", r"\[tokenize\] needs 'model', which nothing before it provides"),
        ('model = "smollm2"\n[train]', r"\[train\] needs 'activations', which nothing before it provides"),
        ('model = "smollm2"', "names no stage"),
        ('model = "smollm2"\ntext = ["a"]\n[tokenize]\nmax_tokens = -1', r"\[tokenize\]: max_tokens is -1"),
        ('model = "smollm2"\ntext = ["a"]\ntokenize = 3', r"tokenize is 3; expected a section \[tokenize\]"),
    ],
)
def test_bad_recipes(text: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        plan_stages(text, "mine", tmp_path)


def test_shipped_recipes_are_understood(tmp_path: Path):
    for path in (Path(__file__).parents[1] / "monosemy" / "recipes").glob("*.toml"):
        plan = plan_stages(read_recipe(path.stem), path.stem, tmp_path)
        assert [stage.name for stage, _ in plan][-1] == "report"


def test_another_recipe_for_the_same_folder_is_refused(finished: Path, recipe: Path, tmp_path: Path, capsys):
    other = tmp_path / "other.toml"
    other.write_text(recipe.read_text().replace("n_latents = 48", "n_latents = 64"))
    assert main(["run", str(other), "--out", str(finished)]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
