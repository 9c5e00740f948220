// Worker threads: OpenMP's, taken from the runtime that torch has already loaded (see docs/adr/0002).
#include "parallel.h"

static int g_threads = 1;

EXPORT int quire_threads() { return g_threads; }
EXPORT void quire_set_threads(int threads) { g_threads = threads < 1 ? 1 : threads; }

void run_workers(int workers, void (*body)(const void*, int), const void* context) {
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; worker++) body(context, worker);
}
