"""The output folder: checked before anything is loaded, and each file in it written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

from ..errors import InputError
from ..writing import make_writable, write_image


def missing_folders(folder: str | Path) -> list[Path]:
    """What making `folder` would make: it and those above it that are not there."""
    return [path for path in (Path(folder), *Path(folder).parents) if not os.path.exists(path)]


def check_output_folder(output_dir: str | Path) -> None:
    """Makes the output folder.

    Raises:
        InputError: if it cannot be written, or the model card would overwrite somebody's README.md.
    """
    folder = make_writable(output_dir, "output_dir")
    if (folder / "README.md").exists() and not (folder / "config.yaml").exists():
        raise InputError(f"--output_dir: {folder} holds a README.md of no training run, which would be overwritten")


def write_grid(rows: list[list[Image.Image]], folder: Path) -> list[Path]:
    """Writes `grid.png`, a row per prompt, and each image of it on its own; returns the paths, the grid's first."""
    images = [image for row in rows for image in row]
    paths = [write_image(make_image_grid(images, rows=len(rows), cols=len(rows[0])), folder / "grid.png")]
    for r, row in enumerate(rows):
        paths += [write_image(image, folder / f"prompt{r}-image{c}.png") for c, image in enumerate(row)]
    return paths


def size_text(path: Path) -> str:
    size = path.stat().st_size
    return f"{size:,} bytes" if size < 100_000 else f"{size / 1e6:.1f} MB"
