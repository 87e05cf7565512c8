// How a product is divided: blocks of tokens, and tiles of as many panels as their sums have room for in registers.
//
// Product: what a tile computes. kMostTokens: tokens of a block. most_panels(tokens): panels of a tile.
// tile<Count, Panels>(w, tokens, panel): `Panels` panels times `Count` tokens.
#pragma once

#include <algorithm>

#include "kernels/formats.h"
#include "kernels/linear.h"

namespace layerskip {

// The tokens of a product: y = x W^T, or y += where `add`. What belongs to a group of inputs lies beside that of the other
// tokens.
struct Tokens {
    const float* x;
    int64_t ldx;
    float* y;
    int64_t ldy;
    bool add;
    bool fetch_panels;        // fetch the next panels instead of later inputs, as these are in the cache already
    int64_t all;              // tokens of a group in what follows
    const float* group_sums;  // of x, [I / 32, all], for formats with minima
    // Where inputs have eight bits (int8/inputs.h):
    const int8_t* numbers;         // [I / 32, all, 32]
    const float* steps;            // [I / 32, all], between neighbouring numbers
    const int32_t* negative_sums;  // [I / 32, all], minus the sums of the numbers
    const int32_t* negative_halves;  // [I / 32, all, 2], of 16 numbers each, where weights have a scale for 16 inputs

    // From the `count`-th token on.
    Tokens from(int64_t count) const {
        Tokens part = *this;
        part.x += count * ldx;
        part.y += count * ldy;
        part.group_sums += count;
        part.numbers += count * kGroup;
        part.steps += count;
        part.negative_sums += count;
        part.negative_halves += 2 * count;
        return part;
    }
};

constexpr int64_t kAhead = 8192;  // bytes between what is multiplied and what is fetched

// Units of a panel.
template <typename Type>
inline int64_t panel_units(int64_t inputs) {
    return (inputs + Type::kInputs - 1) / Type::kInputs;
}

// Where to fetch from while the group of inputs at `start` is multiplied, counted in inputs of the tile's first panel.
// The last groups of a tile are followed by the first ones of the next tile, which the processor doesn't foresee.
template <typename Type, int Panels>
inline int64_t place_ahead(const Tokens& tokens, int64_t inputs, int64_t start) {
    constexpr int64_t bytes = sizeof(typename Type::Unit) / Type::kInputs;
    constexpr int64_t groups = std::max<int64_t>(1, kAhead / (Panels * kGroup * bytes));
    const int64_t place = start + (tokens.fetch_panels ? inputs : groups * kGroup);
    return place < inputs ? place : place + (Panels - 1) * inputs;
}

// What sums become at the end of a tile.
template <typename Type, int Count, int Panels>
inline void store_tile(const Linear& w, const Tokens& tokens, int64_t panel, const Wide (&sums)[Count][Panels]) {
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
template <typename Product, int Count, int Panels = Product::most_panels(Count)>
void multiply_tiles(const Linear& w, const Tokens& tokens, int start, int stop) {
    for (; start + Panels <= stop; start += Panels) Product::template tile<Count, Panels>(w, tokens, start);
    if constexpr (Panels > 1) multiply_tiles<Product, Count, Panels / 2>(w, tokens, start, stop);
}

// A block of up to `Count` tokens.
template <typename Product, int Count = Product::kMostTokens>
void multiply_block(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    if (count == Count) return multiply_tiles<Product, Count>(w, tokens, start, stop);
    if constexpr (Count > 1) multiply_block<Product, Count - 1>(w, tokens, count, start, stop);
}

// One block of tokens after another. If there are several, they go through a tile's panels, which stay in the cache,
// before the next ones; the last block fetches these.
template <typename Product>
void multiply_as(const Linear& w, const Tokens& tokens, int count, int start, int stop) {
    const int blocks = (count + Product::kMostTokens - 1) / Product::kMostTokens;
    const int step = blocks > 1 ? Product::most_panels(Product::kMostTokens) : stop - start;
    for (int panel = start; panel < stop; panel += step) {
        for (int block = 0; block < blocks; ++block) {
            int from, to;
            share(count, block, blocks, from, to);
            Tokens part = tokens.from(from);
            part.fetch_panels = blocks > 1 && block == blocks - 1;
            multiply_block<Product>(w, part, to - from, panel, std::min(stop, panel + step));
        }
    }
}

}  // namespace layerskip
