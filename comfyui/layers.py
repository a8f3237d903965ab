"""The attention layers of ComfyUI's models, under the names that diffusers has for them.

A coefficient file names layers as diffusers does. ComfyUI keeps the modules of the original code:

    down_blocks.0.attentions.1.transformer_blocks.0.attn2    input_blocks.2.1.transformer_blocks.0.attn2
    mid_block.attentions.0.transformer_blocks.0.attn1        middle_block.1.transformer_blocks.0.attn1
    up_blocks.1.attentions.2.transformer_blocks.0.attn1      output_blocks.5.1.transformer_blocks.0.attn1
    transformer_blocks.7.attn                                double_blocks.7
    single_transformer_blocks.3.attn                         single_blocks.3
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ATTENTION = r"\.(\d+)\.transformer_blocks\.(\d+)\.(attn[12])"
_INPUT = re.compile(rf"input_blocks\.(\d+){_ATTENTION}")
_MIDDLE = re.compile(rf"middle_block{_ATTENTION}")
_OUTPUT = re.compile(rf"output_blocks\.(\d+){_ATTENTION}")
_DOWNSAMPLE = re.compile(r"input_blocks\.(\d+)\.\d+\.op")  # the convolution of a block that halves the resolution
_UPSAMPLE = re.compile(r"output_blocks\.(\d+)\.\d+\.conv")  # and of one whose last module doubles it
_DOUBLE, _SINGLE = re.compile(r"double_blocks\.(\d+)"), re.compile(r"single_blocks\.(\d+)")


def unet_layers(modules: Iterable[str]) -> dict[str, str]:
    """Name in diffusers -> module of a UNet of Stable Diffusion 1.x, 2.x or XL, that is a `CrossAttention`.

    Args:
        modules: the names of all modules of ComfyUI's model.
    """
    names = list(modules)
    downsamples = sorted(int(found[1]) for name in names if (found := _DOWNSAMPLE.fullmatch(name)))
    upsamples = sorted(int(found[1]) for name in names if (found := _UPSAMPLE.fullmatch(name)))
    layers = {}
    for name in names:
        if found := _MIDDLE.fullmatch(name):
            layers[f"mid_block.attentions.0.transformer_blocks.{found[2]}.{found[3]}"] = name
        elif found := _INPUT.fullmatch(name):
            before = [number for number in downsamples if number < int(found[1])]
            first = before[-1] + 1 if before else 1  # block 0 is the first convolution
            layers[_name("down_blocks", len(before), int(found[1]) - first, found[3], found[4])] = name
        elif found := _OUTPUT.fullmatch(name):
            before = [number for number in upsamples if number < int(found[1])]
            first = before[-1] + 1 if before else 0
            layers[_name("up_blocks", len(before), int(found[1]) - first, found[3], found[4])] = name
    return layers


def _name(side: str, block: int, attention: int, transformer: str, layer: str) -> str:
    return f"{side}.{block}.attentions.{attention}.transformer_blocks.{transformer}.{layer}"


def flux_layers(modules: Iterable[str]) -> dict[str, str]:
    """Name in diffusers -> module of FLUX.1, that is a block with one call for attention.

    Args:
        modules: the names of all modules of ComfyUI's model.
    """
    layers = {}
    for name in modules:
        if found := _DOUBLE.fullmatch(name):
            layers[f"transformer_blocks.{found[1]}.attn"] = name
        elif found := _SINGLE.fullmatch(name):
            layers[f"single_transformer_blocks.{found[1]}.attn"] = name
    return layers


def replaced_by_others(module: str, replaced: dict[str, dict[tuple, object]]) -> bool:
    """Whether ComfyUI's `patches_replace` computes this layer of a UNet otherwise, so that its forward is not called.

    Args:
        module: its name in ComfyUI's model.
        replaced: `"attn1"` or `"attn2"` -> block, as `("input", 4)` or `("input", 4, 0)` -> what replaces it.
    """
    found = _INPUT.fullmatch(module) or _OUTPUT.fullmatch(module)
    if found:
        block: tuple = (module.partition("_")[0], int(found[1]), int(found[3]))
    elif found := _MIDDLE.fullmatch(module):
        block = ("middle", 0, int(found[2]))
    else:
        return False
    others = replaced.get(module.rpartition(".")[2], {})
    return block in others or block[:2] in others
