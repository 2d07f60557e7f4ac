// Matrix products: tiles of MR rows × NR columns of a row-major activation and a packed weight.
//
// A packed weight [N, K] is [N/NR, K/G, NR, G]: panels of NR columns, and in each, for every group of G consecutive k
// that fill 32 bits, NR groups side by side (`packing.py` makes it). One step of the product broadcasts a group of the
// activation and multiplies it with NR groups of the weight. What differs between precisions is the word of a group:
//
//   Float      1 float32            fused multiply-add
//   BFloat16   2 bfloat16           vdpbf16ps                    AVX512-BF16
//   Byte       4 uint8 · int8       vpdpbusd                     AVX512-VNNI
//   Pair       2 int16              vpdpwssd                     AVX512-VNNI; attention between int8 products
//   Short      2 int16              vpmaddwd                     AVX2; a panel of int8 weights is widened to it
//
// Weights of a dtype that the level cannot multiply are widened, a panel at a time, to Float or Short. Sums are taken in
// the order of k whatever the tile, so that a row's result does not depend on the rows beside it.
#pragma once

#include "vec.h"

namespace {

constexpr int NR = 32;  // columns of a panel; packing.py has the same number
constexpr int COLUMNS = 2 * VL;  // of one pass over a panel: two vectors
#if defined(__AVX512F__)
constexpr int MR = 12;  // rows of a tile: 24 of 32 registers hold sums
#else
constexpr int MR = 6;  // 12 of 16
#endif

struct Float {
  using Sum = float;
  static constexpr bool EXACT = false;
  using Vector = vf;
  static VF_INLINE vf word(const char* p) { return splat(*reinterpret_cast<const float*>(p)); }
  static VF_INLINE vf words(const char* p) { return *reinterpret_cast<const vf*>(p); }
  static VF_INLINE vf step(vf sum, vf a, vf b) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Sum = float;
  static constexpr bool EXACT = false;
  using Vector = vf;
  static VF_INLINE vi word(const char* p) { return splat_int(*reinterpret_cast<const int32_t*>(p)); }
  static VF_INLINE vi words(const char* p) { return *reinterpret_cast<const vi*>(p); }
  static VF_INLINE vf step(vf sum, vi a, vi b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Byte {
  using Sum = int32_t;
  static constexpr bool EXACT = true;
  using Vector = vi;
  static VF_INLINE vi word(const char* p) { return splat_int(*reinterpret_cast<const int32_t*>(p)); }
  static VF_INLINE vi words(const char* p) { return *reinterpret_cast<const vi*>(p); }
  static VF_INLINE vi step(vi sum, vi a, vi b) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
};
struct Pair : Byte {
  static VF_INLINE vi step(vi sum, vi a, vi b) { return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
};
#elif defined(__AVX2__)
struct Short {
  using Sum = int32_t;
  static constexpr bool EXACT = true;
  using Vector = vi;
  static VF_INLINE vi word(const char* p) { return splat_int(*reinterpret_cast<const int32_t*>(p)); }
  static VF_INLINE vi words(const char* p) { return *reinterpret_cast<const vi*>(p); }
#if defined(__AVX512BW__)
  static VF_INLINE vi step(vi sum, vi a, vi b) { return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#else
  static VF_INLINE vi step(vi sum, vi a, vi b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif
};
#endif

// Groups that are summed in registers before they are added to the sums before: 3072 terms one after the other would
// err three times as much as PyTorch's products do. Integers are exact.
constexpr int64_t SUMMED = 256;

// tile[ROWS][NR] (+)= a[ROWS][groups] · b[groups][NR], two vectors of columns. a_stride: bytes of a row.
template <class Word, int ROWS, bool ADD>
VF_INLINE void sum_groups(const char* a, int64_t a_stride, const char* b, int64_t groups, typename Word::Sum* tile) {
  typename Word::Vector sums[ROWS][2] = {};
  for (int64_t k = 0; k < groups; k++) {
    const auto b0 = Word::words(b), b1 = Word::words(b + 4 * VL);
    b += 4 * NR;
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++) {
      const auto x = Word::word(a + m * a_stride + 4 * k);
      sums[m][0] = Word::step(sums[m][0], x, b0);
      sums[m][1] = Word::step(sums[m][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; m++) {
    auto* out = reinterpret_cast<typename Word::Vector*>(tile + m * NR);
    out[0] = ADD ? out[0] + sums[m][0] : sums[m][0];
    out[1] = ADD ? out[1] + sums[m][1] : sums[m][1];
  }
}

template <class Word, int ROWS>
void tile_product(const char* a, int64_t a_stride, const char* b, int64_t groups, typename Word::Sum* tile) {
  const int64_t first = !Word::EXACT && groups > SUMMED ? SUMMED : groups;
  sum_groups<Word, ROWS, false>(a, a_stride, b, first, tile);
  for (int64_t k = first; k < groups; k += SUMMED) {
    const int64_t count = groups - k < SUMMED ? groups - k : SUMMED;
    sum_groups<Word, ROWS, true>(a + 4 * k, a_stride, b + 4 * NR * k, count, tile);
  }
}

template <class Word>
using TileProduct = void (*)(const char*, int64_t, const char*, int64_t, typename Word::Sum*);

template <class Word, int ROWS = MR>
struct Tiles {
  static TileProduct<Word> of(int rows) {
    return rows == ROWS ? tile_product<Word, ROWS> : Tiles<Word, ROWS - 1>::of(rows);
  }
};
template <class Word>
struct Tiles<Word, 0> {
  static TileProduct<Word> of(int) { return nullptr; }
};

// a[rows ≤ MR][groups] times a panel of NR columns, into tile[MR][NR].
template <class Word>
VF_INLINE void panel_product(int rows, const char* a, int64_t a_stride, const char* b, int64_t groups,
                             typename Word::Sum* tile) {
  const auto product = Tiles<Word>::of(rows);
  for (int column = 0; column < NR; column += COLUMNS) product(a, a_stride, b + 4 * column, groups, tile + column);
}

}  // namespace
