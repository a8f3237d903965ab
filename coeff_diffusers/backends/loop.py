"""Mixed attention by torch's functions, in a loop over blocks of query rows: on any device, in any dtype.

The maps of a block are formed whole, in float32 (float64 for float64 inputs), mixed by one product, and formed again
in the backward pass. For 16-bit inputs on an accelerator the two large products, queries by keys and maps by values,
and those of the backward pass take 16-bit operands and add them up in float32, so that they run on its matrix units;
scores, softmax and mixing stay float32. On a CPU all is done in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import accumulation_dtype, alpha_of, empty_output, gain_of, masked, softmax

# Entries of an array of maps, of which a block has three or four at a time. On a CPU these are 8 MB of float32. An
# accelerator must be filled: an array may take a 512th part of its memory; where that is not known, 2**23 float32 are
# 32 MB. That is not measured.
_BLOCK_ENTRIES_CPU = 2**21
_BLOCK_ENTRIES_ACCELERATOR = 2**23
_BLOCK_MEMORY_SHARE = 1 / 512


def forward(
    query: Tensor, key: Tensor, value: Tensor, coeff: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, laid out as (B, T, H, E); and -inf in the place of statistics, of which [`backward`] reads none."""
    alpha, products = alpha_of(coeff, query), _Products(query)
    out = empty_output(query, value)
    with torch.autocast(query.device.type, enabled=False):
        for b, t in _blocks(query, key):
            maps = _maps(products, query[b, :, t], key[b], _block_of(attn_mask, b, t), is_causal, t.start, scale)
            out[b, :, t] = products.of_mixed(alpha[b], maps, value[b])
    # were another way to read them after all, its gradients would not be finite, rather than wrong
    return out, query.new_full((2, *query.shape[:3]), float("-inf"), dtype=torch.float32)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    statistics: Tensor,
    is_causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and alpha, empty where not wanted. Sums over blocks are kept wide.

    With M = alpha maps:    dV = M^T dO,  dM = dO V^T,  dalpha = dM maps^T,  dmaps = alpha^T dM,
                            dscores = softmax'(dmaps),  dQ = dscores K scale,  dK = dscores^T Q scale.
    """
    alpha, products = alpha_of(coeff, query), _Products(query)
    inputs = (query, key, value, alpha)
    sums = [torch.zeros_like(x, dtype=alpha.dtype) if wants else x.new_empty(0) for x, wants in zip(inputs, wanted)]
    grad_query, grad_key, grad_value, grad_alpha = sums
    with torch.autocast(query.device.type, enabled=False):
        for b, t in _blocks(query, key):
            maps = _maps(products, query[b, :, t], key[b], _block_of(attn_mask, b, t), is_causal, t.start, scale)
            block_grad = grad_out[b, :, t]
            if wanted[2]:
                grad_value[b] += products.of_mixed(alpha[b], maps, block_grad, transposed=True)
            if not (wanted[0] or wanted[1] or wanted[3]):
                continue
            grad_mixed = products(block_grad, value[b].mT)
            if wanted[3]:
                # a row at a time: in one product of all, whose terms nearly cancel, more is lost
                grad_alpha[b] += torch.einsum("bits, bjts -> btij", grad_mixed, maps).sum(1)
            if not (wanted[0] or wanted[1]):
                continue
            grad_maps = _mix(alpha[b].mT, grad_mixed)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_maps, maps, -1, maps.dtype)
            if wanted[0]:
                grad_query[b, :, t] = products(grad_scores, key[b]) * scale
            if wanted[1]:
                grad_key[b] += products(grad_scores.mT, query[b, :, t]) * scale
    return (*(x.to(like.dtype) for x, like in zip(sums, inputs)),)  # type: ignore[return-value]


class _Products:
    """(b, H, n, k) @ (b, H, k, m) in the accumulation dtype, of operands in the dtype that suits the device."""

    def __init__(self, query: Tensor) -> None:
        self.wide = accumulation_dtype(query.dtype)
        self.narrow = query.dtype if _multiplies_narrow(query) else None

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        if self.narrow is None:
            return left.to(self.wide) @ right.to(self.wide)
        left, right = (x.to(self.narrow) for x in (left, right))
        product: Tensor = _narrow_product(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])
        return product

    def of_mixed(self, alpha: Tensor, maps: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
        """alpha maps, or its transpose over queries and keys, times `right`."""
        if self.narrow != torch.float16:
            mixed = _mix(alpha, maps)
            return self(mixed.mT if transposed else mixed, right)
        gain = gain_of(alpha)
        mixed = _mix(alpha * gain, maps)
        return self(mixed.mT if transposed else mixed, right) / gain[..., None]


def _multiplies_narrow(query: Tensor) -> bool:
    """Whether the device multiplies 16-bit matrices into float32: Nvidia's with torch >= 2.8, not in all modes."""
    if query.device.type != "cuda" or torch.version.hip or not _HAS_OUT_DTYPE:
        return False
    if query.dtype == torch.float16:
        return not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) >= (8, 0)


_HAS_OUT_DTYPE = any("dtype" in overload for overload in torch.ops.aten.bmm.overloads())


def _narrow_product(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten.bmm.dtype(left, right, torch.float32)
    return product


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of query rows whose maps fit a budget: whole samples, or else some rows of one."""
    B, H, T, S = *query.shape[:3], key.shape[2]
    most_rows = max(1, _block_entries(query.device) // max(1, H * S))
    samples = max(1, min(B, most_rows // max(1, T)))
    for b in range(0, B, samples):
        for t in range(0, T, most_rows):
            yield slice(b, min(b + samples, B)), slice(t, min(t + most_rows, T))


def _block_entries(device: torch.device) -> int:
    """How many entries of the maps an array may have."""
    if device.type == "cpu":
        return _BLOCK_ENTRIES_CPU
    if device.type == "cuda":  # a part of the whole, not of what is free: asking for that waits for the device
        return int(torch.cuda.get_device_properties(device).total_memory * _BLOCK_MEMORY_SHARE / 4)
    return _BLOCK_ENTRIES_ACCELERATOR


def _block_of(attn_mask: Tensor | None, b: slice, t: slice) -> Tensor | None:
    if attn_mask is None:
        return None
    attn_mask = attn_mask[b if attn_mask.shape[0] > 1 else slice(None)]
    return attn_mask[:, :, t if attn_mask.shape[2] > 1 else slice(None)]


def _maps(
    products: _Products,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    first_row: int,
    scale: float,
) -> Tensor:
    """(b, H, t, S), in the accumulation dtype, of queries from `first_row` on."""
    if products.narrow is None:
        scores = products(query.to(products.wide) * scale, key.mT)
    else:  # the product would be rounded, and the scores are not
        scores = products(query, key.mT).mul_(scale)
    return softmax(masked(scores, attn_mask, is_causal, first_row), attn_mask is not None)


def _mix(alpha: Tensor, maps: Tensor) -> Tensor:
    """einsum("bij, bjts -> bits", alpha, maps)."""
    return (alpha @ maps.flatten(2)).view_as(maps)
