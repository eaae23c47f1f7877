// Inference: all convolutions of a few crystals at a time, whose features never leave the cache.
#pragma once
#include "conv.h"

namespace srcgcnn::SRCGCNN_LEVEL {

constexpr int kBlockRows = 48;   // small crystals are joined until the node product has this many rows
constexpr int kTaskCrystals = 8;  // crystals that one thread takes at once

// The convolutions with their fixed statistics folded in. `shared`: all steps have one weight (and bias).
template <class T>
class Recurrence {
 public:
  struct Scratch {
    Buffer<T> pq, m, terms, r, rows;
    Windows<T> windows;
  };

  Recurrence(const Layer<T>* layers, int n_steps, bool shared, int n_features, int width)
      : n_steps_(n_steps), K(n_features), F(width), C(2 * width), shared_(shared),
        nodes_((shared ? 1 : n_steps) * node_size()), w_e_((shared ? 1 : n_steps) * edge_size()),
        scale_(n_steps * C), shift_(n_steps * C), scale2_(n_steps * F), shift2_(n_steps * F) {
    for (int t = 0; t < n_steps; ++t) {
      fold_first<T>(scale_ + t * C, shift_ + t * C, layers[t], F);
      fold_second<T>(scale2_ + t * F, shift2_ + t * F, layers[t], F);
      if (t > 0 && shared) continue;
      pack_nodes<T>(nodes_ + t * node_size(), layers[t].weight, F, K, nullptr);
      pack_edges<T>(w_e_ + t * edge_size(), layers[t].weight, F, K, shared ? nullptr : scale_ + t * C);
    }
  }

  // The first step's products of the rows of a table of features.
  void prepare_table(const T* table, int64_t n) {
    table_.reserve(n * 4 * F);
    node_product<T>(table_, table, nodes_of(0), n, F);
  }

  // state (rows of the crystals [c0, c1), F): features in, those after the last step out.
  void run(T* state, const Features<T>& h, const Edges<T>& g, int64_t c0, int64_t c1, Scratch& scratch) const {
    const int n_panels = F / kChannels<T>;
    const int64_t first = g.crystal_ptr[c0], n = g.crystal_ptr[c1] - first;
    int64_t block_shells = 0, most_shells = 0;
    for (int64_t c = c0; c < c1; ++c) {
      block_shells += shells_of(g, c);
      most_shells = shells_of(g, c) > most_shells ? shells_of(g, c) : most_shells;
    }
    auto& [pq, m, terms, r, rows, windows] = scratch;
    pq.reserve(n * 4 * F);
    rows.reserve(n * kQuad<T>);
    m.reserve(n * F);
    r.reserve(most_shells * kPair<T>);
    terms.reserve((shared_ ? block_shells : 0) * C);
    if (h.species)
      features_of<T>(state, h, first, first + n, F);
    else
      memcpy(state, h.data + first * F, n * F * sizeof(T));
    if (shared_) {  // the edge terms are the same in every step: evaluated once, scaled per step
      T* to = terms;
      for (int64_t c = c0; c < c1; ++c) {
        windows.of_crystal(g, c);
        for (int x = 0; x < n_panels; ++x, to += windows.n * kPair<T>)
          shell_terms<T>(to, windows, w_e_ + int64_t(x) * K * kPair<T>, nullptr);
      }
    }
    for (int t = 0; t < n_steps_; ++t) {
      if (t == 0 && h.species)
        row_products<T>(pq, h, table_, nodes_of(t), first, first + n, F);
      else
        node_product<T>(pq, state, nodes_of(t), n, F);
      const T* from = terms;
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t begin = g.crystal_ptr[c] - first, count = g.crystal_ptr[c + 1] - g.crystal_ptr[c];
        if (!shared_) windows.of_crystal(g, c);
        for (int x = 0; x < n_panels; ++x) {
          const T* step_scale = scale_ + t * C + x * kPair<T>;
          on_terms<T>(
              true,
              [&](auto powers) {
                constexpr bool P = decltype(powers)::value;
                return scale_rows<T, P>(rows, pq + (x * n + begin) * kQuad<T>, count, step_scale,
                                        shift_ + t * C + x * kPair<T>) &&
                       (shared_ ? scale_terms<T, P>(r, from, shells_of(g, c), step_scale)
                                : shell_terms<T, P>(r, windows, w_e_ + t * edge_size() + int64_t(x) * K * kPair<T>,
                                                    nullptr));
              },
              [&](auto powers) {
                gate_panel<T, decltype(powers)::value>(m + begin * F + x * kChannels<T>, rows, r, g, c, F);
              });
          if (shared_) from += shells_of(g, c) * kPair<T>;
        }
      }
      residual_softplus<T>(state, state, m, n, F, scale2_ + t * F, shift2_ + t * F);
    }
  }

 private:
  int64_t node_size() const { return int64_t(F) * 4 * F; }
  int64_t edge_size() const { return int64_t(K) * C; }
  Packed<T> nodes_of(int t) const { return {nodes_ + (shared_ ? 0 : t) * node_size(), F, 4 * F}; }

  const int n_steps_, K, F, C;
  const bool shared_;
  Buffer<T> nodes_, w_e_, scale_, shift_, scale2_, shift2_, table_;
};

// Runs `run(c0, c1)` over the crystals of one task, small ones joined.
template <class T, class Run>
void over_blocks(const Edges<T>& g, int64_t task, Run run) {
  const int64_t end = (task + 1) * kTaskCrystals, last = end < g.n_crystals ? end : g.n_crystals;
  for (int64_t c0 = task * kTaskCrystals; c0 < last;) {
    int64_t c1 = c0 + 1;
    while (c1 < last && g.crystal_ptr[c1 + 1] - g.crystal_ptr[c0] <= kBlockRows) ++c1;
    run(c0, c1);
    c0 = c1;
  }
}
template <class T>
int64_t tasks_of(const Edges<T>& g) {
  return (g.n_crystals + kTaskCrystals - 1) / kTaskCrystals;
}

template <class T>
void stack(T* out, const Features<T>& h, const Layer<T>* layers, int n_steps, bool shared, const Edges<T>& g, int F,
           int threads) {
  Recurrence<T> recurrence(layers, n_steps, shared, g.n_features, F);
  if (h.species) recurrence.prepare_table(h.data, h.n_table);
  const int64_t tasks = tasks_of(g);
#pragma omp parallel num_threads(tasks < threads ? int(tasks ? tasks : 1) : threads)
  {
    FlushDenormals flush;
    typename Recurrence<T>::Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task)
      over_blocks(g, task, [&](int64_t c0, int64_t c1) {
        recurrence.run(out + int64_t(g.crystal_ptr[c0]) * F, h, g, c0, c1, scratch);
      });
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
