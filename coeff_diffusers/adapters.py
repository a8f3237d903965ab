"""Coefficients on a model or a pipeline: put on, choose, weigh, disable, take off.

`model` is a diffusers model, or a pipeline, whose denoisers (`unet`, `transformer`, `transformer_2`, ...) are meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from .config import CoeffConfig
from .layers import attention_layers, device_of, head_count, select_layers
from .processor import CoeffAttnProcessor

DEFAULT_ADAPTER = "default"


def add_coeff_adapter(model: Any, config: CoeffConfig | None = None, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Adds coefficients Delta = 0 to the attention layers that `config` selects, and makes them the active adapter.

    Until it is trained the adapter changes nothing. Its parameters are float32, on the device of their layer, and
    require a gradient; the flags of all other parameters are left as they are. peft's `add_adapter` freezes what it
    finds: call it before.

    Args:
        model: a diffusers model or a pipeline.
        config: which layers, and the dropout in training. `None` takes every layer.
        adapter_name: a new name, without a full stop.

    Raises:
        ValueError: if the name is in use or not allowed, or no layer can be selected, or a selected layer is tied to
            one that is not; the model is as it was.
    """
    config = config or CoeffConfig()
    check_new_adapter_name(model, adapter_name)
    layers = [layer for part in denoisers(model).values() for layer in select_layers(part, config).values()]
    _check_ties(model, layers)
    wrap_layers(layers, adapter_name, config)
    _activate(model, {adapter_name: 1.0})


def coeff_parameters(model: Any, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The Delta parameters, (H, H) float32 each, of one adapter or of all: what an optimizer is given.

    Coefficients tied over several layers are one parameter.

    Raises:
        ValueError: if there is no such adapter.
    """
    names = list_coeff_adapters(model) if adapter_name is None else [adapter_name]
    check_known(model, names)
    return [p.coeff[name] for p in coeff_processors(model) for name in names if name in p.coeff]


def set_coeff_adapters(
    model: Any,
    adapter_names: str | Sequence[str],
    adapter_weights: float | Sequence[float] = 1.0,
) -> None:
    """Makes these adapters the active ones: `alpha = I + sum_k weight_k Delta_k`.

    Args:
        model: a diffusers model or a pipeline.
        adapter_names: one name, or several.
        adapter_weights: one finite number for all, or one for each. Negative and above one are allowed; where all are
            0 the base model runs, bit for bit.

    Raises:
        ValueError: for an unknown name, one named twice, or weights that do not fit; nothing is changed.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    check_known(model, names)
    if len(set(names)) < len(names):
        raise ValueError(f"adapters are named twice in {names}")
    weights = list(adapter_weights) if isinstance(adapter_weights, Iterable) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapters {names} need as many weights, got {len(weights)}: {weights}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"adapter_weights must be finite, got {weights}")
    _activate(model, dict(zip(names, map(float, weights))))


def list_coeff_adapters(model: Any) -> list[str]:
    """The names of all adapters on `model`, in the order they were added; empty if there are none."""
    return list(dict.fromkeys(name for p in coeff_processors(model) for name in p.coeff))


def get_active_coeff_adapters(model: Any) -> dict[str, float]:
    """Name -> weight of the active adapters."""
    active: dict[str, float] = {}
    for processor in coeff_processors(model):
        active.update(processor.adapter_weights)
    return active


def delete_coeff_adapters(model: Any, adapter_names: str | Sequence[str]) -> None:
    """Deletes these adapters; layers left with none get their own processor back.

    Others do not become active in their place: [`set_coeff_adapters`] chooses what is.

    Raises:
        ValueError: for an unknown name; nothing is changed.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    check_known(model, names)
    for processor in coeff_processors(model):
        for name in names:
            if name in processor.coeff:
                processor.delete_adapter(name)
    for layer in _wrapped_layers(model):
        if not layer.processor.coeff:
            set_processor(layer, layer.processor.processor)


@contextmanager
def coeff_disabled(model: Any) -> Iterator[None]:
    """Inside, `model` is the base model, bit for bit; afterwards as before.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    check_known(model, [])
    before = [(processor, processor.enabled) for processor in coeff_processors(model)]
    try:
        for processor, _ in before:
            processor.enabled = False
        yield
    finally:
        for processor, enabled in before:
            processor.enabled = enabled


def unload_coeff_weights(model: Any) -> None:
    """Takes all coefficients off and puts the original processor objects back.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    check_known(model, [])
    for layer in _wrapped_layers(model):
        set_processor(layer, layer.processor.processor)


def denoisers(model: Any) -> dict[str, nn.Module]:
    """Component name -> model: the denoisers of a pipeline, or the one that `model` is.

    Raises:
        ValueError: if a pipeline has no denoiser.
        TypeError: if `model` is neither a pipeline nor a module.
    """
    if isinstance(model, nn.Module):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        return {"unet" if "UNet" in type(model).__name__ else "transformer": model}
    if not hasattr(model, "components"):
        raise TypeError(f"model must be a diffusers model or pipeline, got {type(model).__name__}")
    parts = {
        name: extract_model_from_parallel(part, keep_torch_compile=False)
        for name, part in model.components.items()
        if name.startswith(("unet", "transformer")) and isinstance(part, nn.Module)
    }
    if not parts:
        raise ValueError(f"{type(model).__name__} has no unet or transformer; it has {sorted(model.components)}")
    return parts


def coeff_processors(model: Any) -> list[CoeffAttnProcessor]:
    """Every `CoeffAttnProcessor` of `model`, once each."""
    return list(dict.fromkeys(layer.processor for layer in _wrapped_layers(model)))


def wrap_layers(layers: Sequence[Any], adapter_name: str, config: CoeffConfig) -> None:
    """Gives each layer Delta = 0 under a name that is new on it."""
    for layer in layers:
        if not isinstance(layer.processor, CoeffAttnProcessor):
            wrapper = CoeffAttnProcessor(head_count(layer), layer.processor).to(device_of(layer))
            wrapper.delete_adapter(DEFAULT_ADAPTER)
            set_processor(layer, wrapper)
    for processor in dict.fromkeys(layer.processor for layer in layers):
        processor.add_adapter(adapter_name, config)


def set_processor(layer: Any, processor: Any) -> None:
    """`layer.processor = processor`, also from a Module to a plain object and on layers without `set_processor`."""
    layer._modules.pop("processor", None)
    layer.processor = processor


def check_new_adapter_name(model: Any, adapter_name: str) -> None:
    """Raises ValueError if the name is in use on `model` or cannot be used."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(
            "adapter_name must not be empty, hold a full stop or be the name of a method of torch's ParameterDict, "
            f"got {adapter_name!r}"
        )
    names = list_coeff_adapters(model)
    if adapter_name in names:
        raise ValueError(
            f"adapter {adapter_name!r} is in use (there are {names}): choose another adapter_name, or "
            f"delete_coeff_adapters(model, {adapter_name!r}) first; load_coeff_weights(..., hotswap=True) replaces it"
        )


def _check_ties(model: Any, layers: Sequence[Any]) -> None:
    """Raises ValueError if one of `layers` shares its coefficients with a layer that is not among them."""
    chosen, wrapped = {id(layer) for layer in layers}, _wrapped_layers(model)
    tied = {id(layer.processor) for layer in wrapped if id(layer) in chosen}
    left_out = sum(id(layer.processor) in tied and id(layer) not in chosen for layer in wrapped)
    if left_out:
        raise ValueError(
            f"the selected layers share a CoeffAttnProcessor with {left_out} that are not selected, which would get "
            "the adapter too; select all of them, or unload_coeff_weights(model) first"
        )


def _wrapped_layers(model: Any) -> list[Any]:
    layers = [layer for part in denoisers(model).values() for layer in attention_layers(part).values()]
    return [layer for layer in layers if isinstance(layer.processor, CoeffAttnProcessor)]


def _activate(model: Any, weights: dict[str, float]) -> None:
    for processor in coeff_processors(model):
        processor.adapter_weights = {name: w for name, w in weights.items() if name in processor.coeff}


def check_known(model: Any, names: Sequence[str]) -> None:
    """Raises ValueError if `model` has no coefficients, or one of `names` is no adapter of it."""
    known = list_coeff_adapters(model)
    if not known:
        raise ValueError(f"{type(model).__name__} has no coefficients: add_coeff_adapter or load_coeff_weights first")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no adapter {unknown}; it has {known}")
