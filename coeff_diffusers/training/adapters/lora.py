"""LoRA beside the coefficients, or alone: peft's, in the standard file that every other tool reads."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from coeff_diffusers.layers import matches

from ..errors import InputError
from ..families import Family
from ..settings.dreambooth import LoraSettings


def lora_targets(family: Family, settings: LoraSettings) -> list[str]:
    """What gets a LoRA in the denoiser, as peft takes it: the family's own layers, or those of --lora_layers.

    Raises:
        InputError: if a pattern matches no layer that can have one; all such patterns are named.
    """
    if settings.lora_layers is None:
        return list(family.lora_targets)
    modules = family.denoiser.named_modules()
    layers = [path for path, module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    idle = [pattern for pattern in settings.lora_layers if not any(matches(path, pattern) for path in layers)]
    if idle:
        raise InputError(f"--lora_layers: {idle} match no linear layer or convolution; there is {layers[-1]!r}")
    return [path for path in layers if any(matches(path, pattern) for pattern in settings.lora_layers)]


def add_lora(model: Any, settings: LoraSettings, targets: Sequence[str]) -> list[nn.Parameter]:
    """Adds a LoRA, zero at first, and returns its parameters, in float32."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        use_dora=settings.use_dora,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:  # diffusers has no LoRA for PixArt's transformer
        inject_adapter_in_model(config, model)
    cast_training_params(model)
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def has_lora_loader(pipeline: Any) -> bool:
    """Whether the pipeline has `load_lora_weights`, and a format of its own for it."""
    return hasattr(pipeline, "save_lora_weights")


def save_lora(family: Family, folder: Path) -> Path:
    """Writes `folder / pytorch_lora_weights.safetensors`, whole or not at all, with rank and alpha in its header.

    Or the two files of peft's own format, for pipelines that have none.
    """
    from peft.utils import get_peft_model_state_dict

    if not has_lora_loader(family.pipeline):
        return save_peft(family.denoiser, folder)
    arguments = {}
    for part in (family.denoiser_name, *family.text_encoder_names):
        model = getattr(family.pipeline, part, None)
        if model is None or not hasattr(model, "peft_config"):
            continue
        layers = get_peft_model_state_dict(model)
        if family.denoiser_name == "unet":  # pipelines with a transformer read the names that peft gives
            layers = convert_state_dict_to_diffusers(layers)
        arguments[f"{part}_lora_layers"] = layers
        arguments[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    path = folder / LORA_WEIGHT_NAME_SAFE
    with _temporary_folder(folder, path) as temporary:
        family.pipeline.save_lora_weights(temporary, **arguments)
        os.replace(Path(temporary) / LORA_WEIGHT_NAME_SAFE, path)
    return path


@contextmanager
def _temporary_folder(folder: Path, path: Path) -> Iterator[str]:
    """In `folder`, for what libraries write. Raises OSError that names `path` where these have errors of their own."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        why = f"cannot be written, and is as it was: {getattr(error, 'strerror', None) or error}"
        raise OSError(getattr(error, "errno", None) or errno.EIO, why, str(path)) from error


def save_peft(model: Any, folder: Path) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, for `peft.PeftModel.from_pretrained`."""
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict

    weights = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(model).items()}
    with _temporary_folder(folder, folder / SAFETENSORS_WEIGHTS_NAME) as temporary:
        model.peft_config["default"].save_pretrained(temporary)
        save_file(
            {name: value.contiguous() for name, value in weights.items()},
            Path(temporary) / SAFETENSORS_WEIGHTS_NAME,
            {"format": "pt"},
        )
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            os.replace(Path(temporary) / name, folder / name)
    return folder / SAFETENSORS_WEIGHTS_NAME
