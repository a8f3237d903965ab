"""Coefficient files from the shell: look into them, compare them, merge and prune them, try them on a model's config.

    coeff-diffusers info outputs/demo --plot delta.png
    coeff-diffusers check outputs/demo --model stable-diffusion-v1-5/stable-diffusion-v1-5

Exit codes: 0 done, fits or equal; 1 differs or does not fit; 2 wrong usage, or a file that cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import base_differences, merge_coeff_files, prune_coeff_file, read_checked, relative_norm
from .checkpoint import KEY_SUFFIX, differences, find_file
from .coeff_file import read_file
from .console import escaped_output
from .files import printable

DONE, DIFFERS, UNUSABLE = 0, 1, 2


@escaped_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = make_parser().parse_args(argv)
    try:
        code, result, text = args.run(args)
        text = json.dumps(result, indent=2, allow_nan=False) if args.json else text
    except (ValueError, OSError, ImportError) as error:
        lines = map(printable, f"coeff-diffusers {args.command}: {error}".split("\n"))
        print("\n".join(lines), file=sys.stderr)
        return UNUSABLE
    except Exception:  # a fault of the program's own, which must not end with 1: that is an answer
        traceback.print_exc()
        return UNUSABLE
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing more is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


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
        from .plot import plot_layers

        plot_layers(tensors, args.plot, f"{printable(path.name)}: {result['coefficients']:,} coefficients")
        result["plot"] = str(args.plot)
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
        from .plot import plot_layers

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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "coeff-diffusers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = "a .safetensors file, a folder with one, or a repository of the Hub"

    sub = _command(commands, info, "what a file is for, how large Delta is by layer, which heads mix most",
                   "info outputs/demo", "info dog.safetensors --plot dog.png",
                   "info dog.safetensors --json | jq .header")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("--top", type=int, default=8, help="how many heads to list")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="draws Delta of every layer (pip install matplotlib)")

    sub = _command(commands, merge, "adds files up: sum_k weight_k Delta_k",
                   "merge dog.safetensors style.safetensors -o both.safetensors --weights 1 0.5",
                   "merge a.safetensors b.safetensors -o difference.safetensors --weights 1 -1",
                   "merge a.safetensors b.safetensors c.safetensors -o mean.safetensors --average",
                   "merge cat.safetensors dog.safetensors -o between.safetensors --interpolate 0.3")  # fmt: skip
    sub.add_argument("files", nargs="+", metavar="FILE", help=what)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the new .safetensors file")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each file; 1 by default")
    how.add_argument("--average", action="store_true", help="weighs each of n files by 1/n")
    how.add_argument("--interpolate", type=float, metavar="T", help="weighs two files by 1 - T and T")
    sub.add_argument("--ignore-base-name", action="store_true", help="merge though the base models' names differ")

    sub = _command(commands, prune, "leaves the small entries or the layers that matter least out",
                   "prune dog.safetensors -o small.safetensors --entries 200",
                   "prune dog.safetensors -o small.safetensors --layers 10")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the new .safetensors file")
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--entries", type=int, metavar="K", help="keeps the K entries of the largest magnitude")
    how.add_argument("--layers", type=int, metavar="K", help="keeps the K layers of the largest relative norm")

    sub = _command(commands, diff, "compares two files; exit code 1 if they differ",
                   "diff run1/pytorch_coeff_weights.safetensors run2/pytorch_coeff_weights.safetensors",
                   "diff a.safetensors b.safetensors --tolerance 1e-6 --plot difference.png")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("other", help=what)
    sub.add_argument("--tolerance", type=float, default=0.0, help="largest difference of an entry that is none")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="draws the second less the first")

    sub = _command(commands, check, "tells whether a file fits a model, by its config alone; exit code 1 if not",
                   "check outputs/demo --model stable-diffusion-v1-5/stable-diffusion-v1-5",
                   "check dog.safetensors --model models/my-model && echo it fits")  # fmt: skip
    sub.add_argument("file", help=what)
    sub.add_argument("--model", required=True, help="a pipeline or model: a folder, or a name on the Hub")
    return parser


def _command(commands: Any, run: Any, summary: str, *examples: str) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  coeff-diffusers {example}" for example in examples)
    sub: argparse.ArgumentParser = commands.add_parser(
        run.__name__,
        help=summary,
        description=f"{run.__name__}: {summary}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=run)
    sub.add_argument("--json", action="store_true", help="prints JSON")
    return sub


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
        lines.append(f"  {component}: {said['class']} {name}, {len(said['heads'])} layers")
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
    return "\n".join(lines + (["", f"wrote {printable(result['plot'])}"] if "plot" in result else []))


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


if __name__ == "__main__":
    sys.exit(main())
