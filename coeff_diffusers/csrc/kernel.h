// mixed_attention and its gradients in float32 on a CPU. kernel.py calls this, and says what is computed and where the
// time goes; docs/speed.md has the measurements.
//
// Compiled once for each instruction set, by avx512.cpp and avx2.cpp. Only vectors of GCC and clang are used, nothing of
// Python or torch: memory, also for scratch, is torch's, and the threads are those of the OpenMP that torch has loaded.
//
// A strip is R query rows of one head, R = NR vectors; a row is a lane. Arrays of a strip lie as (width, R) or (keys, R),
// so that no product of heads needs a sum over lanes, any width of heads fills the vectors, and scores, maps and their
// gradients never change their layout. A panel holds the entries of a tile of keys for a strip, (keys, R).

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using std::ptrdiff_t;

// W floats are a vector. The sizes of what is summed in registers: N x NR vectors of N keys (or widths, or heads) by the
// rows of a strip; OUTER keys by UNITS vectors of width; DOTS x DOTS pairs of heads.
#ifdef __AVX512F__  // 32 registers
constexpr int W = 16, N = 12, OUTER = 8, UNITS = 3, DOTS = 4;
#else  // 16 registers
constexpr int W = 8, N = 6, OUTER = 4, UNITS = 3, DOTS = 3;
#endif
constexpr int NR = 2, R = NR * W;
constexpr int HALF = 8;             // rows of keys, values and queries that are summed over are padded to so many floats
constexpr int PAD = 2 * R;          // between panels, whose heads would else all lie in the same few sets of a cache
constexpr int CACHED = 4096;        // floats of maps that are mixed at a time, if that takes several rounds of heads

typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float half_vec __attribute__((vector_size(4 * HALF), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define CASE(n, F) case n: F(n); break;
#define SWITCH(n, F)                                                                                          \
    switch (n) {                                                                                              \
        CASE(1, F) CASE(2, F) CASE(3, F) CASE(4, F) CASE(5, F) CASE(6, F) CASE(7, F) CASE(8, F) CASE(9, F)    \
        CASE(10, F) CASE(11, F) CASE(12, F)                                                                   \
    }

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec splat(float x) { return x - vec{}; }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }  // b if one is not a number
INLINE ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
INLINE ptrdiff_t parts_of(ptrdiff_t n, ptrdiff_t most) { return (n + most - 1) / most; }
INLINE ptrdiff_t padded(ptrdiff_t width) { return parts_of(width, HALF) * HALF; }

// e^x for x <= 0, to the last bit or two of a float; 0 below e^-87, not a number for such. x = n ln 2 + f, and e^f by a
// polynomial, fitted by Chebyshev's points to a relative error of 1.1e-8.
INLINE vec exponential(vec x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: a float so large has no bits for a fraction
    const vec shifted = x * 1.44269504f + to_integer;
    const vec n = shifted - to_integer;
    const vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first with few bits
    vec p = f * 0.0013934545f + 0.0083637768f;
    p = p * f + 0.0416664556f;
    p = p * f + 0.1666657329f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const vec power = (vec)(((ivec)shifted + 127) << 23);  // the bits of to_integer are shifted out
    return x < -87.0f ? vec{} : p * power;
}

// ---- products ----

// out (K, R) = x (K, width) y (width, R).
template <int K> INLINE void multiply_some(const float *x, ptrdiff_t width, const float *y, float *out) {
    vec sum[K][NR];
    UNROLL for (int k = 0; k < K; k++) UNROLL for (int r = 0; r < NR; r++) sum[k][r] = vec{};
    for (ptrdiff_t d = 0; d < width; d++) {
        vec row[NR];
        __builtin_prefetch(x + K * width + K * d);
        UNROLL for (int r = 0; r < NR; r++) row[r] = load(y + d * R + r * W);
        UNROLL for (int k = 0; k < K; k++) UNROLL for (int r = 0; r < NR; r++) sum[k][r] += splat(x[k * width + d]) * row[r];
    }
    UNROLL for (int k = 0; k < K; k++) UNROLL for (int r = 0; r < NR; r++) store(out + k * R + r * W, sum[k][r]);
}

// out (keys, R) = x (keys, width) y (width, R): scores, of keys by queries, and the gradient of maps, of values by that
// of the output.
static void multiply(const float *x, int keys, ptrdiff_t width, const float *y, float *out) {
    int k = 0;
    for (; k + N <= keys; k += N) multiply_some<N>(x + k * width, width, y, out + k * R);
#define SOME(n) if (n < N) multiply_some<n < N ? n : 1>(x + k * width, width, y, out + k * R)
    SWITCH(keys - k, SOME)
#undef SOME
}

// out (D, R) += x (keys, D of width)^T y (keys, R).
template <int D> INLINE void add_some(const float *x, ptrdiff_t width, const float *y, int keys, float *out) {
    vec sum[D][NR];
    UNROLL for (int d = 0; d < D; d++) UNROLL for (int r = 0; r < NR; r++) sum[d][r] = load(out + d * R + r * W);
    for (int k = 0; k < keys; k++) {
        vec row[NR];
        UNROLL for (int r = 0; r < NR; r++) row[r] = load(y + k * R + r * W);
        UNROLL for (int d = 0; d < D; d++) UNROLL for (int r = 0; r < NR; r++) sum[d][r] += splat(x[k * width + d]) * row[r];
    }
    UNROLL for (int d = 0; d < D; d++) UNROLL for (int r = 0; r < NR; r++) store(out + d * R + r * W, sum[d][r]);
}

// out (width, R) += x (keys, width)^T y (keys, R): the output, of values by mixed maps, and the gradient of queries, of
// keys by that of scores.
static void add_product(const float *x, int keys, ptrdiff_t width, const float *y, float *out) {
    const ptrdiff_t parts = parts_of(width, N);
    for (ptrdiff_t p = 0; p < parts; p++) {
        const ptrdiff_t d = width * p / parts;
#define SOME(n) if (n <= N) add_some<n <= N ? n : 1>(x + d, width, y, keys, out + d * R)
        SWITCH(width * (p + 1) / parts - d, SOME)
#undef SOME
    }
}

// out (K, F vectors and H half ones, of width) += x (K, R) rows (R, of width). A key and its rows lie in x one after
// another, so it is the width that is in lanes here.
template <int K, int F, int H> INLINE void add_outer_some(const float *x, const float *rows, ptrdiff_t width, float *out) {
    vec sum[K][F + 1];
    half_vec half[K];
    UNROLL for (int k = 0; k < K; k++) {
        UNROLL for (int d = 0; d < F; d++) sum[k][d] = load(out + k * width + d * W);
        if (H) half[k] = *(const half_vec *)(out + k * width + F * W);
    }
    for (int r = 0; r < R; r++) {
        vec row[F + 1];
        half_vec half_row;
        UNROLL for (int d = 0; d < F; d++) row[d] = load(rows + r * width + d * W);
        if (H) half_row = *(const half_vec *)(rows + r * width + F * W);
        UNROLL for (int k = 0; k < K; k++) {
            UNROLL for (int d = 0; d < F; d++) sum[k][d] += splat(x[k * R + r]) * row[d];
            if (H) half[k] += (x[k * R + r] - half_vec{}) * half_row;
        }
    }
    UNROLL for (int k = 0; k < K; k++) {
        UNROLL for (int d = 0; d < F; d++) store(out + k * width + d * W, sum[k][d]);
        if (H) *(half_vec *)(out + k * width + F * W) = half[k];
    }
}

template <int F, int H> static void add_outer_part(const float *x, int keys, const float *rows, ptrdiff_t width, float *out) {
    int k = 0;
    for (; k + OUTER <= keys; k += OUTER) add_outer_some<OUTER, F, H>(x + k * R, rows, width, out + k * width);
#define SOME(n) if (n < OUTER) add_outer_some<n < OUTER ? n : 1, F, H>(x + k * R, rows, width, out + k * width)
    SWITCH(keys - k, SOME)
#undef SOME
}

// out (keys, width) += x (keys, R) rows (R, width), width a multiple of HALF: the gradients of keys and values.
static void add_outer(const float *x, int keys, const float *rows, ptrdiff_t width, float *out) {
    const ptrdiff_t units = parts_of(width, W), parts = parts_of(units, UNITS);
    for (ptrdiff_t p = 0; p < parts; p++) {
        const ptrdiff_t from = units * p / parts, to = units * (p + 1) / parts, d = from * W;
        const bool half = to * W > width;
        switch (to - from) {
            case 1: half ? add_outer_part<0, 1>(x, keys, rows + d, width, out + d)
                         : add_outer_part<1, 0>(x, keys, rows + d, width, out + d); break;
            case 2: half ? add_outer_part<1, 1>(x, keys, rows + d, width, out + d)
                         : add_outer_part<2, 0>(x, keys, rows + d, width, out + d); break;
            case 3: half ? add_outer_part<2, 1>(x, keys, rows + d, width, out + d)
                         : add_outer_part<3, 0>(x, keys, rows + d, width, out + d); break;
        }
    }
}

// ---- mixing ----

// Panels of all heads: those of neighbouring heads are `stride` floats apart.
struct Panels {
    float *p;
    ptrdiff_t stride;
    float *operator[](ptrdiff_t head) const { return p + head * stride; }
    Panels from(int key) const { return {p + key * R, stride}; }
};

// I output heads of `mix`.
template <int I, bool SCALED>
INLINE void mix_some(const float *weights, ptrdiff_t H, Panels maps, Panels scales, int keys, Panels mixed) {
    for (int k = 0; k < keys; k++) {
        vec sum[I][NR];
        UNROLL for (int i = 0; i < I; i++) UNROLL for (int r = 0; r < NR; r++) sum[i][r] = vec{};
        for (ptrdiff_t j = 0; j < H; j++) {
            vec map[NR];
            UNROLL for (int r = 0; r < NR; r++) {
                map[r] = load(maps[j] + k * R + r * W);
                if (SCALED) map[r] *= load(scales[j] + r * W);
            }
            UNROLL for (int i = 0; i < I; i++) UNROLL for (int r = 0; r < NR; r++) sum[i][r] += splat(weights[j * H + i]) * map[r];
        }
        UNROLL for (int i = 0; i < I; i++) UNROLL for (int r = 0; r < NR; r++) store(mixed[i] + k * R + r * W, sum[i][r]);
    }
}

// mixed_i (keys, R) = sum_j weights[j, i] maps_j (keys, R), and before that each map times its scale (R), if SCALED.
template <bool SCALED>
static void mix(const float *weights, ptrdiff_t H, Panels maps, Panels scales, int keys, Panels mixed) {
    const ptrdiff_t parts = parts_of(H, N);
    const int most = parts == 1 || CACHED / R / H < 1 ? keys : (int)(CACHED / R / H);
    for (int k = 0; k < keys; k += most)
        for (ptrdiff_t p = 0; p < parts; p++) {
            const ptrdiff_t i = H * p / parts;
            const int some = (int)smaller(keys - k, most);
            const Panels part = {mixed[i], mixed.stride};
#define SOME(n) if (n <= N) mix_some<n <= N ? n : 1, SCALED>(weights + i, H, maps.from(k), scales, some, part.from(k))
            SWITCH(H * (p + 1) / parts - i, SOME)
#undef SOME
        }
}

// sums[i, j] (W lanes) += x_i (keys, R) . y_j (keys, R) of I by J heads.
template <int I, int J> INLINE void add_dots_some(Panels x, Panels y, int keys, float *sums, ptrdiff_t H) {
    vec sum[I][J];
    UNROLL for (int i = 0; i < I; i++) UNROLL for (int j = 0; j < J; j++) sum[i][j] = load(sums + (i * H + j) * W);
    for (ptrdiff_t at = 0; at < (ptrdiff_t)keys * R; at += W) {
        vec right[J];
        UNROLL for (int j = 0; j < J; j++) right[j] = load(y[j] + at);
        UNROLL for (int i = 0; i < I; i++) UNROLL for (int j = 0; j < J; j++) sum[i][j] += load(x[i] + at) * right[j];
    }
    UNROLL for (int i = 0; i < I; i++) UNROLL for (int j = 0; j < J; j++) store(sums + (i * H + j) * W, sum[i][j]);
}

// For all heads: the gradient of the coefficients, of that of mixed maps by maps.
static void add_dots(Panels x, Panels y, int keys, float *sums, ptrdiff_t H) {
    for (ptrdiff_t i = 0; i < H; i += DOTS)
        for (ptrdiff_t j = 0; j < H; j += DOTS) {
            const Panels left = {x[i], x.stride}, right = {y[j], y.stride};
            float *to = sums + (i * H + j) * W;
#define ROW(I, n) if (n <= DOTS) add_dots_some<I, n <= DOTS ? n : 1>(left, right, keys, to, H)
#define SOME1(n) ROW(1, n)
#define SOME2(n) ROW(2, n)
#define SOME3(n) ROW(3, n)
#define SOME4(n) ROW(4, n)
            const ptrdiff_t rows = smaller(DOTS, H - i), columns = smaller(DOTS, H - j);
            if (rows == 1) SWITCH(columns, SOME1)
            if (rows == 2) SWITCH(columns, SOME2)
            if (rows == 3) SWITCH(columns, SOME3)
            if (DOTS > 3 && rows == 4) SWITCH(columns, SOME4)
#undef ROW
        }
}

// ---- a call ----

struct Array {  // (B, H, T or S, width), the last of stride 1
    float *p;
    ptrdiff_t b, h, t;
    float *at(ptrdiff_t batch, ptrdiff_t head, ptrdiff_t row) const { return p + batch * b + head * h + row * t; }
};

struct Mask {
    const void *p;  // nullptr: none
    ptrdiff_t b, h, t, s;
    ptrdiff_t boolean;  // true: takes part; else float32, added to the scores
};

// As in kernel.py, field by field. Keys and values are contiguous.
struct Call {
    ptrdiff_t B, H, T, S, D, E;
    Array query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    Mask mask;
    const float *alpha, *alpha_transposed;  // (B, H, H)
    float *statistics;                      // (2, B, H, T): each row's largest score, and 1 / the sum of its exponentials
    float *grad_alpha;                      // (threads, B, H, H), or nullptr
    float *scratch;
    ptrdiff_t rows, keys;                   // of a block and of a tile; rows is a multiple of R
    ptrdiff_t threads, is_causal;
    ptrdiff_t next;                         // block that nobody has begun
    double scale;

    ptrdiff_t strips() const { return rows / R; }
    ptrdiff_t tiles() const { return parts_of(S, keys); }
    ptrdiff_t blocks() const { return parts_of(T, rows); }
    ptrdiff_t panel() const { return keys * R + PAD; }
    ptrdiff_t heads_and_strips() const { return H * strips(); }
};

// Hands out scratch, floats in whole cache lines; with nullptr it only counts.
struct Arena {
    float *base;
    ptrdiff_t used;
    float *take(ptrdiff_t n) {
        float *p = base ? base + used : nullptr;
        used += parts_of(n, 16) * 16;
        return p;
    }
};

// Query rows of a block, and tiles of keys that any of them sees.
struct Block {
    ptrdiff_t b, first, end, tiles;
    Block(const Call &c, ptrdiff_t index)
        : b(index / c.blocks()), first(index % c.blocks() * c.rows), end(smaller(first + c.rows, c.T)),
          tiles(c.is_causal ? smaller(c.tiles(), parts_of(end, c.keys)) : c.tiles()) {}
    int strips() const { return (int)parts_of(end - first, R); }
    ptrdiff_t row(int strip) const { return first + strip * R; }
    int rows(int strip) const { return (int)smaller(R, end - row(strip)); }
};

// to (width, R) = from (rows, width)^T times scale, with zeros for rows that are not there.
static void pack(const float *from, ptrdiff_t stride, int rows, ptrdiff_t width, float scale, float *to) {
    if (rows < R) memset(to, 0, sizeof(float) * width * R);
    ptrdiff_t d = 0;
    for (; d + HALF <= width; d += HALF)
        for (int r = 0; r < rows; r++)
            UNROLL for (int e = 0; e < HALF; e++) to[(d + e) * R + r] = from[r * stride + d + e] * scale;
    for (; d < width; d++)
        for (int r = 0; r < rows; r++) to[d * R + r] = from[r * stride + d] * scale;
}

// to (rows, width) = from (width, R)^T times scale.
static void unpack(const float *from, int rows, ptrdiff_t width, float scale, float *to, ptrdiff_t stride) {
    ptrdiff_t d = 0;
    for (; d + HALF <= width; d += HALF)
        for (int r = 0; r < rows; r++)
            UNROLL for (int e = 0; e < HALF; e++) to[r * stride + d + e] = from[(d + e) * R + r] * scale;
    for (; d < width; d++)
        for (int r = 0; r < rows; r++) to[r * stride + d] = from[d * R + r] * scale;
}

// to (R, padded width) = from (rows, width) times scale, with zeros for rows and widths that are not there.
static void pack_rows(const float *from, ptrdiff_t stride, int rows, ptrdiff_t width, float scale, float *to) {
    memset(to, 0, sizeof(float) * padded(width) * R);
    for (int r = 0; r < rows; r++)
        for (ptrdiff_t d = 0; d < width; d++) to[r * padded(width) + d] = from[r * stride + d] * scale;
}

INLINE float mask_value(const Mask &m, ptrdiff_t at) {
    if (m.boolean) return ((const uint8_t *)m.p)[at] ? 0.0f : -INFINITY;
    return ((const float *)m.p)[at];
}

// Adds the mask to the scores (keys, R) of a strip and the keys from `first_key` on.
static void add_mask(const Call &c, const Block &block, ptrdiff_t head, int strip, ptrdiff_t first_key, int keys, float *scores) {
    const ptrdiff_t row = block.row(strip);
    const int rows = block.rows(strip);
    if (c.is_causal) {
        for (int k = 0; k < keys; k++)
            for (int r = (int)smaller(R, first_key + k - row) - 1; r >= 0; r--) scores[k * R + r] = -INFINITY;
    } else if (c.mask.p && c.mask.t == 0) {
        const ptrdiff_t at = block.b * c.mask.b + head * c.mask.h + first_key * c.mask.s;
        for (int k = 0; k < keys; k++) {
            const vec value = splat(mask_value(c.mask, at + k * c.mask.s));
            UNROLL for (int r = 0; r < NR; r++) store(scores + k * R + r * W, load(scores + k * R + r * W) + value);
        }
    } else if (c.mask.p) {
        for (int r = 0; r < rows; r++) {
            const ptrdiff_t at = block.b * c.mask.b + head * c.mask.h + (row + r) * c.mask.t + first_key * c.mask.s;
            for (int k = 0; k < keys; k++) scores[k * R + r] += mask_value(c.mask, at + k * c.mask.s);
        }
    }
}

// A strip's scores for a tile, masked. `queries` have the scale.
static void form_scores(const Call &c, const Block &block, ptrdiff_t head, int strip, ptrdiff_t tile, const float *queries, float *to) {
    const ptrdiff_t first_key = tile * c.keys;
    const int keys = (int)smaller(c.keys, c.S - first_key);
    multiply(c.key.at(block.b, head, first_key), keys, c.D, queries, to);
    if (c.mask.p || (c.is_causal && first_key + keys > block.row(strip) + 1))
        add_mask(c, block, head, strip, first_key, keys, to);
}

// ---- forward ----

// What a thread needs for a block. Strips lie within heads, heads within tiles.
struct ForwardScratch {
    float *queries;         // (H, strips, D, R)
    float *most, *total;    // (H, strips, R): the largest score until now, and the sum of exponentials of scores less that
    float *scales;          // (tiles, H, strips, R): the largest score when a tile's exponentials were formed; then what they
                            // must be multiplied by
    float *mixed;           // (H, panel)
    float *out;             // (H, strips, E, R)
    float *maps;            // (tiles, H, strips, panel)
    ForwardScratch(const Call &c, Arena &arena) {
        const ptrdiff_t n = c.heads_and_strips();
        queries = arena.take(n * c.D * R);
        most = arena.take(n * R);
        total = arena.take(n * R);
        scales = arena.take(c.tiles() * n * R);
        mixed = arena.take(c.H * c.panel());
        out = arena.take(n * c.E * R);
        maps = arena.take(c.tiles() * n * c.panel());
    }
};

// The exponentials of a strip's scores for a tile, in their place, less the largest score until now; and the sums.
static void form_exponentials(int keys, float *scores, float *most, float *total, float *scale) {
    vec before[NR], now[NR], shift[NR], sum[NR];
    UNROLL for (int r = 0; r < NR; r++) now[r] = before[r] = load(most + r * W);
    for (int k = 0; k < keys; k++)
        UNROLL for (int r = 0; r < NR; r++) now[r] = larger(now[r], load(scores + k * R + r * W));
    UNROLL for (int r = 0; r < NR; r++) {
        shift[r] = now[r] == -INFINITY ? vec{} : now[r];  // all keys until now are masked
        sum[r] = load(total + r * W) * exponential(before[r] - shift[r]);
    }
    for (int k = 0; k < keys; k++)
        UNROLL for (int r = 0; r < NR; r++) {
            const vec e = exponential(load(scores + k * R + r * W) - shift[r]);
            sum[r] += e;
            store(scores + k * R + r * W, e);
        }
    UNROLL for (int r = 0; r < NR; r++) {
        store(most + r * W, now[r]);
        store(scale + r * W, shift[r]);
        store(total + r * W, sum[r]);
    }
}

static void forward_block(const Call &c, const Block &block, const ForwardScratch &s) {
    const ptrdiff_t all = c.heads_and_strips(), panel = c.panel();
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            const float *queries = s.queries + at * c.D * R;
            pack(c.query.at(block.b, h, block.row(g)), c.query.t, block.rows(g), c.D, (float)c.scale, s.queries + at * c.D * R);
            for (int r = 0; r < R; r++) s.most[at * R + r] = -INFINITY, s.total[at * R + r] = 0.0f;
            memset(s.out + at * c.E * R, 0, sizeof(float) * c.E * R);
            (void)queries;
        }
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (ptrdiff_t tile = 0; tile < block.tiles; tile++)
            for (int g = 0; g < block.strips(); g++) {
                const ptrdiff_t at = h * c.strips() + g;
                float *maps = s.maps + (tile * all + at) * panel;
                form_scores(c, block, h, g, tile, s.queries + at * c.D * R, maps);
                form_exponentials((int)smaller(c.keys, c.S - tile * c.keys), maps, s.most + at * R, s.total + at * R,
                                  s.scales + (tile * all + at) * R);
            }
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++)
            for (int r = 0; r < R; r += W) {
                const ptrdiff_t at = (h * c.strips() + g) * R + r;
                const vec most = load(s.most + at), total = load(s.total + at);
                store(s.most + at, most == -INFINITY ? vec{} : most);
                store(s.total + at, total == 0.0f ? vec{} : 1.0f / total);  // a row without a key: zeros
            }
    for (ptrdiff_t tile = 0; tile < block.tiles; tile++) {
        const int keys = (int)smaller(c.keys, c.S - tile * c.keys);
        for (ptrdiff_t at = 0; at < all * R; at += W) {
            float *scale = s.scales + tile * all * R + at;
            store(scale, exponential(load(scale) - load(s.most + at)) * load(s.total + at));
        }
        for (int g = 0; g < block.strips(); g++) {
            const Panels mixed = {s.mixed, panel};
            mix<true>(c.alpha_transposed + block.b * c.H * c.H, c.H, {s.maps + (tile * all + g) * panel, c.strips() * panel},
                      {s.scales + (tile * all + g) * R, c.strips() * R}, keys, mixed);
            for (ptrdiff_t h = 0; h < c.H; h++)
                add_product(c.value.at(block.b, h, tile * c.keys), keys, c.E, mixed[h], s.out + (h * c.strips() + g) * c.E * R);
        }
    }
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            unpack(s.out + at * c.E * R, block.rows(g), c.E, 1.0f, c.out.at(block.b, h, block.row(g)), c.out.t);
            if (c.statistics) {
                float *most = c.statistics + (block.b * c.H + h) * c.T + block.row(g);
                memcpy(most, s.most + at * R, sizeof(float) * block.rows(g));
                memcpy(most + c.B * c.H * c.T, s.total + at * R, sizeof(float) * block.rows(g));
            }
        }
}

// ---- backward ----

struct BackwardScratch {
    // of all threads
    float *queries, *query_rows;        // (H, strips, D, R) and (H, strips, R, padded D), with the scale
    float *grads, *grad_rows;           // of the output: (H, strips, E, R) and (H, strips, R, padded E)
    float *most, *inverse;              // (H, strips, R): the statistics
    float *maps, *grad_maps;            // (tiles, H, strips, panel)
    float *grad_key, *grad_value;       // (H, S, padded D), (H, S, padded E): sums of a sample
    // of each
    float *grad_mixed, *mixed;          // (H, panel)
    float *dots;                        // (threads; H, strips, R): sums over a thread's keys of maps times their gradients
    float *grad_query;                  // (threads; H, strips, D, R): sums over a thread's keys
    float *grad_alpha;                  // (H, H, W): sums of a sample
    ptrdiff_t all_dots, all_grad_query;

    BackwardScratch(const Call &c, Arena &arena, ptrdiff_t thread) {
        const ptrdiff_t n = c.heads_and_strips();
        queries = arena.take(n * c.D * R);
        query_rows = arena.take(n * padded(c.D) * R);
        grads = arena.take(n * c.E * R);
        grad_rows = arena.take(n * padded(c.E) * R);
        most = arena.take(n * R);
        inverse = arena.take(n * R);
        maps = arena.take(c.tiles() * n * c.panel());
        grad_maps = arena.take(c.tiles() * n * c.panel());
        grad_key = arena.take(c.grad_key.p ? c.H * c.S * padded(c.D) : 0);
        grad_value = arena.take(c.grad_value.p ? c.H * c.S * padded(c.E) : 0);
        all_dots = n * R, all_grad_query = n * c.D * R;
        dots = arena.take(c.threads * all_dots);
        grad_query = arena.take(c.threads * all_grad_query);
        const ptrdiff_t before = arena.used;
        for (ptrdiff_t i = 0; i <= thread; i++) {
            grad_mixed = arena.take(c.H * c.panel());
            mixed = arena.take(c.H * c.panel());
            grad_alpha = arena.take(c.grad_alpha ? c.H * c.H * W : 0);
        }
        arena.used = before + (arena.used - before) / (thread + 1) * c.threads;
    }
};

extern "C" {
// of the OpenMP runtime that is in the process; GCC's, which LLVM's and Intel's have as well
void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
void GOMP_barrier(void) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}

struct Member {  // of the threads that compute a call
    ptrdiff_t index, size;
    Member(const Call &c) : index(c.threads > 1 ? omp_get_thread_num() : 0), size(c.threads > 1 ? omp_get_num_threads() : 1) {}
    void wait() const {
        if (size > 1) GOMP_barrier();
    }
};

// A block's rows as the products need them; each thread some heads.
static void pack_block(const Call &c, const Block &block, const BackwardScratch &s, const Member &me) {
    for (ptrdiff_t h = me.index; h < c.H; h += me.size)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            const int rows = block.rows(g);
            const float *query = c.query.at(block.b, h, block.row(g)), *grad = c.grad_out.at(block.b, h, block.row(g));
            pack(query, c.query.t, rows, c.D, (float)c.scale, s.queries + at * c.D * R);
            pack_rows(query, c.query.t, rows, c.D, (float)c.scale, s.query_rows + at * padded(c.D) * R);
            pack(grad, c.grad_out.t, rows, c.E, 1.0f, s.grads + at * c.E * R);
            pack_rows(grad, c.grad_out.t, rows, c.E, 1.0f, s.grad_rows + at * padded(c.E) * R);
            const float *most = c.statistics + (block.b * c.H + h) * c.T + block.row(g);
            for (int r = 0; r < R; r++) {
                s.most[at * R + r] = r < rows ? most[r] : 0.0f;
                s.inverse[at * R + r] = r < rows ? most[c.B * c.H * c.T + r] : 0.0f;
            }
        }
}

// Maps of a tile, their gradients, and what follows from them: dV = M^T dO, dM = dO V^T, dalpha = dM maps^T and
// dmaps = alpha^T dM, where M are the mixed maps.
static void backward_maps(const Call &c, const Block &block, ptrdiff_t tile, const BackwardScratch &s, float *dots) {
    const ptrdiff_t all = c.heads_and_strips(), panel = c.panel(), first_key = tile * c.keys;
    const int keys = (int)smaller(c.keys, c.S - first_key);
    const bool scores = c.grad_query.p || c.grad_key.p;
    const Panels mixed = {s.mixed, panel}, grad_mixed = {s.grad_mixed, panel};
    for (int g = 0; g < block.strips(); g++) {
        const Panels maps = {s.maps + (tile * all + g) * panel, c.strips() * panel};
        const Panels grad_maps = {s.grad_maps + (tile * all + g) * panel, c.strips() * panel};
        for (ptrdiff_t h = 0; h < c.H; h++) {
            const ptrdiff_t at = h * c.strips() + g;
            form_scores(c, block, h, g, tile, s.queries + at * c.D * R, maps[h]);
            vec most[NR], inverse[NR];
            UNROLL for (int r = 0; r < NR; r++) most[r] = load(s.most + at * R + r * W), inverse[r] = load(s.inverse + at * R + r * W);
            for (int k = 0; k < keys; k++)
                UNROLL for (int r = 0; r < NR; r++) {
                    float *p = maps[h] + k * R + r * W;
                    store(p, exponential(load(p) - most[r]) * inverse[r]);
                }
        }
        if (c.grad_value.p) {
            mix<false>(c.alpha_transposed + block.b * c.H * c.H, c.H, maps, {}, keys, mixed);
            for (ptrdiff_t h = 0; h < c.H; h++)
                add_outer(mixed[h], keys, s.grad_rows + (h * c.strips() + g) * padded(c.E) * R, padded(c.E),
                          s.grad_value + (h * c.S + first_key) * padded(c.E));
        }
        if (!scores && !c.grad_alpha) continue;
        for (ptrdiff_t h = 0; h < c.H; h++)
            multiply(c.value.at(block.b, h, first_key), keys, c.E, s.grads + (h * c.strips() + g) * c.E * R, grad_mixed[h]);
        if (c.grad_alpha) add_dots(grad_mixed, maps, keys, s.grad_alpha, c.H);
        if (!scores) continue;
        mix<false>(c.alpha + block.b * c.H * c.H, c.H, grad_mixed, {}, keys, grad_maps);
        for (ptrdiff_t h = 0; h < c.H; h++) {
            float *to = dots + (h * c.strips() + g) * R;
            vec sum[NR];
            UNROLL for (int r = 0; r < NR; r++) sum[r] = load(to + r * W);
            for (int k = 0; k < keys; k++)
                UNROLL for (int r = 0; r < NR; r++) sum[r] += load(maps[h] + k * R + r * W) * load(grad_maps[h] + k * R + r * W);
            UNROLL for (int r = 0; r < NR; r++) store(to + r * W, sum[r]);
        }
    }
}

// From there: dscores = maps (dmaps - the row's dot), dQ = dscores K, dK = dscores^T Q. `dots` are those of all keys.
static void backward_scores(const Call &c, const Block &block, ptrdiff_t tile, const BackwardScratch &s, const float *dots, float *grad_query) {
    const ptrdiff_t all = c.heads_and_strips(), panel = c.panel(), first_key = tile * c.keys;
    const int keys = (int)smaller(c.keys, c.S - first_key);
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            const float *maps = s.maps + (tile * all + at) * panel;
            float *grads = s.grad_maps + (tile * all + at) * panel;
            vec dot[NR];
            UNROLL for (int r = 0; r < NR; r++) dot[r] = load(dots + at * R + r * W);
            for (int k = 0; k < keys; k++)
                UNROLL for (int r = 0; r < NR; r++) {
                    const ptrdiff_t i = k * R + r * W;
                    store(grads + i, load(maps + i) * (load(grads + i) - dot[r]));
                }
            if (c.grad_query.p) add_product(c.key.at(block.b, h, first_key), keys, c.D, grads, grad_query + at * c.D * R);
            if (c.grad_key.p)
                add_outer(grads, keys, s.query_rows + at * padded(c.D) * R, padded(c.D), s.grad_key + (h * c.S + first_key) * padded(c.D));
        }
}

// x (n) += each of the `count` arrays after it, `stride` floats apart, in turn.
static void add_up(float *x, ptrdiff_t n, ptrdiff_t count, ptrdiff_t stride) {
    for (ptrdiff_t i = 1; i < count; i++)
        for (ptrdiff_t at = 0; at < n; at++) x[at] += x[i * stride + at];
}

// The part of a thread: of each block, every `size`th tile. So nobody adds to the same keys' gradients, and all sums have
// an order.
static void backward_thread(void *data) {
    Call &c = *(Call *)data;
    const Member me(c);
    Arena arena = {c.scratch, 0};
    const BackwardScratch s(c, arena, me.index);
    float *dots = s.dots + me.index * s.all_dots, *grad_query = s.grad_query + me.index * s.all_grad_query;
    for (ptrdiff_t b = 0; b < c.B; b++) {
        if (c.grad_alpha) memset(s.grad_alpha, 0, sizeof(float) * c.H * c.H * W);
        for (ptrdiff_t h = 0; h < c.H; h++)
            for (ptrdiff_t tile = me.index; tile < c.tiles(); tile += me.size) {
                const ptrdiff_t k = tile * c.keys, keys = smaller(c.keys, c.S - k);
                if (c.grad_key.p) memset(s.grad_key + (h * c.S + k) * padded(c.D), 0, sizeof(float) * keys * padded(c.D));
                if (c.grad_value.p) memset(s.grad_value + (h * c.S + k) * padded(c.E), 0, sizeof(float) * keys * padded(c.E));
            }
        for (ptrdiff_t index = b * c.blocks(); index < (b + 1) * c.blocks(); index++) {
            const Block block(c, index);
            pack_block(c, block, s, me);
            memset(dots, 0, sizeof(float) * s.all_dots);
            me.wait();
            for (ptrdiff_t tile = me.index; tile < block.tiles; tile += me.size) backward_maps(c, block, tile, s, dots);
            me.wait();
            if (c.grad_query.p || c.grad_key.p) {
                if (me.index == 0) add_up(s.dots, s.all_dots, me.size, s.all_dots);
                memset(grad_query, 0, sizeof(float) * s.all_grad_query);
                me.wait();
                for (ptrdiff_t tile = me.index; tile < block.tiles; tile += me.size)
                    backward_scores(c, block, tile, s, s.dots, grad_query);
                me.wait();
            }
            if (c.grad_query.p)
                for (ptrdiff_t h = me.index; h < c.H; h += me.size)
                    for (int g = 0; g < block.strips(); g++) {
                        float *of_all = s.grad_query + (h * c.strips() + g) * c.D * R;
                        add_up(of_all, c.D * R, me.size, s.all_grad_query);
                        unpack(of_all, block.rows(g), c.D, (float)c.scale, c.grad_query.at(b, h, block.row(g)), c.grad_query.t);
                    }
        }
        for (ptrdiff_t h = 0; h < c.H; h++)
            for (ptrdiff_t tile = me.index; tile < c.tiles(); tile += me.size)
                for (ptrdiff_t k = tile * c.keys; k < smaller(c.S, (tile + 1) * c.keys); k++) {
                    if (c.grad_key.p)
                        memcpy(c.grad_key.at(b, h, k), s.grad_key + (h * c.S + k) * padded(c.D), sizeof(float) * c.D);
                    if (c.grad_value.p)
                        memcpy(c.grad_value.at(b, h, k), s.grad_value + (h * c.S + k) * padded(c.E), sizeof(float) * c.E);
                }
        if (c.grad_alpha)
            for (ptrdiff_t i = 0; i < c.H * c.H; i++) {
                float sum = 0.0f;
                for (int w = 0; w < W; w++) sum += s.grad_alpha[i * W + w];
                c.grad_alpha[(me.index * c.B + b) * c.H * c.H + i] = sum;
            }
    }
}

static void forward_thread(void *data) {
    Call &c = *(Call *)data;
    Arena arena = {c.scratch, 0};
    for (ptrdiff_t i = 0; i < Member(c).index; i++) ForwardScratch(c, arena);
    const ForwardScratch scratch(c, arena);
    for (;;) {
        const ptrdiff_t index = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
        if (index >= c.B * c.blocks()) return;
        forward_block(c, Block(c, index), scratch);
    }
}

static void run(void (*work)(void *), Call *c) {
    if (c->threads > 1)
        GOMP_parallel(work, c, (unsigned)c->threads, 0);
    else
        work(c);
}

// ---- what kernel.py calls ----

extern "C" {
ptrdiff_t size_of_call(void) { return sizeof(Call); }
ptrdiff_t rows_of_strip(void) { return R; }
ptrdiff_t has_threads(void) { return GOMP_parallel && GOMP_barrier && omp_get_thread_num && omp_get_num_threads; }

// Floats of scratch, with the sizes in a call.
ptrdiff_t forward_scratch(const Call *c) {
    Arena arena = {nullptr, 0};
    for (ptrdiff_t i = 0; i < c->threads; i++) ForwardScratch(*c, arena);
    return arena.used;
}
ptrdiff_t backward_scratch(const Call *c) {
    Arena arena = {nullptr, 0};
    BackwardScratch(*c, arena, 0);
    return arena.used;
}

void forward(Call *c) { run(forward_thread, c); }
void backward(Call *c) { run(backward_thread, c); }
}
