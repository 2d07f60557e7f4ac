// The operator on attention: packed [B, N, 3C], or q, k and v of their own.
#include "../torch.h"

namespace vit_fast {
namespace {

// (out [B, Nq, C], lse [B, H, Nq] float32, empty unless asked for). The last axis of every tensor is contiguous.
std::tuple<Tensor, Tensor> attention(Tensor qkv, std::optional<Tensor> k, std::optional<Tensor> v, int64_t num_heads,
                                     double scale, bool with_lse) {
  const int64_t batch = qkv.size(0), queries = qkv.size(1), width = k ? qkv.size(2) : qkv.size(2) / 3;
  const int64_t keys = k ? k->size(1) : queries, bytes = static_cast<int64_t>(qkv.element_size());
  const char* packed = static_cast<const char*>(qkv.const_data_ptr());
  Tensor out = empty(qkv, {batch, queries, width}, qkv.scalar_type());
  Tensor lse = with_lse ? empty(qkv, {batch, num_heads, queries}, ScalarType::Float)
                        : empty(qkv, {0}, ScalarType::Float);
  Attention call{};
  call.q = packed;
  call.k = k ? k->const_data_ptr() : packed + width * bytes;
  call.v = v ? v->const_data_ptr() : packed + 2 * width * bytes;
  call.out = out.mutable_data_ptr();
  call.lse = with_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  call.type = type_of(qkv);
  call.batch = batch, call.num_heads = num_heads, call.queries = queries, call.keys = keys;
  call.head_size = width / num_heads;
  for (int i = 0; i < 2; i++) {
    call.q_stride[i] = qkv.stride(i);
    call.k_stride[i] = k ? k->stride(i) : qkv.stride(i);
    call.v_stride[i] = v ? v->stride(i) : qkv.stride(i);
  }
  call.scale = static_cast<float>(scale);
  call.pool = thread_pool();
  const Workspace workspace(qkv, kernels().attention_workspace(call));
  call.workspace = workspace.data();
  kernels().attention(call);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace vit_fast
