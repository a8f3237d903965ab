"""Arithmetic on coefficient files: subjects added up, averaged, scaled, and pruned.

A layer that a file does not have is Delta = 0: it counts as zeros in a sum, and takes the untouched attention call in
a model. State dicts have the keys of the file format, their values are (H, H).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import KEY_SUFFIX, file_header, find_file, save_whole
from .coeff_file import FORMAT_VERSION, read_file, too_large, value_problem
from .files import printable

Source = str | os.PathLike[str]


def combine(state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_k weight_k Delta_k, float32, over the layers that any of them has.

    To average n, weigh each by `1 / n`; to subtract, by `1, -1`; to go from one to another, by `1 - t, t`.

    Raises:
        ValueError: if there is not one finite weight for each, or shapes differ.
    """
    if not state_dicts or len(weights) != len(state_dicts) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(state_dicts)} adapters need as many finite weights, at least one, got {list(weights)}")
    combined: dict[str, Tensor] = {}
    for state_dict, weight in zip(state_dicts, weights):
        for key, delta in state_dict.items():
            term = weight * delta.to(torch.float32)
            if key in combined and combined[key].shape != term.shape:
                raise ValueError(f"{key}: has the shapes {tuple(combined[key].shape)} and {tuple(term.shape)}")
            combined[key] = combined[key] + term if key in combined else term
    return combined


def prune_entries(state_dict: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The `keep` entries of the largest magnitude, over all layers; others are 0, and layers of zeros are left out.

    Raises:
        ValueError: if there are not that many, or `keep` is not positive.
    """
    sizes = torch.cat([delta.flatten().abs() for delta in state_dict.values()])
    _check_keep(keep, len(sizes), "entries")
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.topk(keep).indices] = True
    masks = kept.split([delta.numel() for delta in state_dict.values()])
    pruned = {key: delta * mask.view_as(delta) for (key, delta), mask in zip(state_dict.items(), masks)}
    return {key: delta for key, delta in pruned.items() if delta.any()}


def prune_layers(state_dict: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The `keep` layers that change their maps the most by [`relative_norm`]; the others are left out.

    Raises:
        ValueError: if there are not that many, or `keep` is not positive.
    """
    _check_keep(keep, len(state_dict), "layers")
    ranked = sorted(state_dict, key=lambda key: relative_norm(state_dict[key]), reverse=True)[:keep]
    return {key: delta for key, delta in state_dict.items() if key in ranked}


def relative_norm(delta: Tensor) -> float:
    """||Delta|| / ||I||, Frobenius norms: how much is added to the maps, comparable between layers of other H."""
    return float(delta.norm()) / math.sqrt(len(delta))


def merge_coeff_files(
    files: Sequence[Source],
    output: Source,
    weights: Sequence[float] | None = None,
    *,
    ignore_base_name: bool = False,
) -> Path:
    """Writes sum_k weight_k Delta_k of several files (or of one, scaled) into a new one; see [`combine`].

    Its header says how it was made, and from what. Entries on which all sources agree are kept.

    Args:
        files: files, folders or repositories of the Hub.
        output: path of the new file, ending in `.safetensors`.
        weights: one for each file; all 1 by default.
        ignore_base_name: merges files for models of the same class and layers that go by other names.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the files are for different models, each difference listed, or one is damaged, or there is not
            one finite weight for each, or the sum has values that loading would refuse.
        OSError: if a file is not there, or the new one cannot be written.
    """
    paths = [find_file(file) for file in files]
    weights = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    contents = [read_checked(path) for path in paths]
    headers = [header for _, header in contents]
    problems = [
        line
        for path, header in zip(paths[1:], headers[1:])
        for line in base_differences(headers[0], header, (paths[0].name, path.name), ignore_base_name)
    ]
    if problems:
        raise ValueError("the files are for different models:\n  " + "\n  ".join(problems))
    combined = combine([tensors for tensors, _ in contents], weights)
    sources = [_source(path, header) | {"weight": weight} for path, header, weight in zip(paths, headers, weights)]
    return _write(combined, headers, {"operation": "combine", "sources": sources}, output)


def prune_coeff_file(file: Source, output: Source, *, entries: int | None = None, layers: int | None = None) -> Path:
    """Writes what [`prune_entries`] or [`prune_layers`] leaves of a file into a new one. Arguments and errors alike.

    Args:
        file: a file, a folder or a repository of the Hub.
        output: path of the new file, ending in `.safetensors`.
        entries: how many entries to keep.
        layers: how many layers to keep; one of the two is given.
    """
    if (entries is None) == (layers is None):
        raise ValueError(f"one of entries and layers must be given, got entries={entries}, layers={layers}")
    path = find_file(file)
    tensors, header = read_checked(path)
    pruned = prune_layers(tensors, layers) if entries is None else prune_entries(tensors, entries)  # type: ignore[arg-type]
    kept = {"entries": entries} if layers is None else {"layers": layers}
    return _write(pruned, [header], {"operation": "prune", "keep": kept, "sources": [_source(path, header)]}, output)


def base_differences(
    one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str], ignore_base_name: bool = False
) -> list[str]:
    """What two headers say otherwise of their base models, a line each."""
    bases = [_facts(header["coeff_diffusers"]["base"], ignore_base_name) for header in (one, other)]
    return [
        printable(
            f"{fact}: {bases[0].get(fact, 'absent')} in {names[0]}, {bases[1].get(fact, 'absent')} in {names[1]}"
        )
        for fact in sorted(bases[0].keys() | bases[1].keys())
        if bases[0].get(fact) != bases[1].get(fact)
    ]


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Values, float32 in the order of the layers' numbers, and header of a file whose values are what its header says.

    Raises:
        ValueError: if they are not, every offender listed.
    """
    tensors, header = read_file(path)
    heads = {
        f"{component}.{layer}{KEY_SUFFIX}": count
        for component, base in header["coeff_diffusers"]["base"].items()
        for layer, count in base["heads"].items()
    }
    problems = [f"{key}: no layer of the model the file is for" for key in tensors if key not in heads]
    for key, delta in tensors.items():
        expected = (heads.get(key),) * 2
        if key in heads and delta.shape != expected:
            problems.append(f"{key}: must have shape {expected}, got {tuple(delta.shape)}")
        elif problem := value_problem(delta) or too_large(delta):
            problems.append(f"{key}: {problem}")
    if problems or not tensors:
        raise ValueError(f"{printable(path)} is damaged:\n  " + "\n  ".join(problems or ["it holds no coefficients"]))
    ordered = sorted(tensors.items(), key=lambda item: _by_number(item[0]))
    return {key: delta.to(torch.float32) for key, delta in ordered}, header


def _by_number(key: str) -> list[tuple[int, str]]:
    return [(len(part) if part.isdecimal() else 0, part) for part in key.split(".")]


def _facts(base: Mapping[str, Any], ignore_name: bool) -> dict[str, Any]:
    facts = {}
    for component, said in base.items():
        facts[f"{component} class"] = said["class"]
        facts.update({f"{component}.{layer} heads": count for layer, count in said["heads"].items()})
        if not ignore_name:
            facts[f"{component} name"] = said.get("name")
    return facts


def _source(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """A source as the new header names it: what it was made for and from, without its base model."""
    own = {key: value for key, value in header.items() if key not in ("format", "coeff_diffusers")}
    made = header["coeff_diffusers"].get("made_from")
    return {"file": printable(path.name), "metadata": own} | ({"made_from": made} if made else {})


def _write(
    tensors: dict[str, Tensor], headers: Sequence[Mapping[str, Any]], made_from: dict[str, Any], output: Source
) -> Path:
    path = Path(output)
    if path.suffix != ".safetensors":
        raise ValueError(f"output must end in .safetensors, got {str(path)!r}")
    if not tensors:
        raise ValueError(f"nothing is left to write to {printable(path)}: every entry is 0")
    if problems := {key: why for key, delta in tensors.items() if (why := value_problem(delta) or too_large(delta))}:
        lines = (f"\n  {key}: {why}" for key, why in problems.items())
        raise ValueError(f"{printable(path)} was not written, for loading would refuse it:" + "".join(lines))
    descriptions = [header["coeff_diffusers"] for header in headers]
    first = descriptions[0]
    description = {
        "format_version": FORMAT_VERSION,
        "config": _common(descriptions).get("config"),
        "base": {component: _base([each["base"][component] for each in descriptions]) for component in first["base"]},
        "made_from": made_from,
    }
    formats = ("format", "coeff_diffusers", "modelspec.")
    kept = {key: value for key, value in _common(headers).items() if not key.startswith(formats)}
    save_whole(tensors, file_header(description, title=printable(path.stem), metadata=kept), path)
    return path


def _base(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the first says of a component, without a quantisation that the others do not say, too."""
    both = _common(said)
    return {name: value for name, value in said[0].items() if name != "quantization" or name in both}


def _common(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them say alike."""
    return {key: value for key, value in entries[0].items() if all(other.get(key) == value for other in entries)}


def _check_keep(keep: int, count: int, what: str) -> None:
    if not 1 <= keep <= count:
        raise ValueError(f"keep must lie in [1, {count}], for there are {count} {what}, got {keep}")
