// Inference: all convolutions of a few crystals at a time, whose features never leave the cache.
#pragma once
#include "conv.h"

namespace srcgcnn::SRCGCNN_LEVEL {

constexpr int kBlockRows = 48;  // small crystals are joined until the node product has this many rows

template <class T>
void stack(T* out, const Features<T>& h, const Layer<T>* layers, int n_steps, bool shared, const Edges<T>& g, int F,
           int threads) {
  const int K = g.n_features, C = 2 * F, n_panels = F / kChannels<T>;
  const int64_t node_size = int64_t(F) * 4 * F, edge_size = int64_t(K) * C, shells = most_shells(g);
  const int64_t n_table = h.species ? h.n_table : 0;
  Buffer<T> nodes(n_steps * node_size), w_e((shared ? 1 : n_steps) * edge_size), scale(n_steps * C);
  Buffer<T> shift(n_steps * C), scale2(n_steps * F), shift2(n_steps * F), table(n_table * 4 * F);
  for (int t = 0; t < n_steps; ++t) {
    fold_first<T>(scale + t * C, shift + t * C, layers[t], F);
    fold_second<T>(scale2 + t * F, shift2 + t * F, layers[t], F);
    if (!shared) pack_edges<T>(w_e + t * edge_size, layers[t].weight, F, K, scale + t * C);
    if (t == 0 || !shared) pack_nodes<T>(nodes + t * node_size, layers[t].weight, F, K, nullptr);
  }
  if (shared) pack_edges<T>(w_e, layers[0].weight, F, K, nullptr);
  const auto nodes_of = [&](int t) { return Packed<T>{nodes + (shared ? 0 : t) * node_size, F, 4 * F}; };
  if (n_table) node_product<T>(table, h.data, nodes_of(0), n_table, F);

#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Buffer<T> pq, m, terms, r(shells * kPair<T>), rows;
    Windows<T> windows;
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
        rows.reserve(n * kQuad<T>);
        m.reserve(n * F);
        terms.reserve((shared ? block_shells : 0) * C);
        T* state = out + first * F;
        if (h.species)
          features_of<T>(state, h, first, first + n, F);
        else
          memcpy(state, h.data + first * F, n * F * sizeof(T));
        if (shared) {  // the edge terms are the same in every step: evaluated once, scaled per step
          T* to = terms;
          for (int64_t c = c0; c < c1; ++c) {
            windows.of_crystal(g, c);
            for (int x = 0; x < n_panels; ++x, to += windows.n * kPair<T>)
              shell_terms<T>(to, windows, w_e + int64_t(x) * K * kPair<T>, nullptr);
          }
        }
        for (int t = 0; t < n_steps; ++t) {
          if (t == 0 && h.species)
            row_products<T>(pq, h, table, nodes_of(t), first, first + n, F);
          else
            node_product<T>(pq, state, nodes_of(t), n, F);
          const T* from = terms;
          for (int64_t c = c0; c < c1; ++c) {
            const int64_t begin = g.crystal_ptr[c], count = g.crystal_ptr[c + 1] - begin;
            if (!shared) windows.of_crystal(g, c);
            for (int x = 0; x < n_panels; ++x) {
              const T* step_scale = scale + t * C + x * kPair<T>;
              on_terms<T>(
                  true,
                  [&](auto powers) {
                    constexpr bool P = decltype(powers)::value;
                    return scale_rows<T, P>(rows, pq + (x * n + begin - first) * kQuad<T>, count, step_scale,
                                            shift + t * C + x * kPair<T>) &&
                           (shared ? scale_terms<T, P>(r, from, shells_of(g, c), step_scale)
                                   : shell_terms<T, P>(r, windows, w_e + t * edge_size + int64_t(x) * K * kPair<T>,
                                                       nullptr));
                  },
                  [&](auto powers) {
                    gate_panel<T, decltype(powers)::value>(m - first * F + x * kChannels<T>, rows, r, g, c, F);
                  });
              if (shared) from += shells_of(g, c) * kPair<T>;
            }
          }
          residual_softplus<T>(state, state, m, n, F, scale2 + t * F, shift2 + t * F);
        }
        c0 = c1;
      }
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
