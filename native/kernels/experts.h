// A layer's experts, in place of its MLP: each token goes through those that the router ranks highest for it.
//
// Tokens are sorted by expert, and an expert's panels are read once for all of its tokens. What a token gets is the sum
// of its own experts' outputs in the order of their ranks: its result doesn't depend, to the last bit, on the tokens
// beside it or on which member computed what.
#pragma once

#include "network.h"
#include "threads.h"

namespace layerskip {

class Experts {
  public:
    // `floats` and `numbers` are room for a block of up to `most` tokens (see below), shared by the team.
    Experts(const Network& network, int tokens, int most, float* floats, int32_t* numbers, Team& team, int member);

    static int64_t shared_floats(const Network& network, int most);
    static int64_t shared_numbers(const Network& network, int most);

    // out [tokens, D] of x [tokens, D]. All members call it; each has then written the tokens member, member + size, ...
    void run(const Layer& layer, const float* x, float* out);

  private:
    void choose(const Layer& layer, int token);
    void sort();
    void gather(const float* x);
    void inner(const Layer& layer, const float* x);
    void outer(const Layer& layer);
    template <typename Multiply>
    void share_panels(int panels, const Multiply& multiply_panels);

    const Network& net_;
    const int tokens_;
    Team& team_;
    const int member_;
    float *scores_;   // [tokens, E up to whole panels]
    float *weights_;  // [tokens, C]
    float *sorted_;   // [tokens C, D], inputs by expert
    float *gate_up_;  // [tokens C, 2 J]
    float *inner_;    // [tokens C, J]
    float *outputs_;  // [tokens C, D], by expert
    int32_t *chosen_;  // [tokens, C], experts by rank
    int32_t *places_;  // [tokens, C], where the inputs and outputs of these are
    int32_t *starts_;  // [E + 1], the first place of each expert
    int32_t *used_;    // [1 + E], number of experts that have tokens, and which
};

}  // namespace layerskip
