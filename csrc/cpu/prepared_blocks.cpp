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

// A packed weight whose sizes would lead out of an array: a fault of whoever called the operator with other tensors than
// kernels/packing.py makes.
void check(const PackedLinear& linear, const Tensor* tensors, Type type, bool quantised, int64_t group, int64_t inputs,
           int64_t outputs) {
  const Tensor& weight = tensors[0];
  bool fits = weight.dim() == 4 && weight.size(2) == 32 && weight.size(3) == group && type_of(weight) == type &&
              weight.is_contiguous() && linear.groups * group >= inputs && linear.groups * group < inputs + group &&
              linear.panels * 32 >= outputs && linear.panels * 32 < outputs + 32;
  for (int i = 1; i < (quantised ? 4 : 2); i++)
    fits = fits && tensors[i].numel() == linear.panels * 32 && tensors[i].element_size() == 4 &&
           tensors[i].is_contiguous();
  STD_TORCH_CHECK(fits, "a packed weight does not have the sizes of ", inputs, " inputs and ", outputs, " outputs");
}

// x [B, N, C] → [B, N, C] in its dtype. weights: of each block qkv, proj, fc1, fc2, each (weight, bias), or (weight,
// scale, sums, bias) where the weights are int8.
Tensor prepared_blocks(Tensor x, std::vector<Tensor> weights, int64_t num_heads, double scale, std::string activation,
                       double eps1, double eps2) {
  const Type type = type_of(weights.at(0));
  const bool quantised = type == Type::int8;
  const size_t size = quantised ? 4 : 2;
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), rows = batch * tokens;
  STD_TORCH_CHECK(weights.size() % (4 * size) == 0, "the tensors are no whole number of blocks");
  STD_TORCH_CHECK(num_heads > 0 && width % num_heads == 0, "the width is no multiple of the heads");
  const Activation act = activation_of(activation);
  const int64_t group = weights[0].size(3), hidden = weights[3 * size].size(1) * group;
  std::vector<PackedBlock> blocks;
  for (size_t i = 0; i < weights.size(); i += 4 * size) {
    PackedLinear linears[4];
    // fc1 has as many outputs as fc2 has inputs, up to the padding of a group; twice as many where half of them gate.
    const int64_t fc1 = weights[i + 2 * size].size(0) * 32;
    const int64_t outputs[] = {3 * width, width, fc1, width}, inputs[] = {width, width, width, hidden};
    for (int j = 0; j < 4; j++) {
      linears[j] = packed_linear(&weights[i + j * size], quantised);
      check(linears[j], &weights[i + j * size], type, quantised, group, inputs[j], outputs[j]);
    }
    const int64_t units = is_gated(act) ? fc1 / 2 : fc1;
    STD_TORCH_CHECK(units <= hidden + 31 && units >= hidden - group + 1, "fc1 does not have the outputs that fc2 takes");
    blocks.push_back({linears[0], linears[1], linears[2], linears[3]});
  }
  Tensor wide = empty(x, {batch, tokens, width}, ScalarType::Float);
  torch::stable::copy_(wide, x);
  if (rows == 0) return x.scalar_type() == ScalarType::Float ? wide : torch::stable::new_empty(x, x.sizes());
  PreparedBlocks call{static_cast<float*>(wide.mutable_data_ptr()), blocks.data(),
                      static_cast<int64_t>(blocks.size()), batch, tokens, width, hidden, num_heads,
                      static_cast<float>(scale), static_cast<float>(eps1), static_cast<float>(eps2),
                      act, type, thread_pool(), nullptr};
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
