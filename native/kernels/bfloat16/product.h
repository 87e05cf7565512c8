// y = x W^T with weights and inputs in bfloat16, whose products are exact, and sums in float32.
//
// Pairs of inputs are added up in ascending order, the second of a pair before the first, each time rounded to the
// nearest: this is what VDPBF16PS does, so that other instruction sets give the same bits. Only numbers below 2^-126,
// which that instruction takes for zeros, may differ.
#pragma once

#include "kernels/tiles.h"

namespace layerskip {

// Bytes of the inputs of `tokens` tokens in the form that `multiply_bfloat16` reads.
int64_t bfloat16_bytes(int64_t inputs, int64_t tokens);

// Round inputs start..stop-1, whole pairs, of tokens first..last-1 of x [tokens, ldx]; `to` is as long as bfloat16_bytes().
void round_to_bfloat16(const float* x, int64_t ldx, int64_t inputs, int64_t first, int64_t last, int64_t start,
                       int64_t stop, void* to);

// As `multiply`, for weights in bfloat16 with an even number of inputs, `rounded` being those of all tokens.
void multiply_bfloat16(const Linear& w, const Tokens& tokens, int count, int start, int stop, const void* rounded);

}  // namespace layerskip
