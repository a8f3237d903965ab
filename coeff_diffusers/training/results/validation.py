"""Images from the model as it stands, which leave training exactly as it was.

The pipeline runs the live denoiser where it is and in the precision it trains in: it is neither moved nor cast. The
VAE, which may wait in the CPU's memory meanwhile, comes and goes, and decodes in the precision that the pipeline gives
it: that of SDXL overflows in float16, to which autocast would cast it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..families import Family
from ..images.latents import vae_on
from ..settings.dreambooth import DreamBoothSettings


def validation_images(
    family: Family, settings: DreamBoothSettings, accelerator: Accelerator
) -> list[list[Image.Image]]:
    """A row of images a prompt. Image i has the same first noise in every row and at every step of training."""
    device = accelerator.device
    modes = [(model, model.training) for model in (family.denoiser, *family.trained_text_encoders)]
    for model, _ in modes:
        model.eval()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            accelerator.autocast(),
            vae_on(family, device),
            decoding_without_autocast(family.pipeline.vae),
        ):
            return [[image for call in row for image in call()] for row in validation_calls(family, settings)]
    finally:
        for model, was_training in modes:
            model.train(was_training)


@contextmanager
def decoding_without_autocast(vae: Any) -> Iterator[None]:
    decode = vae.decode

    def as_it_is(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = as_it_is
    try:
        yield
    finally:
        del vae.decode


def of_final_images(settings: DreamBoothSettings) -> DreamBoothSettings:
    """The settings with the prompts of the images after training."""
    final = () if settings.skip_final_inference else settings.final_validation_prompt or settings.validation_prompt
    return replace(settings, validation_prompt=final, final_validation_prompt=(), skip_final_inference=False)


def all_validation_prompts(settings: DreamBoothSettings) -> tuple[str, ...]:
    """Of images during and after training, each once."""
    return tuple(dict.fromkeys(settings.validation_prompt + of_final_images(settings).validation_prompt))


def validation_calls(family: Family, settings: DreamBoothSettings) -> list[list[Callable[[], list[Image.Image]]]]:
    """The pipeline's calls of each row, each for a batch of images."""
    seeds = [int(settings.seed or 0) + i for i in range(settings.num_validation_images)]
    size = settings.sample_batch_size
    batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    return [
        [partial(_images, family, prompt, batch, settings) for batch in batches]
        for prompt in settings.validation_prompt
    ]


def _images(family: Family, prompt: str, seeds: list[int], settings: DreamBoothSettings) -> list[Image.Image]:
    images: list[Image.Image] = family.pipeline(
        height=settings.resolution,
        width=settings.resolution,
        num_inference_steps=settings.validation_num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **family.call_arguments([prompt] * len(seeds), settings.validation_guidance_scale),
    ).images
    return images
