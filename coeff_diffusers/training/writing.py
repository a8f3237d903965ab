"""Files and folders, written whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from coeff_diffusers.files import whole_file

from .errors import InputError


def make_writable(folder: str | Path, setting: str) -> Path:
    """Makes the folder and tries to write into it.

    Raises:
        InputError: if either fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        raise InputError(f"--{setting}: {folder} cannot be written: {error}") from error


def write_text(text: str, path: Path) -> Path:
    with whole_file(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    return path


def write_image(image: Image.Image, path: Path) -> Path:
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path
