// Products in all formats, noise, filters, drafting and passes through a small network, of fixed pseudo-random numbers:
// prints a hash of the bits of each result. Programs built for different instruction sets are compared by it, and it is
// run under sanitizers.
//
//     everything [threads] [rounds]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "interface.h"

using namespace layerskip;

namespace {

int threads = 1, wrong = 0;

// Numbers that need no library to be computed, and no rounding: the same everywhere.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 2 + 1) {}
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 33);
    }
    // From -1 to 1, in steps that bfloat16 (8 bits) or float32 (20 bits) holds.
    float number(int bits) {
        const int32_t most = 1 << (bits - 1);
        return static_cast<float>(static_cast<int32_t>(next() % (2 * most)) - most) / static_cast<float>(most);
    }
    std::vector<float> numbers(int64_t count, int bits = 20, float scale = 1.0f) {
        std::vector<float> found(count);
        for (float& value : found) value = number(bits) * scale;
        return found;
    }
};

uint64_t hash(const void* data, size_t bytes) {
    const auto* from = static_cast<const uint8_t*>(data);
    uint64_t found = 14695981039346656037u;
    for (size_t i = 0; i < bytes; ++i) found = (found ^ from[i]) * 1099511628211u;
    return found;
}

template <typename Number>
void report(const std::string& name, const std::vector<Number>& values) {
    double sum = 0, most = 0;
    for (const Number value : values) {
        sum += static_cast<double>(value);
        most = std::max(most, std::fabs(static_cast<double>(value)));
        if (!std::isfinite(static_cast<double>(value))) ++wrong;
    }
    std::printf("%s %016llx %.9g %.9g\n", name.c_str(),
                static_cast<unsigned long long>(hash(values.data(), values.size() * sizeof(Number))), sum, most);
}

struct NamedFormat {
    const char* name;
    int32_t format;
    int block_bytes;  // 0: not in blocks
    int scales;       // float16 numbers at the start of a block
    int scale_bytes;  // of each output and group, or of each output in int8
    bool int8;        // whether inputs may have eight bits
};

constexpr NamedFormat kFormats[] = {
    {"float32", kFloat32, 0, 0, 0, false}, {"bfloat16", kBFloat16, 0, 0, 0, false},
    {"int8", kInt8, 0, 0, 4, true},        {"int4", kInt4, 0, 0, 2, true},
    {"float16", kFloat16, 0, 0, 0, false}, {"q8_0", kQ8_0, 34, 1, 2, true},
    {"q4_0", kQ4_0, 18, 1, 2, true},       {"q4_1", kQ4_1, 20, 2, 4, true},
};

int64_t padded(int64_t outputs) { return (outputs + kPanel - 1) / kPanel * kPanel; }

// A weight and what its structure points to.
struct Weight {
    std::vector<uint8_t> panels, scales;
    std::vector<float> bias;
    Linear view{};

    Weight(const NamedFormat& format, int inputs, int outputs, int32_t compute, uint64_t seed, int step = 1) {
        const int64_t all = padded(outputs) * step;
        panels.resize(layerskip_packed_bytes(inputs, static_cast<int32_t>(all), format.format));
        const int64_t groups = format.format == kInt8 ? 1 : inputs / kGroup;
        scales.resize(all * groups * format.scale_bytes);
        for (int first = 0; first < step; ++first) pack(format, inputs, outputs, Random(seed + first), first, step);
        bias = Random(seed + 100).numbers(all);
        view.panels = panels.data();
        view.scales = scales.data();
        view.bias = bias.data();
        view.inputs = inputs;
        view.outputs = static_cast<int32_t>(all);
        view.format = format.format;
        view.compute = compute;
    }

    void pack(const NamedFormat& format, int inputs, int outputs, Random random, int first, int step) {
        PackCall call{};
        call.panels = panels.data();
        call.scales = scales.data();
        call.inputs = inputs;
        call.outputs = outputs;
        call.format = format.format;
        call.first = first;
        call.step = step;
        call.threads = threads;
        if (format.block_bytes == 0) {
            const float scale = 1.0f / 8;
            const std::vector<float> numbers = random.numbers(static_cast<int64_t>(outputs) * inputs, 8, scale);
            call.weight = numbers.data();
            return layerskip_pack(&call);
        }
        std::vector<uint8_t> blocks(static_cast<size_t>(outputs) * (inputs / kGroup) * format.block_bytes);
        for (size_t at = 0; at < blocks.size(); at += format.block_bytes) {
            for (int i = 0; i < format.block_bytes; ++i) blocks[at + i] = static_cast<uint8_t>(random.next());
            for (int i = 0; i < format.scales; ++i) blocks[at + 2 * i + 1] = 0x1c | (random.next() & 0x83);  // small
        }
        call.weight = blocks.data();
        layerskip_pack_blocks(&call);
    }
};

void products() {
    for (const NamedFormat& format : kFormats) {
        for (int32_t compute = kComputeFloat32; compute <= (format.int8 ? kComputeInt8 : kComputeFloat32); ++compute) {
            std::vector<float> all;
            for (const int inputs : {32, 160}) {
                for (const int outputs : {13, 80, 176}) {
                    const Weight weight(format, inputs, outputs, compute, inputs + outputs);
                    const std::vector<float> x = Random(7).numbers(13 * inputs);
                    std::vector<float> alone(13 * weight.view.outputs);
                    for (int row = 0; row < 13; ++row)
                        layerskip_multiply(&weight.view, x.data() + row * inputs, 1,
                                           alone.data() + row * weight.view.outputs, threads);
                    for (const int rows : {1, 2, 3, 5, 8, 13}) {
                        std::vector<float> y(rows * weight.view.outputs);
                        layerskip_multiply(&weight.view, x.data(), rows, y.data(), threads);
                        if (std::memcmp(y.data(), alone.data(), y.size() * sizeof(float)) != 0) ++wrong;
                    }
                    all.insert(all.end(), alone.begin(), alone.end());
                }
            }
            report(std::string("product ") + format.name + (compute ? " int8" : " float32"), all);
        }
    }
}

void noise() {
    const uint64_t keys[] = {1, 123456789, ~0ull};
    std::vector<float> out(3 * 1003);
    layerskip_gumbel(keys, 3, 5, 1003, out.data(), threads);
    report("noise", out);
    const float temperatures[] = {0.7f, 1.5f}, top_p[] = {0.9f, 1.0f}, min_p[] = {0.0f, 0.05f};
    const int32_t top_k[] = {50, 0};
    const uint64_t seeds[] = {3, 4};
    const Sampling sampling{temperatures, top_p, min_p, top_k, seeds};
    std::vector<float> scores = Random(9).numbers(2 * 3 * 500, 20, 8.0f), kept;
    layerskip_filter(&sampling, scores.data(), 2, 3, 500, threads);
    for (const float score : scores) kept.push_back(std::isfinite(score) ? score : 1000.0f);
    report("filters", kept);
}

constexpr int kWidth = 64, kHeads = 4, kKvHeads = 2, kChannels = 16, kInner = 96, kVocabulary = 208, kLayers = 3;
constexpr int kCapacity = 300, kRows = 3, kExperts = 4, kExpertInner = 32;

// A network with windows, norms of heads and, in its last layer, experts if they are asked for.
struct Model {
    std::vector<Weight> weights;
    std::vector<Layer> layers{kLayers};
    std::vector<Expert> experts{kExperts};
    std::vector<float> norms, cosines, sines, keys, values, embedding;
    Network network{};
    Cache cache{};
    Embedding table{};

    Model(const NamedFormat& format, int32_t compute, bool with_experts) {
        weights.reserve(64);
        const auto make = [&](int inputs, int outputs, int step = 1) {
            weights.emplace_back(format, inputs, outputs, compute, 1000 + weights.size() * 10, step);
            return weights.back().view;
        };
        norms = Random(20).numbers(kWidth, 8);
        for (float& value : norms) value = 1.0f + value / 4;
        // Some points of a circle, rather than what libraries differ in.
        for (int i = 0; i < kCapacity * kChannels; ++i) {
            const float sign = i % kChannels < kChannels / 2 ? -1.0f : 1.0f;
            cosines.push_back(i / kChannels % 2 ? 0.6f : 0.8f);
            sines.push_back((i / kChannels % 2 ? 0.8f : 0.6f) * sign);
        }
        for (int index = 0; index < kLayers; ++index) {
            Layer& layer = layers[index];
            layer.qkv = make(kWidth, (kHeads + 2 * kKvHeads) * kChannels);
            layer.o = make(kHeads * kChannels, kWidth);
            layer.attention_norm = layer.mlp_norm = layer.q_norm = layer.k_norm = norms.data();
            layer.cosines = cosines.data();
            layer.sines = sines.data();
            layer.window = index == 1 ? 40 : 0;
            if (with_experts && index == kLayers - 1) {
                layer.router = make(kWidth, kExperts);
                for (Expert& expert : experts) expert = {make(kWidth, kExpertInner, 2), make(kExpertInner, kWidth)};
                layer.experts = experts.data();
            } else {
                layer.gate_up = make(kWidth, kInner, 2);
                layer.down = make(kInner, kWidth);
            }
        }
        fill_network(make(kWidth, kVocabulary), with_experts);
        const int64_t row = static_cast<int64_t>(kCapacity + 1) * kKvHeads * kChannels;
        keys.resize(kLayers * kRows * row);
        values.resize(kLayers * kRows * row);
        cache.keys = keys.data();
        cache.values = values.data();
        cache.layer_stride = kRows * row;
        cache.row_stride = row;
        cache.capacity = kCapacity;
        embedding = Random(30).numbers(kVocabulary * kWidth, 8);
        table.table = embedding.data();
        table.format = kFloat32;
        table.multiplier = 1.0f;
    }

    void fill_network(const Linear& head, bool with_experts) {
        network.layers = layers.data();
        network.final_norm = norms.data();
        network.head = head;
        network.hidden_size = kWidth;
        network.num_heads = network.all_heads = kHeads;
        network.num_kv_heads = network.all_kv_heads = kKvHeads;
        network.head_dim = network.rotary_dim = kChannels;
        network.intermediate_size = kInner;
        network.num_experts = with_experts ? kExperts : 0;
        network.experts_per_token = 2;
        network.expert_size = kExpertInner;
        network.norm_expert_weights = 1;
        network.vocab_size = kVocabulary;
        network.threads = threads;
        network.num_layers = kLayers;
        network.adapter = -1;
        network.rms_norm_eps = 1e-6f;
        network.attention_scale = 0.25f;
        network.residual_multiplier = 1.0f;
    }

    // The states of `counts` tokens of each row from `starts` on.
    std::vector<float> run(const std::vector<int64_t>& starts, const std::vector<int32_t>& counts, uint64_t seed) {
        int32_t tokens = 0;
        for (const int32_t count : counts) tokens += count;
        std::vector<float> hidden = Random(seed).numbers(static_cast<int64_t>(tokens) * kWidth);
        RunLayersCall call{};
        call.network = &network;
        call.cache = &cache;
        call.starts = starts.data();
        call.counts = counts.data();
        call.hidden = hidden.data();
        call.rows = kRows;
        call.stop = kLayers;
        layerskip_run_layers(&call);
        return hidden;
    }
};

void pass(const NamedFormat& format, int32_t compute, bool with_experts) {
    const std::string name = std::string(format.name) + (compute ? " int8" : " float32") + (with_experts ? " experts" : "");
    Model model(format, compute, with_experts);
    report("prompts " + name, model.run({0, 0, 0}, {150, 1, 70}, 40));
    const std::vector<float> states = model.run({150, 1, 70}, {5, 0, 3}, 41);
    report("block " + name, states);
    std::vector<float> logits(8 * model.network.vocab_size);
    layerskip_unembed(&model.network, states.data(), 8, logits.data());
    report("logits " + name, logits);

    for (const bool sampled : {false, true}) {
        const float temperatures[] = {1.0f, 0.8f, 1.2f}, top_p[] = {1.0f, 0.9f, 1.0f}, min_p[] = {0.0f, 0.0f, 0.0f};
        const int32_t top_k[] = {0, 0, 20};
        const uint64_t seeds[] = {5, 6, 7};
        const Sampling sampling{temperatures, top_p, min_p, top_k, seeds};
        const int64_t last[] = {3, 4, 5}, starts[] = {155, 1, 73};
        const int32_t limits[] = {4, 1, 3};
        int32_t written[kRows], drawn[kRows];
        std::vector<float> hidden((8 + kRows) * kWidth), confidences(8);
        std::vector<int64_t> drafts(8);
        DraftCall call{};
        call.network = &model.network;
        call.cache = &model.cache;
        call.embedding = &model.table;
        call.sampling = sampled ? &sampling : nullptr;
        call.tokens = last;
        call.starts = starts;
        call.limits = limits;
        call.written = written;
        call.drawn = drawn;
        call.hidden = hidden.data();
        call.drafts = drafts.data();
        call.confidences = confidences.data();
        call.rows = kRows;
        call.exit_layer = 2;
        call.complete = 1;
        if (layerskip_draft(&call) != 0) ++wrong;
        report((sampled ? "sampled drafts " : "drafts ") + name, drafts);
    }
}

}  // namespace

int main(int count, char** arguments) {
    threads = count > 1 ? std::atoi(arguments[1]) : 1;
    const int rounds = count > 2 ? std::atoi(arguments[2]) : 1;
    if (!layerskip_runs_here()) return std::printf("needs %s\n", layerskip_missing()), 77;
    for (int round = 0; round < rounds; ++round) {
        products();
        noise();
        for (const NamedFormat& format : kFormats)
            for (int32_t compute = 0; compute <= (format.int8 ? 1 : 0); ++compute)
                for (const bool with_experts : {false, true}) pass(format, compute, with_experts);
    }
    std::fprintf(stderr, "%s: %d wrong\n", layerskip_target(), wrong);
    return wrong != 0;
}
