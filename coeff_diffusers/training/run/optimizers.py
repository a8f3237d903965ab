"""Optimizers by name: SOAP, torch's, bitsandbytes', Prodigy, and those of pytorch-optimizer.

Coefficients have one, and a LoRA beside them may have another; to the run they are one optimizer.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from ..settings.dreambooth import DreamBoothSettings, OptimizerSettings
from .soap import SOAP

Kind = Callable[..., torch.optim.Optimizer]
ELSEWHERE = {"prodigy": ("prodigyopt", "Prodigy")}  # those of other packages than the three that are searched


def check_optimizer(settings: DreamBoothSettings) -> None:
    """Raises InputError if there is no such optimizer, its package is missing, or it cannot have these arguments."""
    for what in [
        kind for kind, trained in (("coefficients", settings.coeff), ("lora", settings.lora_rank)) if trained
    ]:
        choice, parameter = _choice(what, settings), nn.Parameter(torch.zeros(2, 2))
        if hasattr(optimizer_class(choice, settings.use_8bit_adam), "eval"):
            raise InputError(
                f"{choice} keeps other weights for training than for validation and saving, which cannot be had here; "
                "--use_ema averages weights"
            )
        parameter.grad = torch.ones_like(parameter)
        try:
            make_optimizer({what: [parameter]}, settings).step()
        except InputError:
            raise
        except Exception as error:  # whatever an optimizer makes of arguments that it cannot use
            raise InputError(f"{choice}: {error}") from error


class Choice(NamedTuple):
    """An optimizer's name, and the flag that it was given by."""

    flag: str
    name: str

    def __str__(self) -> str:
        return f"--{self.flag} {self.name}"


def make_optimizer(parameters: Mapping[str, list[nn.Parameter]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """A parameter group for each kind of parameters, in their order; kinds that have one optimizer share it."""
    choices = {what: _choice(what, settings) for what in parameters}
    shares = {choice: [what for what in parameters if choices[what] == choice] for choice in choices.values()}
    made = [_make({what: parameters[what] for what in share}, c, settings) for c, share in shares.items()]
    kinds = list(chain(*shares.values()))
    return made[0] if len(made) == 1 else SeveralOptimizers(made, [kinds.index(what) for what in parameters])


def _choice(what: str, settings: OptimizerSettings) -> Choice:
    """Of a kind of parameters."""
    if "lora" in what and settings.lora_optimizer != settings.optimizer:
        return Choice("lora_optimizer", settings.lora_optimizer)
    return Choice("optimizer", settings.optimizer)


def _make(parameters: dict[str, list[nn.Parameter]], choice: Choice, settings: OptimizerSettings) -> Any:
    s = settings
    rates = {
        "coefficients": {"lr": s.learning_rate, "weight_decay": s.adam_weight_decay},
        "lora": {"lr": s.lora_learning_rate, "weight_decay": s.lora_weight_decay},
        "text_encoder_coefficients": {"lr": s.text_encoder_lr, "weight_decay": s.adam_weight_decay},
        "text_encoder_lora": {"lr": s.text_encoder_lora_lr, "weight_decay": s.adam_weight_decay_text_encoder},
    }
    kind = optimizer_class(choice, s.use_8bit_adam)
    taken = inspect.signature(kind).parameters
    given = optimizer_args(s.optimizer_args) if choice.flag == "optimizer" else {}
    if unknown := [name for name in given if name not in taken or name == "params"]:
        names = [name for name in taken if name not in ("params", "kwargs")]
        raise InputError(f"--optimizer_args: {choice.name} has no {', '.join(unknown)}; it has {', '.join(names)}")
    shared = {name: value for name, value in _options(kind, s).items() if name in taken} | given
    for group in rates.values():
        for name in ("lr", "weight_decay"):
            if name in given or name not in taken:
                del group[name]
    return kind([{"params": group, **rates[what]} for what, group in parameters.items()], **shared)


def _options(kind: Kind, settings: OptimizerSettings) -> dict[str, Any]:
    """What the flags say beside rates and weight decays: --adam_beta1 and the like are for Adam and its kin alone."""
    s, name = settings, kind.__name__.lower()
    if name not in ("soap", "prodigy") and "adam" not in name:
        return {}
    beta2 = s.adam_beta2 if s.adam_beta2 is not None else 0.99 if name == "soap" else 0.999
    options: dict[str, Any] = {"betas": (s.adam_beta1, beta2), "eps": s.adam_epsilon}
    prodigys = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup") if name == "prodigy" else ()
    return options | {option: getattr(s, f"prodigy_{option}") for option in prodigys}


class SeveralOptimizers(torch.optim.Optimizer):
    """Several as one, each for parameters of its own.

    Args:
        optimizers: that each have parameter groups.
        order: numbers of their groups, counted through, in the order in which `param_groups` has them.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], order: Sequence[int]) -> None:
        self.optimizers, self.order = optimizers, order
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        groups = list(chain(*(optimizer.param_groups for optimizer in self.optimizers)))
        return [groups[number] for number in self.order]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = self._groups()  # which are new dicts then


def optimizer_class(choice: Choice, in_8_bits: bool = False) -> Kind:
    """Raises InputError if there is none of this name, or its package is missing."""
    name = choice.name
    if name == "soap":
        return SOAP
    if name == "adamw" and in_8_bits:
        name = "adamw8bit"
    if name in ELSEWHERE:
        package, kind = ELSEWHERE[name]
        found: Kind = getattr(_package(package, str(choice)), kind)
        return found
    named = _named(torch.optim, name)
    if named is None and name.endswith("bit"):
        flag = "--use_8bit_adam" if in_8_bits else str(choice)
        named = _named(_package("bitsandbytes", flag).optim, name)
    if named is None:
        package = _package("pytorch_optimizer", str(choice), "pytorch-optimizer")
        try:
            named = package.load_optimizer(name)
        except NotImplementedError as error:
            raise InputError(
                f"--{choice.flag}: there is no {name} in torch.optim, bitsandbytes or pytorch-optimizer"
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
