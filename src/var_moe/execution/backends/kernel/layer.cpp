// The experts of one layer on a CPU, without the dropped pairs. `build.py` compiles this for the
// machine that runs it.
//
// A layer is four steps over all threads: the executed pairs are sorted by expert; their rows are
// multiplied by the experts' first weights, with silu(gate) * up in the same pass; then by the
// second weights; and each token's pairs are added. What stands in for dropped pairs (a learned
// compensation) is one more such expert, for the tokens that drop any. Any number of rows takes the
// same code: nothing is compiled while a model runs.
#include "products.h"

namespace {

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
    auto runs = [&](int64_t expert) { return expert >= 0 && expert < of.experts; };
    for (int64_t s = 0; s < slots; ++s)
        if (runs(call.kept[s])) ++ends[call.kept[s]];
    int64_t start = 0;
    for (int64_t e = 0; e < of.experts; ++e) {
        const int64_t count = ends[e];
        ends[e] = start;
        start += count;
    }
    for (int64_t s = 0; s < slots; ++s) {
        const int64_t expert = call.kept[s];
        room.place[s] = runs(expert) ? int32_t(ends[expert]++) : -1;
        if (runs(expert)) room.token[room.place[s]] = int32_t(s / of.top_k);
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

// A matrix of elements of so many bytes by panels.
void pack_matrix(const Matrix *from, int32_t bytes, int32_t activation, int32_t neighbours, void *to,
                 int32_t threads) {
    if (bytes == 4)
        pack<uint32_t, 1>(*from, activation, (uint32_t *)to, threads);
    else if (neighbours == 1)
        pack<uint16_t, 1>(*from, activation, (uint16_t *)to, threads);
    else
        pack<uint16_t, 2>(*from, activation, (uint16_t *)to, threads);
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
