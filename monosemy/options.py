"""Configs that hold configs, and the flat options that people see.

A config with many options groups them in smaller dataclasses. On the command line, in recipes, in a grid and in
manifests there are only options, by their own names, which are unique within a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints


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
    """An instance of `config` from options by name; those that are not given have their defaults."""
    arguments = {}
    for field in dataclasses.fields(config):
        nested = _nested(config, field.name)
        if nested:
            arguments[field.name] = build(nested, {name: given[name] for name in options(nested) if name in given})
        elif field.name in given:
            arguments[field.name] = given[field.name]
    return config(**arguments)


def replaced(config: Any, **changes: Any) -> Any:
    """`config` with some options changed, by name, wherever they are."""
    return build(type(config), values(config) | changes)


@cache
def _nested(config: type, name: str) -> type | None:
    """The dataclass that field `name` holds, if it holds one."""
    kind = get_type_hints(config)[name]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
