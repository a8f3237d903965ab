"""The Triton kernels of gpu.py, which says what they compute together and in which order.

A strip is an array (samples, H, rows, keys) of maps of some query rows, all heads and all keys; its rows are padded to
a multiple of 16 keys, and the padding is written as zeros. Where a kernel
writes in place, no thread overwrites what another has still to read: a product's operands go through shared memory,
and past its barrier, before anything of the product is written. (A barrier of our own would keep the compiler from
loading the next tiles ahead.) Scores and logarithms are in base 2. Offsets of a tile are int64, those within it int32.

Triton's interpreter, in which the tests run these kernels on a CPU, multiplies the bits of bfloat16 as if they were
integers, and cuts float32 off where it should be rounded to bfloat16: `_dot` and `_rounded` see to both there, and are
plain products and casts on a GPU.
"""

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.3e38)  # of an additive mask in base 2: the least number of a dtype masks, and is no infinity

# Of those, a value of one or a multiple of 16 would be compiled for by itself, and they change from strip to strip.
_OF_STRIP = ["first_sample", "first_row", "rows"]


@triton.jit
def _dot(left, right, sums=None):
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if sums is None:
        return tl.dot(left, right)
    return tl.dot(left, right, sums)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    if (_INTERPRETED and dtype == tl.bfloat16) and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def _split(x, dtype: tl.constexpr):
    """x as a sum of two numbers of `dtype`, of which the second is the first's rounding error."""
    high = _rounded(x, dtype)
    return high, _rounded(x - high.to(tl.float32), dtype)


@triton.jit
def _offset(index, stride, ALIGNED: tl.constexpr):
    """index * stride, in int64. ALIGNED: a multiple of 8, so that 16 bytes load at once; Triton looks for 16 alone."""
    offset = index.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def _step(count: tl.constexpr, stride, ALIGNED: tl.constexpr):
    step = count * stride
    if ALIGNED:
        step = tl.multiple_of(step, 8)
    return step


@triton.jit
def _load(
    base,
    rows,
    columns,
    n_rows,
    n_columns,
    stride,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A tile whose columns are adjacent in memory; zeros beyond the array."""
    offset = rows * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    at = base + offset[:, None] + columns[None, :]
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(at)
    if EVEN_ROWS:
        return tl.load(at, mask=columns[None, :] < n_columns, other=0.0)
    if EVEN_COLUMNS:
        return tl.load(at, mask=rows[:, None] < n_rows, other=0.0)
    return tl.load(at, mask=(rows[:, None] < n_rows) & (columns[None, :] < n_columns), other=0.0)


@triton.jit
def _masked(
    scores,
    mask,
    first_row,
    first_key,
    n_rows,
    n_keys,
    stride_t,
    stride_s,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_S: tl.constexpr,
):
    """Scores less what is hidden. MASK: 0 none; 1 boolean, as bytes; 2 additive; 3 and 4 the same for all rows alike.

    `mask` points to the sample and head; the tile begins at `first_row` and `first_key`.
    """
    row = first_row + tl.arange(0, scores.shape[0])
    column = first_key + tl.arange(0, scores.shape[1])
    at = mask + column.to(tl.int64) * stride_s
    if MASK == 1 or MASK == 2:
        there = (row[:, None] < n_rows) & (column[None, :] < n_keys)
        entries = tl.load(at[None, :] + row.to(tl.int64)[:, None] * stride_t, mask=there, other=0)
    if MASK == 3 or MASK == 4:
        entries = tl.load(at, mask=column < n_keys, other=0)[None, :]
    if MASK == 1 or MASK == 3:
        scores = tl.where(entries != 0, scores, float("-inf"))
    if MASK == 2 or MASK == 4:
        added = entries.to(tl.float32)
        scores += tl.where(
            added == float("-inf"), added, tl.maximum(added * _LOG2_E, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
        )
    if CAUSAL:
        scores = tl.where(row[:, None] >= column[None, :], scores, float("-inf"))
    if not EVEN_S:
        scores = tl.where(column[None, :] < n_keys, scores, float("-inf"))
    return scores


@triton.jit
def _of_rows(top, total):
    """What a row's map is formed from once more, exp2(scores - shift) * factor: nothing, for a row without a key.

    Two numbers, for beside the least number of a dtype, in a mask, the logarithm of the sum would be lost.
    """
    return tl.where(total == 0.0, float("inf"), top), tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def prepare_kernel(coeff, mixed, needed, gain, stride_ab, stride_ai, stride_aj, H: tl.constexpr, HP: tl.constexpr):
    """For each head of a sample: whether it is mixed, whether a mixed head uses its map, and its gain in float16.

    It is mixed where its row of Delta is not zero. The gain is the power of two by which its mixed maps are
    multiplied.
    """
    b = tl.program_id(0)
    i = tl.arange(0, HP)
    j = tl.arange(0, HP)
    at = coeff + b.to(tl.int64) * stride_ab + i[:, None] * stride_ai + j[None, :] * stride_aj
    delta = tl.load(at, mask=(i[:, None] < H) & (j[None, :] < H), other=0.0).to(tl.float32)
    used = (delta != 0.0).to(tl.int32)
    is_mixed = tl.max(used, 1)
    diagonal = i[:, None] == j[None, :]
    is_needed = tl.max(tl.where(diagonal, 1, used) * is_mixed[:, None], 0)
    largest = tl.sum(tl.abs(delta + tl.where(diagonal & (i[:, None] < H), 1.0, 0.0)), 1)
    power = tl.exp2(tl.minimum(tl.floor(15.0 - tl.log2(tl.maximum(largest, 1e-30))), 10.0))
    tl.store(mixed + b * H + i, is_mixed, mask=i < H)
    tl.store(needed + b * H + j, is_needed, mask=j < H)
    tl.store(gain + b * H + i, power, mask=i < H)


@triton.jit
def plain_kernel(
    query,
    key,
    value,
    mask,
    out,
    statistics,
    mixed,
    scale,
    T,
    S,
    D: tl.constexpr,
    E: tl.constexpr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_ob,
    stride_oh,
    stride_ot,
    B,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
):
    """Attention of the heads that are not mixed, a tile of rows a program, with a running softmax."""
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if tl.load(mixed + b * H + h) != 0:
        return
    first_row = tl.program_id(0) * BM
    r = tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    base = (
        query
        + _offset(b, stride_qb, ALIGNED)
        + _offset(h, stride_qh, ALIGNED)
        + _offset(first_row, stride_qt, ALIGNED)
    )
    q = _load(base, r, d, T - first_row, D, stride_qt, EVEN_T, EVEN_D, ALIGNED)
    key += _offset(b, stride_kb, ALIGNED) + _offset(h, stride_kh, ALIGNED)
    value += _offset(b, stride_vb, ALIGNED) + _offset(h, stride_vh, ALIGNED)
    mask += b * stride_mb + h.to(tl.int64) * stride_mh
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BE), tl.float32)
    c = tl.arange(0, BN)
    for first_key in tl.range(0, S, BN, num_stages=STAGES):
        k = _load(key, c, d, S - first_key, D, stride_ks, EVEN_S, EVEN_D, ALIGNED)
        scores = _dot(q, tl.trans(k)) * scale
        scores = _masked(scores, mask, first_row, first_key, T, S, stride_mt, stride_ms, MASK, CAUSAL, EVEN_S)
        new_top = tl.maximum(top, tl.max(scores, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(top - reference)
        v = _load(value, c, e, S - first_key, E, stride_vs, EVEN_S, EVEN_E, ALIGNED)
        total = total * shrink + tl.sum(p, 1)
        sums = _dot(_rounded(p, v.dtype), v, sums * shrink[:, None])
        top = new_top
        key += _step(BN, stride_ks, ALIGNED)
        value += _step(BN, stride_vs, ALIGNED)
    there = r < T - first_row
    shift, divisor = _of_rows(top, total)
    at = statistics + (b * H + h) * T + first_row + r
    tl.store(at, shift, mask=there)
    tl.store(at + B * H * T, divisor, mask=there)
    sums = sums * divisor[:, None]
    out += b * stride_ob + h.to(tl.int64) * stride_oh + first_row.to(tl.int64) * stride_ot
    at = out + r[:, None] * stride_ot + e[None, :]
    tl.store(at, _rounded(sums, out.dtype.element_ty), mask=there[:, None] & (e[None, :] < E))


@triton.jit(do_not_specialize=_OF_STRIP)
def exps_kernel(
    query,
    key,
    mask,
    strip,
    tops,
    sums,
    needed,
    scale,
    first_sample,
    first_row,
    rows,
    T,
    S,
    D: tl.constexpr,
    R,
    SP,
    NT,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Exponentials of a head's scores, less the largest of a tile's row, which is written with the tile's sum.

    A program has one tile of rows and TILES tiles of keys, one after another.
    """
    groups = tl.cdiv(NT, TILES)
    first = (tl.program_id(0) // groups) * BM
    group = tl.program_id(0) % groups
    h = tl.program_id(1)
    local_b = tl.program_id(2)
    b = (first_sample + local_b).to(tl.int64)
    if tl.load(needed + b * H + h) == 0:
        return
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, BD)
    row = first_row + first
    q = _load(
        query + _offset(b, stride_qb, ALIGNED) + _offset(h, stride_qh, ALIGNED) + _offset(row, stride_qt, ALIGNED),
        r,
        d,
        T - row,
        D,
        stride_qt,
        EVEN_T,
        EVEN_D,
        ALIGNED,
    )
    first_key = group * TILES * BN
    key += _offset(b, stride_kb, ALIGNED) + _offset(h, stride_kh, ALIGNED) + _offset(first_key, stride_ks, ALIGNED)
    mask += b * stride_mb + h.to(tl.int64) * stride_mh
    line = (local_b.to(tl.int64) * H + h) * R + first
    strip += line * SP
    there = r < rows - first
    for i in tl.range(0, tl.minimum(TILES, NT - group * TILES), num_stages=STAGES):
        tile = group * TILES + i
        start = tl.multiple_of(tile * BN, BN)
        k = _load(key, c, d, S - start, D, stride_ks, EVEN_S, EVEN_D, ALIGNED)
        scores = _dot(q, tl.trans(k))
        if (MASK == 0 and not CAUSAL) and EVEN_S:
            top = tl.max(scores, 1) * scale
            exps = tl.exp2(scores * scale - top[:, None])
        else:
            scores = _masked(scores * scale, mask, row, start, T, S, stride_mt, stride_ms, MASK, CAUSAL, EVEN_S)
            top = tl.max(scores, 1)
            exps = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        statistic = (line + r) * NT + tile
        tl.store(tops + statistic, top, mask=there)
        tl.store(sums + statistic, tl.sum(exps, 1), mask=there)
        at = strip + r[:, None] * SP + (start + c)[None, :]
        kept = there[:, None] & ((start + c)[None, :] < SP)
        tl.store(at, _rounded(exps, strip.dtype.element_ty), mask=kept)
        key += _step(BN, stride_ks, ALIGNED)


@triton.jit(do_not_specialize=_OF_STRIP)
def mix_kernel(
    strip,
    tops,
    sums,
    coeff,
    mixed,
    needed,
    gain,
    statistics,
    first_sample,
    first_row,
    rows,
    B,
    T,
    R,
    SP,
    NT,
    stride_ab,
    stride_ai,
    stride_aj,
    H: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    NTP: tl.constexpr,
    STAGES: tl.constexpr,
    GAIN: tl.constexpr,
):
    """alpha maps of one row, or of a part of its keys, in the place of the exponentials.

    What a tile's exponentials must be multiplied by goes into alpha.
    """
    t = tl.program_id(0)
    local_b = tl.program_id(1)
    part = tl.program_id(2)
    b = (first_sample + local_b).to(tl.int64)
    i = tl.arange(0, HP)
    is_mixed = tl.load(mixed + b * H + i, mask=i < H, other=0)
    if tl.max(is_mixed, 0) == 0:
        return
    used = tl.load(needed + b * H + i, mask=i < H, other=0) != 0
    line = i * R + t  # within the sample's strip, whose size gpu.py keeps below 2**31
    strip += local_b.to(tl.int64) * H * R * SP
    tops += local_b.to(tl.int64) * H * R * NT
    sums += local_b.to(tl.int64) * H * R * NT
    top = tl.full((HP,), float("-inf"), tl.float32)
    total = tl.zeros((HP,), tl.float32)
    for first in tl.range(0, NT, NTP, num_stages=1):
        n = first + tl.arange(0, NTP)
        there = used[:, None] & (n[None, :] < NT)
        some_tops = tl.load(tops + line[:, None] * NT + n[None, :], mask=there, other=float("-inf"))
        some_sums = tl.load(sums + line[:, None] * NT + n[None, :], mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(some_tops, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - reference) + tl.sum(some_sums * tl.exp2(some_tops - reference[:, None]), 1)
        top = new_top
    shift, divisor = _of_rows(top, total)
    if part == 0:
        at = statistics + (b * H + i) * T + first_row + t
        tl.store(at, shift, mask=used)
        tl.store(at + B * H * T, divisor, mask=used)
    j = tl.arange(0, HP)
    at = coeff + b * stride_ab + i[:, None] * stride_ai + j[None, :] * stride_aj
    alpha = tl.load(at, mask=(i[:, None] < H) & (j[None, :] < H), other=0.0).to(tl.float32)
    alpha += tl.where(i[:, None] == j[None, :], 1.0, 0.0)
    if GAIN:
        alpha = alpha * tl.load(gain + b * H + i, mask=i < H, other=1.0)[:, None]
    at = strip + line[:, None] * SP + tl.arange(0, BN)[None, :]
    dtype = strip.dtype.element_ty
    length = tl.cdiv(NT, tl.num_programs(2))
    for tile in tl.range(part * length, tl.minimum(part * length + length, NT), num_stages=STAGES):
        start = tl.multiple_of(tile * BN, BN)
        kept = (start + tl.arange(0, BN))[None, :] < SP
        exps = tl.load(at + start, mask=used[:, None] & kept, other=0.0)
        factor = tl.exp2(tl.load(tops + line * NT + tile, mask=used, other=float("-inf")) - shift) * divisor
        high, low = _split(alpha * factor[None, :], dtype)
        maps = _dot(low, exps, _dot(high, exps))
        tl.store(at + start, _rounded(maps, dtype), mask=(is_mixed[:, None] != 0) & kept)


@triton.jit(do_not_specialize=_OF_STRIP)
def times_kernel(
    strip,
    right,
    out,
    partial,
    mixed,
    gain,
    scale,
    first_sample,
    first_row,
    rows,
    S,
    E: tl.constexpr,
    R,
    SP,
    stride_rb,
    stride_rh,
    stride_rs,
    stride_ob,
    stride_oh,
    stride_ot,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
    GAIN: tl.constexpr,
    ALL: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_E: tl.constexpr,
):
    """A strip times values, or keys for the queries' gradient, times `scale`, less the gain.

    A program has a tile of rows and one of SPLITS parts of the keys. With more than one, float32 sums of each are
    written for sum_kernel, (SPLITS, samples, H, R, E). ALL: of heads that are not mixed, too.
    """
    tiles = tl.cdiv(rows, BM)
    first = (tl.program_id(0) % tiles) * BM
    part = tl.program_id(0) // tiles
    h = tl.program_id(1)
    local_b = tl.program_id(2)
    b = (first_sample + local_b).to(tl.int64)
    if not ALL:
        if tl.load(mixed + b * H + h) == 0:
            return
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    e = tl.arange(0, BE)
    there = r < rows - first
    line = (local_b.to(tl.int64) * H + h) * R + first
    length = tl.cdiv(tl.cdiv(S, BN), SPLITS) * BN
    start = part * length
    at = strip + line * SP + start + r[:, None] * SP + c[None, :]
    right += _offset(b, stride_rb, ALIGNED) + _offset(h, stride_rh, ALIGNED) + _offset(start, stride_rs, ALIGNED)
    sums = tl.zeros((BM, BE), tl.float32)
    for first_key in tl.range(start, tl.minimum(start + length, S), BN, num_stages=STAGES):
        if EVEN_S:
            maps = tl.load(at, mask=there[:, None], other=0.0)
        else:  # up to the padding, which is zeros: more of it loads at once
            maps = tl.load(at, mask=there[:, None] & (first_key + c[None, :] < SP), other=0.0)
        v = _load(right, c, e, S - first_key, E, stride_rs, EVEN_S, EVEN_E, ALIGNED)
        sums = _dot(maps, v, sums)
        at += BN
        right += _step(BN, stride_rs, ALIGNED)
    kept = there[:, None] & (e[None, :] < E)
    if SPLITS > 1:
        line += part.to(tl.int64) * tl.num_programs(2) * H * R
        tl.store(partial + line * E + r[:, None] * E + e[None, :], sums, mask=kept)
    else:
        if GAIN:
            scale = scale / tl.load(gain + b * H + h)
        out += b * stride_ob + h.to(tl.int64) * stride_oh + (first_row + first).to(tl.int64) * stride_ot
        tl.store(out + r[:, None] * stride_ot + e[None, :], _rounded(sums * scale, out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=_OF_STRIP)
def sum_kernel(
    partial,
    out,
    mixed,
    gain,
    scale,
    first_sample,
    first_row,
    rows,
    E: tl.constexpr,
    R,
    stride_ob,
    stride_oh,
    stride_ot,
    H: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    SPLITS: tl.constexpr,
    GAIN: tl.constexpr,
    ALL: tl.constexpr,
):
    """Adds up the parts of times_kernel."""
    first = tl.program_id(0) * BM
    h = tl.program_id(1)
    local_b = tl.program_id(2)
    b = (first_sample + local_b).to(tl.int64)
    if not ALL:
        if tl.load(mixed + b * H + h) == 0:
            return
    r = tl.arange(0, BM)
    e = tl.arange(0, BE)
    kept = (r < rows - first)[:, None] & (e[None, :] < E)
    line = (local_b.to(tl.int64) * H + h) * R + first
    sums = tl.zeros((BM, BE), tl.float32)
    for _ in tl.static_range(SPLITS):
        sums += tl.load(partial + line * E + r[:, None] * E + e[None, :], mask=kept, other=0.0)
        line += tl.num_programs(2) * H * R
    if GAIN:
        scale = scale / tl.load(gain + b * H + h)
    out += b * stride_ob + h.to(tl.int64) * stride_oh + (first_row + first).to(tl.int64) * stride_ot
    tl.store(out + r[:, None] * stride_ot + e[None, :], _rounded(sums * scale, out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=_OF_STRIP)
def maps_kernel(
    query,
    key,
    value,
    grad_out,
    mask,
    statistics,
    maps,
    grads,
    scale,
    first_sample,
    first_row,
    rows,
    B,
    T,
    S,
    D: tl.constexpr,
    E: tl.constexpr,
    R,
    SP,
    NT,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
    MAP_GAIN: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
):
    """Maps of a head, formed again, and the gradient of its mixed maps, dO V^T."""
    groups = tl.cdiv(NT, TILES)
    first = (tl.program_id(0) // groups) * BM
    group = tl.program_id(0) % groups
    h = tl.program_id(1)
    local_b = tl.program_id(2)
    b = (first_sample + local_b).to(tl.int64)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    row = first_row + first
    there = r < rows - first
    query += _offset(b, stride_qb, ALIGNED) + _offset(h, stride_qh, ALIGNED) + _offset(row, stride_qt, ALIGNED)
    q = _load(query, r, d, T - row, D, stride_qt, EVEN_T, EVEN_D, ALIGNED)
    grad_out += _offset(b, stride_gb, ALIGNED) + _offset(h, stride_gh, ALIGNED) + _offset(row, stride_gt, ALIGNED)
    g = _load(grad_out, r, e, T - row, E, stride_gt, EVEN_T, EVEN_E, ALIGNED)
    statistics += (b * H + h) * T + row
    shift = tl.load(statistics + r, mask=there, other=float("inf"))
    factor = tl.load(statistics + B * H * T + r, mask=there, other=0.0) * MAP_GAIN
    first_key = group * TILES * BN
    key += _offset(b, stride_kb, ALIGNED) + _offset(h, stride_kh, ALIGNED) + _offset(first_key, stride_ks, ALIGNED)
    value += _offset(b, stride_vb, ALIGNED) + _offset(h, stride_vh, ALIGNED) + _offset(first_key, stride_vs, ALIGNED)
    mask += b * stride_mb + h.to(tl.int64) * stride_mh
    line = (local_b.to(tl.int64) * H + h) * R + first
    for i in tl.range(0, tl.minimum(TILES, NT - group * TILES), num_stages=STAGES):
        start = tl.multiple_of((group * TILES + i) * BN, BN)
        k = _load(key, c, d, S - start, D, stride_ks, EVEN_S, EVEN_D, ALIGNED)
        scores = _dot(q, tl.trans(k)) * scale
        scores = _masked(scores, mask, row, start, T, S, stride_mt, stride_ms, MASK, CAUSAL, EVEN_S)
        p = tl.exp2(scores - shift[:, None]) * factor[:, None]
        at = line * SP + r[:, None] * SP + (start + c)[None, :]
        kept = there[:, None] & ((start + c)[None, :] < SP)
        tl.store(maps + at, _rounded(p, maps.dtype.element_ty), mask=kept)
        v = _load(value, c, e, S - start, E, stride_vs, EVEN_S, EVEN_E, ALIGNED)
        tl.store(grads + at, _rounded(_dot(g, tl.trans(v)), grads.dtype.element_ty), mask=kept)
        key += _step(BN, stride_ks, ALIGNED)
        value += _step(BN, stride_vs, ALIGNED)


@triton.jit(do_not_specialize=_OF_STRIP)
def grads_kernel(
    maps,
    grads,
    grad_scores,
    coeff,
    gain,
    products,
    first_sample,
    first_row,
    rows,
    R,
    SP,
    stride_ab,
    stride_ai,
    stride_aj,
    H: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    MAP_GAIN: tl.constexpr,
):
    """One row: gradients of alpha and of the scores, and the mixed maps, which take the maps' place.

    C_ij = sum_s dM_i P_j is the row's share of alpha's gradient, and sum_i alpha_ij C_ij what softmax's derivative
    takes off:  dS_j = P_j (sum_i alpha_ij dM_i - sum_i alpha_ij C_ij). Float32 gradients (of float16 inputs, whose
    products may exceed that dtype) are multiplied as the sum of two bfloat16 numbers.
    """
    t = tl.program_id(0)
    local_b = tl.program_id(1)
    b = (first_sample + local_b).to(tl.int64)
    i = tl.arange(0, HP)
    j = tl.arange(0, HP)
    c = tl.arange(0, BN)
    sample = local_b.to(tl.int64) * H * R * SP
    maps += sample
    grads += sample
    grad_scores += sample
    at = (i[:, None] * R + t) * SP + c[None, :]  # gpu.py keeps a sample's strip below 2**31
    WIDE: tl.constexpr = grads.dtype.element_ty == tl.float32
    dtype = maps.dtype.element_ty
    sums = tl.zeros((HP, HP), tl.float32)
    for start in tl.range(0, SP, BN, num_stages=STAGES):
        kept = (i[:, None] < H) & ((start + c)[None, :] < SP)
        p = tl.load(maps + at + start, mask=kept, other=0.0)
        g = tl.load(grads + at + start, mask=kept, other=0.0)
        if WIDE:
            g_high, g_low = _split(g, tl.bfloat16)
            p_high, p_low = _split(p.to(tl.float32), tl.bfloat16)
            sums = _dot(g_low, tl.trans(p_high), _dot(g_high, tl.trans(p_low), sums))
            sums = _dot(g_high, tl.trans(p_high), sums)
        else:
            sums = _dot(g, tl.trans(p), sums)
    sums = sums / MAP_GAIN
    tl.store(products + ((local_b.to(tl.int64) * R + t) * HP + i[:, None]) * HP + j[None, :], sums)
    at_alpha = coeff + b * stride_ab + i[:, None] * stride_ai + j[None, :] * stride_aj
    alpha = tl.load(at_alpha, mask=(i[:, None] < H) & (j[None, :] < H), other=0.0).to(tl.float32)
    alpha += tl.where(i[:, None] == j[None, :], 1.0, 0.0)
    taken_off = tl.sum(alpha * sums, 0)
    if WIDE:
        t_high, t_low = _split(tl.trans(alpha), tl.bfloat16)
        alpha = alpha * (tl.load(gain + b * H + i, mask=i < H, other=1.0)[:, None] / MAP_GAIN)
    else:
        t_high, t_low = _split(tl.trans(alpha), dtype)
    a_high, a_low = _split(alpha, dtype)
    for start in tl.range(0, SP, BN, num_stages=STAGES):
        kept = (i[:, None] < H) & ((start + c)[None, :] < SP)
        p = tl.load(maps + at + start, mask=kept, other=0.0)
        g = tl.load(grads + at + start, mask=kept, other=0.0)
        mixed_maps = _dot(a_low, p, _dot(a_high, p))
        if WIDE:
            g_high, g_low = _split(g, tl.bfloat16)
            grad_maps = _dot(t_high, g_high, _dot(t_high, g_low, _dot(t_low, g_high)))
        else:
            grad_maps = _dot(t_low, g, _dot(t_high, g))
        grad = p.to(tl.float32) * (grad_maps - taken_off[:, None]) / MAP_GAIN
        tl.store(maps + at + start, _rounded(mixed_maps, dtype), mask=kept)
        tl.store(grad_scores + at + start, _rounded(grad, grad_scores.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=_OF_STRIP)
def keys_kernel(
    maps,
    grad_scores,
    query,
    grad_out,
    grad_key,
    grad_value,
    gain,
    scale,
    first_sample,
    first_row,
    rows,
    S,
    D: tl.constexpr,
    E: tl.constexpr,
    R,
    SP,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
    GAIN: tl.constexpr,
    ADD: tl.constexpr,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
):
    """Gradients of a tile of keys, dS^T Q scale, and of its values, M^T dO. ADD: to those of the strips before."""
    start = tl.program_id(0) * BN
    h = tl.program_id(1)
    local_b = tl.program_id(2)
    b = (first_sample + local_b).to(tl.int64)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    at = (local_b.to(tl.int64) * H + h) * R * SP + r[:, None] * SP + (start + c)[None, :]
    query += _offset(b, stride_qb, ALIGNED) + _offset(h, stride_qh, ALIGNED) + _offset(first_row, stride_qt, ALIGNED)
    grad_out += (
        _offset(b, stride_gb, ALIGNED) + _offset(h, stride_gh, ALIGNED) + _offset(first_row, stride_gt, ALIGNED)
    )
    of_keys = tl.zeros((BN, BD), tl.float32)
    of_values = tl.zeros((BN, BE), tl.float32)
    for first in tl.range(0, rows, BM, num_stages=STAGES):
        kept = (r[:, None] < rows - first) & ((start + c)[None, :] < SP)
        if OF_VALUES:
            m = tl.load(maps + at, mask=kept, other=0.0)
            g = _load(grad_out, r, e, rows - first, E, stride_gt, False, EVEN_E, ALIGNED)
            of_values = _dot(tl.trans(m), g, of_values)
            grad_out += _step(BM, stride_gt, ALIGNED)
        if OF_KEYS:
            s = tl.load(grad_scores + at, mask=kept, other=0.0)
            q = _load(query, r, d, rows - first, D, stride_qt, False, EVEN_D, ALIGNED)
            of_keys = _dot(tl.trans(s), q, of_keys)
            query += _step(BM, stride_qt, ALIGNED)
        at += BM * SP
    there = c[:, None] < S - start
    if OF_VALUES:
        if GAIN:
            of_values = of_values / tl.load(gain + b * H + h)
        grad_value += b * stride_dvb + h.to(tl.int64) * stride_dvh + start.to(tl.int64) * stride_dvs
        place = grad_value + c[:, None] * stride_dvs + e[None, :]
        kept = there & (e[None, :] < E)
        if ADD:
            of_values += tl.load(place, mask=kept, other=0.0)
        tl.store(place, _rounded(of_values, grad_value.dtype.element_ty), mask=kept)
    if OF_KEYS:
        of_keys = of_keys * scale
        grad_key += b * stride_dkb + h.to(tl.int64) * stride_dkh + start.to(tl.int64) * stride_dks
        place = grad_key + c[:, None] * stride_dks + d[None, :]
        kept = there & (d[None, :] < D)
        if ADD:
            of_keys += tl.load(place, mask=kept, other=0.0)
        tl.store(place, _rounded(of_keys, grad_key.dtype.element_ty), mask=kept)
