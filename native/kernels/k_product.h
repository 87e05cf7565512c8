// y = x W^T for weights in five or six bits (k_formats.h), with inputs and sums in float32.
#pragma once

#include "kernels/tiles.h"

namespace layerskip {

// As `multiply`, for Q5_0, Q5_1, Q5_K and Q6_K. Formats with minima need `tokens.group_sums`.
void multiply_k(const Linear& w, const Tokens& tokens, int count, int start, int stop);

}  // namespace layerskip
