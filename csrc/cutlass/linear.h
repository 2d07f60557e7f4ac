// out[M, N] = epilogue(x[M, K] · weight[N, K]ᵀ) by CUTLASS: what a kernel takes, and the table of kernels.
//
// Each kernel is an object file of its own, as nvcc needs up to 50 s and 4 GB for one: csrc/build.py compiles
// linear_sm90.cu and linear_sm80.cu once for each of their kernels, with -DVF_KERNEL=<name>.
// No kernel of this folder has run on a GPU.
#pragma once

#include <cstdint>

#include "epilogue.h"

namespace vf {

// Vectors are float32, all addresses at multiples of 16 bytes, N and K and the strides (in elements) multiples of 8.
struct LinearParams {
    void* out;                          // [M, N] contiguous, 16 bits
    const void *x, *weight;             // rows of x at x_stride; weight contiguous
    const float *bias, *gamma;          // [N], null for zeros, for ones
    const void* residual;               // [M, N], rows at residual_stride
    const float *mean, *rstd, *sums;    // [M], [M], [N]: of a folded LayerNorm
    int rows, features, size;           // M, N, K
    int64_t x_stride, residual_stride;
    Activation activation;
    int swizzle;                        // of sm_90: tiles of a column of tiles that follow each other, 1, 2, 4 or 8
    int multiprocessors;
    void* stream;                       // a cudaStream_t
};

// Launches; returns null, or what CUTLASS or CUDA says.
using LinearKernel = const char* (*)(const LinearParams&);

// What a caller names a kernel by, besides its dtype: how its loop is organised, and what it does with the sums.
enum Family : int { MULTISTAGE = 0, PINGPONG = 1, COOPERATIVE = 2 };
enum Epilogue : int { ACTIVATION, FOLD, RESIDUAL };

// name, family, epilogue, dtype of x, weight and out, and the capabilities that it runs on (10 · major + minor).
#define VF_LINEAR_KERNELS(KERNEL)                                                  \
    KERNEL(pingpong_activation, PINGPONG, ACTIVATION, BFLOAT16, 90, 90)            \
    KERNEL(pingpong_fold, PINGPONG, FOLD, BFLOAT16, 90, 90)                        \
    KERNEL(pingpong_residual, PINGPONG, RESIDUAL, BFLOAT16, 90, 90)                \
    KERNEL(cooperative_activation, COOPERATIVE, ACTIVATION, BFLOAT16, 90, 90)      \
    KERNEL(cooperative_fold, COOPERATIVE, FOLD, BFLOAT16, 90, 90)                  \
    KERNEL(cooperative_residual, COOPERATIVE, RESIDUAL, BFLOAT16, 90, 90)          \
    KERNEL(multistage_activation_bf16, MULTISTAGE, ACTIVATION, BFLOAT16, 80, 9999) \
    KERNEL(multistage_residual_bf16, MULTISTAGE, RESIDUAL, BFLOAT16, 80, 9999)     \
    KERNEL(multistage_activation_fp16, MULTISTAGE, ACTIVATION, FLOAT16, 80, 9999)  \
    KERNEL(multistage_residual_fp16, MULTISTAGE, RESIDUAL, FLOAT16, 80, 9999)      \
    KERNEL(turing_activation_fp16, MULTISTAGE, ACTIVATION, FLOAT16, 75, 75)        \
    KERNEL(turing_residual_fp16, MULTISTAGE, RESIDUAL, FLOAT16, 75, 75)

#define VF_DECLARE(name, ...) const char* name(const LinearParams&);
VF_LINEAR_KERNELS(VF_DECLARE)
#undef VF_DECLARE

}  // namespace vf
