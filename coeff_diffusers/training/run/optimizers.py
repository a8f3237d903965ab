"""The optimizers that there are: AdamW, with its state in 32 or 8 bits, and Prodigy."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..settings.dreambooth import DreamBoothSettings


def check_optimizer(settings: DreamBoothSettings) -> None:
    """Raises InputError if the package of the optimizer is missing, or cannot be imported."""
    if settings.optimizer == "prodigy":
        _package("prodigyopt", "--optimizer prodigy")
    if settings.use_8bit_adam:
        _package("bitsandbytes", "--use_8bit_adam")


def make_optimizer(parameters: dict[str, list[nn.Parameter]], settings: DreamBoothSettings) -> torch.optim.Optimizer:
    """A parameter group for each kind of parameters, in their order."""
    s = settings
    rates = {
        "coefficients": {"lr": s.learning_rate, "weight_decay": s.adam_weight_decay},
        "lora": {"lr": s.lora_learning_rate, "weight_decay": s.lora_weight_decay},
        "text_encoder_coefficients": {"lr": s.text_encoder_lr, "weight_decay": s.adam_weight_decay},
        "text_encoder_lora": {"lr": s.text_encoder_lora_lr, "weight_decay": s.adam_weight_decay_text_encoder},
    }
    groups = [{"params": group, **rates[what]} for what, group in parameters.items()]
    shared: dict[str, Any] = {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    if settings.optimizer == "prodigy":
        optimizer: torch.optim.Optimizer = _package("prodigyopt", "--optimizer prodigy").Prodigy(
            groups,
            beta3=settings.prodigy_beta3,
            decouple=settings.prodigy_decouple,
            use_bias_correction=settings.prodigy_use_bias_correction,
            safeguard_warmup=settings.prodigy_safeguard_warmup,
            **shared,
        )
        return optimizer
    if settings.use_8bit_adam:
        optimizer = _package("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit(groups, **shared)
        return optimizer
    return torch.optim.AdamW(groups, **shared)


def rates_in_use(optimizer: Any) -> list[float]:
    """The learning rate of each parameter group: with Prodigy, times the distance that it has estimated so far."""
    return [float(group["lr"]) * float(group.get("d", 1.0)) for group in optimizer.param_groups]


def _package(name: str, flag: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{flag} needs {name}, which cannot be imported: {error}; pip install {name}") from error
