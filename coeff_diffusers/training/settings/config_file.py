"""Settings in a YAML file: a line per setting, by the setting's name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import InputError
from .rules import adapter, problems_of

HEADER = (
    "# Settings of a run of coeff_diffusers.training. The same run again: coeff-diffusers train --config this_file\n"
)


def write_config(values: Mapping[str, Any]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)
    return HEADER + text


def read_config(path: str | Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file.

    Args:
        path: the file.
        hints: setting -> type, with its rule.

    Raises:
        InputError: if the file cannot be read, or has keys that are unknown or given twice, or values that cannot be
            used; all of them are listed.
    """
    entries, problems = _entries(path)
    values = {}
    for name, value in entries:
        if name not in hints:
            problems.append(f"{name}: is no setting{_alike(name, hints)}")
            continue
        if value is False and "'no'" in str(hints[name]):
            value = "no"  # as YAML reads the word, where it is a choice
        try:
            values[name] = adapter(hints[name]).validate_python(value)
        except ValidationError as error:
            problems += [f"{name}: {problem}" for _, problem in problems_of(error)]
    if problems:
        raise InputError(f"--config: {path}:\n  " + "\n  ".join(problems))
    return values


def _alike(name: str, hints: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, hints, n=1)
    return f"; did you mean {found[0]}?" if found else ""


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
