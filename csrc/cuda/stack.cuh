// Inference: all convolutions of a crystal in one kernel, where its rows fit into shared memory, else layer by layer.
//
// z_ij = p_i + q_j + r_ij. A block takes the next crystals that have at most `rows` rows together through all steps:
// features, p and q of its rows and r of its distinct distances stay in shared memory. Small blocks, of which a
// multiprocessor holds two, so that one multiplies while the other gates, serve most crystals; large ones, alone, the rest. p and q come from the tensor cores
// and leave them scaled and shifted, in the units of gate2. A warp walks the edges of a row, each lane with its channels.
// No result depends on what else is in the block: rows of a product are independent, and a row's edges have an order.
// An index that leaves its crystal is not followed; its row becomes NaN.
#pragma once
#include "device.cuh"
#include "stack.h"

namespace srcgcnn {

constexpr int kSmall = 8, kLarge = 16;  // warps of a block
constexpr int kMostShells = 256;
constexpr int kSlots = 1024, kProbes = 8;  // of the hash table of distances; one that finds no slot is left out
constexpr int kReach = 9;        // Gaussians in reach of a distance; those left out are below 2e-9
constexpr unsigned kEmpty = 0xffffffffu;

// A block of so many warps: how many a multiprocessor holds, and how many rows one takes at most. With more rows more
// tiles share one reading of the weights; their sums fill 64 registers of a thread.
template <int W, int kWarps>
struct Shape {
  static constexpr int threads = 32 * kWarps, blocks = 16 / kWarps, rows = (W == 32 ? 64 : 4096 / W) * kWarps / 8;
  static constexpr int tiles = rows / 16, columns = 4 * W / 8 / kWarps;  // of a product, in tiles: of all, of a warp
};

// Places in shared memory, in numbers of 4 bytes. The strides spread rows of a tile over the banks.
template <int W>
struct Places {
  static constexpr int h_stride = W + 4, pq_stride = 4 * W + 8;
  static constexpr int per_row = h_stride + pq_stride + 2, fixed = 2 * kSlots + 4, per_shell = 2 * W + 1;
  int rows, shells;

  SRCGCNN_DEVICE int pq() const { return rows * h_stride; }
  SRCGCNN_DEVICE int terms() const { return pq() + rows * pq_stride; }
  SRCGCNN_DEVICE int distances() const { return terms() + shells * 2 * W; }
  SRCGCNN_DEVICE int crystals() const { return distances() + (shells + 1) / 2 * 2; }
  SRCGCNN_DEVICE int keys() const { return crystals() + rows * 2; }
  SRCGCNN_DEVICE int numbers() const { return keys() + kSlots; }
  SRCGCNN_DEVICE int count() const { return numbers() + kSlots; }
};

// Where what prepare() writes is.
template <int W>
struct Prepared {
  int n_features, n_weights, n_steps;
  static constexpr int64_t nodes_size = int64_t(4) * W * W;
  static constexpr int vectors_size = 6 * W;  // scale and shift of the first norm (2W each), of the second (W each)

  SRCGCNN_HOST_DEVICE int64_t weight_size() const { return nodes_size + int64_t(n_features) * 2 * W; }
  SRCGCNN_HOST_DEVICE int64_t nodes(int t) const { return (n_weights > 1 ? t : 0) * weight_size(); }
  SRCGCNN_HOST_DEVICE int64_t filter(int t) const { return nodes(t) + nodes_size; }
  SRCGCNN_HOST_DEVICE int64_t vectors(int t) const { return n_weights * weight_size() + int64_t(t) * vectors_size; }
  SRCGCNN_HOST_DEVICE int64_t bad() const { return vectors(n_steps); }  // not 0: crystal_ptr does not ascend from 0 to N
  SRCGCNN_HOST_DEVICE int64_t size() const { return bad() + 1; }
};

template <int W>
struct Stack {
  float* out;  // (N, F)
  float* q;    // (N, 2W): those of large crystals
  const float* prepared;
  DeviceFeatures h;
  DeviceGraph g;
  Prepared<W> at;
  Places<W> places;
  int F, n_steps, least;  // crystals with more rows than `least` are meant
  bool relaxed;           // one TF32 product, not three
  int rows_per_task, n_tasks;
};

constexpr int kLayersAtOnce = 16;
struct Layers {
  DeviceLayer of[kLayersAtOnce];
};

// Weights to the order in which the lanes of mma read them, filters to (K, 2W), both norms to scale and shift.
template <int W>
__global__ void prepare(float* to, Prepared<W> at, Layers layers, int first, int count, int F, DeviceGraph g) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const int columns = 2 * F + at.n_features;
  for (int l = 0; l < count; ++l) {
    const DeviceLayer& layer = layers.of[l];
    const int t = first + l;
    if (t < at.n_weights)
      for (int64_t x = thread; x < at.weight_size(); x += threads) {
        int row, column;
        bool there;
        if (x < at.nodes_size) {
          const int pair = int(x & 1), lane = int(x >> 1) & 31, tile = int(x >> 6);
          const int k = tile % (W / 8) * 8 + lane % 4 + 4 * pair, n = tile / (W / 8) * 8 + lane / 4;
          there = k < F && n % W < F;
          row = n / W % 2 * F + n % W;
          column = n / (2 * W) * F + k;
        } else {
          const int n = int((x - at.nodes_size) % (2 * W));
          there = n % W < F;
          row = n / W * F + n % W;
          column = 2 * F + int((x - at.nodes_size) / (2 * W));
        }
        to[at.nodes(t) + x] = there ? layer.weight[int64_t(row) * columns + column] : 0.0f;
      }
    float* vectors = to + at.vectors(t);
    for (int64_t x = thread; x < 3 * W; x += threads) {
      const int c = int(x % W), half = int(x / W);
      double scale = 0, shift = 0;
      if (c < F && half < 2) {
        const int n = half * F + c;
        const double a = layer.gamma1[n] / sqrt(double(layer.var1[n]) + layer.eps1);
        const double unit = half ? kLog2e : -kLog2e;
        scale = unit * a;
        shift = unit * (layer.beta1[n] + a * ((layer.bias ? double(layer.bias[n]) : 0.0) - layer.mean1[n]));
      } else if (c < F) {
        scale = layer.gamma2[c] / sqrt(double(layer.var2[c]) + layer.eps2);
        shift = layer.beta2[c] - scale * layer.mean2[c];
      }
      vectors[half < 2 ? x : 4 * W + c] = float(scale);
      vectors[half < 2 ? 2 * W + x : 5 * W + c] = float(shift);
    }
  }
  for (int64_t c = thread; c <= g.n_crystals; c += threads) {
    const int64_t p = g.crystal_ptr[c];
    const bool good = c ? p >= g.crystal_ptr[c - 1] && p <= g.n_rows && (c < g.n_crystals || p == g.n_rows) : p == 0;
    if (!good) to[at.bad()] = 1.0f;
  }
}

// The part of a block of kWarps warps: `n` rows from `first` on.
template <int W, int kWarps>
struct Block {
  static constexpr int warps = kWarps, threads = 32 * kWarps;
  const Stack<W>& s;
  float* shared;
  int first, n;

  SRCGCNN_DEVICE float* h(int row) const { return shared + row * Places<W>::h_stride; }
  SRCGCNN_DEVICE float* pq(int row) const { return shared + s.places.pq() + row * Places<W>::pq_stride; }
  SRCGCNN_DEVICE float* term(int shell) const { return shared + s.places.terms() + shell * 2 * W; }
  SRCGCNN_DEVICE float* distance() const { return shared + s.places.distances(); }
  // First row of the row's crystal, and the row after its last; the same twice: not a row of this block.
  SRCGCNN_DEVICE int* crystal(int row) const { return reinterpret_cast<int*>(shared + s.places.crystals()) + 2 * row; }
  SRCGCNN_DEVICE unsigned* keys() const { return reinterpret_cast<unsigned*>(shared + s.places.keys()); }
  SRCGCNN_DEVICE int* numbers() const { return reinterpret_cast<int*>(shared + s.places.numbers()); }
  SRCGCNN_DEVICE int* count() const { return reinterpret_cast<int*>(shared + s.places.count()); }
};

// Fills crystal() of the block's rows for crystals [c, end), which cover them; larger ones than `least` alone count.
template <int W, int kWarps>
SRCGCNN_DEVICE void find_crystals(const Block<W, kWarps>& b, int c, int end, int least) {
  for (int row = threadIdx.x; row < b.n; row += b.threads) {
    int k = c;
    while (k + 1 < end && b.s.g.crystal_ptr[k + 1] <= b.first + row) ++k;
    const int from = b.s.g.crystal_ptr[k], to = b.s.g.crystal_ptr[k + 1];
    b.crystal(row)[0] = from;
    b.crystal(row)[1] = to - from > least ? to : from;
  }
}

// Features of the block's rows, and zeros up to whole tiles and to W.
template <int W, int kWarps>
SRCGCNN_DEVICE void read_features(const Block<W, kWarps>& b, const DeviceFeatures& h) {
  const int F = b.s.F, rows = (b.n + 15) / 16 * 16;
  for (int x = threadIdx.x; x < rows * W; x += b.threads) {
    const int row = x / W, c = x % W;
    float value = 0.0f;
    if (row < b.n && c < F) {
      const int64_t i = int64_t(b.first) + row, from = h.species ? h.species[i] : i;
      const bool known = !h.species || (from >= 0 && from < h.n_table);
      value = known ? h.data[from * F + c] : NAN;
    }
    b.h(row)[c] = value;
  }
}

// Rows of h times the weights, scaled and shifted, to pq: (p filter, p core, q filter, q core). A warp has its columns of
// all rows: for each tile of the weights, read once, all tiles of rows.
template <int W, int kWarps>
SRCGCNN_DEVICE void multiply(const Block<W, kWarps>& b, int t) {
  constexpr int kTiles = Shape<W, kWarps>::tiles, per_warp = Shape<W, kWarps>::columns;
  constexpr int most = kTiles > 4 ? 16 / kTiles : 4, together = per_warp < most ? per_warp : most;
  const int lane = lane_of(), group = lane / 4, in_group = lane % 4;
  const float* nodes = b.s.prepared + b.s.at.nodes(t);
  const float* scale = b.s.prepared + b.s.at.vectors(t);
  const float* shift = scale + 2 * W;
  for (int first = warp_of() * per_warp; first < (warp_of() + 1) * per_warp; first += together) {
    float sum[kTiles][together][4] = {};
#pragma unroll 1
    for (int k = 0; k < W; k += 8) {
      float w[together][2], w_low[together][2];
#pragma unroll
      for (int x = 0; x < together; ++x) {
        const auto read = load<2>(nodes + (((first + x) * (W / 8) + k / 8) * 32 + lane) * 2);
#pragma unroll
        for (int y = 0; y < 2; ++y) split(read.x[y], w[x][y], w_low[x][y]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile * 16 >= b.n) break;
        const float* at = b.h(tile * 16 + group) + k + in_group;
        constexpr int eight = 8 * Places<W>::h_stride;
        float a[4], a_low[4];
        split(at[0], a[0], a_low[0]);
        split(at[eight], a[1], a_low[1]);
        split(at[4], a[2], a_low[2]);
        split(at[eight + 4], a[3], a_low[3]);
        if (!b.s.relaxed) {
#pragma unroll
          for (int x = 0; x < together; ++x) {
            device::mma(sum[tile][x], a_low, w[x]);
            device::mma(sum[tile][x], a, w_low[x]);
          }
        }
#pragma unroll
        for (int x = 0; x < together; ++x) device::mma(sum[tile][x], a, w[x]);
      }
    }
#pragma unroll
    for (int x = 0; x < together; ++x) {
      const int column = (first + x) * 8 + 2 * in_group;
      const auto by = load<2>(scale + column % (2 * W));
      const auto add = column < 2 * W ? load<2>(shift + column) : Channels<2>{};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile * 16 >= b.n) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Channels<2> y;
#pragma unroll
          for (int c = 0; c < 2; ++c) y.x[c] = fmaf(sum[tile][x][2 * half + c], by.x[c], add.x[c]);
          store<2>(b.pq(tile * 16 + group + 8 * half) + column, y);
        }
      }
    }
  }
}

SRCGCNN_DEVICE int slot_of(unsigned key, int probe) { return int(((key * 0x9e3779b1u) >> 20) + probe) & (kSlots - 1); }

// The distinct distances of the block's edges, numbered. Which number one has, and which are left out where there are
// too many, depends on the threads; what the number stands for does not.
template <int W, int kWarps>
SRCGCNN_DEVICE void find_shells(const Block<W, kWarps>& b) {
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
      if (number < b.s.places.shells) {
        b.distance()[number] = __uint_as_float(key);
        b.numbers()[slot] = number;
      }
      break;
    }
  }
}
template <int W, int kWarps>
SRCGCNN_DEVICE int shell_of(const Block<W, kWarps>& b, float distance) {
  const unsigned key = __float_as_uint(distance);
  for (int probe = 0; probe < kProbes; ++probe) {
    const int slot = slot_of(key, probe);
    if (b.keys()[slot] == key) return b.numbers()[slot];
  }
  return -1;
}

template <int V>
struct Pair {
  Channels<V> filter, core;
};
template <int W, int V = W / 32>
SRCGCNN_DEVICE Pair<V> load_pair(const float* p) {
  return {load<V>(p + lane_of() * V), load<V>(p + W + lane_of() * V)};
}

// r of one distance: the Gaussians in reach of it times the filter, one lane a Gaussian, then one lane its channels.
template <int W, int V = W / 32>
SRCGCNN_DEVICE Pair<V> edge_term(const float* filter, const DeviceGraph& g, float distance) {
  const int count = g.n_features < kReach ? g.n_features : kReach;
  const float u = (distance - g.dmin) * g.inverse_step;
  const int first = int(fminf(fmaxf(u + (0.5f - kReach / 2), 0.0f), float(g.n_features - count)));
  const float x = u - float(first + lane_of());
  const float value = device::exp2(x * x * float(-kLog2e));
  Pair<V> r = {};
#pragma unroll
  for (int k = 0; k < kReach; ++k) {
    if (k == count) break;
    const float a = __shfl_sync(kAllLanes, value, k);
    const auto w = load_pair<W>(filter + int64_t(first + k) * 2 * W);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      r.filter.x[v] = fmaf(a, w.filter.x[v], r.filter.x[v]);
      r.core.x[v] = fmaf(a, w.core.x[v], r.core.x[v]);
    }
  }
  return r;
}

template <int W, int kWarps>
SRCGCNN_DEVICE void fill_shells(const Block<W, kWarps>& b, int t) {
  constexpr int V = W / 32;
  const int count = *b.count() < b.s.places.shells ? *b.count() : b.s.places.shells;
  for (int shell = warp_of(); shell < count; shell += b.warps) {
    const auto r = edge_term<W>(b.s.prepared + b.s.at.filter(t), b.s.g, b.distance()[shell]);
    store<V>(b.term(shell) + lane_of() * V, r.filter);
    store<V>(b.term(shell) + W + lane_of() * V, r.core);
  }
}

// h <- softplus(h + scale2 sum_j gate(p_i + q_j + r_ij) + shift2), a warp a row. q of the block's rows, or, with
// kLayer, of all. The last step leaves for `out`, and each where kLayer.
template <int W, int kWarps, bool kLayer>
SRCGCNN_DEVICE void gate_rows(const Block<W, kWarps>& b, int t) {
  constexpr int V = W / 32;
  const Stack<W>& s = b.s;
  const DeviceGraph& g = s.g;
  const float* filter = s.prepared + s.at.filter(t);
  const float* vectors = s.prepared + s.at.vectors(t);
  const auto scale = load_pair<W>(vectors);
  const auto scale2 = load<V>(vectors + 4 * W + lane_of() * V), shift2 = load<V>(vectors + 5 * W + lane_of() * V);
  for (int row = warp_of(); row < b.n; row += b.warps) {
    const int low = b.crystal(row)[0], high = b.crystal(row)[1];
    if (kLayer && low == high) continue;
    const int64_t i = int64_t(b.first) + row, begin = g.row_ptr[i], end = g.row_ptr[i + 1];
    bool good = begin >= 0 && begin <= end && end <= g.n_edges;
    const auto p = load_pair<W>(b.pq(row));
    Channels<V> sum = {};
    for (int64_t e0 = begin; good && e0 < end; e0 += 32) {
      const int64_t e = e0 + lane_of();
      int sender = -1, shell = -1;
      float distance = 0.0f;
      if (e < end) {
        sender = g.sender[e];
        sender = sender >= low && sender < high ? sender : -1;
        if (!g.edge_term) {
          distance = g.distance[e];
          shell = shell_of(b, distance);
        }
      }
      const int many = end - e0 < 32 ? int(end - e0) : 32;
      for (int k = 0; k < many; ++k) {
        const int j = __shfl_sync(kAllLanes, sender, k), number = __shfl_sync(kAllLanes, shell, k);
        if (j < 0) {
          good = false;
          break;
        }
        const auto q = load_pair<W>(kLayer ? s.q + int64_t(j) * 2 * W : b.pq(j - b.first) + 2 * W);
        Pair<V> r;
        if (number >= 0)
          r = load_pair<W>(b.term(number));
        else if (g.edge_term)
          r = load_pair<W>(g.edge_term + (e0 + k) * 2 * W);
        else
          r = edge_term<W>(filter, g, __shfl_sync(kAllLanes, distance, k));
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float f = fmaf(scale.filter.x[v], r.filter.x[v], p.filter.x[v] + q.filter.x[v]);
          const float c = fmaf(scale.core.x[v], r.core.x[v], p.core.x[v] + q.core.x[v]);
          sum.x[v] += gate2<DeviceMath>(f, c);
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
      if ((kLayer || t + 1 == s.n_steps) && c < s.F) s.out[i * s.F + c] = x.x[v];
    }
    if (!kLayer) store<V>(h, x);
  }
}

template <int W>
SRCGCNN_DEVICE void spoil(const Stack<W>& s, int64_t first, int64_t end) {
  for (int64_t x = first * s.F + threadIdx.x; x < end * s.F; x += blockDim.x) s.out[x] = NAN;
}

// All steps of the crystals that have more than `least` and at most `rows` rows. A task is the crystals that begin in its
// range of rows.
template <int W, int kWarps>
__global__ void __launch_bounds__(Shape<W, kWarps>::threads, Shape<W, kWarps>::blocks) whole_crystals(const Stack<W> s) {
  SRCGCNN_SHARED(shared);
  const DeviceGraph& g = s.g;
  const bool bad = s.prepared[s.at.bad()] != 0.0f;
  for (int task = int(blockIdx.x); task < s.n_tasks; task += int(gridDim.x)) {
    const int64_t first_row = int64_t(task) * s.rows_per_task, last = first_row + s.rows_per_task;
    const int64_t end_row = last < g.n_rows ? last : g.n_rows;
    if (bad) {
      spoil(s, first_row, end_row);
      continue;
    }
    int c = first_not_below(g.crystal_ptr, int(g.n_crystals), first_row);
    const int end = first_not_below(g.crystal_ptr, int(g.n_crystals), end_row);
    while (c < end) {
      const int mine = c + lane_of(), first = g.crystal_ptr[c];
      const int begin = mine < end ? g.crystal_ptr[mine] : 0, size = mine < end ? g.crystal_ptr[mine + 1] - begin : 0;
      const bool wanted = mine < end && size > s.least && size <= s.places.rows;
      const int skip = __ffs(__ballot_sync(kAllLanes, wanted)) - 1;  // crystals before the first that is wanted
      if (skip) {
        c += skip < 0 ? 32 : skip;
        continue;
      }
      const unsigned fit = __ballot_sync(kAllLanes, wanted && begin + size - first <= s.places.rows);
      const int count = ~fit ? __ffs(~fit) - 1 : 32;
      const Block<W, kWarps> b{s, shared, first, g.crystal_ptr[c + count] - first};
      find_crystals(b, c, c + count, 0);
      read_features(b, s.h);
      if (!g.edge_term) find_shells(b);
      __syncthreads();
      for (int t = 0; t < s.n_steps; ++t) {
        if (!g.edge_term && (t == 0 || s.at.n_weights > 1)) fill_shells(b, t);
        multiply<W, kWarps>(b, t);
        __syncthreads();
        gate_rows<W, kWarps, false>(b, t);
        __syncthreads();
      }
      c += count;
    }
  }
}

// Marks the rows of crystals with more than `least` rows in this block; false where there are none.
template <int W, int kWarps>
SRCGCNN_DEVICE bool find_large(const Block<W, kWarps>& b) {
  const DeviceGraph& g = b.s.g;
  int c = first_not_below(g.crystal_ptr, int(g.n_crystals), int64_t(b.first) + 1) - 1;  // that of the first row
  const int begin = c;
  bool found = false;
  while (c < g.n_crystals && g.crystal_ptr[c] < b.first + b.n) {
    found |= g.crystal_ptr[c + 1] - g.crystal_ptr[c] > b.s.least;
    ++c;
  }
  if (found) find_crystals(b, begin, c, b.s.least);
  return found;
}

// One step of the crystals with more than `least` rows: with kGate the step itself, else the q of their rows, which it
// needs.
template <int W, bool kGate>
__global__ void __launch_bounds__(Shape<W, kSmall>::threads, Shape<W, kSmall>::blocks)
    layer_of_crystals(const Stack<W> s, int t) {
  SRCGCNN_SHARED(shared);
  const bool bad = s.prepared[s.at.bad()] != 0.0f;
  const int64_t rows = s.places.rows;
  for (int64_t first = blockIdx.x * rows; first < s.g.n_rows; first += gridDim.x * rows) {
    const int64_t left = s.g.n_rows - first;
    const Block<W, kSmall> b{s, shared, int(first), int(left < rows ? left : rows)};
    if (bad) {
      if (kGate) spoil(s, first, first + b.n);
      continue;
    }
    if (!find_large(b)) continue;
    read_features(b, t ? DeviceFeatures{s.out, nullptr, 0} : s.h);
    if (kGate && !s.g.edge_term) find_shells(b);
    __syncthreads();
    multiply<W, kSmall>(b, t);
    if (kGate && !s.g.edge_term) fill_shells(b, t);
    __syncthreads();
    if (kGate)
      gate_rows<W, kSmall, true>(b, t);
    else
      for (int x = threadIdx.x; x < b.n * 2 * W; x += b.threads) {
        const int row = x / (2 * W), c = x % (2 * W);
        if (b.crystal(row)[0] < b.crystal(row)[1]) s.q[(first + row) * 2 * W + c] = b.pq(row)[2 * W + c];
      }
    __syncthreads();
  }
}

}  // namespace srcgcnn
