// Threads for kernels that clang compiled. What clang makes of `#pragma omp` calls an OpenMP runtime; PyTorch's cannot be
// linked with on a Mac, and a second one in the process crashes or takes the cores from the first. So the few functions that
// our directives call are defined here, as LLVM's runtime defines them (openmp/runtime/src/kmp.h), hidden from all others.
// What gcc compiled shares the libgomp that PyTorch loaded, and has no need of this.
//
// A region has the workers if no other region has them, else one thread alone: no result depends on their number.
#ifndef _WIN32
#include <pthread.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace {

constexpr int kMostArguments = 96;  // variables that a region shares: conv_backward's has 53
constexpr int kSpins = 2000;        // looks at a number, some 20 to 80 µs, before a thread sleeps

void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // "yield" takes no time on many of them
#endif
}

// A number that one thread changes and others wait for.
class Signal {
 public:
  uint64_t now() const { return value_.load(std::memory_order_acquire); }

  void set(uint64_t value) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      value_.store(value, std::memory_order_release);
    }
    changed_.notify_all();
  }

  // The value once it is no longer this one.
  uint64_t after(uint64_t old) {
    for (int k = 0; k < kSpins; ++k, rest())
      if (now() != old) return now();
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return now() != old; });
    return now();
  }

 private:
  std::atomic<uint64_t> value_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// What the threads of a region share.
struct Team {
  int size = 1;
  std::atomic<int> arrived{0};
  Signal passed;                 // barriers
  std::atomic<uint64_t> loop{0};  // the number of a dynamic loop in the upper half, its next iteration in the lower
  std::atomic<uint32_t> singles{0};

  void meet() {
    const uint64_t before = passed.now();
    const int all = size;  // once the last has arrived, the next region may have another one
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < all) {
      passed.after(before);
    } else {
      arrived.store(0, std::memory_order_relaxed);
      passed.set(before + 1);
    }
  }
};

// A thread within a region. Loops and singles are met in the same order by all, so that counting them tells which is which.
struct Member {
  Team* team;
  int32_t index;
  uint64_t loops = 0;
  uint32_t singles = 0;
  uint64_t iterations = 0;
};
thread_local Member* self = nullptr;
thread_local int32_t wanted = 1;  // threads for the region that comes next

using Body = void (*)(int32_t* thread, int32_t* bound, ...);

// The compiled body of a region takes as many pointers as it shares variables; it is not variadic.
template <size_t>
using Pointer = void*;
template <size_t... k>
void call_with(Body body, int32_t index, void* const* shared, std::index_sequence<k...>) {
  reinterpret_cast<void (*)(int32_t*, int32_t*, Pointer<k>...)>(body)(&index, &index, shared[k]...);
}
template <size_t n>
void call(Body body, int32_t index, void* const* shared) {
  call_with(body, index, shared, std::make_index_sequence<n>());
}
using Call = void (*)(Body, int32_t, void* const*);
template <size_t... n>
Call call_of(size_t arguments, std::index_sequence<n...>) {
  static constexpr Call calls[] = {call<n>...};
  return calls[arguments];
}

struct Region {
  Body body;
  Call call;
  void* shared[kMostArguments];

  void run(Team& team, int32_t index) const {
    Member member{&team, index};
    Member* const outer = std::exchange(self, &member);
    call(body, index, shared);
    self = outer;
  }
};

class Workers {
 public:
  // False: another region has them.
  bool run(const Region& region, int32_t size) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock) return false;
    try {
      for (; count_ < size - 1; ++count_) std::thread(&Workers::work, this, count_ + 1, call_.now()).detach();
    } catch (const std::system_error&) {  // as many as the system gives
      size = count_ + 1;
    }
    region_ = &region;
    team_.size = size;
    team_.loop = team_.singles = 0;
    call_.set(((call_.now() >> 16) + 1) << 16 | uint64_t(size));
    region.run(team_, 0);
    team_.meet();
    return true;
  }

 private:
  // What a worker reads of a region stays until all its threads have met; who is not of the region reads nothing of it.
  void work(int32_t index, uint64_t seen) {
    for (;;) {
      seen = call_.after(seen);
      if (index >= int32_t(seen & 0xffff)) continue;
      region_->run(team_, index);
      team_.meet();
    }
  }

  std::mutex busy_;
  int32_t count_ = 0;
  Signal call_;  // number of the region << 16 | its threads
  const Region* region_ = nullptr;
  Team team_;
};

// Never destroyed: its threads sleep until the process ends. The threads of a process that forks stay behind in it.
Workers* workers = nullptr;

Workers& the_workers() {
  static const bool once = [] {
    workers = new Workers;
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { workers = new Workers; });
#endif
    return true;
  }();
  (void)once;
  return *workers;
}

// The part of iterations lower..upper that is this thread's, as clang asks for it: all of them at once, in order.
template <class I, class S>
void share(int32_t schedule, int32_t* is_last, I* lower, I* upper, S* stride) {
  constexpr int32_t kStatic = 34;  // without a size of the parts
  if (schedule != kStatic) std::abort();
  const uint64_t n = uint64_t(*upper - *lower) + 1, size = uint64_t(self->team->size), index = uint64_t(self->index);
  const uint64_t each = n / size, rest = n % size;
  const uint64_t begin = index * each + (index < rest ? index : rest), end = begin + each + (index < rest);
  *is_last = end == n && begin < end;
  *upper = I(*lower + I(end) - 1);
  *lower = I(*lower + I(begin));
  *stride = S(n);
}

template <class I>
int next(int32_t* is_last, I* lower, I* upper, I* stride) {
  const uint64_t first = self->loops << 32;
  std::atomic<uint64_t>& loop = self->team->loop;
  uint64_t at = loop.load(std::memory_order_relaxed), taken;
  do {
    taken = at < first ? first : at;
    if (taken - first >= self->iterations) return 0;
  } while (!loop.compare_exchange_weak(at, taken + 1, std::memory_order_relaxed));
  *lower = *upper = I(taken - first);
  *stride = 1;
  *is_last = taken - first + 1 == self->iterations;
  return 1;
}

// A loop of our kernels begins at 0 and hands out one iteration at a time.
void begin_loop(int64_t lower, int64_t upper, int64_t stride, int64_t chunk) {
  if (lower != 0 || stride != 1 || chunk != 1 || upper >= int64_t(UINT32_MAX)) std::abort();
  self->loops += 1;
  self->iterations = uint64_t(upper + 1);
}

}  // namespace

#pragma GCC visibility push(hidden)
extern "C" {

int32_t __kmpc_global_thread_num(void*) { return self ? self->index : 0; }
void __kmpc_push_num_threads(void*, int32_t, int32_t n) { wanted = n; }

void __kmpc_fork_call(void*, int32_t n, Body body, ...) {
  if (n > kMostArguments) {
    fprintf(stderr, "srcgcnn_fast: a parallel region shares %d variables, raise kMostArguments\n", n);
    std::abort();
  }
  Region region{body, call_of(size_t(n), std::make_index_sequence<kMostArguments + 1>()), {}};
  va_list arguments;
  va_start(arguments, body);
  for (int32_t k = 0; k < n; ++k) region.shared[k] = va_arg(arguments, void*);
  va_end(arguments);
  const int32_t size = std::exchange(wanted, 1);
  if (size > 1 && size < 1 << 16 && !self && the_workers().run(region, size)) return;
  Team alone;
  region.run(alone, 0);
}

void __kmpc_barrier(void*, int32_t) { self->team->meet(); }

int32_t __kmpc_master(void*, int32_t) { return self->index == 0; }
void __kmpc_end_master(void*, int32_t) {}

int32_t __kmpc_single(void*, int32_t) {
  uint32_t before = self->singles++;
  return self->team->singles.compare_exchange_strong(before, before + 1, std::memory_order_relaxed);
}
void __kmpc_end_single(void*, int32_t) {}

void __kmpc_for_static_init_4(void*, int32_t, int32_t schedule, int32_t* last, int32_t* lower, int32_t* upper, int32_t* stride,
                              int32_t, int32_t) {
  share(schedule, last, lower, upper, stride);
}
void __kmpc_for_static_init_4u(void*, int32_t, int32_t schedule, int32_t* last, uint32_t* lower, uint32_t* upper, int32_t* stride,
                              int32_t, int32_t) {
  share(schedule, last, lower, upper, stride);
}
void __kmpc_for_static_init_8(void*, int32_t, int32_t schedule, int32_t* last, int64_t* lower, int64_t* upper, int64_t* stride,
                              int64_t, int64_t) {
  share(schedule, last, lower, upper, stride);
}
void __kmpc_for_static_init_8u(void*, int32_t, int32_t schedule, int32_t* last, uint64_t* lower, uint64_t* upper, int64_t* stride,
                              int64_t, int64_t) {
  share(schedule, last, lower, upper, stride);
}
void __kmpc_for_static_fini(void*, int32_t) {}

void __kmpc_dispatch_init_4(void*, int32_t, int32_t, int32_t lower, int32_t upper, int32_t stride, int32_t chunk) {
  begin_loop(lower, upper, stride, chunk);
}
void __kmpc_dispatch_init_8(void*, int32_t, int32_t, int64_t lower, int64_t upper, int64_t stride, int64_t chunk) {
  begin_loop(lower, upper, stride, chunk);
}
int __kmpc_dispatch_next_4(void*, int32_t, int32_t* last, int32_t* lower, int32_t* upper, int32_t* stride) {
  return next(last, lower, upper, stride);
}
int __kmpc_dispatch_next_8(void*, int32_t, int32_t* last, int64_t* lower, int64_t* upper, int64_t* stride) {
  return next(last, lower, upper, stride);
}
void __kmpc_dispatch_deinit(void*, int32_t) {}  // called by clang 19 and newer
}
#pragma GCC visibility pop
