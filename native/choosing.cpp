#include "choosing.h"

#include <algorithm>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/sampling.h"
#include "pass.h"
#include "threads.h"

namespace layerskip {
namespace {

// Tokens for positions first[b], first[b] + 1, ... of row b from hidden [rows, queries, D], as indices of the head's
// outputs: sampled by the row's rules, or the likeliest; -1 where a logit isn't finite. `logits` is room for [rows,
// queries, V padded]; the scores stay in it.
void choose_outputs(const Network& network, const float* hidden, int32_t rows, int32_t queries, const int64_t* first,
                    const Sampling* sampling, float* logits, int64_t* chosen) {
    const int32_t tokens = rows * queries;
    unembed(network, hidden, tokens, logits);
    const auto choose_one = [&](int64_t token) {
        const int64_t row = token / queries;
        float* scores = logits + token * network.head.outputs;
        if (!all_finite(scores, network.head.outputs)) {
            chosen[token] = -1;
        } else if (sampling == nullptr || !sampling->samples(row)) {
            chosen[token] = std::max_element(scores, scores + network.vocab_size) - scores;
        } else {
            filter(*sampling, row, scores, network.vocab_size);
            const uint64_t key = noise_key(sampling->seeds[row], first[row] + token % queries);
            chosen[token] = sample(scores, network.vocab_size, key, network.token_ids);
        }
    };
    if (sampling == nullptr || tokens == 1) {
        for (int token = 0; token < tokens; ++token) choose_one(token);
        return;
    }
    Team::of(network.threads).run([&](int member, int size) {
        for (int token = member; token < tokens; token += size) choose_one(token);
    });
}

// Indices of the head's outputs -> token ids.
void name_tokens(const Network& network, int64_t* tokens, int64_t count) {
    for (int64_t i = 0; network.token_ids != nullptr && i < count; ++i)
        if (tokens[i] >= 0) tokens[i] = network.token_ids[tokens[i]];
}

// As `confidence_class` in layerskip/model/drafts.py.
int confidence_class(float confidence) {
    return std::min(kConfidenceClasses - 1, static_cast<int>(confidence * confidence * kConfidenceClasses));
}

}  // namespace

void choose(const ChooseCall& call) {
    const Network& network = *call.network;
    const int64_t tokens = static_cast<int64_t>(call.rows) * call.queries, size = network.hidden_size;
    for (int64_t token = 0; call.tokens != nullptr && token < tokens; ++token)
        embed(*call.embedding, call.tokens[token], size, call.hidden + token * size);
    run_layers(network, call.hidden, call.rows, call.queries, call.starts, *call.cache, call.start, call.stop);
    if (network.adapter >= 0) {
        const std::vector<int64_t> sources(tokens, -1);  // of a text whose later layers never ran
        const std::vector<float> nothing(tokens * size);
        run_adapter(network, network.adapter, call.hidden, call.rows, call.queries, call.starts,
                    {sources.data(), nothing.data()}, *call.cache);
    }
    std::vector<float> logits(tokens * network.head.outputs);
    std::vector<int64_t> first(call.starts, call.starts + call.rows);
    for (int64_t& position : first) ++position;
    choose_outputs(network, call.hidden, call.rows, call.queries, first.data(), call.sampling, logits.data(),
                   call.chosen);
    name_tokens(network, call.chosen, tokens);
}

int32_t draft(const DraftCall& call) {
    const Network& network = *call.network;
    const int64_t rows = call.rows, size = network.hidden_size, outputs = network.head.outputs;
    const bool adapts = network.adapter >= 0;
    std::vector<float> logits(rows * outputs), chances(rows, 1.0f), adapted(adapts ? rows * size : 0);
    std::vector<int64_t> positions(call.starts, call.starts + rows), sources(positions);
    for (int64_t& source : sources) --source;  // the last token that all layers have run over
    std::vector<float> projected(adapts ? rows * size : 0);
    if (adapts && network.layers[network.adapter].values.panels != nullptr)
        fuse(network, network.adapter, call.rows, 1, sources.data(), *call.cache, projected.data());
    int32_t num_drafts = call.num_drafts;
    for (int32_t index = 0; index < num_drafts + (call.complete ? 1 : 0); ++index) {
        float* hidden = call.hidden + index * rows * size;
        const int64_t* last = index == 0 ? call.tokens : call.drafts + (index - 1) * rows;
        for (int64_t row = 0; row < rows; ++row) embed(*call.embedding, last[row], size, hidden + row * size);
        run_layers(network, hidden, call.rows, 1, positions.data(), *call.cache, 0, call.exit_layer);
        if (index == num_drafts) {
            if (adapts) write_keys(network, hidden, call.rows, 1, positions.data(), *call.cache, network.adapter);
            break;
        }
        if (adapts) {
            std::copy(hidden, hidden + rows * size, adapted.begin());
            run_adapter(network, network.adapter, adapted.data(), call.rows, 1, positions.data(),
                        {sources.data(), projected.data()}, *call.cache);
        }
        int64_t* chosen = call.drafts + index * rows;
        for (int64_t& position : positions) ++position;
        choose_outputs(network, adapts ? adapted.data() : hidden, call.rows, 1, positions.data(), call.sampling,
                       logits.data(), chosen);
        if (*std::min_element(chosen, chosen + rows) < 0) return -1;
        float total = 0;
        for (int64_t row = 0; call.stop_rule != nullptr && row < rows; ++row) {
            const float confidence = probability(logits.data() + row * outputs, network.vocab_size, chosen[row]);
            call.confidences[index * rows + row] = confidence;
            total += chances[row] *= call.stop_rule->rates[confidence_class(confidence)];
        }
        name_tokens(network, chosen, rows);
        if (call.stop_rule != nullptr && total < call.stop_rule->least * static_cast<float>(rows))
            num_drafts = index + 1;
    }
    return num_drafts;
}

}  // namespace layerskip
