// LayerNorm forward: y = (x − mean) · rstd · weight + bias over the last axis, rstd = 1/√(var + eps). RMSNorm takes 0 for the
// mean, so that var is the mean of x².
//
// x [rows, C] at one or two strides, y [rows, C] contiguous, in the dtype of x or, of a float32 x, in 16 bits; weight and
// bias [C], contiguous, in the dtype of y or float32, or absent; mean and rstd [rows] float32. Either of y and the statistics
// may be left out. Statistics take two passes in float32, as large means leave no digits to E[x²] − E[x]²: the mean (not of
// RMSNorm), then the sum and the squares of what is left. That sum is what rounding lost of the mean (`rest` below); it corrects mean,
// variance and y.
//
// Two kernels:
//   layer_norm_fwd_kernel       a warp is a row, which stays in registers; four rows a block: C up to 2048, all in pieces
//                               of 16 bytes
//   layer_norm_wide_fwd_kernel  a block of 256 threads is a row and reads it three times (RMSNorm twice), out of the L2 cache
//                               but for the first; one element an access where something is not aligned
// Width, types and alignment choose the kernel: a row's bits do not depend on the batch.
// Moves rows · C elements in and out. Limits: rows below 2^31.
// Sources: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019.
#include "rows.h"

namespace vf {

struct LayerNormParams {
    void* y;            // [rows, C] contiguous, or null: statistics alone
    float *mean, *rstd; // [rows], or null
    const void* x;      // [rows, C]
    const void *weight, *bias;  // [C], or null
    Rows x_rows;
    int64_t rows;
    int width;
    float eps;
    bool rms;
};

struct Statistics {
    float mean, rest, rstd;
};

__device__ __forceinline__ void add_centred(float centred, float& rest, float& squares) {
    rest += centred;
    squares += centred * centred;
}

// Of a row, from its rounded mean (0 of RMSNorm) and the sums of x − mean and of its squares.
__device__ __forceinline__ Statistics finish(const LayerNormParams& p, float mean, float sum, float squares) {
    const float rest = p.rms ? 0.0f : sum / p.width;
    return {mean, rest, 1.0f / sqrtf(fmaxf(squares / p.width - rest * rest, 0.0f) + p.eps)};
}

__device__ __forceinline__ void write_statistics(const LayerNormParams& p, int64_t row, const Statistics& s) {
    store(p.mean + row, s.mean + s.rest);
    store(p.rstd + row, s.rstd);
}

// y of VEC neighbouring elements from the column on.
template <class P, class Y, int VEC>
__device__ __forceinline__ void write_normal(
    const LayerNormParams& p, Y* y, const float (&x)[VEC], int column, const Statistics& s) {
    float result[VEC], side[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) result[i] = ((x[i] - s.mean) - s.rest) * s.rstd;
    if (p.weight) {
        load_vector(side, static_cast<const P*>(p.weight) + column);
#pragma unroll
        for (int i = 0; i < VEC; i++) result[i] *= side[i];
    }
    if (p.bias) {
        load_vector(side, static_cast<const P*>(p.bias) + column);
#pragma unroll
        for (int i = 0; i < VEC; i++) result[i] += side[i];
    }
    store_vector(y + column, result);
}

constexpr int LAYER_NORM_WARPS = 4;

template <class X, class P, class Y, int VEC, int PER_LANE>
__global__ void __launch_bounds__(32 * LAYER_NORM_WARPS) layer_norm_fwd_kernel(const LayerNormParams p) {
    const int lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LAYER_NORM_WARPS + threadIdx.x / 32;
    if (row >= p.rows) return;
    const X* x = static_cast<const X*>(p.x) + p.x_rows.offset(row);
    constexpr int PIECES = PER_LANE / VEC;
    float values[PIECES][VEC], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
        const int column = (j * 32 + lane) * VEC;
        if (column < p.width) {
            load_vector(values[j], x + column);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum += values[j][i];
        }
    }
    const float mean = p.rms ? 0.0f : warp_sum(sum) / p.width;
    float squares = 0.0f, rest = 0.0f;
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
        if ((j * 32 + lane) * VEC < p.width) {
#pragma unroll
            for (int i = 0; i < VEC; i++) add_centred(values[j][i] - mean, rest, squares);
        }
    }
    const Statistics s = finish(p, mean, warp_sum(rest), warp_sum(squares));
    if (p.mean && lane == 0) write_statistics(p, row, s);
    if (!p.y) return;
    Y* y = static_cast<Y*>(p.y) + row * p.width;
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
        const int column = (j * 32 + lane) * VEC;
        if (column < p.width) write_normal<P>(p, y, values[j], column, s);
    }
}

constexpr int WIDE_THREADS = 256;

// The sum over all threads of a block, in shared memory of one float a warp.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared_store(shared + threadIdx.x / 32, x);
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < WIDE_THREADS / 32; i++) sum += shared_load(shared + i);
    __syncthreads();
    return sum;
}

// The blocks of a multiprocessor are told, because ptxas would spill to reach six of them (float32 on sm_90).
template <class X, class P, class Y, int VEC>
__global__ void __launch_bounds__(WIDE_THREADS, 4) layer_norm_wide_fwd_kernel(const LayerNormParams p) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int64_t row = blockIdx.x;
    const X* x = static_cast<const X*>(p.x) + p.x_rows.offset(row);
    const int first = threadIdx.x * VEC;
    float values[VEC], mean = 0.0f;
    if (!p.rms) {
        float sum = 0.0f;
        for (int column = first; column < p.width; column += WIDE_THREADS * VEC) {
            load_vector(values, x + column);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum += values[i];
        }
        mean = block_sum(sum, shared) / p.width;
    }
    float squares = 0.0f, rest = 0.0f;
    for (int column = first; column < p.width; column += WIDE_THREADS * VEC) {
        load_vector(values, x + column);
#pragma unroll
        for (int i = 0; i < VEC; i++) add_centred(values[i] - mean, rest, squares);
    }
    rest = block_sum(rest, shared);
    const Statistics s = finish(p, mean, rest, block_sum(squares, shared));
    if (p.mean && threadIdx.x == 0) write_statistics(p, row, s);
    if (!p.y) return;
    Y* y = static_cast<Y*>(p.y) + row * p.width;
    for (int column = first; column < p.width; column += WIDE_THREADS * VEC) {
        load_vector(values, x + column);
        write_normal<P>(p, y, values, column, s);
    }
}

template <class X, class P, class Y> bool launch_layer_norm(const LayerNormParams& p, Stream stream) {
    constexpr int VEC = 16 / sizeof(X), THREADS = 32 * LAYER_NORM_WARPS;
    const int64_t blocks = ceil_div<int64_t>(p.rows, LAYER_NORM_WARPS);
    const size_t wide = WIDE_THREADS / 32 * sizeof(float);
    const bool pieces = p.width % VEC == 0 && p.width * sizeof(Y) % 16 == 0 && rows_aligned(p.x, p.x_rows, sizeof(X)) &&
                        rows_aligned(p.weight, {}, 1) && rows_aligned(p.bias, {}, 1);
    if (!pieces) {
        launch(layer_norm_wide_fwd_kernel<X, P, Y, 1>, p.rows, WIDE_THREADS, wide, stream, p);
    } else if (p.width <= 512) {
        launch(layer_norm_fwd_kernel<X, P, Y, VEC, 16>, blocks, THREADS, 0, stream, p);
    } else if (p.width <= 1024) {
        launch(layer_norm_fwd_kernel<X, P, Y, VEC, 32>, blocks, THREADS, 0, stream, p);
    } else if (p.width <= 2048) {
        launch(layer_norm_fwd_kernel<X, P, Y, VEC, 64>, blocks, THREADS, 0, stream, p);
    } else {
        launch(layer_norm_wide_fwd_kernel<X, P, Y, VEC>, p.rows, WIDE_THREADS, wide, stream, p);
    }
    return true;
}

template <class X, class Y> bool launch_layer_norm(const LayerNormParams& p, int param_type, Stream stream) {
    if (param_type == FLOAT32) return launch_layer_norm<X, float, Y>(p, stream);
    if constexpr (!std::is_same_v<Y, float>) {
        if (param_type == TypeOf<Y>::value) return launch_layer_norm<X, Y, Y>(p, stream);
    }
    return false;
}

// Launches the kernel of these types; false where there is none. weight and bias share a type.
inline bool layer_norm(const LayerNormParams& p, int x_type, int param_type, int y_type, Stream stream) {
    if (p.rows == 0) return true;
    if (x_type == FLOAT32 && y_type == FLOAT32) return launch_layer_norm<float, float>(p, param_type, stream);
    if (x_type == FLOAT32 && y_type == FLOAT16) return launch_layer_norm<float, fp16>(p, param_type, stream);
    if (x_type == FLOAT32 && y_type == BFLOAT16) return launch_layer_norm<float, bf16>(p, param_type, stream);
    if (x_type == FLOAT16 && y_type == FLOAT16) return launch_layer_norm<fp16, fp16>(p, param_type, stream);
    if (x_type == BFLOAT16 && y_type == BFLOAT16) return launch_layer_norm<bf16, bf16>(p, param_type, stream);
    return false;
}

}  // namespace vf

#ifndef VF_KERNELS_ONLY
#include "operators.h"

namespace {

using namespace vf;

void layer_norm_operator(MaybeTensor y, MaybeTensor mean, MaybeTensor rstd, Tensor x, MaybeTensor weight, MaybeTensor bias,
                         double eps, bool rms) {
    const int64_t width = x.size(x.dim() - 1);
    STD_TORCH_CHECK(width > 0 && width < 1 << 24, "vit_fast_cuda::layer_norm: width");
    const LayerNormParams p = {
        data(y), data<float>(mean), data<float>(rstd), data(x), data(weight), data(bias), rows_of(x), x.numel() / width,
        static_cast<int>(width), static_cast<float>(eps), rms};
    const int param_type = type_of(weight ? weight : bias);
    STD_TORCH_CHECK(!weight || !bias || type_of(bias) == param_type, "vit_fast_cuda::layer_norm: weight and bias differ");
    const OnDevice device(x);
    const int y_type = y ? type_of(y) : type_of(x);
    STD_TORCH_CHECK(layer_norm(p, type_of(x), param_type, y_type, device.stream), "vit_fast_cuda::layer_norm: dtypes");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cuda, VF_DISPATCH_KEY, m) {
    m.impl("layer_norm", TORCH_BOX(&layer_norm_operator));
}
#endif
