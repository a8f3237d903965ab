"""How images become tensors, and in which order they are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import BLUE, RED, opened, saved
from PIL import Image

from coeff_diffusers.training.images.dreambooth_dataset import (
    Crop,
    DreamBoothDataset,
    collate,
    cover,
    crop_image,
    seed_of,
    upright_rgb,
)
from coeff_diffusers.training.images.files import TrainingImage
from coeff_diffusers.training.run.dreambooth import TrainingResult


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(paths: list[Path], class_paths: list[Path] | None = None, **changes: object) -> DreamBoothDataset:
    settings = {"resolution": 4, "seed": 0, **changes}
    return DreamBoothDataset(20, opened(paths), opened(class_paths or []), **settings)


# Images


def test_another_run_in_the_process_reads_a_changed_image_anew(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", color=RED)
    before = dataset([path])[0][0].pixels
    saved(path, color=BLUE)
    after = dataset([path])[0][0].pixels
    assert (before[0, 0, 0], after[0, 0, 0]) == (1.0, -1.0)


def test_an_image_is_turned_as_its_exif_entry_says() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise: what is left goes to the top
    upright = upright_rgb(image, "white")
    assert upright.size == (1, 2)
    assert [upright.getpixel((0, y)) for y in range(2)] == [RED, BLUE]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_the_stated_colour(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", (2, 1))
        palette.putpalette([9, 9, 9, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        palette.info["transparency"] = 0
        image = palette
    shown = upright_rgb(image.convert(mode), "#0000ff")
    assert [shown.getpixel((x, 0)) for x in range(2)] == [BLUE, (0, 0, 0)]


def test_half_transparent_pixels_are_mixed() -> None:
    assert upright_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "white").getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert [upright_rgb(image, "white").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_a_grey_that_is_transparent_in_sixteen_bits_shows_the_stated_colour(tmp_path: Path) -> None:
    values = np.array([[32896, 32897, 65535]], dtype=np.uint16)
    try:
        Image.fromarray(values).save(tmp_path / "a.png", transparency=32896)
    except OSError:
        pytest.skip("this Pillow reads such an image, but cannot write one")
    with Image.open(tmp_path / "a.png") as image:
        shown = upright_rgb(image, "#0000ff")
    assert [shown.getpixel((x, 0)) for x in range(3)] == [BLUE, (128, 128, 128), (255, 255, 255)]


@pytest.mark.parametrize(
    ("size", "crop", "fitted"),
    [
        ((600, 400), (4, 4), (6, 4)),
        ((401, 400), (4, 4), (4, 4)),
        ((3, 9), (4, 4), (4, 12)),
        ((4, 4), (4, 4), (4, 4)),
        ((600, 400), (4, 8), (8, 5)),  # height and width of the crop
        ((600, 400), (8, 4), (12, 8)),
    ],
)
def test_an_image_covers_what_is_cut_out_of_it(
    size: tuple[int, int], crop: tuple[int, int], fitted: tuple[int, int]
) -> None:
    assert cover(size[1], size[0], crop) == (fitted[1], fitted[0])


def columns(width: int) -> Image.Image:
    """4 rows; column x has the value 10 x."""
    return Image.fromarray(np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None] * 10, (4, width, 3)).copy())


def values(pixels: torch.Tensor) -> list[int]:
    return ((pixels[0, 0] + 1) * 127.5).round().int().tolist()


def crop_of(image: Image.Image, seed: int = 0, center_crop: bool = False, random_flip: bool = False) -> Crop:
    source = TrainingImage("a", "a fox", lambda: image, image.height, image.width)
    return Crop.draw(source, (4, 4), center_crop, random_flip, generator(seed))


def drawn(image: Image.Image, *options: Any) -> list[int]:
    """The first row of a crop."""
    return values(crop_image(image, crop_of(image, *options)))


def test_tensors_span_minus_one_to_one() -> None:
    image = Image.new("RGB", (4, 4), RED)
    pixels = crop_image(image, crop_of(image))
    assert pixels.shape == (3, 4, 4)
    assert [pixels[c].unique().tolist() for c in range(3)] == [[1.0], [-1.0], [-1.0]]


def test_centre_crops_are_in_the_middle_and_random_ones_everywhere() -> None:
    image = columns(8)
    assert drawn(image, 0, True) == [20, 30, 40, 50]
    assert {drawn(image, seed)[0] for seed in range(50)} == {0, 10, 20, 30, 40}


def test_half_of_the_images_are_mirrored_if_asked_for() -> None:
    image = columns(4)
    plain = [drawn(image, seed) for seed in range(100)]
    flipped = [drawn(image, seed, False, True) for seed in range(100)]
    assert all(row == [0, 10, 20, 30] for row in plain)
    assert 35 < sum(row == [30, 20, 10, 0] for row in flipped) < 65  # of 100; 3 standard deviations


def test_a_mirrored_cut_says_what_is_missing_on_its_own_left() -> None:
    crop = Crop(crop_of(columns(8)).image, (4, 4), 0.0, mirrored=True)
    assert (values(crop_image(columns(8), crop)), crop.corner) == ([30, 20, 10, 0], (0, 4))


# Draws


def test_every_image_is_shown_once_before_any_is_shown_again(tmp_path: Path) -> None:
    images = opened([saved(tmp_path / f"{i}.png") for i in range(5)])
    data = DreamBoothDataset(20, images, [], resolution=4, seed=0)
    passes = [[data.crop("instance", draw).image for draw in range(5 * epoch, 5 * epoch + 5)] for epoch in range(4)]
    assert all(Counter(shown) == Counter(images) for shown in passes)
    assert len({tuple(shown) for shown in passes}) > 1


def test_a_draw_follows_from_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.png", (8, 4), (i, i, i)) for i in range(3)]
    data, again, other = (dataset(paths, random_flip=True, seed=seed) for seed in (0, 0, 1))
    forwards = [data[draw][0] for draw in range(6)]
    backwards = [again[draw][0] for draw in reversed(range(6))][::-1]
    for example, same in zip(forwards, backwards):
        assert (example.seed, example.name, example.sizes) == (same.seed, same.name, same.sizes)
        torch.testing.assert_close(example.pixels, same.pixels, rtol=0, atol=0)
    assert not {example.seed for example in forwards} & {other[draw][0].seed for draw in range(20)}


def test_a_run_that_is_continued_draws_what_would_have_come(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.png", (8, 4), (i, i, i)) for i in range(3)]
    whole, rest = dataset(paths), dataset(paths, first=4)
    for n in range(3):
        expected, got = whole[4 + n][0], rest[n][0]
        assert (got.name, got.seed, got.sizes) == (expected.name, expected.seed, expected.sizes)
        torch.testing.assert_close(got.pixels, expected.pixels, rtol=0, atol=0)


def test_an_example_says_how_it_was_cut_out_of_the_file(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 10))
    image.putdata([(x, x, x) for _ in range(10) for x in range(40)])
    image.save(tmp_path / "a.png")
    example = dataset([tmp_path / "a.png"], resolution=10)[0][0]
    height, width, top, left, *target = example.sizes
    assert (height, width, top, target) == (10, 40, 0, [10, 10])
    assert left == values(example.pixels)[0] > 0


def test_subject_and_class_differ_in_all_that_is_random(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png")
    draws = [dataset([path], [path])[n] for n in range(4)]
    assert len({example.seed for draw in draws for example in draw}) == 8


def test_a_batch_holds_the_subjects_images_first_then_those_of_the_class(tmp_path: Path) -> None:
    data = dataset([saved(tmp_path / "a.png", color=RED)], [saved(tmp_path / "b.png", color=BLUE)])
    batch = collate([data[0], data[1], data[2]])
    assert batch["pixels"].shape == (6, 3, 4, 4)
    assert batch["pixels"][:, 0, 0, 0].tolist() == [1.0] * 3 + [-1.0] * 3
    assert batch["prompts"] == ["a a"] * 3 + ["a b"] * 3
    assert batch["kinds"] == ["instance"] * 3 + ["class"] * 3
    assert batch["seeds"].tolist() == [data[n][kind].seed for kind in (0, 1) for n in range(3)]


def test_seeds_fit_a_generator_and_do_not_repeat() -> None:
    seeds = [seed_of(run, draw) for run in range(20) for draw in range(50)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)


# Runs


def test_a_run_on_turned_and_transparent_files_is_the_run_on_images_as_they_are_seen(
    train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    stored, shown = tmp_path / "stored", tmp_path / "shown"
    stored.mkdir()
    shown.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))
    noise.save(shown / "a.png")
    turned = noise.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back
    turned.save(stored / "a.png", exif=turned.getexif())
    transparent = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    transparent.paste(noise.crop((0, 0, 8, 16)).convert("RGBA"), (0, 0))
    transparent.save(stored / "b.png")
    ground = Image.new("RGB", (16, 16), BLUE)
    ground.paste(transparent, mask=transparent.getchannel("A"))
    ground.save(shown / "b.png")
    results = [
        train(instance_data_dir=folder, background_color="blue", output_dir=tmp_path / f"out-{folder.name}")
        for folder in (stored, shown)
    ]
    assert results[0].losses == results[1].losses
