"""The attention layers of a diffusers model: where they are, how many heads they have, and of which kind they are."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .config import AttentionKind, CoeffConfig

logger = logging.getLogger(__name__)

# Processors that compute their own softmax, so that there is no call to mix at. Each has a twin that makes the call.
_OWN_SOFTMAX = ("AttnProcessor", "AttnAddedKVProcessor", "CustomDiffusionAttnProcessor", "IPAdapterAttnProcessor")


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> attention module, for every module of `model` that owns a processor and names its heads.

    Several model classes have no `set_attn_processor`, so the modules are walked.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if getattr(module, "processor", None) is not None and head_count(module) and "processor" not in path.split(".")
    }


def head_count(module: nn.Module) -> int:
    """The number of query heads H of a diffusers attention module; 0 if it names none."""
    counts = (getattr(module, name, None) for name in ("heads", "num_heads", "num_attention_heads"))
    return next((count for count in counts if isinstance(count, int)), 0)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are; the CPU for those that an offloading hook keeps elsewhere."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def attention_kind(path: str, module: nn.Module) -> AttentionKind:
    """`"joint"` if text and picture share the layer's sequence, `"cross"` if the keys are other tokens, else `"self"`.

    Told by what the module is: joint layers have projections for added tokens, or none of their own at the end as in
    FLUX's single-stream blocks (`pre_only`); cross-attention says so itself, or else by its name.
    """
    if getattr(module, "added_kv_proj_dim", None) is not None or getattr(module, "pre_only", False):
        return "joint"
    is_cross = getattr(module, "is_cross_attention", None)
    if is_cross is None:
        name = path.rpartition(".")[2]
        is_cross = name == "attn2" or "cross" in name
    return "cross" if is_cross else "self"


def select_layers(model: nn.Module, config: CoeffConfig) -> dict[str, Any]:
    """The layers of `model` that `config` selects and that can be served.

    Layers of linear attention, which forms no maps, are left out and named in a warning.

    Raises:
        ValueError: if nothing is selected, a pattern matches no layer, or a selected layer's processor computes its
            own softmax.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer with a processor to wrap")
    _check_patterns(config, layers)
    chosen = {path: module for path, module in layers.items() if _is_selected(config, path, module)}
    linear = [path for path, module in chosen.items() if "Linear" in _processor_name(module)]
    check_softmax(chosen)
    served = {path: module for path, module in chosen.items() if path not in linear}
    if not served:
        found = sorted({attention_kind(path, module) for path, module in layers.items()})
        raise ValueError(
            f"no attention layer of {type(model).__name__} is selected by {config}. Its {len(layers)} layers are of "
            f"the kinds {found}, the first is {next(iter(layers))!r}"
            + (", and those selected are linear attention, which forms no maps" if linear else "")
        )
    if linear:
        logger.warning("linear attention forms no maps; no coefficients for:\n%s", _listed(layers, linear))
    return served


def check_softmax(layers: dict[str, Any]) -> None:
    """Raises ValueError if the processors of some layers compute their own softmax."""
    hand_made = [path for path, module in layers.items() if _computes_own_softmax(_processor_name(module))]
    if hand_made:
        raise ValueError(
            "the attention processors of these layers compute their own softmax, where no coefficients can take part; "
            "call model.set_attn_processor(AttnProcessor2_0()), or disable attention slicing or xFormers, first:\n"
            + _listed(layers, hand_made)
        )


def _is_selected(config: CoeffConfig, path: str, module: nn.Module) -> bool:
    if attention_kind(path, module) not in config.kinds:
        return False
    included = config.include is None or any(_matches(path, pattern) for pattern in config.include)
    return included and not any(_matches(path, pattern) for pattern in config.exclude or ())


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _check_patterns(config: CoeffConfig, layers: dict[str, nn.Module]) -> None:
    patterns = [*(config.include or ()), *(config.exclude or ())]
    idle = [pattern for pattern in patterns if not any(_matches(path, pattern) for path in layers)]
    if idle:
        raise ValueError(
            f"the patterns {idle} match none of the {len(layers)} attention layers, of which the first is "
            f"{next(iter(layers))!r}"
        )


def _computes_own_softmax(processor_name: str) -> bool:
    return processor_name in _OWN_SOFTMAX or "Sliced" in processor_name or "XFormers" in processor_name


def _processor_name(module: Any) -> str:
    return type(module.processor).__name__


def _listed(layers: dict[str, nn.Module], paths: list[str], most: int = 10) -> str:
    lines = [f"  {path} ({_processor_name(layers[path])})" for path in paths[:most]]
    return "\n".join(lines + ([f"  and {len(paths) - len(lines)} more"] if len(paths) > len(lines) else []))
