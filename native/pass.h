// A forward pass over a block of tokens: any number of layers in one call of the team, then the head.
#pragma once

#include <cstdint>

#include "network.h"

namespace layerskip {

// Consecutive tokens of each row of the cache. What belongs to tokens lies row after row, without gaps: [N, ...].
struct Rows {
    const int64_t* starts;  // [B], position of each row's first token
    const int32_t* counts;  // [B], tokens of each row; 0: the row takes no part
    int32_t rows;           // B

    // N, of all rows.
    int64_t total() const {
        int64_t tokens = 0;
        for (int32_t row = 0; row < rows; ++row) tokens += counts[row];
        return tokens;
    }

    // Call body(token, row, position) for each token.
    template <typename Body>
    void each(const Body& body) const {
        int64_t token = 0;
        for (int32_t row = 0; row < rows; ++row)
            for (int32_t i = 0; i < counts[row]; ++i) body(token++, static_cast<int64_t>(row), starts[row] + i);
    }
};

// Run layers start..stop-1 over the rows' tokens, and write the keys of the adapters between them. hidden [N, D] is
// changed in place; keys and values go into the cache.
void run_layers(const Network& network, float* hidden, const Rows& rows, const Cache& cache, int32_t start,
                int32_t stop);

// What an exit adapter adds after attention: the values that later layers keep of one earlier token, projected.
struct Fused {
    const int64_t* sources;  // [N], slot of that token; -1: none
    const float* projected;  // [N, D], from fuse()
};

// projected [N, D] of the tokens at `sources` for an adapter's layer; zeros where there is none.
void fuse(const Network& network, int32_t layer, const Rows& rows, const int64_t* sources, const Cache& cache,
          float* projected);

// Run an exit adapter's layer over the rows' tokens; hidden [N, D] is changed in place.
void run_adapter(const Network& network, int32_t layer, float* hidden, const Rows& rows, const Fused& fused,
                 const Cache& cache);

// Write the keys and values of one layer for its input; hidden [N, D] stays as it is.
void write_keys(const Network& network, const float* hidden, const Rows& rows, const Cache& cache, int32_t layer);

// logits [tokens, V padded to whole panels] of hidden [tokens, D]: final norm and head.
void unembed(const Network& network, const float* hidden, int32_t tokens, float* logits);

}  // namespace layerskip
