// What follows a matrix product that torch has run: the activation, or residual + row_scale · gamma · x. A pass each.
//
//   activation   out = act(z), z [rows, F] contiguous, out [rows, F], or [rows, F/2] of a gated activation, which is
//                act(first half) · second half; out may be z (not of a gated one). Evaluated in float32, gelu by erf.
//   residual     out = residual + row_scale[image] · gamma[column] · x, x and out [rows, C] contiguous, residual [rows, C] at
//                one or two strides; out and residual in the dtype of x, or float32. gamma [C] and row_scale [images] in the
//                dtype of x or float32, contiguous, or absent. Summed in float32 and rounded once.
// A thread has VEC neighbouring elements: 16 bytes of x where everything is aligned, else one.
// Moves each element in and out once. Limits: 2^31 blocks of 256·VEC elements.
#include "rows.h"

namespace vf {

// Gated ones from SWIGLU on: of silu, gelu and gelu_tanh.
enum Activation : int {
    GELU = 1, GELU_TANH = 2, QUICK_GELU = 3, RELU = 4, SILU = 5, SWIGLU = 6, GEGLU = 7, GEGLU_TANH = 8
};

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + exp2_approx(-LOG2E * z)); }

template <int ACTIVATION> __device__ __forceinline__ float activate(float z) {
    if constexpr (ACTIVATION == GELU) return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
    if constexpr (ACTIVATION == GELU_TANH) return z * sigmoid(1.5957691216057308f * z * (1.0f + 0.044715f * z * z));
    if constexpr (ACTIVATION == QUICK_GELU) return z * sigmoid(1.702f * z);
    if constexpr (ACTIVATION == RELU) return z < 0.0f ? 0.0f : z;  // NaN stays NaN
    return z * sigmoid(z);  // SILU
}

struct ActivationParams {
    void* out;
    const void* z;
    int64_t count;  // elements of out
    int width;      // of out
};

constexpr int EPILOGUE_THREADS = 256;

template <class T, int ACTIVATION, bool GATED, int VEC>
__global__ void __launch_bounds__(EPILOGUE_THREADS) activation_kernel(const ActivationParams p) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * EPILOGUE_THREADS + threadIdx.x) * VEC;
    if (i >= p.count) return;
    const T* z = static_cast<const T*>(p.z) + i;
    if constexpr (GATED) z += i / p.width * p.width;
    float values[VEC], gated[VEC];
    load_vector(values, z);
#pragma unroll
    for (int j = 0; j < VEC; j++) values[j] = activate<ACTIVATION>(values[j]);
    if constexpr (GATED) {
        load_vector(gated, z + p.width);
#pragma unroll
        for (int j = 0; j < VEC; j++) values[j] *= gated[j];
    }
    store_vector(static_cast<T*>(p.out) + i, values);
}

struct ResidualParams {
    void* out;
    const void *x, *residual, *gamma, *row_scale;
    Rows residual_rows;
    int64_t count, rows_per_image;
    int width;
    bool gamma_wide, scale_wide;  // float32
};

template <class X, class R, int VEC>
__global__ void __launch_bounds__(EPILOGUE_THREADS) residual_kernel(const ResidualParams p) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * EPILOGUE_THREADS + threadIdx.x) * VEC;
    if (i >= p.count) return;
    const int64_t row = i / p.width;
    const int column = static_cast<int>(i - row * p.width);
    float x[VEC], residual[VEC];
    load_vector(x, static_cast<const X*>(p.x) + i);
    load_vector(residual, static_cast<const R*>(p.residual) + p.residual_rows.offset(row) + column);
    const float scale = p.row_scale ? load_either<X>(p.row_scale, row / p.rows_per_image, p.scale_wide) : 1.0f;
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        if (p.gamma) x[j] *= load_either<X>(p.gamma, column + j, p.gamma_wide);
        residual[j] += scale * x[j];
    }
    store_vector(static_cast<R*>(p.out) + i, residual);
}

template <class T, int ACTIVATION, bool GATED = false> void launch_activation(const ActivationParams& p, Stream stream) {
    constexpr int VEC = 16 / sizeof(T);
    const bool aligned = p.width % VEC == 0 && rows_aligned(p.z, {}, 1) && rows_aligned(p.out, {}, 1);
    const int64_t threads = aligned ? p.count / VEC : p.count, blocks = ceil_div<int64_t>(threads, EPILOGUE_THREADS);
    if (aligned) launch(activation_kernel<T, ACTIVATION, GATED, VEC>, blocks, EPILOGUE_THREADS, 0, stream, p);
    else launch(activation_kernel<T, ACTIVATION, GATED, 1>, blocks, EPILOGUE_THREADS, 0, stream, p);
}

template <class T> bool launch_activation(const ActivationParams& p, int activation, Stream stream) {
    if (activation == GELU) launch_activation<T, GELU>(p, stream);
    else if (activation == GELU_TANH) launch_activation<T, GELU_TANH>(p, stream);
    else if (activation == QUICK_GELU) launch_activation<T, QUICK_GELU>(p, stream);
    else if (activation == RELU) launch_activation<T, RELU>(p, stream);
    else if (activation == SILU) launch_activation<T, SILU>(p, stream);
    else if (activation == SWIGLU) launch_activation<T, SILU, true>(p, stream);
    else if (activation == GEGLU) launch_activation<T, GELU, true>(p, stream);
    else if (activation == GEGLU_TANH) launch_activation<T, GELU_TANH, true>(p, stream);
    else return false;
    return true;
}

// Launches the kernel of a type and an activation; false where there is none.
inline bool activation(const ActivationParams& p, int activation, int type, Stream stream) {
    if (type == FLOAT32) return launch_activation<float>(p, activation, stream);
    if (type == FLOAT16) return launch_activation<fp16>(p, activation, stream);
    if (type == BFLOAT16) return launch_activation<bf16>(p, activation, stream);
    return false;
}

template <class X, class R> bool launch_residual(const ResidualParams& p, Stream stream) {
    constexpr int VEC = 16 / sizeof(X);
    const bool aligned = p.width % VEC == 0 && p.width * sizeof(R) % 16 == 0 && rows_aligned(p.x, {}, 1) &&
                         rows_aligned(p.out, {}, 1) && rows_aligned(p.residual, p.residual_rows, sizeof(R));
    const int64_t threads = aligned ? p.count / VEC : p.count, blocks = ceil_div<int64_t>(threads, EPILOGUE_THREADS);
    if (aligned) launch(residual_kernel<X, R, VEC>, blocks, EPILOGUE_THREADS, 0, stream, p);
    else launch(residual_kernel<X, R, 1>, blocks, EPILOGUE_THREADS, 0, stream, p);
    return true;
}

// Launches the kernel of two types; false where there is none.
inline bool residual(const ResidualParams& p, int x_type, int residual_type, Stream stream) {
    if (x_type == FLOAT32 && residual_type == FLOAT32) return launch_residual<float, float>(p, stream);
    if (x_type == FLOAT16 && residual_type == FLOAT16) return launch_residual<fp16, fp16>(p, stream);
    if (x_type == BFLOAT16 && residual_type == BFLOAT16) return launch_residual<bf16, bf16>(p, stream);
    if (x_type == FLOAT16 && residual_type == FLOAT32) return launch_residual<fp16, float>(p, stream);
    if (x_type == BFLOAT16 && residual_type == FLOAT32) return launch_residual<bf16, float>(p, stream);
    return false;
}

}  // namespace vf

#ifndef VF_KERNELS_ONLY
#include "operators.h"

namespace {

using namespace vf;

void activation_operator(Tensor out, Tensor z, int64_t which) {
    const int64_t width = out.size(out.dim() - 1);
    STD_TORCH_CHECK(z.is_contiguous() && out.is_contiguous() && type_of(out) == type_of(z) && width < int64_t{1} << 31 &&
                        z.numel() == out.numel() * (which >= SWIGLU ? 2 : 1),
                    "vit_fast_cuda::activation: arguments");
    const ActivationParams p = {data(out), data(z), out.numel(), static_cast<int>(width)};
    const OnDevice device(z);
    STD_TORCH_CHECK(activation(p, static_cast<int>(which), type_of(z), device.stream), "vit_fast_cuda::activation: kind");
}

void residual_operator(Tensor out, Tensor x, Tensor residual_, MaybeTensor gamma, MaybeTensor row_scale) {
    const int64_t width = x.size(x.dim() - 1);
    STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && x.numel() == out.numel() && width < int64_t{1} << 31 &&
                        x.numel() == residual_.numel() && type_of(out) == type_of(residual_),
                    "vit_fast_cuda::residual: arguments");
    ResidualParams p = {};
    p.out = data(out), p.x = data(x), p.residual = data(residual_), p.gamma = data(gamma), p.row_scale = data(row_scale);
    p.residual_rows = rows_of(residual_);
    p.count = x.numel(), p.width = static_cast<int>(width);
    p.rows_per_image = row_scale && row_scale->numel() ? x.numel() / width / row_scale->numel() : 1;
    p.gamma_wide = type_of(gamma) == FLOAT32, p.scale_wide = type_of(row_scale) == FLOAT32;
    const OnDevice device(x);
    STD_TORCH_CHECK(residual(p, type_of(x), type_of(residual_), device.stream), "vit_fast_cuda::residual: dtypes");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cuda, VF_DISPATCH_KEY, m) {
    m.impl("activation", TORCH_BOX(&activation_operator));
    m.impl("residual", TORCH_BOX(&residual_operator));
}
#endif
