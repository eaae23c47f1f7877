// Inference: all convolutions of a few crystals at a time, whose features never leave the cache.
#pragma once
#include "conv.h"

namespace srcgcnn::SRCGCNN_LEVEL {

constexpr int kBlockRows = 48;  // small crystals are joined until the node product has this many rows

template <class T>
void stack(T* out, const T* h, const Layer<T>* layers, int n_steps, bool shared, const Edges<T>& g, int F,
           int threads) {
  const int K = g.n_features, C = 2 * F;
  const int64_t node_size = int64_t(F) * 4 * F, edge_size = int64_t(K) * C, shells = most_shells(g);
  Buffer<T> nodes(n_steps * node_size), w_e((shared ? 1 : n_steps) * edge_size), scale(n_steps * C);
  Buffer<T> start(n_steps * 4 * F), scale2(n_steps * F), shift2(n_steps * F);
  for (int t = 0; t < n_steps; ++t) {
    T* first = scale + t * C;
    memset(start + t * 4 * F, 0, 4 * F * sizeof(T));
    fold_first<T>(first, start + t * 4 * F, layers[t], F);
    fold_second<T>(scale2 + t * F, shift2 + t * F, layers[t], F);
    pack_nodes<T>(nodes + t * node_size, layers[t].weight, F, K, first);
    if (!shared) pack_edges<T>(w_e + t * edge_size, layers[t].weight, F, K, first);
  }
  if (shared) pack_edges<T>(w_e, layers[0].weight, F, K, nullptr);

#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    constexpr int W = Simd<T>::width;
    Buffer<T> pq, m, r, raw(shared ? 0 : shells * C);
    const int64_t tasks = (g.n_crystals + 7) / 8;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t last = (task + 1) * 8 < g.n_crystals ? (task + 1) * 8 : g.n_crystals;
      for (int64_t c0 = task * 8; c0 < last;) {
        int64_t c1 = c0 + 1;
        while (c1 < last && g.crystal_ptr[c1 + 1] - g.crystal_ptr[c0] <= kBlockRows) ++c1;
        const int64_t first = g.crystal_ptr[c0], n = g.crystal_ptr[c1] - first;
        int64_t block_shells = 0;
        for (int64_t c = c0; c < c1; ++c) block_shells += shells_of(g, c);
        pq.reserve(n * 4 * F);
        m.reserve(n * F);
        r.reserve((shared ? block_shells : 0) * C);
        raw.reserve(shells * C);
        T* state = out + first * F;
        memcpy(state, h + first * F, n * F * sizeof(T));
        if (shared) {  // the edge terms are the same in every step: evaluated once, scaled per step
          T* to = r;
          for (int64_t c = c0; c < c1; to += shells_of(g, c) * C, ++c) shell_terms<T>(to, g, c, w_e, C, nullptr);
        }
        for (int t = 0; t < n_steps; ++t) {
          const Packed<T> product{nodes + t * node_size, F, 4 * F};
          node_product<T>(pq, state, product, 0, n, F, start + t * 4 * F);
          const T* from = r;
          for (int64_t c = c0; c < c1; ++c) {
            if (shared) {
              for (int64_t s = 0; s < shells_of(g, c); ++s, from += C)
                for (int x = 0; x < C; x += W) store(raw + s * C + x, load(from + x) * load(scale + t * C + x));
            } else {
              shell_terms<T>(raw, g, c, w_e + t * edge_size, C, nullptr);
            }
            gate_crystal<T>(m - first * F, pq + (g.crystal_ptr[c] - first) * 4 * F, raw, g, c, F);
          }
          residual_softplus<T>(state, state, m, n, F, scale2 + t * F, shift2 + t * F);
        }
        c0 = c1;
      }
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
