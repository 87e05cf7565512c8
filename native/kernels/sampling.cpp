#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/vector.h"

namespace layerskip {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kFirstSorted = 64;  // likeliest tokens that are sorted first; they usually contain the nucleus

// SplitMix64's finalizer.
uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

float largest(const float* scores, int64_t count) {
    float most = -kInfinity;
    int64_t i = 0;
    if (count >= kLanes) {
        Vector lanes = load(scores);
        for (; i + kLanes <= count; i += kLanes) lanes = maximum(lanes, load(scores + i));
        for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, lanes[lane]);
    }
    for (; i < count; ++i) most = std::max(most, scores[i]);
    return most;
}

// exp(scores - most) into `to`, 0 for -infinity; returns their sum.
float exponentials(const float* scores, int64_t count, float most, float* to) {
    Vector sums{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vector score = load(scores + i);
        const Vector value = score > -kInfinity ? exponential(score - most) : Vector{};
        store(to + i, value);
        sums += value;
    }
    float total = sum(sums);
    for (; i < count; ++i) total += to[i] = std::exp(scores[i] - most);
    return total;
}

void keep_top_k(float* scores, int64_t count, int64_t k) {
    if (k >= count) return;
    std::vector<float> sorted(scores, scores + count);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    for (int64_t i = 0; i < count; ++i)
        if (scores[i] < sorted[k - 1]) scores[i] = -kInfinity;
}

// Keep the likeliest tokens up to the one with which they reach `share` of the probability.
void keep_top_p(float* scores, int64_t count, float share) {
    std::vector<float> weights(count);
    const float total = exponentials(scores, count, largest(scores, count), weights.data());
    const double wanted = static_cast<double>(share) * total;
    // All tokens below this weight have less than the remaining probability together: none of them is kept.
    const float least = static_cast<float>((total - wanted) / (2.0 * static_cast<double>(count)));
    std::vector<std::pair<float, int64_t>> candidates;  // -weight and number, so that they sort by descending weight
    for (int64_t i = 0; i < count; ++i)
        if (weights[i] >= least) candidates.emplace_back(-weights[i], i);
    std::fill(weights.begin(), weights.end(), -kInfinity);  // from here on, the scores that stay
    const int64_t size = static_cast<int64_t>(candidates.size());
    double above = 0;
    for (int64_t done = 0, step = kFirstSorted; done < size && (done == 0 || above < wanted); step *= 4) {
        const int64_t end = std::min(size, done + step);
        std::partial_sort(candidates.begin() + done, candidates.begin() + end, candidates.end());
        for (; done < end && (done == 0 || above < wanted); ++done) {
            weights[candidates[done].second] = scores[candidates[done].second];
            above -= candidates[done].first;
        }
    }
    std::copy(weights.begin(), weights.end(), scores);
}

void keep_min_p(float* scores, int64_t count, float share) {
    const float least = largest(scores, count) + std::log(share);
    for (int64_t i = 0; i < count; ++i)
        if (scores[i] < least) scores[i] = -kInfinity;
}

WordVector consecutive(int64_t first) {
    return WordVector{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<uint32_t>(first);
}

// Standard Gumbel noise of kLanes tokens.
Vector noise_of(uint64_t key, WordVector tokens) {
    WordVector x = tokens * 0x9E3779B1u + static_cast<uint32_t>(key);
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= static_cast<uint32_t>(key >> 32);
    x ^= x >> 15;
    x *= 0x735A2D97u;
    x ^= x >> 15;
    // Halves are converted one by one: there is no conversion of unsigned words before AVX-512. Their sum rounds once.
    const Vector high = to_float((IntVector)(x >> 16)) * 65536.0f, low = to_float((IntVector)(x & 0xffffu));
    const Vector uniform = minimum((high + low + 0.5f) * 0x1p-32f, broadcast(1.0f - 0x1p-24f));
    // -log1p(-u): log(w) u / (1 - w) with w = 1 - u rounded keeps full precision for small u.
    const Vector rest = 1.0f - uniform, lost = 1.0f - rest;
    const Vector exponent = lost > 0.0f ? logarithm(rest) * (uniform / lost) : -uniform;
    return -logarithm(-exponent);
}

}  // namespace

uint64_t noise_key(uint64_t seed, int64_t position) {
    uint64_t key = mix(seed);
    for (uint64_t part : {uint64_t{0}, static_cast<uint64_t>(position), uint64_t{0}})
        key = mix(key ^ mix(part + 0x9E3779B97F4A7C15u));
    return key;
}

void filter(const Sampling& sampling, int64_t row, float* scores, int64_t count) {
    const float temperature = sampling.temperatures[row];
    if (temperature == 0.0f) return;
    if (temperature != 1.0f)
        for (int64_t i = 0; i < count; ++i) scores[i] /= temperature;
    if (sampling.top_k[row] > 0) keep_top_k(scores, count, sampling.top_k[row]);
    if (sampling.top_p[row] < 1.0f) keep_top_p(scores, count, sampling.top_p[row]);
    if (sampling.min_p[row] > 0.0f) keep_min_p(scores, count, sampling.min_p[row]);
}

int64_t likeliest(const float* scores, int64_t count) {
    const float most = largest(scores, count);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const IntVector same = load(scores + i) == most;
        int32_t any = 0;
        for (int lane = 0; lane < kLanes; ++lane) any |= same[lane];
        if (any != 0) break;
    }
    for (; i < count; ++i)
        if (scores[i] == most) return i;
    return 0;
}

int64_t sample(const float* scores, int64_t count, uint64_t key, const int64_t* tokens) {
    int64_t best = 0;
    float most = -kInfinity;
    for (int64_t first = 0; first < count; first += kLanes) {
        const int64_t size = std::min<int64_t>(kLanes, count - first);
        WordVector ids = consecutive(first);
        for (int64_t i = 0; tokens != nullptr && i < size; ++i) ids[i] = static_cast<uint32_t>(tokens[first + i]);
        const Vector noise = noise_of(key, ids);
        for (int64_t i = 0; i < size; ++i) {
            const float score = scores[first + i] + noise[i];
            if (score > most) {
                most = score;
                best = first + i;
            }
        }
    }
    return best;
}

void gumbel(uint64_t key, int64_t token, int64_t count, float* out) {
    for (int64_t first = 0; first < count; first += kLanes) {
        const Vector noise = noise_of(key, consecutive(token + first));
        std::memcpy(out + first, &noise, std::min<int64_t>(kLanes, count - first) * sizeof(float));
    }
}

bool any_not_a_number(const float* scores, int64_t count) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) found |= scores[i] != scores[i];
    return found;
}

float probability(const float* scores, int64_t count, int64_t chosen) {
    thread_local std::vector<float> weights;
    if (static_cast<int64_t>(weights.size()) < count) weights.resize(count);
    const float total = exponentials(scores, count, largest(scores, count), weights.data());
    return weights[chosen] / total;
}

}  // namespace layerskip
