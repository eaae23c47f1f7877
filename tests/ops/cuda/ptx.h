// Functions of the C++ that ptx.py makes of PTX. A register holds bits, and read as a narrower type its lower ones. A shared
// address is an offset, as on a GPU. Every access is checked for its alignment, in shared memory for its bounds too, and lanes
// must meet at one instruction, where the emulation of the source (emulation.h) asks for one operation alone.
#pragma once
#include <limits>
#include <type_traits>

#include "emulation.h"
#include "traffic.h"

namespace ptx {

constexpr uint32_t kAllLanes = ~0u;

[[noreturn]] inline void fail(const char* what, const char* where) {
  fprintf(stderr, "%s: ", where);
  emulation::fail(what);
}

// Before anything was written to it.
template <class T>
T nothing() {
  T x;
  memset(&x, sizeof(T) == 1 ? 1 : 0xff, sizeof x);
  return x;
}
template <class T, class V>
T as(V x) {
  if constexpr (std::is_same_v<T, bool> || std::is_same_v<V, bool>) {
    static_assert(std::is_same_v<T, V>, "a predicate is no number");
    return x;
  } else {
    static_assert(sizeof(T) <= sizeof(V), "a register is too narrow");
    T y;
    memcpy(&y, &x, sizeof y);
    return y;
  }
}
template <class V, class T>
void put(V& to, T x) {
  if constexpr (std::is_same_v<V, bool>) {
    to = bool(x);
  } else if constexpr (std::is_integral_v<V> && std::is_integral_v<T>) {
    static_assert(sizeof(T) <= sizeof(V), "a register is too narrow");
    to = V(x);
  } else {
    static_assert(sizeof(T) == sizeof(V), "a register of another size");
    memcpy(&to, &x, sizeof x);
  }
}

template <class T, int N>
struct Vector {
  T x[N];
};
inline Vector<uint16_t, 2> halves(uint32_t x) { return {{uint16_t(x), uint16_t(x >> 16)}}; }
inline Vector<uint32_t, 2> halves(uint64_t x) { return {{uint32_t(x), uint32_t(x >> 32)}}; }
inline uint32_t joined(Vector<uint16_t, 2> of) { return of.x[0] | uint32_t(of.x[1]) << 16; }
inline uint64_t joined(Vector<uint32_t, 2> of) { return of.x[0] | uint64_t(of.x[1]) << 32; }

// Memory. Addresses of vectors are multiples of their size.
template <class T, int N>
T* parameters(uint64_t at, const char* where) {
  if (at % (sizeof(T) * N)) fail("an address is not aligned", where);
  return reinterpret_cast<T*>(at);
}
template <class T, int N>
T* memory(uint64_t at, const char* where) {
  traffic_access(false, at, int(sizeof(T) * N), where);
  return parameters<T, N>(at, where);
}
template <class T, int N>
T* shared(uint64_t at, const char* where) {
  const uint32_t offset = uint32_t(at);
  if (offset + uint64_t(sizeof(T) * N) > uint64_t(emulation::shared_size)) fail("beyond shared memory", where);
  if (offset % (sizeof(T) * N)) fail("a shared address is not aligned", where);
  traffic_access(true, offset, int(sizeof(T) * N), where);
  return reinterpret_cast<T*>(reinterpret_cast<char*>(emulation::shared_memory) + offset);
}
template <int N, class T>
auto load(const T* at) {
  if constexpr (N == 1) {
    return *at;
  } else {
    Vector<T, N> all;
    for (int k = 0; k < N; ++k) all.x[k] = at[k];
    return all;
  }
}
template <class T>
void store(T* at, T x) {
  *at = x;
}
template <class T, int N>
void store(T* at, const Vector<T, N>& all) {
  for (int k = 0; k < N; ++k) at[k] = all.x[k];
}
inline void copy(uint64_t to, uint64_t from, uint32_t size, uint32_t there, const char* where) {
  if (size != 16 || (there != 0 && there != 16)) fail("a copy of some bytes of its 16", where);
  srcgcnn::device::copy_async(shared<uint32_t, 4>(to, where), memory<uint32_t, 4>(from, where), there);
}

// What all lanes do together.
struct Place {  // where the first lane of a warp waits, and how many wait
  const char* first;
  int lanes = 0;
  void come(const char* where) {
    if (lanes++ == 0) first = where;
    if (first != where) {
      fprintf(stderr, "%s and ", first);
      fail("lanes of a warp meet at different instructions", where);
    }
    lanes %= 32;
  }
};
inline Place in_warp[emulation::kMostThreads / 32], in_block[emulation::kMostThreads / 32];
inline void meet(const char* where, uint32_t mask = kAllLanes) {
  if (mask != kAllLanes) fail("not all lanes of the warp", where);
  in_warp[emulation::current / 32].come(where);
}
inline void block_barrier(uint32_t number, const char* where) {
  if (number) fail("a barrier that __syncthreads is not", where);
  in_block[emulation::current / 32].come(where);
  __syncthreads();
  traffic_barrier();
}
inline void warp_barrier(uint32_t mask, const char* where) {
  meet(where, mask);
  __syncwarp();
}
inline uint32_t shuffled(uint32_t x, uint32_t lane, uint32_t bounds, uint32_t mask, const char* where) {
  if (bounds != 31) fail("lanes in parts", where);
  meet(where, mask);
  return __shfl_sync(mask, x, int(lane));
}
inline uint32_t ballot(bool x, uint32_t mask, const char* where) {
  meet(where, mask);
  return __ballot_sync(mask, x);
}
inline int32_t reduced_min(int32_t x, uint32_t mask, const char* where) {
  meet(where, mask);
  return __reduce_min_sync(mask, x);
}
inline int32_t reduced_max(int32_t x, uint32_t mask, const char* where) {
  meet(where, mask);
  return __reduce_max_sync(mask, x);
}
inline uint32_t reduced_or(uint32_t x, uint32_t mask, const char* where) {
  meet(where, mask);
  return __reduce_or_sync(mask, x);
}
template <emulation::Meeting kKind>
Vector<float, 4> product(const Vector<uint32_t, 4>& a, const Vector<uint32_t, 2>& b, Vector<float, 4> sum, const char* where) {
  meet(where);
  srcgcnn::device::multiply(kKind, sum.x, a.x, b.x);
  return sum;
}

// Arithmetic that C++ has otherwise, or not at all.
inline int64_t wide(int32_t x) { return x; }
inline uint64_t wide(uint32_t x) { return x; }
inline uint32_t wide(uint16_t x) { return x; }
inline float fused(float x, float y, float z) { return fmaf(x, y, z); }
inline double fused(double x, double y, double z) { return fma(x, y, z); }
inline int32_t high_product(int32_t x, int32_t y) { return int32_t((int64_t(x) * y) >> 32); }
inline uint32_t high_product(uint32_t x, uint32_t y) { return uint32_t((uint64_t(x) * y) >> 32); }
template <class T>
T quotient(T x, T y) {
  if constexpr (std::is_integral_v<T>)
    if (!y) return T(-1);  // PTX leaves it open; GPUs give all bits
  return x / y;
}
template <class T>
T remainder(T x, T y) {
  return y ? T(x % y) : x;
}
// Of a NaN and a number they are the number.
template <class T>
T least(T x, T y) {
  return x != x ? y : y < x ? y : x;
}
template <class T>
T most(T x, T y) {
  return x != x ? y : y > x ? y : x;
}
inline float absolute(float x) { return fabsf(x); }
inline double absolute(double x) { return fabs(x); }
inline bool inverted(bool x) { return !x; }
template <class T>
T inverted(T x) {
  return T(~x);
}
template <class T>
bool ordered(T x, T y) {
  return x == x && y == y;
}
template <class T>
bool different(T x, T y) {
  return ordered(x, y) && x != y;
}
template <class T>
T shifted_left(T x, uint32_t n) {
  return n < 8 * sizeof(T) ? T(x << n) : T(0);
}
template <class T>
T shifted_right(T x, uint32_t n) {
  return n < 8 * sizeof(T) ? T(x >> n) : T(x < 0 ? -1 : 0);
}
inline uint32_t inserted(uint32_t x, uint32_t into, uint32_t at, uint32_t length) {
  const uint32_t mask = shifted_left(length < 32 ? (1u << length) - 1 : ~0u, at);
  return (into & ~mask) | (shifted_left(x, at) & mask);
}
inline uint32_t leading_zeros(uint32_t x) { return x ? uint32_t(__builtin_clz(x)) : ~0u; }
inline uint32_t reversed(uint32_t x) {
  uint32_t y = 0;
  for (int k = 0; k < 32; ++k) y |= (x >> k & 1) << (31 - k);
  return y;
}
// What is too large is the largest; of a NaN it is zero.
template <class T, class V>
T toward_zero(V x) {
  if (x != x) return 0;
  const double first = double(std::numeric_limits<T>::min()), last = double(std::numeric_limits<T>::max());
  return double(x) <= first ? std::numeric_limits<T>::min() : double(x) >= last ? std::numeric_limits<T>::max() : T(x);
}

}  // namespace ptx
