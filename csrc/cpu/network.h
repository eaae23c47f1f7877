// Inference of a whole network: embedding, convolutions, mean over atoms and readout of a few crystals at a time.
#pragma once
#include "readout.h"
#include "stack.h"

namespace srcgcnn::SRCGCNN_LEVEL {

// The rows of a table that a batch uses, embedded, and each row's place among them.
template <class T>
struct Embedded {
  Buffer<T> h;
  Buffer<int32_t> place;
  int64_t n = 0;

  Features<T> fill(const Features<T>& from, int64_t n_rows, const Dense<T>& embedding) {
    const int A = embedding.in, F = embedding.out, wide = rounded_up<T>(F);
    Buffer<T> used(from.n_table * A), weight(int64_t(A + 1) * wide);
    Buffer<int32_t> found_at(from.n_table);
    place.reserve(n_rows);
    int32_t *found = found_at, *to = place;
    memset(found, 0xff, from.n_table * sizeof(int32_t));
    for (int64_t i = 0; i < n_rows; ++i) {
      const int64_t s = from.species[i];
      if (found[s] < 0) {
        memcpy(used + n * A, from.data + s * A, A * sizeof(T));
        found[s] = int32_t(n++);
      }
      to[i] = found[s];
    }
    T* bias = weight + int64_t(A) * wide;
    for (int c = 0; c < F; ++c) {
      pack_column<T>(weight, A, wide, c, embedding.weight + int64_t(c) * A, T(1));
      bias[c] = embedding.bias ? embedding.bias[c] : T(0);
    }
    h.reserve(n * F);
    gemm_nn<T>(used, A, Packed<T>{weight, A, wide}, h, F, n, bias, false);
    return {h, place, n};
  }
};

// out (B, O). h: (N, F), or, with `embedding`, a table (n_table, A), embedded here.
// Where the graph has no shells they are made here, crystal by crystal. F is a multiple of a vector.
template <class T>
void network(T* out, const Features<T>& h_in, const Dense<T>* embedding, const Layer<T>* layers, int n_steps, bool shared,
             const Edges<T>& g_in, const T* row_weight, const Dense<T>* readout_layers, int n_readout, int F, int threads) {
  Recurrence<T> recurrence(layers, n_steps, shared, g_in.n_features, F);
  const PackedReadout<T> packed(readout_layers, n_readout, false);
  Features<T> h = h_in;
  Embedded<T> embedded;
  if (embedding) h = embedded.fill(h_in, g_in.n_rows, *embedding);
  if (h.species) recurrence.prepare_table(h.data, h.n_table);
  const bool finds_shells = !g_in.features && !g_in.shell_of;
  Edges<T> g = g_in;
  Buffer<int32_t> shell_of(finds_shells ? g.n_edges : 0), shell_count(finds_shells ? g.n_crystals : 0);
  Buffer<T> shell_distance(finds_shells ? g.n_edges : 0);
  if (finds_shells) g.shell_of = shell_of, g.shell_distance = shell_distance, g.shell_count = shell_count;
  const int width = packed.width(), O = packed.out(n_readout - 1);
  const Tasks<T> tasks(g, threads);
  Teamwork<T> teamwork(g, threads);
  Buffer<T> team_state, team_means(teamwork.count * width);
  ShellFinder<T> team_finder;
#pragma omp parallel num_threads(teamwork.threads(tasks.count))
  {
    FlushDenormals flush;
    typename Recurrence<T>::Scratch scratch;
    ShellFinder<T> finder;
    for (int64_t c = 0; teamwork.count && c < g.n_crystals; ++c) {
      if (teamwork.place(c) < 0) continue;
      const int64_t first = g.crystal_ptr[c], n = g.crystal_ptr[c + 1] - first;
#pragma omp single
      {
        if (finds_shells) team_finder.of_crystal(shell_of, shell_distance, shell_count, g, c);
        team_state.reserve(n * F);
      }
      recurrence.run_by_team(team_state, h, g, c, teamwork.scratch, scratch);
#pragma omp single
      mean_of<T>(team_means + teamwork.place(c) * width, team_state, row_weight + first, n, F);
    }
    Buffer<T> state, values(kTaskCrystals * width), x(kTaskCrystals * packed.widest());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks.count; ++task) {
      const int64_t t0 = tasks.first(task);
      tasks.over_blocks(g, task, [&](int64_t c0, int64_t c1) {
        const int64_t first = g.crystal_ptr[c0], place = teamwork.place(c0);
        if (place >= 0) {
          memcpy(values + (c0 - t0) * width, team_means + place * width, rounded_up<T>(F) * sizeof(T));
          return;
        }
        if (finds_shells)
          for (int64_t c = c0; c < c1; ++c) finder.of_crystal(shell_of, shell_distance, shell_count, g, c);
        state.reserve((g.crystal_ptr[c1] - first) * F);
        recurrence.run(state, h, g, c0, c1, scratch);
        for (int64_t c = c0; c < c1; ++c)
          mean_of<T>(values + (c - t0) * width, state + (g.crystal_ptr[c] - first) * F, row_weight + g.crystal_ptr[c],
                     g.crystal_ptr[c + 1] - g.crystal_ptr[c], F);
      });
      packed.forward(out + t0 * O, values, tasks.end(task) - t0, x);
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
