// Inputs of a product in eight bits: each group of 32 has a step between its numbers, its largest magnitude over 127.
#pragma once

#include <cstdint>

namespace layerskip {

struct QuantizedInputs {
    const int8_t* numbers;   // [tokens, I], from -127 to 127
    const float* steps;      // [tokens, I / 32]; not a number where an input isn't finite
    const int32_t* sums;     // [tokens, I / 32], of the numbers
    const float* real_sums;  // [tokens, I / 32], sums times steps
};

// Of x [tokens, ldx], whose I inputs are a multiple of 32. Each token's are computed by themselves. What is returned is
// the calling thread's, until its next call.
QuantizedInputs quantize_inputs(const float* x, int64_t ldx, int tokens, int64_t inputs);

}  // namespace layerskip
