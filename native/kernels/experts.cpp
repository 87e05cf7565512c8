#include "kernels/experts.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/elementwise.h"
#include "kernels/linear.h"

namespace layerskip {
namespace {

int64_t padded(int64_t count) { return (count + kPanel - 1) / kPanel * kPanel; }

}  // namespace

Experts::Experts(const Network& network, int tokens, int most, float* floats, int32_t* numbers, Team& team, int member)
    : net_(network), tokens_(tokens), team_(team), member_(member) {
    const int64_t pairs = static_cast<int64_t>(most) * net_.experts_per_token;
    scores_ = floats;
    weights_ = scores_ + most * padded(net_.num_experts);
    sorted_ = weights_ + padded(pairs);
    gate_up_ = sorted_ + pairs * net_.hidden_size;
    inner_ = gate_up_ + pairs * 2 * net_.expert_size;
    outputs_ = inner_ + pairs * net_.expert_size;
    chosen_ = numbers;
    places_ = chosen_ + pairs;
    starts_ = places_ + pairs;
    used_ = starts_ + net_.num_experts + 1;
}

int64_t Experts::shared_floats(const Network& net, int most) {
    if (net.num_experts == 0) return 0;
    const int64_t pairs = static_cast<int64_t>(most) * net.experts_per_token;
    const int64_t widths = 2 * static_cast<int64_t>(net.hidden_size) + 3 * static_cast<int64_t>(net.expert_size);
    return most * padded(net.num_experts) + padded(pairs) + pairs * widths;
}

int64_t Experts::shared_numbers(const Network& net, int most) {
    if (net.num_experts == 0) return 0;
    return 2 * static_cast<int64_t>(most) * net.experts_per_token + 2 * (net.num_experts + 1);
}

void Experts::run(const Layer& layer, const float* x, float* out) {
    int start, stop;
    share(layer.router.outputs / kPanel, member_, team_.size(), start, stop);
    multiply(layer.router, x, net_.hidden_size, tokens_, scores_, layer.router.outputs, start, stop, false);
    team_.barrier();
    for (int token = member_; token < tokens_; token += team_.size()) choose(layer, token);
    team_.barrier();
    if (member_ == 0) sort();
    team_.barrier();
    if (tokens_ > 1) {  // the inputs of a single token are all the same
        gather(x);
        team_.barrier();
    }
    inner(layer, x);
    team_.barrier();
    outer(layer);
    team_.barrier();
    const int64_t size = net_.hidden_size, count = net_.experts_per_token;
    for (int token = member_; token < tokens_; token += team_.size()) {
        float* mixed = out + token * size;
        std::fill(mixed, mixed + size, 0.0f);
        for (int64_t pair = token * count; pair < (token + 1) * count; ++pair)
            add(outputs_ + places_[pair] * size, weights_[pair], size, mixed);
    }
}

// The experts of a token by rank, the first of equals first, and their weights.
void Experts::choose(const Layer& layer, int token) {
    const int count = net_.experts_per_token, all = net_.num_experts;
    float* scores = scores_ + static_cast<int64_t>(token) * layer.router.outputs;
    int32_t* chosen = chosen_ + token * count;
    float* weights = weights_ + token * count;
    const float most = *std::max_element(scores, scores + all);
    float total = 0;
    for (int expert = 0; !net_.norm_expert_weights && expert < all; ++expert)
        total += std::exp(scores[expert] - most);
    for (int rank = 0; rank < count; ++rank) {
        const int best = static_cast<int>(std::max_element(scores, scores + all) - scores);
        chosen[rank] = best;
        weights[rank] = std::exp(scores[best] - most);
        if (net_.norm_expert_weights) total += weights[rank];
        scores[best] = -std::numeric_limits<float>::infinity();
    }
    for (int rank = 0; rank < count; ++rank) weights[rank] /= total;
}

// Places of all pairs of a token and an expert, by expert; run by one member.
void Experts::sort() {
    const int pairs = tokens_ * net_.experts_per_token, all = net_.num_experts;
    std::fill(starts_, starts_ + all + 1, 0);
    for (int pair = 0; pair < pairs; ++pair) ++starts_[chosen_[pair] + 1];
    used_[0] = 0;
    for (int expert = 0; expert < all; ++expert) {
        if (starts_[expert + 1] > 0) used_[++used_[0]] = expert;
        starts_[expert + 1] += starts_[expert];
    }
    for (int pair = 0; pair < pairs; ++pair) places_[pair] = starts_[chosen_[pair]]++;
    for (int expert = all; expert > 0; --expert) starts_[expert] = starts_[expert - 1];  // they are now one further
    starts_[0] = 0;
}

void Experts::gather(const float* x) {
    const int64_t size = net_.hidden_size, count = net_.experts_per_token;
    for (int token = member_; token < tokens_; token += team_.size())
        for (int64_t pair = token * count; pair < (token + 1) * count; ++pair)
            std::copy(x + token * size, x + (token + 1) * size, sorted_ + places_[pair] * size);
}

// Call multiply_panels(expert, its first place, its number of tokens, first panel, one past the last) for this member's
// share of the panels of all experts that have tokens, each of which has `panels`.
template <typename Multiply>
void Experts::share_panels(int panels, const Multiply& multiply_panels) {
    int start, stop;
    share(used_[0] * panels, member_, team_.size(), start, stop);
    for (int i = start / panels; i * panels < stop; ++i) {
        const int expert = used_[1 + i], place = starts_[expert];
        multiply_panels(expert, place, starts_[expert + 1] - place, std::max(start - i * panels, 0),
                        std::min(stop - i * panels, panels));
    }
}

void Experts::inner(const Layer& layer, const float* x) {
    const int64_t width = net_.hidden_size, size = net_.expert_size;
    share_panels(net_.expert_size / kPanel, [&](int expert, int64_t place, int count, int start, int stop) {
        const float* inputs = tokens_ == 1 ? x : sorted_ + place * width;
        float* gate_up = gate_up_ + place * 2 * size;
        multiply(layer.experts[expert].gate_up, inputs, width, count, gate_up, 2 * size, 2 * start, 2 * stop, false);
        for (int row = 0; row < count; ++row) {
            for (int panel = start; panel < stop; ++panel) {
                const float* gate = gate_up + row * 2 * size + 2 * panel * kPanel;
                activate(gate, gate + kPanel, kPanel, net_.activation, inner_ + (place + row) * size + panel * kPanel);
            }
        }
    });
}

void Experts::outer(const Layer& layer) {
    const int64_t width = net_.hidden_size, size = net_.expert_size;
    share_panels(net_.hidden_size / kPanel, [&](int expert, int64_t place, int count, int start, int stop) {
        multiply(layer.experts[expert].down, inner_ + place * size, size, count, outputs_ + place * width, width, start,
                 stop, false);
    });
}

}  // namespace layerskip
