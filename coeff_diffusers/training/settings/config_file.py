"""Settings in a YAML file: a line a setting, by the setting's name."""

from __future__ import annotations

import os
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError

HEADER = "# Settings of training/train_dreambooth.py. The same run again: --config with this file.\n"
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def write_config(values: Mapping[str, Any]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return HEADER + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def read_config(path: str | Path, hints: Mapping[str, Any], may_be_no: Collection[str] = ()) -> dict[str, Any]:
    """The values of a file.

    Args:
        path: the file.
        hints: setting -> type.
        may_be_no: the settings of which "no" is a choice: it is false in YAML.

    Raises:
        InputError: if the file cannot be read, or has keys that are unknown or given twice, or values of another type;
            all of them are listed.
    """
    entries, problems = _entries(path)
    values = {}
    for name, value in entries:
        try:
            values[name] = as_type("no" if value is False and name in may_be_no else value, hints[name])
        except KeyError:
            problems.append(f"{name}: is no setting")
        except TypeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InputError(f"--config: {path}:\n  " + "\n  ".join(problems))
    return values


@contextmanager
def yaml_root(path: str | Path, setting: str) -> Iterator[tuple[yaml.SafeLoader, yaml.Node | None]]:
    """A file's loader and its root, `None` of an empty one; what YAML does not understand within is an InputError."""
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        yield loader, loader.get_single_node()
    except InputError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError: no UTF-8, or a day such as 2020-13-45
        raise InputError(f"--{setting}: {path} cannot be read: {error}") from error


def given_twice(node: yaml.MappingNode) -> list[str]:
    """A line for each key that is there several times, which YAML's own loader would hide.

    The node must not have been loaded yet: loading adds keys that are merged in by `<<`.
    """
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    return [f"{name}: is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]


def _entries(path: str | Path) -> tuple[list[tuple[str, Any]], list[str]]:
    """Keys and values in their order, and what is wrong with the keys."""
    with yaml_root(path, "config") as (loader, node):
        if node is None:
            return [], []
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"--config: {path} must be lines of 'setting: value'")
        problems, entries = given_twice(node), []
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                entries.append((key.value, loader.construct_object(value, deep=True)))
            else:
                problems.append(f"line {key.start_mark.line + 1}: what stands before the colon must be text")
        return entries, problems


def as_type(value: Any, hint: Any) -> Any:
    """The value as a setting's type; one that stands alone is a tuple of itself where there may be several.

    Raises:
        TypeError: if it is of another type, saying what is wanted and what is there.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    optional, hint = type(None) in kinds, next((kind for kind in kinds if kind is not type(None)), hint)
    if value is None and optional:
        return None
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(as_type(each, kind) for each in (value if isinstance(value, list | tuple) else [value]))
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if hint is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)  # 1e-4 is text in YAML, which wants 1.0e-4
        except (ValueError, OverflowError):
            pass
    if type(value) is not hint:
        quoted = "; yes, no, on and off are text in quotes" if hint is str and isinstance(value, bool) else ""
        raise TypeError(f"must be {KINDS[hint]}, got {value!r}{quoted}")
    return value
