// A model of a CUDA GPU on a CPU, for tests: the words of csrc/cuda/device.h and of CUDA C++, under g++ on x86-64.
//
// Every CUDA thread is a fibre with a stack of its own; one fibre runs at a time, and blocks run one after another. A
// fibre gives way at barriers and at instructions of a whole warp (shuffle, ldmatrix, mma), in order or, with a seed, at
// random. A launch ends at the first fault:
//   global memory    an access outside of the elements of a registered view, or misaligned; a write to an input; two
//                    threads that write one element; a read of an output that was not written
//   shared memory    an access outside, or misaligned; a read of what was never written; a data race: two threads,
//                    one of them writing, without a barrier between
//   cp.async         a read, or a write, of what is in flight; the destination is NaN until its thread has waited
//   barriers         threads of a block at different barriers, or gone, while others wait; a warp whose lanes meet at
//                    different instructions
//   registers        a shuffle whose mask is not the whole warp
// It cannot show: speed, the rounding of tensor cores (sums here are in float32, in order of depth), ex2.approx, errors
// in PTX itself, a layout of fragments that kernel and model both have wrong, limits of launches and registers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include <math.h>  // erff, exp2f, … outside of std, as in CUDA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define VF_LINE int line = __builtin_LINE()

struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct float2 {
    float x, y;
};

namespace emulator {

struct Index {
    unsigned x;
};

// The lanes of a warp meet at `run`, which gets what each of them has given.
void warp_meets(void (*run)(void* const* lanes), void* mine, int line);
void block_barrier(int line);
void warp_barrier(unsigned mask, int line);
void global_access(const void* address, int64_t bytes, bool write, int line);
void shared_access(const void* address, int bytes, bool write, int line);
void copy_async(void* shared, const void* global, bool valid, int line);
void copy_commit();
void copy_wait(int groups);
void ldmatrix(uint32_t* registers, const void* row, bool transposed, int line);
void mma(float* c, const uint32_t* a, const uint32_t* b, int depth, float (*widen)(uint16_t), int line);
float shuffle_xor(unsigned mask, float value, int lanes, int line);
unsigned char* shared_memory();
void launch(int64_t grid, int threads, size_t shared, const std::function<void()>& kernel);
// Under torch operators there are no views, so that global memory is not checked, and a fault is an exception.
void raise_unless_called_by_a_test();

float widen_half(uint16_t bits);
uint16_t round_half(float value);

inline float widen_bfloat(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t round_bfloat(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

using std::min;

extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(VF_LINE) { emulator::block_barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, VF_LINE) { emulator::warp_barrier(mask, line); }
inline float __shfl_xor_sync(unsigned mask, float value, int lanes, VF_LINE) {
    return emulator::shuffle_xor(mask, value, lanes, line);
}

namespace vf {

struct fp16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};
using Stream = void*;

inline float to_float(float x) { return x; }
inline float to_float(fp16 x) { return emulator::widen_half(x.bits); }
inline float to_float(bf16 x) { return emulator::widen_bfloat(x.bits); }
inline float to_float(uint8_t x) { return x; }
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline fp16 from_float<fp16>(float x) { return {emulator::round_half(x)}; }
template <> inline bf16 from_float<bf16>(float x) { return {emulator::round_bfloat(x)}; }

template <class T> T load(const T* address, VF_LINE) {
    emulator::global_access(address, sizeof(T), false, line);
    return *address;
}
template <class T> void store(T* address, T value, VF_LINE) {
    emulator::global_access(address, sizeof(T), true, line);
    *address = value;
}
inline uint4 load16(const void* address, VF_LINE) {
    emulator::global_access(address, 16, false, line);
    return *static_cast<const uint4*>(address);
}
inline void store16(void* address, uint4 value, VF_LINE) {
    emulator::global_access(address, 16, true, line);
    *static_cast<uint4*>(address) = value;
}
inline unsigned char* shared_memory() { return emulator::shared_memory(); }
template <class T> T shared_load(const T* address, VF_LINE) {
    emulator::shared_access(address, sizeof(T), false, line);
    return *address;
}
template <class T> void shared_store(T* address, T value, VF_LINE) {
    emulator::shared_access(address, sizeof(T), true, line);
    *address = value;
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, VF_LINE) { emulator::ldmatrix(r, row, false, line); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, VF_LINE) { emulator::ldmatrix(r, row, true, line); }
inline void cp_async16(void* shared, const void* global, bool valid, VF_LINE) {
    emulator::copy_async(shared, global, valid, line);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int GROUPS> void cp_async_wait() { emulator::copy_wait(GROUPS); }

template <class T> void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VF_LINE) {
    const uint32_t b[2] = {b0, b1};
    constexpr bool half = std::is_same_v<T, fp16>;
    emulator::mma(c, a, b, 16, half ? emulator::widen_half : emulator::widen_bfloat, line);
}
inline void mma_m16n8k8_fp16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0, VF_LINE) {
    const uint32_t a[2] = {a0, a1};
    emulator::mma(c, a, &b0, 8, emulator::widen_half, line);
}
inline float exp2_approx(float x) { return std::exp2(x); }

#if defined(VF_EMULATED_ARCH) && VF_EMULATED_ARCH < 800
#define VF_HALF_STEP 1
#endif

struct Limits {
    int shared, multiprocessors;
};
Limits device_limits();

template <class Params>
void launch(void (*kernel)(Params), int64_t grid, int threads, size_t shared, Stream, const Params& params) {
    emulator::launch(grid, threads, shared, [=] { kernel(params); });
    emulator::raise_unless_called_by_a_test();
}

}  // namespace vf
