// Vectors of 32-bit lanes at one instruction-set level: VL lanes, and the few operations that the kernels need.
//
// Compiled once for each level (kernels.cpp): everything here has internal linkage, so that no code of a higher level
// can be linked into a lower one. Where the level has no instruction, GCC's vector extensions write it out.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(VL), aligned(1), may_alias));

#define VF_INLINE inline __attribute__((always_inline))

VF_INLINE vf splat(float x) { return x - vf{}; }
VF_INLINE vi splat_int(int32_t x) { return x - vi{}; }
VF_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
VF_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
VF_INLINE vi bits(vf x) { return reinterpret_cast<vi>(x); }
VF_INLINE vf float_of_bits(vi x) { return reinterpret_cast<vf>(x); }
VF_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
VF_INLINE vf select(vi mask, vf a, vf b) { return float_of_bits((mask & bits(a)) | (~mask & bits(b))); }

// NaN in either argument gives NaN.
VF_INLINE vf max_nan(vf a, vf b) { return select((a > b) | (a != a), a, b); }

// The larger or smaller; b where a is NaN.
VF_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
VF_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}

// a·b + c; one rounding where the level has an instruction for it.
VF_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The nearest integer, ties to even, of |x| < 2^22.
VF_INLINE vi round_to_int(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else
  const vf magic = splat(12582912.0f);  // 1.5·2^23
  return bits(x + magic) - bits(magic);
#endif
}

// 1/x of a normal x: to an ulp, or with LOW to 2^-14.
template <bool LOW = false>
VF_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return LOW ? y : y + y * fma(-x, y, splat(1.0f));
#else
  return splat(1.0f) / x;
#endif
}

VF_INLINE float sum(vf x) {
  float lanes[VL], total;
  memcpy(lanes, &x, sizeof(x));
  for (int half = VL / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  total = lanes[0];
  return total;
}
VF_INLINE float largest(vf x) {
  float lanes[VL];
  memcpy(lanes, &x, sizeof(x));
  for (int i = 1; i < VL; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
VF_INLINE float smallest(vf x) {
  float lanes[VL];
  memcpy(lanes, &x, sizeof(x));
  for (int i = 1; i < VL; i++) lanes[0] = lanes[i] < lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// p·2^n of a whole |n| < 252; 0 or inf where that leaves the range.
VF_INLINE vf scale_by_power(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vi whole = round_to_int(n), half = whole >> 1;  // in two factors, neither of which leaves the range
  return p * float_of_bits((half + 127) << 23) * float_of_bits((whole - half + 127) << 23);
#endif
}

VF_INLINE vf nearest_whole(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, 0);
#else
  return to_float(round_to_int(x));
#endif
}

// e^x of −104 ≤ x ≤ 89: to 1.5 ulp, or with LOW to 6e-6, for what is rounded to bfloat16 or int8 afterwards.
template <bool LOW = false>
VF_INLINE vf exp_in_range(vf x) {
  const vf n = nearest_whole(x * splat(1.44269504f));
  vf r = fma(n, splat(-0.693359375f), x), p;
  if constexpr (LOW) {
    r = fma(n, splat(2.12194440e-4f), r);
    p = fma(splat(4.127699e-2f), r, splat(1.6753689e-1f));
    p = fma(p, r, splat(5.0005136e-1f));
  } else {
    r = fma(n, splat(2.12194440e-4f), r);
    p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
  }
  return scale_by_power(fma(p, r * r, r) + splat(1.0f), n);
}

// e^x to 1.5 ulp; 0 below −104, +inf above 88.7, NaN for NaN.
VF_INLINE vf exp_of(vf x) {
  return select(x != x, x, exp_in_range(vmin(vmax(x, splat(-104.0f)), splat(89.0f))));
}

// The low bytes or halves of lanes that hold 0 … 255, or 0 … 65535.
VF_INLINE vb low_bytes(vi x) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector((vu)x, vb);
#endif
}
VF_INLINE vh low_halves(vi x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector((vu)x, vh);
#endif
}

// 16-bit floats.

VF_INLINE vf widen_bfloat16(vh x) { return float_of_bits(__builtin_convertvector(x, vi) << 16); }

// To nearest, ties to even; NaN stays NaN.
VF_INLINE vh narrow_bfloat16(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
  const vi b = bits(x);
  vi rounded = (vi)(((vu)b + 0x7fffu + (((vu)b >> 16) & 1u)) >> 16);
  const vi nan = x != x;
  rounded = (nan & 0x7fc0) | (~nan & rounded);
  return low_halves(rounded);
}

VF_INLINE vf widen_float16(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  // The exponent is rebased by a product, which makes normal numbers of subnormal ones; inf and NaN apart.
  const vi h = __builtin_convertvector(x, vi), magnitude = h & 0x7fff, sign = (h & 0x8000) << 16;
  vf wide = float_of_bits(magnitude << 13) * splat(5.192296858534828e33f);  // 2^112
  const vi special = magnitude >= 0x7c00;
  wide = select(special, float_of_bits((magnitude << 13) | 0x7f800000), wide);
  return float_of_bits(bits(wide) | sign);
#endif
}

VF_INLINE vh narrow_float16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vi b = bits(x), sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
  // Normal: round the 13 bits away, to even. Subnormal: an addition of 0.5 leaves the rounded bits at the low end.
  const vi normal = (vi)((vu)(magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13);
  const vi tiny = bits(float_of_bits(magnitude) + splat(0.5f)) - bits(splat(0.5f));
  vi h = magnitude < (113 << 23) ? tiny : normal;
  h = magnitude >= 0x477ff000 ? splat_int(0x7c00) : h;
  h = magnitude > 0x7f800000 ? splat_int(0x7e00) : h;
  return __builtin_convertvector((vu)(h | sign), vh);
#endif
}

}  // namespace
