"""Images of the subject shown smaller, larger or elsewhere, with the words for it in their captions.

As Custom Diffusion resizes and shifts (arXiv 2212.04488), so that a prompt can go on asking for sizes and places. What
is drawn is one of few: a small image has 2/3 of its size and a large one 4/3, and places are 3/16 of the side off.
So a word means one thing, and latents can be cached.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..settings.rules import Size

SCALES = {"small": 2 / 3, "": 1.0, "large": 4 / 3}
SHIFT = 3 / 16
PLACES = {"": (0.0, 0.0), "left": (0.0, -SHIFT), "right": (0.0, SHIFT), "top": (-SHIFT, 0.0), "bottom": (SHIFT, 0.0)}


class Augmentation(NamedTuple):
    """How an image is shown: names of `SCALES` and `PLACES`; the empty ones are the image as it is."""

    size: str = ""
    place: str = ""

    @property
    def scale(self) -> float:
        return SCALES[self.size]


AS_IT_IS = Augmentation()
# large images lie in the middle, where they have to; weights are those of a draw
CHOICES = {
    AS_IT_IS: 0,
    Augmentation("small"): 4,
    Augmentation("large"): 6,
    **{Augmentation("", place): 1.5 for place in PLACES if place},
    **{Augmentation("small", place): 1 for place in PLACES if place},
}


def draw_augmentation(share: float, seed: int) -> Augmentation:
    """One of `CHOICES` in a `share` of draws, else the image as it is."""
    rng = random.Random(seed)
    return rng.choices(list(CHOICES), list(CHOICES.values()))[0] if rng.random() < share else AS_IT_IS


def caption_of(prompt: str, augmentation: Augmentation, words: Mapping[str, str]) -> str:
    """The prompt with the words for size and place.

    They stand where the prompt has {size} and {place}, else at its end, in the place of a full stop; an image as it is
    has none of it, nor the space or the comma before them.

        "a {size} cup on a table, {place}"  ->  "a small cup on a table, on the left" or "a cup on a table"
        "a cup on a table"                  ->  "a cup on a table, small, on the left"
    """
    for mark, name in zip(("{size}", "{place}"), augmentation):
        if name and mark not in prompt:
            prompt = ", ".join(filter(None, (prompt.rstrip(" ."), mark)))
        prompt = prompt.replace(mark, words[name]) if name else re.sub(rf"^{mark},?\s*|(,?\s+)?{mark}", "", prompt)
    return prompt


def plain(prompt: str) -> str:
    """Of an image as it is."""
    return caption_of(prompt, AS_IT_IS, {})


def captions_of(prompt: str, share: float, words: Mapping[str, str]) -> list[str]:
    """All that a prompt can become."""
    shown = CHOICES if share else (AS_IT_IS,)
    return list(dict.fromkeys(caption_of(prompt, augmentation, words) for augmentation in shown))


def offsets(size: Size, part: Size, augmentation: Augmentation) -> tuple[int, int]:
    """Where an image of `part` pixels begins on a ground of `size`, in pixels from its top and its left."""
    shift = PLACES[augmentation.place]
    top, left = (round((whole - own) / 2 + by * whole) for whole, own, by in zip(size, part, shift))
    return top, left


def place(image: NDArray[np.uint8], size: Size, augmentation: Augmentation) -> NDArray[np.uint8]:
    """An image (h, w, 3) on a ground (*size, 3).

    What lies outside of the ground is cut off; where the image does not reach, the pixels of its edges go on.
    """
    part = image.shape[0], image.shape[1]
    starts = offsets(size, part, augmentation)
    rows, columns = ((np.arange(whole) - start).clip(0, own - 1) for whole, own, start in zip(size, part, starts))
    placed: NDArray[np.uint8] = image[rows][:, columns]
    return placed


def covered(size: Size, part: Size, augmentation: Augmentation) -> tuple[float, ...]:
    """Top, left, bottom and right of what the image covers of the ground, as parts of its sides."""
    starts = offsets(size, part, augmentation)
    ends = [min(whole, start + own) / whole for whole, own, start in zip(size, part, starts)]
    return (*(max(0, start) / whole for whole, start in zip(size, starts)), *ends)
