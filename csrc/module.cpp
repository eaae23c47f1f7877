// The Python binding: addresses and sizes in, kernels called. ops/cpu.py checks shapes and types beforehand.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#ifdef SRCGCNN_WITH_CUDA
#include "cuda/binding.h"
#endif

#if defined(__clang__) && defined(_MSC_VER)
#pragma comment(lib, "clang_rt.builtins-x86_64.lib")  // __builtin_cpu_supports
#endif

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

const Level* chosen = nullptr;

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() { return chosen->f32; }
template <>
const Kernels<double>& kernels<double>() { return chosen->f64; }

template <class T>
T* address(uintptr_t a) { return reinterpret_cast<T*>(a); }

// Addresses in the order of the structs' fields; a null address is 0.
using Addresses = std::vector<uintptr_t>;
using Sizes = std::tuple<int64_t, int64_t, int64_t, int>;  // rows, edges, crystals, features of an edge
using Basis = std::tuple<double, double>;                  // dmin, step

template <class T>
Edges<T> edges(const Addresses& a, const Sizes& s, const Basis& b) {
  return {address<T>(a.at(0)),       address<T>(a.at(1)),       address<int32_t>(a.at(2)), address<int32_t>(a.at(3)),
          address<int32_t>(a.at(4)), address<int32_t>(a.at(5)), address<T>(a.at(6)),       address<int32_t>(a.at(7)),
          std::get<0>(s),            std::get<1>(s),            std::get<2>(s),            std::get<3>(s),
          T(std::get<0>(b)),         T(std::get<1>(b))};
}

template <class T>
Moments<T> moments(const Addresses& a) {
  return {address<T>(a.at(0)), address<T>(a.at(1)), address<T>(a.at(2)), address<T>(a.at(3)),
          address<double>(a.at(4)), address<double>(a.at(5))};
}

// Features of the rows: their address, that of the species (or 0), rows of the table.
using FeatureArguments = std::tuple<uintptr_t, uintptr_t, int64_t>;

template <class T>
Features<T> features(const FeatureArguments& a) {
  return {address<T>(std::get<0>(a)), address<int32_t>(std::get<1>(a)), std::get<2>(a)};
}

using Norms = std::tuple<double, double, bool, bool>;  // eps1, eps2, train1, train2
using Momenta = std::tuple<double, double>;            // of both norms' running statistics

template <class T>
Layer<T> layer(const Addresses& a, const Norms& n) {
  return {address<T>(a.at(0)), address<T>(a.at(1)), address<T>(a.at(2)), address<T>(a.at(3)),
          address<T>(a.at(4)), address<T>(a.at(5)), address<T>(a.at(6)), address<T>(a.at(7)),
          address<T>(a.at(8)), address<T>(a.at(9)), T(std::get<0>(n)),   T(std::get<1>(n)),
          std::get<2>(n),      std::get<3>(n)};
}

// A linear map: addresses of its weight and bias (0: none), features in and out.
using DenseArguments = std::tuple<uintptr_t, uintptr_t, int, int>;

template <class T>
std::vector<Dense<T>> dense(const std::vector<DenseArguments>& a) {
  if (a.size() > size_t(kMostLayers)) throw nb::value_error("too many layers in the readout");
  std::vector<Dense<T>> layers;
  for (const auto& [weight, bias, in, out] : a) layers.push_back({address<T>(weight), address<T>(bias), in, out});
  return layers;
}

// Statistics that processes share: addresses of the messages (none where no norm is shared), and what exchanges them,
// which takes the GIL for itself. After its first error it is not called again, and the error is raised at the end.
class Exchange {
 public:
  Exchange(const Addresses& messages, nb::handle call) : call_(call) {
    if (!messages.empty()) joint_ = {{address<double>(messages.at(0)), address<double>(messages.at(1))}, &run, this};
  }
  const Joint& joint() const { return joint_; }
  void finish() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static bool run(void* self, int norm) {
    auto* mine = static_cast<Exchange*>(self);
    if (mine->error_) return false;
    nb::gil_scoped_acquire gil;
    try {
      mine->call_(norm);
    } catch (...) {
      mine->error_ = std::current_exception();
    }
    return !mine->error_;
  }
  nb::handle call_;
  Joint joint_{};
  std::exception_ptr error_;
};

template <class T>
void bind(nb::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string(stem) + suffix; };
  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  m.attr(name("width").c_str()) = kernels<T>().width;
  m.attr(name("lanes").c_str()) = kernels<T>().lanes;
  m.def(name("edge_shells").c_str(), [](uintptr_t shell_of, uintptr_t shell_distance, uintptr_t shell_count,
                                        const Addresses& e, Sizes s, Basis b, int threads) {
    kernels<T>().edge_shells(address<int32_t>(shell_of), address<T>(shell_distance), address<int32_t>(shell_count),
                             edges<T>(e, s, b), threads);
  }, nogil);
  m.def(name("edge_moments").c_str(), [](uintptr_t in_degree, uintptr_t by_receiver, uintptr_t by_sender,
                                         uintptr_t sum, uintptr_t gram, uintptr_t weight, const Addresses& e, Sizes s, Basis b,
                                         int threads) {
    kernels<T>().edge_moments(address<T>(in_degree), address<T>(by_receiver), address<T>(by_sender),
                              address<double>(sum), address<double>(gram), address<T>(weight), edges<T>(e, s, b), threads);
  }, nogil);
  m.def(name("conv").c_str(), [](uintptr_t out, uintptr_t messages, uintptr_t products, FeatureArguments h, const Addresses& l, Norms n,
                                 const Addresses& running, Momenta momenta, const Addresses& e, Sizes s, Basis b,
                                 const Addresses& mo, const Addresses& shared, nb::handle call, int width, int threads) {
    Exchange exchange(shared, call);
    const Running<T> moves{address<T>(running.at(0)), address<T>(running.at(1)), address<T>(running.at(2)),
                           address<T>(running.at(3)), T(std::get<0>(momenta)), T(std::get<1>(momenta))};
    kernels<T>().conv(address<T>(out), address<T>(messages), address<T>(products), features<T>(h), layer<T>(l, n), moves,
                      edges<T>(e, s, b), moments<T>(mo), exchange.joint(), width, threads);
    exchange.finish();
  }, nogil);
  m.def(name("conv_backward").c_str(), [](const Addresses& d, uintptr_t grad, FeatureArguments h, uintptr_t messages,
                                          uintptr_t products,
                                          const Addresses& l, Norms n, const Addresses& e, Sizes s, Basis b,
                                          const Addresses& mo, const Addresses& shared, nb::handle call, int width,
                                          int threads) {
    Exchange exchange(shared, call);
    const Gradients<T> gradients{address<T>(d.at(0)), address<T>(d.at(1)), address<T>(d.at(2)), address<T>(d.at(3)),
                                 address<T>(d.at(4)), address<T>(d.at(5)), address<T>(d.at(6)), address<T>(d.at(7))};
    kernels<T>().conv_backward(gradients, address<T>(grad), features<T>(h), address<T>(messages), address<T>(products),
                               layer<T>(l, n), edges<T>(e, s, b), moments<T>(mo), exchange.joint(), width, threads);
    exchange.finish();
  }, nogil);
  m.def(name("stack").c_str(), [](uintptr_t out, FeatureArguments h, const std::vector<Addresses>& l,
                                  const std::vector<Norms>& n, bool shared, const Addresses& e, Sizes s, Basis b,
                                  int width, int threads) {
    std::vector<Layer<T>> layers;
    for (size_t t = 0; t < l.size(); ++t) layers.push_back(layer<T>(l[t], n.at(t)));
    kernels<T>().stack(address<T>(out), features<T>(h), layers.data(), int(layers.size()), shared, edges<T>(e, s, b),
                       width, threads);
  }, nogil);
  m.def(name("readout").c_str(), [](uintptr_t out, uintptr_t values, uintptr_t h, uintptr_t row_weight, uintptr_t crystal_ptr,
                                    int64_t n_crystals, const std::vector<DenseArguments>& r, int threads) {
    const auto layers = dense<T>(r);
    kernels<T>().readout(address<T>(out), address<T>(values), address<T>(h), address<T>(row_weight),
                         address<int32_t>(crystal_ptr), n_crystals, layers.data(), int(layers.size()), threads);
  }, nogil);
  m.def(name("readout_backward").c_str(), [](const std::vector<std::tuple<uintptr_t, uintptr_t>>& d, uintptr_t d_h,
                                             uintptr_t grad, uintptr_t values, uintptr_t row_weight, uintptr_t crystal_ptr,
                                             int64_t n_crystals, const std::vector<DenseArguments>& r, int threads) {
    const auto layers = dense<T>(r);
    std::vector<DenseGradient<T>> gradients;
    for (const auto& [weight, bias] : d) gradients.push_back({address<T>(weight), address<T>(bias)});
    kernels<T>().readout_backward(gradients.data(), address<T>(d_h), address<T>(grad), address<T>(values),
                                  address<T>(row_weight), address<int32_t>(crystal_ptr), n_crystals, layers.data(),
                                  int(layers.size()), threads);
  }, nogil);
  m.def(name("network").c_str(), [](uintptr_t out, FeatureArguments h, const std::vector<DenseArguments>& embedding,
                                    const std::vector<Addresses>& l, const std::vector<Norms>& n, bool shared,
                                    const Addresses& e, Sizes s, Basis b, uintptr_t row_weight,
                                    const std::vector<DenseArguments>& r, int width, int threads) {
    std::vector<Layer<T>> layers;
    for (size_t t = 0; t < l.size(); ++t) layers.push_back(layer<T>(l[t], n.at(t)));
    const auto first = dense<T>(embedding), last = dense<T>(r);
    kernels<T>().network(address<T>(out), features<T>(h), first.empty() ? nullptr : first.data(), layers.data(),
                         int(layers.size()), shared, edges<T>(e, s, b), address<T>(row_weight), last.data(),
                         int(last.size()), width, threads);
  }, nogil);
}

// First fault of a batch of graphs as (kind, position); kind 0: none. What the kernels rely on, so that no index can
// leave its array and no two threads meet in one crystal.
std::tuple<int, int64_t> check_graph(const Addresses& a, Sizes sizes) {
  const auto* sender = address<int32_t>(a.at(2));
  const auto* row_ptr = address<int32_t>(a.at(3));
  const auto* crystal_ptr = address<int32_t>(a.at(4));
  const auto* shell_count = address<int32_t>(a.at(7));
  const auto [n_rows, n_edges, n_crystals, n_features] = sizes;
  if (row_ptr[0] != 0 || row_ptr[n_rows] != n_edges) return {1, n_rows};
  if (crystal_ptr[0] != 0 || crystal_ptr[n_crystals] != n_rows) return {3, n_crystals};
  for (int64_t c = 0; c < n_crystals; ++c)
    if (crystal_ptr[c + 1] < crystal_ptr[c] || crystal_ptr[c + 1] > n_rows) return {3, c};
  for (int64_t i = 0; i < n_rows; ++i)
    if (row_ptr[i + 1] < row_ptr[i] || row_ptr[i + 1] > n_edges) return {1, i};
  const int64_t stray = chosen->f32.stray_edge(sender, row_ptr, crystal_ptr, n_crystals);
  if (stray >= 0) return {2, stray};
  if (!shell_count) return {0, 0};
  const int64_t crystal =
      chosen->f32.stray_shell(address<int32_t>(a.at(5)), shell_count, row_ptr, crystal_ptr, n_crystals);
  if (crystal >= 0) return {4, crystal};
  return {0, 0};
}

// The first crystal whose rows do not follow those of the one before, or -1.
int64_t check_crystals(uintptr_t crystal_ptr_, int64_t n_crystals, int64_t n_rows) {
  const auto* crystal_ptr = address<int32_t>(crystal_ptr_);
  if (crystal_ptr[0] != 0) return 0;
  for (int64_t c = 0; c < n_crystals; ++c)
    if (crystal_ptr[c + 1] < crystal_ptr[c] || crystal_ptr[c + 1] > n_rows) return c;
  return crystal_ptr[n_crystals] == n_rows ? -1 : n_crystals;
}

// The first row whose species is not in a table of n_table rows, or -1.
int64_t check_species(uintptr_t species_, int64_t n_rows, int64_t n_table) {
  const auto* species = address<int32_t>(species_);
  for (int64_t i = 0; i < n_rows; ++i)
    if (species[i] < 0 || species[i] >= n_table) return i;
  return -1;
}

// Rows, edges and atoms of some graphs together, from where each graph of their store begins in its arrays.
std::tuple<int64_t, int64_t, int64_t> graph_sizes(const Addresses& firsts, uintptr_t crystals, int64_t n_crystals) {
  int64_t sums[3] = {};
  for (int k = 0; k < 3; ++k) {
    const auto* first = address<int64_t>(firsts.at(k));
    for (int64_t c = 0; c < n_crystals; ++c) {
      const int64_t i = address<int64_t>(crystals)[c];
      sums[k] += first[i + 1] - first[i];
    }
  }
  return {sums[0], sums[1], sums[2]};
}

// Graphs of a store joined by a thread that never takes Python's lock, or by whoever wants them before it has begun, as on a
// machine whose cores are busy. Addresses are in the order of the fields of Joined and Stored; `owners` keep the arrays.
class Packing {
 public:
  Packing(const Addresses& out, const Addresses& a, uintptr_t crystals, int64_t n_crystals, nb::object owners)
      : owners_(std::move(owners)), work_(std::make_shared<Work>()), done_(work_->done.get_future()) {
    work_->joined = {address<int32_t>(out.at(0)), address<float>(out.at(1)),   address<int32_t>(out.at(2)),
                     address<int32_t>(out.at(3)), address<int32_t>(out.at(4)), address<float>(out.at(5)),
                     address<int32_t>(out.at(6))};
    work_->store = {address<int64_t>(a.at(0)), address<int64_t>(a.at(1)), address<int64_t>(a.at(2)),
                    address<uint8_t>(a.at(3)), address<float>(a.at(4)),   address<int32_t>(a.at(5)),
                    address<int32_t>(a.at(6)), address<float>(a.at(7)),   address<int32_t>(a.at(8))};
    work_->crystals = address<int64_t>(crystals);
    work_->n_crystals = n_crystals;
  }
  ~Packing() {
    if (work_->begun.exchange(true)) done_.wait();
  }
  void start() {
    std::thread([work = work_] { work->run_once(); }).detach();
  }
  void finish() {
    if (!work_->run_once()) done_.wait();
  }

 private:
  struct Work {
    Joined joined;
    Stored store;
    const int64_t* crystals;
    int64_t n_crystals;
    std::atomic<bool> begun{false};
    std::promise<void> done;
    bool run_once() {
      if (begun.exchange(true)) return false;
      chosen->f32.pack(joined, store, crystals, n_crystals);
      done.set_value();
      return true;
    }
  };
  nb::object owners_;
  std::shared_ptr<Work> work_;
  std::future<void> done_;
};

}  // namespace

NB_MODULE(_core, m) {
  chosen = choose_level();
  bind<float>(m, "_f32");
  bind<double>(m, "_f64");
  m.def("check_graph", &check_graph);
  m.def("check_crystals", &check_crystals);
  m.def("check_species", &check_species);
  m.def("graph_sizes", &graph_sizes);
  nb::class_<Packing>(m, "Packing")
      .def(nb::init<const Addresses&, const Addresses&, uintptr_t, int64_t, nb::object>())
      .def("start", &Packing::start)
      .def("finish", &Packing::finish, nb::call_guard<nb::gil_scoped_release>());
  m.def("simd_level", [] { return std::string(chosen->name); });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const Level* usable : usable_levels()) names.emplace_back(usable->name);
    return names;
  });
  m.attr("compiler") = SRCGCNN_COMPILER;
  m.attr("cuda") = SRCGCNN_CUDA_BUILD;
#ifdef SRCGCNN_WITH_CUDA
  bind_cuda(m);
#endif
#if defined(SRCGCNN_TEAM)
  m.attr("threads") = "the package's own";
#elif defined(_OPENMP)
  m.attr("threads") = "OpenMP";
#else
  m.attr("threads") = "";
#endif
}
