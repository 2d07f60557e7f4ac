// Attention of one head: softmax(scale · q kᵀ) v, for a few queries at a time.
//
// k and v of a head are packed as the products read them, k transposed. A tile of MR queries then takes its scores with
// BLOCK keys, their exponentials, and the product with v; with more keys than that, a running maximum and sum (m_i, l_i)
// rescale what was added before (online softmax). Dropout takes exponentials out of the product with v, not out of the
// sum. Scores, exponentials and sums are float32, and so are the products,
// except for two words of two elements:
//   BFloat16   bfloat16 on a processor that multiplies it: q, k, v and the exponentials
//   Pair       int16, between int8 products on a processor with VNNI: q and k with a scale for each token, v with one for
//              each column of a head, exponentials in steps of 1/2047. The scales leave a sum of products below 2^31.
//
// Memory: k and v of a head once for each thread; no N×N matrix. 4·N·N·D FLOPs a head.
// Source: Dao et al., "FlashAttention", 2022.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "rows.h"
#include "tasks.h"

namespace {

using vit_fast::Attention;

constexpr int64_t BLOCK = 512;  // keys; a multiple of NR

template <class Word>
constexpr int GROUP = 1;  // elements of a word
#if defined(__AVX512BF16__)
template <>
constexpr int GROUP<BFloat16> = 2;
#endif
#if defined(__AVX512VNNI__)
template <>
constexpr int GROUP<Pair> = 2;
#endif

// The word of the exponential 1, and the largest of a value: BLOCK · ONE · ONE < 2^31.
template <class Word>
constexpr float ONE = Word::EXACT ? 2047.0f : 1.0f;

// The largest of an element of q and k: size · largest² < 2^31, in 16 bits.
inline float largest_word(int64_t size) {
  const float bound = __builtin_sqrtf(2147483000.0f / static_cast<float>(size)) - 1;
  return bound < 32767.0f ? __builtin_floorf(bound) : 32767.0f;
}

// |x|, and what makes NaN of a scale where x is not finite.
VF_INLINE void add_magnitude(vf x, vf& top, vf& finite) { top = vmax(vmax(x, -x), top), finite += x * splat(0.0f); }

VF_INLINE float step_of(float top, float words) { return top > 1e-30f ? top / words : 1.0f; }

// A row of any dtype as words, with zeros up to a whole word. Returns the scale of its elements.
template <class Word>
VF_INLINE float row_as_words(const char* x, Type type, int64_t size, float* scratch, char* words) {
  if constexpr (GROUP<Word> == 1) {
    widen_row(x, type, size, reinterpret_cast<float*>(words));
  } else if constexpr (Word::EXACT) {
    widen_row(x, type, size, scratch);
    for (int64_t i = size; i < round_up(size, VL); i++) scratch[i] = 0;
    vf top = {}, finite = {};
    for (int64_t i = 0; i < size; i += VL) add_magnitude(load(scratch + i), top, finite);
    const float step = step_of(largest(top), largest_word(size)), inverse = 1.0f / step;
    for (int64_t i = 0; i < size; i += VL) {
      const vh halves = low_halves(round_to_int(load(scratch + i) * inverse));
      memcpy(words + 2 * i, &halves, sizeof(halves));
    }
    return step + sum(finite);
  } else {
    widen_row(x, type, size, scratch);
    scratch[size] = 0;
    narrow_row(scratch, round_up(size, 2), words, Type::bfloat16);
  }
  return 1.0f;
}

template <class Word>
struct AttentionSpace {
  int64_t key_panels, head_groups, head_panels, key_groups;
  char *keys, *values, *queries, *weights, *words;
  float *row, *scores, *out, *row_max, *row_sum;
  float *query_scale, *key_scale, *value_scale;  // of int16 words alone

  static constexpr int64_t SCORES = BLOCK + 16;  // of a row; the padding keeps rows out of one set of the cache

  AttentionSpace() = default;
  AttentionSpace(Arena& arena, int64_t num_keys, int64_t head_size) {
    constexpr int G = GROUP<Word>;
    key_panels = ceil_div(num_keys, NR);
    head_groups = ceil_div(head_size, G);
    head_panels = ceil_div(head_size, NR);
    key_groups = ceil_div(num_keys, G);
    keys = arena.take<char>(key_panels * head_groups * NR * 4);
    values = arena.take<char>(head_panels * key_groups * NR * 4);
    queries = arena.take<char>(MR * query_stride());
    weights = arena.take<char>(MR * SCORES * 4);
    row = arena.take<float>(head_panels * NR + VL);
    words = arena.take<char>(2 * head_panels * NR * 4);
    if constexpr (Word::EXACT) {
      query_scale = arena.take<float>(MR);
      key_scale = arena.take<float>(key_panels * NR);
      value_scale = arena.take<float>(head_panels * NR);
    }
    scores = arena.take<float>(MR * SCORES);
    out = arena.take<float>(MR * head_panels * NR);
    row_max = arena.take<float>(MR);
    row_sum = arena.take<float>(MR);
  }
  int64_t query_stride() const { return head_groups * 4 + 64; }
};

// k transposed: [panels of NR keys][groups of the head][NR] words.
template <class Word>
void pack_keys(AttentionSpace<Word>& space, const char* k, int64_t stride, Type type, int64_t count, int64_t size) {
  const int64_t groups = space.head_groups;
  for (int64_t panel = 0; panel < space.key_panels; panel++) {
    int32_t* words = reinterpret_cast<int32_t*>(space.keys) + panel * groups * NR;
    const int64_t keys = count - panel * NR < NR ? count - panel * NR : NR;
    if (keys < NR) memset(words, 0, groups * NR * 4);
    if constexpr (Word::EXACT) memset(space.key_scale + panel * NR, 0, NR * 4);
    for (int64_t key = 0; key < keys; key++) {
      const char* from = k + (panel * NR + key) * stride;
      const float scale = row_as_words<Word>(from, type, size, space.row, space.words);
      if constexpr (Word::EXACT) space.key_scale[panel * NR + key] = scale;
      const int32_t* row = reinterpret_cast<const int32_t*>(space.words);
      for (int64_t g = 0; g < groups; g++) words[g * NR + key] = row[g];
    }
  }
}

// v: [panels of NR columns of the head][groups of keys][NR] words.
template <class Word>
void pack_values(AttentionSpace<Word>& space, const char* v, int64_t stride, Type type, int64_t count, int64_t size) {
  const int64_t width = space.head_panels * NR;
  float* row = reinterpret_cast<float*>(space.words);
  float* odd = row + width;
  memset(row, 0, 2 * width * 4);
  if constexpr (Word::EXACT) {
    float* finite = odd;
    for (int64_t column = 0; column < width; column += VL) store(space.value_scale + column, vf{});
    for (int64_t key = 0; key < count; key++) {
      widen_row(v + key * stride, type, size, row);
      for (int64_t column = 0; column < width; column += VL) {
        vf top = load(space.value_scale + column), rest = load(finite + column);
        add_magnitude(load(row + column), top, rest);
        store(space.value_scale + column, top), store(finite + column, rest);
      }
    }
    for (int64_t column = 0; column < width; column++)
      space.value_scale[column] = step_of(space.value_scale[column], ONE<Word>) + finite[column];
  }
  for (int64_t group = 0; group < space.key_groups; group++) {
    const int64_t key = group * GROUP<Word>;
    widen_row(v + key * stride, type, size, row);
    if (GROUP<Word> == 2 && key + 1 < count) {
      widen_row(v + (key + 1) * stride, type, size, odd);
    } else {
      memset(odd, 0, width * 4);
    }
    for (int64_t column = 0; column < width; column += VL) {
      const int64_t panel = column / NR;
      char* words = space.values + ((panel * space.key_groups + group) * NR + column % NR) * 4;
      if constexpr (GROUP<Word> == 1) {
        store(reinterpret_cast<float*>(words), load(row + column));
      } else if constexpr (Word::EXACT) {
        const vf inverse = splat(1.0f) / load(space.value_scale + column);
        const vi low = round_to_int(load(row + column) * inverse), high = round_to_int(load(odd + column) * inverse);
        *reinterpret_cast<vi*>(words) = (low & 0xffff) | (high << 16);
      } else {
        const vi low = __builtin_convertvector(narrow_bfloat16(load(row + column)), vi);
        const vi high = __builtin_convertvector(narrow_bfloat16(load(odd + column)), vi);
        *reinterpret_cast<vi*>(words) = low | (high << 16);
      }
    }
  }
}

// The exponentials of a row of scaled scores with `count` keys, as words; updates the row's maximum and sum (of the words,
// which are rounded, so that the weights of int16 add up to 1), and returns the factor by which what was added before has
// to be scaled. `top`: the maxima of the row's whole vectors.
template <class Word>
VF_INLINE float softmax_row(float* s, char* weights, int64_t count, vf top, float& row_max, float& row_sum) {
  constexpr bool LOW = GROUP<Word> == 2;
  const int64_t padded = round_up(count, NR);
  float m = row_max;
  bool nan = row_max != row_max;
  for (int i = 0; i < VL; i++) {
    nan |= top[i] != top[i];
    m = top[i] > m ? top[i] : m;
  }
  for (int64_t i = count / VL * VL; i < count; i++) {
    nan |= s[i] != s[i];
    m = s[i] > m ? s[i] : m;
  }
  if (nan) m = __builtin_nanf("");
  if (m == -__builtin_inff()) {  // no key with a score yet
    memset(weights, 0, padded * 4 / GROUP<Word>);
    return 1.0f;
  }
  for (int64_t i = count; i < padded; i++) s[i] = -__builtin_inff();
  const float correction = exp_of(splat(row_max - m))[0];
  vf total = {};
  for (int64_t i = 0; i < padded; i += VL) {
    // exp(−87) is nothing beside the row's maximum, whose exponential is 1.
    const vf e = exp_in_range<LOW>(vmax(load(s + i) - m, splat(-87.0f)));
    if constexpr (Word::EXACT) {
      const vi rounded = round_to_int(e * splat(ONE<Word>));
      const vh halves = low_halves(rounded);
      memcpy(weights + 2 * i, &halves, sizeof(halves));
      total += to_float(rounded);
      continue;
    }
    total += e;
    if constexpr (GROUP<Word> == 1) {
      store(reinterpret_cast<float*>(weights) + i, e);
    } else {
      store_as(weights, i, e, Type::bfloat16);
    }
  }
  row_max = m;
  row_sum = row_sum * correction + sum(total) + m * 0.0f;  // a NaN among the scores makes the row NaN
  return correction;
}

// Takes out the words of a row's exponentials that dropout does not keep; `first` is the index of the first.
template <class Word>
VF_INLINE void drop_weights(const Dropout& drop, char* weights, int64_t count, int64_t first) {
  for (int64_t i = 0; i < count; i += VL) {
    const vi keep = kept(drop, first + i);
    if constexpr (GROUP<Word> == 1) {
      vi* words = reinterpret_cast<vi*>(weights + 4 * i);
      *words = *words & keep;
    } else {
      vh* halves = reinterpret_cast<vh*>(weights + 2 * i);
      *halves = *halves & __builtin_convertvector(keep, vh);
    }
  }
}

// The biases of VL keys from `key` on; 0 behind the last key.
VF_INLINE vf biases(const Attention& a, int64_t batch, int64_t head, int64_t query, int64_t key) {
  const int64_t* stride = a.bias.stride;
  const float* row = a.bias.data + batch * stride[0] + head * stride[1] + query * stride[2];
  if (key + VL <= a.keys) return load(row + key);
  vf x = {};
  for (int64_t i = key; i < a.keys; i++) x[i - key] = row[i];
  return x;
}

template <class Word>
void attend(const Attention& a, AttentionSpace<Word>& space, int64_t batch, int64_t head, int64_t first, int64_t last) {
  const int64_t size = size_of(a.type), D = a.head_size;
  auto at = [&](const void* p, const int64_t* stride, int64_t token) {
    return static_cast<const char*>(p) + (batch * stride[0] + token * stride[1] + head * D) * size;
  };
  pack_keys(space, at(a.k, a.k_stride, 0), a.k_stride[1] * size, a.type, a.keys, D);
  pack_values(space, at(a.v, a.v_stride, 0), a.v_stride[1] * size, a.type, a.keys, D);
  const int64_t width = space.head_panels * NR;
  alignas(64) typename Word::Sum tile[MR * NR];
  const auto sums = [&](int at) {
    if constexpr (Word::EXACT) return to_float(*reinterpret_cast<const vi*>(tile + at));
    else return load(tile + at);
  };
  for (int64_t start = first; start < last; start += MR) {
    const int rows = static_cast<int>(last - start < MR ? last - start : MR);
    for (int m = 0; m < rows; m++) {
      char* query = space.queries + m * space.query_stride();
      const float scale = row_as_words<Word>(at(a.q, a.q_stride, start + m), a.type, D, space.row, query);
      if constexpr (Word::EXACT) space.query_scale[m] = scale;
      space.row_max[m] = -__builtin_inff();
      space.row_sum[m] = 0;
    }
    for (int64_t block = 0; block < a.keys; block += BLOCK) {
      const int64_t count = a.keys - block < BLOCK ? a.keys - block : BLOCK;
      vf top[MR];
      for (int m = 0; m < rows; m++) top[m] = splat(-__builtin_inff());
      for (int64_t panel = 0; panel * NR < count; panel++) {
        const char* words = space.keys + (block / NR + panel) * space.head_groups * NR * 4;
        panel_product<Word>(rows, space.queries, space.query_stride(), words, space.head_groups, tile);
        for (int m = 0; m < rows; m++)
          for (int n = 0; n < NR; n += VL) {
            vf x = sums(m * NR + n) * a.scale;
            if constexpr (Word::EXACT) x *= load(space.key_scale + block + panel * NR + n) * space.query_scale[m];
            if (a.bias.data) x += biases(a, batch, head, start + m, block + panel * NR + n);
            store(space.scores + m * space.SCORES + panel * NR + n, x);
            if (panel * NR + n + VL <= count) top[m] = max_nan(top[m], x);
          }
      }
      float correction[MR];
      for (int m = 0; m < rows; m++)
        correction[m] = softmax_row<Word>(space.scores + m * space.SCORES, space.weights + m * space.SCORES * 4, count,
                                          top[m], space.row_max[m], space.row_sum[m]);
      for (int m = 0; a.dropout.given && m < rows; m++)
        drop_weights<Word>(a.dropout, space.weights + m * space.SCORES * 4, count,
                           ((batch * a.num_heads + head) * a.queries + start + m) * a.keys + block);
      for (int64_t panel = 0; panel < space.head_panels; panel++) {
        const char* words = space.values + (panel * space.key_groups + block / GROUP<Word>) * NR * 4;
        panel_product<Word>(rows, space.weights, space.SCORES * 4, words, ceil_div(count, GROUP<Word>), tile);
        for (int m = 0; m < rows; m++)
          for (int n = 0; n < NR; n += VL) {
            float* out = space.out + m * width + panel * NR + n;
            vf x = sums(m * NR + n);
            if constexpr (Word::EXACT) x *= load(space.value_scale + panel * NR + n);
            store(out, block ? fma(load(out), splat(correction[m]), x) : x);
          }
      }
    }
    for (int m = 0; m < rows; m++) {
      float* out = space.out + m * width;
      // A row whose keys are all masked has no sum, and gives zeros.
      const float scale = a.dropout.given ? a.dropout.scale : 1.0f;
      const float inverse = space.row_sum[m] == 0 ? 0.0f : scale / space.row_sum[m];
      for (int64_t d = 0; d < width; d += VL) store(out + d, load(out + d) * inverse);
      const int64_t token = batch * a.queries + start + m;
      narrow_row(out, D, static_cast<char*>(a.out) + (token * a.num_heads * D + head * D) * size, a.type);
      if (a.lse)
        a.lse[(batch * a.num_heads + head) * a.queries + start + m] =
            space.row_max[m] + __builtin_logf(space.row_sum[m] / ONE<Word>);
    }
  }
}

template <class Word>
int64_t attention_bytes(const Attention& a) {
  Arena arena{nullptr};
  AttentionSpace<Word>(arena, a.keys, a.head_size);
  return arena.used;
}

template <class Word>
void attention_with(const Attention& a) {
  const int64_t heads = a.batch * a.num_heads, bytes = attention_bytes<Word>(a);
  // Few heads for many threads: the queries of a head are shared out too, in multiples of a tile.
  const int64_t wanted = heads ? ceil_div(3 * a.pool.slots, heads) : 1, tiles = ceil_div(a.queries, MR);
  const int64_t parts = heads >= 3 * a.pool.slots ? 1 : wanted < tiles ? wanted : tiles;
  run_tasks(a.pool, heads * parts, [&](int64_t index, int64_t slot) {
    Arena arena{static_cast<char*>(a.workspace) + slot * bytes};
    AttentionSpace<Word> space(arena, a.keys, a.head_size);
    const int64_t head = index / parts, part = index % parts;
    const int64_t first = part * tiles / parts * MR, last = (part + 1) * tiles / parts * MR;
    attend(a, space, head / a.num_heads, head % a.num_heads, first, last < a.queries ? last : a.queries);
  });
}

}  // namespace
