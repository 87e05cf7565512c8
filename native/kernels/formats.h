// How a panel stores its 16 weights of one input in each format, and how they become 16 floats.
//
// Unit: what a panel stores for one input, or for several (kInputs). decode(): its weights for one of them, in formats
// with groups before scale and minimum, which scale() and minimum() return for a panel's group of 32 inputs.
#pragma once

#include "kernels/linear.h"
#include "kernels/wide.h"

namespace layerskip {

static_assert(kPanel == kWideLanes, "a panel's weights of one input are unpacked together");

// What most formats have in common: no groups, no scale of each output.
struct PlainFormat {
    static constexpr int kInputs = 1;        // inputs of a unit
    static constexpr bool kGrouped = false;  // scales for each group of inputs
    static constexpr bool kMinimum = false;  // and a minimum, which is added
    static constexpr bool kScaled = false;   // one scale for each output
    static constexpr int kHalves = kPanel;   // 16-bit numbers that scale and minimum of a group take
};

struct Float32 : PlainFormat {
    struct Unit {
        float values[kPanel];
    };
    static Wide decode(const Unit& unit, int) { return load_wide(unit.values); }
};

// A word holds two inputs' weights of one output, the first in its lower half: this is how instructions for products of
// bfloat16 take them.
struct BFloat16 : PlainFormat {
    static constexpr int kInputs = 2;
    struct Unit {
        uint32_t values[kPanel];
    };
    static Wide decode(const Unit& unit, int input) { return load_bfloat16_of(unit.values, input); }
};

// A bfloat16 for each output of a panel.
struct BFloat16Scales {
    uint32_t values[kPanel / 2];  // outputs j and j + 8 share a word
};

struct Float16 : PlainFormat {
    struct Unit {
        uint16_t values[kPanel];
    };
    static Wide decode(const Unit& unit, int) { return load_wide_halves(unit.values); }
};

// Eight bits for each weight: a word holds those of four inputs for one output, the first in its lowest bits.
struct Bytes : PlainFormat {
    static constexpr int kInputs = 4;
    struct Unit {
        uint32_t values[kPanel];
    };
    static Wide decode(const Unit& unit, int input) { return load_bytes(unit.values, input); }
};

struct Int8 : Bytes {
    static constexpr bool kScaled = true;
};

// Four bits for each weight: a word holds those of eight inputs for one output, each of its bytes those of inputs i (in
// the lower half) and i + 4.
struct Nibbles : PlainFormat {
    static constexpr int kInputs = 8;
    static constexpr bool kGrouped = true;
    struct Unit {
        uint32_t values[kPanel];
    };
};

// Where a word has input i.
inline int nibble_shift(int i) { return i % 4 * 8 + i / 4 * 4; }

struct Int4 : Nibbles {
    static Wide decode(const Unit& unit, int input) { return signed_nibbles(unit.values, nibble_shift(input)); }
    static Wide scale(const void* scales, int64_t group) {
        return load_bfloat16(static_cast<const BFloat16Scales*>(scales)[group].values);
    }
};

// Blocks of GGUF files: float16 scales, and for q4_1 minima behind the scales of each group.
struct Q8_0 : Bytes {
    static constexpr bool kGrouped = true;
    static Wide scale(const void* scales, int64_t group) {
        return load_wide_halves(static_cast<const uint16_t*>(scales) + group * kPanel);
    }
};

struct Q4_0 : Nibbles {  // scale * (number - 8): the minimum is -8 * scale
    static constexpr bool kMinimum = true;
    static Wide decode(const Unit& unit, int input) { return nibbles(unit.values, nibble_shift(input)); }
    static Wide scale(const void* scales, int64_t group) { return Q8_0::scale(scales, group); }
    static Wide minimum(const void* scales, int64_t group) { return scale(scales, group) * -8.0f; }
};

struct Q4_1 : Nibbles {  // scale * number + minimum
    static constexpr int kHalves = 2 * kPanel;
    static constexpr bool kMinimum = true;
    static Wide decode(const Unit& unit, int input) { return nibbles(unit.values, nibble_shift(input)); }
    static Wide scale(const void* scales, int64_t group) { return Q8_0::scale(scales, 2 * group); }
    static Wide minimum(const void* scales, int64_t group) { return Q8_0::scale(scales, 2 * group + 1); }
};

}  // namespace layerskip
