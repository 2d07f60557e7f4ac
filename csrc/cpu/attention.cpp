// The operator on attention: packed [B, N, 3C], or q, k and v of their own.
#include "../torch.h"

namespace vit_fast {
namespace {

// (out [B, Nq, C], lse [B, H, Nq] float32, empty unless asked for). The last axis of every tensor is contiguous.
std::tuple<Tensor, Tensor> attention(Tensor qkv, std::optional<Tensor> k, std::optional<Tensor> v, int64_t num_heads,
                                     double scale, bool with_lse, double dropout_p, std::optional<Tensor> seed) {
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
  call.dropout = dropout_of(dropout_p, seed);
  call.pool = thread_pool();
  const Workspace workspace(qkv, kernels().attention_workspace(call));
  call.workspace = workspace.data();
  kernels().attention(call);
  return {out, lse};
}

void take_strides(int64_t* to, const Tensor& t) { to[0] = t.stride(0), to[1] = t.stride(1); }

// (dq, dk, dv) of the dtype of q; of packed input they are the thirds of one tensor [B, N, 3C], which comes alone. The
// last axis of every tensor is contiguous.
std::vector<Tensor> attention_bwd(Tensor grad, Tensor qkv, int64_t num_heads, double scale, std::optional<Tensor> k,
                                  std::optional<Tensor> v, Tensor out, Tensor lse, double dropout_p,
                                  std::optional<Tensor> seed) {
  AttentionBackward call{};
  const int64_t width = k ? qkv.size(2) : qkv.size(2) / 3, bytes = static_cast<int64_t>(qkv.element_size());
  std::vector<Tensor> grads{empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2)}, qkv.scalar_type())};
  if (k)
    for (const Tensor& t : {*k, *v}) grads.push_back(empty(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type()));
  const void** inputs[] = {&call.q, &call.k, &call.v};
  void** outputs[] = {&call.dq, &call.dk, &call.dv};
  int64_t *strides[] = {call.q_stride, call.k_stride, call.v_stride};
  int64_t *its_strides[] = {call.dq_stride, call.dk_stride, call.dv_stride};
  const Tensor separate[] = {qkv, k ? *k : qkv, v ? *v : qkv};
  for (int i = 0; i < 3; i++) {
    const int64_t offset = k ? 0 : i * width * bytes;
    const Tensor& gradient = grads[k ? i : 0];
    *inputs[i] = static_cast<const char*>(separate[i].const_data_ptr()) + offset;
    *outputs[i] = static_cast<char*>(gradient.mutable_data_ptr()) + offset;
    take_strides(strides[i], separate[i]);
    take_strides(its_strides[i], gradient);
  }
  call.out = out.const_data_ptr(), call.grad = grad.const_data_ptr();
  take_strides(call.out_stride, out);
  take_strides(call.grad_stride, grad);
  call.lse = static_cast<const float*>(lse.const_data_ptr());
  call.type = type_of(qkv);
  call.batch = qkv.size(0), call.num_heads = num_heads, call.head_size = width / num_heads;
  call.queries = qkv.size(1), call.keys = separate[1].size(1);
  call.scale = static_cast<float>(scale);
  call.dropout = dropout_of(dropout_p, seed);
  call.pool = thread_pool();
  const Workspace workspace(qkv, kernels().attention_bwd_workspace(call));
  call.workspace = workspace.data();
  kernels().attention_bwd(call);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace vit_fast
