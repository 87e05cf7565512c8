#include "attention.h"

#include <algorithm>
#include <limits>

namespace layerskip {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kQueries = 4;  // of a tile

// Scores of `Queries` queries with a piece's keys: scores[q][t]. Keys beyond `count` are the last one again.
template <int Queries>
void score(const float* const* queries, const float* keys, int64_t stride, int64_t channels, int count, float scale,
           float (*scores)[kSlots]) {
    constexpr int kKeys = Queries == 1 ? 8 : Queries == 2 ? 4 : 2;
    for (int t = 0; t < count; t += kKeys) {
        const float* key[kKeys];
        for (int k = 0; k < kKeys; ++k) key[k] = keys + std::min(t + k, count - 1) * stride;
        Vector products[kLanes] = {};
        for (int64_t i = 0; i < channels; i += kLanes) {
            for (int q = 0; q < Queries; ++q) {
                const Vector query = load(queries[q] + i);
                for (int k = 0; k < kKeys; ++k) products[q * kKeys + k] += query * load(key[k] + i);
            }
        }
        const Vector found = sums(products) * scale;
        for (int q = 0; q < Queries; ++q)
            for (int k = 0; k < kKeys; ++k) scores[q][t + k] = found[q * kKeys + k];
    }
}

// results[q] = sum over t of weights[q][t] * values[t]
template <int Queries>
void mix(const float (*weights)[kSlots], const float* values, int64_t stride, int64_t channels, int count,
         float* const* results) {
    constexpr int kVectors = Queries == 1 ? 8 : Queries == 2 ? 4 : 2;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= channels; i += kVectors * kLanes) {
        Vector sums[Queries][kVectors] = {};
        for (int t = 0; t < count; ++t) {
            for (int v = 0; v < kVectors; ++v) {
                const Vector value = load(values + t * stride + i + v * kLanes);
                for (int q = 0; q < Queries; ++q) sums[q][v] += value * weights[q][t];
            }
        }
        for (int q = 0; q < Queries; ++q)
            for (int v = 0; v < kVectors; ++v) store(results[q] + i + v * kLanes, sums[q][v]);
    }
    for (; i < channels; i += kLanes) {
        for (int q = 0; q < Queries; ++q) {
            Vector sum{};
            for (int t = 0; t < count; ++t) sum += load(values + t * stride + i) * weights[q][t];
            store(results[q] + i, sum);
        }
    }
}

}  // namespace

Attention::Attention(const Network& network, const Cache& cache, const Segment* segments, int num_segments,
                     float* partials, Team& team, int member)
    : net_(network), cache_(cache), segments_(segments), num_segments_(num_segments), partials_(partials), team_(team),
      member_(member), channels_(network.head_channels), stride_(network.kv_heads * channels_),
      partial_floats_(channels_ + kLanes) {}

Attention::Span Attention::span_of(int64_t position, int64_t window) const {
    return {window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0, std::min(position, cache_.capacity) + 1};
}

Attention::Part Attention::part_of(const Segment& rows, int64_t window) const {
    const int64_t first = span_of(rows.position, window).first / kSlots;
    const int64_t end = span_of(rows.position + rows.count - 1, window).last;
    return {rows, first, (end + kSlots - 1) / kSlots - first, nullptr};
}

float* Attention::partial(const Part& part, int row, int head, int64_t piece) const {
    return part.partials + ((row * net_.heads + head) * part.pieces + piece) * partial_floats_;
}

void Attention::run(const float* qkv, float* out, int layer, int64_t window) {
    int64_t used = 0;
    for (int i = 0; i < num_segments_; ++i) {
        for (int done = 0; done < segments_[i].count;) {
            Segment rows{segments_[i].text, segments_[i].position + done, segments_[i].first + done,
                         segments_[i].count - done};
            const int64_t row_floats = net_.heads * part_of(rows, window).pieces * partial_floats_;
            const int64_t fitting = (kPartialFloats - used) / row_floats;
            if (fitting == 0 && used > 0) {
                finish(qkv, out, layer, window);
                used = 0;
                continue;
            }
            rows.count = static_cast<int>(std::min<int64_t>(rows.count, std::max<int64_t>(1, fitting)));
            Part part = part_of(rows, window);
            part.partials = partials_ + used;
            parts_.push_back(part);
            used += rows.count * net_.heads * part.pieces * partial_floats_;
            done += rows.count;
        }
    }
    finish(qkv, out, layer, window);
}

// The parts that were gathered: this member's share of their pieces, then of their results.
void Attention::finish(const float* qkv, float* out, int layer, int64_t window) {
    int pieces = 0, results = 0, from, to;
    for (const Part& part : parts_) {
        pieces += static_cast<int>(part.pieces) * net_.kv_heads;
        results += part.rows.count * net_.heads;
    }
    share(pieces, member_, team_.size(), from, to);
    for (const Part& part : parts_) {
        const int size = static_cast<int>(part.pieces) * net_.kv_heads;
        for (int item = std::max(0, from); item < std::min(size, to); ++item) piece(part, qkv, layer, window, item);
        from -= size, to -= size;
    }
    team_.barrier();
    share(results, member_, team_.size(), from, to);
    for (const Part& part : parts_) {
        const int size = part.rows.count * net_.heads;
        for (int item = std::max(0, from); item < std::min(size, to); ++item)
            combine(part, out, item / net_.heads, item % net_.heads);
        from -= size, to -= size;
    }
    team_.barrier();
    parts_.clear();
}

// One piece for all rows of a part and all heads that share it.
void Attention::piece(const Part& part, const float* qkv, int layer, int64_t window, int64_t item) {
    const Segment& rows = part.rows;
    const int groups = net_.heads / net_.kv_heads, total = rows.count * groups;
    const int kv_head = static_cast<int>(item / part.pieces);
    const int64_t index = item % part.pieces, slot = (part.first_piece + index) * kSlots;
    const int64_t place = layer * cache_.layer_stride + rows.text * cache_.row_stride + slot * stride_ + kv_head * channels_;
    const int64_t row_floats = static_cast<int64_t>(net_.heads + 2 * net_.kv_heads) * channels_;
    const int64_t end = span_of(rows.position + rows.count - 1, window).last;
    const int count = static_cast<int>(std::min<int64_t>(kSlots, end - slot));
    for (int done = 0; done < total; done += kQueries) {
        const float* queries[kQueries];
        float* results[kQueries];
        Span spans[kQueries];
        const int size = std::min(kQueries, total - done);
        for (int q = 0; q < size; ++q) {
            const int row = (done + q) / groups, head = kv_head * groups + (done + q) % groups;
            queries[q] = qkv + (rows.first + row) * row_floats + head * channels_;
            results[q] = partial(part, row, head, index);
            spans[q] = span_of(rows.position + row, window);
        }
        const float *keys = cache_.keys + place, *values = cache_.values + place;
        switch (size) {
            case 1: tile<1>(queries, results, spans, keys, values, slot, count); break;
            case 2: tile<2>(queries, results, spans, keys, values, slot, count); break;
            case 3: tile<3>(queries, results, spans, keys, values, slot, count); break;
            default: tile<4>(queries, results, spans, keys, values, slot, count); break;
        }
    }
}

// results[q]: the mixture of values, then the maximum of the scores and the sum of their exponentials.
template <int Queries>
void Attention::tile(const float* const* queries, float* const* results, const Span* spans, const float* keys,
                     const float* values, int64_t slot, int count) {
    alignas(32) float scores[Queries][kSlots];
    score<Queries>(queries, keys, stride_, channels_, count, net_.attention_scale, scores);
    for (int q = 0; q < Queries; ++q) {
        const int low = static_cast<int>(std::max<int64_t>(0, spans[q].first - slot));
        const int high = static_cast<int>(std::min<int64_t>(count, spans[q].last - slot));
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
        results[q][channels_] = most;
        results[q][channels_ + 1] = sum(totals);
    }
    mix<Queries>(scores, values, stride_, channels_, count, results);
}

// A row's result of one head from its pieces, in order.
void Attention::combine(const Part& part, float* out, int row, int head) const {
    float most = -kInfinity, total = 0;
    for (int64_t i = 0; i < part.pieces; ++i) most = std::max(most, partial(part, row, head, i)[channels_]);
    float* to = out + ((part.rows.first + row) * static_cast<int64_t>(net_.heads) + head) * channels_;
    std::fill(to, to + channels_, 0.0f);
    for (int64_t i = 0; i < part.pieces; ++i) {
        const float* found = partial(part, row, head, i);
        if (found[channels_ + 1] == 0) continue;  // it sees nothing there
        const float factor = exponential(broadcast(found[channels_] - most))[0];
        total += factor * found[channels_ + 1];
        for (int64_t c = 0; c < channels_; c += kLanes) store(to + c, load(to + c) + load(found + c) * factor);
    }
    for (int64_t c = 0; c < channels_; c += kLanes) store(to + c, load(to + c) * (1 / total));
}

}  // namespace layerskip
