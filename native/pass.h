// A forward pass over a block of tokens: any number of layers in one call of the team, then the head.
#pragma once

#include <cstdint>

#include "network.h"

namespace layerskip {

// Run layers start..stop-1 over `queries` consecutive tokens of each row, row b's from position starts[b] on, and write
// the keys of the adapters between them. hidden [rows, queries, D] is changed in place; keys and values go into the
// cache.
void run_layers(const Network& network, float* hidden, int32_t rows, int32_t queries, const int64_t* starts,
                const Cache& cache, int32_t start, int32_t stop);

// What an exit adapter adds after attention: the values that later layers keep of one earlier token, projected.
struct Fused {
    const int64_t* sources;  // [tokens], slot of that token; -1: none
    const float* projected;  // [tokens, D], from fuse()
};

// projected [rows * queries, D] of the tokens at `sources` for an adapter's layer; zeros where there is none.
void fuse(const Network& network, int32_t layer, int32_t rows, int32_t queries, const int64_t* sources,
          const Cache& cache, float* projected);

// Run an exit adapter's layer over `queries` consecutive tokens of each row; hidden is changed in place.
void run_adapter(const Network& network, int32_t layer, float* hidden, int32_t rows, int32_t queries,
                 const int64_t* starts, const Fused& fused, const Cache& cache);

// Write the keys and values of one layer for its input; hidden stays as it is.
void write_keys(const Network& network, const float* hidden, int32_t rows, int32_t queries, const int64_t* starts,
                const Cache& cache, int32_t layer);

// logits [tokens, V padded to whole panels] of hidden [tokens, D]: final norm and head.
void unembed(const Network& network, const float* hidden, int32_t tokens, float* logits);

}  // namespace layerskip
