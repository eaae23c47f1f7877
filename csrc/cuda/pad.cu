// The kernel and the launchers of pad.h.
#include "pad.h"

#include <string.h>

#include "device.cuh"

namespace srcgcnn {
namespace {

constexpr int kThreads = 256, kMostParts = 1024;

// Numbers of a field in a batch of these sizes.
SRCGCNN_HOST_DEVICE int64_t count_of(const BatchPadding& p, int field, int64_t rows, int64_t edges, int64_t crystals) {
  switch (field) {
    case kNumbers:
    case kWeight: return rows;
    case kDistance:
    case kSender: return edges;
    case kRowPtr: return rows + 1;
    case kCrystalPtr: return crystals + 1;
    case kAtomFeatures: return rows * p.n_atom;
    default: return edges * p.n_edge;
  }
}

// Number k of what a field is padded with. The first rows have an edge more than the others, where edges do not divide.
SRCGCNN_HOST_DEVICE uint32_t padding(const BatchPadding& p, int field, int64_t k) {
  switch (field) {
    case kNumbers: return 1;
    case kWeight: return uint32_t(p.weight);
    case kDistance: return 0x3f800000;  // 1; any that is a distance
    case kCrystalPtr: return uint32_t(p.to_rows);
    case kAtomFeatures:
    case kEdgeFeatures: return 0;
  }
  const uint32_t n = uint32_t(k), rows = uint32_t(p.to_rows - p.n_rows), edges = uint32_t(p.to_edges - p.n_edges);
  const uint32_t degree = edges / rows, longer = edges - rows * degree;
  if (field == kRowPtr) return uint32_t(p.n_edges) + (n + 1) * degree + (n < longer ? n + 1 : longer);
  const uint32_t of_longer = longer * (degree + 1);
  return uint32_t(p.n_rows) + (n < of_longer ? n / (degree + 1) : longer + (n - of_longer) / degree);
}

}  // namespace

// A block takes a part of one field.
__global__ void __launch_bounds__(kThreads) pad(const __grid_constant__ BatchPadding p) {
  const int field = int(blockIdx.x) % kBatchFields;
  uint32_t* to = p.to[field];
  if (!to) return;
  const uint32_t* from = p.from[field];
  const int64_t given = count_of(p, field, p.n_rows, p.n_edges, p.n_crystals);
  const int64_t all = count_of(p, field, p.to_rows, p.to_edges, p.to_crystals);
  const int64_t step = int64_t(gridDim.x) / kBatchFields * kThreads;
  for (int64_t i = int64_t(blockIdx.x) / kBatchFields * kThreads + threadIdx.x; i < all; i += step)
    to[i] = i < given ? from[i] : padding(p, field, i - given);
}

}  // namespace srcgcnn

using namespace srcgcnn;

extern "C" const char* srcgcnn_cuda_pad(const BatchPadding* given, void* stream) {
  int64_t most = 0;
  for (int field = 0; field < kBatchFields; ++field) {
    const int64_t count = count_of(*given, field, given->to_rows, given->to_edges, given->to_crystals);
    if (given->to[field] && count > most) most = count;
  }
  const int64_t parts = (most + kThreads - 1) / kThreads;
  SRCGCNN_LAUNCH(pad, unsigned((parts < kMostParts ? parts : kMostParts) * kBatchFields), kThreads, 0, stream, *given);
  return message(cudaGetLastError());
}

extern "C" const char* srcgcnn_cuda_send(const BatchPadding* given, void* there, const void* here, int64_t size,
                                         void* event, void* stream) {
  const BatchPadding& p = *given;
  cudaError_t error = cudaEventSynchronize(static_cast<cudaEvent_t>(event));
  if (error) return message(error);
  for (int field = 0; field < kBatchFields; ++field) {
    if (!p.to[field]) continue;
    const int64_t given_numbers = count_of(p, field, p.n_rows, p.n_edges, p.n_crystals);
    const int64_t all = count_of(p, field, p.to_rows, p.to_edges, p.to_crystals);
    if (given_numbers) memcpy(p.to[field], p.from[field], size_t(given_numbers) * 4);
    for (int64_t i = given_numbers; i < all; ++i) p.to[field][i] = padding(p, field, i - given_numbers);
  }
  error = cudaMemcpyAsync(there, here, size_t(size), cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
  if (!error) error = cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream));
  return message(error);
}
