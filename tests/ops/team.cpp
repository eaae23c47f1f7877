// The functions of csrc/cpu/team.cpp, called as clang calls them for `#pragma omp`; "fork" tries them in a forked process, too.
//
//   g++ -std=c++17 -O2 -fsanitize=thread tests/ops/team.cpp csrc/cpu/team.cpp -o team && ./team
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

extern "C" {
using Body = void (*)(int32_t*, int32_t*, ...);
void __kmpc_push_num_threads(void*, int32_t, int32_t);
void __kmpc_fork_call(void*, int32_t, Body, ...);
int32_t __kmpc_global_thread_num(void*);
void __kmpc_barrier(void*, int32_t);
int32_t __kmpc_master(void*, int32_t);
int32_t __kmpc_single(void*, int32_t);
void __kmpc_for_static_init_4(void*, int32_t, int32_t, int32_t*, int32_t*, int32_t*, int32_t*, int32_t, int32_t);
void __kmpc_for_static_init_8u(void*, int32_t, int32_t, int32_t*, uint64_t*, uint64_t*, int64_t*, int64_t, int64_t);
void __kmpc_dispatch_init_4(void*, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t);
void __kmpc_dispatch_init_8(void*, int32_t, int32_t, int64_t, int64_t, int64_t, int64_t);
int __kmpc_dispatch_next_4(void*, int32_t, int32_t*, int32_t*, int32_t*, int32_t*);
int __kmpc_dispatch_next_8(void*, int32_t, int32_t*, int64_t*, int64_t*, int64_t*);
}

namespace {

constexpr int kStatic = 34, kDynamic = 35;

void check(bool right, const char* what) {
  if (right) return;
  fprintf(stderr, "wrong: %s\n", what);
  std::_Exit(1);
}

// What a region leaves: plain memory, so that the thread sanitizer sees whether the functions order its readings and writings.
struct Seen {
  explicit Seen(int iterations) : visits(iterations), sums(iterations) {}
  std::vector<int> visits, sums;
  int masters = 0, singles = 0;
  int present[8] = {};  // threads
};

// Loops of every kind, one after the other; in between, threads read what others wrote.
void body(int32_t* thread, int32_t*, Seen* first, Seen* second, Seen* third, const int64_t* rounds) {
  const int32_t t = *thread;
  check(t == __kmpc_global_thread_num(nullptr), "a thread's number");
  first->present[t] += 1;
  const int n = int(first->visits.size());
  for (int64_t round = 0; round < *rounds; ++round) {
    int32_t last = 0, lower = 0, upper = n - 1, stride = 1;
    if (n) {
      __kmpc_for_static_init_4(nullptr, t, kStatic, &last, &lower, &upper, &stride, 1, 1);
      for (int i = lower; i <= upper; ++i) first->visits[size_t(i)] += 1;
    }
    __kmpc_barrier(nullptr, t);
    __kmpc_dispatch_init_4(nullptr, t, kDynamic, 0, n - 1, 1, 1);
    while (__kmpc_dispatch_next_4(nullptr, t, &last, &lower, &upper, &stride))
      for (int i = lower; i <= upper; ++i) {
        second->visits[size_t(i)] += 1;
        second->sums[size_t(i)] += first->visits[size_t(n - 1 - i)];
      }
    __kmpc_barrier(nullptr, t);
    if (__kmpc_master(nullptr, t)) first->masters += 1;
    if (__kmpc_single(nullptr, t)) first->singles += 1;
    __kmpc_barrier(nullptr, t);
    check(first->masters == round + 1 && first->singles == round + 1, "one thread has a single");
    int64_t from = 0, to = 0, step = 0;
    __kmpc_dispatch_init_8(nullptr, t, kDynamic, 0, n - 1, 1, 1);
    while (__kmpc_dispatch_next_8(nullptr, t, &last, &from, &to, &step))
      for (int64_t i = from; i <= to; ++i) third->visits[size_t(i)] += 1;
    __kmpc_barrier(nullptr, t);
    if (n) {
      uint64_t begin = 0, end = uint64_t(n) - 1;
      __kmpc_for_static_init_8u(nullptr, t, kStatic, &last, &begin, &end, &step, 1, 1);
      for (uint64_t i = begin; i + 1 < end + 2; ++i) third->sums[i] += second->visits[size_t(n) - 1 - i];
    }
    __kmpc_barrier(nullptr, t);
  }
}

void region(int threads, int n, int64_t rounds, bool is_only) {
  Seen first(n), second(n), third(n);
  __kmpc_push_num_threads(nullptr, 0, threads);
  __kmpc_fork_call(nullptr, 4, reinterpret_cast<Body>(body), &first, &second, &third, &rounds);
  for (int t = 0; t < (is_only ? threads : 1); ++t) check(first.present[t] == 1, "as many threads as were asked for");
  for (const Seen* seen : {&first, &second, &third})
    for (int visits : seen->visits) check(visits == rounds, "each iteration once");
  for (const Seen* seen : {&second, &third})
    for (int sum : seen->sums) check(sum == rounds * (rounds + 1) / 2, "what another thread wrote");
}

// Regions within a region have one thread each.
void nested(int32_t*, int32_t*) { region(3, 5, 2, false); }

int calls = 0;
void nothing(int32_t*, int32_t*) { calls += 1; }
void many(int32_t*, int32_t*, int* a0, int* a1, int* a2, int* a3, int* a4, int* a5, int* a6, int* a7, int* a8, int* a9) {
  for (int* a : {a0, a1, a2, a3, a4, a5, a6, a7, a8, a9}) *a += 1;
}

void arguments() {
  __kmpc_fork_call(nullptr, 0, reinterpret_cast<Body>(nothing));  // nobody asked for threads
  check(calls == 1, "one thread");
  __kmpc_push_num_threads(nullptr, 0, 2);
  __kmpc_fork_call(nullptr, 0, reinterpret_cast<Body>(nested));
  int a[10];
  for (int k = 0; k < 10; ++k) a[k] = k;
  __kmpc_fork_call(nullptr, 10, reinterpret_cast<Body>(many), a, a + 1, a + 2, a + 3, a + 4, a + 5, a + 6, a + 7, a + 8, a + 9);
  for (int k = 0; k < 10; ++k) check(a[k] == k + 1, "arguments in order");
}

void all(bool is_only) {
  for (int threads = 1; threads <= 5; ++threads)
    for (int n : {0, 1, 3, 4, 100}) region(threads, n, 8, is_only);
}

}  // namespace

int main(int count, char** given) {
  all(true);
  arguments();
  std::vector<std::thread> callers;  // regions at once: one of them has the threads
  for (int k = 0; k < 3; ++k) callers.emplace_back(all, false);
  for (auto& caller : callers) caller.join();
  if (count > 1 && !strcmp(given[1], "fork")) {
    const pid_t child = fork();
    if (!child) {
      all(true);
      std::_Exit(0);
    }
    int status = 1;
    check(waitpid(child, &status, 0) == child && status == 0, "a forked process");
  }
  for (int k = 0; k < 200; ++k) {  // the workers sleep in between
    region(1 + k % 3, 7, 1, true);
    if (k % 20 == 0) usleep(2000);
  }
  puts("done");
}
