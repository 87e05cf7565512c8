// How a panel stores its 16 weights of one input in each format, and how they become two vectors.
//
// Unit: what a panel stores for one input. decode(): its weights as vectors, in formats with groups before scale and
// minimum, which scale() and minimum() return for a panel's group of 32 inputs.
#pragma once

#include <cstring>

#include "kernels/linear.h"
#include "kernels/vector.h"

namespace layerskip {

static_assert(kPanel == 2 * kLanes, "a panel's weights of one input are unpacked as two vectors");

// What most formats have in common: no groups, no scale of each output, not fetched ahead.
struct PlainFormat {
    static constexpr bool kGrouped = false;  // scales for each group of inputs
    static constexpr bool kMinimum = false;  // and a minimum, which is added
    static constexpr bool kScaled = false;   // one scale for each output
    static constexpr bool kFetches = false;  // limited by memory: worth fetching ahead
};

struct Float32 : PlainFormat {
    struct Unit {
        float values[kPanel];
    };
    static constexpr bool kFetches = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        low = load(unit.values);
        high = load(unit.values + kLanes);
    }
};

struct BFloat16 : PlainFormat {  // outputs j and j + 8 share a word: a bfloat16 is the upper half of a float32
    struct Unit {
        uint32_t values[kLanes];
    };
    static constexpr bool kFetches = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        WordVector words;
        std::memcpy(&words, unit.values, sizeof words);
        low = (Vector)(words << 16);
        high = (Vector)(words & 0xffff0000u);
    }
};

struct Float16 : PlainFormat {
    struct Unit {
        uint16_t values[kPanel];
    };
    static constexpr bool kFetches = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        low = load_halves(unit.values);
        high = load_halves(unit.values + kLanes);
    }
};

struct Int8 : PlainFormat {
    struct Unit {
        int8_t values[kPanel];
    };
    static constexpr bool kScaled = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        low = to_float(widen(unit.values));
        high = to_float(widen(unit.values + kLanes));
    }
};

struct Int4 : PlainFormat {  // outputs j and j + 8 share a byte, each with a sign
    struct Unit {
        int8_t values[kLanes];
    };
    static constexpr bool kGrouped = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        const IntVector words = widen(unit.values);
        low = to_float((words << 28) >> 28);
        high = to_float(words >> 4);
    }
    static void scale(const void* scales, int64_t group, Vector& low, Vector& high) {
        BFloat16::decode(static_cast<const BFloat16::Unit*>(scales)[group], low, high);
    }
};

// Blocks of GGUF files: float16 scales, and for q4_1 minima behind the scales of each group.
struct Q8_0 : PlainFormat {
    using Unit = Int8::Unit;
    static constexpr bool kGrouped = true;
    static constexpr int kHalves = kPanel;  // float16 numbers for a group of 32 inputs
    static void decode(const Unit& unit, Vector& low, Vector& high) { Int8::decode(unit, low, high); }
    static void scale(const void* scales, int64_t group, Vector& low, Vector& high) {
        const uint16_t* halves = static_cast<const uint16_t*>(scales) + group * kHalves;
        low = load_halves(halves);
        high = load_halves(halves + kLanes);
    }
};

struct Q4_0 : PlainFormat {  // scale * (number - 8): the minimum is -8 * scale
    struct Unit {
        uint8_t values[kLanes];  // outputs j and j + 8 share a byte
    };
    static constexpr bool kGrouped = true;
    static constexpr bool kMinimum = true;
    static constexpr int kHalves = kPanel;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        const IntVector words = widen(unit.values);
        low = to_float(words & 0xf);
        high = to_float(words >> 4);
    }
    static void scale(const void* scales, int64_t group, Vector& low, Vector& high) {
        Q8_0::scale(scales, group, low, high);
    }
    static void minimum(const void* scales, int64_t group, Vector& low, Vector& high) {
        scale(scales, group, low, high);
        low *= -8.0f;
        high *= -8.0f;
    }
};

struct Q4_1 : PlainFormat {  // scale * number + minimum
    using Unit = Q4_0::Unit;
    static constexpr bool kGrouped = true;
    static constexpr bool kMinimum = true;
    static constexpr int kHalves = 2 * kPanel;
    static void decode(const Unit& unit, Vector& low, Vector& high) { Q4_0::decode(unit, low, high); }
    static void scale(const void* scales, int64_t group, Vector& low, Vector& high) {
        const uint16_t* halves = static_cast<const uint16_t*>(scales) + group * kHalves;
        low = load_halves(halves);
        high = load_halves(halves + kLanes);
    }
    static void minimum(const void* scales, int64_t group, Vector& low, Vector& high) {
        const uint16_t* halves = static_cast<const uint16_t*>(scales) + group * kHalves + kPanel;
        low = load_halves(halves);
        high = load_halves(halves + kLanes);
    }
};

}  // namespace layerskip
