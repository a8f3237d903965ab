"""Coefficients and LoRA on the text encoders, which are then in every step and are not released.

As in diffusers' scripts, the CLIP encoders train where a pipeline has any; else its only text encoder.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from coeff_diffusers import CoeffConfig, add_coeff_adapter, coeff_parameters
from coeff_diffusers.text import check_text_encoder, text_attention_layers

from ..errors import InputError
from ..families import Family
from ..settings.dreambooth import AdapterSettings
from .lora import add_lora

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "q", "k", "v", "o")  # of CLIP, Qwen and Gemma, T5


def check_text_encoders(family: Family, settings: AdapterSettings, prompt: str) -> None:
    """Raises InputError if the family's text encoders cannot be trained, or not as these settings ask.

    Args:
        family: with its text encoders.
        settings: what is trained.
        prompt: any that is trained on.
    """
    for name, encoder in _chosen(family).items():
        try:
            check_text_encoder(encoder)
        except ValueError as error:
            raise InputError(f"--train_text_encoder: {name}: {error}") from error
        if not layers_in_use(family, name, prompt):
            raise InputError(f"--train_text_encoder: this pipeline encodes prompts without gradients in {name}")
    save = getattr(family.pipeline, "save_lora_weights", None)
    savable = inspect.signature(save).parameters if save else {}
    if settings.lora_rank and "text_encoder_lora_layers" not in savable:
        raise InputError(
            f"--train_text_encoder: {type(family.pipeline).__name__} has no LoRA on text encoders; leave out "
            "--lora_rank"
        )


def add_text_encoder_adapters(family: Family, settings: AdapterSettings, prompt: str) -> dict[str, list[nn.Parameter]]:
    """Puts on the adapters, and writes the encoders down in `family.trained_text_encoders`.

    Returns:
        `"text_encoder_coefficients"` and `"text_encoder_lora"` -> parameters, where they are asked for.
    """
    added: dict[str, list[nn.Parameter]] = {}
    for name, encoder in _chosen(family).items():
        paths = layers_in_use(family, name, prompt)
        switch_dropout_off(encoder)
        if settings.lora_rank:
            targets = [path for path, _ in encoder.named_modules() if _is_target(path, paths)]
            lora = add_lora(encoder, settings, targets)
            added.setdefault("text_encoder_lora", []).extend(lora)
        if settings.coeff:
            add_coeff_adapter(encoder, CoeffConfig(include=tuple(paths), dropout=settings.coeff_dropout))
            added.setdefault("text_encoder_coefficients", []).extend(coeff_parameters(encoder))
        family.trained_text_encoders.append(encoder)
    return added


def layers_in_use(family: Family, name: str, prompt: str) -> list[str]:
    """Paths of the attention layers that the prompt's conditions depend on.

    The last ones often do not count: SDXL reads the layer before. What never has a gradient must not wait for one.
    """
    layers = text_attention_layers(getattr(family.pipeline, name))
    probes = [next(layer.parameters()) for layer in layers.values()]
    for probe in probes:
        probe.requires_grad_(True)
    try:
        with torch.enable_grad():
            [conditions] = family.encode_prompts([prompt])
            sums = [value.float().sum() for value in conditions.values() if value.requires_grad]
            found = torch.autograd.grad(sums, probes, allow_unused=True) if sums else [None] * len(probes)
    finally:
        for probe in probes:
            probe.requires_grad_(False)
    return [path for path, gradient in zip(layers, found) if gradient is not None]


def switch_dropout_off(encoder: nn.Module) -> None:
    """Of the model's own, which has none in generation either; the adapters' own comes later and stays."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]


def _chosen(family: Family) -> dict[str, Any]:
    encoders = {name: getattr(family.pipeline, name, None) for name in family.text_encoder_names}
    there = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    clip = {name: encoder for name, encoder in there.items() if type(encoder).__name__.startswith("CLIPText")}
    return clip or there


def _is_target(path: str, layers: list[str]) -> bool:
    return any(path.startswith(f"{layer}.") for layer in layers) and path.rpartition(".")[2] in LORA_TARGETS
