r"""Attention whose heads share their maps.

    maps_j = softmax(Q_j K_j^T * scale + mask)              j = 1..H, the source map
    alpha  = I + coeff                                      coeff is Delta of the paper, (H, H)
    out_i  = (sum_j alpha_ij maps_j) V_i                    i = 1..H, the output head

Coeff-Tuning: Miao, Chen and Qiu, CVPR 2025, arXiv 2503.18337. Rows of ``coeff`` are output heads, columns are source
maps; ``coeff = 0`` is ordinary attention.

Letters: B batch, H heads (i output, j source), T queries, S keys, D head width of queries and keys, E of values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Map entries formed at a time on a CPU: 2**19 float32 are 2 MB, so that the few arrays of a block stay in a last-level
# cache. On an accelerator a block must be large enough to fill it; 2**26 float32 are 256 MB. The latter is unmeasured.
_BLOCK_ENTRIES_CPU = 2**19
_BLOCK_ENTRIES_ACCELERATOR = 2**26


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""`torch.nn.functional.scaled_dot_product_attention`, with the maps of all heads mixed by `I + coeff`.

    The maps are formed a block of query rows at a time and formed again in the backward pass, so that neither pass
    stores an array of T x S entries. Attention dropout and a mask that needs a gradient take the plain formula
    ([`mixed_attention_reference`]), which does.

    The softmax and the mixing are done in float32 (float64 for float64 inputs), with autocast switched off; under
    autocast the inputs are first cast as `scaled_dot_product_attention` casts them, so that the output has the dtype
    that the model expects.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D); (B, G, S, D) with `enable_gqa`, where G divides H.
        value: (B, H, S, E); (B, G, S, E) with `enable_gqa`.
        coeff: (H, H), or (B, H, H) for one matrix per sample. Row i, column j is how much of head j's map is added to
            head i's. Kept in its own dtype (float32 in an adapter) whatever the inputs' dtype is.
        attn_mask: broadcastable to (B, H, T, S); boolean (True takes part) or added to the scores. Rows that are
            masked out entirely give zeros.
        dropout_p: probability with which entries of the maps are dropped, before they are mixed.
        is_causal: masks keys s > t. Not together with `attn_mask`.
        scale: factor on the scores, `1 / sqrt(D)` by default.
        enable_gqa: lets groups of query heads share a key and value head. H counts query heads.

    Returns:
        (B, H, T, E), in the dtype of `query`.

    Raises:
        ValueError: if shapes do not fit; the message names both.
    """
    _check_shapes(query, key, value, coeff, attn_mask, is_causal, enable_gqa)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    coeff = coeff.to(query.device)
    with torch.autocast(device_type, enabled=False):
        if dropout_p > 0.0 or (attn_mask is not None and attn_mask.requires_grad):
            return mixed_attention_reference(
                query, key, value, coeff, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if enable_gqa:
            key, value = (_repeat_groups(x, query.shape[1]) for x in (key, value))
        if attn_mask is not None:
            attn_mask = _to_four_dims(attn_mask)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output: Tensor = _BlockwiseMixedAttention.apply(query, key, value, coeff, attn_mask, is_causal, scale)
        return output


def mixed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The formula as it stands at the head of this file: the oracle of the tests. Arguments as [`mixed_attention`].

    Forms all (B, H, T, S) maps at once, in float32 (float64 for float64 inputs).
    """
    _check_shapes(query, key, value, coeff, attn_mask, is_causal, enable_gqa)
    dtype, wide = query.dtype, _accumulation_dtype(query.dtype)
    query, key, value, coeff = (x.to(wide) for x in (query, key, value, coeff))
    if enable_gqa:
        key, value = (_repeat_groups(x, query.shape[1]) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bjtd, bjsd -> bjts", query, key) * scale
    maps = F.dropout(_softmax(_masked(scores, attn_mask, is_causal, 0), attn_mask is not None), dropout_p)
    alpha = torch.eye(coeff.shape[-1], dtype=wide, device=coeff.device) + coeff
    if alpha.ndim == 2:
        mixed = torch.einsum("ij, bjts -> bits", alpha, maps)
    else:
        mixed = torch.einsum("bij, bjts -> bits", alpha, maps)
    return torch.einsum("bits, bise -> bite", mixed, value).to(dtype)


class _BlockwiseMixedAttention(torch.autograd.Function):
    """The reference, a block of samples and query rows at a time. Backward forms each block's maps again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        coeff: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, coeff, attn_mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        alpha = _alpha(coeff, query.dtype)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for b, t in _blocks(query, key):
            maps = _block_maps(query, key, attn_mask, is_causal, scale, b, t)
            mixed = _mix(_per_sample(alpha, b), maps)
            out[b, :, t] = mixed @ value[b].to(mixed.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return _blockwise_backward(ctx, grad_out)


def _blockwise_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, coeff, attn_mask = ctx.saved_tensors
    needs_query, needs_key, needs_value, needs_coeff = ctx.needs_input_grad[:4]
    needs_scores = needs_query or needs_key
    alpha = _alpha(coeff, query.dtype)
    # key, value and coeff gather a sum over blocks, so they are kept wide until the end
    grad_query = torch.empty_like(query) if needs_query else None
    grad_key = torch.zeros_like(key, dtype=alpha.dtype) if needs_key else None
    grad_value = torch.zeros_like(value, dtype=alpha.dtype) if needs_value else None
    grad_alpha = torch.zeros_like(alpha) if needs_coeff else None

    for b, t in _blocks(query, key):
        maps = _block_maps(query, key, attn_mask, ctx.is_causal, ctx.scale, b, t)
        block_alpha = _per_sample(alpha, b)
        block_grad = grad_out[b, :, t].to(maps.dtype)
        if grad_value is not None:
            grad_value[b] += _mix(block_alpha, maps).mT @ block_grad
        if not (needs_scores or needs_coeff):
            continue
        grad_mixed = block_grad @ value[b].to(maps.dtype).mT  # (b, i, t, S)
        if grad_alpha is not None:
            per_sample = grad_mixed.flatten(2) @ maps.flatten(2).mT  # (b, i, j)
            if grad_alpha.ndim == 2:
                grad_alpha += per_sample.sum(0)
            else:
                grad_alpha[b] += per_sample
        if needs_scores:
            grad_maps = _mix(block_alpha.mT, grad_mixed)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_maps, maps, -1, maps.dtype) * ctx.scale
            if grad_query is not None:
                grad_query[b, :, t] = grad_scores @ key[b].to(maps.dtype)
            if grad_key is not None:
                grad_key[b] += grad_scores.mT @ query[b, :, t].to(maps.dtype)

    return (
        grad_query,
        None if grad_key is None else grad_key.to(key.dtype),
        None if grad_value is None else grad_value.to(value.dtype),
        None if grad_alpha is None else grad_alpha.to(coeff.dtype),
        None,
        None,
        None,
    )


def _blocks(query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """(samples, query rows) of each block: whole samples while they are small, else some rows of one sample."""
    B, H, T, S = *query.shape[:3], key.shape[2]
    entries = _BLOCK_ENTRIES_CPU if query.device.type == "cpu" else _BLOCK_ENTRIES_ACCELERATOR
    samples = max(1, entries // max(1, H * T * S))
    rows = max(1, entries // max(1, H * S)) if samples == 1 else T
    rows = max(1, min(rows, T))
    return [
        (slice(b, min(b + samples, B)), slice(t, min(t + rows, T)))
        for b in range(0, B, samples)
        for t in range(0, T, rows)
    ]


def _block_maps(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, b: slice, t: slice
) -> Tensor:
    """The maps (b, H, t, S) of a block, in the accumulation dtype."""
    wide = _accumulation_dtype(query.dtype)
    scores = (query[b, :, t].to(wide) * scale) @ key[b].to(wide).mT
    if attn_mask is not None:
        attn_mask = attn_mask[b if attn_mask.shape[0] > 1 else slice(None)]
        attn_mask = attn_mask[:, :, t if attn_mask.shape[2] > 1 else slice(None)]
    return _softmax(_masked(scores, attn_mask, is_causal, t.start), attn_mask is not None)


def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool, first_row: int) -> Tensor:
    T, S = scores.shape[-2:]
    if is_causal:
        rows = torch.arange(first_row, first_row + T, device=scores.device)
        attn_mask = rows[:, None] >= torch.arange(S, device=scores.device)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask.to(scores.dtype)


def _softmax(scores: Tensor, has_mask: bool) -> Tensor:
    """Softmax over the keys; zeros, as from `scaled_dot_product_attention`, for a row whose keys are all masked."""
    if not has_mask or scores.shape[-1] == 0:
        return torch.softmax(scores, dim=-1)
    empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)  # twice: no NaN in a gradient


def _mix(alpha: Tensor, maps: Tensor) -> Tensor:
    """einsum("ij, bjts -> bits", alpha, maps) as one product of (H, H) by (H, t * S) a sample."""
    return torch.matmul(alpha, maps.flatten(2)).view_as(maps)


def _alpha(coeff: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _accumulation_dtype(dtype)
    return torch.eye(coeff.shape[-1], dtype=wide, device=coeff.device) + coeff.to(wide)


def _per_sample(alpha: Tensor, b: slice) -> Tensor:
    return alpha if alpha.ndim == 2 else alpha[b]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeat_groups(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _to_four_dims(attn_mask: Tensor) -> Tensor:
    return attn_mask[(None,) * (4 - attn_mask.ndim)]


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            "query, key and value must have 4 dimensions (batch, heads, tokens, width), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    B, H, T, D = query.shape
    S = key.shape[2]
    if key.shape[0] != B or key.shape[3] != D:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch and head width")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree in batch, heads and length"
        )
    if key.shape[1] != H and not (enable_gqa and key.shape[1] > 0 and H % key.shape[1] == 0):
        raise ValueError(
            f"query has {H} heads and key {key.shape[1]}: the counts must be equal, or with enable_gqa=True the first "
            "a multiple of the second"
        )
    if coeff.shape not in ((H, H), (B, H, H)):
        raise ValueError(f"coeff must have shape {(H, H)} for {H} heads or {(B, H, H)}, got {tuple(coeff.shape)}")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other")
    wrong = attn_mask.ndim > 4 or any(m not in (1, n) for m, n in zip(attn_mask.shape[::-1], (S, T, H, B)))
    if wrong:
        raise ValueError(f"attn_mask must be broadcastable to {(B, H, T, S)}, got {tuple(attn_mask.shape)}")
