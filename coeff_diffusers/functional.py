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

from . import team
from .products import by_linear, by_onednn, multiply
from .team import Member, shares

# Map entries formed at a time, in all buffers of a block together. On a CPU these are 24 MB of float32: products of a
# hundred rows and more were measured to be faster than blocks that stay in a cache. Each thread of a team, up to the
# 16th, has 0.7 of that where each has its own block, and 0.55 where they share them, as in the backward pass, which
# holds more besides. An accelerator must be filled: a block may take a 128th part of its memory; where that is not
# known, 2**25 float32 are 128 MB. That is not measured.
_BLOCK_ENTRIES_CPU = 6 * 2**20
_BLOCK_ENTRIES_ACCELERATOR = 2**25
_BLOCK_MEMORY_SHARE = 1 / 128
_TEAM_MIN_WORK = 2**27  # multiplications of queries by keys, some 3 ms of a core; below, threads wait too often


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
    stores an array of T x S entries. On a CPU a block takes 24 MB; where torch has several threads, a large call is
    divided over as many, which take up to 17 MB each. Attention dropout and a mask that needs a gradient take the
    plain formula ([`mixed_attention_reference`]), which does.

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
        if dropout_p > 0.0 or (attn_mask is not None and attn_mask.requires_grad) or key.shape[2] == 0:
            return mixed_attention_reference(
                query, key, value, coeff, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        if enable_gqa:
            key, value = (_repeat_groups(x, query.shape[1]) for x in (key, value))
        if attn_mask is not None:
            attn_mask = _to_four_dims(attn_mask)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output: Tensor = _blockwise(query, key, value, coeff, attn_mask, is_causal, scale)
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
    " -> Tensor",
)
def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The reference, a block of samples and query rows at a time. Each member of a team takes every other block."""
    alpha = _alpha(coeff, query)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    blocks = _Blocks(query, key, attn_mask, is_causal, shared=False, buffers=9 / 8)
    keys, values = blocks.operand(key), blocks.operand(value)

    def work(member: Member) -> None:
        buffer = _LiftedBuffer(blocks)
        for b in blocks.samples:
            own = member.share(blocks.merged_heads(b))
            blocks.fill(keys, key, b, own, scale)
            blocks.fill(values, value, b, own)
            member.wait()
            for t in blocks.rows[member.index :: member.size]:
                maps, every = buffer.lifted(b, t), slice(0, blocks.merged_heads(b))
                blocks.form_maps(blocks.merged(query[:, :, t], b), keys[every], b, t, maps, every)
                mixed = buffer.mix(alpha[b], b, t)
                multiply(mixed, values[every], out[b, :, t].flatten(0, 1))
            member.wait()  # before others come into the place of these keys and values

    with torch.autocast(query.device.type, enabled=False):
        team.run(work, blocks.threads)
    return out


@_blockwise.register_fake
def _(query, key, value, coeff, attn_mask, is_causal, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op(
    "coeff_diffusers::mixed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor coeff, Tensor? attn_mask, bool is_causal,"
    " float scale, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _blockwise_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coeff: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and coeff, empty where not wanted."""
    blocks = _Blocks(query, key, attn_mask, is_causal, shared=True, buffers=2 + 1 / 8)
    alpha = _alpha(coeff, query)
    gradients = _add_up_gradients(grad_out, query, key, value, alpha, blocks, scale, wanted)
    grad_query, grad_key, grad_value, grad_alpha = gradients  # the buffers are freed, before these are written anew
    if wanted[3]:
        grad_alpha = grad_alpha.sum(0) if coeff.ndim == 3 else grad_alpha.sum((0, 1))
    if wanted[1]:
        grad_key = grad_key.mul_(scale).mT.contiguous().to(key.dtype)
    if wanted[2]:
        grad_value = grad_value.mT.contiguous().to(value.dtype)
    return grad_query, grad_key, grad_value, grad_alpha.to(coeff.dtype)


@_blockwise_backward.register_fake
def _(grad_out, query, key, value, coeff, attn_mask, is_causal, scale, wanted):  # type: ignore[no-untyped-def]
    inputs = (query, key, value, coeff)
    return tuple(x.new_empty(x.shape if wants else 0) for x, wants in zip(inputs, wanted))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.is_causal, ctx.scale = inputs[5:]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
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
    blocks: _Blocks,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients as [`_empty_gradients`] lays them out. Each block's maps are formed again.

    With M = alpha maps:    dV = M^T dO,  dM = dO V^T,  dalpha = dM maps^T,  dmaps = alpha^T dM,
                            dscores = softmax'(dmaps),  dQ = dscores K scale,  dK = dscores^T Q, without the scale.

    The members of a team take some heads each, and some rows of all heads where heads are mixed.
    """
    gradients = _empty_gradients(query, key, value, alpha, wanted, blocks.threads)
    grad_query, grad_key, grad_value, grad_alpha = gradients
    keys, values = blocks.operand(key), blocks.operand(value)
    buffers = [blocks.new_buffer() for _ in range(2)]

    def work(member: Member) -> None:
        for b in blocks.samples:
            own = member.share(blocks.merged_heads(b))
            blocks.fill(keys, key, b, own, scale)
            blocks.fill(values, value, b, own)
            for t in blocks.rows:
                maps, other = (blocks.in_buffer(buffer, b, t) for buffer in buffers)
                part = member.share(t.stop - t.start)
                queries, block_grad = (blocks.merged(x[:, :, t], b)[own] for x in (query, grad_out))
                blocks.form_maps(queries, keys[own], b, t, maps[own], own)
                member.wait()
                if wanted[2]:
                    blocks.mix(alpha[b], maps[:, part], out=other[:, part])
                    member.wait()
                    grad_value[b].flatten(0, 1)[own].baddbmm_(block_grad.mT, other[own])
                if not (wanted[0] or wanted[1] or wanted[3]):
                    continue
                multiply(block_grad, values[own].mT, other[own])
                member.wait()
                if wanted[3]:
                    grads, sources = (blocks.by_sample(x[:, part]) for x in (other, maps))
                    grad_alpha[member.index, b].baddbmm_(grads, sources.mT)
                if wanted[0] or wanted[1]:
                    blocks.mix_in_place(alpha[b].mT, other[:, part])
                member.wait()
                if wanted[0] or wanted[1]:
                    _softmax_backward(other[own], maps[own])
                if wanted[0]:
                    multiply(other[own], keys[own], grad_query[b, :, t].flatten(0, 1)[own])
                if wanted[1]:
                    grad_key[b].flatten(0, 1)[own].baddbmm_(queries.mT, other[own])

    with torch.autocast(query.device.type, enabled=False):
        team.run(work, blocks.threads)
    return gradients


class _Blocks:
    """Blocks of (samples, query rows), whose maps fit a budget.

    Whole samples are taken together while they are small, else some rows of one sample. Heads and samples of a block
    are merged into one dimension, (b * H), for the batched products. A team's blocks are of one sample.

    Args:
        shared: whether the members of a team work on one block together, or each has its own in memory.
        buffers: the size of a block with its buffers, in maps.

    Attributes:
        threads: how many work on the blocks.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        shared: bool,
        buffers: float,
    ) -> None:
        self.attn_mask, self.is_causal, self.device = attn_mask, is_causal, query.device
        self.wide, self.threads = _accumulation_dtype(query.dtype), _threads(query, key)
        at_once = 1 if shared else self.threads
        B, self.heads, T, self.S = *query.shape[:3], key.shape[2]
        entries = _block_entries(query.device, self.threads, shared)
        most = int(entries / at_once / buffers / max(1, self.heads * self.S))
        samples = 1 if self.threads > 1 else max(1, min(B, most // max(1, T)))
        self.samples = [slice(b, min(b + samples, B)) for b in range(0, B, samples)]
        count = -(-T // max(1, most)) if samples == 1 else 1
        count = min(-(-count // at_once) * at_once, T)  # as many for each member
        self.rows = shares(T, count)
        self.most_rows, self.most_heads = -(-T // max(1, count)), samples * self.heads

    def new_buffer(self, extra_rows: int = 0) -> Tensor:
        shape = (self.most_heads, self.most_rows + extra_rows, self.S)
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def in_buffer(self, buffer: Tensor, b: slice, t: slice) -> Tensor:
        """(b * H, t, S). A head has the same place in every block, for members may be in different ones."""
        return buffer[: self.merged_heads(b), : t.stop - t.start]

    def merged_heads(self, b: slice) -> int:
        count: int = (b.stop - b.start) * self.heads
        return count

    def merged(self, x: Tensor, b: slice) -> Tensor:
        """(b * H, ., .) of (B, H, ., .), in the accumulation dtype; contiguous, which models' views are not."""
        return x[b].flatten(0, 1).to(self.wide).contiguous()

    def by_sample(self, x: Tensor) -> Tensor:
        """(b * H, t, S) as (b, H, t * S)."""
        heads, rows, keys = x.shape
        return x.view(heads // max(1, self.heads), self.heads, rows * keys)

    def operand(self, x: Tensor) -> Tensor:
        """Room for the keys or values (b * H, S, .) of a block, as [`fill`] puts them there."""
        return torch.empty(self.most_heads, *x.shape[2:], dtype=self.wide, device=self.device)

    def fill(self, operand: Tensor, x: Tensor, b: slice, own: slice, scale: float = 1.0) -> None:
        operand[own] = x[b].flatten(0, 1)[own]
        if scale != 1.0:
            operand[own] *= scale

    def form_maps(self, queries: Tensor, keys: Tensor, b: slice, t: slice, out: Tensor, own: slice) -> None:
        """The maps (., t, S) of the `own` heads of a block, of queries (., t, D) and keys (., S, D) with the scale."""
        if self.attn_mask is None and not self.is_causal and by_onednn(queries, keys.mT):
            for head in range(len(out)):  # while a head's scores are in the cache
                torch.softmax(by_linear(queries[head], keys[head].mT), dim=-1, out=out[head])
            return
        scores = multiply(queries, keys.mT, out).unflatten(0, (b.stop - b.start, -1))
        masked = _masked(scores, self._block_mask(b, t, own), self.is_causal, t.start)
        out.copy_(_softmax(masked, self.attn_mask is not None).flatten(0, 1))

    def _block_mask(self, b: slice, t: slice, own: slice) -> Tensor | None:
        if self.attn_mask is None:
            return None
        mask = self.attn_mask[b if self.attn_mask.shape[0] > 1 else slice(None)]
        if own.stop - own.start < self.merged_heads(b):  # of one sample
            mask = mask[:, own if mask.shape[1] > 1 else slice(None)]
        return mask[:, :, t if mask.shape[2] > 1 else slice(None)]

    def mix(self, alpha: Tensor, maps: Tensor, out: Tensor) -> None:
        """einsum("ij, bjts -> bits", alpha, maps)."""
        torch.bmm(alpha, self.by_sample(maps), out=self.by_sample(out))

    def mix_in_place(self, alpha: Tensor, maps: Tensor) -> None:
        """[`mix`] by way of a small buffer."""
        columns = self.by_sample(maps)
        some = torch.empty_like(columns[:, :, : -(-columns.shape[2] // 8)], memory_format=torch.contiguous_format)
        for part in columns.split(max(1, some.shape[2]), dim=-1):
            mixed = some[:, :, : part.shape[2]]
            part.copy_(torch.bmm(alpha, part, out=mixed))


class _LiftedBuffer:
    """Where the maps of a block are mixed without a second buffer, which would halve its rows.

    It has an eighth more rows than the block. The maps lie at its end, and mixing moves them to its beginning, an
    eighth at a time, so that no entry is written before it was read for the last time.
    """

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks, self.lift = blocks, -(-blocks.most_rows // 8)
        self.storage = blocks.new_buffer(self.lift)

    def lifted(self, b: slice, t: slice) -> Tensor:
        """(b * H, t, S), at the end."""
        return self.blocks.in_buffer(self.storage[:, self.lift :], b, t)

    def mix(self, alpha: Tensor, b: slice, t: slice) -> Tensor:
        """einsum("ij, bjts -> bits", alpha, lifted), at the beginning."""
        mixed = self.blocks.in_buffer(self.storage, b, t)
        parts = (
            self.blocks.by_sample(x).split(max(1, self.lift * self.blocks.S), -1) for x in (self.lifted(b, t), mixed)
        )
        for lifted, result in zip(*parts):
            torch.bmm(alpha, lifted, out=result)
        return mixed


def _threads(query: Tensor, key: Tensor) -> int:
    """How many share a call's blocks: one where torch's own threads do better, or where there are no cores."""
    work = query.numel() * key.shape[2]
    return torch.get_num_threads() if team.can_share(query.device) and work >= _TEAM_MIN_WORK else 1


def _block_entries(device: torch.device, threads: int, shared: bool) -> float:
    """How many entries of the maps the buffers of all blocks in memory may have together."""
    if device.type == "cpu":
        return _BLOCK_ENTRIES_CPU * (1 if threads == 1 else min(threads, 16) * (0.55 if shared else 0.7))
    if device.type == "cuda":  # a part of the whole, not of what is free: asking for that waits for the device
        return int(torch.cuda.get_device_properties(device).total_memory * _BLOCK_MEMORY_SHARE / 4)
    return _BLOCK_ENTRIES_ACCELERATOR


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, wanted: list[bool], threads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the blocks put their gradients.

    Those of key, value and alpha are sums over blocks, and kept wide; those of key and value as (B, H, width, S), to
    which a block is added faster; that of alpha as a sum for each thread, (threads, B, H, H).
    """
    return (
        query.new_empty(query.shape if wanted[0] else 0),
        alpha.new_zeros(key.mT.shape if wanted[1] else 0),
        alpha.new_zeros(value.mT.shape if wanted[2] else 0),
        alpha.new_zeros((threads, *alpha.shape) if wanted[3] else 0),
    )


def _softmax_backward(grad_maps: Tensor, maps: Tensor) -> None:
    """The gradient of the scores, in the place of that of the maps, (b * H, t, S)."""
    heads = zip(grad_maps, maps) if maps.device.type == "cpu" else [(grad_maps, maps)]  # a head's rows lie together
    for grad, of_head in heads:
        torch.ops.aten._softmax_backward_data.out(grad, of_head, -1, maps.dtype, grad_input=grad)


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
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean or floating point, got {attn_mask.dtype}")
    wrong = attn_mask.ndim > 4 or any(m not in (1, n) for m, n in zip(attn_mask.shape[::-1], (S, T, H, B)))
    if wrong:
        raise ValueError(f"attn_mask must be broadcastable to {(B, H, T, S)}, got {tuple(attn_mask.shape)}")
