// The kernels of one instruction-set level, VF_LEVEL, as a table. This file is compiled once for each level.
#include "kernels.h"

#include "attention.h"
#include "attention_bwd.h"
#include "dropout.h"
#include "layer_norm.h"
#include "layer_norm_bwd.h"
#include "linear.h"
#include "patch_embed.h"
#include "prepared_blocks.h"

namespace {

using vit_fast::Kernels;

int64_t prepared_blocks_workspace(const PreparedBlocks& s) {
  return with_type(s.type, [&]<Type TYPE>() { return Stack<TYPE>(images_of(s, 0, images_at_a_time<TYPE>(s))).bytes; });
}

void prepared_blocks(const PreparedBlocks& s) {
  with_type(s.type, [&]<Type TYPE>() {
    const int64_t groups = ceil_div(s.batch, images_at_a_time<TYPE>(s));
    for (int64_t i = 0; i < groups; i++)
      Stack<TYPE>(images_of(s, i * s.batch / groups, (i + 1) * s.batch / groups)).run();
  });
}

int64_t attention_workspace(const Attention& a) {
#if defined(__AVX512BF16__)
  if (a.type == Type::bfloat16) return a.pool.slots * attention_bytes<BFloat16>(a);
#endif
  return a.pool.slots * attention_bytes<Float>(a);
}

void attention(const Attention& a) {
#if defined(__AVX512BF16__)
  if (a.type == Type::bfloat16) return attention_with<BFloat16>(a);
#endif
  attention_with<Float>(a);
}

#define VF_STRING_(x) #x
#define VF_STRING(x) VF_STRING_(x)
#define VF_TABLE_(level) kernels_##level
#define VF_TABLE(level) VF_TABLE_(level)

}  // namespace

namespace vit_fast {

extern const Kernels VF_TABLE(VF_LEVEL);
const Kernels VF_TABLE(VF_LEVEL) = {
    VF_STRING(VF_LEVEL),
    prepared_blocks_workspace,
    prepared_blocks,
    keep_mask,
    attention_workspace,
    attention,
    layer_norm,
    attention_bwd_workspace,
    attention_bwd,
    layer_norm_bwd_workspace,
    layer_norm_bwd,
    linear_workspace,
    linear_layer,
    patch_embed_workspace,
    patch_embed,
};

}  // namespace vit_fast
