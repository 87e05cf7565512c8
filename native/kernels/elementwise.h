// What a network computes beside products and attention: embeddings, norms, activations, rotations.
#pragma once

#include <cstdint>

#include "network.h"

namespace layerskip {

// to [size] = the embedding of a token.
void embed(const Embedding& embedding, int64_t token, int64_t size, float* to);

// y [size] = x / rms(x) * weight
void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* y);

// Sum of the squares of x [size], `size` being a multiple of kLanes.
float sum_of_squares(const float* x, int64_t size);

// x [size] = x * factor * weight, `size` being a multiple of kLanes.
void rescale(float* x, float factor, const float* weight, int64_t size);

// to [size] = activation(gate) * up, `size` being a multiple of kLanes.
void activate(const float* gate, const float* up, int64_t size, int32_t activation, float* to);

// to [head_dim] = x [head_dim], of which the first `rotary_dim` channels are rotated; `to` may be x.
void rotate(const float* x, const float* cosines, const float* sines, int64_t rotary_dim, int64_t head_dim, float* to);

// y [size] += factor * x
void add(const float* x, float factor, int64_t size, float* y);

// Whether all numbers [size] are finite, `size` being a multiple of kLanes.
bool all_finite(const float* numbers, int64_t size);

}  // namespace layerskip
