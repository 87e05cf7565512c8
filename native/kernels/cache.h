// Numbers of the cache of keys and values: float32, bfloat16, or whole numbers of eight bits with one float32 scale for
// each token, layer and head. They are rounded when they are written, and read alike by all queries.
#pragma once

#include "kernels/wide.h"
#include "network.h"

namespace layerskip {

// The upper half of a float32.
struct Half {
    uint16_t bits;
};

inline Vector load(const Half* from) {
#if defined(__AVX2__)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(16)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vector)(__builtin_convertvector(halves, WordVector) << 16);
#endif
}

inline Vector load(const int8_t* from) { return to_float(widen(from)); }

#if defined(__AVX512F__)

inline Wide load_wide(const Half* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Wide)_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, halves), 16);
}

inline Wide load_wide(const int8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Wide)_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, bytes));
}

#else

template <typename Number>
inline Wide load_wide(const Number* from) {
    return {load(from), load(from + kLanes)};
}

#endif

// Call body(number), whose type is that of the cache's numbers.
template <typename Body>
void with_numbers(const Cache& cache, const Body& body) {
    switch (cache.format) {
        case kFloat32: return body(float{});
        case kBFloat16: return body(Half{});
        default: return body(int8_t{});
    }
}

// Write the numbers of one head; `place` is where they are among the cache's keys, or its values.
void put_keys(const Cache& cache, int64_t place, const float* x, int64_t head_dim);
void put_values(const Cache& cache, int64_t place, const float* x, int64_t head_dim);

// The values of consecutive heads, from `place` on, as floats.
void read_values(const Cache& cache, int64_t place, int64_t head_dim, int64_t heads, float* to);

}  // namespace layerskip
