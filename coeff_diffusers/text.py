"""Text encoders of transformers, through transformers' own interface for attention functions.

A function registered as `coeff_sdpa` runs transformers' `sdpa` function, under the layer's [`CoeffAttnProcessor`]
where it has one. Nothing is patched: `set_attn_implementation` puts it on, and back.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

IMPLEMENTATION = "coeff_sdpa"


def is_text_encoder(model: Any) -> bool:
    """Whether `model` is a model of transformers."""
    return hasattr(model, "set_attn_implementation")


def text_attention_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> attention module, for the modules that ask their config which attention function to call."""
    return {
        path: module
        for path, module in model.named_modules()
        if "Attention" in type(module).__name__
        and hasattr(getattr(module, "config", None), "_attn_implementation")
        and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    }


def check_text_encoder(model: Any) -> None:
    """Raises ValueError if attention functions cannot be chosen on `model`, or another than `sdpa` is."""
    name = type(model).__name__
    if not text_attention_layers(model):
        raise ValueError(f"{name} does not take its attention through transformers' AttentionInterface")
    if getattr(model.config, "attn_logit_softcapping", None) is not None:  # older transformers lose the cap with sdpa
        raise ValueError(f"{name} caps its attention scores, which scaled_dot_product_attention does not")
    chosen = model.config._attn_implementation
    if chosen not in ("sdpa", IMPLEMENTATION):
        raise ValueError(f"{name} uses the attention {chosen!r}; call its set_attn_implementation('sdpa') first")


def use_coefficients(model: Any, wanted: bool) -> None:
    """Chooses the attention function that mixes, or transformers' `sdpa` again."""
    if wanted != (model.config._attn_implementation == IMPLEMENTATION):
        model.set_attn_implementation(IMPLEMENTATION if wanted else "sdpa")


class SdpaAttention:
    """transformers' `sdpa` attention function, in the place of a processor."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(IMPLEMENTATION, _attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, *args, **kwargs)

    def __reduce__(self) -> Any:  # so that a copy in another process registers, too
        return SdpaAttention, ()


def _attention_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    processor = getattr(module, "processor", None)
    attend = sdpa_attention_forward if processor is None else processor
    return attend(module, *args, **kwargs)
