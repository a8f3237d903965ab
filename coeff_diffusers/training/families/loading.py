"""Loads a base model, its denoiser last, so that text encoders have encoded and gone before the largest part comes.

Until [`Family.load_denoiser`] there is its config alone, in a model without weights: enough to say what would be
trained, and for a pipeline's call that is stopped before it denoises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...quantization import Quantization, quantization_of
from ..errors import InputError
from ..settings.dreambooth import BaseModelSettings, ObjectiveSettings
from .base import Family
from .sharding import shard_frozen_weights
from .single_file import is_single_file, load_single_file, single_file_config


def load_family(
    kind: type[Family],
    settings: BaseModelSettings,
    objective: ObjectiveSettings,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    index: Mapping[str, Any],
    fsdp: bool = False,
    offload: Callable[[nn.Module], object] | None = None,
) -> Family:
    """Loads and freezes everything but the denoiser. Safety checkers take no part in training.

    Args:
        kind: of [`find_family`].
        settings: which base model.
        objective: what it is trained for.
        device: where it goes.
        dtype: of all its weights that are not quantised.
        quantization: of the denoiser and the large text encoders.
        index: what its model_index.json says.
        fsdp: shards the denoiser over the processes.
        offload: puts the denoiser where it is to be, in the place of moving all of it to `device`.

    Raises:
        InputError: if it cannot be loaded, or not trained so; so does [`Family.load_denoiser`] later.
    """
    part = kind.denoiser_name

    def load(only: set[str], **given: Any) -> Any:
        """The pipeline with these parts, and those that are given."""
        left_out = dict.fromkeys(name for name in index if is_model(index[name]) and name not in only)
        try:
            with quantization.loading():
                given = left_out | dict(kind.load_arguments) | given
                return _load_pipeline(settings, index, dtype, quantization, device, given)
        except (OSError, ValueError) as error:
            name, file = settings.pretrained_model_name_or_path, quantization.gguf_file
            if file and str(error).startswith(file):
                raise InputError(f"--gguf_file: {error}") from error
            known = str(error).startswith(name)
            raise InputError(
                f"--pretrained_model_name_or_path: {error if known else f'{name} cannot be loaded: {error}'}"
            ) from error

    def load_denoiser() -> nn.Module:
        denoiser: Any = getattr(load({part}), part)
        denoiser.requires_grad_(False).eval()
        cast_inputs_under_autocast(denoiser)
        if fsdp:  # before the whole of it is on the device
            shard_frozen_weights(denoiser, device)
        if offload is None:
            denoiser.to(device)
        else:
            offload(denoiser)
        return cast(nn.Module, denoiser)

    others = {name for name in index if is_model(index[name])} - {part}
    arguments: dict[str, Any] = {part: skeleton(settings, index, part, device, dtype)}
    if settings.pretrained_vae_model_name_or_path:
        arguments["vae"] = load_vae(settings.pretrained_vae_model_name_or_path, dtype)
    pipeline = load(others - set(arguments), **arguments)
    pipeline.set_progress_bar_config(disable=True)
    for way in ("tiling", "slicing"):
        if getattr(settings, f"enable_vae_{way}"):
            save_vae_memory(pipeline.vae, way)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            cast_inputs_under_autocast(component)
    family = kind(pipeline.to(device), objective)
    family.denoiser_loader = load_denoiser
    return family


def cast_inputs_under_autocast(model: nn.Module) -> None:
    """Has a quantised model's linear layers take what autocast gives plain ones; one that is not is left as it is.

    Those of torchao and bitsandbytes compute and answer in the dtype of their inputs: under autocast that is float32
    after a norm, which is slow on a GPU, and on a CPU the next norm refuses it, whose weights have 16 bits.
    """
    if quantization_of(model) is not None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return inputs
    return (inputs[0].to(torch.get_autocast_dtype(device)), *inputs[1:])


def _load_pipeline(
    settings: BaseModelSettings,
    index: Mapping[str, Any],
    dtype: torch.dtype,
    quantization: Quantization,
    device: torch.device,
    given: dict[str, Any],
) -> Any:
    """A pipeline of the parts that are not given."""
    name, revision = settings.pretrained_model_name_or_path, settings.revision
    lacking = {part: said for part, said in index.items() if part not in given}
    unset = {part: None for part, said in index.items() if said in ([None, None], (None, None))}
    given = unset | given
    if is_single_file(name):
        return load_single_file(
            name,
            settings.single_file_config,
            dtype=dtype,
            quantization=quantization,
            device=device,
            revision=revision,
            **given,
        )
    given |= quantization.arguments(lacking, name, dtype, revision)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        name, revision=revision, variant=settings.variant, dtype=dtype, **given
    )
    quantization.check_loaded(pipeline, lacking)
    return pipeline


def skeleton(
    settings: BaseModelSettings, index: Mapping[str, Any], part: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """A part of the base model by its config alone: without weights, though it says that it is on `device`.

    Raises:
        InputError: if there is no config.
    """
    name, revision = settings.pretrained_model_name_or_path, settings.revision
    kind: Any = getattr(diffusers, index[part][1])
    try:
        source = single_file_config(name, settings.single_file_config)[0] if is_single_file(name) else name
        config = kind.load_config(source, subfolder=part, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model_name_or_path: {name} cannot be loaded: {error}") from error
    config.pop("quantization_config", None)
    here = {"__module__": kind.__module__, "device": property(lambda self: device), "to": lambda self, *_, **__: self}
    with init_empty_weights():
        named: Any = type(kind.__name__, (kind,), here)
        return nn.Module.to(named.from_config(config), dtype=dtype)


def is_model(said: Any) -> bool:
    """Whether an entry of model_index.json is a model, rather than a tokenizer, a scheduler or a value."""
    if not isinstance(said, list | tuple) or len(said) != 2 or said[0] not in ("diffusers", "transformers"):
        return False
    kind = getattr(importlib.import_module(said[0]), said[1], None)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


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
