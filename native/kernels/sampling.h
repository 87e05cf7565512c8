// Tokens sampled from logits: temperature and filters, then the best score with noise on top.
//
// The same rules as layerskip/model/choosing/sampling.py, and the same noise as layerskip/model/choosing/noise.py, up to the rounding of
// logarithms and sums.
#pragma once

#include <cstdint>

namespace layerskip {

// Rules of sampling, [B] values each: one for every row.
struct Sampling {
    const float* temperatures;  // 0: the row takes its likeliest token, and its other values don't matter
    const float* top_p;         // 1: all tokens
    const float* min_p;         // 0: all
    const int32_t* top_k;       // 0: all
    const uint64_t* seeds;

    bool samples(int64_t row) const { return temperatures[row] > 0; }
};

// Key of the noise at one place, `noise.make_key` with purpose TARGET and counter 0.
uint64_t noise_key(uint64_t seed, int64_t position);

// out [count], standard Gumbel noise of `count` tokens from `token` on.
void gumbel(uint64_t key, int64_t token, int64_t count, float* out);

// Whether some score [count] isn't a number: filters order scores, which needs numbers.
bool any_not_a_number(const float* scores, int64_t count);

// By the rules of `row`: divide scores [count] by the temperature, and make -infinity of those that top-k, top-p and
// min-p leave out. Without a temperature they stay as they are.
void filter(const Sampling& sampling, int64_t row, float* scores, int64_t count);

// Index of the best of `count` scores, of several the first.
int64_t likeliest(const float* scores, int64_t count);

// Index of the best score with noise. tokens: ids of the scores; null: their numbers.
int64_t sample(const float* scores, int64_t count, uint64_t key, const int64_t* tokens);

// exp(score of `chosen`) / sum of exp(scores).
float probability(const float* scores, int64_t count, int64_t chosen);

}  // namespace layerskip
