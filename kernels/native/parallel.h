// Threads. `parallel.cpp` is the only file that knows how they are made.
#pragma once
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int quire_threads();

// Calls body(context, worker) once for each worker in [0, workers), at the same time; returns when all have.
void run_workers(int workers, void (*body)(const void* context, int worker), const void* context);

namespace {

// Splits [0, size) evenly over the threads, at least `grain` each: a short range stays on the caller's thread.
template <class F> void parallel_for(int64_t size, int64_t grain, const F& f) {
  int64_t workers = size / (grain > 0 ? grain : 1);
  if (workers > quire_threads()) workers = quire_threads();
  if (workers <= 1) return f((int64_t)0, size);
  struct Context { const F* f; int64_t size, workers; } context = {&f, size, workers};
  run_workers((int)workers, [](const void* p, int worker) {
    const Context& c = *(const Context*)p;
    (*c.f)(c.size * worker / c.workers, c.size * (worker + 1) / c.workers);
  }, &context);
}

}  // namespace
