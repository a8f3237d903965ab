"""What has become of a model's coefficients: attached, effective, trainable, and what stands in their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .adapters import components, now, walk_layers
from .choice import BASE, entry_of
from .coefficients import LayerCoefficients
from .layers import attention_layers
from .processor import NATIVE_BACKENDS
from .text import IMPLEMENTATION, is_text_encoder


def check_coeff_adapters(model: Any) -> list[str]:
    """Looks the coefficients on `model` over, without running it.

    Args:
        model: a diffusers model or a pipeline.

    Returns:
        One line per finding. Lines that begin with `"problem: "` name what keeps coefficients from taking part in the
        next forward pass, or from being trained in it; the others begin with `"ok: "`.
    """
    held, lost = walk_layers(model)
    if not held and not lost:
        return [f"problem: {type(model).__name__} has no coefficients"]
    chosen = {path.partition(".")[0] for path in (*held, *lost)}  # of the components, those that have some
    layers = sum(len(attention_layers(part)) for name, part in components(model).items() if name in chosen)
    coefficients = list(dict.fromkeys(layer.processor.coefficients for layer in held.values()))
    lines = [f"ok: {len(held)} of {layers} attention layers have coefficients"]
    for name in dict.fromkeys(name for layer in coefficients for name in layer.adapters()):
        lines += _adapter(name, [layer for layer in coefficients if layer.has(name)])
    entries = [entry_of(layer.record) for layer in coefficients]
    if not all(layer.enabled for layer in coefficients) or any(entry and entry.choice is BASE for entry in entries):
        lines.append("problem: coefficients are switched off (coeff_disabled)")
    lines += [
        f"problem: {path} lost its coefficients, its processor is {now(layer)}" for path, (layer, _) in lost.items()
    ]
    return lines + _backends(model, held)


def _adapter(name: str, layers: Sequence[LayerCoefficients]) -> list[str]:
    adapters = [layer.record.state.adapters[name] for layer in layers]
    deltas = [adapter.delta(layer.number) for adapter, layer in zip(adapters, layers)]
    weights = {layer.adapter_weights.get(name, 0.0) for layer in layers}
    frozen = sum(adapter.coeff is not None and not delta.requires_grad for adapter, delta in zip(adapters, deltas))
    lines = []
    if weights == {0.0}:
        lines.append(f"problem: adapter {name!r} is not active, or active with weight 0: see set_coeff_adapters")
    elif not any(torch.any(delta) for delta in deltas):
        lines.append(f"ok: adapter {name!r} is active, and all of its coefficients are 0: the base model")
    else:
        lines.append(f"ok: adapter {name!r} is active with weight {', '.join(map(str, sorted(weights)))}")
    if frozen:
        lines.append(
            f"problem: {frozen} of {len(deltas)} matrices of adapter {name!r} are frozen and will not train: "
            "for p in coeff_parameters(model): p.requires_grad_(True)"
        )
    else:
        lines.append(f"ok: adapter {name!r} is trainable, {sum(delta.numel() for delta in deltas)} coefficients")
    if not all(torch.isfinite(delta).all() for delta in deltas):
        lines.append(f"problem: adapter {name!r} has values that are not finite")
    return lines


def _backends(model: Any, wrapped: dict[str, Any]) -> list[str]:
    lines = []
    named = {getattr(layer.processor.processor, "_attention_backend", None) for layer in wrapped.values()}
    for backend in sorted(str(getattr(backend, "value", backend)) for backend in named if backend is not None):
        native = backend in NATIVE_BACKENDS
        lines.append(
            f"{'ok' if native else 'problem'}: attention backend {backend!r}"
            + ("" if native else " hands out no maps to mix: model.set_attention_backend('native')")
        )
    for component, part in components(model).items():
        chosen = getattr(part.config, "_attn_implementation", None) if is_text_encoder(part) else IMPLEMENTATION
        if chosen != IMPLEMENTATION and any(path.startswith(f"{component}.") for path in wrapped):
            lines.append(
                f"problem: {component} uses the attention {chosen!r}, where coefficients take no part: "
                f"set_attn_implementation({IMPLEMENTATION!r})"
            )
    return lines
