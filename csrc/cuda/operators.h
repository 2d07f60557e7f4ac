// What the torch operators of this folder share: device guard, stream, types and rows of tensors, through the stable ABI.
// Arguments are checked in Python (kernels/arguments.py, backends/cuda.py), with the words that a user reads; a check here
// fails only where that one is wrong. Schemas are defined in backends/cuda.py.
// Under the emulator the operators are those of CPU tensors, so that tests run the whole path.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "rows.h"

namespace vf {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int type_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case torch::headeronly::ScalarType::Float: return FLOAT32;
        case torch::headeronly::ScalarType::Half: return FLOAT16;
        case torch::headeronly::ScalarType::BFloat16: return BFLOAT16;
        case torch::headeronly::ScalarType::Byte: return UINT8;
        default: STD_TORCH_CHECK(false, "vit_fast_cuda: a dtype that the kernels do not have"); return -1;
    }
}
inline int type_of(const MaybeTensor& x) { return x ? type_of(*x) : FLOAT32; }

template <class T = void> T* data(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }
template <class T = void> T* data(const MaybeTensor& x) { return x ? static_cast<T*>(x->data_ptr()) : nullptr; }

inline Rows rows_of(const Tensor& x) {
    Rows rows;
    STD_TORCH_CHECK(x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1, "vit_fast_cuda: the last axis is not contiguous");
    STD_TORCH_CHECK(find_rows(rows, x.sizes().data(), x.strides().data(), x.dim()), "vit_fast_cuda: rows need three strides");
    return rows;
}

// Makes the device of a tensor current; the stream is its current one.
#ifdef VF_EMULATED
#define VF_DISPATCH_KEY CPU
struct OnDevice {
    Stream stream = nullptr;
    explicit OnDevice(const Tensor&) {}
};
#else
#define VF_DISPATCH_KEY CUDA
struct OnDevice {
    torch::stable::accelerator::DeviceGuard guard;
    Stream stream;
    explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {
        void* current = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current) == 0, "vit_fast_cuda: no stream");
        stream = static_cast<Stream>(current);
    }
};
#endif

}  // namespace vf
