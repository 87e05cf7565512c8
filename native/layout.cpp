// The layout of all structures that callers fill in, as text. library.py builds the same text from its own structures.
#include <cstddef>
#include <initializer_list>
#include <string>

#include "interface.h"

namespace layerskip {
namespace {

struct Field {
    const char* name;
    size_t offset, size;
};

std::string describe(const char* structure, size_t size, std::initializer_list<Field> fields) {
    std::string text = structure + (" " + std::to_string(size)) + ":";
    for (const Field& field : fields)
        text += std::string(" ") + field.name + " " + std::to_string(field.offset) + "+" + std::to_string(field.size);
    return text + "\n";
}

// A macro, since nothing else turns a field into its name and its offset.
#define FIELD(structure, field) \
    Field { #field, offsetof(structure, field), sizeof(structure::field) }

}  // namespace

const char* layerskip_layout() {
    static const std::string layout =
        describe("Linear", sizeof(Linear),
                 {FIELD(Linear, panels), FIELD(Linear, scales), FIELD(Linear, bias), FIELD(Linear, inputs),
                  FIELD(Linear, outputs), FIELD(Linear, format), FIELD(Linear, compute)}) +
        describe("Expert", sizeof(Expert), {FIELD(Expert, gate_up), FIELD(Expert, down)}) +
        describe("Layer", sizeof(Layer),
                 {FIELD(Layer, input), FIELD(Layer, values), FIELD(Layer, value_layers), FIELD(Layer, distances),
                  FIELD(Layer, qkv), FIELD(Layer, o), FIELD(Layer, gate_up), FIELD(Layer, down),
                  FIELD(Layer, router), FIELD(Layer, experts),
                  FIELD(Layer, attention_norm), FIELD(Layer, q_norm), FIELD(Layer, k_norm),
                  FIELD(Layer, post_attention_norm), FIELD(Layer, mlp_norm), FIELD(Layer, post_mlp_norm),
                  FIELD(Layer, cosines), FIELD(Layer, sines), FIELD(Layer, window),
                  FIELD(Layer, num_value_layers)}) +
        describe("Network", sizeof(Network),
                 {FIELD(Network, layers), FIELD(Network, final_norm), FIELD(Network, head), FIELD(Network, token_ids),
                  FIELD(Network, exits), FIELD(Network, hidden_size), FIELD(Network, num_heads),
                  FIELD(Network, num_kv_heads),
                  FIELD(Network, head_dim), FIELD(Network, rotary_dim), FIELD(Network, intermediate_size),
                  FIELD(Network, num_experts), FIELD(Network, experts_per_token), FIELD(Network, expert_size),
                  FIELD(Network, norm_expert_weights),
                  FIELD(Network, vocab_size), FIELD(Network, activation), FIELD(Network, threads),
                  FIELD(Network, num_layers), FIELD(Network, num_adapters), FIELD(Network, adapter),
                  FIELD(Network, rms_norm_eps), FIELD(Network, attention_scale),
                  FIELD(Network, residual_multiplier), FIELD(Network, joint_qk_norm), FIELD(Network, all_heads),
                  FIELD(Network, all_kv_heads), FIELD(Network, counted), FIELD(Network, total)}) +
        describe("Cache", sizeof(Cache),
                 {FIELD(Cache, keys), FIELD(Cache, values), FIELD(Cache, key_scales), FIELD(Cache, value_scales),
                  FIELD(Cache, layer_stride), FIELD(Cache, row_stride), FIELD(Cache, capacity), FIELD(Cache, format),
                  FIELD(Cache, padding)}) +
        describe("Embedding", sizeof(Embedding),
                 {FIELD(Embedding, table), FIELD(Embedding, format), FIELD(Embedding, multiplier)}) +
        describe("StopRule", sizeof(StopRule), {FIELD(StopRule, rates), FIELD(StopRule, least), FIELD(StopRule, kept)}) +
        describe("Sampling", sizeof(Sampling),
                 {FIELD(Sampling, temperatures), FIELD(Sampling, top_p), FIELD(Sampling, min_p),
                  FIELD(Sampling, top_k), FIELD(Sampling, seeds)}) +
        describe("RunLayersCall", sizeof(RunLayersCall),
                 {FIELD(RunLayersCall, network), FIELD(RunLayersCall, cache), FIELD(RunLayersCall, starts),
                  FIELD(RunLayersCall, counts), FIELD(RunLayersCall, hidden), FIELD(RunLayersCall, rows),
                  FIELD(RunLayersCall, start), FIELD(RunLayersCall, stop), FIELD(RunLayersCall, padding)}) +
        describe("AdaptCall", sizeof(AdaptCall),
                 {FIELD(AdaptCall, network), FIELD(AdaptCall, cache), FIELD(AdaptCall, starts),
                  FIELD(AdaptCall, counts), FIELD(AdaptCall, sources), FIELD(AdaptCall, hidden),
                  FIELD(AdaptCall, rows), FIELD(AdaptCall, layer)}) +
        describe("ChooseCall", sizeof(ChooseCall),
                 {FIELD(ChooseCall, network), FIELD(ChooseCall, cache), FIELD(ChooseCall, embedding),
                  FIELD(ChooseCall, sampling), FIELD(ChooseCall, tokens), FIELD(ChooseCall, starts),
                  FIELD(ChooseCall, counts), FIELD(ChooseCall, hidden), FIELD(ChooseCall, chosen),
                  FIELD(ChooseCall, rows), FIELD(ChooseCall, start), FIELD(ChooseCall, stop),
                  FIELD(ChooseCall, padding)}) +
        describe("DraftCall", sizeof(DraftCall),
                 {FIELD(DraftCall, network), FIELD(DraftCall, cache), FIELD(DraftCall, embedding),
                  FIELD(DraftCall, stop_rule), FIELD(DraftCall, sampling), FIELD(DraftCall, tokens),
                  FIELD(DraftCall, starts), FIELD(DraftCall, limits), FIELD(DraftCall, written),
                  FIELD(DraftCall, drawn), FIELD(DraftCall, hidden), FIELD(DraftCall, drafts),
                  FIELD(DraftCall, confidences), FIELD(DraftCall, rows), FIELD(DraftCall, exit_layer),
                  FIELD(DraftCall, complete), FIELD(DraftCall, padding)}) +
        describe("RoundsCall", sizeof(RoundsCall),
                 {FIELD(RoundsCall, network), FIELD(RoundsCall, drafter), FIELD(RoundsCall, cache),
                  FIELD(RoundsCall, embedding), FIELD(RoundsCall, draft_embedding), FIELD(RoundsCall, stop_rule),
                  FIELD(RoundsCall, sampling), FIELD(RoundsCall, tokens), FIELD(RoundsCall, starts),
                  FIELD(RoundsCall, remaining), FIELD(RoundsCall, limits), FIELD(RoundsCall, ends),
                  FIELD(RoundsCall, num_ends), FIELD(RoundsCall, texts), FIELD(RoundsCall, written),
                  FIELD(RoundsCall, drawn), FIELD(RoundsCall, drafts), FIELD(RoundsCall, targets), FIELD(RoundsCall, confidences),
                  FIELD(RoundsCall, seconds), FIELD(RoundsCall, most_seconds), FIELD(RoundsCall, rows),
                  FIELD(RoundsCall, exit_layer), FIELD(RoundsCall, num_layers), FIELD(RoundsCall, complete),
                  FIELD(RoundsCall, most_rounds), FIELD(RoundsCall, repeated)}) +
        describe("PackCall", sizeof(PackCall),
                 {FIELD(PackCall, weight), FIELD(PackCall, panels), FIELD(PackCall, scales), FIELD(PackCall, inputs),
                  FIELD(PackCall, outputs), FIELD(PackCall, format), FIELD(PackCall, first), FIELD(PackCall, step),
                  FIELD(PackCall, threads)});
    return layout.c_str();
}

}  // namespace layerskip
