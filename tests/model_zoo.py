"""Every model class of the installed diffusers: a tiny instance and a call of it, or why it is not tested.

`MODELS` holds (config, inputs) under the class name; `r(*shape)` draws normal numbers. `NOT_SERVED` holds the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from hosts import visible
from torch import Tensor, nn

from coeff_diffusers import CoeffConfig

Inputs = Callable[[Callable[..., Tensor]], dict[str, Any]]

B = 2  # samples
TIMES = torch.tensor([5, 700])
UNIT_TIMES = torch.tensor([0.2, 0.7])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])  # of a text of 5 tokens
SIZE = torch.tensor([[16, 16], [16, 16]])


def model_classes() -> dict[str, type[nn.Module]]:
    """Name -> class, of every model class that diffusers exports."""
    exported = {name: _exported(name) for name in dir(diffusers)}
    return {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, diffusers.ModelMixin) and value is not diffusers.ModelMixin
    }


def _exported(name: str) -> Any:
    try:
        return getattr(diffusers, name, None)
    except RuntimeError:  # pipelines that need a newer transformers than is installed
        return None


def class_name(name: str) -> str:
    """Of an entry of `MODELS`, which may name a variant in brackets behind."""
    return name.partition(" (")[0]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = model_classes()[class_name(name)](**MODELS[name][0]).eval().requires_grad_(False)
    if name == "ZImageControlNetModel":  # it runs on the embedders and refiners of a transformer
        model = type(model).from_transformer(model, build("ZImageTransformer2DModel"))
        model.gradient_checkpointing = False  # which diffusers 0.42.1 leaves out
    with torch.no_grad():
        for parameter in visible(model).parameters():
            if parameter.ndim <= 1 and not parameter.any():  # gates that start closed
                nn.init.normal_(parameter)
    return model


def call(name: str, model: nn.Module) -> Tensor:
    """All tensors that `model` returns, in one row."""
    generator = torch.Generator().manual_seed(1)
    inputs = MODELS[name][1](lambda *shape: torch.randn(*shape, generator=generator))
    return torch.cat([tensor.flatten() for tensor in _tensors(model(**inputs))])


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    return [t for part in output for t in _tensors(part)] if hasattr(output, "__iter__") else []


def _ids(height: int, width: int, axes: int = 3) -> Tensor:
    """Position ids (height * width, axes), the last two of them rows and columns."""
    grid = torch.stack(torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij"), -1)
    return torch.cat([torch.zeros(height * width, axes - 2), grid.flatten(0, 1)], -1)


# fmt: off
UNET: dict[str, Any] = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CONTROLNET = {name: value for name, value in UNET.items() if name != "up_block_types"} | {
    "attention_head_dim": 2, "conditioning_embedding_out_channels": (4, 8),
}
MOTION = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 8,
    "num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 4,
}
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
FLUX = DIT | {
    "in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4),
}
WAN = DIT | {
    "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16,
    "rope_max_seq_len": 16,
}
HUNYUAN_VIDEO = DIT | {
    "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 8,
    "pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4),
}
LTX = DIT | {
    "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 8,
}
SANA = DIT | {
    "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
    "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 8,
}
HUNYUAN_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 32, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 16,
    "text_len": 5, "text_len_t5": 5,
}
SD3 = DIT | {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 8, "caption_projection_dim": 16,
    "pooled_projection_dim": 8, "pos_embed_max_size": 8,
}
QWEN = DIT | {
    "in_channels": 16, "out_channels": 4, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4),
}
ACE = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "audio_acoustic_hidden_dim": 4, "sliding_window": 2,
}
COSMOS = {
    "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "text_embed_dim": 8, "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
}


def _unet_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {"sample": r(B, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": r(B, 5, 8)}


def _video_unet_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {"sample": r(B, 4, 2, 8, 8), "timestep": TIMES, "encoder_hidden_states": r(B, 5, 8)}


def _flux_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": r(B, 6, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": UNIT_TIMES,
        "img_ids": _ids(2, 3), "txt_ids": torch.zeros(5, 3),
    }


def _text_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": r(B, 4, 8, 8), "encoder_hidden_states": r(B, 5, 8), "timestep": TIMES}


def _video_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": r(B, 4, 2, 4, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": TIMES}


def _sd3_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return _text_inputs(r) | {"pooled_projections": r(B, 8)}


def _hunyuan_dit_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    rotary = r(16, 16)
    return _text_inputs(r) | {
        "timestep": TIMES.float(),
        "text_embedding_mask": MASK.float(), "encoder_hidden_states_t5": r(B, 5, 8),
        "text_embedding_mask_t5": MASK.float(),
        "image_meta_size": torch.tensor([[8.0, 8, 8, 8, 0, 0]] * B), "style": torch.zeros(B, dtype=torch.long),
        "image_rotary_emb": (rotary.cos(), rotary.sin()), "return_dict": False,
    }


def _qwen_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": r(B, 6, 16), "encoder_hidden_states": r(B, 5, 8), "encoder_hidden_states_mask": MASK,
        "timestep": UNIT_TIMES, "img_shapes": [[(1, 2, 3)]] * B,
    }


def _ltx2_inputs(r: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": r(B, 8, 4), "audio_hidden_states": r(B, 3, 4), "encoder_hidden_states": r(B, 5, 8),
        "audio_encoder_hidden_states": r(B, 5, 8), "timestep": TIMES, "encoder_attention_mask": MASK,
        "audio_encoder_attention_mask": MASK, "num_frames": 2, "height": 2, "width": 2, "audio_num_frames": 3,
    }


MODELS: dict[str, tuple[dict[str, Any], Inputs]] = {
    # UNets
    "UNet2DModel": (
        {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda r: {"sample": r(B, 3, 8, 8), "timestep": TIMES}),
    "UNet2DConditionModel": (
        UNET | {"attention_head_dim": 2},
        lambda r: _unet_inputs(r) | {"encoder_attention_mask": MASK}),
    "UNet2DConditionModel (text among the keys)": (  # DeepFloyd IF, Kandinsky 2
        UNET | {"attention_head_dim": 4, "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")},
        _unet_inputs),
    "UNet2DConditionModel (gated)": (  # GLIGEN
        UNET | {"attention_head_dim": 2, "attention_type": "gated"},
        lambda r: _unet_inputs(r) | {"cross_attention_kwargs": {"gligen": {
            "boxes": torch.tensor([[[0.1, 0.1, 0.5, 0.6]]] * B), "positive_embeddings": r(B, 1, 8),
            "masks": torch.ones(B, 1)}}}),
    "UNet3DConditionModel": (
        UNET | {"attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        _video_unet_inputs),
    "I2VGenXLUNet": (
        UNET | {"attention_head_dim": 2, "num_attention_heads": 2,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "sample_size": 8},
        lambda r: _video_unet_inputs(r) | {
            "fps": torch.tensor([2, 8]), "image_latents": r(B, 4, 2, 8, 8), "image_embeddings": r(B, 8)}),
    "UNetMotionModel": (
        MOTION | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                  "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        lambda r: _video_unet_inputs(r) | {"encoder_hidden_states": r(B * 2, 5, 8)}),
    "UNetSpatioTemporalConditionModel": (
        {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 8, "num_attention_heads": 2,
         "in_channels": 4, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "num_frames": 2},
        lambda r: {"sample": r(B, 2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": r(B, 1, 8),
                   "added_time_ids": torch.ones(B, 3)}),
    "Kandinsky3UNet": (
        {"time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2,
         "block_out_channels": (8, 8, 16, 16), "cross_attention_dim": 8, "encoder_hid_dim": 8},
        lambda r: _unet_inputs(r) | {"encoder_attention_mask": MASK}),
    "StableCascadeUNet": (
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 8,
         "block_out_channels": (8, 8), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
         "up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": 8, "clip_seq": 2,
         "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1)},
        lambda r: {"sample": r(B, 4, 8, 8), "timestep_ratio": UNIT_TIMES, "clip_text_pooled": r(B, 1, 8)}),
    "UVit2DModel": (
        {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 12,
         "encoder_hidden_size": 8, "vocab_size": 12, "codebook_size": 10, "in_channels": 8, "block_out_channels": 8,
         "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "sample_size": 4},
        lambda r: {"input_ids": torch.arange(32).view(B, 4, 4) % 12, "encoder_hidden_states": r(B, 5, 8),
                   "pooled_text_emb": r(B, 8), "micro_conds": r(B, 3)}),
    "DreamLiteUNetModel": (
        UNET | {"attention_head_dim": 4, "num_kv_heads": 1, "use_linear_projection": True,
                "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
                "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D")},
        _unet_inputs),
    "AudioLDM2UNet2DConditionModel": (
        UNET | {"attention_head_dim": 2, "cross_attention_dim": [[None, 8]] * 2},
        lambda r: _unet_inputs(r) | {"encoder_hidden_states_1": r(B, 5, 8)}),
    "UNetControlNetXSModel": (
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "num_attention_heads": 2,
         "sample_size": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "ctrl_conditioning_embedding_out_channels": (4, 8),
         "ctrl_block_out_channels": (4, 8), "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 4},
        lambda r: _unet_inputs(r) | {"controlnet_cond": r(B, 3, 16, 16)}),
    "UniDiffuserModel": (
        DIT | {"text_dim": 8, "clip_img_dim": 8, "num_text_tokens": 5, "in_channels": 4, "out_channels": 4,
               "sample_size": 8, "patch_size": 2, "norm_num_groups": 4, "num_layers": 3},
        lambda r: {"latent_image_embeds": r(B, 4, 8, 8), "image_embeds": r(B, 1, 8), "prompt_embeds": r(B, 5, 8),
                   "timestep_img": 5, "timestep_text": 7}),
    # ControlNets
    "ControlNetModel": (CONTROLNET, lambda r: _unet_inputs(r) | {"controlnet_cond": r(B, 3, 16, 16)}),
    "ControlNetUnionModel": (
        CONTROLNET | {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8, "num_control_type": 2,
                      "block_out_channels": (8, 16), "addition_embed_type": "text_time",
                      "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32},
        lambda r: _unet_inputs(r) | {
            "controlnet_cond": [r(B, 3, 16, 16)], "control_type": torch.tensor([[1.0, 0.0]] * B),
            "control_type_idx": [0], "conditioning_scale": [1.0],
            "added_cond_kwargs": {"text_embeds": r(B, 8), "time_ids": torch.ones(B, 6)}}),
    "SparseControlNetModel": (
        {name: value for name, value in MOTION.items() if name != "num_attention_heads"} | {
            "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")},
        lambda r: _video_unet_inputs(r) | {
            "encoder_hidden_states": r(B * 2, 5, 8), "controlnet_cond": r(B, 4, 2, 8, 8),
            "conditioning_mask": torch.ones(B, 1, 2, 8, 8)}),
    "FluxControlNetModel": (
        FLUX | {"pooled_projection_dim": 8},
        lambda r: _flux_inputs(r) | {"pooled_projections": r(B, 8), "controlnet_cond": r(B, 6, 4)}),
    "SD3ControlNetModel": (SD3, lambda r: _sd3_inputs(r) | {"controlnet_cond": r(B, 4, 8, 8)}),
    "QwenImageControlNetModel": (QWEN, lambda r: _qwen_inputs(r) | {"controlnet_cond": r(B, 6, 16)}),
    "HunyuanDiT2DControlNetModel": (
        HUNYUAN_DIT | {"transformer_num_layers": 4},
        lambda r: _hunyuan_dit_inputs(r) | {"controlnet_cond": r(B, 4, 8, 8)}),
    "SanaControlNetModel": (SANA, lambda r: _text_inputs(r) | {"controlnet_cond": r(B, 4, 8, 8)}),
    "CosmosControlNetModel": (
        COSMOS | {"n_controlnet_blocks": 1, "in_channels": 6, "latent_channels": 6, "model_channels": 24},
        lambda r: {"controls_latents": r(B, 4, 2, 4, 4), "latents": r(B, 4, 2, 4, 4), "timestep": TIMES,
                   "encoder_hidden_states": r(B, 5, 8), "condition_mask": torch.ones(B, 1, 2, 4, 4),
                   "padding_mask": torch.zeros(1, 1, 4, 4)}),
    # transformers: text beside images
    "Transformer2DModel": (
        DIT | {"in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda r: {"hidden_states": r(B, 8, 4, 4), "encoder_hidden_states": r(B, 5, 8)}),
    "DreamLiteTransformer2DModel": (
        DIT | {"in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 8},
        lambda r: {"hidden_states": r(B, 16, 4, 4), "encoder_hidden_states": r(B, 5, 8)}),
    "TransformerTemporalModel": (
        DIT | {"in_channels": 8, "norm_num_groups": 4},
        lambda r: {"hidden_states": r(B * 3, 8, 4, 4), "num_frames": 3}),
    "DiTTransformer2DModel": (
        DIT | {"sample_size": 8, "num_embeds_ada_norm": 1000},
        lambda r: {"hidden_states": r(B, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 2])}),
    "PixArtTransformer2DModel": (
        DIT | {"sample_size": 8, "cross_attention_dim": 16, "caption_channels": 8, "use_additional_conditions": False},
        lambda r: _text_inputs(r) | {"encoder_attention_mask": MASK, "added_cond_kwargs": {
            "resolution": None, "aspect_ratio": None}}),
    "SanaTransformer2DModel": (SANA, lambda r: _text_inputs(r) | {"encoder_attention_mask": MASK}),
    "SanaVideoTransformer3DModel": (
        SANA | {"attention_head_dim": 12, "num_layers": 1, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
                "rope_max_seq_len": 16},
        _video_inputs),
    "HunyuanDiT2DModel": (HUNYUAN_DIT | {"num_layers": 2}, _hunyuan_dit_inputs),
    "LatteTransformer3DModel": (
        DIT | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16,
               "caption_channels": 8, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "video_length": 2,
               "norm_elementwise_affine": False},
        lambda r: _video_inputs(r) | {"hidden_states": r(B, 4, 2, 8, 8)}),
    "LuminaNextDiT2DModel": (
        {"sample_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
         "multiple_of": 4, "cross_attention_dim": 8},
        lambda r: _text_inputs(r) | {
            "timestep": UNIT_TIMES, "encoder_mask": MASK,
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), r(8, 8, 4)), "cross_attention_kwargs": {}}),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 1, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 4, "axes_dim_rope": (4, 2, 2),
         "axes_lens": (32, 16, 16), "cap_feat_dim": 8},
        lambda r: _text_inputs(r) | {"timestep": UNIT_TIMES, "encoder_attention_mask": MASK.bool()}),
    "PriorTransformer": (
        DIT | {"embedding_dim": 8, "num_embeddings": 5},
        lambda r: {"hidden_states": r(B, 8), "timestep": TIMES, "proj_embedding": r(B, 8),
                   "encoder_hidden_states": r(B, 5, 8)}),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 16, "pos_embed_max_size": 16},
        lambda r: _text_inputs(r) | {"timestep": UNIT_TIMES}),
    "SD3Transformer2DModel": (
        SD3 | {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}, _sd3_inputs),
    "FluxTransformer2DModel": (
        FLUX | {"pooled_projection_dim": 8}, lambda r: _flux_inputs(r) | {"pooled_projections": r(B, 8)}),
    "Flux2Transformer2DModel": (
        FLUX | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8},
        lambda r: _flux_inputs(r) | {"img_ids": _ids(2, 3, 4), "txt_ids": torch.zeros(5, 4), "guidance": UNIT_TIMES}),
    "ChromaTransformer2DModel": (
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 8, "approximator_layers": 1}, _flux_inputs),
    "BriaTransformer2DModel": (FLUX | {"axes_dims_rope": [2, 2, 4]}, _flux_inputs),
    "BriaFiboTransformer2DModel": (
        FLUX | {"axes_dims_rope": [2, 2, 4], "text_encoder_dim": 8},
        lambda r: _flux_inputs(r) | {"text_encoder_layers": [r(B, 5, 8), r(B, 5, 8)]}),
    "LongCatImageTransformer2DModel": (FLUX, _flux_inputs),
    "OvisImageTransformer2DModel": (FLUX | {"out_channels": 4}, _flux_inputs),
    "QwenImageTransformer2DModel": (QWEN, _qwen_inputs),
    "CogView3PlusTransformer2DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
               "sample_size": 8, "pos_embed_max_size": 8},
        lambda r: _text_inputs(r) | {"original_size": SIZE, "target_size": SIZE, "crop_coords": SIZE}),
    "CogView4Transformer2DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
               "sample_size": 8, "pos_embed_max_size": 8, "rope_axes_dim": (8, 8)},
        lambda r: _text_inputs(r) | {"original_size": SIZE, "target_size": SIZE, "crop_coords": SIZE}),
    "GlmImageTransformer2DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
               "prior_vq_quantizer_codebook_size": 10},
        lambda r: _text_inputs(r) | {
            "target_size": SIZE, "crop_coords": SIZE, "prior_token_id": torch.arange(32).view(B, 16) % 10,
            "prior_token_drop": torch.zeros(B, 16, dtype=torch.bool)}),
    "HiDreamImageTransformer2DModel": (
        DIT | {"patch_size": 2, "in_channels": 4, "num_single_layers": 1, "caption_channels": [8, 8],
               "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2),
               "max_resolution": (4, 4), "llama_layers": (0, 1)},
        lambda r: {"hidden_states": r(B, 4, 8, 8), "timesteps": TIMES, "encoder_hidden_states_t5": r(B, 5, 8),
                   "encoder_hidden_states_llama3": r(2, B, 5, 8), "pooled_embeds": r(B, 8)}),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "context_in_dim": 8, "hidden_size": 16, "num_heads": 2, "depth": 1, "axes_dim": [4, 4]},
        lambda r: _text_inputs(r) | {"timestep": UNIT_TIMES, "attention_mask": MASK.bool()}),
    "ErnieImageTransformer2DModel": (
        {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 8, "rope_axes_dim": (4, 2, 2)},
        lambda r: {"hidden_states": r(B, 4, 2, 3), "timestep": TIMES, "text_bth": r(B, 5, 8),
                   "text_lens": torch.tensor([5, 3])}),
    "ZImageTransformer2DModel": (
        {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 8, "axes_dims": [4, 2, 2], "axes_lens": [64, 8, 8]},
        lambda r: {"x": [r(4, 1, 4, 4), r(4, 1, 4, 4)], "t": UNIT_TIMES, "cap_feats": [r(5, 8), r(3, 8)]}),
    "Krea2Transformer2DModel": (
        DIT | {"in_channels": 4, "num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 8,
               "text_hidden_dim": 8, "num_text_layers": 2, "text_num_attention_heads": 2,
               "text_num_key_value_heads": 1, "text_intermediate_size": 8, "num_layerwise_text_blocks": 1,
               "num_refiner_text_blocks": 1, "axes_dims_rope": (2, 2, 4)},
        lambda r: {"hidden_states": r(B, 6, 4), "encoder_hidden_states": r(B, 5, 2, 8), "timestep": UNIT_TIMES,
                   "position_ids": torch.cat([torch.zeros(5, 3), _ids(2, 3)]), "encoder_attention_mask": MASK.bool()}),
    # transformers: video and audio
    "WanTransformer3DModel": (WAN, _video_inputs),
    "ChronoEditTransformer3DModel": (WAN | {"rope_temporal_skip_len": 2}, _video_inputs),
    "WanVACETransformer3DModel": (
        WAN | {"vace_layers": [0], "vace_in_channels": 6},
        lambda r: _video_inputs(r) | {"control_hidden_states": r(B, 6, 2, 4, 4)}),
    "SkyReelsV2Transformer3DModel": (WAN, _video_inputs),
    "AnyFlowTransformer3DModel": (WAN, lambda r: _video_inputs(r) | {
        "hidden_states": r(B, 2, 4, 4, 4), "timestep": torch.full((B, 2), 500.0),
        "r_timestep": torch.full((B, 2), 300.0)}),
    "HeliosTransformer3DModel": (
        {name: value for name, value in WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        _video_inputs),
    "CogVideoXTransformer3DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8, "sample_width": 4,
               "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 5},
        lambda r: _video_inputs(r) | {"hidden_states": r(B, 2, 4, 4, 4)}),
    "ConsisIDTransformer3DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8, "sample_width": 4,
               "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 5},
        lambda r: _video_inputs(r) | {"hidden_states": r(B, 2, 4, 4, 4)}),
    "AllegroTransformer3DModel": (
        DIT | {"attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8, "sample_height": 4,
               "sample_width": 4, "sample_frames": 2},
        lambda r: _video_inputs(r) | {
            "attention_mask": torch.ones(B, 2, 4, 4), "encoder_attention_mask": MASK, "image_rotary_emb": (
                [(r(8, 4), r(8, 4))] * 3, [torch.arange(8)[None]] * 3)}),
    "LTXVideoTransformer3DModel": (
        LTX, lambda r: {"hidden_states": r(B, 8, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": TIMES,
                        "encoder_attention_mask": MASK, "num_frames": 2, "height": 2, "width": 2}),
    "LTX2VideoTransformer3DModel": (
        LTX | {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
               "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8},
        _ltx2_inputs),
    "MochiTransformer3DModel": (
        DIT | {"in_channels": 4, "pooled_projection_dim": 16, "text_embed_dim": 8, "time_embed_dim": 4,
            "num_layers": 2},
        lambda r: _video_inputs(r) | {"encoder_attention_mask": MASK.bool()}),
    "HunyuanVideoTransformer3DModel": (
        HUNYUAN_VIDEO, lambda r: _video_inputs(r) | {
            "encoder_attention_mask": MASK, "pooled_projections": r(B, 8), "guidance": torch.tensor([1.0, 6.0])}),
    "HunyuanVideoFramepackTransformer3DModel": (
        HUNYUAN_VIDEO | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        lambda r: _video_inputs(r) | {
            "encoder_attention_mask": MASK, "pooled_projections": r(B, 8), "guidance": torch.tensor([1.0, 6.0]),
            "image_embeds": r(B, 3, 8), "indices_latents": torch.arange(2),
            "latents_clean": r(B, 4, 1, 4, 4), "indices_latents_clean": torch.arange(1),
            "latents_history_2x": r(B, 4, 2, 4, 4), "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": r(B, 4, 4, 8, 8), "indices_latents_history_4x": torch.arange(4)}),
    "HunyuanVideo15Transformer3DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": 8,
               "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (2, 2, 4), "target_size": 8},
        lambda r: _video_inputs(r) | {
            "timestep": TIMES.float(), "encoder_attention_mask": MASK, "encoder_hidden_states_2": r(B, 5, 8),
            "encoder_attention_mask_2": MASK,
            "image_embeds": r(B, 3, 8)}),
    "HunyuanImageTransformer2DModel": (
        {name: value for name, value in HUNYUAN_VIDEO.items() if name != "pooled_projection_dim"} | {
            "rope_axes_dim": (4, 4)},
        lambda r: _text_inputs(r) | {"hidden_states": r(B, 4, 3, 3), "encoder_attention_mask": MASK,
            "timestep": TIMES.float()}),
    "MotifVideoTransformer3DModel": (
        {name: value for name, value in HUNYUAN_VIDEO.items()
         if name not in ("pooled_projection_dim", "num_refiner_layers")} | {
            "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True},
        lambda r: _video_inputs(r) | {"encoder_attention_mask": MASK}),
    "CosmosTransformer3DModel": (
        COSMOS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "concat_padding_mask": False},
        lambda r: _video_inputs(r) | {"attention_mask": MASK.bool()}),
    "StableAudioDiTModel": (
        DIT | {"sample_size": 6, "in_channels": 4, "out_channels": 4, "num_key_value_attention_heads": 1,
               "cross_attention_dim": 8, "time_proj_dim": 8, "global_states_input_dim": 8,
               "cross_attention_input_dim": 8},
        lambda r: {"hidden_states": r(B, 4, 6), "timestep": TIMES, "encoder_hidden_states": r(B, 5, 8),
                   "global_hidden_states": r(B, 1, 8), "rotary_embedding": (r(7, 4).cos(), r(7, 4).sin())}),
    "StableAudio3DiTModel": (
        {"io_channels": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "cond_token_dim": 8, "global_cond_dim": 8,
         "local_add_cond_dim": 5, "timestep_features_dim": 8, "num_memory_tokens": 2},
        lambda r: {"hidden_states": r(B, 4, 6), "timestep": UNIT_TIMES, "encoder_hidden_states": r(B, 5, 8),
                   "global_hidden_states": r(B, 8), "local_add_cond": r(B, 5, 6)}),
    "AceStepTransformer1DModel": (
        ACE | {"num_hidden_layers": 2, "in_channels": 12},
        lambda r: {"hidden_states": r(B, 6, 4), "timestep": UNIT_TIMES, "timestep_r": UNIT_TIMES,
                   "encoder_hidden_states": r(B, 5, 16), "context_latents": r(B, 6, 8)}),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4},
        lambda r: {"hidden_states": r(B, 6, 4), "encoder_hidden_states": r(B, 5, 8),
                   "encoder_attention_mask": MASK.bool(), "timestep": UNIT_TIMES, "latent_cond": r(B, 6, 4)}),
    "MiniMaxMusic3Transformer1DModel": (
        DIT | {"in_channels": 4, "condition_dim": 8, "ff_inner_dim": 16, "rotary_dim": 4, "fourier_embedding_dim": 8},
        lambda r: {"hidden_states": r(B, 4, 6), "timestep": UNIT_TIMES, "encoder_hidden_states": r(B, 6, 8)}),
    "AnyFlowFARTransformer3DModel": (
        WAN | {"chunk_partition": (1, 1), "compressed_patch_size": (1, 2, 2)},
        lambda r: _video_inputs(r) | {
            "hidden_states": r(B, 2, 4, 4, 4), "timestep": torch.full((B, 2), 500.0),
            "r_timestep": torch.full((B, 2), 300.0), "chunk_partition": [1, 1]}),
    "AnimaTextConditioner": (
        {"source_dim": 8, "target_dim": 8, "model_dim": 16, "num_layers": 1, "num_attention_heads": 2,
         "target_vocab_size": 10, "min_sequence_length": 4},
        lambda r: {"source_hidden_states": r(B, 5, 8), "target_input_ids": torch.arange(8).view(B, 4)}),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "audio_vocab_size": 8},
        lambda r: {"inputs_embeds": r(B, 5, 16)}),
    "BriaFibo2Transformer2DModel": (
        {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 8,
         "injection_layer_ids": (0,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
         "gist_step": 2, "gist_min_text_len": 1, "gist_max_text_len": 8, "axes_dims": (4, 2, 2),
         "axes_lens": (64, 16, 16)},
        lambda r: {"hidden_states": r(B, 4, 4, 4), "timestep": UNIT_TIMES, "encoder_hidden_states": r(B, 2, 5, 8),
                   "encoder_attention_mask": MASK.bool()}),
    "Flux3Transformer2DModel": (
        FLUX | {"cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        lambda r: {"hidden_states": r(B, 6, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": UNIT_TIMES,
                   "img_ids": _ids(2, 3, 4), "txt_ids": torch.zeros(5, 4), "image_cond_hidden_states": r(B, 3, 4),
                   "image_cond_ids": _ids(1, 3, 4)}),
    "Kandinsky5Transformer3DModel": (
        {"in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 16, "ff_dim": 16, "num_text_blocks": 1,
         "num_visual_blocks": 1, "axes_dims": (4, 2, 2)},
        lambda r: {"hidden_states": r(B, 2, 4, 4, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": TIMES,
                   "pooled_projections": r(B, 8), "text_rope_pos": torch.arange(5),
                   "visual_rope_pos": [torch.arange(2)] * 3}),
    "Kandinsky6Transformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 16,
         "ff_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 2, 2), "visual_cond": False,
         "in_audio_dim": 4, "out_audio_dim": 4},
        lambda r: {"hidden_states": r(B, 2, 4, 4, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": TIMES,
                   "pooled_projections": r(B, 8), "audio_hidden_states": r(B, 3, 4)}),
    "QwenImage21Transformer2DModel": (
        DIT | {"in_channels": 4, "out_channels": 4, "context_in_dim": 8, "axes_dims_rope": (2, 2, 4)},
        lambda r: {"hidden_states": r(B, 4, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": UNIT_TIMES,
                   "img_shapes": [[(1, 2, 2)]] * B, "img_mask": torch.tensor([[False] * 5 + [True]] * B),
                   "encoder_hidden_states_mask": MASK}),
    "RFD4ProteinaTransformer": (
        {"nlayers": 1, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 4,
         "token_type_emb_dim": 4, "cath_emb_dim": 4, "t_emb_dim": 8, "seq_sep_dim": 5, "xt_pair_dist_dim": 5,
         "tri_mult_c": 8, "feats_seq": ("xt_bb_ca", "xt_local_latents"),
         "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",),
         "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents")},
        lambda r: {"bb_ca": r(B, 6, 3), "local_latents": r(B, 6, 4), "bb_ca_time": UNIT_TIMES,
                   "local_latents_time": UNIT_TIMES, "padding_mask": torch.ones(B, 6, dtype=torch.bool),
                   "conditioning": {"is_in_context_conditioning": torch.zeros(B, 6),
                                    "supports_local_latent": torch.ones(B, 6)}}),
    "SanaWMTransformer3DModel": (
        {"in_channels": 4, "num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "softmax_every_n": 2,
         "linear_head_dim": 12, "chunk_plucker_channels": 4, "caption_channels": 8, "image_size": 32},
        lambda r: {"hidden_states": r(B, 4, 2, 4, 4), "timestep": TIMES[:, None].expand(B, 1)[:, None],
            "encoder_hidden_states": r(B, 1, 5, 8),
                   "encoder_attention_mask": MASK}),
    "SanaWMLTX2RefinerTransformer3DModel": (
        LTX | {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
               "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8},
        lambda r: {"hidden_states": r(B, 8, 4), "encoder_hidden_states": r(B, 5, 8), "timestep": TIMES,
                   "video_rotary_emb": (r(B, 8, 16).cos(), r(B, 8, 16).sin()), "encoder_attention_mask": MASK}),
    "EasyAnimateTransformer3DModel": (
        DIT | {"num_layers": 2, "mmdit_layers": 1, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "patch_size": 2,
               "sample_width": 4, "sample_height": 4, "time_embed_dim": 8, "text_embed_dim": 8},
        _video_inputs),
    "Ideogram4Transformer2DModel": (
        DIT | {"in_channels": 4, "intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 8,
               "mrope_section": (2, 1, 1)},
        lambda r: {"hidden_states": r(B, 11, 4), "timestep": UNIT_TIMES, "encoder_hidden_states": r(B, 11, 8),
                   "position_ids": torch.cat([torch.zeros(5, 3), _ids(2, 3)]).long().expand(B, 11, 3),
                   "segment_ids": torch.zeros(B, 11), "indicator": torch.tensor([[3] * 5 + [2] * 6] * B)}),
    "JoyImageEditTransformer3DModel": (
        {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 8, "num_layers": 1,
         "rope_dim_list": [4, 2, 2]},
        _video_inputs),
    "JoyImageEditPlusTransformer3DModel": (
        {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 8, "num_layers": 1,
         "rope_dim_list": [4, 2, 2]},
        lambda r: _video_inputs(r) | {"hidden_states": r(B, 4, 4, 1, 2, 2), "shape_list": [[(1, 2, 2)]] * B,
                                      "encoder_hidden_states_mask": MASK}),
    "MiniMaxH3Transformer3DModel": (
        DIT | {"hidden_size": 16, "num_refiner_layers": 1, "ffn_dim": 16, "in_channels": 4, "audio_in_channels": 4,
               "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 8, "time_embed_dim": 8, "rope_freq_dim": 1},
        lambda r: {"hidden_states": r(1, 4, 16), "audio_hidden_states": r(1, 3, 4),
            "encoder_hidden_states": r(1, 5, 8),
                   "timestep": TIMES[1:], "timestep_indices": torch.zeros(12, dtype=torch.long),
                   "token_tags": torch.tensor([0] * 5 + [1] * 4 + [2] * 3), "position_ids": _ids(3, 4),
                   "text_indices": torch.arange(5), "video_indices": torch.arange(5, 9),
                   "audio_indices": torch.arange(9, 12)}),
    "NucleusMoEImageTransformer2DModel": (
        DIT | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4),
               "num_key_value_heads": 1},
        lambda r: _qwen_inputs(r) | {"img_shapes": [(1, 2, 3)] * B, "encoder_hidden_states_mask": MASK.bool()}),
    "OmniGenTransformer2DModel": (
        {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
            "num_layers": 1,
         "pad_token_id": 0, "vocab_size": 10, "pos_embed_max_size": 8, "time_step_dim": 8,
         "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
        lambda r: {"hidden_states": r(B, 4, 4, 4), "timestep": UNIT_TIMES, "input_ids": torch.arange(10).view(B, 5),
                   "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(B, 10, 10),
                   "position_ids": torch.arange(10).expand(B, 10)}),
    "Cosmos3OmniTransformer": (
        {"head_dim": 8, "hidden_size": 16, "intermediate_size": 16, "latent_channel": 4, "num_attention_heads": 4,
         "num_hidden_layers": 2, "num_key_value_heads": 2, "patch_latent_dim": 16, "vocab_size": 10,
         "rope_axes_dim": (2, 1, 1)},
        lambda r: {"input_ids": torch.arange(5), "text_indexes": torch.arange(5), "position_ids": torch.arange(13),
                   "und_len": 5, "sequence_length": 13, "vision_tokens": [r(1, 4, 2, 4, 4)],
                   "vision_token_shapes": [(2, 2, 2)], "vision_sequence_indexes": torch.arange(5, 13),
                   "vision_mse_loss_indexes": torch.arange(5, 13), "vision_timesteps": torch.full((8,), 500.0),
                   "vision_noisy_frame_indexes": [torch.arange(2)]}),
    "WanAnimateTransformer3DModel": (
        WAN | {"in_channels": 12, "latent_channels": 4, "image_dim": 8, "added_kv_proj_dim": 24,
               "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16,
               "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8,
               "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1},
        lambda r: _video_inputs(r) | {
            "hidden_states": r(B, 12, 3, 4, 4), "encoder_hidden_states": r(B, 512, 8),
            "encoder_hidden_states_image": r(B, 3, 8),
            "pose_hidden_states": r(B, 4, 2, 4, 4), "face_pixel_values": r(B, 3, 8, 16, 16)}),
    "WanAnimate2Transformer3DModel": (
        {"text_len": 6, "in_dim": 8, "dim": 24, "ffn_dim": 16, "freq_dim": 8, "text_dim": 8, "out_dim": 4,
            "num_heads": 2,
         "num_layers": 1},
        lambda r: {"hidden_states": [r(4, 2, 4, 4), r(4, 2, 4, 4)],
            "condition_latents": [r(4, 2, 4, 4), r(4, 2, 4, 4)],
                   "timestep": TIMES, "encoder_hidden_states": [r(5, 8), r(4, 8)], "kv_cache": WanAnimate2KVCache(1),
                   "kv_cache_mode": "extract", "seq_len": 8, "encoder_hidden_states_image": r(B, 3, 1280),
                   "offset_grid_sizes": torch.tensor([[2, 2, 2]] * B)}),
    "AceStepConditionEncoder": (
        {name: value for name, value in ACE.items() if name != "audio_acoustic_hidden_dim"} | {
            "text_hidden_dim": 8, "timbre_hidden_dim": 4, "num_lyric_encoder_hidden_layers": 2,
            "num_timbre_encoder_hidden_layers": 2},
        lambda r: {"text_hidden_states": r(B, 5, 8), "text_attention_mask": MASK, "lyric_hidden_states": r(B, 5, 8),
                   "lyric_attention_mask": MASK, "refer_audio_acoustic_hidden_states_packed": r(B, 3, 4),
                   "refer_audio_order_mask": torch.arange(B)}),
    "AceStepAudioTokenDetokenizer": (
        ACE | {"num_attention_pooler_hidden_layers": 2}, lambda r: {"hidden_states": r(B, 2, 16)}),
    "ZImageControlNetModel": (
        {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4, "dim": 16,
         "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        lambda r: {"x": [r(4, 1, 4, 4), r(4, 1, 4, 4)], "t": UNIT_TIMES, "cap_feats": [r(5, 8), r(3, 8)],
                   "control_context": [r(4, 1, 4, 4), r(4, 1, 4, 4)]}),
}

# What of a model is left out, because the call below does not come to it.
CONFIGS = {
    "SanaWMLTX2RefinerTransformer3DModel": CoeffConfig(exclude="audio_*", include=("attn1", "attn2")),
}

REQUIRES = {"CosmosControlNetModel": "torchvision"}

_AUTOENCODER = "an autoencoder, no denoiser"
_NO_PROCESSOR = "no attention module with a processor"
_SEVERAL = "a list of models that are tested, or a holder of parts of one"

NOT_SERVED: dict[str, str] = {
    name: _AUTOENCODER for name, cls in model_classes().items() if ".autoencoders." in cls.__module__
} | {
    "AceStepAudioTokenizer": "its output is quantised, so that no gradient reaches coefficients",
    "AudioLDM2ProjectionModel": _NO_PROCESSOR,
    "CLIPImageProjection": _NO_PROCESSOR,
    "ControlNetXSAdapter": _SEVERAL,
    "FluxMultiControlNetModel": _SEVERAL,
    "HunyuanDiT2DMultiControlNetModel": _SEVERAL,
    "Ideogram4PromptEnhancerHead": _NO_PROCESSOR,
    "Kandinsky6SRLatentUpscalerBank": _NO_PROCESSOR,
    "Kandinsky6SRTransformer3DModel": "FlexAttention throughout, refused by name",
    "MiniMaxMusic3ConditionEncoder": _NO_PROCESSOR,
    "MotionAdapter": _SEVERAL,
    "MultiAdapter": _NO_PROCESSOR,
    "MultiControlNetModel": _SEVERAL,
    "QwenImageMultiControlNetModel": _SEVERAL,
    "ReduxImageEncoder": _NO_PROCESSOR,
    "SD3MultiControlNetModel": _SEVERAL,
    "StableAudio3DurationEmbedder": _NO_PROCESSOR,
    "StableAudioProjectionModel": _NO_PROCESSOR,
    "T2IAdapter": _NO_PROCESSOR,
    "T5FilmDecoder": "its attention is not scaled and computes its own softmax, refused by name",
    "UNet1DModel": _NO_PROCESSOR,
    "UniDiffuserTextDecoder": _NO_PROCESSOR,
}
# fmt: on
