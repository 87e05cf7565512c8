// Sixteen floats: one vector with AVX-512, else two of eight lanes.
//
// Lane j goes through the same operations either way, so both give the same numbers. Nothing here adds up lanes: what
// does (`sum` in vector.h) keeps eight of them.
#pragma once

#include "kernels/vector.h"

namespace layerskip {

constexpr int kWideLanes = 16;

#if defined(__AVX512F__)

// All lanes. Intrinsics without a mask do the same, but GCC 12 warns of its own definition of them.
constexpr __mmask16 kAll = 0xffff;

typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideInts __attribute__((vector_size(64)));
typedef uint32_t WideWords __attribute__((vector_size(64)));

inline Wide broadcast_wide(float value) { return (Wide)_mm512_set1_ps(value); }

inline WideWords load_wide_words(const uint32_t* from) { return (WideWords)_mm512_loadu_si512(from); }

inline Wide load_wide(const float* from) { return (Wide)_mm512_loadu_ps(from); }

inline void add_product(Wide& sum, Wide a, Wide b) { sum += a * b; }

inline Wide maximum(Wide a, Wide b) { return a > b ? a : b; }

inline Wide exponential(Wide x) { return exponential_of<Wide, WideInts>(x); }

// x where `index` is at least the lane's number in `from` and below that in `to`, else `other`.
inline Wide between(const int32_t* from, const int32_t* to, int32_t index, Wide x, Wide other) {
    WideInts first, last;
    std::memcpy(&first, from, sizeof first);
    std::memcpy(&last, to, sizeof last);
    return first <= index ? (last > index ? x : other) : other;
}

// x, and zero where `score` is minus infinity.
inline Wide unless_infinite(Wide score, Wide x) { return score == -__builtin_inff() ? Wide{} : x; }

inline void store(float* to, Wide value) { _mm512_storeu_ps(to, (__m512)value); }

// Numbers j and j + 8 share a word: a bfloat16 is the upper half of a float32.
inline Wide load_bfloat16(const uint32_t* from) {
    typedef int16_t Halves __attribute__((vector_size(64)));
    const Halves places = {0, 0, 0, 2, 0, 4, 0, 6, 0, 8, 0, 10, 0, 12, 0, 14,
                           0, 1, 0, 3, 0, 5, 0, 7, 0, 9, 0, 11, 0, 13, 0, 15};
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Wide)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, (__m512i)places, _mm512_castsi256_si512(words));
}

// The bfloat16 in the lower (0) or upper (1) half of each word.
inline Wide load_bfloat16_of(const uint32_t* from, int half) {
    const WideWords words = (WideWords)_mm512_loadu_si512(from);
    return (Wide)(half == 0 ? words << 16 : words & 0xffff0000u);
}

inline Wide load_wide_halves(const uint16_t* from) {
    return (Wide)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Byte `i` of each word, from -128 to 127.
inline Wide load_bytes(const uint32_t* from, int i) {
    typedef int32_t Numbers __attribute__((vector_size(64)));
    const WideWords words = (WideWords)_mm512_loadu_si512(from);
    return (Wide)_mm512_maskz_cvtepi32_ps(kAll, (__m512i)((Numbers)(words << (24 - 8 * i)) >> 24));
}

// The four bits of each word from bit `shift` on, from 0 to 15. Looking up a number takes the index from the lowest four.
inline Wide nibbles(const uint32_t* from, int shift) {
    const Wide numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const WideWords words = (WideWords)_mm512_loadu_si512(from);
    return (Wide)_mm512_maskz_permutexvar_ps(kAll, (__m512i)(words >> shift), (__m512)numbers);
}

// The same with signs, from -8 to 7.
inline Wide signed_nibbles(const uint32_t* from, int shift) {
    const Wide numbers = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    const WideWords words = (WideWords)_mm512_loadu_si512(from);
    return (Wide)_mm512_maskz_permutexvar_ps(kAll, (__m512i)(words >> shift), (__m512)numbers);
}

#else

struct Wide {
    Vector low, high;
};

inline Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
inline Wide operator*(Wide a, float b) { return {a.low * b, a.high * b}; }

inline void add_product(Wide& sum, Wide a, Wide b) {
    sum.low += a.low * b.low;
    sum.high += a.high * b.high;
}

inline Wide operator-(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }

inline Wide maximum(Wide a, Wide b) { return {maximum(a.low, b.low), maximum(a.high, b.high)}; }

inline Wide exponential(Wide x) { return {exponential(x.low), exponential(x.high)}; }

inline Vector between(const int32_t* from, const int32_t* to, int32_t index, Vector x, Vector other) {
    IntVector first, last;
    std::memcpy(&first, from, sizeof first);
    std::memcpy(&last, to, sizeof last);
    return first <= index ? (last > index ? x : other) : other;
}

// x where `index` is at least the lane's number in `from` and below that in `to`, else `other`.
inline Wide between(const int32_t* from, const int32_t* to, int32_t index, Wide x, Wide other) {
    return {between(from, to, index, x.low, other.low),
            between(from + kLanes, to + kLanes, index, x.high, other.high)};
}

// x, and zero where `score` is minus infinity.
inline Wide unless_infinite(Wide score, Wide x) {
    const auto part = [](Vector score, Vector x) { return score == -__builtin_inff() ? Vector{} : x; };
    return {part(score.low, x.low), part(score.high, x.high)};
}

inline Wide& operator+=(Wide& a, Wide b) {
    a.low += b.low;
    a.high += b.high;
    return a;
}

inline Wide broadcast_wide(float value) { return {broadcast(value), broadcast(value)}; }

inline Wide load_wide(const float* from) { return {load(from), load(from + kLanes)}; }

inline void store(float* to, Wide value) {
    store(to, value.low);
    store(to + kLanes, value.high);
}

inline WordVector load_words(const uint32_t* from) {
    WordVector words;
    std::memcpy(&words, from, sizeof words);
    return words;
}

// Numbers j and j + 8 share a word: a bfloat16 is the upper half of a float32.
inline Wide load_bfloat16(const uint32_t* from) {
    const WordVector words = load_words(from);
    return {(Vector)(words << 16), (Vector)(words & 0xffff0000u)};
}

// The bfloat16 in the lower (0) or upper (1) half of each word.
inline Wide load_bfloat16_of(const uint32_t* from, int half) {
    const auto part = [half](WordVector words) { return (Vector)(half == 0 ? words << 16 : words & 0xffff0000u); };
    return {part(load_words(from)), part(load_words(from + kLanes))};
}

inline Wide load_wide_halves(const uint16_t* from) { return {load_halves(from), load_halves(from + kLanes)}; }

// Byte `i` of each word, from -128 to 127.
inline Wide load_bytes(const uint32_t* from, int i) {
    const auto half = [i](WordVector words) { return to_float((IntVector)(words << (24 - 8 * i)) >> 24); };
    return {half(load_words(from)), half(load_words(from + kLanes))};
}

// The four bits of each word from bit `shift` on, from 0 to 15.
inline Wide nibbles(const uint32_t* from, int shift) {
    const auto half = [shift](WordVector words) { return to_float((IntVector)(words >> shift & 0xf)); };
    return {half(load_words(from)), half(load_words(from + kLanes))};
}

// The same with signs, from -8 to 7.
inline Wide signed_nibbles(const uint32_t* from, int shift) {
    const auto half = [shift](WordVector words) { return to_float((IntVector)(words << (28 - shift)) >> 28); };
    return {half(load_words(from)), half(load_words(from + kLanes))};
}

#endif

}  // namespace layerskip
