// Dropout's mask by Philox4x32-10: whether an element is kept is a function of the seed and of its linear index in the
// whole dropped tensor. The bits are those of kernels/reference.py, whatever the level, the tile and the thread.
//
// A vector draws VL elements; of the four words of a counter the first is used, as tl.rand does. 20 products of 32 bits
// an element, no memory.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
#pragma once

#include "tasks.h"
#include "vec.h"

namespace {

using vit_fast::Dropout;

// The low and the high half of each lane's product with a constant.
VF_INLINE void wide_product(vu a, uint32_t b, vu& low, vu& high) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, factor = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, factor = _mm256_set1_epi64x(b);
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < VL; i++) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    low[i] = static_cast<uint32_t>(product), high[i] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// All bits of a lane are set where element first + lane · step is kept.
VF_INLINE vi kept(const Dropout& drop, int64_t first, int64_t step = 1) {
  vu c0, c1, c2 = {}, c3 = {};
  for (int i = 0; i < VL; i++) {
    const uint64_t index = static_cast<uint64_t>(first + i * step);
    c0[i] = static_cast<uint32_t>(index), c1[i] = static_cast<uint32_t>(index >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(drop.seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(drop.seed) >> 32);
  for (int round = 0; round < 10; round++) {
    vu low0, high0, low2, high2;
    wide_product(c0, 0xD2511F53u, low0, high0);
    wide_product(c2, 0xCD9E8D57u, low2, high2);
    c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const vi word = reinterpret_cast<vi>(c0);
  const vf uniform = to_float(word ^ (word >> 31)) * splat(4.6566127342e-10f);
  return uniform > splat(drop.p);
}

// x · mask / (1 − p) for the elements from `first` on.
VF_INLINE vf dropped(vf x, const Dropout& drop, int64_t first) {
  return select(kept(drop, first), x * drop.scale, vf{});
}

void keep_mask(const vit_fast::KeepMask& mask) {
  constexpr int64_t TASK = 1 << 14;
  run_tasks(mask.pool, ceil_div(mask.count, TASK), [&](int64_t task, int64_t) {
    const int64_t end = (task + 1) * TASK < mask.count ? (task + 1) * TASK : mask.count;
    for (int64_t i = task * TASK; i < end; i += VL) {
      const vb bytes = __builtin_convertvector(kept(mask.dropout, i) & 1, vb);
      if (i + VL <= end) {
        memcpy(mask.keep + i, &bytes, VL);
      } else {
        memcpy(mask.keep + i, &bytes, end - i);
      }
    }
  });
}

}  // namespace
