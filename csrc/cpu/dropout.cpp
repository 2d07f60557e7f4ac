// The operator that draws a mask of dropout.
#include "../torch.h"

namespace vit_fast {

Dropout dropout_of(double p, const std::optional<Tensor>& seed) {
  if (!seed) return {};
  const float kept = static_cast<float>(1.0 - p);
  return {*static_cast<const int64_t*>(seed->const_data_ptr()), static_cast<float>(p), 1.0f / kept, true};
}

namespace {

// bool [count]: which elements are kept. seed: int64, one element.
Tensor keep_mask(Tensor seed, int64_t count, double p) {
  Tensor keep = empty(seed, {count}, ScalarType::Bool);
  KeepMask call{dropout_of(p, seed), count, static_cast<uint8_t*>(keep.mutable_data_ptr()), thread_pool()};
  kernels().keep_mask(call);
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) { m.impl("keep_mask", TORCH_BOX(&keep_mask)); }

}  // namespace vit_fast
