"""What is trained: coefficients and a LoRA, put on the frozen base model and written to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import is_peft_available
from torch import nn

from coeff_diffusers import CoeffConfig, add_coeff_adapter, coeff_parameters, save_coeff_weights
from coeff_diffusers.layers import select_layers
from coeff_diffusers.quantization import parameter_count

from ..errors import InputError
from ..families import Family
from ..families.sharding import held
from ..settings.dreambooth import AdapterSettings, CoefficientSettings
from .lora import add_lora, lora_targets, save_lora
from .text_encoders import add_text_encoder_adapters, check_text_encoders


def coeff_config(settings: CoefficientSettings) -> CoeffConfig:
    return CoeffConfig(
        include=settings.coeff_include,
        exclude=settings.coeff_exclude,
        kinds=settings.coeff_kinds,
        dropout=settings.coeff_dropout,
    )


def check_adapters(family: Family, settings: AdapterSettings, prompt: str) -> None:
    """Raises InputError if what is to be trained cannot be put on the model; before class images take their time.

    Args:
        family: the base model.
        settings: what is trained.
        prompt: any that is trained on.
    """
    if settings.lora_rank and not is_peft_available():
        raise InputError("--lora_rank needs peft: pip install 'coeff_diffusers[lora]'")
    lora_targets(family, settings)
    if settings.coeff:
        try:
            select_layers(family.denoiser, coeff_config(settings))
        except ValueError as error:  # a pattern or a kind that no layer has
            raise InputError(f"--coeff_kinds, --coeff_include, --coeff_exclude: {error}") from error
    if settings.train_text_encoder:
        check_text_encoders(family, settings, prompt)


def add_adapters(
    family: Family, settings: AdapterSettings, prompt: str, adapter_name: str = "default"
) -> dict[str, list[nn.Parameter]]:
    """Puts on what is trained.

    Args:
        family: the base model.
        settings: what is trained.
        prompt: any that is trained on.
        adapter_name: of the coefficients.

    Returns:
        `"coefficients"`, `"lora"`, `"text_encoder_coefficients"`, `"text_encoder_lora"` -> their parameters, where
        they are asked for.
    """
    parameters = {}
    if settings.lora_rank:
        parameters["lora"] = add_lora(family.denoiser, settings, lora_targets(family, settings))
    if settings.coeff:
        add_coeff_adapter(family.denoiser, coeff_config(settings), adapter_name=adapter_name)
        parameters = {"coefficients": coeff_parameters(family.denoiser, adapter_name)} | parameters
    if settings.train_text_encoder:
        parameters |= add_text_encoder_adapters(family, settings, prompt)
    return parameters


def check_trainable(family: Family, parameters: Mapping[str, list[nn.Parameter]]) -> None:
    """Raises RuntimeError unless exactly these parameters require a gradient, in float32."""
    expected = {parameter for group in parameters.values() for parameter in group}
    names = {p: f"{what} {n}" for what, group in parameters.items() for n, p in enumerate(group)}
    for component, part in family.pipeline.components.items():
        if isinstance(part, nn.Module):
            names |= {parameter: f"{component}.{name}" for name, parameter in part.named_parameters()}
    problems = []
    for parameter, name in names.items():
        if parameter.requires_grad != (parameter in expected):
            problems.append(f"{name} " + ("is trainable" if parameter.requires_grad else "is frozen"))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            problems.append(f"{name} is trained in {parameter.dtype}")
    if problems:
        raise RuntimeError("only coefficients and LoRA may train, in float32, but:\n  " + "\n  ".join(problems))


def count_parameters(parameters: Mapping[str, list[nn.Parameter]]) -> dict[str, int]:
    """Kind -> the number of its parameters."""
    return {what: sum(p.numel() for p in group) for what, group in parameters.items()}


def trainable_parameters_text(family: Family, parameters: Mapping[str, list[nn.Parameter]]) -> str:
    """PEFT's line, with the kinds of parameters where there are several, and what a process holds of shards."""
    parts = [part for part in family.pipeline.components.values() if isinstance(part, nn.Module)]
    frozen = [p for part in parts for p in part.parameters() if not p.requires_grad]
    trained = count_parameters(parameters)
    trainable, count = sum(trained.values()), family.released + sum(parameter_count(p) for p in frozen)
    here = family.released + sum(held(p) for p in frozen)
    text = (
        f"trainable params: {trainable:,} || all params: {trainable + count:,} || "
        f"trainable%: {100 * trainable / (trainable + count):.4f}"
    )
    if set(trained) != {"coefficients"}:
        text += f" ({', '.join(f'{what} {n:,}' for what, n in trained.items())})"
    return text + (f"\nEach process holds about {here:,} of the frozen ones." if here < count else "")


def save_weights(
    family: Family,
    settings: AdapterSettings,
    folder: Path,
    metadata: dict[str, str],
    weight_name: str = "pytorch_coeff_weights.safetensors",
    adapter_name: str = "default",
) -> dict[str, Path]:
    """Writes what was trained into `folder`: `"coefficients"` and `"lora"` -> the file.

    Args:
        family: that it is on.
        settings: what was trained.
        folder: where to.
        metadata: of the coefficient file.
        weight_name: of the coefficient file.
        adapter_name: of the coefficients.
    """
    files = {}
    if settings.coeff:
        files["coefficients"] = save_coeff_weights(
            family.pipeline, folder, weight_name=weight_name, adapter_name=adapter_name, metadata=metadata
        )
    if settings.lora_rank:
        files["lora"] = save_lora(family, folder)
    return files
