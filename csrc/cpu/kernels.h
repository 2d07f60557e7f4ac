// What a kernel takes, and the table of kernels of an instruction-set level.
//
// Plain structs and function pointers: the operators (on PyTorch's headers, compiled once) fill the arguments and call
// the kernels (on no headers, compiled once for each level) of the highest level that the processor has.
// Arguments have been checked. Sizes are in elements; B batch, N tokens, C width, H heads, D head size.
#pragma once

#include <cstdint>

namespace vit_fast {

// Runs body(context, slot) on every thread of a pool. Slots are 0 … slots − 1, each on one thread at a time.
struct Pool {
  int64_t slots;
  void (*run)(void (*body)(void* context, int64_t slot), void* context, int64_t slots);
};

enum class Type : int32_t { float32, float16, bfloat16, int8, uint8 };

// The last three are gated: act(first half) · second half of the features, by silu, gelu and gelu_tanh.
enum class Activation : int32_t { none, gelu, gelu_tanh, quick_gelu, relu, silu, swiglu, geglu, geglu_tanh };

constexpr bool is_gated(Activation activation) { return activation >= Activation::swiglu; }

// The activation of the gate of a gated one; another stays what it is.
constexpr Activation of_gate(Activation activation) {
  return activation == Activation::swiglu       ? Activation::silu
         : activation == Activation::geglu      ? Activation::gelu
         : activation == Activation::geglu_tanh ? Activation::gelu_tanh
                                                : activation;
}

// A weight as kernels/packing.py packs it. gain, scale and sums: of int8 weights alone, else null.
struct PackedLinear {
  const void* weight;   // [panels, groups, NR, 32 bits]
  const float* gain;    // [groups·4]: of the inputs, before they are quantised
  const float* scale;   // [panels·NR]
  const int32_t* sums;  // [panels·NR]: of the quantised rows
  const float* bias;    // [panels·NR]
  int64_t panels, groups;
};

struct PackedBlock {
  PackedLinear qkv, proj, fc1, fc2;
};

// A norm of the heads of q or k: weight and bias [D] or null.
struct HeadNorm {
  const float *weight, *bias;
  float eps;
  bool given;
};

// Rotary embedding: cos and sin at strides of batch, head and token, null without one; the first `prefix` tokens stay.
struct Rope {
  const float *cos, *sin;
  int64_t stride[3], prefix;
  bool interleaved;  // pairs (2i, 2i + 1), else (c, c + D/2)
};

// What is added to the scores, at strides of batch, head and query; data is null without one.
struct ScoreBias {
  const float* data;
  int64_t stride[3];
};

// x [B·N, C] float32 through a stack of pre-norm blocks, in place.
struct PreparedBlocks {
  float* x;
  const PackedBlock* blocks;
  int64_t depth, batch, tokens, width, hidden, num_heads;
  float scale, eps1, eps2;
  Activation activation;
  Type type;  // of the weights
  bool rms;   // the kind of all norms
  float out_eps, hidden_eps;  // of the norms before proj and fc2; negative without one
  int64_t hidden_features;    // that the norm before fc2 sees
  HeadNorm q_norm, k_norm;
  Rope rope;
  ScoreBias bias;
  Pool pool;
  void* workspace;  // prepared_blocks_workspace bytes, aligned to 64
};

// Dropout of a tensor whose elements are numbered by their linear index: the mask of `seed`, the factor of what is kept.
struct Dropout {
  int64_t seed;
  float p, scale;
  bool given;
};

// The mask alone: keep[i] is 1 or 0.
struct KeepMask {
  Dropout dropout;
  int64_t count;
  uint8_t* keep;
  Pool pool;
};

// softmax(scale · q kᵀ) v of every head; strides of batch, token and head. lse: natural log, [B, H, N], or null.
struct Attention {
  const void *q, *k, *v;
  void* out;  // [B, N, H·D]
  float* lse;
  Type type;
  int64_t batch, num_heads, queries, keys, head_size;
  int64_t q_stride[2], k_stride[2], v_stride[2];  // batch, token; heads are D apart
  float scale;
  Pool pool;
  void* workspace;  // attention_workspace bytes, aligned to 64
  ScoreBias bias = {};
  Dropout dropout = {};  // of the probabilities [B, H, Nq, Nk]
};

// Rows [rows, width] at a stride; weight and bias float32 [width] or null; mean and rstd [rows] or null. rms: RMSNorm.
struct LayerNorm {
  const void* x;
  const float *weight, *bias;
  void* out;
  float *mean, *rstd;
  Type type, out_type;
  int64_t rows, width, stride;
  float eps;
  bool rms;
  Pool pool;
};

// Gradients of Attention: dq, dk, dv of the dtype of q; out and grad [B, N, H·D]; strides of batch and token.
struct AttentionBackward {
  const void *q, *k, *v, *out, *grad;
  const float* lse;
  void *dq, *dk, *dv;
  Type type;
  int64_t batch, num_heads, queries, keys, head_size;
  int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2], grad_stride[2];
  int64_t dq_stride[2], dk_stride[2], dv_stride[2];
  float scale;
  Pool pool;
  void* workspace;  // attention_bwd_workspace bytes, aligned to 64
  Dropout dropout = {};
};

// Gradients of LayerNorm: dx [rows, width] of the dtype of x; dweight and dbias float32 [width].
struct LayerNormBackward {
  const void *x, *grad;
  const float *weight, *mean, *rstd;
  void* dx;
  float *dweight, *dbias;
  Type type;
  int64_t rows, width, stride, grad_stride;
  bool rms;
  Pool pool;
  void* workspace;  // layer_norm_bwd_workspace bytes, aligned to 64
};

// A weight as nn.Linear holds it: [features, width] at a stride of rows; bias float32 [features] or null.
struct Weight {
  const void* data;
  const float* bias;
  Type type;
  int64_t features, width, stride;
};

// act(z) of z = LN(x) wᵀ + b rounded to the dtype of out, or residual + row_scale·gamma·dropout(x wᵀ + b) where there is
// a residual. Rows of x at a stride; residual and out [rows, features] (half the features of a gated activation). All
// vectors float32, or null.
struct Linear {
  const void* x;
  Type type, out_type;  // of x; of out and the residual
  int64_t rows, stride;
  bool normalise, rms;
  const float *ln_weight, *ln_bias;
  float eps;
  float *mean, *rstd;
  Weight weight;
  Activation activation;
  const float *gamma, *row_scale;
  int64_t rows_per_scale;
  const void* residual;
  void* z;  // [rows, all features] of out_type: what the activation takes, or null
  void* out;
  Pool pool;
  void* workspace;  // linear_workspace bytes, aligned to 64
  const PackedLinear* packed = nullptr;  // the weight, packed already: then weight has its sizes and its type alone
  Dropout dropout = {};                  // of the branch [rows, features], where there is a residual
};

// images [B, channels, H, W] at any strides; weight [features, channels·P·P']; out [B, prefix + patches, features].
struct PatchEmbed {
  const void* images;
  Type type, out_type;
  int64_t batch, channels, stride[4], patch[2], step[2], grid[2];
  const float *mean, *std;      // [channels] or null
  Weight weight;
  const float* pos_embed;       // [patches, features] or null
  const void* prefix_tokens;    // [1 or B, prefix, features] of out_type; prefix_stride 0: the same for every image
  int64_t prefix, prefix_stride;
  void* out;
  Pool pool;
  void* workspace;  // patch_embed_workspace bytes, aligned to 64
};

struct Kernels {
  const char* level;
  int64_t (*prepared_blocks_workspace)(const PreparedBlocks&);
  void (*prepared_blocks)(const PreparedBlocks&);
  void (*keep_mask)(const KeepMask&);
  int64_t (*attention_workspace)(const Attention&);
  void (*attention)(const Attention&);
  void (*layer_norm)(const LayerNorm&);
  int64_t (*attention_bwd_workspace)(const AttentionBackward&);
  void (*attention_bwd)(const AttentionBackward&);
  int64_t (*layer_norm_bwd_workspace)(const LayerNormBackward&);
  void (*layer_norm_bwd)(const LayerNormBackward&);
  int64_t (*linear_workspace)(const Linear&);
  void (*linear)(const Linear&);
  int64_t (*patch_embed_workspace)(const PatchEmbed&);
  void (*patch_embed)(const PatchEmbed&);
};

// The table of the highest level that the processor has, or of the one that `use_level` named.
const Kernels& kernels();

}  // namespace vit_fast
