// CUDA's execution model for an ordinary compiler, so that the kernels of csrc/cuda run, slowly, on a CPU: a block's
// threads are fibers, which meet at __syncthreads and at every operation of a warp. Included before the kernels.
//
// What it finds: wrong indices, layouts and orders (results), numbers that nobody wrote (shared memory begins as NaN),
// overruns of shared memory (the pages around it cannot be touched, and what fills the first one must stay), vectors that
// are not aligned (a trap), lanes that do not meet where they must (abort), and missing barriers (results that depend on the order of warps, see
// emulated_order; every race, whatever the results, with races.h). What it does not: speed, and the rounding of the GPU's
// approximate exponentials.
#pragma once
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "races.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define SRCGCNN_DEVICE inline
#define SRCGCNN_HOST_DEVICE inline
#define SRCGCNN_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  emulation::launch((kernel), grid, threads, shared, stream, __VA_ARGS__)
#define SRCGCNN_SHARED(name) float* name = emulation::shared_memory

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct Index {
  unsigned x = 0;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation __attribute__((visibility("hidden"))) {

constexpr int kMostThreads = 1024, kMostCopies = 256, kStack = 260 << 10;  // 256 would put all stacks into the same sets of a cache
inline int processors = 4, shared_per_processor = 228 << 10;
inline int places = 25, parts = 1;  // of the tensor cores' sums: Hopper's
inline bool descending = false;
inline int launches = 0, on_stream = 0;  // the latter: those, and memsets, that went to `asked_stream`
inline void* asked_stream;
inline unsigned last_blocks = ~0u;  // only so many blocks run, the last ones
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, int> allowed;  // shared memory of the kernels that asked for more than 48 KiB
inline float* shared_memory;
inline int shared_size;
inline std::vector<std::function<void()>> sent;  // copies from the host that nobody has waited for
inline std::map<void*, size_t> recorded;         // how many of them an event stands for

enum State : uint8_t { kReady, kAtWarp, kAtBlock, kDone };
enum Meeting { kSyncWarp, kShuffle, kBallot, kReduction, kProduct, kProductOfBfloat16, kProductOfHalf };
struct Copy {  // to shared memory: it comes when the thread waits for its group, no sooner
  void* to;
  const void* from;
  bool there;
  int group;
};
struct Thread {
  void* at[5];  // where it goes on
  bool begun = false;
  int group = 0, n_copies = 0;
  Copy copies[kMostCopies];
};
struct Warp {
  State state[32];
  int waiting = 0;  // lanes that are at `meeting`
  Meeting meeting;
  int turn = 0;  // which half of `words` is next
  uint32_t words[2][32];
  float sum[32][4];  // what each lane holds of the factors and the sum of a product
  uint32_t a[32][4], b[32][2];
};
inline Thread threads[kMostThreads];
inline Warp warps[kMostThreads / 32];
inline void* scheduler[5];
inline int current;
inline std::function<void()> body;
inline const bool told = (races_not_of_kernels(threads, sizeof threads), races_not_of_kernels(warps, sizeof warps), true);

inline Warp& my_warp() { return warps[current / 32]; }
inline int lane() { return current % 32; }
inline State& state_of(int thread) { return warps[thread / 32].state[thread % 32]; }
inline char* const stacks = static_cast<char*>(
    mmap(nullptr, size_t(kMostThreads) * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
inline char* stack_of(int thread) { return stacks + size_t(thread) * kStack; }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation of CUDA: %s (block %u, thread %d)\n", what, blockIdx.x, current);
  abort();
}

// To where __builtin_setjmp was, which is cheaper than setjmp. Were it seen not to return, the compiler would drop what comes then.
[[gnu::noipa]] inline void go_on(void** at) { __builtin_longjmp(at, 1); }

// To the warp's next lane if it can go on, which is cheaper than by way of the scheduler.
[[gnu::noinline]] inline void leave(State state) {
  races_thread(-1, nullptr, 0);
  state_of(current) = state;
  if (!__builtin_setjmp(threads[current].at)) {
    const int next = current + (descending ? -1 : 1);
    if (next < 0 || next / 32 != current / 32 || state_of(next) != kReady || !threads[next].begun) go_on(scheduler);
    threadIdx.x = unsigned(current = next);
    go_on(threads[next].at);
  }
  races_thread(current, stack_of(current), kStack);
}
inline void run_for_ever() {
  for (;;) {
    races_thread(current, stack_of(current), kStack);
    body();
    leave(kDone);
  }
}
// Comes back when a lane waits and the next one cannot go on; that lane is `current` then.
[[gnu::noinline]] inline void resume(int thread) {
  static ucontext_t context;
  threadIdx.x = unsigned(current = thread);
  if (__builtin_setjmp(scheduler)) return;
  if (threads[thread].begun) go_on(threads[thread].at);
  threads[thread].begun = true;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_of(thread);
  context.uc_stack.ss_size = kStack - thread % 32 * 128;  // not all in the same lines of the cache
  makecontext(&context, run_for_ever, 0);
  setcontext(&context);
}

// All lanes of the warp meet; they must do so for the same operation.
inline void meet(Meeting operation) {
  Warp& warp = my_warp();
  if (warp.waiting++ && warp.meeting != operation) fail("the lanes of a warp meet for different operations");
  warp.meeting = operation;
  leave(kAtWarp);
}
inline void multiply(Warp& warp);
inline bool open_warp(int number) {
  Warp& warp = warps[number];
  if (warp.waiting != 32) return false;
  warp.waiting = 0;
  warp.turn ^= 1;
  memset(warp.state, kReady, sizeof warp.state);
  if (warp.meeting >= kProduct) multiply(warp);
  if (warp.meeting == kSyncWarp) races_at_warp(number);
  return true;
}

inline void run_block(int n_threads) {
  const int n_warps = n_threads / 32, step = descending ? -1 : 1;
  for (int w = 0; w < n_warps; ++w) memset(warps[w].state, kReady, sizeof warps[w].state);
  for (;;) {
    bool moved = false;
    for (int w = 0; w < n_warps; ++w) {
      const int warp = descending ? n_warps - 1 - w : w;
      do {  // as far as it can: the greatest distance between warps
        for (int lane = descending ? 31 : 0; lane >= 0 && lane < 32; lane += step) {
          if (warps[warp].state[lane] != kReady) continue;
          resume(32 * warp + lane);
          lane = current % 32;
          moved = true;
        }
      } while (open_warp(warp));
    }
    int at_block = 0, done = 0;
    for (int t = 0; t < n_threads; ++t) {
      at_block += state_of(t) == kAtBlock;
      done += state_of(t) == kDone;
    }
    for (int t = 0; t < n_threads && done == n_threads; ++t)
      if (threads[t].n_copies) fail("a thread ends before its copies have come");
    if (done == n_threads) return;
    if (at_block == n_threads) {
      for (int w = 0; w < n_warps; ++w) memset(warps[w].state, kReady, sizeof warps[w].state);
      races_at_block();
    } else if (!moved)
      fail("threads wait for others that do not come");
  }
}

inline void run_blocks(unsigned grid, int n_threads, int shared, void* stream, const std::function<void()>& kernel) {
  const size_t page = 4096, size = (size_t(shared) + page - 1) / page * page;
  void* reserved = mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* memory = static_cast<char*>(reserved) + page;
  if (size) mprotect(memory, size, PROT_READ | PROT_WRITE);
  shared_memory = reinterpret_cast<float*>(memory + size - size_t(shared) / 16 * 16);
  shared_size = shared;
  body = kernel;
  races_launch(memory, size);
  ++launches;
  on_stream += stream == asked_stream;
  gridDim.x = grid;
  blockDim.x = unsigned(n_threads);
  const unsigned some = grid < last_blocks ? grid : last_blocks;
  for (unsigned block = grid - some; block < grid; ++block) {
    blockIdx.x = descending ? 2 * grid - some - 1 - block : block;
    if (size) memset(memory, 0xff, size);
    races_block(blockIdx.x);
    run_block(n_threads);
    for (const char* at = memory; at < reinterpret_cast<const char*>(shared_memory); ++at)
      if (*at != '\xff') fail("a write before shared memory");
  }
  munmap(reserved, size + 2 * page);
}

// A kernel as ptx.py wrote it, which takes its arguments as a GPU does: one after the other, each aligned.
struct Translated {
  int size, most_threads;
  void (*run)(const char* given);
  Translated(const char* name, int size, int most_threads, void (*run)(const char*))
      : size(size), most_threads(most_threads), run(run) {
    all()[name] = this;
  }
  static std::map<std::string, const Translated*>& all() {
    static std::map<std::string, const Translated*> found;
    return found;
  }
  static const Translated& of(const void* kernel) {
    Dl_info about{};
    dladdr(kernel, &about);
    const auto found = all().find(about.dli_sname ? about.dli_sname : "");
    if (found == all().end()) fail("a kernel that nvcc did not compile");
    return *found->second;
  }
};
struct alignas(16) Piece {
  char bytes[16];
};
inline void put(std::vector<Piece>& arguments, size_t& end, const void* argument, size_t size, size_t alignment) {
  end = (end + alignment - 1) / alignment * alignment + size;
  arguments.resize((end + 15) / 16);
  memcpy(arguments.data()->bytes + end - size, argument, size);
}

// What a GPU refuses to launch is an error, and nothing runs.
template <class... Parameters, class... Given>
void launch(void (*kernel)(Parameters...), unsigned grid, int threads, int shared, void* stream, const Given&... given) {
  const void* code = reinterpret_cast<void*>(kernel);
  const auto found = allowed.find(code);
  int most_threads = kMostThreads;
  std::function<void()> work = [=] { kernel(given...); };
#ifdef SRCGCNN_PTX  // what nvcc made of it
  const Translated& translated = Translated::of(code);
  most_threads = translated.most_threads;
  std::vector<Piece> arguments;
  size_t end = 0;
  const auto add = [&](const auto& argument) { put(arguments, end, &argument, sizeof argument, alignof(decltype(argument))); };
  (add(Parameters(given)), ...);
  if (int(end) != translated.size) fail("a kernel with other arguments");
  work = [arguments, run = translated.run] { run(arguments.data()->bytes); };
#endif
  if (!grid || grid > 0x7fffffff || threads > most_threads || threads <= 0)
    last_error = cudaErrorInvalidConfiguration;
  else if (shared > (found == allowed.end() ? 48 << 10 : found->second))
    last_error = cudaErrorInvalidValue;
  else
    run_blocks(grid, threads, shared, stream, work);
}

}  // namespace emulation

inline void __syncthreads() { emulation::leave(emulation::kAtBlock); }

inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
// What a lane says, and what all of its warp said when they have met.
template <class T>
SRCGCNN_UNSEEN const uint32_t (&words_of_all(emulation::Meeting operation, T x))[32] {
  static_assert(sizeof(T) == 4, "words alone");
  emulation::Warp& warp = emulation::my_warp();
  memcpy(&warp.words[warp.turn][emulation::lane()], &x, 4);
  emulation::meet(operation);
  return warp.words[warp.turn ^ 1];
}
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  memcpy(&x, &words_of_all(emulation::kShuffle, x)[from & 31], 4);
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned all, T x, int mask) {
  return __shfl_sync(all, x, emulation::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto& words = words_of_all(emulation::kBallot, uint32_t(x));
  unsigned found = 0;
  for (int lane = 0; lane < 32; ++lane) found |= words[lane] << lane;
  return found;
}
template <class T, class Combine>
T reduced(T x, Combine combine) {
  const auto& words = words_of_all(emulation::kReduction, x);
  T found = T(words[0]);
  for (int lane = 1; lane < 32; ++lane) found = combine(found, T(words[lane]));
  return found;
}
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  return reduced(x, [](unsigned a, unsigned b) { return a | b; });
}
inline int __reduce_min_sync(unsigned, int x) {
  return reduced(x, [](int a, int b) { return a < b ? a : b; });
}
inline int __reduce_max_sync(unsigned, int x) {
  return reduced(x, [](int a, int b) { return a > b ? a : b; });
}
inline void __syncwarp() { emulation::meet(emulation::kSyncWarp); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
SRCGCNN_UNSEEN inline unsigned atomicCAS(unsigned* at, unsigned expected, unsigned value) {
  races_atomic(at, sizeof *at, __builtin_return_address(0));
  const unsigned found = *at;
  if (found == expected) *at = value;
  return found;
}
SRCGCNN_UNSEEN inline int atomicAdd(int* at, int value) {
  races_atomic(at, sizeof *at, __builtin_return_address(0));
  const int found = *at;
  *at += value;
  return found;
}

namespace srcgcnn::device {
inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
inline float exp2(float x) { return flushed(::exp2f(flushed(x))); }
inline float reciprocal(float x) { return flushed(1.0f / flushed(x)); }
template <class T>
void prefetch(const T*, int64_t, int64_t) {}
inline unsigned known_late(unsigned x) { return x; }
template <bool kCached = false>
SRCGCNN_UNSEEN void copy_async(void* to, const void* from, bool there) {
  auto& thread = emulation::threads[emulation::current];
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a copy is not aligned");
  if (thread.n_copies == emulation::kMostCopies) emulation::fail("too many copies on their way");
  races_copy(to, there ? from : nullptr, false, __builtin_return_address(0));
  thread.copies[thread.n_copies++] = {to, from, there, thread.group};
}
inline void store_four(float* to, float x0, float x1, float x2, float x3) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::fail("a vector is not aligned");
  to[0] = x0, to[1] = x1, to[2] = x2, to[3] = x3;
}
inline void commit_copies() { ++emulation::threads[emulation::current].group; }
template <int kLeft>
SRCGCNN_UNSEEN void wait_for_copies() {
  auto& thread = emulation::threads[emulation::current];
  int later = 0;
  for (int k = 0; k < thread.n_copies; ++k) {
    const emulation::Copy copy = thread.copies[k];
    if (copy.group >= thread.group - kLeft) {
      thread.copies[later++] = copy;
      continue;
    }
    races_copy(copy.to, copy.there ? copy.from : nullptr, true, __builtin_return_address(0));
    if (copy.there)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
  thread.n_copies = later;
}
// d += a b: what this lane holds of the three.
template <class Word>
SRCGCNN_UNSEEN void multiply(emulation::Meeting product, float (&d)[4], const Word (&a)[4], const Word (&b)[2]) {
  emulation::Warp& warp = emulation::my_warp();
  const int lane = emulation::lane();
  memcpy(warp.sum[lane], d, sizeof d);
  memcpy(warp.a[lane], a, sizeof a);
  memcpy(warp.b[lane], b, sizeof b);
  emulation::meet(product);
  memcpy(d, warp.sum[lane], sizeof d);
}
inline void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) { multiply(emulation::kProduct, d, a, b); }
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(emulation::kProductOfBfloat16, d, a, b);
}
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(emulation::kProductOfHalf, d, a, b);
}
inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_bfloat16(float low, float high) { return to_bfloat16(high) << 16 | to_bfloat16(low); }
// IEEE 754's 16 bits: nearest, ties to even, with subnormal numbers.
inline uint32_t to_half(float x) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(x) & 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= 0x47800000) return sign | 0x7c00;
  // Subnormal numbers: a sum with 1/2, whose last place is 2^-24, rounds them.
  if (bits < 0x38800000) return sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000);
  return sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
}
inline uint32_t to_half(float low, float high) { return to_half(high) << 16 | to_half(low); }
inline float of_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size < 0x400) return copysignf(float(size) * 0x1p-24f, __uint_as_float(sign));
  return __uint_as_float(sign | (size < 0x7c00 ? (size << 13) + (112u << 23) : 0x7f800000u | (size & 0x3ff) << 13));
}
inline void of_half(uint32_t both, float& low, float& high) {
  low = of_half(both & 0xffff);
  high = of_half(both >> 16);
}
}  // namespace srcgcnn::device

namespace emulation {
// Vectors of the compiler's, which are never arguments, so that it need not know those of the processor.
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
// A tensor core does not round a sum to the nearest number: products and what they are added to are cut off below so many binary
// places of the largest of them, all at once (Hopper) or in halves (Ampere), and so is the sum, below those of a float. Bit by
// bit what Xie et al. found GPUs to do, arXiv 2511.10909. One (16, K) tile times one (K, 8) tile; `number` reads the k-th of a
// word's numbers, whose exponents are not below `least`.
template <int K, class Number>
SRCGCNN_UNSEEN void multiply(Warp& warp, int least, const Number& number) {
  constexpr int kEach = K / 8, kWords = 4 * kEach;  // numbers of a word, and of all first words of four lanes
  const int at_once = K / parts;
  const auto read = [&](const Floats& given, Doubles& numbers, Longs& exponents) {
    Ints found = ((Ints(given) >> 23) & 255) - 127;
    found = given == 0 ? Ints{} - 126 : found < least ? Ints{} + least : found;
    numbers = __builtin_convertvector(given, Doubles);
    exponents = __builtin_convertvector(found, Longs);
  };
  Doubles right[K], left[kEach];
  Longs of_right[K], of_left[kEach];
  for (int k = 0; k < K; ++k) {
    Floats given{};
    for (int column = 0; column < 8; ++column)
      given[column] = number(warp.b[column * 4 + k % kWords / kEach][k / kWords], k % kEach);
    read(given, right[k], of_right[k]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; k += 8) {
      Floats given{};
      for (int j = 0; j < 8; ++j)
        given[j] = number(warp.a[row % 8 * 4 + (k + j) % kWords / kEach][row / 8 + (k + j) / kWords * 2], j % kEach);
      read(given, left[k / 8], of_left[k / 8]);
    }
    Floats d{};
    for (int column = 0; column < 8; ++column) d[column] = warp.sum[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
    for (int first = 0; first < K; first += at_once) {
      Ints of_d = ((Ints(d) >> 23) & 255) - 127;
      of_d = of_d < -126 ? Ints{} - 126 : of_d;
      Longs most = __builtin_convertvector(of_d, Longs);
      const Doubles wide = __builtin_convertvector(d, Doubles);
      Doubles exact = wide;
      for (int k = first; k < first + at_once; ++k) {
        const Longs both = of_right[k] + of_left[k / 8][k % 8];
        most = both > most ? both : most;
        exact += right[k] * left[k / 8][k % 8];
      }
      const Doubles unit = Doubles((places - most + 1023) << 52), back = Doubles((most - places + 1023) << 52);
      Longs units = __builtin_convertvector(wide * unit, Longs);
      for (int k = first; k < first + at_once; ++k)
        units += __builtin_convertvector(right[k] * left[k / 8][k % 8] * unit, Longs);
      const Doubles sum = __builtin_convertvector(units, Doubles) * back;
      const Floats nearest = __builtin_convertvector(sum, Floats);
      const Doubles too_much = __builtin_convertvector(nearest, Doubles) - sum;
      const Longs beyond = (sum > 0 && too_much > 0) || (sum < 0 && too_much < 0);
      const Floats toward_zero = Floats(Ints(nearest) + __builtin_convertvector(beyond, Ints));
      const Longs finite = exact - exact == 0;
      d = __builtin_convertvector(finite, Ints) ? toward_zero : __builtin_convertvector(exact, Floats);
    }
    for (int column = 0; column < 8; ++column) warp.sum[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] = d[column];
  }
}
inline void multiply(Warp& warp) {
  using srcgcnn::device::of_half;
  if (warp.meeting == kProduct)  // of TF32, which is floats without their last 13 bits
    multiply<8>(warp, -126, [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000); });
  else if (warp.meeting == kProductOfBfloat16)
    multiply<16>(warp, -126, [](uint32_t word, int k) { return __uint_as_float(k ? word & 0xffff0000 : word << 16); });
  else
    multiply<16>(warp, -14, [](uint32_t word, int k) { return of_half(k ? word >> 16 : word & 0xffff); });
}
}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount                ? emulation::processors
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? emulation::shared_per_processor
                                                                      : 1024;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int size) {
  if (size > emulation::shared_per_processor - 1024) return emulation::last_error = cudaErrorInvalidValue;
  emulation::allowed[reinterpret_cast<const void*>(kernel)] = size;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t stream) {
  emulation::on_stream += stream == emulation::asked_stream;
  memset(at, value, size);
  return cudaSuccess;
}
// A copy from the host comes as late as it may: when somebody waits for the event that was recorded after it.
using cudaEvent_t = void*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  emulation::on_stream += stream == emulation::asked_stream;
  emulation::sent.push_back([=] { memcpy(to, from, size); });
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  emulation::recorded[event] = emulation::sent.size();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  for (size_t k = 0; k < emulation::recorded[event]; ++k) emulation::sent[k]();
  emulation::sent.clear();
  emulation::recorded.clear();
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "invalid value";
}

// Of the tests: the emulated GPU, its tensor cores, the order of its warps and blocks, launches so far, launches and memsets on a stream
// since it was named, which blocks run, whether the next launch fails, the wait for an event, the end of all that is on its way.
extern "C" {
__attribute__((weak)) void emulated_gpu(int processors, int shared_per_processor) {
  emulation::processors = processors;
  emulation::shared_per_processor = shared_per_processor;
}
__attribute__((weak)) void emulated_tensor_cores(int places, int parts) {
  emulation::places = places;
  emulation::parts = parts;
}
__attribute__((weak)) void emulated_order(int descending) { emulation::descending = descending; }
__attribute__((weak)) int emulated_launches() { return emulation::launches; }
__attribute__((weak)) int emulated_stream(void* asked) {
  const int found = emulation::on_stream;
  emulation::asked_stream = asked;
  emulation::on_stream = 0;
  return found;
}
__attribute__((weak)) void emulated_blocks(unsigned last) { emulation::last_blocks = last; }
__attribute__((weak)) void emulated_wait(void* event) { cudaEventSynchronize(event); }
__attribute__((weak)) void emulated_end() {
  emulation::sent.clear();
  emulation::recorded.clear();
}
__attribute__((weak)) void emulated_error() { emulation::last_error = cudaErrorInvalidValue; }
}
