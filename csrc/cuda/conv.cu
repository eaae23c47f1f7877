// The launchers of conv.cuh, gram.cuh and rows.cuh.
#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "conv.cuh"
#include "gram.cuh"
#include "rows.cuh"

namespace srcgcnn {
namespace {

// The current device, and what a block may have of its shared memory.
struct Device {
  int processors, shared;

  const char* ask() {
    int device = 0, reserved = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (!error) error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    shared -= reserved;
    return message(error);
  }
};

// More shared memory than every kernel may have without asking: asked for once for each kernel and device.
template <class Kernel>
const char* allow(Kernel kernel, int size) {
  if (size <= (48 << 10)) return nullptr;
  static std::mutex mutex;
  static std::vector<std::pair<Kernel, int>> allowed;
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  const std::lock_guard<std::mutex> lock(mutex);
  if (error || std::find(allowed.begin(), allowed.end(), std::make_pair(kernel, number)) != allowed.end())
    return message(error);
  Device device;
  if (const char* wrong = device.ask()) return wrong;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
  if (!error) allowed.emplace_back(kernel, number);
  return message(error);
}

template <class Kernel>
const char* launch(Kernel kernel, int64_t blocks, int numbers, const DeviceConv& given, void* stream,
                   int n_threads = kThreads) {
  const int size = (numbers + 3) / 4 * 16;
  if (const char* wrong = allow(kernel, size)) return wrong;
  SRCGCNN_LAUNCH(kernel, unsigned(blocks), n_threads, size, stream, given);
  return message(cudaGetLastError());
}

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t chunks(const DeviceConv& g) { return g.width / kChunk; }
// Of gate_sum: shares of the rows, of all chunks, for which a GPU has room at a time. Its bits do not depend on them.
int64_t shares(const DeviceConv& g) {
  Device device = {};
  device.ask();  // an error of it is one of the launch
  const int64_t n = chunks(g), room = n ? kGateBlocks * device.processors / n : 0;
  return n * std::min(parts(g.n_rows, kWarps * kQuads), std::max<int64_t>(room, 1));
}
int64_t threads(int64_t n) {  // blocks of a kernel whose threads share out n numbers
  const int64_t blocks = parts(n, kThreads), most = 8192;
  return blocks < most ? blocks : most;
}

constexpr int kGram = kTerms * kTerms;
static_assert(kWarps * kRecord <= kGram, "sums take the edges' place");

}  // namespace
}  // namespace srcgcnn

using namespace srcgcnn;

#define SRCGCNN_LAUNCHER_OF(name, kernel, blocks, numbers)                             \
  extern "C" const char* srcgcnn_cuda_##name(const DeviceConv* given, void* stream) { \
    const DeviceConv& g = *given;                                                     \
    return launch(kernel, blocks, numbers, g, stream);                                \
  }
#define SRCGCNN_LAUNCHER(name, blocks, numbers) SRCGCNN_LAUNCHER_OF(name, name, blocks, numbers)
#define SRCGCNN_LAUNCHER_BY_STORAGE(name, blocks, numbers) \
  SRCGCNN_LAUNCHER_OF(name, (g.half ? name<true> : name<false>), blocks, numbers)
SRCGCNN_LAUNCHER(edge_sum, threads(32 * g.n_rows), 0)
SRCGCNN_LAUNCHER(edge_gram, parts(g.n_features, kTerms) * g.programs * parts(g.n_features, kTerms), kGram)
SRCGCNN_LAUNCHER(column_sums, chunks(g) * g.programs, 2 * kSamples + 4 * kThreads)
SRCGCNN_LAUNCHER(neighbors, counts_of(g.n_rows), 2 * kSamples + 4 * kThreads + int(g.F))
SRCGCNN_LAUNCHER_BY_STORAGE(gate_sum, shares(g),
                            kVectors + kNorms + kWarps * (g.half ? kGateTile<Bfloat16> : kGateTile<float>))
SRCGCNN_LAUNCHER(finish, chunks(g) * g.programs, 0)
SRCGCNN_LAUNCHER(finish_backward, chunks(g) * g.programs, 4 * kWarps * 32)
SRCGCNN_LAUNCHER(correct, parts(g.columns, kChunk) * g.programs, 0)
SRCGCNN_LAUNCHER_BY_STORAGE(backward_receivers, chunks(g) * g.programs * parts(g.n_features, kTerms), kVectors + kWarps * kReceivers)
extern "C" const char* srcgcnn_cuda_backward_senders(const DeviceConv* given, void* stream) {
  const DeviceConv& g = *given;
  const int tile = g.half ? kSenderTile<Bfloat16> : kSenderTile<float>;
  return launch(g.half ? backward_senders<true> : backward_senders<false>, chunks(g) * parts(g.n_rows, kSenderRows),
                kVectors + kCorrection + kSenders + kSenderWarps * tile, g, stream, 32 * kSenderWarps);
}

#include "layer.h"
