"""The weight of all coefficients for one call of a model, given among the attention kwargs of its pipeline:

pipe(prompt, cross_attention_kwargs={"coeff_scale": 0.5})

Half of diffusers' transformers take `attention_kwargs` and pass none of them on to their layers. A hook before the
model's own forward therefore takes the key out, and the model's processors share what it read.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

KEY = "coeff_scale"


class CallScale:
    """A call's `coeff_scale`, 1 if it has none. One instance is a model's hook, and shared by its processors."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self.scale = 1.0
        for name, given in kwargs.items():
            if name.endswith("attention_kwargs") and given is not None and KEY in given:
                self.scale = checked(given[KEY])
                return args, {**kwargs, name: {key: value for key, value in given.items() if key != KEY}}
        return None


def checked(scale: Any) -> float:
    """Raises ValueError if it is not a finite number."""
    if isinstance(scale, str) or not math.isfinite(scale):
        raise ValueError(f"{KEY} must be a finite number, got {scale!r}")
    return scale  # type: ignore[no-any-return]


def call_scale(model: nn.Module) -> CallScale:
    """The model's own, hooked before its forward."""
    found = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CallScale)]
    if not found:
        found = [CallScale()]
        model.register_forward_pre_hook(found[0], with_kwargs=True)
    return found[0]


def remove_call_scale(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, CallScale):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
