"""What a model knows of its coefficients: on which layers they are, and their weight for one call.

A hook before the model's own forward holds it. Layers that the host has built anew since are found missing there. And
the weight of all coefficients for one call is read there, for half of diffusers' transformers take `attention_kwargs`
and pass none of them on to their layers:

    pipe(prompt, cross_attention_kwargs={"coeff_scale": 0.5})
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from .layers import accelerator_of

if TYPE_CHECKING:
    from .coefficients import LayerCoefficients

KEY = "coeff_scale"
GUARD = "_coeff_guard"  # attribute of a layer, out of sight of `named_modules` and `state_dict`: what was put on it


_numbers = itertools.count()
_records: WeakValueDictionary[str, ModelRecord] = WeakValueDictionary()


class ModelRecord:
    """The coefficients of a model by module path, and a call's `coeff_scale`, 1 if it has none.

    One instance is a model's hook, and shared by the coefficients of its layers.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.scale = 1.0
        self.copied: set[str] = set()  # layers of which the host has taken one copy, without coefficients
        self.layers: dict[str, LayerCoefficients] = {}
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.key = f"{next(_numbers)}"  # of each copy its own
        _records[self.key] = self

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.check(model)
        if torch.compiler.is_compiling():
            _before_trace(self.key)
        self.scale = 1.0
        for name, given in kwargs.items():
            if name.endswith("attention_kwargs") and given is not None and KEY in given:
                self.scale = checked(given[KEY])
                return args, {**kwargs, name: {key: value for key, value in given.items() if key != KEY}}
        return None

    def check(self, model: nn.Module) -> None:
        """Raises RuntimeError if a layer whose coefficients take part is another module by now, or gone."""
        rebuilt = self.rebuilt(model)
        lost = [path for path in rebuilt if rebuilt[path].takes_part]
        if lost:
            raise RuntimeError(
                f"{len(lost)} of {len(self.layers)} layers with coefficients are other modules by now, without them, "
                f"the first is {lost[0]!r}: set_coeff_adapters(model, names) puts the coefficients on them, "
                "unload_coeff_weights(model) gives them up"
            )

    def rebuilt(self, model: nn.Module) -> dict[str, LayerCoefficients]:
        """Path -> coefficients, of those whose layer is not the one that they were put on."""
        found = {}
        for path, coefficients in self.layers.items():  # a loop that torch.compile can trace
            guard = getattr(module_at(model, path), GUARD, None)
            if guard is None or guard.coefficients is not coefficients:
                found[path] = coefficients
        return found

    def move(self, model: nn.Module) -> None:
        """Moves Delta to the accelerators that its layers are on."""
        for path, coefficients in self.layers.items():
            device = accelerator_of(module_at(model, path))
            if device is not None:
                coefficients.move(device)


def module_at(model: nn.Module, path: str) -> Any:
    """The module at `path`, also where modules on the way are wrapped; `None` if there is none."""
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _before_trace(key: str) -> bool:
    """Moves Delta to its layers, so that nothing compiled copies it each time.

    Run for its effect while torch.compile traces the model, once. Older releases take nothing but constants here.
    """
    record = _records[key]
    if record.model is not None:
        record.move(record.model)
    return True


def checked(scale: Any) -> float:
    """Raises ValueError if it is not a finite number."""
    if isinstance(scale, str) or not math.isfinite(scale):
        raise ValueError(f"{KEY} must be a finite number, got {scale!r}")
    return scale  # type: ignore[no-any-return]


def model_record(model: nn.Module) -> ModelRecord:
    """The model's own, hooked before its forward."""
    record = known_record(model)
    if record is None:
        record = ModelRecord(model)
        model.register_forward_pre_hook(record, with_kwargs=True)
    return record


def known_record(model: nn.Module) -> ModelRecord | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ModelRecord)), None)


def remove_record(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ModelRecord):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
