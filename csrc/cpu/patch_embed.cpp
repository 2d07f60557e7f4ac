// The operator on patch embedding.
#include "../torch.h"

namespace vit_fast {
namespace {

// images [B, in, H, W] at any strides, weight [C, in, P, P'] contiguous, pos_embed float32 [patches, C], prefix_tokens
// [1 or B, K, C] contiguous in the weight's dtype; bias, mean, std float32. → [B, K + patches, C] in the weight's dtype.
Tensor patch_embed(Tensor images, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> pos_embed,
                   std::optional<Tensor> prefix_tokens, std::vector<int64_t> step, std::optional<Tensor> mean,
                   std::optional<Tensor> std) {
  auto floats = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  PatchEmbed call{};
  call.images = images.const_data_ptr();
  call.type = images.scalar_type() == ScalarType::Byte ? Type::uint8 : type_of(images);
  call.out_type = type_of(weight);
  call.batch = images.size(0), call.channels = images.size(1);
  for (int i = 0; i < 4; i++) call.stride[i] = images.stride(i);
  for (int i = 0; i < 2; i++) {
    call.patch[i] = weight.size(2 + i), call.step[i] = step[i];
    call.grid[i] = (images.size(2 + i) - call.patch[i]) / step[i] + 1;
  }
  call.mean = floats(mean), call.std = floats(std);
  const int64_t features = weight.size(0), width = call.channels * call.patch[0] * call.patch[1];
  call.weight = {weight.const_data_ptr(), floats(bias), call.out_type, features, width, width};
  call.pos_embed = floats(pos_embed);
  if (prefix_tokens) {
    call.prefix_tokens = prefix_tokens->const_data_ptr();
    call.prefix = prefix_tokens->size(1);
    call.prefix_stride = prefix_tokens->size(0) == 1 ? 0 : call.prefix * features;
  }
  Tensor out = empty(images, {call.batch, call.prefix + call.grid[0] * call.grid[1], features}, weight.scalar_type());
  call.out = out.mutable_data_ptr();
  call.pool = thread_pool();
  const Workspace workspace(images, kernels().patch_embed_workspace(call));
  call.workspace = workspace.data();
  kernels().patch_embed(call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) { m.impl("patch_embed", TORCH_BOX(&patch_embed)); }

}  // namespace vit_fast
