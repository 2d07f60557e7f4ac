// LayerNorm of rows: (x − mean)·rstd·weight + bias, statistics in float32, two passes over a row in cache. RMSNorm: the
// mean is 0.
#pragma once

#include "rows.h"
#include "tasks.h"

namespace {

using vit_fast::LayerNorm;

void layer_norm(const LayerNorm& n) {
  const int64_t size = size_of(n.type), per_task = n.width < 16384 ? 16384 / (n.width + 1) + 1 : 1;
  run_tasks(n.pool, ceil_div(n.rows, per_task), [&](int64_t task, int64_t) {
    const int64_t last = (task + 1) * per_task < n.rows ? (task + 1) * per_task : n.rows;
    for (int64_t row = task * per_task; row < last; row++) {
      const char* x = static_cast<const char*>(n.x) + row * n.stride * size;
      const Moments m = moments(x, n.type, n.width, n.eps, n.rms);
      normalise_row(x, n.type, n.width, m, n.weight, n.bias, n.out, row * n.width, n.out_type);
      if (n.mean) n.mean[row] = m.mean, n.rstd[row] = m.rstd;
    }
  });
}

}  // namespace
