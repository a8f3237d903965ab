"""Aspect-ratio buckets: images keep about the shape that they have, and a step shows images of one shape."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from ..settings.rules import Size

T = TypeVar("T")


def nearest_bucket(height: int, width: int, buckets: Sequence[Size]) -> Size:
    """The bucket of the nearest aspect ratio, and of these the one of the nearest area.

    Distances are those of logarithms, so that twice as wide is as far as half as wide, whatever a bucket's area. (The
    cross product that diffusers' `find_nearest_bucket` compares favours buckets of small area.)
    """

    def distance(bucket: Size) -> tuple[float, float]:
        tall, wide = math.log(bucket[0] / height), math.log(bucket[1] / width)
        return round(abs(tall - wide), 9), abs(tall + wide)  # rounded: equal ratios are to be equal

    return min(buckets, key=distance)


def bucket_of_step(buckets: Sequence[Size], step: int, seed: str) -> tuple[Size, int]:
    """The bucket that an optimizer step shows, and how many steps have shown it before.

    Of as many steps as there are images, each bucket has as many as it has images, in an order drawn anew each
    time. All images of a step are of one bucket, so that it can be divided into batches for processes and for
    gradient accumulation in any way.

    Args:
        buckets: of each of the subject's images.
        step: counted from 0.
        seed: of the order.
    """
    cycle, place = divmod(step, len(buckets))
    order = shuffled(tuple(buckets), f"{seed}/{cycle}")
    return order[place], cycle * buckets.count(order[place]) + order[:place].count(order[place])


@lru_cache(maxsize=8)  # neighbouring draws are of the same pass
def shuffled(items: tuple[T, ...], seed: int | str) -> list[T]:
    """In an order that follows from the seed."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def buckets_text(chosen: Sequence[Size], buckets: Sequence[Size]) -> str:
    """How many images have chosen each bucket, for people."""
    counts = [f"{width} x {height}: {chosen.count((height, width))}" for height, width in buckets]
    return f"Images by bucket (width x height): {', '.join(counts)}."
