#include "kernels/attention.h"

#include <algorithm>
#include <limits>

#include "kernels/wide.h"

namespace layerskip {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kQueries = 4;          // queries of a tile
constexpr int64_t kLineFloats = 16;  // floats of a cache line

// Slots are too far apart for the processor to foresee the next one.
__attribute__((always_inline)) inline void fetch(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kLineFloats) __builtin_prefetch(from + i);
}

// Scores of `Queries` queries with a piece's keys: scores[q][t]. Keys beyond `count` are the last one again. Meanwhile,
// what comes next is fetched if it is given: values of the piece, and keys of the next one.
template <int Queries>
void score(const float* const* queries, const float* keys, const float* values, const float* next_keys, int64_t stride,
           int64_t head_dim, int count, float scale, float (*scores)[kSlots]) {
    constexpr int kKeys = Queries == 1 ? 8 : Queries == 2 ? 4 : 2;
    for (int t = 0; t < count; t += kKeys) {
        const float* key[kKeys];
        for (int k = 0; k < kKeys; ++k) {
            key[k] = keys + std::min(t + k, count - 1) * stride;
            if (next_keys == nullptr) continue;
            fetch(values + (t + k) * stride, head_dim);
            fetch(next_keys + (t + k) * stride, head_dim);
        }
        Vector products[kLanes] = {};
        for (int64_t i = 0; i < head_dim; i += kLanes) {
            for (int q = 0; q < Queries; ++q) {
                const Vector query = load(queries[q] + i);
                for (int k = 0; k < kKeys; ++k) products[q * kKeys + k] += query * load(key[k] + i);
            }
        }
        const Vector results = sums(products) * scale;
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

// results[q] = sum over t of weights[q][t] * values[t], from channel i on.
template <int Queries, int Wides = most_channels(Queries)>
void mix(const float (*weights)[kSlots], const float* values, int64_t stride, int64_t head_dim, int count,
         float* const* results, int64_t i = 0) {
    for (; i + Wides * kWideLanes <= head_dim; i += Wides * kWideLanes) {
        Wide sums[Queries][Wides] = {};
        for (int t = 0; t < count; ++t) {
            for (int v = 0; v < Wides; ++v) {
                const Wide value = load_wide(values + t * stride + i + v * kWideLanes);
                for (int q = 0; q < Queries; ++q) add_product(sums[q][v], value, broadcast_wide(weights[q][t]));
            }
        }
        for (int q = 0; q < Queries; ++q)
            for (int v = 0; v < Wides; ++v) store(results[q] + i + v * kWideLanes, sums[q][v]);
    }
    if constexpr (Wides > 1) return mix<Queries, Wides / 2>(weights, values, stride, head_dim, count, results, i);
    for (int q = 0; i < head_dim && q < Queries; ++q) {  // eight channels are left over
        Vector sum{};
        for (int t = 0; t < count; ++t) sum += load(values + t * stride + i) * weights[q][t];
        store(results[q] + i, sum);
    }
}

}  // namespace

Attention::Attention(const Network& network, const Cache& cache, const Segment* segments, int num_segments,
                     float* partials, Team& team, int member)
    : net_(network), cache_(cache), segments_(segments), num_segments_(num_segments), partials_(partials), team_(team),
      member_(member), head_dim_(network.head_dim), stride_(network.num_kv_heads * head_dim_),
      partial_floats_(head_dim_ + kLanes) {}

Attention::Span Attention::span_of(int64_t position, int64_t window) const {
    return {window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0, std::min(position, cache_.capacity) + 1};
}

Attention::Part Attention::part_of(const Segment& tokens, int64_t window) const {
    const int64_t first = span_of(tokens.position, window).start / kSlots;
    const int64_t stop = span_of(tokens.position + tokens.count - 1, window).stop;
    return {tokens, first, (stop + kSlots - 1) / kSlots - first, nullptr};
}

float* Attention::partial(const Part& part, int token, int head, int64_t piece) const {
    return part.partials + ((token * net_.num_heads + head) * part.pieces + piece) * partial_floats_;
}

void Attention::run(const float* qkv, float* out, int layer, int64_t window) {
    int64_t used = 0;
    for (int i = 0; i < num_segments_; ++i) {
        for (int done = 0; done < segments_[i].count;) {
            Segment tokens{segments_[i].row, segments_[i].position + done, segments_[i].first + done,
                           segments_[i].count - done};
            const int64_t token_floats = net_.num_heads * part_of(tokens, window).pieces * partial_floats_;
            const int64_t fitting = (kPartialFloats - used) / token_floats;
            if (fitting == 0 && used > 0) {
                finish(qkv, out, layer, window);
                used = 0;
                continue;
            }
            tokens.count = static_cast<int>(std::min<int64_t>(tokens.count, std::max<int64_t>(1, fitting)));
            Part part = part_of(tokens, window);
            part.partials = partials_ + used;
            parts_.push_back(part);
            used += tokens.count * net_.num_heads * part.pieces * partial_floats_;
            done += tokens.count;
        }
    }
    finish(qkv, out, layer, window);
}

// Compute the parts gathered so far: this member's share of their pieces, then of their results.
void Attention::finish(const float* qkv, float* out, int layer, int64_t window) {
    int pieces = 0, results = 0, from, to;
    for (const Part& part : parts_) {
        pieces += static_cast<int>(part.pieces) * net_.num_kv_heads;
        results += part.tokens.count * net_.num_heads;
    }
    share(pieces, member_, team_.size(), from, to);
    for (const Part& part : parts_) {
        const int size = static_cast<int>(part.pieces) * net_.num_kv_heads;
        for (int item = std::max(0, from); item < std::min(size, to); ++item) piece(part, qkv, layer, window, item);
        from -= size, to -= size;
    }
    team_.barrier();
    share(results, member_, team_.size(), from, to);
    for (const Part& part : parts_) {
        const int size = part.tokens.count * net_.num_heads;
        for (int item = std::max(0, from); item < std::min(size, to); ++item)
            combine(part, out, item / net_.num_heads, item % net_.num_heads);
        from -= size, to -= size;
    }
    team_.barrier();
    parts_.clear();
}

// One piece for all tokens of a part and all heads that share it.
void Attention::piece(const Part& part, const float* qkv, int layer, int64_t window, int64_t item) {
    const Segment& tokens = part.tokens;
    const int groups = net_.num_heads / net_.num_kv_heads, total = tokens.count * groups;
    const int kv_head = static_cast<int>(item / part.pieces);
    const int64_t index = item % part.pieces, slot = (part.first_piece + index) * kSlots;
    const int64_t row = layer * cache_.layer_stride + tokens.row * cache_.row_stride;
    const int64_t place = row + slot * stride_ + kv_head * head_dim_;
    const int64_t token_floats = static_cast<int64_t>(net_.num_heads + 2 * net_.num_kv_heads) * head_dim_;
    const int64_t stop = span_of(tokens.position + tokens.count - 1, window).stop;
    const int count = static_cast<int>(std::min<int64_t>(kSlots, stop - slot));
    const int64_t to_next_head = head_dim_ - index * kSlots * stride_;
    for (int done = 0; done < total; done += kQueries) {
        const float* queries[kQueries];
        float* results[kQueries];
        Span spans[kQueries];
        const int size = std::min(kQueries, total - done);
        for (int q = 0; q < size; ++q) {
            const int token = (done + q) / groups, head = kv_head * groups + (done + q) % groups;
            queries[q] = qkv + (tokens.first + token) * token_floats + head * head_dim_;
            results[q] = partial(part, token, head, index);
            spans[q] = span_of(tokens.position + token, window);
        }
        const float *keys = cache_.keys + place, *values = cache_.values + place;
        const float* next = done > 0 ? nullptr : keys + (index + 1 < part.pieces ? kSlots * stride_ : to_next_head);
        switch (size) {
            case 1: tile<1>(queries, results, spans, keys, values, next, slot, count); break;
            case 2: tile<2>(queries, results, spans, keys, values, next, slot, count); break;
            case 3: tile<3>(queries, results, spans, keys, values, next, slot, count); break;
            default: tile<4>(queries, results, spans, keys, values, next, slot, count); break;
        }
    }
}

// results[q]: the mixture of values, then the maximum of the scores and the sum of their exponentials.
template <int Queries>
void Attention::tile(const float* const* queries, float* const* results, const Span* spans, const float* keys,
                     const float* values, const float* next_keys, int64_t slot, int count) {
    alignas(32) float scores[Queries][kSlots];
    score<Queries>(queries, keys, values, next_keys, stride_, head_dim_, count, net_.attention_scale, scores);
    for (int q = 0; q < Queries; ++q) {
        const int low = static_cast<int>(std::max<int64_t>(0, spans[q].start - slot));
        const int high = static_cast<int>(std::min<int64_t>(count, spans[q].stop - slot));
        for (int t = 0; t < std::min(low, kSlots); ++t) scores[q][t] = -kInfinity;
        for (int t = std::max(0, high); t < kSlots; ++t) scores[q][t] = -kInfinity;
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
        results[q][head_dim_] = most;
        results[q][head_dim_ + 1] = sum(totals);
    }
    mix<Queries>(scores, values, stride_, head_dim_, count, results);
}

// A token's result of one head from its pieces, in order.
void Attention::combine(const Part& part, float* out, int token, int head) const {
    float most = -kInfinity, total = 0;
    for (int64_t i = 0; i < part.pieces; ++i) most = std::max(most, partial(part, token, head, i)[head_dim_]);
    float* to = out + ((part.tokens.first + token) * static_cast<int64_t>(net_.num_heads) + head) * head_dim_;
    std::fill(to, to + head_dim_, 0.0f);
    for (int64_t i = 0; i < part.pieces; ++i) {
        const float* result = partial(part, token, head, i);
        if (result[head_dim_ + 1] == 0) continue;  // it attends to nothing there
        const float factor = exponential(broadcast(result[head_dim_] - most))[0];
        total += factor * result[head_dim_ + 1];
        for (int64_t c = 0; c < head_dim_; c += kLanes) store(to + c, load(to + c) + load(result + c) * factor);
    }
    for (int64_t c = 0; c < head_dim_; c += kLanes) store(to + c, load(to + c) * (1 / total));
}

}  // namespace layerskip
