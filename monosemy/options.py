"""Configs that hold configs, and the flat options that people see.

A config with many options groups them in smaller dataclasses. On the command line, in recipes, in a grid and in
manifests there are only options, by their own names, which are unique within a config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from monosemy.runtime import InputError


def options(config: type) -> dict[str, dataclasses.Field]:
    """Name of every option of dataclass `config` -> its field, those of nested dataclasses in their place."""
    found = {}
    for field in dataclasses.fields(config):
        nested = _nested(config, field.name)
        found |= options(nested) if nested else {field.name: field}
    return found


def values(config: Any) -> dict[str, Any]:
    """Name of every option of `config` -> its value."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= values(value) if _nested(type(config), field.name) else {field.name: value}
    return found


def build(config: type, given: Mapping[str, Any]) -> Any:
    """An instance of `config` from options by name; those that are not given have their defaults. Raises `TypeError`
    for names that it does not have."""
    unknown = given.keys() - options(config).keys()
    if unknown:
        raise TypeError(f"{config.__name__} has no option {', '.join(map(repr, sorted(unknown)))}")
    arguments = {}
    for field in dataclasses.fields(config):
        nested = _nested(config, field.name)
        if nested:
            defaults = {} if field.default is dataclasses.MISSING else values(field.default)
            own = {name: given[name] for name in options(nested) if name in given}
            arguments[field.name] = build(nested, defaults | own)
        elif field.name in given:
            arguments[field.name] = given[field.name]
    return config(**arguments)


def replaced(config: Any, **changes: Any) -> Any:
    """`config` with some options changed, by name, wherever they are."""
    return build(type(config), values(config) | changes)


def check_values(config: Any) -> None:
    """Raise `InputError` where an option of dataclass `config` is none of the words that it may be, or no finite
    number."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(get_args(kind))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}; expected a finite number")


@cache
def _nested(config: type, name: str) -> type | None:
    """The dataclass that field `name` holds, if it holds one."""
    kind = get_type_hints(config)[name]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
