"""What quantised layers hold, told of plain ones: their weights, and what each needs while it computes.

As read in bitsandbytes, torchao, optimum-quanto and diffusers' GGUF, and seen in the memory of a process on a CPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BITS = {"bnb_nf4": 4.127, "bnb_int8": 8.0, "torchao_int8": 8.0, "torchao_float8": 8.0}  # a weight, with its scales
BITS |= {"quanto_int8": 8.0, "quanto_float8": 8.0}
BITS_MOVED = {"bnb_nf4": 4.0}  # by --group_offload, where that is another number: its scales stay on the device
OF_AUTOGRAD = ("torchao", "gguf")  # the backward pass gets the weights of the forward pass
TWO_STEPS = ("torchao_float8", "quanto_int8", "quanto_float8", "gguf")  # to dequantise: cast, then scaled, or so


def quantised_layers(model: Any) -> Iterator[nn.Linear]:
    """The linear layers that are quantised, which are all but those that the libraries leave as they are."""
    kept = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not words and not any(name in path.split(".") for name in kept):
            yield module


def bits_of(method: str) -> float:
    """A weight's, with its scales; of a method that there is no flag for by its name."""
    return BITS.get(method) or (4.5 if re.search("int4|nf4|fp4", method, re.IGNORECASE) else 8.0)


def weight_bytes(model: Any, bits: float | None) -> int:
    """What the weights take, those of linear layers quantised to so many bits."""
    total = sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))
    if bits is not None:
        total -= sum(plain_bytes(each) - each.weight.numel() * bits / 8 for each in quantised_layers(model))
    return int(total)


def largest_layer(model: Any) -> int:
    """Bytes of the weights of the largest layer that is quantised, before it is."""
    return max(map(plain_bytes, quantised_layers(model)), default=0)


def plain_bytes(layer: nn.Linear) -> int:
    return layer.weight.numel() * layer.weight.itemsize


def compute_as_quantised(model: Any, method: str) -> None:
    """Has the layers hold, while they compute, what quantised ones do beside their weights.

    All dequantise their weights for it. Those of bitsandbytes and optimum-quanto let go of them and do it again in the
    backward pass. For torchao and GGUF autograd keeps them until then, or gradient checkpointing makes them again.
    """
    layers: list[Any] = list(quantised_layers(model))
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, method)


def _forward(layer: nn.Linear, method: str, inputs: Tensor) -> Tensor:
    if method.startswith(OF_AUTOGRAD):
        return nn.functional.linear(inputs, _dequantised(layer.weight, method), layer.bias)
    answer: Tensor = _Dequantising.apply(inputs, layer.weight, layer.bias, method)
    return answer


def _dequantised(weight: Tensor, method: str) -> Tensor:
    copy = weight.clone()
    return copy.clone() if method in TWO_STEPS else copy


class _Dequantising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, method: str) -> Tensor:
        ctx.weight, ctx.method = weight, method
        if method == "bnb_int8":  # which has it past checkpointing's reach, though frozen weights have no use for it
            ctx.inputs = inputs
        elif method != "bnb_nf4":
            ctx.save_for_backward(inputs)
        return nn.functional.linear(inputs, _dequantised(weight, method), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight = _dequantised(ctx.weight, ctx.method)
        return grads[0].to(weight.dtype) @ weight, None, None, None
