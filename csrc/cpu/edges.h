// What the kernels need of a graph: scratch memory, chunks of crystals, windows of Gaussians, shells, moments.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <new>

#include "gemm.h"
#include "kernels.h"

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

// Large scratch memory outlives a call: fresh pages cost more than the arithmetic on them. At most kPoolBytes wait in
// kSlots, the largest ones.
class Pool {
 public:
  struct Slot {
    void* data;
    int64_t bytes;
  };

  // A slot of at least that size, unless the smallest is more than twice too large; then new memory, or bad_alloc.
  static Slot take(int64_t bytes) {
    if (kExact) return {memset(allocate(bytes), 0xff, bytes), bytes};
    Slot best{nullptr, 0};
    int at = -1;
    lock();
    for (int k = 0; k < kSlots && bytes >= kLeast; ++k)
      if (slots_[k].data && slots_[k].bytes >= bytes && slots_[k].bytes <= 2 * bytes &&
          (at < 0 || slots_[k].bytes < slots_[at].bytes))
        at = k;
    if (at >= 0) {
      best = slots_[at];
      slots_[at] = {nullptr, 0};
      held_ -= best.bytes;
    }
    unlock();
    return at >= 0 ? best : Slot{allocate(bytes), bytes};
  }

  static void give(Slot slot) {
    if (kExact) return release(slot.data);
    if (slot.bytes >= kLeast) {
      lock();
      int at = 0;  // the smallest of the slots, an empty one if there is one
      for (int k = 1; k < kSlots; ++k)
        if (slots_[k].bytes < slots_[at].bytes) at = k;
      if (slots_[at].bytes < slot.bytes && held_ + slot.bytes - slots_[at].bytes <= kPoolBytes) {
        const Slot other = slots_[at];
        slots_[at] = slot;
        held_ += slot.bytes - other.bytes;
        slot = other;
      }
      unlock();
    }
    release(slot.data);
  }

 private:
  static constexpr int kSlots = 64;
  static constexpr int64_t kLeast = 32 << 10;  // smaller ones come from pages that the process has
  static constexpr int64_t kPoolBytes = int64_t(64) << 20;

  static void* allocate(int64_t bytes) {
#ifdef _WIN32
    void* data = _aligned_malloc(bytes, 64);
#else
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes)) data = nullptr;
#endif
    if (!data) throw std::bad_alloc();
    return data;
  }
  static void release(void* data) {
#ifdef _WIN32
    _aligned_free(data);
#else
    free(data);
#endif
  }

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

template <class T>
SRCGCNN_INLINE int64_t shells_of(const Edges<T>& g, int64_t crystal) {
  if (!g.features) return g.shell_count[crystal];
  return g.row_ptr[g.crystal_ptr[crystal + 1]] - g.row_ptr[g.crystal_ptr[crystal]];
}

// The edge features that matter in each shell of a crystal: `count` numbers that belong to features first..first+count.
// With given features every edge is its own shell, and all its features count.
template <class T>
class Windows {
 public:
  int64_t n;
  int count;
  bool are_given;

  SRCGCNN_INLINE const T* values(int64_t s) const { return at_ + s * stride_; }
  SRCGCNN_INLINE int first(int64_t s) const { return first_at_ ? first_at_[s] : 0; }

  void of_crystal(const Edges<T>& g, int64_t crystal) {
    prepare(g, crystal);
    fill(g, 0, n);
  }
  // The same in two: room for all shells, and then those from s0 to s1, by any thread.
  void prepare(const Edges<T>& g, int64_t crystal) {
    const int64_t begin = g.row_ptr[g.crystal_ptr[crystal]];
    n = shells_of(g, crystal);
    are_given = g.features != nullptr;
    if (are_given) {
      at_ = g.features + begin * g.n_features, first_at_ = nullptr, count = int(stride_ = g.n_features);
      return;
    }
    values_.reserve(n * kPadded);
    first_.reserve(n);
    distance_ = g.shell_distance + begin;
    at_ = values_, first_at_ = first_, stride_ = kPadded;
    count = g.n_features < kReach<T> ? g.n_features : kReach<T>;
  }
  void fill(const Edges<T>& g, int64_t s0, int64_t s1) {
    if (are_given) return;
    using M = typename MathOf<T>::M;
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    const int last = g.n_features - count;
    V lane;
    for (int l = 0; l < W; ++l) lane[l] = T(l);
    for (int64_t s = s0; s < s1; ++s) {
      const T u = (distance_[s] - g.dmin) / g.step;
      // A far or infinite distance must not reach the integer conversion.
      const T lowest = u + T(0.5) - kReach<T> / 2;
      const int f = !(lowest > 0) ? 0 : lowest >= last ? last : int(lowest);
      static_cast<int32_t*>(first_)[s] = f;
      for (int k = 0; k < kPadded; k += W) {
        const V x = splat(u - T(f + k)) - lane;
        const V power = T(-kLog2e) * x * x;
        const V far = power < 0 ? V{} : power;  // or a distance that is no number, which shall not pass for a far one
        store(static_cast<T*>(values_) + s * kPadded + k, V(power > T(-110) ? M::exp2(power) : far));
      }
    }
  }

 private:
  static constexpr int kPadded = (kReach<T> + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;
  Buffer<T> values_;
  Buffer<int32_t> first_;
  const T *at_, *distance_;
  const int32_t* first_at_;
  int64_t stride_;
};

// Sums of three terms as products of their powers of two (float): no product leaves the range with each term in bounds.
template <class T>
constexpr bool kHasPowers = sizeof(T) == 4;
template <class T, int NV>
struct Bound {
  static constexpr T most = 40;
  typename Simd<T>::V worst[NV] = {};

  SRCGCNN_INLINE void look(typename Simd<T>::V x, int v) {  // passes a NaN, which goes its own way through the powers
    worst[v] = MathOf<T>::M::max(MathOf<T>::M::abs(x), worst[v]);
  }
  bool holds() const {
    auto all = worst[0];
    for (int v = 1; v < NV; ++v) all = MathOf<T>::M::max(all, worst[v]);
    bool good = true;
    for (int l = 0; l < Simd<T>::width; ++l) good &= all[l] <= most;
    return good;
  }
};
template <bool b>
struct Flag {
  static constexpr bool value = b;
};

// Channels are worked through in panels: kVectors vectors of the filter half and the same of the core half, so that what
// a crystal needs of one panel stays in the first-level cache. Arrays of 2F channels are ordered panel by panel, and hold
// (filter, core) of the panel; `placed` says where channel c of the layer is.
constexpr int kVectors = SRCGCNN_VECTOR_BYTES == 64 ? 1 : 2;
template <class T>
constexpr int kChannels = kVectors * Simd<T>::width;
template <class T>
constexpr int kPair = 2 * kChannels<T>;

template <class T>
SRCGCNN_INLINE int placed(int c, int F) {
  const int half = c / F, x = c % F;
  return x / kChannels<T> * kPair<T> + half * kChannels<T> + x % kChannels<T>;
}

// r (shells, kPair) = start + e W_e for the shells of one crystal and one panel, or the powers of it; w_e (K, kPair).
// False: a power's exponent is out of bounds. R: how many features a window has, 0 if that is not known.
template <class T, bool kPowers, int R>
bool shell_terms_of(T* r, const Windows<T>& windows, const T* w_e, const T* start) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 2 * kVectors;
  Bound<T, NV> bound;
  V from[NV];
  for (int v = 0; v < NV; ++v) from[v] = start ? load(start + v * W) : V{};
  for (int64_t s = 0; s < windows.n; ++s) {
    const T* values = windows.values(s);
    const T* w = w_e + int64_t(windows.first(s)) * NV * W;
    V sum[NV];
    for (int v = 0; v < NV; ++v) sum[v] = from[v];
    for (int k = 0; k < (R ? R : windows.count); ++k) {
      const V a = splat(values[k]);
      for (int v = 0; v < NV; ++v) sum[v] += a * load(w + int64_t(k) * NV * W + v * W);
    }
    for (int v = 0; v < NV; ++v) {
      if constexpr (kPowers) {
        bound.look(sum[v], v);
        sum[v] = MathOf<T>::M::exp2(sum[v]);
      }
      store(r + s * NV * W + v * W, sum[v]);
    }
  }
  return !kPowers || bound.holds();
}
// All features of every edge: a matrix product.
template <class T, bool kPowers>
bool edge_terms_of(T* r, const Windows<T>& windows, const T* w_e, const T* start) {
  constexpr int W = Simd<T>::width, NV = 2 * kVectors, R = SRCGCNN_VECTOR_BYTES == 64 ? 6 : 2;
  const int K = windows.count;
  int64_t s = 0;
  for (; s + R <= windows.n; s += R)
    tile_nn<T, R, NV>(windows.values(s), K, w_e, K, r + s * kPair<T>, kPair<T>, start, false);
  for (; s < windows.n; ++s)
    tile_nn<T, 1, NV>(windows.values(s), K, w_e, K, r + s * kPair<T>, kPair<T>, start, false);
  if (!kPowers) return true;
  Bound<T, NV> bound;
  for (s = 0; s < windows.n; ++s)
    for (int v = 0; v < NV; ++v) {
      T* at = r + (s * NV + v) * W;
      bound.look(load(at), v);
      store(at, MathOf<T>::M::exp2(load(at)));
    }
  return bound.holds();
}
template <class T, bool kPowers = false>
bool shell_terms(T* r, const Windows<T>& windows, const T* w_e, const T* start) {
  if (windows.are_given) return edge_terms_of<T, kPowers>(r, windows, w_e, start);
  return windows.count == kReach<T> ? shell_terms_of<T, kPowers, kReach<T>>(r, windows, w_e, start)
                                    : shell_terms_of<T, kPowers, 0>(r, windows, w_e, start);
}

// dw_e (K, kPair) += e^T t for the shells of one crystal and one panel; t (shells, kPair). Shells with the same window
// follow each other (they are ordered by distance): their sums stay in registers.
template <class T>
void shell_gradient(T* dw_e, const Windows<T>& windows, const T* t) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, R = kReach<T>, C = kPair<T>;
  constexpr int NV = SRCGCNN_VECTOR_BYTES == 64 ? 2 : 1;  // vectors whose R sums fit the registers
  if (windows.are_given)
    return gemm_tn<T>(windows.values(0), windows.count, windows.count, t, C, C, dw_e, C, windows.n);
  if (windows.count == R) {
    for (int c = 0; c < C; c += NV * W)
      for (int64_t s = 0; s < windows.n;) {
        const int first = windows.first(s);
        V sum[R][NV] = {};
        do {
          const T* values = windows.values(s);
          V d[NV];
          for (int v = 0; v < NV; ++v) d[v] = load(t + s * C + c + v * W);
          for (int k = 0; k < R; ++k)
            for (int v = 0; v < NV; ++v) sum[k][v] += splat(values[k]) * d[v];
        } while (++s < windows.n && windows.first(s) == first);
        for (int k = 0; k < R; ++k)
          for (int v = 0; v < NV; ++v) {
            T* at = dw_e + int64_t(first + k) * C + c + v * W;
            store(at, load(at) + sum[k][v]);
          }
      }
    return;
  }
  for (int64_t s = 0; s < windows.n; ++s)
    for (int k = 0; k < windows.count; ++k) {
      T* row = dw_e + int64_t(windows.first(s) + k) * C;
      const auto a = splat(windows.values(s)[k]);
      for (int c = 0; c < C; c += W) store(row + c, load(row + c) + a * load(t + s * C + c));
    }
}

static int64_t stray_edge(const int32_t* sender, const int32_t* row_ptr, const int32_t* crystal_ptr, int64_t n_crystals) {
  for (int64_t c = 0; c < n_crystals; ++c) {
    const uint32_t first = uint32_t(crystal_ptr[c]), n = uint32_t(crystal_ptr[c + 1]) - first;
    const int64_t begin = row_ptr[crystal_ptr[c]], end = row_ptr[crystal_ptr[c + 1]];
    int outside = 0;
    for (int64_t e = begin; e < end; ++e) outside |= uint32_t(sender[e]) - first >= n;
    if (outside)
      for (int64_t e = begin; e < end; ++e)
        if (uint32_t(sender[e]) - first >= n) return e;
  }
  return -1;
}

// The first crystal with more shells than edges, or an edge of no shell of it; -1: none.
static int64_t stray_shell(const int32_t* shell_of, const int32_t* shell_count, const int32_t* row_ptr,
                           const int32_t* crystal_ptr, int64_t n_crystals) {
  for (int64_t c = 0; c < n_crystals; ++c) {
    const int64_t begin = row_ptr[crystal_ptr[c]], end = row_ptr[crystal_ptr[c + 1]];
    const uint32_t n = uint32_t(shell_count[c]);
    int outside = n > uint32_t(end - begin);
    for (int64_t e = begin; e < end; ++e) outside |= uint32_t(shell_of[e]) >= n;
    if (outside) return c;
  }
  return -1;
}

// The edges of one crystal by sender and by shell, in order: sums over them are gathered, because scattered ones would
// wait for each other in memory. Edges and rows count within the crystal.
class Incoming {
 public:
  struct List {
    const int32_t* start;  // (keys + 1)
    const int32_t* edge;
  };
  List by_sender, by_shell;
  const int32_t* receiver;  // by edge

  template <class T>
  void of_crystal(const Edges<T>& g, int64_t crystal, int64_t shells) {
    const int64_t first = g.crystal_ptr[crystal], n = g.crystal_ptr[crystal + 1] - first, begin = g.row_ptr[first];
    const int64_t edges = g.row_ptr[first + n] - begin;
    receiver_.reserve(edges);
    int32_t* receivers = receiver_;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t e = g.row_ptr[first + i]; e < g.row_ptr[first + i + 1]; ++e) receivers[e - begin] = int32_t(i);
    receiver = receiver_;
    by_sender = sort(sender_start_, sender_edge_, g.sender + begin, int32_t(first), n, edges);
    if (g.shell_of) by_shell = sort(shell_start_, shell_edge_, g.shell_of + begin, 0, shells, edges);
  }

 private:
  static List sort(Buffer<int32_t>& start_at, Buffer<int32_t>& edge_at, const int32_t* key, int32_t least, int64_t n,
                   int64_t edges) {
    start_at.zero(n + 2);
    edge_at.reserve(edges);
    int32_t* start = start_at;
    int32_t* edge = edge_at;
    for (int64_t e = 0; e < edges; ++e) ++start[key[e] - least + 2];
    for (int64_t k = 2; k <= n; ++k) start[k] += start[k - 1];
    for (int64_t e = 0; e < edges; ++e) edge[start[key[e] - least + 1]++] = int32_t(e);
    return {start, edge};
  }

  Buffer<int32_t> receiver_, sender_start_, sender_edge_, shell_start_, shell_edge_;
};

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

// Shells in the order of their distances, up to the width of a bin: counting sort. `number` becomes old -> new.
template <class T>
void order_shells(T* distance, int32_t count, T* copy, int32_t* number) {
  constexpr int kBins = 256;
  constexpr T per_length = 16;  // bins of 1/16 Å
  int32_t start[kBins + 1] = {};
  const auto bin = [&](T d) { return d > 0 ? (d * per_length < kBins - 1 ? int(d * per_length) : kBins - 1) : 0; };
  for (int32_t s = 0; s < count; ++s) ++start[bin(copy[s] = distance[s]) + 1];
  for (int b = 0; b < kBins; ++b) start[b + 1] += start[b];
  for (int32_t s = 0; s < count; ++s) distance[number[s] = start[bin(copy[s])]++] = copy[s];
}

// Distinct distances of a crystal by a hash table that is emptied per crystal.
template <class T>
class ShellFinder {
 public:
  void of_crystal(int32_t* shell_of, T* shell_distance, int32_t* shell_count, const Edges<T>& g, int64_t c) {
    const int64_t begin = g.row_ptr[g.crystal_ptr[c]], end = g.row_ptr[g.crystal_ptr[c + 1]];
    int64_t slots = 64;
    while (slots < 2 * (end - begin)) slots *= 2;
    table_.reserve(slots);
    int32_t* table = table_;
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
    copy_.reserve(count);
    number_.reserve(count);
    int32_t* number = number_;
    order_shells<T>(shell_distance + begin, count, copy_, number);
    for (int64_t e = begin; e < end; ++e) shell_of[e] = number[shell_of[e]];
  }

 private:
  Buffer<int32_t> table_, number_;
  Buffer<T> copy_;
};

template <class T>
void edge_shells(int32_t* shell_of, T* shell_distance, int32_t* shell_count, const Edges<T>& g, int threads) {
  const int n_chunks = chunks_of(g);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    ShellFinder<T> finder;
    for (int64_t c = chunk_begin(g, chunk); c < chunk_begin(g, chunk + 1); ++c)
      finder.of_crystal(shell_of, shell_distance, shell_count, g, c);
  }
}

// to[x] = the sum over the chunks of parts (chunks, size), in double, of kSumBlock numbers from `begin` on.
constexpr int kSumBlock = 64;
template <class To, class T>
void sum_of_chunks(To* to, const T* parts, int64_t size, int n_chunks, int64_t begin) {
  const int64_t n = size - begin < kSumBlock ? size - begin : kSumBlock;
  double total[kSumBlock] = {};
  for (int chunk = 0; chunk < n_chunks; ++chunk)
    for (int64_t x = 0; x < n; ++x) total[x] += parts[chunk * size + begin + x];
  for (int64_t x = 0; x < n; ++x) to[begin + x] = To(total[x]);
}

// Adds weight[s] e_s^T e_s of the windows to gram (K, K), and weight[s] e_s to sum (K). Shells come by distance, and
// those whose windows begin at the same Gaussian are added up in registers first. R: as for shell_terms_of.
template <class T, int R>
void add_moments(double* gram, double* sum, const Windows<T>& windows, const double* weight, int64_t k) {
  if constexpr (R == 0) {
    for (int64_t s = 0; s < windows.n; ++s)
      for (int a = 0; a < windows.count; ++a) {
        const double wa = weight[s] * windows.values(s)[a];
        sum[windows.first(s) + a] += wa;
        double* row = gram + (windows.first(s) + a) * k + windows.first(s);
        for (int b = 0; b < windows.count; ++b) row[b] += wa * windows.values(s)[b];
      }
  } else {
    using V = typename Simd<double>::V;
    constexpr int W = Simd<double>::width, NV = (R + W - 1) / W;
    for (int64_t s = 0; s < windows.n;) {
      const int first = windows.first(s);
      V total[R + 1][NV] = {};  // the last row: the sum
      for (; s < windows.n && windows.first(s) == first; ++s) {
        double values[NV * W] = {};
        for (int b = 0; b < R; ++b) values[b] = windows.values(s)[b];
        for (int a = 0; a <= R; ++a) {
          const double wa = a < R ? weight[s] * values[a] : weight[s];
          for (int v = 0; v < NV; ++v) total[a][v] += wa * load(values + v * W);
        }
      }
      for (int a = 0; a <= R; ++a) {
        double* row = a < R ? gram + (first + a) * k + first : sum + first;
        for (int b = 0; b < R; ++b) row[b] += total[a][b / W][b % W];
      }
    }
  }
}

template <class T>
void edge_moments(T* in_degree, T* by_receiver, T* by_sender, double* sum_out, double* gram, const T* row_weight, const Edges<T>& g,
                  int threads) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 4;
  const int64_t k = g.n_features, size = k * (k + 1), wide = (k + NV * W - 1) / (NV * W) * (NV * W);
  const int n_chunks = chunks_of(g);
  Buffer<double> partial;
  partial.zero(n_chunks * size);
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Windows<T> windows;
    Buffer<double> shell_weight;
    Buffer<T> vectors, received(wide), sent;  // edge vectors of the shells (shells, wide), sums of a row, of all rows
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      double* sum = partial + chunk * size;
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      memset(in_degree + g.crystal_ptr[c0], 0, (g.crystal_ptr[c1] - g.crystal_ptr[c0]) * sizeof(T));
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t row0 = g.crystal_ptr[c], n = g.crystal_ptr[c + 1] - row0, begin = g.row_ptr[row0];
        windows.of_crystal(g, c);
        shell_weight.zero(windows.n);
        vectors.zero(windows.n * wide);
        sent.zero(n * wide);
        for (int64_t s = 0; s < windows.n; ++s)
          memcpy(vectors + s * wide + windows.first(s), windows.values(s), windows.count * sizeof(T));
        for (int64_t i = row0; i < row0 + n; ++i) {
          const T w = row_weight[i];
          for (int64_t x = 0; x < wide; x += NV * W) {
            V total[NV] = {};
            for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
              const int64_t s = g.features ? e - begin : g.shell_of[e];
              const T* from = vectors + s * wide + x;
              T* to = sent + (g.sender[e] - row0) * wide + x;
              for (int v = 0; v < NV; ++v) {
                const V values = load(from + v * W);
                total[v] += values;
                store(to + v * W, load(to + v * W) + w * values);
              }
              if (x) continue;
              in_degree[g.sender[e]] += w;
              shell_weight[s] += w;
            }
            for (int v = 0; v < NV; ++v) store(received + x + v * W, total[v]);
          }
          memcpy(by_receiver + i * k, received, k * sizeof(T));
        }
        for (int64_t j = 0; j < n; ++j) memcpy(by_sender + (row0 + j) * k, sent + j * wide, k * sizeof(T));
        const auto add = !g.features && windows.count == kReach<T> ? add_moments<T, kReach<T>> : add_moments<T, 0>;
        add(sum, sum + k * k, windows, shell_weight, k);
      }
    }
#pragma omp for schedule(static)
    for (int64_t x = 0; x < size; x += kSumBlock) sum_of_chunks<double, double>(partial, partial, size, n_chunks, x);
  }
  memcpy(gram, partial, k * k * sizeof(double));
  memcpy(sum_out, partial + k * k, k * sizeof(double));
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
