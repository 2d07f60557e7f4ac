// The entry of the patch embedding kernels for tests.
#include "patch_embed.cu"

// sizes: batch, channels, patch_height, patch_width, step_height, step_width, tokens, grid_width, num_prefix, width.
// strides: four of images, row of weight, bias, two of pos, three of prefix.
extern "C" int emulated_patch_embed(void* out, const void* images, const void* weight, const void* bias, const void* pos,
                                    const void* prefix, const void* pixels, const int64_t* sizes, const int64_t* strides,
                                    int64_t channels_inner, int64_t type, int64_t pixel_type, int64_t pos_wide,
                                    int64_t prefix_wide) {
    vf::PatchEmbedParams p = {};
    p.out = out, p.images = images, p.weight = weight, p.bias = bias, p.pos = pos, p.prefix = prefix;
    p.pixels = static_cast<const float*>(pixels);
    const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
    p.channels = size(1), p.patch_height = size(2), p.patch_width = size(3), p.step_height = size(4), p.step_width = size(5);
    p.tokens = size(6), p.grid_width = size(7), p.num_prefix = size(8), p.width = size(9);
    p.rows = sizes[0] * p.tokens, p.prefix_rows = sizes[0] * p.num_prefix;
    p.image_stride = strides[0], p.channel_stride = strides[1], p.height_stride = strides[2], p.width_stride = strides[3];
    p.weight_row = strides[4], p.bias_stride = strides[5], p.pos_row = strides[6], p.pos_column = strides[7];
    p.prefix_image = strides[8], p.prefix_row = strides[9], p.prefix_column = strides[10];
    p.channels_inner = channels_inner, p.pos_wide = pos_wide, p.prefix_wide = prefix_wide;
    return vf::patch_embed(p, static_cast<int>(type), static_cast<int>(pixel_type), nullptr);
}
