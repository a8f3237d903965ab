"""Pictures from folders, made into the square tensors that the model trains on.

What is random about a training picture follows from the run's seed and the picture's place in the run alone. So a run
is the same whatever the number of workers and processes, and however a batch is divided by gradient accumulation.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from settings import InputError
from torch import Tensor
from torch.utils.data import Dataset

# What tools leave beside pictures. Any other file is meant to be a picture, and is an error if it is none.
SIDECAR_SUFFIXES = (".txt", ".caption", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".ini", ".db")


def find_images(folder: str | Path, setting: str, empty_allowed: bool = False) -> list[Path]:
    """The pictures of a folder by name, each of which can be read.

    Folders within, hidden files and files with one of `SIDECAR_SUFFIXES` are passed over.

    Raises:
        InputError: if there is no such folder, no picture in it, or files are no pictures, which are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--{setting}: {folder} " + ("is no folder" if folder.exists() else "does not exist"))
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.suffix.lower() not in SIDECAR_SUFFIXES]
    if not files and not empty_allowed:
        raise InputError(f"--{setting}: there are no pictures in {folder}")
    problems = [f"{path}: {problem}" for path in files if (problem := _read_problem(path))]
    if problems:
        raise InputError(f"--{setting}: these files cannot be read as pictures:\n  " + "\n  ".join(problems))
    return files


def read_captions(folder: str | Path, images: list[Path], column: str) -> dict[Path, str]:
    """What `column` of `folder / metadata.jsonl` says of each picture, as the datasets library's imagefolder has it.

    Raises:
        InputError: if there is no such file, a line of it cannot be read, or a picture has no caption, which is named.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise InputError(f"--caption_column: there is no {path}")
    captions, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line) if line.strip() else {"file_name": "", column: ""}
            captions[entry["file_name"]] = str(entry[column]).strip()
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"line {number} has no file_name and {column}: {error!r}")
    problems += [f"{image.name} has no caption" for image in images if not captions.get(image.name)]
    if problems:
        raise InputError(f"--caption_column: {path}:\n  " + "\n  ".join(problems))
    return {image: captions[image.name] for image in images}


def _read_problem(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()  # opening reads the header only, and does not see a file that breaks off
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def upright_rgb(image: Image.Image, background: str) -> Image.Image:
    """Turned as its EXIF entry says, and in RGB. What is transparent shows the background's colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion cuts off at 255
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if not image.mode.endswith("A") and "transparency" not in image.info:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, ImageColor.getrgb(background))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def fit_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """Scaled so that the shorter side has `side` pixels."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@lru_cache(maxsize=256)  # at 512 pixels a picture takes some 0.8 MB
def load_image(path: Path, modified: int, side: int, background: str) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, its shorter side `side` pixels, and height and width that it has in the file."""
    with Image.open(path) as image:
        upright = upright_rgb(image, background)
    return fit_shorter_side(upright, side), (upright.height, upright.width)


def crop(
    image: Image.Image, side: int, center_crop: bool, random_flip: bool, generator: torch.Generator
) -> tuple[Tensor, tuple[int, int]]:
    """(3, side, side) in [-1, 1] of a picture whose shorter side has `side` pixels, and top and left of the crop."""
    # (3, height, width); drawn in any case, so that one option does not change what another one draws
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
    where, mirror = torch.rand(2, generator=generator).tolist()
    where = 0.5 if center_crop else where
    top, left = (int(where * (length - side + 1)) for length in pixels.shape[1:])
    pixels = pixels[:, top : top + side, left : left + side]
    return (pixels.flip(-1) if random_flip and mirror < 0.5 else pixels), (top, left)


def seed_of(*parts: object) -> int:
    """A seed from the run's seed and what it is for; those of runs with seeds 0 and 1 have nothing in common."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@dataclass(frozen=True)
class Example:
    """A picture as it is drawn in a run.

    Args:
        kind: `"instance"` or `"class"`.
        path: the file.
        prompt: the prompt that it is trained with.
        pixels: (3, height, width) in [-1, 1].
        sizes: height and width of the file, top and left of the crop, height and width of it.
        seed: of the noise that is added to it.
    """

    kind: str
    path: str
    prompt: str
    pixels: Tensor
    sizes: tuple[int, ...]
    seed: int


class DreamBoothDataset(Dataset[list[Example]]):
    """Draw n of a run: a picture of the subject and, with prior preservation, one of its class.

    Every picture is shown once in an order drawn anew before any is shown again, also across batches. It is read in
    order, 0, 1, 2, ..., to the end of the run.

    Args:
        draws: how many draws are taken.
        first: the first of them, in a run that is continued.
        instance_images: the subject's pictures.
        class_images: pictures of its class; none without prior preservation.
        prompts: of each of these pictures.
    """

    def __init__(
        self,
        draws: int,
        instance_images: list[Path],
        class_images: list[Path],
        prompts: dict[Path, str],
        *,
        resolution: int,
        seed: int,
        center_crop: bool = False,
        random_flip: bool = False,
        background_color: str = "white",
        first: int = 0,
    ) -> None:
        self.draws, self.first = draws, first
        self.images = {"instance": instance_images} | ({"class": class_images} if class_images else {})
        self.prompts, self.resolution, self.seed = prompts, resolution, seed
        self.center_crop, self.random_flip, self.background_color = center_crop, random_flip, background_color

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> list[Example]:
        """Of the subject, and of the class if there are class pictures."""
        return [self._example(kind, draw + self.first) for kind in self.images]

    def path(self, kind: str, draw: int) -> Path:
        """Which picture a draw shows."""
        paths = self.images[kind]
        epoch, place = divmod(draw, len(paths))
        order = list(paths)
        random.Random(seed_of(self.seed, kind, "order", epoch)).shuffle(order)
        return order[place]

    def _example(self, kind: str, draw: int) -> Example:
        path, side = self.path(kind, draw), self.resolution
        image, size = load_image(path, path.stat().st_mtime_ns, side, self.background_color)
        generator = torch.Generator().manual_seed(seed_of(self.seed, kind, "crop", draw))
        pixels, (top, left) = crop(image, side, self.center_crop, self.random_flip, generator)
        return Example(
            kind=kind,
            path=str(path),
            prompt=self.prompts[path],
            pixels=pixels,
            sizes=(*size, top, left, side, side),
            seed=seed_of(self.seed, kind, "noise", draw),
        )


def collate(draws: list[list[Example]]) -> dict[str, Any]:
    """A batch, the subject's pictures first, then as many of the class."""
    examples = [example for kind in zip(*draws) for example in kind]
    return {
        "kinds": [example.kind for example in examples],
        "paths": [example.path for example in examples],
        "prompts": [example.prompt for example in examples],
        "pixels": torch.stack([example.pixels for example in examples]),  # (B, 3, height, width)
        "sizes": torch.tensor([example.sizes for example in examples]),  # (B, 6)
        "seeds": torch.tensor([example.seed for example in examples]),  # (B,)
    }
