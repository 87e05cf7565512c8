#include "kernels/linear.h"

#include <algorithm>
#include <cmath>
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
    const float* group_sums;  // of x, [tokens, I / 32], for formats with minima
};

constexpr int kMostTokens = 6;    // tokens of a tile
constexpr int64_t kAhead = 1024;  // bytes to fetch ahead

// Most panels at once for a number of tokens: enough sums to hide a product's latency, few enough for 16 registers.
constexpr int most_panels(int tokens) { return tokens == 1 ? 6 : tokens == 2 ? 3 : 1; }

// `Panels` panels times `Count` tokens at once; their sums stay in registers. A single panel is one stream of memory,
// which alone doesn't use all of its bandwidth: bytes are fetched `ahead` of those that are multiplied.
template <typename Type, int Count, int Panels>
void tile(const Linear& w, const Tokens& tokens, int64_t panel, int64_t ahead) {
    using Unit = typename Type::Unit;
    const int64_t inputs = w.inputs, ldx = tokens.ldx;
    const float* x = tokens.x;
    const Unit* units = static_cast<const Unit*>(w.panels) + panel * inputs;
    Vector sums[Count][Panels][2] = {};
    if constexpr (Type::kGrouped) {
        const int64_t groups = inputs / kGroup;
        for (int64_t group = 0; group < groups; ++group) {
            Vector partial[Count][Panels][2] = {};
            for (int64_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
                for (int p = 0; p < Panels; ++p) {
                    Vector low, high;
                    Type::decode(units[p * inputs + i], low, high);
                    for (int t = 0; t < Count; ++t) {
                        const Vector value = broadcast(x[t * ldx + i]);
                        partial[t][p][0] += low * value;
                        partial[t][p][1] += high * value;
                    }
                }
            }
            for (int p = 0; p < Panels; ++p) {
                Vector low, high;
                Type::scale(w.scales, (panel + p) * groups + group, low, high);
                for (int t = 0; t < Count; ++t) {
                    sums[t][p][0] += low * partial[t][p][0];
                    sums[t][p][1] += high * partial[t][p][1];
                }
                if constexpr (Type::kMinimum) {
                    Type::minimum(w.scales, (panel + p) * groups + group, low, high);
                    for (int t = 0; t < Count; ++t) {
                        const Vector total = broadcast(tokens.group_sums[t * groups + group]);
                        sums[t][p][0] += low * total;
                        sums[t][p][1] += high * total;
                    }
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
                for (int t = 0; t < Count; ++t) {
                    const Vector value = broadcast(x[t * ldx + i]);
                    sums[t][p][0] += low * value;
                    sums[t][p][1] += high * value;
                }
            }
        }
    }
    for (int p = 0; p < Panels; ++p) {
        for (int half = 0; half < 2; ++half) {
            const int64_t output = (panel + p) * kPanel + half * kLanes;
            for (int t = 0; t < Count; ++t) {
                Vector value = sums[t][p][half];
                if constexpr (Type::kScaled) value *= load(static_cast<const float*>(w.scales) + output);
                if (w.bias != nullptr) value += load(w.bias + output);
                float* to = tokens.y + t * tokens.ldy + output;
                if (tokens.add) value += load(to);
                store(to, value);
            }
        }
    }
}

template <typename Type, int Count>
void tile_of(const Linear& w, const Tokens& tokens, int64_t panel, int panels, int64_t ahead) {
    switch (panels) {
        case 1: return tile<Type, Count, 1>(w, tokens, panel, ahead);
        case 2: return tile<Type, Count, std::min(2, most_panels(Count))>(w, tokens, panel, ahead);
        case 3: return tile<Type, Count, std::min(3, most_panels(Count))>(w, tokens, panel, ahead);
        case 4: return tile<Type, Count, std::min(4, most_panels(Count))>(w, tokens, panel, ahead);
        case 5: return tile<Type, Count, std::min(5, most_panels(Count))>(w, tokens, panel, ahead);
        default: return tile<Type, Count, most_panels(Count)>(w, tokens, panel, ahead);
    }
}

// Few tokens: as many panels at once as there is room for.
template <typename Type, int Count>
void multiply_few(const Linear& w, const Tokens& tokens, int start, int stop) {
    const int most = most_panels(Count), tiles = (stop - start + most - 1) / most;
    for (int i = 0; i < tiles; ++i) {
        int from, to;
        share(stop - start, i, tiles, from, to);
        tile_of<Type, Count>(w, tokens, start + from, to - from, kAhead);
    }
}

// More tokens: one block of them after another through one panel, which stays in the cache. The last block fetches the
// next panel.
template <typename Type>
void multiply_many(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    const int blocks = (count + kMostTokens - 1) / kMostTokens;
    const int64_t panel_bytes = w.inputs * static_cast<int64_t>(sizeof(typename Type::Unit));
    for (int panel = start; panel < stop; ++panel) {
        for (int block = 0; block < blocks; ++block) {
            int from, to;
            share(count, block, blocks, from, to);
            const Tokens part{tokens.x + from * tokens.ldx, tokens.ldx, tokens.y + from * tokens.ldy, tokens.ldy,
                              tokens.add, tokens.group_sums + from * (w.inputs / kGroup)};
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
void multiply_as(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    switch (count) {
        case 1: return multiply_few<Type, 1>(w, tokens, start, stop);
        case 2: return multiply_few<Type, 2>(w, tokens, start, stop);
        default: return multiply_many<Type>(w, tokens, count, start, stop);
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
    const Tokens all{x, ldx, y, ldy, add, minima ? sum_groups(x, ldx, tokens, w.inputs / kGroup) : nullptr};
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
