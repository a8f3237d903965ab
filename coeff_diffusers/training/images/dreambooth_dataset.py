"""Images, made into the tensors that the model trains on.

What is random about a training image follows from the run's seed and the image's place in the run alone. So a run
is the same whatever the number of workers and processes, and however a batch is divided by gradient accumulation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..settings.rules import WORDS
from .augment import (
    AS_IT_IS,
    Augmentation,
    caption_of,
    covered,
    draw_augmentation,
    offsets,
    place,
)
from .buckets import Size, bucket_of_step, nearest_bucket, shuffled
from .colours import to_srgb
from .files import TrainingImage


def upright_rgb(image: Image.Image, background: str) -> Image.Image:
    """Turned as its EXIF entry says, and in sRGB. What is transparent shows the background's colour."""
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    image = to_srgb(image, profile)
    if not image.mode.endswith("A") and "transparency" not in image.info:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, ImageColor.getrgb(background))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of a grey image with 16, which Pillow's own conversion cuts off at 255; with alpha, if one grey is clear."""
    values = np.asarray(image)
    grey = Image.fromarray((values // 257).astype(np.uint8))
    if "transparency" in image.info:
        opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(opaque))
    return grey


def cover(height: int, width: int, size: Size) -> Size:
    """The least size of an image that covers `size` unstretched, so that one side fits."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


@lru_cache(maxsize=256)  # at 512 pixels an image takes some 0.8 MB
def load_image(source: TrainingImage, size: Size, background: str) -> Image.Image:
    """The source, covering `size`."""
    with source.read() as stored:
        upright = upright_rgb(stored, background)
    return upright.resize(cover(upright.height, upright.width, size)[::-1], Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Crop:
    """What of an image is shown.

    Args:
        image: which one.
        size: height and width of the crop.
        where: it lies along the side that is too long: from 0, its start, to 1, its end.
        mirrored: left and right are exchanged.
        augmentation: how large it is shown, and where.
    """

    image: TrainingImage
    size: Size
    where: float
    mirrored: bool
    augmentation: Augmentation = AS_IT_IS

    @classmethod
    def draw(
        cls,
        image: TrainingImage,
        size: Size,
        center_crop: bool,
        random_flip: bool,
        generator: torch.Generator,
        augmentation: Augmentation = AS_IT_IS,
    ) -> Crop:
        # both are drawn in any case, so that one option does not change what another one draws
        where, mirror = torch.rand(2, generator=generator).tolist()
        nothing_is_cut = image.height * size[1] == image.width * size[0]
        where = 0.5 if center_crop or nothing_is_cut else where
        return cls(image, size, where, random_flip and mirror < 0.5, augmentation)

    @property
    def part(self) -> Size:
        """Height and width of what is taken of the scaled image: the crop's, times the augmentation's scale."""
        return round(self.size[0] * self.augmentation.scale), round(self.size[1] * self.augmentation.scale)

    @property
    def covering(self) -> Size:
        """Height and width that the image is scaled to."""
        return cover(self.image.height, self.image.width, self.part)

    @property
    def start(self) -> tuple[int, int]:
        """Top and left of the part in the scaled image, which is mirrored already if it is to be."""
        rest = [whole - part for whole, part in zip(self.covering, self.part)]
        top, left = (int(self.where * (length + 1)) for length in rest)
        return top, rest[1] - left if self.mirrored else left

    @property
    def corner(self) -> tuple[int, int]:
        """Top and left in the scaled image of what is shown of it."""
        top, left = (max(0, -offset) for offset in offsets(self.size, self.part, self.augmentation))
        return self.start[0] + top, self.start[1] + left

    @property
    def covered(self) -> tuple[float, ...]:
        """Top, left, bottom and right of what the image covers of the crop, as parts of its sides."""
        return covered(self.size, self.part, self.augmentation)


def crop_image(image: Image.Image, crop: Crop) -> Tensor:
    """(3, height, width) in [-1, 1] of a scaled image."""
    (top, left), (height, width) = crop.start, crop.part
    image = ImageOps.mirror(image) if crop.mirrored else image
    box = image.crop((left, top, left + width, top + height))
    shown = place(np.array(box), crop.size, crop.augmentation)
    return torch.from_numpy(shown).permute(2, 0, 1).float() / 127.5 - 1.0


def seed_of(*parts: object) -> int:
    """A seed from the run's seed and what it is for; those of runs with seeds 0 and 1 have nothing in common."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@dataclass(frozen=True)
class Example:
    """An image as it is drawn in a run.

    Args:
        kind: `"instance"` or `"class"`.
        name: of the image, for messages.
        prompt: the prompt that it is trained with.
        pixels: (3, height, width) in [-1, 1]; `None` if the moments are there.
        moments: (2, ...), mean and deviation of its latents, if they have been encoded before.
        sizes: height and width of the file, top and left of the crop, height and width of it.
        seed: of the noise that is added to it.
        box: what of the crop is trained on, as of [`Crop.covered`]; `None` is all.
    """

    kind: str
    name: str
    prompt: str
    pixels: Tensor | None
    moments: Tensor | None
    sizes: tuple[int, ...]
    seed: int
    box: tuple[float, ...] | None = None


class DreamBoothDataset(Dataset[list[Example]]):
    """Draw n of a run: an image of the subject and, with prior preservation, one of its class.

    Every image is shown once in an order drawn anew before any other of its bucket is shown again, also across
    batches. It is read in order, 0, 1, 2, ..., to the end of the run.

    Args:
        draws: how many draws are taken.
        instance_images: the subject's images.
        class_images: images of its class; none without prior preservation. They are cropped to the bucket of the
            subject's image that they are shown with.
        resolution: height and width of the crops, if there are no buckets.
        seed: of all that is random.
        center_crop: crop at the centre, as is always done with buckets.
        random_flip: mirror half of the images.
        background_color: of what is transparent.
        caption_dropout: probability with which the empty prompt takes the place of an image's.
        augment: share of the subject's draws that show it smaller, larger or elsewhere.
        words: of the captions of these.
        first: the first draw, in a run that is continued.
        buckets: sizes, of which each image of the subject has the one that is most like it.
        step_draws: how many draws an optimizer step takes, over all processes. These are of one bucket.

    Attributes:
        moments: of crops that have been encoded before; their images are not read.
    """

    def __init__(
        self,
        draws: int,
        instance_images: list[TrainingImage],
        class_images: list[TrainingImage],
        *,
        resolution: int,
        seed: int,
        center_crop: bool = False,
        random_flip: bool = False,
        background_color: str = "white",
        caption_dropout: float = 0.0,
        augment: float = 0.0,
        words: Mapping[str, str] = WORDS,
        first: int = 0,
        buckets: Sequence[Size] = (),
        step_draws: int = 1,
    ) -> None:
        self.draws, self.first, self.step_draws, self.seed = draws, first, step_draws, seed
        self.center_crop, self.random_flip = center_crop or bool(buckets), random_flip
        self.background_color, self.caption_dropout = background_color, caption_dropout
        self.augment, self.words = augment, words
        sizes = buckets or [(resolution, resolution)]
        self.sizes = tuple(nearest_bucket(image.height, image.width, sizes) for image in instance_images)
        self.instance_images = {
            size: tuple(image for image, other in zip(instance_images, self.sizes) if other == size)
            for size in dict.fromkeys(self.sizes)
        }
        self.class_images = tuple(class_images)
        self.kinds = ("instance", "class") if class_images else ("instance",)
        self.moments: dict[Crop, Tensor] = {}

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> list[Example]:
        """Of the subject, and of the class if there are class images."""
        return [self._example(kind, draw + self.first) for kind in self.kinds]

    def crop(self, kind: str, draw: int) -> Crop:
        """Which image a draw of the run shows, and what of it."""
        step, place = divmod(draw, self.step_draws)
        size, steps_before = bucket_of_step(self.sizes, step, f"{self.seed}/buckets")
        images, shown = self.class_images, draw
        if kind == "instance":
            images, shown = self.instance_images[size], steps_before * self.step_draws + place
        epoch, place = divmod(shown, len(images))
        image = shuffled(images, seed_of(self.seed, kind, "order", epoch))[place]
        generator = torch.Generator().manual_seed(seed_of(self.seed, kind, "crop", draw))
        share = self.augment if kind == "instance" else 0.0
        augmentation = draw_augmentation(share, seed_of(self.seed, kind, "augment", draw))
        return Crop.draw(image, size, self.center_crop, self.random_flip, generator, augmentation)

    def crops(self) -> list[Crop]:
        """All that will be shown, each once."""
        draws = range(self.first, self.first + self.draws)
        return list(dict.fromkeys(self.crop(kind, draw) for draw in draws for kind in self.kinds))

    def pixels(self, crop: Crop) -> Tensor:
        """(3, height, width) in [-1, 1]."""
        return crop_image(load_image(crop.image, crop.part, self.background_color), crop)

    def _example(self, kind: str, draw: int) -> Example:
        crop = self.crop(kind, draw)
        moments = self.moments.get(crop)
        dropped = random.Random(seed_of(self.seed, kind, "caption", draw)).random() < self.caption_dropout
        prompt = crop.image.prompt
        if kind == "instance":
            prompt = caption_of(prompt, crop.augmentation, self.words)
        return Example(
            kind=kind,
            name=crop.image.name,
            prompt="" if dropped else prompt,
            pixels=self.pixels(crop) if moments is None else None,
            moments=moments,
            sizes=(crop.image.height, crop.image.width, *crop.corner, *crop.size),
            seed=seed_of(self.seed, kind, "noise", draw),
            box=crop.covered if self.augment else None,
        )


def collate(draws: list[list[Example]]) -> dict[str, Any]:
    """A batch, the subject's images first, then as many of the class; with moments if all have them, or pixels."""
    examples = [example for kind in zip(*draws) for example in kind]
    content = "pixels" if examples[0].moments is None else "moments"
    boxes = [example.box for example in examples]
    return {
        "kinds": [example.kind for example in examples],
        "names": [example.name for example in examples],
        "prompts": [example.prompt for example in examples],
        # (B, 3, height, width) or (B, 2, ...)
        content: torch.stack([getattr(example, content) for example in examples]),
        "sizes": torch.tensor([example.sizes for example in examples]),  # (B, 6)
        "seeds": torch.tensor([example.seed for example in examples]),  # (B,)
        **({} if None in boxes else {"boxes": torch.tensor(boxes)}),  # (B, 4)
    }
