// mixed_attention and its gradients in float32 on a CPU, as kernel.py calls them. functional.py has the formulas and
// the letters, docs/speed.md the reasons and the measurements.
//
// Compiled once for each instruction set, by avx512.cpp and avx2.cpp, with the vectors of GCC and clang and nothing of
// Python or torch: memory, scratch as well, is torch's, and so are the threads, of the OpenMP that it has loaded.
//
// A strip is R query rows of one head, R = NR vectors; a row is a lane. Arrays of a strip lie as (width, R) or (keys,
// R): so no product needs a sum over lanes but those for the gradients of keys and values, heads of any width fill the
// vectors, and scores, maps and their gradients keep their layout. A panel holds the entries of a strip for a tile of
// keys, (keys, R). A block is some strips of every head.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using std::ptrdiff_t;

extern "C" {
// of the OpenMP runtime that is in the process; GCC's, which LLVM's and Intel's have as well
void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
void GOMP_barrier(void) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}

namespace {

// W floats are a vector. What is summed in registers at once: N keys (or widths, or heads) by the NR vectors of a
// strip's rows; OUTER keys by UNITS vectors of width; DOTS by DOTS pairs of heads.
#ifdef __AVX512F__  // 32 registers
constexpr int W = 16, N = 12, OUTER = 8, UNITS = 3, DOTS = 4;
#else  // 16 registers
constexpr int W = 8, N = 6, OUTER = 4, UNITS = 3, DOTS = 3;
#endif
constexpr int NR = 2, R = NR * W;
constexpr int HALF = 8;  // what has its width in lanes is padded to a multiple of this

typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef double wide_vec __attribute__((vector_size(8 * W), aligned(8), may_alias));
typedef float half_vec __attribute__((vector_size(4 * HALF), aligned(4), may_alias));

#define INLINE     inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)  // unrolled
// calls F(n), for n from 1 to 12
#define SWITCH(n, F)           \
    switch (n) {               \
        case 1: F(1); break;   \
        case 2: F(2); break;   \
        case 3: F(3); break;   \
        case 4: F(4); break;   \
        case 5: F(5); break;   \
        case 6: F(6); break;   \
        case 7: F(7); break;   \
        case 8: F(8); break;   \
        case 9: F(9); break;   \
        case 10: F(10); break; \
        case 11: F(11); break; \
        case 12: F(12); break; \
    }

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec splat(float x) { return x - vec{}; }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }  // b if one is not a number
constexpr int at_most(int n, int most) { return n < most ? n : most; }
INLINE ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
INLINE ptrdiff_t parts_of(ptrdiff_t n, ptrdiff_t most) { return (n + most - 1) / most; }
INLINE ptrdiff_t whole_lines(ptrdiff_t floats) { return parts_of(floats, 16) * 16; }  // of a cache
INLINE ptrdiff_t padded(ptrdiff_t width) { return parts_of(width, HALF) * HALF; }

// e^x for x <= 0, to the last bit or two; 0 below e^-87; not a number for what is none. With x = n ln 2 + f, it is 2^n
// times a polynomial in f, fitted at Chebyshev's points, whose relative error is 1.1e-8.
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

// out (K, R) = X y, or added to it, where y is (width, R) and X[k, d] is x[k * next + d * step].
template <int K, bool ADD>
INLINE void multiply_some(const float *x, ptrdiff_t next, ptrdiff_t step, ptrdiff_t width, const float *y,
                          float *out) {
    vec sum[K][NR];
    EACH (k, K)
        EACH (r, NR) sum[k][r] = ADD ? load(out + k * R + r * W) : vec{};
    for (ptrdiff_t d = 0; d < width; d++) {
        vec row[NR];
        if (!ADD) __builtin_prefetch(x + K * next + K * d);  // the rows that come next
        EACH (r, NR) row[r] = load(y + d * R + r * W);
        EACH (k, K)
            EACH (r, NR) sum[k][r] += splat(x[k * next + d * step]) * row[r];
    }
    EACH (k, K)
        EACH (r, NR) store(out + k * R + r * W, sum[k][r]);
}

// out (keys, R) = x (keys, width) y (width, R): scores, of keys by queries; the gradient of mixed maps, of values by
// that of the output.
void multiply(const float *x, int keys, ptrdiff_t width, const float *y, float *out) {
    int k = 0;
    for (; k + N <= keys; k += N) multiply_some<N, false>(x + k * width, width, 1, width, y, out + k * R);
#define SOME(n) \
    if (n < N) multiply_some<at_most(n, N - 1), false>(x + k * width, width, 1, width, y, out + k * R)
    SWITCH(keys - k, SOME)
#undef SOME
}

// out (width, R) += x (keys, width)^T y (keys, R): the output, of values by mixed maps; the gradient of queries, of
// keys by that of scores.
void add_product(const float *x, int keys, ptrdiff_t width, const float *y, float *out) {
    const ptrdiff_t parts = parts_of(width, N);
    for (ptrdiff_t p = 0; p < parts; p++) {
        const ptrdiff_t d = width * p / parts;
#define SOME(n) \
    if (n <= N) multiply_some<at_most(n, N), true>(x + d, 1, width, keys, y, out + d * R)
        SWITCH(width * (p + 1) / parts - d, SOME)
#undef SOME
    }
}

// K keys by F vectors and H half ones of the width, which lies in lanes here.
template <int K, int F, int H>
INLINE void add_outer_some(const float *x, const float *rows, ptrdiff_t width, float *out) {
    vec sum[K][F + 1];
    half_vec half[K];
    EACH (k, K) {
        EACH (d, F) sum[k][d] = load(out + k * width + d * W);
        if (H) half[k] = *(const half_vec *)(out + k * width + F * W);
    }
    for (int r = 0; r < R; r++) {
        vec row[F + 1];
        half_vec half_row;
        EACH (d, F) row[d] = load(rows + r * width + d * W);
        if (H) half_row = *(const half_vec *)(rows + r * width + F * W);
        EACH (k, K) {
            EACH (d, F) sum[k][d] += splat(x[k * R + r]) * row[d];
            if (H) half[k] += (x[k * R + r] - half_vec{}) * half_row;
        }
    }
    EACH (k, K) {
        EACH (d, F) store(out + k * width + d * W, sum[k][d]);
        if (H) *(half_vec *)(out + k * width + F * W) = half[k];
    }
}

template <int F, int H>
void add_outer_part(const float *x, int keys, const float *rows, ptrdiff_t width, float *out) {
    int k = 0;
    for (; k + OUTER <= keys; k += OUTER) add_outer_some<OUTER, F, H>(x + k * R, rows, width, out + k * width);
#define SOME(n) \
    if (n < OUTER) add_outer_some<at_most(n, OUTER - 1), F, H>(x + k * R, rows, width, out + k * width)
    SWITCH(keys - k, SOME)
#undef SOME
}

// out (keys, width) += x (keys, R) rows (R, width), width a multiple of HALF: the gradients of keys and values.
void add_outer(const float *x, int keys, const float *rows, ptrdiff_t width, float *out) {
    const ptrdiff_t units = parts_of(width, W), parts = parts_of(units, UNITS);
    for (ptrdiff_t p = 0; p < parts; p++) {
        const ptrdiff_t from = units * p / parts, to = units * (p + 1) / parts, d = from * W;
        const bool half = to * W > width;
        switch (to - from) {
            case 1:
                half ? add_outer_part<0, 1>(x, keys, rows + d, width, out + d)
                     : add_outer_part<1, 0>(x, keys, rows + d, width, out + d);
                break;
            case 2:
                half ? add_outer_part<1, 1>(x, keys, rows + d, width, out + d)
                     : add_outer_part<2, 0>(x, keys, rows + d, width, out + d);
                break;
            case 3:
                half ? add_outer_part<2, 1>(x, keys, rows + d, width, out + d)
                     : add_outer_part<3, 0>(x, keys, rows + d, width, out + d);
                break;
        }
    }
}

// ---- mixing ----

// Panels of all heads: those of neighbouring heads are `stride` floats apart.
struct Panels {
    float *p;
    ptrdiff_t stride;
    float *operator[](ptrdiff_t head) const { return p + head * stride; }
};

// I output heads of `mix`.
template <int I, bool SCALED>
INLINE void mix_some(const float *weights, ptrdiff_t H, Panels maps, Panels scales, int keys, Panels mixed) {
    for (int k = 0; k < keys; k++) {
        vec sum[I][NR];
        EACH (i, I)
            EACH (r, NR) sum[i][r] = vec{};
        for (ptrdiff_t j = 0; j < H; j++) {
            vec map[NR];
            EACH (r, NR) {
                map[r] = load(maps[j] + k * R + r * W);
                if (SCALED) map[r] *= load(scales[j] + r * W);
            }
            EACH (i, I)
                EACH (r, NR) sum[i][r] += splat(weights[j * H + i]) * map[r];
        }
        EACH (i, I)
            EACH (r, NR) store(mixed[i] + k * R + r * W, sum[i][r]);
    }
}

// mixed_i (keys, R) = sum_j weights[j, i] maps_j (keys, R), and before that each map times its scale (R), if SCALED.
template <bool SCALED>
void mix(const float *weights, ptrdiff_t H, Panels maps, Panels scales, int keys, Panels mixed) {
    const ptrdiff_t parts = parts_of(H, N);
    for (ptrdiff_t p = 0; p < parts; p++) {
        const ptrdiff_t i = H * p / parts;
        const Panels part = {mixed[i], mixed.stride};
#define SOME(n) \
    if (n <= N) mix_some<at_most(n, N), SCALED>(weights + i, H, maps, scales, keys, part)
        SWITCH(H * (p + 1) / parts - i, SOME)
#undef SOME
    }
}

// I by J heads of `add_dots`.
template <int I, int J>
INLINE void add_dots_some(Panels x, Panels y, int keys, double *sums, ptrdiff_t H) {
    vec sum[I][J];
    EACH (i, I)
        EACH (j, J) sum[i][j] = vec{};
    for (ptrdiff_t at = 0; at < (ptrdiff_t)keys * R; at += W) {
        vec right[J];
        EACH (j, J) right[j] = load(y[j] + at);
        EACH (i, I)
            EACH (j, J) sum[i][j] += load(x[i] + at) * right[j];
    }
    EACH (i, I)
        EACH (j, J) *(wide_vec *)(sums + (i * H + j) * W) += __builtin_convertvector(sum[i][j], wide_vec);
}

// sums (H, H, W) += x_i . y_j, lane by lane: the gradient of alpha, of that of mixed maps by maps. Its terms, of all
// queries and keys, may nearly cancel, so that only those of a panel are added in float32.
void add_dots(Panels x, Panels y, int keys, double *sums, ptrdiff_t H) {
    for (ptrdiff_t i = 0; i < H; i += DOTS)
        for (ptrdiff_t j = 0; j < H; j += DOTS) {
            const Panels left = {x[i], x.stride}, right = {y[j], y.stride};
            double *to = sums + (i * H + j) * W;
#define ROW(I, n) \
    if (n <= DOTS) add_dots_some<I, at_most(n, DOTS)>(left, right, keys, to, H)
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
    float *statistics;                      // (2, B, H, T): a row's largest score, and 1 / the sum of its exponentials
    double *grad_alpha;                     // (threads, B, H, H); nullptr, as others, where not wanted
    float *scratch;
    ptrdiff_t rows, keys;        // of a block, a multiple of R, and of a tile
    ptrdiff_t threads, by_rows;  // by_rows: in the backward pass each thread has blocks of its own
    ptrdiff_t is_causal;
    ptrdiff_t next;  // the first block that no thread has begun
    double scale;

    ptrdiff_t strips() const { return rows / R; }
    ptrdiff_t tiles() const { return parts_of(S, keys); }
    ptrdiff_t blocks() const { return parts_of(T, rows); }
    ptrdiff_t panel() const { return keys * R; }
    ptrdiff_t heads_and_strips() const { return H * strips(); }
    int keys_of(ptrdiff_t tile) const { return (int)smaller(keys, S - tile * keys); }
};

// One of the threads that compute a call. In the backward pass they are one group, whose members share a block and
// have some tiles of keys each; or, by_rows, each is a group and takes blocks of its own.
struct Member {
    ptrdiff_t thread, threads, group, groups, index, size;  // index: in the group, which has `size` members
    Member(const Call &c, ptrdiff_t thread, ptrdiff_t threads)
        : thread(thread),
          threads(threads),
          group(c.by_rows ? thread : 0),
          groups(c.by_rows ? threads : 1),
          index(c.by_rows ? 0 : thread),
          size(c.by_rows ? 1 : threads) {}
    Member(const Call &c)
        : Member(c, c.threads > 1 ? omp_get_thread_num() : 0, c.threads > 1 ? omp_get_num_threads() : 1) {}
    void wait_for_group() const {
        if (size > 1) GOMP_barrier();
    }
    void wait_for_all() const {
        if (threads > 1) GOMP_barrier();
    }
};

// Hands out scratch to a thread, in whole cache lines. Without memory it counts what all take.
struct Arena {
    float *base;
    Member me;
    ptrdiff_t used = 0;
    Arena(float *base, const Member &me) : base(base), me(me) {}
    float *of_group(ptrdiff_t n) { return take(n, me.groups, me.group); }  // n floats for each group
    float *own(ptrdiff_t n) { return take(n, me.threads, me.thread); }     // and for each thread

  private:
    float *take(ptrdiff_t n, ptrdiff_t times, ptrdiff_t which) {
        n = whole_lines(n);
        used += n * times;
        return base ? base + used - n * (times - which) : nullptr;
    }
};

// Query rows of a block, and tiles of keys that any of them sees.
struct Block {
    ptrdiff_t b, first, end, tiles;
    Block(const Call &c, ptrdiff_t index)
        : b(index / c.blocks()),
          first(index % c.blocks() * c.rows),
          end(smaller(first + c.rows, c.T)),
          tiles(c.is_causal ? smaller(c.tiles(), parts_of(end, c.keys)) : c.tiles()) {}
    int strips() const { return (int)parts_of(end - first, R); }
    ptrdiff_t row(int strip) const { return first + strip * R; }
    int rows(int strip) const { return (int)smaller(R, end - row(strip)); }
};

// to (width, R) = from (rows, width)^T times scale, with zeros for rows that are not there.
void pack(const float *from, ptrdiff_t stride, int rows, ptrdiff_t width, float scale, float *to) {
    if (rows < R) memset(to, 0, sizeof(float) * width * R);
    ptrdiff_t d = 0;
    for (; d + HALF <= width; d += HALF)
        for (int r = 0; r < rows; r++)
            EACH (e, HALF) to[(d + e) * R + r] = from[r * stride + d + e] * scale;
    for (; d < width; d++)
        for (int r = 0; r < rows; r++) to[d * R + r] = from[r * stride + d] * scale;
}

// to (rows, width) = from (width, R)^T times scale.
void unpack(const float *from, int rows, ptrdiff_t width, float scale, float *to, ptrdiff_t stride) {
    ptrdiff_t d = 0;
    for (; d + HALF <= width; d += HALF)
        for (int r = 0; r < rows; r++)
            EACH (e, HALF) to[r * stride + d + e] = from[(d + e) * R + r] * scale;
    for (; d < width; d++)
        for (int r = 0; r < rows; r++) to[r * stride + d] = from[d * R + r] * scale;
}

// to (R, padded width) = from (rows, width) times scale, with zeros for rows and widths that are not there.
void pack_rows(const float *from, ptrdiff_t stride, int rows, ptrdiff_t width, float scale, float *to) {
    memset(to, 0, sizeof(float) * padded(width) * R);
    for (int r = 0; r < rows; r++)
        for (ptrdiff_t d = 0; d < width; d++) to[r * padded(width) + d] = from[r * stride + d] * scale;
}

INLINE float masked(float score, const Mask &m, ptrdiff_t at) {
    if (m.boolean) return ((const uint8_t *)m.p)[at] ? score : -INFINITY;
    return score + ((const float *)m.p)[at];
}

// Adds the mask to the scores (keys, R) of a strip and the keys from `first_key` on.
void add_mask(const Call &c, const Block &block, ptrdiff_t head, int strip, ptrdiff_t first_key, int keys,
              float *scores) {
    const ptrdiff_t row = block.row(strip);
    const int rows = block.rows(strip);
    if (c.is_causal) {
        for (int k = 0; k < keys; k++)
            for (int r = (int)smaller(R, first_key + k - row) - 1; r >= 0; r--) scores[k * R + r] = -INFINITY;
    } else if (c.mask.p && c.mask.t == 0) {
        const ptrdiff_t at = block.b * c.mask.b + head * c.mask.h + first_key * c.mask.s;
        for (int k = 0; k < keys; k++) {
            for (int r = 0; r < R; r++) scores[k * R + r] = masked(scores[k * R + r], c.mask, at + k * c.mask.s);
        }
    } else if (c.mask.p) {
        for (int r = 0; r < rows; r++) {
            const ptrdiff_t at = block.b * c.mask.b + head * c.mask.h + (row + r) * c.mask.t + first_key * c.mask.s;
            for (int k = 0; k < keys; k++) scores[k * R + r] = masked(scores[k * R + r], c.mask, at + k * c.mask.s);
        }
    }
}

// A strip's scores for a tile, masked. `queries` have the scale.
void form_scores(const Call &c, const Block &block, ptrdiff_t head, int strip, ptrdiff_t tile, const float *queries,
                 float *to) {
    const ptrdiff_t first_key = tile * c.keys;
    const int keys = c.keys_of(tile);
    multiply(c.key.at(block.b, head, first_key), keys, c.D, queries, to);
    if (c.mask.p || (c.is_causal && first_key + keys > block.row(strip) + 1))
        add_mask(c, block, head, strip, first_key, keys, to);
}

// ---- forward ----

// What a thread needs for a block.
struct ForwardScratch {
    float *queries;       // (H, strips, D, R), with the scale
    float *most, *total;  // (H, strips, R): the largest score until now; the sum of exponentials of scores less that
    float *scales;        // (tiles, H, strips, R): the largest score when a tile's exponentials were formed
    float *mixed;         // (H, panel)
    float *out;           // (H, strips, E, R)
    float *maps;          // (tiles, H, strips, panel): exponentials

    ForwardScratch(const Call &c, Arena &arena) {
        const ptrdiff_t n = c.heads_and_strips();
        queries = arena.own(n * c.D * R);
        most = arena.own(n * R);
        total = arena.own(n * R);
        scales = arena.own(c.tiles() * n * R);
        mixed = arena.own(c.H * c.panel());
        out = arena.own(n * c.E * R);
        maps = arena.own(c.tiles() * n * c.panel());
    }
};

// The exponentials of a strip's scores for a tile, in their place, less the largest score until now; and the sums.
void form_exponentials(int keys, float *scores, float *most, float *total, float *scale) {
    vec before[NR], now[NR], shift[NR], sum[NR];
    EACH (r, NR) now[r] = before[r] = load(most + r * W);
    for (int k = 0; k < keys; k++)
        EACH (r, NR) now[r] = larger(now[r], load(scores + k * R + r * W));
    EACH (r, NR) {
        shift[r] = now[r] == -INFINITY ? vec{} : now[r];  // all keys until now are masked
        sum[r] = load(total + r * W) * exponential(before[r] - shift[r]);
    }
    for (int k = 0; k < keys; k++)
        EACH (r, NR) {
            const vec e = exponential(load(scores + k * R + r * W) - shift[r]);
            sum[r] += e;
            store(scores + k * R + r * W, e);
        }
    EACH (r, NR) {
        store(most + r * W, now[r]);
        store(scale + r * W, now[r]);
        store(total + r * W, sum[r]);
    }
}

void forward_block(const Call &c, const Block &block, const ForwardScratch &s) {
    const ptrdiff_t all = c.heads_and_strips(), panel = c.panel();
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            const float *query = c.query.at(block.b, h, block.row(g));
            pack(query, c.query.t, block.rows(g), c.D, (float)c.scale, s.queries + at * c.D * R);
            for (int r = 0; r < R; r++) s.most[at * R + r] = -INFINITY, s.total[at * R + r] = 0.0f;
            memset(s.out + at * c.E * R, 0, sizeof(float) * c.E * R);
        }
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (ptrdiff_t tile = 0; tile < block.tiles; tile++)
            for (int g = 0; g < block.strips(); g++) {
                const ptrdiff_t at = h * c.strips() + g;
                float *maps = s.maps + (tile * all + at) * panel;
                form_scores(c, block, h, g, tile, s.queries + at * c.D * R, maps);
                form_exponentials(c.keys_of(tile), maps, s.most + at * R, s.total + at * R,
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
        const int keys = c.keys_of(tile);
        for (ptrdiff_t at = 0; at < all * R; at += W) {  // now what its exponentials are multiplied by
            float *scale = s.scales + tile * all * R + at;
            store(scale, exponential(load(scale) - load(s.most + at)) * load(s.total + at));
        }
        for (int g = 0; g < block.strips(); g++) {
            const Panels mixed = {s.mixed, panel};
            const Panels maps = {s.maps + (tile * all + g) * panel, c.strips() * panel};
            const Panels scales = {s.scales + (tile * all + g) * R, c.strips() * R};
            mix<true>(c.alpha_transposed + block.b * c.H * c.H, c.H, maps, scales, keys, mixed);
            for (ptrdiff_t h = 0; h < c.H; h++)
                add_product(c.value.at(block.b, h, tile * c.keys), keys, c.E, mixed[h],
                            s.out + (h * c.strips() + g) * c.E * R);
        }
    }
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            unpack(s.out + at * c.E * R, block.rows(g), c.E, 1.0f, c.out.at(block.b, h, block.row(g)), c.out.t);
            float *most = c.statistics + (block.b * c.H + h) * c.T + block.row(g);
            memcpy(most, s.most + at * R, sizeof(float) * block.rows(g));
            memcpy(most + c.B * c.H * c.T, s.total + at * R, sizeof(float) * block.rows(g));
        }
}

// ---- backward ----

// What threads need for a block, and for the sums of a sample.
struct BackwardScratch {
    // of a group
    float *queries, *query_rows;    // (H, strips, D, R) and (H, strips, R, padded D), with the scale
    float *grads, *grad_rows;       // of the output: (H, strips, E, R) and (H, strips, R, padded E)
    float *most, *inverse;          // (H, strips, R): the statistics
    float *maps, *grad_maps;        // (tiles, H, strips, panel); then the gradient of the scores
    float *grad_key, *grad_value;   // (H, S, padded D) and (H, S, padded E): sums over its blocks
    float *all_dots, *all_queries;  // dots and grad_query of its first member; others' follow
    // of a thread
    float *grad_mixed, *mixed;  // (H, panel)
    float *dots;                // (H, strips, R): sums over its keys of maps times their gradients
    float *grad_query;          // (H, strips, D, R): sums over its keys
    double *grad_alpha;         // (H, H, W): sums over its keys and blocks
    ptrdiff_t dots_size, grad_query_size, grad_key_size, grad_value_size;

    BackwardScratch(const Call &c, Arena &arena) {
        const ptrdiff_t n = c.heads_and_strips();
        dots_size = n * R, grad_query_size = n * c.D * R;
        grad_key_size = c.grad_key.p ? whole_lines(c.H * c.S * padded(c.D)) : 0;
        grad_value_size = c.grad_value.p ? whole_lines(c.H * c.S * padded(c.E)) : 0;
        queries = arena.of_group(n * c.D * R);
        query_rows = arena.of_group(n * padded(c.D) * R);
        grads = arena.of_group(n * c.E * R);
        grad_rows = arena.of_group(n * padded(c.E) * R);
        most = arena.of_group(n * R);
        inverse = arena.of_group(n * R);
        maps = arena.of_group(c.tiles() * n * c.panel());
        grad_maps = arena.of_group(c.tiles() * n * c.panel());
        grad_key = arena.of_group(grad_key_size);
        grad_value = arena.of_group(grad_value_size);
        grad_mixed = arena.own(c.H * c.panel());
        mixed = arena.own(c.H * c.panel());
        grad_alpha = (double *)arena.own(c.grad_alpha ? 2 * c.H * c.H * W : 0);
        dots = arena.own(dots_size);
        grad_query = arena.own(grad_query_size);
        all_dots = dots - arena.me.index * dots_size;
        all_queries = grad_query - arena.me.index * grad_query_size;
    }
};

// A block's rows as the products need them; each member some heads.
void pack_block(const Call &c, const Block &block, const BackwardScratch &s, const Member &me) {
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
void backward_maps(const Call &c, const Block &block, ptrdiff_t tile, const BackwardScratch &s) {
    const ptrdiff_t all = c.heads_and_strips(), panel = c.panel(), first_key = tile * c.keys;
    const int keys = c.keys_of(tile);
    const bool scores = c.grad_query.p || c.grad_key.p;
    const Panels mixed = {s.mixed, panel}, grad_mixed = {s.grad_mixed, panel};
    for (int g = 0; g < block.strips(); g++) {
        const Panels maps = {s.maps + (tile * all + g) * panel, c.strips() * panel};
        const Panels grad_maps = {s.grad_maps + (tile * all + g) * panel, c.strips() * panel};
        for (ptrdiff_t h = 0; h < c.H; h++) {
            const ptrdiff_t at = h * c.strips() + g;
            form_scores(c, block, h, g, tile, s.queries + at * c.D * R, maps[h]);
            vec most[NR], inverse[NR];
            EACH (r, NR) {
                most[r] = load(s.most + at * R + r * W);
                inverse[r] = load(s.inverse + at * R + r * W);
            }
            for (int k = 0; k < keys; k++)
                EACH (r, NR) {
                    float *p = maps[h] + k * R + r * W;
                    const vec map = exponential(load(p) - most[r]) * inverse[r];
                    store(p, inverse[r] == 0.0f ? vec{} : map);  // rows without a key, or beyond the last
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
            multiply(c.value.at(block.b, h, first_key), keys, c.E, s.grads + (h * c.strips() + g) * c.E * R,
                     grad_mixed[h]);
        if (c.grad_alpha) add_dots(grad_mixed, maps, keys, s.grad_alpha, c.H);
        if (!scores) continue;
        mix<false>(c.alpha + block.b * c.H * c.H, c.H, grad_mixed, {}, keys, grad_maps);
        for (ptrdiff_t h = 0; h < c.H; h++) {
            float *to = s.dots + (h * c.strips() + g) * R;
            vec sum[NR];
            EACH (r, NR) sum[r] = load(to + r * W);
            for (int k = 0; k < keys; k++)
                EACH (r, NR) sum[r] += load(maps[h] + k * R + r * W) * load(grad_maps[h] + k * R + r * W);
            EACH (r, NR) store(to + r * W, sum[r]);
        }
    }
}

// From there: dscores = maps (dmaps - the row's dot), dQ = dscores K, dK = dscores^T Q.
void backward_scores(const Call &c, const Block &block, ptrdiff_t tile, const BackwardScratch &s) {
    const ptrdiff_t all = c.heads_and_strips(), panel = c.panel(), first_key = tile * c.keys;
    const int keys = c.keys_of(tile);
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (int g = 0; g < block.strips(); g++) {
            const ptrdiff_t at = h * c.strips() + g;
            const float *maps = s.maps + (tile * all + at) * panel;
            float *grads = s.grad_maps + (tile * all + at) * panel;
            vec dot[NR];
            EACH (r, NR) dot[r] = load(s.all_dots + at * R + r * W);  // of all keys by now
            for (int k = 0; k < keys; k++)
                EACH (r, NR) {
                    const ptrdiff_t i = k * R + r * W;
                    store(grads + i, load(maps + i) * (load(grads + i) - dot[r]));
                }
            if (c.grad_query.p)
                add_product(c.key.at(block.b, h, first_key), keys, c.D, grads, s.grad_query + at * c.D * R);
            if (c.grad_key.p)
                add_outer(grads, keys, s.query_rows + at * padded(c.D) * R, padded(c.D),
                          s.grad_key + (h * c.S + first_key) * padded(c.D));
        }
}

// x (n) += each of the `count` - 1 arrays after it, `stride` floats apart, in turn.
void add_up(float *x, ptrdiff_t n, ptrdiff_t count, ptrdiff_t stride) {
    for (ptrdiff_t i = 1; i < count; i++)
        for (ptrdiff_t at = 0; at < n; at++) x[at] += x[i * stride + at];
}

// Of the keys of a member, and all coefficients.
void clear_sums(const Call &c, const BackwardScratch &s, const Member &me) {
    if (c.grad_alpha) memset(s.grad_alpha, 0, sizeof(double) * c.H * c.H * W);
    for (ptrdiff_t h = 0; h < c.H; h++)
        for (ptrdiff_t tile = me.index; tile < c.tiles(); tile += me.size) {
            const ptrdiff_t k = h * c.S + tile * c.keys, keys = c.keys_of(tile);
            if (c.grad_key.p) memset(s.grad_key + k * padded(c.D), 0, sizeof(float) * keys * padded(c.D));
            if (c.grad_value.p) memset(s.grad_value + k * padded(c.E), 0, sizeof(float) * keys * padded(c.E));
        }
}

// to (S, width) = the sum of all groups' `sums` (S, padded width) of a head, which are `size` floats apart.
void write_sum(float *sums, ptrdiff_t groups, ptrdiff_t size, ptrdiff_t S, ptrdiff_t width, float *to,
               ptrdiff_t stride) {
    add_up(sums, S * padded(width), groups, size);
    for (ptrdiff_t k = 0; k < S; k++) memcpy(to + k * stride, sums + k * padded(width), sizeof(float) * width);
}

// The gradients of keys and values of a sample, each thread some heads; and the thread's sums of that of alpha.
void write_sums(const Call &c, ptrdiff_t b, const BackwardScratch &s, const Member &me) {
    for (ptrdiff_t h = me.thread; h < c.H; h += me.threads) {
        if (c.grad_key.p) {
            float *of_first = s.grad_key - me.group * s.grad_key_size + h * c.S * padded(c.D);
            write_sum(of_first, me.groups, s.grad_key_size, c.S, c.D, c.grad_key.at(b, h, 0), c.grad_key.t);
        }
        if (c.grad_value.p) {
            float *of_first = s.grad_value - me.group * s.grad_value_size + h * c.S * padded(c.E);
            write_sum(of_first, me.groups, s.grad_value_size, c.S, c.E, c.grad_value.at(b, h, 0), c.grad_value.t);
        }
    }
    if (!c.grad_alpha) return;
    double *to = c.grad_alpha + (me.thread * c.B + b) * c.H * c.H;
    for (ptrdiff_t i = 0; i < c.H * c.H; i++) {
        to[i] = 0.0;
        for (int w = 0; w < W; w++) to[i] += s.grad_alpha[i * W + w];
    }
}

// A member's part of a block: every `size`th tile of keys. So nobody adds to the sums of another, and all sums have an
// order.
void backward_block(const Call &c, const Block &block, const BackwardScratch &s, const Member &me) {
    pack_block(c, block, s, me);
    memset(s.dots, 0, sizeof(float) * s.dots_size);
    me.wait_for_group();
    for (ptrdiff_t tile = me.index; tile < block.tiles; tile += me.size) backward_maps(c, block, tile, s);
    me.wait_for_group();
    if (!c.grad_query.p && !c.grad_key.p) return;
    if (me.index == 0) add_up(s.all_dots, s.dots_size, me.size, s.dots_size);
    memset(s.grad_query, 0, sizeof(float) * s.grad_query_size);
    me.wait_for_group();
    for (ptrdiff_t tile = me.index; tile < block.tiles; tile += me.size) backward_scores(c, block, tile, s);
    me.wait_for_group();
    if (!c.grad_query.p) return;
    for (ptrdiff_t h = me.index; h < c.H; h += me.size)
        for (int g = 0; g < block.strips(); g++) {
            float *sum = s.all_queries + (h * c.strips() + g) * c.D * R;
            add_up(sum, c.D * R, me.size, s.grad_query_size);
            unpack(sum, block.rows(g), c.D, (float)c.scale, c.grad_query.at(block.b, h, block.row(g)), c.grad_query.t);
        }
}

void backward_thread(void *data) {
    const Call &c = *(const Call *)data;
    const Member me(c);
    Arena arena(c.scratch, Member(c, me.thread, c.threads));  // there may be fewer threads than there is room for
    const BackwardScratch s(c, arena);
    for (ptrdiff_t b = 0; b < c.B; b++) {
        clear_sums(c, s, me);
        for (ptrdiff_t i = me.group; i < c.blocks(); i += me.groups)
            backward_block(c, Block(c, b * c.blocks() + i), s, me);
        me.wait_for_all();
        write_sums(c, b, s, me);
        me.wait_for_all();
    }
}

void forward_thread(void *data) {
    Call &c = *(Call *)data;
    Arena arena(c.scratch, Member(c, Member(c).thread, c.threads));
    const ForwardScratch scratch(c, arena);
    for (;;) {
        const ptrdiff_t index = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
        if (index >= c.B * c.blocks()) return;
        forward_block(c, Block(c, index), scratch);
    }
}

void run(void (*work)(void *), Call *c) {
    if (c->threads > 1)
        GOMP_parallel(work, c, (unsigned)c->threads, 0);
    else
        work(c);
}

}  // namespace

// ---- what kernel.py calls ----

extern "C" {
ptrdiff_t source(void) { return SOURCE; }  // a checksum of this file, which setup.py gives
ptrdiff_t rows_of_strip(void) { return R; }
ptrdiff_t has_threads(void) { return GOMP_parallel && GOMP_barrier && omp_get_thread_num && omp_get_num_threads; }

// Floats of scratch that a call needs, whose other fields are set.
ptrdiff_t forward_scratch(const Call *c) {
    Arena arena(nullptr, Member(*c, 0, c->threads));
    ForwardScratch(*c, arena);
    return arena.used;
}
ptrdiff_t backward_scratch(const Call *c) {
    Arena arena(nullptr, Member(*c, 0, c->threads));
    BackwardScratch(*c, arena);
    return arena.used;
}

void forward(Call *c) { run(forward_thread, c); }
void backward(Call *c) { run(backward_thread, c); }
}
