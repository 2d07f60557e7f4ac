// What the CUTLASS kernels compute on the float32 sums of a product before they are rounded: plain functions of values,
// for nvcc and for a host compiler, which tests/csrc/test_cutlass_epilogue.py takes to compare them with float64.
//
//   activation   act(acc + bias)
//   fold         act(rstd · (acc − mean · sum) + bias), a LayerNorm folded into the product: mean and rstd of the row of x,
//                sum of the row of the weight
//   residual     residual + gamma · (acc + bias), rounded once
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define VF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VF_HOST_DEVICE inline
#endif

namespace vf {

// The numbers of vit_fast/backends/cuda.py.
enum ActivationName : int { NONE = 0, GELU = 1, GELU_TANH = 2, QUICK_GELU = 3, RELU = 4 };

// An activation as one kernel takes any of them: max(z, a), which NaN passes; gelu by erf; z · sigmoid(z · (a + b z²)).
struct Activation {
    enum Form : int { CLAMP, ERF, SIGMOID } form;
    float a, b;
};

// False where there is no such activation.
inline bool find_activation(Activation& found, int name) {
    constexpr float NEVER = -INFINITY, TANH = 1.5957691216057308f;  // 2 √(2/π)
    switch (name) {
        case NONE: found = {Activation::CLAMP, NEVER, 0.0f}; return true;
        case GELU: found = {Activation::ERF, 0.0f, 0.0f}; return true;
        case GELU_TANH: found = {Activation::SIGMOID, TANH, TANH * 0.044715f}; return true;
        case QUICK_GELU: found = {Activation::SIGMOID, 1.702f, 0.0f}; return true;
        case RELU: found = {Activation::CLAMP, 0.0f, 0.0f}; return true;
        default: return false;
    }
}

VF_HOST_DEVICE float clamp(float z, float least) { return z < least ? least : z; }

VF_HOST_DEVICE float gelu(float z) { return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f)); }

VF_HOST_DEVICE float times_sigmoid(float z, float a, float b) {
    const float square = b == 0.0f ? 0.0f : b * z * z;  // not 0 · ∞
    const float power = z * (a + square) * -1.4426950408889634f;  // of 2
#ifdef __CUDA_ARCH__
    float exponential;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(power));
    return __fdividef(z, 1.0f + exponential);  // 0 for a denominator from 2^126 on, as it should be
#else
    return z / (1.0f + exp2f(power));
#endif
}

// The functions below work on vectors of N floats, with [] (cutlass::Array, std::array). The form is asked for once.

template <int N, class V> VF_HOST_DEVICE V activate(V z, const Activation& how) {
    if (how.form == Activation::ERF) {
#pragma unroll
        for (int i = 0; i < N; i++) z[i] = gelu(z[i]);
    } else if (how.form == Activation::SIGMOID) {
#pragma unroll
        for (int i = 0; i < N; i++) z[i] = times_sigmoid(z[i], how.a, how.b);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) z[i] = clamp(z[i], how.a);
    }
    return z;
}

template <int N, class V> VF_HOST_DEVICE V activation_epilogue(V acc, const V& bias, const Activation& how) {
#pragma unroll
    for (int i = 0; i < N; i++) acc[i] += bias[i];
    return activate<N>(acc, how);
}

template <int N, class V>
VF_HOST_DEVICE V fold_epilogue(V acc, const V& mean, const V& rstd, const V& sum, const V& bias, const Activation& how) {
#pragma unroll
    for (int i = 0; i < N; i++) acc[i] = rstd[i] * (acc[i] - mean[i] * sum[i]) + bias[i];
    return activate<N>(acc, how);
}

template <int N, class V> VF_HOST_DEVICE V residual_epilogue(V acc, const V& bias, const V& gamma, const V& residual) {
#pragma unroll
    for (int i = 0; i < N; i++) acc[i] = residual[i] + gamma[i] * (acc[i] + bias[i]);
    return acc;
}

}  // namespace vf
