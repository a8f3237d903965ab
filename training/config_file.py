"""Settings in a YAML file: a line a setting, by the setting's name."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from errors import InputError

HEADER = "# Settings of training/train_dreambooth.py. The same run again: --config with this file.\n"
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def write_config(values: Mapping[str, Any]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return HEADER + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def read_config(path: str | Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file, of the types in `hints` (setting -> type).

    Raises:
        InputError: if the file cannot be read, or has keys that are unknown or given twice, or values of another type;
            all of them are listed.
    """
    entries = _entries(path)
    names = [name for name, _ in entries]
    problems = [f"{name}: is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    values = {}
    for name, value in entries:
        try:
            values[name] = _as_type(value, hints[name])
        except KeyError:
            problems.append(f"{name}: is no setting")
        except TypeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InputError(f"--config: {path}:\n  " + "\n  ".join(problems))
    return values


def _entries(path: str | Path) -> list[tuple[str, Any]]:
    """Keys and values in their order; a key that is there twice stays so, which `yaml.safe_load` would hide."""
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"--config: {path} must be lines of 'setting: value'")
        return [(key.value, loader.construct_object(value, deep=True)) for key, value in node.value]
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: {path} cannot be read: {error}") from error


def _as_type(value: Any, hint: Any) -> Any:
    """Raises TypeError saying what is wanted, and what is there."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    optional, hint = type(None) in kinds, next((kind for kind in kinds if kind is not type(None)), hint)
    if value is None and optional:
        return None
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(_as_type(each, kind) for each in (value if isinstance(value, list) else [value]))
    if hint is str and value is False:  # `mixed_precision: no` is false in YAML
        return "no"
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # 1e-4 is text in YAML, which wants 1.0e-4
        except ValueError:
            pass
    if type(value) is not hint:
        raise TypeError(f"must be {KINDS[hint]}, got {value!r}")
    return value
