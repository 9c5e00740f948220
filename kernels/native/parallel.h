// Threads. `parallel.cpp` is the only file that knows how they are made.
#pragma once
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int quire_threads();

// Calls body(context, worker) from this thread and from up to `workers` - 1 others at the same time, as many as are
// free; returns when all that began have returned. So a body must not count on the others.
void run_workers(int workers, void (*body)(const void* context, int worker), const void* context);

namespace {

// Calls f(item) for each item in [0, count), handed out one by one to threads as they become free: for items of
// unequal cost, and for a thread that loses its core to another program.
template <class F> void for_each_item(int64_t count, int64_t workers, const F& f) {
  struct Context { const F* f; int64_t count; mutable int64_t next; } context = {&f, count, 0};
  auto work = [](const void* p, int) {
    const Context& c = *(const Context*)p;
    for (;;) {
      int64_t i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
      if (i >= c.count) return;
      (*c.f)(i);
    }
  };
  if (workers > count) workers = count;
  if (workers > 1) run_workers((int)workers, work, &context);
  else work(&context, 0);
}

// Splits [0, size) evenly over the threads, at least `grain` each: a short range stays on the caller's thread.
template <class F> void parallel_for(int64_t size, int64_t grain, const F& f) {
  int64_t workers = size / (grain > 0 ? grain : 1);
  if (workers > quire_threads()) workers = quire_threads();
  if (workers <= 1) return f((int64_t)0, size);
  for_each_item(workers, workers, [&](int64_t i) { f(size * i / workers, size * (i + 1) / workers); });
}

}  // namespace
