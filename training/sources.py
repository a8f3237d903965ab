"""Where pictures come from: folders with captions here, data sets of the datasets library in hub_data.py."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from settings import InputError

# What tools leave beside pictures. Any other file is meant to be a picture, and is an error if it is none.
SIDECAR_SUFFIXES = (".txt", ".caption", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".ini", ".db")


@dataclass(frozen=True, eq=False)  # equal to itself alone, so that a file may be there twice, with two prompts
class Picture:
    """A picture that can be read, and the prompt that it is trained with.

    Args:
        name: what messages call it.
        prompt: the prompt.
        read: opens it as it is stored. Of top-level functions, so that worker processes can be handed it.
        height: in pixels, once it is turned as its EXIF entry says.
        width: likewise.
        digest: of its pixels.
    """

    name: str
    prompt: str
    read: Callable[[], Image.Image]
    height: int
    width: int
    digest: str = ""


def open_pictures(sources: Iterable[tuple[str, str, Callable[[], Image.Image]]], setting: str) -> list[Picture]:
    """Reads each source (name, prompt, read) once, to the end.

    Raises:
        InputError: if some cannot be read as pictures, or their numbers not as colours; they are named.
    """
    pictures, problems = [], []
    for name, prompt, read in sources:
        try:
            with read() as image:
                # loads it: opening reads the header only, and does not see a file that breaks off
                upright = ImageOps.exif_transpose(image)
                shape = str((upright.mode, upright.size, upright.getpalette())).encode()
                digest = hashlib.sha256(shape + upright.tobytes()).hexdigest()
            if problem := _range_problem(upright):
                problems.append(f"{name}: {problem}")
            pictures.append(Picture(name, prompt, read, upright.height, upright.width, digest))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    if problems:
        raise InputError(f"--{setting}: these cannot be read as pictures:\n  " + "\n  ".join(problems))
    return pictures


def _range_problem(image: Image.Image) -> str | None:
    """Why it cannot be told which numbers are black and white; of 8 and 16 bits it can."""
    what = None
    if image.mode == "F":
        what = "mode F has numbers of any range"
    elif image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            what = f"mode I has numbers from {low} to {high} here, beyond 16 bits"
    return what and f"{what}, so that black and white are unknown: save it as an 8- or 16-bit PNG"


def file_pictures(prompts: dict[Path, str], setting: str) -> list[Picture]:
    """The pictures in files, with the prompt of each. Raises as [`open_pictures`]."""
    return open_pictures([(str(path), prompt, partial(Image.open, path)) for path, prompt in prompts.items()], setting)


def folder_pictures(
    folder: str | Path,
    setting: str,
    prompt: str,
    caption_column: str | None = None,
    caption_extension: str | None = None,
) -> list[Picture]:
    """A folder's pictures by name, each with `prompt` or its own caption.

    Args:
        folder: where they are.
        setting: the flag that named it.
        prompt: of all of them, where there are no captions.
        caption_column: of the folder's metadata.jsonl or metadata.csv.
        caption_extension: of a text file beside each picture.

    Raises:
        InputError: as [`find_images`], [`read_captions`], [`read_sidecars`] and [`open_pictures`].
    """
    images = find_images(folder, setting)
    if caption_column:
        prompts = read_captions(folder, images, caption_column)
    elif caption_extension:
        prompts = read_sidecars(images, caption_extension)
    else:
        prompts = dict.fromkeys(images, prompt)
    return file_pictures(prompts, setting)


def find_images(folder: str | Path, setting: str, empty_allowed: bool = False) -> list[Path]:
    """A folder's files that are meant to be pictures, by name.

    Folders within, hidden files and files with one of `SIDECAR_SUFFIXES` are passed over.

    Raises:
        InputError: if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--{setting}: {folder} " + ("is no folder" if folder.exists() else "does not exist"))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.suffix.lower() not in SIDECAR_SUFFIXES]
    if not files and not empty_allowed:
        raise InputError(f"--{setting}: there are no pictures in {folder}")
    return files


def read_captions(folder: str | Path, images: list[Path], column: str) -> dict[Path, str]:
    """What `column` of the folder's metadata says of each picture, as the datasets library's imagefolder has it.

    Raises:
        InputError: if there is no metadata or no such column, an entry cannot be read, or a picture has no caption.
    """
    path, entries, problems = _read_metadata(Path(folder))
    columns = dict.fromkeys(name for entry in entries.values() for name in entry if name != "file_name")
    if entries and column not in columns:
        raise InputError(f"--caption_column: {path} has no column {column!r}; it has {', '.join(columns)}")
    captions = {}
    for where, entry in entries.items():
        text = entry.get(column)
        if isinstance(entry.get("file_name"), str) and isinstance(text, str):
            captions[entry["file_name"]] = text.strip()
        else:
            problems.append(f"{where} has no file_name and {column}")
    problems += [f"{image.name} has no caption" for image in images if not captions.get(image.name)]
    if problems:
        raise InputError(f"--caption_column: {path}:\n  " + "\n  ".join(problems))
    return {image: captions[image.name] for image in images}


def _read_metadata(folder: Path) -> tuple[Path, dict[str, dict[str, Any]], list[str]]:
    """The metadata file, its entries by line, and what cannot be read in it."""
    found = [path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).is_file()]
    if len(found) != 1:
        has = "has both metadata.jsonl and metadata.csv" if found else "has neither metadata.jsonl nor metadata.csv"
        raise InputError(f"--caption_column: {folder} {has}; keep captions in one of them")
    text = _read_text(found[0], "caption_column")
    if found[0].suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
        return found[0], {f"line {reader.line_num}": row for row in reader}, []
    entries, problems = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError as error:
            problems.append(f"line {number} is no JSON: {error}")
            continue
        if isinstance(entry, dict):
            entries[f"line {number}"] = entry
        elif entry is not None:
            problems.append(f"line {number} is no JSON object")
    return found[0], entries, problems


def read_sidecars(images: list[Path], extension: str) -> dict[Path, str]:
    """The text of the file with this extension beside each picture: `1.txt` of `1.jpg`.

    Raises:
        InputError: if a picture has none, or an empty one, which are named.
    """
    prompts = {}
    for image in images:
        path = image.with_suffix("." + extension.removeprefix("."))
        prompts[image] = _read_text(path, "caption_extension").strip() if path.is_file() else ""
    problems = [f"{image.name} has no caption" for image, prompt in prompts.items() if not prompt]
    if problems:
        raise InputError(
            f"--caption_extension: {images[0].parent}, in files that end in {extension}:\n  " + "\n  ".join(problems)
        )
    return prompts


def _read_text(path: Path, setting: str) -> str:
    """Raises InputError if the file is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with the mark that some tools put first, or without
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--{setting}: {path} cannot be read as text in UTF-8: {error}") from error
