r"""Attention whose heads share their maps.

    maps_j = softmax(Q_j K_j^T * scale + mask)              j = 1..H, the source map
    alpha  = I + coeff                                      coeff is Delta of the paper, (H, H)
    out_i  = (sum_j alpha_ij maps_j) V_i                    i = 1..H, the output head

Coeff-Tuning: Miao, Chen and Qiu, CVPR 2025, arXiv 2503.18337. Rows of ``coeff`` are output heads, columns are source
maps; ``coeff = 0`` is ordinary attention.

Letters: B batch, H heads (i output, j source), T queries, S keys, D head width of queries and keys, E of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import kernel

# Entries of an array of maps, of which a block has three or four at a time, where no kernel forms them. On a CPU these
# are 8 MB of float32. An accelerator must be filled: an array may take a 512th part of its memory; where that is not
# known, 2**23 float32 are 32 MB. That is not measured.
_BLOCK_ENTRIES_CPU = 2**21
_BLOCK_ENTRIES_ACCELERATOR = 2**23
_BLOCK_MEMORY_SHARE = 1 / 512


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
    stores an array of T x S entries. On x86 CPUs compiled code does it (kernel.py), with 10 MB of maps for each of
    torch's threads forward, and 20 MB for all backward; or more where H * S exceeds 80,000, for a block has 32 rows at
    least (16 with AVX2). Elsewhere torch's functions do it, with three or four arrays of 8 MB on a CPU. Attention
    dropout, a mask that needs a gradient and forward-mode differentiation (`torch.func.jvp`) take the plain formula
    ([`mixed_attention_reference`]), which stores all T x S entries.

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
        dropout_p: probability in [0, 1] with which entries of the maps are dropped, before they are mixed.
        is_causal: masks keys s > t. Not together with `attn_mask`.
        scale: factor on the scores, `1 / sqrt(D)` by default.
        enable_gqa: lets groups of query heads share a key and value head. H counts query heads.

    Returns:
        (B, H, T, E), in the dtype of `query`.

    Raises:
        ValueError: if shapes do not fit, which the message names both, or another argument cannot be used.
    """
    _check_shapes(query, key, value, coeff, attn_mask, is_causal, enable_gqa)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    coeff = coeff.to(query.device)
    with torch.autocast(device_type, enabled=False):
        mask_needs_grad = attn_mask is not None and attn_mask.requires_grad
        if dropout_p > 0.0 or mask_needs_grad or key.shape[2] == 0 or _has_tangent(query, key, value, coeff):
            return mixed_attention_reference(
                query, key, value, coeff, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if enable_gqa:
            key, value = (_repeat_groups(x, query.shape[1]) for x in (key, value))
        if attn_mask is not None:
            attn_mask = _to_four_dims(attn_mask)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output: Tensor = _blockwise(query, key, value, coeff, attn_mask, is_causal, scale)[0]
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


# One opaque operator, so that torch.compile takes it into a whole graph without unrolling the loop over blocks, and
# does not compile again when only the coefficients change.


@torch.library.custom_op(
    "coeff_diffusers::mixed_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor coeff, Tensor? attn_mask, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
)
def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The reference, a block of query rows at a time; and statistics for the kernel's backward pass."""
    alpha = _alpha(coeff, query)
    if kernel.takes(query, key, value):
        return kernel.forward(query, key, value, alpha, attn_mask, is_causal, scale)
    out = kernel.empty_output(query, value)
    with torch.autocast(query.device.type, enabled=False):
        for b, t in _blocks(query, key):
            maps = _maps(query[b, :, t], key[b], _block_of(attn_mask, b, t), is_causal, t.start, scale)
            out[b, :, t] = _mix(alpha[b], maps) @ value[b].to(maps.dtype)
    return out, query.new_zeros(2, *query.shape[:3], dtype=torch.float32)  # not read: of the kernel's shape, though


@_blockwise.register_fake
def _(query, key, value, coeff, attn_mask, is_causal, scale):  # type: ignore[no-untyped-def]
    return kernel.empty_output(query, value), query.new_empty(2, *query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "coeff_diffusers::mixed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor coeff, Tensor? attn_mask,"
    " Tensor statistics, bool is_causal, float scale, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _blockwise_backward(
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
    """Gradients of query, key, value and coeff, empty where not wanted."""
    alpha = _alpha(coeff, query)
    if kernel.takes(query, key, value):
        *gradients, grad_alpha = kernel.backward(
            grad_out, query, key, value, alpha, statistics, attn_mask, is_causal, scale, wanted
        )
    else:
        with torch.autocast(query.device.type, enabled=False):
            *gradients, grad_alpha = _add_up_gradients(
                grad_out, query, key, value, alpha, attn_mask, is_causal, scale, wanted
            )
    if wanted[3] and coeff.ndim == 2:
        grad_alpha = grad_alpha.sum(0)
    return (*gradients, grad_alpha.to(coeff.dtype))  # type: ignore[return-value]


@_blockwise_backward.register_fake
def _(grad_out, query, key, value, coeff, attn_mask, statistics, is_causal, scale, wanted):  # type: ignore[no-untyped-def]
    *inputs, grad_coeff = [
        torch.empty_like(x) if wants else x.new_empty(0) for x, wants in zip((query, key, value, coeff), wanted)
    ]
    return (*inputs, grad_coeff.contiguous())


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.is_causal, ctx.scale = inputs[5:]


def _backward(ctx: Any, grad_out: Tensor, grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    grads = _blockwise_backward(grad_out, *ctx.saved_tensors, ctx.is_causal, ctx.scale, wanted)
    return (*(grad if wants else None for grad, wants in zip(grads, wanted)), None, None, None)


_blockwise.register_autograd(_backward, setup_context=_save_for_backward)


def _add_up_gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and alpha. Each block's maps are formed again, and sums are kept wide.

    With M = alpha maps:    dV = M^T dO,  dM = dO V^T,  dalpha = dM maps^T,  dmaps = alpha^T dM,
                            dscores = softmax'(dmaps),  dQ = dscores K scale,  dK = dscores^T Q scale.
    """
    wide = alpha.dtype
    inputs = (query, key, value, alpha)
    sums = [torch.zeros_like(x, dtype=wide) if wants else x.new_empty(0) for x, wants in zip(inputs, wanted)]
    grad_query, grad_key, grad_value, grad_alpha = sums
    for b, t in _blocks(query, key):
        maps = _maps(query[b, :, t], key[b], _block_of(attn_mask, b, t), is_causal, t.start, scale)
        block_grad = grad_out[b, :, t].to(wide)
        if wanted[2]:
            grad_value[b] += _mix(alpha[b], maps).mT @ block_grad
        if not (wanted[0] or wanted[1] or wanted[3]):
            continue
        grad_mixed = block_grad @ value[b].to(wide).mT
        if wanted[3]:
            # a row at a time: in one product of all, whose terms nearly cancel, more is lost
            grad_alpha[b] += torch.einsum("bits, bjts -> btij", grad_mixed, maps).sum(1)
        if not (wanted[0] or wanted[1]):
            continue
        grad_maps = _mix(alpha[b].mT, grad_mixed)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_maps, maps, -1, wide)
        if wanted[0]:
            grad_query[b, :, t] = grad_scores @ key[b].to(wide) * scale
        if wanted[1]:
            grad_key[b] += grad_scores.mT @ query[b, :, t].to(wide) * scale
    return (*(x.to(like.dtype) for x, like in zip(sums, inputs)),)  # type: ignore[return-value]


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
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, first_row: int, scale: float
) -> Tensor:
    """(b, H, t, S), in the accumulation dtype, of queries from `first_row` on."""
    wide = _accumulation_dtype(query.dtype)
    scores = (query.to(wide) * scale) @ key.to(wide).mT
    return _softmax(_masked(scores, attn_mask, is_causal, first_row), attn_mask is not None)


def _mix(alpha: Tensor, maps: Tensor) -> Tensor:
    """einsum("bij, bjts -> bits", alpha, maps)."""
    return (alpha @ maps.flatten(2)).view_as(maps)


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


def _alpha(coeff: Tensor, query: Tensor) -> Tensor:
    """I + coeff for each sample, (B, H, H), in the accumulation dtype of the query."""
    wide = _accumulation_dtype(query.dtype)
    alpha = torch.eye(coeff.shape[-1], dtype=wide, device=coeff.device) + coeff.to(wide)
    return alpha.expand(query.shape[0], -1, -1)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeat_groups(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _to_four_dims(attn_mask: Tensor) -> Tensor:
    return attn_mask[(None,) * (4 - attn_mask.ndim)]


def _has_tangent(*inputs: Tensor) -> bool:
    """Whether forward-mode differentiation is under way, of which an operator of our own would lose the tangents."""
    return not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


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
    for name, x in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is not None and x.device != query.device:
            raise ValueError(f"query is on {query.device} and {name} on {x.device}: move them to one device")
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
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean or floating point, got {attn_mask.dtype}")
    wrong = attn_mask.ndim > 4 or any(m not in (1, n) for m, n in zip(attn_mask.shape[::-1], (S, T, H, B)))
    if wrong:
        raise ValueError(f"attn_mask must be broadcastable to {(B, H, T, S)}, got {tuple(attn_mask.shape)}")
