#include "rounds.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <vector>

#include "choosing.h"
#include "threads.h"

namespace layerskip {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point start, Clock::time_point end) {
    return std::chrono::duration<double>(end - start).count();
}

// Whether the last `count` tokens have occurred before.
bool repeats(const std::vector<int64_t>& text, int32_t count) {
    if (count < 1 || static_cast<int64_t>(text.size()) <= count) return false;
    const auto end = text.end() - 1;  // an earlier occurrence may share tokens with the last one
    return std::search(text.begin(), end, text.end() - count, text.end()) != end;
}

// Runs rounds until something has to be decided outside.
class Rounds {
  public:
    explicit Rounds(const RoundsCall& call)
        : call_(call), rows_(call.rows), written_(call.written), drawn_(call.drawn), drafts_(call.drafts),
          targets_(call.targets), confidences_(call.confidences), seconds_(call.seconds),
          last_(call.tokens, call.tokens + rows_), starts_(call.starts, call.starts + rows_),
          remaining_(call.remaining, call.remaining + rows_), limits_(rows_), counts_(rows_) {
        const int64_t* text = call.texts;
        for (int64_t row = 0; text != nullptr && row < rows_; text += call.starts[row++]) {
            texts_.emplace_back(text, text + call.starts[row]);
            texts_.back().push_back(call.tokens[row]);
        }
    }

    int32_t run() {
        const auto started = Clock::now();
        for (int32_t done = 0; done < call_.most_rounds;) {
            if (!round()) return done > 0 ? done : -1;  // the next call comes to the same drafts, and says so
            ++done;
            if (ends_ || seconds_between(started, Clock::now()) >= call_.most_seconds) return done;
        }
        return call_.most_rounds;
    }

  private:
    // Whether all logits of drafts were finite.
    bool round() {
        std::lock_guard<std::mutex> lock(Team::in_use());
        const auto started = Clock::now();
        for (int64_t row = 0; row < rows_; ++row)  // verification adds a token itself
            limits_[row] = static_cast<int32_t>(std::min<int64_t>(call_.limits[row], remaining_[row] - 1));
        const int32_t longest = *std::max_element(limits_.begin(), limits_.end());
        const bool drafts = call_.exit_layer > 0 && longest > 0;
        if (drafts) {
            if (!draft_all()) return false;
        } else {
            std::fill_n(written_, rows_, 0);
            std::fill_n(drawn_, rows_, 0);
        }
        const auto middle = Clock::now();
        verify(drafts && call_.complete);
        advance();
        seconds_[0] = drafts ? seconds_between(started, middle) : 0.0;
        seconds_[1] = seconds_between(middle, Clock::now());
        seconds_ += 2;
        return true;
    }

    bool draft_all() {
        int64_t room = 0;
        for (int32_t limit : limits_) room += limit + 1;
        hidden_.resize(room * call_.network->hidden_size);
        DraftCall call{};
        call.network = call_.drafter;
        call.cache = call_.cache;
        call.embedding = call_.draft_embedding;
        call.stop_rule = call_.stop_rule;
        call.sampling = call_.sampling;
        call.tokens = last_.data();
        call.starts = starts_.data();
        call.limits = limits_.data();
        call.written = written_;
        call.drawn = drawn_;
        call.hidden = hidden_.data();
        call.drafts = drafts_;
        call.confidences = confidences_;
        call.rows = call_.rows;
        call.exit_layer = call_.exit_layer;
        call.complete = call_.complete;
        return draft(call) == 0;
    }

    // `shares_states`: go on from the outputs of the exit; otherwise begin with the embedding.
    void verify(bool shares_states) {
        int64_t total = 0;
        for (int64_t row = 0; row < rows_; ++row) total += counts_[row] = written_[row] + 1;
        ChooseCall call{};
        call.network = call_.network;
        call.cache = call_.cache;
        call.embedding = call_.embedding;
        call.sampling = call_.sampling;
        call.starts = starts_.data();
        call.counts = counts_.data();
        call.chosen = targets_;
        call.rows = call_.rows;
        call.start = shares_states ? call_.exit_layer : 0;
        call.stop = call_.num_layers;
        if (!shares_states) {
            tokens_.clear();
            const int64_t* draft = drafts_;
            for (int64_t row = 0; row < rows_; draft += written_[row++]) {
                tokens_.push_back(last_[row]);
                tokens_.insert(tokens_.end(), draft, draft + written_[row]);
            }
            hidden_.resize(total * call_.network->hidden_size);
            call.tokens = tokens_.data();
        }
        call.hidden = hidden_.data();
        choose(call);
    }

    // Accept the drafts that the target chose too, as `accept_matching` in layerskip/decoding/rounds/acceptance.py, and
    // go on after the target's own token.
    void advance() {
        const int64_t* ends = call_.ends;
        for (int64_t row = 0; row < rows_; ends += call_.num_ends[row++]) {
            int64_t accepted = 0;
            while (accepted < written_[row] && drafts_[accepted] == targets_[accepted]) ++accepted;
            last_[row] = targets_[accepted];
            starts_[row] += accepted + 1;
            remaining_[row] -= accepted + 1;
            ends_ |= remaining_[row] == 0 || last_[row] < 0;
            for (int64_t i = 0; i <= accepted; ++i)
                ends_ |= std::find(ends, ends + call_.num_ends[row], targets_[i]) != ends + call_.num_ends[row];
            if (!texts_.empty()) {
                texts_[row].insert(texts_[row].end(), targets_, targets_ + accepted + 1);
                ends_ |= repeats(texts_[row], call_.repeated);
            }
            drafts_ += written_[row];
            targets_ += written_[row] + 1;
            confidences_ += drawn_[row];
        }
        written_ += rows_;
        drawn_ += rows_;
    }

    const RoundsCall& call_;
    const int64_t rows_;
    int32_t *written_, *drawn_;    // what follows in the caller's memory is this round's
    int64_t *drafts_, *targets_;
    float* confidences_;
    double* seconds_;
    std::vector<int64_t> last_, starts_, remaining_;  // of each row, at present
    std::vector<int32_t> limits_, counts_;            // of this round
    std::vector<std::vector<int64_t>> texts_;         // of each row, where they are watched
    std::vector<int64_t> tokens_;
    std::vector<float> hidden_;
    bool ends_ = false;  // whether something has to be decided outside
};

}  // namespace

int32_t rounds(const RoundsCall& call) { return Rounds(call).run(); }

}  // namespace layerskip
