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

from .coefficients import LayerCoefficients
from .config import CoeffConfig
from .files import check_text
from .guard import put_on, take_off
from .layers import accelerator_of, check_softmax, head_count, matches, processor_name, select_layers
from .processor import CoeffAttnProcessor
from .record import GUARD, known_record, model_record, module_at, remove_record
from .text import is_text_encoder, use_coefficients

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

    Until it is trained the adapter changes nothing. Its parameters are float32 and require a gradient; they are no
    parameters of the model, whose own are left as they are.

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
    layers = {
        f"{name}.{path}": layer for name, part in parts.items() for path, layer in select_layers(part, config).items()
    }
    _check_ties(model, layers.values())
    wrap_layers(model, layers, adapter_name, config)
    _activate(model, find_layers(model)[0], {adapter_name: 1.0})


def coeff_parameters(model: Any, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The Delta parameters, (H, H) float32 each, of one adapter or of all: what an optimizer is given.

    They are not among `model.parameters()`: what averages gradients over processes, or sets them to zero by the model,
    must be given them, too. Coefficients tied over several layers are one parameter. On an accelerator, they are moved
    there.

    Raises:
        ValueError: if there is no such adapter.
    """
    names = list_coeff_adapters(model) if adapter_name is None else [adapter_name]
    known = known_coefficients(model, names)
    for part in components(model).values():
        if record := known_record(part):
            record.move(part)
    return [layer.coeff[name] for layer in known for name in names if name in layer.coeff]


def set_coeff_adapters(
    model: Any,
    adapter_names: str | Sequence[str],
    adapter_weights: Weight | Sequence[Weight] = 1.0,
) -> None:
    """Makes these adapters the active ones: `alpha = I + sum_k weight_k Delta_k`.

    A weight may be given by layer, as shell-style patterns on module paths or on their ends (as in [`CoeffConfig`]):
    `{"up_blocks.*": 0.5, "attn2": 0.0}`. Where several match, the last counts; a layer that none matches has weight 1.

    Where the host has put other processors in the place of those with the coefficients (`load_ip_adapter`,
    `fuse_qkv_projections`, ...), or other modules (`enable_free_noise`), the coefficients are put on the new ones.

    Args:
        model: a diffusers model or a pipeline.
        adapter_names: one name, or several.
        adapter_weights: one weight for all, or one for each. Negative and above one are allowed; where all are 0 the
            base model runs, bit for bit.

    Raises:
        ValueError: for an unknown name, one named twice, weights that do not fit, a pattern that matches no layer of
            the adapter, a new processor that computes its own softmax, or a layer that is gone; nothing is changed.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    held, lost = find_layers(model)
    paths = _coefficients(held) | {path: coefficients for path, (_, coefficients) in lost.items()}
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
    if lost:
        _put_back(model, lost)
        held, _ = find_layers(model)
    _activate(model, held, {name: by_layer.get(name, weight) for name, weight in zip(names, weights)})


@contextmanager
def coeff_adapters(
    model: Any, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = 1.0
) -> Iterator[None]:
    """Inside, these adapters are the active ones, as [`set_coeff_adapters`] says; afterwards those from before."""
    before = [(layer, layer.adapter_weights) for layer in layer_coefficients(model)]
    set_coeff_adapters(model, adapter_names, adapter_weights)
    try:
        yield
    finally:
        for layer, weights in before:
            layer.adapter_weights = {name: weights[name] for name in weights if name in layer.coeff}


def list_coeff_adapters(model: Any) -> list[str]:
    """The names of all adapters on `model`, in the order they were added; empty if there are none."""
    return list(dict.fromkeys(name for layer in layer_coefficients(model) for name in layer.coeff))


def get_active_coeff_adapters(model: Any) -> dict[str, Weight]:
    """Name -> weight of the active adapters, in the form that [`set_coeff_adapters`] takes.

    Where layers differ, the weight is a dict from each layer's path to its own.
    """
    active: dict[str, dict[str, float]] = {}
    for path, coefficients in _coefficients(find_layers(model)[0]).items():
        for name, weight in coefficients.adapter_weights.items():
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
    for layer in known_coefficients(model, names):
        for name in names:
            if name in layer.coeff:
                layer.delete_adapter(name)
    _unwrap(model, {path: layer for path, layer in find_layers(model)[0].items() if not layer.processor.coeff})


@contextmanager
def coeff_disabled(model: Any) -> Iterator[None]:
    """Inside, `model` is the base model, bit for bit; afterwards as before.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    before = [(layer, layer.enabled) for layer in _held_or_lost(model)]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def disable_coeff_adapters(model: Any) -> None:
    """Makes `model` the base model, bit for bit, until [`enable_coeff_adapters`].

    Raises:
        ValueError: if `model` has no coefficients.
    """
    for layer in _held_or_lost(model):
        layer.enabled = False


def enable_coeff_adapters(model: Any) -> None:
    """Undoes [`disable_coeff_adapters`]: the active adapters take part again.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    for layer in _held_or_lost(model):
        layer.enabled = True


def unload_coeff_weights(model: Any) -> None:
    """Takes all coefficients off and puts the original processor objects back.

    Processors that the host has put in their place since stay.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    held, lost = find_layers(model)
    if not held and not lost:
        known_coefficients(model)
    _unwrap(model, held | {path: layer for path, (layer, _) in lost.items()})


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


def layer_coefficients(model: Any) -> list[LayerCoefficients]:
    """The coefficients of every layer of `model` that has some; once each, if they are tied.

    Raises:
        ValueError: if some layers lost them to other processors, or are other modules by now.
    """
    held, lost = find_layers(model)
    if lost:
        lines = [f"  {path} ({now(layer)})" for path, (layer, _) in lost.items()]
        raise ValueError(
            f"the processors of {len(lines)} layers with coefficients were replaced, as load_ip_adapter, "
            "fuse_qkv_projections, set_attn_processor, enable_free_noise and their like do. Either "
            "set_coeff_adapters(model, names), which puts the coefficients on the new ones, or "
            "unload_coeff_weights(model):\n" + "\n".join(lines[:10])
        )
    return list(dict.fromkeys(_coefficients(held).values()))


def _held_or_lost(model: Any) -> list[LayerCoefficients]:
    held, lost = find_layers(model)
    layers = [*_coefficients(held).values(), *(coefficients for _, coefficients in lost.values())]
    _check_names(model, (), layers)
    return layers


def now(layer: Any) -> str:
    """What a layer has in the place of its coefficients."""
    return "no longer there" if layer is None else f"now {processor_name(layer)}"


def find_layers(model: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, LayerCoefficients]]]:
    """`component.path` -> layer, of those with coefficients; and of those that lost them, with what they lost.

    A walk of its own, for `named_modules` takes longer than a switch of adapters should.
    """
    held: dict[str, Any] = {}
    lost: dict[str, tuple[Any, LayerCoefficients]] = {}
    seen = set()
    parts = components(model)
    todo: list[tuple[str, Any]] = list(parts.items())[::-1]
    while todo:
        path, module = todo.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        own = vars(module)
        children, guard = own["_modules"], own.get(GUARD)
        processor = children.get("processor") or own.get("processor")
        if isinstance(processor, CoeffAttnProcessor) and (guard is None or guard.guards(processor)):
            held[path] = module
        elif guard is not None:
            lost[path] = module, guard.coefficients
        todo.extend((f"{path}.{name}", children[name]) for name in reversed(children) if name != "processor")
    for component, part in parts.items():
        if record := known_record(part):
            for path, coefficients in record.rebuilt(part).items():
                lost[f"{component}.{path}"] = module_at(part, path), coefficients
    return held, lost


def wrap_layers(model: Any, layers: Mapping[str, Any], adapter_name: str, config: CoeffConfig) -> None:
    """Gives each layer of `model`, `component.path` -> layer, Delta = 0 under a name that is new on it."""
    parts, chosen = components(model), {}
    for path, layer in layers.items():
        processor = getattr(layer, "processor", None)
        if isinstance(processor, CoeffAttnProcessor):
            coefficients = processor.coefficients
        else:
            coefficients = LayerCoefficients(head_count(layer))
        component, _, inner = path.partition(".")
        put_on(parts[component], inner, layer, coefficients)
        chosen[coefficients] = accelerator_of(layer)
    for coefficients, device in chosen.items():
        coefficients.add_adapter(adapter_name, config)
        if device is not None:
            coefficients.move(device)
    _choose_attention_functions(model)


def _put_back(model: Any, lost: Mapping[str, tuple[Any, LayerCoefficients]]) -> None:
    """Puts the coefficients that layers have lost on the processors, or modules, that there are now."""
    gone = [path for path, (layer, c) in lost.items() if layer is None or head_count(layer) != c.num_heads]
    if gone:
        raise ValueError(
            f"these layers with coefficients are gone, or have another number of heads by now: {gone[:10]}; "
            "unload_coeff_weights(model)"
        )
    check_softmax({path: layer for path, (layer, _) in lost.items()})
    parts = components(model)
    for path, (layer, coefficients) in lost.items():
        component, _, inner = path.partition(".")
        put_on(parts[component], inner, layer, coefficients)


def _unwrap(model: Any, layers: Mapping[str, Any]) -> None:
    """Gives layers their own processor back, unless they have another by now, and forgets their coefficients."""
    parts = components(model)
    for path, layer in layers.items():
        if layer is not None:
            take_off(layer)
        component, _, inner = path.partition(".")
        record = known_record(parts[component])
        if record is not None:
            record.layers.pop(inner, None)
    _choose_attention_functions(model)
    held = find_layers(model)[0]
    for component, part in parts.items():
        if not any(path.startswith(f"{component}.") for path in held):
            remove_record(part)


def _choose_attention_functions(model: Any) -> None:
    for part in components(model).values():
        if is_text_encoder(part):
            use_coefficients(part, bool(find_layers(part)[0]))


def _chosen_parts(model: Any, names: str | Sequence[str]) -> dict[str, nn.Module]:
    parts, chosen = components(model), [names] if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in parts]
    if unknown or not chosen:
        raise ValueError(f"components must name some of {sorted(parts)}, got {chosen}")
    return {name: parts[name] for name in chosen}


def check_new_adapter_name(model: Any, adapter_name: str) -> None:
    """Raises ValueError if the name is in use on `model` or cannot be used."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must not be empty or hold a full stop, got {adapter_name!r}")
    check_text(adapter_name, "adapter_name")
    known = layer_coefficients(model)
    if not all(layer.enabled for layer in known):
        raise ValueError(
            "coefficients are disabled, and a new adapter would be too: enable_coeff_adapters(model) first"
        )
    if any(adapter_name in layer.coeff for layer in known):
        raise ValueError(
            f"adapter {adapter_name!r} is in use (there are {list_coeff_adapters(model)}): choose another "
            f"adapter_name, or delete_coeff_adapters(model, {adapter_name!r}) first; "
            "load_coeff_weights(..., hotswap=True) replaces its values"
        )


def _check_ties(model: Any, layers: Iterable[Any]) -> None:
    """Raises ValueError if one of `layers` shares its coefficients with a layer that is not among them."""
    chosen, held = set(layers), find_layers(model)[0].values()
    tied = {layer.processor.coefficients for layer in held if layer in chosen}
    left_out = sum(layer.processor.coefficients in tied and layer not in chosen for layer in held)
    if left_out:
        raise ValueError(
            f"the selected layers share a CoeffAttnProcessor with {left_out} that are not selected, which would get "
            "the adapter too; select all of them, or unload_coeff_weights(model) first"
        )


def _coefficients(held: Mapping[str, Any]) -> dict[str, LayerCoefficients]:
    return {path: layer.processor.coefficients for path, layer in held.items()}


def _by_layer(
    paths: Mapping[str, LayerCoefficients], name: str, patterns: Mapping[str, float]
) -> dict[LayerCoefficients, float]:
    """Coefficients -> the weight that the last pattern matching their path says, 1 where none matches."""
    paths = {path: coefficients for path, coefficients in paths.items() if name in coefficients.coeff}
    idle = [pattern for pattern in patterns if not any(matches(path, pattern) for path in paths)]
    if idle:
        raise ValueError(
            f"the patterns {idle} match none of the {len(paths)} layers of adapter {name!r}, of which the first is "
            f"{next(iter(paths))!r}"
        )
    chosen: dict[LayerCoefficients, float] = {}
    for path, coefficients in paths.items():
        weight = [1.0, *(float(weight) for pattern, weight in patterns.items() if matches(path, pattern))][-1]
        if chosen.setdefault(coefficients, weight) != weight:
            raise ValueError(f"{path} is tied to layers of weight {chosen[coefficients]}, and cannot have {weight}")
    return chosen


def _activate(
    model: Any, held: Mapping[str, Any], weights: Mapping[str, float | Mapping[LayerCoefficients, float]]
) -> None:
    components_held = {path.partition(".")[0] for path in held}
    records = {name: model_record(part) for name, part in components(model).items() if name in components_held}
    for path, coefficients in _coefficients(held).items():
        coefficients.record = records[path.partition(".")[0]]
        coefficients.adapter_weights = {
            name: float(weight[coefficients] if isinstance(weight, Mapping) else weight)
            for name, weight in weights.items()
            if name in coefficients.coeff
        }


def known_coefficients(model: Any, names: Sequence[str] = ()) -> list[LayerCoefficients]:
    """As [`layer_coefficients`], of a model that has these adapters, and at least one.

    Raises:
        ValueError: otherwise.
    """
    found = layer_coefficients(model)
    _check_names(model, names, found)
    return found


def _check_names(model: Any, names: Sequence[str], layers: Iterable[LayerCoefficients]) -> None:
    known = dict.fromkeys(name for layer in layers for name in layer.configs)
    if not known:
        raise ValueError(f"{type(model).__name__} has no coefficients: add_coeff_adapter or load_coeff_weights first")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no adapter {unknown}; it has {list(known)}")
