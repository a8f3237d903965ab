"""What training of each family should take: memory and time, predicted from the sizes of the published models.

    python examples/benchmarks/families.py

Models are built from config, without weights. Nothing is measured: `predict` says what is added up.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    Flux2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coeff_diffusers.layers import attention_layers, head_count, reason_left_out

sys.path.append(str(Path(__file__).parents[1] / "emojibooth"))
from sizes import REAL

CARD, PEAK, SHARE = "A100", 312e12, 0.4  # operations a second in bfloat16, and what of it products reach
MIXING = 2.5  # time of attention with coefficients by attention without, docs/speed.md
KEPT = 34  # bytes a token and channel that a block keeps for its backward pass (Korthikanti et al., arXiv 2205.05198)
# weights that see an image once, and not its tokens; the text's tokens alone; the image's alone
ONCE = re.compile(r"norm\w*\.linear|modulation|_mod\.|adaLN|time_|timestep|adaln_single|pooled|guidance_embed")
OF_TEXT = re.compile(r"context|txt|caption|cap_|\.add_[qkv]|to_add_out")
OF_IMAGE = re.compile(r"noise_refiner|img_|x_embedder")


class Kind(NamedTuple):
    """A denoiser; parameters of its text encoders, in billions; a token's side in pixels; text tokens; other keys."""

    build: Callable[[], nn.Module]
    encoders: float
    pixels: int = 16
    text: int = 0
    keys: int | None = None


# Of the text encoders: CLIP-L 0.12, OpenCLIP bigG 0.69, T5-XXL 4.76, Gemma 2 2.61, Qwen3 4.02 and Qwen2.5-VL 8.29.
KINDS = {
    "Stable Diffusion 1.5": Kind(REAL["SD 1.5"], 0.12),
    "Stable Diffusion XL": Kind(REAL["SDXL"], 0.82),
    "Stable Diffusion 3.5 medium": Kind(
        lambda: SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
        ), 5.58, text=333),
    "FLUX.1": Kind(REAL["FLUX.1"], 4.89, text=512),
    "FLUX.2 [klein] 4B": Kind(
        lambda: Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ), 4.02, text=512),
    "PixArt-Sigma": Kind(lambda: PixArtTransformer2DModel(caption_channels=4096), 4.76),
    "Sana 1.6B": Kind(lambda: SanaTransformer2DModel(), 2.61, pixels=32, keys=300),
    "Lumina Image 2.0": Kind(
        lambda: Lumina2Transformer2DModel(axes_lens=(300, 512, 512), cap_feat_dim=2304), 2.61, text=256),
    "Z-Image": Kind(lambda: ZImageTransformer2DModel(), 4.02, text=512),
    "Qwen-Image": Kind(lambda: QwenImageTransformer2DModel(), 8.29, text=512),
}  # fmt: skip


class Prediction(NamedTuple):
    coefficients: int
    weights: float  # of the denoiser in bfloat16, GB
    memory: dict[int, float]  # side of the image -> GB while it trains
    seconds: dict[int, float]  # side of the image -> of a step


def predict(name: str, sides: tuple[int, ...] = (512, 1024)) -> Prediction:
    """One image a step, bfloat16, gradient checkpointing, latents and prompts encoded before.

    Memory: the denoiser, what each block is given, and what one block keeps. Seconds: forward, forward again, and the
    gradients of the activations, which take as long, for no weight has a gradient.
    """
    kind = KINDS[name]
    with torch.device("meta"):
        model: Any = kind.build()
    layers = [layer for layer in attention_layers(model).values() if reason_left_out(layer) is None]
    weights = sum(each.numel() for each in (*model.parameters(), *model.buffers())) * 2 / 1e9
    memory, seconds = {}, {}
    for side in sides:
        operations, attention, kept = of_unet(model, side) if "Diffusion 1.5" in name or "XL" in name else (
            of_transformer(model, (side // kind.pixels) ** 2, kind.text, kind.keys)
        )  # fmt: skip
        memory[side] = weights + kept / 1e9
        seconds[side] = 3 * (operations + (MIXING - 1) * attention) / (PEAK * SHARE)
    return Prediction(sum(head_count(layer) ** 2 for layer in layers), weights, memory, seconds)


def of_transformer(model: Any, image: int, text: int, keys: int | None) -> tuple[float, float, float]:
    """Operations of a forward pass, those of attention among them, and bytes of activations."""
    config, tokens = model.config, image + text
    width = config.get("dim") or config.get("hidden_size") or config.num_attention_heads * config.attention_head_dim
    blocks, products = 0, 0
    for name, part in model.named_children():
        several = list(part) if isinstance(part, nn.ModuleList) else []
        blocks += len(several)
        for each in several or [part]:
            parameters = {f"{name}.{path}": parameter.numel() for path, parameter in each.named_parameters()}
            two_streams = any(OF_TEXT.search(path) for path in parameters)
            for path, count in parameters.items():
                seen = image if two_streams or OF_IMAGE.search(path) else tokens
                seen = text if OF_TEXT.search(path) else seen
                products += 2 * count * (0 if ONCE.search(path) else seen)
    attention = 4 * tokens * (keys or tokens) * width * blocks
    return products + attention, attention, tokens * width * (2 * blocks + KEPT)


def of_unet(model: Any, side: int) -> tuple[float, float, float]:
    """The same, counted by a forward pass without numbers."""
    latent = torch.empty(1, 4, side // 8, side // 8, device="meta")
    text = torch.empty(1, 77, model.config.cross_attention_dim, device="meta")
    added = {"text_embeds": torch.empty(1, 1280, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
    with FlopCounterMode(display=False) as counter:
        model(latent, torch.ones(1, device="meta"), text, added_cond_kwargs=added)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operator, count in counts.items() if "attention" in str(operator))
    channels = model.config.block_out_channels
    kept = sum((side // 8 >> level) ** 2 * width for level, width in enumerate(channels))
    return counter.get_total_flops(), attention, kept * (2 * 8 + KEPT * 4)


def table() -> str:
    columns = ["coefficients", "denoiser, GB", "its text encoders, GB", "training at 512 px, GB", "at 1024 px"]
    columns += ["seconds a step at 512 px", "at 1024 px"]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return "\n".join(lines + [row(name) for name in KINDS])


def row(name: str) -> str:
    one = predict(name)
    cells = [f"{one.coefficients:,}", f"{one.weights:.1f}", f"{KINDS[name].encoders * 2:.1f}"]
    cells += [f"{one.memory[side]:.1f}" for side in (512, 1024)]
    cells += [f"{one.seconds[side]:.2f}" for side in (512, 1024)]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
