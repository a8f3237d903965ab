"""Latents encoded once before training, so that no step needs the VAE. It is then released as far as it can be.

What is kept of an image are moments, mean and deviation: a step draws its latents from them, as it does without the
cache. Images are encoded one at a time with it and without, so that both give the same bits whatever a batch is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import free_memory
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..families import Family
from ..settings.dreambooth import ImageSettings
from .dreambooth_dataset import Crop, DreamBoothDataset
from .files import TrainingImage
from .subjects_dataset import SubjectsDataset


def check_cacheable(images: Sequence[TrainingImage], settings: ImageSettings) -> None:
    """Raises InputError, naming them, if images are cropped at random: then there is no end of latents."""
    if not settings.cache_latents or settings.center_crop or settings.aspect_ratio_buckets:
        return
    problems = dict.fromkeys(f"{p.name} is {p.width} x {p.height}" for p in images if p.height != p.width)
    if problems:
        raise InputError(
            "--cache_latents: these images are not square and would be cropped at random, differently each time; "
            "crop at the centre with --center_crop or --aspect_ratio_buckets:\n  " + "\n  ".join(problems)
        )


def is_cacheable(images: Sequence[TrainingImage], settings: ImageSettings) -> bool:
    """Whether --cache_latents could be had."""
    return settings.center_crop or bool(settings.aspect_ratio_buckets) or all(p.height == p.width for p in images)


def encode_crops(family: Family, dataset: DreamBoothDataset | SubjectsDataset, silent: bool) -> dict[Crop, Tensor]:
    """The moments, float32 in the CPU's memory, of everything that the data set will show."""
    moments = {}
    for crop in tqdm(dataset.crops(), desc="encoding images", disable=silent):
        pixels = dataset.pixels(crop)[None].to(family.device)
        moments[crop] = family.encode_images(pixels)[0].cpu()
    return moments


def moments_of(family: Family, batch: dict[str, Any]) -> Tensor:
    """Of the batch's images, (B, 2, ...): as they were encoded before, or encoded now."""
    if "moments" in batch:
        cached: Tensor = batch["moments"]
        return cached
    return torch.cat([family.encode_images(pixels) for pixels in batch["pixels"].split(1)])


class _Released(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this part of the VAE was released when every image of the run had been encoded")


def release_vae(family: Family, keep_decoder: bool) -> None:
    """Frees the VAE's encoder, and its decoder unless images will be made; that one waits in the CPU's memory."""
    vae = family.pipeline.vae
    for part in ("encoder",) if keep_decoder else ("encoder", "decoder"):
        setattr(vae, part, _Released())
    if keep_decoder:
        vae.to("cpu")
    free_memory()


@contextmanager
def vae_on(family: Family, device: torch.device) -> Iterator[None]:
    """Has the VAE on the device, and back where it was afterwards."""
    vae = family.pipeline.vae
    home = vae.device
    vae.to(device)
    try:
        yield
    finally:
        vae.to(home)
