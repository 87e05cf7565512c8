// Attention of a block of tokens over a cache, in pieces of 32 slots.
//
// A piece is read once for up to 64 queries: those of a row's tokens and of the heads that share keys. Every query gets
// its own maximum, sum and mixture of values from each piece, which are then put together in order: a token's result
// doesn't depend, to the last bit, on the tokens beside it or on which member computed what.
#pragma once

#include <vector>

#include "kernels/attention_piece.h"
#include "kernels/linear.h"
#include "network.h"
#include "threads.h"

namespace layerskip {

// Tokens of one row, at consecutive positions.
struct Segment {
    int64_t row;
    int64_t position;  // of the first token
    int first;         // its place in the block
    int count;
};

class Attention {
  public:
    // `floats` is room for `shared_floats`, shared by the team.
    Attention(const Network& network, const Cache& cache, const Segment* segments, int num_segments, float* floats,
              Team& team, int member);

    static int64_t shared_floats(const Network& network);

    // out [tokens, H, D_head] of qkv [tokens, H + 2 H_kv, D_head], whose keys and values are in the cache. All members
    // call it; the result is complete when it returns.
    void run(const float* qkv, float* out, int layer, int64_t window);

  private:
    static constexpr int kMost = 64;             // queries of a tile
    static constexpr int kMany = 9;              // queries that are better computed side by side
    static constexpr int64_t kKept = 1 << 20;    // floats of results of pieces, where members share pieces

    // Queries of one row and one key/value head: those of H / H_kv heads for each token, one token after the other.
    struct Tile {
        const Segment* tokens;
        int first, count;  // of the queries of `tokens`
        int64_t first_piece, pieces;
        int before;  // queries of the tiles before it
    };
    // What a call computes.
    struct Step {
        const float* qkv;
        float* out;
        int layer;
        int64_t window;
    };

    void make_tiles(int64_t window);
    void run_whole(const Step& step);
    void run_shared(const Step& step);
    template <typename Number>
    void whole(const Step& step, const Tile& tile, int kv_head);
    void merge_kept(const Step& step, int pieces, int64_t begin);
    void merge_some(const Step& step, const Tile& tile, int kv_head, int first, int size, int pieces, int64_t begin);
    template <typename Number, typename Results, typename Done>
    void attend(const Step& step, const Tile& tile, int kv_head, int64_t begin, int64_t end, const Results& results,
                const Done& done);
    template <typename Number>
    Piece<Number> piece_of(const Step& step, const Tile& tile, int kv_head, int64_t index) const;
    template <typename Number>
    Piece<float> in_floats(const Piece<Number>& piece) const;
    void turn(const float* const* queries, int count) const;
    Span span_of(int64_t position, int64_t window) const;
    int64_t position_of(const Tile& tile, int query) const;
    float* out_of(const Step& step, const Tile& tile, int kv_head, int query) const;
    int64_t number_of(const Tile& tile, int kv_head, int query) const;  // of a query, among those of all heads

    const Network& net_;
    const Cache& cache_;
    const Segment* segments_;
    const int num_segments_;
    Team& team_;
    const int member_, groups_;
    const int64_t head_dim_, stride_, result_floats_;
    float *kept_;     // results of pieces; then `most` and total of each query
    float *turned_;   // [kMost / 16, D_head, 16], this member's, as what follows
    float *keys_, *values_;  // [32, D_head], a piece in floats
    float *results_;  // [16, D_head + 8]
    std::vector<Tile> tiles_;
};

}  // namespace layerskip
