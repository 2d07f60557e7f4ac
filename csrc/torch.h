// PyTorch's stable ABI as the operators use it: dtypes, workspaces, the thread pool.
//
// Built against the ABI of torch 2.11, a library loads in every later torch. Arguments have been checked in Python,
// which owns the words of every error; what is checked here would be a fault of our own.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace vit_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Char:
      return Type::int8;
    default:
      STD_TORCH_CHECK(false, "dtype of a tensor is not float32, float16, bfloat16 or int8");
  }
}

inline Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "gelu",   "gelu_tanh", "quick_gelu", "relu",
                         "silu", "swiglu", "geglu",     "geglu_tanh"};
  for (int i = 0; i < 9; i++)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

// PyTorch's intra-op threads, as many as torch.set_num_threads says.
inline Pool thread_pool() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {threads, [](void (*body)(void*, int64_t), void* context, int64_t slots) {
            struct Call {
              void (*body)(void*, int64_t);
              void* context;
            } call{body, context};
            auto range = [](int64_t begin, int64_t end, void* untyped) {
              const auto& call = *static_cast<Call*>(untyped);
              for (int64_t slot = begin; slot < end; slot++) call.body(call.context, slot);
            };
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, slots, 1, range, &call));
          }};
}

// Dropout with a seed, an int64 tensor of one element; none without.
Dropout dropout_of(double p, const std::optional<Tensor>& seed);

// An uninitialised tensor like another in device, of its own shape and dtype.
inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// Scratch memory aligned to a cache line, freed with the object.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) : tensor_(empty(like, {bytes + 64}, ScalarType::Byte)) {}
  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  Tensor tensor_;
};

}  // namespace vit_fast
