#include "interface.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "choosing.h"
#include "kernels/linear.h"
#include "kernels/sampling.h"
#include "kernels/target.h"
#include "pass.h"
#include "threads.h"

namespace layerskip {
namespace {

using Lock = std::lock_guard<std::mutex>;

// Call pack_panel(panel, first output, number of outputs) for every panel of a weight.
template <typename PackPanel>
void pack_panels(const PackCall& call, const PackPanel& pack_panel) {
    Lock lock(Team::in_use());
    Team::of(call.threads).run([&](int member, int size) {
        int start, stop;
        share((call.outputs + kPanel - 1) / kPanel, member, size, start, stop);
        for (int panel = start; panel < stop; ++panel)
            pack_panel(call.first + panel * call.step, panel * kPanel, std::min(kPanel, call.outputs - panel * kPanel));
    });
}

}  // namespace

void layerskip_run_layers(const RunLayersCall* call) {
    Lock lock(Team::in_use());
    run_layers(*call->network, call->hidden, {call->starts, call->counts, call->rows}, *call->cache, call->start,
               call->stop);
}

void layerskip_write_keys(const RunLayersCall* call) {
    Lock lock(Team::in_use());
    write_keys(*call->network, call->hidden, {call->starts, call->counts, call->rows}, *call->cache, call->start);
}

void layerskip_run_adapter(const AdaptCall* call) {
    Lock lock(Team::in_use());
    const Network& network = *call->network;
    const Rows rows{call->starts, call->counts, call->rows};
    std::vector<float> projected(rows.total() * network.hidden_size);
    if (network.layers[call->layer].values.panels != nullptr)
        fuse(network, call->layer, rows, call->sources, *call->cache, projected.data());
    run_adapter(network, call->layer, call->hidden, rows, {call->sources, projected.data()}, *call->cache);
}

void layerskip_unembed(const Network* network, const float* hidden, int32_t tokens, float* logits) {
    Lock lock(Team::in_use());
    unembed(*network, hidden, tokens, logits);
}

void layerskip_choose(const ChooseCall* call) {
    Lock lock(Team::in_use());
    choose(*call);
}

int32_t layerskip_draft(const DraftCall* call) {
    Lock lock(Team::in_use());
    return draft(*call);
}

int64_t layerskip_packed_bytes(int32_t inputs, int32_t outputs, int32_t format) {
    return packed_bytes(inputs, outputs, format);
}

void layerskip_pack(const PackCall* call) {
    const float* weight = static_cast<const float*>(call->weight);
    const int64_t inputs = call->inputs;
    pack_panels(*call, [&](int panel, int64_t output, int count) {
        pack(weight + output * inputs, inputs, count, call->format, call->panels, call->scales, panel);
    });
}

void layerskip_pack_blocks(const PackCall* call) {
    const uint8_t* weight = static_cast<const uint8_t*>(call->weight);
    const int64_t output_bytes = blocks_row_bytes(call->format, call->inputs);
    pack_panels(*call, [&](int panel, int64_t output, int count) {
        pack_blocks(weight + output * output_bytes, call->inputs, count, call->format, call->panels, call->scales,
                    panel);
    });
}

int32_t layerskip_fits_float16(const float* numbers, int64_t count) { return fits_float16(numbers, count); }

int32_t layerskip_fits_bfloat16(const float* numbers, int64_t count) { return fits_bfloat16(numbers, count); }

void layerskip_multiply(const Linear* w, const float* x, int32_t tokens, float* y, int32_t threads) {
    Lock lock(Team::in_use());
    Team::of(threads).run([&](int member, int size) {
        int start, stop;
        share(w->outputs / kPanel, member, size, start, stop);
        multiply(*w, x, w->inputs, tokens, y, w->outputs, start, stop, false);
    });
}

void layerskip_filter(const Sampling* sampling, float* scores, int64_t rows, int64_t queries, int64_t count,
                      int32_t threads) {
    Team::share_out(threads, rows * queries, [&](int64_t position) {
        float* logits = scores + position * count;
        if (!any_not_a_number(logits, count)) filter(*sampling, position / queries, logits, count);
    });
}

void layerskip_gumbel(const uint64_t* keys, int64_t positions, int64_t token, int64_t count, float* out,
                      int32_t threads) {
    Team::share_out(threads, positions,
                    [&](int64_t position) { gumbel(keys[position], token, count, out + position * count); });
}

int32_t layerskip_interface() { return 16; }

const char* layerskip_target() { return target(); }

int32_t layerskip_runs_here() { return runs_here(); }

}  // namespace layerskip
