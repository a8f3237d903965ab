"""Coefficients on a model or a pipeline: put on, choose, weigh, disable, take off.

`model` is a diffusers model, or a pipeline: its denoisers (`unet`, `transformer`, `transformer_2`, ...) get
coefficients, its text encoders and ControlNets where they are asked for. A text encoder can be `model`, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from .call_scale import call_scale, remove_call_scale
from .config import CoeffConfig
from .layers import check_softmax, device_of, head_count, matches, processor_name, select_layers
from .processor import CoeffAttnProcessor
from .text import IMPLEMENTATION, SdpaAttention, is_text_encoder, use_coefficients

DEFAULT_ADAPTER = "default"
Weight = float | Mapping[str, float]  # of all layers, or of those that a pattern matches


def add_coeff_adapter(
    model: Any,
    config: CoeffConfig | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    components: str | Sequence[str] | None = None,
) -> None:
    """Adds coefficients Delta = 0 to the attention layers that `config` selects, and makes them the active adapter.

    Until it is trained the adapter changes nothing. Its parameters are float32, on the device of their layer, and
    require a gradient; the flags of all other parameters are left as they are. peft's `add_adapter` freezes what it
    finds: call it before.

    Args:
        model: a diffusers model or a pipeline.
        config: which layers, and the dropout in training. `None` takes every layer.
        adapter_name: a new name, without a full stop.
        components: of a pipeline, the names of its components to take: `("unet", "text_encoder")`. `None` takes its
            denoisers.

    Raises:
        ValueError: if the name is in use or not allowed, a component is unknown, no layer can be selected, or a
            selected layer is tied to one that is not; the model is as it was.
    """
    config = config or CoeffConfig()
    check_new_adapter_name(model, adapter_name)
    parts = denoisers(model) if components is None else _chosen_parts(model, components)
    layers = [layer for part in parts.values() for layer in select_layers(part, config).values()]
    _check_ties(model, layers)
    wrap_layers(model, layers, adapter_name, config)
    _activate(_by_part(model, _walk(model)[0]), {adapter_name: 1.0})


def coeff_parameters(model: Any, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The Delta parameters, (H, H) float32 each, of one adapter or of all: what an optimizer is given.

    Coefficients tied over several layers are one parameter.

    Raises:
        ValueError: if there is no such adapter.
    """
    names = list_coeff_adapters(model) if adapter_name is None else [adapter_name]
    return [p.coeff[name] for p in known_processors(model, names) for name in names if name in p.coeff]


def set_coeff_adapters(
    model: Any,
    adapter_names: str | Sequence[str],
    adapter_weights: Weight | Sequence[Weight] = 1.0,
) -> None:
    """Makes these adapters the active ones: `alpha = I + sum_k weight_k Delta_k`.

    A weight may be given by layer, as shell-style patterns on module paths or on their ends (as in [`CoeffConfig`]):
    `{"up_blocks.*": 0.5, "attn2": 0.0}`. Where several match, the last counts; a layer that none matches has weight 1.

    Where the host has put other processors in the place of those with the coefficients (`load_ip_adapter`,
    `fuse_qkv_projections`, ...), the coefficients are put on the new ones.

    Args:
        model: a diffusers model or a pipeline.
        adapter_names: one name, or several.
        adapter_weights: one weight for all, or one for each. Negative and above one are allowed; where all are 0 the
            base model runs, bit for bit.

    Raises:
        ValueError: for an unknown name, one named twice, weights that do not fit, a pattern that matches no layer of
            the adapter, or a new processor that computes its own softmax; nothing is changed.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    wrapped, replaced = _walk(model)
    paths = _processors(wrapped) | {path: _recorded(layer) for path, layer in replaced.items()}
    _check_names(model, names, paths.values())
    if len(set(names)) < len(names):
        raise ValueError(f"adapters are named twice in {names}")
    several = isinstance(adapter_weights, Iterable) and not isinstance(adapter_weights, Mapping)
    weights: list[Any] = list(adapter_weights) if several else [adapter_weights] * len(names)  # type: ignore[arg-type]
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapters {names} need as many weights, got {len(weights)}: {weights}")
    numbers = [n for weight in weights for n in (weight.values() if isinstance(weight, Mapping) else [weight])]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"adapter_weights must be finite, got {weights}")
    by_layer = {name: _by_layer(paths, name, w) for name, w in zip(names, weights) if isinstance(w, Mapping)}
    if replaced:
        _put_back(model, replaced)
        wrapped, _ = _walk(model)
    _activate(_by_part(model, wrapped), {name: by_layer.get(name, weight) for name, weight in zip(names, weights)})


@contextmanager
def coeff_adapters(
    model: Any, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = 1.0
) -> Iterator[None]:
    """Inside, these adapters are the active ones, as [`set_coeff_adapters`] says; afterwards those from before."""
    before = [(processor, processor.adapter_weights) for processor in coeff_processors(model)]
    set_coeff_adapters(model, adapter_names, adapter_weights)
    try:
        yield
    finally:
        for processor, weights in before:
            processor.adapter_weights = {name: weights[name] for name in weights if name in processor.coeff}


def list_coeff_adapters(model: Any) -> list[str]:
    """The names of all adapters on `model`, in the order they were added; empty if there are none."""
    return list(dict.fromkeys(name for p in coeff_processors(model) for name in p.coeff))


def get_active_coeff_adapters(model: Any) -> dict[str, Weight]:
    """Name -> weight of the active adapters, in the form that [`set_coeff_adapters`] takes.

    Where layers differ, the weight is a dict from each layer's path to its own.
    """
    active: dict[str, dict[str, float]] = {}
    for path, processor in _wrapped_paths(model).items():
        for name, weight in processor.adapter_weights.items():
            active.setdefault(name, {})[path] = weight
    return {
        name: weights if len(set(weights.values())) > 1 else next(iter(weights.values()))
        for name, weights in active.items()
    }


def delete_coeff_adapters(model: Any, adapter_names: str | Sequence[str]) -> None:
    """Deletes these adapters; layers left with none get their own processor back.

    Others do not become active in their place: [`set_coeff_adapters`] chooses what is.

    Raises:
        ValueError: for an unknown name; nothing is changed.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for processor in known_processors(model, names):
        for name in names:
            if name in processor.coeff:
                processor.delete_adapter(name)
    _unwrap(model, [layer for layer in _wrapped_layers(model) if not layer.processor.coeff])


@contextmanager
def coeff_disabled(model: Any) -> Iterator[None]:
    """Inside, `model` is the base model, bit for bit; afterwards as before.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    before = [(processor, processor.enabled) for processor in known_processors(model)]
    try:
        for processor, _ in before:
            processor.enabled = False
        yield
    finally:
        for processor, enabled in before:
            processor.enabled = enabled


def disable_coeff_adapters(model: Any) -> None:
    """Makes `model` the base model, bit for bit, until [`enable_coeff_adapters`].

    Raises:
        ValueError: if `model` has no coefficients.
    """
    for processor in known_processors(model):
        processor.enabled = False


def enable_coeff_adapters(model: Any) -> None:
    """Undoes [`disable_coeff_adapters`]: the active adapters take part again.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    for processor in known_processors(model):
        processor.enabled = True


def unload_coeff_weights(model: Any) -> None:
    """Takes all coefficients off and puts the original processor objects back.

    Processors that the host has put in their place since stay.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    layers = [*_wrapped_layers(model), *replaced_layers(model).values()]
    if not layers:
        known_processors(model)
    _unwrap(model, layers)


def components(model: Any) -> dict[str, nn.Module]:
    """Component name -> model: all of a pipeline that may have coefficients, or the one that `model` is.

    Raises:
        TypeError: if `model` is neither a pipeline nor a module.
    """
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
        name = type(model).__name__
        if is_text_encoder(model):
            return {"text_encoder": model}
        return {"unet" if "UNet" in name else "controlnet" if "ControlNet" in name else "transformer": model}
    if not hasattr(model, "components"):
        raise TypeError(f"model must be a diffusers model or pipeline, got {type(model).__name__}")
    parts = {name: _unwrapped(part) for name, part in model.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if ".autoencoders." not in type(part).__module__}


def denoisers(model: Any) -> dict[str, nn.Module]:
    """Component name -> model: the denoisers of a pipeline, or the one that `model` is.

    Raises:
        ValueError: if a pipeline has no denoiser.
        TypeError: if `model` is neither a pipeline nor a module.
    """
    parts = components(model)
    if isinstance(model, nn.Module):
        return parts
    names = ("unet", "transformer", "prior", "decoder")  # with a number or a name behind it
    found = {name: part for name, part in parts.items() if name.startswith(names) and not is_text_encoder(part)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no unet or transformer; it has {sorted(model.components)}")
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    from diffusers import ModelMixin  # imports transformers
    from transformers import PreTrainedModel

    if issubclass(type(model), (ModelMixin, PreTrainedModel)):
        return model  # accelerate would walk all of its modules to find that out
    unwrapped: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return unwrapped


def coeff_processors(model: Any) -> list[CoeffAttnProcessor]:
    """Every `CoeffAttnProcessor` of `model`, once each.

    Raises:
        ValueError: if some of them were replaced by other processors.
    """
    wrapped, replaced = _walk(model)
    if replaced:
        lines = [f"  {path} (now {processor_name(layer)})" for path, layer in replaced.items()]
        raise ValueError(
            f"the processors of {len(lines)} layers with coefficients were replaced, as load_ip_adapter, "
            "fuse_qkv_projections, set_attn_processor and their like do. Either set_coeff_adapters(model, names), "
            "which puts the coefficients on the new ones, or unload_coeff_weights(model):\n" + "\n".join(lines[:10])
        )
    return list(dict.fromkeys(layer.processor for layer in wrapped.values()))


def replaced_layers(model: Any) -> dict[str, Any]:
    """`component.path` -> attention module, of those that lost the processor with their coefficients."""
    return _walk(model)[1]


def wrap_layers(model: Any, layers: Sequence[Any], adapter_name: str, config: CoeffConfig) -> None:
    """Gives each layer of `model` Delta = 0 under a name that is new on it."""
    for layer in layers:
        processor = getattr(layer, "processor", None)
        if not isinstance(processor, CoeffAttnProcessor):
            wrapper = CoeffAttnProcessor(head_count(layer), processor or SdpaAttention()).to(device_of(layer))
            wrapper.delete_adapter(DEFAULT_ADAPTER)
            set_processor(layer, wrapper)
        if _RECORD not in vars(layer):
            vars(layer)[_RECORD] = (layer.processor, layer.register_forward_pre_hook(_refuse_replaced))
    for processor in dict.fromkeys(layer.processor for layer in layers):
        processor.add_adapter(adapter_name, config)
    _choose_attention_functions(model)


def set_processor(layer: Any, processor: Any) -> None:
    """`layer.processor = processor`, also from a Module to a plain object and on layers without `set_processor`."""
    layer._modules.pop("processor", None)
    layer.processor = processor


# What a layer was given is written down on the layer itself, out of sight of `named_modules` and `state_dict`: it goes
# with copies and pickles of the model, and ends with it.
_RECORD = "_coeff_record"


def _recorded(layer: Any) -> Any:
    return vars(layer)[_RECORD][0]


def _refuse_replaced(layer: Any, args: Any) -> None:
    """Before each forward pass of a layer with coefficients: they must still be there."""
    processor = getattr(layer, "processor", None)
    if not isinstance(processor, CoeffAttnProcessor):  # of whatever copy of the model
        raise RuntimeError(
            f"the processor with this layer's coefficients was replaced by {type(processor).__name__}; "
            "set_coeff_adapters(model, names) puts the coefficients on it, unload_coeff_weights(model) gives them up"
        )
    chosen = getattr(getattr(layer, "config", None), "_attn_implementation", None)
    if isinstance(processor.processor, SdpaAttention) and chosen != IMPLEMENTATION:
        raise RuntimeError(
            f"the attention function was set to {chosen!r}, where coefficients take no part; call "
            f"set_attn_implementation({IMPLEMENTATION!r}), or unload_coeff_weights(model)"
        )


def _put_back(model: Any, replaced: Mapping[str, Any]) -> None:
    """Puts the coefficients that layers have lost on the processors that they have now."""
    check_softmax(dict(replaced))
    new: dict[Any, Any] = {layer.processor: layer.processor.processor for layer in _wrapped_layers(model)}
    if any(new.setdefault(_recorded(layer), layer.processor) is not layer.processor for layer in replaced.values()):
        raise ValueError("coefficients tied over several layers cannot be put on different processors")
    for layer in replaced.values():
        wrapper, processor = _recorded(layer), layer.processor
        if wrapper.processor is not processor:
            wrapper.wrap(processor)
        set_processor(layer, wrapper)


def _unwrap(model: Any, layers: Sequence[Any]) -> None:
    """Gives layers their own processor back, unless they have another by now, and forgets their coefficients."""
    for layer in layers:
        if isinstance(layer.processor, CoeffAttnProcessor):
            own = layer.processor.processor
            set_processor(layer, own)
            if isinstance(own, SdpaAttention):
                del layer.processor
        _, hook = vars(layer).pop(_RECORD, (None, None))
        if hook is not None:
            hook.remove()
    _choose_attention_functions(model)
    still = _by_part(model, _walk(model)[0])
    for part in components(model).values():
        if part not in still:
            remove_call_scale(part)


def _choose_attention_functions(model: Any) -> None:
    for part in components(model).values():
        if is_text_encoder(part):
            use_coefficients(part, bool(_wrapped_layers(part)))


def _chosen_parts(model: Any, names: str | Sequence[str]) -> dict[str, nn.Module]:
    parts, chosen = components(model), [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in parts]
    if unknown or not chosen:
        raise ValueError(f"components must name some of {sorted(parts)}, got {chosen}")
    return {name: parts[name] for name in chosen}


def check_new_adapter_name(model: Any, adapter_name: str) -> None:
    """Raises ValueError if the name is in use on `model` or cannot be used."""
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(
            "adapter_name must not be empty, hold a full stop or be the name of a method of torch's ParameterDict, "
            f"got {adapter_name!r}"
        )
    if any(not processor.enabled for processor in coeff_processors(model)):
        raise ValueError(
            "coefficients are disabled, and a new adapter would be too: enable_coeff_adapters(model) first"
        )
    if any(adapter_name in processor.coeff for processor in coeff_processors(model)):
        raise ValueError(
            f"adapter {adapter_name!r} is in use (there are {list_coeff_adapters(model)}): choose another "
            f"adapter_name, or delete_coeff_adapters(model, {adapter_name!r}) first; "
            "load_coeff_weights(..., hotswap=True) replaces its values"
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
    return list(_walk(model)[0].values())


def _wrapped_paths(model: Any) -> dict[str, CoeffAttnProcessor]:
    return _processors(_walk(model)[0])


def _processors(wrapped: Mapping[str, Any]) -> dict[str, CoeffAttnProcessor]:
    return {path: layer.processor for path, layer in wrapped.items()}


def _walk(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Component and module path -> layer: those with coefficients, and those that lost them to another processor.

    A walk of its own, for `named_modules` takes longer than a switch of adapters should.
    """
    wrapped, replaced, seen = {}, {}, set()
    todo: list[tuple[str, Any]] = list(components(model).items())[::-1]
    while todo:
        path, module = todo.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        children = module._modules
        if isinstance(children.get("processor"), CoeffAttnProcessor):
            wrapped[path] = module
        if _RECORD in vars(module) and getattr(module, "processor", None) is not _recorded(module):
            replaced[path] = module
        todo.extend((f"{path}.{name}", children[name]) for name in reversed(children) if name != "processor")
    return wrapped, replaced


def _by_layer(
    processors: Mapping[str, CoeffAttnProcessor], name: str, patterns: Mapping[str, float]
) -> dict[CoeffAttnProcessor, float]:
    """Processor -> the weight that the last pattern matching its path says, 1 where none matches."""
    paths = {path: processor for path, processor in processors.items() if name in processor.coeff}
    idle = [pattern for pattern in patterns if not any(matches(path, pattern) for path in paths)]
    if idle:
        raise ValueError(
            f"the patterns {idle} match none of the {len(paths)} layers of adapter {name!r}, of which the first is "
            f"{next(iter(paths))!r}"
        )
    chosen: dict[CoeffAttnProcessor, float] = {}
    for path, processor in paths.items():
        weight = [1.0, *(float(weight) for pattern, weight in patterns.items() if matches(path, pattern))][-1]
        if chosen.setdefault(processor, weight) != weight:
            raise ValueError(f"{path} is tied to layers of weight {chosen[processor]}, and cannot have {weight}")
    return chosen


def _activate(
    processors: Mapping[nn.Module, list[CoeffAttnProcessor]],
    weights: Mapping[str, float | Mapping[CoeffAttnProcessor, float]],
) -> None:
    for part, of_part in processors.items():
        scale = call_scale(part)
        for processor in of_part:
            processor.call_scale = scale
            processor.adapter_weights = {
                name: float(weight[processor] if isinstance(weight, Mapping) else weight)
                for name, weight in weights.items()
                if name in processor.coeff
            }


def known_processors(model: Any, names: Sequence[str] = ()) -> list[CoeffAttnProcessor]:
    """As [`coeff_processors`], of a model that has these adapters, and at least one.

    Raises:
        ValueError: otherwise.
    """
    processors = coeff_processors(model)
    _check_names(model, names, processors)
    return processors


def _check_names(model: Any, names: Sequence[str], processors: Iterable[CoeffAttnProcessor]) -> None:
    known = dict.fromkeys(name for processor in processors for name in processor.configs)
    if not known:
        raise ValueError(f"{type(model).__name__} has no coefficients: add_coeff_adapter or load_coeff_weights first")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no adapter {unknown}; it has {list(known)}")


def _by_part(model: Any, wrapped: Mapping[str, Any]) -> dict[nn.Module, list[CoeffAttnProcessor]]:
    """The processors of each component that has some."""
    found: dict[str, dict[CoeffAttnProcessor, None]] = {}
    for path, layer in wrapped.items():
        found.setdefault(path.partition(".")[0], {})[layer.processor] = None
    return {part: list(found[name]) for name, part in components(model).items() if name in found}
