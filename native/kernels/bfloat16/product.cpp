#include "kernels/bfloat16/product.h"

#include <cstring>

#include "kernels/float_product.h"

namespace layerskip {
namespace {

// The upper halves of floats, to the nearest, ties to even; what is below 2^-126 becomes zero.
inline WordVector upper_halves(Vector value) {
    const WordVector bits = (WordVector)value;
    const WordVector rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const WordVector quiet = bits >> 16 | 0x40u;  // of what isn't a number, which rounding could turn into one
    const auto is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
    const auto is_normal = (bits & 0x7f800000u) != 0u;
    return (is_number ? rounded : quiet) & (is_normal ? WordVector{} + 0xffffu : WordVector{} + 0x8000u);
}

uint16_t upper_half(float value) { return static_cast<uint16_t>(upper_halves(broadcast(value))[0]); }

#if defined(__AVX512BF16__)

using Number = uint16_t;  // one input after the other

inline void write(const WordVector halves, Number* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_maskz_cvtepi32_epi16(0xff, (__m256i)halves));
}

inline void write_one(uint16_t half, int64_t i, Number* to) { to[i] = half; }

struct BFloat16Product {
    static constexpr int kMostTokens = 12;
    static constexpr int most_panels(int tokens) { return tokens <= 4 ? 4 : 2; }

    template <int Count, int Panels>
    static void tile(const Linear& w, const Tokens& tokens, int64_t panel) {
        using Unit = BFloat16::Unit;
        constexpr int kGroupUnits = kGroup / BFloat16::kInputs;
        const int64_t inputs = w.inputs, step = panel_units<BFloat16>(inputs);
        const auto* units = static_cast<const Unit*>(w.panels) + panel * step;
        const auto* numbers = reinterpret_cast<const uint16_t*>(tokens.x);
        const int64_t next = tokens.ldx * (sizeof(float) / sizeof(Number));
        Wide sums[Count][Panels] = {};
        const auto add_pair = [&](int64_t unit) __attribute__((always_inline)) {
            Wide weights[Panels];
            for (int p = 0; p < Panels; ++p) weights[p] = (Wide)load_wide_words(units[p * step + unit].values);
            for (int t = 0; t < Count; ++t) {
                int32_t pair;
                std::memcpy(&pair, numbers + t * next + unit * BFloat16::kInputs, sizeof pair);
                const __m512i inputs_ = _mm512_set1_epi32(pair);
                for (int p = 0; p < Panels; ++p)
                    sums[t][p] = (Wide)_mm512_dpbf16_ps((__m512)sums[t][p], (__m512bh)inputs_, (__m512bh)weights[p]);
            }
        };
        int64_t unit = 0;
        for (; unit + kGroupUnits <= step; unit += kGroupUnits) {
            const int64_t start = unit * BFloat16::kInputs;
            const auto* ahead = units + (place_ahead<BFloat16, Panels>(tokens, inputs, start) - start) / BFloat16::kInputs;
#pragma GCC unroll 2
            for (int i = 0; i < kGroupUnits; ++i) {
                for (int p = 0; p < Panels; ++p) __builtin_prefetch(ahead + p * step + unit + i);
                add_pair(unit + i);
            }
        }
        for (; unit < step; ++unit) add_pair(unit);
        store_tile<BFloat16>(w, tokens, panel, sums);
    }
};

#else

using Number = float;  // rounded, the second of a pair before the first

inline void write(WordVector halves, Number* to) {
    const Vector rounded = (Vector)(halves << 16);
    store(to, Vector{rounded[1], rounded[0], rounded[3], rounded[2], rounded[5], rounded[4], rounded[7], rounded[6]});
}

inline void write_one(uint16_t half, int64_t i, Number* to) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(to + (i ^ 1), &bits, sizeof bits);
}

struct SecondBeforeFirst : BFloat16 {
    static Wide decode(const Unit& unit, int input) { return BFloat16::decode(unit, 1 - input); }
};

using BFloat16Product = FloatProduct<SecondBeforeFirst>;

#endif

}  // namespace

int64_t bfloat16_bytes(int64_t inputs, int64_t tokens) { return tokens * inputs * sizeof(Number); }

void round_to_bfloat16(const float* x, int64_t ldx, int64_t inputs, int64_t first, int64_t last, int64_t start,
                       int64_t stop, void* to) {
    for (int64_t token = first; token < last; ++token) {
        Number* numbers = static_cast<Number*>(to) + token * inputs;
        int64_t i = start;
        for (; i + kLanes <= stop; i += kLanes) write(upper_halves(load(x + token * ldx + i)), numbers + i);
        for (; i < stop; ++i) write_one(upper_half(x[token * ldx + i]), i, numbers);
    }
}

void multiply_bfloat16(const Linear& w, const Tokens& tokens, int count, int start, int stop, const void* rounded) {
    Tokens all = tokens;
    all.x = static_cast<const float*>(rounded);
    all.ldx = w.inputs * sizeof(Number) / sizeof(float);
    multiply_as<BFloat16Product>(w, all, count, start, stop);
}

}  // namespace layerskip
