#include "kernels/k_product.h"

#include "kernels/k_formats.h"

namespace layerskip {
namespace {

// As FloatProduct of linear.cpp, with units that have a scale each, and whose numbers are decoded four inputs at a time.
template <typename Type>
struct UnitProduct {
#if defined(__AVX512F__)
    static constexpr int kMostTokens = 6;  // of more, decoding twice costs less than what doesn't fit into registers
    static constexpr int most_panels(int tokens) { return tokens <= 2 ? 4 : 2; }
#else
    static constexpr int kMostTokens = 6;
    static constexpr int most_panels(int tokens) { return tokens == 1 ? 2 : 1; }
#endif
    static_assert(!Type::kMinimum || Type::kInputs == kGroup, "sums of x are those of 32 inputs");

    // Each sum is over a unit's inputs in ascending order.
    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_unit(const typename Type::Unit* unit, int64_t panel,
                                                               const float* x, int64_t ldx,
                                                               Wide (&sums)[Count][Panels]) {
#pragma GCC unroll 8
        for (int part = 0; part < Type::kInputs / 4; ++part) {
            WideWords words[Panels];
            for (int p = 0; p < Panels; ++p) words[p] = Type::template part<false>(unit[p * panel], part);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                for (int p = 0; p < Panels; ++p) {
                    const Wide weights = Type::decode(words[p], i);
                    for (int t = 0; t < Count; ++t)
                        add_product(sums[t][p], weights, broadcast_wide(x[t * ldx + 4 * part + i]));
                }
            }
        }
    }

    template <int Count, int Panels>
    static void tile(const Linear& w, const Tokens& tokens, int64_t panel) {
        const int64_t inputs = w.inputs, count = inputs / Type::kInputs;
        const auto* units = static_cast<const typename Type::Unit*>(w.panels) + panel * count;
        Wide sums[Count][Panels] = {};
        for (int64_t unit = 0; unit < count; ++unit) {
            const int64_t ahead = place_ahead<Type, Panels>(tokens, inputs, unit * Type::kInputs) / Type::kInputs;
            for (int p = 0; p < Panels; ++p) {
                fetch_unit(units + ahead + p * count);
                __builtin_prefetch(static_cast<const uint16_t*>(w.scales) +
                                   ((panel + p) * count + ahead) * Type::kHalves);
            }
            Wide partial[Count][Panels] = {};
            add_unit<Count, Panels>(units + unit, count, tokens.x + unit * Type::kInputs, tokens.ldx, partial);
            for (int p = 0; p < Panels; ++p) {
                const int64_t place = (panel + p) * count + unit;
                const Wide scale = Type::scale(w.scales, place);
                for (int t = 0; t < Count; ++t) add_product(sums[t][p], scale, partial[t][p]);
                if constexpr (Type::kMinimum) {
                    const Wide minimum = Type::minimum(w.scales, place);
                    for (int t = 0; t < Count; ++t)
                        add_product(sums[t][p], minimum, broadcast_wide(tokens.group_sums[unit * tokens.all + t]));
                }
            }
        }
        store_tile<Type>(w, tokens, panel, sums);
    }
};

}  // namespace

void multiply_k(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    switch (w.format) {
        case kQ5_0: return multiply_as<UnitProduct<Q5_0>>(w, tokens, count, start, stop);
        case kQ5_1: return multiply_as<UnitProduct<Q5_1>>(w, tokens, count, start, stop);
        case kQ5_K: return multiply_as<UnitProduct<Q5_K>>(w, tokens, count, start, stop);
        default: return multiply_as<UnitProduct<Q6_K>>(w, tokens, count, start, stop);
    }
}

}  // namespace layerskip
