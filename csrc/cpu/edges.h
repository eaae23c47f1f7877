// What the kernels need of a graph: scratch memory, chunks of crystals, windows of Gaussians, shells, moments.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "simd.h"

namespace srcgcnn::SRCGCNN_LEVEL {

// Partial sums are kept per chunk of crystals and added in order, so no result depends on the number of threads: the
// number of chunks follows from the graph alone. About 4 096 edges a chunk repay the zeroing and adding of its sums.
constexpr int kMostChunks = 64;
template <class T>
int chunks_of(const Edges<T>& g) {
  const int64_t n = g.n_edges / 4096 + 1;
  return n < 4 ? 4 : n > kMostChunks ? kMostChunks : int(n);
}

// Gaussians in reach of a distance: those left out are below 2e-9 (float) and 5e-19 (double).
template <class T>
constexpr int kReach = sizeof(T) == 4 ? 9 : 13;

// For sanitizers: every scratch buffer ends where its numbers end and begins as NaN, so that they see what leaves it.
#ifdef SRCGCNN_NO_POOL
constexpr bool kExact = true;
#else
constexpr bool kExact = false;
#endif

// Scratch memory outlives a call: fresh pages cost more than the arithmetic on them. At most kPoolBytes wait in kSlots.
class Pool {
 public:
  struct Slot {
    void* data;
    int64_t bytes;
  };

  // A slot of at least that size, unless the smallest is more than twice too large; then new memory.
  static Slot take(int64_t bytes) {
    if (kExact) {
      void* data = nullptr;
      if (posix_memalign(&data, 64, bytes)) abort();
      memset(data, 0xff, bytes);
      return {data, bytes};
    }
    Slot best{nullptr, 0};
    int at = -1;
    lock();
    for (int k = 0; k < kSlots; ++k)
      if (slots_[k].data && slots_[k].bytes >= bytes && slots_[k].bytes <= 2 * bytes &&
          (at < 0 || slots_[k].bytes < slots_[at].bytes))
        at = k;
    if (at >= 0) {
      best = slots_[at];
      slots_[at].data = nullptr;
      held_ -= best.bytes;
    }
    unlock();
    if (at >= 0) return best;
    void* data = aligned_alloc(64, bytes);
    if (!data) abort();
    return {data, bytes};
  }

  static void give(Slot slot) {
    if (kExact) return free(slot.data);
    lock();
    int at = -1;
    for (int k = 0; k < kSlots && at < 0; ++k)
      if (!slots_[k].data) at = k;
    const bool keep = at >= 0 && held_ + slot.bytes <= kPoolBytes;
    if (keep) {
      slots_[at] = slot;
      held_ += slot.bytes;
    }
    unlock();
    if (!keep) free(slot.data);
  }

 private:
  static constexpr int kSlots = 64;
  static constexpr int64_t kPoolBytes = int64_t(64) << 20;

  static void lock() {
    while (__atomic_test_and_set(&busy_, __ATOMIC_ACQUIRE)) {
    }
  }
  static void unlock() { __atomic_clear(&busy_, __ATOMIC_RELEASE); }

  static inline Slot slots_[kSlots] = {};
  static inline int64_t held_ = 0;
  static inline bool busy_ = false;
};

// Scratch, aligned and not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { reserve(n); }
  ~Buffer() { release(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return static_cast<T*>(slot_.data); }
  operator const T*() const { return static_cast<const T*>(slot_.data); }

  // At least n numbers; what was there is lost.
  void reserve(int64_t n) {
    const int64_t bytes = kExact ? n * int64_t(sizeof(T)) : (n * int64_t(sizeof(T)) + 127) / 64 * 64;
    if (slot_.data && bytes <= slot_.bytes && !kExact) return;
    release();
    slot_ = Pool::take(bytes);
  }
  void zero(int64_t n) {
    reserve(n);
    memset(slot_.data, 0, n * sizeof(T));
  }

 private:
  void release() {
    if (slot_.data) Pool::give(slot_);
    slot_.data = nullptr;
  }

  Pool::Slot slot_{nullptr, 0};
};

// First crystal of a chunk: chunks hold about equal numbers of edges, and depend on the graph alone.
template <class T>
int64_t chunk_begin(const Edges<T>& g, int chunk) {
  if (chunk <= 0) return 0;
  const int n_chunks = chunks_of(g);
  if (chunk >= n_chunks) return g.n_crystals;
  const int64_t wanted = g.n_edges * chunk / n_chunks;
  int64_t low = 0, high = g.n_crystals;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (g.row_ptr[g.crystal_ptr[middle]] < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The window of edge features that matter at one distance: values[0..count) belong to features first..first+count.
template <class T>
struct Window {
  static constexpr int kPadded = (kReach<T> + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;

  const T* values;
  int first, count;
  T local[kPadded];

  SRCGCNN_INLINE void at(const Edges<T>& g, T distance) {
    using M = typename MathOf<T>::M;
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    V lane;
    for (int l = 0; l < W; ++l) lane[l] = T(l);
    count = g.n_features < kReach<T> ? g.n_features : kReach<T>;
    const T u = (distance - g.dmin) / g.step;
    const int last = g.n_features - count;
    // A far or infinite distance must not reach the integer conversion.
    const T lowest = u + T(0.5) - kReach<T> / 2;
    first = !(lowest > 0) ? 0 : lowest >= last ? last : int(lowest);
    for (int k = 0; k < kPadded; k += W) {
      const V x = splat(u - T(first + k)) - lane;
      const V power = T(-kLog2e) * x * x;
      store(local + k, V(power > T(-110) ? M::exp2(power) : V{}));
    }
    values = local;
  }

  // The k-th shell of crystal c, whose edges begin at `begin`; with given features every edge is its own.
  SRCGCNN_INLINE void shell(const Edges<T>& g, int64_t begin, int64_t k) {
    if (g.features) {
      values = g.features + (begin + k) * g.n_features, first = 0, count = g.n_features;
      return;
    }
    at(g, g.shell_distance[begin + k]);
  }
};

template <class T>
SRCGCNN_INLINE int64_t shells_of(const Edges<T>& g, int64_t crystal) {
  if (!g.features) return g.shell_count[crystal];
  return g.row_ptr[g.crystal_ptr[crystal + 1]] - g.row_ptr[g.crystal_ptr[crystal]];
}

// r (shells, width) = start + e W_e for the shells of one crystal; w_e (K, width).
template <class T>
void shell_terms(T* r, const Edges<T>& g, int64_t crystal, const T* w_e, int width, const T* start) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, B = 8;
  const int64_t begin = g.row_ptr[g.crystal_ptr[crystal]], n = shells_of(g, crystal);
  Window<T> window;
  for (int64_t s = 0; s < n; ++s) {
    window.shell(g, begin, s);
    T* to = r + s * width;
    const T* w = w_e + int64_t(window.first) * width;
    int c = 0;
    for (; c + B * W <= width; c += B * W) {
      V sum[B];
      for (int v = 0; v < B; ++v) sum[v] = start ? load(start + c + v * W) : V{};
      for (int k = 0; k < window.count; ++k) {
        const V a = splat(window.values[k]);
        for (int v = 0; v < B; ++v) sum[v] += a * load(w + int64_t(k) * width + c + v * W);
      }
      for (int v = 0; v < B; ++v) store(to + c + v * W, sum[v]);
    }
    for (; c < width; c += W) {
      V sum = start ? load(start + c) : V{};
      for (int k = 0; k < window.count; ++k) sum += splat(window.values[k]) * load(w + int64_t(k) * width + c);
      store(to + c, sum);
    }
  }
}

// dw_e (K, width) += e^T t for the shells of one crystal; t (shells, width).
template <class T>
void shell_gradient(T* dw_e, const Edges<T>& g, int64_t crystal, const T* t, int width) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, B = 8;
  const int64_t begin = g.row_ptr[g.crystal_ptr[crystal]], n = shells_of(g, crystal);
  Window<T> window;
  for (int64_t s = 0; s < n; ++s) {
    window.shell(g, begin, s);
    const T* from = t + s * width;
    T* to = dw_e + int64_t(window.first) * width;
    int c = 0;
    for (; c + B * W <= width; c += B * W) {
      V d[B];
      for (int v = 0; v < B; ++v) d[v] = load(from + c + v * W);
      for (int k = 0; k < window.count; ++k) {
        const V a = splat(window.values[k]);
        T* row = to + int64_t(k) * width + c;
        for (int v = 0; v < B; ++v) store(row + v * W, load(row + v * W) + a * d[v]);
      }
    }
    for (; c < width; c += W)
      for (int k = 0; k < window.count; ++k) {
        T* row = to + int64_t(k) * width + c;
        store(row, load(row) + splat(window.values[k]) * load(from + c));
      }
  }
}

SRCGCNN_INLINE uint64_t bits_of(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}
SRCGCNN_INLINE uint64_t bits_of(double x) {
  uint64_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}

// Distinct distances of every crystal, numbered in order of appearance, by a hash table that is emptied per crystal.
template <class T>
void edge_shells(int32_t* shell_of, T* shell_distance, int32_t* shell_count, const Edges<T>& g, int threads) {
  const int n_chunks = chunks_of(g);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    Buffer<int32_t> table;
    for (int64_t c = chunk_begin(g, chunk); c < chunk_begin(g, chunk + 1); ++c) {
      const int64_t begin = g.row_ptr[g.crystal_ptr[c]], end = g.row_ptr[g.crystal_ptr[c + 1]];
      int64_t slots = 64;
      while (slots < 2 * (end - begin)) slots *= 2;
      table.reserve(slots);
      memset(table, 0xff, slots * sizeof(int32_t));
      int32_t count = 0;
      for (int64_t e = begin; e < end; ++e) {
        const uint64_t key = bits_of(g.distance[e]);
        uint64_t slot = (key * 0x9e3779b97f4a7c15ull >> 20) & (slots - 1);
        while (table[slot] >= 0 && bits_of(shell_distance[begin + table[slot]]) != key) slot = (slot + 1) & (slots - 1);
        if (table[slot] < 0) {
          shell_distance[begin + count] = g.distance[e];
          table[slot] = count++;
        }
        shell_of[e] = table[slot];
      }
      shell_count[c] = count;
    }
  }
}

template <class T>
void edge_moments(T* in_degree, T* by_receiver, T* by_sender, double* sum_out, double* gram, const T* row_weight, const Edges<T>& g,
                  int threads) {
  const int64_t k = g.n_features, size = k * (k + 1);
  const int n_chunks = chunks_of(g);
  Buffer<double> partial;
  partial.zero(n_chunks * size);
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Buffer<Window<T>> windows;
    Buffer<double> shell_weight;
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      double* sum = partial + chunk * size;
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      const int64_t first = g.crystal_ptr[c0], last = g.crystal_ptr[c1];
      memset(in_degree + first, 0, (last - first) * sizeof(T));
      memset(by_receiver + first * k, 0, (last - first) * k * sizeof(T));
      memset(by_sender + first * k, 0, (last - first) * k * sizeof(T));
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t begin = g.row_ptr[g.crystal_ptr[c]], n = shells_of(g, c);
        windows.reserve(n);
        shell_weight.zero(n);
        for (int64_t s = 0; s < n; ++s) {
          windows[s].shell(g, begin, s);
          if (!g.features) windows[s].values = windows[s].local;
        }
        for (int64_t i = g.crystal_ptr[c]; i < g.crystal_ptr[c + 1]; ++i)
          for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
            const int64_t s = g.features ? e - begin : g.shell_of[e];
            const Window<T>& window = windows[s];
            const T w = row_weight[i];
            T* to_i = by_receiver + i * k + window.first;
            T* to_j = by_sender + int64_t(g.sender[e]) * k + window.first;
            for (int a = 0; a < window.count; ++a) {
              to_i[a] += window.values[a];
              to_j[a] += w * window.values[a];
            }
            in_degree[g.sender[e]] += w;
            shell_weight[s] += w;
          }
        for (int64_t s = 0; s < n; ++s) {
          const Window<T>& window = windows[s];
          for (int a = 0; a < window.count; ++a) {
            const double wa = shell_weight[s] * window.values[a];
            sum[k * k + window.first + a] += wa;
            double* row = sum + (window.first + a) * k + window.first;
            for (int b = 0; b < window.count; ++b) row[b] += wa * window.values[b];
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t x = 0; x < size; ++x) {
      double total = 0;
      for (int chunk = 0; chunk < n_chunks; ++chunk) total += partial[chunk * size + x];
      (x < k * k ? gram[x] : sum_out[x - k * k]) = total;
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
