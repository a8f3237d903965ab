"""A Stable Diffusion in a single file, with the names of the original code, as such models are handed around."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: StableDiffusionPipeline, path: Path) -> Path:
    """For a UNet and a VAE of two blocks with one layer each."""
    unet = {f"model.diffusion_model.{_of_unet(key)}": value for key, value in pipeline.unet.state_dict().items()}
    vae = {f"first_stage_model.{_of_vae(key)}": _conv(key, value) for key, value in pipeline.vae.state_dict().items()}
    text = {
        f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
        for key, value in pipeline.text_encoder.state_dict().items()
    }
    save_file({key: value.contiguous() for key, value in (unet | vae | text).items()}, path)
    return path


def _of_unet(key: str) -> str:
    for name, original in ENDS.items():
        if key.startswith(f"{name}."):
            return key.replace(name, original, 1)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_of_layer(found[1], found[3])}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    side, block, what, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if what == "downsamplers":
        return f"input_blocks.2.0.{rest.replace('conv', 'op')}"
    if what == "upsamplers":
        return f"output_blocks.1.2.{rest}"
    place = f"input_blocks.{1 + 2 * block}" if side == "down" else f"output_blocks.{2 * block + layer}"
    return f"{place}.{int(what == 'attentions')}.{_of_layer(what, rest)}"


def _of_layer(what: str, rest: str) -> str:
    name, _, end = rest.partition(".")
    return f"{RESNET[name]}.{end}" if what == "resnets" else rest


def _of_vae(key: str) -> str:
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    if ".mid_block.attentions.0." in key:
        for name, original in ATTENTION.items():
            key = key.replace(f"attentions.0.{name}.", f"attn_1.{original}.")
    key = (
        key.replace("mid_block.", "mid.").replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    )
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{1 - int(found[1])}.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample", key)


def _conv(key: str, value: Tensor) -> Tensor:
    return value[..., None, None] if "attentions" in key and value.ndim == 2 else value
