// A product with inputs and sums in float32.
#pragma once

#include <algorithm>

#include "kernels/tiles.h"

namespace layerskip {

// The numbers of tokens and panels of a tile: enough sums to hide a product's
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
                        add_product(sums[t][p], minimum, broadcast_wide(tokens.group_sums[group * tokens.all + t]));
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

}  // namespace layerskip
