#include "kernels/int8/product.h"

#include <cstring>

#include "kernels/int8/dot.h"
#include "kernels/int8/inputs.h"
#include "kernels/int8/k_product.h"
#include "kernels/k_formats.h"

namespace layerskip {
namespace {

// Four inputs' weights as unsigned bytes, which are `kOffset` greater than the weights, for each format.
struct BytesOf {
    static constexpr int32_t kOffset = 128;
    static constexpr bool kFull = true;      // eight bits, not only seven
    static constexpr bool kMinimum = false;  // besides what the offset takes away
    static WideWords bytes(const uint32_t* words, int) { return load_wide_words(words) ^ 0x80808080u; }
};

template <int32_t Offset, uint32_t Flipped>
struct NibblesOf {
    static constexpr int32_t kOffset = Offset;
    static constexpr bool kFull = false;
    static constexpr bool kMinimum = false;
    static WideWords bytes(const uint32_t* words, int half) {
        return (load_wide_words(words) >> 4 * half & 0x0f0f0f0fu) ^ Flipped;
    }
};

template <typename Type>
struct Four;
template <>
struct Four<Int8> : BytesOf {};
template <>
struct Four<Q8_0> : BytesOf {};
template <>
struct Four<Int4> : NibblesOf<8, 0x08080808u> {};  // signs: -8 to 7 become 0 to 15
template <>
struct Four<Q4_0> : NibblesOf<8, 0> {};
template <>
struct Four<Q4_1> : NibblesOf<0, 0> {
    static constexpr bool kMinimum = true;
};
template <>
struct Four<Q4_K> : Four<Q4_1> {};

template <typename Type>
struct Int8Product {
#if defined(__AVX512F__)
    static constexpr int kMostTokens = 6;
    static constexpr int most_panels(int tokens) { return tokens <= 2 ? 4 : 2; }
#else
    static constexpr int kMostTokens = 3;
    static constexpr int most_panels(int tokens) { return tokens == 1 ? 2 : 1; }
#endif

    // Exact sums of one group, for `Panels` panels and `Count` tokens.
    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_group(const typename Type::Unit* units, const Tokens& tokens,
                                                                int64_t inputs, int64_t start,
                                                                Ints (&dots)[Count][Panels]) {
        constexpr int kInputs = Type::kInputs;
        const int64_t panel = inputs / kInputs;
        const auto* ahead = units + (place_ahead<Type, Panels>(tokens, inputs, start) - start) / kInputs;
#pragma GCC unroll 8
        for (int64_t i = start; i < start + kGroup; i += kInputs) {
            for (int p = 0; p < Panels; ++p) __builtin_prefetch(ahead + p * panel + i / kInputs);
#pragma GCC unroll 2
            for (int part = 0; part < kInputs / 4; ++part) {
                for (int p = 0; p < Panels; ++p) {
                    const WideWords bytes = Four<Type>::bytes(units[p * panel + i / kInputs].values, part);
                    for (int t = 0; t < Count; ++t) {
                        uint32_t numbers;
                        std::memcpy(&numbers, tokens.numbers + t * inputs + i + 4 * part, sizeof numbers);
                        add_dot<Four<Type>::kFull>(dots[t][p], bytes, numbers);
                    }
                }
            }
        }
    }

    template <int Count, int Panels>
    static void tile(const Linear& w, const Tokens& tokens, int64_t panel) {
        const int64_t inputs = w.inputs, groups = inputs / kGroup;
        const auto* units = static_cast<const typename Type::Unit*>(w.panels) + panel * inputs / Type::kInputs;
        Wide sums[Count][Panels] = {};
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t start = group * kGroup, ahead = place_ahead<Type, Panels>(tokens, inputs, start) / kGroup;
            Ints dots[Count][Panels];
            for (int t = 0; t < Count; ++t) {
                const Ints before = broadcast_ints(-Four<Type>::kOffset * tokens.number_sums[t * groups + group]);
                for (int p = 0; p < Panels; ++p) dots[t][p] = before;
            }
            add_group<Count, Panels>(units, tokens, inputs, start, dots);
            for (int p = 0; p < Panels; ++p) {
                const int64_t first = (panel + p) * groups;
                if constexpr (Type::kGrouped)
                    __builtin_prefetch(static_cast<const uint16_t*>(w.scales) + (first + ahead) * Type::kHalves);
                for (int t = 0; t < Count; ++t) {
                    const int64_t place = t * groups + group;
                    Wide value = to_wide(dots[t][p]);
                    if constexpr (Type::kGrouped) value = value * Type::scale(w.scales, first + group);
                    add_product(sums[t][p], value, broadcast_wide(tokens.steps[place]));
                    if constexpr (Four<Type>::kMinimum)
                        add_product(sums[t][p], Type::minimum(w.scales, first + group),
                                    broadcast_wide(tokens.group_sums[place]));
                }
            }
        }
        store_tile<Type>(w, tokens, panel, sums);
    }
};

}  // namespace

void multiply_int8(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    const QuantizedInputs inputs = quantize_inputs(tokens.x, tokens.ldx, count, w.inputs);
    Tokens all = tokens;
    all.numbers = inputs.numbers;
    all.steps = inputs.steps;
    all.number_sums = inputs.sums;
    all.group_sums = inputs.real_sums;
    switch (w.format) {
        case kInt8: return multiply_as<Int8Product<Int8>>(w, all, count, start, stop);
        case kQ8_0: return multiply_as<Int8Product<Q8_0>>(w, all, count, start, stop);
        case kQ4_0: return multiply_as<Int8Product<Q4_0>>(w, all, count, start, stop);
        case kQ4_1: return multiply_as<Int8Product<Q4_1>>(w, all, count, start, stop);
        case kQ4_K: return multiply_as<Int8Product<Q4_K>>(w, all, count, start, stop);
        case kQ5_0:
        case kQ5_1:
        case kQ5_K:
        case kQ6_K: return multiply_k_int8(w, all, count, start, stop);
        default: return multiply_as<Int8Product<Int4>>(w, all, count, start, stop);
    }
}

}  // namespace layerskip
