// Tokens drawn from logits: temperature and filters, then the best score with noise on top.
//
// The same rules as layerskip/decoding/sampling.py with transformers' processors, and the same noise as
// layerskip/decoding/noise.py, up to the rounding of logarithms and sums.
#pragma once

#include <cstdint>

#include "vector.h"

namespace layerskip {

struct Sampling {
    float temperature;
    float top_p;            // 1: all tokens
    float min_p;            // 0: all
    int32_t top_k;          // 0: all
    const uint64_t* seeds;  // of each text
};

// Key of the noise at one place, `noise.make_key` with purpose TARGET and counter 0.
uint64_t noise_key(uint64_t seed, int64_t position);

// Standard Gumbel noise of kLanes tokens.
Vector gumbel(uint64_t key, WordVector tokens);

// Divide scores [count] by the temperature, and make -infinity of those that top-k, top-p and min-p leave out.
void filter(const Sampling& sampling, float* scores, int64_t count);

// Index of the best score with noise. tokens: ids of the scores; null: their numbers.
int64_t draw(const float* scores, int64_t count, uint64_t key, const int64_t* tokens);

// exp(score of `chosen`) / sum of exp(scores).
float probability(const float* scores, int64_t count, int64_t chosen);

extern "C" {

// `filter` of each of the rows of scores [rows, count].
void layerskip_filter(const Sampling* sampling, float* scores, int64_t rows, int64_t count, int32_t threads);

// out [rows, count], the noise of tokens 0..count-1 for each key.
void layerskip_gumbel(const uint64_t* keys, int64_t rows, int64_t count, float* out, int32_t threads);
}

}  // namespace layerskip
