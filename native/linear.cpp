#include "linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "formats.h"

namespace layerskip {
namespace {

// The rows of a product: y = x W^T, or y += where `add`.
struct Rows {
    const float* x;
    int64_t ldx;
    float* y;
    int64_t ldy;
    bool add;
    const float* group_sums;  // of x, [rows, I / 32], for formats with minima
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
        const int64_t groups = inputs / kGroup;
        for (int64_t group = 0; group < groups; ++group) {
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
                Type::scale(w.scales, (panel + p) * groups + group, low, high);
                for (int r = 0; r < Count; ++r) {
                    sums[r][p][0] += low * partial[r][p][0];
                    sums[r][p][1] += high * partial[r][p][1];
                }
                if constexpr (Type::kMinimum) {
                    Type::minimum(w.scales, (panel + p) * groups + group, low, high);
                    for (int r = 0; r < Count; ++r) {
                        const Vector total = broadcast(rows.group_sums[r * groups + group]);
                        sums[r][p][0] += low * total;
                        sums[r][p][1] += high * total;
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
            const Rows part{rows.x + from * rows.ldx, rows.ldx, rows.y + from * rows.ldy, rows.ldy, rows.add,
                            rows.group_sums + from * (w.inputs / kGroup)};
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

// Sums of x over each group of inputs: what a minimum is multiplied by. One row after the other, so that a row's sums
// don't depend on the rows beside it.
const float* sum_groups(const float* x, int64_t ldx, int rows, int64_t groups) {
    thread_local std::vector<float> sums;
    if (static_cast<int64_t>(sums.size()) < rows * groups) sums.resize(rows * groups);
    for (int row = 0; row < rows; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = x + row * ldx + group * kGroup;
            sums[row * groups + group] =
                sum((load(from) + load(from + kLanes)) + (load(from + 2 * kLanes) + load(from + 3 * kLanes)));
        }
    }
    return sums.data();
}

}  // namespace

void multiply(const Linear& w, const float* x, int64_t ldx, int rows, float* y, int64_t ldy, int first, int last,
              bool add) {
    const bool minima = w.format == kQ4_0 || w.format == kQ4_1;
    const Rows all{x, ldx, y, ldy, add, minima ? sum_groups(x, ldx, rows, w.inputs / kGroup) : nullptr};
    switch (w.format) {
        case kFloat32: return multiply_as<Float32>(w, all, rows, first, last);
        case kBFloat16: return multiply_as<BFloat16>(w, all, rows, first, last);
        case kInt8: return multiply_as<Int8>(w, all, rows, first, last);
        case kFloat16: return multiply_as<Float16>(w, all, rows, first, last);
        case kQ8_0: return multiply_as<Q8_0>(w, all, rows, first, last);
        case kQ4_0: return multiply_as<Q4_0>(w, all, rows, first, last);
        case kQ4_1: return multiply_as<Q4_1>(w, all, rows, first, last);
        default: return multiply_as<Int4>(w, all, rows, first, last);
    }
}

}  // namespace layerskip
