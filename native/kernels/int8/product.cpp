#include "kernels/int8/product.h"

#include <cstring>

#include "kernels/int8/dot.h"
#include "kernels/int8/k_product.h"
#include "kernels/k_formats.h"

namespace layerskip {
namespace {

// Four inputs' weights as unsigned bytes, for each format. They are 2^kOffsetBits greater than the weights where `kOffset`.
struct BytesOf {
    static constexpr bool kOffset = kByteOffset != 0;
    static constexpr int kOffsetBits = 7;
    static constexpr bool kFull = true;      // eight bits, not only seven
    static constexpr bool kMinimum = false;  // besides what the offset takes away
    static WideWords bytes(const uint32_t* words, int) { return load_wide_words(words) ^ kByteFlip; }
};

template <bool Offset, uint32_t Flipped>
struct NibblesOf {
    static constexpr bool kOffset = Offset;
    static constexpr int kOffsetBits = 3;
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
struct Four<Int4> : NibblesOf<true, 0x08080808u> {};  // signs: -8 to 7 become 0 to 15
template <>
struct Four<Q4_0> : NibblesOf<true, 0> {};
template <>
struct Four<Q4_1> : NibblesOf<false, 0> {
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

    using Bytes = Four<Type>;
    using Unit = typename Type::Unit;
    static constexpr int kWords = kGroup / 4;  // of a group's inputs, for each output
    static constexpr bool kAsFloats = Type::kGrouped && !Bytes::kOffset;  // sums begin with `start_as_floats`

    // What a group's sums begin with: it takes away what the offset of the weights adds.
    static Ints first_sum(const Tokens& tokens, int64_t place) {
        if constexpr (kAsFloats) return start_as_floats();
        if constexpr (!Bytes::kOffset) return Ints{};
        return broadcast_shifted<Bytes::kOffsetBits>(tokens.negative_sums[place]);
    }

    static uint32_t four_numbers(const Tokens& tokens, int64_t place, int word) {
        uint32_t numbers;
        std::memcpy(&numbers, tokens.numbers + place * kGroup + 4 * word, sizeof numbers);
        return numbers;
    }

    // sum += a group's sum for a panel, times scale and step, and its minimum.
    static void add_group_sum(Wide& sum, const Linear& w, const Tokens& tokens, int64_t place, int64_t group, Ints dot) {
        Wide value;
        if constexpr (kAsFloats) value = scaled_as_floats(dot, Type::scale(w.scales, group));
        else if constexpr (Type::kGrouped) value = to_wide(dot) * Type::scale(w.scales, group);
        else value = to_wide(dot);
        add_product(sum, value, broadcast_wide(tokens.steps[place]));
        if constexpr (Bytes::kMinimum)
            add_product(sum, Type::minimum(w.scales, group), broadcast_wide(tokens.group_sums[place]));
    }

    // Exact sums of one group, for `Panels` panels and `Count` tokens.
    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_group(const Unit* units, const Tokens& tokens,
                                                                int64_t inputs, int64_t group,
                                                                Ints (&dots)[Count][Panels]) {
        constexpr int kInputs = Type::kInputs;
        const int64_t panel = inputs / kInputs, start = group * kGroup;
        const auto* ahead = units + (place_ahead<Type, Panels>(tokens, inputs, start) - start) / kInputs;
#pragma GCC unroll 8
        for (int64_t i = start; i < start + kGroup; i += kInputs) {
            for (int p = 0; p < Panels; ++p) __builtin_prefetch(ahead + p * panel + i / kInputs);
#pragma GCC unroll 2
            for (int part = 0; part < kInputs / 4; ++part) {
                for (int p = 0; p < Panels; ++p) {
                    const WideWords bytes = Bytes::bytes(units[p * panel + i / kInputs].values, part);
                    for (int t = 0; t < Count; ++t)
                        add_dot<Bytes::kFull>(dots[t][p], bytes,
                                              four_numbers(tokens, group * tokens.all + t, (i - start) / 4 + part));
                }
            }
        }
    }

    template <int Panels>
    static void fetch_scales(const Linear& w, int64_t panel, int64_t ahead) {
        const int64_t groups = w.inputs / kGroup;
        for (int p = 0; Type::kGrouped && p < Panels; ++p)
            __builtin_prefetch(static_cast<const uint16_t*>(w.scales) + ((panel + p) * groups + ahead) * Type::kHalves);
    }

    template <int Count, int Panels>
    static void tile(const Linear& w, const Tokens& tokens, int64_t panel) {
        const int64_t inputs = w.inputs, groups = inputs / kGroup;
        const auto* units = static_cast<const Unit*>(w.panels) + panel * inputs / Type::kInputs;
        Wide sums[Count][Panels] = {};
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t place = group * tokens.all;
            Ints dots[Count][Panels];
            for (int t = 0; t < Count; ++t)
                for (int p = 0; p < Panels; ++p) dots[t][p] = first_sum(tokens, place + t);
            add_group<Count, Panels>(units, tokens, inputs, group, dots);
            fetch_scales<Panels>(w, panel, place_ahead<Type, Panels>(tokens, inputs, group * kGroup) / kGroup);
            for (int p = 0; p < Panels; ++p)
                for (int t = 0; t < Count; ++t)
                    add_group_sum(sums[t][p], w, tokens, place + t, (panel + p) * groups + group, dots[t][p]);
        }
        store_tile<Type>(w, tokens, panel, sums);
    }

#if defined(__AVX512F__)
    // With many tokens, a group's bytes stay in registers while all tokens are multiplied with them, and sums lie in the
    // first cache. From this many tokens on that is faster.
    static constexpr int kMany = 7;
    static constexpr int kSums = 64;  // tokens

    template <int Panels>
    using Group = WideWords[kWords][Panels];
    template <int Panels>
    using Sums = Wide[kSums][Panels];

    // A group's bytes times tokens first..first+Count-1.
    template <int Count, int Panels>
    __attribute__((always_inline)) static inline void add_tokens(const Linear& w, const Tokens& tokens, int first,
                                                                 int64_t panel, int64_t group,
                                                                 const Group<Panels>& bytes, Sums<Panels>& sums) {
        const int64_t groups = w.inputs / kGroup, place = group * tokens.all + first;
        Ints dots[Count][Panels];
        for (int t = 0; t < Count; ++t)
            for (int p = 0; p < Panels; ++p) dots[t][p] = first_sum(tokens, place + t);
#pragma GCC unroll 8
        for (int word = 0; word < kWords; ++word)
            for (int t = 0; t < Count; ++t)
                for (int p = 0; p < Panels; ++p)
                    add_dot<Bytes::kFull>(dots[t][p], bytes[word][p], four_numbers(tokens, place + t, word));
        for (int t = 0; t < Count; ++t)
            for (int p = 0; p < Panels; ++p)
                add_group_sum(sums[first + t][p], w, tokens, place + t, (panel + p) * groups + group, dots[t][p]);
    }

    // All tokens, `Most` at a time, and those that are left over.
    template <int Most, int Panels>
    __attribute__((always_inline)) static inline void add_all(const Linear& w, const Tokens& tokens, int first,
                                                              int count, int64_t panel, int64_t group,
                                                              const Group<Panels>& bytes, Sums<Panels>& sums) {
        for (; first + Most <= count; first += Most) add_tokens<Most, Panels>(w, tokens, first, panel, group, bytes, sums);
        if constexpr (Most > 1) add_all<Most - 1, Panels>(w, tokens, first, count, panel, group, bytes, sums);
    }

    template <int Panels>
    static void strip(const Linear& w, const Tokens& tokens, int count, int64_t panel) {
        const int64_t inputs = w.inputs, groups = inputs / kGroup, step = inputs / Type::kInputs;
        const auto* units = static_cast<const Unit*>(w.panels) + panel * step;
        Sums<Panels> sums;
        for (int t = 0; t < count; ++t)
            for (int p = 0; p < Panels; ++p) sums[t][p] = Wide{};
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t ahead = place_ahead<Type, Panels>(tokens, inputs, group * kGroup);
            Group<Panels> bytes;
            constexpr int kUnits = kGroup / Type::kInputs, kParts = Type::kInputs / 4;
            for (int i = 0; i < kUnits; ++i) {
                for (int p = 0; p < Panels; ++p) {
                    __builtin_prefetch(units + p * step + ahead / Type::kInputs + i);
                    for (int part = 0; part < kParts; ++part)
                        bytes[kParts * i + part][p] = Bytes::bytes(units[p * step + group * kUnits + i].values, part);
                }
            }
            fetch_scales<Panels>(w, panel, ahead / kGroup);
            add_all<8 / Panels, Panels>(w, tokens, 0, count, panel, group, bytes, sums);
        }
        for (int t = 0; t < count; ++t) {
            Wide of_token[1][Panels];
            for (int p = 0; p < Panels; ++p) of_token[0][p] = sums[t][p];
            store_tile<Type>(w, tokens.from(t), panel, of_token);
        }
    }

    static void multiply_many(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
        const int blocks = (count + kSums - 1) / kSums;
        for (int panel = start; panel < stop; panel += 2) {
            for (int block = 0; block < blocks; ++block) {
                int from, to;
                share(count, block, blocks, from, to);
                Tokens part = tokens.from(from);
                part.fetch_panels = blocks > 1 && block == blocks - 1;
                if (panel + 2 <= stop) strip<2>(w, part, to - from, panel);
                else strip<1>(w, part, to - from, panel);
            }
        }
    }
#endif

    static void multiply(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
#if defined(__AVX512F__)
        if (count >= kMany) return multiply_many(w, tokens, count, start, stop);
#endif
        multiply_as<Int8Product>(w, tokens, count, start, stop);
    }
};

}  // namespace

void multiply_int8(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    switch (w.format) {
        case kInt8: return Int8Product<Int8>::multiply(w, tokens, count, start, stop);
        case kQ8_0: return Int8Product<Q8_0>::multiply(w, tokens, count, start, stop);
        case kQ4_0: return Int8Product<Q4_0>::multiply(w, tokens, count, start, stop);
        case kQ4_1: return Int8Product<Q4_1>::multiply(w, tokens, count, start, stop);
        case kQ4_K: return Int8Product<Q4_K>::multiply(w, tokens, count, start, stop);
        case kQ5_0:
        case kQ5_1:
        case kQ5_K:
        case kQ6_K: return multiply_k_int8(w, tokens, count, start, stop);
        default: return Int8Product<Int4>::multiply(w, tokens, count, start, stop);
    }
}

}  // namespace layerskip
