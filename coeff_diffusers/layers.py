"""The attention layers of a diffusers model: where they are, how many heads they have, and of which kind they are."""

from __future__ import annotations

import inspect
import logging
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .config import AttentionKind, CoeffConfig
from .text import check_text_encoder, is_text_encoder, text_attention_layers

logger = logging.getLogger(__name__)

# Parts of processors' class names, and why their layers get no coefficients.
_LEFT_OUT = {
    "Linear": "linear attention, which forms no maps",
    "Multiscale": "linear attention, which forms no maps",
    "Flex": "FlexAttention, whose maps cannot be had",
    "AnyFlowCausal": "FlexAttention, whose maps cannot be had",
    "Kandinsky6SR": "FlexAttention, whose maps cannot be had",
}

# Processors of layers with one sequence of text and image, where the module itself does not show it.
_JOINT = (
    "AuraFlow", "BriaFibo2", "CogVideoX", "CogView", "Cosmos3", "EasyAnimate", "ErnieImage", "Flux", "GlmImage",
    "HiDream", "Ideogram4", "JoyImage", "Krea2", "Lumina2", "MiniMaxH3", "MotifVideoAttn", "OmniGen", "PRX",
    "QwenImage", "ZSingleStream",
)  # fmt: skip
# Blocks of such models that prepare the text or the image alone.
_ONE_STREAM = ("refiner", "mode_blocks", "text_fusion", "perceiver")


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> attention module, for every module of `model` that owns a processor and names its heads.

    Several model classes have no `set_attn_processor`, so the modules are walked. The layers of a text encoder
    (transformers) have no processor, unless they have coefficients.
    """
    if is_text_encoder(model):
        return text_attention_layers(model)
    return {
        path: module
        for path, module in model.named_modules()
        if getattr(module, "processor", None) is not None and head_count(module) and "processor" not in path.split(".")
    }


def head_count(module: nn.Module) -> int:
    """The number of query heads H of an attention module; 0 if neither it nor its config names it."""
    names = ("heads", "num_heads", "num_attention_heads", "n_heads")
    counts = (getattr(owner, name, None) for owner in (module, getattr(module, "config", None)) for name in names)
    return next((count for count in counts if isinstance(count, int)), 0)


def accelerator_of(module: nn.Module) -> torch.device | None:
    """Where the module's weights are; `None` on a CPU, and where an offloading hook keeps them between calls."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return None if device.type in ("cpu", "meta") else device


def attention_kind(path: str, module: nn.Module) -> AttentionKind:
    """`"joint"` if text and image share the layer's sequence, `"cross"` if the keys are other tokens, else `"self"`.

    Told by what the module is: cross-attention says so itself, or else by its name; joint layers have projections for
    added tokens, or none of their own at the end as in FLUX's single-stream blocks (`pre_only`), or a processor that
    is known to take one sequence of both.
    """
    if _is_cross(path.rpartition(".")[2], module):
        return "cross"
    if getattr(module, "add_k_proj", None) is not None or getattr(module, "pre_only", False):
        return "joint"
    one_stream = any(part in path for part in _ONE_STREAM)
    return "joint" if processor_name(module).startswith(_JOINT) and not one_stream else "self"


def _is_cross(name: str, module: nn.Module) -> bool:
    named = name.endswith("attn2") or "cross" in name or "_to_" in name or "Cross" in type(module).__name__
    declared = getattr(module, "is_cross_attention", None)
    if declared and not named:  # true also where the width of the keys was given and is that of the queries
        return getattr(module, "cross_attention_dim", None) != getattr(module, "query_dim", None)
    return named if declared is None else bool(declared)


def select_layers(model: nn.Module, config: CoeffConfig) -> dict[str, Any]:
    """The layers of `model` that `config` selects and that can be served.

    Layers that form no maps, or form them outside a processor, are left out and named in a warning.

    Raises:
        ValueError: if nothing is selected, a pattern matches no layer, or a selected layer's processor computes its
            own softmax.
    """
    if is_text_encoder(model):
        check_text_encoder(model)
    layers = attention_layers(model)
    outside = [] if is_text_encoder(model) else _attention_outside_processors(model, layers)
    if not layers:
        found = f"; its attention is in {', '.join(outside)}" if outside else ""
        raise ValueError(f"{type(model).__name__} has no attention layer with a processor to wrap{found}")
    _check_patterns(config, layers)
    chosen = {path: module for path, module in layers.items() if _is_selected(config, path, module)}
    reasons = {path: reason_left_out(module) for path, module in chosen.items()}
    served = {path: module for path, module in chosen.items() if reasons[path] is None}
    check_softmax(served)
    left_out = [f"{path} ({processor_name(chosen[path])}): {reason}" for path, reason in reasons.items() if reason]
    if not served:
        found = ", ".join(sorted({attention_kind(path, module) for path, module in layers.items()}))
        raise ValueError(
            f"no attention layer of {type(model).__name__} is selected by {config}. Its {len(layers)} layers are of "
            f"the kinds {found}, the first is {next(iter(layers))!r}"
            + (". Those selected cannot be served:\n" + _listed(left_out) if left_out else "")
        )
    if config.include is None:
        left_out += [f"{path}: attention outside a processor" for path in outside]
    if left_out:
        logger.warning("no coefficients for these layers of %s:\n%s", type(model).__name__, _listed(left_out))
    return served


def check_softmax(layers: dict[str, Any]) -> None:
    """Raises ValueError if the processors of some layers compute their own softmax, with a way out for each."""
    found: dict[str, list[str]] = {}
    for path, module in layers.items():
        if advice := softmax_advice(module):
            found.setdefault(advice, []).append(f"{path} ({processor_name(module)})")
    if found:
        raise ValueError(
            "the attention processors of these layers compute their own softmax, where no coefficients can take part. "
            + "\n".join(f"First {advice}:\n{_listed(paths)}" for advice, paths in found.items())
        )


def softmax_advice(module: Any) -> str | None:
    """What to do about a processor that computes its own softmax, so that there is no call to mix at, or `None`."""
    processor = wrapped_processor(module)
    name = type(processor).__name__
    if not _computes_own_softmax(processor):
        return None
    if not getattr(module, "scale_qk", True):
        return "leave such layers out, by CoeffConfig(exclude=...): no other processor leaves their scores unscaled"
    if isinstance(processor, nn.Module):
        return f"put {name}2_0, with the same weights, in its place"
    added = getattr(module, "added_kv_proj_dim", None) is not None
    return f"call model.set_attn_processor({'AttnAddedKVProcessor2_0' if added else 'AttnProcessor2_0'}())"


def _is_selected(config: CoeffConfig, path: str, module: nn.Module) -> bool:
    if attention_kind(path, module) not in config.kinds:
        return False
    included = config.include is None or any(matches(path, pattern) for pattern in config.include)
    return included and not any(matches(path, pattern) for pattern in config.exclude or ())


def matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _check_patterns(config: CoeffConfig, layers: dict[str, nn.Module]) -> None:
    patterns = [*(config.include or ()), *(config.exclude or ())]
    idle = [pattern for pattern in patterns if not any(matches(path, pattern) for path in layers)]
    if idle:
        raise ValueError(
            f"the patterns {idle} match none of the {len(layers)} attention layers, of which the first is "
            f"{next(iter(layers))!r}"
        )


def _computes_own_softmax(processor: Any) -> bool:
    # xFormers and slices go by their names; the others get their maps from a method of diffusers' Attention
    name = type(processor).__name__
    call = type(processor).forward if isinstance(processor, nn.Module) else type(processor).__call__
    code = getattr(inspect.unwrap(call), "__code__", None)
    return "XFormers" in name or "Sliced" in name or "get_attention_scores" in getattr(code, "co_names", ())


def reason_left_out(module: Any) -> str | None:
    """Why no coefficients can act on this layer, or `None`."""
    name = processor_name(module)
    return next((reason for part, reason in _LEFT_OUT.items() if part in name), None)


def _attention_outside_processors(model: nn.Module, layers: dict[str, Any]) -> list[str]:
    """`path (class)` of the outermost modules that attend without a processor, by the names of their classes."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in [*layers, *found])
        around = any(layer.startswith(f"{path}.") for layer in layers)
        if path and "Attention" in type(module).__name__ and not inside and not around:
            found.append(path)
    return [f"{path} ({type(model.get_submodule(path)).__name__})" for path in found]


def processor_name(module: Any) -> str:
    """The class name of the processor of the host, wrapped or not."""
    return type(wrapped_processor(module)).__name__


def wrapped_processor(module: Any) -> Any:
    processor = getattr(module, "processor", None)
    return getattr(processor, "processor", processor)


def _listed(lines: list[str], most: int = 10) -> str:
    shown = [f"  {line}" for line in lines[:most]]
    return "\n".join(shown + ([f"  and {len(lines) - most} more"] if len(lines) > most else []))
