// Inference: all convolutions of a few crystals at a time, whose features never leave the cache.
#pragma once
#include "conv.h"

namespace srcgcnn::SRCGCNN_LEVEL {

constexpr int kBlockRows = 48;   // small crystals are joined until the node product has this many rows
constexpr int kTaskCrystals = 8;  // crystals that one thread takes at once
constexpr int kTeamRows = 512;    // a crystal of fewer rows is not worth the threads' waiting for each other

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
    auto &pq = scratch.pq, &m = scratch.m, &terms = scratch.terms, &r = scratch.r, &rows = scratch.rows;
    auto& windows = scratch.windows;
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

  // The same for one crystal, by all threads of a parallel region, which call it with the same arguments but for `mine`: they
  // share out rows and shells, and the panels, of which each is one thread's: what it writes others need not fetch.
  void run_by_team(T* state, const Features<T>& h, const Edges<T>& g, int64_t crystal, Scratch& scratch,
                   Scratch& mine) const {
    const int n_panels = F / kChannels<T>;
    const int64_t first = g.crystal_ptr[crystal], n = g.crystal_ptr[crystal + 1] - first, shells = shells_of(g, crystal);
    auto &pq = scratch.pq, &m = scratch.m, &terms = scratch.terms;
    auto& windows = scratch.windows;
    const auto rows_from = [n](int64_t i) { return i + kRowBlock < n ? kRowBlock : n - i; };
    mine.rows.reserve(n * kQuad<T>);
    mine.r.reserve(shells * kPair<T>);
#pragma omp single
    {
      pq.reserve(n * 4 * F);
      m.reserve(n * F);
      terms.reserve((shared_ ? shells : 0) * C);
      windows.prepare(g, crystal);
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < n; i += kRowBlock) {
      if (h.species)
        features_of<T>(state + i * F, h, first + i, first + i + rows_from(i), F);
      else
        memcpy(state + i * F, h.data + (first + i) * F, rows_from(i) * F * sizeof(T));
    }
#pragma omp for schedule(static)
    for (int64_t s = 0; s < shells; s += kRowBlock) windows.fill(g, s, s + kRowBlock < shells ? s + kRowBlock : shells);
    for (int t = 0; t < n_steps_; ++t) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; i += kRowBlock) {
        if (t > 0 || !h.species) {
          node_block<T>(pq, state, nodes_of(t), i, n, F);
          continue;
        }
        for (int x = 0; x < n_panels; ++x)
          for (int64_t k = i; k < i + rows_from(i); ++k)
            memcpy(pq + (x * n + k) * kQuad<T>, table_ + (x * h.n_table + h.species[first + k]) * kQuad<T>,
                   kQuad<T> * sizeof(T));
      }
#pragma omp for schedule(static)
      for (int x = 0; x < n_panels; ++x) {
        const T* step_scale = scale_ + t * C + x * kPair<T>;
        T* of_panel = terms + x * shells * kPair<T>;
        if (shared_ && t == 0) shell_terms<T>(of_panel, windows, w_e_ + int64_t(x) * K * kPair<T>, nullptr);
        on_terms<T>(
            true,
            [&](auto powers) {
              constexpr bool P = decltype(powers)::value;
              return scale_rows<T, P>(mine.rows, pq + x * n * kQuad<T>, n, step_scale, shift_ + t * C + x * kPair<T>) &&
                     (shared_ ? scale_terms<T, P>(mine.r, of_panel, shells, step_scale)
                              : shell_terms<T, P>(mine.r, windows, w_e_ + t * edge_size() + int64_t(x) * K * kPair<T>,
                                                  nullptr));
            },
            [&](auto powers) {
              gate_panel<T, decltype(powers)::value>(m + x * kChannels<T>, mine.rows, mine.r, g, crystal, F);
            });
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; i += kRowBlock)
        residual_softplus<T>(state + i * F, state + i * F, m + i * F, rows_from(i), F, scale2_ + t * F, shift2_ + t * F);
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

// Runs of crystals that a thread takes at once, those with most edges first, so that no thread is still busy with much when
// the others are done. They share the edges out well enough when none has more than an eighth of a thread's part; smaller
// ones than a block of rows would cost more than waiting does.
template <class T>
class Tasks {
 public:
  Tasks(const Edges<T>& g, int threads) : begin_(g.n_crystals + 1), order_(g.n_crystals) {
    const int64_t most = threads > 1 ? g.n_edges / (8 * threads) : g.n_edges;
    int32_t *begin = begin_, *order = order_;
    const auto edge = [&](int64_t c) { return int64_t(g.row_ptr[g.crystal_ptr[c]]); };
    for (int64_t c = 0; c < g.n_crystals; ++c) {
      const int64_t first = count ? begin[count - 1] : 0;
      const bool is_large = edge(c + 1) - edge(first) > most && g.crystal_ptr[c + 1] - g.crystal_ptr[first] > kBlockRows;
      if (c == 0 || c - first == kTaskCrystals || is_large) begin[count++] = int32_t(c);
    }
    begin[count] = int32_t(g.n_crystals);
    for (int64_t k = 0; k < count; ++k) order[k] = int32_t(k);
    int64_t gap = 1;
    while (3 * gap + 1 < count) gap = 3 * gap + 1;
    for (; threads > 1 && gap; gap /= 3)  // a Shell sort
      for (int64_t k = gap; k < count; ++k) {
        const int32_t task = order[k];
        const int64_t edges = edge(begin[task + 1]) - edge(begin[task]);
        int64_t at = k;
        for (; at >= gap && edge(begin[order[at - gap] + 1]) - edge(begin[order[at - gap]]) < edges; at -= gap)
          order[at] = order[at - gap];
        order[at] = task;
      }
  }
  int64_t count = 0;
  int64_t first(int64_t k) const { return begin_[order_[k]]; }
  int64_t end(int64_t k) const { return begin_[order_[k] + 1]; }

  // Runs `run(c0, c1)` over the crystals of a task, small ones joined.
  template <class Run>
  void over_blocks(const Edges<T>& g, int64_t k, Run run) const {
    for (int64_t c0 = first(k); c0 < end(k);) {
      int64_t c1 = c0 + 1;
      while (c1 < end(k) && g.crystal_ptr[c1 + 1] - g.crystal_ptr[c0] <= kBlockRows) ++c1;
      run(c0, c1);
      c0 = c1;
    }
  }

 private:
  Buffer<int32_t> begin_, order_;
};

// Crystals that would still keep one thread busy when the others are done with the rest; a team of all takes them.
template <class T>
class Teamwork {
 public:
  Teamwork(const Edges<T>& g, int threads) : place_(threads > 1 ? g.n_crystals : 0), threads_(threads) {
    for (int64_t c = 0; threads > 1 && c < g.n_crystals; ++c) {
      const int64_t first = g.crystal_ptr[c], end = g.crystal_ptr[c + 1];
      const bool is_large = end - first >= kTeamRows && (g.row_ptr[end] - g.row_ptr[first]) * threads > g.n_edges;
      static_cast<int32_t*>(place_)[c] = is_large ? int32_t(count++) : -1;
    }
  }
  int64_t count = 0;
  // Which of them crystal c is, or -1.
  int64_t place(int64_t c) const { return count ? static_cast<const int32_t*>(place_)[c] : -1; }
  int threads(int64_t tasks) const { return count || tasks >= threads_ ? threads_ : tasks ? int(tasks) : 1; }

  typename Recurrence<T>::Scratch scratch;

 private:
  Buffer<int32_t> place_;
  const int threads_;
};

template <class T>
void stack(T* out, const Features<T>& h, const Layer<T>* layers, int n_steps, bool shared, const Edges<T>& g, int F,
           int threads) {
  Recurrence<T> recurrence(layers, n_steps, shared, g.n_features, F);
  if (h.species) recurrence.prepare_table(h.data, h.n_table);
  const Tasks<T> tasks(g, threads);
  Teamwork<T> teamwork(g, threads);
#pragma omp parallel num_threads(teamwork.threads(tasks.count))
  {
    FlushDenormals flush;
    typename Recurrence<T>::Scratch scratch;
    for (int64_t c = 0; teamwork.count && c < g.n_crystals; ++c)
      if (teamwork.place(c) >= 0)
        recurrence.run_by_team(out + int64_t(g.crystal_ptr[c]) * F, h, g, c, teamwork.scratch, scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks.count; ++task)
      tasks.over_blocks(g, task, [&](int64_t c0, int64_t c1) {
        if (teamwork.place(c0) >= 0) return;
        recurrence.run(out + int64_t(g.crystal_ptr[c0]) * F, h, g, c0, c1, scratch);
      });
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
