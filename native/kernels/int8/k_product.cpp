#include "kernels/int8/k_product.h"

#include <cstring>
#include <vector>

#include "kernels/int8/dot.h"
#include "kernels/k_formats.h"

namespace layerskip {
namespace {

// As Int8Product of product.cpp. A unit has one scale and a whole-number sum of its own; in Q6_K, two of them have the
// same step between their inputs' numbers.
template <typename Type>
struct UnitInt8Product {
#if defined(__AVX512F__)
    static constexpr int kMostTokens = 6;
    static constexpr int most_panels(int tokens) { return tokens <= 2 ? 4 : 2; }
#else
    static constexpr int kMostTokens = 3;
    static constexpr int most_panels(int tokens) { return tokens == 1 ? 2 : 1; }
#endif
    static constexpr int kUnits = kGroup / Type::kInputs;  // of a group of inputs

    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_unit(const typename Type::Unit* unit, int64_t panel,
                                                               const int8_t* numbers,
                                                               Ints (&dots)[Count][Panels]) {
#pragma GCC unroll 8
        for (int part = 0; part < Type::kInputs / 4; ++part) {
            for (int p = 0; p < Panels; ++p) {
                const WideWords bytes = Type::template part<true>(unit[p * panel], part);
                for (int t = 0; t < Count; ++t) {
                    uint32_t four;
                    std::memcpy(&four, numbers + t * kGroup + 4 * part, sizeof four);
                    add_dot<false>(dots[t][p], bytes, four);
                }
            }
        }
    }

    // Minus what unsigned numbers add to a unit's sum.
    static int32_t start_of(const Tokens& tokens, int64_t place, int64_t part) {
        if constexpr (Type::kOffset == 0) return 0;
        return Type::kOffset * (kUnits == 1 ? tokens.negative_sums[place] : tokens.negative_halves[2 * place + part]);
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
            const int64_t first = unit / kUnits * tokens.all, part = unit % kUnits;
            Ints dots[Count][Panels];
            for (int t = 0; t < Count; ++t) {
                const Ints before = broadcast_shifted<0>(start_of(tokens, first + t, part));
                for (int p = 0; p < Panels; ++p) dots[t][p] = before;
            }
            add_unit<Count, Panels>(units + unit, count, tokens.numbers + first * kGroup + part * Type::kInputs, dots);
            for (int p = 0; p < Panels; ++p) {
                const int64_t place = (panel + p) * count + unit;
                const Wide scale = Type::scale(w.scales, place);
                for (int t = 0; t < Count; ++t) {
                    const int64_t group = first + t;
                    add_product(sums[t][p], to_wide(dots[t][p]) * scale, broadcast_wide(tokens.steps[group]));
                    if constexpr (Type::kMinimum)
                        add_product(sums[t][p], Type::minimum(w.scales, place),
                                    broadcast_wide(tokens.group_sums[group]));
                }
            }
        }
        store_tile<Type>(w, tokens, panel, sums);
    }
};

// Minus the sums of each half of a group of inputs.
const int32_t* sum_halves(const int8_t* numbers, int64_t count) {
    thread_local std::vector<int32_t> sums;
    if (static_cast<int64_t>(sums.size()) < count) sums.resize(count);
    for (int64_t half = 0; half < count; ++half) {
        int32_t sum = 0;
        for (int i = 0; i < kGroup / 2; ++i) sum -= numbers[half * (kGroup / 2) + i];
        sums[half] = sum;
    }
    return sums.data();
}

}  // namespace

void multiply_k_int8(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    switch (w.format) {
        case kQ5_0: return multiply_as<UnitInt8Product<Q5_0>>(w, tokens, count, start, stop);
        case kQ5_1: return multiply_as<UnitInt8Product<Q5_1>>(w, tokens, count, start, stop);
        case kQ5_K: return multiply_as<UnitInt8Product<Q5_K>>(w, tokens, count, start, stop);
        default: {
            Tokens all = tokens;
            all.negative_halves = sum_halves(all.numbers, count * static_cast<int64_t>(w.inputs) / (kGroup / 2));
            return multiply_as<UnitInt8Product<Q6_K>>(w, all, count, start, stop);
        }
    }
}

}  // namespace layerskip
