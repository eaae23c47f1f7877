// Inference: all convolutions of a crystal in one kernel, where its rows fit into shared memory, else layer by layer.
//
// z_ij = p_i + q_j + r_ij. A block takes the next crystals that have at most `rows` rows together through all steps:
// features, as pairs of halves, p and q of its rows and r of its distinct distances stay in shared memory. Small blocks, of
// which a multiprocessor holds two, so that one multiplies while the other gates, serve most crystals; large ones, alone, the
// rest. p and q come from the tensor cores and leave them scaled and shifted, in the units of gate2. A warp walks the edges of
// a row, each lane with its channels.
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
constexpr int kLinks = 12;       // edges of a row of which is kept, from step to step, where their q and r are, at most
constexpr unsigned kEmpty = 0xffffffffu;

// A block of so many warps: how many a multiprocessor holds, and how many rows one takes at most.
template <int W, int kWarps>
struct Shape {
  static constexpr int threads = 32 * kWarps, blocks = 16 / kWarps, rows = kWarps == kLarge ? (W == 128 ? 64 : 128) : W == 32 ? 64 : W == 64 ? 48 : 32;
  // Of a product, in tiles of 16 channels and 8 rows: all its channels, and those of a warp, at least two, so that they share
  // what is read of a row; where there are more warps, they share out the rows.
  static constexpr int channels = 4 * W / 16, mine = channels > 2 * kWarps ? channels / kWarps : 2;
  static constexpr int parts = channels / mine, shares = kWarps / parts;
};

// Places in shared memory, in numbers of 4 bytes, for a block with so many rows; distances take what they leave. The
// stride of p and q spreads rows of a tile over the banks.
template <int W, class T>
struct Places {
  static SRCGCNN_HOST_DEVICE constexpr int words(int numbers) { return numbers * int(sizeof(T)) / 4; }
  static constexpr int pq_stride = 4 * W + (sizeof(T) == 4 ? 4 : 8);  // in T
  static constexpr int per_row = W + words(pq_stride) + 4 + 2 * kLinks, fixed = 2 * kSlots + 4, per_shell = words(2 * W) + 1;
  int rows, shells;

  static SRCGCNN_HOST_DEVICE Places of(int n, int words) {
    const int rows = n > 16 ? (n + 7) / 8 * 8 : 16, most = (words - fixed - rows * per_row) / per_shell;
    return {rows, most < 0 ? 0 : most > kMostShells ? kMostShells : most / 4 * 4};
  }
  SRCGCNN_HOST_DEVICE int pq() const { return rows * W; }
  SRCGCNN_HOST_DEVICE int terms() const { return pq() + rows * words(pq_stride); }
  SRCGCNN_HOST_DEVICE int distances() const { return terms() + shells * words(2 * W); }
  SRCGCNN_HOST_DEVICE int links() const { return (distances() + shells + 3) / 4 * 4; }
  SRCGCNN_HOST_DEVICE int crystals() const { return links() + rows * 2 * kLinks; }
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
  static SRCGCNN_DEVICE int at(int half, int channel) { return (channel & -V) * 2 + half * V + (channel & (V - 1)); }
  static SRCGCNN_DEVICE int half(int at) { return at / V % 2; }
  static SRCGCNN_DEVICE int channel(int at) { return at / (2 * V) * V + at % V; }
};

// Where what prepare() writes is, in numbers of 4 bytes.
template <int W, class T>
struct Prepared {
  DevicePlan plan;
  static constexpr int64_t nodes_size = Places<W, T>::words(4 * W * W);
  // Scale of the first norm, for r (2W); scale and shift of the second (W each); of the first for a product in the units of its
  // factors, two scales and two shifts for two channels (8W).
  static constexpr int vectors_size = 12 * W, norms = 4 * W;

  static constexpr int table_stride = W + 4;

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
  // Of the rows of the table [p, q] of the first step (n_table, 4W), in the type of what edges read; then the table, (n_table, W)
  // as Row has it, each with its inverse and three numbers of nothing; float32 where there is no step.
  SRCGCNN_HOST_DEVICE int64_t first_products() const { return (counters() + kCounters + 3) / 4 * 4; }
  SRCGCNN_HOST_DEVICE int64_t table() const { return first_products() + int64_t(plan.n_table) * Places<W, T>::words(4 * W); }
  // Of each linear map its weight, (in, out) where that is wide and (out, in) where it is not, then its bias.
  SRCGCNN_HOST_DEVICE int64_t readout() const { return table() + int64_t(plan.n_table) * table_stride; }
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

// A row of h, a lane its channels: float32 with kHalf, else halves in their Unit, whose four words have the high parts of four
// channels and then the low ones. first_word: the lane's first.
template <int W, bool kHalf>
struct Row {
  static constexpr int V = W / 32;
  static SRCGCNN_DEVICE int first_word() {
    const int pair = lane_of() * V / 2;
    return kHalf ? lane_of() * V : pair / 2 * 4 + pair % 2;
  }
  // Of halves, what is yet to be multiplied by the inverse.
  static SRCGCNN_DEVICE Channels<V> load(const float* from) {
    if constexpr (kHalf) return srcgcnn::load<V>(from);
    constexpr int pairs = V > 2 ? V / 2 : 1;
    float high[2 * pairs], low[2 * pairs];
#pragma unroll
    for (int k = 0; k < pairs; ++k) {
      device::of_half(__float_as_uint(from[k]), high[2 * k], high[2 * k + 1]);
      device::of_half(__float_as_uint(from[k + 2]), low[2 * k], low[2 * k + 1]);
    }
    Channels<V> x;
#pragma unroll
    for (int v = 0; v < V; ++v) x.x[v] = high[v] + low[v];
    if (V == 1 && lane_of() % 2) x.x[0] = high[1] + low[1];
    return x;
  }
  static SRCGCNN_DEVICE void store(float* to, float* inverse, const Channels<V>& x) {
    if constexpr (kHalf) {
      srcgcnn::store<V>(to, x);
      return;
    }
    float most = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) most = fmaxf(most, fabsf(x.x[v]));
    const Unit unit(__reduce_max_sync(kAllLanes, int(__float_as_uint(most))));
    if (lane_of() == 0) *inverse = unit.inverse;
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      uint32_t high, low;
      split(x.x[v] * unit.scale, x.x[V > 1 ? v + 1 : v] * unit.scale, high, low);
      if constexpr (V == 1) {
        reinterpret_cast<uint16_t*>(to)[lane_of() % 2] = uint16_t(high);
        reinterpret_cast<uint16_t*>(to + 2)[lane_of() % 2] = uint16_t(low);
      } else {
        to[v / 2] = __uint_as_float(high);
        to[v / 2 + 2] = __uint_as_float(low);
      }
    }
  }
};

// A tile of the weights, 16 channels by as many of their inputs, as lanes hold it, in numbers of 16 bits: a lane has channels
// lane / 4 * 2 and the next one, so that the product leaves it two neighbours, and inputs lane % 4 * 4 .. + 3, so that it
// reads these of a row at once. Of float32 the high parts of a tile come before the low ones.
template <class T>
struct Tile {
  static constexpr int depth = 16, size = 16 * depth, parts = sizeof(T) == 4 ? 2 : 1;
  // Where input k of channel n is, of W inputs.
  template <int W>
  static SRCGCNN_DEVICE int64_t at(int n, int k) {
    const int lane = n % 16 / 2 * 4 + k % depth / 4, word = n % 2 + k % 4 / 2 * 2;
    return int64_t(n / 16 * (W / depth) + k / depth) * parts * size + lane * 8 + word * 2 + k % 2;
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

// Products of x with rows of a matrix, n numbers each: a warp has every so many-th four of them and reads each along the row.
// row_of(k) may be null, done(k, product) is called by one lane.
template <class RowOf, class Done>
SRCGCNN_DEVICE void products_with(const float* x, int n, int rows, RowOf row_of, Done done) {
  constexpr int kAtOnce = 4;
  for (int first = kAtOnce * warp_of(); first < rows; first += kAtOnce * int(blockDim.x) / 32) {
    const float* row[kAtOnce];
    float sums[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) row[j] = first + j < rows ? row_of(first + j) : nullptr;
#pragma unroll 4
    for (int k = lane_of(); k < n; k += 32) {
      const float own = x[k];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) sums[j] = fmaf(own, row[j] ? row[j][k] : 0.0f, sums[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int half = 16; half > 0; half /= 2) sums[j] += __shfl_xor_sync(kAllLanes, sums[j], half);
      if (lane_of() == j && first + j < rows) done(first + j, sums[j]);
    }
  }
}

// The embedded table and the first step's [p, q] of its rows, a block a row; `row` holds W numbers, `sums` 4 W.
template <int W, class T>
SRCGCNN_DEVICE void prepare_table(float* to, const Prepared<W, T>& at, const Layers& layers, float* row, float* sums) {
  const DevicePlan& plan = at.plan;
  const DeviceLayer& layer = layers.of[0];
  const int F = plan.F, columns = 2 * F + plan.n_features;
  for (int place = int(blockIdx.x); place < plan.n_table; place += int(gridDim.x)) {
    products_with(
        layers.table + int64_t(place) * plan.n_atom, plan.n_atom, F,
        [&](int c) { return layers.embedding.weight + int64_t(c) * plan.n_atom; },
        [&](int c, float sum) { row[c] = sum + (layers.embedding.bias ? layers.embedding.bias[c] : 0.0f); });
    __syncthreads();
    if (warp_of() == 0) {
      constexpr int V = W / 32;
      float* held = to + at.table() + int64_t(place) * at.table_stride;
      Channels<V> x;
#pragma unroll
      for (int v = 0; v < V; ++v) x.x[v] = lane_of() * V + v < F ? row[lane_of() * V + v] : 0.0f;
      Row<W, sizeof(T) == 2>::store(held + Row<W, sizeof(T) == 2>::first_word(), held + W, x);
    }
    products_with(
        row, F, 4 * W,
        [&](int n) -> const float* {
          const int c = Sides<W>::channel(n % (2 * W));
          return c < F ? layer.weight + int64_t(Sides<W>::half(n) * F + c) * columns + n / (2 * W) * F : nullptr;
        },
        [&](int n, float sum) { sums[n] = sum; });
    __syncthreads();
    T* products = reinterpret_cast<T*>(to + at.first_products()) + int64_t(place) * 4 * W;
    for (int n = int(threadIdx.x); n < 4 * W; n += int(blockDim.x)) {
      const int c = Sides<W>::channel(n % (2 * W)), half = Sides<W>::half(n);
      float value = 0.0f;
      if (c < F) {
        const FirstNorm norm(layer, half, half * F + c);
        value = fmaf(sums[n], float(norm.scale), n < 2 * W ? float(norm.shift) : 0.0f);
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
    float* vectors = to + at.vectors(t);
    uint16_t* nodes = reinterpret_cast<uint16_t*>(to + at.nodes(t));
    for (int n = int(thread / 32); n < 4 * W; n += int(threads / 32)) {  // a warp a channel of the rows' product
      const int half = n / W % 2, row = half * F + n % W;
      float weights[W / 32];
      int most = 0;
#pragma unroll
      for (int i = 0; i < W / 32; ++i) {
        const int k = i * 32 + lane_of();
        weights[i] = k < F && n % W < F ? layer.weight[int64_t(row) * columns + n / (2 * W) * F + k] : 0.0f;
        const int bits = int(__float_as_uint(weights[i]) & 0x7fffffffu);
        most = bits > most ? bits : most;
      }
      const Unit unit(__reduce_max_sync(kAllLanes, most));
      if (lane_of() == 0) {
        const FirstNorm norm(layer, half, n % W < F ? row : 0);
        float* to = vectors + at.norms + n / 2 * 4 + n % 2;
        to[0] = n % W < F ? float(norm.scale) * (kHalf ? 1.0f : unit.inverse) : 0.0f;
        to[2] = n % W < F && n < 2 * W ? float(norm.shift) : 0.0f;
      }
      if (t >= at.n_weights()) continue;
#pragma unroll
      for (int i = 0; i < W / 32; ++i) {
        uint16_t* to = nodes + Tile<T>::template at<W>(n, i * 32 + lane_of());
        uint32_t high, low;
        split(weights[i] * unit.scale, 0.0f, high, low);
        to[0] = uint16_t(kHalf ? device::to_bfloat16(weights[i], 0.0f) : high);
        if (!kHalf) to[Tile<T>::size] = uint16_t(low);
      }
    }
    if (t < at.n_weights()) {
      T* filter = reinterpret_cast<T*>(to + at.filter(t));
      for (int64_t x = thread; x < int64_t(at.filter_rows()) * 2 * W; x += threads) {
        const int n = int(x % (2 * W)), c = Sides<W>::channel(n), k = int(x / (2 * W));
        const int64_t from = int64_t(Sides<W>::half(n) * F + c) * columns + 2 * F + k;
        store<1>(filter + x, Channels<1>{{c < F && k < at.plan.n_features ? layer.weight[from] : 0.0f}});
      }
    }
    for (int64_t x = thread; x < 3 * W; x += threads) {
      const int c = int(x % W), half = int(x / W);
      double scale = 0, shift = 0;
      if (c < F && half < 2) {
        scale = FirstNorm(layer, half, half * F + c).scale;
      } else if (c < F) {
        scale = layer.gamma2[c] / sqrt(double(layer.var2[c]) + layer.eps2);
        shift = layer.beta2[c] - scale * layer.mean2[c];
      }
      vectors[x] = float(scale);
      if (half == 2) vectors[3 * W + c] = float(shift);
    }
  }
  if (first == 0) prepare_table(to, at, layers, shared, shared + W);
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

  // A row of h as float32, or as pairs of Unit's halves of two channels; 16 words of odd rows change places with the next 16,
  // so that two rows are read side by side.
  SRCGCNN_DEVICE float* h(int row, int channel) const { return shared + row * W + (channel ^ (row & 1) * 16); }
  SRCGCNN_DEVICE float* words(int row) const {  // the lane's of Row
    const int first = Row<W, kHalf>::first_word();
    return h(row, first & ~3) + (first & 3);
  }
  SRCGCNN_DEVICE float* unit(int row) const { return reinterpret_cast<float*>(crystal(row) + 3); }  // the inverse
  SRCGCNN_DEVICE T* pq(int row) const { return reinterpret_cast<T*>(shared + places.pq()) + row * P::pq_stride; }
  SRCGCNN_DEVICE T* term(int shell) const { return reinterpret_cast<T*>(shared + places.terms()) + shell * 2 * W; }
  SRCGCNN_DEVICE float* distance() const { return shared + places.distances(); }
  // First row of the row's crystal, the row after its last; the row's number of edges if find_links() has them all, or -1; unit(),
  // and before that the row's place in the embedded table.
  SRCGCNN_DEVICE int* crystal(int row) const { return reinterpret_cast<int*>(shared + places.crystals()) + 4 * row; }
  SRCGCNN_DEVICE uint2* links(int row) const { return reinterpret_cast<uint2*>(shared + places.links()) + kLinks * row; }
  SRCGCNN_DEVICE unsigned* keys() const { return reinterpret_cast<unsigned*>(shared + places.keys()); }
  SRCGCNN_DEVICE int* numbers() const { return reinterpret_cast<int*>(shared + places.numbers()); }
  SRCGCNN_DEVICE int* count() const { return reinterpret_cast<int*>(shared + places.count()); }
};

// Fills crystal() of the block's rows for `count` crystals, which cover them; lane l has where number l begins, and its size.
// The last number is the row's place in the embedded table, or -1.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void find_crystals(const Block<W, kWarps, kHalf>& b, int begin, int size, int count) {
  static_assert(Shape<W, kWarps>::rows <= 32 * kWarps, "a lane a row");
  const int mine = warp_of() + lane_of() * b.warps;
  int place = -1;
  if (b.s.at.plan.n_table && mine < b.n) place = b.s.h.species[int64_t(b.first) + mine];
  if (place >= b.s.at.plan.n_table || place < 0) place = -1;
  for (int row = warp_of(), number = 0; row < b.n; row += b.warps, ++number) {
    const int k = __popc(__ballot_sync(kAllLanes, lane_of() < count && begin <= b.first + row)) - 1;
    const int from = __shfl_sync(kAllLanes, begin, k), to = from + __shfl_sync(kAllLanes, size, k);
    const int4 all{from, to, -1, __shfl_sync(kAllLanes, place, number)};
    if (lane_of() == 0) *reinterpret_cast<int4*>(b.crystal(row)) = all;
  }
}

// Features of the block's rows, a warp its rows, each lane with its channels.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void read_features(const Block<W, kWarps, kHalf>& b, const DeviceFeatures& h) {
  constexpr int V = W / 32;
  const int F = b.s.at.plan.F, mine = warp_of() + lane_of() * b.warps;
  const int stride = h.species && b.s.at.plan.n_table ? b.s.at.table_stride : F;
  const int64_t i = int64_t(b.first) + mine;
  int place = -1;  // in the table, or -1: no number
  if (mine < b.n) place = h.species ? h.species[i] : mine;
  if (h.species && place >= h.n_table) place = -1;
  const float* data = h.species ? h.data : h.data + int64_t(b.first) * F;
#pragma unroll 4
  for (int k = 0; k < 32; ++k) {
    const int row = warp_of() + k * b.warps, from = __shfl_sync(kAllLanes, place, k);
    if (row >= b.n) break;
    Channels<V> x;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = lane_of() * V + v;
      x.x[v] = c < F ? NAN : 0.0f;
      if (from >= 0 && c < F) x.x[v] = data[int64_t(from) * stride + c];
    }
    Row<W, kHalf>::store(b.words(row), b.unit(row), x);
  }
}

// What a lane holds of a tile of the weights and of a tile of 8 rows.
template <class T>
struct Factors {
  uint32_t high[4], low[4];
  struct Rows {
    uint32_t high[2], low[2];
    SRCGCNN_DEVICE explicit Rows(const float* at) {
      const uint4 found = *reinterpret_cast<const uint4*>(at);
      high[0] = found.x, high[1] = found.y, low[0] = found.z, low[1] = found.w;
    }
  };
  SRCGCNN_DEVICE void read(const uint4* at) {
    const uint4 a = at[0], b = at[32];
    high[0] = a.x, high[1] = a.y, high[2] = a.z, high[3] = a.w;
    low[0] = b.x, low[1] = b.y, low[2] = b.z, low[3] = b.w;
  }
  // The tensor cores cut off what a sum has no digits for: so they add up three products of 16 terms, the small ones first,
  // and the rest is added here.
  template <bool kRelaxed>
  SRCGCNN_DEVICE void add_product(float (&sum)[4], const Rows& rows, bool first) const {
    if (kRelaxed) {
      device::mma_half(sum, high, rows.high);
      return;
    }
    float part[4] = {};
    device::mma_half(part, high, rows.low);
    device::mma_half(part, low, rows.high);
    device::mma_half(part, high, rows.high);
#pragma unroll
    for (int v = 0; v < 4; ++v) sum[v] = first ? part[v] : sum[v] + part[v];
  }
};
template <>
struct Factors<Bfloat16> {
  uint32_t both[4];
  struct Rows {
    uint32_t both[2];
    SRCGCNN_DEVICE explicit Rows(const float* at) {
      const auto found = load<4>(at);
      both[0] = device::to_bfloat16(found.x[0], found.x[1]);
      both[1] = device::to_bfloat16(found.x[2], found.x[3]);
    }
  };
  SRCGCNN_DEVICE void read(const uint4* at) {
    const uint4 a = *at;
    both[0] = a.x, both[1] = a.y, both[2] = a.z, both[3] = a.w;
  }
  template <bool kRelaxed>
  SRCGCNN_DEVICE void add_product(float (&sum)[4], const Rows& rows, bool) const {
    device::mma(sum, both, rows.both);
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};
// Rows of h times the weights, scaled and shifted, to pq: (p, q), each by Sides. A warp keeps the weights of 16 of its channels
// in registers, as many steps as fit there, and takes all tiles of rows, two at a time; sums wait in pq for further steps (W = 128).
template <bool kRelaxed, int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void multiply(const Block<W, kWarps, kHalf>& b, int t) {
  using T = typename Storage<kHalf>::type;
  using S = Shape<W, kWarps>;
  constexpr int depth = Tile<T>::depth, steps = W / depth, held = steps > 4 && !kHalf ? 4 : steps;
  constexpr int apart = 8 * S::shares, stride = Places<W, T>::pq_stride;  // rows of a warp's tiles
  const unsigned thread = device::known_late(threadIdx.x);
  const int lane = thread % 32, group = lane / 4, in_group = lane % 4, warp = thread / 32;
  const int first_tile = warp % S::parts * S::mine, column = first_tile * 16 + 2 * group, from = warp / S::parts * 8;
  const auto* nodes = reinterpret_cast<const uint4*>(b.s.nodes(t)) + first_tile * steps * Tile<T>::parts * 32 + lane;
  const float* norms = b.s.vectors(t) + Prepared<W, T>::norms + 2 * column;
  const float *even_rows = b.h(from + group, 4 * in_group), *odd_rows = b.h(from + group, depth + 4 * in_group);
  const float* units = b.unit(from + 2 * in_group);
  T* products = b.pq(from + 2 * in_group) + column / (2 * W) * 2 * W + Sides<W>::at(column / W % 2, column % W);
  constexpr int passes = steps / held;
#pragma unroll 1
  for (int pass = 0; pass < S::mine * passes; ++pass) {  // neighbours, filter or core, of p or of q
    const bool begins = passes == 1 || pass % passes == 0, ends = passes == 1 || pass % passes == passes - 1;
    Factors<T> w[held];
#pragma unroll
    for (int step = 0; step < held; ++step) w[step].read(nodes + step * Tile<T>::parts * 32);
    nodes += held * Tile<T>::parts * 32;
    const auto norm = load<4>(norms);
    const int first = pass % passes * held * depth;
    const float *even = even_rows + first, *odd = odd_rows + first, *unit = units;
    T* to = products;
    if (ends) norms += 32, products += 32;
    const auto take = [&](auto many) {
      constexpr int tiles = decltype(many)::value;
      float sum[tiles][4] = {};
      const auto place = [&](int x, int v, int c) { return to + (x * apart + v) * stride + (W == 32 ? 2 * c : c); };
      if constexpr (held < steps) {
        if (!begins) {
#pragma unroll
          for (int x = 0; x < tiles; ++x)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[x][k] = load<1>(place(x, k % 2, k / 2)).x[0];
        }
      }
#pragma unroll
      for (int step = 0; step < held; ++step)
#pragma unroll
        for (int x = 0; x < tiles; ++x) {
          const typename Factors<T>::Rows rows((step % 2 ? odd : even) + step / 2 * 2 * depth + x * apart * W);
          w[step].template add_product<kRelaxed>(sum[x], rows, step == 0 && held == steps);
        }
#pragma unroll
      for (int x = 0; x < tiles; ++x)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float inverse = kHalf ? 1.0f : unit[4 * (x * apart + v)];
          Channels<2> y;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float raw = sum[x][v + 2 * c];
            y.x[c] = held == steps || ends ? fmaf(raw * inverse, norm.x[c], norm.x[c + 2]) : raw;
          }
          if constexpr (W == 32) {
            store<1>(place(x, v, 0), Channels<1>{{y.x[0]}});
            store<1>(place(x, v, 1), Channels<1>{{y.x[1]}});
          } else {
            store<2>(place(x, v, 0), y);
          }
        }
      even += tiles * apart * W, odd += tiles * apart * W, unit += 4 * tiles * apart, to += tiles * apart * stride;
    };
    int row = from;
    if constexpr (held < steps) {  // and no registers for two
#pragma unroll 1
      for (; row < b.n; row += apart) take(Count<1>{});
    } else {
#pragma unroll 1
      for (; row + apart < b.n; row += 2 * apart) take(Count<2>{});
      if (row < b.n) take(Count<1>{});
    }
  }
}

// Rows of h and their [p, q] in the first step, from those of the table; a row without a place there is NaN.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void look_up(const Block<W, kWarps, kHalf>& b) {
  using T = typename Storage<kHalf>::type;
  constexpr int vectors = Places<W, T>::words(4 * W) / 4;
  for (int row = warp_of(); row < b.n; row += b.warps) {
    const int place = b.crystal(row)[3];
    const bool there = place >= 0;
    const uint4* from = reinterpret_cast<const uint4*>(b.s.first_products() + int64_t(there ? place : 0) * 4 * W);
#pragma unroll
    for (int k = lane_of(); k < vectors; k += 32)
      reinterpret_cast<uint4*>(b.pq(row))[k] = there ? from[k] : uint4{~0u, ~0u, ~0u, ~0u};
    const float* held = b.s.prepared + b.s.at.table() + int64_t(there ? place : 0) * b.s.at.table_stride;
    auto x = load<W / 32>(held + lane_of() * (W / 32));
#pragma unroll
    for (int v = 0; v < W / 32; ++v) x.x[v] = there ? x.x[v] : __uint_as_float(~0u);  // of both halves
    store<W / 32>(b.h(row, lane_of() * (W / 32)), x);
    __syncwarp();  // the place has been read
    if (lane_of() == 0) *b.unit(row) = held[W];
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
// where q and r of an edge are, in bytes from the beginning. -1 in place of the number of edges: another row.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void find_links(const Block<W, kWarps, kHalf>& b) {
  using T = typename Storage<kHalf>::type;
  const DeviceGraph& g = b.s.g;
  static_assert(kLinks <= 16, "half a warp a row, a lane an edge");
  const char* begins = reinterpret_cast<const char*>(b.shared);
  const auto bytes = [&](const T* at) { return unsigned(reinterpret_cast<const char*>(at) - begins); };
  const int edge = lane_of() % 16;
  for (int first = 2 * warp_of(); first < b.n; first += 2 * b.warps) {
    const int row = first + lane_of() / 16;
    const bool there = row < b.n;
    const int32_t* ends = g.row_ptr + (int64_t(b.first) + (there ? row : first));
    const int begin = ends[0], end = ends[1];
    bool quick = there && begin >= 0 && begin <= end && end <= g.n_edges && end - begin <= kLinks;
    uint2 link = {};
    bool good = true;
    if (quick && edge < end - begin) {
      const int sender = g.sender[int64_t(begin) + edge], shell = shell_of(b, g.distance[int64_t(begin) + edge]);
      good = sender >= b.crystal(row)[0] && sender < b.crystal(row)[1] && shell >= 0;
      link.x = bytes(b.pq(sender - b.first) + 2 * W);
      link.y = bytes(b.term(shell));
    }
    quick = (__ballot_sync(kAllLanes, !good) >> (lane_of() & 16) & 0xffffu) == 0 && quick;
    const int64_t ahead = int64_t(begin) + b.n * kLinks + edge;  // of the block that comes next, perhaps
    device::prefetch(g.sender, ahead, g.n_edges);
    device::prefetch(g.distance, ahead, g.n_edges);
    if (there && edge < kLinks) b.links(row)[edge] = link;
    if (there && edge == 0) b.crystal(row)[2] = quick ? end - begin : -1;
  }
}

template <int V>
struct Pair {
  Channels<V> filter, core;
};
// The lane's of 2W numbers, as Sides has them.
template <int V, class T>
SRCGCNN_DEVICE Pair<V> load_mine(const T* mine) {
  if constexpr (2 * V * sizeof(T) > 16) return {load<V>(mine), load<V>(mine + V)};
  const auto found = load<2 * V>(mine);
  Pair<V> pair;
#pragma unroll
  for (int v = 0; v < V; ++v) pair.filter.x[v] = found.x[v], pair.core.x[v] = found.x[V + v];
  return pair;
}
template <int W, class T>
SRCGCNN_DEVICE Pair<W / 32> load_pair(const T* p) {
  return load_mine<W / 32>(p + lane_of() * (W / 16));
}
// The Gaussians in reach of a distance, one lane a Gaussian, the same in both halves of a warp: the first of them, and the
// lane's value.
struct Gaussians {
  int first;
  float value;
  SRCGCNN_DEVICE Gaussians(const DeviceGraph& g, float distance) {
    static_assert(kReach <= 16, "half a warp");
    const float u = (distance - g.dmin) * g.inverse_step, last = float(g.n_features > kReach ? g.n_features - kReach : 0);
    first = int(fminf(fmaxf(u + (0.5f - kReach / 2), 0.0f), last));
    const float x = u - float(first + lane_of() % 16);
    value = device::exp2(x * x * float(-kLog2e));
  }
};
// r of one distance: those of lane `from` and the next ones times the filter, a lane its channels. What is read of the filter is
// on its way together, as far as registers reach.
template <int W, class T, int V = W / 32>
SRCGCNN_DEVICE Pair<V> edge_term(const T* filter, const Gaussians& e, int from) {
  constexpr int together = V > 2 ? (kHopper ? kReach / 3 : 1) : kReach;
  const T* weights = filter + int64_t(__shfl_sync(kAllLanes, e.first, from)) * 2 * W + lane_of() * 2 * V;
  Pair<V> r = {};
#pragma unroll 1
  for (int k0 = 0; k0 < kReach; k0 += together) {
    Pair<V> w[together];
#pragma unroll
    for (int k = 0; k < together; ++k) w[k] = load_mine<V>(weights + (k0 + k) * 2 * W);
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const float a = __shfl_sync(kAllLanes, e.value, from + k0 + k);
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

// A warp two distances at a time, where registers reach.
template <int W, int kWarps, bool kHalf>
SRCGCNN_DEVICE void fill_shells(const Block<W, kWarps, kHalf>& b, int t) {
  constexpr int V = W / 32, together = V > 2 ? 1 : 2;
  const int count = *b.count() < b.places.shells ? *b.count() : b.places.shells;
  const auto* filter = b.s.filter(t);
  for (int shell = together * warp_of(); shell < count; shell += together * b.warps) {
    const int mine = shell + lane_of() / 16;
    const Gaussians e(b.s.g, b.distance()[together == 2 && mine < count ? mine : shell]);
    const auto fill = [&](int k) {
      const auto r = edge_term<W>(filter, e, 16 * k);
      auto* to = b.term(shell + k) + lane_of() * 2 * V;
      store<V>(to, r.filter);
      store<V>(to + V, r.core);
    };
    fill(0);
    if (together == 2 && shell + 1 < count) fill(1);
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
  const auto scale2 = load<V>(vectors + 2 * W + lane_of() * V), shift2 = load<V>(vectors + 3 * W + lane_of() * V);
  const bool last = t + 1 == s.at.plan.n_steps, leaves = kLayer || (last && !s.out);
  const char* mine = reinterpret_cast<const char*>(b.shared) + lane_of() * 2 * V * int(sizeof(T));
  // Of the warp's rows, all even or all odd.
  float* words = b.words(warp_of());
  const int plain = int(b.h(warp_of(), lane_of() * V) - words);
  int* about = b.crystal(warp_of());
  const T* own = b.pq(warp_of()) + lane_of() * 2 * V;
  const uint2* links = b.links(warp_of());
  static_assert(kWarps % 2 == 0, "");
#pragma unroll 1
  for (int row = warp_of(); row < b.n; row += kWarps, words += kWarps * W, about += kWarps * 4,
           own += kWarps * Places<W, T>::pq_stride, links += kWarps * kLinks) {
    const int4 crystal = *reinterpret_cast<const int4*>(about);
    const int low = crystal.x, high = crystal.y, linked = kLayer ? -1 : crystal.z;
    const float unit = kHalf ? 1.0f : __uint_as_float(unsigned(crystal.w));
    auto x = Row<W, kHalf>::load(words);
    const auto p = load_mine<V>(own);
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
      [[maybe_unused]] constexpr int ahead = V > 2 ? 1 : 2;
      const uint2* link = links;
      const auto add_link = [&](unsigned q, unsigned r) {
        add_pair(load_mine<V>(reinterpret_cast<const T*>(mine + q)), load_mine<V>(reinterpret_cast<const T*>(mine + r)));
      };
      int left = linked - 4;
#pragma unroll 1
      for (; left >= 0; left -= 4, link += 4) {
#pragma unroll ahead
        for (int v = 0; v < 4; v += 2) {
          const uint4 two = *reinterpret_cast<const uint4*>(link + v);
          add_link(two.x, two.y);
          add_link(two.z, two.w);
        }
      }
#pragma unroll 1
      for (; left > -4; --left, ++link) add_link(link->x, link->y);
    } else {
      const int64_t begin = g.row_ptr[int64_t(b.first) + row], end = g.row_ptr[int64_t(b.first) + row + 1];
      bool good = begin >= 0 && begin <= end && end <= g.n_edges;
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
            r = edge_term<W>(filter, Gaussians(g, __shfl_sync(kAllLanes, distance, k)), 0);
          add(__shfl_sync(kAllLanes, sender, k), r);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (!good) sum.x[v] = NAN;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float change = fmaf(scale2.x[v], sum.x[v] * DeviceMath::ln2, shift2.x[v]);
      x.x[v] = softplus<DeviceMath>(fmaf(x.x[v], unit, change));
    }
    if (leaves) {
      const int64_t i = int64_t(b.first) + int(device::known_late(unsigned(row)));
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int c = lane_of() * V + v;
        if (c < s.at.plan.F) s.rows[i * s.at.plan.F + c] = x.x[v];
      }
    }
    if (kLayer) continue;
    __syncwarp();  // lanes have words of each other's channels
    if (last)
      store<V>(words + plain, x);  // for the readout, as it is
    else
      Row<W, kHalf>::store(words, reinterpret_cast<float*>(about + 3), x);
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
      Channels<V> sum = {}, rounded = {};
      float atoms = 0.0f;
      for (int i = crystal_ptr[c + k] + part; i < end; i += kShares) {
        const float weight = s.row_weight[i];
        const Channels<V> h = row(i);
        atoms += weight;
#pragma unroll
        for (int v = 0; v < V; ++v) add_exactly(weight, h.x[v], sum.x[v], rounded.x[v]);
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
  const int whole = (b.s.words - P::fixed) / P::per_row & -8, most = whole < Shape<W, kWarps>::rows ? whole : Shape<W, kWarps>::rows;
  const int wanted = room < 16 ? 16 : room < most ? room : most;
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
    int c = first_not_below(g.crystal_ptr, int(g.n_crystals), s.row_of(task));
    int limit = task + 1 < s.n_tasks ? int(s.row_of(task + 1)) : INT32_MAX;  // the last one has those without rows
    while (c < g.n_crystals) {
      const int mine = c + lane_of(), begin = mine < g.n_crystals ? g.crystal_ptr[mine] : INT32_MAX;
      const int next = begin < limit ? g.crystal_ptr[mine + 1] : begin, first = __shfl_sync(kAllLanes, begin, 0);
      if (first >= limit) break;
      const bool wanted = begin < limit && next - begin > s.least && next - begin <= s.most;
      const int skip = __ffs(__ballot_sync(kAllLanes, wanted)) - 1;  // crystals before the first that is wanted
      if (skip) {
        c += skip < 0 ? 32 : skip;
        continue;
      }
      const unsigned fit = __ballot_sync(kAllLanes, wanted && (mine == c || next - first <= *together));
      const int count = ~fit ? __ffs(~fit) - 1 : 32;
      const int n = __shfl_sync(kAllLanes, next, count - 1) - first;
      const Block<W, kWarps, kHalf> b{s, shared, first, n, Places<W, typename Storage<kHalf>::type>::of(n, s.words)};
      find_crystals(b, begin, next - begin, count);
      if (!s.at.plan.n_table) read_features(b, s.h);
      if (!g.edge_term) {
        find_shells(b);
        __syncthreads();
        find_links(b);
        if (threadIdx.x == 0 && n) *together = joined_next(b, *together);
      }
      __syncthreads();
      const int kept = lane_of() == 0 ? c + count : lane_of() == 1 ? count : limit;  // one register, while they are short
      for (int t = 0; t < s.at.plan.n_steps; ++t) {
        if (!g.edge_term && (t == 0 || !s.at.plan.shared)) fill_shells(b, t);
        find_products(b, t);
        __syncthreads();
        gate_rows<false>(b, t);
        __syncthreads();
      }
      c = __shfl_sync(kAllLanes, kept, 0);
      limit = __shfl_sync(kAllLanes, kept, 2);
      const int taken = __shfl_sync(kAllLanes, kept, 1);
      if (s.out)
        read_out(s, shared + b.places.pq(), s.words - 2 - b.places.pq(), c - taken, taken,
                 [&](int i) { return load<W / 32>(b.h(i - first, lane_of() * (W / 32))); });
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
    if (t || !s.at.plan.n_table) read_features(b, t ? DeviceFeatures{s.rows, nullptr, 0} : s.h);
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
