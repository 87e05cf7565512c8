// Inputs of a product in eight bits: each group of 32 has a step between its numbers, its largest magnitude over 127.
#pragma once

#include <cstdint>

namespace layerskip {

// A group's numbers of all tokens lie side by side, then those of the next group.
struct QuantizedInputs {
    int8_t* numbers;         // [I / 32, tokens, 32], from -127 to 127
    float* steps;            // [I / 32, tokens]; not a number where an input isn't finite
    float* real_sums;        // [I / 32, tokens], sums of a group's numbers times its step
    int32_t* negative_sums;  // [I / 32, tokens], minus the sums of the numbers
    int64_t tokens;

    // Bytes of all of them, and where they are from `memory` on, which is aligned to 64 bytes.
    static int64_t bytes(int64_t inputs, int64_t tokens);
    static QuantizedInputs at(void* memory, int64_t inputs, int64_t tokens);

    // Fill in tokens first..last-1 of groups start..stop-1 of x [tokens, ldx]. Each group of a token by itself.
    void quantize(const float* x, int64_t ldx, int64_t first, int64_t last, int64_t start, int64_t stop) const;
};

}  // namespace layerskip
