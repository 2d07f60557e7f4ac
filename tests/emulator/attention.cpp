// The entry of the attention kernels for tests.
#include "attention.cu"

// strides: of image and row of q, k and v.
extern "C" int emulated_attention(void* out, void* lse, const void* q, const void* k, const void* v, int64_t batch,
                                  int64_t num_heads, int64_t num_queries, int64_t num_keys, int64_t head_size,
                                  const int64_t* strides, int64_t type, double scale) {
    vf::AttentionParams p = {};
    p.out = out, p.lse = static_cast<float*>(lse), p.q = q, p.k = k, p.v = v;
    p.q_image = strides[0], p.q_row = strides[1], p.k_image = strides[2], p.k_row = strides[3];
    p.v_image = strides[4], p.v_row = strides[5];
    p.num_heads = static_cast<int>(num_heads), p.num_queries = static_cast<int>(num_queries);
    p.num_keys = static_cast<int>(num_keys), p.head_size = static_cast<int>(head_size);
    p.negative = scale < 0, p.scale_log2 = vf::attention_scale(scale);
    return vf::attention(p, batch, static_cast<int>(type), nullptr);
}
