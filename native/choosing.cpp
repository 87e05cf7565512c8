#include "choosing.h"

#include <algorithm>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/sampling.h"
#include "pass.h"
#include "threads.h"

namespace layerskip {
namespace {

constexpr int kSharedTokens = 3;  // from so many tokens on, members share looking for the likeliest

// Room for the logits of `tokens` tokens; callers hold `Team::in_use`. Megabytes that come from the system anew for
// each call would be filled with zeros by it.
float* logits_of(const Network& network, int64_t tokens) {
    static std::vector<float> logits;
    const size_t count = tokens * network.head.outputs;
    if (logits.size() < count) logits.resize(count);
    return logits.data();
}

// The token after each of the rows' tokens, from hidden [N, D], as indices of the head's outputs: sampled by the row's
// rules, or the likeliest; -1 where a logit isn't finite. confidences: their probabilities [N], or null.
void choose_outputs(const Network& network, const float* hidden, const Rows& rows, const Sampling* sampling,
                    int64_t* chosen, float* confidences = nullptr) {
    const int64_t tokens = rows.total();
    float* logits = logits_of(network, tokens);
    unembed(network, hidden, static_cast<int32_t>(tokens), logits);
    const auto choose_one = [&](int64_t token, int64_t row, int64_t position) {
        float* scores = logits + token * network.head.outputs;
        if (!all_finite(scores, network.head.outputs)) {
            chosen[token] = -1;
        } else if (sampling == nullptr || !sampling->samples(row)) {
            chosen[token] = likeliest(scores, network.vocab_size);
        } else {
            filter(*sampling, row, scores, network.vocab_size);
            chosen[token] =
                sample(scores, network.vocab_size, noise_key(sampling->seeds[row], position + 1), network.token_ids);
        }
        if (confidences != nullptr && chosen[token] >= 0)
            confidences[token] = probability(scores, network.vocab_size, chosen[token]);
    };
    if (tokens == 1 || (sampling == nullptr && tokens < kSharedTokens)) return rows.each(choose_one);
    Team::of(network.threads).run([&](int member, int size) {
        rows.each([&](int64_t token, int64_t row, int64_t position) {
            if (token % size == member) choose_one(token, row, position);
        });
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

// Some of the rows, one token of each.
struct Part {
    explicit Part(int64_t rows) : counts(rows, 0) {}

    void add(int64_t row) {
        counts[row] = 1;
        members.push_back(row);
    }

    Rows at(const std::vector<int64_t>& positions) const {
        return {positions.data(), counts.data(), static_cast<int32_t>(counts.size())};
    }

    std::vector<int32_t> counts;
    std::vector<int64_t> members;  // ascending
};

// Writes drafts pass by pass: a pass runs one token of each row that goes on.
class Drafting {
  public:
    explicit Drafting(const DraftCall& call)
        : call_(call), net_(*call.network), rows_(call.rows), size_(net_.hidden_size), adapts_(net_.adapter >= 0),
          last_(call.tokens, call.tokens + rows_), positions_(call.starts, call.starts + rows_), first_(rows_ + 1, 0),
          chances_(rows_, 1.0f), states_(rows_ * size_), adapted_(adapts_ ? rows_ * size_ : 0), chosen_(rows_),
          sources_(rows_), confidences_(rows_) {
        std::fill(call.written, call.written + rows_, 0);
        std::fill(call.drawn, call.drawn + rows_, 0);
        for (int64_t row = 0; row < rows_; ++row) {
            first_[row + 1] = first_[row] + call.limits[row];
            if (call.limits[row] > 0) open_.push_back(row);
            else if (call.complete) closing_.push_back(row);
        }
        if (adapts_ && net_.layers[net_.adapter].values.panels != nullptr) fuse_committed();
    }

    // Whether all logits were finite.
    bool run() {
        while (!open_.empty() || !closing_.empty())
            if (!pass()) return false;
        close_gaps();
        return true;
    }

  private:
    // What all rows' later layers keep of their last committed token, which is the same for all drafts.
    void fuse_committed() {
        std::vector<int64_t> sources(rows_);
        for (int64_t row = 0; row < rows_; ++row) sources[row] = call_.starts[row] - 1;
        const std::vector<int32_t> ones(rows_, 1);
        committed_.resize(rows_ * size_);
        fuse(net_, net_.adapter, {call_.starts, ones.data(), static_cast<int32_t>(rows_)}, sources.data(),
             *call_.cache, committed_.data());
    }

    // Run the latest token of the rows that go on, and choose the next one for those that have room for drafts.
    bool pass() {
        Part all(rows_), drafting(rows_), closing(rows_);
        for (int64_t row : open_) drafting.add(row);
        for (int64_t row : closing_) closing.add(row);
        std::vector<int64_t> members(open_.size() + closing_.size());
        std::merge(open_.begin(), open_.end(), closing_.begin(), closing_.end(), members.begin());
        for (int64_t row : members) all.add(row);
        for (size_t i = 0; i < members.size(); ++i)
            embed(*call_.embedding, last_[members[i]], size_, states_.data() + i * size_);
        run_layers(net_, states_.data(), all.at(positions_), *call_.cache, 0, call_.exit_layer);
        for (size_t i = 0; call_.complete && i < members.size(); ++i) {
            const int64_t row = members[i];
            copy_state(states_.data() + i * size_, call_.hidden + (first_[row] + row + index_) * size_);
        }
        float* states = states_.data();
        if (!closing.members.empty() && adapts_) {
            gather(members, closing.members, adapted_.data());
            write_keys(net_, adapted_.data(), closing.at(positions_), *call_.cache, net_.adapter);
        }
        closing_.clear();
        if (adapts_ || drafting.members.size() < members.size()) {
            std::vector<float>& part = adapts_ ? adapted_ : parts_;
            part.resize(rows_ * size_);
            gather(members, drafting.members, states = part.data());
        }
        if (adapts_ && !drafting.members.empty()) adapt(drafting, states);
        const bool finite = drafting.members.empty() || choose(drafting, states);
        for (int64_t& position : positions_) ++position;
        ++index_;
        return finite;
    }

    void copy_state(const float* from, float* to) const { std::copy(from, from + size_, to); }

    // The states of `wanted` among those of `members`, both ascending.
    void gather(const std::vector<int64_t>& members, const std::vector<int64_t>& wanted, float* to) const {
        size_t place = 0;
        for (size_t i = 0; i < members.size() && place < wanted.size(); ++i)
            if (members[i] == wanted[place]) copy_state(states_.data() + i * size_, to + place++ * size_);
    }

    void adapt(const Part& drafting, float* states) {
        projected_.resize(rows_ * size_);
        for (size_t i = 0; i < drafting.members.size(); ++i) {
            const int64_t row = drafting.members[i];
            sources_[i] = call_.starts[row] - 1;  // the last token that all layers have run over
            if (!committed_.empty()) copy_state(committed_.data() + row * size_, projected_.data() + i * size_);
        }
        run_adapter(net_, net_.adapter, states, drafting.at(positions_), {sources_.data(), projected_.data()},
                    *call_.cache);
    }

    bool choose(const Part& drafting, const float* states) {
        const int64_t count = drafting.members.size();
        choose_outputs(net_, states, drafting.at(positions_), call_.sampling, chosen_.data(),
                       call_.stop_rule == nullptr ? nullptr : confidences_.data());
        if (*std::min_element(chosen_.begin(), chosen_.begin() + count) < 0) return false;
        open_.clear();
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = drafting.members[i];
            if (!keeps(row, confidences_[i])) continue;
            name_tokens(net_, &chosen_[i], 1);
            last_[row] = call_.drafts[first_[row] + call_.written[row]++] = chosen_[i];
            const bool doubtful = call_.stop_rule != nullptr && chances_[row] < call_.stop_rule->least;
            if (!doubtful && call_.written[row] < call_.limits[row]) open_.push_back(row);
            else if (call_.complete) closing_.push_back(row);
        }
        return true;
    }

    // Notes a draft's confidence, where that is asked for; whether it is worth being verified.
    bool keeps(int64_t row, float confidence) {
        const int32_t drawn = call_.drawn[row]++;
        if (call_.stop_rule == nullptr) return true;
        call_.confidences[first_[row] + drawn] = confidence;
        chances_[row] *= call_.stop_rule->rates[confidence_class(confidence)];
        return chances_[row] >= call_.stop_rule->kept;
    }

    // Bring together what rows with fewer drafts than they had room for have left apart.
    void close_gaps() {
        int64_t drafts = 0, drawn = 0, states = 0;
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t first = first_[row], count = call_.written[row];
            std::copy_n(call_.drafts + first, count, call_.drafts + drafts);
            if (call_.stop_rule != nullptr)
                std::copy_n(call_.confidences + first, call_.drawn[row], call_.confidences + drawn);
            if (call_.complete && states != first + row)
                std::copy_n(call_.hidden + (first + row) * size_, (count + 1) * size_, call_.hidden + states * size_);
            drafts += count;
            drawn += call_.drawn[row];
            states += count + 1;
        }
    }

    const DraftCall& call_;
    const Network& net_;
    const int64_t rows_, size_;
    const bool adapts_;
    int index_ = 0;                   // passes so far
    std::vector<int64_t> open_;       // rows that draft, ascending
    std::vector<int64_t> closing_;    // rows whose last draft has to run through the layers, ascending
    std::vector<int64_t> last_;       // each row's latest token
    std::vector<int64_t> positions_;  // of these
    std::vector<int64_t> first_;      // drafts that the rows before each have room for
    std::vector<float> chances_;      // that all drafts of a row are accepted
    std::vector<float> states_, adapted_, parts_, committed_, projected_;
    std::vector<int64_t> chosen_, sources_;
    std::vector<float> confidences_;  // of the latest drafts
};

}  // namespace

void choose(const ChooseCall& call) {
    const Network& network = *call.network;
    const Rows rows{call.starts, call.counts, call.rows};
    const int64_t tokens = rows.total(), size = network.hidden_size;
    for (int64_t token = 0; call.tokens != nullptr && token < tokens; ++token)
        embed(*call.embedding, call.tokens[token], size, call.hidden + token * size);
    run_layers(network, call.hidden, rows, *call.cache, call.start, call.stop);
    if (network.adapter >= 0) {
        const std::vector<int64_t> sources(tokens, -1);  // of a text whose later layers never ran
        const std::vector<float> nothing(tokens * size);
        run_adapter(network, network.adapter, call.hidden, rows, {sources.data(), nothing.data()}, *call.cache);
    }
    choose_outputs(network, call.hidden, rows, call.sampling, call.chosen);
    name_tokens(network, call.chosen, tokens);
}

int32_t draft(const DraftCall& call) { return Drafting(call).run() ? 0 : -1; }

}  // namespace layerskip
