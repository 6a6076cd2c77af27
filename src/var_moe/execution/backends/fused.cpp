// The experts of one layer on a CPU: products, activation and weighted sum, without the dropped
// pairs. Compiled for the machine that runs it (`build.py`), so that the instruction set
// is known here: AMX, AVX-512 with bfloat16, AVX-512, or what the compiler makes of plain vectors.
//
// A layer is four steps over all threads: the executed pairs are sorted by expert; their rows are
// multiplied by the experts' first weights, with silu(gate) * up in the same pass; then by the
// second weights; and each token's pairs are added. What stands in for dropped pairs (a learned
// compensation) is one more such expert, for the tokens that drop any. Any number of rows takes the
// same code: nothing is compiled while a model runs.
//
// Weights are packed by panels of NB output columns: [expert][panel][K / S][NB][S], with S = 2
// neighbours of a column side by side in bfloat16, 1 in float32. A panel stays in the L2 cache
// while all rows of its expert pass. A gated panel holds NB / 2 columns of the gate, then the same
// of up.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, NV = 4, MR = 6;  // floats of a vector, vectors and rows of a tile
#else
constexpr int VL = 8, NV = 2, MR = 6;
#endif
constexpr int NB = VL * NV;
constexpr int64_t BLOCK_BYTES = 4096;  // of a column that are multiplied at once

typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vs __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
INLINE void put(float *to, float x) { *to = x; }
INLINE void put(bf16 *to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x00400000;
    *to = uint16_t(bits >> 16);
}

struct half { uint16_t bits; };

// A vector of weights as float32, whatever they are stored in.
INLINE vf load(const float *b) { return *(const vf *)b; }
INLINE vf load(const bf16 *b) {
    return (vf)(__builtin_convertvector(*(const vs *)b, vu) << 16);
}
INLINE vf load(const half *b) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)b));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)b));
#else
    return vf{};  // `serves` says that it is not there
#endif
}

// One step of a tile: M rows by NV vectors.
template <int M, class W>
INLINE void step(const float *const *a, int64_t k, const W *b, vf (*acc)[NV]) {
    vf right[NV];
    for (int j = 0; j < NV; ++j) right[j] = load(b + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
        const float left = a[i][k];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += left * right[j];
    }
}
// The same in bfloat16: two of K.
template <int M>
INLINE void step(const bf16 *const *a, int64_t k, const bf16 *b, vf (*acc)[NV]) {
#if defined(__AVX512BF16__)
    __m512bh right[NV];
    for (int j = 0; j < NV; ++j)
        right[j] = (__m512bh)_mm512_loadu_si512((const void *)(b + j * VL * 2));
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
        int32_t pair;
        std::memcpy(&pair, a[i] + k * 2, 4);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
            acc[i][j] = (vf)_mm512_dpbf16_ps((__m512)acc[i][j], left, right[j]);
    }
#else
    vf even[NV], odd[NV];
    for (int j = 0; j < NV; ++j) {
        const vu both = *(const vu *)(b + j * VL * 2);
        even[j] = (vf)(both << 16);
        odd[j] = (vf)(both & 0xffff0000u);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
        const float left = to_float(a[i][k * 2]), next = to_float(a[i][k * 2 + 1]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] += left * even[j] + next * odd[j];
    }
#endif
}

// (M, K) rows by a panel, added to (M, NB) sums.
template <class T, class W, int M>
void tile(const T *const *rows, int64_t start, int64_t steps, const W *b, float *sums, bool add) {
    constexpr int S = sizeof(float) / sizeof(T);
    vf acc[M][NV];
    const T *a[M];
    for (int i = 0; i < M; ++i) {
        a[i] = rows[i] + start * S;
        for (int j = 0; j < NV; ++j)
            acc[i][j] = add ? *(const vf *)(sums + i * NB + j * VL) : vf{};
    }
    for (int64_t k = 0; k < steps; ++k) step<M>(a, k, b + k * NB * S, acc);
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < NV; ++j) *(vf *)(sums + i * NB + j * VL) = acc[i][j];
}

template <class T, class W>
void any_tile(int rows, const T *const *a, int64_t start, int64_t steps, const W *b, float *sums,
              bool add) {
    switch (rows) {
    case 1: return tile<T, W, 1>(a, start, steps, b, sums, add);
    case 2: return tile<T, W, 2>(a, start, steps, b, sums, add);
    case 3: return tile<T, W, 3>(a, start, steps, b, sums, add);
    case 4: return tile<T, W, 4>(a, start, steps, b, sums, add);
    case 5: return tile<T, W, 5>(a, start, steps, b, sums, add);
    default: return tile<T, W, 6>(a, start, steps, b, sums, add);
    }
}

// Matrix tiles (AMX): 16 rows of 64 bytes. A test compiles them as plain loops (EMULATE_AMX).
#if defined(EMULATE_AMX)
#define AMX 1
struct Tile { char bytes[16][64]; };
thread_local Tile tiles[8];
inline void tile_zero(int t) { tiles[t] = Tile{}; }
inline void tile_load(int t, const void *from, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tiles[t].bytes[r], (const char *)from + r * stride, 64);
}
inline void tile_store(int t, void *to, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy((char *)to + r * stride, tiles[t].bytes[r], 64);
}
inline void tile_dot(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n)
            for (int k = 0; k < 32; ++k)
                ((float *)tiles[c].bytes[m])[n] +=
                    to_float(((const bf16 *)tiles[a].bytes[m])[k]) *
                    to_float(((const bf16 *)tiles[b].bytes[k / 2])[2 * n + k % 2]);
}
inline bool tiles_allowed() { return true; }
inline void tiles_begin() {}
inline void tiles_end() {}
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define AMX 1
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) _tile_loadd(t, from, stride)
#define tile_store(t, to, stride) _tile_stored(t, to, stride)
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)
inline bool tiles_allowed() {
    // The kernel keeps the tiles' state for a process that asks for it (ARCH_REQ_XCOMP_PERM).
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}
inline void tiles_begin() {
    alignas(64) unsigned char config[64] = {1};  // palette
    for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
    _tile_loadconfig(config);
}
inline void tiles_end() { _tile_release(); }
#endif

#if defined(AMX)
// (16 R, 2 steps) rows by a panel, added to (16 R, NB) sums. `steps` is a multiple of 16.
template <int R>
void tile_block(const bf16 *a, int64_t stride, int64_t steps, const bf16 *b, float *sums, bool add) {
    constexpr int64_t wide = NB * sizeof(float);
    const int64_t lower = 16 * stride / int64_t(sizeof(bf16));
    for (int c = 0; c < NB; c += 32) {
        float *upper = sums + c, *under = upper + 16 * NB;
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        if (add) {
            tile_load(0, upper, wide);
            tile_load(1, upper + 16, wide);
        }
        if (add && R == 2) {
            tile_load(2, under, wide);
            tile_load(3, under + 16, wide);
        }
        for (int64_t k = 0; k < steps; k += 16) {
            tile_load(6, b + (k * NB + c) * 2, wide);
            tile_load(7, b + (k * NB + c + 16) * 2, wide);
            tile_load(4, a + 2 * k, stride);
            tile_dot(0, 4, 6);
            tile_dot(1, 4, 7);
            if (R == 2) {
                tile_load(5, a + lower + 2 * k, stride);
                tile_dot(2, 5, 6);
                tile_dot(3, 5, 7);
            }
        }
        tile_store(0, upper, wide);
        tile_store(1, upper + 16, wide);
        if (R == 2) {
            tile_store(2, under, wide);
            tile_store(3, under + 16, wide);
        }
    }
}
#endif

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

// Whether rows must lie side by side: tiles are loaded by a stride.
template <class T> bool side_by_side() {
#if defined(AMX)
    return std::is_same<T, bf16>::value && NB % 32 == 0 && tiles_allowed();
#else
    return false;
#endif
}
constexpr int64_t SLACK = 32;  // rows that tiles read and write behind the last one

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

// What is the same in every forward.
struct Layer {
    int32_t wide;  // bytes of an element of its input: 4 (float32) or 2 (bfloat16)
    int32_t by_pair;  // vectors are of a first and a dropped expert, else of the dropped one
    int64_t experts, top_k;
    Product first, second;
    const void *vectors;  // (rows, D) what stands in for a dropped expert, or null
    Product down, up;  // and a map of the input that all share; weights are null without one
};

// One forward's (T, D) input and output, and (T, K) decisions.
struct Call {
    const void *hidden;
    const int64_t *index;  // of the router
    const int64_t *kept;  // the same, -1 where a pair is dropped
    const float *weight;
    void *out;
    char *scratch;
    int64_t tokens;
    int32_t threads;
};

// Where things lie in scratch memory.
struct Room {
    int32_t *place;  // (T, K) each slot's row, -1 where it is dropped
    int32_t *token;  // (P,) each row's token
    int64_t *ends;  // (E,) the row after each expert's last
    int32_t *cut;  // (T,) each token's row among those that drop something, or -1
    int32_t *cut_token;  // (C,) their tokens
    int32_t *vector;  // (T, K) the vector of each dropped slot
    char *line, *inner, *pairs, *cut_inner, *cut_out;
    int64_t bytes;

    Room(const Layer &of, int64_t tokens, char *base) {
        const int64_t slots = tokens * of.top_k, hidden = of.second.width;
        char *at = base;
        auto take = [&](int64_t count, int64_t size) {
            char *from = at;
            at += (count * size + 63) / 64 * 64;
            return from;
        };
        place = (int32_t *)take(slots, 4);
        token = (int32_t *)take(slots, 4);
        ends = (int64_t *)take(of.experts, 8);
        cut = (int32_t *)take(tokens, 4);
        cut_token = (int32_t *)take(tokens, 4);
        vector = (int32_t *)take(slots, 4);
        const bool gathers = of.wide == 2 && side_by_side<bf16>();
        line = take((slots + SLACK) * of.first.depth, gathers ? of.wide : 0);
        inner = take((slots + SLACK) * std::max(of.first.width, of.second.depth), of.wide);
        pairs = take(slots * hidden, of.wide);
        const int64_t rank = of.vectors && of.down.weights ? of.down.width : 0;
        cut_inner = take((tokens + SLACK) * rank, of.wide);
        cut_out = take(rank ? tokens * hidden : 0, of.wide);
        bytes = at - base;
    }
};

void sort_pairs(const Layer &of, const Call &call, const Room &room) {
    int64_t *ends = room.ends;
    std::fill(ends, ends + of.experts, 0);
    const int64_t slots = call.tokens * of.top_k;
    for (int64_t s = 0; s < slots; ++s)
        if (call.kept[s] >= 0) ++ends[call.kept[s]];
    int64_t start = 0;
    for (int64_t e = 0; e < of.experts; ++e) {
        const int64_t count = ends[e];
        ends[e] = start;
        start += count;
    }
    for (int64_t s = 0; s < slots; ++s) {
        const int64_t expert = call.kept[s];
        room.place[s] = expert < 0 ? -1 : int32_t(ends[expert]++);
        if (expert >= 0) room.token[room.place[s]] = int32_t(s / of.top_k);
    }
}

// Which tokens drop something, and the vectors for it; how many tokens.
int64_t find_cuts(const Layer &of, const Call &call, const Room &room) {
    int64_t cuts = 0;
    for (int64_t t = 0; t < call.tokens; ++t) {
        const int64_t *index = call.index + t * of.top_k, *kept = call.kept + t * of.top_k;
        const float *weight = call.weight + t * of.top_k;
        int64_t first = 0;
        bool any = false;
        for (int64_t k = 0; k < of.top_k; ++k) {
            any |= kept[k] < 0;
            const bool ahead = weight[k] > weight[first] ||
                               (weight[k] == weight[first] && index[k] < index[first]);
            first = ahead ? k : first;
        }
        // Of two, the other one is the first, or the one that runs.
        if (of.top_k == 2) first = kept[0] < 0 ? 1 : 0;
        for (int64_t k = 0; k < of.top_k; ++k) {
            const int64_t lost = of.top_k == 2 ? 1 - first : k;
            const int64_t above = of.by_pair ? index[first] * of.experts : 0;
            room.vector[t * of.top_k + k] = int32_t(above + index[lost]);
        }
        room.cut[t] = any ? int32_t(cuts) : -1;
        if (any) room.cut_token[cuts++] = int32_t(t);
    }
    return cuts;
}

template <class T> void combine(const Layer &of, const Call &call, const Room &room) {
    const int64_t width = of.second.width;
    const T *pairs = (const T *)room.pairs, *vectors = (const T *)of.vectors;
    const T *shared = of.vectors && of.down.weights ? (const T *)room.cut_out : nullptr;
#pragma omp parallel num_threads(call.threads)
    {
        static thread_local std::vector<float> line;
        if (int64_t(line.size()) < width) line.resize(width);
        float *sum = line.data();
        auto add = [&](const T *row, float scale) {
            for (int64_t d = 0; d < width; ++d) sum[d] += scale * to_float(row[d]);
        };
#pragma omp for schedule(static)
        for (int64_t t = 0; t < call.tokens; ++t) {
            std::fill(sum, sum + width, 0.0f);
            float lost = 0;
            for (int64_t s = t * of.top_k; s < (t + 1) * of.top_k; ++s) {
                if (room.place[s] >= 0) {
                    add(pairs + int64_t(room.place[s]) * width, call.weight[s]);
                } else if (vectors) {
                    add(vectors + int64_t(room.vector[s]) * width, call.weight[s]);
                    lost += call.weight[s];
                }
            }
            if (shared && room.cut[t] >= 0) add(shared + int64_t(room.cut[t]) * width, lost);
            T *out = (T *)call.out + t * width;
            for (int64_t d = 0; d < width; ++d) put(out + d, sum[d]);
        }
    }
}

template <class T> void first_step(const Layer &of, const Call &call, const Room &room) {
    sort_pairs(of, call, room);
    multiply<T>(call.hidden, room.token, room.line, room.ends, of.experts, of.first, room.inner,
                call.threads);
}

template <class T> void second_step(const Layer &of, const Call &call, const Room &room) {
    multiply<T>(room.inner, nullptr, nullptr, room.ends, of.experts, of.second, room.pairs,
                call.threads);
}

template <class T> void last_step(const Layer &of, const Call &call, const Room &room) {
    if (of.vectors) {
        const int64_t cuts = find_cuts(of, call, room);
        if (cuts && of.down.weights) {
            // Rows are gathered into what the experts' own inputs have left.
            multiply<T>(call.hidden, room.cut_token, room.line, &cuts, 1, of.down, room.cut_inner,
                        call.threads);
            multiply<T>(room.cut_inner, nullptr, nullptr, &cuts, 1, of.up, room.cut_out,
                        call.threads);
        }
    }
    combine<T>(of, call, room);
}

}  // namespace

extern "C" {

// How this was compiled: instruction set and panel width.
const char *instructions() {
#if defined(AMX)
    if (tiles_allowed()) return "AMX";
#endif
#if defined(__AVX512BF16__)
    return "AVX-512 with bfloat16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "plain vectors";
#endif
}
int64_t panel_columns() { return NB; }
// Whether few rows and many of elements of so many bytes are summed in different ways.
int32_t sums_in_two_ways(int32_t wide) { return wide == 2 && side_by_side<bf16>(); }
// Whether weights can be stored in float32, bfloat16 or float16 (0, 1, 2) here.
int32_t serves(int32_t stored) {
#if defined(__AVX512F__) || defined(__F16C__)
    return stored >= 0 && stored <= 2;
#else
    return stored == 0 || stored == 1;
#endif
}

int64_t scratch_bytes(const Layer *of, int64_t tokens) { return Room(*of, tokens, nullptr).bytes; }

// A layer's output.
void run_layer(const Layer *of, const Call *call) {
    const Room room(*of, call->tokens, call->scratch);
    if (of->wide == 2) {
        first_step<bf16>(*of, *call, room);
        second_step<bf16>(*of, *call, room);
        last_step<bf16>(*of, *call, room);
    } else {
        first_step<float>(*of, *call, room);
        second_step<float>(*of, *call, room);
        last_step<float>(*of, *call, room);
    }
}

// The same in three steps, where something is done to the rows between them. After each, `rows`
// says where in scratch memory they lie, and how many there are.
void run_step(const Layer *of, const Call *call, int32_t step, int64_t *rows) {
    const Room room(*of, call->tokens, call->scratch);
    const bool narrow = of->wide == 2;
    if (step == 0)
        narrow ? first_step<bf16>(*of, *call, room) : first_step<float>(*of, *call, room);
    else if (step == 1)
        narrow ? second_step<bf16>(*of, *call, room) : second_step<float>(*of, *call, room);
    else
        narrow ? last_step<bf16>(*of, *call, room) : last_step<float>(*of, *call, room);
    rows[0] = (step == 0 ? room.inner : room.pairs) - call->scratch;
    rows[1] = of->experts ? room.ends[of->experts - 1] : 0;
}
}
