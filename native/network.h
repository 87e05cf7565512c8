// A decoder and its cache: plain structures, which layerskip/model/native/network.py fills in through ctypes.
//
// Shapes: L layers, B rows, D width, H heads, H_kv key/value heads, D_head channels of a head, R rotary channels, I
// width of the MLP, E experts, C experts of a token, J width of an expert, V vocabulary, T capacity of the cache.
#pragma once

#include <cstdint>

#include "kernels/linear.h"

namespace layerskip {

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

struct Expert {
    Linear gate_up;  // D -> 2 J, panels of gate and up in turn
    Linear down;     // J -> D
};

struct Layer {
    Linear input;                      // D -> D, before all else; without panels but in exit adapters
    Linear values;                     // S H_kv D_head -> D, added after attention; without panels but in exit adapters
    const int32_t* value_layers;       // [S], the layers whose values it reads
    const float* distances;            // [kDistances, D], added too
    Linear qkv;                        // D -> (H + 2 H_kv) D_head
    Linear o;                          // H D_head -> D
    Linear gate_up;                    // D -> 2 I, panels of gate and up in turn
    Linear down;                       // I -> D
    Linear router;                     // D -> E; without panels but in layers with experts in place of the MLP
    const Expert* experts;             // [E] or null
    const float* attention_norm;       // [D] or null
    const float* q_norm;               // [D_head], or [H D_head] where norms are joint, or null
    const float* k_norm;               // [D_head], or [H_kv D_head] where norms are joint, or null
    const float* post_attention_norm;  // [D] or null
    const float* mlp_norm;             // [D] or null
    const float* post_mlp_norm;        // [D] or null
    const float* cosines;              // [positions, R]; null: nothing is rotated
    const float* sines;                // [positions, R], negative in the first half
    int64_t window;                    // tokens that a query attends to, itself included; 0: all
    int64_t num_value_layers;          // S
};

// Classes of distances from a token to the one whose values it reads: 0 for the token before it, and so on; the last
// class is for none.
constexpr int kDistances = 9;

// Adds up what the processes that share a network have computed with their parts of it: replaces `sums` [count].
using Total = void (*)(float* sums, int64_t count);

// An exit adapter is a layer that was trained to predict from the output of an earlier layer than the last. A pass over
// its exit writes its keys and values as well, so that drafting can begin there after any token. It may also read the
// values that later layers keep of an earlier token.
struct Network {
    const Layer* layers;        // [L + A]: the layers, then the exit adapters
    const float* final_norm;    // [D]
    Linear head;                // D -> V
    const int64_t* token_ids;   // [V] ids of the head's outputs; null: their numbers
    const int32_t* exits;       // [A], the number of layers before each exit adapter
    int32_t hidden_size;        // D
    int32_t num_heads;          // H
    int32_t num_kv_heads;       // H_kv
    int32_t head_dim;           // D_head
    int32_t rotary_dim;         // R
    int32_t intermediate_size;  // I
    int32_t num_experts;        // E; 0: no layer has experts
    int32_t experts_per_token;  // C
    int32_t expert_size;        // J
    int32_t norm_expert_weights;  // whether the weights of a token's experts sum to 1, rather than those of all experts
    int32_t vocab_size;         // V, outputs of the head
    int32_t activation;
    int32_t threads;
    int32_t num_layers;         // L
    int32_t num_adapters;       // A
    int32_t adapter;            // the layer that adapts what norm and head read; -1: none
    float rms_norm_eps;
    float attention_scale;
    float residual_multiplier;  // on what a layer adds to the state
    int32_t joint_qk_norm;      // whether norms of queries and keys span all heads of a token
    int32_t all_heads;          // H of all processes together
    int32_t all_kv_heads;       // H_kv of all processes together
    const float* counted;       // [H + H_kv], 0 for heads that another process counts; null: all count
    Total total;                // null: this process has the whole network
};

struct Cache {
    void* keys;    // [L, B, T + 1, H_kv, D_head]; the last slot is scratch
    void* values;  // as the keys
    float* key_scales;     // [L, B, T + 1, H_kv] in int8, else null
    float* value_scales;   // as those of the keys
    int64_t layer_stride;  // numbers, a multiple of D_head
    int64_t row_stride;    // numbers, a multiple of D_head
    int64_t capacity;      // T
    int32_t format;        // float32, bfloat16 or int8
    int32_t padding;
};

struct Embedding {
    const void* table;  // [V, D], or the blocks of each row as they are in a GGUF file
    int32_t format;     // float32, bfloat16, or blocks
    float multiplier;
};

// A row's drafting ends once the chance that all of its drafts are accepted falls below `least`; a draft with which it
// falls below `kept` is given up.
constexpr int kConfidenceClasses = 8;
struct StopRule {
    float rates[kConfidenceClasses];  // how often a draft is accepted, by class of its confidence
    float least;
    float kept;
};

}  // namespace layerskip
