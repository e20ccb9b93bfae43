"""Configs in configs: one flat list of options for people, and back."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from monosemy import options
from monosemy.artifact import recorded_config, unrecorded
from monosemy.runtime import InputError
from monosemy.sae.settings import Optimizer, TrainConfig, Variant, Watch


@dataclass(frozen=True)
class Inner:
    size: int = 3
    place: str | None = unrecorded(None)


@dataclass(frozen=True)
class Middle:
    inner: Inner = field(default_factory=Inner)
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise InputError(f"rate is {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str
    middle: Middle = field(default_factory=Middle)
    last: tuple[int, ...] = ()


def test_options_are_flat_and_in_their_place():
    assert list(options.options(Outer)) == ["name", "size", "place", "rate", "last"]
    assert options.options(Outer)["size"].default == 3
    assert list(options.options(Inner)) == ["size", "place"]


def test_values():
    outer = Outer("a", Middle(Inner(7), 0.25), (1, 2))
    assert options.values(outer) == {"name": "a", "size": 7, "place": None, "rate": 0.25, "last": (1, 2)}


def test_build_fills_what_is_not_given():
    assert options.build(Outer, {"name": "a"}) == Outer("a")
    assert options.build(Outer, {"name": "a", "size": 9, "last": (4,)}) == Outer("a", Middle(Inner(9)), (4,))
    with pytest.raises(TypeError, match="name"):
        options.build(Outer, {"size": 9})


def test_build_undoes_values():
    outer = Outer("a", Middle(Inner(7, "here"), 0.25), (1, 2))
    assert options.build(Outer, options.values(outer)) == outer


def test_replaced_reaches_every_depth_and_checks_again():
    outer = Outer("a", Middle(Inner(7), 0.25))
    assert options.replaced(outer, size=8, name="b") == Outer("b", Middle(Inner(8), 0.25))
    assert outer == Outer("a", Middle(Inner(7), 0.25))
    with pytest.raises(InputError, match="rate is -1"):
        options.replaced(outer, rate=-1.0)


def test_a_manifest_records_options_flat():
    assert recorded_config(Outer("a", Middle(Inner(7, "here")))) == {"name": "a", "size": 7, "rate": 0.5, "last": []}


def test_options_of_training_are_unique():
    """Or one would hide another on the command line and in recipes."""
    parts = (TrainConfig, Variant, Optimizer, Watch)
    names = [name for part in parts for name in part.__annotations__ if name not in ("variant", "optimizer", "watch")]
    assert sorted(names) == sorted(options.options(TrainConfig))


@dataclass(frozen=True)
class Told:
    kind: Literal["soft", "hard"] = "soft"
    inner: Inner = Inner(11)


def test_the_default_of_a_nested_config_counts():
    assert options.build(Told, {}) == Told()
    assert options.build(Told, {"place": "here"}).inner == Inner(11, "here")


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="TrainConfig has no option 'learning_rte'"):
        options.build(TrainConfig, {"learning_rte": 1})
    with pytest.raises(TypeError, match="Told has no option 'size2'"):
        options.replaced(Told(), size2=1)


def test_words_that_an_option_does_not_know_are_refused():
    options.check_values(Told())
    with pytest.raises(InputError, match="kind is 'firm'; expected one of soft, hard"):
        options.check_values(Told("firm"))  # pyright: ignore
