"""Figures of a run arrive where they were asked for, and the same ones everywhere."""

import json
from pathlib import Path

import pytest

from monosemy import options
from monosemy.runtime import InputError
from monosemy.sae import train
from monosemy.sae.settings import TrainConfig
from monosemy.sae.tracking import Tracker, read_history

FIGURES = ("loss", "fvu", "aux_loss", "l0", "dead", "learning_rate", "k")


def test_the_history(training_config: TrainConfig):
    config = options.replaced(training_config, log_every=6, validations=4)
    train.run(config)
    lines = read_history(config.out)
    assert [line["step"] for line in lines] == [6, 10, 12, 18, 20, 24, 29, 30, 36, 39]
    for line in lines:
        assert line["tokens"] == 256 * line["step"]
        logged, validated = line["step"] % 6 == 0 or line["step"] == 39, line["step"] in (10, 20, 29, 39)
        expected = [*(FIGURES if logged else ()), *(("validation_fvu",) if validated else ())]
        assert list(line) == ["step", "tokens", *expected]
        assert all(isinstance(value, int | float) for value in line.values())
        assert line.get("l0", 1) <= 4
        assert 0 < line.get("fvu", 0.5) < 1
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_history_depends_on_nothing_but_the_training(training_config: TrainConfig, tmp_path: Path):
    files = []
    for name in ("a", "b"):
        config = options.replaced(training_config, out=tmp_path / name, tensorboard=tmp_path / "board")
        train.run(config if name == "b" else options.replaced(config, tensorboard=None))
        files.append((config.out / "history.jsonl").read_bytes())
    assert files[0] == files[1]


def test_lines_after_the_checkpoint_are_cut_off(training_config: TrainConfig, tmp_path: Path):
    first = Tracker(tmp_path, training_config, 0)
    for step in range(1, 6):
        first.log({"step": step, "tokens": 10 * step, "fvu": 1 / step})
    assert [line["step"] for line in read_history(tmp_path)] == [1, 2, 3, 4, 5]  # at once, not at the end
    first.close()
    first.close()
    second = Tracker(tmp_path, training_config, 3)
    assert [line["step"] for line in read_history(tmp_path)] == [1, 2, 3]
    second.log({"step": 4, "tokens": 40, "fvu": 0.1})
    second.close()
    assert [line["fvu"] for line in read_history(tmp_path)] == [1, 1 / 2, 1 / 3, 0.1]


def test_an_sae_without_history(tmp_path: Path):
    with pytest.raises(InputError, match=r"history.jsonl is missing: this SAE was trained by an older version"):
        read_history(tmp_path)


def test_a_missing_package_is_named_before_anything_is_trained(training_config: TrainConfig, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    for package in ("wandb", "tensorboard"):
        config = options.replaced(training_config, **{package: "x" if package == "wandb" else Path("x")})
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util, "find_spec", lambda name, hidden=package: None if name == hidden else find(name)
            )
            with pytest.raises(
                InputError, match=rf"needs the package '{package}'.*pip install 'monosemy\[{package}\]'"
            ):
                train.run(config)
        assert not config.out.with_name("sae.partial").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*", "ignore::DeprecationWarning:google.*")
def test_tensorboard_shows_the_history(training_config: TrainConfig, tmp_path: Path):
    train.run(options.replaced(training_config, tensorboard=tmp_path / "board"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board" / training_config.out.name))
    board.Reload()
    lines = read_history(training_config.out)
    for name in (*FIGURES, "tokens", "validation_fvu"):
        found = {event.step: event.value for event in board.Scalars(name)}
        assert found == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6)
    assert all(event.value > 0 for event in board.Scalars("tokens_per_second"))
    assert "tokens_per_second" not in lines[0]


@pytest.mark.slow
def test_weights_and_biases_offline(training_config: TrainConfig, tmp_path: Path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    whole = train.run(training_config)
    config = options.replaced(training_config, out=tmp_path / "watched", wandb="monosemy-test", train_tokens=5120)
    train.run(config)
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [log] = run.glob("run-*.wandb")
    content = log.read_bytes()
    for text in ("monosemy-test", "watched", "tokens_per_second", "validation_fvu", "dead_after_tokens"):
        assert text.encode() in content
    for line in read_history(config.out):
        assert json.dumps(line["step"]).encode() in content
        if "fvu" in line:
            assert json.dumps(line["fvu"]).encode() in content
    assert "wandb" not in whole.config
