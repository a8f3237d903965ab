// The CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize` builds and runs it.
//
//     kernel_sanitized SECONDS SEED
//
// Each case has random shapes, strides, mask and threads. Every array is an allocation of its own, of exactly the size
// that it must have, so that a byte read or written beyond it is reported. Output and gradients are compared with
// plain loops in double.

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <vector>

#define SOURCE 0
#include "kernel.h"

namespace {

std::mt19937 generator;

ptrdiff_t between(ptrdiff_t least, ptrdiff_t most) {
    return std::uniform_int_distribution<ptrdiff_t>(least, most)(generator);
}
bool one_in(ptrdiff_t n) { return between(1, n) == 1; }

// (B, H, rows, width), the last of stride 1, with gaps between the others, in any order; on the heap.
struct Tensor {
    ptrdiff_t B, H, rows, width;
    Array array;
    std::unique_ptr<float[]> data;

    Tensor(ptrdiff_t B, ptrdiff_t H, ptrdiff_t rows, ptrdiff_t width, bool contiguous = false)
        : B(B), H(H), rows(rows), width(width) {
        const ptrdiff_t gap = contiguous ? 0 : between(0, 3);
        array.t = width + gap;
        array.h = array.t * rows;
        if (!contiguous && one_in(2)) array.h = array.t, array.t *= H;  // as projections lay it out
        array.b = (width + gap) * rows * H;
        const ptrdiff_t size = (B - 1) * array.b + (H - 1) * array.h + (rows - 1) * array.t + width;
        data.reset(new float[size]);
        std::normal_distribution<float> normal;
        for (ptrdiff_t i = 0; i < size; i++) data[i] = normal(generator);
        array.p = data.get();
    }
    float &operator()(ptrdiff_t b, ptrdiff_t h, ptrdiff_t row, ptrdiff_t d) const { return array.at(b, h, row)[d]; }
};

// What the loops give, laid out as (B, H, rows, width) in double.
struct Exact {
    ptrdiff_t H, rows, width;
    std::vector<double> data;
    Exact(const Tensor &like)
        : H(like.H), rows(like.rows), width(like.width), data(like.B * like.H * like.rows * like.width) {}
    double &operator()(ptrdiff_t b, ptrdiff_t h, ptrdiff_t row, ptrdiff_t d) {
        return data[((b * H + h) * rows + row) * width + d];
    }
};

void compare(const char *what, const Call &c, double got, double expected, double scale) {
    if (std::abs(got - expected) <= 1e-3 * (1.0 + scale))
        return;  // of some hundred float32 terms, the largest `scale`
    fprintf(stderr, "%s: %g, expected %g (B %td H %td T %td S %td D %td E %td rows %td keys %td threads %td)\n", what,
            got, expected, c.B, c.H, c.T, c.S, c.D, c.E, c.rows, c.keys, c.threads);
    exit(1);
}

void compare(const char *what, const Call &c, const Tensor &got, Exact &expected) {
    double largest = 0.0;
    for (double x : expected.data) largest = std::max(largest, std::abs(x));
    for (ptrdiff_t b = 0; b < got.B; b++)
        for (ptrdiff_t h = 0; h < got.H; h++)
            for (ptrdiff_t r = 0; r < got.rows; r++)
                for (ptrdiff_t d = 0; d < got.width; d++)
                    compare(what, c, got(b, h, r, d), expected(b, h, r, d), largest);
}

void one_case() {
    const ptrdiff_t B = between(1, 3), H = between(1, one_in(4) ? 20 : 9), T = between(1, one_in(3) ? 90 : 20);
    const ptrdiff_t S = between(1, one_in(3) ? 300 : 40), D = between(1, one_in(3) ? 80 : 20), E = between(1, 40);
    const Tensor query(B, H, T, D), key(B, H, S, D, true), value(B, H, S, E, true), grad_out(B, H, T, E);
    const Tensor alpha(B, 1, H, H, true), transposed(B, 1, H, H, true);
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t i = 0; i < H; i++)
            for (ptrdiff_t j = 0; j < H; j++) {
                alpha(b, 0, i, j) = alpha(b, 0, i, j) * 0.3f + (i == j ? 1.0f : 0.0f);
                transposed(b, 0, j, i) = alpha(b, 0, i, j);
            }
    const Tensor out(B, H, T, E), grad_query(B, H, T, D), grad_key(B, H, S, D), grad_value(B, H, S, E);
    Call c{};
    c.B = B, c.H = H, c.T = T, c.S = S, c.D = D, c.E = E;
    c.query = query.array, c.key = key.array, c.value = value.array, c.out = out.array, c.grad_out = grad_out.array;
    c.alpha = alpha.data.get(), c.alpha_transposed = transposed.data.get();
    c.scale = 1.0 / std::sqrt((double)D);
    c.threads = has_threads() ? between(1, 4) : 1;
    c.rows = between(1, 3) * rows_of_strip();
    c.keys = between(1, S);

    // a mask: none, causal, boolean or added, each of its dimensions as large as the maps' or 1
    const ptrdiff_t kind = between(0, 3);
    c.is_causal = kind == 1;
    std::unique_ptr<float[]> added;
    std::unique_ptr<uint8_t[]> boolean;
    if (kind >= 2) {
        const ptrdiff_t b = one_in(2) ? B : 1, h = one_in(2) ? H : 1, t = one_in(2) ? T : 1, s = one_in(4) ? 1 : S;
        const ptrdiff_t size = b * h * t * s;
        c.mask.b = b > 1 ? h * t * s : 0, c.mask.h = h > 1 ? t * s : 0, c.mask.t = t > 1 ? s : 0;
        c.mask.s = s > 1 ? 1 : 0, c.mask.boolean = kind == 2;
        boolean.reset(kind == 2 ? new uint8_t[size] : nullptr);
        added.reset(kind == 3 ? new float[size] : nullptr);
        for (ptrdiff_t i = 0; i < size; i++) {
            const bool seen = !one_in(3);
            if (kind == 2) boolean[i] = seen;
            if (kind == 3) added[i] = seen ? (float)between(-2, 2) : -INFINITY;
        }
        c.mask.p = kind == 2 ? (const void *)boolean.get() : added.get();
    }
    auto masked_score = [&](ptrdiff_t b, ptrdiff_t h, ptrdiff_t t, ptrdiff_t s, double score) {
        if (kind == 1) return s > t ? -INFINITY : score;
        const ptrdiff_t at = b * c.mask.b + h * c.mask.h + t * c.mask.t + s * c.mask.s;
        return kind == 2 ? (boolean[at] ? score : -INFINITY) : kind == 3 ? score + added[at] : score;
    };

    Tensor statistics(2, 1, 1, B * H * T, true);
    c.statistics = statistics.data.get();
    auto run = [&](ptrdiff_t size, void (*pass)(Call *)) {
        std::unique_ptr<float[]> scratch(new float[size]);  // of any bytes: nothing may be read before it is written
        memset(scratch.get(), 0xff, size * sizeof(float));  // which are not numbers
        c.scratch = scratch.get(), c.next = 0;
        pass(&c);
    };
    c.by_rows = 1;
    run(forward_scratch(&c), forward);

    const bool with_query = !one_in(4), with_key = !one_in(4), with_value = !one_in(4), with_alpha = !one_in(4);
    if (with_query) c.grad_query = grad_query.array;
    if (with_key) c.grad_key = grad_key.array;
    if (with_value) c.grad_value = grad_value.array;
    std::vector<double> grad_alpha(c.threads * B * H * H,
                                   0.0);  // as torch.zeros: there may be fewer threads than asked
    if (with_alpha) c.grad_alpha = grad_alpha.data();
    c.by_rows = one_in(2);
    run(backward_scratch(&c), backward);

    Exact o(out), dq(query), dk(key), dv(value), dalpha(alpha);
    std::vector<double> maps(H * S), mixed(S), grad_mixed(H * S), grad_maps(H * S);
    for (ptrdiff_t b = 0; b < B; b++)
        for (ptrdiff_t t = 0; t < T; t++) {
            for (ptrdiff_t h = 0; h < H; h++) {
                double most = -INFINITY, total = 0.0;
                for (ptrdiff_t s = 0; s < S; s++) {
                    double score = 0.0;
                    for (ptrdiff_t d = 0; d < D; d++) score += (double)query(b, h, t, d) * key(b, h, s, d);
                    maps[h * S + s] = masked_score(b, h, t, s, score * c.scale);
                    most = std::max(most, maps[h * S + s]);
                }
                for (ptrdiff_t s = 0; s < S; s++) {
                    double &map = maps[h * S + s];
                    map = most == -INFINITY ? 0.0 : std::exp(map - most);
                    total += map;
                }
                for (ptrdiff_t s = 0; s < S && total > 0.0; s++) maps[h * S + s] /= total;
            }
            std::fill(grad_maps.begin(), grad_maps.end(), 0.0);
            for (ptrdiff_t i = 0; i < H; i++)
                for (ptrdiff_t s = 0; s < S; s++) {
                    double sum = 0.0, grad = 0.0;
                    for (ptrdiff_t j = 0; j < H; j++) sum += alpha(b, 0, i, j) * maps[j * S + s];
                    for (ptrdiff_t e = 0; e < E; e++) {
                        o(b, i, t, e) += sum * value(b, i, s, e);
                        dv(b, i, s, e) += sum * grad_out(b, i, t, e);
                        grad += (double)grad_out(b, i, t, e) * value(b, i, s, e);
                    }
                    for (ptrdiff_t j = 0; j < H; j++) {
                        dalpha(b, 0, i, j) += grad * maps[j * S + s];
                        grad_maps[j * S + s] += grad * alpha(b, 0, i, j);
                    }
                }
            for (ptrdiff_t h = 0; h < H; h++) {
                double dot = 0.0;
                for (ptrdiff_t s = 0; s < S; s++) dot += maps[h * S + s] * grad_maps[h * S + s];
                for (ptrdiff_t s = 0; s < S; s++) {
                    const double grad = maps[h * S + s] * (grad_maps[h * S + s] - dot) * c.scale;
                    for (ptrdiff_t d = 0; d < D; d++) {
                        dq(b, h, t, d) += grad * key(b, h, s, d);
                        dk(b, h, s, d) += grad * query(b, h, t, d);
                    }
                }
            }
        }
    compare("output", c, out, o);
    if (with_query) compare("gradient of queries", c, grad_query, dq);
    if (with_key) compare("gradient of keys", c, grad_key, dk);
    if (with_value) compare("gradient of values", c, grad_value, dv);
    double largest = 0.0;
    for (double x : dalpha.data) largest = std::max(largest, std::abs(x));
    for (ptrdiff_t i = 0; with_alpha && i < B * H * H; i++) {
        double sum = 0.0;
        for (ptrdiff_t thread = 0; thread < c.threads; thread++) sum += grad_alpha[thread * B * H * H + i];
        compare("gradient of alpha", c, sum, dalpha.data[i], largest);
    }
}

}  // namespace

int main(int count, char **arguments) {
    const double seconds = count > 1 ? atof(arguments[1]) : 20.0;
    const unsigned seed = count > 2 ? (unsigned)atoi(arguments[2]) : 0;
    const time_t end = time(nullptr) + (time_t)seconds;
    unsigned cases = 0;
    for (; cases < 20 || time(nullptr) < end; cases++) {
        generator.seed(seed + cases);
        one_case();
    }
    printf("%u cases of %td rows a strip, %s threads: as the plain loops, nothing reported\n", cases, rows_of_strip(),
           has_threads() ? "with" : "without");
}
