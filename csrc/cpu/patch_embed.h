// Patch embedding: each patch of an image times the weight, plus bias and position embedding; prefix tokens in front.
//
// The rows of the product are gathered from the pixels, a task's at a time: no im2col matrix. uint8 pixels are divided
// by 255, then mean and std apply. Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
#pragma once

#include "linear.h"

namespace {

VF_INLINE float pixel_at(const PatchEmbed& p, int64_t offset) {
  if (p.type == Type::uint8) return static_cast<const uint8_t*>(p.images)[offset] / 255.0f;
  return load_one(p.images, offset, p.type);
}

void gather_patch(const PatchEmbed& p, int64_t row, float* out) {
  const int64_t patches = p.grid[0] * p.grid[1], image = row / patches, patch = row % patches;
  const int64_t top = patch / p.grid[1] * p.step[0], left = patch % p.grid[1] * p.step[1];
  for (int64_t c = 0; c < p.channels; c++) {
    const float mean = p.mean ? p.mean[c] : 0.0f, spread = p.std ? p.std[c] : 1.0f;
    for (int64_t y = 0; y < p.patch[0]; y++) {
      const int64_t start = image * p.stride[0] + c * p.stride[1] + (top + y) * p.stride[2] + left * p.stride[3];
      if (p.stride[3] == 1 && p.type != Type::uint8) {
        widen_row(static_cast<const char*>(p.images) + start * size_of(p.type), p.type, p.patch[1], out);
      } else {
        for (int64_t x = 0; x < p.patch[1]; x++) out[x] = pixel_at(p, start + x * p.stride[3]);
      }
      if (p.mean || p.std)
        for (int64_t x = 0; x < p.patch[1]; x++) out[x] = (out[x] - mean) / spread;
      out += p.patch[1];
    }
  }
}

int64_t patch_embed_workspace(const PatchEmbed& p) { return weight_workspace(p.weight, p.pool); }

void patch_embed(const PatchEmbed& p) {
  const int64_t patches = p.grid[0] * p.grid[1], features = p.weight.features, tokens = p.prefix + patches;
  const int64_t element = size_of(p.out_type);
  auto out_row = [&](int64_t image, int64_t token) { return (image * tokens + token) * features; };
  auto write = [&](int64_t row, int64_t n, const vf* values) {
    const int64_t image = row / patches, patch = row % patches, count = features - n < NR ? features - n : NR;
    vf results[NR / VL];
    for (int i = 0; i < NR / VL; i++) results[i] = values[i];
    if (p.pos_embed) {
      float* lanes = reinterpret_cast<float*>(results);
      const float* position = p.pos_embed + patch * features + n;
      for (int64_t i = 0; i < count; i++) lanes[i] += position[i];
    }
    write_values(p.out, out_row(image, p.prefix + patch) + n, count, results, p.out_type);
  };
  for (int64_t image = 0; image < p.batch; image++)
    if (p.prefix)
      memcpy(static_cast<char*>(p.out) + out_row(image, 0) * element,
             static_cast<const char*>(p.prefix_tokens) + image * p.prefix_stride * element,
             p.prefix * features * element);
  with_product_type(p.weight.type, [&]<Type TYPE>() {
    packed_product<TYPE>(p.pool, p.workspace, p.weight, false, p.batch * patches,
                         [&](int64_t row, float* out) { gather_patch(p, row, out); }, write);
  });
}

}  // namespace
