// The operator on LayerNorm over the last axis.
#include "../torch.h"

namespace vit_fast {
namespace {

// x [rows, C] with a contiguous last axis; weight and bias float32 [C]. (out [rows, C] of a dtype: 0 that of x, 1
// float32, 2 float16, 3 bfloat16; mean and rstd [rows] float32, empty unless asked for).
std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              double eps, bool with_stats) {
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
  call.eps = static_cast<float>(eps);
  call.pool = thread_pool();
  kernels().layer_norm(call);
  return {out, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) { m.impl("layer_norm", TORCH_BOX(&layer_norm)); }

}  // namespace vit_fast
