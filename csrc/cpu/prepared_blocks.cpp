// The operator on a stack of packed blocks.
#include "../torch.h"

namespace vit_fast {
namespace {

PackedLinear packed_linear(const Tensor* tensors, bool quantised) {
  const Tensor& weight = tensors[0];
  return {
      weight.const_data_ptr(),
      quantised ? static_cast<const float*>(tensors[1].const_data_ptr()) : nullptr,
      quantised ? static_cast<const int32_t*>(tensors[2].const_data_ptr()) : nullptr,
      static_cast<const float*>(tensors[quantised ? 3 : 1].const_data_ptr()),
      weight.size(0),
      weight.size(1),
  };
}

// x [B, N, C] → [B, N, C] in its dtype. weights: of each block qkv, proj, fc1, fc2, each (weight, bias), or (weight,
// scale, sums, bias) where the weights are int8.
Tensor prepared_blocks(Tensor x, std::vector<Tensor> weights, int64_t num_heads, double scale, std::string activation,
                       double eps1, double eps2) {
  const Type type = type_of(weights.at(0));
  const bool quantised = type == Type::int8;
  const size_t size = quantised ? 4 : 2;
  std::vector<PackedBlock> blocks;
  for (size_t i = 0; i + 4 * size <= weights.size(); i += 4 * size) {
    const Tensor* first = &weights[i];
    blocks.push_back({packed_linear(first, quantised), packed_linear(first + size, quantised),
                      packed_linear(first + 2 * size, quantised), packed_linear(first + 3 * size, quantised)});
  }
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), rows = batch * tokens;
  const int64_t hidden = blocks[0].fc2.groups * weights[3 * size].size(3);
  Tensor wide = empty(x, {batch, tokens, width}, ScalarType::Float);
  torch::stable::copy_(wide, x);
  if (rows == 0) return x.scalar_type() == ScalarType::Float ? wide : torch::stable::new_empty(x, x.sizes());
  PreparedBlocks call{static_cast<float*>(wide.mutable_data_ptr()), blocks.data(),
                      static_cast<int64_t>(blocks.size()), batch, tokens, width, hidden, num_heads,
                      static_cast<float>(scale), static_cast<float>(eps1), static_cast<float>(eps2),
                      activation_of(activation), type, thread_pool(), nullptr};
  const Workspace workspace(x, kernels().prepared_blocks_workspace(call));
  call.workspace = workspace.data();
  kernels().prepared_blocks(call);
  if (x.scalar_type() == ScalarType::Float) return wide;
  Tensor out = empty(x, {batch, tokens, width}, x.scalar_type());
  torch::stable::copy_(out, wide);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) { m.impl("prepared_blocks", TORCH_BOX(&prepared_blocks)); }

}  // namespace vit_fast
