// Inference: all convolutions of a crystal in one kernel, where its rows fit into shared memory, else layer by layer.
//
// z_ij = p_i + q_j + r_ij. A block takes the next crystals that have at most `rows` rows together through all steps:
// features, p and q of its rows and r of its distinct distances stay in shared memory. Small blocks, of which a
// multiprocessor holds two, so that one multiplies while the other gates, serve most crystals; large ones, alone, the rest. p and q come from the tensor cores
// and leave them scaled and shifted, in the units of gate2. A warp walks the edges of a row, each lane with its channels.
// Where the plan has a readout, a block ends with the mean of each of its crystals and its linear maps, and no row leaves.
// With kHalf what edges read (p, q, r and the filter) is bfloat16, and so are the factors of the rows' products.
// No result depends on what else is in the block: rows of a product are independent, a row's edges have an order, and so
// has a crystal's mean. An index that leaves its crystal is not followed; its row becomes NaN.
#pragma once
#include "device.cuh"
#include "stack.h"

namespace srcgcnn {

// Before sm_90 the compiler needs more registers for the same code.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif
constexpr int kSmall = 8, kLarge = 16;  // warps of a block
constexpr int kMostShells = 512;
constexpr int kSlots = 512, kProbes = 8;  // of the hash table of distances; one that finds no slot is left out
constexpr int kReach = 9;        // Gaussians in reach of a distance; those left out are below 2e-9
constexpr int kLinks = 12;       // edges of a row whose ends and distances are kept from step to step, at most
constexpr unsigned kEmpty = 0xffffffffu;

// A block of so many warps: how many a multiprocessor holds, and how many rows one takes at most, whose sums fill up to 48
// registers of a thread.
template <int W, int kWarps>
struct Shape {
  static constexpr int threads = 32 * kWarps, blocks = 16 / kWarps, rows = kWarps == kLarge ? (W == 128 ? 64 : 128) : W == 32 ? 64 : W == 64 ? 48 : 32;
  // Of a product, in tiles of 16 channels and 8 rows: all its channels, and those of a warp, at least two, so that they share
  // what is made of a row; where there are more warps, they share out the rows.
  static constexpr int channels = 4 * W / 16, mine = channels > 2 * kWarps ? channels / kWarps : 2;
  static constexpr int parts = channels / mine, shares = kWarps / parts, tiles = rows / 8 / shares;
};

// Places in shared memory, in numbers of 4 bytes, for a block with so many rows; distances take what they leave. The
// strides spread rows of a tile over the banks.
template <int W, class T>
struct Places {
  static SRCGCNN_HOST_DEVICE constexpr int words(int numbers) { return numbers * int(sizeof(T)) / 4; }
  static constexpr int h_stride = W + 16 / int(sizeof(T)), pq_stride = 4 * W + 8;  // the latter in T
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "a row of h is W + 4 or W + 8");
  static constexpr int per_row = h_stride + words(pq_stride) + 4 + kLinks, fixed = 2 * kSlots + 4, per_shell = words(2 * W) + 1;
  int rows, shells;

  static SRCGCNN_HOST_DEVICE Places of(int n, int words) {
    const int rows = n > 16 ? (n + 7) / 8 * 8 : 16, most = (words - fixed - rows * per_row) / per_shell;
    return {rows, most < 0 ? 0 : most > kMostShells ? kMostShells : most / 4 * 4};
  }
  SRCGCNN_HOST_DEVICE int pq() const { return rows * h_stride; }
  SRCGCNN_HOST_DEVICE int terms() const { return pq() + rows * words(pq_stride); }
  SRCGCNN_HOST_DEVICE int distances() const { return terms() + shells * words(2 * W); }
  SRCGCNN_HOST_DEVICE int links() const { return (distances() + shells + 3) / 4 * 4; }
  SRCGCNN_HOST_DEVICE int crystals() const { return links() + rows * kLinks; }
  SRCGCNN_HOST_DEVICE int keys() const { return crystals() + rows * 4; }
  SRCGCNN_HOST_DEVICE int numbers() const { return keys() + kSlots; }
  SRCGCNN_HOST_DEVICE int count() const { return numbers() + kSlots; }
};

enum Finding { kBad, kLargerThanSmall, kLargerThanAny, kNothing, kFindings };
// Counted in whole numbers behind the findings: tasks taken by small and by large blocks; parts of crystals that no block has room for.
enum Counter { kSmallTasks, kLargeTasks, kParts, kCounters = 4 };

// 2W numbers of an edge or of one of its ends, filter and core: a lane has W / 32 neighbouring channels of both, side by side.
template <int W>
struct Sides {
  static constexpr int V = W / 32;
  static SRCGCNN_DEVICE int at(int half, int channel) { return channel / V * 2 * V + half * V + channel % V; }
  static SRCGCNN_DEVICE int half(int at) { return at / V % 2; }
  static SRCGCNN_DEVICE int channel(int at) { return at / (2 * V) * V + at % V; }
};

// Where what prepare() writes is, in numbers of 4 bytes.
template <int W, class T>
struct Prepared {
  DevicePlan plan;
  static constexpr int64_t nodes_size = Places<W, T>::words(4 * W * W);
  static constexpr int vectors_size = 6 * W;  // scale and shift of the first norm (2W each), of the second (W each)

  SRCGCNN_HOST_DEVICE int n_weights() const { return plan.shared ? 1 : plan.n_steps; }
  // Of the filter, with zeros up to what one distance reads.
  SRCGCNN_HOST_DEVICE int filter_rows() const { return plan.n_features > kReach ? plan.n_features : kReach; }
  SRCGCNN_HOST_DEVICE int64_t weight_size() const { return nodes_size + int64_t(filter_rows()) * Places<W, T>::words(2 * W); }
  SRCGCNN_HOST_DEVICE int64_t nodes(int t) const { return (plan.shared ? 0 : t) * weight_size(); }
  SRCGCNN_HOST_DEVICE int64_t filter(int t) const { return nodes(t) + nodes_size; }
  SRCGCNN_HOST_DEVICE int64_t vectors(int t) const { return n_weights() * weight_size() + int64_t(t) * vectors_size; }
  // Findings, not 0 where true: crystal_ptr does not ascend from 0 to N; a crystal has no room in a small block; in none.
  SRCGCNN_HOST_DEVICE int64_t findings() const { return vectors(plan.n_steps); }
  SRCGCNN_HOST_DEVICE int64_t counters() const { return findings() + kFindings; }
  // Of the rows of the table [p, q] of the first step (n_table, 4W), in the type of what edges read; then the table (n_table, F).
  SRCGCNN_HOST_DEVICE int64_t first_products() const { return (counters() + kCounters + 3) / 4 * 4; }
  SRCGCNN_HOST_DEVICE int64_t table() const { return first_products() + int64_t(plan.n_table) * Places<W, T>::words(4 * W); }
  // Of each linear map its weight, (in, out) where that is wide and (out, in) where it is not, then its bias.
  SRCGCNN_HOST_DEVICE int64_t readout() const { return table() + int64_t(plan.n_table) * plan.F; }
  SRCGCNN_HOST_DEVICE int64_t size() const {
    int64_t at = readout();
    for (int l = 0; l < plan.n_readout; ++l) at += int64_t(plan.readout[l] + 1) * plan.readout[l + 1];
    return at;
  }
};
SRCGCNN_DEVICE bool is_wide(int out) { return out >= 32; }

template <int W, bool kHalf>
struct Stack {
  using T = typename Storage<kHalf>::type;
  float* rows;  // (N, F): what leaves without a readout, and features of large crystals
  T* q;         // (N, 2W): those of large crystals
  float* out;   // (B, O), or null: no readout
  const float *row_weight, *prepared;
  DeviceFeatures h;
  DeviceGraph g;
  Prepared<W, T> at;
  Finding asked;     // without which there is nothing to do
  int words;         // of a block's shared memory
  int least, most;   // crystals with more rows than `least` are meant, and in one block those with at most `most`
  int together;      // crystals are joined up to so many rows, at first
  int wide;          // numbers that the readout keeps of a crystal, at most
  int n_tasks, wide_tasks;         // the latter come first, of `wide_rows` rows each; the others have `narrow_rows`
  int wide_rows, narrow_rows;
  Counter taken;     // of tasks
  int* counters;
  int* parts;        // of crystals that no block has room for
  float* means;      // (B, W) softplus of the crystals' means where the maps have a kernel of their own, or null

  SRCGCNN_DEVICE const T* nodes(int t) const { return reinterpret_cast<const T*>(prepared + at.nodes(t)); }
  SRCGCNN_DEVICE const T* filter(int t) const { return reinterpret_cast<const T*>(prepared + at.filter(t)); }
  SRCGCNN_DEVICE const float* vectors(int t) const { return prepared + at.vectors(t); }
  SRCGCNN_DEVICE bool found(Finding what) const { return prepared[at.findings() + what] != 0.0f; }
  SRCGCNN_DEVICE int* counter(Counter what) const { return counters + what; }
  SRCGCNN_DEVICE const T* first_products() const { return reinterpret_cast<const T*>(prepared + at.first_products()); }
  SRCGCNN_DEVICE bool has_work() const { return asked == kNothing || found(asked); }
  SRCGCNN_DEVICE int64_t row_of(int task) const {
    return task < wide_tasks ? int64_t(task) * wide_rows
                             : int64_t(wide_tasks) * wide_rows + int64_t(task - wide_tasks) * narrow_rows;
  }
  SRCGCNN_DEVICE int n_out() const { return at.plan.readout[at.plan.n_readout]; }
};

constexpr int kLayersAtOnce = 16;
struct Layers {
  DeviceLayer of[kLayersAtOnce];
  DeviceDense embedding, readout[kMostReadout];
  const float* table;  // null: embedding and readout are not meant
};

// A tile of the weights, 16 channels by `depth` of their inputs, as a lane holds it: numbers of channels lane / 4 * 2 and the
// next one, so that the product leaves the lane two neighbours.
template <class T>
struct Tile {
  static constexpr int numbers = 16 / int(sizeof(T)), depth = 32 / int(sizeof(T));
  static SRCGCNN_DEVICE int channel(int lane, int x) { return lane / 4 * 2 + (sizeof(T) == 4 ? x : x / 2) % 2; }
  static SRCGCNN_DEVICE int k(int lane, int x) {
    return sizeof(T) == 4 ? lane % 4 + x / 2 * 4 : lane % 4 * 2 + x % 2 + x / 4 * 8;
  }
};

// The first norm of a layer as scale and shift, in the units of gate2.
struct FirstNorm {
  double scale, shift;
  SRCGCNN_DEVICE FirstNorm(const DeviceLayer& layer, int half, int n) {
    const double a = layer.gamma1[n] / sqrt(double(layer.var1[n]) + layer.eps1), unit = half ? kLog2e : -kLog2e;
    scale = unit * a;
    shift = unit * (layer.beta1[n] + a * ((layer.bias ? double(layer.bias[n]) : 0.0) - layer.mean1[n]));
  }
};

// The embedded table and the first step's [p, q] of its rows, a block a row; `row` holds F numbers.
template <int W, class T>
SRCGCNN_DEVICE void prepare_table(float* to, const Prepared<W, T>& at, const Layers& layers, float* row) {
  const DevicePlan& plan = at.plan;
  const DeviceLayer& layer = layers.of[0];
  const int F = plan.F, columns = 2 * F + plan.n_features;
  for (int place = int(blockIdx.x); place < plan.n_table; place += int(gridDim.x)) {
    __syncthreads();
    for (int c = int(threadIdx.x); c < F; c += int(blockDim.x)) {
      const float* from = layers.table + int64_t(place) * plan.n_atom;
      const float* weight = layers.embedding.weight + int64_t(c) * plan.n_atom;
      float sum = layers.embedding.bias ? layers.embedding.bias[c] : 0.0f;
#pragma unroll 8
      for (int a = 0; a < plan.n_atom; ++a) sum = fmaf(from[a], weight[a], sum);
      row[c] = to[at.table() + int64_t(place) * F + c] = sum;
    }
    __syncthreads();
    T* products = reinterpret_cast<T*>(to + at.first_products()) + int64_t(place) * 4 * W;
    for (int n = int(threadIdx.x); plan.n_steps && n < 4 * W; n += int(blockDim.x)) {
      const int c = Sides<W>::channel(n % (2 * W)), half = Sides<W>::half(n);
      float value = 0.0f;
      if (c < F) {
        const float* weight = layer.weight + int64_t(half * F + c) * columns + n / (2 * W) * F;
        float sum = 0.0f;
#pragma unroll 8
        for (int k = 0; k < F; ++k) sum = fmaf(row[k], weight[k], sum);
        const FirstNorm norm(layer, half, half * F + c);
        value = fmaf(sum, float(norm.scale), n < 2 * W ? float(norm.shift) : 0.0f);
      }
      store<1>(products + n, Channels<1>{{value}});
    }
  }
}

// The readout's weights, transposed where they are wide.
template <int W, class T>
SRCGCNN_DEVICE void prepare_readout(float* to, const Prepared<W, T>& at, const Layers& layers, int64_t thread, int64_t threads) {
  const DevicePlan& plan = at.plan;
  float* next = to + at.readout();
  for (int l = 0; l < plan.n_readout; ++l) {
    const int in = plan.readout[l], out = plan.readout[l + 1];
    const DeviceDense& layer = layers.readout[l];
    for (int64_t x = thread; x < int64_t(in + 1) * out; x += threads) {
      const int64_t from = is_wide(out) ? x % out * in + x / out : x;
      next[x] = x < int64_t(in) * out ? layer.weight[from] : layer.bias ? layer.bias[x - int64_t(in) * out] : 0.0f;
    }
    next += int64_t(in + 1) * out;
  }
}

// Weights to the order in which the lanes of mma read them, filters to (K, 2W) by Sides, both norms to scale and shift; what is
// found of the crystals, for blocks that take up to `small` and `large` rows.
template <int W, bool kHalf>
__global__ void prepare(float* to, const __grid_constant__ Prepared<W, typename Storage<kHalf>::type> at,
                        const __grid_constant__ Layers layers, int first, int count, const DeviceGraph g, int small,
                        int large) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const int F = at.plan.F, columns = 2 * F + at.plan.n_features;
  for (int l = 0; l < count; ++l) {
    const DeviceLayer& layer = layers.of[l];
    const int t = first + l;
    if (t < at.n_weights()) {
      T* weights = reinterpret_cast<T*>(to + at.nodes(t));
      for (int64_t x = thread; x < int64_t(4) * W * W + int64_t(at.filter_rows()) * 2 * W; x += threads) {
        int row, column;
        bool there;
        if (x < int64_t(4) * W * W) {
          constexpr int numbers = Tile<T>::numbers, deep = W / Tile<T>::depth;
          const int lane = int(x) / numbers % 32, tile = int(x) / (32 * numbers);
          const int k = tile % deep * Tile<T>::depth + Tile<T>::k(lane, int(x) % numbers);
          const int n = tile / deep * 16 + Tile<T>::channel(lane, int(x) % numbers);
          there = k < F && n % W < F;
          row = n / W % 2 * F + n % W;
          column = n / (2 * W) * F + k;
        } else {
          const int64_t y = x - int64_t(4) * W * W;
          const int n = int(y % (2 * W)), c = Sides<W>::channel(n);
          there = c < F && y / (2 * W) < at.plan.n_features;
          row = Sides<W>::half(n) * F + c;
          column = 2 * F + int(y / (2 * W));
        }
        store<1>(weights + x, Channels<1>{{there ? layer.weight[int64_t(row) * columns + column] : 0.0f}});
      }
    }
    float* vectors = to + at.vectors(t);
    for (int64_t x = thread; x < 3 * W; x += threads) {
      const int c = int(x % W), half = int(x / W);
      double scale = 0, shift = 0;
      if (c < F && half < 2) {
        const FirstNorm norm(layer, half, half * F + c);
        scale = norm.scale;
        shift = norm.shift;
      } else if (c < F) {
        scale = layer.gamma2[c] / sqrt(double(layer.var2[c]) + layer.eps2);
        shift = layer.beta2[c] - scale * layer.mean2[c];
      }
      vectors[half < 2 ? x : 4 * W + c] = float(scale);
      vectors[half < 2 ? 2 * W + x : 5 * W + c] = float(shift);
    }
  }
  if (first == 0) prepare_table(to, at, layers, shared);
  if (first == 0) prepare_readout(to, at, layers, thread, threads);
  float* findings = to + at.findings();
  for (int64_t c = thread; c <= g.n_crystals; c += threads) {
    const int64_t p = g.crystal_ptr[c], size = c ? p - g.crystal_ptr[c - 1] : 0;
    const bool good = c ? size >= 0 && p <= g.n_rows && (c < g.n_crystals || p == g.n_rows) : p == 0;
    if (!good) findings[kBad] = 1.0f;
    if (size > small) findings[kLargerThanSmall] = 1.0f;
    if (size > large) findings[kLargerThanAny] = 1.0f;
  }
}

// The part of a block of kWarps warps: `n` rows from `first` on.
template <int W, int kWarps, bool kHalf>
struct Block {
  using T = typename Storage<kHalf>::type;
  using P = Places<W, T>;
  static constexpr int warps = kWarps, threads = 32 * kWarps;
  const Stack<W, kHalf>& s;
  float* shared;
  int first, n;
  P places;

  SRCGCNN_DEVICE float* h(int row) const { return shared + row * P::h_stride; }
  SRCGCNN_DEVICE T* pq(int row) const { return reinterpret_cast<T*>(shared + places.pq()) + row * P::pq_stride; }
  SRCGCNN_DEVICE T* term(int shell) const { return reinterpret_cast<T*>(shared + places.terms()) + shell * 2 * W; }
  SRCGCNN_DEVICE float* distance() const { return shared + places.distances(); }
  // First row of the row's crystal, the row after its last; the row's number of edges if find_links() has them all, or -1.
  SRCGCNN_DEVICE int* crystal(int row) const { return reinterpret_cast<int*>(shared + places.crystals()) + 4 * row; }
  SRCGCNN_DEVICE unsigned* links(int row) const { return reinterpret_cast<unsigned*>(shared + places.links()) + kLinks * row; }
  SRCGCNN_DEVICE unsigned* keys() const { return reinterpret_cast<unsigned*>(shared + places.keys()); }
  SRCGCNN_DEVICE int* numbers() const { return reinterpret_cast<int*>(shared + places.numbers()); }
  SRCGCNN_DEVICE int* count() const { return reinterpret_cast<int*>(shared + places.count()); }
};

// Fills crystal() of the block's rows for `count` crystals, which cover them; lane l has where number l begins, and its size.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void find_crystals(const Block<W, kWarps, kHalf>& b, int begin, int size, int count) {
  for (int row = warp_of(); row < b.n; row += b.warps) {
    const int k = __popc(__ballot_sync(kAllLanes, lane_of() < count && begin <= b.first + row)) - 1;
    const int from = __shfl_sync(kAllLanes, begin, k), to = from + __shfl_sync(kAllLanes, size, k);
    if (lane_of() < 3) b.crystal(row)[lane_of()] = lane_of() == 0 ? from : lane_of() == 1 ? to : -1;
  }
}

// Features of the block's rows, and zeros up to whole tiles and to W; a warp its rows, each lane with its channels.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void read_features(const Block<W, kWarps, kHalf>& b, const DeviceFeatures& h) {
  static_assert(Shape<W, kWarps>::rows <= 32 * kWarps, "a lane a row");
  const int F = b.s.at.plan.F, rows = (b.n + 15) / 16 * 16, mine = warp_of() + lane_of() * b.warps;
  const int64_t i = int64_t(b.first) + mine;
  int place = -1;  // in the table, or -1: no number
  if (mine < b.n) place = h.species ? h.species[i] : mine;
  if (h.species && place >= h.n_table) place = -1;
  const float* data = h.species ? h.data : h.data + int64_t(b.first) * F;
#pragma unroll 4
  for (int k = 0; k < 32; ++k) {
    const int row = warp_of() + k * b.warps, from = __shfl_sync(kAllLanes, place, k);
    if (row >= rows) break;
#pragma unroll
    for (int c = lane_of(); c < W; c += 32) {
      float value = row < b.n && c < F ? NAN : 0.0f;
      if (from >= 0 && c < F) value = data[int64_t(from) * F + c];
      b.h(row)[c] = value;
    }
  }
}

// What a lane holds of a tile of the weights and of a tile of 8 rows, and their product, added to sums.
template <class T>
struct Factors {
  float high[4], low[4];
  struct Rows {
    float x[2];
    SRCGCNN_DEVICE void read(const float* h, int stride) {
      const float* at = h + lane_of() / 4 * stride + lane_of() % 4;
      x[0] = at[0], x[1] = at[4];
    }
  };
  using Read = Channels<4>;
  static SRCGCNN_DEVICE Read read(const float* at) { return load<4>(at); }
  SRCGCNN_DEVICE explicit Factors(const Read& found) {
#pragma unroll
    for (int k = 0; k < 4; ++k) split(found.x[k], high[k], low[k]);
  }
  Factors() = default;
  // The tensor cores cut off what a sum has no digits for: so they add up three products of 8 terms, the small ones first,
  // and the rest is added here.
  template <bool kRelaxed, int kMany>
  static SRCGCNN_DEVICE void multiply(float (&sum)[kMany][4], const Rows& rows, const Factors (&w)[kMany]) {
    float high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) split(rows.x[k], high[k], low[k]);
    if constexpr (kRelaxed) {
#pragma unroll
      for (int k = 0; k < 2; ++k) high[k] = alone(high[k], low[k]);
#pragma unroll
      for (int m = 0; m < kMany; ++m) {
        float nearest[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) nearest[k] = alone(w[m].high[k], w[m].low[k]);
        device::mma(sum[m], nearest, high);
      }
    } else {
      float part[kMany][4] = {};
#pragma unroll
      for (int m = 0; m < kMany; ++m) device::mma(part[m], w[m].high, low);
#pragma unroll
      for (int m = 0; m < kMany; ++m) device::mma(part[m], w[m].low, high);
#pragma unroll
      for (int m = 0; m < kMany; ++m) device::mma(part[m], w[m].high, high);
#pragma unroll
      for (int m = 0; m < kMany; ++m)
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[m][v] += part[m][v];
    }
  }
};
template <>
struct Factors<Bfloat16> {
  uint32_t both[4];
  struct Rows {
    uint32_t both[2];
    SRCGCNN_DEVICE void read(const float* h, int stride) {
      const float* at = h + lane_of() / 4 * stride + lane_of() % 4 * 2;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const auto found = load<2>(at + x * 8);
        both[x] = device::to_bfloat16(found.x[0], found.x[1]);
      }
    }
  };
  using Read = uint4;
  static SRCGCNN_DEVICE Read read(const Bfloat16* at) { return *reinterpret_cast<const uint4*>(at); }
  SRCGCNN_DEVICE explicit Factors(const Read& found) : both{found.x, found.y, found.z, found.w} {}
  Factors() = default;
  template <bool kRelaxed, int kMany>
  static SRCGCNN_DEVICE void multiply(float (&sum)[kMany][4], const Rows& rows, const Factors (&w)[kMany]) {
#pragma unroll
    for (int m = 0; m < kMany; ++m) device::mma(sum[m], w[m].both, rows.both);
  }
};

// Rows of h times the weights, scaled and shifted, to pq: (p, q), each by Sides. A warp has its channels of all rows: for each
// tile of the weights, read once, all tiles of rows.
template <bool kRelaxed, int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void multiply(const Block<W, kWarps, kHalf>& b, int t) {
  using T = typename Storage<kHalf>::type;
  using S = Shape<W, kWarps>;
  constexpr int depth = Tile<T>::depth, together = kHopper ? 2 : 1;
  constexpr int tiles = S::tiles > 6 ? S::tiles / 2 : S::tiles, stride = Places<W, T>::h_stride;
  const int lane = lane_of(), group = lane / 4, in_group = lane % 4;
  const int share = warp_of() / S::parts;
  const T* nodes = b.s.nodes(t);
  const float* scale = b.s.vectors(t);
  const float* shift = scale + 2 * W;
  for (int pass = 0; pass < S::mine / together * (S::tiles / tiles); ++pass) {
    const int first = warp_of() % S::parts * S::mine + pass % (S::mine / together) * together;
    const int from = (pass / (S::mine / together) * tiles * S::shares + share) * 8;
    if (from >= b.n) break;
    float sum[tiles][together][4] = {};
    typename Factors<T>::Read next[together];  // on its way while the step before is multiplied
    const auto read = [&](int step) {
#pragma unroll
      for (int x = 0; x < together; ++x)
        next[x] = Factors<T>::read(nodes + (((first + x) * (W / depth) + step) * 32 + lane) * Tile<T>::numbers);
    };
    read(0);
#pragma unroll 1
    for (int step = 0; step < W / depth; ++step) {
      Factors<T> w[together];
#pragma unroll
      for (int x = 0; x < together; ++x) w[x] = Factors<T>(next[x]);
      read(step + 1 < W / depth ? step + 1 : step);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        const int row = from + tile * S::shares * 8;
        if (row >= b.n) break;
        typename Factors<T>::Rows rows;
        rows.read(b.h(row) + step * depth, stride);
        Factors<T>::template multiply<kRelaxed>(sum[tile], rows, w);
      }
    }
#pragma unroll
    for (int x = 0; x < together; ++x) {
      const int column = (first + x) * 16 + 2 * group, half = column / W % 2, channel = column % W;
      const auto by = load<2>(scale + column % (2 * W));
      auto add = load<2>(shift + column % (2 * W));
      if (column >= 2 * W) add = {};
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        const int row = from + tile * S::shares * 8;
        if (row >= b.n) break;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          Channels<2> y;
#pragma unroll
          for (int c = 0; c < 2; ++c) y.x[c] = fmaf(sum[tile][x][v + 2 * c], by.x[c], add.x[c]);
          T* to = b.pq(row + 2 * in_group + v) + column / (2 * W) * 2 * W;
          if constexpr (W == 32) {
            store<1>(to + Sides<W>::at(half, channel), Channels<1>{{y.x[0]}});
            store<1>(to + Sides<W>::at(half, channel + 1), Channels<1>{{y.x[1]}});
          } else {
            store<2>(to + Sides<W>::at(half, channel), y);
          }
        }
      }
    }
  }
}

// [p, q] of the block's rows in the first step, from those of the table; a row without a place there is NaN.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void look_up(const Block<W, kWarps, kHalf>& b) {
  using T = typename Storage<kHalf>::type;
  constexpr int vectors = Places<W, T>::words(4 * W) / 4;
  for (int row = warp_of(); row < b.n; row += b.warps) {
    const int place = b.s.h.species[int64_t(b.first) + row];
    const bool there = place >= 0 && place < b.s.h.n_table;
    const uint4* from = reinterpret_cast<const uint4*>(b.s.first_products() + int64_t(there ? place : 0) * 4 * W);
#pragma unroll
    for (int k = lane_of(); k < vectors; k += 32)
      reinterpret_cast<uint4*>(b.pq(row))[k] = there ? from[k] : uint4{~0u, ~0u, ~0u, ~0u};
  }
}

// [p, q] of the block's rows.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void find_products(const Block<W, kWarps, kHalf>& b, int t) {
  if (t == 0 && b.s.at.plan.n_table)
    look_up(b);
  else if (!kHalf && b.s.at.plan.precision != kFloat32)
    multiply<true>(b, t);
  else
    multiply<false>(b, t);
}

SRCGCNN_DEVICE int slot_of(unsigned key, int probe) { return int(((key * 0x9e3779b1u) >> 23) + probe) & (kSlots - 1); }

// The distinct distances of the block's edges, numbered. Which number one has, and which are left out where there are
// too many, depends on the threads; what the number stands for does not.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void find_shells(const Block<W, kWarps, kHalf>& b) {
  for (int x = threadIdx.x; x < kSlots; x += b.threads) {
    b.keys()[x] = kEmpty;
    b.numbers()[x] = -1;
  }
  if (threadIdx.x == 0) *b.count() = 0;
  __syncthreads();
  const auto bounded = [&](int64_t e) { return e < 0 ? int64_t(0) : e > b.s.g.n_edges ? b.s.g.n_edges : e; };
  const int64_t end = bounded(b.s.g.row_ptr[b.first + b.n]);
  for (int64_t e = bounded(b.s.g.row_ptr[b.first]) + threadIdx.x; e < end; e += b.threads) {
    const unsigned key = __float_as_uint(b.s.g.distance[e]);
    if (key == kEmpty) continue;
    for (int probe = 0; probe < kProbes; ++probe) {
      const int slot = slot_of(key, probe);
      const unsigned found = atomicCAS(b.keys() + slot, kEmpty, key);
      if (found == key) break;
      if (found != kEmpty) continue;
      const int number = atomicAdd(b.count(), 1);
      if (number < b.places.shells) {
        b.distance()[number] = __uint_as_float(key);
        b.numbers()[slot] = number;
      }
      break;
    }
  }
}
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE int shell_of(const Block<W, kWarps, kHalf>& b, float distance) {
  const unsigned key = __float_as_uint(distance);
  for (int probe = 0; probe < kProbes; ++probe) {
    const int slot = slot_of(key, probe);
    if (b.keys()[slot] == key) return b.numbers()[slot];
  }
  return -1;
}

// Of each row whose edges all end in its crystal and have a place among the distances, and which has no more than kLinks:
// their rows in the block, and in the upper half of the word the numbers of their distances. -1 in place of the number of
// edges: another row.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void find_links(const Block<W, kWarps, kHalf>& b) {
  const DeviceGraph& g = b.s.g;
  static_assert(kLinks <= 32 && kMostShells <= 1 << 16, "a lane an edge, half a word a number");
  for (int row = warp_of(); row < b.n; row += b.warps) {
    const int64_t i = int64_t(b.first) + row, begin = g.row_ptr[i], end = g.row_ptr[i + 1];
    bool quick = begin >= 0 && begin <= end && end <= g.n_edges && end - begin <= kLinks;
    unsigned link = 0;
    bool good = true;
    if (quick && lane_of() < end - begin) {
      const int sender = g.sender[begin + lane_of()], shell = shell_of(b, g.distance[begin + lane_of()]);
      good = sender >= b.crystal(row)[0] && sender < b.crystal(row)[1] && shell >= 0;
      link = unsigned(sender - b.first) | unsigned(shell) << 16;
    }
    quick = __ballot_sync(kAllLanes, !good) == 0 && quick;
    device::prefetch(g.sender, begin + b.n * kLinks + lane_of(), g.n_edges);  // of the block that comes next, perhaps
    device::prefetch(g.distance, begin + b.n * kLinks + lane_of(), g.n_edges);
    if (lane_of() < kLinks) b.links(row)[lane_of()] = link;
    if (lane_of() == 0) b.crystal(row)[2] = quick ? int(end - begin) : -1;
  }
}

template <int V>
struct Pair {
  Channels<V> filter, core;
};
// Of 2W numbers the lane's, as Sides has them.
template <int W, class T, int V = W / 32>
SRCGCNN_DEVICE Pair<V> load_pair(const T* p) {
  const T* mine = p + lane_of() * 2 * V;
  if constexpr (2 * V * sizeof(T) > 16) return {load<V>(mine), load<V>(mine + V)};
  const auto found = load<2 * V>(mine);
  Pair<V> pair;
#pragma unroll
  for (int v = 0; v < V; ++v) pair.filter.x[v] = found.x[v], pair.core.x[v] = found.x[V + v];
  return pair;
}
// r of one distance: the Gaussians in reach of it times the filter, one lane a Gaussian, then one lane its channels. What
// is read of the filter is on its way together, as far as registers reach.
template <int W, class T, int V = W / 32>
SRCGCNN_DEVICE Pair<V> edge_term(const T* filter, const DeviceGraph& g, float distance) {
  constexpr int together = V > 2 ? (kHopper ? kReach / 3 : 1) : kReach;
  const float u = (distance - g.dmin) * g.inverse_step, last = float(g.n_features > kReach ? g.n_features - kReach : 0);
  const int first = int(fminf(fmaxf(u + (0.5f - kReach / 2), 0.0f), last));
  const float x = u - float(first + lane_of());
  const float value = device::exp2(x * x * float(-kLog2e));
  Pair<V> r = {};
#pragma unroll 1
  for (int k0 = 0; k0 < kReach; k0 += together) {
    Pair<V> w[together];
#pragma unroll
    for (int k = 0; k < together; ++k) w[k] = load_pair<W>(filter + int64_t(first + k0 + k) * 2 * W);
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const float a = __shfl_sync(kAllLanes, value, k0 + k);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        r.filter.x[v] = fmaf(a, w[k].filter.x[v], r.filter.x[v]);
        r.core.x[v] = fmaf(a, w[k].core.x[v], r.core.x[v]);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) r.filter.x[v] = as_stored(filter, r.filter.x[v]), r.core.x[v] = as_stored(filter, r.core.x[v]);
  return r;
}

template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void fill_shells(const Block<W, kWarps, kHalf>& b, int t) {
  constexpr int V = W / 32;
  const int count = *b.count() < b.places.shells ? *b.count() : b.places.shells;
  for (int shell = warp_of(); shell < count; shell += b.warps) {
    const auto r = edge_term<W>(b.s.filter(t), b.s.g, b.distance()[shell]);
    store<V>(b.term(shell) + lane_of() * 2 * V, r.filter);
    store<V>(b.term(shell) + lane_of() * 2 * V + V, r.core);
  }
}

// h <- softplus(h + scale2 sum_j gate(p_i + q_j + r_ij) + shift2), a warp a row. q of the block's rows, or, with
// kLayer, of all. The last step leaves for `rows` unless a readout follows, and each where kLayer.
template <bool kLayer, int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void gate_rows(const Block<W, kWarps, kHalf>& b, int t) {
  using T = typename Storage<kHalf>::type;
  constexpr int V = W / 32;
  const Stack<W, kHalf>& s = b.s;
  const DeviceGraph& g = s.g;
  const T* filter = s.filter(t);
  const float* vectors = s.vectors(t);
  const T* given = static_cast<const T*>(g.edge_term);
  const Pair<V> scale{load<V>(vectors + lane_of() * V), load<V>(vectors + W + lane_of() * V)};
  const auto scale2 = load<V>(vectors + 4 * W + lane_of() * V), shift2 = load<V>(vectors + 5 * W + lane_of() * V);
  for (int row = warp_of(); row < b.n; row += b.warps) {
    const int low = b.crystal(row)[0], high = b.crystal(row)[1];
    const int64_t i = int64_t(b.first) + row;
    const int linked = kLayer ? -1 : b.crystal(row)[2];
    bool good = true;
    const auto p = load_pair<W>(b.pq(row));
    Channels<V> sum = {};
    const auto add_pair = [&](const Pair<V>& q, const Pair<V>& r) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float f = fmaf(scale.filter.x[v], r.filter.x[v], p.filter.x[v] + q.filter.x[v]);
        const float c = fmaf(scale.core.x[v], r.core.x[v], p.core.x[v] + q.core.x[v]);
        sum.x[v] += gate2<DeviceMath>(f, c);
      }
    };
    if (linked >= 0) {  // nothing to ask of an edge: several are on their way, as far as registers reach
      [[maybe_unused]] constexpr int ahead = V > 2 ? 1 : 4;
      const unsigned* links = b.links(row);
      const auto add_link = [&](unsigned link) {
        add_pair(load_pair<W>(b.pq(int(link & 0xffffu)) + 2 * W), load_pair<W>(b.term(int(link >> 16))));
      };
      int k = 0;
      for (; k + 4 <= linked; k += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(links + k);
#pragma unroll ahead
        for (int v = 0; v < 4; ++v) add_link(v == 0 ? four.x : v == 1 ? four.y : v == 2 ? four.z : four.w);
      }
      for (; k < linked; ++k) add_link(links[k]);
    } else {
      const int64_t begin = g.row_ptr[i], end = g.row_ptr[i + 1];
      good = begin >= 0 && begin <= end && end <= g.n_edges;
      const auto add = [&](int j, const Pair<V>& r) {
        add_pair(load_pair<W>(kLayer ? s.q + int64_t(j) * 2 * W : b.pq(j - b.first) + 2 * W), r);
      };
      for (int64_t e0 = begin; good && e0 < end; e0 += 32) {
        const int64_t e = e0 + lane_of();
        int sender = low, shell = 0;
        float distance = 0.0f;
        if (e < end) {
          sender = g.sender[e];
          if (!given) {
            distance = g.distance[e];
            shell = shell_of(b, distance);
          }
        }
        good = __ballot_sync(kAllLanes, sender < low || sender >= high) == 0;
        const bool from_table = kLayer && __ballot_sync(kAllLanes, shell < 0) == 0 && !given;
        const int many = !good ? 0 : end - e0 < 32 ? int(end - e0) : 32;
        if (from_table) {  // nothing to ask of an edge: several are on their way, as far as registers reach
          [[maybe_unused]] constexpr int ahead = V > 2 ? 1 : 4;
#pragma unroll ahead
          for (int k = 0; k < many; ++k)
            add(__shfl_sync(kAllLanes, sender, k), load_pair<W>(b.term(__shfl_sync(kAllLanes, shell, k))));
          continue;
        }
        for (int k = 0; k < many; ++k) {
          const int number = __shfl_sync(kAllLanes, shell, k);
          Pair<V> r;
          if (given)
            r = load_pair<W>(given + (e0 + k) * 2 * W);
          else if (number >= 0)
            r = load_pair<W>(b.term(number));
          else
            r = edge_term<W>(filter, g, __shfl_sync(kAllLanes, distance, k));
          add(__shfl_sync(kAllLanes, sender, k), r);
        }
      }
    }
    float* h = b.h(row) + lane_of() * V;
    auto x = load<V>(h);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float m = good ? sum.x[v] * DeviceMath::ln2 : NAN;
      const float u = x.x[v] + fmaf(scale2.x[v], m, shift2.x[v]);
      x.x[v] = softplus<DeviceMath>(u);
      const int c = lane_of() * V + v;
      if ((kLayer || (t + 1 == s.at.plan.n_steps && !s.out)) && c < s.at.plan.F) s.rows[i * s.at.plan.F + c] = x.x[v];
    }
    if (!kLayer) store<V>(h, x);
  }
}

// The readout's linear maps of crystals [c, c + many), with a softplus before each, after which the numbers that go in are at
// `from` of each crystal's `size` in `space`. Every sum has an order of its own, whoever forms it.
template <int W, bool kHalf>
SRCGCNN_DEVICE void apply_maps(const Stack<W, kHalf>& s, float* space, int size, int from, int c, int many) {
  const DevicePlan& plan = s.at.plan;
  const int warps = int(blockDim.x) / 32, n_out = s.n_out();
  const float* weight = s.prepared + s.at.readout();
  for (int l = 0; l < plan.n_readout; ++l) {
    const int in = plan.readout[l], out = plan.readout[l + 1], here = from + l % 2 * s.wide, to = from + (l + 1) % 2 * s.wide;
    const float* bias = weight + int64_t(in) * out;
    const auto put = [&](int k, int o, float y) {
      if (l + 1 == plan.n_readout)
        s.out[int64_t(c + k) * n_out + o] = y;
      else
        space[k * size + to + o] = softplus<DeviceMath>(y);
    };
    if (is_wide(out)) {  // a lane a number, of four crystals at a time
      const int blocks = (out + 31) / 32;
      for (int x = warp_of(); x < blocks * ((many + 3) / 4); x += warps) {
        const int o = x % blocks * 32 + lane_of(), k = x / blocks * 4;
        if (o >= out) continue;
        float sum[4];
#pragma unroll
        for (int y = 0; y < 4; ++y) sum[y] = bias[o];
        int i = 0;
#pragma unroll 2
        for (; i + 4 <= in; i += 4) {
          float w[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) w[v] = weight[(i + v) * out + o];
#pragma unroll
          for (int y = 0; y < 4; ++y) {
            const auto x = load<4>(space + (k + y < many ? k + y : k) * size + here + i);
#pragma unroll
            for (int v = 0; v < 4; ++v) sum[y] = fmaf(w[v], x.x[v], sum[y]);
          }
        }
        for (; i < in; ++i)
#pragma unroll
          for (int y = 0; y < 4; ++y)
            sum[y] = fmaf(weight[i * out + o], space[(k + y < many ? k + y : k) * size + here + i], sum[y]);
#pragma unroll
        for (int y = 0; y < 4; ++y)
          if (k + y < many) put(k + y, o, sum[y]);
      }
    } else {  // a warp a number
      for (int x = warp_of(); x < many * out; x += warps) {
        const int k = x / out, o = x % out;
        float sum = 0.0f;
        for (int i = lane_of(); i < in; i += 32) sum = fmaf(weight[o * in + i], space[k * size + here + i], sum);
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane_of() == 0) put(k, o, sum + bias[o]);
      }
    }
    weight = bias + out;
    __syncthreads();
  }
}

// The mean of crystals [c, c + count) over their atoms, which leaves, or goes on to the maps: here, or by way of `means` in
// maps_of_crystals(). `row` gives a lane its channels of a row. `space` holds `words` numbers.
constexpr int kShares = 8;  // of a sum over rows
template <int W, bool kHalf, class Row>
SRCGCNN_DEVICE void read_out(const Stack<W, kHalf>& s, float* space, int words, int c, int count, const Row& row) {
  constexpr int V = W / 32, sums = kShares * (W + 1);
  const DevicePlan& plan = s.at.plan;
  const int32_t* crystal_ptr = s.g.crystal_ptr;
  const int warps = int(blockDim.x) / 32, threads = int(blockDim.x);
  const bool here = plan.n_readout && !s.means;
  const int size = sums + (here ? 2 * s.wide : 0), most = words / size;  // a crystal: partial sums, and two lists of numbers
  for (const int stop = c + count; c < stop; c += most) {
    const int many = stop - c < most ? stop - c : most;
    for (int x = warp_of(); x < many * kShares; x += warps) {
      const int k = x / kShares, part = x % kShares, end = crystal_ptr[c + k + 1];
      Channels<V> sum = {};
      float atoms = 0.0f;
      for (int i = crystal_ptr[c + k] + part; i < end; i += kShares) {
        const float weight = s.row_weight[i];
        const Channels<V> h = row(i);
        atoms += weight;
#pragma unroll
        for (int v = 0; v < V; ++v) sum.x[v] = fmaf(weight, h.x[v], sum.x[v]);
      }
      store<V>(space + k * size + part * W + lane_of() * V, sum);
      if (lane_of() == 0) space[k * size + kShares * W + part] = atoms;
    }
    __syncthreads();
    for (int x = threadIdx.x; x < many * W; x += threads) {
      const int k = x / W, channel = x % W;
      float sum = 0.0f, atoms = 0.0f;
#pragma unroll
      for (int part = 0; part < kShares; ++part) {
        sum += space[k * size + part * W + channel];
        atoms += space[k * size + kShares * W + part];
      }
      const float mean = atoms == 0.0f ? 0.0f : sum / atoms;  // a crystal without rows, as the CPU has it
      if (here)
        space[k * size + sums + channel] = softplus<DeviceMath>(mean);
      else if (plan.n_readout)
        s.means[int64_t(c + k) * W + channel] = softplus<DeviceMath>(mean);
      else if (channel < plan.F)
        s.out[int64_t(c + k) * plan.F + channel] = mean;
    }
    __syncthreads();
    if (here) apply_maps(s, space, size, sums, c, many);
  }
}

// The maps of all crystals from their means, a block some at a time.
template <int W, bool kHalf>
__global__ void __launch_bounds__(Shape<W, kSmall>::threads) maps_of_crystals(const Stack<W, kHalf> s) {
  SRCGCNN_SHARED(shared);
  if (s.found(kBad)) return;
  const int size = 2 * s.wide, most = s.words / size;
  for (int64_t c = int64_t(blockIdx.x) * most; c < s.g.n_crystals; c += int64_t(gridDim.x) * most) {
    const int many = int(s.g.n_crystals - c < most ? s.g.n_crystals - c : most);
    for (int x = threadIdx.x; x < many * W; x += int(blockDim.x)) shared[x / W * size + x % W] = s.means[c * W + x];
    __syncthreads();
    apply_maps(s, shared, size, 0, int(c), many);
  }
}

// NaN for whatever would leave.
template <int W, bool kHalf>
SRCGCNN_DEVICE void spoil(const Stack<W, kHalf>& s) {
  const int64_t size = s.out ? s.g.n_crystals * s.n_out() : s.g.n_rows * s.at.plan.F;
  float* to = s.out ? s.out : s.rows;
  for (int64_t x = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; x < size; x += int64_t(gridDim.x) * blockDim.x)
    to[x] = NAN;
}

// Up to how many rows the next crystals are joined: as many as leave room for the distances that they will have if they are
// like these. Fewer distances than these, more rows share a reading of the weights.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE int joined_next(const Block<W, kWarps, kHalf>& b, int now) {
  using P = typename Block<W, kWarps, kHalf>::P;
  const int row = P::per_row + (*b.count() * P::per_shell + b.n - 1) / b.n, room = (b.s.words - P::fixed) / 8 * 7 / row;
  const int wanted = room < 16 ? 16 : room < Shape<W, kWarps>::rows ? room : Shape<W, kWarps>::rows;
  return (now + wanted) / 2;
}

// The first task of a block is that of its number; each further one is the next that no block has.
template <int W, bool kHalf>
SRCGCNN_DEVICE int next_of(const Stack<W, kHalf>& s, int* shared) {
  if (s.n_tasks <= int(gridDim.x)) return s.n_tasks;
  __syncthreads();
  if (threadIdx.x == 0) *shared = int(gridDim.x) + atomicAdd(s.counter(s.taken), 1);
  __syncthreads();
  return *shared;
}

// All steps of the crystals that have more than `least` and at most `most` rows. A task is the crystals that begin in its
// range of rows.
template <int W, int kWarps, bool kHalf>
__global__ void __launch_bounds__(Shape<W, kWarps>::threads, Shape<W, kWarps>::blocks)
    whole_crystals(const Stack<W, kHalf> s) {
  SRCGCNN_SHARED(shared);
  const DeviceGraph& g = s.g;
  if (s.found(kBad)) spoil(s);
  if (s.found(kBad) || !s.has_work()) return;
  int* next_task = reinterpret_cast<int*>(shared) + s.words - 1;  // Places leave these alone
  int* together = next_task - 1;
  if (threadIdx.x == 0) *together = s.together;
  __syncthreads();
  for (int task = int(blockIdx.x); task < s.n_tasks; task = next_of(s, next_task)) {
    const int64_t first_row = s.row_of(task);
    int c = first_not_below(g.crystal_ptr, int(g.n_crystals), first_row);
    const int end = task + 1 < s.n_tasks ? first_not_below(g.crystal_ptr, int(g.n_crystals), s.row_of(task + 1))
                                         : int(g.n_crystals);  // with those that have no rows
    while (c < end) {
      const int mine = c + lane_of(), first = g.crystal_ptr[c];
      const int begin = mine < end ? g.crystal_ptr[mine] : 0, size = mine < end ? g.crystal_ptr[mine + 1] - begin : 0;
      const bool wanted = mine < end && size > s.least && size <= s.most;
      const int skip = __ffs(__ballot_sync(kAllLanes, wanted)) - 1;  // crystals before the first that is wanted
      if (skip) {
        c += skip < 0 ? 32 : skip;
        continue;
      }
      const unsigned fit = __ballot_sync(kAllLanes, wanted && (mine == c || begin + size - first <= *together));
      const int count = ~fit ? __ffs(~fit) - 1 : 32;
      const int n = g.crystal_ptr[c + count] - first;
      const Block<W, kWarps, kHalf> b{s, shared, first, n, Places<W, typename Storage<kHalf>::type>::of(n, s.words)};
      find_crystals(b, begin, size, count);
      read_features(b, s.h);
      if (!g.edge_term) {
        find_shells(b);
        __syncthreads();
        find_links(b);
        if (threadIdx.x == 0 && n) *together = joined_next(b, *together);
      }
      __syncthreads();
      for (int t = 0; t < s.at.plan.n_steps; ++t) {
        if (!g.edge_term && (t == 0 || !s.at.plan.shared)) fill_shells(b, t);
        find_products(b, t);
        __syncthreads();
        gate_rows<false>(b, t);
        __syncthreads();
      }
      if (s.out)
        read_out(s, shared + b.places.pq(), s.words - b.places.pq(), c, count,
                 [&](int i) { return load<W / 32>(b.h(i - first) + lane_of() * (W / 32)); });
      c += count;
    }
  }
}

// Lists the crystals with more than `least` rows in parts of up to `together` rows: crystal, and number of the part.
template <int W, bool kHalf>
__global__ void list_parts(const Stack<W, kHalf> s) {
  if (s.found(kBad) || !s.has_work()) return;
  const int threads = int(gridDim.x * blockDim.x);
  for (int c = int(blockIdx.x * blockDim.x + threadIdx.x); c < s.g.n_crystals; c += threads) {
    const int size = s.g.crystal_ptr[c + 1] - s.g.crystal_ptr[c];
    if (size <= s.least) continue;
    const int parts = (size + s.together - 1) / s.together, at = atomicAdd(s.counter(kParts), parts);
    for (int k = 0; k < parts; ++k) {
      s.parts[2 * int64_t(at + k)] = c;
      s.parts[2 * int64_t(at + k) + 1] = k;
    }
  }
}

// One step of these parts: with kGate the step itself, else the q of their rows, which it needs.
template <int W, bool kGate, bool kHalf>
__global__ void __launch_bounds__(Shape<W, kSmall>::threads, Shape<W, kSmall>::blocks)
    layer_of_crystals(const Stack<W, kHalf> s, int t) {
  SRCGCNN_SHARED(shared);
  if (kGate && s.found(kBad)) spoil(s);
  if (s.found(kBad) || !s.has_work()) return;
  const auto places = Places<W, typename Storage<kHalf>::type>::of(s.together, s.words);
  const int count = *s.counter(kParts);
  for (int k = count - int(gridDim.x - blockIdx.x); k >= 0; k -= int(gridDim.x)) {  // the last parts to the last blocks
    const int c = s.parts[2 * int64_t(k)], end = s.g.crystal_ptr[c + 1];
    const int first = s.g.crystal_ptr[c] + s.parts[2 * int64_t(k) + 1] * s.together;
    const Block<W, kSmall, kHalf> b{s, shared, first, end - first < s.together ? end - first : s.together, places};
    find_crystals(b, s.g.crystal_ptr[c], end - s.g.crystal_ptr[c], 1);
    read_features(b, t ? DeviceFeatures{s.rows, nullptr, 0} : s.h);
    if (kGate && !s.g.edge_term) find_shells(b);
    __syncthreads();
    find_products(b, t);
    if (kGate && !s.g.edge_term) fill_shells(b, t);
    __syncthreads();
    if (kGate)
      gate_rows<true>(b, t);
    else
      for (int x = threadIdx.x; x < b.n * 2 * W; x += b.threads) {
        const int row = x / (2 * W), channel = x % (2 * W);
        s.q[int64_t(first + row) * 2 * W + channel] = b.pq(row)[2 * W + channel];
      }
    __syncthreads();
  }
}

// The readout of the crystals with more than `least` rows, a block some crystals that follow each other.
template <int W, bool kHalf>
__global__ void __launch_bounds__(Shape<W, kSmall>::threads, Shape<W, kSmall>::blocks)
    readout_of_crystals(const Stack<W, kHalf> s) {
  SRCGCNN_SHARED(shared);
  if (s.found(kBad) || !s.has_work()) return;
  const int64_t share = (s.g.n_crystals + gridDim.x - 1) / gridDim.x, last = (blockIdx.x + 1) * share;
  const int end = int(last < s.g.n_crystals ? last : s.g.n_crystals), F = s.at.plan.F;
  const auto row = [&](int i) {
    Channels<W / 32> h;
#pragma unroll
    for (int v = 0; v < W / 32; ++v) {
      const int c = lane_of() * (W / 32) + v;
      h.x[v] = c < F ? s.rows[int64_t(i) * F + c] : 0.0f;
    }
    return h;
  };
  for (int64_t c = blockIdx.x * share; c < end;) {
    const int mine = int(c) + lane_of();
    const bool wanted = mine < end && s.g.crystal_ptr[mine + 1] - s.g.crystal_ptr[mine] > s.least;
    const int skip = __ffs(__ballot_sync(kAllLanes, wanted)) - 1;
    if (skip >= 0) read_out(s, shared, s.words, int(c) + skip, 1, row);
    c += skip < 0 ? 32 : skip + 1;
  }
}

}  // namespace srcgcnn
