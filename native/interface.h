// The library's functions: plain C, called by layerskip/model/native/ through ctypes. All memory is the caller's.
//
// Calls with many parameters take them in a structure. layerskip/model/native/library.py repeats every structure, and
// refuses a library whose structures are laid out differently. Shapes as in network.h; B rows, each with some
// consecutive tokens (perhaps none), N tokens in all. What belongs to tokens lies row after row, without gaps.
#pragma once

#include <cstdint>

#include "kernels/linear.h"
#include "kernels/sampling.h"
#include "network.h"

namespace layerskip {

struct RunLayersCall {
    const Network* network;
    const Cache* cache;
    const int64_t* starts;  // [B], position of each row's first token
    const int32_t* counts;  // [B], tokens of each row
    float* hidden;          // [N, D], the input of layer `start`; becomes the output of layer `stop` - 1
    int32_t rows;           // B
    int32_t start;          // layers start..stop-1
    int32_t stop;
    int32_t padding;
};

struct AdaptCall {
    const Network* network;
    const Cache* cache;
    const int64_t* starts;   // [B], position of each row's first token
    const int32_t* counts;   // [B], tokens of each row
    const int64_t* sources;  // [N], slot of the token whose values each reads; -1: none
    float* hidden;           // [N, D], the output of the exit; becomes what norm and head read
    int32_t rows;            // B
    int32_t layer;           // the adapter's
};

struct ChooseCall {
    const Network* network;
    const Cache* cache;
    const Embedding* embedding;  // used if `tokens` are given
    const Sampling* sampling;    // null: take the likeliest tokens
    const int64_t* tokens;       // [N]; null: `hidden` is given
    const int64_t* starts;       // [B], position of each row's first token
    const int32_t* counts;       // [B], tokens of each row
    float* hidden;               // [N, D], the input of layer `start`, or room for the embeddings; is changed
    int64_t* chosen;             // out [N]; -1 where a logit is infinite or not a number
    int32_t rows;                // B
    int32_t start;               // layers start..stop-1
    int32_t stop;
    int32_t padding;
};

// K[b]: drafts of row b, at most. Rows that have theirs drop out of the passes that follow.
struct DraftCall {
    const Network* network;
    const Cache* cache;
    const Embedding* embedding;
    const StopRule* stop_rule;  // null: K drafts in each row, without confidences
    const Sampling* sampling;   // null: take the likeliest tokens
    const int64_t* tokens;      // [B], each row's last token
    const int64_t* starts;      // [B], their positions
    const int32_t* limits;      // [B], K
    int32_t* written;           // out [B], drafts of each row
    int32_t* drawn;             // out [B], the same with a last one that was given up
    float* hidden;              // out, room for sum of K + 1; outputs of the exit [sum of written + 1, D]
    int64_t* drafts;            // out, room for sum of K; [sum of written]
    float* confidences;         // out, room for sum of K; [sum of drawn], probabilities of the drafts
    int32_t rows;               // B
    int32_t exit_layer;         // layers to run
    int32_t complete;           // run each row's last draft through the layers as well; otherwise `hidden` isn't written
    int32_t padding;
};

// Rounds of drafts and verification, or of steps without drafts, until a row has come to its end, the last two tokens of
// one that is watched have occurred before in it, or what was agreed on is used up. R: rounds, at most `most_rounds`. What rounds give lies round after round, in each of them row after row,
// without gaps.
struct RoundsCall {
    const Network* network;            // verifies
    const Network* drafter;            // may have weights of its own; null without drafts
    const Cache* cache;                // of both
    const Embedding* embedding;
    const Embedding* draft_embedding;  // null without drafts
    const StopRule* stop_rule;         // as in DraftCall
    const Sampling* sampling;          // null: take the likeliest tokens
    const int64_t* tokens;             // [B], each row's last token
    const int64_t* starts;             // [B], their positions
    const int64_t* remaining;          // [B], tokens that each row may gain, 1 or more, for which the cache has room
    const int32_t* limits;             // [B], drafts of a row in each round, at most
    const int64_t* ends;               // tokens that end a row, row after row
    const int32_t* num_ends;           // [B], how many of them are each row's
    const int64_t* texts;              // tokens before each row's last one, row after row; null: rows aren't watched
                                       // for the last `repeated` tokens of one having occurred before
    int32_t* written;                  // out [R, B], drafts of each row
    int32_t* drawn;                    // out [R, B], the same with a last one that was given up
    int64_t* drafts;                   // out, room for R x sum of limits
    int64_t* targets;                  // out, room for R x sum of (limits + 1): the network's tokens after each row's last
                                       // one and after each of its drafts
    float* confidences;                // out, room for R x sum of limits; probabilities of the drafts, with a stop rule
    double* seconds;                   // out [R, 2], of drafting and of verification
    double most_seconds;               // no further round begins after that
    int32_t rows;                      // B
    int32_t exit_layer;                // layers that draft; 0 without drafts
    int32_t num_layers;                // layers that verify
    int32_t complete;                  // verification goes on from the outputs of the exit
    int32_t most_rounds;
    int32_t repeated;
};

struct PackCall {
    const void* weight;  // [outputs, inputs] in float32, or the blocks of each output as in a GGUF file
    void* panels;        // out
    void* scales;        // out, in formats that have some
    int32_t inputs;
    int32_t outputs;     // the last panel is filled up with zeros
    int32_t format;
    int32_t first;       // the weight fills every `step`-th panel from `first` on
    int32_t step;
    int32_t threads;
};

extern "C" {

void layerskip_run_layers(const RunLayersCall* call);

// Write the keys and values of layer `start` for its input, without running it.
void layerskip_write_keys(const RunLayersCall* call);

// Run an exit adapter.
void layerskip_run_adapter(const AdaptCall* call);

// logits [tokens, V padded to whole panels] of hidden [tokens, D]: final norm and head.
void layerskip_unembed(const Network* network, const float* hidden, int32_t tokens, float* logits);

// The token after each of a block: layers start..stop-1, the network's adapter if it has one, final norm, head, then the
// likeliest token or a sampled one, whose noise is that of its position, which is one more than its predecessor's.
void layerskip_choose(const ChooseCall* call);

// Write up to K tokens after each row's last one with the first layers, each chosen as by layerskip_choose. Returns -1
// where a logit is infinite or not a number, else 0.
int32_t layerskip_draft(const DraftCall* call);

// Returns R; -1 where a logit of the first round's drafts is infinite or not a number. Where one of a target is, that
// target is -1, and the round the last one.
int32_t layerskip_rounds(const RoundsCall* call);

int64_t layerskip_packed_bytes(int32_t inputs, int32_t outputs, int32_t format);

// Lay out a weight in float32.
void layerskip_pack(const PackCall* call);

// Lay out a weight in blocks of a GGUF file.
void layerskip_pack_blocks(const PackCall* call);

// Whether float16 holds all of these numbers exactly.
int32_t layerskip_fits_float16(const float* numbers, int64_t count);

// Whether bfloat16 holds all of these numbers exactly.
int32_t layerskip_fits_bfloat16(const float* numbers, int64_t count);

// y [tokens, O] = x [tokens, I] W^T + b.
void layerskip_multiply(const Linear* w, const float* x, int32_t tokens, float* y, int32_t threads);

// `filter` of scores [rows, queries, count] by each row's rules.
void layerskip_filter(const Sampling* sampling, float* scores, int64_t rows, int64_t queries, int64_t count,
                      int32_t threads);

// out [positions, count], the noise of `count` tokens from `token` on, for the key of each position.
void layerskip_gumbel(const uint64_t* keys, int64_t positions, int64_t token, int64_t count, float* out,
                      int32_t threads);

// Version of these structures and functions; the caller refuses another.
int32_t layerskip_interface();

// Size of every structure, and offset and size of each of its fields, as text.
const char* layerskip_layout();

// Name of the instruction set that the library was compiled for.
const char* layerskip_target();

// Whether this processor has the instructions that the library was compiled with; asked before anything else is called.
int32_t layerskip_runs_here();

// Names of those that it lacks, or that the system doesn't allow, with spaces between them; may be asked at any time.
const char* layerskip_missing();
}

}  // namespace layerskip
