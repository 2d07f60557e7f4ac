// The words in which the CUDA kernels of this folder are written: PTX under nvcc, a model of the GPU under g++.
//
// Every access to memory goes through a word: load, store, load16, store16 for global memory; shared_load, shared_store,
// ldmatrix, cp_async16 for shared memory. So tests/emulator, which defines the same words where VF_EMULATED is set, sees
// each of them: it runs the kernels on a CPU and checks bounds, races, barriers and uninitialised reads.
// Instructions: ldmatrix and mma.sync.m16n8k8 fp16 from sm_75, mma.sync.m16n8k16 bf16 and fp16 and cp.async from sm_80.
// On sm_75 cp_async16 is a load and a store, and an m16n8k16 product of fp16 is two of m16n8k8.
// Not measured: no kernel of this folder has run on a GPU.
// Source: PTX ISA 9.0, sections "Warp-level Matrix Instructions" (layouts of fragments) and "cp.async".
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef VF_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace vf {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using Stream = cudaStream_t;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Global memory.
template <class T> __device__ __forceinline__ T load(const T* address) { return *address; }
template <class T> __device__ __forceinline__ void store(T* address, T value) { *address = value; }
__device__ __forceinline__ uint4 load16(const void* address) { return *static_cast<const uint4*>(address); }
__device__ __forceinline__ void store16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }

// Shared memory: the dynamic array of the launch alone.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char vf_shared[];
    return vf_shared;
}
template <class T> __device__ __forceinline__ T shared_load(const T* address) { return *address; }
template <class T> __device__ __forceinline__ void shared_store(T* address, T value) { *address = value; }

__device__ __forceinline__ uint32_t shared_address(const void* address) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// Four 8 × 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from global to shared memory, or zeros where not valid (then nothing is read); complete after cp_async_wait.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
    *static_cast<uint4*>(shared) = valid ? load16(global) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most GROUPS committed groups of this thread are in flight.
template <int GROUPS> __device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS) : "memory");
#endif
}

// c += a b of a row-major [16, 16] (or [16, 8]) and a column-major [16, 8] (or [8, 8]) fragment.
template <class T> __device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();  // there is no bf16 product before sm_80; the backend never launches it
#endif
}
template <> __device__ __forceinline__ void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();  // mma() takes m16n8k8 there
#endif
}
__device__ __forceinline__ void mma_m16n8k8_fp16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}

// Within 2 ulp; 0 for −inf.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define VF_HALF_STEP 1  // products of 8 elements in depth, fp16 alone
#endif

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// What the current device has: bytes of shared memory that a block may ask for, and multiprocessors.
struct Limits {
    int shared, multiprocessors;
};
inline Limits device_limits() {
    int device;
    Limits limits;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
    check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    return limits;
}

template <class Params>
void launch(void (*kernel)(Params), int64_t grid, int threads, size_t shared, Stream stream, const Params& params) {
    if (grid == 0) return;
    if (grid > 0x7fffffff) throw std::runtime_error("launch: more than 2^31 - 1 blocks");
    if (shared > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              "cudaFuncSetAttribute");
    }
    kernel<<<static_cast<unsigned>(grid), threads, shared, stream>>>(params);
    check(cudaGetLastError(), "launch");
}

}  // namespace vf
#endif

namespace vf {

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Element types by the number that the host passes.
enum Type : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, UINT8 = 3 };

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr int value = FLOAT32; };
template <> struct TypeOf<fp16> { static constexpr int value = FLOAT16; };
template <> struct TypeOf<bf16> { static constexpr int value = BFLOAT16; };

// Two elements of 16 bits in a register, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    union { T value[2]; uint32_t bits; } u = {{from_float<T>(low), from_float<T>(high)}};
    return u.bits;
}

// VEC neighbouring elements as floats: in accesses of 16 bytes, or of 4 where there are only 8 bytes, or one element.
template <class T, int VEC> __device__ __forceinline__ void load_vector(float (&values)[VEC], const T* address) {
    if constexpr (VEC == 1) {
        values[0] = to_float(load(address));
    } else {
        constexpr bool WHOLE = VEC * sizeof(T) % 16 == 0;
        using Piece = std::conditional_t<WHOLE, uint4, uint32_t>;
        constexpr int STEP = sizeof(Piece) / sizeof(T);
#pragma unroll
        for (int first = 0; first < VEC; first += STEP) {
            union { Piece bits; T value[STEP]; } u = {};
            if constexpr (WHOLE) u.bits = load16(address + first);
            else u.bits = load(reinterpret_cast<const uint32_t*>(address + first));
#pragma unroll
            for (int i = 0; i < STEP; i++) values[first + i] = to_float(u.value[i]);
        }
    }
}
template <class T, int VEC> __device__ __forceinline__ void store_vector(T* address, const float (&values)[VEC]) {
    if constexpr (VEC == 1) {
        store(address, from_float<T>(values[0]));
    } else {
        constexpr bool WHOLE = VEC * sizeof(T) % 16 == 0;
        using Piece = std::conditional_t<WHOLE, uint4, uint32_t>;
        constexpr int STEP = sizeof(Piece) / sizeof(T);
#pragma unroll
        for (int first = 0; first < VEC; first += STEP) {
            union { Piece bits; T value[STEP]; } u = {};
#pragma unroll
            for (int i = 0; i < STEP; i++) u.value[i] = from_float<T>(values[first + i]);
            if constexpr (WHOLE) store16(address + first, u.bits);
            else store(reinterpret_cast<uint32_t*>(address + first), u.bits);
        }
    }
}

// Element i of a vector of T or, where `wide`, of float32.
template <class T> __device__ __forceinline__ float load_either(const void* address, int64_t i, bool wide) {
    return wide ? load(static_cast<const float*>(address) + i) : to_float(load(static_cast<const T*>(address) + i));
}

// c += a b, m16n8k16 in fragments; the halves of a fragment in depth are fragments of m16n8k8.
template <class T> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef VF_HALF_STEP
    if constexpr (TypeOf<T>::value == FLOAT16) {
        mma_m16n8k8_fp16(c, a[0], a[1], b0);
        mma_m16n8k8_fp16(c, a[2], a[3], b1);
        return;
    }
#endif
    mma_m16n8k16<T>(c, a, b0, b1);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// Four floats of shared memory, at a multiple of 16 bytes; c + a · b of them.
__device__ __forceinline__ float4 shared_load4(const float* address) {
    return shared_load(reinterpret_cast<const float4*>(address));
}
__device__ __forceinline__ float dot4(const float4& a, const float4& b, float c) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, c))));
}

template <class T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

}  // namespace vf
