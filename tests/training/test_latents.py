"""Latents encoded once: the same run with and without, each latent its image's, and the VAE let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import opened
from PIL import Image
from safetensors.torch import load_file
from tiny_sd import tiny_pipeline

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.images.dreambooth_dataset import DreamBoothDataset, Example, upright_rgb
from coeff_diffusers.training.images.files import TrainingImage
from coeff_diffusers.training.images.latents import encode_crops, moments_of, release_vae, vae_on
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings import parse_settings

WORDS = ["small=s", "large=l", "left=w", "right=e", "top=n", "bottom=b"]  # for the tokenizer takes 16 tokens
Train = Callable[..., TrainingResult]
SIZES = [(24, 16), (26, 17), (16, 16), (15, 28)]  # width and height


def noise(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """An image of noise for each size (width and height)."""
    folder.mkdir()
    paths = [folder / f"{folder.name}-{i}.png" for i in range(len(sizes))]
    for i, (path, (width, height)) in enumerate(zip(paths, sizes)):
        pixels = np.random.default_rng([len(folder.name), i]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def family(argv: Callable[..., list[str]]) -> StableDiffusion:
    return StableDiffusion(tiny_pipeline(), parse_settings(argv()))


def coefficients(result: TrainingResult) -> dict[str, torch.Tensor]:
    assert result.coeff_file is not None
    return load_file(result.coeff_file)


@pytest.mark.parametrize(
    "changes",
    [
        {"center_crop": True},
        {
            "center_crop": True,
            "random_flip": True,
            "gradient_accumulation_steps": 2,
            "augment": 0.5,
            "augment_words": WORDS,
        },
        {"aspect_ratio_buckets": "16,16;16,24;24,16", "random_flip": True, "repeats": 2},
    ],
    ids=["centre crop", "flips, augmented and accumulated", "buckets"],
)
def test_a_run_is_bit_for_bit_the_same_with_cached_latents(
    train: Train, tmp_path: Path, changes: dict[str, Any]
) -> None:
    noise(tmp_path / "subject", SIZES)
    noise(tmp_path / "class", [(20, 16), (16, 18)])
    flags = {"instance_data_dir": tmp_path / "subject", "max_train_steps": 4, **changes}
    flags |= {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    without = train(**flags, num_class_images=2)
    with_cache = train(**flags, num_class_images=2, cache_latents=True, output_dir=tmp_path / "cached")
    assert with_cache.losses == without.losses
    torch.testing.assert_close(coefficients(with_cache), coefficients(without), rtol=0, atol=0)


def dataset(subject: list[TrainingImage], classes: list[TrainingImage], **changes: Any) -> DreamBoothDataset:
    settings = {"resolution": 16, "seed": 0, "random_flip": True, "step_draws": 4, **changes}
    return DreamBoothDataset(48, subject, classes, **settings)


def expected_moments(family: StableDiffusion, example: Example, files: dict[str, Path]) -> torch.Tensor:
    """From the example's name and sizes alone, by another way than the data set's."""
    with Image.open(files[example.name]) as image:
        upright = upright_rgb(image, "white")
    assert upright.size == (example.sizes[1], example.sizes[0])
    top, left, height, width = example.sizes[2:]
    scale = max(height / upright.height, width / upright.width)
    scaled = upright.resize((round(upright.width * scale), round(upright.height * scale)), Image.Resampling.LANCZOS)
    boxes = [
        np.asarray(image.crop((left, top, left + width, top + height))).copy()
        for image in (scaled, scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    ]
    return torch.stack([family.encode_images(tensor(box))[0] for box in boxes])


def tensor(box: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(box).permute(2, 0, 1)[None].float() / 127.5 - 1.0


@pytest.mark.parametrize("buckets", [(), ((16, 24), (16, 16), (24, 16))], ids=["square", "buckets"])
def test_each_cached_latent_is_of_its_image_with_its_prompt(
    family: StableDiffusion, tmp_path: Path, buckets: tuple[tuple[int, int], ...]
) -> None:
    paths = noise(tmp_path / "subject", SIZES), noise(tmp_path / "class", [(20, 16), (16, 18), (16, 16)])
    files = {str(path): path for group in paths for path in group}
    data = dataset(opened(paths[0]) * 2, opened(paths[1]), buckets=buckets, center_crop=True)
    data.moments = encode_crops(family, data, silent=True)
    mirrored = set()
    for draw in range(48):
        for kind, example in zip(("subject", "class"), data[draw]):
            assert example.pixels is None
            plain, flipped = expected_moments(family, example, files)
            assert torch.equal(example.moments, plain) != torch.equal(example.moments, flipped)
            mirrored.add(torch.equal(example.moments, flipped))
            assert example.prompt == f"a {files[example.name].stem}"
            assert files[example.name].parent.name == kind
    assert mirrored == {True, False}


def test_only_what_will_be_shown_is_encoded_and_each_once(
    family: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, original = [], family.encode_images
    monkeypatch.setattr(family, "encode_images", lambda pixels: encoded.append(len(pixels)) or original(pixels))
    subject, classes = opened(noise(tmp_path / "subject", SIZES)), opened(noise(tmp_path / "class", [(16, 16)] * 30))
    encode_crops(family, dataset(subject * 3, classes, random_flip=False, center_crop=True), silent=True)
    assert encoded == [1] * (4 + 30)
    rest = DreamBoothDataset(2, subject, classes, resolution=16, seed=0, center_crop=True, first=5)
    assert set(encode_crops(family, rest, silent=True)) == {
        rest.crop(k, n) for k in ("instance", "class") for n in (5, 6)
    }


def test_square_images_are_cached_whole_without_a_centre_crop(family: StableDiffusion, tmp_path: Path) -> None:
    data = dataset(opened(noise(tmp_path / "subject", [(16, 16), (20, 20)])), [])
    assert len(encode_crops(family, data, silent=True)) == 4  # mirrored, too


def test_cached_latents_are_float32_in_the_cpus_memory_and_nothing_is_read_again(
    family: StableDiffusion, tmp_path: Path
) -> None:
    paths = noise(tmp_path / "subject", SIZES)
    family.pipeline.vae.to(torch.bfloat16)
    data = dataset(opened(paths), [], center_crop=True)
    data.moments = encode_crops(family, data, silent=True)
    for path in paths:
        path.unlink()
    for draw in range(48):
        (example,) = data[draw]
        assert (example.moments.dtype, example.moments.device.type) == (torch.float32, "cpu")
        assert example.moments.shape == (2, 4, 8, 8)


def test_what_is_encoded_does_not_depend_on_the_batch(family: StableDiffusion) -> None:
    pixels = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    alone = torch.cat([moments_of(family, {"pixels": pixels[i : i + 1]}) for i in range(5)])
    torch.testing.assert_close(moments_of(family, {"pixels": pixels}), alone, rtol=0, atol=0)


# What cannot be cached


def test_images_that_are_cropped_at_random_are_refused_by_name(train: Train, tmp_path: Path) -> None:
    noise(tmp_path / "subject", SIZES)
    with pytest.raises(InputError, match="--cache_latents: .*--center_crop or --aspect_ratio_buckets") as error:
        train(instance_data_dir=tmp_path / "subject", cache_latents=True, repeats=2)
    named = [line.strip().rpartition("/")[2] for line in str(error.value).splitlines()[1:]]
    assert named == ["subject-0.png is 24 x 16", "subject-1.png is 26 x 17", "subject-3.png is 15 x 28"]


def test_class_images_that_are_cropped_at_random_are_refused_by_name(train: Train, tmp_path: Path) -> None:
    noise(tmp_path / "subject", [(16, 16)])
    noise(tmp_path / "class", [(16, 16), (20, 16)])
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a fox"}
    with pytest.raises(InputError, match=r"--cache_latents: (.|\n)*class-1.png is 20 x 16"):
        train(instance_data_dir=tmp_path / "subject", cache_latents=True, **prior)


# The VAE


def test_a_released_vae_is_freed_but_for_what_is_needed(family: StableDiffusion) -> None:
    vae = family.pipeline.vae
    encoder, decoder = weakref.ref(vae.encoder), weakref.ref(vae.decoder)
    release_vae(family, keep_decoder=True)
    gc.collect()
    assert (encoder() is None, decoder() is None) == (True, False)
    with pytest.raises(RuntimeError, match="this part of the VAE was released"):
        family.encode_images(torch.zeros(1, 3, 16, 16))
    release_vae(family, keep_decoder=False)
    gc.collect()
    assert decoder() is None


def test_images_made_after_the_release_are_the_same(family: StableDiffusion) -> None:
    settings = {"num_inference_steps": 1, "output_type": "np", "latents": torch.randn(1, 4, 8, 8)}
    before = family.pipeline("a fox", **settings).images
    release_vae(family, keep_decoder=True)
    np.testing.assert_array_equal(family.pipeline("a fox", **settings).images, before)


def test_the_vae_comes_to_the_device_and_goes_back(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    monkeypatch.setattr(family.pipeline.vae, "to", lambda device: moves.append(str(device)))
    with suppress(KeyError), vae_on(family, torch.device("meta")):
        moves.append("inside")
        raise KeyError
    assert moves == ["meta", "inside", "cpu"]


@pytest.mark.parametrize("prompts", [["a fox"], None], ids=["with validation", "without"])
def test_training_with_cached_latents_holds_the_decoder_for_validation_alone(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str] | None
) -> None:
    noise(tmp_path / "subject", [(16, 16)])
    held, original = [], StableDiffusion.errors

    def errors(family: StableDiffusion, *args: Any) -> Any:
        vae = family.pipeline.vae
        held.append([part for part in ("encoder", "decoder") if any(True for _ in getattr(vae, part).parameters())])
        return original(family, *args)

    monkeypatch.setattr(StableDiffusion, "errors", errors)
    result = train(
        instance_data_dir=tmp_path / "subject",
        cache_latents=True,
        **({"final_validation_prompt": prompts, "num_validation_images": 1} if prompts else {}),
    )
    assert held == [["decoder"] if prompts else []] * 3
    assert len(result.images) == (2 if prompts else 0)
