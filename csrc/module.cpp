// The Python binding: addresses and sizes in, kernels called. ops/cpu.py checks shapes and types beforehand.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"

namespace nb = nanobind;
using namespace srcgcnn;

namespace {

std::vector<const Level*> usable_levels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  std::vector<const Level*> levels;
  if (v2) levels.push_back(&level_v2);
  if (v3) levels.push_back(&level_v3);
  if (v4) levels.push_back(&level_v4);
  return levels;
#else
  return {&level_portable};
#endif
}

const Level* choose_level() {
  const auto levels = usable_levels();
  if (levels.empty()) throw nb::import_error("this processor has no SSE4.2, which the compiled kernels need");
  const char* wanted = std::getenv("SRCGCNN_FAST_SIMD");
  if (!wanted || !*wanted) return levels.back();
  std::string names;
  for (const Level* level : levels) {
    if (std::string(level->name) == wanted) return level;
    names += std::string(names.empty() ? "" : ", ") + level->name;
  }
  const auto message = std::string("SRCGCNN_FAST_SIMD=") + wanted + " is not a level of this processor; choose one of " + names;
  throw nb::import_error(message.c_str());
}

const Level* level = nullptr;

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() { return level->f32; }
template <>
const Kernels<double>& kernels<double>() { return level->f64; }

template <class T>
T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

// (distance, features, sender, row_ptr, crystal_ptr), (n_rows, n_edges, n_crystals, n_features), (dmin, step)
using Pointers = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
using Sizes = std::tuple<int64_t, int64_t, int64_t, int>;
using Basis = std::tuple<double, double>;

template <class T>
Edges<T> edges(const Pointers& p, const Sizes& s, const Basis& b) {
  return {address<T>(std::get<0>(p)), address<T>(std::get<1>(p)), address<int32_t>(std::get<2>(p)),
          address<int32_t>(std::get<3>(p)), address<int32_t>(std::get<4>(p)), std::get<0>(s), std::get<1>(s),
          std::get<2>(s), std::get<3>(s), T(std::get<0>(b)), T(std::get<1>(b))};
}

template <class T>
void bind(nb::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string(stem) + suffix; };
  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  m.def(name("gate_sum").c_str(), [](uintptr_t out, uintptr_t p, uintptr_t q, uintptr_t w_e, Pointers ptr, Sizes s,
                                     Basis b, int width, int threads) {
    kernels<T>().gate_sum(address<T>(out), address<T>(p), address<T>(q), address<T>(w_e), edges<T>(ptr, s, b), width,
                          threads);
  }, nogil);
  m.def(name("gate_sum_backward").c_str(), [](uintptr_t dp, uintptr_t dq, uintptr_t dw_e, uintptr_t d_edge,
                                              uintptr_t grad, uintptr_t p, uintptr_t q, uintptr_t w_e, Pointers ptr,
                                              Sizes s, Basis b, int width, int threads) {
    kernels<T>().gate_sum_backward(address<T>(dp), address<T>(dq), address<T>(dw_e), address<T>(d_edge),
                                   address<T>(grad), address<T>(p), address<T>(q), address<T>(w_e),
                                   edges<T>(ptr, s, b), width, threads);
  }, nogil);
  m.def(name("neighbor_sum").c_str(), [](uintptr_t out, uintptr_t h, Pointers ptr, Sizes s, int width, bool transpose,
                                         int threads) {
    kernels<T>().neighbor_sum(address<T>(out), address<T>(h), edges<T>(ptr, s, {0.0, 1.0}), width, transpose, threads);
  }, nogil);
  m.def(name("edge_moments").c_str(), [](uintptr_t by_receiver, uintptr_t by_sender, uintptr_t gram, uintptr_t weight,
                                         Pointers ptr, Sizes s, Basis b, int threads) {
    kernels<T>().edge_moments(address<T>(by_receiver), address<T>(by_sender), address<double>(gram), address<T>(weight),
                              edges<T>(ptr, s, b), threads);
  }, nogil);
}

// First fault of a batch of graphs as (kind, position); kind 0: none. What the kernels rely on, so that no index can
// leave its array and no two threads meet in one crystal.
std::tuple<int, int64_t> check_graph(uintptr_t sender_, uintptr_t row_ptr_, uintptr_t crystal_ptr_, Sizes sizes) {
  const auto* sender = address<int32_t>(sender_);
  const auto* row_ptr = address<int32_t>(row_ptr_);
  const auto* crystal_ptr = address<int32_t>(crystal_ptr_);
  const auto [n_rows, n_edges, n_crystals, n_features] = sizes;
  if (row_ptr[0] != 0 || row_ptr[n_rows] != n_edges) return {1, n_rows};
  if (crystal_ptr[0] != 0 || crystal_ptr[n_crystals] != n_rows) return {3, n_crystals};
  for (int64_t c = 0; c < n_crystals; ++c) {
    const int32_t first = crystal_ptr[c], end = crystal_ptr[c + 1];
    if (end < first || end > n_rows) return {3, c};
    for (int64_t i = first; i < end; ++i)
      if (row_ptr[i + 1] < row_ptr[i] || row_ptr[i + 1] > n_edges) return {1, i};
    int32_t outside = 0;
    for (int64_t e = row_ptr[first]; e < row_ptr[end]; ++e) outside |= (sender[e] < first) | (sender[e] >= end);
    if (!outside) continue;
    for (int64_t e = row_ptr[first]; e < row_ptr[end]; ++e)
      if (sender[e] < first || sender[e] >= end) return {2, e};
  }
  return {0, 0};
}

}  // namespace

NB_MODULE(_core, m) {
  level = choose_level();
  bind<float>(m, "_f32");
  bind<double>(m, "_f64");
  m.def("check_graph", &check_graph);
  m.def("simd_level", [] { return std::string(level->name); });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const Level* usable : usable_levels()) names.emplace_back(usable->name);
    return names;
  });
  m.attr("compiler") = SRCGCNN_COMPILER;
  m.attr("cuda") = SRCGCNN_CUDA_BUILD;
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;
#else
  m.attr("openmp") = 0;
#endif
}
