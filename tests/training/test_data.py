"""Pictures: which files are taken, how they become tensors, and in which order they are shown."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data import (
    DreamBoothDataset,
    collate,
    crop,
    find_images,
    fit_shorter_side,
    read_captions,
    seed_of,
    upright_rgb,
)
from PIL import Image
from settings import InputError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(path: Path, size: tuple[int, int] = (6, 4), color: tuple[int, int, int] = RED) -> Path:
    Image.new("RGB", size, color).save(path)
    return path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(paths: list[Path], class_paths: list[Path] | None = None, **changes: object) -> DreamBoothDataset:
    settings = {"resolution": 4, "seed": 0, **changes}
    prompts = {path: f"a {path.stem}" for path in [*paths, *(class_paths or [])]}
    return DreamBoothDataset(20, paths, class_paths or [], prompts, **settings)


# Files


def test_pictures_are_taken_by_name_and_sidecars_hidden_files_and_folders_passed_over(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name) for name in ("b.png", "A.JPG", "c.webp")]
    for name in (".DS_Store", "b.txt", "metadata.jsonl", "notes.MD"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "folder").mkdir()
    assert find_images(tmp_path, "instance_data_dir") == sorted(paths)


def test_captions_are_the_column_of_each_picture(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png")]
    lines = [
        '{"file_name": "b.png", "text": " a sks fox on blue "}',
        "",
        '{"file_name": "a.png", "text": "a sks fox"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "gone.png", "text": "x"}']))
    expected = {images[0]: "a sks fox", images[1]: "a sks fox on blue"}
    assert read_captions(tmp_path, images, "text") == expected


def test_pictures_without_a_caption_and_broken_lines_are_named(tmp_path: Path) -> None:
    images = [saved(tmp_path / name) for name in ("a.png", "b.png")]
    with pytest.raises(InputError, match="--caption_column: there is no .*metadata.jsonl"):
        read_captions(tmp_path, images, "text")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "x"}\n[]\n{"file_name": "b.png",')
    with pytest.raises(InputError) as error:
        read_captions(tmp_path, images, "text")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines[:3]] == [
        f"line {number} has no file_name and text" for number in (1, 2, 3)
    ]
    assert [line.strip() for line in lines[3:]] == ["a.png has no caption", "b.png has no caption"]


def test_a_picture_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", color=RED)
    before = dataset([path])[0][0].pixels
    saved(path, color=BLUE)
    os.utime(path, ns=(1, 1))
    after = dataset([path])[0][0].pixels
    assert (before[0, 0, 0], after[0, 0, 0]) == (1.0, -1.0)


def test_every_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.png", (64, 64))
    (tmp_path / "text.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "torn.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:-500])
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match="--instance_data_dir: these files cannot be read as pictures") as error:
        find_images(tmp_path, "instance_data_dir")
    named = [Path(line.strip().partition(": ")[0]).name for line in str(error.value).splitlines()[1:]]
    assert named == ["empty.jpg", "text.png", "torn.jpg"]
    assert str(whole) not in str(error.value)


def test_a_missing_an_empty_and_a_false_folder_are_told_apart(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a caption alone")
    for folder, problem in (
        ("none", "does not exist"),
        ("a.png", "is no folder"),
        ("empty", "there are no pictures in"),
    ):
        with pytest.raises(InputError, match=f"--class_data_dir: .*{problem}"):
            find_images(tmp_path / folder, "class_data_dir")
    assert find_images(tmp_path / "empty", "class_data_dir", empty_allowed=True) == []
    assert file.exists()


# Pictures


def test_a_picture_is_turned_as_its_exif_entry_says() -> None:
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


@pytest.mark.parametrize(
    ("size", "fitted"), [((600, 400), (6, 4)), ((401, 400), (4, 4)), ((3, 9), (4, 12)), ((4, 4), (4, 4))]
)
def test_the_shorter_side_gets_the_resolution(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_shorter_side(Image.new("RGB", size), 4).size == fitted


def columns(width: int) -> Image.Image:
    """4 rows; column x has the value 10 x."""
    return Image.fromarray(np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None] * 10, (4, width, 3)).copy())


def values(pixels: torch.Tensor) -> list[int]:
    return ((pixels[0, 0] + 1) * 127.5).round().int().tolist()


def test_tensors_span_minus_one_to_one() -> None:
    image = Image.new("RGB", (4, 4), RED)
    pixels, _ = crop(image, 4, False, False, generator())
    assert pixels.shape == (3, 4, 4)
    assert [pixels[c].unique().tolist() for c in range(3)] == [[1.0], [-1.0], [-1.0]]


def test_centre_crops_are_in_the_middle_and_random_ones_everywhere() -> None:
    image = columns(8)
    assert values(crop(image, 4, True, False, generator())[0]) == [20, 30, 40, 50]
    firsts = {values(crop(image, 4, False, False, generator(seed))[0])[0] for seed in range(50)}
    assert firsts == {0, 10, 20, 30, 40}


def test_half_of_the_pictures_are_mirrored_if_asked_for() -> None:
    image = columns(4)
    plain = [values(crop(image, 4, False, False, generator(seed))[0]) for seed in range(100)]
    flipped = [values(crop(image, 4, False, True, generator(seed))[0]) for seed in range(100)]
    assert all(row == [0, 10, 20, 30] for row in plain)
    assert 35 < sum(row == [30, 20, 10, 0] for row in flipped) < 65  # of 100; 3 standard deviations


# Draws


def test_every_picture_is_shown_once_before_any_is_shown_again(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    data = dataset(paths)
    passes = [[data.path("instance", draw) for draw in range(5 * epoch, 5 * epoch + 5)] for epoch in range(4)]
    assert all(Counter(shown) == Counter(paths) for shown in passes)
    assert len({tuple(shown) for shown in passes}) > 1


def test_a_draw_follows_from_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.png", (8, 4), (i, i, i)) for i in range(3)]
    data, again, other = (dataset(paths, random_flip=True, seed=seed) for seed in (0, 0, 1))
    forwards = [data[draw][0] for draw in range(6)]
    backwards = [again[draw][0] for draw in reversed(range(6))][::-1]
    for example, same in zip(forwards, backwards):
        assert (example.seed, example.path, example.sizes) == (same.seed, same.path, same.sizes)
        torch.testing.assert_close(example.pixels, same.pixels, rtol=0, atol=0)
    assert not {example.seed for example in forwards} & {other[draw][0].seed for draw in range(20)}


def test_a_run_that_is_continued_draws_what_would_have_come(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{i}.png", (8, 4), (i, i, i)) for i in range(3)]
    whole, rest = dataset(paths), dataset(paths, first=4)
    for n in range(3):
        expected, got = whole[4 + n][0], rest[n][0]
        assert (got.path, got.seed, got.sizes) == (expected.path, expected.seed, expected.sizes)
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


def test_a_batch_holds_the_subjects_pictures_first_then_those_of_the_class(tmp_path: Path) -> None:
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
