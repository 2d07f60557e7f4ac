// Rows of activations: loaded from and stored to any dtype, normalised, and encoded as the words that a product reads.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using vit_fast::Type;

constexpr int64_t size_of(Type type) {
  return type == Type::float32 ? 4 : type == Type::float16 || type == Type::bfloat16 ? 2 : 1;
}

// VL elements at index i of an array, as float32.
VF_INLINE vf load_as_float(const void* p, int64_t i, Type type) {
  if (type == Type::float32) return load(static_cast<const float*>(p) + i);
  const vh half = *reinterpret_cast<const vh*>(static_cast<const uint16_t*>(p) + i);
  return type == Type::bfloat16 ? widen_bfloat16(half) : widen_float16(half);
}

VF_INLINE void store_as(void* p, int64_t i, vf x, Type type) {
  if (type == Type::float32) {
    store(static_cast<float*>(p) + i, x);
  } else {
    const vh half = type == Type::bfloat16 ? narrow_bfloat16(x) : narrow_float16(x);
    *reinterpret_cast<vh*>(static_cast<uint16_t*>(p) + i) = half;
  }
}

// What an array of the type would hold of x, as float32.
VF_INLINE vf rounded_to(Type type, vf x) {
  if (type == Type::float32) return x;
  return type == Type::bfloat16 ? widen_bfloat16(narrow_bfloat16(x)) : widen_float16(narrow_float16(x));
}

VF_INLINE float load_one(const void* p, int64_t i, Type type) {
  alignas(64) char lanes[4 * VL] = {};
  memcpy(lanes, static_cast<const char*>(p) + i * size_of(type), size_of(type));
  return load_as_float(lanes, 0, type)[0];
}

VF_INLINE void store_one(void* p, int64_t i, float x, Type type) {
  alignas(64) char lanes[4 * VL];
  store_as(lanes, 0, splat(x), type);
  memcpy(static_cast<char*>(p) + i * size_of(type), lanes, size_of(type));
}

// `count` elements of any dtype, as float32.
VF_INLINE void widen_row(const void* from, Type type, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(to + i, load_as_float(from, i, type));
  for (; i < count; i++) to[i] = load_one(from, i, type);
}

VF_INLINE void narrow_row(const float* from, int64_t count, void* to, Type type) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store_as(to, i, load(from + i), type);
  for (; i < count; i++) store_one(to, i, from[i], type);
}

struct Moments {
  float mean, rstd;
};

// Of a row, in two passes: the mean first, then the sum of squares around it. For RMSNorm the mean is 0.
VF_INLINE Moments moments(const void* x, Type type, int64_t width, float eps, bool rms) {
  vf totals[4] = {}, squares[4] = {};
  float mean = 0, rest = 0;
  const int64_t whole = width / VL * VL;
  if (!rms) {
    for (int64_t i = 0, j = 0; i < whole; i += VL, j++) totals[j & 3] += load_as_float(x, i, type);
    for (int64_t i = whole; i < width; i++) rest += load_one(x, i, type);
    mean = (sum((totals[0] + totals[1]) + (totals[2] + totals[3])) + rest) / width;
    rest = 0;
  }
  for (int64_t i = 0, j = 0; i < whole; i += VL, j++) {
    const vf centred = load_as_float(x, i, type) - mean;
    squares[j & 3] = fma(centred, centred, squares[j & 3]);
  }
  for (int64_t i = whole; i < width; i++) {
    const float centred = load_one(x, i, type) - mean;
    rest += centred * centred;
  }
  const float variance = (sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest) / width;
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// (x − mean)·rstd·weight + bias of a row, from element `start` of out on; weight and bias may be null.
VF_INLINE void normalise_row(const void* x, Type type, int64_t width, Moments m, const float* weight, const float* bias,
                             void* out, int64_t start, Type out_type) {
  int64_t i = 0;
  for (; i + VL <= width; i += VL) {
    vf y = (load_as_float(x, i, type) - m.mean) * m.rstd;
    if (weight) y = y * load(weight + i);
    if (bias) y = y + load(bias + i);
    store_as(out, start + i, y, out_type);
  }
  for (; i < width; i++) {
    float y = (load_one(x, i, type) - m.mean) * m.rstd;
    if (weight) y *= weight[i];
    if (bias) y += bias[i];
    store_one(out, start + i, y, out_type);
  }
}

}  // namespace
