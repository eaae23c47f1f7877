// One training step of a convolution and its inference by the portable kernels: arrays in on stdin, results out on stdout.
//
//   aarch64-linux-gnu-g++ -std=c++17 -O3 -fopenmp -static -DSRCGCNN_LEVEL=portable -I csrc/cpu tests/ops/portable.cpp
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#include "kernels.cpp"

using namespace srcgcnn;
using namespace srcgcnn::SRCGCNN_LEVEL;

namespace {

template <class T>
T* zeros(int64_t n) {
  const size_t bytes = (size_t(n) * sizeof(T) / 64 + 1) * 64;
  return static_cast<T*>(std::memset(Pool::take(bytes).data, 0, bytes));
}

template <class T>
T* in(int64_t n) {
  T* p = zeros<T>(n);
  if (std::fread(p, sizeof(T), size_t(n), stdin) != size_t(n)) std::exit(2);
  return p;
}

template <class T>
void out(const T* p, int64_t n) {
  std::fwrite(p, sizeof(T), size_t(n), stdout);
}

template <class T>
void run(const Kernels<T>& kernels, int threads) {
  const int64_t* size = in<int64_t>(5);
  const int64_t N = size[0], E = size[1], B = size[2], K = size[3], F = size[4], M = 2 * F * (2 * F + K);
  const int width = int(F);
  Edges<T> edges{in<T>(E), nullptr, in<int32_t>(E), in<int32_t>(N + 1), in<int32_t>(B + 1), nullptr, nullptr, nullptr,
                 N, E, B, int(K), T(0), T(0.2)};
  const T* row_weight = in<T>(N);
  const Features<T> h{in<T>(N * F), nullptr, 0};
  Layer<T> layer{in<T>(M), in<T>(2 * F), in<T>(2 * F), in<T>(2 * F), in<T>(F), in<T>(F), in<T>(2 * F), in<T>(2 * F),
                 in<T>(F), in<T>(F), T(1e-5), T(1e-5), false, false};
  const T* grad = in<T>(N * F);

  auto* shell_of = zeros<int32_t>(E);
  auto* shell_distance = zeros<T>(E);
  auto* shell_count = zeros<int32_t>(B);
  kernels.edge_shells(shell_of, shell_distance, shell_count, edges, threads);
  edges.shell_of = shell_of, edges.shell_distance = shell_distance, edges.shell_count = shell_count;

  T* result = zeros<T>(N * F);
  kernels.stack(result, h, &layer, 1, false, edges, width, threads);
  out(result, N * F);

  auto *in_degree = zeros<T>(N), *by_receiver = zeros<T>(N * K), *by_sender = zeros<T>(N * K);
  auto *sum = zeros<double>(K), *gram = zeros<double>(K * K);
  kernels.edge_moments(in_degree, by_receiver, by_sender, sum, gram, row_weight, edges, threads);
  const Moments<T> moments{row_weight, in_degree, by_receiver, by_sender, sum, gram};
  layer.train1 = layer.train2 = true;
  T* m = zeros<T>(N * F);
  kernels.conv(result, m, nullptr, h, layer, {}, edges, moments, {}, width, threads);
  out(result, N * F);

  const Gradients<T> g{zeros<T>(N * F), zeros<T>(M), zeros<T>(2 * F), zeros<T>(2 * F), zeros<T>(2 * F), zeros<T>(F), zeros<T>(F), nullptr};
  kernels.conv_backward(g, grad, h, m, nullptr, layer, edges, moments, {}, width, threads);
  out(g.h, N * F), out(g.weight, M), out(g.gamma1, 2 * F), out(g.beta1, 2 * F), out(g.gamma2, F), out(g.beta2, F);
}

}  // namespace

int main(int, char** arguments) {
#ifdef _WIN32
  _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
#endif
  const int threads = std::atoi(arguments[2]);
  if (arguments[1][0] == 'f') run(level_portable.f32, threads);
  else run(level_portable.f64, threads);
}
