#include "kernels/cache.h"

namespace layerskip {
namespace {

constexpr float kTiny = 1e-30f;  // below it, a head's numbers count as zeros: what divides by them would overflow

// To the nearest, and to the even one of two; what is no number stays none.
void round_to_halves(const float* x, int64_t size, uint16_t* to) {
    typedef uint16_t Halves __attribute__((vector_size(16)));
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vector value = load(x + i);
        const WordVector bits = (WordVector)value;
        const WordVector rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        const WordVector kept = value == value ? rounded : bits >> 16 | 0x40u;
        const Halves halves = __builtin_convertvector(kept, Halves);
        std::memcpy(to + i, &halves, sizeof halves);
    }
}

// Whole numbers from -127 to 127; returns their scale, which is none where a number is infinite or none.
float round_to_bytes(const float* x, int64_t size, int8_t* to) {
    typedef int8_t Bytes __attribute__((vector_size(8)));
    IntVector most{};  // without signs, numbers are ordered as their bits are, infinite ones and what is none at the end
    for (int64_t i = 0; i < size; i += kLanes) {
        const IntVector bits = (IntVector)load(x + i) & 0x7fffffff;
        most = most > bits ? most : bits;
    }
    int32_t bits = 0;
    for (int j = 0; j < kLanes; ++j) bits = bits > most[j] ? bits : most[j];
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    if (bits >= 0x7f800000 || largest < kTiny) {
        std::memset(to, 0, size);
        return bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    }
    const float inverse = 127.0f / largest;
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vector whole = (load(x + i) * inverse + magic) - magic;
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(whole, IntVector), Bytes);
        std::memcpy(to + i, &bytes, sizeof bytes);
    }
    return largest / 127.0f;
}

void put(int32_t format, void* numbers, float* scales, int64_t place, const float* x, int64_t head_dim) {
    switch (format) {
        case kFloat32: std::memcpy(static_cast<float*>(numbers) + place, x, head_dim * sizeof(float)); break;
        case kBFloat16: round_to_halves(x, head_dim, static_cast<uint16_t*>(numbers) + place); break;
        default:
            scales[place / head_dim] = round_to_bytes(x, head_dim, static_cast<int8_t*>(numbers) + place);
    }
}

}  // namespace

void put_keys(const Cache& cache, int64_t place, const float* x, int64_t head_dim) {
    put(cache.format, cache.keys, cache.key_scales, place, x, head_dim);
}

void put_values(const Cache& cache, int64_t place, const float* x, int64_t head_dim) {
    put(cache.format, cache.values, cache.value_scales, place, x, head_dim);
}

void read_values(const Cache& cache, int64_t place, int64_t head_dim, int64_t heads, float* to) {
    with_numbers(cache, [&](auto number) {
        const auto* values = static_cast<const decltype(number)*>(cache.values) + place;
        for (int64_t head = 0; head < heads; ++head) {
            const float scale = cache.format == kInt8 ? cache.value_scales[place / head_dim + head] : 1.0f;
            for (int64_t i = head * head_dim; i < (head + 1) * head_dim; i += kLanes)
                store(to + i, load(values + i) * scale);
        }
    });
}

}  // namespace layerskip
