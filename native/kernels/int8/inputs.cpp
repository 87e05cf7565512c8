#include "kernels/int8/inputs.h"

#include <vector>

#include "kernels/linear.h"
#include "kernels/vector.h"

namespace layerskip {
namespace {

constexpr int kParts = kGroup / kLanes;

float largest(Vector v) {
    float found = v[0];
    for (int i = 1; i < kLanes; ++i) found = v[i] > found ? v[i] : found;
    return found;
}

void narrow(IntVector from, int8_t* to) {
#if defined(__AVX512VL__) && defined(__AVX512F__)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_cvtepi32_epi8((__m256i)from));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(from[i]);
#endif
}

int32_t total(IntVector v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

}  // namespace

QuantizedInputs quantize_inputs(const float* x, int64_t ldx, int tokens, int64_t inputs) {
    thread_local std::vector<int8_t> numbers;
    thread_local std::vector<float> steps, real_sums;
    thread_local std::vector<int32_t> sums;
    const int64_t groups = inputs / kGroup;
    if (static_cast<int64_t>(numbers.size()) < tokens * inputs) numbers.resize(tokens * inputs);
    if (static_cast<int64_t>(steps.size()) < tokens * groups) {
        steps.resize(tokens * groups);
        sums.resize(tokens * groups);
        real_sums.resize(tokens * groups);
    }
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Vector most_number = broadcast(127.0f);
    const IntVector magnitude = IntVector{} + 0x7fffffff;
    for (int token = 0; token < tokens; ++token) {
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = x + token * ldx + group * kGroup;
            int8_t* to = numbers.data() + token * inputs + group * kGroup;
            Vector parts[kParts], most = {}, nothing = {};
            for (int i = 0; i < kParts; ++i) {
                parts[i] = load(from + i * kLanes);
                most = maximum((Vector)((IntVector)parts[i] & magnitude), most);
                nothing += parts[i] * 0.0f;  // not a number where an input isn't finite
            }
            const float step = largest(most) * (1.0f / 127.0f) + sum(nothing);
            const float inverse = step > 0 ? 1.0f / step : 0.0f;
            IntVector added = {};
            for (int i = 0; i < kParts; ++i) {
                // Within the limits whatever the input is; where it isn't finite, the step isn't a number.
                const Vector scaled = maximum(minimum(parts[i] * inverse, most_number), -most_number);
                const IntVector rounded = (IntVector)(scaled + magic) - (IntVector)magic;
                narrow(rounded, to + i * kLanes);
                added += rounded;
            }
            const int64_t place = token * groups + group;
            steps[place] = step;
            sums[place] = total(added);
            real_sums[place] = step * static_cast<float>(sums[place]);
        }
    }
    return {numbers.data(), steps.data(), sums.data(), real_sums.data()};
}

}  // namespace layerskip
