#include "linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace layerskip {
namespace {

inline Vector as_floats(WordVector bits) { return (Vector)bits; }  // the same bits

// Formats: how 16 weights of one input become two vectors. Unit: what a panel holds for one input.
struct Float32 {
    struct Unit {
        float values[kPanel];
    };
    static constexpr bool kGrouped = false;
    static constexpr bool kScaled = false;
    static constexpr bool kFetches = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        low = load(unit.values);
        high = load(unit.values + kLanes);
    }
};

struct BFloat16 {  // outputs j and j + 8 share a word: a bfloat16 is the upper half of a float32
    struct Unit {
        uint32_t values[kLanes];
    };
    static constexpr bool kGrouped = false;
    static constexpr bool kScaled = false;
    static constexpr bool kFetches = true;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        WordVector words;
        std::memcpy(&words, unit.values, sizeof words);
        low = as_floats(words << 16);
        high = as_floats(words & 0xffff0000u);
    }
};

struct Int8 {
    struct Unit {
        int8_t values[kPanel];
    };
    static constexpr bool kGrouped = false;
    static constexpr bool kScaled = true;
    static constexpr bool kFetches = false;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        low = to_float(widen(unit.values));
        high = to_float(widen(unit.values + kLanes));
    }
};

struct Int4 {  // outputs j and j + 8 share a byte
    struct Unit {
        int8_t values[kLanes];
    };
    static constexpr bool kGrouped = true;
    static constexpr bool kScaled = false;
    static constexpr bool kFetches = false;
    static void decode(const Unit& unit, Vector& low, Vector& high) {
        const IntVector words = widen(unit.values);
        low = to_float((words << 28) >> 28);
        high = to_float(words >> 4);
    }
};

// The rows of a product: y = x W^T, or y += where `add`.
struct Rows {
    const float* x;
    int64_t ldx;
    float* y;
    int64_t ldy;
    bool add;
};

constexpr int kMaxRows = 6;
constexpr int64_t kAhead = 1024;  // bytes

// Most panels at once for a number of rows: enough sums to hide the latency of a product, few enough for 16 registers.
constexpr int most_panels(int rows) { return rows == 1 ? 6 : rows == 2 ? 3 : 1; }

// `Panels` panels times `Count` rows at once; their sums stay in registers. A single panel is one stream of memory, which
// doesn't keep it busy: bytes `ahead` of it are fetched on the way.
template <typename Type, int Count, int Panels>
void tile(const Linear& w, const Rows& rows, int64_t panel, int64_t ahead) {
    using Unit = typename Type::Unit;
    const int64_t inputs = w.inputs, ldx = rows.ldx;
    const float* x = rows.x;
    const Unit* units = static_cast<const Unit*>(w.panels) + panel * inputs;
    Vector sums[Count][Panels][2] = {};
    if constexpr (Type::kGrouped) {
        const auto* scales = static_cast<const BFloat16::Unit*>(w.scales) + panel * (inputs / kGroup);
        for (int64_t group = 0; group < inputs / kGroup; ++group) {
            Vector partial[Count][Panels][2] = {};
            for (int64_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
                for (int p = 0; p < Panels; ++p) {
                    Vector low, high;
                    Type::decode(units[p * inputs + i], low, high);
                    for (int r = 0; r < Count; ++r) {
                        const Vector value = broadcast(x[r * ldx + i]);
                        partial[r][p][0] += low * value;
                        partial[r][p][1] += high * value;
                    }
                }
            }
            for (int p = 0; p < Panels; ++p) {
                Vector low, high;
                BFloat16::decode(scales[p * (inputs / kGroup) + group], low, high);
                for (int r = 0; r < Count; ++r) {
                    sums[r][p][0] += low * partial[r][p][0];
                    sums[r][p][1] += high * partial[r][p][1];
                }
            }
        }
    } else {
        const char* next = reinterpret_cast<const char*>(units) + ahead;
        for (int64_t i = 0; i < inputs; ++i) {
            if constexpr (Count >= 3 && Type::kFetches) __builtin_prefetch(next + i * sizeof(Unit));
            for (int p = 0; p < Panels; ++p) {
                Vector low, high;
                Type::decode(units[p * inputs + i], low, high);
                for (int r = 0; r < Count; ++r) {
                    const Vector value = broadcast(x[r * ldx + i]);
                    sums[r][p][0] += low * value;
                    sums[r][p][1] += high * value;
                }
            }
        }
    }
    for (int p = 0; p < Panels; ++p) {
        for (int half = 0; half < 2; ++half) {
            const int64_t output = (panel + p) * kPanel + half * kLanes;
            for (int r = 0; r < Count; ++r) {
                Vector value = sums[r][p][half];
                if constexpr (Type::kScaled) value *= load(static_cast<const float*>(w.scales) + output);
                if (w.bias != nullptr) value += load(w.bias + output);
                float* to = rows.y + r * rows.ldy + output;
                if (rows.add) value += load(to);
                store(to, value);
            }
        }
    }
}

template <typename Type, int Count>
void tile_of(const Linear& w, const Rows& rows, int64_t panel, int panels, int64_t ahead) {
    switch (panels) {
        case 1: return tile<Type, Count, 1>(w, rows, panel, ahead);
        case 2: return tile<Type, Count, std::min(2, most_panels(Count))>(w, rows, panel, ahead);
        case 3: return tile<Type, Count, std::min(3, most_panels(Count))>(w, rows, panel, ahead);
        case 4: return tile<Type, Count, std::min(4, most_panels(Count))>(w, rows, panel, ahead);
        case 5: return tile<Type, Count, std::min(5, most_panels(Count))>(w, rows, panel, ahead);
        default: return tile<Type, Count, most_panels(Count)>(w, rows, panel, ahead);
    }
}

// Few rows: as many panels at once as there is room for.
template <typename Type, int Count>
void multiply_few(const Linear& w, const Rows& rows, int first, int last) {
    const int most = most_panels(Count), tiles = (last - first + most - 1) / most;
    for (int i = 0; i < tiles; ++i) {
        int from, to;
        share(last - first, i, tiles, from, to);
        tile_of<Type, Count>(w, rows, first + from, to - from, kAhead);
    }
}

// More rows: block after block of them through one panel, which stays in the cache. Meanwhile the last block fetches the
// next panel.
template <typename Type>
void multiply_many(const Linear& w, const Rows& rows, int count, int first, int last) {
    const int blocks = (count + kMaxRows - 1) / kMaxRows;
    const int64_t panel_bytes = w.inputs * static_cast<int64_t>(sizeof(typename Type::Unit));
    for (int panel = first; panel < last; ++panel) {
        for (int block = 0; block < blocks; ++block) {
            int from, to;
            share(count, block, blocks, from, to);
            const Rows part{rows.x + from * rows.ldx, rows.ldx, rows.y + from * rows.ldy, rows.ldy, rows.add};
            const int64_t ahead = blocks > 1 && block == blocks - 1 ? panel_bytes : kAhead;
            switch (to - from) {
                case 3: tile<Type, 3, 1>(w, part, panel, ahead); break;
                case 4: tile<Type, 4, 1>(w, part, panel, ahead); break;
                case 5: tile<Type, 5, 1>(w, part, panel, ahead); break;
                default: tile<Type, 6, 1>(w, part, panel, ahead); break;
            }
        }
    }
}

template <typename Type>
void multiply_as(const Linear& w, const Rows& rows, int count, int first, int last) {
    switch (count) {
        case 1: return multiply_few<Type, 1>(w, rows, first, last);
        case 2: return multiply_few<Type, 2>(w, rows, first, last);
        default: return multiply_many<Type>(w, rows, count, first, last);
    }
}

uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Largest magnitude of weight[first..last) over `limit`: the step between neighbouring integers.
float step_of(const float* weight, int64_t first, int64_t last, float limit) {
    float largest = 0;
    for (int64_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(weight[i]));
    return largest / limit;
}

int8_t quantize(float value, float step, int limit) {
    const float scaled = step > 0 ? std::nearbyint(value / step) : 0;
    return static_cast<int8_t>(std::min<float>(limit, std::max<float>(-limit - 1, scaled)));
}

void pack_int4(const float* const* rows, int64_t inputs, void* panels, void* scales, int64_t panel) {
    const int64_t groups = inputs / kGroup;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = group * kGroup, to = from + kGroup;
        auto& words = static_cast<BFloat16::Unit*>(scales)[panel * groups + group];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const float *low = rows[lane], *high = rows[lane + kLanes];
            const uint16_t steps[2] = {to_bfloat16(step_of(low, from, to, 7)), to_bfloat16(step_of(high, from, to, 7))};
            words.values[lane] = steps[0] | static_cast<uint32_t>(steps[1]) << 16;
            for (int64_t i = from; i < to; ++i)
                static_cast<Int4::Unit*>(panels)[panel * inputs + i].values[lane] =
                    static_cast<int8_t>((quantize(low[i], from_bfloat16(steps[0]), 7) & 0xf) |
                                        (quantize(high[i], from_bfloat16(steps[1]), 7) & 0xf) << 4);
        }
    }
}

}  // namespace

int64_t packed_bytes(int32_t inputs, int32_t outputs, int32_t format) {
    const int64_t count = static_cast<int64_t>(inputs) * outputs;
    switch (format) {
        case kFloat32: return 4 * count;
        case kBFloat16: return 2 * count;
        case kInt8: return count;
        default: return count / 2;
    }
}

void pack(const float* weight, int64_t inputs, int count, int32_t format, void* panels, void* scales, int64_t panel) {
    const std::vector<float> zeros(count < kPanel ? inputs : 0);
    const float* rows[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) rows[j] = j < count ? weight + j * inputs : zeros.data();
    if (format == kInt4) return pack_int4(rows, inputs, panels, scales, panel);
    float steps[kPanel];
    for (int64_t j = 0; format == kInt8 && j < kPanel; ++j)
        static_cast<float*>(scales)[panel * kPanel + j] = steps[j] = step_of(rows[j], 0, inputs, 127);
    for (int64_t i = 0; i < inputs; ++i) {
        const int64_t unit = panel * inputs + i;
        for (int64_t j = 0; j < kPanel; ++j) {
            const float value = rows[j][i];
            switch (format) {
                case kFloat32: static_cast<Float32::Unit*>(panels)[unit].values[j] = value; break;
                case kBFloat16: {
                    auto* halves = reinterpret_cast<uint16_t*>(static_cast<BFloat16::Unit*>(panels) + unit);
                    halves[j % kLanes * 2 + j / kLanes] = to_bfloat16(value);
                    break;
                }
                default: static_cast<Int8::Unit*>(panels)[unit].values[j] = quantize(value, steps[j], 127); break;
            }
        }
    }
}

void multiply(const Linear& w, const float* x, int64_t ldx, int rows, float* y, int64_t ldy, int first, int last,
              bool add) {
    const Rows all{x, ldx, y, ldy, add};
    switch (w.format) {
        case kFloat32: return multiply_as<Float32>(w, all, rows, first, last);
        case kBFloat16: return multiply_as<BFloat16>(w, all, rows, first, last);
        case kInt8: return multiply_as<Int8>(w, all, rows, first, last);
        default: return multiply_as<Int4>(w, all, rows, first, last);
    }
}

}  // namespace layerskip
