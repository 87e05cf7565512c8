// Attention of a block of rows over a cache, in pieces of 32 slots.
//
// A piece is read once for all rows of a text and all heads that share it: verifying several tokens moves little more
// than decoding one. Every piece gives a row its own maximum, sum and mixture of values, which are then put together in
// order: a row's result doesn't depend, to the last bit, on the rows beside it or on who computed what.
#pragma once

#include <vector>

#include "network.h"
#include "threads.h"

namespace layerskip {

constexpr int kSlots = 32;  // of a piece

// Rows of one text, in order, at consecutive positions.
struct Segment {
    int64_t text;
    int64_t position;  // of the first row
    int first;         // row
    int count;
};

class Attention {
  public:
    // `partials` is room for kPartialFloats, shared by the team.
    static constexpr int64_t kPartialFloats = 1 << 21;

    Attention(const Network& network, const Cache& cache, const Segment* segments, int num_segments, float* partials,
              Team& team, int member);

    // out [rows, H, D_head] of qkv [rows, H + 2 H_kv, D_head], whose keys and values are in the cache. All members call
    // it, and find the result after it.
    void run(const float* qkv, float* out, int layer, int64_t window);

  private:
    // Slots that a row sees: [first, last).
    struct Span {
        int64_t first, last;
    };
    // Rows of a text whose partial results are kept at the same time.
    struct Part {
        Segment rows;
        int64_t first_piece, pieces;
        float* partials;  // [rows, H, pieces, D_head + 8]
    };

    Span span_of(int64_t position, int64_t window) const;
    Part part_of(const Segment& rows, int64_t window) const;
    void finish(const float* qkv, float* out, int layer, int64_t window);
    void piece(const Part& part, const float* qkv, int layer, int64_t window, int64_t item);
    template <int Queries>
    void tile(const float* const* queries, float* const* results, const Span* spans, const float* keys,
              const float* values, int64_t slot, int count);
    void combine(const Part& part, float* out, int row, int head) const;
    float* partial(const Part& part, int row, int head, int64_t piece) const;

    const Network& net_;
    const Cache& cache_;
    const Segment* segments_;
    const int num_segments_;
    float* partials_;
    Team& team_;
    const int member_;
    const int64_t channels_, stride_, partial_floats_;
    std::vector<Part> parts_;
};

}  // namespace layerskip
