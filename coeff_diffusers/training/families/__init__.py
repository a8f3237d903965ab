"""The families of models that can be trained, found by the class of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from ...quantization import Quantization, large_text_encoders, text_encoders
from ..errors import InputError
from ..settings.dreambooth import BaseModelSettings
from .base import Conditions, DiffusionFamily, Family, FlowFamily
from .flux import Flux
from .flux2 import Flux2Klein
from .loading import load_family, save_vae_memory
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .single_file import is_single_file, single_file_config
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

__all__ = [
    "FAMILIES",
    "Conditions",
    "DiffusionFamily",
    "Family",
    "FlowFamily",
    "find_family",
    "find_quantization",
    "load_family",
    "pipeline_index",
    "save_vae_memory",
]

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


def find_family(settings: BaseModelSettings, index: Mapping[str, Any]) -> type[Family]:
    """Which family the base model is of, by what [`pipeline_index`] says.

    Raises:
        InputError: if it is one that cannot be trained.
    """
    name, families = (
        settings.pretrained_model_name_or_path,
        {p: family for family in FAMILIES for p in family.supported},
    )
    if index.get("_class_name") not in families:
        raise InputError(
            f"--pretrained_model_name_or_path: {name} is a {index.get('_class_name')}; supported are "
            + ", ".join(sorted(families))
        )
    return families[index["_class_name"]]


def find_quantization(
    settings: BaseModelSettings, index: Mapping[str, Any], train_text_encoder: bool, device: torch.device
) -> Quantization:
    """How the base model's weights are to be held. Text encoders that train are held as they are.

    Raises:
        InputError: if that cannot be had on the device, or there is nothing to quantise.
    """
    trains = train_text_encoder and len(text_encoders(index)) == len(large_text_encoders(index))  # CLIP's train else
    quantization = Quantization(settings.quantize, settings.gguf_file, text_encoders=not trains)
    try:
        quantization.check(device.type, index)
    except ValueError as error:
        raise InputError(f"--{'quantize' if settings.quantize else 'gguf_file'}: {error}") from error
    return quantization


def pipeline_index(settings: BaseModelSettings) -> dict[str, Any]:
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
