"""Tiny diffusers models, built from config, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from coeff_diffusers.adapters import layer_coefficients


@dataclass
class Host:
    """A model, a call of it, and what the walk must find on it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    layers: int
    coefficients: int
    kinds: set[str]

    def run(self, model: nn.Module) -> torch.Tensor:
        return model(**self.inputs(), return_dict=False)[0]


def _unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
    )


def _pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=24,
        caption_channels=16,
        out_channels=8,
        norm_num_groups=1,
        use_additional_conditions=False,
    )


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    )


def _randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HOSTS = {
    "unet": Host(
        _unet,
        lambda: {
            "sample": _randn(1, 2, 4, 8, 8),
            "timestep": torch.tensor([5, 700]),
            "encoder_hidden_states": _randn(2, 2, 5, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
        layers=8,
        coefficients=6 * 4 + 2 * 16,
        kinds={"self", "cross"},
    ),
    "pixart": Host(
        _pixart,
        lambda: {
            "hidden_states": _randn(1, 2, 4, 8, 8),
            "timestep": torch.tensor([5, 700]),
            "encoder_hidden_states": _randn(2, 2, 5, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        layers=4,
        coefficients=4 * 9,
        kinds={"self", "cross"},
    ),
    "sd3": Host(
        _sd3,
        lambda: {
            "hidden_states": _randn(1, 2, 4, 8, 8),
            "encoder_hidden_states": _randn(2, 2, 5, 16),
            "pooled_projections": _randn(3, 2, 24),
            "timestep": torch.tensor([5, 700]),
        },
        layers=3,
        coefficients=3 * 16,
        kinds={"self", "joint"},
    ),
    "flux": Host(
        _flux,
        lambda: {
            "hidden_states": _randn(1, 2, 16, 4),
            "encoder_hidden_states": _randn(2, 2, 5, 16),
            "pooled_projections": _randn(3, 2, 24),
            "timestep": torch.tensor([0.2, 0.7]),
            "img_ids": torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"))
            .flatten(1)
            .T,
            "txt_ids": torch.zeros(5, 3),
        },
        layers=3,
        coefficients=3 * 4,
        kinds={"joint"},
    ),
}


def visible(model: nn.Module) -> nn.Module:
    """Large random weights, also where a transformer starts with zeros, so that attention shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.numel():
                nn.init.normal_(parameter, std=2.0 * parameter[0].numel() ** -0.5)
    return model


def randomise(model: Any, adapter_name: str = "default", seed: int = 0, scale: float = 0.5) -> None:
    """Random Delta, not symmetric, so that rows and columns can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for processor in layer_coefficients(model):
            if adapter_name in processor.coeff:
                processor.coeff[adapter_name].normal_(std=scale, generator=generator)
