// The gradients of attention for one head: dq, dk and dv from q, k, v, the output's gradient and the statistics.
//
//     p  = exp(scale·q kᵀ − lse)         dv = pᵀ do
//     ds = scale·p·(do vᵀ − delta)       dq = ds k,  dk = dsᵀ q          delta = Σ_d do·o
//
// With dropout, whose mask is drawn again: dv = (p·mask)ᵀ do, and (do vᵀ)·mask in the place of do vᵀ.
//
// Two sweeps: one over tiles of queries for dq, one over tiles of keys, where scores are computed transposed, for dk and
// dv. Nothing is added from two tasks, so that the gradients have the same bits with any number of threads. All float32.
//
// Memory: seven packed copies of a head for each thread; no N×N matrix. 14·N·N·D FLOPs a head.
// Source: Dao et al., "FlashAttention", 2022.
#pragma once

#include "attention.h"

namespace {

using vit_fast::AttentionBackward;

// A head's rows [count, D] as the products read them.
struct Operand {
  const char* rows;  // of the tensor
  int64_t stride;    // bytes
  int64_t count;
  char *transposed, *natural;  // panels [D][NR rows]; panels [rows][NR columns of D]; null where not needed
};

struct BackwardSpace {
  float *row, *a1, *a2, *p, *ds, *out1, *out2, *delta, *lse;
  char *words, *transposed[4], *natural[3];

  BackwardSpace(Arena& arena, int64_t queries, int64_t keys, int64_t size) {
    const int64_t longest = queries > keys ? queries : keys, width = round_up(size, NR);
    row = arena.take<float>(2 * (width + VL));
    words = arena.take<char>(2 * width * 4);
    a1 = arena.take<float>(MR * (size + 16)), a2 = arena.take<float>(MR * (size + 16));
    p = arena.take<float>(MR * (BLOCK + 16)), ds = arena.take<float>(MR * (BLOCK + 16));
    out1 = arena.take<float>(MR * width), out2 = arena.take<float>(MR * width);
    delta = arena.take<float>(round_up(longest, NR)), lse = arena.take<float>(round_up(longest, NR));
    for (auto& packed : transposed) packed = arena.take<char>(round_up(longest, NR) * size * 4);
    for (auto& packed : natural) packed = arena.take<char>(longest * width * 4);
  }
};

// Packs rows as pack_keys and pack_values of attention.h do.
void pack_operand(BackwardSpace& space, const Operand& x, Type type, int64_t size) {
  AttentionSpace<Float> packing;
  packing.key_panels = ceil_div(x.count, NR), packing.head_groups = size;
  packing.head_panels = ceil_div(size, NR), packing.key_groups = x.count;
  packing.row = space.row, packing.words = space.words;
  packing.keys = x.transposed, packing.values = x.natural;
  if (x.transposed) pack_keys(packing, x.rows, x.stride, type, x.count, size);
  if (x.natural) pack_values(packing, x.rows, x.stride, type, x.count, size);
}

// One tile of rows against all columns. Of queries: a = q, b = do; columns k and v; out1 = dq. Of keys: a = k, b = v;
// columns q and do; out1 = dk, out2 = dv. lse and delta belong to queries: the rows, or the columns. plane: of the head.
template <bool KEYS>
void sweep_tile(const AttentionBackward& g, BackwardSpace& space, int64_t plane, int rows, int64_t first,
                const Operand& columns,
                const char* other_transposed, const char* other_natural) {
  const int64_t D = g.head_size, stride = D + 16, width = round_up(D, NR), score_stride = BLOCK + 16;
  alignas(64) float tile[MR * NR], other[MR * NR];
  if (!columns.count) {  // keys without queries
    memset(space.out1, 0, rows * width * 4);
    memset(space.out2, 0, rows * width * 4);
  }
  for (int64_t block = 0; block < columns.count; block += BLOCK) {
    const int64_t count = columns.count - block < BLOCK ? columns.count - block : BLOCK;
    for (int64_t panel = 0; panel * NR < count; panel++) {
      const int64_t offset = (block / NR + panel) * D * NR * 4;
      panel_product<Float>(rows, reinterpret_cast<char*>(space.a1), stride * 4, columns.transposed + offset, D, tile);
      panel_product<Float>(rows, reinterpret_cast<char*>(space.a2), stride * 4, other_transposed + offset, D, other);
      for (int m = 0; m < rows; m++)
        for (int n = 0; n < NR; n += VL) {
          const int64_t column = block + panel * NR + n;
          const vf lse = KEYS ? load(space.lse + column) : splat(space.lse[first + m]);
          const vf delta = KEYS ? load(space.delta + column) : splat(space.delta[first + m]);
          const vf p = exp_of(load(tile + m * NR + n) * g.scale - lse);  // nothing reads behind the last column
          vf dp = load(other + m * NR + n), weights = p;
          if (g.dropout.given) {
            const int64_t row = first + m, query = KEYS ? column : row, key = KEYS ? row : column;
            const vi keep = kept(g.dropout, (plane * g.queries + query) * g.keys + key, KEYS ? g.keys : 1);
            dp = select(keep, dp * g.dropout.scale, vf{}), weights = select(keep, p * g.dropout.scale, vf{});
          }
          const vf ds = p * (dp - delta) * g.scale;
          store(space.p + m * score_stride + panel * NR + n, weights);
          store(space.ds + m * score_stride + panel * NR + n, ds);
        }
    }
    for (int64_t panel = 0; panel * NR < width; panel++) {
      auto add = [&](const float* scores, const char* natural, float* out) {
        const char* words = natural + (panel * columns.count + block) * NR * 4;
        panel_product<Float>(rows, reinterpret_cast<const char*>(scores), score_stride * 4, words, count, tile);
        for (int m = 0; m < rows; m++)
          for (int n = 0; n < NR; n += VL) {
            float* to = out + m * width + panel * NR + n;
            store(to, block ? load(to) + load(tile + m * NR + n) : load(tile + m * NR + n));
          }
      };
      add(space.ds, columns.natural, space.out1);
      if (KEYS) add(space.p, other_natural, space.out2);
    }
  }
}

void attention_head_bwd(const AttentionBackward& g, BackwardSpace& space, int64_t batch, int64_t head) {
  const int64_t D = g.head_size, size = size_of(g.type), width = round_up(D, NR);
  auto rows_of = [&](const void* p, const int64_t* stride, int64_t count) {
    const char* start = static_cast<const char*>(p) + (batch * stride[0] + head * D) * size;
    return Operand{start, stride[1] * size, count, nullptr, nullptr};
  };
  Operand q = rows_of(g.q, g.q_stride, g.queries), k = rows_of(g.k, g.k_stride, g.keys);
  Operand v = rows_of(g.v, g.v_stride, g.keys), dout = rows_of(g.grad, g.grad_stride, g.queries);
  const Operand out = rows_of(g.out, g.out_stride, g.queries);
  q.transposed = space.transposed[0], k.transposed = space.transposed[1];
  v.transposed = space.transposed[2], dout.transposed = space.transposed[3];
  q.natural = space.natural[0], k.natural = space.natural[1], dout.natural = space.natural[2];
  const Operand packed[] = {q, k, v, dout};
  for (const Operand& x : packed) pack_operand(space, x, g.type, D);
  const float* lse = g.lse + (batch * g.num_heads + head) * g.queries;
  memset(space.lse, 0, round_up(g.queries, NR) * 4);
  memset(space.delta, 0, round_up(g.queries, NR) * 4);
  for (int64_t i = 0; i < g.queries; i++) {
    float *a = space.row, *b = space.row + width + VL;
    widen_row(out.rows + i * out.stride, g.type, D, a);
    widen_row(dout.rows + i * dout.stride, g.type, D, b);
    float delta = 0;
    for (int64_t d = 0; d < D; d++) delta += a[d] * b[d];
    space.delta[i] = delta, space.lse[i] = lse[i];
  }
  auto write = [&](const float* from, void* to, const int64_t* stride, int64_t token) {
    char* row = static_cast<char*>(to) + (batch * stride[0] + token * stride[1] + head * D) * size;
    narrow_row(from, D, row, g.type);
  };
  auto sweep = [&]<bool KEYS>(const Operand& a, const Operand& b, const Operand& columns, const Operand& other) {
    for (int64_t first = 0; first < a.count; first += MR) {
      const int rows = static_cast<int>(a.count - first < MR ? a.count - first : MR);
      for (int m = 0; m < rows; m++) {
        widen_row(a.rows + (first + m) * a.stride, g.type, D, space.a1 + m * (D + 16));
        widen_row(b.rows + (first + m) * b.stride, g.type, D, space.a2 + m * (D + 16));
      }
      sweep_tile<KEYS>(g, space, batch * g.num_heads + head, rows, first, columns, other.transposed, other.natural);
      for (int m = 0; m < rows; m++) {
        write(space.out1 + m * width, KEYS ? g.dk : g.dq, KEYS ? g.dk_stride : g.dq_stride, first + m);
        if (KEYS) write(space.out2 + m * width, g.dv, g.dv_stride, first + m);
      }
    }
  };
  sweep.template operator()<false>(q, dout, k, v);
  sweep.template operator()<true>(k, v, q, dout);
}

int64_t attention_bwd_space(const AttentionBackward& g) {
  Arena arena{nullptr};
  BackwardSpace(arena, g.queries, g.keys, g.head_size);
  return arena.used;
}

int64_t attention_bwd_workspace(const AttentionBackward& g) { return g.pool.slots * attention_bwd_space(g); }

void attention_bwd(const AttentionBackward& g) {
  const int64_t bytes = attention_bwd_space(g);
  run_tasks(g.pool, g.batch * g.num_heads, [&](int64_t index, int64_t slot) {
    Arena arena{static_cast<char*>(g.workspace) + slot * bytes};
    BackwardSpace space(arena, g.queries, g.keys, g.head_size);
    attention_head_bwd(g, space, index / g.num_heads, index % g.num_heads);
  });
}

}  // namespace
