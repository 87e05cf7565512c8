#include "network.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "attention.h"
#include "sampling.h"
#include "threads.h"

namespace layerskip {
namespace {

constexpr int kChunk = 64;  // rows that go through the layers together: enough to be bound by arithmetic

// y = x / rms(x) * weight
void normalize(const float* x, const float* weight, int64_t width, float epsilon, float* y) {
    Vector squares{};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < width; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + epsilon);
    for (i = 0; i + kLanes <= width; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < width; ++i) y[i] = x[i] * scale * weight[i];
}

Vector activate(Vector x, int32_t activation) {
    switch (activation) {
        case kSilu: return x / (exponential(-x) + 1.0f);
        case kGeluTanh: {  // x (1 + tanh z) / 2 = x / (1 + e^-2z)
            const Vector z = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
            return x / (exponential(z * -2.0f) + 1.0f);
        }
        default:
            for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
            return x;
    }
}

// Rows that go through the layers together.
struct Block {
    int rows = 0;
    int64_t texts[kChunk];
    int64_t positions[kChunk];
    Segment segments[kChunk];
    int num_segments = 0;

    void add(int64_t text, int64_t position) {
        if (num_segments == 0 || segments[num_segments - 1].text != text)
            segments[num_segments++] = {text, position, rows, 0};
        ++segments[num_segments - 1].count;
        texts[rows] = text;
        positions[rows++] = position;
    }
};

// One member's part of a forward pass.
class Pass {
  public:
    Pass(const Network& network, const Cache& cache, float* hidden, const Block& block, float* shared, Team& team,
         int member)
        : net_(network), cache_(cache), hidden_(hidden), rows_(block.rows), texts_(block.texts),
          positions_(block.positions), team_(team), member_(member),
          attention_(network, cache, block.segments, block.num_segments, shared, team, member) {
        const int64_t channels = static_cast<int64_t>(net_.heads + 2 * net_.kv_heads) * net_.head_channels;
        qkv_ = shared + Attention::kPartialFloats;
        attended_ = qkv_ + kChunk * channels;
        gate_up_ = attended_ + kChunk * static_cast<int64_t>(net_.heads) * net_.head_channels;
        inner_ = gate_up_ + kChunk * 2 * static_cast<int64_t>(net_.mlp_width);
        normed_ = inner_ + kChunk * static_cast<int64_t>(net_.mlp_width);
        out_ = normed_ + kChunk * static_cast<int64_t>(net_.width);
    }

    // Floats of `shared`.
    static int64_t shared_floats(const Network& net) {
        const int64_t qkv = static_cast<int64_t>(net.heads + 2 * net.kv_heads) * net.head_channels;
        const int64_t attended = static_cast<int64_t>(net.heads) * net.head_channels;
        return Attention::kPartialFloats + kChunk * (qkv + attended + 3 * static_cast<int64_t>(net.mlp_width) + 2 * net.width);
    }

    void run(int first, int last) {
        for (int index = first; index < last; ++index) {
            const Layer& layer = net_.layers[index];
            norm_rows(hidden_, layer.attention_norm);
            product(layer.qkv, normed_, qkv_, false);
            team_.barrier();
            place_keys(layer, index);
            team_.barrier();
            attention_.run(qkv_, attended_, index, layer.window);
            add_product(layer.o, attended_, layer.post_attention_norm);
            team_.barrier();
            norm_rows(hidden_, layer.mlp_norm);
            mlp_inner(layer);
            team_.barrier();
            add_product(layer.down, inner_, layer.post_mlp_norm);
            team_.barrier();
        }
    }

    void logits(float* to) {
        norm_rows(hidden_, net_.final_norm);
        product(net_.head, normed_, to, false);
    }

  private:
    // Norms of all rows into the shared buffer; ends with a barrier.
    void norm_rows(const float* x, const float* weight) {
        for (int row = member_; row < rows_; row += team_.size())
            normalize(x + row * net_.width, weight, net_.width, net_.epsilon, normed_ + row * net_.width);
        team_.barrier();
    }

    // This member's outputs of all rows.
    void product(const Linear& w, const float* x, float* y, bool add) {
        int first, last;
        share(w.outputs / kPanel, member_, team_.size(), first, last);
        multiply(w, x, w.inputs, rows_, y, w.outputs, first, last, add);
    }

    // hidden += norm(x W^T), the norm only where there is one.
    void add_product(const Linear& w, const float* x, const float* norm) {
        if (norm == nullptr) return product(w, x, hidden_, true);
        product(w, x, out_, false);
        team_.barrier();
        for (int row = member_; row < rows_; row += team_.size()) {
            float* out = out_ + row * net_.width;
            normalize(out, norm, net_.width, net_.epsilon, out);
            for (int i = 0; i < net_.width; ++i) hidden_[row * net_.width + i] += out[i];
        }
    }

    void mlp_inner(const Layer& layer) {
        int first, last;
        share(net_.mlp_width / kPanel, member_, team_.size(), first, last);
        const int64_t width = layer.gate_up.outputs;
        multiply(layer.gate_up, normed_, net_.width, rows_, gate_up_, width, 2 * first, 2 * last, false);
        for (int row = 0; row < rows_; ++row) {
            for (int panel = first; panel < last; ++panel) {
                const float* gate = gate_up_ + row * width + 2 * panel * kPanel;
                float* to = inner_ + row * static_cast<int64_t>(net_.mlp_width) + panel * kPanel;
                for (int i = 0; i < kPanel; i += kLanes)
                    store(to + i, activate(load(gate + i), net_.activation) * load(gate + kPanel + i));
            }
        }
    }

    // Head norms and rotation of queries (in place) and keys, and keys and values into the cache.
    void place_keys(const Layer& layer, int index) {
        const int heads = net_.heads + 2 * net_.kv_heads;
        const int64_t channels = net_.head_channels;
        for (int task = member_; task < rows_ * heads; task += team_.size()) {
            const int row = task / heads, head = task % heads;
            float* x = qkv_ + task * channels;
            if (head < net_.heads) {
                turn(layer, layer.q_norm, x, row, x);
                continue;
            }
            const int64_t slot = std::min(positions_[row], cache_.capacity);
            const int64_t at = index * cache_.layer_stride + texts_[row] * cache_.row_stride;
            const bool is_key = head < net_.heads + net_.kv_heads;
            const int kv_head = head - net_.heads - (is_key ? 0 : net_.kv_heads);
            const int64_t place = at + (slot * net_.kv_heads + kv_head) * channels;
            if (is_key) {
                turn(layer, layer.k_norm, x, row, cache_.keys + place);
            } else {
                std::memcpy(cache_.values + place, x, channels * sizeof(float));
            }
        }
    }

    void turn(const Layer& layer, const float* norm, float* x, int row, float* to) {
        if (norm != nullptr) normalize(x, norm, net_.head_channels, net_.epsilon, x);
        const int64_t rotary = net_.rotary_channels, half = rotary / 2;
        const int64_t position = std::min(positions_[row], cache_.capacity - 1);
        const float* cosines = layer.cosines + position * rotary;
        const float* sines = layer.sines + position * rotary;
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            to[i] = a * cosines[i] + b * sines[i];
            to[i + half] = b * cosines[i + half] + a * sines[i + half];
        }
        for (int64_t i = rotary; i < net_.head_channels; ++i) to[i] = x[i];
    }

    const Network& net_;
    const Cache& cache_;
    float* hidden_;
    const int rows_;
    const int64_t* texts_;
    const int64_t* positions_;
    Team& team_;
    const int member_;
    float *qkv_, *attended_, *gate_up_, *inner_, *normed_, *out_;
    Attention attention_;
};

// Forward passes take turns by `Team::in_use`.
float* workspace(int64_t floats) {
    static std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < floats) kept.resize(floats);
    return kept.data();
}

void run_layers(const Network& network, float* hidden, int32_t texts, int32_t queries, const int64_t* starts,
                const Cache& cache, int32_t first, int32_t last) {
    Team& team = Team::of(network.threads);
    float* shared = workspace(Pass::shared_floats(network));
    const int64_t total = static_cast<int64_t>(texts) * queries;
    for (int64_t begin = 0; begin < total; begin += kChunk) {
        Block block;
        for (int64_t row = begin; row < std::min(total, begin + kChunk); ++row)
            block.add(row / queries, starts[row / queries] + row % queries);
        team.run([&](int member, int) {
            Pass(network, cache, hidden + begin * network.width, block, shared, team, member).run(first, last);
        });
    }
}

void unembed(const Network& network, const float* hidden, int32_t rows, float* logits) {
    Team& team = Team::of(network.threads);
    float* shared = workspace(Pass::shared_floats(network));
    const Cache none{};
    for (int64_t begin = 0; begin < rows; begin += kChunk) {
        Block block;
        block.rows = static_cast<int>(std::min<int64_t>(kChunk, rows - begin));
        float* states = const_cast<float*>(hidden) + begin * network.width;
        team.run([&](int member, int) {
            Pass(network, none, states, block, shared, team, member).logits(logits + begin * network.head.outputs);
        });
    }
}

void embed(const Embedding& embedding, int64_t token, int64_t width, float* to) {
    switch (embedding.format) {
        case kFloat32:
            std::memcpy(to, static_cast<const float*>(embedding.table) + token * width, width * sizeof(float));
            break;
        case kBFloat16:
            for (int64_t i = 0; i < width; ++i) {
                const uint16_t half = static_cast<const uint16_t*>(embedding.table)[token * width + i];
                const uint32_t bits = static_cast<uint32_t>(half) << 16;
                std::memcpy(to + i, &bits, sizeof bits);
            }
            break;
        default:
            const int64_t blocks = width / kGroup, bytes = block_bytes(embedding.format);
            const uint8_t* row = static_cast<const uint8_t*>(embedding.table) + token * blocks * bytes;
            for (int64_t i = 0; i < blocks; ++i) unpack_block(row + i * bytes, embedding.format, to + i * kGroup);
    }
    for (int64_t i = 0; i < width; ++i) to[i] *= embedding.multiplier;
}

// Whether all of these numbers are, `count` being a multiple of kLanes: infinite ones and those that are none make the sum
// of their products with zero something else than zero.
bool all_finite(const float* numbers, int64_t count) {
    Vector total{};
    for (int64_t i = 0; i < count; i += kLanes) total += load(numbers + i) * 0.0f;
    return sum(total) == 0.0f;
}

// The token after each position, `queries` positions to a text: sampled with the position's key by the text's rules, or
// the likeliest where there are none; -1 where a logit isn't finite. `logits` is room for [texts * queries, V padded].
void choose(const Network& network, const float* hidden, int32_t texts, int32_t queries, float* logits,
            const Sampling* sampling, const uint64_t* keys, int64_t* out) {
    const int32_t rows = texts * queries;
    unembed(network, hidden, rows, logits);
    const auto choose_one = [&](int64_t row) {
        float* scores = logits + row * network.head.outputs;
        if (!all_finite(scores, network.head.outputs)) {
            out[row] = -1;
        } else if (sampling == nullptr || !sampling->samples(row / queries)) {
            out[row] = std::max_element(scores, scores + network.vocabulary) - scores;
        } else {
            filter(*sampling, row / queries, scores, network.vocabulary);
            out[row] = sample(scores, network.vocabulary, keys[row], network.tokens);
        }
    };
    if (sampling == nullptr || rows == 1) {
        for (int row = 0; row < rows; ++row) choose_one(row);
        return;
    }
    Team::of(network.threads).run([&](int member, int size) {
        for (int row = member; row < rows; row += size) choose_one(row);
    });
}

// `acceptance.confidence_class`.
int confidence_class(float confidence) {
    return std::min(kConfidenceClasses - 1, static_cast<int>(confidence * confidence * kConfidenceClasses));
}

}  // namespace

void layerskip_run_layers(const Network* network, float* hidden, int32_t texts, int32_t queries, const int64_t* starts,
                          const Cache* cache, int32_t first, int32_t last) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    run_layers(*network, hidden, texts, queries, starts, *cache, first, last);
}

void layerskip_unembed(const Network* network, const float* hidden, int32_t rows, float* logits) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    unembed(*network, hidden, rows, logits);
}

void layerskip_choose(const Network* network, const Embedding* embedding, const int64_t* tokens, float* hidden,
                      int32_t texts, int32_t queries, const int64_t* starts, const Cache* cache, int32_t first,
                      int32_t last, const Sampling* sampling, int64_t* out) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    const int32_t rows = texts * queries;
    for (int row = 0; tokens != nullptr && row < rows; ++row)
        embed(*embedding, tokens[row], network->width, hidden + row * static_cast<int64_t>(network->width));
    run_layers(*network, hidden, texts, queries, starts, *cache, first, last);
    std::vector<float> logits(static_cast<int64_t>(rows) * network->head.outputs);
    std::vector<uint64_t> keys(rows);
    for (int row = 0; sampling != nullptr && row < rows; ++row)
        keys[row] = noise_key(sampling->seeds[row / queries], starts[row / queries] + row % queries + 1);
    choose(*network, hidden, texts, queries, logits.data(), sampling, keys.data(), out);
    for (int row = 0; network->tokens != nullptr && row < rows; ++row)
        if (out[row] >= 0) out[row] = network->tokens[out[row]];
}

int32_t layerskip_draft(const Network* network, const Embedding* embedding, const int64_t* tokens, int32_t texts,
                        const int64_t* starts, int32_t drafts, int32_t layers, const Cache* cache,
                        const DraftStop* stop, const Sampling* sampling, int32_t complete, float* hidden, int64_t* out,
                        float* confidences) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    const int64_t width = network->width, outputs = network->head.outputs;
    std::vector<float> logits(texts * outputs), chances(texts, 1.0f);
    std::vector<int64_t> at(starts, starts + texts);
    std::vector<uint64_t> keys(texts);
    for (int draft = 0; draft < drafts + (complete ? 1 : 0); ++draft) {
        float* states = hidden + draft * texts * width;
        const int64_t* last = draft == 0 ? tokens : out + (draft - 1) * texts;
        for (int text = 0; text < texts; ++text) embed(*embedding, last[text], width, states + text * width);
        run_layers(*network, states, texts, 1, at.data(), *cache, 0, layers);
        if (draft == drafts) break;
        int64_t* chosen = out + draft * texts;
        for (int text = 0; text < texts; ++text) {
            ++at[text];
            if (sampling != nullptr) keys[text] = noise_key(sampling->seeds[text], at[text]);
        }
        choose(*network, states, texts, 1, logits.data(), sampling, keys.data(), chosen);
        if (*std::min_element(chosen, chosen + texts) < 0) return -1;
        float total = 0;
        for (int text = 0; stop != nullptr && text < texts; ++text) {
            const float confidence = probability(logits.data() + text * outputs, network->vocabulary, chosen[text]);
            confidences[draft * texts + text] = confidence;
            total += chances[text] *= stop->rates[confidence_class(confidence)];
        }
        for (int text = 0; network->tokens != nullptr && text < texts; ++text)
            chosen[text] = network->tokens[chosen[text]];
        if (stop != nullptr && total < stop->least * texts) drafts = draft + 1;
    }
    return drafts;
}

int64_t layerskip_packed_bytes(int32_t inputs, int32_t outputs, int32_t format) {
    return packed_bytes(inputs, outputs, format);
}

void layerskip_pack(const float* weight, int32_t inputs, int32_t rows, int32_t format, void* panels, void* scales,
                    int32_t first, int32_t step, int32_t threads) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    Team::of(threads).run([&](int member, int size) {
        int from, to;
        share((rows + kPanel - 1) / kPanel, member, size, from, to);
        for (int panel = from; panel < to; ++panel)
            pack(weight + panel * static_cast<int64_t>(kPanel) * inputs, inputs, std::min(kPanel, rows - panel * kPanel),
                 format, panels, scales, first + panel * step);
    });
}

void layerskip_pack_blocks(const uint8_t* weight, int32_t inputs, int32_t rows, int32_t format, void* panels,
                           void* scales, int32_t first, int32_t step, int32_t threads) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    const int64_t row_bytes = inputs / kGroup * block_bytes(format);
    Team::of(threads).run([&](int member, int size) {
        int from, to;
        share((rows + kPanel - 1) / kPanel, member, size, from, to);
        for (int panel = from; panel < to; ++panel)
            pack_blocks(weight + panel * kPanel * row_bytes, inputs, std::min(kPanel, rows - panel * kPanel), format,
                        panels, scales, first + panel * step);
    });
}

int32_t layerskip_fits_float16(const float* numbers, int64_t count) { return fits_float16(numbers, count); }

int32_t layerskip_fits_bfloat16(const float* numbers, int64_t count) {
    uint32_t lost = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, numbers + i, sizeof bits);
        lost |= bits & 0xffff;
    }
    return lost == 0;
}

void layerskip_multiply(const Linear* w, const float* x, int32_t rows, float* y, int32_t threads) {
    std::lock_guard<std::mutex> lock(Team::in_use());
    Team& team = Team::of(threads);
    team.run([&](int member, int size) {
        int first, last;
        share(w->outputs / kPanel, member, size, first, last);
        multiply(*w, x, w->inputs, rows, y, w->outputs, first, last, false);
    });
}

int32_t layerskip_interface() { return 4; }

int32_t layerskip_size_of(int32_t structure) {
    constexpr size_t sizes[] = {sizeof(Linear), sizeof(Layer),     sizeof(Network), sizeof(Cache),
                                sizeof(Embedding), sizeof(DraftStop), sizeof(Sampling)};
    return static_cast<int32_t>(sizes[structure]);
}

int32_t layerskip_runs_here() {
#if defined(__x86_64__) && defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return 1;
#endif
}

}  // namespace layerskip
