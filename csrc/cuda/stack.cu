// The launchers of stack.cuh for one width (SRCGCNN_WIDTH), each its own translation unit.
#include "stack.cuh"

namespace srcgcnn {
namespace {

constexpr int W = SRCGCNN_WIDTH;

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// As many rows as the shape takes, in whole tiles, and terms of half as many distances, or more.
template <int kWarps>
Places<W> places_in(int numbers) {
  Places<W> p;
  p.rows = Shape<W, kWarps>::rows;
  for (;; p.rows -= 16) {
    const int shells = (numbers - Places<W>::fixed - p.rows * Places<W>::per_row) / Places<W>::per_shell;
    p.shells = shells < 0 ? 0 : shells > kMostShells ? kMostShells : shells / 2 * 2;
    if (2 * p.shells >= p.rows || p.rows == 16) return p;
  }
}

int bytes(const Places<W>& p) {
  return 4 * (p.rows * Places<W>::per_row + p.shells * Places<W>::per_shell + Places<W>::fixed);
}

struct Device {
  int processors;
  Places<W> small, large;

  const char* ask() {
    int device = 0, per_processor = 0, reserved = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (!error) error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    if (error) return message(error);
    small = places_in<kSmall>((per_processor / Shape<W, kSmall>::blocks - reserved) / 4);
    large = places_in<kLarge>((per_processor / Shape<W, kLarge>::blocks - reserved) / 4);
    return nullptr;
  }
};

Prepared<W> layout(int n_features, int n_steps, bool shared) { return {n_features, shared ? 1 : n_steps, n_steps}; }

template <class Kernel, class... Arguments>
const char* launch(Kernel kernel, int64_t blocks, int threads, int size, void* stream, Arguments... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size);
  if (error) return message(error);
  SRCGCNN_LAUNCH(kernel, unsigned(blocks), threads, size, stream, arguments...);
  return message(cudaGetLastError());
}

// Crystals with more than `least` and at most `places.rows` rows.
template <int kWarps>
const char* run_whole(Stack<W> s, const Places<W>& places, int least, int processors, void* stream) {
  const int64_t rows = s.g.n_rows, most = int64_t(processors) * Shape<W, kWarps>::blocks;
  s.places = places;
  s.least = least;
  // Few rows: a task for every block. Many: tasks of several blocks' rows, whose last block is seldom half empty.
  const int64_t share = (rows + most - 1) / most, large = 4 * places.rows;
  s.rows_per_task = int(share < large ? share : large);
  s.n_tasks = int((rows + s.rows_per_task - 1) / s.rows_per_task);
  return launch(whole_crystals<W, kWarps>, s.n_tasks < most ? s.n_tasks : most, Shape<W, kWarps>::threads,
                bytes(places), stream, s);
}

// Sizes are known on the device alone: where a crystal of a class may be there, its kernels look for it.
const char* run(Stack<W> s, const Device& device, void* stream) {
  const int64_t rows = s.g.n_rows, least = s.g.n_crystals > 1 ? 0 : rows;  // the largest crystal has at least so many
  const char* error = nullptr;
  if (least <= device.small.rows)
    error = run_whole<kSmall>(s, device.small, -1, device.processors, stream);
  if (!error && rows > device.small.rows && least <= device.large.rows)
    error = run_whole<kLarge>(s, device.large, device.small.rows, device.processors, stream);
  if (rows <= device.large.rows) return error;
  s.places = device.small;
  s.least = device.large.rows;
  const int64_t tiles = (rows + s.places.rows - 1) / s.places.rows, most = device.processors * Shape<W, kSmall>::blocks;
  const auto layer = [&](auto kernel, int t) {
    return launch(kernel, tiles < most ? tiles : most, Shape<W, kSmall>::threads, bytes(s.places), stream, s, t);
  };
  for (int t = 0; t < s.n_steps && !error; ++t) {
    error = layer(layer_of_crystals<W, false>, t);
    if (!error) error = layer(layer_of_crystals<W, true>, t);
  }
  return error;
}

}  // namespace
}  // namespace srcgcnn

using namespace srcgcnn;

#define SRCGCNN_JOIN_(a, b) a##b
#define SRCGCNN_JOIN(a, b) SRCGCNN_JOIN_(a, b)
#define SRCGCNN_NAME(stem) SRCGCNN_JOIN(srcgcnn_cuda_##stem##_, SRCGCNN_WIDTH)

extern "C" const char* SRCGCNN_NAME(image)() {
  cudaFuncAttributes found;
  return message(cudaFuncGetAttributes(&found, whole_crystals<W, kSmall>));
}

extern "C" int64_t SRCGCNN_NAME(prepared_size)(int n_features, int n_steps, bool shared) {
  return layout(n_features, n_steps, shared).size();
}

extern "C" int64_t SRCGCNN_NAME(filter_at)() { return Prepared<W>::nodes_size; }

extern "C" const char* SRCGCNN_NAME(scratch_size)(int64_t* size, int64_t n_rows) {
  Device device;
  const char* error = device.ask();
  if (!error) *size = n_rows > device.large.rows ? n_rows * 2 * W : 0;
  return error;
}

extern "C" const char* SRCGCNN_NAME(prepare)(float* prepared, const DeviceLayer* layers, int n_steps, bool shared, int F,
                                             const DeviceGraph* graph, void* stream) {
  const auto at = layout(graph->n_features, n_steps, shared);
  const char* error = message(cudaMemsetAsync(prepared + at.bad(), 0, 4, static_cast<cudaStream_t>(stream)));
  for (int first = 0; first < n_steps && !error; first += kLayersAtOnce) {
    const int count = n_steps - first < kLayersAtOnce ? n_steps - first : kLayersAtOnce;
    Layers some = {};
    for (int l = 0; l < count; ++l) some.of[l] = layers[first + l];
    SRCGCNN_LAUNCH(prepare<W>, 64, 256, 0, stream, prepared, at, some, first, count, F, *graph);
    error = message(cudaGetLastError());
  }
  return error;
}

extern "C" const char* SRCGCNN_NAME(stack)(float* out, float* scratch, const DeviceFeatures* h, const float* prepared,
                                           int n_steps, bool shared, int F, bool relaxed, const DeviceGraph* graph,
                                           void* stream) {
  Device device;
  const char* error = device.ask();
  if (error) return error;
  const Stack<W> s{out, scratch, prepared, *h, *graph, layout(graph->n_features, n_steps, shared), {}, F, n_steps, 0, relaxed, 0, 0};
  return run(s, device, stream);
}
