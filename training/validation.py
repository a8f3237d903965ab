"""Pictures from the model as it stands, which leave training exactly as it was.

The pipeline runs the live denoiser where it is and in the precision it trains in: it is neither moved nor cast.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from families import Family
from PIL import Image
from settings import DreamBoothSettings


def validation_images(
    family: Family, settings: DreamBoothSettings, accelerator: Accelerator
) -> list[list[Image.Image]]:
    """A row of pictures a prompt. Picture i has the same first noise in every row and at every step of training."""
    denoiser, device = family.denoiser, accelerator.device
    was_training = denoiser.training
    seeds = [int(settings.seed or 0) + i for i in range(settings.num_validation_images)]
    denoiser.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
            return [_row(family.pipeline, prompt, seeds, settings) for prompt in settings.validation_prompt]
    finally:
        denoiser.train(was_training)


def _row(pipeline: Any, prompt: str, seeds: list[int], settings: DreamBoothSettings) -> list[Image.Image]:
    images: list[Image.Image] = []
    scale = settings.validation_guidance_scale
    guidance = {} if scale is None else {"guidance_scale": scale}
    for start in range(0, len(seeds), settings.sample_batch_size):
        batch = seeds[start : start + settings.sample_batch_size]
        images += pipeline(
            [prompt] * len(batch),
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.validation_num_inference_steps,
            **guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in batch],
        ).images
    return images
