// Products whose weight is several weights in formats of their own: `Linear::panels` has them.
#pragma once

#include "kernels/linear.h"

namespace layerskip {

// As `multiply`, for kStacked and kAlternating.
void multiply_parts(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start, int stop,
                    bool add, const void* prepared);

}  // namespace layerskip
