// Blocks of GGUF files in the formats of k_formats.h: how packing.cpp lays them out and reads them.
#pragma once

#include <cstdint>

#include "kernels/linear.h"

namespace layerskip {

// As `block_bytes`, `pack_blocks` and `unpack_block`, for Q5_0, Q5_1, Q4_K, Q5_K and Q6_K.
int64_t k_block_bytes(int32_t format);
void pack_k_blocks(const uint8_t* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales,
                   int64_t panel);
void unpack_k_block(const uint8_t* block, int32_t format, float* to);

}  // namespace layerskip
