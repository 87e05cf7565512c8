#include "pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cache.h"
#include "kernels/elementwise.h"
#include "kernels/experts.h"
#include "kernels/linear.h"
#include "threads.h"

namespace layerskip {
namespace {

// Tokens that go through the layers together: enough to be limited by arithmetic. Of 32, 64, 96 and 128, prompts took
// the least time with 96.
constexpr int kChunk = 96;
constexpr int kFewTokens = 4;  // up to so many, preparing a product's inputs takes a member less time than waiting
constexpr int64_t kLine = 64;  // bytes

// Tokens that go through the layers together.
struct Block {
    int tokens = 0;
    int64_t rows[kChunk];
    int64_t positions[kChunk];
    Segment segments[kChunk];
    int num_segments = 0;

    void add(int64_t row, int64_t position) {
        if (num_segments == 0 || segments[num_segments - 1].row != row)
            segments[num_segments++] = {row, position, tokens, 0};
        ++segments[num_segments - 1].count;
        rows[tokens] = row;
        positions[tokens++] = position;
    }

    void clear() { tokens = num_segments = 0; }
};

// Room for the results of a step, shared by the team.
struct Workspace {
    float* floats;
    int32_t* numbers;
};

template <typename Number>
Number* at_least(std::vector<Number>& kept, int64_t count) {
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    return kept.data();
}

// One member's part of a forward pass.
class Pass {
  public:
    Pass(const Network& network, const Cache& cache, float* hidden, const Block& block, const Workspace& shared,
         Team& team, int member)
        : net_(network), cache_(cache), hidden_(hidden), tokens_(block.tokens), rows_(block.rows),
          positions_(block.positions), team_(team), member_(member),
          attention_(network, cache, block.segments, block.num_segments, shared.floats, team, member),
          experts_(network, block.tokens, kChunk, shared.floats + own_floats(network), shared.numbers, team, member) {
        const int64_t heads = net_.num_heads + 2 * net_.num_kv_heads;
        qkv_ = shared.floats + Attention::shared_floats(net_);
        attended_ = qkv_ + kChunk * heads * net_.head_dim;
        gate_up_ = attended_ + kChunk * static_cast<int64_t>(net_.num_heads) * net_.head_dim;
        inner_ = gate_up_ + kChunk * 2 * static_cast<int64_t>(net_.intermediate_size);
        normed_ = inner_ + kChunk * static_cast<int64_t>(net_.intermediate_size);
        out_ = normed_ + kChunk * static_cast<int64_t>(net_.hidden_size);
        const auto after = reinterpret_cast<uintptr_t>(out_ + kChunk * static_cast<int64_t>(net_.hidden_size));
        prepared_ = reinterpret_cast<char*>((after + kLine - 1) / kLine * kLine);
        prepared_inner_ = prepared_ + prepared_room(net_);
    }

    // Room that the members share; callers hold `Team::in_use`.
    static Workspace workspace(const Network& net) {
        static std::vector<float> floats;
        static std::vector<int32_t> numbers;
        return {at_least(floats, own_floats(net) + Experts::shared_floats(net, kChunk)),
                at_least(numbers, Experts::shared_numbers(net, kChunk))};
    }

    // Floats without those of experts.
    static int64_t own_floats(const Network& net) {
        const int64_t qkv = static_cast<int64_t>(net.num_heads + 2 * net.num_kv_heads) * net.head_dim;
        const int64_t attended = static_cast<int64_t>(net.num_heads) * net.head_dim;
        const int64_t mlp = 3 * static_cast<int64_t>(net.intermediate_size);
        return Attention::shared_floats(net) + kChunk * (qkv + attended + mlp + 2 * net.hidden_size) +
               (kLine + 2 * prepared_room(net)) / static_cast<int64_t>(sizeof(float));
    }

    // Bytes for the prepared inputs of any product; a multiple of a line.
    static int64_t prepared_room(const Network& net) {
        const int64_t attended = static_cast<int64_t>(net.num_heads) * net.head_dim;
        const int64_t most = std::max<int64_t>({net.hidden_size, net.intermediate_size, attended});
        return (most_prepared_bytes(most, kChunk) + kLine - 1) / kLine * kLine;
    }

    // `fused`, of this block's tokens, is what the exit adapter that is run adds; null where none is.
    void run(int start, int stop, const Fused* fused = nullptr) {
        for (int index = start; index < stop; ++index) {
            const Layer& layer = net_.layers[index];
            if (layer.input.panels != nullptr) project_input(layer);
            const float* input = norm_tokens(hidden_, layer.attention_norm, &layer.qkv);
            product(layer.qkv, input, qkv_, false, prepared_);
            team_.barrier();
            norm_heads_together(layer, 0);
            place_keys(layer, index, 0);
            team_.barrier();
            attention_.run(qkv_, attended_, index, layer.window);
            add_product(layer.o, attended_, layer.post_attention_norm, prepare_together(layer.o, attended_));
            team_.barrier();
            if (fused != nullptr) add_fused(layer, *fused);
            const float* x = norm_tokens(hidden_, layer.mlp_norm, layer.experts == nullptr ? &layer.gate_up : nullptr);
            if (layer.experts != nullptr) {
                experts_.run(layer, x, out_);
                total(out_, net_.hidden_size);
                add_output(layer.post_mlp_norm);
            } else {
                mlp_inner(layer, x);
                team_.barrier();
                add_product(layer.down, inner_, layer.post_mlp_norm, prepared_inner_);
            }
            team_.barrier();
            if (index + 1 < stop) write_adapter_keys(index + 1);
        }
    }

    // Keys and values of a layer for its input `hidden`; ends without a barrier, as the next step begins with one.
    void write_keys(int index) {
        const Layer& layer = net_.layers[index];
        const float* x = hidden_;
        if (layer.input.panels != nullptr) {
            product(layer.input, hidden_, out_, false);
            team_.barrier();
            x = out_;
        }
        x = norm_tokens(x, layer.attention_norm, &layer.qkv);
        int start, stop;
        const int first = net_.num_heads * net_.head_dim / kPanel, panels = layer.qkv.outputs / kPanel;
        share(panels - first, member_, team_.size(), start, stop);
        multiply(layer.qkv, x, layer.qkv.inputs, tokens_, qkv_, layer.qkv.outputs, first + start, first + stop,
                 false, prepared_);
        team_.barrier();
        norm_heads_together(layer, net_.num_heads);
        place_keys(layer, index, net_.num_heads);
    }

    void logits(float* to) {
        const float* x = norm_tokens(hidden_, net_.final_norm, &net_.head);
        product(net_.head, x, to, false, prepared_);
    }

  private:
    void write_adapter_keys(int exit) {
        for (int adapter = 0; adapter < net_.num_adapters; ++adapter)
            if (net_.exits[adapter] == exit) write_keys(net_.num_layers + adapter);
    }

    // Ends with a barrier.
    void add_fused(const Layer& layer, const Fused& fused) {
        const int64_t size = net_.hidden_size;
        for (int token = member_; token < tokens_; token += team_.size()) {
            const int64_t source = fused.sources[token], distance = positions_[token] - 1 - source;
            const int64_t kind = source < 0 ? kDistances - 1 : std::min<int64_t>(distance, kDistances - 2);
            add(fused.projected + token * size, net_.residual_multiplier, size, hidden_ + token * size);
            add(layer.distances + kind * size, net_.residual_multiplier, size, hidden_ + token * size);
        }
        team_.barrier();
    }

    // hidden = hidden W^T; ends with a barrier.
    void project_input(const Layer& layer) {
        product(layer.input, hidden_, out_, false);
        team_.barrier();
        const int64_t size = net_.hidden_size;
        for (int token = member_; token < tokens_; token += team_.size())
            std::copy(out_ + token * size, out_ + (token + 1) * size, hidden_ + token * size);
        team_.barrier();
    }

    // The norms of all tokens, or the tokens themselves where there is no norm, prepared for a product in `prepared_`
    // if one is given; ends with a barrier.
    const float* norm_tokens(const float* x, const float* weight, const Linear* next) {
        const int64_t size = net_.hidden_size;
        const float* result = weight == nullptr ? x : normed_;
        int first, last;
        share(tokens_, member_, team_.size(), first, last);
        for (int token = first; token < last; ++token) {
            if (weight != nullptr)
                normalize(x + token * size, weight, size, net_.rms_norm_eps, normed_ + token * size);
            if (next != nullptr) prepare_tokens(*next, result, token, token + 1, prepared_);
        }
        team_.barrier();
        return result;
    }

    void prepare_tokens(const Linear& w, const float* x, int first, int last, char* to) {
        prepare(w, x, w.inputs, tokens_, {first, last, 0, (w.inputs + kGroup - 1) / kGroup}, to);
    }

    // Prepare the inputs of a product that are complete, each member its tokens. Null where members do so by themselves.
    const void* prepare_together(const Linear& w, const float* x) {
        if (tokens_ <= kFewTokens || prepared_bytes(w, tokens_) == 0) return nullptr;
        int first, last;
        share(tokens_, member_, team_.size(), first, last);
        prepare_tokens(w, x, first, last, prepared_inner_);
        team_.barrier();
        return prepared_inner_;
    }

    // This member's outputs of all tokens.
    void product(const Linear& w, const float* x, float* y, bool add, const void* prepared = nullptr) {
        int start, stop;
        share(w.outputs / kPanel, member_, team_.size(), start, stop);
        multiply(w, x, w.inputs, tokens_, y, w.outputs, start, stop, add, prepared);
    }

    // hidden += norm(x W^T), with the norm and the factor only where there are some.
    void add_product(const Linear& w, const float* x, const float* norm, const void* prepared) {
        if (norm == nullptr && net_.residual_multiplier == 1.0f && net_.total == nullptr)
            return product(w, x, hidden_, true, prepared);
        product(w, x, out_, false, prepared);
        if (net_.total == nullptr) team_.barrier();
        total(out_, net_.hidden_size);
        add_output(norm);
    }

    // Replace [tokens, size] by what all processes have in its place together; between barriers, where there are others.
    void total(float* parts, int64_t size) {
        if (net_.total == nullptr) return;
        team_.barrier();
        if (member_ == 0) net_.total(parts, tokens_ * size);
        team_.barrier();
    }

    // hidden += norm(out), for this member's tokens.
    void add_output(const float* norm) {
        const int64_t size = net_.hidden_size;
        for (int token = member_; token < tokens_; token += team_.size()) {
            float* out = out_ + token * size;
            if (norm != nullptr) normalize(out, norm, size, net_.rms_norm_eps, out);
            add(out, net_.residual_multiplier, size, hidden_ + token * size);
        }
    }

    // What a member computes, it prepares for the next product: whole groups of its inputs.
    void mlp_inner(const Layer& layer, const float* x) {
        const int64_t outputs = layer.gate_up.outputs, size = net_.intermediate_size;
        int first, last;
        share((net_.intermediate_size + kGroup - 1) / kGroup, member_, team_.size(), first, last);
        const int start = first * (kGroup / kPanel);
        const int stop = std::min(last * (kGroup / kPanel), net_.intermediate_size / kPanel);
        multiply(layer.gate_up, x, net_.hidden_size, tokens_, gate_up_, outputs, 2 * start, 2 * stop, false, prepared_);
        for (int token = 0; token < tokens_; ++token) {
            for (int panel = start; panel < stop; ++panel) {
                const float* gate = gate_up_ + token * outputs + 2 * panel * kPanel;
                activate(gate, gate + kPanel, kPanel, net_.activation, inner_ + token * size + panel * kPanel);
            }
        }
        prepare(layer.down, inner_, size, tokens_, {0, tokens_, first, last}, prepared_inner_);
    }

    // Norms that span all heads of a token, of queries (unless the first head is that of the keys) and keys, in place;
    // ends with a barrier if there are such.
    void norm_heads_together(const Layer& layer, int first) {
        if (!net_.joint_qk_norm || layer.q_norm == nullptr) return;
        const int64_t queries = static_cast<int64_t>(net_.num_heads) * net_.head_dim;
        const int64_t keys = static_cast<int64_t>(net_.num_kv_heads) * net_.head_dim;
        if (net_.total != nullptr) return norm_heads_of_all(layer);
        for (int token = member_; token < tokens_; token += team_.size()) {
            float* x = qkv_ + token * (queries + 2 * keys);
            if (first == 0) normalize(x, layer.q_norm, queries, net_.rms_norm_eps, x);
            normalize(x + queries, layer.k_norm, keys, net_.rms_norm_eps, x + queries);
        }
        team_.barrier();
    }

    // The same where other processes have some of the heads: the squares of all are added up first.
    void norm_heads_of_all(const Layer& layer) {
        const int64_t heads = net_.num_heads + net_.num_kv_heads, head_dim = net_.head_dim;
        const int64_t step = (heads + net_.num_kv_heads) * head_dim;
        for (int token = member_; token < tokens_; token += team_.size()) {
            float* squares = out_ + 2 * token;  // of queries, of keys
            squares[0] = squares[1] = 0.0f;
            for (int64_t head = 0; head < heads; ++head)
                if (net_.counted[head] != 0.0f)
                    squares[head >= net_.num_heads] += sum_of_squares(qkv_ + token * step + head * head_dim, head_dim);
        }
        total(out_, 2);
        for (int token = member_; token < tokens_; token += team_.size()) {
            for (int64_t head = 0; head < heads; ++head) {
                const bool is_key = head >= net_.num_heads;
                const int64_t all = (is_key ? net_.all_kv_heads : net_.all_heads) * head_dim;
                const float mean = out_[2 * token + is_key] / static_cast<float>(all);
                const float* weight = is_key ? layer.k_norm + (head - net_.num_heads) * head_dim
                                             : layer.q_norm + head * head_dim;
                rescale(qkv_ + token * step + head * head_dim, 1.0f / std::sqrt(mean + net_.rms_norm_eps), weight,
                        head_dim);
            }
        }
        team_.barrier();
    }

    // Head norms and rotation of queries (in place) and keys, and keys and values into the cache; from head `first` on.
    // Members take one head after the other, as in the product before: most of what a member reads, it has written.
    void place_keys(const Layer& layer, int index, int first) {
        const int heads = net_.num_heads + 2 * net_.num_kv_heads, used = heads - first;
        const int64_t head_dim = net_.head_dim;
        int start, stop;
        share(tokens_ * used, member_, team_.size(), start, stop);
        for (int task = start; task < stop; ++task) {
            const int token = task % tokens_, head = first + task / tokens_;
            float* x = qkv_ + (token * heads + head) * head_dim;
            if (head < net_.num_heads) {
                turn(layer, layer.q_norm, x, token);
                continue;
            }
            const int64_t slot = std::min(positions_[token], cache_.capacity);
            const int64_t at = index * cache_.layer_stride + rows_[token] * cache_.row_stride;
            const bool is_key = head < net_.num_heads + net_.num_kv_heads;
            const int kv_head = head - net_.num_heads - (is_key ? 0 : net_.num_kv_heads);
            const int64_t place = at + (slot * net_.num_kv_heads + kv_head) * head_dim;
            if (is_key) {
                turn(layer, layer.k_norm, x, token);
                put_keys(cache_, place, x, head_dim);
            } else {
                put_values(cache_, place, x, head_dim);
            }
        }
    }

    void turn(const Layer& layer, const float* norm, float* x, int token) {
        if (norm != nullptr && !net_.joint_qk_norm) normalize(x, norm, net_.head_dim, net_.rms_norm_eps, x);
        if (layer.cosines == nullptr) return;
        const int64_t angle = std::min(positions_[token], cache_.capacity - 1) * net_.rotary_dim;
        rotate(x, layer.cosines + angle, layer.sines + angle, net_.rotary_dim, net_.head_dim, x);
    }

    const Network& net_;
    const Cache& cache_;
    float* hidden_;
    const int tokens_;
    const int64_t* rows_;
    const int64_t* positions_;
    Team& team_;
    const int member_;
    float *qkv_, *attended_, *gate_up_, *inner_, *normed_, *out_;
    // What products read besides their inputs: norms, and the outputs of attention and the MLP's inner part, which may
    // be written while other members still read the former.
    char *prepared_, *prepared_inner_;
    Attention attention_;
    Experts experts_;
};

// Call body(pass, first token) on every member for blocks of the tokens.
template <typename Body>
void in_blocks(const Network& network, float* hidden, const Rows& rows, const Cache& cache, const Body& body) {
    Team& team = Team::of(network.threads);
    const Workspace shared = Pass::workspace(network);
    const int64_t total = rows.total();
    int64_t begin = 0;
    Block block;
    rows.each([&](int64_t token, int64_t row, int64_t position) {
        block.add(row, position);
        if (block.tokens < kChunk && token + 1 < total) return;
        team.run([&](int member, int) {
            Pass pass(network, cache, hidden + begin * network.hidden_size, block, shared, team, member);
            body(pass, begin);
        });
        begin = token + 1;
        block.clear();
    });
}

}  // namespace

void run_layers(const Network& network, float* hidden, const Rows& rows, const Cache& cache, int32_t start,
                int32_t stop) {
    in_blocks(network, hidden, rows, cache, [&](Pass& pass, int64_t) { pass.run(start, stop); });
}

void fuse(const Network& network, int32_t index, const Rows& rows, const int64_t* sources, const Cache& cache,
          float* projected) {
    const Layer& layer = network.layers[index];
    const int64_t part = static_cast<int64_t>(network.num_kv_heads) * network.head_dim, inputs = layer.values.inputs;
    const int64_t total = rows.total();
    std::vector<float> values(total * inputs);
    rows.each([&](int64_t token, int64_t row, int64_t) {
        for (int64_t i = 0; sources[token] >= 0 && i < layer.num_value_layers; ++i) {
            const int64_t place =
                layer.value_layers[i] * cache.layer_stride + row * cache.row_stride + sources[token] * part;
            read_values(cache, place, network.head_dim, network.num_kv_heads,
                        values.data() + token * inputs + i * part);
        }
    });
    Team::of(network.threads).run([&](int member, int size) {
        int start, stop;
        share(layer.values.outputs / kPanel, member, size, start, stop);
        multiply(layer.values, values.data(), inputs, static_cast<int>(total), projected, network.hidden_size, start,
                 stop, false);
    });
    if (network.total != nullptr) network.total(projected, total * network.hidden_size);
}

void run_adapter(const Network& network, int32_t layer, float* hidden, const Rows& rows, const Fused& fused,
                 const Cache& cache) {
    const int64_t size = network.hidden_size;
    in_blocks(network, hidden, rows, cache, [&](Pass& pass, int64_t begin) {
        const Fused part{fused.sources + begin, fused.projected + begin * size};
        pass.run(layer, layer + 1, network.layers[layer].values.panels == nullptr ? nullptr : &part);
    });
}

void write_keys(const Network& network, const float* hidden, const Rows& rows, const Cache& cache, int32_t layer) {
    float* input = const_cast<float*>(hidden);  // a pass changes its input, but not here
    in_blocks(network, input, rows, cache, [&](Pass& pass, int64_t) { pass.write_keys(layer); });
}

void unembed(const Network& network, const float* hidden, int32_t tokens, float* logits) {
    Team& team = Team::of(network.threads);
    const Workspace shared = Pass::workspace(network);
    const Cache none{};
    for (int64_t begin = 0; begin < tokens; begin += kChunk) {
        Block block;
        block.tokens = static_cast<int>(std::min<int64_t>(kChunk, tokens - begin));
        float* states = const_cast<float*>(hidden) + begin * network.hidden_size;
        team.run([&](int member, int) {
            Pass(network, none, states, block, shared, team, member).logits(logits + begin * network.head.outputs);
        });
    }
}

}  // namespace layerskip
