"""What the ways to compute mixed attention share: dtypes, the matrix alpha, softmax, the layout of the output."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of maps and sums, for inputs of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def alpha_of(coeff: Tensor, query: Tensor) -> Tensor:
    """I + coeff for each sample, (B, H, H), in the accumulation dtype of the query."""
    wide = accumulation_dtype(query.dtype)
    alpha = torch.eye(coeff.shape[-1], dtype=wide, device=coeff.device) + coeff.to(wide)
    return alpha.expand(query.shape[0], -1, -1)


def gain_of(alpha: Tensor) -> Tensor:
    """What mixed maps are multiplied by where they are kept in float16, for each output head, (B, H, 1), a power of 2.

    Entries of a map of 4,096 keys are some 2e-4, of which float16 keeps less than its 11 bits. 2**10, or what keeps
    sums of alpha's row below 2**15, since no entry of a map exceeds 1.
    """
    largest = alpha.abs().sum(-1, keepdim=True)
    return torch.exp2(torch.floor(15 - torch.log2(largest)).clamp(max=10.0))


def masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool, first_row: int = 0) -> Tensor:
    """(..., T, S) scores of the queries from `first_row` on, less what the mask hides."""
    T, S = scores.shape[-2:]
    if is_causal:
        rows = torch.arange(first_row, first_row + T, device=scores.device)
        attn_mask = rows[:, None] >= torch.arange(S, device=scores.device)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask.to(scores.dtype)


def softmax(scores: Tensor, has_mask: bool) -> Tensor:
    """Softmax over the keys; zeros, as from `scaled_dot_product_attention`, for a row whose keys are all masked."""
    if not has_mask or scores.shape[-1] == 0:
        return torch.softmax(scores, dim=-1)
    empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)  # twice: no NaN in a gradient


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """(B, H, T, E) in the memory of (B, T, H, E), which models make of it next."""
    B, H, T = query.shape[:3]
    return query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
