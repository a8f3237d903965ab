"""The families of models that can be trained, found by the class of the pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from settings import DreamBoothSettings, InputError
from sharding import shard_frozen_weights
from torch import nn

from .base import Conditions, DiffusionFamily, Family, FlowFamily
from .flux import Flux
from .flux2 import Flux2Klein
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

__all__ = ["FAMILIES", "Conditions", "DiffusionFamily", "Family", "FlowFamily", "find_family", "load_family"]

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArt,
    Flux2Klein,
    QwenImage,
    ZImage,
    Sana,
    Lumina2,
)


def find_family(settings: DreamBoothSettings) -> type[Family]:
    """Reads which pipeline the base model is.

    Raises:
        InputError: if the base model is not there, or of a family that cannot be trained.
    """
    name = settings.pretrained_model_name_or_path
    try:
        config = diffusers.DiffusionPipeline.load_config(name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model_name_or_path: there is no pipeline at {name!r}: {error}") from error
    families = {pipeline: family for family in FAMILIES for pipeline in family.supported}
    if config.get("_class_name") not in families:
        raise InputError(
            f"--pretrained_model_name_or_path: {name} is a {config.get('_class_name')}; supported are "
            + ", ".join(sorted(families))
        )
    return families[config["_class_name"]]


def load_family(kind: type[Family], settings: DreamBoothSettings, device: torch.device, dtype: torch.dtype) -> Family:
    """Loads and freezes everything. Safety checkers take no part in training."""
    name, revision = settings.pretrained_model_name_or_path, settings.revision
    config = diffusers.DiffusionPipeline.load_config(name, revision=revision)
    left_out = [component for component, of in config.items() if of in ([None, None], (None, None))]
    arguments = dict.fromkeys(left_out) | dict(kind.load_arguments)
    if settings.pretrained_vae_model_name_or_path:
        arguments["vae"] = load_vae(settings.pretrained_vae_model_name_or_path, dtype)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        name,
        revision=revision,
        variant=settings.variant,
        dtype=dtype,
        **arguments,
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in ("tiling", "slicing"):
        if getattr(settings, f"enable_vae_{part}"):
            save_vae_memory(pipeline.vae, part)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if settings.fsdp:  # before the whole of it is on the device
        shard_frozen_weights(getattr(pipeline, kind.denoiser_name), device)
    return kind(pipeline.to(device), settings)


def load_vae(name: str, dtype: torch.dtype) -> nn.Module:
    """Raises InputError if there is none."""
    try:
        vae: nn.Module = diffusers.AutoModel.from_pretrained(name, dtype=dtype)
        return vae
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_vae_model_name_or_path: there is no VAE at {name!r}: {error}") from error


def save_vae_memory(vae: Any, part: str) -> None:
    """Has the VAE compute in tiles of a picture, or a picture at a time; raises InputError if it cannot."""
    try:
        getattr(vae, f"enable_{part}")()
    except (AttributeError, NotImplementedError) as error:
        raise InputError(f"--enable_vae_{part}: {type(vae).__name__} cannot do that") from error
