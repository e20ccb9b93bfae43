"""Progress, and numbers for people."""

import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monosemy import runtime
from monosemy.runtime import InputError, Progress, choose_dtype, count, duration, random_stream, require


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.2, "4.2 s"),
        (59.97, "1 min 00 s"),
        (190, "3 min 10 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (812, "812"),
        (45_312, "45.3k"),
        (999_999, "1.00M"),
        (2_400_000, "2.40M"),
        (135e9, "135G"),
        (2e12, "2.00T"),
    ],
)
def test_count(number: float, text: str):
    assert count(number) == text


@given(st.floats(0, 9e14))
def test_a_count_is_right_to_three_digits(number: float):
    match = re.fullmatch(r"([\d.]+)([kMGT]?)", count(number))
    assert match
    size = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    assert float(match[1]) * size == pytest.approx(number, rel=0.0051, abs=0.5)


def test_random_streams_depend_on_the_whole_key():
    def first(*key: int) -> float:
        return random_stream(*key).random()

    assert first(1, 2, 3) == first(1, 2, 3)
    assert len({first(1, 2, 3), first(1, 2, 4), first(1, 3, 2), first(2, 1, 3)}) == 4


def test_dtypes_by_name():
    cpu = torch.device("cpu")
    assert choose_dtype("float16", cpu) is torch.float16
    assert choose_dtype("auto", cpu) in (torch.bfloat16, torch.float32)


def test_a_missing_package_is_named_with_its_remedy():
    require("json", "report")
    with pytest.raises(
        InputError, match=re.escape("'no_such_package', which is not installed: pip install 'monosemy[report]'")
    ):
        require("no_such_package", "report")


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(np.arange(0, 1000, 5.0))
    monkeypatch.setattr(runtime.time, "monotonic", lambda: float(next(clock)))
    with Progress("capture", total=2000, unit="token") as progress:
        progress.skip(1000)
        progress.advance(500, fvu=0.25)
        progress.advance(500)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "capture:  75%, 1.50k of 2.00k tokens, 33 tokens/s, 15.0 s left, fvu 0.25"
    assert lines[-1] == "capture: 2.00k tokens in 25.0 s, 40 tokens/s, fvu 0.25"


def test_progress_with_nothing_done_yet(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("load", total=0, unit="file") as progress:
        progress.advance(0)
    assert "unknown time left" in capsys.readouterr().err


def test_progress_says_nothing_of_success_when_it_fails(capsys):
    with pytest.raises(RuntimeError, match="stop"), Progress("load", total=3, unit="file"):
        raise RuntimeError("stop")
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("train", total=10, unit="step") as progress:
        progress.advance(4, loss=0.5)
        assert progress.bar is not None
        progress.bar.refresh()
    assert "train" in screen.getvalue()
    assert "40%" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()
    assert screen.getvalue().rstrip().rsplit("\n", 1)[-1].endswith("loss 0.5")
