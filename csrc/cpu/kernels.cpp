// The body of every CPU kernel, compiled once per SIMD level (SRCGCNN_LEVEL names it).
// No std templates here: an inline function compiled for AVX-512 must not be the copy that the linker keeps.
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#include "simd.h"

#define SRCGCNN_STRING_(x) #x
#define SRCGCNN_STRING(x) SRCGCNN_STRING_(x)

namespace srcgcnn::SRCGCNN_LEVEL {
namespace {

// Partial sums are kept per chunk of crystals and added in order, so no result depends on the number of threads.
constexpr int kChunks = 32;
constexpr int kRowsPerTask = 64;

// Gaussians in reach of a distance: those left out are below 2e-9 (float) and 5e-19 (double).
template <class T>
constexpr int kReach = sizeof(T) == 4 ? 9 : 13;

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    const size_t bytes = ((n > 0 ? n : 1) * sizeof(T) + 127) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data_) abort();
    memset(data_, 0, bytes);
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

// The window of edge features that matter for one edge: values[0..count) belong to features first..first+count.
template <class T>
struct Window {
  const T* values;
  int first, count;
  T local[kReach<T>];

  SRCGCNN_INLINE void fill(const Edges<T>& g, int64_t e) {
    if (g.features) {
      values = g.features + e * g.n_features, first = 0, count = g.n_features;
      return;
    }
    count = g.n_features < kReach<T> ? g.n_features : kReach<T>;
    const T u = (g.distance[e] - g.dmin) / g.step;
    const int last = g.n_features - count;
    // A far or infinite distance must not reach the integer conversion.
    const T lowest = u + T(0.5) - kReach<T> / 2;
    first = !(lowest > 0) ? 0 : lowest >= last ? last : int(lowest);
    constexpr int W = Simd<T>::width;
    T padded[(kReach<T> + W - 1) / W * W];
    for (int k = 0; k < (kReach<T> + W - 1) / W * W; ++k) {
      const T x = u - T(first + k);
      padded[k] = -x * x;
    }
    for (int k = 0; k < kReach<T>; k += W) {
      const auto x = load(padded + k);
      store(padded + k, typename Simd<T>::V(x > T(-80) ? VectorMath::exp(x) : typename Simd<T>::V{}));
    }
    for (int k = 0; k < kReach<T>; ++k) local[k] = padded[k];
    values = local;
  }
};

// y = p_i + q_j + e_ij w_e for NV vectors of the filter half and NV of the core half, from channel c on.
template <class T, int NV>
SRCGCNN_INLINE void assemble(typename Simd<T>::V* f, typename Simd<T>::V* s, const T* p, const T* q, const T* w_e,
                             const Window<T>& window, int width, int c) {
  constexpr int W = Simd<T>::width;
  for (int v = 0; v < NV; ++v) {
    f[v] = load(p + c + v * W) + load(q + c + v * W);
    s[v] = load(p + width + c + v * W) + load(q + width + c + v * W);
  }
  const T* w = w_e + int64_t(window.first) * 2 * width + c;
  for (int k = 0; k < window.count; ++k, w += 2 * width) {
    const auto a = splat(window.values[k]);
    for (int v = 0; v < NV; ++v) {
      f[v] += a * load(w + v * W);
      s[v] += a * load(w + width + v * W);
    }
  }
}

template <class T, int NV>
void gate_sum_row(T* m, const T* p, const T* q, const T* w_e, const Edges<T>& g, const Window<T>* windows, int64_t i,
                  int width, int c) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width;
  V sum[NV];
  for (int v = 0; v < NV; ++v) sum[v] = V{};
  const int64_t begin = g.row_ptr[i];
  for (int64_t e = begin; e < g.row_ptr[i + 1]; ++e) {
    V f[NV], s[NV];
    assemble<T, NV>(f, s, p + i * 2 * width, q + int64_t(g.sender[e]) * 2 * width, w_e, windows[e - begin], width, c);
    for (int v = 0; v < NV; ++v) sum[v] += gate<VectorMath>(f[v], s[v]);
  }
  for (int v = 0; v < NV; ++v) store(m + i * width + c + v * W, sum[v]);
}

template <class T>
int64_t largest_degree(const Edges<T>& g) {
  int64_t most = 0;
  for (int64_t i = 0; i < g.n_rows; ++i) {
    const int64_t degree = g.row_ptr[i + 1] - g.row_ptr[i];
    if (degree > most) most = degree;
  }
  return most;
}

// Vectors that fit the registers at once: four of each half with 32 registers, two with 16.
constexpr int kVectors = SRCGCNN_VECTOR_BYTES == 64 ? 4 : 2;

template <class T>
void gate_sum_aligned(T* m, const T* p, const T* q, const T* w_e, const Edges<T>& g, int width, int threads) {
  constexpr int W = Simd<T>::width;
  const int64_t most = largest_degree(g), tasks = (g.n_rows + kRowsPerTask - 1) / kRowsPerTask;
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Buffer<Window<T>> windows(most);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t end = (task + 1) * kRowsPerTask < g.n_rows ? (task + 1) * kRowsPerTask : g.n_rows;
      for (int64_t i = task * kRowsPerTask; i < end; ++i) {
        for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) windows[e - g.row_ptr[i]].fill(g, e);
        int c = 0;
        for (; c + kVectors * W <= width; c += kVectors * W)
          gate_sum_row<T, kVectors>(m, p, q, w_e, g, windows, i, width, c);
        for (; c < width; c += W) gate_sum_row<T, 1>(m, p, q, w_e, g, windows, i, width, c);
      }
    }
  }
}

// Gradients of one row for NV vectors of each half; dw_e is the chunk's partial sum, slope (per window value) optional.
template <class T, int NV>
void gate_sum_backward_row(T* dp, T* dq, T* dw_e, T* slope, const T* grad, const T* p, const T* q, const T* w_e,
                           const Edges<T>& g, const Window<T>* windows, int64_t i, int width, int c) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width;
  V sum_f[NV], sum_s[NV], up[NV];
  for (int v = 0; v < NV; ++v) {
    sum_f[v] = sum_s[v] = V{};
    up[v] = load(grad + i * width + c + v * W);
  }
  const int64_t begin = g.row_ptr[i];
  for (int64_t e = begin; e < g.row_ptr[i + 1]; ++e) {
    const Window<T>& window = windows[e - begin];
    V f[NV], s[NV];
    assemble<T, NV>(f, s, p + i * 2 * width, q + int64_t(g.sender[e]) * 2 * width, w_e, window, width, c);
    T* dq_j = dq + int64_t(g.sender[e]) * 2 * width + c;
    for (int v = 0; v < NV; ++v) {
      const auto d = gate_gradient<VectorMath>(f[v], s[v]);
      f[v] = up[v] * d.d_filter;
      s[v] = up[v] * d.d_core;
      sum_f[v] += f[v];
      sum_s[v] += s[v];
      store(dq_j + v * W, load(dq_j + v * W) + f[v]);
      store(dq_j + width + v * W, load(dq_j + width + v * W) + s[v]);
    }
    T* dw = dw_e + int64_t(window.first) * 2 * width + c;
    for (int k = 0; k < window.count; ++k, dw += 2 * width) {
      const auto a = splat(window.values[k]);
      for (int v = 0; v < NV; ++v) {
        store(dw + v * W, load(dw + v * W) + a * f[v]);
        store(dw + width + v * W, load(dw + width + v * W) + a * s[v]);
      }
    }
    if (slope) {
      const T* w = w_e + int64_t(window.first) * 2 * width + c;
      for (int k = 0; k < window.count; ++k, w += 2 * width) {
        V dot = V{};
        for (int v = 0; v < NV; ++v) dot += f[v] * load(w + v * W) + s[v] * load(w + width + v * W);
        T total = 0;
        for (int l = 0; l < W; ++l) total += dot[l];
        slope[(e - begin) * g.n_features + window.first + k] += total;
      }
    }
  }
  for (int v = 0; v < NV; ++v) {
    store(dp + i * 2 * width + c + v * W, sum_f[v]);
    store(dp + i * 2 * width + width + c + v * W, sum_s[v]);
  }
}

// First crystal of a chunk: chunks hold about equal numbers of edges, and depend on the graph alone.
template <class T>
int64_t chunk_begin(const Edges<T>& g, int chunk) {
  if (chunk >= kChunks) return g.n_crystals;
  const int64_t wanted = g.n_edges * chunk / kChunks;
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
void gate_sum_backward_aligned(T* dp, T* dq, T* dw_e, T* d_edge, const T* grad, const T* p, const T* q, const T* w_e,
                               const Edges<T>& g, int width, int threads) {
  constexpr int W = Simd<T>::width;
  const int64_t most = largest_degree(g), size = int64_t(g.n_features) * 2 * width;
  Buffer<T> partial(kChunks * size);
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Buffer<Window<T>> windows(most);
    Buffer<T> slope(d_edge ? most * g.n_features : 0);
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      T* dw = partial + chunk * size;
      // chunk 0 begins at row 0, so that empty crystals at the front are covered too
      const int64_t first = chunk == 0 ? 0 : g.crystal_ptr[chunk_begin(g, chunk)];
      const int64_t end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
      for (int64_t i = first; i < end; ++i) {
        const int64_t begin = g.row_ptr[i], degree = g.row_ptr[i + 1] - begin;
        for (int64_t k = 0; k < degree; ++k) windows[k].fill(g, begin + k);
        if (d_edge) memset(slope, 0, degree * g.n_features * sizeof(T));
        T* s = d_edge ? static_cast<T*>(slope) : nullptr;
        int c = 0;
        for (; c + kVectors * W <= width; c += kVectors * W)
          gate_sum_backward_row<T, kVectors>(dp, dq, dw, s, grad, p, q, w_e, g, windows, i, width, c);
        for (; c < width; c += W)
          gate_sum_backward_row<T, 1>(dp, dq, dw, s, grad, p, q, w_e, g, windows, i, width, c);
        if (!d_edge) continue;
        for (int64_t k = 0; k < degree; ++k) {
          const T* row = slope + k * g.n_features;
          if (g.features) {
            memcpy(d_edge + (begin + k) * g.n_features, row, g.n_features * sizeof(T));
            continue;
          }
          T total = 0;
          const Window<T>& window = windows[k];
          for (int j = 0; j < window.count; ++j) {
            const T x = (g.distance[begin + k] - g.dmin) / g.step - T(window.first + j);
            total += row[window.first + j] * T(-2) * x / g.step * window.values[j];
          }
          d_edge[begin + k] = total;
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t x = 0; x < size; ++x) {
      T total = 0;
      for (int chunk = 0; chunk < kChunks; ++chunk) total += partial[chunk * size + x];
      dw_e[x] = total;
    }
  }
}

// Rows of `halves` blocks of `width` numbers, each block widened with zeros to `padded` numbers, and back.
template <class T>
void widen(T* out, const T* in, int64_t rows, int halves, int width, int padded) {
  for (int64_t r = 0; r < rows * halves; ++r) memcpy(out + r * padded, in + r * width, width * sizeof(T));
}
template <class T>
void narrow(T* out, const T* in, int64_t rows, int halves, int width, int padded) {
  for (int64_t r = 0; r < rows * halves; ++r) memcpy(out + r * width, in + r * padded, width * sizeof(T));
}

template <class T>
int padded_width(int width) {
  constexpr int W = Simd<T>::width;
  return (width + W - 1) / W * W;
}

template <class T>
void gate_sum(T* m, const T* p, const T* q, const T* w_e, const Edges<T>& g, int width, int threads) {
  const int wide = padded_width<T>(width);
  if (wide == width) return gate_sum_aligned(m, p, q, w_e, g, width, threads);
  const int64_t n = g.n_rows;
  Buffer<T> wm(n * wide), wp(n * 2 * wide), wq(n * 2 * wide), ww(int64_t(g.n_features) * 2 * wide);
  widen<T>(wp, p, n, 2, width, wide);
  widen<T>(wq, q, n, 2, width, wide);
  widen<T>(ww, w_e, g.n_features, 2, width, wide);
  gate_sum_aligned<T>(wm, wp, wq, ww, g, wide, threads);
  narrow<T>(m, wm, n, 1, width, wide);
}

template <class T>
void gate_sum_backward(T* dp, T* dq, T* dw_e, T* d_edge, const T* grad, const T* p, const T* q, const T* w_e,
                       const Edges<T>& g, int width, int threads) {
  const int wide = padded_width<T>(width);
  if (wide == width) return gate_sum_backward_aligned(dp, dq, dw_e, d_edge, grad, p, q, w_e, g, width, threads);
  const int64_t n = g.n_rows, k = g.n_features;
  Buffer<T> wg(n * wide), wp(n * 2 * wide), wq(n * 2 * wide), ww(k * 2 * wide);
  Buffer<T> gp(n * 2 * wide), gq(n * 2 * wide), gw(k * 2 * wide);
  widen<T>(wg, grad, n, 1, width, wide);
  widen<T>(wp, p, n, 2, width, wide);
  widen<T>(wq, q, n, 2, width, wide);
  widen<T>(ww, w_e, k, 2, width, wide);
  gate_sum_backward_aligned<T>(gp, gq, gw, d_edge, wg, wp, wq, ww, g, wide, threads);
  narrow<T>(dp, gp, n, 2, width, wide);
  narrow<T>(dq, gq, n, 2, width, wide);
  narrow<T>(dw_e, gw, k, 2, width, wide);
}

template <class T>
void neighbor_sum(T* out, const T* h, const Edges<T>& g, int width, bool transpose, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    FlushDenormals flush;
    const int64_t first = chunk == 0 ? 0 : g.crystal_ptr[chunk_begin(g, chunk)];
    const int64_t end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
    memset(out + first * width, 0, (end - first) * width * sizeof(T));
    for (int64_t i = first; i < end; ++i)
      for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
        const int64_t j = g.sender[e];
        T* __restrict to = out + (transpose ? j : i) * width;
        const T* __restrict from = h + (transpose ? i : j) * width;
        for (int c = 0; c < width; ++c) to[c] += from[c];
      }
  }
}

template <class T>
void edge_moments(T* by_receiver, T* by_sender, double* gram, const T* row_weight, const Edges<T>& g, int threads) {
  const int64_t k = g.n_features, size = k * k;
  Buffer<double> partial(kChunks * size);
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      double* sum = partial + chunk * size;
      const int64_t first = chunk == 0 ? 0 : g.crystal_ptr[chunk_begin(g, chunk)];
      const int64_t end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
      memset(by_receiver + first * k, 0, (end - first) * k * sizeof(T));
      memset(by_sender + first * k, 0, (end - first) * k * sizeof(T));
      Window<T> window;
      for (int64_t i = first; i < end; ++i)
        for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
          window.fill(g, e);
          T* to_i = by_receiver + i * k + window.first;
          T* to_j = by_sender + int64_t(g.sender[e]) * k + window.first;
          const T w = row_weight[i];
          for (int a = 0; a < window.count; ++a) {
            to_i[a] += window.values[a];
            to_j[a] += w * window.values[a];
            const double wa = double(w) * window.values[a];
            double* row = sum + (window.first + a) * k + window.first;
            for (int b = 0; b < window.count; ++b) row[b] += wa * window.values[b];
          }
        }
    }
#pragma omp for schedule(static)
    for (int64_t x = 0; x < size; ++x) {
      double total = 0;
      for (int chunk = 0; chunk < kChunks; ++chunk) total += partial[chunk * size + x];
      gram[x] = total;
    }
  }
}

}  // namespace
}  // namespace srcgcnn::SRCGCNN_LEVEL

namespace srcgcnn {
#define SRCGCNN_TABLE(T) \
  {SRCGCNN_LEVEL::gate_sum<T>, SRCGCNN_LEVEL::gate_sum_backward<T>, SRCGCNN_LEVEL::neighbor_sum<T>, \
   SRCGCNN_LEVEL::edge_moments<T>}
#define SRCGCNN_JOIN_(a, b) a##b
#define SRCGCNN_JOIN(a, b) SRCGCNN_JOIN_(a, b)
extern const Level SRCGCNN_JOIN(level_, SRCGCNN_LEVEL);
const Level SRCGCNN_JOIN(level_, SRCGCNN_LEVEL) = {SRCGCNN_STRING(SRCGCNN_LEVEL), SRCGCNN_TABLE(float),
                                                   SRCGCNN_TABLE(double)};
}  // namespace srcgcnn
