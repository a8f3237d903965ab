"""The commands on coefficient files: info, merge, prune, diff, check. Each returns exit code, JSON and text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import base_differences, merge_coeff_files, prune_coeff_file, read_checked, relative_norm
from ..checkpoint import KEY_SUFFIX, differences, find_file
from ..coeff_file import read_file
from ..files import printable

DONE, DIFFERS = 0, 1
Answer = tuple[int, dict[str, Any], str]  # exit code, what --json prints, what is printed else


def info(args: argparse.Namespace) -> Answer:
    path = find_file(args.file)
    tensors, header = read_checked(path)
    layers = [_layer(key, tensors[key]) for key in tensors]
    heads = sorted((head for key in tensors for head in _heads(key, tensors[key])), key=lambda h: -h["norm"])
    result = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "coefficients": sum(delta.numel() for delta in tensors.values()),
        "header": header,
        "layers": layers,
        "heads": heads[: args.top],
    }
    if args.plot:
        from ..plot import plot_layers

        plot_layers(tensors, args.plot, f"{printable(path.name)}: {result['coefficients']:,} coefficients")
        result["plot"] = str(args.plot)
    if args.growth:
        from ..plot import plot_growth

        result["steps"] = plot_growth(path.parent, args.growth)
        result["growth"] = str(args.growth)
    return DONE, result, _info_text(result)


def merge(args: argparse.Namespace) -> Answer:
    count = len(args.files)
    weights = args.weights
    if args.average:
        weights = [1 / count] * count
    if args.interpolate is not None:
        if count != 2:
            raise ValueError(f"--interpolate goes from one file to another, got {count} files")
        weights = [1 - args.interpolate, args.interpolate]
    path = merge_coeff_files(args.files, args.output, weights, ignore_base_name=args.ignore_base_name)
    used = weights or [1.0] * count
    terms = " + ".join(f"{weight:g} * {Path(file).name}" for weight, file in zip(used, args.files))
    return DONE, {"file": str(path), "weights": used}, printable(f"wrote {path} = {terms}")


def prune(args: argparse.Namespace) -> Answer:
    before, _ = read_checked(find_file(args.file))
    path = prune_coeff_file(args.file, args.output, entries=args.entries, layers=args.layers)
    after, _ = read_file(path)
    counts = [(len(state), int(sum(delta.count_nonzero() for delta in state.values()))) for state in (before, after)]
    share = _square(after) / (_square(before) or 1.0)
    result = {
        "file": str(path),
        "layers": [counts[0][0], counts[1][0]],
        "entries": [counts[0][1], counts[1][1]],
        "squared_norm_kept": share,
    }
    return (
        DONE,
        result,
        f"wrote {printable(path)}: {counts[1][1]:,} of {counts[0][1]:,} entries, "
        f"{counts[1][0]} of {counts[0][0]} layers, {share:.1%} of the squared norm",
    )


def diff(args: argparse.Namespace) -> Answer:
    paths = [find_file(file) for file in (args.file, args.other)]
    (one, first), (other, second) = (read_checked(path) for path in paths)
    names = (str(paths[0]), str(paths[1]))
    base = base_differences(first, second, names)
    layers: list[dict[str, Any]] = []
    deltas: dict[str, Tensor] = {}
    for key in dict.fromkeys((*one, *other)):
        if key not in one or key not in other:
            layers.append({"layer": _name(key), "only_in": names[key in other]})
        elif one[key].shape != other[key].shape:
            layers.append({"layer": _name(key), "shapes": [list(one[key].shape), list(other[key].shape)]})
        else:
            deltas[key] = other[key].to(torch.float32) - one[key].to(torch.float32)
            largest = float(deltas[key].abs().max())
            if largest > args.tolerance:
                layers.append(_layer(key, deltas[key]) | {"largest": largest})
    result = {"equal": not (base or layers), "base": base, "layers": layers}
    if args.plot:
        from ..plot import plot_layers

        if not deltas:
            raise ValueError("the files have no layer in common that could be drawn")
        plot_layers(deltas, args.plot, printable(f"{paths[1].name} - {paths[0].name}"))
        result["plot"] = str(args.plot)
    return DONE if result["equal"] else DIFFERS, result, _diff_text(result, len(one.keys() | other.keys()))


def check(args: argparse.Namespace) -> Answer:
    path = find_file(args.file)
    tensors, header = read_file(path)
    try:
        model = skeleton(args.model)
    except ImportError:
        raise
    except Exception as error:  # whatever comes of a config that is none
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{printable(args.model)} cannot be built from its config: {printable(reason)}") from error
    problems = differences(model, tensors, header["coeff_diffusers"])
    made_for = {component: said.get("name") for component, said in header["coeff_diffusers"]["base"].items()}
    result: dict[str, Any] = {"fits": not problems, "differences": problems, "made_for": made_for}
    if problems:
        lines = [f"{path} does not fit {args.model}:", *(f"  {what}: {why}" for what, why in problems.items())]
        text = "\n".join(map(printable, lines))
        return DIFFERS, result, text
    names = ", ".join(filter(None, made_for.values())) or "a model without a name"
    return DONE, result, printable(f"{path} fits {args.model}: {len(tensors)} layers. It was made for {names}.")


def skeleton(name_or_path: str) -> Any:
    """The denoisers of a pipeline or the model itself, built from config on the meta device: no weight is read.

    Raises:
        ValueError: if there is no denoiser of diffusers in it.
        OSError: if there is no such folder or repository.
    """
    import diffusers
    from accelerate import init_empty_weights

    def build(class_name: Any, config: dict[str, Any]) -> torch.nn.Module:
        cls = getattr(diffusers, str(class_name), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
            raise ValueError(f"{name_or_path}: {class_name} is no model class of diffusers")
        with init_empty_weights():
            model: torch.nn.Module = cls.from_config(config)
        return model

    try:
        index = diffusers.DiffusionPipeline.load_config(name_or_path)
    except OSError:  # no model_index.json: the folder of a single model
        config = diffusers.AutoModel.load_config(name_or_path)
        return build(config.get("_class_name"), config)
    components = {
        part: build(entry[1], diffusers.AutoModel.load_config(name_or_path, subfolder=part))
        for part, entry in index.items()
        if part.startswith(("unet", "transformer")) and isinstance(entry, (list, tuple)) and entry[1]
    }
    return SimpleNamespace(components=components)


def _name(key: str) -> str:
    return key.removesuffix(KEY_SUFFIX)


def _layer(key: str, delta: Tensor) -> dict[str, Any]:
    norm = float(delta.norm())
    return {"layer": _name(key), "heads": len(delta), "norm": norm, "relative_norm": relative_norm(delta)}


def _heads(key: str, delta: Tensor) -> list[dict[str, Any]]:
    """How much each output head takes from the maps, and from which head's the most."""
    return [
        {"layer": _name(key), "head": i, "norm": float(row.norm()), "source": int(j), "entry": float(row[j])}
        for i, row in enumerate(delta)
        for j in (row.abs().argmax(),)
    ]


def _square(state_dict: Mapping[str, Tensor]) -> float:
    return float(sum(delta.square().sum() for delta in state_dict.values()))


def _info_text(result: dict[str, Any]) -> str:
    header, own = result["header"], result["header"]["coeff_diffusers"]
    size = f"{result['coefficients']:,} coefficients, {result['bytes']:,} bytes"
    lines = [f"{printable(result['file'])}: {size}", "", "made for"]
    for component, said in own["base"].items():
        name = printable(said.get("name") or "(no name)")
        how = f", quantised: {printable(said['quantization'])}" if "quantization" in said else ""
        lines.append(f"  {component}: {said['class']} {name}, {len(said['heads'])} layers{how}")
    told = {key: value for key, value in header.items() if key not in ("format", "coeff_diffusers")}
    told |= {key: json.dumps(own[key]) for key in ("versions", "made_from") if key in own}
    lines += ["", "said by its writer", *(printable(f"  {key}: {value}") for key, value in sorted(told.items()))]
    wide = max(len(layer["layer"]) for layer in result["layers"])
    lines += ["", f"{'layer':{wide}}  heads   ||Delta||   ||Delta||/||I||"]
    for layer in result["layers"]:
        lines.append(
            f"{layer['layer']:{wide}}  {layer['heads']:5}   {layer['norm']:9.3f}   {layer['relative_norm']:15.3f}"
        )
    lines += ["", "heads that mix most (norm of their row of Delta; largest entry)"]
    for head in result["heads"]:
        lines.append(
            f"  {head['norm']:6.3f}  {head['layer']} head {head['head']}: {head['entry']:+.3f} of map {head['source']}"
        )
    wrote = [f"wrote {printable(result[name])}" for name in ("plot", "growth") if name in result]
    return "\n".join([*lines, "", *wrote] if wrote else lines)


def _diff_text(result: dict[str, Any], count: int) -> str:
    lines = [] if result["equal"] else [f"{len(result['layers'])} of {count} layers differ"]
    lines += [f"  {line}" for line in result["base"]]
    for layer in result["layers"]:
        if "only_in" in layer:
            lines.append(f"  {layer['layer']}: only in {printable(layer['only_in'])}")
        elif "shapes" in layer:
            lines.append(f"  {layer['layer']}: shapes {layer['shapes'][0]} and {layer['shapes'][1]}")
        else:
            lines.append(f"  {layer['layer']}: norm {layer['norm']:.3g}, largest {layer['largest']:.3g}")
    if result["equal"]:
        lines = [f"equal: {count} layers"]
    return "\n".join(lines + ([f"wrote {printable(result['plot'])}"] if "plot" in result else []))
