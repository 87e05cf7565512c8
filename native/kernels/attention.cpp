#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace layerskip {
namespace {

constexpr int64_t kLineFloats = 16;  // floats of a cache line

// Floats that each member has for itself.
int64_t member_floats(const Network& net, int most) {
    return (most + 2 * kSlots + kWideLanes) * static_cast<int64_t>(net.head_dim) + kWideLanes * kLanes;
}

// Put results of at most 16 queries over their next piece together with those over the pieces before it.
void merge(float* const* results, int size, int64_t head_dim, float* most, float* total, float* const* outs) {
    alignas(64) float factors[kWideLanes] = {};
    for (int q = 0; q < size; ++q) factors[q] = -std::fabs(most_of(results[q], head_dim) - most[q]);
    store(factors, exponential(load_wide(factors)));
    for (int q = 0; q < size; ++q) {
        const float *result = results[q], factor = factors[q], sum = total_of(results[q], head_dim);
        if (sum == 0) continue;  // it attends to nothing there
        if (most_of(results[q], head_dim) > most[q]) {
            most[q] = most_of(results[q], head_dim);
            total[q] = total[q] * factor + sum;
            for (int64_t i = 0; i < head_dim; i += kLanes)
                store(outs[q] + i, load(outs[q] + i) * factor + load(result + i));
        } else {
            total[q] += sum * factor;
            for (int64_t i = 0; i < head_dim; i += kLanes)
                store(outs[q] + i, load(outs[q] + i) + load(result + i) * factor);
        }
    }
}

void divide(float* out, float total, int64_t head_dim) {
    const float factor = 1 / total;
    for (int64_t i = 0; i < head_dim; i += kLanes) store(out + i, load(out + i) * factor);
}

}  // namespace

Attention::Attention(const Network& network, const Cache& cache, const Segment* segments, int num_segments,
                     float* floats, Team& team, int member)
    : net_(network), cache_(cache), segments_(segments), num_segments_(num_segments), team_(team), member_(member),
      groups_(network.num_heads / network.num_kv_heads), head_dim_(network.head_dim),
      stride_(network.num_kv_heads * head_dim_), result_floats_(head_dim_ + kLanes) {
    const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(floats) / sizeof(float) % kLineFloats);
    kept_ = floats + (kLineFloats - misplaced) % kLineFloats;
    turned_ = kept_ + kKept + member * member_floats(network, kMost);
    keys_ = turned_ + kMost * head_dim_;
    values_ = keys_ + kSlots * head_dim_;
    results_ = values_ + kSlots * head_dim_;
}

int64_t Attention::shared_floats(const Network& net) {
    return kLineFloats + kKept + net.threads * member_floats(net, kMost);
}

Span Attention::span_of(int64_t position, int64_t window) const {
    return {window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0, std::min(position, cache_.capacity) + 1};
}

int64_t Attention::position_of(const Tile& tile, int query) const {
    return tile.tokens->position + (tile.first + query) / groups_;
}

float* Attention::out_of(const Step& step, const Tile& tile, int kv_head, int query) const {
    const int64_t token = tile.tokens->first + (tile.first + query) / groups_;
    return step.out + (token * net_.num_heads + kv_head * groups_ + (tile.first + query) % groups_) * head_dim_;
}

int64_t Attention::number_of(const Tile& tile, int kv_head, int query) const {
    return static_cast<int64_t>(tile.before) * net_.num_kv_heads + kv_head * tile.count + query;
}

void Attention::make_tiles(int64_t window) {
    tiles_.clear();
    int before = 0;
    for (const Segment* tokens = segments_; tokens < segments_ + num_segments_; ++tokens) {
        const int queries = tokens->count * groups_;
        for (int first = 0; first < queries; first += kMost) {
            Tile tile{tokens, first, std::min(kMost, queries - first), 0, 0, before};
            tile.first_piece = span_of(position_of(tile, 0), window).start / kSlots;
            const int64_t stop = span_of(position_of(tile, tile.count - 1), window).stop;
            tile.pieces = std::max<int64_t>(0, (stop + kSlots - 1) / kSlots - tile.first_piece);
            before += tile.count;
            tiles_.push_back(tile);
        }
    }
}

void Attention::run(const float* qkv, float* out, int layer, int64_t window) {
    make_tiles(window);
    const Step step{qkv, out, layer, window};
    const int64_t tiles = static_cast<int64_t>(tiles_.size()), queries = tiles_.back().before + tiles_.back().count;
    const bool enough = tiles * net_.num_kv_heads >= 4 * team_.size();
    const bool fits = queries * net_.num_kv_heads * (result_floats_ + 2) <= kKept;
    if (team_.size() == 1 || enough || !fits) {
        run_whole(step);
    } else {
        run_shared(step);
    }
}

// Every member computes all pieces of its tiles.
void Attention::run_whole(const Step& step) {
    int64_t pieces = 0, before = 0;  // of all tiles; of those gone through
    for (const Tile& tile : tiles_) pieces += tile.pieces * net_.num_kv_heads;
    for (const Tile& tile : tiles_) {
        for (int kv_head = 0; kv_head < net_.num_kv_heads; ++kv_head) {
            if (before * team_.size() / std::max<int64_t>(1, pieces) == member_)
                with_numbers(cache_, [&](auto number) { whole<decltype(number)>(step, tile, kv_head); });
            before += tile.pieces;
        }
    }
    team_.barrier();
}

template <typename Number>
void Attention::whole(const Step& step, const Tile& tile, int kv_head) {
    float most[kMost], total[kMost], *outs[kMost], *results[kWideLanes];
    for (int q = 0; q < tile.count; ++q) {
        most[q] = -kInfinity, total[q] = 0;
        outs[q] = out_of(step, tile, kv_head, q);
        std::fill(outs[q], outs[q] + head_dim_, 0.0f);
    }
    for (int q = 0; q < kWideLanes; ++q) results[q] = results_ + q * result_floats_;
    attend<Number>(
        step, tile, kv_head, 0, tile.pieces, [&](int query, int64_t) { return results[query % kWideLanes]; },
        [&](int query, int size) {
            merge(results + query % kWideLanes, size, head_dim_, most + query, total + query, outs + query);
        });
    for (int q = 0; q < tile.count; ++q) divide(outs[q], total[q], head_dim_);
}

// Members share the pieces of few tiles: as many at a time as there is room for their results, which are put together
// before the next ones.
void Attention::run_shared(const Step& step) {
    int64_t most = 0;
    for (const Tile& tile : tiles_) most = std::max(most, tile.pieces);
    const int64_t queries = (tiles_.back().before + tiles_.back().count) * static_cast<int64_t>(net_.num_kv_heads);
    const int64_t room = std::min(most, (kKept - 2 * queries) / (queries * result_floats_));
    for (int64_t begin = 0; begin < most; begin += room) {
        int64_t items = 0;
        for (const Tile& tile : tiles_)
            items += std::clamp<int64_t>(tile.pieces - begin, 0, room) * net_.num_kv_heads;
        int from, to;
        share(static_cast<int>(items), member_, team_.size(), from, to);
        for (const Tile& tile : tiles_) {
            const int count = static_cast<int>(std::clamp<int64_t>(tile.pieces - begin, 0, room));
            const int end = std::min(count * net_.num_kv_heads, to);
            for (int item = std::max(0, from), next; item < end; item = next) {
                const int kv_head = item / count;
                next = std::min(end, (kv_head + 1) * count);  // all of this member's pieces of a head
                const int64_t first = begin + item % count;
                const auto result = [&](int query, int64_t piece) {
                    return kept_ + (number_of(tile, kv_head, query) * room + piece - begin) * result_floats_;
                };
                with_numbers(cache_, [&](auto number) {
                    attend<decltype(number)>(step, tile, kv_head, first, first + next - item, result, [](int, int) {});
                });
            }
            from -= count * net_.num_kv_heads, to -= count * net_.num_kv_heads;
        }
        team_.barrier();
        merge_kept(step, static_cast<int>(room), begin);
        team_.barrier();
    }
}

// Put together the results of pieces from `begin` on. Members take the queries of one head after the other, as they did
// the pieces, so that most of what a member reads here is what it has written.
void Attention::merge_kept(const Step& step, int pieces, int64_t begin) {
    const int kv_heads = net_.num_kv_heads;
    int from, to;
    share((tiles_.back().before + tiles_.back().count) * kv_heads, member_, team_.size(), from, to);
    for (const Tile& tile : tiles_) {
        for (int kv_head = 0; kv_head < kv_heads && begin < tile.pieces; ++kv_head) {
            const int before = static_cast<int>(number_of(tile, kv_head, 0));
            const int end = std::min(tile.count, to - before);
            for (int query = std::max(0, from - before); query < end; query += kWideLanes)
                merge_some(step, tile, kv_head, query, std::min(kWideLanes, end - query), pieces, begin);
        }
    }
}

// The same of at most 16 queries of a head.
void Attention::merge_some(const Step& step, const Tile& tile, int kv_head, int first, int size, int pieces,
                           int64_t begin) {
    float most[kWideLanes], total[kWideLanes], *outs[kWideLanes], *results[kWideLanes];
    const int64_t number = number_of(tile, kv_head, first);
    for (int q = 0; q < size; ++q) {
        const float* state = kept_ + kKept - 2 * (number + q + 1);
        most[q] = begin == 0 ? -kInfinity : state[0], total[q] = begin == 0 ? 0 : state[1];
        outs[q] = out_of(step, tile, kv_head, first + q);
        results[q] = kept_ + (number + q) * pieces * result_floats_;
        if (begin == 0) std::fill(outs[q], outs[q] + head_dim_, 0.0f);
    }
    const int64_t end = std::min<int64_t>(tile.pieces, begin + pieces);
    for (int64_t piece = begin; piece < end; ++piece) {
        merge(results, size, head_dim_, most, total, outs);
        for (int q = 0; q < size; ++q) results[q] += result_floats_;
    }
    for (int q = 0; q < size; ++q) {
        float* state = kept_ + kKept - 2 * (number + q + 1);
        state[0] = most[q], state[1] = total[q];
        if (end == tile.pieces) divide(outs[q], total[q], head_dim_);
    }
}

// Pieces begin..end-1 of a tile for one head: results(query, piece) says where they go, and done(query, size) is called
// when those of some queries over a piece are there.
template <typename Number, typename Results, typename Done>
void Attention::attend(const Step& step, const Tile& tile, int kv_head, int64_t begin, int64_t end,
                       const Results& results, const Done& done) {
    const float* queries[kMost];
    Span spans[kMost];
    const int64_t token_floats = static_cast<int64_t>(net_.num_heads + 2 * net_.num_kv_heads) * head_dim_;
    for (int q = 0; q < tile.count; ++q) {
        const int64_t token = tile.tokens->first + (tile.first + q) / groups_;
        queries[q] = step.qkv + token * token_floats + (kv_head * groups_ + (tile.first + q) % groups_) * head_dim_;
        spans[q] = span_of(position_of(tile, q), step.window);
    }
    const bool many = tile.count >= kMany;
    if (many) turn(queries, tile.count);
    for (int64_t index = begin; index < end; ++index) {
        Piece<Number> piece = piece_of<Number>(step, tile, kv_head, index);
        const Piece<float> floats = many ? in_floats(piece) : Piece<float>{};
        for (int first = 0, size; first < tile.count; first += size) {
            const bool side_by_side = many && tile.count - first > kFew;
            size = std::min(side_by_side ? kWideLanes : kFew, tile.count - first);
            float* to[kWideLanes];
            for (int q = 0; q < size; ++q) to[q] = results(first + q, index);
            if (side_by_side) {
                Turned turned{turned_ + first * head_dim_, {}, {}};
                for (int q = 0; q < size; ++q) {
                    const auto place = [&](int64_t slot) {
                        return static_cast<int32_t>(std::clamp<int64_t>(slot - piece.slot, 0, piece.count));
                    };
                    turned.from[q] = place(spans[first + q].start), turned.to[q] = place(spans[first + q].stop);
                }
                attend_many(turned, size, floats, head_dim_, net_.attention_scale, to);
            } else if (many) {
                attend_some(queries + first, spans + first, size, floats, head_dim_, net_.attention_scale, to);
            } else {
                attend_some(queries + first, spans + first, size, piece, head_dim_, net_.attention_scale, to);
                piece.next_keys = nullptr;
            }
            done(first, size);
        }
    }
}

template <typename Number>
Piece<Number> Attention::piece_of(const Step& step, const Tile& tile, int kv_head, int64_t index) const {
    const int64_t slot = (tile.first_piece + index) * kSlots;
    const int64_t row = step.layer * cache_.layer_stride + tile.tokens->row * cache_.row_stride;
    const int64_t place = row + slot * stride_ + kv_head * head_dim_;
    const int64_t stop = span_of(position_of(tile, tile.count - 1), step.window).stop;
    const bool scaled = cache_.format == kInt8;
    const Number* keys = static_cast<const Number*>(cache_.keys) + place;
    return {keys,
            static_cast<const Number*>(cache_.values) + place,
            keys + (index + 1 < tile.pieces ? kSlots * stride_ : head_dim_ - index * kSlots * stride_),
            scaled ? cache_.key_scales + place / head_dim_ : nullptr,
            scaled ? cache_.value_scales + place / head_dim_ : nullptr,
            stride_,
            net_.num_kv_heads,
            slot,
            static_cast<int>(std::min<int64_t>(kSlots, stop - slot))};
}

// The same piece in floats, which scales are still to be applied to.
template <typename Number>
Piece<float> Attention::in_floats(const Piece<Number>& piece) const {
    const auto copy = [&](const Number* from, float* to) {
        for (int t = 0; t < piece.count; ++t)
            for (int64_t i = 0; i < head_dim_; i += kLanes)
                store(to + t * head_dim_ + i, load(from + t * piece.stride + i));
    };
    for (int t = 0; t < kSlots; ++t) {
        fetch(piece.next_keys + t * piece.stride, head_dim_);
        fetch(piece.next_keys + (piece.values - piece.keys) + t * piece.stride, head_dim_);
    }
    if constexpr (std::is_same_v<Number, float>) return piece;
    copy(piece.keys, keys_);
    copy(piece.values, values_);
    return {keys_, values_, nullptr, piece.key_scales, piece.value_scales, head_dim_, piece.scale_stride, piece.slot,
            piece.count};
}

// Queries side by side, sixteen at a time; the last ones are filled up with zeros.
void Attention::turn(const float* const* queries, int count) const {
    for (int first = 0; first < count; first += kWideLanes) {
        float* to = turned_ + first * head_dim_;
        for (int q = 0; q < kWideLanes; ++q)
            for (int64_t i = 0; i < head_dim_; ++i)
                to[i * kWideLanes + q] = first + q < count ? queries[first + q][i] : 0.0f;
    }
}

}  // namespace layerskip
