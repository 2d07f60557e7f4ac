// A stack of pre-norm transformer blocks on packed weights, for inference.
//
//     x = x + proj(attention(qkv(LN1(x))))
//     x = x + fc2(act(fc1(LN2(x))))
//
// The parameters of the norms (LayerNorm or RMSNorm, also before proj and fc2) and LayerScale are folded into the
// weights; q and k may be normalised and turned (rotary embedding) where they are projected. x, the sums, the
// statistics, q, k, v and the scores are float32. Everything but attention works on rows alone: a task takes a few rows
// from the end of attention through proj, LN2, fc1, fc2, the next block's LN1 and qkv, so that a block has two parallel
// regions. A few images go through the whole stack, then the next ones: what is kept between two regions stays small
// enough for the caches. What a product reads is encoded as its words: float32 or bfloat16 rows; for int8 weights, uint8
// with a scale and a zero point for each row, taken from its smallest and largest value (asymmetric, dynamic), after
// each channel has got the gain g whose inverse is in the weight's column (packing.input_gain):
//
//     g·x ≈ s·(q − z),  x·w ≈ s·s_w·(q·w_q − z·Σ w_q)
//
// Weights: read once for each task. FLOPs: 2·rows·(4C² + 2·C·F) and attention's 4·B·N·N·C a block.
#pragma once

#include "activations.h"
#include "attention.h"
#include "gemm.h"
#include "rows.h"
#include "tasks.h"

namespace {

using vit_fast::PackedBlock;
using vit_fast::PackedLinear;
using vit_fast::PreparedBlocks;


// Rows as the words of a product, and what turns integers back into values.
struct Encoded {
  char* words;
  int64_t stride;  // bytes
  float* scale;    // of a row
  int32_t* zero;
};

// How weights of a type are multiplied at this level: Word, and how a row becomes words.
template <Type TYPE>
struct Products {
  using Word = Float;
  static constexpr int GROUP = 1;
  static constexpr bool WIDENED = TYPE != Type::float32;  // a panel at a time
};
#if defined(__AVX512BF16__)
template <>
struct Products<Type::bfloat16> {
  using Word = BFloat16;
  static constexpr int GROUP = 2;
  static constexpr bool WIDENED = false;
};
#endif
#if defined(__AVX512VNNI__)
template <>
struct Products<Type::int8> {
  using Word = Byte;
  static constexpr int GROUP = 4;
  static constexpr bool WIDENED = false;
};
#elif defined(__AVX2__)
template <>
struct Products<Type::int8> {
  using Word = Short;
  static constexpr int GROUP = 2;
  static constexpr bool WIDENED = true;
};
#endif

// Elements of a group of a packed weight (kernels/packing.py); float16 is always widened, and so has no pairs.
constexpr int stored_group(Type type) { return type == Type::int8 ? 4 : type == Type::bfloat16 ? 2 : 1; }

// A row of float32 as words; `gain`: of int8 words; `padded`: elements that a product reads, the last of them 0.
template <Type TYPE>
VF_INLINE void encode_row(const float* x, const float* gain, int64_t width, int64_t padded, const Encoded& to,
                          int64_t row) {
  char* words = to.words + row * to.stride;
  if constexpr (TYPE != Type::int8) {
    constexpr Type as = Products<TYPE>::GROUP == 2 ? Type::bfloat16 : Type::float32;
    narrow_row(x, width, words, as);
    memset(words + width * size_of(as), 0, (padded - width) * size_of(as));
  } else {
    vf low = {}, high = {}, finite = {};  // the range includes 0, which padding and zero activations keep exactly
    int64_t i = 0;
    float lowest = 0, highest = 0, not_finite = 0;
    for (; i + VL <= width; i += VL) {
      const vf v = load(x + i) * load(gain + i);
      low = vmin(v, low), high = vmax(v, high), finite += v * splat(0.0f);
    }
    for (; i < width; i++) {
      const float v = x[i] * gain[i];
      lowest = v < lowest ? v : lowest, highest = v > highest ? v : highest, not_finite += v * 0.0f;
    }
    lowest = smallest(vmin(low, splat(lowest))), highest = largest(vmax(high, splat(highest)));
    not_finite += sum(finite);  // NaN makes the scale, and with it the whole row of the product, NaN
    const float range = highest - lowest, step = range > 1e-30f ? range / 255.0f : 1.0f, inverse = 1.0f / step;
    const float zero = __builtin_rintf(-lowest * inverse);
    to.scale[row] = step + not_finite;
    to.zero[row] = static_cast<int32_t>(zero);
    const auto put = [&](vf v, int64_t count) __attribute__((always_inline)) {
      // Rounding may lead half a step out of the range.
      const vi q = round_to_int(vmin(vmax(fma(v, splat(inverse), splat(zero)), splat(0.0f)), splat(255.0f)));
      if constexpr (Products<TYPE>::GROUP == 4) {
        const vb bytes = low_bytes(q);
        memcpy(words + i, &bytes, count);
      } else if constexpr (Products<TYPE>::GROUP == 2) {
        const vh shorts = low_halves(q);
        memcpy(words + 2 * i, &shorts, 2 * count);
      } else {
        const vf floats = to_float(q);
        memcpy(words + 4 * i, &floats, 4 * count);
      }
    };
    for (i = 0; i + VL <= width; i += VL) put(load(x + i) * load(gain + i), VL);  // a size known to the compiler
    for (; i < padded; i += VL) {
      vf v;
      for (int j = 0; j < VL; j++) v[j] = i + j < width ? x[i + j] * gain[i + j] : 0.0f;
      put(v, padded - i < VL ? padded - i : VL);
    }
  }
}

// A panel of a packed weight as the words that the level multiplies.
template <Type TYPE>
VF_INLINE void widen_panel(const char* panel, int64_t groups, char* to) {
  constexpr int G = stored_group(TYPE);
  for (int64_t k = 0; k < groups; k++) {
    for (int n = 0; n < NR; n += VL) {
      if constexpr (TYPE == Type::float16) {
        store(reinterpret_cast<float*>(to) + k * NR + n, load_as_float(panel, k * NR + n, TYPE));
        continue;
      }
      const vi word = *reinterpret_cast<const vi*>(panel + (k * NR + n) * 4);
      char* out = to + (k * G * NR + n) * 4;
      if constexpr (TYPE == Type::bfloat16) {
        *reinterpret_cast<vi*>(out) = word << 16;
        *reinterpret_cast<vi*>(out + NR * 4) = word & (vi)splat_int(static_cast<int32_t>(0xffff0000));
      } else if constexpr (TYPE == Type::int8 && Products<TYPE>::GROUP == 2) {
        const vi b0 = (word << 24) >> 24, b1 = (word << 16) >> 24, b2 = (word << 8) >> 24, b3 = word >> 24;
        *reinterpret_cast<vi*>(to + ((2 * k + 1) * NR + n) * 4) = (b2 & 0xffff) | (b3 << 16);
        *reinterpret_cast<vi*>(to + (2 * k * NR + n) * 4) = (b0 & 0xffff) | (b1 << 16);
      } else if constexpr (TYPE == Type::int8) {
        *reinterpret_cast<vf*>(out) = to_float((word << 24) >> 24);
        *reinterpret_cast<vf*>(out + NR * 4) = to_float((word << 16) >> 24);
        *reinterpret_cast<vf*>(out + NR * 8) = to_float((word << 8) >> 24);
        *reinterpret_cast<vf*>(out + NR * 12) = to_float(word >> 24);
      }
    }
  }
}

// f<TYPE>() of the type of packed weights.
template <class F>
auto with_type(Type type, const F& f) {
  switch (type) {
    case Type::float16:
      return f.template operator()<Type::float16>();
    case Type::bfloat16:
      return f.template operator()<Type::bfloat16>();
    case Type::int8:
      return f.template operator()<Type::int8>();
    default:
      return f.template operator()<Type::float32>();
  }
}

// Encoded rows times a packed weight: write(row, column, values) for each vector of values x·w + bias.
template <Type TYPE, class Write>
VF_INLINE void linear(const Encoded& x, int64_t rows, const PackedLinear& linear, char* widened, const Write& write) {
  using P = Products<TYPE>;
  using Word = typename P::Word;
  constexpr int G = stored_group(TYPE);
  const int64_t groups = linear.groups * G / P::GROUP, bytes = linear.groups * G * NR * size_of(TYPE);
  const int64_t tiles = ceil_div(rows, MR);
  alignas(64) typename Word::Sum tile[MR * NR];
  for (int64_t panel = 0; panel < linear.panels; panel++) {
    const char* words = static_cast<const char*>(linear.weight) + panel * bytes;
    if constexpr (P::WIDENED) {
      widen_panel<TYPE>(words, linear.groups, widened);
      words = widened;
    }
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
      panel_product<Word>(static_cast<int>(last - first), x.words + first * x.stride, x.stride, words, groups, tile);
      for (int64_t row = first; row < last; row++) {
        const auto* sums = tile + (row - first) * NR;
        vf values[NR / VL];
#pragma GCC unroll 8
        for (int i = 0; i < NR / VL; i++) {
          const int64_t n = panel * NR + i * VL;
          const vf bias = load(linear.bias + n);
          if constexpr (TYPE == Type::int8) {
            const vi weight_sums = *reinterpret_cast<const vi*>(linear.sums + n);
            vf value;
            if constexpr (P::GROUP == 1) {
              value = load(reinterpret_cast<const float*>(sums) + i * VL) - to_float(weight_sums) * float(x.zero[row]);
            } else {
              value = to_float(*reinterpret_cast<const vi*>(sums + i * VL) - x.zero[row] * weight_sums);
            }
            values[i] = fma(value, load(linear.scale + n) * x.scale[row], bias);
          } else {
            values[i] = load(reinterpret_cast<const float*>(sums) + i * VL) + bias;
          }
        }
        write(row, panel * NR, values);
      }
    }
  }
}

// Rotary embedding of a head in place: x·cos + rotate(x)·sin.
VF_INLINE void turn(float* x, const float* cos, const float* sin, int64_t size, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < size; i += 2) {
      const float a = x[i], b = x[i + 1];
      x[i] = a * cos[i] - b * sin[i];
      x[i + 1] = b * cos[i + 1] + a * sin[i + 1];
    }
    return;
  }
  const int64_t half = size / 2;
  int64_t i = 0;
  for (; i + VL <= half; i += VL) {
    const vf a = load(x + i), b = load(x + half + i);
    store(x + i, a * load(cos + i) - b * load(sin + i));
    store(x + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

// Rows of a task: more where weights are widened for each task, or read in float32.
template <Type TYPE>
constexpr int64_t TASK_ROWS = Products<TYPE>::WIDENED || TYPE == Type::float32 ? 9 * MR : 4 * MR;

template <Type TYPE>
struct BlockSpace {
  float *normal, *hidden;
  Encoded narrow, wide;
  char* widened;

  BlockSpace(Arena& arena, int64_t narrow_bytes, int64_t wide_bytes, int64_t width, int64_t hidden_width) {
    normal = arena.take<float>(width + VL);
    hidden = arena.take<float>(TASK_ROWS<TYPE> * hidden_stride(hidden_width));
    narrow = {arena.take<char>(TASK_ROWS<TYPE> * narrow_bytes), narrow_bytes, arena.take<float>(TASK_ROWS<TYPE>),
              arena.take<int32_t>(TASK_ROWS<TYPE>)};
    wide = {arena.take<char>(TASK_ROWS<TYPE> * wide_bytes), wide_bytes, narrow.scale, narrow.zero};
    const int64_t longest = narrow_bytes > wide_bytes ? narrow_bytes : wide_bytes;
    widened = arena.take<char>(longest * NR);
  }
  // A row and one panel more, which the tail of a product may write; out of one set of the cache.
  static int64_t hidden_stride(int64_t hidden) { return round_up(hidden, NR) + NR + 16; }
};

template <bool FIRST, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

template <Type TYPE>
struct Stack {
  const PreparedBlocks s;
  int64_t rows, qkv_stride, narrow_bytes, wide_bytes, space_bytes;
  float *qkv, *attended;
  char* spaces;
  Attention attention;

  // Whether activations are rounded more coarsely than float16 before they are multiplied.
  static constexpr bool LOW = TYPE == Type::int8 || (TYPE == Type::bfloat16 && Products<TYPE>::GROUP == 2);

  explicit Stack(const PreparedBlocks& stack) : s(stack) {
    rows = s.batch * s.tokens;
    // The qkv rows are read as heads; a padding keeps them out of one set of the cache.
    qkv_stride = 3 * s.width + 16;
    narrow_bytes = row_bytes(s.width), wide_bytes = row_bytes(s.hidden);
    Arena arena{static_cast<char*>(s.workspace)};
    qkv = arena.take<float>(rows * qkv_stride);
    attended = arena.take<float>(rows * s.width);
    const int64_t token = qkv_stride, batch = s.tokens * qkv_stride;
    attention = {qkv, qkv + s.width, qkv + 2 * s.width, attended, nullptr, Type::float32,
                 s.batch, s.num_heads, s.tokens, s.tokens, s.width / s.num_heads,
                 {batch, token}, {batch, token}, {batch, token}, s.scale, s.pool, nullptr, s.bias};
    Arena one{nullptr};
    BlockSpace<TYPE>(one, narrow_bytes, wide_bytes, s.width, s.hidden);
    space_bytes = one.used;
    const int64_t attention_bytes = ::attention_bytes<AttentionWord>(attention);
    const int64_t largest = space_bytes > attention_bytes ? space_bytes : attention_bytes;
    spaces = arena.take<char>(largest * s.pool.slots);  // a row task and a head task never run at the same time
    attention.workspace = spaces;
    bytes = arena.used;
  }
  int64_t bytes;

#if defined(__AVX512BF16__)
  using AttentionWord = typename Choose<TYPE == Type::bfloat16 || TYPE == Type::int8, BFloat16, Float>::Type;
#elif defined(__AVX512VNNI__)
  using AttentionWord = typename Choose<TYPE == Type::int8, Pair, Float>::Type;
#else
  using AttentionWord = Float;
#endif

  static int64_t row_bytes(int64_t width) {
    return round_up(width, stored_group(TYPE)) * 4 / Products<TYPE>::GROUP + 64;
  }

  VF_INLINE Moments moments_of(const float* x, int64_t width, float eps) const {
    return moments(x, Type::float32, width, eps, s.rms);
  }

  // A norm without parameters of rows of x, encoded.
  void normalise(int64_t first, int64_t last, float eps, const float* gain, BlockSpace<TYPE>& space) const {
    for (int64_t row = first; row < last; row++)
      encode_narrow(s.x + row * s.width, eps, gain, space, row - first);
  }

  // A row of width C, normalised unless eps is negative, encoded.
  VF_INLINE void encode_narrow(const float* x, float eps, const float* gain, BlockSpace<TYPE>& space,
                               int64_t row) const {
    if (eps >= 0) {
      normalise_row(x, Type::float32, s.width, moments_of(x, s.width, eps), nullptr, nullptr, space.normal, 0,
                    Type::float32);
      x = space.normal;
    }
    encode_row<TYPE>(x, gain, s.width, round_up(s.width, stored_group(TYPE)), space.narrow, row);
  }

  // q and k of rows, normalised and turned in place.
  void prepare_heads(int64_t first, int64_t last) const {
    const int64_t size = s.width / s.num_heads;
    for (int64_t row = first; row < last; row++) {
      const int64_t batch = row / s.tokens, token = row % s.tokens - s.rope.prefix;
      for (int part = 0; part < 2; part++) {
        const vit_fast::HeadNorm& norm = part ? s.k_norm : s.q_norm;
        float* heads = qkv + row * qkv_stride + part * s.width;
        for (int64_t head = 0; head < s.num_heads; head++) {
          float* x = heads + head * size;
          if (norm.given)
            normalise_row(x, Type::float32, size, moments_of(x, size, norm.eps), norm.weight, norm.bias, x, 0,
                          Type::float32);
          if (s.rope.cos && token >= 0) {
            const int64_t at = batch * s.rope.stride[0] + head * s.rope.stride[1] + token * s.rope.stride[2];
            turn(x, s.rope.cos + at, s.rope.sin + at, size, s.rope.interleaved);
          }
        }
      }
    }
  }

  void project_qkv(const PackedBlock& block, int64_t first, int64_t last, BlockSpace<TYPE>& space) const {
    normalise(first, last, s.eps1, block.qkv.gain, space);
    const int64_t columns = 3 * s.width;
    linear<TYPE>(space.narrow, last - first, block.qkv, space.widened, [&](int64_t row, int64_t n, const vf* values) {
      store_columns(qkv + (first + row) * qkv_stride, n, columns, values);
    });
    if (s.rope.cos || s.q_norm.given || s.k_norm.given) prepare_heads(first, last);
  }

  static VF_INLINE void store_columns(float* row, int64_t n, int64_t columns, const vf* values) {
    if (n + NR <= columns) {
      for (int i = 0; i < NR / VL; i++) store(row + n + i * VL, values[i]);
    } else {
      const float* lanes = reinterpret_cast<const float*>(values);
      for (int64_t i = 0; n + i < columns; i++) row[n + i] = lanes[i];
    }
  }

  // x += x·w + bias
  void add_linear(const Encoded& from, const PackedLinear& weight, int64_t first, int64_t last, char* widened) const {
    linear<TYPE>(from, last - first, weight, widened, [&](int64_t row, int64_t n, const vf* values) {
      float* x = s.x + (first + row) * s.width + n;
      if (n + NR <= s.width) {
        for (int i = 0; i < NR / VL; i++) store(x + i * VL, load(x + i * VL) + values[i]);
      } else {
        const float* lanes = reinterpret_cast<const float*>(values);
        for (int64_t i = 0; n + i < s.width; i++) x[i] += lanes[i];
      }
    });
  }

  void finish_block(const PackedBlock& block, int64_t first, int64_t last, BlockSpace<TYPE>& space) const {
    const int64_t count = last - first;
    for (int64_t row = 0; row < count; row++)
      encode_narrow(attended + (first + row) * s.width, s.out_eps, block.proj.gain, space, row);
    add_linear(space.narrow, block.proj, first, last, space.widened);
    normalise(first, last, s.eps2, block.fc1.gain, space);
    const int64_t stride = BlockSpace<TYPE>::hidden_stride(s.hidden);
    const bool gated = vit_fast::is_gated(s.activation);
    const Activation activation = vit_fast::of_gate(s.activation);
    linear<TYPE>(space.narrow, count, block.fc1, space.widened, [&](int64_t row, int64_t n, const vf* values) {
      float* hidden = space.hidden + row * stride;
      if (gated) {  // half of a panel gates, the other half is gated
        constexpr int HALF = NR / VL / 2;
        for (int i = 0; i < HALF; i++)
          store(hidden + n / 2 + i * VL, activate<LOW>(values[i], activation) * values[i + HALF]);
      } else {
        for (int i = 0; i < NR / VL; i++) store(hidden + n + i * VL, activate<LOW>(values[i], activation));
      }
    });
    const int64_t hidden_padded = round_up(s.hidden, stored_group(TYPE));
    for (int64_t row = 0; row < count; row++) {
      float* hidden = space.hidden + row * stride;
      if (s.hidden_eps >= 0)
        normalise_row(hidden, Type::float32, s.hidden_features, moments_of(hidden, s.hidden_features, s.hidden_eps),
                      nullptr, nullptr, hidden, 0, Type::float32);
      encode_row<TYPE>(hidden, block.fc2.gain, s.hidden, hidden_padded, space.wide, row);
    }
    add_linear(space.wide, block.fc2, first, last, space.widened);
  }

  void run() const {
    const int64_t tasks = row_tasks(s.pool, rows, TASK_ROWS<TYPE>);
    for (int64_t b = -1; b < s.depth; b++) {
      run_tasks(s.pool, tasks, [&](int64_t task, int64_t slot) {
        Arena arena{spaces + slot * space_bytes};
        BlockSpace<TYPE> space(arena, narrow_bytes, wide_bytes, s.width, s.hidden);
        const int64_t first = task * rows / tasks, last = (task + 1) * rows / tasks;
        if (b >= 0) finish_block(s.blocks[b], first, last, space);
        if (b + 1 < s.depth) project_qkv(s.blocks[b + 1], first, last, space);
      });
      if (b + 1 < s.depth) attention_with<AttentionWord>(attention);
    }
  }
};

// How many images go through the stack at a time: enough that each thread gets two tasks of rows in a region.
template <Type TYPE>
int64_t images_at_a_time(const PreparedBlocks& s) {
  const int64_t images = s.tokens ? ceil_div(2 * s.pool.slots * TASK_ROWS<TYPE>, s.tokens) : s.batch;
  return images < s.batch ? images : s.batch;
}

// The same stack on images first … last − 1.
inline PreparedBlocks images_of(PreparedBlocks s, int64_t first, int64_t last) {
  s.x += first * s.tokens * s.width;
  s.batch = last - first;
  if (s.rope.cos) s.rope.cos += first * s.rope.stride[0], s.rope.sin += first * s.rope.stride[0];
  if (s.bias.data) s.bias.data += first * s.bias.stride[0];
  return s;
}

}  // namespace
