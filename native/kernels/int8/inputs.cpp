#include "kernels/int8/inputs.h"

#include <algorithm>
#include <limits>

#include "kernels/linear.h"
#include "kernels/vector.h"

namespace layerskip {
namespace {

#if defined(__AVX2__)

// The largest magnitude of a group: bits of positive floats are ordered as the floats are.
inline float largest(const float* from) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const auto part = [&](int i) {
        return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * kLanes)), magnitude);
    };
    const __m256i eight = _mm256_max_epi32(_mm256_max_epi32(part(0), part(1)), _mm256_max_epi32(part(2), part(3)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

// Write a group's inputs times `inverse`, rounded to the nearest whole numbers; returns their sum.
inline int32_t write_numbers(const float* from, float inverse, int8_t* to) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const auto part = [&](int i) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i * kLanes), factor));
    };
    const __m256i low = _mm256_packs_epi32(part(0), part(1)), high = _mm256_packs_epi32(part(2), part(3));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
    // Sums of eight bytes each, which are 128 greater than the numbers.
    const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    const __m128i pairs = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return _mm_cvtsi128_si32(_mm_add_epi64(pairs, _mm_unpackhi_epi64(pairs, pairs))) - 128 * kGroup;
}

#else

inline float largest(const float* from) {
    IntVector most = {};
    for (int i = 0; i < kGroup; i += kLanes) {
        const IntVector bits = (IntVector)load(from + i) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    int32_t bits = most[0];
    for (int i = 1; i < kLanes; ++i) bits = most[i] > bits ? most[i] : bits;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int32_t write_numbers(const float* from, float inverse, int8_t* to) {
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Vector most = broadcast(127.0f);        // where an input isn't finite, products can be anything
    int32_t total = 0;
    for (int i = 0; i < kGroup; i += kLanes) {
        const Vector scaled = maximum(minimum(load(from + i) * inverse, most), -most);
        const IntVector rounded = (IntVector)(scaled + magic) - (IntVector)magic;
        for (int j = 0; j < kLanes; ++j) {
            to[i + j] = static_cast<int8_t>(rounded[j]);
            total += rounded[j];
        }
    }
    return total;
}

#endif

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t QuantizedInputs::bytes(int64_t inputs, int64_t tokens) {
    return aligned(tokens * inputs) + 3 * aligned(tokens * (inputs / kGroup) * sizeof(float));
}

QuantizedInputs QuantizedInputs::at(void* memory, int64_t inputs, int64_t tokens) {
    auto* numbers = static_cast<int8_t*>(memory);
    char* after = static_cast<char*>(memory) + aligned(tokens * inputs);
    const int64_t step = aligned(tokens * (inputs / kGroup) * sizeof(float));
    return {numbers, reinterpret_cast<float*>(after), reinterpret_cast<float*>(after + step),
            reinterpret_cast<int32_t*>(after + 2 * step), tokens};
}

void QuantizedInputs::quantize(const float* x, int64_t ldx, int64_t first, int64_t last, int64_t start,
                               int64_t stop) const {
    for (int64_t token = first; token < last; ++token) {
        for (int64_t group = start; group < stop; ++group) {
            const float* from = x + token * ldx + group * kGroup;
            const int64_t place = group * tokens + token;
            const float most = largest(from);
            const float step = most * (1.0f / 127.0f) + most * 0.0f;  // not a number where `most` isn't finite
            // One over the smallest steps would be infinite.
            const float inverse = step > 0 ? std::min(1.0f / step, std::numeric_limits<float>::max()) : 0.0f;
            const int32_t total = write_numbers(from, inverse, numbers + place * kGroup);
            steps[place] = step;
            real_sums[place] = step * static_cast<float>(total);
            negative_sums[place] = -total;
        }
    }
}

}  // namespace layerskip
