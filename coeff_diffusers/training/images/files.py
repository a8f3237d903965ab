"""Where images come from: folders with captions here, data sets of the datasets library in hub_datasets.py."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from ..errors import InputError
from .colours import changes_colours

# What tools leave beside images. Any other file is meant to be an image, and is an error if it is none.
SIDECAR_SUFFIXES = (".txt", ".caption", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".ini", ".db")


@dataclass(frozen=True, eq=False)  # equal to itself alone, so that a file may be there twice, with two prompts
class TrainingImage:
    """An image that can be read, and the prompt that it is trained with.

    Args:
        name: what messages call it.
        prompt: the prompt.
        read: opens it as it is stored. Of top-level functions, so that worker processes can be handed it.
        height: in pixels, once it is turned as its EXIF entry says.
        width: likewise.
        digest: of its pixels, and of a colour profile that changes them.
    """

    name: str
    prompt: str
    read: Callable[[], Image.Image]
    height: int
    width: int
    digest: str = ""


def open_images(sources: Iterable[tuple[str, str, Callable[[], Image.Image]]], setting: str) -> list[TrainingImage]:
    """Reads each source (name, prompt, read) once, to the end, and warns of colour profiles that cannot be used.

    Raises:
        InputError: if some cannot be read as images, or their numbers not as colours; they are named.
    """
    images, problems = [], []
    for name, prompt, read in sources:
        try:
            with read() as image:
                # loads it: opening reads the header only, and does not see a file that breaks off
                upright = ImageOps.exif_transpose(image)
                shape = str((upright.mode, upright.size, upright.getpalette())).encode()
                profile = _profile(upright, name)
                digest = hashlib.sha256(shape + upright.tobytes() + profile).hexdigest()
            if problem := _range_problem(upright):
                problems.append(f"{name}: {problem}")
            images.append(TrainingImage(name, prompt, read, upright.height, upright.width, digest))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    if problems:
        raise InputError(f"--{setting}: these cannot be read as images:\n  " + "\n  ".join(problems))
    return images


def _profile(image: Image.Image, name: str) -> bytes:
    """The colour profile, if the image has one that changes its colours."""
    try:
        return bytes(image.info["icc_profile"]) if changes_colours(image) else b""
    except ValueError as error:
        warnings.warn(f"{name}: its colour profile cannot be used, and it is taken for sRGB: {error}", stacklevel=2)
        return b""


def _range_problem(image: Image.Image) -> str | None:
    """Why it cannot be told which numbers are black and white; of 8 and 16 bits it can."""
    what = None
    if image.mode == "F":
        what = "mode F has numbers of any range"
    elif image.mode == "I":
        low, high = (int(value) for value in image.getextrema())  # type: ignore[arg-type]
        if low < 0 or high > 65535:
            what = f"mode I has numbers from {low} to {high} here, beyond 16 bits"
    return what and f"{what}, so that black and white are unknown: save it as an 8- or 16-bit PNG"


def file_images(prompts: dict[Path, str], setting: str) -> list[TrainingImage]:
    """The images in files, with the prompt of each. Raises as [`open_images`]."""
    return open_images([(str(path), prompt, partial(open_file, path)) for path, prompt in prompts.items()], setting)


def open_file(path: Path) -> Image.Image:
    """Raises OSError if it is no image, or a link to a file that is not there."""
    if path.is_symlink() and not path.exists():
        raise OSError(f"is a link to {path.readlink()}, which is not there")
    return Image.open(path)


def folder_images(
    folder: str | Path,
    setting: str,
    prompt: str,
    caption_column: str | None = None,
    caption_extension: str | None = None,
) -> list[TrainingImage]:
    """A folder's images by name, each with `prompt` or its own caption.

    Args:
        folder: where they are.
        setting: the flag that named it.
        prompt: of all of them, where there are no captions.
        caption_column: of the folder's metadata.jsonl or metadata.csv.
        caption_extension: of a text file beside each image.

    Raises:
        InputError: as [`find_images`], [`read_captions`], [`read_sidecars`] and [`open_images`].
    """
    images = find_images(folder, setting)
    if caption_column:
        prompts = read_captions(folder, images, caption_column)
    elif caption_extension:
        prompts = read_sidecars(images, caption_extension)
    else:
        prompts = dict.fromkeys(images, prompt)
    return file_images(prompts, setting)


def find_images(folder: str | Path, setting: str, empty_allowed: bool = False) -> list[Path]:
    """A folder's files that are meant to be images, by name, and links that lead nowhere.

    Folders within, hidden files and files with one of `SIDECAR_SUFFIXES` are passed over.

    Raises:
        InputError: if there is no such folder, or no image in it; folders within that have some are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--{setting}: {folder} " + ("is no folder" if folder.exists() else "does not exist"))
    files = _image_files(folder)
    if not files and not empty_allowed:
        raise InputError(f"--{setting}: there are no images in {folder}{_images_within(folder, setting)}")
    return files


def _image_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() or not path.exists()]
    return [path for path in files if not path.name.startswith(".") and path.suffix.lower() not in SIDECAR_SUFFIXES]


def _images_within(folder: Path, setting: str) -> str:
    """What is said of folders within that have images; kohya's scripts take such, named as in `10_sks fox`."""
    lines = []
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in filter(_image_files, folders):
        kohya = re.fullmatch(r"(\d+)_(.+)", path.name)
        flags = f' --repeats {kohya[1]} --instance_prompt "{kohya[2]}"' if kohya else ""
        lines.append(f'--{setting} "{path}"{flags}' if setting == "instance_data_dir" else str(path))
    if not lines:
        return ""
    return "\n  ".join([" itself, and folders within it are not read; give one of those that have some:", *lines])


def read_captions(folder: str | Path, images: list[Path], column: str) -> dict[Path, str]:
    """What `column` of the folder's metadata says of each image, as the datasets library's imagefolder has it.

    Raises:
        InputError: if there is no metadata or no such column, an entry cannot be read, is of an image that is not
            there or that another entry is of, or an image has no caption.
    """
    path, entries, problems, unread = _read_metadata(Path(folder))
    columns = dict.fromkeys(name for entry in entries.values() for name in entry if name != "file_name")
    if entries and column not in columns:
        raise InputError(f"--caption_column: {path} has no column {column!r}; it has {', '.join(columns)}")
    captions: dict[Path, str] = {}
    lines: dict[Path, str] = {}
    find = _by_name(images)
    for where, entry in entries.items():
        name, text = entry.get("file_name"), entry.get(column)
        if not isinstance(name, str) or not isinstance(text, str):
            problems.append(f"{where} has no file_name and {column}")
            unread.append(str(name))
        elif (image := find(name)) is None:
            problems.append(f"{where} names {name}, which is no image of the folder: correct it, or take it out")
        elif image in lines:
            problems.append(f"{where} names {name}, as {lines[image]} does: leave one of them")
        else:
            captions[image], lines[image] = text.strip(), where
    without = [image.name for image in images if not captions.get(image)]
    problems += [f"{name} has no caption" for name in without if not any(name in text for text in unread)]
    if problems:
        raise InputError(f"--caption_column: {path}:\n  " + "\n  ".join(problems))
    return {image: captions[image] for image in images}


def _by_name(paths: Iterable[Path]) -> Callable[[str], Path | None]:
    """Finds a file by its name, also by `./a.png`, and with its accents composed or not, as a Mac decomposes them."""
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    exact = {path.name: path for group in alike.values() for path in group}

    def find(name: str) -> Path | None:
        plain = PurePosixPath(name).as_posix()
        group = alike.get(unicodedata.normalize("NFC", plain), [])
        return exact.get(plain) or (group[0] if len(group) == 1 else None)

    return find


def _read_metadata(folder: Path) -> tuple[Path, dict[str, dict[str, Any]], list[str], list[str]]:
    """The metadata file, its entries by line, what is wrong with it, and the text that is not read because of it."""
    found = [path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).is_file()]
    if len(found) != 1:
        has = "has both metadata.jsonl and metadata.csv" if found else "has neither metadata.jsonl nor metadata.csv"
        raise InputError(f"--caption_column: {folder} {has}; keep captions in one of them")
    text = _read_text(found[0], "caption_column")
    return found[0], *(_csv_entries(text) if found[0].suffix == ".csv" else _json_entries(text))


def _csv_entries(text: str) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    entries, problems, unread, names = {}, [], [], []
    try:
        names = next(reader, [])
        problems = [f"line 1 has the column {name} twice" for name in _twice(list(filter(None, names)))]
        for cells in reader:
            where = f"line {reader.line_num}"
            if len(cells) > len(names):
                problems.append(
                    f"{where} has {len(cells)} cells, and line 1 has {len(names)}: a text with commas stands in quotes"
                )
                unread.append(",".join(cells))
            elif cells:
                entries[where] = dict(zip(names, cells))
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}; nothing after it is read. Is a quotation mark not closed?")
        unread.append(text)
    return entries, problems, unread


def _json_entries(text: str) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    entries, problems, unread = {}, [], []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines takes U+2028 and others within a text for ends
        try:
            entry = json.loads(line, object_pairs_hook=_object) if line.strip() else None
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number} is no JSON: {error}")
            unread.append(line)
            continue
        if isinstance(entry, dict):
            entries[f"line {number}"] = entry
        elif entry is not None:
            problems.append(f"line {number} is no JSON object")
            unread.append(line)
    return entries, problems, unread


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice([name for name, _ in pairs]):
        raise ValueError(f"{', '.join(twice)} is given twice")
    return dict(pairs)


def _twice(names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def read_sidecars(images: list[Path], extension: str) -> dict[Path, str]:
    """The text of the file with this extension beside each image: `1.txt` of `1.jpg`.

    Raises:
        InputError: if an image has none, or an empty one, which are named.
    """
    prompts = {}
    ending = "." + extension.removeprefix(".")
    find = _by_name(path for path in images[0].parent.iterdir() if path.is_file())
    for image in images:
        path = find(image.with_suffix(ending).name)
        prompts[image] = _read_text(path, "caption_extension").strip() if path else ""
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
