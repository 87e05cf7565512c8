#include "kernels/elementwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/linear.h"
#include "kernels/vector.h"

namespace layerskip {
namespace {

Vector activated(Vector x, int32_t activation) {
    switch (activation) {
        case kSilu: return x / (exponential(-x) + 1.0f);
        case kGeluTanh: {  // x (1 + tanh z) / 2 = x / (1 + e^-2z)
            const Vector z = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
            return x / (exponential(z * -2.0f) + 1.0f);
        }
        default:
            for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
            return x;
    }
}

}  // namespace

void embed(const Embedding& embedding, int64_t token, int64_t size, float* to) {
    switch (embedding.format) {
        case kFloat32:
            std::memcpy(to, static_cast<const float*>(embedding.table) + token * size, size * sizeof(float));
            break;
        case kBFloat16:
            for (int64_t i = 0; i < size; ++i) {
                const uint16_t half = static_cast<const uint16_t*>(embedding.table)[token * size + i];
                const uint32_t bits = static_cast<uint32_t>(half) << 16;
                std::memcpy(to + i, &bits, sizeof bits);
            }
            break;
        default:
            const int64_t inputs = block_inputs(embedding.format), blocks = size / inputs;
            const int64_t bytes = block_bytes(embedding.format);
            const uint8_t* from = static_cast<const uint8_t*>(embedding.table) + token * blocks * bytes;
            for (int64_t i = 0; i < blocks; ++i) unpack_block(from + i * bytes, embedding.format, to + i * inputs);
    }
    for (int64_t i = 0; i < size; ++i) to[i] *= embedding.multiplier;
}

void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* y) {
    Vector squares{};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
    for (i = 0; i + kLanes <= size; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; ++i) y[i] = x[i] * scale * weight[i];
}

float sum_of_squares(const float* x, int64_t size) {
    Vector squares{};
    for (int64_t i = 0; i < size; i += kLanes) squares += load(x + i) * load(x + i);
    return sum(squares);
}

void rescale(float* x, float factor, const float* weight, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(x + i) * factor * load(weight + i));
}

void activate(const float* gate, const float* up, int64_t size, int32_t activation, float* to) {
    for (int64_t i = 0; i < size; i += kLanes) store(to + i, activated(load(gate + i), activation) * load(up + i));
}

void rotate(const float* x, const float* cosines, const float* sines, int64_t rotary_dim, int64_t head_dim, float* to) {
    const int64_t half = rotary_dim / 2;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {  // both are read before either is written: `to` may be x
        const Vector a = load(x + i), b = load(x + i + half);
        store(to + i, a * load(cosines + i) + b * load(sines + i));
        store(to + i + half, b * load(cosines + i + half) + a * load(sines + i + half));
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        to[i] = a * cosines[i] + b * sines[i];
        to[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
    if (to != x) std::copy(x + rotary_dim, x + head_dim, to + rotary_dim);
}

void add(const float* x, float factor, int64_t size, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(y + i, load(y + i) + load(x + i) * factor);
    for (; i < size; ++i) y[i] += factor * x[i];
}

// The product of zero with an infinite number, or with one that is none, isn't zero, and neither is a sum with it.
bool all_finite(const float* numbers, int64_t size) {
    Vector total{};
    for (int64_t i = 0; i < size; i += kLanes) total += load(numbers + i) * 0.0f;
    return sum(total) == 0.0f;
}

}  // namespace layerskip
