// y = x W^T for weights in five or six bits (k_formats.h), with inputs in eight bits.
#pragma once

#include "kernels/tiles.h"

namespace layerskip {

// As `multiply_int8`, for Q5_0, Q5_1, Q5_K and Q6_K, with inputs that have been quantized.
void multiply_k_int8(const Linear& w, const Tokens& tokens, int count, int start, int stop);

}  // namespace layerskip
