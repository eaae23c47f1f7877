// One gated convolution, forward and backward, in training and with fixed statistics.
//
// The linear map is split: z_ij = p_i + q_j + r_ij with p, q from one product per row and r from a table per shell.
// Forward: rows -> (statistics of z) -> gate and sum -> statistics of m -> output. Backward: one pass over the edges
// emits plain sums; the corrections of both batch norms are applied per row. Nothing of the edges is stored.
//
// Arrays of rows hold, panel by panel (see edges.h), kQuad numbers of each row: (p filter, p core, q filter, q core),
// or sums in the same places. Arrays of rows are per chunk of crystals, so a panel's rows follow each other.
#pragma once
#include <math.h>

#include "edges.h"
#include "gemm.h"

namespace srcgcnn::SRCGCNN_LEVEL {

template <class T>
constexpr int kQuad = 4 * kChannels<T>;

template <class T>
SRCGCNN_INLINE int64_t degree_of(const Edges<T>& g, int64_t i) {
  return g.row_ptr[i + 1] - g.row_ptr[i];
}
template <class T>
SRCGCNN_INLINE int64_t shell_index(const Edges<T>& g, int64_t e, int64_t begin) {
  return g.features ? e - begin : g.shell_of[e];
}

// Where the p column of channel c is among the 4F columns of a row, panel by panel; its q column is kPair further on.
template <class T>
SRCGCNN_INLINE int column_of(int c, int F) {
  const int x = placed<T>(c, F);
  return x / kPair<T> * kQuad<T> + x % kPair<T>;
}

template <class T>
Packed<T> pack_nodes(T* to, const T* weight, int F, int K, const T* scale) {
  for (int c = 0; c < 2 * F; ++c) {
    const T* row = weight + int64_t(c) * (2 * F + K);
    const int x = column_of<T>(c, F);
    const T by = scale ? scale[placed<T>(c, F)] : T(1);
    pack_column<T>(to, F, 4 * F, x, row, by);
    pack_column<T>(to, F, 4 * F, x + kPair<T>, row + F, by);
  }
  return {to, F, 4 * F};
}
// Its transpose: from the 4F columns back to the rows.
template <class T>
Packed<T> pack_nodes_back(T* to, const T* weight, int F, int K) {
  for (int c = 0; c < 2 * F; ++c) {
    const T* row = weight + int64_t(c) * (2 * F + K);
    const int x = column_of<T>(c, F);
    pack_row<T>(to, 4 * F, F, x, row);
    pack_row<T>(to, 4 * F, F, x + kPair<T>, row + F);
  }
  return {to, 4 * F, F};
}
// Both halves of the linear map below each other: from [h_i, h_j] (2F) to the channels of z as they are placed.
template <class T>
Packed<T> pack_ends(T* to, const T* weight, int F, int K) {
  for (int c = 0; c < 2 * F; ++c)
    pack_column<T>(to, 2 * F, 2 * F, placed<T>(c, F), weight + int64_t(c) * (2 * F + K), T(1));
  return {to, 2 * F, 2 * F};
}
// w_e: panels of (K, kPair).
template <class T>
SRCGCNN_INLINE int64_t edge_weight_at(int k, int x, int K) {
  return int64_t(x / kPair<T>) * K * kPair<T> + k * kPair<T> + x % kPair<T>;
}
template <class T>
void pack_edges(T* w_e, const T* weight, int F, int K, const T* scale) {
  for (int c = 0; c < 2 * F; ++c) {
    const int x = placed<T>(c, F);
    for (int k = 0; k < K; ++k)
      w_e[edge_weight_at<T>(k, x, K)] = weight[int64_t(c) * (2 * F + K) + 2 * F + k] * (scale ? scale[x] : T(1));
  }
}

// The units of gate2: filter channels times -log2(e), core channels times log2(e).
SRCGCNN_INLINE double unit_of(int c, int F) { return c < F ? -kLog2e : kLog2e; }

// y = scale z + shift in gate2's units.
template <class T>
void fold_first(T* scale, T* shift, const Layer<T>& layer, int F) {
  for (int c = 0; c < 2 * F; ++c) {
    const double a = layer.gamma1[c] / sqrt(double(layer.var1[c]) + layer.eps1);
    const double bias = layer.bias ? double(layer.bias[c]) : 0.0;
    scale[placed<T>(c, F)] = T(unit_of(c, F) * a);
    shift[placed<T>(c, F)] = T(unit_of(c, F) * (layer.beta1[c] + a * (bias - layer.mean1[c])));
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

// Rows of one crystal and panel -> scaled and, their p half, shifted; or the powers of that, false where an exponent is
// out of bounds.
template <class T, bool kPowers>
bool scale_rows(T* to, const T* pq, int64_t n, const T* scale, const T* shift) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 2 * kVectors;
  V s[NV], b[NV];
  for (int v = 0; v < NV; ++v) {
    s[v] = load(scale + v * W);
    b[v] = load(shift + v * W);
  }
  Bound<T, 2 * NV> bound;
  for (int64_t i = 0; i < n; ++i)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = i * kQuad<T> + v * W;
      const V p = load(pq + at) * s[v] + b[v], q = load(pq + at + kPair<T>) * s[v];
      if constexpr (kPowers) bound.look(p, v), bound.look(q, NV + v);
      store(to + at, kPowers ? MathOf<T>::M::exp2(p) : p);
      store(to + at + kPair<T>, kPowers ? MathOf<T>::M::exp2(q) : q);
    }
  return !kPowers || bound.holds();
}
// r (n, kPair) -> scaled, or the powers of that.
template <class T, bool kPowers>
bool scale_terms(T* to, const T* r, int64_t n, const T* scale) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 2 * kVectors;
  V by[NV];
  for (int v = 0; v < NV; ++v) by[v] = load(scale + v * W);
  Bound<T, NV> bound;
  for (int64_t s = 0; s < n; ++s)
    for (int v = 0; v < NV; ++v) {
      const V x = load(r + (s * NV + v) * W) * by[v];
      if constexpr (kPowers) bound.look(x, v);
      store(to + (s * NV + v) * W, kPowers ? MathOf<T>::M::exp2(x) : x);
    }
  return !kPowers || bound.holds();
}

// Runs a panel on powers where their exponents are in bounds, else on the sums themselves. fill(Flag<powers>) prepares
// the terms and says whether they are in bounds.
template <class T, class Fill, class Run>
SRCGCNN_INLINE void on_terms(bool want_powers, Fill fill, Run run) {
  if constexpr (kHasPowers<T>)
    if (want_powers && fill(Flag<true>{})) return run(Flag<true>{});
  fill(Flag<false>{});
  run(Flag<false>{});
}

// m (n, F) of one crystal and panel; rows (n, kQuad) and r (shells, kPair) in gate2's units, or powers of two.
template <class T, bool kPowers>
void gate_panel(T* m, const T* rows, const T* r, const Edges<T>& g, int64_t crystal, int F) {
  using V = typename Simd<T>::V;
  using M = typename MathOf<T>::M;
  constexpr int W = Simd<T>::width, NV = kVectors, half = NV * W;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i) {
    const T* p = rows + (i - first) * kQuad<T>;
    V pf[NV], pc[NV], sum[NV];
    for (int v = 0; v < NV; ++v) {
      pf[v] = load(p + v * W);
      pc[v] = load(p + half + v * W);
      sum[v] = V{};
    }
    for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
      const T* q = rows + (g.sender[e] - first) * kQuad<T> + kPair<T>;
      const T* s = r + shell_index(g, e, begin) * kPair<T>;
      for (int v = 0; v < NV; ++v) {
        const V qf = load(q + v * W), rf = load(s + v * W), qc = load(q + half + v * W), rc = load(s + half + v * W);
        if constexpr (kPowers)
          sum[v] += gate_of_powers<M>(pf[v] * qf * rf, pc[v] * qc * rc);
        else
          sum[v] += gate2<M>(pf[v] + (qf + rf), pc[v] + (qc + rc));
      }
    }
    for (int v = 0; v < NV; ++v) store(m + (i - first) * F + v * W, sum[v] * M::ln2);
  }
}

// out = softplus(h + scale m + shift) for n rows.
template <class T>
void residual_softplus(T* out, const T* h, const T* m, int64_t n, int F, const T* scale, const T* shift) {
  using M = typename MathOf<T>::M;
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < F; c += W) {
      const auto x = load(h + i * F + c) + (load(m + i * F + c) * load(scale + c) + load(shift + c));
      store(out + i * F + c, softplus<M>(x));
    }
}

constexpr int kRowBlock = 48;  // rows whose products stay in the first-level cache

// Products of n rows of features; pq holds panels of (n, kQuad). Of one block of rows, from i on:
template <class T>
void node_block(T* pq, const T* h, Packed<T> nodes, int64_t i, int64_t n, int F) {
  gemm_nn<T>(h + i * F, F, nodes, pq + i * kQuad<T>, kQuad<T>, n - i < kRowBlock ? n - i : kRowBlock, nullptr, false,
             kQuad<T>, n * kQuad<T>);
}
template <class T>
void node_product(T* pq, const T* h, Packed<T> nodes, int64_t n, int F) {
  for (int64_t i = 0; i < n; i += kRowBlock) node_block(pq, h, nodes, i, n, F);
}
// Products of the rows [begin, end) of the features; `table` holds those of a table's rows.
template <class T>
void row_products(T* pq, const Features<T>& h, const T* table, Packed<T> nodes, int64_t begin, int64_t end, int F) {
  if (!h.species) return node_product(pq, h.data + begin * F, nodes, end - begin, F);
  for (int c = 0; c < F; c += kChannels<T>, table += h.n_table * kQuad<T>)
    for (int64_t i = begin; i < end; ++i, pq += kQuad<T>)
      memcpy(pq, table + h.species[i] * kQuad<T>, kQuad<T> * sizeof(T));
}
// The features of the rows [begin, end), copied to `to` if they come from a table.
template <class T>
const T* features_of(T* to, const Features<T>& h, int64_t begin, int64_t end, int F) {
  if (!h.species) return h.data + begin * F;
  for (int64_t i = begin; i < end; ++i)
    memcpy(to + (i - begin) * F, h.data + int64_t(h.species[i]) * F, F * sizeof(T));
  return to;
}

// sum w_i (z_ij - centre)^2 of one crystal and panel, added to sum (kPair); r already holds -centre.
template <class T>
void squares_of_panel(double* sum, const T* pq, const T* r, const T* row_weight, const Edges<T>& g, int64_t crystal) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 2 * kVectors;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  V total[NV] = {};
  for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i) {
    const T* p = pq + (i - first) * kQuad<T>;
    V square[NV] = {};
    for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
      const T* q = pq + (g.sender[e] - first) * kQuad<T> + kPair<T>;
      const T* s = r + shell_index(g, e, begin) * kPair<T>;
      for (int v = 0; v < NV; ++v) {
        const V z = load(p + v * W) + (load(q + v * W) + load(s + v * W));
        square[v] += z * z;
      }
    }
    const V w = splat(row_weight[i]);
    for (int v = 0; v < NV; ++v) total[v] += w * square[v];
  }
  for (int v = 0; v < NV; ++v)
    for (int l = 0; l < W; ++l) sum[v * W + l] += total[v][l];
}

// What one chunk knows of the weighted values that a batch norm sees.
template <class T>
struct ChunkStatistics {
  double count;
  double* mean;     // (2F)
  double* squares;  // (2F) about that mean
};

// Joins per-chunk means and sums of squares, in order (Chan, Golub & LeVeque's pairwise formula), then those of the
// processes that share the norm; returns the count of all, 0 if they did not meet. place(c) is where channel c is.
template <class T, class Place>
double join_statistics(const ChunkStatistics<T>* chunks, int n_chunks, int width, T* mean, T* var, Place place,
                       const Joint& joint, int norm) {
  double* message = joint.message[norm];
  Buffer<double> means(width), squares(width);
  for (int x = 0; x < width; ++x) means[x] = squares[x] = 0;
  double count = 0;
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    const double k = chunks[chunk].count;
    if (k == 0) continue;
    const double share = k / (count + k);
    for (int x = 0; x < width; ++x) {
      const double delta = chunks[chunk].mean[x] - means[x];
      squares[x] += chunks[chunk].squares[x] + delta * delta * count * share;
      means[x] += delta * share;
    }
    count += k;
  }
  if (message) {
    for (int c = 0; c < width; ++c) {
      message[1 + c] = means[place(c)];
      message[1 + width + c] = squares[place(c)];
    }
    message[0] = count;
    if (!joint.exchange(joint.context, norm)) {
      for (int c = 0; c < width; ++c) mean[c] = var[c] = 0;
      return 0;
    }
    count = message[0];
  }
  for (int c = 0; c < width; ++c) {
    mean[c] = T(message ? message[1 + c] : means[place(c)]);
    var[c] = T(message ? message[1 + width + c] : count > 0 ? squares[place(c)] / count : 0);
  }
  return count;
}

// Running statistics towards to * by + bias of a batch of so many, as torch rounds it: the product before the difference.
template <class T>
void move_running(T* running, const T* to, double count, double by, const T* bias, T momentum, int width) {
  if (!running || count == 0) return;
  Buffer<T> target(width);
  for (int c = 0; c < width; ++c) target[c] = to[c] * T(by) + (bias ? bias[c] : T(0));
  for (int c = 0; c < width; ++c) {
    const T x = target[c], step = x - running[c];
    running[c] = momentum < T(0.5) ? running[c] + momentum * step : x - step * (1 - momentum);
  }
}

// sum dy and sum dy x̂ (width) of this process -> of all that share the norm; returns the count of all, or `count` if the
// norm is this process's own.
template <class T>
double join_gradients(double* beta, double* gamma, const T* scale, const T* var, T eps, int width, double count,
                      const Joint& joint, int norm) {
  double* message = joint.message[norm];
  if (!message) return count;
  for (int c = 0; c < width; ++c) {
    const double rstd = 1 / sqrt(double(var[c]) + eps), d_mean = -scale[c] * rstd, d_var = 0.5 * d_mean * rstd;
    message[1 + c] = d_mean * beta[c];
    message[1 + width + c] = d_var * gamma[c];
  }
  joint.exchange(joint.context, norm);
  for (int c = 0; c < width; ++c) {
    const double rstd = 1 / sqrt(double(var[c]) + eps), d_mean = -scale[c] * rstd, d_var = 0.5 * d_mean * rstd;
    beta[c] = d_mean != 0 ? message[1 + c] / d_mean : 0;  // where nothing passes the norm, nothing needs them
    gamma[c] = d_var != 0 ? message[1 + width + c] / d_var : 0;
  }
  return message[0];
}

// Mean of z over the edges of the rows [begin, end), exact: it follows from p, q and the edge sums of the rows.
template <class T>
double mean_of_rows(double* mean, const T* pq, const T* w_e, const Edges<T>& g, const Moments<T>& moments,
                    int64_t begin, int64_t end, int F) {
  const int K = g.n_features, C = 2 * F;
  Buffer<double> e_sum;
  e_sum.zero(K);
  double count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double w = moments.row_weight[i];
    for (int k = 0; k < K; ++k) e_sum[k] += w * moments.by_receiver[i * K + k];
    count += w * degree_of(g, i);
  }
  for (int x = 0; x < C; x += kPair<T>, mean += kPair<T>, w_e += int64_t(K) * kPair<T>) {
    double sum[kPair<T>] = {};
    for (int64_t i = begin; i < end; ++i, pq += kQuad<T>) {
      const double wd = double(moments.row_weight[i]) * degree_of(g, i), in = moments.in_degree[i];
      for (int c = 0; c < kPair<T>; ++c) sum[c] += wd * pq[c] + in * pq[kPair<T> + c];
    }
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < kPair<T>; ++c) sum[c] += e_sum[k] * w_e[k * kPair<T> + c];
    for (int c = 0; c < kPair<T>; ++c) mean[c] = count > 0 ? sum[c] / count : 0;
  }
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
void conv(T* out, T* m, T* products, const Features<T>& h, const Layer<T>& layer_in, const Running<T>& running,
          const Edges<T>& g, const Moments<T>& moments, const Joint& joint, int F, int threads) {
  const int K = g.n_features, C = 2 * F, n_chunks = chunks_of(g), n_panels = F / kChannels<T>;
  const int64_t shells = most_shells(g), largest = most_rows(g), n_table = h.species ? h.n_table : 0;
  Layer<T> layer = layer_in;
  if (layer.train1) layer.bias = nullptr;  // batch statistics take any bias away; mean1 leaves without it
  Buffer<T> nodes_at(int64_t(F) * 4 * F), w_e(int64_t(K) * C), w_e_scaled(int64_t(K) * C), pq_scratch(products ? 0 : g.n_rows * 4 * F);
  Buffer<T> scale1(C), shift1(C), scale2(F), shift2(F), table(n_table * 4 * F);
  T* pq_at = products ? products : static_cast<T*>(pq_scratch);
  Buffer<double> mean_at(n_chunks * C), squares_at(n_chunks * C);
  ChunkStatistics<T> chunks[kMostChunks];
  for (int k = 0; k < n_chunks; ++k) chunks[k] = {0, mean_at + k * C, squares_at + k * C};
  const auto nodes = pack_nodes<T>(nodes_at, layer.weight, F, K, nullptr);
  pack_edges<T>(w_e, layer.weight, F, K, nullptr);
  if (n_table) node_product<T>(table, h.data, nodes, n_table, F);

#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Buffer<T> r(shells * kPair<T>), rows(largest * kQuad<T>), centre(C), block(kRowBlock * F);
    Windows<T> windows;
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      const int64_t begin = g.crystal_ptr[c0], end = g.crystal_ptr[c1];
      T* pq = pq_at + begin * 4 * F;
      row_products<T>(pq, h, table, nodes, begin, end, F);
      if (!layer.train1) continue;
      auto& statistics = chunks[chunk];
      statistics.count = mean_of_rows<T>(statistics.mean, pq, w_e, g, moments, begin, end, F);
      for (int c = 0; c < C; ++c) {
        statistics.squares[c] = 0;
        centre[c] = T(-statistics.mean[c]);
      }
      for (int64_t c = c0; c < c1; ++c) {
        windows.of_crystal(g, c);
        for (int x = 0; x < n_panels; ++x) {
          shell_terms<T>(r, windows, w_e + int64_t(x) * K * kPair<T>, centre + x * kPair<T>);
          squares_of_panel<T>(statistics.squares + x * kPair<T>,
                              pq + (x * (end - begin) + g.crystal_ptr[c] - begin) * kQuad<T>, r, moments.row_weight, g,
                              c);
        }
      }
    }
#pragma omp master
    {
      if (layer.train1) {
        const double count = join_statistics(chunks, n_chunks, C, layer.mean1, layer.var1,
                                             [&](int c) { return placed<T>(c, F); }, joint, 0);
        move_running<T>(running.mean1, layer.mean1, count, 1, layer_in.bias, running.momentum1, C);
        move_running<T>(running.var1, layer.var1, count, count / (count - 1), nullptr, running.momentum1, C);
      }
      fold_first<T>(scale1, shift1, layer, F);
      pack_edges<T>(w_e_scaled, layer.weight, F, K, scale1);
    }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      const int64_t begin = g.crystal_ptr[c0], end = g.crystal_ptr[c1];
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t first = g.crystal_ptr[c], n = g.crystal_ptr[c + 1] - first;
        windows.of_crystal(g, c);
        for (int x = 0; x < n_panels; ++x) {
          const T* pq = pq_at + begin * 4 * F + (x * (end - begin) + first - begin) * kQuad<T>;
          on_terms<T>(
              true,
              [&](auto powers) {
                constexpr bool P = decltype(powers)::value;
                return scale_rows<T, P>(rows, pq, n, scale1 + x * kPair<T>, shift1 + x * kPair<T>) &&
                       shell_terms<T, P>(r, windows, w_e_scaled + int64_t(x) * K * kPair<T>, nullptr);
              },
              [&](auto powers) {
                gate_panel<T, decltype(powers)::value>(m + g.crystal_ptr[c] * F + x * kChannels<T>, rows, r, g, c, F);
              });
        }
      }
      if (layer.train2)
        chunks[chunk].count = statistics_of_rows(chunks[chunk].mean, chunks[chunk].squares, m, moments.row_weight,
                                                 begin, end, F);
    }
#pragma omp master
    {
      if (layer.train2) {
        const double count =
            join_statistics(chunks, n_chunks, F, layer.mean2, layer.var2, [](int c) { return c; }, joint, 1);
        move_running<T>(running.mean2, layer.mean2, count, 1, nullptr, running.momentum2, F);
        move_running<T>(running.var2, layer.var2, count, count / (count - 1), nullptr, running.momentum2, F);
      }
      fold_second<T>(scale2, shift2, layer, F);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.n_rows; i += kRowBlock) {
      const int64_t end = g.n_rows - i < kRowBlock ? g.n_rows : i + kRowBlock;
      residual_softplus<T>(out + i * F, features_of<T>(block, h, i, end, F), m + i * F, end - i, F, scale2, shift2);
    }
  }
}

// Sums of z about its mean of one crystal and panel: sum_j z of the receivers and sum_i w_i z of the senders, both in the
// second half of (n, kQuad); r holds minus the mean.
template <class T>
void sums_of_panel(T* own, T* senders, const T* pq, const T* r, const Edges<T>& g, const Incoming& incoming,
                   const T* row_weight, int64_t crystal) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 2 * kVectors;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first], n = g.crystal_ptr[crystal + 1] - first;
  for (int64_t i = 0; i < n; ++i) {
    const T* mine = pq + i * kQuad<T>;
    V sum[NV] = {};
    for (int64_t e = g.row_ptr[first + i]; e < g.row_ptr[first + i + 1]; ++e) {
      const T* q = pq + (g.sender[e] - first) * kQuad<T> + kPair<T>;
      const T* s = r + shell_index(g, e, begin) * kPair<T>;
      for (int v = 0; v < NV; ++v) sum[v] += load(mine + v * W) + (load(q + v * W) + load(s + v * W));
    }
    for (int v = 0; v < NV; ++v) store(own + i * kQuad<T> + kPair<T> + v * W, sum[v]);
  }
  for (int64_t j = 0; j < n; ++j) {
    const T* mine = pq + j * kQuad<T> + kPair<T>;
    V sum[NV] = {};
    for (int32_t k = incoming.by_sender.start[j]; k < incoming.by_sender.start[j + 1]; ++k) {
      const int32_t e = incoming.by_sender.edge[k], i = incoming.receiver[e];
      const T* p = pq + i * kQuad<T>;
      const T* s = r + shell_index(g, begin + e, begin) * kPair<T>;
      const V w = splat(row_weight[first + i]);
      for (int v = 0; v < NV; ++v) sum[v] += w * (load(p + v * W) + (load(mine + v * W) + load(s + v * W)));
    }
    for (int v = 0; v < NV; ++v) store(senders + j * kQuad<T> + kPair<T> + v * W, sum[v]);
  }
}

// to (n, kPair numbers every `stride`) = the sums of rows of dy (edges, kPair) by list.
template <class T>
void gather_panel(T* to, int64_t stride, const T* dy, const Incoming::List& list, int64_t n) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = 2 * kVectors;
  for (int64_t j = 0; j < n; ++j) {
    V sum[NV] = {};
    for (int32_t k = list.start[j]; k < list.start[j + 1]; ++k)
      for (int v = 0; v < NV; ++v) sum[v] += load(dy + (int64_t(list.edge[k]) * NV + v) * W);
    for (int v = 0; v < NV; ++v) store(to + j * stride + v * W, sum[v]);
  }
}

// The edge pass of the backward for one crystal and panel: dy of the edges (edges, kPair), and its sums by receiver (own,
// in the first half of (n, kQuad)), without batch-norm corrections.
template <class T, bool kPowers>
void backward_panel(T* own, T* dy, const T* dm, const T* rows, const T* r, const Edges<T>& g, int64_t crystal, int F) {
  using V = typename Simd<T>::V;
  using M = typename MathOf<T>::M;
  constexpr int W = Simd<T>::width, NV = kVectors, half = NV * W;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i) {
    const T* p = rows + (i - first) * kQuad<T>;
    V d[2 * NV] = {}, up[NV], mine[2 * NV];
    for (int v = 0; v < 2 * NV; ++v) mine[v] = load(p + v * W);
    for (int v = 0; v < NV; ++v) up[v] = load(dm + (i - first) * F + v * W);
    for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e, dy += kPair<T>) {
      const T* q = rows + (g.sender[e] - first) * kQuad<T> + kPair<T>;
      const T* s = r + shell_index(g, e, begin) * kPair<T>;
      for (int v = 0; v < NV; ++v) {
        const V qf = load(q + v * W), qc = load(q + half + v * W), rf = load(s + v * W), rc = load(s + half + v * W);
        GateGradient<V> gradient;
        if constexpr (kPowers)
          gradient = gate_gradient_of_powers<M>(mine[v] * qf * rf, mine[NV + v] * qc * rc);
        else
          gradient = gate_gradient2<M>(mine[v] + (qf + rf), mine[NV + v] + (qc + rc));
        const V df = up[v] * gradient.d_filter, dc = up[v] * gradient.d_core;
        d[v] += df;
        d[NV + v] += dc;
        store(dy + v * W, df);
        store(dy + half + v * W, dc);
      }
    }
    for (int v = 0; v < 2 * NV; ++v) store(own + (i - first) * kQuad<T> + v * W, d[v]);
  }
}

// Gradients of the edges of one crystal (fixed statistics), added panel by panel: per distance, or per given feature.
// rows and r in gate2's units; w_e (K, kPair), a (kPair) the scale of z.
template <class T>
void edge_gradient(T* d_edge, const T* dm, const T* rows, const T* r, const T* w_e, const T* a, const Edges<T>& g,
                   const Windows<T>& windows, int64_t crystal, int F) {
  using M = typename MathOf<T>::M;
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width, NV = kVectors, half = NV * W;
  const int64_t first = g.crystal_ptr[crystal], begin = g.row_ptr[first];
  for (int64_t i = first; i < g.crystal_ptr[crystal + 1]; ++i)
    for (int64_t e = g.row_ptr[i]; e < g.row_ptr[i + 1]; ++e) {
      const int64_t k = shell_index(g, e, begin);
      const T* p = rows + (i - first) * kQuad<T>;
      const T* q = rows + (g.sender[e] - first) * kQuad<T> + kPair<T>;
      const T* s = r + k * kPair<T>;
      V dy[2 * NV];
      for (int v = 0; v < NV; ++v) {
        const V f = load(p + v * W) + (load(q + v * W) + load(s + v * W));
        const V x = load(p + half + v * W) + (load(q + half + v * W) + load(s + half + v * W));
        const auto gradient = gate_gradient2<M>(f, x);
        const V up = load(dm + (i - first) * F + v * W);
        dy[v] = up * gradient.d_filter * load(a + v * W);
        dy[NV + v] = up * gradient.d_core * load(a + half + v * W);
      }
      for (int b = 0; b < windows.count; ++b) {
        V dot = V{};
        for (int v = 0; v < 2 * NV; ++v) dot += dy[v] * load(w_e + (windows.first(k) + b) * kPair<T> + v * W);
        T slope = 0;
        for (int l = 0; l < W; ++l) slope += dot[l];
        if (g.features) {
          d_edge[e * g.n_features + b] += slope;
        } else {
          const T u = (g.distance[e] - g.dmin) / g.step - T(windows.first(k) + b);
          d_edge[e] += slope * windows.values(k)[b] * T(-2) * u / g.step;
        }
      }
    }
}

template <class T>
void conv_backward(const Gradients<T>& d, const T* grad_out, const Features<T>& h, const T* m,
                   const T* products, const Layer<T>& layer_in, const Edges<T>& g, const Moments<T>& moments,
                   const Joint& joint, int F, int threads) {
  const int K = g.n_features, C = 2 * F, n_chunks = chunks_of(g), n_panels = F / kChannels<T>;
  const int64_t N = g.n_rows, shells = most_shells(g), largest = most_rows(g), n_table = h.species ? h.n_table : 0;
  const int64_t nodes_size = int64_t(F) * 4 * F, edges_size = int64_t(K) * C;
  Layer<T> layer = layer_in;
  if (layer.train1) layer.bias = nullptr;
  const bool train = layer.train1;
  Buffer<T> nodes_at(products ? 0 : nodes_size), back_at(nodes_size), ends_at(train ? nodes_size : 0), w_e(edges_size);
  Buffer<T> scale1(C), shift1(C), scale2(F), shift2(F), a1(C), centre(C), r1(C), b0(F), b1(F), k0(C), k1(C);
  Buffer<T> own_at(N * 4 * F), senders_at(N * 4 * F), da_at(h.species ? N * F : 0);
  Buffer<double> edge_part(edges_size), ez(edges_size), by_chunk(n_chunks * 2 * C), totals(2 * F), totals1(2 * C), sums(n_chunks * 2 * F);
  // Per chunk: dw of the node product (or, with a table, what its rows receive: 4F columns, and F of da), dw of the edge
  // weights, and (K, 2F) sum w e^T [h_i, h_j], for the edge weights' correction.
  Buffer<T> dw_nodes(h.species ? 0 : n_chunks * nodes_size), by_species(n_chunks * n_table * 5 * F);
  Buffer<T> dw_edges(n_chunks * edges_size), e_h(train ? n_chunks * edges_size : 0), e_h_total(edges_size);
  Buffer<T> e_z(edges_size), table(n_table * 4 * F);
  T* da = h.species ? static_cast<T*>(da_at) : d.h;
  Packed<T> nodes{nullptr, F, 4 * F}, ends{nullptr, C, C};
  if (!products) nodes = pack_nodes<T>(nodes_at, layer.weight, F, K, nullptr);
  if (train) ends = pack_ends<T>(ends_at, layer.weight, F, K);
  const auto back = pack_nodes_back<T>(back_at, layer.weight, F, K);
  pack_edges<T>(w_e, layer.weight, F, K, nullptr);
  if (n_table && !products) node_product<T>(table, h.data, nodes, n_table, F);
  fold_first<T>(scale1, shift1, layer, F);
  fold_second<T>(scale2, shift2, layer, F);
  for (int c = 0; c < C; ++c) {
    const int x = placed<T>(c, F);
    r1[x] = T(1 / sqrt(double(layer.var1[c]) + layer.eps1));
    a1[x] = layer.gamma1[c] * r1[x];
    centre[x] = (layer.bias ? layer.bias[c] : T(0)) - layer.mean1[c];
    shift1[x] = T(unit_of(c, F) * layer.beta1[c]);  // of z about its mean
  }
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
    // 1. Through the output's softplus: da, and the sums that bn2 needs.
    Buffer<T> block(kRowBlock * 4 * F);
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t begin = g.crystal_ptr[chunk_begin(g, chunk)], end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
      double* sum = sums + chunk * 2 * F;
      memset(sum, 0, 2 * F * sizeof(double));
      for (int64_t b = begin; b < end; b += 16) {  // few rows at a time: their sums are exact enough in T
        const int64_t stop = b + 16 < end ? b + 16 : end;
        const T* mine = features_of<T>(block, h, b, stop, F);
        for (int c = 0; c < F; c += W) {
          V plain = V{}, with_m = V{};
          for (int64_t i = b; i < stop; ++i) {
            const V message = load(m + i * F + c);
            const V x = load(mine + (i - b) * F + c) + (message * load(scale2 + c) + load(shift2 + c));
            const V slope = load(grad_out + i * F + c) * softplus_slope2<M>(x * T(kLog2e));
            store(da + i * F + c, slope);
            plain += slope;
            with_m += slope * (message - load(layer.mean2 + c));
          }
          for (int l = 0; l < W; ++l) {
            sum[c + l] += plain[l];
            sum[F + c + l] += with_m[l];
          }
        }
      }
    }
#pragma omp master
    {
      for (int c = 0; c < 2 * F; ++c) {
        totals[c] = 0;
        for (int chunk = 0; chunk < n_chunks; ++chunk) totals[c] += sums[chunk * 2 * F + c];
      }
      for (int c = 0; c < F; ++c) {
        totals[F + c] /= sqrt(double(layer.var2[c]) + layer.eps2);
        d.beta2[c] = T(totals[c]);
        d.gamma2[c] = T(totals[F + c]);
      }
      if (layer.train2)
        atoms = join_gradients<T>(totals, totals + F, layer.gamma2, layer.var2, layer.eps2, F, atoms, joint, 1);
      for (int c = 0; c < F; ++c) {
        b0[c] = layer.train2 ? T(totals[c] / atoms) : T(0);
        b1[c] = layer.train2 ? T(totals[F + c] / atoms / sqrt(double(layer.var2[c]) + layer.eps2)) : T(0);
      }
    }
#pragma omp barrier
    // 2. The edge pass, crystal by crystal, panel by panel.
    Buffer<T> r(shells * kPair<T>), r_scaled(shells * kPair<T>), t(shells * kPair<T>), rows(largest * kQuad<T>);
    Buffer<T> dm(largest * F), dy_at, raw, we_rows, h_rows;
    Windows<T> windows;
    Incoming incoming;
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t c0 = chunk_begin(g, chunk), c1 = chunk_begin(g, chunk + 1);
      const int64_t begin = g.crystal_ptr[c0], end = g.crystal_ptr[c1];
      double* sum = by_chunk + chunk * 2 * C;
      memset(sum, 0, 2 * C * sizeof(double));
      memset(dw_edges + chunk * edges_size, 0, edges_size * sizeof(T));
      const T* pq_at = products + begin * 4 * F;
      if (!products) {
        raw.reserve((end - begin) * 4 * F);
        row_products<T>(raw, h, table, nodes, begin, end, F);
        pq_at = raw;
      }
      for (int64_t crystal = c0; crystal < c1; ++crystal) {
        const int64_t first = g.crystal_ptr[crystal], n = g.crystal_ptr[crystal + 1] - first;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = (first + i) * F;
          const auto w = splat(layer.train2 ? moments.row_weight[first + i] : T(0));
          for (int c = 0; c < F; c += W) {
            const auto correction = load(b0 + c) + load(b1 + c) * (load(m + at + c) - load(layer.mean2 + c));
            store(dm + i * F + c, load(scale2 + c) * (load(da + at + c) - w * correction));
          }
        }
        if (d.edge) {
          const int64_t per_edge = g.features ? K : 1, from = g.row_ptr[first], to = g.row_ptr[first + n];
          memset(d.edge + from * per_edge, 0, (to - from) * per_edge * sizeof(T));
        }
        windows.of_crystal(g, crystal);
        incoming.of_crystal(g, crystal, windows.n);
        dy_at.reserve((g.row_ptr[first + n] - g.row_ptr[first]) * kPair<T>);
        T* dy = dy_at;
        for (int x = 0; x < n_panels; ++x) {
          const int at = x * kPair<T>;
          const int64_t panel = (x * (end - begin) + first - begin) * kQuad<T>;
          const T* pq = pq_at + panel;
          const T* w_panel = w_e + int64_t(at) * K;
          const T* dm_panel = dm + x * kChannels<T>;
          T* own = own_at + begin * 4 * F + panel;
          T* senders = senders_at + begin * 4 * F + panel;
          shell_terms<T>(r, windows, w_panel, centre + at);
          if (train) sums_of_panel<T>(own, senders, pq, r, g, incoming, moments.row_weight, crystal);
          on_terms<T>(
              !d.edge,
              [&](auto powers) {
                constexpr bool P = decltype(powers)::value;
                return scale_rows<T, P>(rows, pq, n, scale1 + at, shift1 + at) &&
                       scale_terms<T, P>(r_scaled, r, windows.n, scale1 + at);
              },
              [&](auto powers) {
                backward_panel<T, decltype(powers)::value>(own, dy, dm_panel, rows, r_scaled, g, crystal, F);
              });
          gather_panel<T>(senders, kQuad<T>, dy, incoming.by_sender, n);
          if (!g.features) gather_panel<T>(t, kPair<T>, dy, incoming.by_shell, windows.n);
          shell_gradient<T>(dw_edges + chunk * edges_size + int64_t(at) * K, windows, g.features ? dy : t);
          if (d.edge) edge_gradient<T>(d.edge, dm_panel, rows, r_scaled, w_panel, a1 + at, g, windows, crystal, F);
          // sum dy, and sum dy (z - mean) but for the edge part, which follows from dw_edges
          for (int c = 0; c < kPair<T>; c += W) {
            V plain = V{}, with_z = V{};
            for (int64_t i = 0; i < n; ++i) {
              const V dp = load(own + i * kQuad<T> + c), dq = load(senders + i * kQuad<T> + c);
              plain += dp;
              with_z += dp * (load(pq + i * kQuad<T> + c) + load(centre + at + c)) +
                        dq * load(pq + i * kQuad<T> + kPair<T> + c);
            }
            for (int l = 0; l < W; ++l) {
              sum[at + c + l] += plain[l];
              sum[C + at + c + l] += with_z[l];
            }
          }
        }
      }
      if (!train) continue;
      we_rows.reserve((end - begin) * K);
      h_rows.reserve(h.species ? (end - begin) * F : 0);
      for (int64_t i = begin; i < end; ++i)
        for (int k = 0; k < K; ++k)
          we_rows[(i - begin) * K + k] = moments.row_weight[i] * moments.by_receiver[i * K + k];
      const T* mine = features_of<T>(h_rows, h, begin, end, F);
      T* to = e_h + chunk * edges_size;
      memset(to, 0, edges_size * sizeof(T));
      gemm_tn<T>(we_rows, K, K, mine, F, F, to, C, end - begin);
      gemm_tn<T>(moments.by_sender + begin * K, K, K, mine, F, F, to + F, C, end - begin);
    }
    // 3. bn1's sums, and the edge weights' gradient.
#pragma omp for schedule(static)
    for (int64_t x = 0; x < edges_size; x += kSumBlock)
      sum_of_chunks<double, T>(edge_part, dw_edges, edges_size, n_chunks, x);
    if (train) {
#pragma omp for schedule(static)
      for (int64_t x = 0; x < edges_size; x += kSumBlock)
        sum_of_chunks<T, T>(e_h_total, e_h, edges_size, n_chunks, x);
#pragma omp for schedule(static)
      for (int k = 0; k < K; k += kTile)
        gemm_nn<T>(e_h_total + int64_t(k) * C, C, ends, e_z + int64_t(k) * C, C, K - k < kTile ? K - k : kTile, nullptr,
                   false);
    }
    // ez: sum w e_k (z - mean)
#pragma omp for schedule(static)
    for (int64_t row = 0; row < (train ? int64_t(n_panels) * K : 0); ++row) {
      const int64_t x = row / K, k = row % K;
      double* z = ez + row * kPair<T>;
      const T* plain = e_z + k * C + x * kPair<T>;
      for (int c = 0; c < kPair<T>; ++c) z[c] = double(plain[c]) + double(centre[x * kPair<T> + c]) * moments.sum[k];
      for (int64_t b = 0; b < K; ++b) {
        const double overlap = moments.gram[k * K + b];
        if (overlap == 0) continue;  // Gaussians out of each other's reach
        for (int c = 0; c < kPair<T>; ++c) z[c] += overlap * w_e[(x * K + b) * kPair<T> + c];
      }
    }
#pragma omp for schedule(static)
    for (int c = 0; c < C; ++c) {
      const int x = placed<T>(c, F);
      double beta = 0, gamma = 0;
      for (int chunk = 0; chunk < n_chunks; ++chunk) {
        beta += by_chunk[chunk * 2 * C + x];
        gamma += by_chunk[chunk * 2 * C + C + x];
      }
      for (int k = 0; k < K; ++k) gamma += edge_part[edge_weight_at<T>(k, x, K)] * w_e[edge_weight_at<T>(k, x, K)];
      gamma *= r1[x];
      totals1[c] = beta;
      totals1[C + c] = gamma;
      d.beta1[c] = T(beta);
      d.gamma1[c] = T(gamma);
    }
#pragma omp master
    if (train) edges = join_gradients<T>(totals1, totals1 + C, layer.gamma1, layer.var1, layer.eps1, C, edges, joint, 0);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int c = 0; c < C; ++c) {
      const int x = placed<T>(c, F);
      const double beta = totals1[c], gamma = totals1[C + c];
      d.bias[c] = train ? T(0) : T(a1[x] * beta);
      // a (c1 + c2 x̂) = k0 + k1 (z - mean)
      const double c1 = train ? beta / edges : 0, c2 = train ? gamma / edges * r1[x] : 0;
      k0[x] = T(a1[x] * c1);
      k1[x] = T(a1[x] * c2);
      for (int k = 0; k < K; ++k) {
        double value = edge_part[edge_weight_at<T>(k, x, K)];
        if (train) value -= c1 * moments.sum[k] + c2 * ez[edge_weight_at<T>(k, x, K)];
        d.weight[int64_t(c) * (C + K) + C + k] = T(a1[x] * value);
      }
    }
    // 4. Per row: bn1's corrections, then back through the node product.
#pragma omp for schedule(dynamic, 1)
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int64_t begin = g.crystal_ptr[chunk_begin(g, chunk)], end = g.crystal_ptr[chunk_begin(g, chunk + 1)];
      T* species_sums = by_species + chunk * n_table * 5 * F;
      if (h.species) memset(species_sums, 0, n_table * 5 * F * sizeof(T));
      else memset(dw_nodes + chunk * nodes_size, 0, nodes_size * sizeof(T));
      for (int64_t b = begin; b < end; b += kRowBlock) {
        const int64_t n = end - b < kRowBlock ? end - b : kRowBlock;
        for (int x = 0; x < n_panels; ++x)
          for (int64_t i = b; i < b + n; ++i) {
            const int64_t panel = begin * 4 * F + (x * (end - begin) + i - begin) * kQuad<T>;
            const T* mine = own_at + panel;
            const T* theirs = senders_at + panel;
            T* to = block + (i - b) * 4 * F + x * kQuad<T>;
            const auto w = splat(train ? moments.row_weight[i] : T(0));
            const auto wd = w * T(degree_of(g, i));
            const auto in = splat(train ? moments.in_degree[i] : T(0));
            for (int c = 0; c < kPair<T>; c += W) {
              const int at = x * kPair<T> + c;
              auto dp = load(a1 + at) * load(mine + c);
              auto dq = load(a1 + at) * load(theirs + c);
              if (train) {
                dp -= wd * load(k0 + at) + w * load(k1 + at) * load(mine + kPair<T> + c);
                dq -= in * load(k0 + at) + load(k1 + at) * load(theirs + kPair<T> + c);
              }
              store(to + c, dp);
              store(to + kPair<T> + c, dq);
            }
          }
        if (h.species) {
          for (int64_t i = b; i < b + n; ++i) {
            T* to = species_sums + int64_t(h.species[i]) * 5 * F;
            for (int c = 0; c < 4 * F; c += W) store(to + c, load(to + c) + load(block + (i - b) * 4 * F + c));
            for (int c = 0; c < F; c += W) store(to + 4 * F + c, load(to + 4 * F + c) + load(da + i * F + c));
          }
        } else {
          gemm_nn<T>(block, 4 * F, back, d.h + b * F, F, n, nullptr, true);
          gemm_tn<T>(h.data + b * F, F, F, block, 4 * F, 4 * F, dw_nodes + chunk * nodes_size, 4 * F, n);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_table; i += kTile) {
      const int64_t n = n_table - i < kTile ? n_table - i : kTile;
      T* total = by_species + i * 5 * F;
      for (int chunk = 1; chunk < n_chunks; ++chunk)
        for (int64_t c = 0; c < n * 5 * F; c += W)
          store(total + c, load(total + c) + load(total + chunk * n_table * 5 * F + c));
      for (int64_t x = 0; x < n; ++x) memcpy(d.h + (i + x) * F, total + x * 5 * F + 4 * F, F * sizeof(T));
      gemm_nn<T>(total, 5 * F, back, d.h + i * F, F, n, nullptr, true);
    }
#pragma omp for schedule(static)
    for (int k = 0; k < F; k += kTile) {
      const int n = F - k < kTile ? F - k : kTile;
      if (h.species) {
        memset(block, 0, kTile * 4 * F * sizeof(T));
        gemm_tn<T>(h.data + k, F, n, by_species, 5 * F, 4 * F, block, 4 * F, n_table);
      }
      T* total = h.species ? block + 0 : dw_nodes + int64_t(k) * 4 * F;
      for (int chunk = 1; chunk < n_chunks && !h.species; ++chunk)
        for (int c = 0; c < n * 4 * F; c += W)
          store(total + c, load(total + c) + load(total + chunk * nodes_size + c));
      for (int c = 0; c < C; ++c)
        for (int x = 0; x < n; ++x) {
          const T* from = total + x * 4 * F + column_of<T>(c, F);
          T* to = d.weight + int64_t(c) * (C + K) + k + x;
          to[0] = from[0];
          to[F] = from[kPair<T>];
        }
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
