// Rows by their experts' weights, over all threads, with the activation in the same pass.
//
// A panel of weights stays in the L2 cache while all rows of its expert pass. A gated panel holds
// NB / 2 columns of the gate, then the same of up.
#pragma once
#include <algorithm>
#include <vector>
#include <omp.h>

#include "tiles.h"

namespace {

// exp by 2^n times a polynomial: two units in the last place of float32 at most.
INLINE float exp_of(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return (p * r * r + r + 1.0f) * scale;
}

enum Activation { NONE = 0, GATED_SILU = 1, CLAMPED = 2, SILU = 3 };  // CLAMPED: GPT-OSS

// A product's weights by panels, and what becomes of its output.
struct Product {
    const void *weights;
    const float *bias;  // by panels, or null
    int64_t depth, width;  // columns of its input, of its output
    int32_t stored;  // float32, bfloat16 or float16: 0, 1, 2
    int32_t activation;
    float limit, alpha;  // of CLAMPED

    bool gated() const { return activation == GATED_SILU || activation == CLAMPED; }
};

INLINE float silu(float x) { return x / (1.0f + exp_of(-x)); }

INLINE float activated(const Product &by, float x, float up) {
    switch (by.activation) {
    case GATED_SILU: return silu(x) * up;
    case CLAMPED:
        x = std::min(x, by.limit);
        up = std::min(std::max(up, -by.limit), by.limit) + 1.0f;
        return up * x / (1.0f + exp_of(-by.alpha * x));
    case SILU: return silu(x);
    default: return x;
    }
}

// Where a matrix lies: (experts, rows, columns), with steps between neighbours in elements.
struct Matrix {
    const void *values;
    int64_t experts, rows, columns, expert_step, row_step, column_step;
};

// Its rows as the columns of panels, S neighbours of a column side by side.
template <class V, int S>
void pack(const Matrix &from, int activation, V *to, int threads) {
    const bool halves = activation == GATED_SILU || activation == CLAMPED;
    const int columns = halves ? NB / 2 : NB;
    const int64_t width = from.rows / (halves ? 2 : 1), panels = (width + columns - 1) / columns;
    const int64_t steps = from.columns / S;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t e = 0; e < from.experts; ++e)
        for (int64_t p = 0; p < panels; ++p) {
            const V *values = (const V *)from.values + e * from.expert_step;
            V *panel = to + (e * panels + p) * steps * NB * S;
            const V *row[NB];
            for (int c = 0; c < NB; ++c) {
                const int64_t at = p * columns + c % columns;
                const int64_t number = activation == CLAMPED ? 2 * at + c / columns  // in turn
                                                             : at + c / columns * width;
                row[c] = at < width ? values + number * from.row_step : nullptr;
            }
            // Square by square, as one of the two is read or written across its lines.
            for (int64_t k = 0; k < steps; k += 16)
                for (int c = 0; c < NB; ++c)
                    for (int64_t i = k; i < std::min(k + 16, steps); ++i)
                        for (int s = 0; s < S; ++s)
                            panel[(i * NB + c) * S + s] =
                                row[c] ? row[c][(i * S + s) * from.column_step] : V(0);
        }
}

template <class T>
void finish(const float *sums, const float *bias, const Product &by, int width, T *out) {
    float line[NB];
    for (int c = 0; c < NB; ++c) line[c] = bias ? sums[c] + bias[c] : sums[c];
    if (by.activation == NONE)
        for (int c = 0; c < width; ++c) put(out + c, line[c]);
    else if (by.activation == GATED_SILU)  // a loop of its own, for the compiler
        for (int c = 0; c < width; ++c) put(out + c, silu(line[c]) * line[c + NB / 2]);
    else
        for (int c = 0; c < width; ++c)
            put(out + c, activated(by, line[c], by.gated() ? line[c + NB / 2] : 0.0f));
}

// (rows of an expert) x (its weights) for all experts. With a `line` for each row, rows are
// gathered into it first.
template <class T, class W>
void products(const T *rows, const int32_t *from, T *line, const int64_t *ends, int64_t experts,
              const Product &by, T *out, int threads) {
    constexpr int S = sizeof(float) / sizeof(T);
    const W *weights = (const W *)by.weights;
    const int64_t depth = by.depth, width = by.width;
    const int columns = by.gated() ? NB / 2 : NB;  // of the output that a panel makes
    const int64_t panels = (width + columns - 1) / columns;
    const int64_t steps = depth / S, block = BLOCK_BYTES / 4;
    const int64_t panel_size = steps * NB * S;
    struct Job { int64_t expert, start, rows, panel, panels; };
    static thread_local std::vector<Job> jobs;
    jobs.clear();
    int64_t active = 0;
    for (int64_t e = 0, start = 0; e < experts; start = ends[e++]) active += ends[e] > start;
    const int64_t most = std::min<int64_t>(std::max<int64_t>(active * panels / (threads * 8), 1), 8);
    for (int64_t e = 0, start = 0; e < experts; start = ends[e++])
        for (int64_t p = 0; ends[e] > start && p < panels; p += most)
            jobs.push_back({e, start, ends[e] - start, p, std::min(most, panels - p)});
    const Job *all = jobs.data();
    const int64_t count = int64_t(jobs.size()), total = experts ? ends[experts - 1] : 0;
    const bool tiled = side_by_side<T>() && (line || !from);
    const bool gather = tiled && from;
    const T *base = gather ? line : rows;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> sums;
        static thread_local std::vector<const T *> a;
        static thread_local std::vector<float> wide;  // weights of a block as float32
#if defined(AMX)
        if (tiled) tiles_begin();
#endif
        if (gather) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < total; ++r)
                std::memcpy(line + r * depth, rows + from[r] * depth, depth * sizeof(T));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < count; ++number) {
            const Job &job = all[number];
            const int64_t n = job.rows;
            if (int64_t(a.size()) < n) a.resize(n);
            if (int64_t(sums.size()) < (n + SLACK) * NB) sums.resize((n + SLACK) * NB);
            for (int64_t r = 0; r < n; ++r)
                a[r] = from && !gather ? rows + int64_t(from[job.start + r]) * depth
                                       : base + (job.start + r) * depth;
            for (int64_t p = job.panel; p < job.panel + job.panels; ++p) {
                const W *panel = weights + (job.expert * panels + p) * panel_size;
                for (int64_t k = 0; k < steps; k += block) {
                    const int64_t length = std::min(block, steps - k);
                    const W *b = panel + k * NB * S;
                    // What comes next is fetched while the rows pass.
                    const char *next = (const char *)(b + length * NB * S);
                    const int64_t tiles = (n + MR - 1) / MR;
                    const int64_t lines = tiles < 4 ? 0 : length * NB * S * sizeof(W) / 64 / tiles;
                    const bool widen = !std::is_same<T, W>::value && tiles > 3;
                    if (widen) {
                        if (int64_t(wide.size()) < length * NB) wide.resize(length * NB);
                        for (int64_t i = 0; i < length * NB; i += VL)
                            *(vf *)(wide.data() + i) = load(b + i);
                    }
                    int64_t r = 0;
#if defined(AMX)
                    if constexpr (std::is_same<T, bf16>::value) {
                        const int64_t whole = length / 16 * 16;
                        for (int64_t left = n; tiled && whole && left > MR; left = n - r) {
                            const int64_t some = std::min<int64_t>(left, 32);
                            float *to = sums.data() + r * NB;
                            auto block = some > 16 ? tile_block<2> : tile_block<1>;
                            block(a[r] + k * S, depth * sizeof(T), whole, b, to, k > 0);
                            if (whole < length)
                                for (int64_t i = 0; i < some; i += MR)
                                    any_tile<T, W>(int(std::min<int64_t>(MR, some - i)),
                                                   a.data() + r + i, k + whole, length - whole,
                                                   b + whole * NB * S, to + i * NB, true);
                            for (int64_t l = 0; l < lines * 6; ++l, next += 64)
                                __builtin_prefetch(next, 0, 2);
                            r += some;
                        }
                    }
#endif
                    for (; r < n; r += MR) {
                        for (int64_t l = 0; l < lines; ++l, next += 64)
                            __builtin_prefetch(next, 0, 2);
                        const int m = int(std::min<int64_t>(MR, n - r));
                        float *to = sums.data() + r * NB;
                        if constexpr (!std::is_same<T, W>::value)
                            if (widen) {
                                any_tile<T, float>(m, a.data() + r, k, length, wide.data(), to, k > 0);
                                continue;
                            }
                        any_tile<T, W>(m, a.data() + r, k, length, b, to, k > 0);
                    }
                }
                const float *own = by.bias ? by.bias + (job.expert * panels + p) * NB : nullptr;
                const int some = int(std::min<int64_t>(columns, width - p * columns));
                for (int64_t r = 0; r < n; ++r)
                    finish(sums.data() + r * NB, own, by, some,
                           out + (job.start + r) * width + p * columns);
            }
        }
#if defined(AMX)
        if (tiled) tiles_end();
#endif
    }
}

// The same by whatever the weights are stored in.
template <class T>
void multiply(const void *rows, const int32_t *from, void *line, const int64_t *ends,
              int64_t experts, const Product &by, void *out, int threads) {
    const T *in = (const T *)rows;
    T *to = (T *)out, *own = (T *)line;
    if constexpr (std::is_same<T, float>::value) {
        if (by.stored == 2)
            return products<T, half>(in, from, own, ends, experts, by, to, threads);
        if (by.stored == 0)
            return products<T, float>(in, from, own, ends, experts, by, to, threads);
    }
    products<T, bf16>(in, from, own, ends, experts, by, to, threads);
}

}  // namespace
