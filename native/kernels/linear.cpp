#include "kernels/linear.h"

#include <algorithm>
#include <vector>

#include "kernels/formats.h"

namespace layerskip {
namespace {

// The tokens of a product: y = x W^T, or y += where `add`.
struct Tokens {
    const float* x;
    int64_t ldx;
    float* y;
    int64_t ldy;
    bool add;
    bool fetch_panels;        // fetch the next panels instead of later inputs, as these are in the cache already
    const float* group_sums;  // of x, [tokens, I / 32], for formats with minima
};

// Tokens of a tile, and most panels for a number of them: enough sums to hide a product's latency, few enough for the
// registers, of which AVX-512 has twice as many, each twice as wide.
#if defined(__AVX512F__)
constexpr int kMostTokens = 9;
constexpr int most_panels(int tokens) { return tokens <= 5 ? 4 : 2; }
#else
constexpr int kMostTokens = 6;
constexpr int most_panels(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
#endif

constexpr int64_t kAhead = 8192;  // bytes between what is multiplied and what is fetched

template <typename Type>
constexpr int64_t kInputBytes = sizeof(typename Type::Unit) / Type::kInputs;  // of a panel

// Where to fetch from while the group of inputs at `start` is multiplied, counted in inputs of the tile's first panel.
// The last groups of a tile are followed by the first ones of the next tile, which the processor doesn't foresee.
template <typename Type, int Panels>
inline int64_t place_ahead(const Tokens& tokens, int64_t inputs, int64_t start) {
    constexpr int64_t groups = std::max<int64_t>(1, kAhead / (Panels * kGroup * kInputBytes<Type>));
    const int64_t place = start + (tokens.fetch_panels ? inputs : groups * kGroup);
    return place < inputs ? place : place + (Panels - 1) * inputs;
}

// A group of inputs of `Panels` panels, times `Count` tokens, added to `sums`. It is inlined at once, because GCC takes
// fetching for having no effect, and drops it in functions that it inlines late.
template <typename Type, int Count, int Panels>
__attribute__((always_inline)) inline void add_group(const typename Type::Unit* units, const Tokens& tokens,
                                                     int64_t inputs, int64_t start, int64_t stop,
                                                     Wide (&sums)[Count][Panels]) {
    constexpr int kInputs = Type::kInputs;
    const auto* ahead = units + (place_ahead<Type, Panels>(tokens, inputs, start) - start) / kInputs;
    for (int64_t i = start; i < stop; i += kInputs) {
        for (int p = 0; p < Panels; ++p) __builtin_prefetch(ahead + (p * inputs + i) / kInputs);
#pragma GCC unroll 8
        for (int n = 0; n < kInputs; ++n) {
            for (int p = 0; p < Panels; ++p) {
                const Wide weights = Type::decode(units[(p * inputs + i) / kInputs], n);
                for (int t = 0; t < Count; ++t)
                    add_product(sums[t][p], weights, broadcast_wide(tokens.x[t * tokens.ldx + i + n]));
            }
        }
    }
}

// All inputs of formats with groups: sums of each group by itself, then times its scale, then plus its minimum.
template <typename Type, int Count, int Panels>
__attribute__((always_inline)) inline void add_scaled_groups(const Linear& w, const typename Type::Unit* units,
                                                             const Tokens& tokens, int64_t panel,
                                                             Wide (&sums)[Count][Panels]) {
    const int64_t inputs = w.inputs, groups = inputs / kGroup;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t start = group * kGroup, ahead = place_ahead<Type, Panels>(tokens, inputs, start) / kGroup;
        Wide partial[Count][Panels] = {};
        add_group<Type, Count, Panels>(units, tokens, inputs, start, start + kGroup, partial);
        for (int p = 0; p < Panels; ++p) {
            const int64_t first = (panel + p) * groups;
            __builtin_prefetch(static_cast<const uint16_t*>(w.scales) + (first + ahead) * Type::kHalves);
            const Wide scale = Type::scale(w.scales, first + group);
            for (int t = 0; t < Count; ++t) add_product(sums[t][p], scale, partial[t][p]);
            if constexpr (Type::kMinimum) {
                const Wide minimum = Type::minimum(w.scales, first + group);
                for (int t = 0; t < Count; ++t)
                    add_product(sums[t][p], minimum, broadcast_wide(tokens.group_sums[t * groups + group]));
            }
        }
    }
}

// `Panels` panels times `Count` tokens at once; their sums stay in registers.
template <typename Type, int Count, int Panels>
void tile(const Linear& w, const Tokens& tokens, int64_t panel) {
    const int64_t inputs = w.inputs;
    const auto* units = static_cast<const typename Type::Unit*>(w.panels) + panel * inputs / Type::kInputs;
    Wide sums[Count][Panels] = {};
    if constexpr (Type::kGrouped) {
        add_scaled_groups<Type, Count, Panels>(w, units, tokens, panel, sums);
    } else {
        for (int64_t start = 0; start < inputs; start += kGroup)
            add_group<Type, Count, Panels>(units, tokens, inputs, start, std::min(start + kGroup, inputs), sums);
    }
    for (int p = 0; p < Panels; ++p) {
        const int64_t output = (panel + p) * kPanel;
        for (int t = 0; t < Count; ++t) {
            Wide value = sums[t][p];
            if constexpr (Type::kScaled) value = value * load_wide(static_cast<const float*>(w.scales) + output);
            if (w.bias != nullptr) value += load_wide(w.bias + output);
            float* to = tokens.y + t * tokens.ldy + output;
            if (tokens.add) value += load_wide(to);
            store(to, value);
        }
    }
}

// As many panels at once as there is room for, and those that are left over in smaller tiles.
template <typename Type, int Count, int Panels = most_panels(Count)>
void multiply_tiles(const Linear& w, const Tokens& tokens, int start, int stop) {
    for (; start + Panels <= stop; start += Panels) tile<Type, Count, Panels>(w, tokens, start);
    if constexpr (Panels > 1) multiply_tiles<Type, Count, Panels / 2>(w, tokens, start, stop);
}

// A block of up to `Count` tokens.
template <typename Type, int Count = kMostTokens>
void multiply_block(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    if (count == Count) return multiply_tiles<Type, Count>(w, tokens, start, stop);
    if constexpr (Count > 1) multiply_block<Type, Count - 1>(w, tokens, count, start, stop);
}

// One block of tokens after another. If there are several, they go through a tile's panels, which stay in the cache,
// before the next ones; the last block fetches these.
template <typename Type>
void multiply_as(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    const int blocks = (count + kMostTokens - 1) / kMostTokens;
    const int step = blocks > 1 ? most_panels(kMostTokens) : stop - start;
    for (int panel = start; panel < stop; panel += step) {
        for (int block = 0; block < blocks; ++block) {
            int from, to;
            share(count, block, blocks, from, to);
            Tokens part = tokens;
            part.x += from * tokens.ldx;
            part.y += from * tokens.ldy;
            part.fetch_panels = blocks > 1 && block == blocks - 1;
            part.group_sums += from * (w.inputs / kGroup);
            multiply_block<Type>(w, part, to - from, panel, std::min(stop, panel + step));
        }
    }
}

// Sums of x over each group of inputs, which minima are multiplied by. Each token's are computed by themselves, so that
// they don't depend on the tokens beside it.
const float* sum_groups(const float* x, int64_t ldx, int tokens, int64_t groups) {
    thread_local std::vector<float> sums;
    if (static_cast<int64_t>(sums.size()) < tokens * groups) sums.resize(tokens * groups);
    for (int token = 0; token < tokens; ++token) {
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = x + token * ldx + group * kGroup;
            sums[token * groups + group] =
                sum((load(from) + load(from + kLanes)) + (load(from + 2 * kLanes) + load(from + 3 * kLanes)));
        }
    }
    return sums.data();
}

}  // namespace

void multiply(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start, int stop,
              bool add) {
    const bool minima = w.format == kQ4_0 || w.format == kQ4_1;
    const Tokens all{x, ldx, y, ldy, add, false, minima ? sum_groups(x, ldx, tokens, w.inputs / kGroup) : nullptr};
    switch (w.format) {
        case kFloat32: return multiply_as<Float32>(w, all, tokens, start, stop);
        case kBFloat16: return multiply_as<BFloat16>(w, all, tokens, start, stop);
        case kInt8: return multiply_as<Int8>(w, all, tokens, start, stop);
        case kFloat16: return multiply_as<Float16>(w, all, tokens, start, stop);
        case kQ8_0: return multiply_as<Q8_0>(w, all, tokens, start, stop);
        case kQ4_0: return multiply_as<Q4_0>(w, all, tokens, start, stop);
        case kQ4_1: return multiply_as<Q4_1>(w, all, tokens, start, stop);
        default: return multiply_as<Int4>(w, all, tokens, start, stop);
    }
}

}  // namespace layerskip
