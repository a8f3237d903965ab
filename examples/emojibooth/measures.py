"""What is measured of an image, where the right one is known: scenes are composed, so the truth can be drawn.

Subject: features (cosine, of judge.py), PSNR, the name that the judge gives. Prompt: colour, size and place, from
the pixels. Drift: what became of images that have nothing to do with the subject.
"""

from __future__ import annotations

import itertools
import math
import sys
from functools import cache
from statistics import mean

import numpy as np
from judge import HERE, Judge
from PIL import Image
from torch import Tensor

sys.path.append(str(HERE.parent / "emoji"))
from evaluate import name_background
from pretrain import to_tensor
from scenes import IMAGE_SIZE, PLACES, SIZES, Scene, render

SHIFT = 2  # pixels: an image may lie so far off and is compared with the truth moved along
SUBJECTS_FOLDER = HERE.parent / "emoji" / "subjects"

# The base model cannot paint two glyphs, so no prompt asks for the subject beside another.
SCENES = {  # kind -> what is asked for; no training image has these backgrounds
    "background": [("blue", "", ""), ("yellow", "", ""), ("pink", "", ""), ("black", "", "")],
    "size": [("blue", "small", ""), ("yellow", "small", ""), ("pink", "large", ""), ("black", "large", "")],
    "place": [
        *(("blue", "", "on the left"), ("yellow", "", "on the right")),
        *(("pink", "", "at the top"), ("black", "", "at the bottom")),
    ],
}
UNRELATED = [
    Scene("pig face", "blue"),
    Scene("wolf face", "white", "large"),
    Scene("frog face", "orange", "small"),
    Scene("strawberry", "green"),
    Scene("penguin", "purple", "", "on the left"),
    Scene("pizza", "gray", "", "at the top"),
    Scene("airplane", "pink"),
    Scene("sunflower", "black", "large"),
]


def scenes_of(subject: str, kind: str) -> list[Scene]:
    return [Scene(subject, *scene) for scene in SCENES[kind]]


@cache
def glyph_of(subject: str) -> Image.Image:
    """RGBA, of a held-out subject."""
    return Image.open(SUBJECTS_FOLDER / f"{subject.replace(' ', '-')}.png").convert("RGBA")


# ---------------------------------------------------------------------------------------------------------- subject


@cache
def truths(scene: Scene, shift: int = SHIFT) -> Tensor:
    """The scene moved by up to `shift` pixels each way, ((2 shift + 1)^2, 3, 64, 64) in [-1, 1]."""
    moves = itertools.product(range(-shift, shift + 1), repeat=2)
    return to_tensor([render(scene, glyph_of(scene.words), move) for move in moves])


@cache
def features_of_truths(judge: Judge, scene: Scene) -> Tensor:
    return judge.features(truths(scene))


def psnr(image: Image.Image, scene: Scene) -> float:
    """Of the image to the true scene at its best shift, in dB of 255."""
    errors = (truths(scene) - to_tensor([image])).mul(127.5).square().mean((1, 2, 3))
    return 20 * math.log10(255) - 10 * math.log10(max(float(errors.min()), 1e-3))


def likeness(judge: Judge, image: Image.Image, scene: Scene) -> float:
    """Cosine of the image's features and those of the true scene at its best shift."""
    return float((features_of_truths(judge, scene) @ judge.features(to_tensor([image]))[0]).max())


# ----------------------------------------------------------------------------------------------------------- prompt


def silhouette(image: Image.Image, threshold: float = 48.0) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what differs from the background, the frame's median, by `threshold` of 255.

    A row or a column counts from three such pixels on. `None` where there is nothing.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    frame = np.concatenate([part.reshape(-1, 3) for part in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])])
    seen = np.abs(pixels - np.median(frame, axis=0)).max(axis=2) > threshold
    columns, rows = (np.flatnonzero(seen.sum(axis=axis) >= 3) for axis in (0, 1))
    if not len(columns) or not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def name_size(image: Image.Image) -> str | None:
    """The word of `SIZES` whose glyph is as large as the longer side of what is seen."""
    box = silhouette(image)
    if box is None:
        return None
    side = max(box[2] - box[0], box[3] - box[1])
    return min(SIZES, key=lambda word: abs(math.log(SIZES[word] / side)))


def name_place(image: Image.Image) -> str | None:
    """The words of `PLACES` that are nearest to the middle of what is seen."""
    box = silhouette(image)
    if box is None:
        return None
    centre = (box[0] + box[2] - IMAGE_SIZE) / 2, (box[1] + box[3] - IMAGE_SIZE) / 2
    return min(PLACES, key=lambda words: math.dist(PLACES[words], centre))


# -------------------------------------------------------------------------------------------------------------- all


def measure(judge: Judge, images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """Means over images of the subject, each with the scene that was asked for."""
    named = judge.names(to_tensor(images))
    pairs = list(zip(images, scenes))
    return {
        "likeness": mean(likeness(judge, image, scene) for image, scene in pairs),
        "psnr": mean(psnr(image, scene) for image, scene in pairs),
        "recognised": mean(name == scene.words for name, scene in zip(named, scenes)),
        "colour": mean(name_background(image) == scene.background for image, scene in pairs),
        "size": mean(name_size(image) == scene.size for image, scene in pairs),
        "place": mean(name_place(image) == scene.place for image, scene in pairs),
    }


def drift(judge: Judge, images: list[Image.Image], base: list[Image.Image]) -> dict[str, float]:
    """Of images of `UNRELATED`: mean absolute change against the base model's, of 255; share that is recognised."""
    change = (to_tensor(images) - to_tensor(base)).abs().mean() * 127.5
    named = judge.names(to_tensor(images))
    return {
        "drift": float(change),
        "unrelated_recognised": mean(name == scene.words for name, scene in zip(named, UNRELATED)),
    }


def diversity(first: list[Image.Image], second: list[Image.Image]) -> float:
    """Mean absolute difference of the images of two seeds, of 255. There is one right image, so it is noise here."""
    return float((to_tensor(first) - to_tensor(second)).abs().mean() * 127.5)
