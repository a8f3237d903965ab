"""Pictures, made into the square tensors that the model trains on.

What is random about a training picture follows from the run's seed and the picture's place in the run alone. So a run
is the same whatever the number of workers and processes, and however a batch is divided by gradient accumulation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from sources import Picture
from torch import Tensor
from torch.utils.data import Dataset


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
def load_image(picture: Picture, side: int, background: str) -> Image.Image:
    """The picture, its shorter side `side` pixels."""
    with picture.read() as image:
        return fit_shorter_side(upright_rgb(image, background), side)


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
        name: of the picture, for messages.
        prompt: the prompt that it is trained with.
        pixels: (3, height, width) in [-1, 1].
        sizes: height and width of the file, top and left of the crop, height and width of it.
        seed: of the noise that is added to it.
    """

    kind: str
    name: str
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
    """

    def __init__(
        self,
        draws: int,
        instance_images: list[Picture],
        class_images: list[Picture],
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
        self.resolution, self.seed = resolution, seed
        self.center_crop, self.random_flip, self.background_color = center_crop, random_flip, background_color

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> list[Example]:
        """Of the subject, and of the class if there are class pictures."""
        return [self._example(kind, draw + self.first) for kind in self.images]

    def picture(self, kind: str, draw: int) -> Picture:
        """Which one a draw shows."""
        epoch, place = divmod(draw, len(self.images[kind]))
        order = list(self.images[kind])
        random.Random(seed_of(self.seed, kind, "order", epoch)).shuffle(order)
        return order[place]

    def _example(self, kind: str, draw: int) -> Example:
        picture, side = self.picture(kind, draw), self.resolution
        image = load_image(picture, side, self.background_color)
        generator = torch.Generator().manual_seed(seed_of(self.seed, kind, "crop", draw))
        pixels, (top, left) = crop(image, side, self.center_crop, self.random_flip, generator)
        return Example(
            kind=kind,
            name=picture.name,
            prompt=picture.prompt,
            pixels=pixels,
            sizes=(picture.height, picture.width, top, left, side, side),
            seed=seed_of(self.seed, kind, "noise", draw),
        )


def collate(draws: list[list[Example]]) -> dict[str, Any]:
    """A batch, the subject's pictures first, then as many of the class."""
    examples = [example for kind in zip(*draws) for example in kind]
    return {
        "kinds": [example.kind for example in examples],
        "names": [example.name for example in examples],
        "prompts": [example.prompt for example in examples],
        "pixels": torch.stack([example.pixels for example in examples]),  # (B, 3, height, width)
        "sizes": torch.tensor([example.sizes for example in examples]),  # (B, 6)
        "seeds": torch.tensor([example.seed for example in examples]),  # (B,)
    }
