"""The families of models that can be trained, found by the class of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ..errors import InputError
from ..settings.dreambooth import BaseModelSettings, ObjectiveSettings
from .base import Conditions, DiffusionFamily, Family, FlowFamily
from .flux import Flux
from .flux2 import Flux2Klein
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .sharding import shard_frozen_weights
from .single_file import is_single_file, load_single_file, single_file_config
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


def find_family(settings: BaseModelSettings) -> type[Family]:
    """Reads which pipeline the base model is.

    Raises:
        InputError: if the base model is not there, or of a family that cannot be trained.
    """
    name, config = settings.pretrained_model_name_or_path, _pipeline_config(settings)
    families = {pipeline: family for family in FAMILIES for pipeline in family.supported}
    if config.get("_class_name") not in families:
        raise InputError(
            f"--pretrained_model_name_or_path: {name} is a {config.get('_class_name')}; supported are "
            + ", ".join(sorted(families))
        )
    return families[config["_class_name"]]


def _pipeline_config(settings: BaseModelSettings) -> dict[str, Any]:
    """What model_index.json says; raises InputError if there is none, or a setting is not for such a base model."""
    name = settings.pretrained_model_name_or_path
    if settings.revision and Path(name).exists():
        raise InputError(
            f"--revision is of a model on the Hub and has no effect on {name}, which is here: leave it out"
        )
    if is_single_file(name):
        if settings.variant:
            raise InputError(f"--variant has no effect on {name}, which is a single file")
        try:
            return single_file_config(name, settings.single_file_config, revision=settings.revision)[1]
        except ValueError as error:
            raise InputError(f"--pretrained_model_name_or_path: {error}") from error
    if settings.single_file_config:
        raise InputError(f"--single_file_config is for a base model in a single file, and {name} is none")
    try:
        config: dict[str, Any] = diffusers.DiffusionPipeline.load_config(name, revision=settings.revision)
        return config
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model_name_or_path: there is no pipeline at {name!r}: {error}") from error


def load_family(
    kind: type[Family],
    settings: BaseModelSettings,
    objective: ObjectiveSettings,
    device: torch.device,
    dtype: torch.dtype,
    fsdp: bool = False,
) -> Family:
    """Loads and freezes everything. Safety checkers take no part in training.

    Args:
        kind: of [`find_family`].
        settings: which base model.
        objective: what it is trained for.
        device: where it goes.
        dtype: of all its weights.
        fsdp: shards the denoiser over the processes.

    Raises:
        InputError: if it cannot be loaded, or not trained so.
    """
    name, revision = settings.pretrained_model_name_or_path, settings.revision
    left_out = [part for part, of in _pipeline_config(settings).items() if of in ([None, None], (None, None))]
    arguments = dict.fromkeys(left_out) | dict(kind.load_arguments)
    if settings.pretrained_vae_model_name_or_path:
        arguments["vae"] = load_vae(settings.pretrained_vae_model_name_or_path, dtype)
    if is_single_file(name):
        try:
            pipeline = load_single_file(name, settings.single_file_config, revision=revision, dtype=dtype, **arguments)
        except ValueError as error:
            raise InputError(f"--pretrained_model_name_or_path: {error}") from error
    else:
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                name, revision=revision, variant=settings.variant, dtype=dtype, **arguments
            )
        except (OSError, ValueError) as error:
            raise InputError(f"--pretrained_model_name_or_path: {name} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    for part in ("tiling", "slicing"):
        if getattr(settings, f"enable_vae_{part}"):
            save_vae_memory(pipeline.vae, part)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if fsdp:  # before the whole of it is on the device
        shard_frozen_weights(getattr(pipeline, kind.denoiser_name), device)
    return kind(pipeline.to(device), objective)


def load_vae(name: str, dtype: torch.dtype) -> nn.Module:
    """Raises InputError if there is none."""
    try:
        vae: nn.Module = diffusers.AutoModel.from_pretrained(name, dtype=dtype)
        return vae
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_vae_model_name_or_path: there is no VAE at {name!r}: {error}") from error


def save_vae_memory(vae: Any, part: str) -> None:
    """Has the VAE compute in tiles of an image, or an image at a time; raises InputError if it cannot."""
    try:
        getattr(vae, f"enable_{part}")()
    except (AttributeError, NotImplementedError) as error:
        raise InputError(f"--enable_vae_{part}: {type(vae).__name__} cannot do that") from error
