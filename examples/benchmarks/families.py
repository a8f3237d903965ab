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

from coeff_diffusers import CoeffConfig
from coeff_diffusers.layers import head_count, select_layers

sys.path.append(str(Path(__file__).parents[1] / "emojibooth"))
from sizes import REAL

CARD, PEAK, SHARE = "A100", 312e12, 0.4  # operations a second in bfloat16, and what of it products reach
MIXING = 2.5  # time of attention with coefficients by attention without, docs/speed.md
KEPT = 34  # bytes a token and channel that a block keeps for its backward pass (Korthikanti et al., arXiv 2205.05198)
# weights that see an image once, not every token
ONCE = re.compile(r"norm\w*\.linear|modulation|adaLN|time_|timestep|adaln_single|pooled|guidance_embed")


class Kind(NamedTuple):
    """A denoiser; billions of parameters of its text encoders; pixels of a token's side; tokens of text."""

    build: Callable[[], nn.Module]
    encoders: float
    pixels: int = 16
    text: int = 0


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
    "Sana 1.6B": Kind(lambda: SanaTransformer2DModel(), 2.61, pixels=32),
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
    layers = select_layers(model, CoeffConfig())
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2 / 1e9
    memory, seconds = {}, {}
    for side in sides:
        operations, attention, kept = of_unet(model, side) if "Diffusion 1.5" in name or "XL" in name else (
            of_transformer(model, (side // kind.pixels) ** 2 + kind.text)
        )  # fmt: skip
        memory[side] = weights + kept / 1e9
        seconds[side] = 3 * (operations + (MIXING - 1) * attention) / (PEAK * SHARE)
    return Prediction(sum(head_count(layer) ** 2 for layer in layers.values()), weights, memory, seconds)


def of_transformer(model: Any, tokens: int) -> tuple[float, float, float]:
    """Operations of a forward pass, those of attention among them, and bytes of activations."""
    blocks = [block for group in model.children() if isinstance(group, nn.ModuleList) for block in group]
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if not ONCE.search(name))
    width = max(max(layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)) // 4, 1)
    width = getattr(model, "inner_dim", None) or getattr(model.config, "dim", None) or width
    attention = 4 * tokens**2 * width * len(blocks)
    return 2 * tokens * weights + attention, attention, tokens * width * (2 * len(blocks) + KEPT)


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
    columns = ["", "coefficients", "GB: denoiser", "text encoders", "training, 512 px", "1024 px"]
    columns += ["seconds a step, 512 px", "1024 px"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---|" * 7]
    for name, kind in KINDS.items():
        one = predict(name)
        cells = [f"{one.coefficients:,}", f"{one.weights:.1f}", f"{kind.encoders * 2:.1f}"]
        cells += [f"{one.memory[side]:.1f}" for side in (512, 1024)]
        cells += [f"{one.seconds[side]:.2f}" for side in (512, 1024)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
