"""How many parameters a method trains on models of real size: counted on their configs, without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from methods import ATTENTION
from torch import nn

from coeff_diffusers import CoeffAttnProcessor

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL: dict[str, Callable[[], nn.Module]] = {
    "SD 1.5": lambda: UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
    "SDXL": lambda: UNet2DConditionModel(sample_size=128, **SDXL),
    "FLUX.1": lambda: FluxTransformer2DModel(guidance_embeds=True),
}


@cache
def real_model(name: str) -> Any:
    with torch.device("meta"):
        return REAL[name]()


@cache
def counts(name: str) -> dict[str, int]:
    return counts_on(real_model(name))


def counts_on(model: Any) -> dict[str, int]:
    """Method -> numbers, with the settings of `methods`."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = of(layers, *ATTENTION)
    a_rank = sum(layer.in_features + layer.out_features for layer in linear)
    coefficients = sum(p.num_heads**2 for p in CoeffAttnProcessor.for_model(model).values())
    found = {f"LoRA, rank {rank}": rank * a_rank for rank in (1, 4, 16)}
    outputs = of(layers, "to_k", "to_v", "add_k_proj", "add_v_proj")
    return {
        "coefficients": coefficients,
        **found,
        **{f"{lora} + coefficients": count + coefficients for lora, count in found.items()},
        "LoRA, rank 1 on values and outputs": sum(
            layer.in_features + layer.out_features for layer in of(layers, "to_v", "to_out.0")
        ),
        "output mixing": coefficients,
        "coefficients + output mixing": 2 * coefficients,
        "IA3": sum(layer.out_features for layer in outputs)
        + sum(each.in_features for each in of(layers, ".ff.net.2")),
        "OFT": sum(layer.in_features // 4 * 6 for layer in linear),  # blocks of 4, 6 angles each
        "VeRA": sum(layer.out_features + 16 for layer in linear),
        **dict.fromkeys(("LoRA-XS", "FourierFT", "TinyLoRA"), 100 * len(linear)),
        "full fine-tuning": sum(parameter.numel() for parameter in model.parameters()),
    }


def of(layers: dict[str, Any], *ends: str) -> list[Any]:
    return [layer for path, layer in layers.items() if path.endswith(ends)]


def real_sizes() -> str:
    """Markdown: numbers, and megabytes as the files have them, float32 for coefficients and 16 bits for others."""
    names = list(REAL)
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for method in counts(names[0]):
        cells = [f"{counts(name)[method]:,} ({size(method, counts(name)[method])})" for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def size(method: str, count: int) -> str:
    width = 4 if method.startswith(("coefficients", "output")) else 2
    kilobytes = count * width / 1000
    return f"{kilobytes:,.0f} KB" if kilobytes < 1000 else f"{kilobytes / 1000:,.1f} MB"
