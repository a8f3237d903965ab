"""Aspect-ratio buckets: which image gets which, and that a run stays the same however it is divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from image_files import opened, saved
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.images.buckets import nearest_bucket
from coeff_diffusers.training.images.dreambooth_dataset import DreamBoothDataset, Example, collate
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings.dreambooth import DreamBoothSettings
from coeff_diffusers.training.settings.rules import Size, parse_buckets

WIDE, TALL, SQUARE = (4, 8), (8, 4), (6, 6)  # height and width
SIZES = [(16, 8), (18, 8), (15, 8), (10, 10), (8, 15)]  # width and height: three wide, a square, a tall one


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / f"{i}.png", size, (i * 40, 0, 0)) for i, size in enumerate(SIZES)]


def dataset(files: list[Path], class_files: list[Path] | None = None, **changes: Any) -> DreamBoothDataset:
    settings = {"resolution": 4, "seed": 0, "buckets": (WIDE, TALL, SQUARE), "step_draws": 4, **changes}
    return DreamBoothDataset(60, opened(files), opened(class_files or []), **settings)


def shown(data: DreamBoothDataset, draws: range) -> list[tuple[str, Size]]:
    cuts = [data.crop("instance", draw) for draw in draws]
    return [(Path(crop.image.name).name, crop.size) for crop in cuts]


# Which bucket


def test_buckets_are_heights_and_widths() -> None:
    assert parse_buckets(" 512, 768;768,512 ") == ((512, 768), (768, 512))
    assert parse_buckets(None) == ()


@pytest.mark.parametrize("text", ["", "512", "512x768", "512,768,3", "512,-8", "512,0", "512,768;", "4,4;4,4"])
def test_buckets_that_cannot_be_read_are_told(text: str) -> None:
    with pytest.raises(InputError, match=f"--aspect_ratio_buckets must .*, got '{text}'"):
        DreamBoothSettings("base", "a fox", instance_data_dir="in", aspect_ratio_buckets=text)


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [
        (400, 600, (512, 768)),
        (600, 400, (768, 512)),
        (512, 520, (512, 512)),
        (100, 900, (512, 768)),
        (120, 100, (512, 512)),  # 1.2 is nearer to 1 than to 1.5
        (130, 100, (768, 512)),
    ],
)
def test_an_image_gets_the_bucket_of_the_nearest_aspect_ratio(height: int, width: int, bucket: Size) -> None:
    assert nearest_bucket(height, width, [(512, 512), (512, 768), (768, 512)]) == bucket


def test_small_buckets_are_not_favoured() -> None:
    assert nearest_bucket(1200, 1000, [(1024, 1024), (512, 320)]) == (1024, 1024)


def test_of_buckets_of_one_aspect_ratio_the_nearest_area_is_taken() -> None:
    buckets = [(256, 384), (1024, 1536), (512, 768)]
    assert [nearest_bucket(side, side * 3 // 2, buckets)[0] for side in (10, 500, 900)] == [256, 512, 1024]


def test_the_image_as_it_is_seen_decides_not_as_it_is_stored(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8))
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=image.getexif())
    data = dataset([tmp_path / "a.jpg"])
    assert data[0][0].sizes == (16, 8, 0, 0, *TALL)


# Order


def test_a_step_shows_one_bucket_and_each_as_often_as_it_has_images(files: list[Path]) -> None:
    data = dataset(files)
    steps = [{size for _, size in shown(data, range(4 * step, 4 * step + 4))} for step in range(10)]
    assert all(len(sizes) == 1 for sizes in steps)
    for cycle in (steps[:5], steps[5:]):
        assert Counter(chain(*cycle)) == {WIDE: 3, SQUARE: 1, TALL: 1}
    assert steps[:5] != steps[5:]


def test_every_image_of_a_bucket_is_shown_once_before_another_of_it_is_shown_again(files: list[Path]) -> None:
    names = [name for name, size in shown(dataset(files), range(40)) if size == WIDE]
    passes = [names[start : start + 3] for start in range(0, len(names) - 2, 3)]
    assert len(passes) == 8
    assert all(set(names) == {"0.png", "1.png", "2.png"} for names in passes)
    assert len({tuple(names) for names in passes}) > 1


def test_all_images_are_shown_equally_often(files: list[Path]) -> None:
    # a step of 4 draws, 5 images: 5 steps show each of them 4 times
    assert set(Counter(name for name, _ in shown(dataset(files), range(20))).values()) == {4}


def batches(data: DreamBoothDataset, size: int, processes: int) -> Iterator[list[Example]]:
    """As accelerate hands them to the processes, one after the other."""
    sampler = BatchSampler(SequentialSampler(data), size, drop_last=False)
    shards = [BatchSamplerShard(sampler, processes, rank) for rank in range(processes)]
    for together in zip(*shards):
        for draws in together:
            yield [data[draw][0] for draw in draws]


@pytest.mark.parametrize(("size", "processes"), [(4, 1), (2, 2), (1, 4), (2, 1), (1, 2)])
def test_however_a_step_is_divided_its_images_and_their_noise_are_the_same(
    files: list[Path], size: int, processes: int
) -> None:
    data = dataset(files)
    divided = list(batches(data, size, processes))
    assert all(len({example.pixels.shape for example in batch}) == 1 for batch in divided)
    found = [(example.name, example.seed, example.sizes) for batch in divided for example in batch]
    assert found == [(example.name, example.seed, example.sizes) for (example,) in (data[n] for n in range(60))]


def test_a_run_that_is_continued_draws_what_would_have_come(files: list[Path]) -> None:
    whole, rest = dataset(files, random_flip=True), dataset(files, random_flip=True, first=12)
    for n in range(20):
        expected, got = whole[12 + n][0], rest[n][0]
        assert (got.name, got.seed, got.sizes) == (expected.name, expected.seed, expected.sizes)
        torch.testing.assert_close(got.pixels, expected.pixels, rtol=0, atol=0)


def test_one_square_bucket_is_the_resolution_cut_in_the_middle(files: list[Path]) -> None:
    one = dataset(files, buckets=[(4, 4)])
    none = dataset(files, buckets=(), center_crop=True, step_draws=1)
    assert [one.crop("instance", draw).image.name for draw in range(60)] == [
        none.crop("instance", draw).image.name for draw in range(60)
    ]
    torch.testing.assert_close(one[7][0].pixels, none[7][0].pixels, rtol=0, atol=0)


# What is shown


def test_images_fill_their_bucket_unstretched_and_are_cut_at_the_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 8))
    image.putdata([(x * 10, 0, 0) for _ in range(8) for x in range(24)])
    image.save(tmp_path / "a.png")
    example = dataset([tmp_path / "a.png"], buckets=[(8, 16)], resolution=8)[0][0]
    assert example.pixels.shape == (3, 8, 16)
    assert example.sizes == (8, 24, 0, 4, 8, 16)
    shown = ((example.pixels[0, 0] + 1) * 127.5).round().int().tolist()
    assert shown == [x * 10 for x in range(4, 20)]


def test_class_images_are_cut_to_the_bucket_of_the_subjects_images_beside_them(files: list[Path]) -> None:
    saved(files[0].with_name("class.png"), (9, 9))
    data = dataset(files, [files[0].with_name("class.png")])
    for step in range(5):
        batch = collate([data[draw] for draw in range(4 * step, 4 * step + 4)])
        sizes = {tuple(size) for size in batch["sizes"][:, 4:].tolist()}
        assert {batch["pixels"].shape[2:]} == sizes
        assert [Path(name).name for name in batch["names"][4:]] == ["class.png"] * 4


# Runs


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the latents that each batch of training had."""
    found, original = [], StableDiffusion.errors

    def errors(family: StableDiffusion, denoiser: Any, latents: torch.Tensor, *args: Any) -> torch.Tensor:
        found.append(tuple(latents.shape))
        return original(family, denoiser, latents, *args)

    monkeypatch.setattr(StableDiffusion, "errors", errors)
    return found


def coefficients(result: TrainingResult) -> dict[str, torch.Tensor]:
    assert result.coeff_file is not None
    return load_file(result.coeff_file)


def test_a_step_divided_by_accumulation_gives_the_same_coefficients(
    train: Callable[..., TrainingResult], files: list[Path], shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    flags = {"instance_data_dir": files[0].parent, "aspect_ratio_buckets": "8,16;16,8;12,12", "random_flip": True}
    flags |= {"max_train_steps": 5, "output_dir": tmp_path / "out"}
    expected = coefficients(train(**flags, train_batch_size=2))
    assert Counter(shapes) == {(2, 4, 4, 8): 3, (2, 4, 8, 4): 1, (2, 4, 6, 6): 1}
    divided = train(**flags, train_batch_size=1, gradient_accumulation_steps=2)
    # another order of summation
    torch.testing.assert_close(coefficients(divided), expected, rtol=1e-4, atol=1e-5)


def test_class_and_validation_images_have_the_resolution(
    train: Callable[..., TrainingResult],
    files: list[Path],
    tmp_path: Path,
    shapes: list[tuple[int, ...]],
) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    result = train(
        **prior,
        instance_data_dir=files[0].parent,
        aspect_ratio_buckets="8,16;16,8",
        num_class_images=2,
        validation_prompt=["a fox"],
        num_validation_images=1,
        validation_num_inference_steps=1,
        max_train_steps=2,
    )
    images = [*(tmp_path / "class").iterdir(), result.images[1]]
    assert [Image.open(path).size for path in images] == [(16, 16)] * 3
    assert all(shape in ((4, 4, 4, 8), (4, 4, 8, 4)) for shape in shapes)


def test_a_bucket_that_the_model_cannot_have_is_told(train: Callable[..., TrainingResult]) -> None:
    with pytest.raises(InputError, match="--aspect_ratio_buckets must be a multiple of 2 on this model, got 17"):
        train(aspect_ratio_buckets="16,16;16,17")


def test_how_many_images_each_bucket_has_is_printed(
    train: Callable[..., TrainingResult], files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train(instance_data_dir=files[0].parent, aspect_ratio_buckets="8,16;16,8;32,2", max_train_steps=1, repeats=2)
    assert "Images by bucket (width x height): 16 x 8: 4, 8 x 16: 1, 2 x 32: 0." in capsys.readouterr().out
