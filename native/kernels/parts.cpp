#include "kernels/parts.h"

#include <algorithm>
#include <vector>

namespace layerskip {
namespace {

// What is prepared for all parts serves those that compute as the whole does.
const void* prepared_for(const Linear& part, const Linear& w, const void* prepared) {
    return part.compute == w.compute ? prepared : nullptr;
}

// Panels start..stop-1 of what lies one below the other.
void multiply_stacked(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start,
                      int stop, bool add, const void* prepared) {
    const auto* part = static_cast<const Linear*>(w.panels);
    for (int first = 0; first < stop; first += part->outputs / kPanel, ++part) {
        const int from = std::max(start - first, 0), to = std::min(stop - first, part->outputs / kPanel);
        if (from < to)
            multiply(*part, x, ldx, tokens, y + first * kPanel, ldy, from, to, add, prepared_for(*part, w, prepared));
    }
}

// The even panels are those of the first part, the odd ones those of the second. Each part's are computed side by side,
// and put in their places afterwards.
void multiply_alternating(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start,
                          int stop, bool add, const void* prepared) {
    thread_local std::vector<float> room;
    const auto* parts = static_cast<const Linear*>(w.panels);
    for (int part = 0; part < 2; ++part) {
        const int from = (start + 1 - part) / 2, to = (stop + 1 - part) / 2;
        const int64_t width = parts[part].outputs, size = tokens * width;
        if (static_cast<int64_t>(room.size()) < size) room.resize(size);
        if (from < to)
            multiply(parts[part], x, ldx, tokens, room.data(), width, from, to, false,
                     prepared_for(parts[part], w, prepared));
        for (int token = 0; token < tokens; ++token) {
            for (int panel = from; panel < to; ++panel) {
                const float* values = room.data() + token * width + panel * kPanel;
                float* place = y + token * ldy + (2 * panel + part) * kPanel;
                for (int i = 0; i < kPanel; ++i) place[i] = add ? values[i] + place[i] : values[i];
            }
        }
    }
}

}  // namespace

void multiply_parts(const Linear& w, const float* x, int64_t ldx, int tokens, float* y, int64_t ldy, int start, int stop,
                    bool add, const void* prepared) {
    const auto multiply_as_laid_out = w.format == kStacked ? multiply_stacked : multiply_alternating;
    multiply_as_laid_out(w, x, ldx, tokens, y, ldy, start, stop, add, prepared);
}

}  // namespace layerskip
