// Attention of some queries over one piece of the cache: arithmetic only.
//
// Two ways to compute the same bits. Few queries read the cache's numbers as they lie, a key at a time, and add up
// lanes in the end. Many queries, sixteen at a time, lie side by side, one channel after the other: nothing has to be
// added across lanes, and the piece's numbers are turned into floats once for all of them. Either way a product of
// query and key is eight sums over channels j, j + 8, ..., which are then added in pairs.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/cache.h"

namespace layerskip {

constexpr int kSlots = 32;  // slots of a piece
constexpr int kFew = 4;     // queries that read the cache as it is, at most

// Slots that a token attends to: [start, stop).
struct Span {
    int64_t start, stop;
};

// What attention over a part of the slots gives: the mixture of values [D_head] with weights e^(score - most), then
// `most`, the largest score, and the sum of the weights. A result takes D_head + kLanes floats.
inline float& most_of(float* result, int64_t head_dim) { return result[head_dim]; }
inline float& total_of(float* result, int64_t head_dim) { return result[head_dim + 1]; }

// Keys and values of one head in slots slot..slot + count - 1.
template <typename Number>
struct Piece {
    const Number *keys, *values;
    const Number* next_keys;                  // those of the piece that is read next, if it's time to fetch it
    const float *key_scales, *value_scales;   // of each slot, or null
    int64_t stride, scale_stride;             // from one slot to the next
    int64_t slot;
    int count;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What has been stored is read again, and not computed with as it was: a product that is rounded when it is stored must
// not become part of a fused operation.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// Factors on products of queries with the keys of each slot.
template <typename Number>
void read_factors(const Piece<Number>& piece, float scale, float* factors) {
    for (int t = 0; t < kSlots; ++t)
        factors[t] = piece.key_scales == nullptr || t >= piece.count
                         ? scale
                         : scale * piece.key_scales[t * piece.scale_stride];
}

// Slots are too far apart for the processor to foresee the next one.
template <typename Number>
__attribute__((always_inline)) inline void fetch(const Number* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(Number);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

// Scores of `Queries` queries with a piece's keys: scores[q][t], for the keys beyond the last one some numbers.
template <int Queries, typename Number>
void score(const float* const* queries, const Piece<Number>& piece, int64_t head_dim, float (*scores)[kSlots]) {
    constexpr int kKeys = Queries == 1 ? 8 : Queries == 2 ? 4 : 2;
    for (int t = 0; t < piece.count; t += kKeys) {
        const Number* key[kKeys];
        for (int k = 0; k < kKeys; ++k) {
            key[k] = piece.keys + std::min(t + k, piece.count - 1) * piece.stride;
            if (piece.next_keys == nullptr) continue;
            fetch(piece.values + (t + k) * piece.stride, head_dim);
            fetch(piece.next_keys + (t + k) * piece.stride, head_dim);
        }
        Vector products[kLanes] = {};
        for (int64_t i = 0; i < head_dim; i += kLanes) {
            for (int q = 0; q < Queries; ++q) {
                const Vector query = load(queries[q] + i);
                for (int k = 0; k < kKeys; ++k) products[q * kKeys + k] += query * load(key[k] + i);
            }
        }
        const Vector results = sums(products);
        for (int q = 0; q < Queries; ++q)
            for (int k = 0; k < kKeys; ++k) scores[q][t + k] = results[q * kKeys + k];
    }
}

// Vectors of channels that `mix` computes at once for a number of queries.
#if defined(__AVX512F__)
constexpr int most_channels(int) { return 4; }
#else
constexpr int most_channels(int queries) { return queries == 1 ? 4 : queries == 2 ? 2 : 1; }
#endif

// results[q] = sum over t of weight (q, t) * values[t], from channel i on; weights lie `PerQuery` and `PerSlot` apart.
template <int Queries, int PerQuery, int PerSlot, typename Number, int Wides = most_channels(Queries)>
void mix(const float* weights, const Number* values, int64_t stride, int64_t head_dim, int count,
         float* const* results, int64_t i = 0) {
    for (; i + Wides * kWideLanes <= head_dim; i += Wides * kWideLanes) {
        Wide sums[Queries][Wides] = {};
        for (int t = 0; t < count; ++t) {
            Wide value[Wides];
            for (int v = 0; v < Wides; ++v) value[v] = load_wide(values + t * stride + i + v * kWideLanes);
            for (int q = 0; q < Queries; ++q) {
                const Wide weight = broadcast_wide(weights[q * PerQuery + t * PerSlot]);
                for (int v = 0; v < Wides; ++v) add_product(sums[q][v], value[v], weight);
            }
        }
        for (int q = 0; q < Queries; ++q)
            for (int v = 0; v < Wides; ++v) store(results[q] + i + v * kWideLanes, sums[q][v]);
    }
    if constexpr (Wides > 1)
        return mix<Queries, PerQuery, PerSlot, Number, Wides / 2>(weights, values, stride, head_dim, count, results, i);
    for (int q = 0; i < head_dim && q < Queries; ++q) {  // eight channels are left over
        Vector sum{};
        for (int t = 0; t < count; ++t) sum += load(values + t * stride + i) * weights[q * PerQuery + t * PerSlot];
        store(results[q] + i, sum);
    }
}

// Results of `Queries` queries, which are 4 or fewer.
template <int Queries, typename Number>
void attend_few(const float* const* queries, const Span* spans, const Piece<Number>& piece, int64_t head_dim,
                float scale, float* const* results) {
    alignas(64) float scores[Queries][kSlots], factors[kSlots];
    read_factors(piece, scale, factors);
    score<Queries>(queries, piece, head_dim, scores);
    for (int q = 0; q < Queries; ++q) {
        const int low = static_cast<int>(std::max<int64_t>(0, spans[q].start - piece.slot));
        const int high = static_cast<int>(std::min<int64_t>(piece.count, spans[q].stop - piece.slot));
        for (int t = 0; t < kSlots; t += kLanes) store(scores[q] + t, load(scores[q] + t) * load(factors + t));
        for (int t = 0; t < std::min(low, kSlots); ++t) scores[q][t] = -kInfinity;
        for (int t = std::max(0, high); t < kSlots; ++t) scores[q][t] = -kInfinity;
        settle();
        Vector largest = load(scores[q]);
        for (int t = kLanes; t < kSlots; t += kLanes) largest = maximum(largest, load(scores[q] + t));
        float most = largest[0];
        for (int j = 1; j < kLanes; ++j) most = std::max(most, largest[j]);
        Vector totals{};
        for (int t = 0; t < kSlots; t += kLanes) {
            const Vector score = load(scores[q] + t);
            const Vector weights = exponential(score - (most == -kInfinity ? 0.0f : most));
            const Vector seen = score == -kInfinity ? Vector{} : weights;
            store(scores[q] + t, seen);
            totals += seen;
        }
        most_of(results[q], head_dim) = most;
        total_of(results[q], head_dim) = sum(totals);
        if (piece.value_scales == nullptr) continue;
        settle();
        for (int t = 0; t < piece.count; ++t) scores[q][t] *= piece.value_scales[t * piece.scale_stride];
        settle();
    }
    mix<Queries, kSlots, 1>(scores[0], piece.values, piece.stride, head_dim, piece.count, results);
}

template <typename Number>
void attend_some(const float* const* queries, const Span* spans, int size, const Piece<Number>& piece,
                 int64_t head_dim, float scale, float* const* results) {
    switch (size) {
        case 1: return attend_few<1>(queries, spans, piece, head_dim, scale, results);
        case 2: return attend_few<2>(queries, spans, piece, head_dim, scale, results);
        case 3: return attend_few<3>(queries, spans, piece, head_dim, scale, results);
        default: return attend_few<4>(queries, spans, piece, head_dim, scale, results);
    }
}

// One number for each of sixteen queries and four keys. They have names, since compilers keep arrays in memory.
struct Scores {
    Wide a{}, b{}, c{}, d{};
};

inline Scores operator+(Scores x, const Scores& y) {
    x.a += y.a, x.b += y.b, x.c += y.c, x.d += y.d;
    return x;
}

// Sixteen queries side by side, times four keys.
struct Products {
    const float* turned;
    const float* keys[4];
    int64_t head_dim;

    // The sum over channels j, j + 8, ...
    Scores sum(int j) const {
        Scores sums;
        const float *a = keys[0], *b = keys[1], *c = keys[2], *d = keys[3];
        for (int64_t i = j; i < head_dim; i += kLanes) {
            const Wide query = load_wide(turned + i * kWideLanes);
            add_product(sums.a, query, broadcast_wide(a[i]));
            add_product(sums.b, query, broadcast_wide(b[i]));
            add_product(sums.c, query, broadcast_wide(c[i]));
            add_product(sums.d, query, broadcast_wide(d[i]));
        }
        return sums;
    }

    Scores pair(int j) const {
        const Scores even = sum(j);
        return even + sum(j + 1);
    }

    Scores all() const {
        const Scores first = pair(0), low = first + pair(2), third = pair(4), high = third + pair(6);
        return low + high;
    }
};

// scores[t] [16] of four keys from slot t on.
inline void score_many(const float* turned, const Piece<float>& piece, int64_t head_dim, const float* factors, int t,
                       float (*scores)[kWideLanes]) {
    const auto key = [&](int k) { return piece.keys + std::min(t + k, piece.count - 1) * piece.stride; };
    const Scores sums = Products{turned, {key(0), key(1), key(2), key(3)}, head_dim}.all();
    store(scores[t], sums.a * broadcast_wide(factors[t]));
    store(scores[t + 1], sums.b * broadcast_wide(factors[t + 1]));
    store(scores[t + 2], sums.c * broadcast_wide(factors[t + 2]));
    store(scores[t + 3], sums.d * broadcast_wide(factors[t + 3]));
}

// Sixteen queries side by side: turned [D_head, 16], and the slots that they attend to, from a piece's first one on.
struct Turned {
    const float* queries;
    int32_t from[kWideLanes], to[kWideLanes];
};

// Weights [t][16] in place of scores, and each query's maximum and sum.
inline void weigh_many(const Turned& turned, int count, float (*scores)[kWideLanes], float* most, float* total) {
    const Wide nothing = broadcast_wide(-kInfinity);
    Wide largest = nothing;
    for (int t = 0; t < count; ++t) {
        const Wide seen = between(turned.from, turned.to, t, load_wide(scores[t]), nothing);
        store(scores[t], seen);
        largest = maximum(largest, seen);
    }
    store(most, largest);
    alignas(64) float base[kWideLanes];
    for (int q = 0; q < kWideLanes; ++q) base[q] = most[q] == -kInfinity ? 0.0f : most[q];
    settle();
    Wide totals[kLanes] = {};
    for (int t = 0; t < count; ++t) {
        const Wide weights = exponential(load_wide(scores[t]) - load_wide(base));
        const Wide seen = unless_infinite(load_wide(scores[t]), weights);
        store(scores[t], seen);
        totals[t % kLanes] += seen;
    }
    for (int j = 0; j < 4; ++j) totals[j] += totals[j + 4];
    totals[0] += totals[1], totals[2] += totals[3];
    totals[0] += totals[2];
    store(total, totals[0]);
}

// Results of `size` queries, at most 16, over a piece in floats.
inline void attend_many(const Turned& turned, int size, const Piece<float>& piece, int64_t head_dim, float scale,
                        float* const* results) {
    alignas(64) float scores[kSlots][kWideLanes], factors[kSlots], most[kWideLanes], total[kWideLanes];
    read_factors(piece, scale, factors);
    for (int t = 0; t < piece.count; t += 4) score_many(turned.queries, piece, head_dim, factors, t, scores);
    settle();
    weigh_many(turned, piece.count, scores, most, total);
    for (int q = 0; q < size; ++q) {
        most_of(results[q], head_dim) = most[q];
        total_of(results[q], head_dim) = total[q];
    }
    if (piece.value_scales != nullptr) {
        settle();
        for (int t = 0; t < piece.count; ++t)
            store(scores[t], load_wide(scores[t]) * broadcast_wide(piece.value_scales[t * piece.scale_stride]));
    }
    settle();
    int q = 0;
    for (; q + kFew <= size; q += kFew)
        mix<kFew, 1, kWideLanes>(scores[0] + q, piece.values, piece.stride, head_dim, piece.count, results + q);
    for (; q < size; ++q)
        mix<1, 1, kWideLanes>(scores[0] + q, piece.values, piece.stride, head_dim, piece.count, results + q);
}

}  // namespace layerskip
