// The operators on packed weights: a stack of blocks, and one linear layer.
#include "../torch.h"

namespace vit_fast {
namespace {

PackedLinear packed_linear(const Tensor* tensors, bool quantised) {
  const Tensor& weight = tensors[0];
  return {
      weight.const_data_ptr(),
      quantised ? static_cast<const float*>(tensors[1].const_data_ptr()) : nullptr,
      quantised ? static_cast<const float*>(tensors[2].const_data_ptr()) : nullptr,
      quantised ? static_cast<const int32_t*>(tensors[3].const_data_ptr()) : nullptr,
      static_cast<const float*>(tensors[quantised ? 4 : 1].const_data_ptr()),
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
  for (int i = 1; i < (quantised ? 5 : 2); i++)
    fits = fits && tensors[i].numel() == (quantised && i == 1 ? linear.groups * group : linear.panels * 32) &&
           tensors[i].element_size() == 4 && tensors[i].is_contiguous();
  STD_TORCH_CHECK(fits, "a packed weight does not have the sizes of ", inputs, " inputs and ", outputs, " outputs");
}

const float* floats(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

HeadNorm head_norm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  return {floats(weight), floats(bias), static_cast<float>(eps), eps >= 0};
}

// x [B, N, C] → [B, N, C] in its dtype. weights: of each block qkv, proj, fc1, fc2, each (weight, bias), or (weight,
// gain, scale, sums, bias) where the weights are int8.
// norm: "layer" or "rms". out_eps, hidden_eps, q_eps, k_eps: of norms that there need not be, negative without one.
// Vectors and tables are float32; cos and sin [B, H, N', D], bias [B, H, N, N], broadcast by strides of 0, rows dense.
Tensor prepared_blocks(Tensor x, std::vector<Tensor> weights, int64_t num_heads, double scale, std::string activation,
                       double eps1, double eps2, std::string norm, double out_eps, double hidden_eps,
                       int64_t hidden_features, std::optional<Tensor> q_weight, std::optional<Tensor> q_bias,
                       double q_eps, std::optional<Tensor> k_weight, std::optional<Tensor> k_bias, double k_eps,
                       std::optional<Tensor> cos, std::optional<Tensor> sin, std::string rope_layout,
                       int64_t num_prefix, std::optional<Tensor> bias) {
  const Type type = type_of(weights.at(0));
  const bool quantised = type == Type::int8;
  const size_t size = quantised ? 5 : 2;
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
                      act, type, norm == "rms", static_cast<float>(out_eps), static_cast<float>(hidden_eps),
                      hidden_features, head_norm(q_weight, q_bias, q_eps), head_norm(k_weight, k_bias, k_eps),
                      {floats(cos), floats(sin), {}, num_prefix, rope_layout == "interleaved"},
                      {floats(bias), {}}, thread_pool(), nullptr};
  STD_TORCH_CHECK(hidden_features <= hidden, "the norm before fc2 sees more features than there are");
  for (int axis = 0; axis < 3; axis++) {
    if (cos) call.rope.stride[axis] = cos->stride(axis);
    if (bias) call.bias.stride[axis] = bias->stride(axis);
  }
  const Workspace workspace(x, kernels().prepared_blocks_workspace(call));
  call.workspace = workspace.data();
  kernels().prepared_blocks(call);
  if (x.scalar_type() == ScalarType::Float) return wide;
  Tensor out = empty(x, {batch, tokens, width}, x.scalar_type());
  torch::stable::copy_(out, wide);
  return out;
}

// act(LN(x) wᵀ + b), without LN where eps is negative and no gate, or residual + gamma·(x wᵀ + b). x [rows, C] with
// dense rows; residual [rows, features] contiguous in the dtype of x, as is what is returned.
Tensor packed_linear_layer(Tensor x, std::vector<Tensor> weight, int64_t features, std::optional<Tensor> ln_weight,
                           std::optional<Tensor> ln_bias, double eps, bool rms, std::string activation,
                           std::optional<Tensor> gamma, std::optional<Tensor> residual) {
  const Type type = type_of(weight.at(0));
  const bool quantised = type == Type::int8;
  STD_TORCH_CHECK(weight.size() == (quantised ? 5u : 2u), "the tensors are not those of a packed weight");
  const PackedLinear packed = packed_linear(weight.data(), quantised);
  Linear call{};
  call.activation = activation_of(activation);
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(!is_gated(call.activation), "a packed linear layer has no gated activation");
  check(packed, weight.data(), type, quantised, weight[0].size(3), width, features);
  Tensor out = empty(x, {rows, features}, x.scalar_type());
  call.x = x.const_data_ptr();
  call.type = call.out_type = type_of(x);
  call.rows = rows, call.stride = x.stride(0);
  call.normalise = eps >= 0, call.rms = rms;
  call.ln_weight = floats(ln_weight), call.ln_bias = floats(ln_bias);
  call.eps = static_cast<float>(eps);
  call.weight = {nullptr, nullptr, type, features, width, 0};
  call.gamma = floats(gamma);
  call.residual = residual ? residual->const_data_ptr() : nullptr;
  call.out = out.mutable_data_ptr();
  call.packed = &packed;
  call.pool = thread_pool();
  const Workspace workspace(x, kernels().linear_workspace(call));
  call.workspace = workspace.data();
  kernels().linear(call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) {
  m.impl("prepared_blocks", TORCH_BOX(&prepared_blocks));
  m.impl("packed_linear", TORCH_BOX(&packed_linear_layer));
}

}  // namespace vit_fast
