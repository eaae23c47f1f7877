// CUDA's execution model for an ordinary compiler, so that the kernels of csrc/cuda run, slowly, on a CPU: a block's
// threads are fibers, which meet at __syncthreads and at every operation of a warp. Included before the kernels.
//
// What it finds: wrong indices, layouts and orders (results), numbers that nobody wrote (shared memory begins as NaN),
// overruns of shared memory (the page after it cannot be touched), vectors that are not aligned (a trap), lanes that do
// not meet where they must (abort), and missing barriers (results that depend on the order of warps, see
// emulated_order; every race, whatever the results, with races.h). What it does not: speed, and the rounding of the GPU's
// approximate exponentials.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <vector>

#include "races.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define SRCGCNN_DEVICE inline
#define SRCGCNN_HOST_DEVICE inline
#define SRCGCNN_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  emulation::launch(grid, threads, shared, stream, [=] { (kernel)(__VA_ARGS__); })
#define SRCGCNN_SHARED(name) float* name = emulation::shared_memory

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
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

namespace emulation {

constexpr int kMostThreads = 1024, kMostCopies = 256, kStack = 256 << 10;
inline int processors = 4, shared_per_processor = 228 << 10;
inline int places = 25, parts = 1;  // of the tensor cores' sums: Hopper's
inline bool descending = false;
inline int launches = 0, on_stream = 0;  // the latter: those, and memsets, that went to `asked_stream`
inline void* asked_stream;
inline unsigned last_blocks = ~0u;  // only so many blocks run, the last ones
inline cudaError_t last_error = cudaSuccess;
inline float* shared_memory;
inline std::vector<std::function<void()>> sent;  // copies from the host that nobody has waited for
inline std::map<void*, size_t> recorded;         // how many of them an event stands for

enum State { kReady, kAtWarp, kAtBlock, kDone };
struct Warp {
  float a[2][32][4], b[2][32][2];
  uint32_t half_a[2][32][4], half_b[2][32][2];
  uint32_t words[2][32];
};
struct Copy {  // to shared memory: it comes when the thread waits for its group, no sooner
  void* to;
  const void* from;
  bool there;
  int group;
};
struct Thread {
  State state = kDone;
  int group = 0;
  Copy copies[kMostCopies];
  int n_copies = 0;
  int meeting = 0, turn = 0;  // what it waits for; which half of the warp's mailboxes is next
  bool begun = false;
  jmp_buf at;
  ucontext_t context;
};
inline Thread threads[kMostThreads];
inline Warp warps[kMostThreads / 32];
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline int current;
inline std::function<void()> body;
inline const bool told = (races_not_of_kernels(threads, sizeof threads), races_not_of_kernels(warps, sizeof warps), true);

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation of CUDA: %s (block %u, thread %d)\n", what, blockIdx.x, current);
  abort();
}

inline void leave(State state) {
  races_thread(-1, nullptr, 0);
  threads[current].state = state;
  if (!_setjmp(threads[current].at)) _longjmp(scheduler, 1);
  races_thread(current, threads[current].context.uc_stack.ss_sp, kStack);
}
inline void run_for_ever() {
  for (;;) {
    races_thread(current, threads[current].context.uc_stack.ss_sp, kStack);
    body();
    leave(kDone);
  }
}
inline void resume(int thread) {
  current = thread;
  threadIdx.x = unsigned(thread);
  if (_setjmp(scheduler)) return;
  Thread& t = threads[thread];
  if (t.begun) _longjmp(t.at, 1);
  t.begun = true;
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  t.context.uc_stack.ss_size = kStack;
  makecontext(&t.context, run_for_ever, 0);
  setcontext(&t.context);
}

constexpr int kSyncWarp = 4;

// All lanes of the warp meet; they must do so for the same operation.
inline void meet(int operation) {
  threads[current].meeting = operation;
  leave(kAtWarp);
}
inline bool open_warp(int warp) {
  Thread* t = threads + 32 * warp;
  for (int lane = 0; lane < 32; ++lane)
    if (t[lane].state != kAtWarp) return false;
  for (int lane = 0; lane < 32; ++lane) {
    if (t[lane].meeting != t[0].meeting) fail("the lanes of a warp meet for different operations");
    t[lane].state = kReady;
  }
  if (t[0].meeting == kSyncWarp) races_at_warp(warp);
  return true;
}

inline void run_block(int n_threads) {
  const int n_warps = n_threads / 32;
  for (int t = 0; t < n_threads; ++t) threads[t].state = kReady;
  for (;;) {
    bool moved = false;
    for (int w = 0; w < n_warps; ++w) {
      const int warp = descending ? n_warps - 1 - w : w;
      do {  // as far as it can: the greatest distance between warps
        for (int l = 0; l < 32; ++l) {
          const int thread = 32 * warp + (descending ? 31 - l : l);
          if (threads[thread].state != kReady) continue;
          resume(thread);
          moved = true;
        }
      } while (open_warp(warp));
    }
    int at_block = 0, done = 0;
    for (int t = 0; t < n_threads; ++t) {
      at_block += threads[t].state == kAtBlock;
      done += threads[t].state == kDone;
    }
    for (int t = 0; t < n_threads && done == n_threads; ++t)
      if (threads[t].n_copies) fail("a thread ends before its copies have come");
    if (done == n_threads) return;
    if (at_block == n_threads) {
      for (int t = 0; t < n_threads; ++t) threads[t].state = kReady;
      races_at_block();
    } else if (!moved)
      fail("threads wait for others that do not come");
  }
}

inline void launch(unsigned grid, int n_threads, int shared, void* stream, std::function<void()> kernel) {
  const size_t page = 4096, size = (size_t(shared) + page - 1) / page * page;
  char* memory = static_cast<char*>(mmap(nullptr, size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (size) mprotect(memory, size, PROT_READ | PROT_WRITE);
  shared_memory = reinterpret_cast<float*>(memory + size - size_t(shared) / 16 * 16);
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
  }
  munmap(memory, size + page);
}

inline Warp& my_warp() { return warps[current / 32]; }
inline int next_turn() { return threads[current].turn ^= 1; }
inline int lane() { return current % 32; }

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
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  static_assert(sizeof(T) == 4, "words alone");
  const int turn = emulation::next_turn();
  memcpy(&emulation::my_warp().words[turn][emulation::lane()], &x, 4);
  emulation::meet(1);
  memcpy(&x, &emulation::my_warp().words[turn][from & 31], 4);
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned all, T x, int mask) {
  return __shfl_sync(all, x, emulation::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const int turn = emulation::next_turn();
  emulation::my_warp().words[turn][emulation::lane()] = x;
  emulation::meet(2);
  unsigned found = 0;
  for (int lane = 0; lane < 32; ++lane) found |= emulation::my_warp().words[turn][lane] << lane;
  return found;
}
template <class T, class Combine>
T reduced(T x, Combine combine) {
  const int turn = emulation::next_turn();
  const auto& words = emulation::my_warp().words[turn];
  memcpy(&emulation::my_warp().words[turn][emulation::lane()], &x, 4);
  emulation::meet(6);
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
// The tensor core does not look at the last 13 bits of its operands.
inline float seen(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000); }
// Nor does it round a sum to the nearest number: products and what they are added to are cut off below so many binary places
// of the largest of them, all at once (Hopper) or in halves (Ampere), and so is the sum, below those of a float. Bit by bit what
// Xie et al. found GPUs to do, arXiv 2511.10909.
inline int exponent_of(float x, int least) {
  const int exponent = int(__float_as_uint(x) >> 23 & 255) - 127;
  return x == 0 ? -126 : exponent < least ? least : exponent;
}
inline double two_to(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double y;
  memcpy(&y, &bits, 8);
  return y;
}
// of: d += a[k] b[k], whose exponents are not below `least`.
template <int K>
float dot(float d, const float (&a)[K], const float (&b)[K], int least) {
  const int places = emulation::places, at_once = K / emulation::parts;
  for (int first = 0; first < K; first += at_once) {
    double exact = d, sum = 0;
    int most = exponent_of(d, -126);
    for (int k = first; k < first + at_once; ++k) {
      const int exponent = exponent_of(a[k], least) + exponent_of(b[k], least);
      most = exponent > most ? exponent : most;
      exact += double(a[k]) * b[k];
    }
    if (!(fabs(exact) < INFINITY)) {
      d = float(exact);
      continue;
    }
    const double unit = two_to(places - most);
    sum = trunc(d * unit);
    for (int k = first; k < first + at_once; ++k) sum += trunc(double(a[k]) * b[k] * unit);
    sum *= two_to(most - places);
    d = float(sum);
    if (fabs(double(d)) > fabs(sum)) d = nextafterf(d, 0.0f);
  }
  return d;
}
inline void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const int turn = emulation::next_turn(), lane = emulation::lane();
  auto& warp = emulation::my_warp();
  for (int k = 0; k < 4; ++k) warp.a[turn][lane][k] = seen(a[k]);
  for (int k = 0; k < 2; ++k) warp.b[turn][lane][k] = seen(b[k]);
  emulation::meet(3);
  for (int x = 0; x < 4; ++x) {
    const int row = lane / 4 + x / 2 * 8, column = lane % 4 * 2 + x % 2;
    float left[8], right[8];
    for (int k = 0; k < 8; ++k) {
      left[k] = warp.a[turn][row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
      right[k] = warp.b[turn][column * 4 + k % 4][k / 4];
    }
    d[x] = dot(d[x], left, right, -126);
  }
}
inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_bfloat16(float low, float high) { return to_bfloat16(high) << 16 | to_bfloat16(low); }
// IEEE 754's 16 bits: nearest, ties to even, with subnormal numbers.
inline uint32_t to_half(float x) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
  const double size = fabs(double(x));
  if (x != x) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  int exponent;
  frexp(size, &exponent);
  if (!size || exponent < -13) exponent = -13;
  const double units = nearbyint(ldexp(size, 11 - exponent));  // of the last bit: up to 2048, which is the next exponent's 1024
  return sign | (uint32_t(exponent + 13) * 1024 + uint32_t(units));
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
template <class Number>
void mma_of_words(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int least, const Number& number) {
  const int turn = emulation::next_turn(), lane = emulation::lane();
  auto& warp = emulation::my_warp();
  memcpy(warp.half_a[turn][lane], a, sizeof a);
  memcpy(warp.half_b[turn][lane], b, sizeof b);
  emulation::meet(5);
  for (int x = 0; x < 4; ++x) {
    const int row = lane / 4 + x / 2 * 8, column = lane % 4 * 2 + x % 2;
    float left[16], right[16];
    for (int k = 0; k < 16; ++k) {
      left[k] = number(warp.half_a[turn][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
      right[k] = number(warp.half_b[turn][column * 4 + k % 8 / 2][k / 8], k % 2);
    }
    d[x] = dot(d[x], left, right, least);
  }
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_of_words(d, a, b, -126, [](uint32_t both, int k) { return __uint_as_float(k ? both & 0xffff0000 : both << 16); });
}
inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_of_words(d, a, b, -14, [](uint32_t both, int k) { return of_half(k ? both >> 16 : both & 0xffff); });
}
}  // namespace srcgcnn::device

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
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int size) {
  return size <= emulation::shared_per_processor - 1024 ? cudaSuccess : cudaErrorInvalidValue;
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
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

// Of the tests: the emulated GPU, its tensor cores, the order of its warps and blocks, launches so far, launches and memsets on a stream
// since it was named, which blocks run, whether the next launch fails, the wait for an event.
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
__attribute__((weak)) void emulated_error() { emulation::last_error = cudaErrorInvalidValue; }
}
