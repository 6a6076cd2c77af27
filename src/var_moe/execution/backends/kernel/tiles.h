// Products of a few rows by a panel of weights, for the instructions that this processor has:
// AMX, AVX-512 with bfloat16, AVX-512, or what the compiler makes of plain vectors.
//
// Weights are packed by panels of NB output columns: [expert][panel][K / S][NB][S], with S = 2
// neighbours of a column side by side in bfloat16, 1 in float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
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
    asm volatile("" ::: "memory");  // the compiler does not know what tiles read
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

// Whether rows must lie side by side: matrix tiles are loaded by a stride.
template <class T> bool side_by_side() {
#if defined(AMX)
    return std::is_same<T, bf16>::value && NB % 32 == 0 && tiles_allowed();
#else
    return false;
#endif
}
constexpr int64_t SLACK = 32;  // rows that tiles read and write behind the last one

}  // namespace
