// Elementwise activations on a vector.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using vit_fast::Activation;

// Of t^7 … t^0.
constexpr float GELU_C = 0.305f;
constexpr int GELU_TERMS = 8;
constexpr float GELU_P[GELU_TERMS] = {0.03669920936f,  -0.15298838913f, 0.18571704626f, -0.03797696158f,
                                      0.12102174759f, 0.10342084617f,  0.12246681750f, 0.12163973600f};

VF_INLINE vf sigmoid(vf z) { return splat(1.0f) / (splat(1.0f) + exp_of(-z)); }

// z·Φ(z) = max(z, 0) − |z|·Φ(−|z|); Φ(−s) = exp(−s²/2)·p(t), t = 1/(1 + c·s), so that the error stays relative in the
// negative tail. The coefficients are a fit of our own to a relative error of 1e-7.
VF_INLINE vf gelu(vf z) {
  const vf size = vmin(max_nan(z, -z), splat(14.0f));
  const vf t = reciprocal(fma(size, splat(GELU_C), splat(1.0f)));
  vf p = splat(GELU_P[0]);
#pragma GCC unroll 16
  for (int i = 1; i < GELU_TERMS; i++) p = fma(p, t, splat(GELU_P[i]));
  p = p * t * size * exp_of(splat(-0.5f) * size * size);
  return select(z != z, z, vmax(z, splat(0.0f)) - p);
}

VF_INLINE vf activate(vf z, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu(z);
    case Activation::gelu_tanh:
      return z * sigmoid(splat(1.5957691216057308f) * z * (splat(1.0f) + splat(0.044715f) * z * z));
    case Activation::quick_gelu:
      return z * sigmoid(splat(1.702f) * z);
    case Activation::relu:
      return max_nan(z, splat(0.0f));
    default:
      return z;
  }
}

}  // namespace
