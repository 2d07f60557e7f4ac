// Patch embedding: out = [prefix | conv(images, weight, stride) + bias + pos_embed], an implicit GEMM.
//
// images [B, in, H, W], any strides, uint8, float32 or the dtype of the weight; weight [C, K] float32, bf16 or fp16, K = in·P·Q in the
// order of the walk, contiguous; bias [C], in that dtype; pos_embed [N, C] and prefix [1 or B, K', C], each in that dtype or
// float32, any strides; out [B, K' + N, C] contiguous. Pixels become (x − shift)·scale of their channel in float32 where a
// table is given, and are rounded to the weight's dtype; products are accumulated in float32, bias and pos_embed are added
// there, and the sum is rounded once. As in kernels/patch_embed.py.
//
// Row m is a patch (image, gy, gx), depth k the pixel (c, i, j), or (i, j, c) where channels lie innermost, found by index
// arithmetic: no im2col in memory, patches may overlap or leave gaps. A block of four warps computes 64 patches × 64
// channels in steps of 64 bytes in depth: tiles go through registers into one of two stages of shared memory, so that the
// loads of the next step run while this one is multiplied. Rows there are padded by 16 bytes (no bank conflicts). In 16 bits
// each warp multiplies 32 × 32 on tensor cores (on sm_75 fp16 alone, by m16n8k8); in float32 each thread multiplies 8 × 4
// with fused multiply-adds, not in tf32, and sums a step before it adds it, which keeps the error of long sums small.
// Blocks after the last tile copy 64 prefix rows × 64 channels.
// 2·B·N·C·K FLOP; reads the images C / 64 times, mostly out of the L2 cache, and writes B·(K' + N)·C elements.
// Limits: fewer than 2^31 patches and blocks.
#include "device.h"

namespace vf {

struct PatchEmbedParams {
    void* out;
    const void *images, *weight, *bias, *pos, *prefix;  // the last three may be null
    const float* pixels;                                // [2, in]: shift and scale of a channel, or null
    int64_t image_stride, channel_stride, height_stride, width_stride;
    int64_t weight_row, bias_stride, pos_row, pos_column, prefix_image, prefix_row, prefix_column;
    int64_t rows, prefix_rows;  // patches and prefix rows of all images
    int tokens, grid_width, num_prefix, width, channels, patch_height, patch_width, step_height, step_width;
    bool channels_inner, pos_wide, prefix_wide;  // wide: float32
};

constexpr int PATCH_TILE = 64, PATCH_THREADS = 128;
template <class T> struct PatchSizes {
    static constexpr int DEPTH = 64 / sizeof(T), ROW = DEPTH + 16 / sizeof(T);  // elements of a row in shared memory
    static constexpr int STAGE = 2 * PATCH_TILE * ROW;                          // patches, then channels
    static constexpr int LOADS = PATCH_TILE * DEPTH / PATCH_THREADS;            // elements a thread loads of each
    static constexpr size_t SHARED = PATCH_TILE * sizeof(int64_t) + 2 * STAGE * sizeof(T);
};

template <class T, class Pixel> struct PatchTiles : PatchSizes<T> {
    using PatchSizes<T>::DEPTH, PatchSizes<T>::ROW, PatchSizes<T>::LOADS;
    T patches[LOADS], channels[LOADS];

    // A thread has one depth of both tiles, and every fourth row (of float32 every eighth).
    __device__ __forceinline__ void read(
        const PatchEmbedParams& p, const int64_t* corners, int64_t first_row, int first_column, int first_depth, int depth) {
        const int k = first_depth + threadIdx.x % DEPTH;
        int c, i, j;
        if (p.channels_inner) {
            c = k % p.channels, j = k / p.channels % p.patch_width, i = k / (p.channels * p.patch_width);
        } else {
            j = k % p.patch_width, i = k / p.patch_width % p.patch_height, c = k / (p.patch_width * p.patch_height);
        }
        const Pixel* pixel = static_cast<const Pixel*>(p.images) + c * p.channel_stride + i * p.height_stride + j * p.width_stride;
        const T* weight = static_cast<const T*>(p.weight) + k;
        float shift = 0.0f, scale = 1.0f;
        if (p.pixels && k < depth) shift = load(p.pixels + c), scale = load(p.pixels + p.channels + c);
#pragma unroll
        for (int n = 0; n < LOADS; n++) {
            const int row = threadIdx.x / DEPTH + n * (PATCH_THREADS / DEPTH);
            float x = 0.0f;
            if (k < depth && first_row + row < p.rows) x = (to_float(load(pixel + shared_load(corners + row))) - shift) * scale;
            patches[n] = from_float<T>(x);
            const bool inside = k < depth && first_column + row < p.width;
            channels[n] = inside ? load(weight + (first_column + row) * p.weight_row) : from_float<T>(0.0f);
        }
    }

    __device__ __forceinline__ void write(T* stage) const {
#pragma unroll
        for (int n = 0; n < LOADS; n++) {
            const int row = threadIdx.x / DEPTH + n * (PATCH_THREADS / DEPTH);
            T* place = stage + row * ROW + threadIdx.x % DEPTH;
            shared_store(place, patches[n]);
            shared_store(place + PATCH_TILE * ROW, channels[n]);
        }
    }
};

// A thread's part of the sums of a tile of 64 × 64, by mma: four rows × eight columns of its warp's 32 × 32.
template <class T> struct PatchSums {
    static constexpr int ROWS = 4, COLUMNS = 8;
    float acc[2][4][4] = {};

    static __device__ __forceinline__ int row(int i) { return threadIdx.x / 64 * 32 + i * 8 + threadIdx.x % 32 / 4; }
    static __device__ __forceinline__ int column(int j) {
        return threadIdx.x / 32 % 2 * 32 + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
    }
    __device__ __forceinline__ float sum(int i, int j) const { return acc[i / 2][j / 2][i % 2 * 2 + j % 2]; }

    __device__ __forceinline__ void multiply(const T* patches, const T* channels) {
        constexpr int ROW = PatchSizes<T>::ROW;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
#pragma unroll
        for (int k = 0; k < PatchSizes<T>::DEPTH; k += 16) {
            uint32_t a[2][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ldmatrix_x4(a[i], patches + (warp_row + i * 16 + lane % 16) * ROW + k + lane / 16 * 8);
                ldmatrix_x4(b[i], channels + (warp_column + i * 16 + lane / 16 * 8 + lane % 8) * ROW + k + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) mma<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
};

// In float32: eight rows × four columns, 16 threads side by side.
template <> struct PatchSums<float> {
    static constexpr int ROWS = 8, COLUMNS = 4;
    float acc[ROWS][COLUMNS] = {};

    static __device__ __forceinline__ int row(int i) { return threadIdx.x / 16 + i * 8; }
    static __device__ __forceinline__ int column(int j) { return threadIdx.x % 16 + j * 16; }
    __device__ __forceinline__ float sum(int i, int j) const { return acc[i][j]; }

    __device__ __forceinline__ void multiply(const float* patches, const float* channels) {
        constexpr int ROW = PatchSizes<float>::ROW;
        float step[ROWS][COLUMNS] = {};
#pragma unroll
        for (int k = 0; k < PatchSizes<float>::DEPTH; k += 4) {
            float4 b[COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) b[j] = shared_load4(channels + column(j) * ROW + k);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const float4 a = shared_load4(patches + row(i) * ROW + k);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) step[i][j] = dot4(a, b[j], step[i][j]);
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) acc[i][j] += step[i][j];
        }
    }
};

template <class T>
__device__ __forceinline__ void copy_prefix(const PatchEmbedParams& p, int64_t first_row, int first_column) {
    for (int i = threadIdx.x; i < PATCH_TILE * PATCH_TILE; i += PATCH_THREADS) {
        const int64_t row = first_row + i / PATCH_TILE;
        const int column = first_column + i % PATCH_TILE;
        if (row >= p.prefix_rows || column >= p.width) continue;
        const int64_t image = row / p.num_prefix, token = row % p.num_prefix;
        const int64_t from = image * p.prefix_image + token * p.prefix_row + column * p.prefix_column;
        const int64_t to = (image * (p.num_prefix + p.tokens) + token) * p.width + column;
        store(static_cast<T*>(p.out) + to, from_float<T>(load_either<T>(p.prefix, from, p.prefix_wide)));
    }
}

template <class T, class Pixel>
__global__ void __launch_bounds__(PATCH_THREADS) patch_embed_fwd_kernel(const PatchEmbedParams p) {
    using Sizes = PatchSizes<T>;
    const int column_tiles = ceil_div(p.width, PATCH_TILE), depth = p.channels * p.patch_height * p.patch_width;
    const int64_t row_tile = blockIdx.x / column_tiles, row_tiles = ceil_div<int64_t>(p.rows, PATCH_TILE);
    const int first_column = static_cast<int>(blockIdx.x % column_tiles) * PATCH_TILE;
    if (row_tile >= row_tiles) {
        copy_prefix<T>(p, (row_tile - row_tiles) * PATCH_TILE, first_column);
        return;
    }
    const int64_t first_row = row_tile * PATCH_TILE;
    int64_t* corners = reinterpret_cast<int64_t*>(shared_memory());
    T* stages = reinterpret_cast<T*>(corners + PATCH_TILE);
    if (threadIdx.x < PATCH_TILE) {
        const int64_t row = first_row + threadIdx.x, image = row / p.tokens, token = row % p.tokens;
        const int64_t y = token / p.grid_width * p.step_height, x = token % p.grid_width * p.step_width;
        shared_store(corners + threadIdx.x, image * p.image_stride + y * p.height_stride + x * p.width_stride);
    }
    __syncthreads();

    PatchTiles<T, Pixel> tiles;
    tiles.read(p, corners, first_row, first_column, 0, depth);
    PatchSums<T> sums;
    for (int first = 0, stage = 0; first < depth; first += Sizes::DEPTH, stage ^= 1) {
        T* patches = stages + stage * Sizes::STAGE;
        tiles.write(patches);
        __syncthreads();  // this stage is written, and the other is no longer read
        if (first + Sizes::DEPTH < depth) tiles.read(p, corners, first_row, first_column, first + Sizes::DEPTH, depth);
        sums.multiply(patches, patches + PATCH_TILE * Sizes::ROW);
    }

#pragma unroll
    for (int i = 0; i < sums.ROWS; i++) {
        const int64_t row = first_row + sums.row(i);
        if (row >= p.rows) continue;
        const int64_t image = row / p.tokens, token = row % p.tokens;
        T* out = static_cast<T*>(p.out) + (image * (p.num_prefix + p.tokens) + p.num_prefix + token) * p.width;
#pragma unroll
        for (int j = 0; j < sums.COLUMNS; j++) {
            const int column = first_column + sums.column(j);
            if (column >= p.width) continue;
            float x = sums.sum(i, j);
            if (p.bias) x += to_float(load(static_cast<const T*>(p.bias) + column * p.bias_stride));
            if (p.pos) x += load_either<T>(p.pos, token * p.pos_row + column * p.pos_column, p.pos_wide);
            store(out + column, from_float<T>(x));
        }
    }
}

template <class T> bool launch_patch_embed(const PatchEmbedParams& p, int pixel_type, Stream stream) {
    const int64_t row_tiles = ceil_div<int64_t>(p.rows, PATCH_TILE) + ceil_div<int64_t>(p.prefix_rows, PATCH_TILE);
    const int64_t grid = row_tiles * ceil_div(p.width, PATCH_TILE);
    constexpr size_t SHARED = PatchSizes<T>::SHARED;
    if (pixel_type == UINT8) launch(patch_embed_fwd_kernel<T, uint8_t>, grid, PATCH_THREADS, SHARED, stream, p);
    else if (pixel_type == FLOAT32) launch(patch_embed_fwd_kernel<T, float>, grid, PATCH_THREADS, SHARED, stream, p);
    else if (pixel_type == TypeOf<T>::value) launch(patch_embed_fwd_kernel<T, T>, grid, PATCH_THREADS, SHARED, stream, p);
    else return false;
    return true;
}

// Launches the kernel of a type of weights and one of pixels; false where there is none.
inline bool patch_embed(const PatchEmbedParams& p, int type, int pixel_type, Stream stream) {
    if (type == BFLOAT16) return launch_patch_embed<bf16>(p, pixel_type, stream);
    if (type == FLOAT16) return launch_patch_embed<fp16>(p, pixel_type, stream);
    if (type == FLOAT32) return launch_patch_embed<float>(p, pixel_type, stream);
    return false;
}

}  // namespace vf

#ifndef VF_KERNELS_ONLY
#include "operators.h"

namespace {

using namespace vf;

// weight [C, K]; patch: its height and width, and the steps of the grid; grid_width patches in a row.
void patch_embed_operator(Tensor out, Tensor images, Tensor weight, MaybeTensor bias, MaybeTensor pos, MaybeTensor prefix,
                          MaybeTensor pixels, int64_t patch_height, int64_t patch_width, int64_t step_height,
                          int64_t step_width, int64_t grid_width, bool channels_inner) {
    PatchEmbedParams p = {};
    const int64_t batch = images.size(0);
    p.num_prefix = prefix ? static_cast<int>(prefix->size(1)) : 0;
    p.tokens = static_cast<int>(out.size(1)) - p.num_prefix;
    p.rows = batch * p.tokens, p.prefix_rows = batch * p.num_prefix;
    STD_TORCH_CHECK(weight.stride(1) == 1 && weight.size(1) == images.size(1) * patch_height * patch_width &&
                        p.rows > 0 && p.rows < int64_t{1} << 31 && type_of(out) == type_of(weight),
                    "vit_fast_cuda::patch_embed: arguments");
    p.out = data(out), p.images = data(images), p.weight = data(weight), p.bias = data(bias), p.pos = data(pos);
    p.prefix = p.num_prefix ? data(prefix) : nullptr, p.pixels = data<float>(pixels);
    p.image_stride = images.stride(0), p.channel_stride = images.stride(1);
    p.height_stride = images.stride(2), p.width_stride = images.stride(3);
    p.weight_row = weight.stride(0), p.bias_stride = bias ? bias->stride(0) : 0;
    if (pos) p.pos_row = pos->stride(1), p.pos_column = pos->stride(2), p.pos_wide = type_of(*pos) == FLOAT32;
    if (prefix) {
        p.prefix_image = prefix->size(0) > 1 ? prefix->stride(0) : 0;
        p.prefix_row = prefix->stride(1), p.prefix_column = prefix->stride(2), p.prefix_wide = type_of(*prefix) == FLOAT32;
    }
    p.grid_width = static_cast<int>(grid_width), p.width = static_cast<int>(weight.size(0));
    p.channels = static_cast<int>(images.size(1)), p.patch_height = static_cast<int>(patch_height);
    p.patch_width = static_cast<int>(patch_width), p.step_height = static_cast<int>(step_height);
    p.step_width = static_cast<int>(step_width), p.channels_inner = channels_inner;
    const OnDevice device(images);
    STD_TORCH_CHECK(patch_embed(p, type_of(weight), type_of(images), device.stream), "vit_fast_cuda::patch_embed: dtypes");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vit_fast_cuda, VF_DISPATCH_KEY, m) { m.impl("patch_embed", TORCH_BOX(&patch_embed_operator)); }
#endif
