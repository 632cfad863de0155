// The threads of the kernels, and memory that belongs to a thread.
//
// A parallel region has one part per thread. Part i waits for thread i, which finds its share of the weights in its own
// core's cache; whoever is done takes parts that have not begun. So a worker that sleeps, or whose core the system gave
// to another process, delays a region only if it was stopped in the middle of a part.
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "internal.h"

namespace tq {
namespace {

// 20 to 50 microseconds: longer than the serial steps between the regions of a layer, which a thread that sleeps would
// miss. Spinning for longer uses up the time that the scheduler gives us beside other processes.
constexpr int SPINS = 1000;

constexpr size_t APART = 128;  // bytes: processors fetch cache lines in pairs

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` takes no time at all on most cores
#else
  std::this_thread::yield();
#endif
}

// A number that threads can sleep on until it changes. Sequentially consistent throughout: whoever changes one word and
// then looks at another must not miss a thread that does the opposite.
struct alignas(APART) Word : std::atomic<uint32_t> {
  using std::atomic<uint32_t>::atomic;

  void sleep_while(uint32_t value) { call(FUTEX_WAIT_PRIVATE, value); }
  void wake_all() { call(FUTEX_WAKE_PRIVATE, INT_MAX); }

 private:
  void call(int operation, uint32_t value) {
    syscall(SYS_futex, static_cast<std::atomic<uint32_t> *>(this), operation, value, nullptr, nullptr, 0);
  }
};

class Pool {
 public:
  explicit Pool(int wanted) : wanted(wanted), workers_(new Worker[wanted]) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's threads
    for (size_ = 1; size_ < wanted; size_++) {
      Worker &worker = workers_[size_];
      worker.pool = this;
      worker.part = size_;
      if (pthread_create(&worker.thread, nullptr, work, &worker) != 0) break;  // make do with those that started
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Pool() {
    stop_ = true;
    publish();
    for (int i = 1; i < size_; i++) pthread_join(workers_[i].thread, nullptr);
    delete[] workers_;
  }

  void run(void (*part)(void *, int, int), void *context) {
    part_ = part;
    context_ = context;
    caller_processor_.store(sched_getcpu());
    left_.store(size_);
    const uint32_t generation = publish();
    execute(0);
    take_parts(1, generation);
    wait_until_done();
  }

  const int wanted;

 private:
  struct Worker {
    Word taken{0};  // the last generation in which somebody took this part
    Pool *pool;
    int part;
    pthread_t thread;
  };

  uint32_t publish() {
    const uint32_t generation = generation_.load() + 1;
    generation_.store(generation);
    if (sleepers_.load() > 0) generation_.wake_all();
    return generation;
  }

  static void *work(void *argument) {
    const Worker &self = *static_cast<Worker *>(argument);
    self.pool->serve(self.part);
    return nullptr;
  }

  void serve(int part);

  uint32_t wait_for_next(uint32_t seen) {
    // A busy machine may put us where the caller runs, which then waits for us to stop spinning.
    const int spins = sched_getcpu() == caller_processor_.load() ? 0 : SPINS;
    for (int i = 0; i < spins; i++, pause_briefly()) {
      if (const uint32_t now = generation_.load(); now != seen) return now;
    }
    sleepers_.fetch_add(1);
    while (generation_.load() == seen) generation_.sleep_while(seen);
    sleepers_.fetch_sub(1);
    return generation_.load();
  }

  // From `first` on, and round to it. Every part is taken once in each generation, so one that may be taken in this one
  // was taken last in the one before; a thread that comes too late for its generation finds a newer number.
  void take_parts(int first, uint32_t generation) {
    for (int i = 0; i < size_ - 1; i++) {
      const int part = (first - 1 + i) % (size_ - 1) + 1;
      uint32_t before = generation - 1;
      Word &taken = workers_[part].taken;
      if (taken.load() == before && taken.compare_exchange_strong(before, generation)) execute(part);
    }
  }

  void execute(int part) {
    part_(context_, part, size_);
    if (left_.fetch_sub(1) == 1 && caller_sleeps_.load()) left_.wake_all();
  }

  void wait_until_done() {
    for (int i = 0; i < SPINS; i++, pause_briefly()) {
      if (left_.load() == 0) return;
    }
    caller_sleeps_.store(1);
    while (const uint32_t left = left_.load()) left_.sleep_while(left);
    caller_sleeps_.store(0);
  }

  Word generation_{0}, left_{0}, sleepers_{0}, caller_sleeps_{0};
  void (*part_)(void *, int, int) = nullptr;
  void *context_ = nullptr;
  std::atomic<int> caller_processor_{-1};
  std::atomic<bool> stop_{false};
  Worker *workers_;
  int size_ = 1;
};

thread_local bool in_region = false;

void Pool::serve(int part) {
  in_region = true;
  for (uint32_t seen = 0;;) {
    seen = wait_for_next(seen);
    if (stop_) return;
    take_parts(part, seen);
  }
}

std::atomic<int> wanted_threads{0};  // 0: not set yet
std::atomic<bool> pool_taken{false};
Pool *pool = nullptr;  // belongs to who took it; never destroyed at exit, where workers may still be asleep in it

void forget_after_fork() {  // the child has one thread: ours
  pool = nullptr;
  pool_taken = false;
  in_region = false;
}

// When the library is loaded, as another thread may fork at any time later.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, forget_after_fork);

Pool &current_pool() {
  if (pool && pool->wanted != threads()) {
    delete pool;
    pool = nullptr;
  }
  if (!pool) pool = new Pool(threads());
  return *pool;
}

struct Scratch {
  void *data[SLOTS] = {};
  size_t bytes[SLOTS] = {};
  ~Scratch() {
    for (void *memory : data) free(memory);
  }
};

}  // namespace

int threads() {
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  return wanted > 0 ? wanted : std::max(1u, std::thread::hardware_concurrency());
}

void run(void (*part)(void *, int, int), void *context) {
  if (in_region || pool_taken.exchange(true)) return part(context, 0, 1);
  in_region = true;
  current_pool().run(part, context);
  in_region = false;
  pool_taken = false;
}

void *scratch_bytes(int slot, size_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.bytes[slot]) {
    constexpr size_t PAGE = 4096;
    free(scratch.data[slot]);
    scratch.bytes[slot] = (bytes + bytes / 2 + PAGE - 1) / PAGE * PAGE;
    scratch.data[slot] = aligned_alloc(64, scratch.bytes[slot]);
    if (!scratch.data[slot]) abort();  // as operator new does without exceptions
  }
  return scratch.data[slot];
}

}  // namespace tq

void tq_set_threads(int32_t n) { tq::wanted_threads = std::max(1, n); }

int32_t tq_get_threads(void) { return tq::threads(); }
