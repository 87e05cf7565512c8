// Attention of a block of tokens over a cache, in pieces of 32 slots.
//
// A piece is read once for all tokens of a row and all heads that share it: verifying several tokens moves little more
// memory than decoding one. Every token gets its own maximum, sum and mixture of values from each piece, which are then
// combined in order: a token's result doesn't depend, to the last bit, on the tokens beside it or on which member
// computed what.
#pragma once

#include <vector>

#include "network.h"
#include "threads.h"

namespace layerskip {

constexpr int kSlots = 32;  // slots of a piece

// Tokens of one row, at consecutive positions.
struct Segment {
    int64_t row;
    int64_t position;  // of the first token
    int first;         // its place in the block
    int count;
};

class Attention {
  public:
    // `partials` is room for kPartialFloats, shared by the team.
    static constexpr int64_t kPartialFloats = 1 << 21;

    Attention(const Network& network, const Cache& cache, const Segment* segments, int num_segments, float* partials,
              Team& team, int member);

    // out [tokens, H, D_head] of qkv [tokens, H + 2 H_kv, D_head], whose keys and values are in the cache. All members
    // call it; the result is complete when it returns.
    void run(const float* qkv, float* out, int layer, int64_t window);

  private:
    // Slots that a token attends to: [start, stop).
    struct Span {
        int64_t start, stop;
    };
    // Tokens of a row whose partial results are kept at the same time.
    struct Part {
        Segment tokens;
        int64_t first_piece, pieces;
        float* partials;  // [tokens, H, pieces, D_head + 8]
    };

    Span span_of(int64_t position, int64_t window) const;
    Part part_of(const Segment& tokens, int64_t window) const;
    void finish(const float* qkv, float* out, int layer, int64_t window);
    void piece(const Part& part, const float* qkv, int layer, int64_t window, int64_t item);
    template <int Queries>
    void tile(const float* const* queries, float* const* results, const Span* spans, const float* keys,
              const float* values, const float* next_keys, int64_t slot, int count);
    void combine(const Part& part, float* out, int token, int head) const;
    float* partial(const Part& part, int token, int head, int64_t piece) const;

    const Network& net_;
    const Cache& cache_;
    const Segment* segments_;
    const int num_segments_;
    float* partials_;
    Team& team_;
    const int member_;
    const int64_t head_dim_, stride_, partial_floats_;
    std::vector<Part> parts_;
};

}  // namespace layerskip
