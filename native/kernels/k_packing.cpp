// Lays out blocks of GGUF files with five or six bits, or with two levels of scales, and turns them into numbers.
#include <cstring>
#include <vector>

#include "kernels/k_formats.h"
#include "kernels/k_packing.h"

namespace layerskip {
namespace {

// A block as the file has it: where its parts begin.
struct Block {
    const uint8_t* scale;  // float16, followed by a float16 minimum in formats with minima
    const uint8_t* small;  // what they are multiplied by for each group; null: nothing
    const uint8_t* low;    // four bits of each number
    const uint8_t* high;   // the others
};

Block parts_of(const uint8_t* block, int32_t format) {
    switch (format) {
        case kQ5_0: return {block, nullptr, block + 6, block + 2};
        case kQ5_1: return {block, nullptr, block + 8, block + 4};
        case kQ4_K: return {block, block + 4, block + 16, nullptr};
        case kQ5_K: return {block, block + 4, block + 48, block + 16};
        default: return {block + 208, block + 192, block, block + 128};
    }
}

// Number `i` of a block, from 0 on.
uint8_t number_of(const Block& block, int i, int32_t format) {
    switch (format) {
        case kQ5_0:
        case kQ5_1: {
            const int low = i < 16 ? block.low[i] & 0xf : block.low[i - 16] >> 4;
            return static_cast<uint8_t>(low | (block.high[i / 8] >> i % 8 & 1) << 4);
        }
        case kQ6_K: {  // of 128 numbers, 0..31 share bytes of low bits with 64..95, and all quarters those of high bits
            const int half = i / 128, quarter = i % 128 / 32, place = i % 32;
            const int low = block.low[64 * half + quarter % 2 * 32 + place] >> quarter / 2 * 4 & 0xf;
            return static_cast<uint8_t>(low | (block.high[32 * half + place] >> 2 * quarter & 3) << 4);
        }
        default: {
            const int group = i / kGroup, place = i % kGroup;
            const int low = block.low[group / 2 * kGroup + place] >> group % 2 * 4 & 0xf;
            const int fifth = block.high == nullptr ? 0 : block.high[place] >> group & 1;
            return static_cast<uint8_t>(low | fifth << 4);
        }
    }
}

// Six bits each: the scale and the minimum of a group, of eight groups in twelve bytes.
uint8_t small_scale(const uint8_t* small, int group) {
    if (group < 4) return small[group] & 63;
    return static_cast<uint8_t>((small[group + 4] & 0xf) | small[group - 4] >> 6 << 4);
}

uint8_t small_minimum(const uint8_t* small, int group) {
    if (group < 4) return small[group + 4] & 63;
    return static_cast<uint8_t>(small[group + 4] >> 4 | small[group] >> 6 << 4);
}

uint16_t half_at(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return half;
}

// Output `j` of block `at`, counted through all panels.
void place_scales(const Block& block, int32_t format, int64_t at, int j, void* scales) {
    constexpr uint16_t kSign = 0x8000;
    switch (format) {
        case kQ5_0: static_cast<uint16_t*>(scales)[at * kPanel + j] = half_at(block.scale); break;
        case kQ5_1:
            for (int half = 0; half < 2; ++half)
                static_cast<uint16_t*>(scales)[(2 * at + half) * kPanel + j] = half_at(block.scale + 2 * half);
            break;
        case kQ6_K: {
            SixBitScales& to = static_cast<SixBitScales*>(scales)[at];
            to.scale[j] = half_at(block.scale);
            for (int group = 0; group < kSuper / Q6_K::kInputs; ++group)
                to.scales[group][j] = static_cast<int8_t>(block.small[group]);
            break;
        }
        default: {
            SuperScales& to = static_cast<SuperScales*>(scales)[at];
            to.scale[j] = half_at(block.scale);
            to.minimum[j] = half_at(block.scale + 2) ^ kSign;
            for (int group = 0; group < kSuper / kGroup; ++group) {
                to.scales[group][j] = small_scale(block.small, group);
                to.minima[group][j] = small_minimum(block.small, group);
            }
        }
    }
}

// The word that holds the lowest four bits of eight inputs (`Nibbles`).
uint32_t low_word(const uint8_t* numbers) {
    uint32_t word = 0;
    for (int i = 0; i < Nibbles::kInputs; ++i) word |= (numbers[i] & 0xfu) << nibble_shift(i);
    return word;
}

// The word that holds the other bits of a unit, `bits` for each input.
uint32_t high_word(const uint8_t* numbers, int inputs, int bits) {
    uint32_t word = 0;
    for (int i = 0; i < inputs; ++i) word |= static_cast<uint32_t>(numbers[i] >> 4) << (8 * (i % 4) + i / 4 * bits);
    return word;
}

// Output `j` of the units from `units` on, of `count` inputs; `sign`: the highest bit, where numbers are to be signed.
template <typename Type>
void place_units(uint8_t* numbers, int count, int bits, uint8_t sign, int64_t j, typename Type::Unit* units) {
    for (int i = 0; i < count; ++i) numbers[i] ^= sign;
    for (int start = 0; start < count; start += Type::kInputs) {
        auto& unit = units[start / Type::kInputs];
        for (int i = 0; i < Type::kInputs; i += 8) unit.low[i / 8][j] = low_word(numbers + start + i);
        unit.high[j] = high_word(numbers + start, Type::kInputs, bits);
    }
}

// Output `j` of block `at` of `count` numbers, counted through all panels.
void place_numbers(uint8_t* numbers, int count, int32_t format, int64_t at, int64_t j, void* panels) {
    const int64_t first = at * count;
    switch (format) {
        case kQ4_K: {
            auto* units = static_cast<Nibbles::Unit*>(panels) + first / Nibbles::kInputs;
            for (int i = 0; i < count; i += Nibbles::kInputs) units[i / Nibbles::kInputs].values[j] = low_word(numbers + i);
            break;
        }
        case kQ6_K: {
            auto* units = static_cast<Q6_K::Unit*>(panels) + first / Q6_K::kInputs;
            place_units<Q6_K>(numbers, count, 2, 0x20, j, units);
            break;
        }
        default: {
            auto* units = static_cast<Q5_K::Unit*>(panels) + first / Q5_K::kInputs;  // as those of Q5_0 and Q5_1
            place_units<Q5_K>(numbers, count, 1, format == kQ5_0 ? 0x10 : 0, j, units);
        }
    }
}

float to_number(uint16_t half) {
    uint16_t halves[kLanes] = {half};
    return load_halves(halves)[0];
}

}  // namespace

int64_t k_block_bytes(int32_t format) {
    switch (format) {
        case kQ5_0: return 22;
        case kQ5_1: return 24;
        case kQ4_K: return 144;
        case kQ5_K: return 176;
        default: return 210;
    }
}

void pack_k_blocks(const uint8_t* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales,
                   int64_t panel) {
    const int64_t size = block_inputs(format), blocks = inputs / size, bytes = k_block_bytes(format);
    const std::vector<uint8_t> zeros(bytes);
    for (int64_t i = 0; i < blocks; ++i) {
        for (int j = 0; j < kPanel; ++j) {
            const Block block = parts_of(j < count ? weight + (j * blocks + i) * bytes : zeros.data(), format);
            uint8_t numbers[kSuper];
            for (int n = 0; n < size; ++n) numbers[n] = number_of(block, n, format);
            place_scales(block, format, panel * blocks + i, j, scales);
            place_numbers(numbers, static_cast<int>(size), format, panel * blocks + i, j, panels);
        }
    }
}

void unpack_k_block(const uint8_t* from, int32_t format, float* to) {
    const Block block = parts_of(from, format);
    const float scale = to_number(half_at(block.scale));
    const float minimum = format == kQ5_0 || format == kQ6_K ? 0 : to_number(half_at(block.scale + 2));
    for (int i = 0; i < block_inputs(format); ++i) {
        const int number = number_of(block, i, format);
        switch (format) {
            case kQ5_0: to[i] = scale * (number - 16); break;
            case kQ5_1: to[i] = scale * number + minimum; break;
            case kQ6_K: to[i] = scale * static_cast<int8_t>(block.small[i / Q6_K::kInputs]) * (number - 32); break;
            default:
                to[i] = scale * small_scale(block.small, i / kGroup) * number -
                        minimum * small_minimum(block.small, i / kGroup);
        }
    }
}

}  // namespace layerskip
