// One gated convolution, forward and backward, in training and with fixed statistics.
//
// The linear map is split: z_ij = p_i + q_j + r_ij with p, q from one product per row and r from a table per shell.
// Forward: rows -> (statistics of z) -> gate and sum -> statistics of m -> output. Backward: one pass over the edges
// emits plain sums; the corrections of both batch norms are applied per row. Nothing of the edges is stored.
#pragma once
#include <math.h>

#include "edges.h"
#include "gemm.h"

namespace srcgcnn::SRCGCNN_LEVEL {

template <class T>
SRCGCNN_INLINE int64_t degree_of(const Edges<T>& g, int64_t i) {
  return g.row_ptr[i + 1] - g.row_ptr[i];
}
template <class T>
SRCGCNN_INLINE int64_t shell_index(const Edges<T>& g, int64_t e, int64_t begin) {
  return g.features ? e - begin : g.shell_of[e];
}

// Columns of the node product: p filter, p core, q filter, q core, F each.
template <class T>
Packed<T> pack_nodes(T* to, const T* weight, int F, int K, const T* scale) {
  for (int c = 0; c < 2 * F; ++c) {
    const T* row = weight + int64_t(c) * (2 * F + K);
    pack_column<T>(to, F, 4 * F, c, row, scale ? scale[c] : T(1));
    pack_column<T>(to, F, 4 * F, 2 * F + c, row + F, scale ? scale[c] : T(1));
  }
  return {to, F, 4 * F};
}
// Its transpose: from the 4F columns back to the rows.
template <class T>
Packed<T> pack_nodes_back(T* to, const T* weight, int F, int K) {
  for (int c = 0; c < 2 * F; ++c) {
    const T* row = weight + int64_t(c) * (2 * F + K);
    pack_row<T>(to, 4 * F, F, c, row);
    pack_row<T>(to, 4 * F, F, 2 * F + c, row + F);
  }
  return {to, 4 * F, F};
}
template <class T>
void pack_edges(T* w_e, const T* weight, int F, int K, const T* scale) {
  for (int k = 0; k < K; ++k)
    for (int c = 0; c < 2 * F; ++c)
      w_e[int64_t(k) * 2 * F + c] = weight[int64_t(c) * (2 * F + K) + 2 * F + k] * (scale ? scale[c] : T(1));
}

// y = scale z + shift in the units of gate2: filter channels times -log2(e), core channels times log2(e).
template <class T>
void fold_first(T* scale, T* shift, const Layer<T>& layer, int F) {
  for (int c = 0; c < 2 * F; ++c) {
    const double a = layer.gamma1[c] / sqrt(double(layer.var1[c]) + layer.eps1);
    const double unit = c < F ? -kLog2e : kLog2e;
    const double bias = layer.bias ? double(layer.bias[c]) : 0.0;
    scale[c] = T(unit * a);
    shift[c] = T(unit * (layer.beta1[c] + a * (bias - layer.mean1[c])));
  }
}
template <class T>
void fold_second(T* scale, T* shift, const Layer<T>& layer, int F) {
  for (int c = 0; c < F; ++c) {
    const double a = layer.gamma2[c] / sqrt(double(layer.var2[c]) + layer.eps2);
    scale[c] = T(a);
    shift[c] = T(layer.beta2[c] - a * layer.mean2[c]);
  }
}

// pq (n, 4F) -> scaled and, its p half, shifted.
template <class T>
void scale_rows(T* to, const T* pq, int64_t n, int F, const T* scale, const T* shift) {
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < 2 * F; c += W) {
      const auto s = load(scale + c);
      store(to + i * 4 * F + c, load(pq + i * 4 * F + c) * s + load(shift + c));
      store(to + i * 4 * F + 2 * F + c, load(pq + i * 4 * F + 2 * F + c) * s);
    }
}

// Gate and sum of one row for NV vectors of each half from channel c on; y in gate2's units.
template <class T, int NV>
SRCGCNN_INLINE void gate_row(T* m, const T* rows, const T* r, const Edges<T>& g, int64_t i, int64_t first,
                             int64_t begin, int F, int c) {
  using V = typename Simd<T>::V;
  using M = typename MathOf<T>::M;
  constexpr int W = Simd<T>::width;
  const T* p = rows + (i - first) * 4 * F + c;
  V pf[NV], pc[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {
    pf[v] = load(p + v * W);
    pc[v] = load(p + F + v * W);
    sum[v] = V{};
  }
  for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
    const T* q = rows + (g.sender[e] - first) * 4 * F + 2 * F + c;
    const T* s = r + shell_index(g, e, begin) * 2 * F + c;
    V f[NV], k[NV];
    for (int v = 0; v < NV; ++v) f[v] = pf[v] + (load(q + v * W) + load(s + v * W));
    for (int v = 0; v < NV; ++v) k[v] = pc[v] + (load(q + F + v * W) + load(s + F + v * W));
    for (int v = 0; v < NV; ++v) sum[v] += gate2<M>(f[v], k[v]);
  }
  for (int v = 0; v < NV; ++v) store(m + i * F + c + v * W, sum[v] * M::ln2);
}

// Vectors that fit the registers at once: four of each half with 32 registers, two with 16.
constexpr int kVectors = SRCGCNN_VECTOR_BYTES == 64 ? 4 : 2;

// m of all rows of one crystal; rows (n, 4F) and r (shells, 2F) in gate2's units.
template <class T>
void gate_crystal(T* m, const T* rows, const T* r, const Edges<T>& g, int64_t crystal, int F) {
  constexpr int W = Simd<T>::width;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  int c = 0;
  for (; c + kVectors * W <= F; c += kVectors * W)
    for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i)
      gate_row<T, kVectors>(m, rows, r, g, i, first, begin, F, c);
  for (; c < F; c += W)
    for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i) gate_row<T, 1>(m, rows, r, g, i, first, begin, F, c);
}

// out = softplus(h + scale m + shift) for n rows.
template <class T>
void residual_softplus(T* out, const T* h, const T* m, int64_t n, int F, const T* scale, const T* shift) {
  using M = typename MathOf<T>::M;
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < F; c += W) {
      const auto x = load(h + i * F + c) + (load(m + i * F + c) * load(scale + c) + load(shift + c));
      store(out + i * F + c, softplus2<M>(x * T(kLog2e)) * M::ln2);
    }
}

constexpr int kRowBlock = 48;  // rows whose products stay in the first-level cache

template <class T>
void node_product(T* pq, const T* h, Packed<T> nodes, int64_t begin, int64_t end, int F, const T* start = nullptr) {
  for (int64_t i = begin; i < end; i += kRowBlock)
    gemm_nn(h + i * F, F, nodes, pq + (i - begin) * 4 * F, 4 * F, end - i < kRowBlock ? end - i : kRowBlock, start,
            false);
}

// sum w_i (z_ij - centre)^2 of one crystal, added to sum (2F, double); r already holds -centre.
template <class T>
void squares_of_crystal(double* sum, T* row_sum, const T* pq, const T* r, const T* row_weight, const Edges<T>& g,
                        int64_t crystal, int F) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, B = 8;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  for (int c = 0; c < 2 * F; c += B * W) {
    const int n = (2 * F - c) / W < B ? (2 * F - c) / W : B;
    V total[B] = {};
    for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i) {
      V p[B] = {}, square[B] = {};
      for (int v = 0; v < n; ++v) p[v] = load(pq + (i - first) * 4 * F + c + v * W);
      for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
        const T* q = pq + (g.sender[e] - first) * 4 * F + 2 * F + c;
        const T* s = r + shell_index(g, e, begin) * 2 * F + c;
        if (n == B) {
          for (int v = 0; v < B; ++v) {
            const V z = p[v] + (load(q + v * W) + load(s + v * W));
            square[v] += z * z;
          }
        } else {
          for (int v = 0; v < n; ++v) {
            const V z = p[v] + (load(q + v * W) + load(s + v * W));
            square[v] += z * z;
          }
        }
      }
      const V w = splat(row_weight[i]);
      for (int v = 0; v < n; ++v) total[v] += w * square[v];
    }
    for (int v = 0; v < n; ++v) store(row_sum + c + v * W, total[v]);
  }
  for (int c = 0; c < 2 * F; ++c) sum[c] += row_sum[c];
}

// What one chunk knows of the weighted values that a batch norm sees.
template <class T>
struct ChunkStatistics {
  double count;
  double* mean;     // (2F)
  double* squares;  // (2F) about that mean
};

// Joins per-chunk means and sums of squares, in order (Chan, Golub & LeVeque's pairwise formula).
template <class T>
void join_statistics(const ChunkStatistics<T>* chunks, int n_chunks, int width, T* mean, T* var) {
  for (int c = 0; c < width; ++c) {
    double n = 0, m = 0, s = 0;
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const double k = chunks[chunk].count;
      if (k == 0) continue;
      const double delta = chunks[chunk].mean[c] - m;
      s += chunks[chunk].squares[c] + delta * delta * n * k / (n + k);
      m += delta * k / (n + k);
      n += k;
    }
    mean[c] = T(m);
    var[c] = T(n > 0 ? s / n : 0);
  }
}

// Mean of z over the edges of the rows [begin, end), exact: it follows from p, q and the edge sums of the rows.
template <class T>
double mean_of_rows(double* mean, const T* pq, const T* w_e, const Edges<T>& g, const Moments<T>& moments,
                    int64_t begin, int64_t end, int F) {
  const int K = g.n_features, C = 2 * F;
  Buffer<double> e_sum;
  e_sum.zero(K);
  for (int c = 0; c < C; ++c) mean[c] = 0;
  double count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double w = moments.row_weight[i], wd = w * degree_of(g, i), in = moments.in_degree[i];
    const T* row = pq + (i - begin) * 4 * F;
    for (int c = 0; c < C; ++c) mean[c] += wd * row[c] + in * row[C + c];
    for (int k = 0; k < K; ++k) e_sum[k] += w * moments.by_receiver[i * K + k];
    count += wd;
  }
  for (int k = 0; k < K; ++k)
    for (int c = 0; c < C; ++c) mean[c] += e_sum[k] * w_e[int64_t(k) * C + c];
  for (int c = 0; c < C; ++c) mean[c] = count > 0 ? mean[c] / count : 0;
  return count;
}

// Weighted mean and sum of squares about it of m over the rows [begin, end).
template <class T>
double statistics_of_rows(double* mean, double* squares, const T* m, const T* row_weight, int64_t begin, int64_t end,
                          int F) {
  double count = 0;
  for (int c = 0; c < F; ++c) mean[c] = squares[c] = 0;
  for (int64_t i = begin; i < end; ++i) {
    count += row_weight[i];
    for (int c = 0; c < F; ++c) mean[c] += double(row_weight[i]) * m[i * F + c];
  }
  for (int c = 0; c < F; ++c) mean[c] = count > 0 ? mean[c] / count : 0;
  for (int64_t i = begin; i < end; ++i)
    for (int c = 0; c < F; ++c) {
      const double d = m[i * F + c] - mean[c];
      squares[c] += row_weight[i] * d * d;
    }
  return count;
}

template <class T>
int64_t most_shells(const Edges<T>& g) {
  int64_t most = 0;
  for (int64_t c = 0; c < g.n_crystals; ++c) most = shells_of(g, c) > most ? shells_of(g, c) : most;
  return most;
}
template <class T>
int64_t most_rows(const Edges<T>& g) {
  int64_t most = 0;
  for (int64_t c = 0; c < g.n_crystals; ++c) {
    const int64_t n = g.crystal_ptr[c + 1] - g.crystal_ptr[c];
    most = n > most ? n : most;
  }
  return most;
}

template <class T>
void conv(T* out, T* m, const T* h, const Layer<T>& layer_in, const Edges<T>& g, const Moments<T>& moments, int F,
          int threads) {
  const int K = g.n_features, C = 2 * F, n_chunks = chunks_of(g);
  const int64_t shells = most_shells(g), largest = most_rows(g);
  Layer<T> layer = layer_in;
  if (layer.train1) layer.bias = nullptr;  // batch statistics take any bias away; mean1 leaves without it
  Buffer<T> nodes_at(int64_t(F) * 4 * F), w_e(int64_t(K) * C), w_e_scaled(int64_t(K) * C), pq(g.n_rows * 4 * F);
  Buffer<T> scale1(C), shift1(C), scale2(F), shift2(F);
  Buffer<double> mean_at(n_chunks * C), squares_at(n_chunks * C);
  ChunkStatistics<T> chunks[kMostChunks];
  for (int k = 0; k < n_chunks; ++k) chunks[k] = {0, mean_at + k * C, squares_at + k * C};
  const auto nodes = pack_nodes<T>(nodes_at, layer.weight, F, K, nullptr);
  pack_edges<T>(w_e, layer.weight, F, K, nullptr);

#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Buffer<T> r(shells * C), rows(largest * 4 * F), row_sum(C);
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      const int64_t begin = g.crystal_ptr[c0], end = g.crystal_ptr[c1];
      node_product<T>(pq + begin * 4 * F, h, nodes, begin, end, F);
      if (!layer.train1) continue;
      auto& statistics = chunks[chunk];
      statistics.count = mean_of_rows<T>(statistics.mean, pq + begin * 4 * F, w_e, g, moments, begin, end, F);
      for (int c = 0; c < C; ++c) {
        statistics.squares[c] = 0;
        row_sum[c] = T(-statistics.mean[c]);
      }
      Buffer<T> centre(C);
      memcpy(centre, row_sum, C * sizeof(T));
      for (int64_t c = c0; c < c1; ++c) {
        shell_terms<T>(r, g, c, w_e, C, centre);
        squares_of_crystal<T>(statistics.squares, row_sum, pq + g.crystal_ptr[c] * 4 * F, r, moments.row_weight, g, c,
                              F);
      }
    }
#pragma omp single
    {
      if (layer.train1) join_statistics(chunks, n_chunks, C, layer.mean1, layer.var1);
      fold_first<T>(scale1, shift1, layer, F);
      pack_edges<T>(w_e_scaled, layer.weight, F, K, scale1);
    }
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t first = g.crystal_ptr[c];
        scale_rows<T>(rows, pq + first * 4 * F, g.crystal_ptr[c + 1] - first, F, scale1, shift1);
        shell_terms<T>(r, g, c, w_e_scaled, C, nullptr);
        gate_crystal<T>(m, rows, r, g, c, F);
      }
      if (layer.train2)
        chunks[chunk].count = statistics_of_rows(chunks[chunk].mean, chunks[chunk].squares, m, moments.row_weight,
                                                 g.crystal_ptr[c0], g.crystal_ptr[c1], F);
    }
#pragma omp single
    {
      if (layer.train2) join_statistics(chunks, n_chunks, F, layer.mean2, layer.var2);
      fold_second<T>(scale2, shift2, layer, F);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.n_rows; i += kRowBlock) {
      const int64_t n = g.n_rows - i < kRowBlock ? g.n_rows - i : kRowBlock;
      residual_softplus<T>(out + i * F, h + i * F, m + i * F, n, F, scale2, shift2);
    }
  }
}

// The edge pass of the backward for one row and NV vectors of each half. Plain sums, no batch-norm corrections:
// own (4F: sum_j dy | sum_j y), sender rows (4F each: sum_i dy | sum_i w y), shells (2F: sum dy).
template <class T, int NV, bool kTrain>
SRCGCNN_INLINE void backward_row(T* own, T* senders, T* t, const T* dm, const T* rows, const T* r, const Edges<T>& g,
                                 int64_t i, int64_t first, int64_t begin, T weight, int F, int c) {
  using V = typename Simd<T>::V;
  using M = typename MathOf<T>::M;
  constexpr int W = Simd<T>::width;
  const T* p = rows + (i - first) * 4 * F + c;
  V d[2 * NV], y[2 * NV], up[NV], mine[2 * NV];
  for (int v = 0; v < NV; ++v) {
    mine[v] = load(p + v * W);
    mine[NV + v] = load(p + F + v * W);
    up[v] = load(dm + c + v * W);
    d[v] = d[NV + v] = y[v] = y[NV + v] = V{};
  }
  const V w = splat(weight);
  for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
    const int64_t j = g.sender[e] - first, k = shell_index(g, e, begin);
    const T* q = rows + j * 4 * F + 2 * F + c;
    const T* s = r + k * 2 * F + c;
    T* to_j = senders + j * 4 * F + c;
    T* to_k = t + k * 2 * F + c;
    V f[NV], x[NV];
    for (int v = 0; v < NV; ++v) f[v] = mine[v] + (load(q + v * W) + load(s + v * W));
    for (int v = 0; v < NV; ++v) x[v] = mine[NV + v] + (load(q + F + v * W) + load(s + F + v * W));
    if (kTrain) {
      for (int v = 0; v < NV; ++v) {
        y[v] += f[v];
        y[NV + v] += x[v];
        T* sum_f = to_j + 2 * F + v * W;
        T* sum_x = sum_f + F;
        store(sum_f, load(sum_f) + w * f[v]);
        store(sum_x, load(sum_x) + w * x[v]);
      }
    }
    for (int v = 0; v < NV; ++v) {
      const auto gradient = gate_gradient2<M>(f[v], x[v]);
      f[v] = up[v] * gradient.d_filter;
      x[v] = up[v] * gradient.d_core;
    }
    for (int v = 0; v < NV; ++v) {
      d[v] += f[v];
      d[NV + v] += x[v];
      store(to_j + v * W, load(to_j + v * W) + f[v]);
      store(to_j + F + v * W, load(to_j + F + v * W) + x[v]);
      store(to_k + v * W, load(to_k + v * W) + f[v]);
      store(to_k + F + v * W, load(to_k + F + v * W) + x[v]);
    }
  }
  for (int v = 0; v < NV; ++v) {
    store(own + c + v * W, d[v]);
    store(own + F + c + v * W, d[NV + v]);
    if (!kTrain) continue;
    store(own + 2 * F + c + v * W, y[v]);
    store(own + 3 * F + c + v * W, y[NV + v]);
  }
}

// Where the backward passes keep two vectors of each half: more would spill.
constexpr int kBackwardVectors = 2;

template <class T, bool kTrain>
void backward_crystal(T* own, T* senders, T* t, const T* dm, const T* rows, const T* r, const Edges<T>& g,
                      const T* row_weight, int64_t crystal, int F) {
  constexpr int W = Simd<T>::width, B = kBackwardVectors;
  const int64_t first = g.crystal_ptr[crystal], end = g.crystal_ptr[crystal + 1], begin = g.row_ptr[first];
  int c = 0;
  for (; c + B * W <= F; c += B * W)
    for (int64_t i = first; i < end; ++i)
      backward_row<T, B, kTrain>(own + (i - first) * 4 * F, senders, t, dm + (i - first) * F, rows, r, g, i, first,
                                 begin, kTrain ? row_weight[i] : T(1), F, c);
  for (; c < F; c += W)
    for (int64_t i = first; i < end; ++i)
      backward_row<T, 1, kTrain>(own + (i - first) * 4 * F, senders, t, dm + (i - first) * F, rows, r, g, i, first,
                                 begin, kTrain ? row_weight[i] : T(1), F, c);
}

// Gradients of the edges of one crystal (fixed statistics): per distance, or per given feature.
template <class T>
void edge_gradient(T* d_edge, const T* dm, const T* rows, const T* r, const T* w_e, const T* a, const Edges<T>& g,
                   int64_t crystal, int F) {
  using M = typename MathOf<T>::M;
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  const int K = g.n_features;
  Buffer<T> dy(2 * F);
  Window<T> window;
  for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i)
    for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
      const int64_t k = shell_index(g, e, begin);
      const T* p = rows + (i - first) * 4 * F;
      const T* q = rows + (g.sender[e] - first) * 4 * F + 2 * F;
      const T* s = r + k * 2 * F;
      for (int c = 0; c < F; c += W) {
        const V f = load(p + c) + (load(q + c) + load(s + c));
        const V x = load(p + F + c) + (load(q + F + c) + load(s + F + c));
        const auto gradient = gate_gradient2<M>(f, x);
        const V up = load(dm + (i - first) * F + c);
        store(dy + c, up * gradient.d_filter * load(a + c));
        store(dy + F + c, up * gradient.d_core * load(a + F + c));
      }
      window.shell(g, begin, k);
      T total = 0;
      for (int x = 0; x < window.count; ++x) {
        const T* w = w_e + int64_t(window.first + x) * 2 * F;
        V dot = V{};
        for (int c = 0; c < 2 * F; c += W) dot += load(dy + c) * load(w + c);
        T slope = 0;
        for (int l = 0; l < W; ++l) slope += dot[l];
        if (g.features) {
          d_edge[e * K + x] = slope;
        } else {
          const T u = (g.distance[e] - g.dmin) / g.step - T(window.first + x);
          total += slope * window.values[x] * T(-2) * u / g.step;
        }
      }
      if (!g.features) d_edge[e] = total;
    }
}

// Chunk sums of columns: to (columns, double) += rows (n, ld) summed over rows.
template <class T>
void add_columns(double* to, const T* rows, int64_t n, int64_t ld, int columns) {
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < columns; ++c) to[c] += rows[i * ld + c];
}

template <class T>
void conv_backward(const Gradients<T>& d, const T* grad_out, const T* h, const T* m, const Layer<T>& layer_in,
                   const Edges<T>& g, const Moments<T>& moments, int F, int threads) {
  const int K = g.n_features, C = 2 * F, n_chunks = chunks_of(g);
  const int64_t N = g.n_rows, shells = most_shells(g), largest = most_rows(g);
  Layer<T> layer = layer_in;
  if (layer.train1) layer.bias = nullptr;
  const bool train = layer.train1;
  Buffer<T> nodes_at(int64_t(F) * 4 * F), back_at(int64_t(F) * 4 * F), w_e(int64_t(K) * C), w_e_scaled(int64_t(K) * C);
  Buffer<T> scale1(C), shift1(C), scale2(F), shift2(F), a1(C), mean(C), r1(C), b0(F), b1(F);
  Buffer<T> own(N * 4 * F), senders(N * 4 * F);
  Buffer<double> edge_part(int64_t(K) * C), z_part(int64_t(K) * C);
  Buffer<double> sums(n_chunks * 2 * F), totals(2 * F), by_chunk(n_chunks * 2 * C), first_order(2 * C);
  Buffer<T> dw_nodes, dw_edges, e_pq;
  dw_nodes.zero(n_chunks * int64_t(F) * 4 * F);
  dw_edges.zero(n_chunks * int64_t(K) * C);
  e_pq.zero(train ? n_chunks * int64_t(K) * C : 0);
  sums.zero(n_chunks * 2 * F);
  by_chunk.zero(n_chunks * 2 * C);
  const auto nodes = pack_nodes<T>(nodes_at, layer.weight, F, K, nullptr);
  const auto back = pack_nodes_back<T>(back_at, layer.weight, F, K);
  pack_edges<T>(w_e, layer.weight, F, K, nullptr);
  fold_first<T>(scale1, shift1, layer, F);
  fold_second<T>(scale2, shift2, layer, F);
  for (int c = 0; c < C; ++c) {
    r1[c] = T(1 / sqrt(double(layer.var1[c]) + layer.eps1));
    a1[c] = layer.gamma1[c] * r1[c];
    mean[c] = layer.mean1[c] - (layer.bias ? layer.bias[c] : T(0));
  }
  pack_edges<T>(w_e_scaled, layer.weight, F, K, scale1);
  double edges = 0, atoms = 0;
  if (layer.train1 || layer.train2)
    for (int64_t i = 0; i < N; ++i) {
      atoms += moments.row_weight[i];
      edges += double(moments.row_weight[i]) * degree_of(g, i);
    }

#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    using M = typename MathOf<T>::M;
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    // 1. Through the output's softplus: d.h = da, and the sums that bn2 needs.
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t begin = g.crystal_ptr[chunk_begin(g, chunk)], end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
      double* sum = sums + chunk * 2 * F;
      for (int64_t b = begin; b < end; b += 16) {  // few rows at a time: their sums are exact enough in T
        const int64_t stop = b + 16 < end ? b + 16 : end;
        for (int c = 0; c < F; c += W) {
          V plain = V{}, with_m = V{};
          for (int64_t i = b; i < stop; ++i) {
            const V message = load(m + i * F + c);
            const V x = load(h + i * F + c) + (message * load(scale2 + c) + load(shift2 + c));
            const V da = load(grad_out + i * F + c) * softplus_slope2<M>(x * T(kLog2e));
            store(d.h + i * F + c, da);
            plain += da;
            with_m += da * (message - load(layer.mean2 + c));
          }
          for (int l = 0; l < W; ++l) {
            sum[c + l] += plain[l];
            sum[F + c + l] += with_m[l];
          }
        }
      }
    }
#pragma omp single
    {
      for (int c = 0; c < 2 * F; ++c) {
        totals[c] = 0;
        for (int chunk = 0; chunk < n_chunks; ++chunk) totals[c] += sums[chunk * 2 * F + c];
      }
      for (int c = 0; c < F; ++c) {
        totals[F + c] /= sqrt(double(layer.var2[c]) + layer.eps2);
        d.beta2[c] = T(totals[c]);
        d.gamma2[c] = T(totals[F + c]);
        b0[c] = layer.train2 ? T(totals[c] / atoms) : T(0);
        b1[c] = layer.train2 ? T(totals[F + c] / atoms / sqrt(double(layer.var2[c]) + layer.eps2)) : T(0);
      }
    }
    // 2. The edge pass, crystal by crystal.
    Buffer<T> r(shells * C), t(shells * C), rows(largest * 4 * F), raw, dm(largest * F), we_rows;
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      const int64_t begin = g.crystal_ptr[c0], end = g.crystal_ptr[c1];
      double* sum = by_chunk + chunk * 2 * C;
      raw.reserve((end - begin) * 4 * F);
      node_product<T>(raw, h, nodes, begin, end, F);
      memset(senders + begin * 4 * F, 0, (end - begin) * 4 * F * sizeof(T));
      for (int64_t crystal = c0; crystal < c1; ++crystal) {
        const int64_t first = g.crystal_ptr[crystal], n = g.crystal_ptr[crystal + 1] - first;
        const T* pq = raw + (first - begin) * 4 * F;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = (first + i) * F;
          const auto w = splat(layer.train2 ? moments.row_weight[first + i] : T(0));
          for (int c = 0; c < F; c += W) {
            const auto correction = load(b0 + c) + load(b1 + c) * (load(m + at + c) - load(layer.mean2 + c));
            store(dm + i * F + c, load(scale2 + c) * (load(d.h + at + c) - w * correction));
          }
        }
        scale_rows<T>(rows, pq, n, F, scale1, shift1);
        shell_terms<T>(r, g, crystal, w_e_scaled, C, nullptr);
        memset(t, 0, shells_of(g, crystal) * C * sizeof(T));
        T* own_c = own + first * 4 * F;
        T* senders_c = senders + first * 4 * F;
        if (train)
          backward_crystal<T, true>(own_c, senders_c, t, dm, rows, r, g, moments.row_weight, crystal, F);
        else
          backward_crystal<T, false>(own_c, senders_c, t, dm, rows, r, g, nullptr, crystal, F);
        shell_gradient<T>(dw_edges + chunk * int64_t(K) * C, g, crystal, t, C);
        if (d.edge) edge_gradient<T>(d.edge, dm, rows, r, w_e, a1, g, crystal, F);
        // sum dy, and sum dy (z - mean) but for the edge part, which follows from dw_edges
        for (int c = 0; c < C; c += W) {
          V plain = V{}, with_z = V{};
          for (int64_t i = 0; i < n; ++i) {
            const V dp = load(own_c + i * 4 * F + c), dq = load(senders_c + i * 4 * F + c);
            plain += dp;
            with_z += dp * (load(pq + i * 4 * F + c) - load(mean + c)) + dq * load(pq + i * 4 * F + C + c);
          }
          for (int l = 0; l < W; ++l) {
            sum[c + l] += plain[l];
            sum[C + c + l] += with_z[l];
          }
        }
      }
      if (!train) continue;
      // sum w e^T (p_i + q_j), for the correction of the edge weights
      we_rows.reserve((end - begin) * K);
      for (int64_t i = begin; i < end; ++i)
        for (int k = 0; k < K; ++k)
          we_rows[(i - begin) * K + k] = moments.row_weight[i] * moments.by_receiver[i * K + k];
      T* to = e_pq + chunk * int64_t(K) * C;
      gemm_tn<T>(we_rows, K, K, raw, 4 * F, C, to, C, end - begin);
      gemm_tn<T>(moments.by_sender + begin * K, K, K, raw + C, 4 * F, C, to, C, end - begin);
    }
    // 3. bn1's sums, and the edge weights' gradient.
#pragma omp for schedule(static)
    for (int64_t x = 0; x < int64_t(K) * C; ++x) {
      double own_part = 0, z = 0;
      for (int chunk = 0; chunk < n_chunks; ++chunk) own_part += dw_edges[chunk * int64_t(K) * C + x];
      if (train)
        for (int chunk = 0; chunk < n_chunks; ++chunk) z += e_pq[chunk * int64_t(K) * C + x];
      edge_part[x] = own_part;
      z_part[x] = z;
    }
#pragma omp single
    for (int c = 0; c < C; ++c) {
      double beta = 0, gamma = 0;
      for (int chunk = 0; chunk < n_chunks; ++chunk) {
        beta += by_chunk[chunk * 2 * C + c];
        gamma += by_chunk[chunk * 2 * C + C + c];
      }
      for (int k = 0; k < K; ++k) gamma += edge_part[int64_t(k) * C + c] * w_e[int64_t(k) * C + c];
      gamma *= r1[c];
      d.beta1[c] = T(beta);
      d.gamma1[c] = T(gamma);
      d.bias[c] = train ? T(0) : T(a1[c] * beta);
      first_order[c] = train ? beta / edges : 0;
      first_order[C + c] = train ? gamma / edges : 0;
    }
#pragma omp for schedule(static)
    for (int k = 0; k < K; ++k) {
      double* z = z_part + int64_t(k) * C;
      if (train)
        for (int b = 0; b < K; ++b)
          for (int c = 0; c < C; ++c) z[c] += moments.gram[k * K + b] * w_e[int64_t(b) * C + c];
      for (int c = 0; c < C; ++c) {
        double value = edge_part[int64_t(k) * C + c];
        if (train)
          value -= first_order[c] * moments.sum[k] +
                   first_order[C + c] * r1[c] * (z[c] - double(mean[c]) * moments.sum[k]);
        d.weight[int64_t(c) * (C + K) + C + k] = T(a1[c] * value);
      }
    }
    // 4. Per row: bn1's corrections, then back through the node product.
    Buffer<T> block(kRowBlock * 4 * F), k0(C), k1(C);
    for (int c = 0; c < C; ++c) {
      const double unit = c < F ? -kLog2e : kLog2e;
      // a (c1 + c2 x̂) = k0 + k1 y, with y = unit (gamma x̂ + beta): gamma cancels, so it may be zero
      k1[c] = T(r1[c] * first_order[C + c] / unit);
      k0[c] = T(a1[c] * first_order[c] - r1[c] * first_order[C + c] * layer.beta1[c]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t begin = g.crystal_ptr[chunk_begin(g, chunk)], end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
      for (int64_t b = begin; b < end; b += kRowBlock) {
        const int64_t n = end - b < kRowBlock ? end - b : kRowBlock;
        for (int64_t i = b; i < b + n; ++i) {
          const T* mine = own + i * 4 * F;
          const T* theirs = senders + i * 4 * F;
          T* to = block + (i - b) * 4 * F;
          const auto w = splat(train ? moments.row_weight[i] : T(0));
          const auto wd = w * T(degree_of(g, i));
          const auto in = splat(train ? moments.in_degree[i] : T(0));
          for (int c = 0; c < C; c += W) {
            auto dp = load(a1 + c) * load(mine + c);
            auto dq = load(a1 + c) * load(theirs + c);
            if (train) {
              dp -= wd * load(k0 + c) + w * load(k1 + c) * load(mine + C + c);
              dq -= in * load(k0 + c) + load(k1 + c) * load(theirs + C + c);
            }
            store(to + c, dp);
            store(to + C + c, dq);
          }
        }
        gemm_nn<T>(block, 4 * F, back, d.h + b * F, F, n, nullptr, true);
        gemm_tn<T>(h + b * F, F, F, block, 4 * F, 4 * F, dw_nodes + chunk * int64_t(F) * 4 * F, 4 * F, n);
      }
    }
#pragma omp for schedule(static)
    for (int k = 0; k < F; ++k) {
      T* total = dw_nodes + int64_t(k) * 4 * F;
      for (int chunk = 1; chunk < n_chunks; ++chunk)
        for (int c = 0; c < 4 * F; c += W)
          store(total + c, load(total + c) + load(dw_nodes + (chunk * int64_t(F) + k) * 4 * F + c));
      for (int c = 0; c < C; ++c) {
        d.weight[int64_t(c) * (C + K) + k] = total[c];
        d.weight[int64_t(c) * (C + K) + F + k] = total[C + c];
      }
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
