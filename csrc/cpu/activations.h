// Elementwise activations on a vector: float32 precision, or with LOW that of what is rounded to bfloat16 or int8.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using vit_fast::Activation;

// Of t^7 … t^0.
constexpr float GELU_C = 0.305f;
constexpr int GELU_TERMS = 8;
constexpr float GELU_LOW_C = 0.375705f;
constexpr int GELU_LOW_TERMS = 5;
constexpr float GELU_LOW_P[GELU_LOW_TERMS] = {-0.0911806684f, 0.2000518714f, 0.0837157211f, 0.1580672795f, 0.1493327026f};
constexpr float GELU_P[GELU_TERMS] = {0.03669920936f,  -0.15298838913f, 0.18571704626f, -0.03797696158f,
                                      0.12102174759f, 0.10342084617f,  0.12246681750f, 0.12163973600f};

// NaN stays NaN.
template <bool LOW>
VF_INLINE vf sigmoid(vf z) {
  const vf e = exp_in_range<LOW>(vmin(vmax(-z, splat(-87.0f)), splat(87.0f)));
  return select(z != z, z, reciprocal<LOW>(splat(1.0f) + e));
}

// z·Φ(z) = max(z, 0) − |z|·Φ(−|z|); Φ(−s) = exp(−s²/2)·p(t), t = 1/(1 + c·s), so that the error stays relative in the
// negative tail. The coefficients are a fit of our own to a relative error of 1e-7.
template <bool LOW>
VF_INLINE vf gelu(vf z) {
  constexpr int TERMS = LOW ? GELU_LOW_TERMS : GELU_TERMS;
  constexpr const float* P = LOW ? GELU_LOW_P : GELU_P;
  const vf size = vmin(float_of_bits(bits(z) & 0x7fffffff), splat(14.0f));
  const vf t = reciprocal<LOW>(fma(size, splat(LOW ? GELU_LOW_C : GELU_C), splat(1.0f)));
  vf p = splat(P[0]);
#pragma GCC unroll 16
  for (int i = 1; i < TERMS; i++) p = fma(p, t, splat(P[i]));
  p = p * (t * size) * exp_in_range<LOW>(splat(-0.5f) * size * size);
  return vmax(splat(0.0f), z) - p;  // z where it is NaN
}

template <bool LOW>
VF_INLINE vf activate(vf z, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu<LOW>(z);
    case Activation::gelu_tanh:
      return z * sigmoid<LOW>(splat(1.5957691216057308f) * z * (splat(1.0f) + splat(0.044715f) * z * z));
    case Activation::quick_gelu:
      return z * sigmoid<LOW>(splat(1.702f) * z);
    case Activation::relu:
      return max_nan(z, splat(0.0f));
    case Activation::silu:
      return z * sigmoid<LOW>(z);
    default:
      return z;
  }
}

}  // namespace
