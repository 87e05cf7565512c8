// Blocks of GGUF files with five or six bits for each weight, and with scales in two levels.
//
// Q4_K, Q5_K and Q6_K have a float16 scale (and, but for Q6_K, a float16 minimum) for 256 inputs, and small whole numbers
// for each 32 of them, 16 in Q6_K, that these are multiplied by. Such a product is exact in float32, and so is its product
// with a weight's number. The numbers take a byte each, where files pack them in six bits.
//
// What a fifth and a sixth bit add to `Nibbles` lies in words of their own. A part is four inputs, whose numbers become the
// four bytes of a word for each output.
#pragma once

#include <cstdint>

#include "kernels/formats.h"
#include "kernels/int8/dot.h"

namespace layerskip {

constexpr int kSuper = 256;  // inputs of a block with two levels of scales

#if defined(__AVX512F__)

inline Wide load_wide_bytes(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Wide)_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
}

inline Wide load_wide_bytes(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Wide)_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, bytes));
}

// The lowest five bits of each word, which is shifted right by `shift`: from 0 to 31, or from -16 to 15.
template <bool Signed>
inline Wide five_bits(WideWords words, int shift) {
    const float last = Signed ? -16 : 16;
    const Wide numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Wide)_mm512_permutex2var_ps((__m512)numbers, (__m512i)(words >> shift), (__m512)(numbers + last));
}

// The lowest six bits, from -32 to 31.
inline Wide six_bits(WideWords words, int shift) {
    typedef int32_t Numbers __attribute__((vector_size(64)));
    return (Wide)_mm512_maskz_cvtepi32_ps(kAll, (__m512i)((Numbers)(words << (26 - shift)) >> 26));
}

#else

inline WideWords operator|(WideWords a, WideWords b) { return {a.low | b.low, a.high | b.high}; }
inline WideWords operator<<(WideWords a, int b) { return {a.low << b, a.high << b}; }

inline Vector load_bytes(const uint8_t* from) {
#if defined(__AVX2__)
    return to_float((IntVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Vector numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = from[i];
    return numbers;
#endif
}

inline Vector load_bytes(const int8_t* from) {
#if defined(__AVX2__)
    return to_float((IntVector)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Vector numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = from[i];
    return numbers;
#endif
}

inline Wide load_wide_bytes(const uint8_t* from) { return {load_bytes(from), load_bytes(from + kLanes)}; }
inline Wide load_wide_bytes(const int8_t* from) { return {load_bytes(from), load_bytes(from + kLanes)}; }

// The lowest five bits of each word, which is shifted right by `shift`: from 0 to 31, or from -16 to 15.
template <bool Signed>
inline Wide five_bits(WideWords words, int shift) {
    const auto half = [shift](WordVector part) {
        if constexpr (Signed) return to_float((IntVector)(part << (27 - shift)) >> 27);
        return to_float((IntVector)(part >> shift & 0x1f));
    };
    return {half(words.low), half(words.high)};
}

// The lowest six bits, from -32 to 31.
inline Wide six_bits(WideWords words, int shift) {
    const auto half = [shift](WordVector part) { return to_float((IntVector)(part << (26 - shift)) >> 26); };
    return {half(words.low), half(words.high)};
}

#endif

// Scale and minimum of 256 inputs, and what they are multiplied by for each 32. Minima are kept with the opposite sign,
// as they are added.
struct SuperScales {
    uint16_t scale[kPanel], minimum[kPanel];
    uint8_t scales[kSuper / kGroup][kPanel], minima[kSuper / kGroup][kPanel];

    static Wide scale_of(const void* scales, int64_t group) {
        const auto& all = static_cast<const SuperScales*>(scales)[group / (kSuper / kGroup)];
        return load_wide_halves(all.scale) * load_wide_bytes(all.scales[group % (kSuper / kGroup)]);
    }
    static Wide minimum_of(const void* scales, int64_t group) {
        const auto& all = static_cast<const SuperScales*>(scales)[group / (kSuper / kGroup)];
        return load_wide_halves(all.minimum) * load_wide_bytes(all.minima[group % (kSuper / kGroup)]);
    }
};

struct Q4_K : Nibbles {
    static constexpr int kHalves = sizeof(SuperScales) / 2 / (kSuper / kGroup);
    static constexpr bool kMinimum = true;
    static Wide decode(const Unit& unit, int input) { return nibbles(unit.values, nibble_shift(input)); }
    static Wide scale(const void* scales, int64_t group) { return SuperScales::scale_of(scales, group); }
    static Wide minimum(const void* scales, int64_t group) { return SuperScales::minimum_of(scales, group); }
};

// Five bits: bit p of byte b of `high` is that of input 4 p + b. Signed numbers are in two's complement.
template <bool Signed>
struct FiveBits : PlainFormat {
    static constexpr int kInputs = kGroup;  // of a unit, which has one scale
    static constexpr bool kGrouped = true;
    static constexpr int32_t kOffset = Signed ? 16 : 0;  // what unsigned numbers are greater by
    struct Unit {
        uint32_t low[kInputs / 8][kPanel];
        uint32_t high[kPanel];
    };
    // The numbers of a part; unsigned ones where `Flip`.
    template <bool Flip>
    static WideWords part(const Unit& unit, int part) {
        WideWords high = load_wide_words(unit.high);
        if constexpr (Flip && Signed) high = high ^ 0xffffffffu;
        const WideWords fifth = part <= 4 ? high << (4 - part) : high >> (part - 4);
        return (load_wide_words(unit.low[part / 2]) >> part % 2 * 4 & 0x0f0f0f0fu) | (fifth & 0x10101010u);
    }
    static Wide decode(WideWords part, int input) { return five_bits<Signed>(part, 8 * input); }
};

struct Q5_0 : FiveBits<true> {  // scale * number, from -16 to 15
    static Wide scale(const void* scales, int64_t group) { return Q8_0::scale(scales, group); }
};

struct Q5_1 : FiveBits<false> {
    static constexpr int kHalves = 2 * kPanel;
    static constexpr bool kMinimum = true;
    static Wide scale(const void* scales, int64_t group) { return Q4_1::scale(scales, group); }
    static Wide minimum(const void* scales, int64_t group) { return Q4_1::minimum(scales, group); }
};

struct Q5_K : FiveBits<false> {
    static constexpr int kHalves = Q4_K::kHalves;
    static constexpr bool kMinimum = true;
    static Wide scale(const void* scales, int64_t group) { return SuperScales::scale_of(scales, group); }
    static Wide minimum(const void* scales, int64_t group) { return SuperScales::minimum_of(scales, group); }
};

// Scale of 256 inputs, and what it is multiplied by for each 16.
struct SixBitScales {
    uint16_t scale[kPanel];
    int8_t scales[kSuper / 16][kPanel];
};

// Six bits in two's complement: bits 2 p and 2 p + 1 of byte b of `high` are those of input 4 p + b.
struct Q6_K : PlainFormat {
    static constexpr int kInputs = 16;
    static constexpr bool kGrouped = true;
    static constexpr int kHalves = sizeof(SixBitScales) / 2 / (kSuper / kInputs);
    static constexpr int32_t kOffset = 32;
    struct Unit {
        uint32_t low[kInputs / 8][kPanel];
        uint32_t high[kPanel];
    };
    template <bool Flip>
    static WideWords part(const Unit& unit, int part) {
        WideWords high = load_wide_words(unit.high);
        if constexpr (Flip) high = high ^ 0xaaaaaaaau;
        const WideWords upper = part <= 2 ? high << (4 - 2 * part) : high >> (2 * part - 4);
        return (load_wide_words(unit.low[part / 2]) >> part % 2 * 4 & 0x0f0f0f0fu) | (upper & 0x30303030u);
    }
    static Wide decode(WideWords part, int input) { return six_bits(part, 8 * input); }
    static Wide scale(const void* scales, int64_t group) {
        const auto& all = static_cast<const SixBitScales*>(scales)[group / (kSuper / kInputs)];
        return load_wide_halves(all.scale) * load_wide_bytes(all.scales[group % (kSuper / kInputs)]);
    }
};

// Fetch a unit, which takes several lines of the cache.
template <typename Unit>
__attribute__((always_inline)) inline void fetch_unit(const Unit* unit) {
    constexpr int kLine = 64;
    for (size_t at = 0; at < sizeof(Unit); at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(unit) + at);
}

}  // namespace layerskip
