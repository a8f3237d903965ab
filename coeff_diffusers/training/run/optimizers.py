"""Optimizers by name: torch's, bitsandbytes', Prodigy, and those of pytorch-optimizer."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..settings.dreambooth import OptimizerSettings

Kind = Callable[..., torch.optim.Optimizer]
ELSEWHERE = {"prodigy": ("prodigyopt", "Prodigy")}  # those of other packages than the three that are searched


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raises InputError if there is no such optimizer, its package is missing, or it cannot have these arguments."""
    kind, parameter = optimizer_class(settings), nn.Parameter(torch.zeros(2, 2))
    if hasattr(kind, "eval"):
        raise InputError(
            f"--optimizer {settings.optimizer} keeps other weights for training than for validation and saving, which "
            "cannot be had here; --use_ema averages weights"
        )
    parameter.grad = torch.ones_like(parameter)
    try:
        make_optimizer({"coefficients": [parameter]}, settings).step()
    except InputError:
        raise
    except Exception as error:  # whatever an optimizer makes of arguments that it cannot use
        raise InputError(f"--optimizer {settings.optimizer}: {error}") from error


def make_optimizer(parameters: dict[str, list[nn.Parameter]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """A parameter group for each kind of parameters, in their order."""
    s = settings
    rates = {
        "coefficients": {"lr": s.learning_rate, "weight_decay": s.adam_weight_decay},
        "lora": {"lr": s.lora_learning_rate, "weight_decay": s.lora_weight_decay},
        "text_encoder_coefficients": {"lr": s.text_encoder_lr, "weight_decay": s.adam_weight_decay},
        "text_encoder_lora": {"lr": s.text_encoder_lora_lr, "weight_decay": s.adam_weight_decay_text_encoder},
    }
    kind = optimizer_class(settings)
    taken = inspect.signature(kind).parameters
    given = optimizer_args(s.optimizer_args)
    if unknown := [name for name in given if name not in taken or name == "params"]:
        names = [name for name in taken if name not in ("params", "kwargs")]
        raise InputError(f"--optimizer_args: {s.optimizer} has no {', '.join(unknown)}; it has {', '.join(names)}")
    shared: dict[str, Any] = {"betas": (s.adam_beta1, s.adam_beta2), "eps": s.adam_epsilon}
    if s.optimizer == "prodigy":
        prodigys = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
        shared |= {name: getattr(s, f"prodigy_{name}") for name in prodigys}
    elif "adam" not in kind.__name__.lower():
        shared = {}  # --adam_beta1 and the like are Adam's; others keep their own defaults
    shared = {name: value for name, value in shared.items() if name in taken} | given
    for group in rates.values():
        for name in ("lr", "weight_decay"):
            if name in given or name not in taken:
                del group[name]
    return kind([{"params": group, **rates[what]} for what, group in parameters.items()], **shared)


def optimizer_class(settings: OptimizerSettings) -> Kind:
    """Raises InputError if there is none of this name, or its package is missing."""
    name = settings.optimizer
    if name == "adamw" and settings.use_8bit_adam:
        name = "adamw8bit"
    if name in ELSEWHERE:
        package, kind = ELSEWHERE[name]
        found: Kind = getattr(_package(package, f"--optimizer {name}"), kind)
        return found
    named = _named(torch.optim, name)
    if named is None and name.endswith("bit"):
        flag = "--use_8bit_adam" if settings.use_8bit_adam else f"--optimizer {name}"
        named = _named(_package("bitsandbytes", flag).optim, name)
    if named is None:
        package = _package("pytorch_optimizer", f"--optimizer {name}", "pytorch-optimizer")
        try:
            named = package.load_optimizer(name)
        except NotImplementedError as error:
            raise InputError(
                f"--optimizer: there is no {name} in torch.optim, bitsandbytes or pytorch-optimizer"
            ) from error
    chosen: Kind = named
    return chosen


def _named(package: Any, name: str) -> Any:
    """The optimizer of a package, whatever the case of its name."""
    kinds = {key.lower(): kind for key, kind in vars(package).items() if isinstance(kind, type)}
    kind = kinds.get(name)
    return kind if kind and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer else None


def optimizer_args(texts: Sequence[str]) -> dict[str, Any]:
    """`weight_decay=0.1` and the like, with values as Python writes them."""
    values, problems = {}, []
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals or not name.strip().isidentifier():
                raise ValueError
            values[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            problems.append(f"{text!r} is not name=value, with a value such as 0.1, True, 'text' or (0.9, 0.99)")
    if problems:
        raise InputError("--optimizer_args: " + "; ".join(problems))
    return values


def rates_in_use(optimizer: Any) -> list[float]:
    """The learning rate of each parameter group: with Prodigy, times the distance that it has estimated so far."""
    return [float(group["lr"]) * float(group.get("d", 1.0)) for group in optimizer.param_groups]


def _package(name: str, flag: str, of_pip: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{flag} needs {name}, which cannot be imported: {error}; pip install {of_pip or name}"
        ) from error
