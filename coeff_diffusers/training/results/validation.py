"""Images from the model as it stands, which leave training exactly as it was.

The pipeline runs the live denoiser where it is and in the precision it trains in: it is neither moved nor cast. The
VAE, which may wait in the CPU's memory meanwhile, comes and goes, and decodes in the precision that the pipeline gives
it: that of SDXL overflows in float16, to which autocast would cast it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..families import Family
from ..images.latents import vae_on
from ..settings.dreambooth import ValidationSettings

Call = Callable[[], list[Image.Image]]


def run_calls(family: Family, rows: list[list[Call]], accelerator: Accelerator) -> list[list[Image.Image]]:
    """The images of [`validation_calls`], a row per prompt; image i has the same first noise in every row."""
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
            return [[image for call in row for image in call()] for row in rows]
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


def final_prompts(settings: ValidationSettings) -> tuple[str, ...]:
    """Of the images after training."""
    return () if settings.skip_final_inference else settings.final_validation_prompt or settings.validation_prompt


def all_prompts(settings: ValidationSettings) -> tuple[str, ...]:
    """Of images during and after training, each once."""
    return tuple(dict.fromkeys(settings.validation_prompt + final_prompts(settings)))


def validation_calls(
    family: Family, prompts: Sequence[str], settings: ValidationSettings, seed: int, resolution: int
) -> list[list[Call]]:
    """The pipeline's calls of each row, a prompt, each for a batch of images.

    Args:
        family: whose pipeline is called.
        prompts: one per row.
        settings: how many images, and how they are sampled.
        seed: of the run; image i has seed + i.
        resolution: height and width in pixels.
    """
    seeds = [seed + i for i in range(settings.num_validation_images)]
    size = settings.sample_batch_size
    batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]

    def call(prompt: str, batch: list[int]) -> list[Image.Image]:
        images: list[Image.Image] = family.pipeline(
            height=resolution,
            width=resolution,
            num_inference_steps=settings.validation_num_inference_steps,
            generator=[torch.Generator().manual_seed(number) for number in batch],
            **family.call_arguments([prompt] * len(batch), settings.validation_guidance_scale),
        ).images
        return images

    return [[partial(call, prompt, batch) for batch in batches] for prompt in prompts]
