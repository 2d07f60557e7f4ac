// Tasks handed out one by one to the threads of a pool: who is slow, or descheduled, takes fewer.
//
// No result depends on which thread ran a task.
#pragma once

#include "kernels.h"

namespace {

// task(index, slot) for each index < count.
template <class Task>
void run_tasks(const vit_fast::Pool& pool, int64_t count, const Task& task) {
  struct Context {
    const Task* task;
    int64_t count, next;
  } context{&task, count, 0};
  const int64_t slots = count < pool.slots ? count : pool.slots;
  auto body = [](void* untyped, int64_t slot) {
    auto& context = *static_cast<Context*>(untyped);
    for (;;) {
      const int64_t index = __atomic_fetch_add(&context.next, 1, __ATOMIC_RELAXED);
      if (index >= context.count) return;
      (*context.task)(index, slot);
    }
  };
  if (slots > 1) {
    pool.run(body, &context, slots);
  } else if (count) {
    body(&context, 0);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How many tasks share rows evenly, each of at most `most`: a multiple of the threads where there are rows enough.
inline int64_t row_tasks(const vit_fast::Pool& pool, int64_t rows, int64_t most) {
  const int64_t least = ceil_div(rows, most), even = round_up(least, pool.slots);
  return even <= rows ? even : least;
}

// Pieces of a workspace, each aligned to a cache line; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

}  // namespace
