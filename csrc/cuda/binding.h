// The CUDA kernels as Python calls them; included by module.cpp where they are built. An error of CUDA's is raised.
#pragma once
#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "conv.h"
#include "pad.h"
#include "stack.h"

namespace srcgcnn {

inline void raise_if(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

// CUDA that the driver supports (0: there is none) and that the kernels were built with, as 1000 major + 10 minor.
inline std::tuple<int, int> cuda_versions() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

// Why there are no kernels for the current device; empty if there are. Throws what may pass, such as a lack of memory.
inline std::string cuda_image_problem() {
  const char* error = srcgcnn_cuda_image_64();
  if (!error) return "";
  for (auto lasting : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorUnsupportedPtxVersion})
    if (std::string(error) == cudaGetErrorString(lasting)) return error;
  raise_if(error);
  return "";
}

struct StackFunctions {
  int width;
  decltype(&srcgcnn_cuda_prepared_size_64) prepared_size;
  decltype(&srcgcnn_cuda_filter_at_64) filter_at;
  decltype(&srcgcnn_cuda_scratch_size_64) scratch_size;
  decltype(&srcgcnn_cuda_prepare_64) prepare;
  decltype(&srcgcnn_cuda_stack_64) stack;
};
#define SRCGCNN_STACK_FUNCTIONS(W)                                                                                  \
  {W, srcgcnn_cuda_prepared_size_##W, srcgcnn_cuda_filter_at_##W, srcgcnn_cuda_scratch_size_##W, \
   srcgcnn_cuda_prepare_##W, srcgcnn_cuda_stack_##W}
inline const StackFunctions& stack_functions(int width) {
  static const StackFunctions all[] = {SRCGCNN_STACK_FUNCTIONS(32), SRCGCNN_STACK_FUNCTIONS(64),
                                       SRCGCNN_STACK_FUNCTIONS(128)};
  for (const auto& one : all)
    if (one.width == width) return one;
  throw std::runtime_error("no CUDA kernels of this width");
}

// graph: distance, term of the edges, sender, row_ptr, crystal_ptr.
inline DeviceGraph device_graph(const std::vector<uintptr_t>& a, const std::tuple<int64_t, int64_t, int64_t, int>& s,
                                const std::tuple<double, double>& basis) {
  return {reinterpret_cast<const float*>(a.at(0)),   reinterpret_cast<const void*>(a.at(1)),
          reinterpret_cast<const int32_t*>(a.at(2)), reinterpret_cast<const int32_t*>(a.at(3)),
          reinterpret_cast<const int32_t*>(a.at(4)), std::get<0>(s),
          std::get<1>(s),                            std::get<2>(s),
          std::get<3>(s),                            float(std::get<0>(basis)),
          float(std::get<1>(basis))};
}

// F, steps, features of an edge, precision, shared, rows and columns of the table that is embedded, then of the readout F
// and what each map gives; none of these: the rows leave.
inline DevicePlan device_plan(const std::vector<int>& p) {
  DevicePlan plan{p.at(0), p.at(1), p.at(2), p.at(3), p.at(4), p.at(5), p.at(6), int(p.size()) - 8, {}};
  if (plan.n_readout > kMostReadout) throw std::runtime_error("too many layers in the readout");
  for (int l = 0; l <= plan.n_readout; ++l) plan.readout[l] = p.at(7 + l);
  return plan;
}

// Pointers and sizes in the order of DeviceConv.
inline DeviceConv device_conv(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes) {
  DeviceConv given = {};
  constexpr size_t n_pointers = offsetof(DeviceConv, n_rows) / sizeof(void*);
  constexpr size_t n_sizes = (offsetof(DeviceConv, dmin) - offsetof(DeviceConv, n_rows)) / sizeof(int64_t);
  if (pointers.size() != n_pointers || sizes.size() != n_sizes) throw std::runtime_error("not the fields of DeviceConv");
  std::memcpy(static_cast<void*>(&given), pointers.data(), n_pointers * sizeof(void*));
  std::memcpy(&given.n_rows, sizes.data(), n_sizes * sizeof(int64_t));
  return given;
}

// A function of conv.h by its name; numbers in the order of DeviceConv, too.
inline void conv_function(const std::string& name, const std::vector<uintptr_t>& pointers,
                          const std::vector<int64_t>& sizes, const std::vector<double>& numbers, uintptr_t stream) {
  DeviceConv given = device_conv(pointers, sizes);
  float* const to[] = {&given.dmin, &given.inverse_step, &given.eps, &given.eps1, &given.momentum1, &given.momentum2};
  if (numbers.size() != sizeof(to) / sizeof(*to)) throw std::runtime_error("not the fields of DeviceConv");
  for (size_t k = 0; k < numbers.size(); ++k) *to[k] = float(numbers[k]);
#define SRCGCNN_CONV_CALL(function) \
  if (name == #function) return raise_if(srcgcnn_cuda_##function(&given, reinterpret_cast<void*>(stream)));
  SRCGCNN_CONV_FUNCTIONS(SRCGCNN_CONV_CALL)
  throw std::runtime_error("no CUDA kernel of this name: " + name);
}

// Addresses of the fields of a batch and of what they are copied to, then sizes in the order of BatchPadding.
inline BatchPadding batch_padding(const std::vector<uintptr_t>& from, const std::vector<uintptr_t>& to,
                                  const std::vector<int64_t>& sizes) {
  BatchPadding given = {};
  for (size_t k = 0; k < kBatchFields; ++k) {
    given.from[k] = reinterpret_cast<const uint32_t*>(from.at(k));
    given.to[k] = reinterpret_cast<uint32_t*>(to.at(k));
  }
  if (sizes.size() * sizeof(int64_t) != sizeof(BatchPadding) - offsetof(BatchPadding, n_rows))
    throw std::runtime_error("not the sizes of BatchPadding");
  std::memcpy(&given.n_rows, sizes.data(), sizes.size() * sizeof(int64_t));
  return given;
}

inline void bind_cuda(nanobind::module_& m) {
  using Addresses = std::vector<uintptr_t>;
  using Sizes = std::tuple<int64_t, int64_t, int64_t, int>;
  using Basis = std::tuple<double, double>;
  m.def("cuda_versions", &cuda_versions);
  m.def("cuda_image_problem", &cuda_image_problem);
  m.def("cuda_conv", &conv_function);
  m.def("cuda_space", [](const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes, int which) {
    const auto given = device_conv(pointers, sizes);
    return srcgcnn_cuda_space(&given, which);
  });
  m.def("cuda_pad", [](const Addresses& from, const Addresses& to, const std::vector<int64_t>& sizes, uintptr_t stream) {
    const auto given = batch_padding(from, to, sizes);
    raise_if(srcgcnn_cuda_pad(&given, reinterpret_cast<void*>(stream)));
  });
  m.def("cuda_send", [](const Addresses& from, const Addresses& to, const std::vector<int64_t>& sizes, uintptr_t there,
                        uintptr_t here, int64_t size, uintptr_t event, uintptr_t stream) {
    const auto given = batch_padding(from, to, sizes);
    raise_if(srcgcnn_cuda_send(&given, reinterpret_cast<void*>(there), reinterpret_cast<const void*>(here), size,
                               reinterpret_cast<void*>(event), reinterpret_cast<void*>(stream)));
  }, nanobind::call_guard<nanobind::gil_scoped_release>());
  using Plan = std::vector<int>;
  m.def("cuda_prepared_size", [](int width, const Plan& p) {
    const auto plan = device_plan(p);
    return stack_functions(width).prepared_size(&plan);
  });
  m.def("cuda_filter_at", [](int width, const Plan& p) {
    const auto plan = device_plan(p);
    return stack_functions(width).filter_at(&plan);
  });
  m.def("cuda_scratch_size", [](int width, const Plan& p, int64_t n_rows, int64_t n_crystals) {
    const auto plan = device_plan(p);
    int64_t size = 0;
    raise_if(stack_functions(width).scratch_size(&size, &plan, n_rows, n_crystals));
    return size;
  });
  // ends: the table, weight and bias of the embedding, then those of each map of the readout.
  m.def("cuda_prepare", [](int width, uintptr_t prepared, const Plan& p, const std::vector<Addresses>& layers,
                           const std::vector<Basis>& eps, const Addresses& ends, const Addresses& g, Sizes s, Basis b,
                           uintptr_t stream) {
    std::vector<DeviceLayer> given;
    for (size_t t = 0; t < layers.size(); ++t) {
      const auto q = [&](int k) { return reinterpret_cast<const float*>(layers[t].at(k)); };
      given.push_back({q(0), q(1), q(2), q(3), q(4), q(5), q(6), q(7), q(8), q(9), std::get<0>(eps.at(t)),
                       std::get<1>(eps.at(t))});
    }
    const auto at = [&](size_t k) { return reinterpret_cast<const float*>(ends.at(k)); };
    const auto plan = device_plan(p);
    const DeviceDense embedding{at(1), at(2)};
    std::vector<DeviceDense> readout;
    for (int l = 0; l < plan.n_readout; ++l) readout.push_back({at(3 + 2 * l), at(4 + 2 * l)});
    const auto graph = device_graph(g, s, b);
    raise_if(stack_functions(width).prepare(reinterpret_cast<float*>(prepared), &plan, given.data(), at(0), &embedding,
                                            readout.data(), &graph, reinterpret_cast<void*>(stream)));
  });
  m.def("cuda_stack", [](int width, uintptr_t out, uintptr_t scratch, std::tuple<uintptr_t, uintptr_t, int64_t> h,
                         uintptr_t row_weight, uintptr_t prepared, const Plan& p, const Addresses& g, Sizes s, Basis b,
                         uintptr_t stream) {
    const DeviceFeatures features{reinterpret_cast<const float*>(std::get<0>(h)),
                                  reinterpret_cast<const int32_t*>(std::get<1>(h)), std::get<2>(h)};
    const auto plan = device_plan(p);
    const auto graph = device_graph(g, s, b);
    raise_if(stack_functions(width).stack(reinterpret_cast<float*>(out), reinterpret_cast<float*>(scratch), &features,
                                          reinterpret_cast<const float*>(row_weight),
                                          reinterpret_cast<const float*>(prepared), &plan, &graph,
                                          reinterpret_cast<void*>(stream)));
  });
}

}  // namespace srcgcnn
