"""Coefficients on a model or a pipeline: put on, choose, weigh, disable, take off.

`model` is a diffusers model, or a pipeline: its denoisers (`unet`, `transformer`, `transformer_2`, ...) get
coefficients, its text encoders and ControlNets where they are asked for. A text encoder can be `model`, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from . import running
from .choice import BASE, Choice, Weight, entered, entry_of
from .coefficients import LayerCoefficients
from .config import CoeffConfig
from .files import check_text
from .guard import Guard, put_on, set_processor, take_off
from .layers import accelerator_of, attention_layers, check_softmax, head_count, matches, processor_name, select_layers
from .processor import CoeffAttnProcessor
from .record import (
    GUARD,
    Attention,
    ModelRecord,
    begin_outside,
    hook_record,
    known_record,
    model_record,
    module_at,
    put_states,
    remove_record,
)
from .resolved import CHANGES, SWAP, Adapter
from .text import is_text_encoder, use_coefficients

DEFAULT_ADAPTER = "default"
WeightBy = float | Mapping[str, float]  # of all layers, or of those that a pattern matches


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
    with CHANGES:
        check_new_adapter_name(model, adapter_name)
        parts = denoisers(model) if components is None else _chosen_parts(model, components)
        selected = {name: select_layers(part, config) for name, part in parts.items()}
        layers = {f"{name}.{path}": layer for name, found in selected.items() for path, layer in found.items()}
        _check_ties(model, layers.values())
        put_adapter(model, layers, adapter_name, config)


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
    found = [layer.coeff[name] for layer in known for name in names if layer.has(name)]
    for part in components(model).values():
        if record := known_record(part):
            record.move(part)
    return found


def set_coeff_adapters(
    model: Any,
    adapter_names: str | Sequence[str],
    adapter_weights: WeightBy | Sequence[WeightBy] = 1.0,
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
    with CHANGES:
        choices = _choices(model, adapter_names, adapter_weights)
        put_states({record: record.having(record.state.adapters, choice) for record, choice in choices.items()})


@contextmanager
def coeff_adapters(
    model: Any, adapter_names: str | Sequence[str], adapter_weights: WeightBy | Sequence[WeightBy] = 1.0
) -> Iterator[None]:
    """Inside, these adapters are the active ones of this thread or asyncio task, as [`set_coeff_adapters`] says.

    Others do not see it. Contexts may be left in any order: each leaves the others as they are.

    Raises:
        ValueError: as [`set_coeff_adapters`], and if coefficients are disabled.
    """
    check_enabled(model)
    with CHANGES:
        choices = _choices(model, adapter_names, adapter_weights)
    with ExitStack() as leave:
        for record, choice in choices.items():
            record.entered = True
            leave.enter_context(entered(model, (record,), choice))
        yield


def _choices(
    model: Any, adapter_names: str | Sequence[str], adapter_weights: WeightBy | Sequence[WeightBy]
) -> dict[ModelRecord, Choice]:
    """What they come to for each of the model's records. Coefficients that layers have lost are put back."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    out_of_store(model, names)
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
    choices = {}
    for record in records_of(model):
        mixture: list[tuple[str, Weight]] = []
        for name, weight in zip(names, weights):
            if name in by_layer:
                mixture.append((name, tuple(by_layer[name].get(layer, 1.0) for layer in record.numbered)))
            else:
                mixture.append((name, float(weight)))
        choices[record] = Choice((tuple(pair for pair in mixture if pair[0] in record.state.adapters),))
    return choices


def list_coeff_adapters(model: Any) -> list[str]:
    """The names of all adapters on `model`, in the order they were added; empty if there are none."""
    layers = layer_coefficients(model)
    return list(dict.fromkeys(name for record in _records(layers) for name in record.state.adapters))


def get_active_coeff_adapters(model: Any) -> dict[str, WeightBy]:
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
    with CHANGES:
        known_coefficients(model, names)
        records = records_of(model)
        held = find_layers(model)[0]
        with all_or_nothing(model, held.values()):
            left = [
                {name: adapter for name, adapter in record.state.adapters.items() if name not in names}
                for record in records
            ]
            put_states({record: record.having(adapters) for record, adapters in zip(records, left)})
            empty = {path: layer for path, layer in held.items() if not layer.processor.coeff}
            _unwrap(model, {path: layer for path, layer in empty.items() if not _is_running(layer)})


@contextmanager
def coeff_disabled(model: Any) -> Iterator[None]:
    """Inside, `model` is the base model, bit for bit, for this thread or asyncio task; afterwards as before.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    records = tuple(records_of(model))
    for record in records:
        record.entered = True
    with entered(model, records, BASE):
        yield


def disable_coeff_adapters(model: Any) -> None:
    """Makes `model` the base model, bit for bit, until [`enable_coeff_adapters`]. Contexts and calls may choose still.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    _enable(model, False)


def enable_coeff_adapters(model: Any) -> None:
    """Undoes [`disable_coeff_adapters`]: the active adapters take part again.

    Raises:
        ValueError: if `model` has no coefficients.
    """
    _enable(model, True)


def _enable(model: Any, enabled: bool) -> None:
    with CHANGES:
        records = records_of(model)
        put_states({record: record.having(record.state.adapters, enabled=enabled) for record in records})
        if enabled:
            for record in records:
                for layer in record.numbered:
                    layer.enabled = True


def check_enabled(model: Any) -> None:
    """Raises ValueError if coefficients are disabled, so that no choice among them would count."""
    for record in records_of(model):
        entry = entry_of(record)
        if not record.state.enabled or (entry is not None and entry.choice is BASE):
            raise ValueError(
                "coefficients are disabled, so that no name would count: enable_coeff_adapters(model) first, or leave "
                "coeff_disabled"
            )


def unload_coeff_weights(model: Any) -> None:
    """Takes all coefficients off and puts the original processor objects back.

    Processors that the host has put in their place since stay.

    Raises:
        ValueError: if `model` has no coefficients.
        RuntimeError: if other threads are calling the model, which would lose its coefficients half way.
    """
    with CHANGES:
        held, lost = find_layers(model)
        if not held and not lost:
            known_coefficients(model)
        layers = held | {path: layer for path, (layer, _) in lost.items()}
        with all_or_nothing(model, [layer for layer in layers.values() if layer is not None]):
            records = _take_records(model)
            put_states({record: record.having({}) for record in records})
            if any(running.other_sessions(record.model) for record in records if record.model is not None):
                raise RuntimeError("other threads are calling this model: unload_coeff_weights when they have ended")
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


def records_of(model: Any) -> list[ModelRecord]:
    """The records of a model's or a pipeline's components that have coefficients, held or lost, or a store.

    Raises:
        ValueError: if there are none.
    """
    records = _take_records(model)
    if not any(record.state.adapters or record.store is not None for record in records):
        raise ValueError(f"{type(model).__name__} has no coefficients: add_coeff_adapter or load_coeff_weights first")
    return records


def _take_records(model: Any) -> list[ModelRecord]:
    """The records; coefficients of processors that were set by hand belong to their model's from now on."""
    held, lost = find_layers(model)
    parts = components(model)
    for path, layer in held.items():
        if layer.processor.coefficients.record.model is None:
            model_record(parts[path.partition(".")[0]]).take(layer.processor.coefficients)
    for called, part in _called_objects(model):
        begin_outside(called, part)
    found = _records([*_coefficients(held).values(), *(coefficients for _, coefficients in lost.values())])
    stored = (record for part in parts.values() if (record := known_record(part)) and record.store is not None)
    return list(dict.fromkeys([*found, *stored]))


def _records(layers: Iterable[LayerCoefficients]) -> list[ModelRecord]:
    return list(dict.fromkeys(layer.record for layer in layers))


def _called_objects(model: Any) -> list[tuple[Any, nn.Module]]:
    """What is called, which may be compiled or wrapped, and the component in it."""
    parts = components(model)
    if isinstance(model, nn.Module):
        return [(model, part) for part in parts.values()]
    return [(model.components[name], part) for name, part in parts.items()]


def now(layer: Any) -> str:
    """What a layer has in the place of its coefficients."""
    return "no longer there" if layer is None else f"now {processor_name(layer)}"


def find_layers(model: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, LayerCoefficients]]]:
    """`component.path` -> layer, of those with coefficients; and of those that lost them, with what they lost.

    Where records know the layers, and all are as they were left, without a walk.
    """
    parts = components(model)
    records = {name: record for name, part in parts.items() if (record := known_record(part)) and record.layers}
    known = {name: _intact(parts[name], record) for name, record in records.items()}
    if known and all(layers is not None for layers in known.values()):
        return {f"{name}.{path}": layer for name, layers in known.items() for path, layer in layers.items()}, {}  # type: ignore[union-attr]
    return walk_layers(model)


def _intact(model: nn.Module, record: ModelRecord) -> dict[str, Any] | None:
    """Path -> layer, of all that the record knows; `None` if one has lost its coefficients."""
    found: dict[str, Any] = {}
    layers = known_attention_layers(model)
    for path, coefficients in record.layers.items():
        layer = layers.get(path)
        if layer is None:
            return None
        own = vars(layer)
        guard, processor = own.get(GUARD), own["_modules"].get("processor") or own.get("processor")
        held = isinstance(processor, CoeffAttnProcessor) and processor.coefficients is coefficients
        if guard is None or guard.coefficients is not coefficients or not held:
            return None
        found[path] = layer
    return found


def known_attention_layers(model: nn.Module) -> dict[str, Any]:
    """As [`attention_layers`], without a walk where the record knows them and they are where they were."""
    record = known_record(model)
    return attention_layers(model) if record is None else _attention(model, record).layers


def known_heads(model: nn.Module) -> dict[str, int]:
    """Path -> heads, of the same layers."""
    record = known_record(model)
    if record is not None:
        return _attention(model, record).heads
    return {path: head_count(layer) for path, layer in attention_layers(model).items()}


def _attention(model: nn.Module, record: ModelRecord) -> Attention:
    known, children = record.attention, [id(child) for child in model._modules.values()]
    if known is not None and known.children == children and all(m.get(name) is to for m, name, to in known.steps):
        return known
    layers = attention_layers(model)
    heads = {path: head_count(layer) for path, layer in layers.items()}
    record.attention = Attention(children, layers, heads, _steps(model, layers))
    return record.attention


def _steps(model: nn.Module, paths: Iterable[str]) -> list[tuple[dict[str, Any], str, Any]]:
    """All steps from module to module that lead to these paths, each once: modules of one, name, module."""
    found = {}
    for path in paths:
        module: Any = model
        for name in path.split("."):
            found[id(module), name] = module._modules, name, module._modules[name]
            module = module._modules[name]
    return list(found.values())


def walk_layers(model: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, LayerCoefficients]]]:
    """As [`find_layers`], of all modules.

    A walk of its own, for `named_modules` takes longer.
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


def put_adapter(
    model: Any,
    layers: Mapping[str, Any],
    adapter_name: str,
    config: CoeffConfig,
    values: Mapping[str, Tensor] | None = None,
    active: bool = True,
) -> None:
    """Gives layers of `model` an adapter of a new name. All or nothing.

    Args:
        model: a diffusers model or a pipeline.
        layers: `component.path` -> layer.
        adapter_name: new on these layers.
        config: of the adapter.
        values: `component.path` -> Delta; without them it is 0, and has parameters.
        active: whether it becomes the active one.
    """
    parts = components(model)
    with CHANGES, all_or_nothing(model, [layer for layer in layers.values() if not is_wrapped(layer)]):
        by_part: dict[str, dict[str, Any]] = {}
        for path, layer in layers.items():
            component, _, inner = path.partition(".")
            by_part.setdefault(component, {})[inner] = layer
        for component, found in by_part.items():
            _wrap(parts[component], found)
            known = model_record(parts[component]).layers
            by_part[component] = {path: found[path] for path in known if path in found}  # in the model's order
        _choose_attention_functions(model)
        adapters = {record: dict(record.state.adapters) for record in _take_records(model)}
        others = tuple(name for name in by_part if name not in denoisers(model))
        for component, found in by_part.items():
            for record, adapter in _adapters_of(component, found, config, values).items():
                adapter.elsewhere = () if component in others else others
                adapters[record][adapter_name] = adapter
        choice = Choice((((adapter_name, 1.0),),)) if active else None
        put_states({record: record.having(having, choice) for record, having in adapters.items()})


def is_wrapped(layer: Any) -> bool:
    return GUARD in vars(layer) and isinstance(getattr(layer, "processor", None), CoeffAttnProcessor)


def _wrap(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Gives layers, path -> layer, coefficients without any adapter, where they have none."""
    record, new = model_record(model), {path: layer for path, layer in layers.items() if not is_wrapped(layer)}
    for path, layer in new.items():
        processor, known = getattr(layer, "processor", None), record.paths.get(path)
        if isinstance(processor, CoeffAttnProcessor):
            coefficients = processor.coefficients
        elif known is not None and known.num_heads == head_count(layer):
            coefficients = known
        else:
            coefficients = LayerCoefficients(head_count(layer))
        put_on(model, path, layer, coefficients)
    if new:
        record.layers = {path: record.layers[path] for path, _ in model.named_modules() if path in record.layers}


def _adapters_of(
    component: str, layers: Mapping[str, Any], config: CoeffConfig, values: Mapping[str, Tensor] | None
) -> dict[ModelRecord, Adapter]:
    """For each record an adapter of these values on its layers, path -> layer; without, of 0 by parameters."""
    paths: dict[LayerCoefficients, str] = {}
    for path, layer in layers.items():
        paths.setdefault(layer.processor.coefficients, path)  # of tied layers the first
    found = {}
    with torch.inference_mode(False), torch.no_grad():
        for record in _records(paths):
            own = [coefficients for coefficients in paths if coefficients.record is record]
            layout = record.layout([coefficients.number for coefficients in own])
            if values is None:
                devices = [accelerator_of(layers[paths[coefficients]]) for coefficients in own]
                zeros = [torch.zeros(c.num_heads, c.num_heads, device=device) for c, device in zip(own, devices)]
                coeff = {c.number: nn.Parameter(delta) for c, delta in zip(own, zeros)}
                found[record] = Adapter(config, layout, coeff=coeff)
            else:
                flat = _flat([values[f"{component}.{paths[coefficients]}"] for coefficients in own])
                found[record] = Adapter(config, layout, flat)
    return found


def _flat(deltas: Sequence[Tensor]) -> Tensor:
    """Copies of all, float32 on the CPU, one after another."""
    if len({(delta.device, delta.dtype) for delta in deltas}) > 1:
        deltas = [delta.to("cpu", torch.float32) for delta in deltas]
    return torch.cat([delta.detach().reshape(-1) for delta in deltas]).to("cpu", torch.float32)


def replace_values(model: Any, adapter_name: str, values: Mapping[str, Tensor]) -> None:
    """Puts values, `component.path` -> Delta, in the place of an adapter's. All or nothing.

    One that has no parameters is replaced as a whole: calls that are running go on with the old one. Parameters get
    the new values themselves.
    """
    with CHANGES, torch.inference_mode(False), torch.no_grad():
        by_record: dict[ModelRecord, dict[int, Tensor]] = {}
        for path, coefficients in _coefficients(find_layers(model)[0]).items():
            if path in values:
                by_record.setdefault(coefficients.record, {})[coefficients.number] = values[path]
        states, changed = {}, []
        for record, deltas in by_record.items():
            before = record.state.adapters[adapter_name]
            flat = _flat([deltas[number] for number in before.layout.sides])
            if before.coeff is None:
                adapter = Adapter(before.config, before.layout, flat, elsewhere=before.elsewhere)
                states[record] = record.having({**record.state.adapters, adapter_name: adapter})
            else:
                states[record] = record.state
                new = before.layout.split(flat)
                changed += [(parameter, new[n], parameter.detach().clone()) for n, parameter in before.coeff.items()]
        with SWAP:
            try:
                put_states(states)
                for parameter, delta, _ in changed:
                    parameter.copy_(delta)
            except BaseException:
                for parameter, _, old in changed:
                    parameter.copy_(old)
                raise


@contextmanager
def all_or_nothing(model: Any, layers: Iterable[Any]) -> Iterator[None]:
    """Has an error inside, or an interruption, leave the model as it was, and these layers of it."""
    before = [_Before(part, known_record(part)) for part in components(model).values()]
    held = [(layer, getattr(layer, "processor", None), vars(layer).get(GUARD)) for layer in layers]
    alone = [(p.coefficients, p.coefficients.record) for _, p, _ in held if isinstance(p, CoeffAttnProcessor)]
    try:
        yield
    except BaseException:
        for layer, processor, guard in held:
            _restore(layer, processor, guard)
        for coefficients, record in alone:
            if coefficients.record is not record:
                coefficients.record, coefficients.number = record, record.numbered.index(coefficients)
        for part in before:
            part.restore()
        raise


def _restore(layer: Any, processor: Any, guard: Guard | None) -> None:
    now = vars(layer).pop(GUARD, None)
    if now is not None and now is not guard:
        now.remove()
    if guard is not None:
        guard.attach(layer)
    if getattr(layer, "processor", None) is not processor:
        set_processor(layer, processor)
        if processor is None:
            del layer.processor


class _Before:
    """A component as it was."""

    def __init__(self, part: Any, record: ModelRecord | None) -> None:
        self.part, self.record = part, record
        if record is not None:
            self.kept = record.state, dict(record.layers), dict(record.paths), record.numbered
        self.function = part.config._attn_implementation if is_text_encoder(part) else None

    def restore(self) -> None:
        if known_record(self.part) is not self.record:
            remove_record(self.part)
            if self.record is not None:
                hook_record(self.part, self.record)
        if self.record is not None:
            with SWAP:
                self.record.state, self.record.layers, self.record.paths, self.record.numbered = self.kept
        if self.function is not None and self.part.config._attn_implementation != self.function:
            self.part.set_attn_implementation(self.function)


def _is_running(layer: Any) -> bool:
    """Whether other threads are calling the model that the layer is of."""
    model = layer.processor.coefficients.record.model
    return model is not None and bool(running.other_sessions(model))


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
    with all_or_nothing(model, [layer for layer, _ in lost.values()]):
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
            record.layers = {path: c for path, c in record.layers.items() if path != inner}  # others may be reading it
    _choose_attention_functions(model)
    for part in parts.values():
        record = known_record(part)
        if record is not None and record.store is None and not record.layers:
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


def check_new_adapter_name(model: Any, adapter_name: str, active: bool = True) -> None:
    """Raises ValueError if the name is in use on `model` or cannot be used."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must not be empty or hold a full stop, got {adapter_name!r}")
    check_text(adapter_name, "adapter_name")
    known = layer_coefficients(model)
    if active and not all(layer.enabled for layer in known):
        raise ValueError(
            "coefficients are disabled, and a new adapter would be too: enable_coeff_adapters(model) first"
        )
    if any(layer.has(adapter_name) for layer in known):
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
    paths = {path: coefficients for path, coefficients in paths.items() if coefficients.has(name)}
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


def out_of_store(model: Any, names: Sequence[str | None]) -> None:
    """Has the model's store, if it has one, load what of these names is not loaded."""
    stores = {record.store for part in components(model).values() if (record := known_record(part))}
    for store in stores - {None}:
        store.load([name for name in dict.fromkeys(names) if name is not None])


def known_coefficients(model: Any, names: Sequence[str] = ()) -> list[LayerCoefficients]:
    """As [`layer_coefficients`], of a model that has these adapters, and at least one.

    Raises:
        ValueError: otherwise.
    """
    found = layer_coefficients(model)
    _check_names(model, names, found)
    return found


def _check_names(model: Any, names: Sequence[str], layers: Iterable[LayerCoefficients]) -> None:
    layers = list(layers)
    known = dict.fromkeys(name for record in _records(layers) for name in record.state.adapters)
    if not layers or not known:
        raise ValueError(f"{type(model).__name__} has no coefficients: add_coeff_adapter or load_coeff_weights first")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no adapter {unknown}; it has {list(known)}")
