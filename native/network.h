// The layers of a decoder over a block of rows, as one call: no operator of a framework in between.
//
// Plain structures and functions of C, filled in and called by layerskip/model/native_network.py through ctypes. All memory is the
// caller's. Shapes: N rows (a row is one token of one text), D width, H heads, H_kv key/value heads, D_head channels of a
// head, R rotary channels, I width of the MLP, V vocabulary, T capacity of the cache.
#pragma once

#include <cstdint>

#include "linear.h"
#include "sampling.h"

namespace layerskip {

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

struct Layer {
    Linear qkv;      // D -> (H + 2 H_kv) D_head
    Linear o;        // H D_head -> D
    Linear gate_up;  // D -> 2 I, panels of gate and up in turn
    Linear down;     // I -> D
    const float* attention_norm;       // [D]
    const float* q_norm;               // [D_head] or null
    const float* k_norm;               // [D_head] or null
    const float* post_attention_norm;  // [D] or null
    const float* mlp_norm;             // [D]
    const float* post_mlp_norm;        // [D] or null
    const float* cosines;              // [positions, R]
    const float* sines;                // [positions, R], negative in the first half
    int64_t window;                    // tokens that a query sees, itself included; 0: all
};

struct Network {
    const Layer* layers;
    const float* final_norm;  // [D]
    Linear head;              // D -> V
    const int64_t* tokens;    // ids of the head's outputs; null: their numbers
    int32_t width;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_channels;
    int32_t rotary_channels;
    int32_t mlp_width;
    int32_t vocabulary;
    int32_t activation;
    int32_t threads;
    float epsilon;
    float attention_scale;
};

struct Cache {
    float* keys;    // [L, B, T + 1, H_kv, D_head]; the last slot is scratch
    float* values;
    int64_t layer_stride;  // in floats
    int64_t row_stride;
    int64_t capacity;      // T
};

struct Embedding {
    const void* table;  // [V, D], or [V, D / 32] blocks as they are in a GGUF file
    int32_t format;     // float32, bfloat16, q8_0, q4_0 or q4_1
    float multiplier;
};

extern "C" {

// Run layers first..last-1 over the tokens of `texts` texts, `queries` consecutive ones each; text b's start at position
// starts[b]. hidden [texts * queries, D] is changed in place; keys and values go into the cache.
void layerskip_run_layers(const Network* network, float* hidden, int32_t texts, int32_t queries, const int64_t* starts,
                          const Cache* cache, int32_t first, int32_t last);

// logits [rows, V padded to whole panels] of hidden [rows, D]: final norm and head.
void layerskip_unembed(const Network* network, const float* hidden, int32_t rows, float* logits);

// The token after each of the rows, drawn, or the likeliest without `sampling`: layers first..last-1, final norm, head.
// A text's tokens are numbered from 0, so that the token after position p is number p + 1. Without `tokens`, hidden
// [texts * queries, D] holds the input of layer `first`; with tokens [texts * queries], it is filled with their embeddings.
// It is changed in place. out: [texts * queries]; -1 where a logit is infinite or not a number.
void layerskip_choose(const Network* network, const Embedding* embedding, const int64_t* tokens, float* hidden,
                      int32_t texts, int32_t queries, const int64_t* starts, const Cache* cache, int32_t first,
                      int32_t last, const Sampling* sampling, int64_t* out);

// When to stop drafting: `rates` says by class of confidence how often a draft holds, and drafting ends once the chance
// that all drafts of a text hold, on average over the texts, falls below `least`.
constexpr int kConfidenceClasses = 8;
struct DraftStop {
    float rates[kConfidenceClasses];
    float least;
};

// Drafts with the first `layers` layers, chosen as by layerskip_choose: from tokens [texts] on, up to `drafts` tokens of
// each text, the first of them at position starts[b] + 1. out, confidences: [drafts, texts], tokens and their probabilities; hidden:
// [drafts + 1, texts, D], outputs of layer `layers` - 1 for the token given and for the drafts; the last draft runs through
// the layers only if `complete`. Without `stop`, `drafts` are made and confidences aren't. Returns how many were made;
// -1 where a logit is infinite or not a number.
int32_t layerskip_draft(const Network* network, const Embedding* embedding, const int64_t* tokens, int32_t texts,
                        const int64_t* starts, int32_t drafts, int32_t layers, const Cache* cache,
                        const DraftStop* stop, const Sampling* sampling, int32_t complete, float* hidden, int64_t* out,
                        float* confidences);

int64_t layerskip_packed_bytes(int32_t inputs, int32_t outputs, int32_t format);

// Lay out weight [rows, inputs], filled up with zeros to whole panels, as every `step`-th panel from `first` on.
void layerskip_pack(const float* weight, int32_t inputs, int32_t rows, int32_t format, void* panels, void* scales,
                    int32_t first, int32_t step, int32_t threads);

// The same from a weight [rows, inputs / 32] in blocks of a GGUF file.
void layerskip_pack_blocks(const uint8_t* weight, int32_t inputs, int32_t rows, int32_t format, void* panels,
                           void* scales, int32_t first, int32_t step, int32_t threads);

// Whether float16 holds all of these numbers exactly.
int32_t layerskip_fits_float16(const float* numbers, int64_t count);

// Whether bfloat16 holds all of these numbers exactly.
int32_t layerskip_fits_bfloat16(const float* numbers, int64_t count);

// y [rows, O] = x [rows, I] W^T + b.
void layerskip_multiply(const Linear* w, const float* x, int32_t rows, float* y, int32_t threads);

// Version of these structures and functions; the caller refuses another.
int32_t layerskip_interface();

// Bytes of a structure: Linear, Layer, Network, Cache, Embedding, DraftStop, Sampling in this order.
int32_t layerskip_size_of(int32_t structure);

// Whether this processor has the instructions that the library was compiled for.
int32_t layerskip_runs_here();
}

}  // namespace layerskip
