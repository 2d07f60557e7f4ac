// Registers the operators of the CPU library on PyTorch's stable ABI. Their schemas are defined in Python
// (vit_fast/backends/cpu.py): a namespace that two libraries define crashes the process.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

extern "C" void vf_twice_generic(const float* x, float* out, int64_t size);
#ifdef VF_LEVELS_X86
extern "C" void vf_twice_avx2(const float* x, float* out, int64_t size);
#endif

namespace {

using torch::stable::Tensor;

Tensor twice(const Tensor& x) {
    Tensor out = torch::stable::empty_like(x);
    auto kernel = vf_twice_generic;
#ifdef VF_LEVELS_X86
    if (__builtin_cpu_supports("avx2")) kernel = vf_twice_avx2;
#endif
    kernel(static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()), x.numel());
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) {
    m.impl("twice", TORCH_BOX(&twice));
}
