// Linear layers on weights as nn.Linear holds them, [out, in]: the weight is packed in the call, then multiplied.
//
//     act(LN(x) wᵀ + b)     residual + row_scale·gamma·dropout(x wᵀ + b)     patches wᵀ + b + pos_embed
//
// Two parallel regions: panels are packed, each once; then a task takes some rows, encodes them (as they are,
// normalised, or gathered from the pixels of a patch), multiplies them with every panel and writes what the epilogue
// makes of them. No normalised copy of x and no im2col matrix is made. Products are float32, or bfloat16 where weights
// are bfloat16 and the processor multiplies it; statistics, sums and epilogues are float32.
//
// Packing reads and writes the weight once more, which pays from some dozens of rows on. A weight that is packed already
// (kernels/packing.py) is multiplied as it is, int8 too.
#pragma once

#include "activations.h"
#include "dropout.h"
#include "gemm.h"
#include "prepared_blocks.h"
#include "rows.h"
#include "tasks.h"

namespace {

using vit_fast::Linear;
using vit_fast::PatchEmbed;
using vit_fast::Weight;

// Rows of a weight from `first` on, as a panel of words. Under a gated activation a panel is NR/2 gates and then the
// NR/2 values that they gate, as kernels/packing.py orders them.
template <class Word>
void pack_panel(const Weight& w, bool gated, int64_t panel, int64_t groups, char* to) {
  constexpr int G = GROUP<Word>, STEP = VL * G;
  const int64_t half = w.features / 2;
  const char* rows[NR];
  for (int n = 0; n < NR; n++) {
    int64_t row = panel * NR + n;
    bool real = row < w.features;
    if (gated) {
      const int64_t unit = panel * NR / 2 + n % (NR / 2);
      real = unit < half;
      row = n < NR / 2 ? unit : half + unit;
    }
    rows[n] = real ? static_cast<const char*>(w.data) + row * w.stride * size_of(w.type) : nullptr;
  }
  alignas(64) float wide[STEP];
  alignas(64) int32_t block[NR][VL];
  for (int64_t k = 0; k < groups; k += VL) {
    const int64_t start = k * G, count = w.width - start < STEP ? w.width - start : STEP;
    for (int n = 0; n < NR; n++) {
      memset(wide, 0, sizeof(wide));
      if (rows[n]) widen_row(rows[n] + start * size_of(w.type), w.type, count, wide);
      narrow_row(wide, STEP, block[n], G == 2 ? Type::bfloat16 : Type::float32);
    }
    int32_t* words = reinterpret_cast<int32_t*>(to) + k * NR;
    const int64_t last = groups - k < VL ? groups - k : VL;
    for (int64_t i = 0; i < last; i++)
      for (int n = 0; n < NR; n++) words[i * NR + n] = block[n][i];
  }
}

// Bytes of a thread's scratch memory, and of the whole call's.
constexpr int64_t LONGEST_TASK = 9 * MR;
int64_t linear_space(int64_t width, int group) {
  return round_up((width + VL) * 4, 64) + round_up(LONGEST_TASK * (ceil_div(width, group) * 4 + 64), 64);
}
int64_t weight_workspace(const Weight& w, const vit_fast::Pool& pool) {
  const int64_t panels = ceil_div(w.features, NR) + 1;
  return panels * round_up(w.width, 2) * NR * 4 + panels * NR * 4 + 192 + pool.slots * linear_space(w.width, 1);
}

// read(row, out): a row of `width` float32 values; write(row, column, values): a panel's values of a row, with the bias.
template <Type TYPE, class Read, class Write>
void packed_product(const vit_fast::Pool& pool, void* workspace, const Weight& w, bool gated, int64_t rows,
                    const Read& read, const Write& write) {
  using Word = typename Products<TYPE>::Word;
  constexpr int G = GROUP<Word>;
  constexpr int64_t TASK = TASK_ROWS<TYPE>;
  const int64_t panels = gated ? ceil_div(w.features / 2, NR / 2) : ceil_div(w.features, NR);
  const int64_t groups = ceil_div(w.width, G), row_bytes = groups * 4 + 64;
  Arena arena{static_cast<char*>(workspace)};
  char* words = arena.take<char>(panels * groups * NR * 4);
  float* bias = arena.take<float>(panels * NR);
  char* spaces = arena.take<char>(pool.slots * linear_space(w.width, G));
  run_tasks(pool, panels, [&](int64_t panel, int64_t) {
    pack_panel<Word>(w, gated, panel, groups, words + panel * groups * NR * 4);
    for (int64_t n = 0; n < NR; n++) {
      const int64_t unit = gated ? panel * NR / 2 + n % (NR / 2) : panel * NR + n;
      const int64_t half = w.features / 2, row = gated && n >= NR / 2 ? half + unit : unit;
      bias[panel * NR + n] = w.bias && unit < (gated ? half : w.features) ? w.bias[row] : 0.0f;
    }
  });
  const PackedLinear packed{words, nullptr, nullptr, nullptr, bias, panels, groups};
  const int64_t tasks = row_tasks(pool, rows, TASK);
  run_tasks(pool, tasks, [&](int64_t task, int64_t slot) {
    Arena own{spaces + slot * linear_space(w.width, G)};
    float* row_values = own.take<float>(w.width + VL);
    const Encoded encoded{own.take<char>(TASK * row_bytes), row_bytes, nullptr, nullptr};
    const int64_t first = task * rows / tasks, last = (task + 1) * rows / tasks;
    for (int64_t row = first; row < last; row++) {
      read(row, row_values);
      encode_row<TYPE>(row_values, nullptr, w.width, groups * G, encoded, row - first);
    }
    linear<TYPE>(encoded, last - first, packed, nullptr,
                 [&](int64_t row, int64_t n, const vf* values) { write(first + row, n, values); });
  });
}

// A thread's scratch memory for rows of a product with a packed weight: one row, and the rows of a task as words.
template <Type TYPE>
struct RowSpace {
  float* row;
  Encoded encoded;
  char* widened;

  RowSpace(Arena& arena, int64_t width) {
    const int64_t bytes = Stack<TYPE>::row_bytes(width), rows = TASK_ROWS<TYPE>;
    row = arena.take<float>(width + VL);
    encoded = {arena.take<char>(rows * bytes), bytes, arena.take<float>(rows), arena.take<int32_t>(rows)};
    widened = arena.take<char>(Products<TYPE>::WIDENED ? bytes * NR : 0);
  }
  static int64_t bytes(int64_t width) {
    Arena arena{nullptr};
    RowSpace(arena, width);
    return arena.used;
  }
};

// packed_product with a weight that is packed already.
template <Type TYPE, class Read, class Write>
void product_with_packed(const vit_fast::Pool& pool, void* workspace, const PackedLinear& packed, int64_t width,
                         int64_t rows, const Read& read, const Write& write) {
  const int64_t tasks = row_tasks(pool, rows, TASK_ROWS<TYPE>), bytes = RowSpace<TYPE>::bytes(width);
  run_tasks(pool, tasks, [&](int64_t task, int64_t slot) {
    Arena arena{static_cast<char*>(workspace) + slot * bytes};
    const RowSpace<TYPE> space(arena, width);
    const int64_t first = task * rows / tasks, last = (task + 1) * rows / tasks;
    for (int64_t row = first; row < last; row++) {
      read(row, space.row);
      encode_row<TYPE>(space.row, packed.gain, width, round_up(width, stored_group(TYPE)), space.encoded, row - first);
    }
    linear<TYPE>(space.encoded, last - first, packed, space.widened,
                 [&](int64_t row, int64_t n, const vf* values) { write(first + row, n, values); });
  });
}

template <class Function>
void with_product_type(Type weight, const Function& function) {
#if defined(__AVX512BF16__)
  if (weight == Type::bfloat16) return function.template operator()<Type::bfloat16>();
#else
  (void)weight;
#endif
  function.template operator()<Type::float32>();
}

int64_t linear_workspace(const Linear& l) {
  if (!l.packed) return weight_workspace(l.weight, l.pool);
  return with_type(l.weight.type, [&]<Type TYPE>() { return l.pool.slots * RowSpace<TYPE>::bytes(l.weight.width); });
}

// Columns n … of a row of float32 values, at most `count` of them, to any dtype.
VF_INLINE void write_values(void* out, int64_t start, int64_t count, const vf* values, Type type) {
  const float* lanes = reinterpret_cast<const float*>(values);
  for (int64_t i = 0; i < count; i += VL) {
    if (i + VL <= count) {
      store_as(out, start + i, load(lanes + i), type);
    } else {
      for (int64_t j = i; j < count; j++) store_one(out, start + j, lanes[j], type);
    }
  }
}

void linear_layer(const Linear& l) {
  const bool gated = vit_fast::is_gated(l.activation);
  const Activation activation = vit_fast::of_gate(l.activation);
  const int64_t features = gated ? l.weight.features / 2 : l.weight.features, width = l.weight.width;
  // As where z is kept for a backward: a forward has the same bits with and without.
  const bool rounds = !l.packed && l.activation != Activation::none && l.out_type != Type::float32;
  auto read = [&](int64_t row, float* out) {
    const char* x = static_cast<const char*>(l.x) + row * l.stride * size_of(l.type);
    if (!l.normalise) return widen_row(x, l.type, width, out);
    const Moments m = moments(x, l.type, width, l.eps, l.rms);
    normalise_row(x, l.type, width, m, l.ln_weight, l.ln_bias, out, 0, Type::float32);
    if (l.mean) l.mean[row] = m.mean, l.rstd[row] = m.rstd;
  };
  auto write = [&](int64_t row, int64_t n, const vf* values) {
    vf results[NR / VL];
    int64_t column = n, count = features - n < NR ? features - n : NR;
    vf z[NR / VL];
    for (int i = 0; i < NR / VL; i++) z[i] = rounds ? rounded_to(l.out_type, values[i]) : values[i];
    if (gated) {
      constexpr int HALF = NR / VL / 2;
      column = n / 2, count = features - column < NR / 2 ? features - column : NR / 2;
      for (int i = 0; i < HALF; i++) results[i] = activate<false>(z[i], activation) * z[i + HALF];
      if (l.z) {
        write_values(l.z, 2 * row * features + column, count, z, l.out_type);
        write_values(l.z, (2 * row + 1) * features + column, count, z + HALF, l.out_type);
      }
    } else {
      for (int i = 0; i < NR / VL; i++) results[i] = activate<false>(z[i], activation);
      if (l.z) write_values(l.z, row * features + column, count, z, l.out_type);
    }
    if (l.residual) {
      const float factor = l.row_scale ? l.row_scale[row / l.rows_per_scale] : 1.0f;
      for (int64_t i = 0; i < count; i += VL) {
        vf gamma = splat(1.0f), residual = {};
        if (i + VL <= count) {
          residual = load_as_float(l.residual, row * features + column + i, l.out_type);
          if (l.gamma) gamma = load(l.gamma + column + i);
        } else {
          for (int64_t j = 0; i + j < count; j++) {
            residual[j] = load_one(l.residual, row * features + column + i + j, l.out_type);
            if (l.gamma) gamma[j] = l.gamma[column + i + j];
          }
        }
        vf branch = results[i / VL];
        if (l.dropout.given) branch = dropped(branch, l.dropout, row * features + column + i);
        if (l.gamma) branch = branch * gamma;
        if (l.row_scale) branch = branch * factor;
        results[i / VL] = residual + branch;
      }
    }
    write_values(l.out, row * features + column, count, results, l.out_type);
  };
  if (l.packed)
    return with_type(l.weight.type, [&]<Type TYPE>() {
      product_with_packed<TYPE>(l.pool, l.workspace, *l.packed, width, l.rows, read, write);
    });
  with_product_type(l.weight.type, [&]<Type TYPE>() {
    packed_product<TYPE>(l.pool, l.workspace, l.weight, gated, l.rows, read, write);
  });
}

}  // namespace
