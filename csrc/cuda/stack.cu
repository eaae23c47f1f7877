// The launchers of stack.cuh for one width (SRCGCNN_WIDTH), each its own translation unit.
#include "stack.cuh"

namespace srcgcnn {
namespace {

constexpr int W = SRCGCNN_WIDTH;

// A block's shared memory, and the rows of it.
template <int kWarps, class T>
struct Room {
  using P = Places<W, T>;
  int words, most, together;

  // A crystal may fill a large one with rows, a small one while there is room for 10 distances to 4 rows. Several are joined
  // while there is room for 15 at first, then as their distances ask for: real crystals have 8, their symmetry quotients 20; a
  // distance without a place costs more than weights read more often.
  void take(int bytes) {
    constexpr int least = 16 * P::per_row + P::fixed;
    words = bytes / 16 * 4 > least ? bytes / 16 * 4 : least;
    most = together = Shape<W, kWarps>::rows;
    while (most > 16 && most * P::per_row + P::fixed > words) most -= 8;
    const auto leaves = [&](int rows, int for_four) { return 4 * P::of(rows, words).shells >= for_four * rows; };
    while (together > 16 && (together > most || !leaves(together, 15))) together -= 8;
    while (kWarps == kSmall && most > together && !leaves(most, 10)) most -= 8;
  }
};

template <class T>
struct Device {
  int processors;
  Room<kSmall, T> small;
  Room<kLarge, T> large;

  const char* ask() {
    int device = 0, per_processor = 0, reserved = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (!error) error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    if (error) return message(error);
    small.take(per_processor / Shape<W, kSmall>::blocks - reserved);
    large.take(per_processor / Shape<W, kLarge>::blocks - reserved);
    return nullptr;
  }
};

template <class Kernel, class... Arguments>
const char* launch(Kernel kernel, int64_t blocks, int threads, int size, void* stream, Arguments... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size);
  if (error) return message(error);
  SRCGCNN_LAUNCH(kernel, unsigned(blocks), threads, size, stream, arguments...);
  return message(cudaGetLastError());
}

// Numbers of a crystal between the readout's maps, in whole vectors; the smallest blocks have room for the widest.
int widest(const DevicePlan& plan) {
  int most = W;
  for (int l = 1; l < plan.n_readout; ++l) most = plan.readout[l] > most ? plan.readout[l] : most;
  return (most + 3) / 4 * 4;
}
static_assert(16 * (Places<W, Bfloat16>::pq_stride / 2 + 4 + 2 * kLinks) + 2 * kSlots >= kShares * (W + 1) + 2 * kWidestReadout, "");

// Of large crystals between their steps, in the scratch, up to where the widest vectors may begin.
int64_t features_size(const DevicePlan& plan, int64_t n_rows) { return (n_rows * plan.F + 3) / 4 * 4; }

// Of q, in numbers of 4 bytes; the list of parts follows, two numbers each, of which a crystal of n > 16 rows has up to n / 8.
template <class T>
int64_t q_size(int64_t n_rows) {
  return n_rows * Places<W, T>::words(2 * W);
}
int64_t list_size(int64_t n_rows) { return (n_rows / 4 + 3) / 4 * 4; }

// With more crystals than multiprocessors the readout's maps have a kernel of their own, which shares readings of their
// weights among crystals; with fewer, a block goes on to them, and there is one launch less.
bool maps_apart(const DevicePlan& plan, int64_t n_crystals, int processors) {
  return plan.n_readout > 0 && n_crystals > processors;
}

// Crystals with more than `least` rows that have room.
template <int kWarps, bool kHalf, class T>
const char* run_whole(Stack<W, kHalf> s, const Room<kWarps, T>& room, int least, Finding asked, int processors,
                      void* stream) {
  const int64_t rows = s.g.n_rows, most = int64_t(processors) * Shape<W, kWarps>::blocks;
  s.words = room.words;
  s.least = least;
  s.asked = asked;
  s.most = room.most;
  s.together = room.together;
  s.taken = kWarps == kSmall ? kSmallTasks : kLargeTasks;
  // Few rows: a task for every block. Many: tasks of several blocks' rows, whose last block is seldom half empty, and at the
  // end tasks of one, so that blocks end together.
  const int64_t share = (rows + most - 1) / most;
  s.narrow_rows = int(share < room.together ? (share ? share : 1) : room.together);
  s.wide_rows = 4 * room.together;
  const int64_t narrow = 8 * most * room.together;  // rows of these at the end
  s.wide_tasks = int(rows > narrow ? (rows - narrow) / s.wide_rows : 0);
  const int64_t left = rows - int64_t(s.wide_tasks) * s.wide_rows;
  s.n_tasks = s.wide_tasks + int(left ? (left + s.narrow_rows - 1) / s.narrow_rows : rows ? 0 : 1);
  return launch(whole_crystals<W, kWarps, kHalf>, s.n_tasks < most ? s.n_tasks : most, Shape<W, kWarps>::threads,
                4 * room.words, stream, s);
}

// Sizes are known on the device alone: where a crystal of a class may be there, its kernels ask whether it is.
template <bool kHalf, class T>
const char* run(Stack<W, kHalf> s, const Device<T>& device, void* stream) {
  const int64_t rows = s.g.n_rows, least = s.g.n_crystals > 1 ? 0 : rows;  // the largest crystal has at least so many
  const bool few = s.g.n_crystals <= device.processors;  // a multiprocessor for each: all of its warps
  const char* error = nullptr;
  if (!few && least <= device.small.most)
    error = run_whole<kSmall>(s, device.small, -1, kNothing, device.processors, stream);
  if (!error && (few || rows > device.small.most) && least <= device.large.most)
    error = run_whole<kLarge>(s, device.large, few ? -1 : device.small.most, few ? kNothing : kLargerThanSmall,
                              device.processors, stream);
  const int64_t most = device.processors * Shape<W, kSmall>::blocks;
  s.words = device.small.words;
  const auto start = [&](auto kernel, int64_t blocks, auto... more) {
    return launch(kernel, blocks < most ? blocks : most, Shape<W, kSmall>::threads, 4 * s.words, stream, s, more...);
  };
  const auto finish = [&](const char* error) {
    return error || !s.means ? error : start(maps_of_crystals<W, kHalf>, s.g.n_crystals);
  };
  if (rows <= device.large.most || error) return finish(error);
  s.together = device.small.together;
  s.least = device.large.most;
  s.asked = kLargerThanAny;
  const int64_t tiles = (rows + s.together - 1) / s.together;
  const int64_t lists = (s.g.n_crystals + 255) / 256;
  error = launch(list_parts<W, kHalf>, lists < most ? lists : most, 256, 0, stream, s);
  for (int t = 0; t < s.at.plan.n_steps && !error; ++t) {
    error = start(layer_of_crystals<W, false, kHalf>, tiles, t);
    if (!error) error = start(layer_of_crystals<W, true, kHalf>, tiles, t);
  }
  if (!error && s.out) error = start(readout_of_crystals<W, kHalf>, s.g.n_crystals);
  return finish(error);
}

bool is_half(const DevicePlan* plan) { return plan->precision == kBfloat16; }

// `what` with the type of what edges read.
template <class What>
auto with_storage(const DevicePlan* plan, What what) {
  return is_half(plan) ? what(Bfloat16{}) : what(float{});
}

template <bool kHalf>
const char* prepare_layers(float* prepared, const DevicePlan& plan, const DeviceLayer* layers, const float* table,
                           const DeviceDense* embedding, const DeviceDense* readout, const DeviceGraph& graph,
                           void* stream) {
  const Prepared<W, typename Storage<kHalf>::type> at{plan};
  Device<typename Storage<kHalf>::type> device;
  const char* error = device.ask();
  if (!error)
    error = message(cudaMemsetAsync(prepared + at.findings(), 0, 4 * kFindings, static_cast<cudaStream_t>(stream)));
  for (int first = 0; first < plan.n_steps && !error; first += kLayersAtOnce) {
    const int count = plan.n_steps - first < kLayersAtOnce ? plan.n_steps - first : kLayersAtOnce;
    Layers some = {};
    for (int l = 0; l < count; ++l) some.of[l] = layers[first + l];
    for (int l = 0; l < plan.n_readout; ++l) some.readout[l] = readout[l];
    if (plan.n_table) some.embedding = *embedding, some.table = table;
    SRCGCNN_LAUNCH((prepare<W, kHalf>), 128, 256, 5 * W * int(sizeof(float)), stream, prepared, at, some, first, count, graph,
                   device.small.most, device.large.most);
    error = message(cudaGetLastError());
  }
  return error;
}

template <bool kHalf>
const char* run_stack(float* out, float* scratch, const DeviceFeatures& h, const float* row_weight, const float* prepared,
                      const DevicePlan& plan, const DeviceGraph& graph, void* stream) {
  using T = typename Storage<kHalf>::type;
  Device<T> device;
  const char* error = device.ask();
  if (error) return error;
  const Prepared<W, T> at{plan};
  const bool reads_out = plan.n_readout >= 0;
  float* q = scratch + (reads_out ? features_size(plan, graph.n_rows) : 0);
  float* means = graph.n_rows > device.large.most ? q + q_size<T>(graph.n_rows) + list_size(graph.n_rows) : scratch;
  if (!maps_apart(plan, graph.n_crystals, device.processors)) means = nullptr;
  DeviceFeatures features = h;
  if (plan.n_table) features.data = prepared + at.table(), features.n_table = plan.n_table;
  const Stack<W, kHalf> s{reads_out ? scratch : out, reinterpret_cast<T*>(q), reads_out ? out : nullptr, row_weight,
                          prepared, features, graph, at, kNothing, 0, 0, 0, 0, widest(plan), 0, 0, 0, 0, kSmallTasks,
                          reinterpret_cast<int*>(const_cast<float*>(prepared) + at.counters()),
                          reinterpret_cast<int*>(q + q_size<T>(graph.n_rows)), means};
  if (graph.n_rows > device.processors || graph.n_rows > device.large.most)  // else a block has one task
    error = message(cudaMemsetAsync(s.counters, 0, 4 * kCounters, static_cast<cudaStream_t>(stream)));
  if (error) return error;
  return run<kHalf>(s, device, stream);
}

}  // namespace
}  // namespace srcgcnn

using namespace srcgcnn;

#define SRCGCNN_JOIN_(a, b) a##b
#define SRCGCNN_JOIN(a, b) SRCGCNN_JOIN_(a, b)
#define SRCGCNN_NAME(stem) SRCGCNN_JOIN(srcgcnn_cuda_##stem##_, SRCGCNN_WIDTH)

extern "C" const char* SRCGCNN_NAME(image)() {
  cudaFuncAttributes found;
  return message(cudaFuncGetAttributes(&found, whole_crystals<W, kSmall, false>));
}

extern "C" int64_t SRCGCNN_NAME(prepared_size)(const DevicePlan* plan) {
  return with_storage(plan, [&](auto type) { return Prepared<W, decltype(type)>{*plan}.size(); });
}

extern "C" int64_t SRCGCNN_NAME(filter_at)(const DevicePlan* plan) {
  return with_storage(plan, [](auto type) { return Prepared<W, decltype(type)>::nodes_size; });
}

extern "C" const char* SRCGCNN_NAME(scratch_size)(int64_t* size, const DevicePlan* plan, int64_t n_rows,
                                                  int64_t n_crystals) {
  return with_storage(plan, [&](auto type) {
    using T = decltype(type);
    Device<T> device;
    const char* error = device.ask();
    const int64_t features = plan->n_readout >= 0 ? features_size(*plan, n_rows) : 0;
    if (error) return error;
    *size = n_rows > device.large.most ? features + q_size<T>(n_rows) + list_size(n_rows) : 0;
    if (maps_apart(*plan, n_crystals, device.processors)) *size += n_crystals * W;
    return error;
  });
}

extern "C" const char* SRCGCNN_NAME(prepare)(float* prepared, const DevicePlan* plan, const DeviceLayer* layers,
                                             const float* table, const DeviceDense* embedding,
                                             const DeviceDense* readout, const DeviceGraph* graph, void* stream) {
  const auto prepare_them = is_half(plan) ? prepare_layers<true> : prepare_layers<false>;
  return prepare_them(prepared, *plan, layers, table, embedding, readout, *graph, stream);
}

extern "C" const char* SRCGCNN_NAME(stack)(float* out, float* scratch, const DeviceFeatures* h, const float* row_weight,
                                           const float* prepared, const DevicePlan* plan, const DeviceGraph* graph,
                                           void* stream) {
  const auto run_it = is_half(plan) ? run_stack<true> : run_stack<false>;
  return run_it(out, scratch, *h, row_weight, prepared, *plan, *graph, stream);
}
