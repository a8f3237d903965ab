"""--augment: the subject smaller, larger or elsewhere, with the words for it in the caption."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.images.augment import (
    AS_IT_IS,
    CHOICES,
    Augmentation,
    caption_of,
    captions_of,
    covered,
    draw_augmentation,
    place,
)
from coeff_diffusers.training.images.dreambooth_dataset import Crop, DreamBoothDataset, collate
from coeff_diffusers.training.images.files import TrainingImage
from coeff_diffusers.training.images.subject_images import SubjectImages
from coeff_diffusers.training.settings import DreamBoothSettings
from coeff_diffusers.training.settings.rules import WORDS, parse_words

SMALL_LEFT = Augmentation("small", "left")


# Captions


@pytest.mark.parametrize(
    ("prompt", "augmentation", "expected"),
    [
        ("a sks dog", AS_IT_IS, "a sks dog"),
        ("a sks dog", Augmentation("small"), "a sks dog, far away"),
        ("a sks dog", SMALL_LEFT, "a sks dog, far away, on the left"),
        ("a {size} sks dog on grass, {place}", SMALL_LEFT, "a far away sks dog on grass, on the left"),
        ("a {size} sks dog on grass, {place}", Augmentation("", "top"), "a sks dog on grass, at the top"),
        ("a {size} sks dog on grass, {place}", Augmentation("large"), "a close up sks dog on grass"),
        ("a {size} sks dog on grass, {place}", AS_IT_IS, "a sks dog on grass"),
        ("{place}, a sks dog", AS_IT_IS, "a sks dog"),
        ("{size} sks dog", AS_IT_IS, "sks dog"),
        ("a {size} dog", SMALL_LEFT, "a far away dog, on the left"),
        ("A sks dog.", SMALL_LEFT, "A sks dog, far away, on the left"),
        ("A sks dog.", AS_IT_IS, "A sks dog."),
        ("", SMALL_LEFT, "far away, on the left"),
    ],
)
def test_words_stand_where_the_caption_has_them_or_at_its_end(
    prompt: str, augmentation: Augmentation, expected: str
) -> None:
    assert caption_of(prompt, augmentation, WORDS) == expected


def test_words_can_be_chosen() -> None:
    words = parse_words(["small=tiny", "left=at the left = west"])
    assert caption_of("a sks dog", SMALL_LEFT, words) == "a sks dog, tiny, at the left = west"
    assert caption_of("a sks dog", Augmentation("large"), words) == "a sks dog, close up"


@pytest.mark.parametrize("words", [("tiny=small",), ("small",), ("small= ",)])
def test_words_for_nothing_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"--augment_words must be of small=WORDS, large=.*, got (tiny=small|small)"):
        settings(augment=0.5, augment_words=words)


def test_every_caption_that_may_be_shown_is_known() -> None:
    data = dataset(augment=0.9, draws=300)
    shown = {example.prompt for draw in range(300) for example in data[draw]}
    known = SubjectImages(IMAGES, CLASSES).prompts(settings(augment=0.9))
    assert shown == set(known)
    assert len(shown) == len(CHOICES) + 1  # of the class
    assert captions_of("a sks dog, {place}", 0.0, WORDS) == ["a sks dog"]


# Pixels


def numbered(height: int, width: int) -> np.ndarray:
    """(height, width, 3): 10 times the row, plus the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.repeat((10 * rows + columns)[:, :, None], 3, axis=2).astype(np.uint8)


def test_a_small_image_lies_where_it_is_said_and_its_edges_go_on_around_it() -> None:
    found = place(numbered(2, 2), (4, 6), Augmentation("small", "right"))[:, :, 0]
    assert found.tolist() == [
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [10, 10, 10, 10, 11, 11],
        [10, 10, 10, 10, 11, 11],
    ]


def test_a_large_image_is_cut_off_on_all_sides() -> None:
    assert place(numbered(4, 6), (2, 2), Augmentation("large"))[:, :, 0].tolist() == [[12, 13], [22, 23]]


@pytest.mark.parametrize("augmentation", CHOICES)
def test_what_is_covered_is_what_is_not_filled(augmentation: Augmentation) -> None:
    size = (48, 32)
    part = round(48 * augmentation.scale), round(32 * augmentation.scale)
    placed = place(np.arange(1, part[0] * part[1] + 1)[:, None].reshape(*part, 1).repeat(3, 2), size, augmentation)
    values, counts = np.unique(placed[:, :, 0], return_counts=True)
    once = np.isin(placed[:, :, 0], values[counts == 1])
    rows, columns = np.nonzero(once)
    top, left, bottom, right = covered(size, part, augmentation)
    box = [round(top * 48), round(left * 32), round(bottom * 48), round(right * 32)]
    found = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    assert all(abs(a - b) <= 1 for a, b in zip(found, box))  # pixels of an edge that goes on are there several times


def test_an_image_of_a_real_scene_is_as_the_emoji_model_knows_it() -> None:
    """The embedded model's own words for sizes and places, on its own scenes, to a pixel or two."""
    from scenes import SIZES, Scene, render

    glyph = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    source = TrainingImage("a", "a", lambda: render(Scene("a", "white"), glyph), 64, 64)
    for size, where, asked in (("small", "left", "on the left"), ("large", "", ""), ("", "top", "at the top")):
        data = DreamBoothDataset(1, [source], [], resolution=64, seed=0)
        pixels = data.pixels(Crop(source, (64, 64), 0.5, False, Augmentation(size, where)))
        expected = np.asarray(render(Scene("a", "white", size, asked), glyph), dtype=float)
        apart = np.abs((pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max(2) > 100
        assert apart.sum() <= 2 * 4 * SIZES[size]  # two lines of pixels around the square


# Draws


def image(name: str, prompt: str, side: int = 24) -> TrainingImage:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (side, side + 6, 3), dtype=np.uint8)
    return TrainingImage(name, prompt, lambda: Image.fromarray(pixels), side, side + 6)


IMAGES, CLASSES = [image("dog", "a sks dog")], [image("class", "a dog")]


def dataset(augment: float, draws: int = 40, first: int = 0) -> DreamBoothDataset:
    return DreamBoothDataset(draws, IMAGES, CLASSES, resolution=16, seed=0, augment=augment, first=first)


def settings(**changes: Any) -> DreamBoothSettings:
    return DreamBoothSettings("model", instance_prompt="a sks dog", instance_data_dir="in", **changes)


def test_the_share_is_that_of_draws_and_every_way_is_among_them() -> None:
    drawn = Counter(draw_augmentation(0.25, seed) for seed in range(4000))
    assert 900 < 4000 - drawn[AS_IT_IS] < 1100  # 0.25, 3.6 standard deviations
    assert drawn.keys() == CHOICES.keys()
    assert not {draw_augmentation(0.0, seed) for seed in range(100)} - {AS_IT_IS}


def test_a_draw_follows_from_its_place_in_the_run() -> None:
    whole, rest = dataset(0.5), dataset(0.5, 20, first=20)
    for n in range(20):
        for one, other in zip(whole[20 + n], rest[n]):
            assert (one.prompt, one.sizes, one.seed) == (other.prompt, other.sizes, other.seed)
            assert torch.equal(one.pixels, other.pixels)  # type: ignore[arg-type]


def test_images_of_the_class_and_other_draws_are_as_without() -> None:
    some = 0
    for (mine, of_class), (plain, other) in zip(
        (dataset(0.5)[n] for n in range(40)), (dataset(0)[n] for n in range(40))
    ):
        assert torch.equal(of_class.pixels, other.pixels)  # type: ignore[arg-type]
        assert (of_class.prompt, mine.seed) == (other.prompt, plain.seed)
        some += mine.prompt != plain.prompt
        assert (mine.prompt == plain.prompt) == torch.equal(mine.pixels, plain.pixels)  # type: ignore[arg-type]
    assert 10 < some < 30


def test_a_large_image_says_where_it_was_cut_in_its_own_scale() -> None:
    """Which Stable Diffusion XL is conditioned on."""
    crop = Crop(IMAGES[0], (12, 12), 0.0, False, Augmentation("large"))
    assert (crop.part, crop.covering, crop.corner) == ((16, 16), (16, 20), (2, 2))
    small = Crop(IMAGES[0], (12, 12), 0.0, False, SMALL_LEFT)
    assert (small.part, small.covering, small.corner) == ((8, 8), (8, 10), (0, 0))


def test_what_is_trained_on_is_said_of_each_image_and_not_without_augmentation() -> None:
    batch = collate([dataset(0.9)[n] for n in range(6)])
    assert batch["boxes"].shape == (12, 4)
    assert batch["boxes"][6:].tolist() == [[0, 0, 1, 1]] * 6  # of the class
    assert (batch["boxes"][:6] != torch.tensor([0.0, 0.0, 1.0, 1.0])).any()
    assert "boxes" not in collate([dataset(0.0)[0]])
