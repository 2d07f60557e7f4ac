// The operator on LayerNorm over the last axis.
#include "../torch.h"

namespace vit_fast {
namespace {

// x [rows, C] with a contiguous last axis; weight and bias float32 [C]. (out [rows, C] in the dtype of x; mean and rstd
// [rows] float32, empty unless asked for).
std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              double eps, bool rms, bool with_stats) {
  const int64_t rows = x.size(0), width = x.size(1), stats = with_stats ? rows : 0;
  Tensor out = empty(x, {rows, width}, x.scalar_type());
  Tensor mean = empty(x, {stats}, ScalarType::Float), rstd = empty(x, {stats}, ScalarType::Float);
  LayerNorm call{};
  call.x = x.const_data_ptr();
  call.weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  call.out = out.mutable_data_ptr();
  call.mean = with_stats ? static_cast<float*>(mean.mutable_data_ptr()) : nullptr;
  call.rstd = with_stats ? static_cast<float*>(rstd.mutable_data_ptr()) : nullptr;
  call.type = call.out_type = type_of(x);
  call.rows = rows, call.width = width, call.stride = x.stride(0);
  call.eps = static_cast<float>(eps), call.rms = rms;
  call.pool = thread_pool();
  kernels().layer_norm(call);
  return {out, mean, rstd};
}

// x and grad [rows, C] of one dtype, each with a contiguous last axis; the rest float32. (dx [rows, C] in the dtype of
// x, dweight and dbias [C] float32).
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean,
                                                  Tensor rstd, bool rms) {
  LayerNormBackward call{};
  call.rows = x.size(0), call.width = x.size(1);
  Tensor dx = empty(x, {call.rows, call.width}, x.scalar_type());
  Tensor dweight = empty(x, {call.width}, ScalarType::Float), dbias = empty(x, {call.width}, ScalarType::Float);
  call.x = x.const_data_ptr(), call.grad = grad.const_data_ptr();
  call.stride = x.stride(0), call.grad_stride = grad.stride(0);
  call.weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
  call.mean = static_cast<const float*>(mean.const_data_ptr());
  call.rstd = static_cast<const float*>(rstd.const_data_ptr());
  call.dx = dx.mutable_data_ptr();
  call.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  call.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  call.type = type_of(x), call.rms = rms;
  call.pool = thread_pool();
  const Workspace workspace(x, kernels().layer_norm_bwd_workspace(call));
  call.workspace = workspace.data();
  kernels().layer_norm_bwd(call);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace vit_fast
