// Attention forward: per head out = softmax(scale · q kᵀ) v, and the natural-log LSE of every row where asked for.
//
// q [B, Nq, C], k and v [B, Nk, C], C = H·D, in float32, bf16 or fp16, D = 16 … 128 in steps of 8: three views of one
// packed projection or three tensors, any strides of images and rows in 16 bytes, heads contiguous. out [B, Nq, C]
// contiguous; lse [B, H, Nq] float32. Scores, softmax and accumulators are float32; the weights are rounded to the dtype of
// v before they meet v. The scale, times log2(e), is applied after the row's largest score is subtracted, as in
// kernels/attention.py. Online softmax: running maximum m_i, denominator l_i, rescaling by alpha.
//
// Two kernels, in both of which a block of four warps works on one head, and a warp on 16 queries:
//   attention_fwd_kernel          16 bits, on tensor cores (on sm_75 fp16 alone, by m16n8k8). K and V lie in shared memory:
//       all of them where they fit (resident: one load and one barrier, then each warp takes tiles of 16 queries by
//       itself), else two stages of 64 keys (32 where that is too much), one filled by cp.async while the other is computed
//       on (streaming: four tiles a block). In both a warp takes 64 keys a step. Scores of a step stay in registers: the
//       layout in which mma.sync leaves them is the one in which it takes the weights.
//   attention_float32_fwd_kernel  float32, by fused multiply-adds, not in tf32, which has 10 bits. Eight lanes share four
//       queries, and each has an eighth of the keys of a step and of the columns of the output. Q lies in shared memory; K
//       and V go through it in steps of 32 keys (16 for heads above 96, so that all fits into the 64 KB of sm_75): V while
//       scores are computed, the next K while weights meet V. Weights pass through shared memory to the lanes that need
//       them. The products of a step are summed before they are added, which keeps the error of many keys small.
// Rows in shared memory are padded by 16 bytes, an odd number of pieces, so that loads meet no bank conflict. Heads are
// padded with zeros to a multiple of 16, keys to a multiple of 16 or of a step.
// Grid: B·H·(blocks a head). A row's bits do not depend on the batch or the grid.
// 4·B·H·Nq·Nk·D FLOP; moves 2·B·(Nq + Nk)·C elements, K and V once for each block of a head.
// Source: online softmax after FlashAttention (Dao et al. 2022, arXiv:2205.14135; 2023, arXiv:2307.08691).
#include "device.h"

namespace vf {

struct AttentionParams {
    void* out;   // [B, Nq, H·D] contiguous
    float* lse;  // [B, H, Nq], or null
    const void *q, *k, *v;  // [B, Nq, H·D], [B, Nk, H·D] twice
    int64_t q_image, q_row, k_image, k_row, v_image, v_row;  // strides in elements
    int num_heads, num_queries, num_keys, head_size;
    int blocks_per_head, tiles_per_block;  // tiles of 16 queries
    int step;                              // keys of a step: 64, or 32 where two stages of 64 do not fit
    bool resident, negative;               // negative: the scale is below zero
    float scale_log2;                      // |scale| · log2(e)
};

constexpr int ATTENTION_WARPS = 4, TILE = 16, STEP = 64;  // queries of a warp, keys of a step at most
constexpr int PAD = 8;                                    // elements of 16 bits after each row of K and V

// Starts copying `rows` rows of one head from row `first` on; zeros outside of [count, head_size].
template <class T, int WIDTH>
__device__ __forceinline__ void copy_rows(T* shared, const T* x, int64_t stride, int first, int rows, int count, int head_size) {
    constexpr int PIECE = 16 / sizeof(T), PIECES = WIDTH / PIECE, ROW = WIDTH + PIECE;
    for (int i = threadIdx.x; i < rows * PIECES; i += 32 * ATTENTION_WARPS) {
        const int row = i / PIECES, column = i % PIECES * PIECE;
        const bool inside = first + row < count && column < head_size;
        cp_async16(shared + row * ROW + column, inside ? x + (first + row) * stride + column : x, inside);
    }
}

// The blocks of a multiprocessor are told, because ptxas would spill to reach more of them (four at WIDTH 64, on sm_89 in
// 16 bits, on sm_90 in float32).
template <class T, int WIDTH>
__global__ void __launch_bounds__(32 * ATTENTION_WARPS, WIDTH <= 96 ? 3 : 2) attention_fwd_kernel(const AttentionParams p) {
    constexpr int ROW = WIDTH + PAD, DEPTH = WIDTH / 16, COLUMNS = WIDTH / 8, KEYS = STEP / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    const int64_t head_of_image = blockIdx.x / p.blocks_per_head;
    const int first_tile = static_cast<int>(blockIdx.x % p.blocks_per_head) * p.tiles_per_block;
    const int64_t image = head_of_image / p.num_heads, head = head_of_image % p.num_heads;
    const T* q = static_cast<const T*>(p.q) + image * p.q_image + head * p.head_size;
    const T* k = static_cast<const T*>(p.k) + image * p.k_image + head * p.head_size;
    const T* v = static_cast<const T*>(p.v) + image * p.v_image + head * p.head_size;
    T* shared = reinterpret_cast<T*>(shared_memory());
    const int padded_keys = ceil_div(p.num_keys, 16) * 16;
    const int stage = (p.resident ? padded_keys : p.step) * ROW;  // elements of K, and of V behind it

    const int loaded = p.resident ? padded_keys : min(p.step, padded_keys);
    copy_rows<T, WIDTH>(shared, k, p.k_row, 0, loaded, p.num_keys, p.head_size);
    copy_rows<T, WIDTH>(shared + stage, v, p.v_row, 0, loaded, p.num_keys, p.head_size);
    cp_async_commit();
    if (p.resident) {
        cp_async_wait<0>();
        __syncthreads();
    }

    for (int begin = first_tile; begin < first_tile + p.tiles_per_block; begin += ATTENTION_WARPS) {
        const int first_query = (begin + warp) * TILE;
        if (p.resident && first_query >= p.num_queries) continue;  // when streaming, all warps meet at the barriers

        // Queries as fragments: rows group and group + 8, columns pair and pair + 8 of each 16.
        uint32_t query[DEPTH][4];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = first_query + group + i % 2 * 8, column = d * 16 + i / 2 * 8 + pair;
                const bool inside = row < p.num_queries && column < p.head_size;
                query[d][i] = inside ? load(reinterpret_cast<const uint32_t*>(q + row * p.q_row + column)) : 0;
            }
        }
        float acc[COLUMNS][4] = {}, l_i[2] = {0.0f, 0.0f}, m_i[2] = {-INFINITY, -INFINITY};

        for (int first = 0; first < p.num_keys; first += p.step) {
            const int end = min(first + p.step, p.num_keys);
            const T* keys = shared + (p.resident ? first * ROW : first / p.step % 2 * 2 * stage);
            const T* values = keys + stage;
            if (!p.resident) {
                cp_async_wait<0>();
                __syncthreads();  // all have loaded this stage and are done with the other
                if (end < p.num_keys) {
                    T* next = shared + (first / p.step + 1) % 2 * 2 * stage;
                    const int rows = min(p.step, padded_keys - end);
                    copy_rows<T, WIDTH>(next, k, p.k_row, end, rows, p.num_keys, p.head_size);
                    copy_rows<T, WIDTH>(next + stage, v, p.v_row, end, rows, p.num_keys, p.head_size);
                    cp_async_commit();
                }
            }

            float s[KEYS][4] = {};
#pragma unroll
            for (int j = 0; j < KEYS; j += 2) {
                if (first + j * 8 >= end) break;
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    uint32_t b[4];
                    ldmatrix_x4(b, keys + (j * 8 + lane / 16 * 8 + lane % 8) * ROW + d * 16 + lane / 8 % 2 * 8);
                    mma<T>(s[j], query[d], b[0], b[1]);
                    mma<T>(s[j + 1], query[d], b[2], b[3]);
                }
            }

            float m_new[2] = {m_i[0], m_i[1]};
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (p.negative) s[j][i] = -s[j][i];
                    if (first + j * 8 + pair + i % 2 >= end) s[j][i] = -INFINITY;
                    m_new[i / 2] = fmaxf(m_new[i / 2], s[j][i]);
                }
            }
            float alpha[2], shift[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {  // four lanes share a row
                m_new[i] = fmaxf(m_new[i], __shfl_xor_sync(FULL_WARP, m_new[i], 1));
                m_new[i] = fmaxf(m_new[i], __shfl_xor_sync(FULL_WARP, m_new[i], 2));
                shift[i] = m_new[i] == -INFINITY ? 0.0f : m_new[i];
                alpha[i] = exp2_approx((m_i[i] - shift[i]) * p.scale_log2);
                m_i[i] = m_new[i];
                l_i[i] *= alpha[i];
            }
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    s[j][i] = exp2_approx((s[j][i] - shift[i / 2]) * p.scale_log2);
                    l_i[i / 2] += s[j][i];
                }
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++) acc[c][i] *= alpha[i / 2];
            }
#pragma unroll
            for (int j = 0; j < KEYS; j += 2) {
                if (first + j * 8 >= end) break;
                const uint32_t weights[4] = {pack<T>(s[j][0], s[j][1]), pack<T>(s[j][2], s[j][3]),
                                             pack<T>(s[j + 1][0], s[j + 1][1]), pack<T>(s[j + 1][2], s[j + 1][3])};
#pragma unroll
                for (int c = 0; c < COLUMNS; c += 2) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, values + (j * 8 + lane / 8 % 2 * 8 + lane % 8) * ROW + c * 8 + lane / 16 * 8);
                    mma<T>(acc[c], weights, b[0], b[1]);
                    mma<T>(acc[c + 1], weights, b[2], b[3]);
                }
            }
        }

#pragma unroll
        for (int i = 0; i < 2; i++) {
            l_i[i] += __shfl_xor_sync(FULL_WARP, l_i[i], 1);
            l_i[i] += __shfl_xor_sync(FULL_WARP, l_i[i], 2);
            const int row = first_query + group + i * 8;
            if (row >= p.num_queries) continue;
            const float inverse = 1.0f / l_i[i];
            T* out = static_cast<T*>(p.out) + ((image * p.num_queries + row) * p.num_heads + head) * p.head_size;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const uint32_t two = pack<T>(acc[c][i * 2] * inverse, acc[c][i * 2 + 1] * inverse);
                if (c * 8 < p.head_size) store(reinterpret_cast<uint32_t*>(out + c * 8 + pair), two);
            }
            if (p.lse && pair == 0) {
                store(p.lse + head_of_image * p.num_queries + row, (m_i[i] * p.scale_log2 + log2f(l_i[i])) * LN2);
            }
        }
    }
}

constexpr int FLOAT_QUERIES = TILE * ATTENTION_WARPS;  // of a block

// Shared memory of the kernel of float32, in floats.
template <int WIDTH> struct FloatAttention {
    static constexpr int STEP = WIDTH <= 96 ? 32 : 16;  // keys of a step
    static constexpr int ROW = WIDTH + 4, WEIGHTS = STEP + 4;  // a row of Q, K and V, and of weights
    static constexpr int K = FLOAT_QUERIES * ROW, V = K + STEP * ROW, P = V + STEP * ROW;  // where each begins
    static constexpr size_t SHARED = (P + FLOAT_QUERIES * WEIGHTS) * sizeof(float);
};

template <int WIDTH>
__global__ void __launch_bounds__(32 * ATTENTION_WARPS, WIDTH <= 80 ? 3 : 2) attention_float32_fwd_kernel(const AttentionParams p) {
    using Sizes = FloatAttention<WIDTH>;
    constexpr int STEP = Sizes::STEP, ROW = Sizes::ROW, KEYS = STEP / 8, PAIRS = WIDTH / 16, QUERIES = 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, eighth = lane % 8, row = warp * TILE + lane / 8;
    const int64_t head_of_image = blockIdx.x / p.blocks_per_head;
    const int first_query = static_cast<int>(blockIdx.x % p.blocks_per_head) * FLOAT_QUERIES;
    const int64_t image = head_of_image / p.num_heads, head = head_of_image % p.num_heads;
    const float* q = static_cast<const float*>(p.q) + image * p.q_image + head * p.head_size;
    const float* k = static_cast<const float*>(p.k) + image * p.k_image + head * p.head_size;
    const float* v = static_cast<const float*>(p.v) + image * p.v_image + head * p.head_size;
    float* shared = reinterpret_cast<float*>(shared_memory());
    const float *queries = shared + row * ROW, *keys = shared + Sizes::K, *values = shared + Sizes::V;
    float* weights = shared + Sizes::P + row * Sizes::WEIGHTS;

    copy_rows<float, WIDTH>(shared, q, p.q_row, first_query, FLOAT_QUERIES, p.num_queries, p.head_size);
    copy_rows<float, WIDTH>(shared + Sizes::K, k, p.k_row, 0, STEP, p.num_keys, p.head_size);
    cp_async_commit();

    float acc[QUERIES][PAIRS][2] = {}, l_i[QUERIES] = {}, m_i[QUERIES];  // columns j · 16 + eighth · 2 and the next
#pragma unroll
    for (int i = 0; i < QUERIES; i++) m_i[i] = -INFINITY;

    for (int first = 0; first < p.num_keys; first += STEP) {
        cp_async_wait<0>();
        __syncthreads();  // K is there, and all are done with V
        copy_rows<float, WIDTH>(shared + Sizes::V, v, p.v_row, first, STEP, p.num_keys, p.head_size);
        cp_async_commit();

        float s[QUERIES][KEYS] = {};  // of keys j · 8 + eighth
#pragma unroll 4
        for (int d = 0; d < WIDTH; d += 4) {
            float4 b[KEYS];
#pragma unroll
            for (int j = 0; j < KEYS; j++) b[j] = shared_load4(keys + (j * 8 + eighth) * ROW + d);
#pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                const float4 a = shared_load4(queries + i * 4 * ROW + d);
#pragma unroll
                for (int j = 0; j < KEYS; j++) s[i][j] = dot4(a, b[j], s[i][j]);
            }
        }

        float alpha[QUERIES];
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            float m_new = m_i[i];
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
                if (p.negative) s[i][j] = -s[i][j];
                if (first + j * 8 + eighth >= p.num_keys) s[i][j] = -INFINITY;
                m_new = fmaxf(m_new, s[i][j]);
            }
#pragma unroll
            for (int lanes = 1; lanes < 8; lanes *= 2) m_new = fmaxf(m_new, __shfl_xor_sync(FULL_WARP, m_new, lanes));
            const float shift = m_new == -INFINITY ? 0.0f : m_new;
            alpha[i] = exp2_approx((m_i[i] - shift) * p.scale_log2);
            m_i[i] = m_new;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS; j++) {
                const float weight = exp2_approx((s[i][j] - shift) * p.scale_log2);
                sum += weight;
                shared_store(weights + i * 4 * Sizes::WEIGHTS + j * 8 + eighth, weight);
            }
            l_i[i] = l_i[i] * alpha[i] + sum;
        }

        cp_async_wait<0>();
        __syncthreads();  // V and the weights are there, and all are done with K
        if (first + STEP < p.num_keys) {
            copy_rows<float, WIDTH>(shared + Sizes::K, k, p.k_row, first + STEP, STEP, p.num_keys, p.head_size);
            cp_async_commit();
        }

        float step[QUERIES][PAIRS][2] = {};
#pragma unroll 2
        for (int key = 0; key < STEP; key += 4) {
            float w[QUERIES][4];
#pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                const float4 four = shared_load4(weights + i * 4 * Sizes::WEIGHTS + key);
                w[i][0] = four.x, w[i][1] = four.y, w[i][2] = four.z, w[i][3] = four.w;
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int j = 0; j < PAIRS; j++) {
                    const float2 two = shared_load(
                        reinterpret_cast<const float2*>(values + (key + n) * ROW + j * 16 + eighth * 2));
#pragma unroll
                    for (int i = 0; i < QUERIES; i++) {
                        step[i][j][0] = fmaf(w[i][n], two.x, step[i][j][0]);
                        step[i][j][1] = fmaf(w[i][n], two.y, step[i][j][1]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
#pragma unroll
                for (int n = 0; n < 2; n++) acc[i][j][n] = fmaf(acc[i][j][n], alpha[i], step[i][j][n]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) l_i[i] += __shfl_xor_sync(FULL_WARP, l_i[i], lanes);
        const int query = first_query + row + i * 4;
        if (query >= p.num_queries) continue;
        const float inverse = 1.0f / l_i[i];
        float* out = static_cast<float*>(p.out) + ((image * p.num_queries + query) * p.num_heads + head) * p.head_size;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int column = j * 16 + eighth * 2;
            const float2 two = {acc[i][j][0] * inverse, acc[i][j][1] * inverse};
            if (column < p.head_size) store(reinterpret_cast<float2*>(out + column), two);
        }
        if (p.lse && eighth == 0) {
            store(p.lse + head_of_image * p.num_queries + query, (m_i[i] * p.scale_log2 + log2f(l_i[i])) * LN2);
        }
    }
}

// The widths of heads that are compiled, multiples of 16.
#ifndef VF_HEAD_WIDTHS
#define VF_HEAD_WIDTHS(f) f(16) f(32) f(48) f(64) f(80) f(96) f(112) f(128)
#endif

template <class T> bool launch_attention(AttentionParams p, int64_t batch, Stream stream) {
    const int width = ceil_div(p.head_size, 16) * 16, tiles = ceil_div(p.num_queries, TILE);
    const Limits limits = device_limits();
    const size_t row = (width + PAD) * sizeof(T);
    const size_t limit = limits.shared, whole = 2 * row * (ceil_div(p.num_keys, 16) * 16);
    p.resident = whole <= limit;
    p.step = p.resident || 4 * row * STEP <= limit ? STEP : STEP / 2;
    // Streaming: four tiles a block. Resident: enough blocks for two on every multiprocessor, as few as that takes.
    p.blocks_per_head = ceil_div(tiles, ATTENTION_WARPS);
    if (p.resident) {
        const int64_t wanted = ceil_div<int64_t>(2 * limits.multiprocessors, batch * p.num_heads);
        p.blocks_per_head = static_cast<int>(wanted < p.blocks_per_head ? wanted : p.blocks_per_head);
    }
    p.tiles_per_block = ceil_div(ceil_div(tiles, p.blocks_per_head), ATTENTION_WARPS) * ATTENTION_WARPS;
    p.blocks_per_head = ceil_div(tiles, p.tiles_per_block);
    const int64_t grid = batch * p.num_heads * p.blocks_per_head;
#define VF_LAUNCH(WIDTH)                                                                                    \
    if (width == WIDTH) {                                                                                   \
        const size_t shared = p.resident ? whole : 4 * row * p.step;                                                  \
        launch(attention_fwd_kernel<T, WIDTH>, grid, 32 * ATTENTION_WARPS, shared, stream, p);              \
        return true;                                                                                        \
    }
    VF_HEAD_WIDTHS(VF_LAUNCH)
#undef VF_LAUNCH
    return false;
}

template <> inline bool launch_attention<float>(AttentionParams p, int64_t batch, Stream stream) {
    const int width = ceil_div(p.head_size, 16) * 16;
    p.blocks_per_head = ceil_div(p.num_queries, FLOAT_QUERIES);
    const int64_t grid = batch * p.num_heads * p.blocks_per_head;
#define VF_LAUNCH(WIDTH)                                                                                             \
    if (width == WIDTH) {                                                                                            \
        const size_t shared = FloatAttention<WIDTH>::SHARED;                                                         \
        launch(attention_float32_fwd_kernel<WIDTH>, grid, 32 * ATTENTION_WARPS, shared, stream, p);                  \
        return true;                                                                                                 \
    }
    VF_HEAD_WIDTHS(VF_LAUNCH)
#undef VF_LAUNCH
    return false;
}

// Launches the kernel of a type and head size; false where there is none. Sizes and strides are set, the rest is chosen here.
inline bool attention(const AttentionParams& p, int64_t batch, int type, Stream stream) {
    if (p.head_size % 8 || p.head_size < 16 || p.head_size > 128) return false;
    if (batch == 0 || p.num_queries == 0) return true;
    if (type == BFLOAT16) return launch_attention<bf16>(p, batch, stream);
    if (type == FLOAT16) return launch_attention<fp16>(p, batch, stream);
    if (type == FLOAT32) return launch_attention<float>(p, batch, stream);
    return false;
}

// Zero would make NaN of the −inf of masked keys; the smallest normal number leaves finite scores at zero.
inline float attention_scale(double scale) { return fmaxf(static_cast<float>(fabs(scale)) * LOG2E, 0x1p-126f); }

}  // namespace vf

#ifndef VF_KERNELS_ONLY
#include "operators.h"

namespace {

using namespace vf;

void attention_operator(Tensor out, MaybeTensor lse, Tensor q, Tensor k, Tensor v, int64_t num_heads, double scale) {
    const int64_t piece = type_of(out) == FLOAT32 ? 4 : 8;  // elements of 16 bytes
    for (const Tensor& x : {q, k, v}) {
        STD_TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && (x.size(0) == 1 || x.stride(0) % piece == 0) &&
                            (x.size(1) == 1 || x.stride(1) % piece == 0) &&
                            reinterpret_cast<int64_t>(x.data_ptr()) % 16 == 0 && type_of(x) == type_of(out),
                        "vit_fast_cuda::attention: layout");
    }
    STD_TORCH_CHECK(num_heads > 0 && k.size(1) > 0 && k.size(1) < 1 << 24 && q.size(1) < 1 << 24, "vit_fast_cuda::attention: sizes");
    AttentionParams p = {};
    p.out = data(out), p.lse = data<float>(lse), p.q = data(q), p.k = data(k), p.v = data(v);
    p.q_image = q.stride(0), p.q_row = q.stride(1), p.k_image = k.stride(0), p.k_row = k.stride(1);
    p.v_image = v.stride(0), p.v_row = v.stride(1);
    p.num_heads = static_cast<int>(num_heads), p.num_queries = static_cast<int>(q.size(1));
    p.num_keys = static_cast<int>(k.size(1)), p.head_size = static_cast<int>(q.size(2) / num_heads);
    p.negative = scale < 0, p.scale_log2 = attention_scale(scale);
    const OnDevice device(q);
    STD_TORCH_CHECK(attention(p, q.size(0), type_of(q), device.stream), "vit_fast_cuda::attention: no kernel");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cuda, VF_DISPATCH_KEY, m) { m.impl("attention", TORCH_BOX(&attention_operator)); }
#endif
