// Statistics of the batch without an edge pass: second moments of the ends and the vectors of the edges, which are sums over
// rows, and the mean and variance of z that follow from them.
#pragma once
#include "conv.cuh"
#include "rows.cuh"

namespace srcgcnn {

constexpr int kMostCounts = 1056;  // blocks of neighbors

// The blocks of neighbors have about as many rows each, whose neighbours mostly are among them.
SRCGCNN_HOST_DEVICE int64_t counts_of(int64_t n_rows) {
  const int64_t most = (n_rows + 31) / 32;
  return most < kMostCounts ? most : kMostCounts;
}
// w degree of a row; NaN where its edges are nowhere.
SRCGCNN_DEVICE float edges_of(const DeviceConv& g, int64_t row) {
  const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
  return begin < 0 || end < begin || end > g.n_edges ? NAN : g.row_weight[row] * float(end - begin);
}

// The mean of h over the edges of some rows, of F numbers; found about the first of them, so that equal rows have zeros left.
template <int V>
SRCGCNN_DEVICE void sample_edges(const DeviceConv& g, float* centre, float* weights, float* sums) {
  const int samples = g.n_rows < kSamples ? int(g.n_rows) : kSamples;
  int* rows = reinterpret_cast<int*>(weights + kSamples);
  if (int k = int(threadIdx.x); k < samples) {
    rows[k] = sample_row(k, g.n_rows);
    weights[k] = edges_of(g, rows[k]);
  }
  __syncthreads();
  float all = 0.0f;
  for (int k = 0; k < samples; ++k) all += weights[k];
  const int units = int(g.F) / V, shares = units < kThreads ? kThreads / units : 1;
  for (int from = 0; from < units; from += kThreads) {
    const int unit = from + int(threadIdx.x) % (units < kThreads ? units : kThreads), share = int(threadIdx.x) / units;
    const bool there = unit < units && share < shares;
    const float* h = g.h + V * (there ? unit : 0);
    const auto first = load<V>(h + rows[0] * g.F);
    Channels<V> sum = {};
#pragma unroll 8
    for (int k = there ? share : kSamples; k < samples; k += shares) {
      const auto x = load<V>(h + rows[k] * g.F);
#pragma unroll
      for (int v = 0; v < V; ++v) sum.x[v] = fmaf(weights[k], x.x[v] - first.x[v], sum.x[v]);
    }
    store<V>(sums + V * threadIdx.x, sum);
    __syncthreads();
    if (there && share == 0) {
      for (int s = 1; s < shares; ++s) {
        const auto more = load<V>(sums + V * (threadIdx.x + s * units));
#pragma unroll
        for (int v = 0; v < V; ++v) sum.x[v] += more.x[v];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum.x[v] = first.x[v] + (all > 0 ? sum.x[v] / all : 0.0f);
      store<V>(centre + V * unit, sum);
    }
    __syncthreads();
  }
}

// The sums of the neighbours of some rows of a warp, kLanes lanes a row and V channels a lane; four neighbours are on their
// way at a time. Returns the lane's part of the number of edges.
template <int V, int kLanes>
SRCGCNN_DEVICE float add_neighbors(const DeviceConv& g, const float* centre, int64_t begin, int64_t end) {
  constexpr int rows = 32 / kLanes;
  const int F = int(g.F), row_size = F * int(sizeof(float)), in_row = lane_of() % kLanes, base = lane_of() - in_row;
  float edges = 0.0f;
#pragma unroll 1
  for (int64_t first = begin + warp_of() * rows; first < end; first += kWarps * rows) {
    const int64_t row = first + lane_of() / kLanes;
    const bool there = row < end;
    const int from_edge = there ? g.ptr[row] : 0, to_edge = there ? g.ptr[row + 1] : 0;
    const bool bad = from_edge < 0 || to_edge < from_edge || to_edge > g.n_edges;
    const int count = bad ? 0 : to_edge - from_edge, most = __reduce_max_sync(kAllLanes, count);
    if (there && in_row == 0) edges += bad ? NAN : g.row_weight[row] * float(count);
#pragma unroll 1
    for (int channel = 0; channel < F; channel += V * kLanes) {
      const int c = channel + V * in_row, at = c < F ? c : 0;
      const auto mean = load<V>(centre + at);
      const char* h = reinterpret_cast<const char*>(g.h + at);
      Channels<V> sum;
#pragma unroll
      for (int v = 0; v < V; ++v) sum.x[v] = bad ? NAN : 0.0f;
#pragma unroll 1
      for (int from = 0; from < most; from += kLanes) {
        const bool mine = from + in_row < count;
        int other = mine ? g.other[from_edge + from + in_row] : 0;
        const bool outside = unsigned(other) >= uint64_t(g.n_rows);
        if (outside) other = 0;
        if (__ballot_sync(kAllLanes, outside) >> base & (kLanes < 32 ? (1u << kLanes % 32) - 1 : kAllLanes)) sum.x[0] = NAN;
        const int here = most - from < kLanes ? most - from : kLanes;
#pragma unroll 1
        for (int k = 0; k < here; k += 4) {
          Channels<V> y[4];
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const int j = __shfl_sync(kAllLanes, other, base + k + t);
            y[t] = load<V>(reinterpret_cast<const float*>(h + int64_t(j) * row_size));
          }
#pragma unroll
          for (int t = 0; t < 4; ++t)
            if (from + k + t < count)
#pragma unroll
              for (int v = 0; v < V; ++v) sum.x[v] += y[t].x[v] - mean.x[v];
        }
      }
#pragma unroll
      for (int v = 1; v < V; ++v) sum.x[v] += 0.0f * sum.x[0];  // all of a row with a bad index are NaN
      if (there && c < F) store<V>(g.out + row * F + c, sum);
    }
  }
  return edges;
}

__global__ void __launch_bounds__(kThreads, 8) neighbors(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  float *weights = shared, *sums = weights + 2 * kSamples, *centre = sums + 4 * kThreads;
  const bool by_four = in_fours(g.F, g.h);
  if (by_four)
    sample_edges<4>(g, centre, weights, sums);
  else
    sample_edges<1>(g, centre, weights, sums);
  const int64_t blocks = gridDim.x, begin = blockIdx.x * g.n_rows / blocks, end = (blockIdx.x + 1) * g.n_rows / blocks;
  if (blockIdx.x + 1 == blocks)
    for (int64_t c = threadIdx.x; c < g.F; c += kThreads) g.out_x[c] = centre[c];
  const float edges = !by_four    ? add_neighbors<1, 32>(g, centre, begin, end)
                      : g.F <= 32 ? add_neighbors<4, 8>(g, centre, begin, end)
                      : g.F <= 64 ? add_neighbors<4, 16>(g, centre, begin, end)
                                  : add_neighbors<4, 32>(g, centre, begin, end);
  sums[threadIdx.x] = edges;
  __syncthreads();
  if (threadIdx.x) return;
  float sum = 0.0f;
  for (int k = 0; k < kThreads; k += 8) sum += sums[k];
  g.out_m[blockIdx.x] = sum;
}

constexpr int kMostRights = 5;  // tiles of 64 columns of a block of gram_products; warps that multiply are twice as many at most
constexpr int kReaders = 64;    // threads of the two warps that read
constexpr int kGramThreads = 2 * kMostRights * 32 + kReaders;
constexpr int kSlots = kMostRights + 1;         // what a stage has: 64 columns each
constexpr int kSlotStride = kRight + 8, kSlotSize = kStageRows * kSlotStride;
constexpr int kSections = 5;                    // of the product's columns: hh, nn, hn, he, ne
constexpr int kGramScales = kSections * kStageRows * 2;
constexpr int kGramStage = kSlots * kSlotSize + kGramScales;
constexpr int kWordsOfSource = 8;
constexpr int kGramShared = (kSlots * kWordsOfSource + kStages * kGramStage + 4 * kGramThreads) * int(sizeof(float));

// Where 64 columns of a stage come from. Flat: 16 rows of n numbers, one after the other, and so they stay.
struct GramSource {
  const float* base;
  int stride, n;  // n numbers of a row
  int flat, by_four;
};
static_assert(sizeof(GramSource) <= kWordsOfSource * sizeof(float), "has a place in shared memory");

// Of a tile of the Gram matrix's columns: its section, and which 64 of the section's columns it has.
struct GramTile {
  int section, window;
  SRCGCNN_DEVICE GramTile(int tile, int windows, int vector_windows) {
    if (tile < 3 * windows) {
      section = tile % 3;
      window = tile / 3;
    } else {
      section = 3 + (tile - 3 * windows) / vector_windows;
      window = (tile - 3 * windows) % vector_windows;
    }
  }
};

// out (programs, F, P): sums of x_i^T r_i over the rows of a program. x = h - c; r: w degree x, w sum_j (h_j - c), in_degree x,
// w sum_j e, sum_i w_i e, w degree, in_degree, e less its mean; so the left side is x times what belongs to the section and the
// right one what is read, less a multiple of its mean. Two warps read 16 rows at a time, two steps ahead, for the others, which
// have 32 columns of x and 64 of r. See multiply_columns.
struct GramProduct {
  const float *h, *around, *by_receiver, *by_sender, *row_weight, *in_degree, *centre, *counts;
  const double* e_sum;
  const int32_t* ptr;
  float* out;
  double* count;  // w degree of all rows
  int64_t n_rows, n_edges;
  int n_counts, F, K, programs, steps;
  int lefts, rights, left_blocks, right_blocks;  // tiles of a block, blocks of a program
};

__global__ void __launch_bounds__(kGramThreads, 1) gram_products(const __grid_constant__ GramProduct g) {
  SRCGCNN_SHARED(shared);
  const int group = lane_of() / 4, in_group = lane_of() % 4;
  const int F = g.F, K = g.K, columns = 3 * F + 2 * K + 2;
  const int windows = (F + kRight - 1) / kRight, vector_windows = (K + kRight) / kRight;  // of K + 1 columns
  const int blocks = g.left_blocks * g.right_blocks, program = int(blockIdx.x) / blocks;
  const int left_window = int(blockIdx.x) % blocks % g.left_blocks, first_tile = int(blockIdx.x) % blocks / g.left_blocks * g.rights;
  const int tiles = 3 * windows + 2 * vector_windows;
  GramSource* sources = reinterpret_cast<GramSource*>(shared);
  float* stages = shared + kSlots * kWordsOfSource;
  // Slot 0 has the block's columns of h; tile k has slot k + 1, unless another has the same.
  const auto slot_of = [&](int k) {
    const GramTile tile(first_tile + k, windows, vector_windows);
    return tile.section < 2 && tile.window == left_window ? 0 : tile.section == 1 && k > 0 ? k : k + 1;
  };
  if (int(threadIdx.x) <= g.rights) {
    const int slot = int(threadIdx.x), k = slot - 1;
    GramSource source = {nullptr, 0, 0, 0, 0};
    GramTile tile(slot ? first_tile + k : 0, windows, vector_windows);
    if (slot == 0) tile.section = 0, tile.window = left_window;
    if (slot == 0 || (first_tile + k < tiles && slot_of(k) == slot)) {
      const float* x = tile.section < 2 ? g.h : tile.section == 2 ? g.around : tile.section == 3 ? g.by_receiver : g.by_sender;
      source.stride = tile.section < 3 ? F : K;
      source.flat = tile.section >= 3 && vector_windows == 1 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
      source.by_four = source.flat || (source.stride % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0);
      source.base = x + tile.window * kRight;
      source.n = source.stride - tile.window * kRight;
    }
    sources[slot] = source;
  }
  // What all blocks of neighbors counted, in the same order by each.
  double count = 0;
  double* partial = reinterpret_cast<double*>(stages);
  if (warp_of() == 0) {
#pragma unroll 11
    for (int k = lane_of(); k < g.n_counts; k += 32) count += g.counts[k];
    partial[lane_of()] = count;
  }
  __syncthreads();
  count = 0;
  for (int lane = 0; lane < 32; ++lane) count += partial[lane];
  if (blockIdx.x == 0 && threadIdx.x == 0) *g.count = count;
  __syncthreads();

  const int reader = int(threadIdx.x) - 32 * g.lefts * g.rights;  // of those that read, or negative
  // The lane's columns, and the means of these.
  const int own_left = warp_of() % g.lefts * kLeft, own = warp_of() / g.lefts, left_column = left_window * kRight + own_left;
  const GramTile tile(first_tile + own, windows, vector_windows);
  const bool busy = reader < 0 && left_column < F && first_tile + own < tiles;
  const int slot = busy ? slot_of(own) : 0, there = tile.section < 3 ? F - tile.window * kRight : K - tile.window * kRight;
  const bool flat = busy && sources[slot].flat;
  float left_mean[4], mean[2][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int c = left_column + 4 * group + k;
    left_mean[k] = c < F ? g.centre[c] : 0.0f;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int in = 32 * q + 4 * group + k, at = tile.window * kRight + in;
      mean[q][k] = 0.0f;
      if (in < there && tile.section != 2) mean[q][k] = tile.section < 2 ? g.centre[at] : float(g.e_sum[at] / count);
      if (in == there && tile.section > 2) mean[q][k] = -1.0f;  // the number of edges itself
    }
  }

  int* place = reinterpret_cast<int*>(stages + kStages * kGramStage) + 4 * threadIdx.x;  // of the sums: registers are scarce
  place[0] = left_column;
  place[1] = tile.window * kRight;
  place[2] = tile.section;
  place[3] = there;
  float weight = 0.0f, degree = 0.0f, in_degree = 0.0f;  // of a row, by the first 16 that read
  const auto read_row = [&](int step) {
    const int64_t row = int64_t(program + step * g.programs) * kStageRows + reader;
    weight = degree = in_degree = 0.0f;
    if (reader >= kStageRows || row >= g.n_rows) return;
    const int begin = g.ptr[row], end = g.ptr[row + 1];
    degree = begin < 0 || end < begin || end > g.n_edges ? NAN : float(end - begin);
    weight = g.row_weight[row];
    in_degree = g.in_degree[row];
  };
  const int own_row = reader / 16, own_column = reader % 16 * 4;  // of a slot, to be read
  const auto read = [&](int step) {
    float* stage = stages + step % kStages * kGramStage;
    const int64_t first = int64_t(program + step * g.programs) * kStageRows;
    if (reader < kStageRows) {
      float* scales = stage + kSlots * kSlotSize + 2 * reader;
      store<2>(scales, Channels<2>{{weight * degree, 1.0f}});
      store<2>(scales + 2 * kStageRows, Channels<2>{{in_degree, 1.0f}});
      store<2>(scales + 4 * kStageRows, Channels<2>{{weight, 0.0f}});
      store<2>(scales + 6 * kStageRows, Channels<2>{{weight, degree}});
      store<2>(scales + 8 * kStageRows, Channels<2>{{1.0f, in_degree}});
    }
    read_row(step + 1);
    const int rows = g.n_rows - first < kStageRows ? int(g.n_rows - first) : kStageRows;  // none, where negative
#pragma unroll 1
    for (int s = 0; s <= g.rights; ++s) {
      const GramSource source = sources[s];
      if (!source.base) continue;
      float* to = stage + s * kSlotSize;
      if (source.flat) {
        const float* from = source.base + (rows > 0 ? first : 0) * source.n;
        const int all = rows > 0 ? rows * source.n : 0;
#pragma unroll 1
        for (int x = 4 * reader; x < kStageRows * source.n; x += 4 * kReaders) {
          if (x < all && x + 4 > all)
            store<4>(to + x, four_of(from, x, all, false));
          else
            device::copy_async(to + x, from + (x < all ? x : 0), x < all);
        }
        continue;
      }
      const int size = source.stride * int(sizeof(float));
      const char* from = reinterpret_cast<const char*>(source.base + (own_column < source.n ? own_column : 0));
#pragma unroll
      for (int k = 0; k < kStageRows; k += kReaders / 16) {
        const int row = own_row + k;
        const auto* x = reinterpret_cast<const float*>(from + int64_t(row < rows ? int(first) + row : 0) * size);
        const int there = row < rows ? source.n - own_column : 0;
        if (source.by_four)
          device::copy_async(to + row * kSlotStride + own_column, x, there > 0);
        else
          store<4>(to + row * kSlotStride + own_column, four_of(x, 0, there, false));
      }
    }
    device::commit_copies();
  };
  if (reader >= 0) read_row(0);
#pragma unroll 1
  for (int step = 0; reader >= 0 && step < kStages - 1; ++step) read(step);
  float sums[2][8][4] = {};
#pragma unroll 1
  for (int step = 0; program + step * g.programs < g.steps; ++step) {
    device::wait_for_copies<kStages - 2>();
    __syncthreads();
    if (reader >= 0) read(step + kStages - 1);
    if (!busy) continue;
    const float* stage = stages + step % kStages * kGramStage;
    const float* scales = stage + kSlots * kSlotSize + 2 * (tile.section * kStageRows + in_group);
    const float* a = stage + in_group * kSlotStride + own_left + 4 * group;
    const int stride = flat ? K : kSlotStride;
    const float* b = stage + slot * kSlotSize + in_group * stride + 4 * group;
#pragma unroll 1
    for (int half = 0; half < kStageRows / 8; ++half) {
      Channels<2> scale[2];
      float high[2][4], low[2][4];
#pragma unroll
      for (int v = 0; v < 2; ++v) {  // rows in_group + 4 v
        scale[v] = load<2>(scales + 8 * v);
        const auto x = load<4>(a + 4 * v * kSlotStride);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          split(scale[v].x[0] * (x.x[k] - left_mean[k]), high[k / 2][v * 2 + k % 2], low[k / 2][v * 2 + k % 2]);
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float right[4][2], right_low[4][2];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          Channels<4> x;
          if (flat) {
#pragma unroll
            for (int k = 0; k < 4; ++k) x.x[k] = 32 * q + 4 * group + k < K ? b[4 * v * stride + 32 * q + k] : 0.0f;
          } else {
            x = load<4>(b + 4 * v * stride + 32 * q);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) split(fmaf(-scale[v].x[1], mean[q][k], x.x[k]), right[k][v], right_low[k][v]);
        }
        add_products(sums, q, high, low, right, right_low);
      }
      scales += 16;
      a += 8 * kSlotStride;
      b += 8 * stride;
    }
  }
  device::wait_for_copies<0>();
  if (!busy) return;
  // Of the section's columns there is one more where it is of edge vectors: the number of edges, at the end of the row.
  const int section = place[2], exist = place[3];
  const int begin = section == 0 ? 0 : section == 1 ? 2 * F : section == 2 ? F : 3 * F + (section - 3) * K;
  float* out = g.out + int64_t(program) * F * columns;
  for_columns(sums, place[0], [&](int row, int c, const Channels<4>& y) {
    if (row >= F) return;
    float* of_row = out + int64_t(row) * columns;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (c + k < exist) of_row[begin + place[1] + c + k] = y.x[k];
      if (c + k == exist && section > 2) of_row[columns - 5 + section] = y.x[k];
    }
  });
}

constexpr int kSums = 3, kStatisticsThreads = 512, kStatisticsAhead = 10;

// A block a column of z. In float64 all of it: with w its weights and S the centred second moments, whose blocks hh, hn,
// nn, he, ne are the product's, the variance is w^T S w / E.
__global__ void __launch_bounds__(kStatisticsThreads, 2) edge_statistics(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);  // of w^T S w, of the mean's shift, of the mean
  float* w = shared + 2 * kSums * kStatisticsThreads;
  const int F = int(g.F), K = int(g.n_features), columns = 3 * F + 2 * K + 2, n = int(blockIdx.x);
  float* right = w + 2 * F + K;  // what a column of the product is multiplied by, besides own[f] or other[f]
  const float *own = w, *other = w + F, *filter = w + 2 * F;
  for (int k = int(threadIdx.x); k < 2 * F + K; k += kStatisticsThreads) w[k] = g.weight[int64_t(n) * (2 * F + K) + k];
  __syncthreads();
  for (int x = int(threadIdx.x); x < columns; x += kStatisticsThreads)
    right[x] = x < F            ? own[x]
               : x < 2 * F      ? 2 * other[x - F]
               : x < 3 * F      ? other[x - 2 * F]
               : x < columns - 2 ? 2 * filter[(x - 3 * F) % K]
                                : 0.0f;
  __syncthreads();
  const double count = *g.totals;
  double mine[kSums] = {};
  constexpr int warps = kStatisticsThreads / 32;
  for (int f = warp_of(); f < F; f += warps) {
    const float* row = g.product + int64_t(f) * columns;
    double of_own = 0, of_other = 0;
    for (int first = lane_of(); first < columns; first += 32 * kStatisticsAhead) {
      float value[kStatisticsAhead];
#pragma unroll
      for (int k = 0; k < kStatisticsAhead; ++k) value[k] = first + 32 * k < columns ? row[first + 32 * k] : 0.0f;
#pragma unroll
      for (int k = 0; k < kStatisticsAhead; ++k) {
        const int x = first + 32 * k;
        if (x >= columns) break;
        const double product = double(value[k]) * right[x];
        if (x < 2 * F || (x >= 3 * F && x < 3 * F + K))
          of_own += product;
        else
          of_other += product;
      }
    }
    mine[0] += own[f] * of_own + other[f] * of_other;
  }
  for (int f = int(threadIdx.x); f < F; f += kStatisticsThreads) {
    const float* row = g.product + int64_t(f + 1) * columns - 2;
    mine[1] += (double(own[f]) * row[0] + double(other[f]) * row[1]) / count;
    mine[2] += (double(own[f]) + other[f]) * g.x[f];
  }
  for (int at = int(threadIdx.x); at < K * K; at += kStatisticsThreads) {
    const int k = at / K, l = at % K;
    mine[0] += double(filter[k]) * filter[l] * (g.e_gram[at] - g.e_sum[k] / count * g.e_sum[l]);
  }
  for (int k = int(threadIdx.x); k < K; k += kStatisticsThreads) mine[2] += filter[k] * (g.e_sum[k] / count);
  for (int k = 0; k < kSums; ++k) sums[k * kStatisticsThreads + threadIdx.x] = mine[k];
  for (int step = kStatisticsThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step)
      for (int k = 0; k < kSums; ++k) sums[k * kStatisticsThreads + threadIdx.x] += sums[k * kStatisticsThreads + threadIdx.x + step];
  }
  if (threadIdx.x == 0) {
    const double shift = sums[kStatisticsThreads], var = sums[0] / count - shift * shift;
    const double mean = sums[2 * kStatisticsThreads] + shift;
    g.out[n] = float(mean);
    g.out_x[n] = var < 0 ? 0.0f : float(var);
    if (g.running_mean1) {
      move(g.running_mean1[n], float(mean + (g.bias ? g.bias[n] : 0.0f)), g.momentum1);
      move(g.running_var1[n], float((var < 0 ? 0 : var) * (count / (count - 1))), g.momentum1);
    }
  }
}

}  // namespace srcgcnn
