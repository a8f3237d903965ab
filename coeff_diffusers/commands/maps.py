"""`coeff-diffusers maps`: where each head looks for a word of the prompt, before and after its maps are mixed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from ..console import escaped_output
from ..maps import AttentionMaps, attention_maps, overlay_map
from ..sampling import sampling_defaults
from .generate import OPTIONS, coeff_files, load_pipeline, processes, write_image
from .requests import PromptsError
from .sheet import sheet


@escaped_output()
def main(args: argparse.Namespace) -> Path:
    """Writes the sheet, and returns its path."""
    files = coeff_files(args.coeff_weights, args.weight_name)
    pipe = load_pipeline(args, files, args.device or processes().device)
    options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    try:
        found = attention_maps(
            pipe,
            args.prompt,
            args.word,
            layers=args.layers,
            steps=args.steps,
            generator=torch.Generator().manual_seed(args.seed),
            **sampling_defaults(pipe) | options,
        )
    except ValueError as error:
        raise PromptsError(str(error)) from error
    path: Path = args.output_file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(maps_sheet(found, f"{args.word!r} in {args.prompt!r}", found.most_changed()[: args.top]), path)
    print(f"wrote {path}")
    return path


def maps_sheet(
    found: AttentionMaps, title: str, layers: list[str], cell: int = 96, columns: int | None = None
) -> Image.Image:
    """A sheet with two rows for each layer, before and after mixing, a column for each head, on one scale a layer.

    Args:
        found: what is drawn.
        title: over all.
        layers: in this order.
        cell: side of a map, in pixels.
        columns: heads of a row, at most; the others follow in two rows of their own. `None` has all in one.
    """
    rows: list[tuple[str, list[Image.Image], list[str]]] = [("the image", [found.image], [])]
    for path in layers:
        both = {"before": found.before[path], "after": found.after[path]}
        limit = max(float(maps.abs().max()) for maps in both.values())
        short = ".".join(part for part in path.split(".")[1:] if part not in ("attentions", "transformer_blocks"))
        count = len(both["before"])
        for start in range(0, count, columns or count):
            for name, maps in both.items():
                part = list(enumerate(maps))[start : start + (columns or count)]
                heads = [overlay_map(found.image, one, limit=limit) for _, one in part]
                captions = [f"head {i}: {float(one.mean()):.2f}" for i, one in part]
                rows.append((f"{short.replace('.', ' ')} {name}", heads, captions))
    return sheet(rows, title=title, cell=cell)
