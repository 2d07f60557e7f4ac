// The operators on linear layers: LayerNorm, product and activation; product, LayerScale and residual.
#include "../torch.h"

namespace vit_fast {
namespace {

const float* floats(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

Weight weight_of(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {weight.const_data_ptr(), floats(bias), type_of(weight), weight.size(0), weight.size(1), weight.stride(0)};
}

void run(Linear& call, const Tensor& x) {
  call.pool = thread_pool();
  const Workspace workspace(x, kernels().linear_workspace(call));
  call.workspace = workspace.data();
  kernels().linear(call);
}

// x [rows, C], weight [F, C], both with a contiguous last axis; vectors float32. (act(LN(x) wᵀ + b) [rows, F] in the
// weight's dtype; mean and rstd [rows] float32, and what the activation takes, [rows, F], empty unless asked for).
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(Tensor x, std::optional<Tensor> ln_weight,
                                                             std::optional<Tensor> ln_bias, double eps, Tensor weight,
                                                             std::optional<Tensor> bias, std::string activation,
                                                             bool rms, bool with_stats, bool with_z) {
  Linear call{};
  const int64_t rows = x.size(0), stats = with_stats ? rows : 0;
  call.activation = activation_of(activation);
  const int64_t features = is_gated(call.activation) ? weight.size(0) / 2 : weight.size(0);
  Tensor out = empty(x, {rows, features}, weight.scalar_type());
  Tensor mean = empty(x, {stats}, ScalarType::Float), rstd = empty(x, {stats}, ScalarType::Float);
  call.x = x.const_data_ptr();
  call.type = type_of(x), call.out_type = type_of(weight);
  call.rows = rows, call.stride = x.stride(0);
  call.normalise = true, call.rms = rms;
  call.ln_weight = floats(ln_weight), call.ln_bias = floats(ln_bias);
  call.eps = static_cast<float>(eps);
  call.mean = with_stats ? static_cast<float*>(mean.mutable_data_ptr()) : nullptr;
  call.rstd = with_stats ? static_cast<float*>(rstd.mutable_data_ptr()) : nullptr;
  call.weight = weight_of(weight, bias);
  Tensor z = empty(x, {with_z ? rows : 0, weight.size(0)}, weight.scalar_type());
  call.z = with_z ? z.mutable_data_ptr() : nullptr;
  call.out = out.mutable_data_ptr();
  run(call, x);
  return {out, mean, rstd, z};
}

// residual + row_scale·gamma·dropout(x wᵀ + b). x [rows, K], residual [rows, C] contiguous; row_scale [rows / rows_per_scale].
Tensor linear_residual(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma,
                       Tensor residual, std::optional<Tensor> row_scale, int64_t rows_per_scale,
                       double dropout_p, std::optional<Tensor> seed) {
  Linear call{};
  Tensor out = empty(residual, {x.size(0), weight.size(0)}, residual.scalar_type());
  call.x = x.const_data_ptr();
  call.type = type_of(x), call.out_type = type_of(residual);
  call.rows = x.size(0), call.stride = x.stride(0);
  call.weight = weight_of(weight, bias);
  call.gamma = floats(gamma), call.row_scale = floats(row_scale);
  call.rows_per_scale = rows_per_scale;
  call.residual = residual.const_data_ptr();
  call.dropout = dropout_of(dropout_p, seed);
  call.out = out.mutable_data_ptr();
  run(call, x);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) {
  m.impl("layer_norm_linear", TORCH_BOX(&layer_norm_linear));
  m.impl("linear_residual", TORCH_BOX(&linear_residual));
}

}  // namespace vit_fast
