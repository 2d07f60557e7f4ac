// The gradients of LayerNorm: dx = rstd·(dn − mean(dn) − n·mean(dn·n)), dweight = Σ dy·n, dbias = Σ dy over rows.
//
// n = (x − mean)·rstd, dn = dy·weight. RMSNorm: mean and mean(dn) are 0. A task takes some rows and leaves its sums of dweight and dbias in a row of the
// workspace; how rows are cut does not depend on the threads, so that the gradients have the same bits with any number.
#pragma once

#include "rows.h"
#include "tasks.h"

namespace {

using vit_fast::LayerNormBackward;

constexpr int64_t NORM_PARTS = 64;

int64_t layer_norm_bwd_workspace(const LayerNormBackward& n) {
  const int64_t parts = n.rows < NORM_PARTS ? n.rows : NORM_PARTS;
  return (2 * parts * round_up(n.width, 16) + 2 * n.pool.slots * round_up(n.width + VL, 16)) * 4 + 256;
}

void layer_norm_bwd(const LayerNormBackward& n) {
  const int64_t parts = n.rows < NORM_PARTS ? n.rows : NORM_PARTS, width = n.width, padded = round_up(width, 16);
  Arena arena{static_cast<char*>(n.workspace)};
  float* dweights = arena.take<float>(parts * padded);
  float* dbiases = arena.take<float>(parts * padded);
  const int64_t scratch = round_up(width + VL, 16);
  float* spaces = arena.take<float>(2 * n.pool.slots * scratch);
  run_tasks(n.pool, parts, [&](int64_t part, int64_t slot) {
    float *x = spaces + 2 * slot * scratch, *dy = x + scratch;
    float *dweight = dweights + part * padded, *dbias = dbiases + part * padded;
    memset(dweight, 0, width * 4);
    memset(dbias, 0, width * 4);
    for (int64_t row = part * n.rows / parts; row < (part + 1) * n.rows / parts; row++) {
      widen_row(static_cast<const char*>(n.x) + row * n.stride * size_of(n.type), n.type, width, x);
      widen_row(static_cast<const char*>(n.grad) + row * n.grad_stride * size_of(n.type), n.type, width, dy);
      const float mean = n.mean[row], rstd = n.rstd[row];
      float total = 0, projected = 0;
      for (int64_t i = 0; i < width; i++) {
        const float normal = (x[i] - mean) * rstd, dn = n.weight ? dy[i] * n.weight[i] : dy[i];
        dweight[i] += dy[i] * normal;
        dbias[i] += dy[i];
        x[i] = normal, dy[i] = dn;
      }
      vf totals = {}, products = {};
      int64_t i = 0;
      for (; i + VL <= width; i += VL) {
        totals += load(dy + i);
        products = fma(load(dy + i), load(x + i), products);
      }
      for (; i < width; i++) total += dy[i], projected += dy[i] * x[i];
      total = n.rms ? 0.0f : (total + sum(totals)) / width, projected = (projected + sum(products)) / width;
      for (i = 0; i < width; i++) dy[i] = (dy[i] - total - x[i] * projected) * rstd;
      narrow_row(dy, width, static_cast<char*>(n.dx) + row * width * size_of(n.type), n.type);
    }
  });
  for (int64_t i = 0; i < width; i++) {
    float dweight = 0, dbias = 0;
    for (int64_t part = 0; part < parts; part++) dweight += dweights[part * padded + i], dbias += dbiases[part * padded + i];
    n.dweight[i] = dweight, n.dbias[i] = dbias;
  }
}

}  // namespace
