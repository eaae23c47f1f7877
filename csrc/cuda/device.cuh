// What the kernels need of the device: gate arithmetic, products on tensor cores, vectors of channels, a search; its errors.
// tests/ops/cuda/emulation.h supplies the same names for an ordinary compiler.
#pragma once
#include <stdint.h>

#include "../gate.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels need compute capability 8.0: set CMAKE_CUDA_ARCHITECTURES to 80 or newer"
#endif
#ifdef __CUDACC__
#define SRCGCNN_DEVICE __device__ __forceinline__
#define SRCGCNN_HOST_DEVICE __host__ __device__ __forceinline__
#define SRCGCNN_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SRCGCNN_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

namespace srcgcnn {

constexpr unsigned kAllLanes = 0xffffffffu;

// CUDA's message, or null. An error stays the thread's last one until it is asked for: the next launch would have it, too.
inline const char* message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

#ifdef __CUDACC__
namespace device {
SRCGCNN_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SRCGCNN_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Number `at` of `count`, if there is one, on its way to the second-level cache.
template <class T>
SRCGCNN_DEVICE void prefetch(const T* from, int64_t at, int64_t count) {
  if (uint64_t(at) < uint64_t(count)) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}
// x, as if it were not known before: what is computed of it is not computed ahead of a loop, where it would stay in registers.
SRCGCNN_DEVICE unsigned known_late(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Four numbers on their way from memory to shared memory, zeros if they are not there; the copies of a thread since its
// last commit are a group, and it waits until all but its last kLeft groups have come. kCached: by the first-level cache.
template <bool kCached = false>
SRCGCNN_DEVICE void copy_async(void* to, const void* from, bool there) {
  const unsigned at = unsigned(__cvta_generic_to_shared(to)), size = there ? 16 : 0;
  if (kCached)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
}
// Four numbers to memory, in one instruction; the compiler takes a vector apart where it loses sight of its alignment.
SRCGCNN_DEVICE void store_four(float* to, float x0, float x1, float x2, float x3) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(x0, x1, x2, x3));
}
SRCGCNN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
SRCGCNN_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// d += a b for one (16, 8) tile a, row by row, and one (8, 8) tile b; PTX ISA, "mma.m16n8k8", says who holds what.
SRCGCNN_DEVICE void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
// Both as bfloat16, nearest, ties to even: `low` in the lower half.
SRCGCNN_DEVICE uint32_t to_bfloat16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// The same for one (16, 16) tile a and one (16, 8) tile b of bfloat16, two numbers a word.
SRCGCNN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Both as numbers of 16 bits of IEEE 754, nearest, ties to even: `low` in the lower half; and back.
SRCGCNN_DEVICE uint32_t to_half(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
SRCGCNN_DEVICE void of_half(uint32_t both, float& low, float& high) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(low), "=f"(high) : "r"(both));
}
// As for bfloat16, of these.
SRCGCNN_DEVICE void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
}  // namespace device
#endif

// The arithmetic that gate.h asks for: exponentials and reciprocals on the transcendental units (2 ulp, 1 ulp), the
// logarithm on the FMA pipes, so that neither waits for the other.
struct DeviceMath {
  static constexpr float ln2 = float(kLn2), log2e = float(kLog2e);
  static SRCGCNN_DEVICE float exp2(float x) { return device::exp2(x); }
  static SRCGCNN_DEVICE float reciprocal(float x) { return device::reciprocal(x); }
  static SRCGCNN_DEVICE float abs(float x) { return fabsf(x); }
  static SRCGCNN_DEVICE float max0(float x) { return fmaxf(x, 0.0f); }  // 0 of a NaN, which the other term keeps
  static SRCGCNN_DEVICE float at_most(float x) { return x > 126.0f ? 126.0f : x; }
  static SRCGCNN_DEVICE float at_most_alone(float x) { return x; }
  static SRCGCNN_DEVICE float tail(float, float t) { return t; }  // the difference is below float's resolution
  static SRCGCNN_DEVICE float select_nonnegative(float c, float a, float b) { return c >= 0.0f ? a : b; }
  // As MathF32::log2_1p in cpu/simd.h: relative error 3e-8 before rounding.
  static SRCGCNN_DEVICE float log2_1p(float t) {
    float p = 7.549182125e-03f;
    p = fmaf(p, t, -4.256706190e-02f);
    p = fmaf(p, t, 1.128561932e-01f);
    p = fmaf(p, t, -1.971189698e-01f);
    p = fmaf(p, t, 2.756414122e-01f);
    p = fmaf(p, t, -3.584084724e-01f);
    p = fmaf(p, t, 4.806929573e-01f);
    p = fmaf(p, t, -7.213402080e-01f);
    p = fmaf(p, t, 1.442694997e+00f);
    return p * t;
  }
  // As MathF32::log2_1p_fraction: relative error 4.3e-8 before rounding.
  static SRCGCNN_DEVICE Fraction<float> log2_1p_fraction(float t) {
    float over = -3.4501634e-03f;
    over = fmaf(over, t, 6.223892e-02f);
    over = fmaf(over, t, 1.0480007f);
    over = fmaf(over, t, 1.442695f);
    return {over * t, fmaf(fmaf(3.2306895e-01f, t, 1.2264156f), t, 1.0f)};
  }
};

SRCGCNN_DEVICE int lane_of() { return int(threadIdx.x) & 31; }
SRCGCNN_DEVICE int warp_of() { return int(threadIdx.x) >> 5; }

struct Bfloat16 {
  uint16_t bits;
};
// How numbers that edges read are stored.
template <bool kHalf>
struct Storage {
  using type = float;
};
template <>
struct Storage<true> {
  using type = Bfloat16;
};

// V neighbouring channels, read and written at once.
template <int V>
struct alignas(4 * V) Channels {
  float x[V];
};
template <int V>
SRCGCNN_DEVICE Channels<V> load(const float* p) {
  return *reinterpret_cast<const Channels<V>*>(p);
}
template <int V>
SRCGCNN_DEVICE void store(float* p, const Channels<V>& v) {
  *reinterpret_cast<Channels<V>*>(p) = v;
}
SRCGCNN_DEVICE void add_to(Channels<4>& y, const Channels<4>& x) {
#pragma unroll
  for (int v = 0; v < 4; ++v) y.x[v] += x.x[v];
}
// Numbers at .. at + 3 of a row of n, zeros beyond it. by_four: they are an aligned vector, all there or none.
SRCGCNN_DEVICE Channels<4> four_of(const float* row, int64_t at, int64_t n, bool by_four) {
  if (by_four) return at < n ? load<4>(row + at) : Channels<4>{};
  Channels<4> x;
#pragma unroll
  for (int v = 0; v < 4; ++v) x.x[v] = at + v < n ? row[at + v] : 0.0f;
  return x;
}
template <int V>
struct alignas(2 * V) Halves {
  uint16_t x[V];
};
template <int V>
SRCGCNN_DEVICE Channels<V> load(const Bfloat16* p) {
  const auto found = *reinterpret_cast<const Halves<V>*>(p);
  Channels<V> v;
#pragma unroll
  for (int k = 0; k < V; ++k) v.x[k] = __uint_as_float(uint32_t(found.x[k]) << 16);
  return v;
}
template <int V>
SRCGCNN_DEVICE void store(Bfloat16* p, const Channels<V>& v) {
  Halves<V> to;
#pragma unroll
  for (int k = 0; k < V; k += 2) {
    const uint32_t both = device::to_bfloat16(v.x[k], k + 1 < V ? v.x[k + 1] : 0.0f);
    to.x[k] = uint16_t(both);
    if (k + 1 < V) to.x[k + 1] = uint16_t(both >> 16);
  }
  *reinterpret_cast<Halves<V>*>(p) = to;
}
// As it is after being stored.
SRCGCNN_DEVICE float as_stored(const float*, float x) { return x; }
SRCGCNN_DEVICE float as_stored(const Bfloat16*, float x) { return __uint_as_float(device::to_bfloat16(0.0f, x)); }

// sum += weight x, and what that rounds off goes into the next (Kahan): exact for 10^5 equal rows too.
SRCGCNN_DEVICE void add_exactly(float weight, float x, float& sum, float& rounded) {
  const float y = fmaf(weight, x, -rounded), next = sum + y;
  rounded = (next - sum) - y;
  sum = next;
}

// The first place of the ascending x (n) whose number is not below `value`; n if none. All lanes ask the same.
SRCGCNN_DEVICE int first_not_below(const int* x, int n, int64_t value) {
  int low = 0, high = n;
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int64_t at = low + int64_t(lane_of()) * step;
    const int below = __popc(__ballot_sync(kAllLanes, at < high && x[at] < value));
    const int64_t next = low + int64_t(below) * step;
    if (below) low = int(next) - step + 1;
    high = !below ? low : next < high ? int(next) : high;
  }
  return low;
}

// x as a sum of two numbers with TF32's digits: three products of them keep those of float32. The tensor cores cut off
// what `low` has beyond its own digits. Not finite: one of both is NaN.
SRCGCNN_DEVICE void split(float x, float& high, float& low) {
  high = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
  low = x - high;
}

// float32 as the sum of two numbers of 16 bits, whose three products keep its digits: of some numbers that are multiplied
// together (a row, a channel's weights), each times the power of two that takes the largest below 2^15. Numbers down to 2^-18
// of the largest keep 22 bits, and smaller ones are off by at most 2^-39 of it. Not finite: neither is their sum.
struct Unit {
  float scale, inverse;
  // Of the bits of the largest, of numbers that are not negative.
  SRCGCNN_DEVICE explicit Unit(int most) {
    const unsigned exponent = unsigned(most > (31 << 23) ? most : 31 << 23) & 0x7f800000u;
    inverse = __uint_as_float(exponent - (14u << 23));
    scale = __uint_as_float((268u << 23) - exponent);
  }
};
SRCGCNN_DEVICE void split(float x, float y, uint32_t& high, uint32_t& low) {
  float a, b;
  high = device::to_half(x, y);
  device::of_half(high, a, b);
  low = device::to_half(x - a, y - b);
}

}  // namespace srcgcnn
