#include "kernels/linear.h"

#include <algorithm>
#include <vector>

#include "kernels/bfloat16/product.h"
#include "kernels/float_product.h"
#include "kernels/formats.h"
#include "kernels/int8/inputs.h"
#include "kernels/int8/product.h"
#include "kernels/k_formats.h"
#include "kernels/k_product.h"
#include "kernels/parts.h"
#include "kernels/tiles.h"

namespace layerskip {
namespace {

// Sums of x over groups of inputs, which minima are multiplied by. Each token's are computed by themselves, so that they
// don't depend on the tokens beside it.
void sum_groups(const float* x, int64_t ldx, int tokens, const Part& part, float* sums) {
    for (int64_t token = part.first; token < part.last; ++token) {
        for (int64_t group = part.start; group < part.stop; ++group) {
            const float* from = x + token * ldx + group * kGroup;
            sums[group * tokens + token] =
                sum((load(from) + load(from + kLanes)) + (load(from + 2 * kLanes) + load(from + 3 * kLanes)));
        }
    }
}

bool has_minima(int32_t format) {
    switch (format) {
        case kQ4_0:
        case kQ4_1:
        case kQ5_1:
        case kQ4_K:
        case kQ5_K: return true;
        default: return false;
    }
}

// What a product reads of its inputs besides the numbers themselves.
enum class Preparation { kNothing, kGroupSums, kQuantized, kBFloat16 };

Preparation preparation_of(const Linear& w) {
    if (w.compute == kComputeInt8) return Preparation::kQuantized;
    if (w.compute == kComputeBFloat16) return Preparation::kBFloat16;
    return has_minima(w.format) ? Preparation::kGroupSums : Preparation::kNothing;
}

// Memory of the calling thread, until its next call.
void* own_memory(int64_t bytes) {
    constexpr int64_t kLine = 64;
    thread_local std::vector<char> memory;
    if (static_cast<int64_t>(memory.size()) < bytes + kLine) memory.resize(bytes + kLine);
    const auto place = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (kLine - place % kLine) % kLine;
}

}  // namespace

int64_t prepared_bytes(const Linear& w, int64_t tokens) {
    switch (preparation_of(w)) {
        case Preparation::kQuantized: return QuantizedInputs::bytes(w.inputs, tokens);
        case Preparation::kBFloat16: return bfloat16_bytes(w.inputs, tokens);
        case Preparation::kGroupSums: return tokens * (w.inputs / kGroup) * sizeof(float);
        default: return 0;
    }
}

int64_t most_prepared_bytes(int64_t inputs, int64_t tokens) {
    constexpr int64_t kSlack = 256;
    return tokens * (inputs + kGroup) * static_cast<int64_t>(sizeof(float)) + kSlack;
}

void prepare(const Linear& w, const float* x, int64_t ldx, int tokens, const Part& part, void* to) {
    switch (preparation_of(w)) {
        case Preparation::kQuantized:
            return QuantizedInputs::at(to, w.inputs, tokens)
                .quantize(x, ldx, part.first, part.last, part.start, part.stop);
        case Preparation::kBFloat16:
            return round_to_bfloat16(x, ldx, w.inputs, part.first, part.last, part.start * kGroup,
                                     std::min<int64_t>(part.stop * kGroup, w.inputs), to);
        case Preparation::kGroupSums: return sum_groups(x, ldx, tokens, part, static_cast<float*>(to));
        default: return;
    }
}

void multiply(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start, int stop,
              bool add, const void* prepared) {
    const Preparation preparation = preparation_of(w);
    if (prepared == nullptr && preparation != Preparation::kNothing) {
        void* memory = own_memory(prepared_bytes(w, tokens));
        prepare(w, x, ldx, tokens, {0, tokens, 0, (w.inputs + kGroup - 1) / kGroup}, memory);
        prepared = memory;
    }
    if (preparation == Preparation::kNothing) prepared = nullptr;  // what callers hand over then means nothing
    if (w.format == kStacked || w.format == kAlternating)
        return multiply_parts(w, x, ldx, tokens, y, ldy, start, stop, add, prepared);
    Tokens all{};
    all.x = x;
    all.ldx = ldx;
    all.y = y;
    all.ldy = ldy;
    all.add = add;
    all.all = tokens;
    if (preparation == Preparation::kGroupSums) all.group_sums = static_cast<const float*>(prepared);
    if (preparation == Preparation::kQuantized) {
        const auto inputs = QuantizedInputs::at(const_cast<void*>(prepared), w.inputs, tokens);
        all.numbers = inputs.numbers;
        all.steps = inputs.steps;
        all.group_sums = inputs.real_sums;
        all.negative_sums = inputs.negative_sums;
        return multiply_int8(w, all, tokens, start, stop);
    }
    if (preparation == Preparation::kBFloat16) return multiply_bfloat16(w, all, tokens, start, stop, prepared);
    switch (w.format) {
        case kFloat32: return multiply_as<FloatProduct<Float32>>(w, all, tokens, start, stop);
        case kBFloat16: return multiply_as<FloatProduct<BFloat16>>(w, all, tokens, start, stop);
        case kInt8: return multiply_as<FloatProduct<Int8>>(w, all, tokens, start, stop);
        case kFloat16: return multiply_as<FloatProduct<Float16>>(w, all, tokens, start, stop);
        case kQ8_0: return multiply_as<FloatProduct<Q8_0>>(w, all, tokens, start, stop);
        case kQ4_0: return multiply_as<FloatProduct<Q4_0>>(w, all, tokens, start, stop);
        case kQ4_1: return multiply_as<FloatProduct<Q4_1>>(w, all, tokens, start, stop);
        case kQ4_K: return multiply_as<FloatProduct<Q4_K>>(w, all, tokens, start, stop);
        case kQ5_0:
        case kQ5_1:
        case kQ5_K:
        case kQ6_K: return multiply_k(w, all, tokens, start, stop);
        default: return multiply_as<FloatProduct<Int4>>(w, all, tokens, start, stop);
    }
}

}  // namespace layerskip
