// y = x W^T with inputs in eight bits, and exact sums of each group of 32 inputs in 32-bit integers.
//
// Groups are added up in float32 in ascending order, so that a token's result doesn't depend on the tokens beside it,
// nor on the instruction set.
#pragma once

#include "kernels/tiles.h"

namespace layerskip {

// As `multiply`, for formats in eight or four bits, and inputs that are a multiple of 32.
void multiply_int8(const Linear& w, const Tokens& tokens, int count, int start, int stop);

}  // namespace layerskip
