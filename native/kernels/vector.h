// Eight floats at a time, by the vector extensions of GCC and Clang: one source for AVX2, NEON and anything else.
//
// The sources in this folder do the arithmetic: their machine code and rounding depend on the instruction set that they
// are compiled for. The sources above it only call them, and are the same for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace layerskip {

constexpr int kLanes = 8;

typedef float Vector __attribute__((vector_size(32)));
typedef int32_t IntVector __attribute__((vector_size(32)));
typedef uint32_t WordVector __attribute__((vector_size(32)));

inline Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline Vector broadcast(float value) { return Vector{value, value, value, value, value, value, value, value}; }

// Eight bytes as numbers. On x86, compilers translate the generic form into slower code.
inline IntVector widen(const int8_t* from) {
#if defined(__AVX2__)
    return (IntVector)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    typedef int8_t Bytes __attribute__((vector_size(8)));
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, IntVector);
#endif
}

inline IntVector widen(const uint8_t* from) {
#if defined(__AVX2__)
    return (IntVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, IntVector);
#endif
}

// Eight float16 numbers. Without an instruction for it, the bits are moved to where float32 has them, which gives
// numbers that are too small by a power of two, subnormal ones included.
inline Vector load_halves(const uint16_t* from) {
#if defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    typedef uint16_t Halves __attribute__((vector_size(16)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const WordVector words = __builtin_convertvector(halves, WordVector);
    const WordVector infinite = (WordVector)((words & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    const WordVector size = (WordVector)((Vector)((words & 0x7fffu) << 13) * 0x1p112f);
    return (Vector)(size | infinite | (words & 0x8000u) << 16);
#endif
}

inline Vector to_float(IntVector value) { return __builtin_convertvector(value, Vector); }

inline float sum(Vector v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The sums of eight vectors side by side, each as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
inline Vector sums(const Vector* v) {
#if defined(__AVX2__)
    const auto pairs = [](Vector a, Vector b) { return (Vector)_mm256_hadd_ps((__m256)a, (__m256)b); };
    const Vector low = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
    const Vector high = pairs(pairs(v[4], v[5]), pairs(v[6], v[7]));
    return (Vector)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x20) +
           (Vector)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x31);
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i)
        result[i] = ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) + ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
    return result;
#endif
}

inline Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

// e^x to about 2 units in the last place: e^x = 2^n e^r with |r| <= ln2 / 2, and a polynomial for e^r.
template <typename Floats, typename Ints>
inline Floats exponential_of(Floats x) {
    x = x > -87.0f ? x : Floats{} - 87.0f;
    x = x < 88.0f ? x : Floats{} + 88.0f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats n = (x * 1.44269504088896341f + magic) - magic;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Floats)power;  // the same bits, read as floats
}

inline Vector exponential(Vector x) { return exponential_of<Vector, IntVector>(x); }

// log(x) of positive normal numbers to about 2 units in the last place: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and a
// polynomial for log(m).
inline Vector logarithm(Vector x) {
    const IntVector bits = (IntVector)x;
    Vector m = (Vector)((bits & 0x7fffff) | 0x3f000000);
    Vector n = to_float((bits >> 23) - 126);
    const auto small = m < 0.707106781186547524f;
    n -= small ? broadcast(1.0f) : Vector{};
    m += (small ? m : Vector{}) - 1.0f;
    const Vector square = m * m;
    Vector p = broadcast(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * square + n * -2.12194440e-4f - square * 0.5f;
    return (m + p) + n * 0.693359375f;
}

}  // namespace layerskip
