// y = x W^T + b for few tokens, with W in panels: 16 outputs side by side, one input after the other.
//
// Every output is one sum over the inputs in ascending order, however many tokens or panels are computed together: a
// token's result doesn't depend, to the last bit, on the tokens beside it. This makes speculation lossless in float32.
#pragma once

#include <cstdint>

namespace layerskip {

// The same for every instruction set, so that packed weights and orders of summation are the same too.
constexpr int kPanel = 16;  // outputs of a panel
constexpr int kGroup = 32;  // inputs that share a scale in int4 and in blocks

enum Format : int32_t {
    kFloat32 = 0,
    kBFloat16 = 1,
    kInt8 = 2,
    kInt4 = 3,
    kFloat16 = 4,
    kQ8_0 = 5,  // blocks of GGUF files, the same numbers laid out in panels
    kQ4_0 = 6,
    kQ4_1 = 7,
    kQ5_0 = 8,
    kQ5_1 = 9,
    kQ4_K = 10,
    kQ5_K = 11,
    kQ6_K = 12,
    kStacked = 13,      // several weights, one below the other, in formats of their own
    kAlternating = 14,  // two weights whose panels alternate, in formats of their own
};

// How a product is computed: with inputs as they are, in eight bits (int8/product.h) or in bfloat16
// (bfloat16/product.h), which are other numbers.
enum Compute : int32_t { kComputeFloat32 = 0, kComputeInt8 = 1, kComputeBFloat16 = 2 };

struct Linear {
    const void* panels;   // [O / 16, I, ...], laid out by pack(); kStacked, kAlternating: Linear [number of parts]
    const void* scales;   // int8: float [O]; int4: pairs of bfloat16 [O / 16, I / 32, 8]; blocks: float16
                          // [O / 16, I / 32, 16], for q4_1 and q5_1 [O / 16, I / 32, 2, 16]; q4_K, q5_K: SuperScales
                          // [O / 16, I / 256]; q6_K: SixBitScales [O / 16, I / 256]
    const float* bias;    // [O] or null
    int32_t inputs;       // a multiple of 32 in int4 and in blocks, of 256 in q4_K, q5_K and q6_K
    int32_t outputs;      // a multiple of 16: the last panel is filled up with zeros
    int32_t format;
    int32_t compute;
};

// Bytes of all panels, without scales.
int64_t packed_bytes(int32_t inputs, int32_t outputs, int32_t format);

// Lay out one panel from weight [count, I] in float32, `count` being 16 or fewer outputs; the others become zeros.
// Scales are written in formats that have some.
void pack(const float* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales, int64_t panel);

// Lay out one panel from weight [count, blocks of a row] (those of GGUF files, or int4), or from rows of int8.
void pack_blocks(const uint8_t* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales,
                 int64_t panel);

// Inputs of a block: 32 or 256.
int64_t block_inputs(int32_t format);

// The numbers that a block stands for.
void unpack_block(const uint8_t* block, int32_t format, float* to);

// Bytes of a block.
int64_t block_bytes(int32_t format);

// Bytes of an output of a weight for `pack_blocks`: whole blocks, or for int8 a float scale and the numbers.
int64_t blocks_row_bytes(int32_t format, int64_t inputs);

// Whether float16 holds all of these numbers exactly.
bool fits_float16(const float* numbers, int64_t count);

// Whether bfloat16 holds all of these numbers exactly.
bool fits_bfloat16(const float* numbers, int64_t count);

// A part of a product's inputs.
struct Part {
    int64_t first, last;   // tokens
    int64_t start, stop;   // groups of inputs
};

// What products read besides the inputs themselves: inputs in other numbers, sums of groups. Members of a team prepare
// a part of it each. Bytes, 0 where the product reads nothing else:
int64_t prepared_bytes(const Linear& w, int64_t tokens);

// At most so many for this number of inputs.
int64_t most_prepared_bytes(int64_t inputs, int64_t tokens);

// Fill in a part of it, for x [tokens, ldx]. to: prepared_bytes(), aligned to 64 bytes.
void prepare(const Linear& w, const float* x, int64_t ldx, int tokens, const Part& part, void* to);

// Panels start..stop-1 of y = x W^T + b, or y += where `add`. x: [tokens, ldx], y: [tokens, ldy]. prepared: from
// prepare(), complete; null: it is done here.
void multiply(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start, int stop,
              bool add, const void* prepared = nullptr);

// Which of `count` things member `member` of `size` does: [start, stop).
inline void share(int count, int member, int size, int& start, int& stop) {
    start = static_cast<int>(static_cast<int64_t>(count) * member / size);
    stop = static_cast<int>(static_cast<int64_t>(count) * (member + 1) / size);
}

}  // namespace layerskip
