// Where the time of the CPU kernels goes: every stage alone, on one thread, best of many rounds, in ns per edge, beside
// this processor's ceilings. The graphs are made here: crystals of 25 rows, 12 neighbours, with 0.18 distinct distances an
// edge, as in full cells, and 0.47, as in symmetry quotients.
//
//   g++ -std=c++17 -O3 -fno-tree-pre -ffp-contract=fast -fopenmp -Wno-psabi -march=x86-64-v4 -mtune=skylake-avx512
//       -mprefer-vector-width=512 -DSRCGCNN_LEVEL=v4 -I csrc/cpu benchmarks/native/stages.cpp -o stages && ./stages
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "kernels.cpp"

using namespace srcgcnn;
using namespace srcgcnn::SRCGCNN_LEVEL;

namespace {

constexpr int F = 64, K = 41, C = 2 * F, kCrystals = 256, kAtoms = 25, kNeighbors = 12;
constexpr int kPanels = F / kChannels<float>, kTwo = kPair<float>;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

template <class Run>
double best(Run run, int rounds = 40) {
  double least = 1e9;
  for (int r = 0; r < rounds; ++r) {
    const double start = now();
    run();
    const double took = now() - start;
    if (took < least) least = took;
  }
  return least;
}

std::vector<float> uniform(size_t n, float low, float high) {
  std::vector<float> v(n);
  for (auto& x : v) x = low + (high - low) * float(drand48());
  return v;
}

// Zeros on cache lines, as PyTorch and the kernels allocate.
struct Aligned : Buffer<float> {
  explicit Aligned(int64_t n) { zero(n); }
  float* data() { return *this; }
};

void ceilings() {
  using V = Simd<float>::V;
  constexpr int n = 4096;
  auto a = uniform(n, -4, 4), b = uniform(n, -4, 4);
  std::vector<float> out(64);
  const double fma = best([&] {
    V s[12];
    for (int v = 0; v < 12; ++v) s[v] = splat(a[v]);
    for (int r = 0; r < 20000; ++r)
      for (int v = 0; v < 12; ++v) s[v] = s[v] * splat(0.999f) + splat(1e-3f);
    for (int v = 0; v < 12; ++v) s[0] += s[v];
    store(out.data(), s[0]);
  });
  const double gate = best([&] {
    V s[4] = {};
    for (int r = 0; r < 50; ++r)
      for (int i = 0; i < n; i += 4 * Simd<float>::width)
        for (int v = 0; v < 4; ++v) {
          const int at = i + v * Simd<float>::width;
          s[v] += gate2<MathF32>(load(a.data() + at), load(b.data() + at));
        }
    for (int v = 0; v < 4; ++v) store(out.data() + v * Simd<float>::width, s[v]);
  });
  const double exps = best([&] {
    V s[4] = {};
    for (int r = 0; r < 50; ++r)
      for (int i = 0; i < n; i += 4 * Simd<float>::width)
        for (int v = 0; v < 4; ++v) s[v] += MathF32::exp2(load(a.data() + i + v * Simd<float>::width));
    for (int v = 0; v < 4; ++v) store(out.data() + v * Simd<float>::width, s[v]);
  });
  std::vector<float> big(1 << 26, 1.0f);
  float total = 0;
  const double read = best([&] {
    V s[4] = {};
    for (size_t i = 0; i < big.size(); i += 64)
      for (int v = 0; v < 64 / Simd<float>::width; ++v) s[v % 4] += load(big.data() + i + v * Simd<float>::width);
    total += s[0][0] + s[1][0] + s[2][0] + s[3][0];
  }, 5);
  printf("ceilings: FMA %.0f GFLOP/s, exp %.2f G/s, gates %.2f G/s (%.1f ns for the 64 of an edge), read %.1f GB/s%s\n",
         20000 * 12 * Simd<float>::width * 2 / fma * 1e-9, 50 * n / exps * 1e-9, 50 * n / gate * 1e-9,
         gate / 50 / n * F * 1e9, big.size() * 4 / read * 1e-9, total < 0 ? " " : "");
}

void stages(int distances) {
  const int64_t N = kCrystals * kAtoms, E = N * kNeighbors;
  std::vector<float> distance(E), weight(N, 1.0f), shell_distance(E), in_degree(N), by_receiver(N * K), by_sender(N * K);
  std::vector<int> sender(E), row_ptr(N + 1), crystal_ptr(kCrystals + 1), shell_of(E), shell_count(kCrystals);
  std::vector<double> sum(K), gram(K * K);
  for (int c = 0; c <= kCrystals; ++c) crystal_ptr[c] = c * kAtoms;
  for (int64_t i = 0; i <= N; ++i) row_ptr[i] = int(i * kNeighbors);
  for (int64_t e = 0; e < E; ++e) {
    const int64_t crystal = e / (kAtoms * kNeighbors);
    sender[e] = int(crystal * kAtoms + lrand48() % kAtoms);
    distance[e] = 2.0f + 2.75f * (lrand48() % distances) / distances + 1e-4f * crystal;
  }
  Edges<float> g{distance.data(), nullptr, sender.data(), row_ptr.data(), crystal_ptr.data(), shell_of.data(),
                 shell_distance.data(), shell_count.data(), N, E, kCrystals, K, 0.0f, 0.2f};
  const double shells = best([&] { edge_shells(shell_of.data(), shell_distance.data(), shell_count.data(), g, 1); });
  const double moments_time = best([&] {
    edge_moments(in_degree.data(), by_receiver.data(), by_sender.data(), sum.data(), gram.data(), weight.data(), g, 1);
  });
  int64_t n_shells = 0;
  for (int n : shell_count) n_shells += n;

  auto h_at = uniform(N * F, 0.2f, 2), grad_at = uniform(N * F, -1, 1), w = uniform(C * (C + K), -0.08f, 0.08f);
  auto one = uniform(C, 1, 1), zero = uniform(C, 0, 0), some = uniform(C, 0.5f, 1.5f);
  const int64_t most = most_shells(g) * C;
  Aligned nodes_at(F * 4 * F), back_at(F * 4 * F), w_e(K * C), pq(N * 4 * F), rows(kAtoms * 4 * F), m(N * F), out(N * F);
  Aligned r(most), t(most), own(N * 4 * F), senders(N * 4 * F), row_sum(C), dw(F * 4 * F), dw_e(K * C);
  std::vector<double> squares(C);
  Aligned h(N * F), grad(N * F);
  memcpy(h.data(), h_at.data(), N * F * sizeof(float));
  memcpy(grad.data(), grad_at.data(), N * F * sizeof(float));
  const auto nodes = pack_nodes<float>(nodes_at.data(), w.data(), F, K, nullptr);
  const auto back = pack_nodes_back<float>(back_at.data(), w.data(), F, K);
  pack_edges<float>(w_e.data(), w.data(), F, K, nullptr);

  const auto show = [&](const char* name, double seconds, const char* note = "") {
    printf("  %-34s %6.1f ns/edge  %s\n", name, 1e9 * seconds / E, note);
  };
  const auto crystals = [&](auto run) {
    return best([&] {
      for (int c = 0; c < kCrystals; ++c) run(c);
    });
  };
  printf("graph: %ld rows, %ld edges, %.2f shells an edge\n", long(N), long(E), double(n_shells) / E);
  printf("once per batch\n");
  show("shells", shells);
  show("moments (training)", moments_time);
  printf("forward\n");
  char note[80];
  const double product = best([&] { node_product<float>(pq.data(), h.data(), nodes, N, F); });
  snprintf(note, sizeof note, "%.0f GFLOP/s", 2.0 * N * F * 4 * F / product * 1e-9);
  show("node product", product, note);
  Windows<float> windows;
  const auto panels = [&](auto run) {  // crystals panel by panel: run(crystal, first number of its rows, panel)
    return crystals([&](int c) {
      windows.of_crystal(g, c);
      for (int x = 0; x < kPanels; ++x) run(c, (x * N + c * kAtoms) * kQuad<float>, x);
    });
  };
  const double terms =
      panels([&](int, int64_t, int x) { shell_terms<float>(r.data(), windows, w_e.data() + x * K * kTwo, nullptr); });
  snprintf(note, sizeof note, "%.0f ns a shell", 1e9 * terms / n_shells);
  show("edge terms of the shells", terms, note);
  show("statistics (training)", panels([&](int c, int64_t at, int x) {
         squares_of_panel<float>(squares.data() + x * kTwo, pq.data() + at, r.data(), weight.data(), g, c);
       }));
  show("powers of the rows", panels([&](int, int64_t at, int x) {
         scale_rows<float, true>(rows.data(), pq.data() + at, kAtoms, one.data() + x * kTwo, zero.data() + x * kTwo);
       }));
  show("edge terms, as powers", panels([&](int, int64_t, int x) {
         shell_terms<float, true>(r.data(), windows, w_e.data() + x * K * kTwo, nullptr);
       }));
  show("gate and sum", panels([&](int c, int64_t, int x) {
         gate_panel<float, true>(m.data() + g.crystal_ptr[c] * F + x * kChannels<float>, rows.data(), r.data(), g, c, F);
       }));
  show("residual, softplus", best([&] {
         residual_softplus<float>(out.data(), h.data(), m.data(), N, F, one.data(), zero.data());
       }));
  printf("backward (and the node product, the scaling and the edge terms again)\n");
  Incoming incoming;
  show("edges by sender and shell", crystals([&](int c) { incoming.of_crystal(g, c, shell_count[c]); }));
  show("sums of z", panels([&](int c, int64_t at, int x) {
         if (x == 0) incoming.of_crystal(g, c, windows.n);
         sums_of_panel<float>(own.data() + at, senders.data() + at, pq.data() + at, r.data(), g, incoming,
                              weight.data(), c);
       }));
  show("powers of the shells", panels([&](int, int64_t, int x) {
         scale_terms<float, true>(t.data(), r.data(), windows.n, one.data() + x * kTwo);
       }));
  Aligned dy(kAtoms * kNeighbors * kTwo);
  show("edge pass", panels([&](int c, int64_t at, int x) {
         backward_panel<float, true>(own.data() + at, dy.data(), grad.data() + x * kChannels<float>, rows.data(),
                                     r.data(), g, c, F);
       }));
  show("its sums by sender and shell", panels([&](int c, int64_t at, int x) {
         if (x == 0) incoming.of_crystal(g, c, windows.n);
         gather_panel<float>(senders.data() + at, kQuad<float>, dy.data(), incoming.by_sender, kAtoms);
         gather_panel<float>(t.data(), kTwo, dy.data(), incoming.by_shell, windows.n);
       }));
  show("edge weights from the shells",
       panels([&](int, int64_t, int x) { shell_gradient<float>(dw_e.data() + x * K * kTwo, windows, t.data()); }));
  show("edge weights' correction", best([&] {
         gemm_tn<float>(by_receiver.data(), K, K, h.data(), F, F, dw_e.data(), F, N);
         gemm_tn<float>(by_sender.data(), K, K, h.data(), F, F, dw_e.data(), F, N);
       }));
  show("back through the node product", best([&] {
         for (int64_t i = 0; i < N; i += kRowBlock)
           gemm_nn<float>(own.data() + i * 4 * F, 4 * F, back, out.data() + i * F, F, N - i < kRowBlock ? N - i : kRowBlock,
                          nullptr, true);
       }));
  show("node weights", best([&] {
         for (int64_t i = 0; i < N; i += kRowBlock)
           gemm_tn<float>(h.data() + i * F, F, F, own.data() + i * 4 * F, 4 * F, 4 * F, dw.data(), 4 * F,
                          N - i < kRowBlock ? N - i : kRowBlock);
       }));
  printf("whole operators\n");
  Aligned products(N * 4 * F);
  const Features<float> rows_of_h{h.data(), nullptr, N};
  Moments<float> moments{weight.data(), in_degree.data(), by_receiver.data(), by_sender.data(), sum.data(), gram.data()};
  std::vector<float> mean1(C), var1(C, 1.0f), mean2(F), var2(F, 1.0f), d_w(w.size()), d1(C), d2(C), d3(C), d4(F), d5(F);
  Layer<float> layer{w.data(), nullptr, some.data(), zero.data(), some.data(), zero.data(), mean1.data(), var1.data(),
                     mean2.data(), var2.data(), 1e-5f, 1e-5f, true, true};
  show("layer, training", best([&] { conv(out.data(), m.data(), products.data(), rows_of_h, layer, {}, g, moments, {}, F, 1); }));
  Gradients<float> gradients{own.data(), d_w.data(), d1.data(), d2.data(), d3.data(), d4.data(), d5.data(), nullptr};
  show("layer, backward", best([&] { conv_backward(gradients, grad.data(), rows_of_h, m.data(), products.data(), layer, g, moments, {}, F, 1); }));
  Layer<float> fixed[3] = {layer, layer, layer};
  for (auto& one_layer : fixed) one_layer.train1 = one_layer.train2 = false;
  show("three steps, inference, shared W", best([&] { stack(out.data(), rows_of_h, fixed, 3, true, g, F, 1); }));
  show("three layers, inference", best([&] { stack(out.data(), rows_of_h, fixed, 3, false, g, F, 1); }));
  std::vector<int> species(N);
  for (int& x : species) x = int(lrand48() % 101);
  const Features<float> elements{h.data(), species.data(), 101};
  show("first layer, elements, training", best([&] { conv<float>(out.data(), m.data(), nullptr, elements, layer, {}, g, moments, {}, F, 1); }));
  show("first layer, elements, backward",
       best([&] { conv_backward<float>(gradients, grad.data(), elements, m.data(), nullptr, layer, g, moments, {}, F, 1); }));
  show("three steps from elements, shared W", best([&] { stack(out.data(), elements, fixed, 3, true, g, F, 1); }));
  show("three layers from elements", best([&] { stack(out.data(), elements, fixed, 3, false, g, F, 1); }));
}

}  // namespace

int main() {
  srand48(1);
  FlushDenormals flush;
  ceilings();
  stages(55);
  stages(168);
}
