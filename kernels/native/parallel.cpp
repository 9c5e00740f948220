// The worker threads: a small pool that the caller never has to wait for.
//
// A job is open while its caller works on it. A worker that is awake joins, one that has lost its core to another
// program does not, and the caller waits only for those that joined. Bodies hand out their work piece by piece
// (for_each_item), so a job is complete whoever joined: with no worker at all the caller does everything. Between
// jobs a worker spins for some 50 us, as long as the gap between two ops of a step, and then sleeps.
// Why not OpenMP: docs/adr/0002.
#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <thread>

namespace {

constexpr int kSpins = 3000;

int g_threads = 1, g_started = 0;
std::mutex g_busy;  // one job at a time; a second caller works alone
std::atomic<uint32_t> g_epoch{0};
std::atomic<uint32_t> g_job{0};  // places << 16 | joined; 0 is closed
std::atomic<uint32_t> g_finished{0};
void (*g_body)(const void*, int);
const void* g_context;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

uint32_t wait_for_job(uint32_t seen) {
  for (int spin = 0; spin < kSpins; spin++) {
    if (g_epoch.load(std::memory_order_acquire) != seen) break;
    pause_cpu();
  }
  g_epoch.wait(seen);
  return g_epoch.load();
}

void work_forever(uint32_t seen) {
  for (;;) {
    seen = wait_for_job(seen);
    uint32_t job = g_job.load();
    while ((job & 0xffff) < job >> 16) {
      if (!g_job.compare_exchange_weak(job, job + 1)) continue;
      // Joined: the caller waits from here on, so body and context are this job's.
      g_body(g_context, (int)(job & 0xffff) + 1);
      g_finished.fetch_add(1);
      break;
    }
  }
}

void start_workers(int workers) {
  // A forked child has none of its parent's threads.
  static int registered = pthread_atfork(nullptr, nullptr, [] { g_started = 0; });
  (void)registered;
  for (; g_started < workers; g_started++) std::thread(work_forever, g_epoch.load()).detach();
}

}  // namespace

EXPORT int quire_threads() { return g_threads; }
EXPORT void quire_set_threads(int threads) { g_threads = threads < 1 ? 1 : threads > 1024 ? 1024 : threads; }

void run_workers(int workers, void (*body)(const void*, int), const void* context) {
  std::unique_lock<std::mutex> lock(g_busy, std::try_to_lock);
  if (!lock.owns_lock()) return body(context, 0);
  start_workers(workers - 1);
  g_body = body, g_context = context;
  g_finished.store(0);
  g_job.store((uint32_t)(workers - 1) << 16);
  g_epoch.fetch_add(1);
  g_epoch.notify_all();
  body(context, 0);
  uint32_t joined = g_job.exchange(0) & 0xffff;
  for (int spin = 0; g_finished.load() < joined; spin++) {
    if (spin < 10 * kSpins) pause_cpu();
    else std::this_thread::yield();  // a worker was interrupted in the middle of an item
  }
}
