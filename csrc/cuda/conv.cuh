// Training: the edge passes of a convolution, and the node kernels around them.
//
// A warp takes the edges of 16 rows, 16 at a time, for 32 of the F channels. r = e(d) w_e of 16 edges is a product on the
// tensor cores, whose operand e(d) is formed in registers, and of which only the steps in reach of the distances are
// done. The product leaves a lane 8 channels of 2 edges, filter and core; there q (or p) of the other end is gathered and
// the gate formed. What is summed over a row goes through shared memory, where each lane then walks one channel of the
// edges in their order. So no sum depends on the order of threads, of warps or of blocks. Nothing of an edge is stored.
#pragma once
#include "conv.h"
#include "device.cuh"

namespace srcgcnn {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChunk = 32;           // channels of a block
constexpr int kTile = 16;            // edges that a warp takes at a time
constexpr int kTaskRows = 16;        // whose edges these are
constexpr int kAtOnce = 8;           // numbers that a lane reads from shared memory before it adds them up
constexpr int kMostDegree = 1 << 26;  // so that the edges of a task can be counted
constexpr int kTerms = 48;           // Gaussians whose sums e^T dy a block holds
constexpr float kCut = 20.25f;       // squared distance from a Gaussian's centre in its widths; beyond it is below 2e-9

// Of a warp in shared memory, in numbers; strides that spread what lanes touch together over the banks.
constexpr int kMessageStride = kChunk + 8, kTileStride = 2 * kChunk + 8, kTermStride = kTerms + 8;
constexpr int kMessageSize = kTile * kMessageStride, kTileSize = kTile * kTileStride, kTermSize = kTile * kTermStride;
constexpr int kVectors = 4 * kChunk;  // of a block: gamma and beta of its channels, in the units of gate2

SRCGCNN_DEVICE float gaussian(float u, int k) {
  const float x = u - float(k), x2 = x * x;
  return x2 > kCut ? 0.0f : device::exp2(x2 * float(-kLog2e));  // a NaN stays one
}

// The edges of 16 rows. Lane l has row first + l: its first edge, and how many of the task's edges come before it.
struct Task {
  int64_t first;
  int begin, before, degree, total;
  bool bad;

  SRCGCNN_DEVICE Task(const DeviceConv& g, int64_t first_row) : first(first_row), begin(0), degree(0), bad(false) {
    const int lane = lane_of();
    if (lane < kTaskRows && first + lane < g.n_rows) {
      const int64_t from = g.ptr[first + lane], to = g.ptr[first + lane + 1];
      bad = from < 0 || to < from || to > g.n_edges || to - from > kMostDegree;
      begin = bad ? 0 : int(from);
      degree = bad ? 0 : int(to - from);
    }
    int sum = degree;
#pragma unroll
    for (int d = 1; d < kTaskRows; d *= 2) {
      const int below = __shfl_sync(kAllLanes, sum, lane - d);
      sum += lane >= d && lane < kTaskRows ? below : 0;
    }
    before = sum - degree;
    total = __shfl_sync(kAllLanes, sum, kTaskRows - 1);
  }
};

// 16 edges of a task; lanes l and l + 16 have number l.
struct Edges {
  int count, row;         // how many there are; the row that this one belongs to, counted within the task
  int other, number;      // row at the other end, or -1: there is none; number of the edge
  float u, poison;        // distance in units of the Gaussians; NaN if the other end is outside
  bool live;
  unsigned last;          // bit l: edge l is the last of its row

  SRCGCNN_DEVICE Edges(const DeviceConv& g, const Task& task, int tile) {
    const int at = tile * kTile + (lane_of() & (kTile - 1));
    count = task.total - tile * kTile < kTile ? task.total - tile * kTile : kTile;
    live = at < task.total;
    row = 0;
#pragma unroll
    for (int step = kTaskRows / 2; step > 0; step /= 2) {  // the last row that does not begin after it
      const int before = __shfl_sync(kAllLanes, task.before, row + step);
      if (before <= at) row += step;
    }
    const int within = at - __shfl_sync(kAllLanes, task.before, row);
    const int place = __shfl_sync(kAllLanes, task.begin, row) + within;
    const int degree = __shfl_sync(kAllLanes, task.degree, row);
    last = __ballot_sync(kAllLanes, live && within + 1 == degree);
    other = -1;
    number = 0;
    u = -1e3f;  // beyond all Gaussians
    poison = 0.0f;
    if (live) {
      other = g.other[place];
      number = g.number ? g.number[place] : place;
      const bool good = other >= 0 && other < g.n_rows && number >= 0 && number < g.n_edges;
      if (!good) {
        other = -1;
        number = 0;
        poison = NAN;
      }
      if (g.distance) u = (g.distance[number] - g.dmin) * g.inverse_step;
    }
  }
};

// Steps of 8 Gaussians that are in reach of some of the 16 edges: [from, to).
struct Reach {
  int from, to;
  SRCGCNN_DEVICE Reach(const DeviceConv& g, const Edges& e) {
    const float most = float(g.n_features - 1);
    int low = int(g.n_features) - 1, high = 0;
    if (e.live) {  // bounds that hold for a NaN too
      low = int(fminf(fmaxf(e.u - 4.5f, 0.0f), most));
      high = int(fmaxf(fminf(e.u + 4.5f, most), 0.0f));
    }
#pragma unroll
    for (int d = 1; d < kTile; d *= 2) {
      const int l = __shfl_xor_sync(kAllLanes, low, d), h = __shfl_xor_sync(kAllLanes, high, d);
      low = l < low ? l : low;
      high = h > high ? h : high;
    }
    from = low / 8;
    to = high / 8 + 1;
  }
};

// What a lane has of 16 edges after a product: edges lane / 4 and lane / 4 + 8, of each 8 channels, as two times four
// neighbours that begin at 4 (lane % 4) and 16 later.
SRCGCNN_DEVICE int edge_of(int half) { return lane_of() / 4 + 8 * half; }
SRCGCNN_DEVICE int channel_of(int four) { return 16 * four + 4 * (lane_of() % 4); }
struct Values {
  float filter[2][2][4], core[2][2][4];  // edge, four, channel
};

// r of 16 edges for the chunk's channels; poisoned. T: how pq and term are stored.
template <class T>
SRCGCNN_DEVICE void edge_terms(Values& r, const DeviceConv& g, const Edges& e, const Reach& reach, int chunk) {
  float poison[2], u[2];
  int number[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    poison[half] = __shfl_sync(kAllLanes, e.poison, edge_of(half));
    u[half] = __shfl_sync(kAllLanes, e.u, edge_of(half));
    number[half] = __shfl_sync(kAllLanes, e.live ? e.number : -1, edge_of(half));
  }
  if (g.term) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const T* at = static_cast<const T*>(g.term) + int64_t(number[half]) * 2 * g.width + chunk * kChunk + channel_of(four);
        const bool there = number[half] >= 0;
        const auto f = there ? load<4>(at) : Channels<4>{}, c = there ? load<4>(at + g.width) : Channels<4>{};
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          r.filter[half][four][v] = f.x[v] + poison[half];
          r.core[half][four][v] = c.x[v] + poison[half];
        }
      }
    return;
  }
  float sum[8][4];
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int v = 0; v < 4; ++v) sum[n][v] = poison[v / 2];
  const int steps = int(g.n_features + 7) / 8;
#pragma unroll 1
  for (int k = reach.from; k < reach.to; ++k) {
    float a[4], low[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) split(gaussian(u[v % 2], 8 * k + lane_of() % 4 + v / 2 * 4), a[v], low[v]);
    const float* weights = g.filter + ((int64_t(chunk) * steps + k) * 8 * 32 + lane_of()) * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const auto w = load<2>(weights + n * 64);
      float b[2], b_low[2];
#pragma unroll
      for (int v = 0; v < 2; ++v) split(w.x[v], b[v], b_low[v]);
      if (!g.relaxed) {
        device::mma(sum[n], low, b);
        device::mma(sum[n], a, b_low);
      }
      device::mma(sum[n], a, b);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int four = 0; four < 2; ++four)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        r.filter[half][four][v] = sum[2 * four + v / 2][2 * half + v % 2];
        r.core[half][four][v] = sum[4 + 2 * four + v / 2][2 * half + v % 2];
      }
}

// The rows at both ends of edge `half` of this lane; false: there is no such edge, or it must not be followed.
SRCGCNN_DEVICE bool ends_of(const Task& task, const Edges& e, int half, int64_t& own, int64_t& other) {
  own = task.first + __shfl_sync(kAllLanes, e.row, edge_of(half));
  other = __shfl_sync(kAllLanes, e.other, edge_of(half));
  return other >= 0;
}

// x = p_i + q_j + r_ij of edge `half`, four channels of it, in place of r.
template <class T>
SRCGCNN_DEVICE void add_ends(float (&filter)[4], float (&core)[4], const DeviceConv& g, int64_t p_row, int64_t q_row,
                             int channel) {
  const T* p = static_cast<const T*>(g.pq) + p_row * 4 * g.width + channel;
  const T* q = static_cast<const T*>(g.pq) + (q_row * 4 + 2) * g.width + channel;
  const auto pf = load<4>(p), pc = load<4>(p + g.width), qf = load<4>(q), qc = load<4>(q + g.width);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    filter[v] = pf.x[v] + (qf.x[v] + filter[v]);
    core[v] = pc.x[v] + (qc.x[v] + core[v]);
  }
}

// gamma and beta of the chunk's channels times -log2(e) (filter) and log2(e) (core), for the block; zeros beyond F.
SRCGCNN_DEVICE void read_vectors(float* vectors, const DeviceConv& g, int chunk) {
  for (int k = int(threadIdx.x); k < kVectors; k += int(blockDim.x)) {
    const int c = chunk * kChunk + k % kChunk, half = k / kChunk % 2;
    const float* from = k < 2 * kChunk ? g.gamma1 : g.beta1;
    const float unit = half ? DeviceMath::log2e : -DeviceMath::log2e;
    vectors[k] = c < g.F ? from[half * g.F + c] * unit : 0.0f;
  }
  __syncthreads();
}
// y of four channels in these units.
SRCGCNN_DEVICE void scaled(float (&f)[4], float (&c)[4], const float (&x_f)[4], const float (&x_c)[4],
                           const float* vectors) {
  const auto gf = load<4>(vectors), gc = load<4>(vectors + kChunk);
  const auto bf = load<4>(vectors + 2 * kChunk), bc = load<4>(vectors + 3 * kChunk);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    f[v] = fmaf(x_f[v], gf.x[v], bf.x[v]);
    c[v] = fmaf(x_c[v], gc.x[v], bc.x[v]);
  }
}

// Rows of the task without edges, or whose pointers are bad: done(row, 0 or NaN).
template <class Done>
SRCGCNN_DEVICE void rows_without_edges(const DeviceConv& g, const Task& task, Done done) {
  const bool there = lane_of() < kTaskRows && task.first + lane_of() < g.n_rows;
  const unsigned bad = __ballot_sync(kAllLanes, task.bad);
  for (unsigned left = __ballot_sync(kAllLanes, there && task.degree == 0); left; left &= left - 1) {
    const int l = __ffs(left) - 1;
    done(task.first + l, bad >> l & 1 ? NAN : 0.0f);
  }
}

// bn2 of one channel with given statistics.
struct Norm {
  float scale, shift, mean, rstd;
  SRCGCNN_DEVICE Norm(const DeviceConv& g, int64_t c, double exact_mean, double var) {
    const double by = 1 / sqrt(var + g.eps), scaled = g.gamma2[c] * by;
    scale = float(scaled);
    shift = float(g.beta2[c] - exact_mean * scaled);
    mean = float(exact_mean);
    rstd = float(by);
  }
  SRCGCNN_DEVICE Norm(const DeviceConv& g, int64_t c) : Norm(g, c, g.mean2[c], g.var2[c]) {}
};

SRCGCNN_DEVICE float finished(float h, float m, float scale, float shift) {
  return softplus<DeviceMath>(h + fmaf(m, scale, shift));
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 4) gate_sum(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), channel = chunk * kChunk + lane_of();
  float* messages = shared + kVectors + warp_of() * kMessageSize;
  read_vectors(shared, g, chunk);
  const int64_t first = (int64_t(blockIdx.x / chunks) * kWarps + warp_of()) * kTaskRows;
  if (first >= g.n_rows) return;
  const bool mine = channel < g.F;
  float scale = 0.0f, shift = 0.0f;
  if (g.out && mine) {
    const Norm norm(g, channel);
    scale = norm.scale;
    shift = norm.shift;
  }
  const auto done = [&](int64_t row, float sum) {
    const int64_t at = row * g.F + channel;
    if (!mine) return;
    if (g.out_m) g.out_m[at] = sum;
    if (g.out) g.out[at] = finished(g.h[at], sum, scale, shift);
  };
  const Task task(g, first);
  rows_without_edges(g, task, done);
  float sum = 0.0f;
  for (int tile = 0; tile * kTile < task.total; ++tile) {
    const Edges e(g, task, tile);
    Values x;
    edge_terms<T>(x, g, e, Reach(g, e), chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t own, other;
      const bool there = ends_of(task, e, half, own, other);
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const int c = channel_of(four);
        if (there) add_ends<T>(x.filter[half][four], x.core[half][four], g, own, other, chunk * kChunk + c);
        float y_f[4], y_c[4];
        scaled(y_f, y_c, x.filter[half][four], x.core[half][four], shared + c);
        Channels<4> message;
#pragma unroll
        for (int v = 0; v < 4; ++v) message.x[v] = gate2<DeviceMath>(y_f[v], y_c[v]);
        store<4>(messages + edge_of(half) * kMessageStride + c, message);
      }
    }
    __syncwarp();
    for (int k = 0; k < e.count; k += kAtOnce) {
      float message[kAtOnce];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) message[v] = messages[(k + v) * kMessageStride + lane_of()];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        if (k + v < e.count) sum += message[v];
        if (e.last >> (k + v) & 1) {
          done(task.first + __shfl_sync(kAllLanes, e.row, k + v), sum * DeviceMath::ln2);
          sum = 0.0f;
        }
      }
    }
    __syncwarp();
  }
}

// x and dy of 16 edges, (filter, core), to shared memory. Edges that are not there leave zeros in dy.
template <bool kBySender, class T>
SRCGCNN_DEVICE void gradients(float* x_tile, float* dy_tile, Values& x, const DeviceConv& g, const Task& task,
                              const Edges& e, int chunk, const float* vectors) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t own, other;
    const bool there = ends_of(task, e, half, own, other);
    const int64_t p_row = kBySender ? other : own, q_row = kBySender ? own : other;
    const float weight = kBySender && g.row_weight && there ? g.row_weight[other] : 1.0f;
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const int c = channel_of(four), column = chunk * kChunk + c;
      auto &x_f = x.filter[half][four], &x_c = x.core[half][four];
      Channels<4> upstream = {};  // which times the NaN of an edge that must not be followed is NaN
      if (there) {
        add_ends<T>(x_f, x_c, g, p_row, q_row, column);
        upstream = load<4>(g.d_m + p_row * g.width + column);
      }
      float y_f[4], y_c[4];
      scaled(y_f, y_c, x_f, x_c, vectors + c);
      Channels<4> out_f, out_c, dy_f, dy_c;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const auto d = gate_gradient2<DeviceMath>(y_f[v], y_c[v]);
        dy_f.x[v] = upstream.x[v] * d.d_filter;
        dy_c.x[v] = upstream.x[v] * d.d_core;
        out_f.x[v] = kBySender ? weight * x_f[v] : x_f[v];
        out_c.x[v] = kBySender ? weight * x_c[v] : x_c[v];
      }
      const int at = edge_of(half) * kTileStride + c;
      store<4>(x_tile + at, out_f);
      store<4>(x_tile + at + kChunk, out_c);
      store<4>(dy_tile + at, dy_f);
      store<4>(dy_tile + at + kChunk, dy_c);
    }
  }
}

// The tiles of 16 edges summed row by row, each lane its channel: done(row, sums of dy, sums of x) at the end of a row,
// each(edge, half, dy, x) for every number.
template <class Done, class Each>
SRCGCNN_DEVICE void walk(const float* x_tile, const float* dy_tile, const Task& task, const Edges& e, float (&d)[2],
                         float (&x_sum)[2], Done done, Each each) {
  constexpr int kSome = kAtOnce / 2;
  for (int k = 0; k < e.count; k += kSome) {
    float dy[kSome][2], x[kSome][2];
#pragma unroll
    for (int v = 0; v < kSome; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (k + v) * kTileStride + half * kChunk + lane_of();
        dy[v][half] = dy_tile[at];
        x[v][half] = x_tile[at];
      }
#pragma unroll
    for (int v = 0; v < kSome; ++v) {
      if (k + v >= e.count) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        d[half] += dy[v][half];
        x_sum[half] += x[v][half];
        each(k + v, half, dy[v][half], x[v][half]);
      }
      if (e.last >> (k + v) & 1) {
        done(task.first + __shfl_sync(kAllLanes, e.row, k + v), d, x_sum);
        d[0] = d[1] = x_sum[0] = x_sum[1] = 0.0f;
      }
    }
  }
}

// e of 16 edges for the Gaussians from `first` on, row by row, all lanes together; of these the tiles of 16 [from, to).
SRCGCNN_DEVICE void write_terms(float* terms, const DeviceConv& g, const Edges& e, int first, int from, int to) {
  const int begin = from > 0 ? 16 * from : 0, end = 16 * to < kTerms ? 16 * to : kTerms;
  for (int k = 0; k < kTile; ++k) {
    const bool live = k < e.count;
    const float u = __shfl_sync(kAllLanes, e.u, k);
    const int64_t at = int64_t(__shfl_sync(kAllLanes, e.number, k)) * g.n_features + first;
    for (int c = begin + lane_of(); c < end; c += 32) {
      const bool there = live && first + c < g.n_features;
      terms[k * kTermStride + c] = !there ? 0.0f : g.distance ? gaussian(u, first + c) : g.features[at + c];
    }
  }
}

// Sums of left^T right over 16 edges, (48, 64), added to what the lanes have; of the Gaussians those in reach. 16 of them
// are a tile of the product.
using Sums = float[kTerms / 16][8][4];
SRCGCNN_DEVICE void add_product(Sums& sums, const float* left, const float* right, bool relaxed, int from, int to) {
  const int group = lane_of() / 4, in_group = lane_of() % 4;
#pragma unroll
  for (int k = 0; k < kTile; k += 8) {
    const float* b_at = right + (k + in_group) * kTileStride + group;
    const float* a_at = left + (k + in_group) * kTermStride + group;
    float a[kTerms / 16][4], a_low[kTerms / 16][4];
#pragma unroll
    for (int tile = 0; tile < kTerms / 16; ++tile) {
      if (tile < from || tile >= to) continue;
      split(a_at[16 * tile], a[tile][0], a_low[tile][0]);
      split(a_at[16 * tile + 8], a[tile][1], a_low[tile][1]);
      split(a_at[4 * kTermStride + 16 * tile], a[tile][2], a_low[tile][2]);
      split(a_at[4 * kTermStride + 16 * tile + 8], a[tile][3], a_low[tile][3]);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float b[2], b_low[2];
      split(b_at[8 * n], b[0], b_low[0]);
      split(b_at[4 * kTileStride + 8 * n], b[1], b_low[1]);
#pragma unroll
      for (int tile = 0; tile < kTerms / 16; ++tile) {
        if (tile < from || tile >= to) continue;
        if (!relaxed) {
          device::mma(sums[tile][n], a_low[tile], b);
          device::mma(sums[tile][n], a[tile], b_low);
        }
        device::mma(sums[tile][n], a[tile], b);
      }
    }
  }
}

// The warps' sums added up in their order, in shared memory (48, 64), for the block, in the place of what it held.
SRCGCNN_DEVICE void add_warps(float* total, const Sums& sums) {
  const int group = lane_of() / 4, in_group = lane_of() % 4;
  for (int warp = 0; warp < kWarps; ++warp) {
    __syncthreads();
    if (warp != warp_of()) continue;
#pragma unroll
    for (int tile = 0; tile < kTerms / 16; ++tile)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float* at = total + (16 * tile + group + v / 2 * 8) * 2 * kChunk + 8 * n + 2 * in_group + v % 2;
          *at = warp ? *at + sums[tile][n][v] : sums[tile][n][v];
        }
  }
  __syncthreads();
}

// Sums of the four warps in their order, for k numbers of each lane: done(number, sum), one warp a number.
template <int kNumbers, class Done>
SRCGCNN_DEVICE void add_lanes(float* shared, const float (&sums)[kNumbers], Done done) {
#pragma unroll
  for (int k = 0; k < kNumbers; ++k) shared[(warp_of() * kNumbers + k) * 32 + lane_of()] = sums[k];
  __syncthreads();
  for (int k = warp_of(); k < kNumbers; k += kWarps) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[(warp * kNumbers + k) * 32 + lane_of()];
    done(k, sum);
  }
}

// A block is one of `programs`, for one chunk of channels and one block of 48 Gaussians.
template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 2) backward_receivers(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), channel = chunk * kChunk + lane_of();
  const int program = int(blockIdx.x / chunks % g.programs), first_term = int(blockIdx.x / chunks / g.programs) * kTerms;
  const bool mine = channel < g.F, writes = mine && first_term == 0;
  float* x_tile = shared + kVectors + warp_of() * (2 * kTileSize + kTermSize);
  float *dy_tile = x_tile + kTileSize, *terms = dy_tile + kTileSize;
  read_vectors(shared, g, chunk);
  float by_gamma[2] = {}, by_vector[4] = {};  // sums of dy x of a row; of dy x and of dy
  const auto done = [&](int64_t row, const float (&d)[2], const float (&x_sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // row by row: few roundings
      by_vector[half] += by_gamma[half];
      by_vector[2 + half] += d[half];
      by_gamma[half] = 0.0f;
      if (!writes) continue;
      g.out[(row * 4 + half) * g.F + channel] = d[half];
      if (g.out_x) g.out_x[(row * 2 + half) * g.F + channel] = x_sum[half];
    }
  };
  Sums sums = {};
  for (int64_t first = (int64_t(program) * kWarps + warp_of()) * kTaskRows; first < g.n_rows;
       first += g.programs * kWarps * kTaskRows) {
    const Task task(g, first);
    rows_without_edges(g, task, [&](int64_t row, float value) { done(row, {value, value}, {value, value}); });
    float d[2] = {}, x_sum[2] = {};
    for (int tile = 0; tile * kTile < task.total; ++tile) {
      const Edges e(g, task, tile);
      const Reach reach(g, e);
      Values x;
      edge_terms<T>(x, g, e, reach, chunk);
      gradients<false, T>(x_tile, dy_tile, x, g, task, e, chunk, shared);
      const int from = g.distance ? (8 * reach.from - first_term) / 16 : 0;
      const int to = g.distance ? (8 * reach.to - first_term + 15) / 16 : kTerms / 16;
      write_terms(terms, g, e, first_term, from, to);
      __syncwarp();
      walk(x_tile, dy_tile, task, e, d, x_sum, done, [&](int k, int half, float dy, float value) {
        by_gamma[half] = fmaf(dy, value, by_gamma[half]);
        if (!g.out_edge) return;
        const int64_t number = __shfl_sync(kAllLanes, e.number, k);
        if (writes) g.out_edge[(number * 2 + half) * g.F + channel] = dy;
      });
      add_product(sums, terms, dy_tile, g.relaxed, from, to);
      __syncwarp();
    }
  }
  float *total = shared + kVectors, *lanes = total + kTerms * 2 * kChunk;
  add_warps(total, sums);
  for (int k = int(threadIdx.x); k < kTerms * 2 * kChunk; k += kThreads) {
    const int term = first_term + k / (2 * kChunk), half = k / kChunk % 2, c = chunk * kChunk + k % kChunk;
    if (term < g.n_features && c < g.F)
      g.out_filter[((int64_t(program) * g.n_features + term) * 2 + half) * g.F + c] = total[k];
  }
  add_lanes(lanes, by_vector, [&](int k, float sum) {
    if (writes) g.out_gamma[(int64_t(program) * 4 + k) * g.F + channel] = sum;
  });
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 4) backward_senders(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), channel = chunk * kChunk + lane_of();
  float* x_tile = shared + kVectors + warp_of() * 2 * kTileSize;
  float* dy_tile = x_tile + kTileSize;
  read_vectors(shared, g, chunk);
  const int64_t first = (int64_t(blockIdx.x / chunks) * kWarps + warp_of()) * kTaskRows;
  if (first >= g.n_rows) return;
  const bool mine = channel < g.F;
  const auto done = [&](int64_t row, const float (&d)[2], const float (&x_sum)[2]) {
    if (!mine) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t c = half * g.F + channel;
      float sum = d[half];
      if (g.row_weight) sum -= fmaf(g.degree[row], g.c1[c], x_sum[half] * g.c2[c]);
      g.out[(row * 4 + 2) * g.F + c] = g.a[c] * sum;
    }
  };
  const Task task(g, first);
  rows_without_edges(g, task, [&](int64_t row, float value) { done(row, {value, value}, {0.0f, 0.0f}); });
  float d[2] = {}, x_sum[2] = {};
  for (int tile = 0; tile * kTile < task.total; ++tile) {
    const Edges e(g, task, tile);
    Values x;
    edge_terms<T>(x, g, e, Reach(g, e), chunk);
    gradients<true, T>(x_tile, dy_tile, x, g, task, e, chunk, shared);
    __syncwarp();
    walk(x_tile, dy_tile, task, e, d, x_sum, done, [](int, int, float, float) {});
    __syncwarp();
  }
}

// A block is one of `programs` for 32 channels; warp w takes every fourth row.
__global__ void __launch_bounds__(kThreads) column_sums(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), channel = int(blockIdx.x % chunks) * kChunk + lane_of();
  const int64_t program = blockIdx.x / chunks;
  const bool mine = channel < g.F;
  const float centre = g.totals && mine ? float(g.totals[channel] / g.totals[3 * g.F + channel]) : 0.0f;
  float sums[4] = {};
  for (int64_t row = program * kWarps + warp_of(); row < g.n_rows; row += g.programs * kWarps) {
    float u = g.row_weight[row];
    if (g.ptr) {
      const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
      u *= begin < 0 || end < begin || end > g.n_edges ? NAN : float(end - begin);
    }
    const float x = mine ? g.x[row * g.F + channel] - centre : 0.0f;
    sums[0] = fmaf(u, x, sums[0]);
    if (g.degree) sums[1] = fmaf(g.degree[row], x, sums[1]);
    sums[2] = fmaf(u * x, x, sums[2]);
    sums[3] += u;
  }
  add_lanes(shared, sums, [&](int k, float sum) {
    if (mine) g.out[(program * 4 + k) * g.F + channel] = sum;
  });
}

// A warp a row, a lane a channel, or a Gaussian.
__global__ void __launch_bounds__(kThreads, 8) gram_rows(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  float *centre = shared, *e_mean = shared + g.F;
  const double count = g.totals[3 * g.F];
  for (int64_t c = threadIdx.x; c < g.F; c += kThreads) centre[c] = float(g.totals[c] / count);
  for (int64_t k = threadIdx.x; k < g.n_features; k += kThreads) e_mean[k] = float(g.e_sum[k] / count);
  __syncthreads();
  const int64_t F = g.F, K = g.n_features, columns = 3 * F + 2 * K + 2;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp_of(); row < g.n_rows; row += int64_t(gridDim.x) * kWarps) {
    const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
    const bool bad = begin < 0 || end < begin || end > g.n_edges;
    const float w = g.row_weight[row], degree = bad ? NAN : float(end - begin), in_degree = g.degree[row];
    float* out = g.out + row * columns;
    for (int64_t c = lane_of(); c < F; c += 32) {
      const float x = g.h[row * F + c] - centre[c];
      float sum = 0.0f;
      for (int64_t e = begin; !bad && e < end; ++e) {
        const int64_t j = g.other[e];
        sum += j >= 0 && j < g.n_rows ? g.h[j * F + c] - centre[c] : NAN;
      }
      g.out_x[row * F + c] = x;
      out[c] = w * degree * x;
      out[F + c] = w * sum;
      out[2 * F + c] = in_degree * x;
    }
    for (int64_t k = lane_of(); k < K; k += 32) {
      out[3 * F + k] = w * fmaf(-degree, e_mean[k], g.by_receiver[row * K + k]);
      out[3 * F + K + k] = fmaf(-in_degree, e_mean[k], g.by_sender[row * K + k]);
    }
    if (lane_of() < 2) out[columns - 2 + lane_of()] = lane_of() ? in_degree : w * degree;
  }
}

constexpr int kSums = 3;

// A block a column of z. In float64 all of it: with w its weights and S the centred second moments, whose blocks hh, hn,
// nn, he, ne are the product's, the variance is w^T S w / E.
__global__ void __launch_bounds__(kThreads, 8) edge_statistics(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);  // of w^T S w, of the mean's shift, of the mean
  float* w = shared + 2 * kSums * kThreads;
  const int64_t F = g.F, K = g.n_features, columns = 3 * F + 2 * K + 2, n = blockIdx.x;
  const float *own = w, *other = w + F, *filter = w + 2 * F;
  for (int64_t k = threadIdx.x; k < 2 * F + K; k += kThreads) w[k] = g.weight[n * (2 * F + K) + k];
  __syncthreads();
  const double count = g.totals[3 * F];
  double mine[kSums] = {};
  for (int64_t f = warp_of(); f < F; f += kWarps) {
    const float* row = g.product + f * columns;
    for (int64_t x = lane_of(); x < columns; x += 32) {
      const double value = row[x];
      if (x < F)
        mine[0] += value * own[f] * own[x];
      else if (x < 2 * F)
        mine[0] += 2 * value * own[f] * other[x - F];
      else if (x < 3 * F)
        mine[0] += value * other[f] * other[x - 2 * F];
      else if (x < 3 * F + K)
        mine[0] += 2 * value * own[f] * filter[x - 3 * F];
      else if (x < 3 * F + 2 * K)
        mine[0] += 2 * value * other[f] * filter[x - 3 * F - K];
      else {
        const double by = x == columns - 2 ? own[f] : other[f];
        mine[1] += by * value / count;
        mine[2] += by * float(g.totals[f] / count);  // as gram_rows rounds it
      }
    }
  }
  for (int64_t k = warp_of(); k < K; k += kWarps) {
    const double mean = g.e_sum[k] / count;
    for (int64_t l = lane_of(); l < K; l += 32)
      mine[0] += double(filter[k]) * filter[l] * (g.e_gram[k * K + l] - mean * g.e_sum[l]);
    if (lane_of() == 0) mine[2] += filter[k] * mean;
  }
  for (int k = 0; k < kSums; ++k) sums[k * kThreads + threadIdx.x] = mine[k];
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step)
      for (int k = 0; k < kSums; ++k) sums[k * kThreads + threadIdx.x] += sums[k * kThreads + threadIdx.x + step];
  }
  if (threadIdx.x == 0) {
    const double shift = sums[kThreads], var = sums[0] / count - shift * shift;
    g.out[n] = float(sums[2 * kThreads] + shift);
    g.out_x[n] = var < 0 ? 0.0f : float(var);
  }
}

SRCGCNN_DEVICE float rstd_of(const DeviceConv& g, int64_t n) { return float(1 / sqrt(double(g.var1[n]) + g.eps)); }

__global__ void __launch_bounds__(kThreads) scale_weights(const DeviceConv g) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t F = g.F, W = g.width, K = g.n_features, columns = 2 * F + K, steps = (K + 7) / 8;
  for (int64_t x = thread; x < 4 * W * F; x += threads) {  // rows: p filter, p core, q filter, q core
    const int64_t row = x / F, c = row % W, half = row / W % 2, n = half * F + c;
    g.out[x] = c < F ? g.weight[n * columns + row / (2 * W) * F + x % F] * rstd_of(g, n) : 0.0f;
  }
  for (int64_t x = thread; x < 4 * W; x += threads) {
    const int64_t c = x % W, n = x / W * F + c;
    const bool there = c < F && x < 2 * W;
    g.out_x[x] = there ? ((g.bias ? g.bias[n] : 0.0f) - g.mean1[n]) * rstd_of(g, n) : 0.0f;
  }
  for (int64_t x = thread; x < K * 2 * F; x += threads) {
    const int64_t n = x % (2 * F);
    g.out_edge[x] = g.weight[n * columns + 2 * F + x / (2 * F)] * rstd_of(g, n);
  }
  for (int64_t x = thread; x < W / kChunk * steps * 512; x += threads) {  // chunk, step, tile, lane, pair: see Values
    const int64_t lane = x / 2 % 32, tile = x / 64 % 8, four = tile % 4 / 2, column = lane / 4;
    const int64_t c = x / 512 / steps * kChunk + 16 * four + column / 2 * 4 + tile % 2 * 2 + column % 2;
    const int64_t k = x / 512 % steps * 8 + lane % 4 + x % 2 * 4, n = tile / 4 * F + c;
    g.out_filter[x] = c < F && k < K ? g.weight[n * columns + 2 * F + k] * rstd_of(g, n) : 0.0f;
  }
  for (int64_t n = thread; n < 2 * F; n += threads) g.out_gamma[n] = rstd_of(g, n);
}

// A warp a row, a lane a Gaussian.
__global__ void __launch_bounds__(kThreads, 12) edge_sum(const DeviceConv g) {
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp_of(); row < g.n_rows; row += int64_t(gridDim.x) * kWarps) {
    const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
    const bool bad = begin < 0 || end < begin || end > g.n_edges;
    for (int64_t k = lane_of(); k < g.n_features; k += 32) {
      float sum = bad ? NAN : 0.0f, weights = sum;
      for (int64_t t = begin; !bad && t < end; ++t) {
        const int64_t i = g.other[t], e = g.number ? g.number[t] : t;
        if (i < 0 || i >= g.n_rows || e < 0 || e >= g.n_edges) {
          sum = weights = NAN;
          break;
        }
        const float w = g.row_weight ? g.row_weight[i] : 1.0f;
        const float value = g.distance ? gaussian((g.distance[e] - g.dmin) * g.inverse_step, int(k))
                                       : g.features[e * g.n_features + k];
        sum = fmaf(w, value, sum);
        weights += w;
      }
      g.out[row * g.n_features + k] = sum;
      if (g.out_degree && k == 0) g.out_degree[row] = weights;
    }
  }
}

// A block is one of `programs`, for 48 Gaussians on the left and 64 on the right.
__global__ void __launch_bounds__(kThreads, 2) edge_gram(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  const int rights = int(g.n_features + 2 * kChunk - 1) / (2 * kChunk), right = int(blockIdx.x % rights) * 2 * kChunk;
  const int program = int(blockIdx.x / rights % g.programs), left = int(blockIdx.x / rights / g.programs) * kTerms;
  float* weighted = shared + kVectors + warp_of() * (2 * kTileSize + kTermSize);
  float* terms = weighted + 2 * kTileSize;
  Sums sums = {};
  for (int64_t first = (int64_t(program) * kWarps + warp_of()) * kTaskRows; first < g.n_rows;
       first += g.programs * kWarps * kTaskRows) {
    const Task task(g, first);
    for (int tile = 0; tile * kTile < task.total; ++tile) {
      const Edges e(g, task, tile);
      write_terms(terms, g, e, left, 0, kTerms / 16);
      for (int k = 0; k < kTile; ++k) {
        const float w = k < e.count ? g.row_weight[task.first + __shfl_sync(kAllLanes, e.row, k)] : 0.0f;
        const float u = __shfl_sync(kAllLanes, e.u, k);
        const int64_t at = int64_t(__shfl_sync(kAllLanes, e.number, k)) * g.n_features + right;
        for (int c = lane_of(); c < 2 * kChunk; c += 32) {
          const bool there = k < e.count && right + c < g.n_features;
          weighted[k * kTileStride + c] = !there ? 0.0f : w * (g.distance ? gaussian(u, right + c) : g.features[at + c]);
        }
      }
      __syncwarp();
      add_product(sums, terms, weighted, g.relaxed, 0, kTerms / 16);
      __syncwarp();
    }
  }
  float* total = shared + kVectors;
  add_warps(total, sums);
  for (int k = int(threadIdx.x); k < kTerms * 2 * kChunk; k += kThreads) {
    const int row = left + k / (2 * kChunk), column = right + k % (2 * kChunk);
    if (row < g.n_features && column < g.n_features)
      g.out[(int64_t(program) * g.n_features + row) * g.n_features + column] = total[k];
  }
}

// A block is one of `programs` for 32 channels; warp w takes every fourth row.
__global__ void __launch_bounds__(kThreads) finish(const DeviceConv g) {
  const int chunks = int(g.width / kChunk), channel = int(blockIdx.x % chunks) * kChunk + lane_of();
  const int64_t program = blockIdx.x / chunks;
  if (channel >= g.F) return;
  const double count = g.totals[3 * g.F + channel], rest = g.more_totals[channel] / count;
  const double mean = double(float(g.totals[channel] / count)) + rest;  // as column_sums rounds it
  double var = g.more_totals[2 * g.F + channel] / count - rest * rest;
  if (var < 0) var = 0;
  const Norm norm(g, channel, mean, var);
  for (int64_t row = program * kWarps + warp_of(); row < g.n_rows; row += g.programs * kWarps) {
    const int64_t at = row * g.F + channel;
    g.out[at] = finished(g.h[at], g.m[at], norm.scale, norm.shift);
  }
  if (program == 0 && warp_of() == 0) {
    g.out_m[channel] = float(mean);
    g.out_x[channel] = float(var);
  }
}

// A block is one of `programs` for 32 channels; warp w takes every fourth row.
__global__ void __launch_bounds__(kThreads) finish_backward(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), channel = int(blockIdx.x % chunks) * kChunk + lane_of();
  const int64_t program = blockIdx.x / chunks;
  const bool mine = channel < g.F;
  float sums[2] = {};
  if (mine) {
    const Norm norm(g, channel);
    for (int64_t row = program * kWarps + warp_of(); row < g.n_rows; row += g.programs * kWarps) {
      const int64_t at = row * g.F + channel;
      const float m = g.m[at], u = g.h[at] + fmaf(m, norm.scale, norm.shift);
      const float d = g.grad[at] * softplus_slope2<DeviceMath>(u * DeviceMath::log2e);
      g.out[at] = d;
      if (g.out_m) g.out_m[at] = d * norm.scale;
      sums[0] += d;
      sums[1] = fmaf(d, (m - norm.mean) * norm.rstd, sums[1]);
    }
  }
  add_lanes(shared, sums, [&](int k, float sum) {
    if (mine) g.out_x[(k * g.programs + program) * g.F + channel] = sum;
  });
}

// A block is one of `programs` for 32 columns; warp w takes every fourth row.
__global__ void __launch_bounds__(kThreads) correct(const DeviceConv g) {
  const int64_t blocks = (g.columns + kChunk - 1) / kChunk, c = blockIdx.x % blocks * kChunk + lane_of();
  if (c >= g.columns) return;
  const float count = g.count ? *g.count : 1.0f, c1 = g.c1[c] / count;
  float c2 = g.c2[c] / count, a, mean = 0.0f;
  if (g.var2) {
    const Norm norm(g, c);
    a = norm.scale;
    c2 *= norm.rstd;
    mean = norm.mean;
  } else {
    a = g.a[c];
  }
  for (int64_t row = int64_t(blockIdx.x / blocks) * kWarps + warp_of(); row < g.n_rows; row += g.programs * kWarps) {
    const int64_t at = row * g.stride + c;
    const float first = g.degree ? g.degree[row] * c1 : c1, x = g.x[row * g.columns + c] - mean;
    g.out[at] = a * (g.grad[at] - g.row_weight[row] * fmaf(x, c2, first));
  }
}

}  // namespace srcgcnn
