// Sums of products of bytes: four inputs of sixteen outputs at a time, in 32-bit integers.
//
// They are exact, so all instruction sets give the same numbers, whatever the order.
#pragma once

#include <cstring>

#include "kernels/wide.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace layerskip {

// Weights of eight bits become bytes by flipping some of their bits, and are then greater by `kByteOffset`. x86
// multiplies unsigned bytes by signed ones; ARM multiplies signed bytes, as weights are.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr uint32_t kByteFlip = 0;
constexpr int32_t kByteOffset = 0;
#else
constexpr uint32_t kByteFlip = 0x80808080u;
constexpr int32_t kByteOffset = 128;
#endif

#if defined(__AVX512F__)

typedef int32_t Ints __attribute__((vector_size(64)));

// All lanes value * 2^bits.
template <int Bits>
inline Ints broadcast_shifted(int32_t value) {
    return (Ints)_mm512_set1_epi32(value) << Bits;
}

inline Wide to_wide(Ints value) { return (Wide)_mm512_maskz_cvtepi32_ps(kAll, (__m512i)value); }

// A sum that begins with these bits is, as a float, 1.5 * 2^23 and the sum: converting it and multiplying it by a scale
// is then one operation. Scales have so few bits that their products with 1.5 * 2^23 are exact, so the result is rounded
// once, as `to_wide(sum) * scale` is.
constexpr float kStart = 12582912.0f;
inline Ints start_as_floats() { return (Ints)_mm512_set1_ps(kStart); }
inline Wide scaled_as_floats(Ints sum, Wide scale) {
    return (Wide)_mm512_fmsub_ps((__m512)sum, (__m512)scale, (__m512)(scale * kStart));
}

// sum += bytes times numbers: of each word the four unsigned bytes, times the four signed numbers of `x`. Where there is
// no instruction for it, products are added up in pairs of 16 bits first, which hold bytes of up to seven bits.
template <bool Full>
inline void add_dot(Ints& sum, WideWords bytes, uint32_t x) {
    const __m512i numbers = _mm512_set1_epi32(static_cast<int32_t>(x));
#if defined(__AVX512VNNI__)
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, numbers);
#else
    const auto dot = [numbers](WideWords part) {
        return (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)part, numbers), _mm512_set1_epi16(1));
    };
    if constexpr (Full) {
        sum += dot(bytes & 0x7f7f7f7fu) + (dot(bytes >> 7 & 0x01010101u) << 7);
    } else {
        sum += dot(bytes);
    }
#endif
}

#else

struct Ints {
    IntVector low, high;
};

struct WideWords {
    WordVector low, high;
};

inline WideWords operator&(WideWords a, uint32_t b) { return {a.low & b, a.high & b}; }
inline WideWords operator^(WideWords a, uint32_t b) { return {a.low ^ b, a.high ^ b}; }
inline WideWords operator>>(WideWords a, int b) { return {a.low >> b, a.high >> b}; }

template <int Bits>
inline Ints broadcast_shifted(int32_t value) {
    const IntVector half = (IntVector{} + value) << Bits;
    return {half, half};
}

inline WideWords load_wide_words(const uint32_t* from) { return {load_words(from), load_words(from + kLanes)}; }

inline Wide to_wide(Ints value) { return {to_float(value.low), to_float(value.high)}; }

// With fewer registers nothing is gained by beginning elsewhere than at zero.
inline Ints start_as_floats() { return Ints{}; }
inline Wide scaled_as_floats(Ints sum, Wide scale) { return to_wide(sum) * scale; }

#if defined(__ARM_FEATURE_DOTPROD)

// sum += bytes times numbers: of each word the four signed bytes, times the four signed numbers of `x`. Bytes of less
// than seven bits are the same with a sign.
inline void add_signed_dot(IntVector& sum, WordVector bytes, uint32_t x) {
    constexpr int kParts = sizeof(IntVector) / sizeof(int32x4_t);
    const int8x16_t numbers = vreinterpretq_s8_u32(vdupq_n_u32(x));
    int32x4_t sums[kParts];
    int8x16_t parts[kParts];
    std::memcpy(sums, &sum, sizeof sums);
    std::memcpy(parts, &bytes, sizeof parts);
    for (int i = 0; i < kParts; ++i) sums[i] = vdotq_s32(sums[i], parts[i], numbers);
    std::memcpy(&sum, sums, sizeof sums);
}

template <bool Full>
inline void add_dot(Ints& sum, WideWords bytes, uint32_t x) {
    add_signed_dot(sum.low, bytes.low, x);
    add_signed_dot(sum.high, bytes.high, x);
}

#else

template <bool Full>
inline IntVector dot(WordVector bytes, uint32_t x) {
#if defined(__AVX2__)
    const __m256i numbers = _mm256_set1_epi32(static_cast<int32_t>(x));
    const auto add_pairs = [numbers](WordVector part) {
        return (IntVector)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)part, numbers), _mm256_set1_epi16(1));
    };
    if constexpr (Full) return add_pairs(bytes & 0x7f7f7f7fu) + (add_pairs(bytes >> 7 & 0x01010101u) << 7);
    return add_pairs(bytes);
#else
    IntVector sum = {};
    for (int i = 0; i < 4; ++i)
        sum += (IntVector)(bytes >> 8 * i & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(x >> 8 * i));
    return sum;
#endif
}

template <bool Full>
inline void add_dot(Ints& sum, WideWords bytes, uint32_t x) {
    sum.low += dot<Full>(bytes.low, x);
    sum.high += dot<Full>(bytes.high, x);
}

#endif

#endif

}  // namespace layerskip
