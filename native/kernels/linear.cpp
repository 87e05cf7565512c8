#include "kernels/linear.h"

#include <algorithm>
#include <vector>

#include "kernels/formats.h"
#include "kernels/int8/product.h"
#include "kernels/k_formats.h"
#include "kernels/k_product.h"
#include "kernels/parts.h"
#include "kernels/tiles.h"

namespace layerskip {
namespace {

// A product with inputs and sums in float32. The numbers of tokens and panels of a tile: enough sums to hide a product's
// latency, few enough for the registers, of which AVX-512 has twice as many, each twice as wide.
template <typename Type>
struct FloatProduct {
#if defined(__AVX512F__)
    static constexpr int kMostTokens = 9;
    static constexpr int most_panels(int tokens) { return tokens <= 5 ? 4 : 2; }
#else
    static constexpr int kMostTokens = 6;
    static constexpr int most_panels(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
#endif

    // A group of inputs of `Panels` panels, times `Count` tokens, added to `sums`. It is inlined at once, because GCC
    // takes fetching for having no effect, and drops it in functions that it inlines late.
    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_group(const typename Type::Unit* units, const Tokens& tokens,
                                                                int64_t inputs, int64_t start, int64_t stop,
                                                                Wide (&sums)[Count][Panels]) {
        constexpr int kInputs = Type::kInputs;
        const int64_t panel = panel_units<Type>(inputs);
        const auto* ahead = units + (place_ahead<Type, Panels>(tokens, inputs, start) - start) / kInputs;
        const auto add_input = [&](int64_t i, int n) __attribute__((always_inline)) {
            for (int p = 0; p < Panels; ++p) {
                const Wide weights = Type::decode(units[p * panel + i / kInputs], n);
                for (int t = 0; t < Count; ++t)
                    add_product(sums[t][p], weights, broadcast_wide(tokens.x[t * tokens.ldx + i + n]));
            }
        };
        int64_t i = start;
        for (; i + kInputs <= stop; i += kInputs) {
            for (int p = 0; p < Panels; ++p) __builtin_prefetch(ahead + p * panel + i / kInputs);
#pragma GCC unroll 8
            for (int n = 0; n < kInputs; ++n) add_input(i, n);
        }
        if constexpr (kInputs > 1 && !Type::kGrouped)
            for (int n = 0; i + n < stop; ++n) add_input(i, n);
    }

    // All inputs of formats with groups: sums of each group by itself, then times its scale, then plus its minimum.
    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_scaled_groups(const Linear& w,
                                                                        const typename Type::Unit* units,
                                                                        const Tokens& tokens, int64_t panel,
                                                                        Wide (&sums)[Count][Panels]) {
        const int64_t inputs = w.inputs, groups = inputs / kGroup;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t start = group * kGroup, ahead = place_ahead<Type, Panels>(tokens, inputs, start) / kGroup;
            Wide partial[Count][Panels] = {};
            add_group<Count, Panels>(units, tokens, inputs, start, start + kGroup, partial);
            for (int p = 0; p < Panels; ++p) {
                const int64_t first = (panel + p) * groups;
                __builtin_prefetch(static_cast<const uint16_t*>(w.scales) + (first + ahead) * Type::kHalves);
                const Wide scale = Type::scale(w.scales, first + group);
                for (int t = 0; t < Count; ++t) add_product(sums[t][p], scale, partial[t][p]);
                if constexpr (Type::kMinimum) {
                    const Wide minimum = Type::minimum(w.scales, first + group);
                    for (int t = 0; t < Count; ++t)
                        add_product(sums[t][p], minimum, broadcast_wide(tokens.group_sums[t * groups + group]));
                }
            }
        }
    }

    // `Panels` panels times `Count` tokens at once; their sums stay in registers.
    template <int Count, int Panels>
    static void tile(const Linear& w, const Tokens& tokens, int64_t panel) {
        const int64_t inputs = w.inputs;
        const auto* units = static_cast<const typename Type::Unit*>(w.panels) + panel * panel_units<Type>(inputs);
        Wide sums[Count][Panels] = {};
        if constexpr (Type::kGrouped) {
            add_scaled_groups<Count, Panels>(w, units, tokens, panel, sums);
        } else {
            for (int64_t start = 0; start < inputs; start += kGroup)
                add_group<Count, Panels>(units, tokens, inputs, start, std::min(start + kGroup, inputs), sums);
        }
        store_tile<Type>(w, tokens, panel, sums);
    }
};

// Sums of x over each group of inputs, which minima are multiplied by. Each token's are computed by themselves, so that
// they don't depend on the tokens beside it.
const float* sum_groups(const float* x, int64_t ldx, int tokens, int64_t groups) {
    thread_local std::vector<float> sums;
    if (static_cast<int64_t>(sums.size()) < tokens * groups) sums.resize(tokens * groups);
    for (int token = 0; token < tokens; ++token) {
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = x + token * ldx + group * kGroup;
            sums[token * groups + group] =
                sum((load(from) + load(from + kLanes)) + (load(from + 2 * kLanes) + load(from + 3 * kLanes)));
        }
    }
    return sums.data();
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

}  // namespace

void multiply(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start, int stop,
              bool add) {
    if (w.format == kStacked || w.format == kAlternating)
        return multiply_parts(w, x, ldx, tokens, y, ldy, start, stop, add);
    Tokens all{};
    all.x = x;
    all.ldx = ldx;
    all.y = y;
    all.ldy = ldy;
    all.add = add;
    if (w.compute == kComputeInt8) return multiply_int8(w, all, tokens, start, stop);
    if (has_minima(w.format)) all.group_sums = sum_groups(x, ldx, tokens, w.inputs / kGroup);
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
