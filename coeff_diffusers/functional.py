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
from torch.autograd import forward_ad

from . import backends
from .backends.common import accumulation_dtype, empty_output, masked, softmax


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
    stores an array of T x S entries. On x86 CPUs compiled code does it, with 10 MB of maps for each of torch's threads
    forward, and 20 MB for all backward; or more where H * S exceeds 80,000, for a block has 32 rows at least (16 with
    AVX2). On GPUs Triton kernels do it for bfloat16 and float16, with strips of maps of 48 to 96 MB; elsewhere torch's
    functions, with three or four arrays of 8 MB on a CPU ([`get_mixing_backend`] says which). Attention dropout, a
    mask that needs a gradient and forward-mode differentiation (`torch.func.jvp`) take the plain formula
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
        scale = _default_scale(query) if scale is None else scale
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
    dtype, wide = query.dtype, accumulation_dtype(query.dtype)
    query, key, value, coeff = (x.to(wide) for x in (query, key, value, coeff))
    if enable_gqa:
        key, value = (_repeat_groups(x, query.shape[1]) for x in (key, value))
    scale = _default_scale(query) if scale is None else scale
    scores = torch.einsum("bjtd, bjsd -> bjts", query, key) * scale
    maps = F.dropout(softmax(masked(scores, attn_mask, is_causal), attn_mask is not None), dropout_p)
    alpha = torch.eye(coeff.shape[-1], dtype=wide, device=coeff.device) + coeff
    if alpha.ndim == 2:
        mixed = torch.einsum("ij, bjts -> bits", alpha, maps)
    else:
        mixed = torch.einsum("bij, bjts -> bits", alpha, maps)
    return torch.einsum("bits, bise -> bite", mixed, value).to(dtype)


def _default_scale(query: Tensor) -> float:
    """1 / sqrt(D). Without width every score is 0, whatever it is multiplied by."""
    width = query.shape[-1]
    return width**-0.5 if width else 1.0


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
    """The reference, a block of query rows at a time; and statistics of the rows for the backward pass."""
    return backends.forward(query, key, value, coeff, attn_mask, is_causal, scale)


@_blockwise.register_fake
def _(query, key, value, coeff, attn_mask, is_causal, scale):  # type: ignore[no-untyped-def]
    return empty_output(query, value), query.new_empty(2, *query.shape[:3], dtype=torch.float32)


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
    *gradients, grad_alpha = backends.backward(
        grad_out, query, key, value, coeff, attn_mask, statistics, is_causal, scale, wanted
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
