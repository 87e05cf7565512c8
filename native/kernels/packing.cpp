// Lays out weights in panels, and turns blocks of GGUF files into numbers.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/formats.h"
#include "kernels/k_packing.h"
#include "kernels/linear.h"
#include "kernels/tiles.h"

namespace layerskip {
namespace {

uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// For a number that float16 holds exactly.
uint16_t to_float16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(size * 0x1p24f);  // a multiple of the smallest number
    return sign | static_cast<uint16_t>((bits >> 13 & 0x3ffff) - (112 << 10));
}

float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Where scales have output j's bfloat16 among those of its panel.
int64_t bfloat16_place(int64_t j) { return j % kLanes * 2 + j / kLanes; }

// The step between neighbouring integers: the largest magnitude of weight[start..stop-1] over `limit`.
float step_of(const float* weight, int64_t start, int64_t stop, float limit) {
    float largest = 0;
    for (int64_t i = start; i < stop; ++i) largest = std::max(largest, std::fabs(weight[i]));
    return largest / limit;
}

int8_t quantize(float value, float step, int limit) {
    const float scaled = step > 0 ? std::nearbyint(value / step) : 0;
    return static_cast<int8_t>(std::min<float>(limit, std::max<float>(-limit - 1, scaled)));
}

// Input `i` of output `j` in a panel whose units begin at `units`.
void place_byte(int8_t number, int64_t i, int64_t j, Bytes::Unit* units) {
    std::memcpy(reinterpret_cast<char*>(units[i / Bytes::kInputs].values + j) + i % Bytes::kInputs, &number, 1);
}

// The same of a bfloat16.
void place_half(uint16_t number, int64_t i, int64_t j, BFloat16::Unit* units) {
    std::memcpy(reinterpret_cast<uint16_t*>(units[i / BFloat16::kInputs].values + j) + i % BFloat16::kInputs, &number,
                sizeof number);
}

// The words that hold output `j` of a panel's group: four, each of eight inputs (`Nibbles`).
void place_nibbles(const uint8_t* numbers, int64_t j, Nibbles::Unit* units) {
    for (int k = 0; k < kGroup / Nibbles::kInputs; ++k) {
        uint32_t word = 0;
        for (int i = 0; i < Nibbles::kInputs; ++i) word |= (numbers[k * Nibbles::kInputs + i] & 0xfu) << nibble_shift(i);
        units[k].values[j] = word;
    }
}

void pack_int4(const float* const* outputs, int64_t inputs, void* panels, void* scales, int64_t panel) {
    const int64_t groups = inputs / kGroup;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = group * kGroup, at = panel * groups + group;
        auto* steps = reinterpret_cast<uint16_t*>(static_cast<BFloat16Scales*>(scales) + at);
        auto* units = static_cast<Nibbles::Unit*>(panels) + at * kGroup / Nibbles::kInputs;
        for (int64_t j = 0; j < kPanel; ++j) {
            const uint16_t step = to_bfloat16(step_of(outputs[j], from, from + kGroup, 7));
            steps[bfloat16_place(j)] = step;
            uint8_t numbers[kGroup];
            for (int i = 0; i < kGroup; ++i)
                numbers[i] = static_cast<uint8_t>(quantize(outputs[j][from + i], from_bfloat16(step), 7));
            place_nibbles(numbers, j, units);
        }
    }
}

// Number i of a block of 32, whose numbers begin at `from`.
uint8_t number_of(const uint8_t* from, int i, int32_t format) {
    if (format == kQ8_0) return from[i];
    return i < kGroup / 2 ? from[i] & 0xf : from[i - kGroup / 2] >> 4;
}

}  // namespace

int64_t packed_bytes(int32_t inputs, int32_t outputs, int32_t format) {
    const int64_t count = static_cast<int64_t>(inputs) * outputs;
    switch (format) {
        case kFloat32: return 4 * count;
        case kBFloat16: return panel_units<BFloat16>(inputs) * sizeof(BFloat16::Unit) * (outputs / kPanel);
        case kFloat16: return 2 * count;
        case kInt8: return panel_units<Int8>(inputs) * sizeof(Int8::Unit) * (outputs / kPanel);
        case kQ8_0: return count;
        case kQ5_0:
        case kQ5_1:
        case kQ5_K: return count / 8 * 5;
        case kQ6_K: return count / 4 * 3;
        default: return count / 2;
    }
}

void pack(const float* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales, int64_t panel) {
    const std::vector<float> zeros(count < kPanel ? inputs : 0);
    const float* outputs[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) outputs[j] = j < count ? weight + j * inputs : zeros.data();
    if (format == kInt4) return pack_int4(outputs, inputs, panels, scales, panel);
    float steps[kPanel];
    for (int64_t j = 0; format == kInt8 && j < kPanel; ++j)
        static_cast<float*>(scales)[panel * kPanel + j] = steps[j] = step_of(outputs[j], 0, inputs, 127);
    auto* int8_panel = static_cast<Int8::Unit*>(panels) + panel * panel_units<Int8>(inputs);
    if (format == kInt8) std::memset(int8_panel, 0, panel_units<Int8>(inputs) * sizeof *int8_panel);
    auto* bfloat16_panel = static_cast<BFloat16::Unit*>(panels) + panel * panel_units<BFloat16>(inputs);
    if (format == kBFloat16 && inputs % BFloat16::kInputs != 0)
        std::memset(bfloat16_panel + inputs / BFloat16::kInputs, 0, sizeof *bfloat16_panel);
    for (int64_t i = 0; i < inputs; ++i) {
        const int64_t unit = panel * inputs + i;
        for (int64_t j = 0; j < kPanel; ++j) {
            const float value = outputs[j][i];
            switch (format) {
                case kFloat32: static_cast<Float32::Unit*>(panels)[unit].values[j] = value; break;
                case kBFloat16: place_half(to_bfloat16(value), i, j, bfloat16_panel); break;
                case kFloat16: static_cast<Float16::Unit*>(panels)[unit].values[j] = to_float16(value); break;
                default: place_byte(quantize(value, steps[j], 127), i, j, int8_panel); break;
            }
        }
    }
}

bool fits_float16(const float* numbers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, numbers + i, sizeof bits);
        const float size = std::fabs(numbers[i]);
        const bool fits = size < 0x1p-14f ? size * 0x1p24f == std::floor(size * 0x1p24f)
                                          : size <= 65504.0f && (bits & 0x1fff) == 0;
        if (!fits) return false;
    }
    return true;
}

bool fits_bfloat16(const float* numbers, int64_t count) {
    uint32_t lost = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, numbers + i, sizeof bits);
        lost |= bits & 0xffff;
    }
    return lost == 0;
}

int64_t block_bytes(int32_t format) {
    switch (format) {
        case kQ8_0: return 34;
        case kQ4_0:
        case kInt4: return 18;
        case kQ4_1: return 20;
        default: return k_block_bytes(format);
    }
}

int64_t block_inputs(int32_t format) { return format == kQ4_K || format == kQ5_K || format == kQ6_K ? 256 : kGroup; }

int64_t blocks_row_bytes(int32_t format, int64_t inputs) {
    return format == kInt8 ? sizeof(float) + inputs : inputs / block_inputs(format) * block_bytes(format);
}

namespace {

// Rows of a scale and int8 numbers.
void pack_rows(const uint8_t* weight, int64_t inputs, int count, void* panels, void* scales, int64_t panel) {
    auto* units = static_cast<Int8::Unit*>(panels) + panel * panel_units<Int8>(inputs);
    std::memset(units, 0, panel_units<Int8>(inputs) * sizeof *units);
    float* to = static_cast<float*>(scales) + panel * kPanel;
    std::fill(to, to + kPanel, 0.0f);
    for (int64_t j = 0; j < count; ++j) {
        const uint8_t* row = weight + j * blocks_row_bytes(kInt8, inputs);
        std::memcpy(to + j, row, sizeof(float));
        for (int64_t i = 0; i < inputs; ++i) place_byte(static_cast<int8_t>(row[sizeof(float) + i]), i, j, units);
    }
}

}  // namespace

void pack_blocks(const uint8_t* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales,
                 int64_t panel) {
    if (format == kInt8) return pack_rows(weight, inputs, count, panels, scales, panel);
    if (format >= kQ5_0) return pack_k_blocks(weight, inputs, count, format, panels, scales, panel);
    const int64_t groups = inputs / kGroup, bytes = block_bytes(format);
    const int halves = format == kQ4_1 ? 2 : 1;  // scale, and minimum
    const uint8_t sign = format == kInt4 ? 8 : 0;  // blocks have numbers + 8, panels two's complement
    const std::vector<uint8_t> zeros(bytes);
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t at = panel * groups + group;
        uint16_t* to = static_cast<uint16_t*>(scales) + at * halves * kPanel;
        for (int j = 0; j < kPanel; ++j) {
            const uint8_t* block = j < count ? weight + (j * groups + group) * bytes : zeros.data();
            const int64_t place = format == kInt4 ? bfloat16_place(j) : j;
            for (int half = 0; half < halves; ++half) std::memcpy(to + half * kPanel + place, block + 2 * half, 2);
            uint8_t numbers[kGroup];
            for (int i = 0; i < kGroup; ++i) numbers[i] = number_of(block + 2 * halves, i, format) ^ (j < count ? sign : 0);
            if (format != kQ8_0) {
                place_nibbles(numbers, j, static_cast<Nibbles::Unit*>(panels) + at * kGroup / Nibbles::kInputs);
                continue;
            }
            auto* units = static_cast<Q8_0::Unit*>(panels) + at * kGroup / Q8_0::kInputs;
            for (int i = 0; i < kGroup; ++i) place_byte(static_cast<int8_t>(numbers[i]), i, j, units);
        }
    }
}

void unpack_block(const uint8_t* block, int32_t format, float* to) {
    if (format >= kQ5_0) return unpack_k_block(block, format, to);
    const int halves = format == kQ4_1 ? 2 : 1;
    uint16_t parts[kLanes] = {};
    std::memcpy(parts, block, halves * sizeof(uint16_t));
    const Vector values = load_halves(parts);
    for (int i = 0; i < kGroup; ++i) {
        const uint8_t number = number_of(block + 2 * halves, i, format);
        switch (format) {
            case kQ8_0: to[i] = values[0] * static_cast<int8_t>(number); break;
            case kQ4_0: to[i] = values[0] * (number - 8); break;
            default: to[i] = values[0] * number + values[1]; break;
        }
    }
}

}  // namespace layerskip
