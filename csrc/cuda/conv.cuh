// Training: the edge passes of a convolution, and the node kernels around them.
//
// A warp takes the edges of 16 rows, 16 at a time, for 32 of the F channels. r = w_e e(d) of 16 edges is a product on the
// tensor cores, whose operand e(d) is formed in registers, and of which only the steps in reach of the distances are
// done. The product leaves a lane 4 channels of 4 edges, filter and core; there q (or p) of the other end is gathered and
// the gate formed. What is summed over a row goes through shared memory, where each lane then walks its columns of the
// edges in their order. So no sum depends on the order of threads, of warps or of blocks. Nothing of an edge is stored.
// In sum e dy^T a lane's dy are an operand as they are. The tensor cores cut sums off: so none there is longer than a few
// products, small ones first, and the rest is added in float32.
#pragma once
#include "conv.h"
#include "device.cuh"

namespace srcgcnn {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChunk = 32;           // channels of a block
constexpr int kTile = 16;            // edges that a warp takes at a time
constexpr int kTaskRows = 16;        // whose edges these are
constexpr int kMostDegree = 1 << 26;  // so that the edges of a task can be counted
constexpr int kTerms = 48;           // Gaussians whose sums e^T dy a block holds
constexpr int kSteps = kTerms / 8;
constexpr float kCut = 20.25f;       // squared distance from a Gaussian's centre in its widths; beyond it is below 2e-9

// In shared memory, in numbers; strides that spread what lanes touch together over the banks.
constexpr int kTileStride = 4 * kChunk + 4, kTileSize = kTile * kTileStride;
constexpr int kVectors = 4 * kChunk;     // of a block: gamma and beta of its channels, in the units of gate2
constexpr int kNorms = 2 * kChunk;       // of a block: scale and shift of bn2 of its channels
constexpr int kCorrection = 6 * kChunk;  // of a block: a, c1 and c2 of its channels

SRCGCNN_DEVICE float gaussian(float u, float k) {
  const float x = u - k, x2 = x * x;
  return x2 > kCut ? 0.0f : device::exp2(x2 * float(-kLog2e));  // a NaN stays one
}

// What a warp keeps in shared memory of its task, and of the 16 edges at hand.
struct Record {
  struct Row {
    int row, shift;  // one with edges; what makes a place in ptr's order of an edge's number within the task
  };
  struct Ends {
    int other, row;  // both can be followed
  };
  alignas(16) Row rows[kTaskRows];
  alignas(16) int last[32];  // of lane l's row, the last edge's number within the task, or -1
  alignas(16) Ends ends[kTile];
  alignas(16) float u[kTile];  // distance in units of the Gaussians; NaN if the other end is outside, far off if there is no edge
  alignas(16) float weight[kTile];
  alignas(16) int number[kTile];
};
constexpr int kRecord = int(sizeof(Record) / sizeof(float));

SRCGCNN_DEVICE int tasks_of(const DeviceConv& g) { return int((g.n_rows + kTaskRows - 1) / kTaskRows); }

// The edges of 16 rows. Lane l has row first + l.
struct Task {
  int first, degree, total;
  bool bad;

  SRCGCNN_DEVICE Task(const DeviceConv& g, int number, Record& record)
      : first(number * kTaskRows), degree(0), bad(false) {
    const int lane = lane_of();
    int begin = 0;
    if (lane < kTaskRows && first + lane < g.n_rows) {
      const int* ptr = g.ptr + first;
      const int64_t from = ptr[lane], to = ptr[lane + 1];
      bad = from < 0 || to < from || to > g.n_edges || to - from > kMostDegree;
      begin = bad ? 0 : int(from);
      degree = bad ? 0 : int(to - from);
    }
    int end = degree;  // edges up to the end of the lane's row
#pragma unroll
    for (int d = 1; d < kTaskRows; d *= 2) {
      const int below = __shfl_sync(kAllLanes, end, lane - d);
      end += lane >= d && lane < kTaskRows ? below : 0;
    }
    total = __reduce_max_sync(kAllLanes, end);
    const unsigned with_edges = __ballot_sync(kAllLanes, degree > 0);
    if (degree > 0)
      record.rows[__popc(with_edges & ((1u << lane) - 1))] = {first + lane, begin - (end - degree)};
    record.last[lane] = degree > 0 ? end - 1 : -1;
    __syncwarp();
  }
};

enum class Weight { kNone, kOwn, kOther };  // whose row_weight an edge has

// 16 edges of a task, of which lanes l and l + 16 have number l; where there are fewer, the last one again.
template <Weight kWeight>
struct Edges {
  int passed = 0;  // rows with edges that end before them
  unsigned last;   // bit l: edge l is the last of its row
  int row, other, number;
  float distance, weight;

  // First half of reading those from number `from` of the task on, `count` or more: what the second's addresses follow from.
  SRCGCNN_DEVICE void begin(const DeviceConv& g, const Record& record, int from, int count) {
    const int k = lane_of() & (kTile - 1), at = k < count ? k : count - 1;
    const unsigned slot = unsigned(record.last[lane_of()] - from);
    last = __reduce_or_sync(kAllLanes, slot < unsigned(kTile) ? 1u << slot : 0u);
    const Record::Row found = record.rows[passed + __popc(last & ((1u << at) - 1))];
    passed += __popc(last);
    const int place = found.shift + from + at;
    row = found.row;
    other = g.other[place];
    number = g.number ? g.number[place] : place;
  }
  SRCGCNN_DEVICE void end(const DeviceConv& g) {
    if (unsigned(other) >= uint64_t(g.n_rows) || unsigned(number) >= uint64_t(g.n_edges)) {
      other = row;
      number = -1;
    }
    const int at = number < 0 ? 0 : number;
    distance = g.distance ? g.distance[at] : g.dmin;
    weight = kWeight == Weight::kNone || !g.row_weight ? 1.0f : g.row_weight[kWeight == Weight::kOwn ? row : other];
  }
  // To the record; u of this lane's edge.
  SRCGCNN_DEVICE float publish(const DeviceConv& g, Record& record, int count) const {
    const int k = lane_of();
    const bool live = (k & (kTile - 1)) < count;
    const float u = number < 0 ? NAN : live ? (distance - g.dmin) * g.inverse_step : -1e3f;
    if (k < kTile) {
      record.ends[k] = {other, row};
      record.u[k] = u;
      if (kWeight != Weight::kNone) record.weight[k] = live ? weight : 0.0f;
      record.number[k] = number < 0 ? 0 : number;
    }
    return u;
  }
};

// Steps of 8 Gaussians that are in reach of some of the 16 edges: [from, to).
struct Reach {
  int from, to;
  SRCGCNN_DEVICE Reach(const DeviceConv& g, float u) {
    constexpr float kMost = 1 << 20;
    const int last = int(g.n_features) - 1;
    const int low = int(u < -5.0f ? kMost : fminf(fmaxf(u - 4.5f, 0.0f), kMost));  // 0 for a NaN
    const int high = int(fmaxf(fminf(u + 4.5f, kMost), 0.0f));                     // all for a NaN
    const int first = __reduce_min_sync(kAllLanes, low), end = __reduce_max_sync(kAllLanes, high);
    from = (first < last ? first : last) / 8;
    to = (end < last ? end : last) / 8 + 1;
  }
};

// What a lane has of 16 edges after a product: edges 2 (lane % 4), the next one, and those 8 later; of each the four
// channels from 4 (lane / 4) on.
SRCGCNN_DEVICE int edge_of(int k) { return 2 * (lane_of() % 4) + k % 2 + k / 2 * 8; }
SRCGCNN_DEVICE int channel_of() { return lane_of() / 4 * 4; }
struct Values {
  float filter[4][4], core[4][4];  // edge, channel
};
template <class T>
struct Four {
  T x[4];
};
// Numbers of these edges, of an array of the record.
template <class T>
SRCGCNN_DEVICE Four<T> of_edges(const T (&all)[kTile]) {
  struct alignas(2 * sizeof(T)) Pair {
    T x[2];
  };
  const int at = edge_of(0);
  const Pair a = *reinterpret_cast<const Pair*>(all + at), b = *reinterpret_cast<const Pair*>(all + at + 8);
  return {{a.x[0], a.x[1], b.x[0], b.x[1]}};
}

// Row `row` of a table whose rows are `stride` bytes apart.
template <class T>
SRCGCNN_DEVICE const T* row_at(const T* table, int row, int stride) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(table) + int64_t(row) * stride);
}
template <int V, class T>
SRCGCNN_DEVICE Channels<V> row_of(const T* table, int row, int stride) {
  return load<V>(row_at(table, row, stride));
}

// The product of 16 edges' Gaussians with the filter. Tile j of its left side is the filter (rows 0 to 7) and the core
// (8 to 15) of channels j, 4 + j, 8 + j, ...; its right sides are the first and the last 8 edges.
template <bool kRelaxed>
struct Product {
  float sum[4][2][4], small[4][2][4];

  template <bool kFirst>
  SRCGCNN_DEVICE void add(const float* at, const float (&u)[2], float k) {
    float e[2][2], low[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float x = gaussian(u[half], k + float(4 * v));
        e[half][v] = x;
        if (!kRelaxed) split(x, e[half][v], low[half][v]);
      }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto w = load<4>(at + j * 256);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int v = 0; v < 4 && kFirst; ++v) sum[j][half][v] = small[j][half][v] = 0.0f;
        device::mma(sum[j][half], w.x, e[half]);
      }
      if (kRelaxed) continue;
      const auto w_low = load<4>(at + j * 256 + 128);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        device::mma(small[j][half], w.x, low[half]);
        device::mma(small[j][half], w_low.x, e[half]);
      }
    }
  }
  SRCGCNN_DEVICE Product(Values& r, const float* weights, const float (&u)[2], const Reach& reach) {
    const float* at = weights + 1024 * reach.from;
    float k = float(8 * reach.from + lane_of() % 4);
    const float end = float(8 * reach.to - 8);
    add<true>(at, u, k);  // of zeros, if none is in reach
#pragma unroll 1
    while (k < end) add<false>(at += 1024, u, k += 8.0f);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r.filter[k][j] = sum[j][k / 2][k % 2] + small[j][k / 2][k % 2];
        r.core[k][j] = sum[j][k / 2][2 + k % 2] + small[j][k / 2][2 + k % 2];
      }
  }
};

// r of 16 edges for the chunk's channels; NaN where the other end is outside. T: how pq and term are stored.
template <class T>
SRCGCNN_DEVICE void edge_terms(Values& r, const DeviceConv& g, const float (&u_of)[kTile], const int (&number_of)[kTile],
                               const Reach& reach, int chunk) {
  if (g.term) {
    const auto u = of_edges(u_of);
    const auto number = of_edges(number_of);
    const T* table = static_cast<const T*>(g.term) + chunk * kChunk + channel_of();
    const int stride = int(2 * g.width * sizeof(T));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto f = row_of<4>(table, number.x[k], stride), c = row_of<4>(table + g.width, number.x[k], stride);
      const float poison = u.x[k] - u.x[k];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        r.filter[k][v] = f.x[v] + poison;
        r.core[k][v] = c.x[v] + poison;
      }
    }
    return;
  }
  const float u[2] = {u_of[lane_of() / 4], u_of[lane_of() / 4 + 8]};
  const float* weights = g.filter + int64_t(chunk * 1024) * (int(g.n_features + 7) / 8) + lane_of() * 4;
  if (g.relaxed)
    Product<true>(r, weights, u, reach);
  else
    Product<false>(r, weights, u, reach);
}

// x = p_i + q_j + r_ij of an edge, four channels of it, in place of r. `pq`: the first row's numbers of these channels.
template <class T>
SRCGCNN_DEVICE void add_ends(float (&filter)[4], float (&core)[4], const T* pq, int64_t width, int p_row, int q_row) {
  const int stride = int(4 * width * sizeof(T));
  const auto pf = row_of<4>(pq, p_row, stride), pc = row_of<4>(pq + width, p_row, stride);
  const auto qf = row_of<4>(pq + 2 * width, q_row, stride), qc = row_of<4>(pq + 3 * width, q_row, stride);
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
    vectors[k] = c < g.F ? from[half * g.all + c] * unit : 0.0f;
  }
  __syncthreads();
}
// y of four channels in these units.
struct Scaling {
  Channels<4> gamma_f, gamma_c, beta_f, beta_c;
  SRCGCNN_DEVICE explicit Scaling(const float* vectors)
      : gamma_f(load<4>(vectors + channel_of())), gamma_c(load<4>(vectors + kChunk + channel_of())),
        beta_f(load<4>(vectors + 2 * kChunk + channel_of())), beta_c(load<4>(vectors + 3 * kChunk + channel_of())) {}
  SRCGCNN_DEVICE float filter(float x, int v) const { return fmaf(x, gamma_f.x[v], beta_f.x[v]); }
  SRCGCNN_DEVICE float core(float x, int v) const { return fmaf(x, gamma_c.x[v], beta_c.x[v]); }
};

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

// The tiles of a task: each(last, count, reach, send), of which the first two are as Edges has them; send(0) and, while
// other work passes, send(1) send for the halves of the next tile's edges.
template <Weight kWeight, class Each>
SRCGCNN_DEVICE void for_tiles(const DeviceConv& g, const Task& task, Record& record, Each each) {
  if (task.total == 0) return;
  Edges<kWeight> edges;
  edges.begin(g, record, 0, task.total);
  edges.end(g);
  for (int left = task.total; left > 0; left -= kTile) {
    const Reach reach(g, edges.publish(g, record, left));
    const unsigned last = edges.last;
    __syncwarp();
    const bool more = left > kTile;
    each(last, left, reach, [&](int half) {
      if (!more) return;
      if (half)
        edges.end(g);
      else
        edges.begin(g, record, task.total - left + kTile, left - kTile);
    });
    __syncwarp();
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

SRCGCNN_DEVICE void keep(const DeviceConv& g, int64_t c, const Norm& norm) {
  g.new_norm[c] = norm.scale;
  g.new_norm[g.F + c] = norm.shift;
}

SRCGCNN_DEVICE float finished(float h, float m, float scale, float shift) {
  return softplus<DeviceMath>(h + fmaf(m, scale, shift));
}

// A tile's edges summed row by row, each lane V columns, `sum` from before on: at a row's last edge its sum takes the edge's
// place. What follows the last of them is nobody's.
template <int V>
SRCGCNN_DEVICE void walk(float* tile, int stride, unsigned last, float (&sum)[V]) {
  constexpr int kAtOnce = 8;  // edges that a lane reads before it adds them up
#pragma unroll
  for (int from = 0; from < kTile; from += kAtOnce) {
    Channels<V> x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) x[k] = load<V>(tile + (from + k) * stride + V * lane_of());
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[k].x[v] = sum[v] += x[k].x[v];
      if (!(last >> (from + k) & 1)) continue;
      store<V>(tile + (from + k) * stride + V * lane_of(), x[k]);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = 0.0f;
    }
  }
}

// Sixteen rows, whose k-th edges are a tile: so what is summed over a row stays with the lanes that have its edges, and
// where rows are sorted by distance, those of a tile are alike. Lanes l and l + 16 have row first + l, or the last one.
struct Rows {
  int first, row, begin, degree, most;  // the row's first edge, how many it has, -1 if nobody knows; the largest degree
  SRCGCNN_DEVICE Rows(const DeviceConv& g, int number) : first(number * kTaskRows) {
    const int at = first + (lane_of() & (kTaskRows - 1)), end = int(g.n_rows) - 1;
    row = at < end ? at : end;
    const int64_t from = g.ptr[row], to = g.ptr[int64_t(row) + 1];
    const bool bad = from < 0 || to < from || to > g.n_edges;
    begin = int(from);
    degree = bad ? -1 : at > end ? 0 : int(to - from);
    most = __reduce_max_sync(kAllLanes, degree);
  }
};

// Of two such tiles, what lanes tell each other.
struct Pair {
  alignas(16) int other[2][kTile];  // can be followed
  alignas(16) float u[2][kTile];    // as of a record
  alignas(16) int number[2][kTile];
};
constexpr int kPair = int(sizeof(Pair) / sizeof(float));

// The tiles of these rows: each(k, which of the pair, reach).
template <class Each>
SRCGCNN_DEVICE void for_kth_edges(const DeviceConv& g, const Rows& rows, Pair& pair, Each each) {
  const int ahead = lane_of() / kTile;  // lanes 16 and on have the second tile
  int other = 0;
  float distance = g.dmin;
  const auto send = [&](int k) {
    const int place = rows.begin + k + ahead;
    if (k + ahead >= rows.degree) return;
    other = g.other[place];
    if (g.distance) distance = g.distance[place];
  };
  send(0);
  float u = 0.0f;
  for (int k = 0; k < rows.most; ++k) {
    if (k % 2 == 0) {
      const bool live = k + ahead < rows.degree, good = live && unsigned(other) < uint64_t(g.n_rows);
      u = good ? (distance - g.dmin) * g.inverse_step : live ? NAN : -1e3f;
      __syncwarp();
      (&pair.other[0][0])[lane_of()] = good ? other : rows.row;
      (&pair.u[0][0])[lane_of()] = u;
      (&pair.number[0][0])[lane_of()] = good ? rows.begin + k + ahead : 0;
      __syncwarp();
      send(k + 2);
    }
    each(k, k % 2, Reach(g, ahead == k % 2 ? u : -1e3f));
  }
}

// Four channels of a row of F, of which those from `channel` on that there are; apart: rows are multiples of it.
SRCGCNN_DEVICE void store_channels(float* row, int channel, int64_t F, const float (&x)[4], int64_t apart = 0) {
  if (F % 4 == 0 && apart % 4 == 0) {
    if (channel < F) store<4>(row + channel, {{x[0], x[1], x[2], x[3]}});
    return;
  }
#pragma unroll 1
  for (int v = 0; v < 4 && channel + v < F; ++v) row[channel + v] = v < 2 ? (v ? x[1] : x[0]) : v < 3 ? x[2] : x[3];
}
SRCGCNN_DEVICE Channels<4> load_channels(const float* row, int channel, int64_t F) {
  if (F % 4 == 0) return channel < F ? load<4>(row + channel) : Channels<4>{};
  Channels<4> x;
#pragma unroll
  for (int v = 0; v < 4; ++v) x.x[v] = channel + v < F ? row[channel + v] : 0.0f;
  return x;
}

// gamma p + beta of the lane's rows, so that y = gamma (q + r) + this; kept in shared memory, each lane its own.
constexpr int kScaledSize = kTaskRows * 2 * kChunk;
template <class T>
SRCGCNN_DEVICE void scale_rows(float* scaled, const DeviceConv& g, const Rows& rows, int chunk, const float* vectors) {
  const T* pq = static_cast<const T*>(g.pq) + chunk * kChunk + channel_of();
  const Scaling y(vectors);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = __shfl_sync(kAllLanes, rows.row, edge_of(k)), stride = int(4 * g.width * sizeof(T));
    auto f = row_of<4>(pq, row, stride), c = row_of<4>(pq + g.width, row, stride);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      f.x[v] = y.filter(f.x[v], v);
      c.x[v] = y.core(c.x[v], v);
    }
    store<4>(scaled + 256 * k + 4 * lane_of(), f);
    store<4>(scaled + 256 * k + 128 + 4 * lane_of(), c);
  }
}

// q_j + r_ij of a lane's edges, in place of r.
template <class T>
SRCGCNN_DEVICE void add_others(Values& x, const DeviceConv& g, const int (&other_of)[kTile], int chunk) {
  const T* q = static_cast<const T*>(g.pq) + 2 * g.width + chunk * kChunk + channel_of();
  const int stride = int(4 * g.width * sizeof(T));
  const auto other = of_edges(other_of);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto f = row_of<4>(q, other.x[k], stride), c = row_of<4>(q + g.width, other.x[k], stride);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      x.filter[k][v] += f.x[v];
      x.core[k][v] += c.x[v];
    }
  }
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 4) gate_sum(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks);
  float* scaled = shared + kVectors + kNorms + warp_of() * (kScaledSize + kPair);
  Pair& pair = *reinterpret_cast<Pair*>(scaled + kScaledSize);
  float* norms = shared + kVectors;
  if (g.out && warp_of() == 0 && chunk * kChunk + lane_of() < g.F) {
    const Norm norm(g, chunk * kChunk + lane_of());
    norms[lane_of()] = norm.scale;
    norms[kChunk + lane_of()] = norm.shift;
    if (g.new_norm && int(blockIdx.x) < chunks) keep(g, chunk * kChunk + lane_of(), norm);
  }
  read_vectors(shared, g, chunk);
  const int number = int(blockIdx.x / chunks) * kWarps + warp_of();
  if (number >= tasks_of(g)) return;
  const Rows rows(g, number);
  scale_rows<T>(scaled, g, rows, chunk, shared);
  int degree[4];
  float sum[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    degree[k] = __shfl_sync(kAllLanes, rows.degree, edge_of(k));
#pragma unroll
    for (int v = 0; v < 4; ++v) sum[k][v] = degree[k] < 0 ? NAN : 0.0f;
  }
  for_kth_edges(g, rows, pair, [&](int n, int which, const Reach& reach) {
    Values x;
    edge_terms<T>(x, g, pair.u[which], pair.number[which], reach, chunk);
    add_others<T>(x, g, pair.other[which], chunk);
    const auto gamma_f = load<4>(shared + channel_of()), gamma_c = load<4>(shared + kChunk + channel_of());
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto f = load<4>(scaled + 256 * k + 4 * lane_of()), c = load<4>(scaled + 256 * k + 128 + 4 * lane_of());
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float y_f = fmaf(x.filter[k][v], gamma_f.x[v], f.x[v]), y_c = fmaf(x.core[k][v], gamma_c.x[v], c.x[v]);
        const float message = gate2<DeviceMath>(y_f, y_c);
        if (n < degree[k]) sum[k][v] += message;
      }
    }
  });
  __syncwarp();
#pragma unroll
  for (int k = 0; k < 16; ++k) scaled[32 * k + lane_of()] = sum[k / 4][k % 4];  // lest the loop keep them in fours
  const auto scale = load<4>(norms + channel_of()), shift = load<4>(norms + kChunk + channel_of());
  const int channel = chunk * kChunk + channel_of();
#pragma unroll 1
  for (int k = 0; k < 4; ++k) {
    const int64_t row = rows.first + edge_of(k);
    if (row >= g.n_rows) continue;
    Channels<4> m;
#pragma unroll
    for (int v = 0; v < 4; ++v) m.x[v] = scaled[128 * k + 32 * v + lane_of()] * DeviceMath::ln2;
    if (g.out_m) store_channels(g.out_m + row * g.F, channel, g.F, m.x);
    if (!g.out) continue;
    const auto h = load_channels(g.h + row * g.F, channel, g.F);
#pragma unroll
    for (int v = 0; v < 4; ++v) m.x[v] = finished(h.x[v], m.x[v], scale.x[v], shift.x[v]);
    store_channels(g.out + row * g.F, channel, g.F, m.x);
  }
}

// By sender: w_i x and dy, the gradients at y, of a lane's edges go to shared memory: of an edge x filter, x core, dy
// filter, dy core. Edges that are not there leave zeros.
template <class T>
SRCGCNN_DEVICE void gradients(float* tile, Values& x, const DeviceConv& g, int count, const Record& record, int chunk,
                              const float* vectors) {
  const int64_t channel = chunk * kChunk + channel_of();
  const T* pq = static_cast<const T*>(g.pq) + channel;
  const auto ends = of_edges(record.ends);
  Channels<4> upstream[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int own = ends.x[k].row, other = ends.x[k].other;
    add_ends(x.filter[k], x.core[k], pq, g.width, other, own);
    upstream[k] = row_of<4>(g.d_m + channel, other, int(g.m_stride * sizeof(float)));
  }
  __syncwarp();  // lest the compiler send for all at once, with registers that it has not
  if (count < kTile) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (edge_of(k) >= count) upstream[k] = {};
  }
  const Scaling y(vectors);
  float* at = tile + edge_of(0) * kTileStride + channel_of();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float weight = record.weight[edge_of(k)];
    Channels<4> out[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const auto d = gate_gradient2<DeviceMath>(y.filter(x.filter[k][v], v), y.core(x.core[k][v], v));
      out[0].x[v] = weight * x.filter[k][v];
      out[1].x[v] = weight * x.core[k][v];
      out[2].x[v] = upstream[k].x[v] * d.d_filter;
      out[3].x[v] = upstream[k].x[v] * d.d_core;
    }
#pragma unroll
    for (int part = 0; part < 4; ++part)
      store<4>(at + (k % 2 + k / 2 * 8) * kTileStride + part * kChunk, out[part]);
  }
}

template <int V>
SRCGCNN_DEVICE void add(float* to, const float (&x)[V]) {
  auto sum = load<V>(to);
#pragma unroll
  for (int v = 0; v < V; ++v) sum.x[v] += x[v];
  store<V>(to, sum);
}

// Numbers of a lane's edges as two operands of eight edges, high and low. The order of the edges within an operand is that
// of the lanes' own, on both sides of a product.
template <bool kRelaxed, int kNumbers>
struct Operand {
  float high[2][kNumbers], low[2][kNumbers];
  SRCGCNN_DEVICE void set(int half, int at, float x) {
    high[half][at] = x;
    if (!kRelaxed) split(x, high[half][at], low[half][at]);
  }
};
// One number of each edge; two, a row of the product and the one 8 later.
template <bool kRelaxed>
SRCGCNN_DEVICE Operand<kRelaxed, 2> right_side(const float (&e)[4]) {
  Operand<kRelaxed, 2> to;
#pragma unroll
  for (int k = 0; k < 4; ++k) to.set(k / 2, k % 2, e[k]);
  return to;
}
template <bool kRelaxed>
SRCGCNN_DEVICE Operand<kRelaxed, 4> left_side(const float (&first)[4], const float (&second)[4]) {
  Operand<kRelaxed, 4> to;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    to.set(k / 2, k % 2 * 2, first[k]);
    to.set(k / 2, k % 2 * 2 + 1, second[k]);
  }
  return to;
}
// sum += left right over 16 edges.
template <bool kRelaxed>
SRCGCNN_DEVICE void add_product(float (&sum)[4], const Operand<kRelaxed, 4>& left, const Operand<kRelaxed, 2>& right) {
  float part[4] = {};
#pragma unroll
  for (int half = 0; half < 2 && !kRelaxed; ++half) {
    device::mma(part, left.low[half], right.high[half]);
    device::mma(part, left.high[half], right.low[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) device::mma(part, left.high[half], right.high[half]);
#pragma unroll
  for (int v = 0; v < 4; ++v) sum[v] += part[v];
}

// The edge vectors of a lane's edges: e, their numbers lane / 4, as many again later, and so on, from number `first` on.
struct Terms {
  Four<float> u;  // less that of the first of them
  Four<int> number;
  int first;
  SRCGCNN_DEVICE Terms(const float (&u_of)[kTile], const int (&number_of)[kTile], int of)
      : u(of_edges(u_of)), number(of_edges(number_of)), first(of + lane_of() / 4) {
#pragma unroll
    for (int n = 0; n < 4; ++n) u.x[n] -= float(first);
  }
  SRCGCNN_DEVICE void read(float (&e)[4], const DeviceConv& g, int later) const {
    if (g.distance) {
#pragma unroll
      for (int n = 0; n < 4; ++n) e[n] = gaussian(u.x[n], float(later));
      return;
    }
    const int k = first + later < g.n_features ? first + later : 0;  // nobody reads the sums of others
#pragma unroll
    for (int n = 0; n < 4; ++n) e[n] = g.features[int64_t(number.x[n]) * g.n_features + k];
  }
};

// Sums of dy e^T over the edges, of 48 Gaussians: of each 8 four tiles as `product` has them on its left side, with the
// Gaussians in the edges' place. They stay in shared memory, four numbers of each lane.
constexpr int kFilterSums = kSteps * 4 * 128;
template <bool kRelaxed>
SRCGCNN_DEVICE void add_filter(float* sums, const Values& dy, const DeviceConv& g, const Terms& e, const Reach& reach,
                               int first_term) {
  Operand<kRelaxed, 4> left[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float f[4] = {dy.filter[0][j], dy.filter[1][j], dy.filter[2][j], dy.filter[3][j]};
    const float c[4] = {dy.core[0][j], dy.core[1][j], dy.core[2][j], dy.core[3][j]};
    left[j] = left_side<kRelaxed>(f, c);
  }
  int step = g.distance ? reach.from - first_term / 8 : 0, end = g.distance ? reach.to - first_term / 8 : kSteps;
  step = step > 0 ? step : 0;
  end = end < kSteps ? end : kSteps;
#pragma unroll 1
  for (; step < end; ++step) {
    float terms[4];
    e.read(terms, g, 8 * step);
    const auto right = right_side<kRelaxed>(terms);
    float* at = sums + step * 512 + 4 * lane_of();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      auto sum = load<4>(at + 128 * j);
      add_product(sum.x, left[j], right);
      store<4>(at + 128 * j, sum);
    }
  }
}

// Numbers of the warps added up in their order, in shared memory (kCount, 32), in the place of what it held.
template <int kCount>
SRCGCNN_DEVICE void add_warps(float* total, const float* mine) {
  for (int warp = 0; warp < kWarps; ++warp) {
    __syncthreads();
    if (warp != warp_of()) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float* at = total + k * 32 + lane_of();
      *at = warp ? *at + mine[k] : mine[k];
    }
  }
  __syncthreads();
}

// What a warp of backward_receivers keeps in shared memory; of each lane four numbers side by side.
struct Receivers {
  float filter[kFilterSums];
  float scaled[kScaledSize];  // of a task; then the sums of its rows
  float by[4][4 * 32];        // sums of dy x, filter and core, and of dy
  Pair pair;
};
constexpr int kReceivers = int(sizeof(Receivers) / sizeof(float));

// A block is one of `programs`, for one chunk of channels and one block of 48 Gaussians.
template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 2) backward_receivers(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), channel = chunk * kChunk + channel_of();
  const int program = int(blockIdx.x / chunks % g.programs);
  const int first_term = int(blockIdx.x / chunks / g.programs) * kTerms;
  Receivers* warps = reinterpret_cast<Receivers*>(shared + kVectors);
  Receivers& mine = warps[warp_of()];
  read_vectors(shared, g, chunk);
  for (int k = 0; k < kFilterSums; k += 128) store<4>(mine.filter + k + 4 * lane_of(), {});
  for (int k = 0; k < 4; ++k) store<4>(mine.by[k] + 4 * lane_of(), {});
  const T* p = static_cast<const T*>(g.pq) + channel;
  const int stride = int(4 * g.width * sizeof(T));
  for (int number = program * kWarps + warp_of(); number < tasks_of(g); number += int(g.programs) * kWarps) {
    const Rows rows(g, number);
    scale_rows<T>(mine.scaled, g, rows, chunk, shared);
    int degree[4];
    Channels<4> upstream[4];
    Values dy_sum, x_sum;  // over a row, of x less p
    float of_gamma[2][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      degree[k] = __shfl_sync(kAllLanes, rows.degree, edge_of(k));
      const int row = __shfl_sync(kAllLanes, rows.row, edge_of(k));
      upstream[k] = row_of<4>(g.d_m + channel, row, int(g.m_stride * sizeof(float)));
#pragma unroll
      for (int v = 0; v < 4; ++v)
        dy_sum.filter[k][v] = dy_sum.core[k][v] = x_sum.filter[k][v] = x_sum.core[k][v] = degree[k] < 0 ? NAN : 0.0f;
    }
    for_kth_edges(g, rows, mine.pair, [&](int n, int which, const Reach& reach) {
      Values x;
      edge_terms<T>(x, g, mine.pair.u[which], mine.pair.number[which], reach, chunk);
      add_others<T>(x, g, mine.pair.other[which], chunk);
      const auto gamma_f = load<4>(shared + channel_of()), gamma_c = load<4>(shared + kChunk + channel_of());
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto f = load<4>(mine.scaled + 256 * k + 4 * lane_of());
        const auto c = load<4>(mine.scaled + 256 * k + 128 + 4 * lane_of());
        const bool live = n < degree[k];
        if (!live) upstream[k] = {};
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float &x_f = x.filter[k][v], &x_c = x.core[k][v];
          const auto d = gate_gradient2<DeviceMath>(fmaf(x_f, gamma_f.x[v], f.x[v]), fmaf(x_c, gamma_c.x[v], c.x[v]));
          const float dy_f = upstream[k].x[v] * d.d_filter, dy_c = upstream[k].x[v] * d.d_core;
          of_gamma[0][v] = fmaf(dy_f, x_f, of_gamma[0][v]);
          of_gamma[1][v] = fmaf(dy_c, x_c, of_gamma[1][v]);
          if (live) {
            x_sum.filter[k][v] += x_f;
            x_sum.core[k][v] += x_c;
            dy_sum.filter[k][v] += dy_f;
            dy_sum.core[k][v] += dy_c;
          }
          x_f = dy_f;
          x_c = dy_c;
        }
      }
      if (g.out_edge && first_term == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (n >= degree[k]) continue;
          const int begin = g.ptr[rows.first + edge_of(k)];
          float* to = g.out_edge + int64_t(begin + n) * 2 * g.all;
          store_channels(to, channel, g.F, x.filter[k], g.all);
          store_channels(to + g.all, channel, g.F, x.core[k], g.all);
        }
      }
      const Terms e(mine.pair.u[which], mine.pair.number[which], first_term);
      if (g.relaxed)
        add_filter<true>(mine.filter, x, g, e, reach, first_term);
      else
        add_filter<false>(mine.filter, x, g, e, reach, first_term);
    });
    // The rows' sums, by way of shared memory lest the loop keep them in fours; first those of dy, then those of x.
    Channels<4> by[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) by[k] = load<4>(mine.by[k] + 4 * lane_of());
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      by[0].x[v] += of_gamma[0][v];
      by[1].x[v] += of_gamma[1][v];
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part && (!g.out_x || first_term)) break;
      const Values& sum = part ? x_sum : dy_sum;
      __syncwarp();
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        mine.scaled[64 * k + lane_of()] = sum.filter[k / 4][k % 4];
        mine.scaled[64 * k + 32 + lane_of()] = sum.core[k / 4][k % 4];
      }
#pragma unroll 1
      for (int k = 0; k < 4; ++k) {
        const int64_t row = rows.first + edge_of(k);
        if (row >= g.n_rows) continue;
        const auto f = row_of<4>(p, int(row), stride), c = row_of<4>(p + g.width, int(row), stride);
        const float edges = part ? float(g.ptr[row + 1] - g.ptr[row]) : 0.0f;
        float of_filter[4], of_core[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          of_filter[v] = mine.scaled[256 * k + 64 * v + lane_of()];
          of_core[v] = mine.scaled[256 * k + 64 * v + 32 + lane_of()];
          if (part) {
            of_filter[v] = fmaf(edges, f.x[v], of_filter[v]);
            of_core[v] = fmaf(edges, c.x[v], of_core[v]);
            continue;
          }
          by[0].x[v] = fmaf(f.x[v], of_filter[v], by[0].x[v]);
          by[1].x[v] = fmaf(c.x[v], of_core[v], by[1].x[v]);
          by[2].x[v] += of_filter[v];
          by[3].x[v] += of_core[v];
        }
        if (first_term) continue;
        float* to = (part ? g.out_x : g.out) + row * 4 * g.F;
        store_channels(to, channel, g.F, of_filter);
        store_channels(to + g.F, channel, g.F, of_core);
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 4; ++k) store<4>(mine.by[k] + 4 * lane_of(), by[k]);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto sum = load<4>(mine.by[k] + 4 * lane_of());
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      float x = sum.x[v];
      x += __shfl_xor_sync(kAllLanes, x, 1);
      x += __shfl_xor_sync(kAllLanes, x, 2);
      if (lane_of() % 4 == 0) mine.scaled[k * kChunk + channel_of() + v] = x;
    }
  }
  __syncthreads();
  // Sums of the four warps in their order.
  for (int k = int(threadIdx.x); k < kFilterSums; k += kThreads) {
    const int number = k % 4, lane = k / 4 % 32, j = k / 128 % 4;
    const int term = first_term + k / 512 * 8 + lane % 4 * 2 + number % 2, c = chunk * kChunk + lane / 4 * 4 + j;
    if (term >= g.n_features || c >= g.F) continue;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp].filter[k];
    g.out_filter[((int64_t(program) * g.n_features + term) * 2 + number / 2) * g.F + c] = sum;
  }
  const int c = chunk * kChunk + lane_of();  // a warp one of the four sums
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp].scaled[warp_of() * kChunk + lane_of()];
  if (c < g.F && first_term == 0) g.out_gamma[(int64_t(program) * 4 + warp_of()) * g.F + c] = sum;
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 4) backward_senders(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks);
  float* correction = shared + kVectors;
  float* tile = correction + kCorrection + warp_of() * (kTileSize + kRecord);
  Record& record = *reinterpret_cast<Record*>(tile + kTileSize);
  for (int k = int(threadIdx.x); k < kCorrection; k += kThreads) {
    const int c = chunk * kChunk + k % kChunk, which = k / (2 * kChunk);
    const float* from = which == 0 ? g.a : which == 1 ? g.c1 : g.c2;
    correction[k] = c < g.F && (which == 0 || g.row_weight) ? from[k / kChunk % 2 * g.F + c] : 0.0f;
  }
  read_vectors(shared, g, chunk);
  const int number = int(blockIdx.x / chunks) * kWarps + warp_of();
  if (number >= tasks_of(g)) return;
  const int half = lane_of() / 8 % 2, walked = chunk * kChunk + lane_of() % 8 * 4;  // columns in `walk`
  const float* mine = correction + half * kChunk + lane_of() % 8 * 4;
  const auto done = [&](int row, const Channels<4>& sum) {
    float d[4];
    const auto a = load<4>(mine);
    if (g.row_weight) {
      const float degree = g.degree[row];
      const auto c1 = load<4>(mine + 2 * kChunk), c2 = load<4>(mine + 4 * kChunk);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float x_sum = __shfl_xor_sync(kAllLanes, sum.x[v], 16);
        d[v] = a.x[v] * (sum.x[v] - fmaf(degree, c1.x[v], x_sum * c2.x[v]));
      }
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v) d[v] = a.x[v] * sum.x[v];
    }
    if (lane_of() >= 16) store_channels(g.out + (int64_t(row) * 4 + 2 + half) * g.F, walked, g.F, d);
  };
  const Task task(g, number, record);
  rows_without_edges(g, task, [&](int row, float value) {
    const float x = lane_of() < 16 ? 0.0f : value;
    done(row, {{x, x, x, x}});
  });
  float sum[4] = {};
  for_tiles<Weight::kOther>(g, task, record, [&](unsigned last, int count, const Reach& reach, auto send) {
    Values x;
    edge_terms<T>(x, g, record.u, record.number, reach, chunk);
    send(0);
    gradients<T>(tile, x, g, count, record, chunk, shared);
    send(1);
    __syncwarp();
    walk<4>(tile, kTileStride, last, sum);
    for (unsigned left = last; left; left &= left - 1) {
      const int k = __ffs(left) - 1;
      done(record.ends[k].row, load<4>(tile + k * kTileStride + 4 * lane_of()));
    }
  });
}

// Of column_sums, finish, finish_backward and correct: a block is one of `programs` for 32 channels, of 16 rows at a time, of
// which a lane has four channels of one; the rows that it reads before it goes on are `apart`.
constexpr int kRowsAtOnce = 4 * kWarps;
SRCGCNN_DEVICE int four_channels_of() { return lane_of() % 8 * 4; }
SRCGCNN_DEVICE int64_t first_row(int64_t program) { return program * kRowsAtOnce + 4 * warp_of() + lane_of() / 8; }

SRCGCNN_DEVICE bool in_fours(int64_t stride, const float* x) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}
SRCGCNN_DEVICE void store_four(float* row, int64_t at, int64_t n, bool by_four, const Channels<4>& x) {
  if (by_four) {
    if (at < n) store<4>(row + at, x);
    return;
  }
#pragma unroll
  for (int v = 0; v < 4; ++v)
    if (at + v < n) row[at + v] = x.x[v];
}
// Sums over the block's rows, in an order of its own: done(number, sum), a lane a channel.
template <int kNumbers, class Done>
SRCGCNN_DEVICE void add_rows(float* shared, float (&sums)[kNumbers][4], Done done) {
#pragma unroll
  for (int k = 0; k < kNumbers; ++k) {
    Channels<4> sum;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      sum.x[v] = sums[k][v] + __shfl_xor_sync(kAllLanes, sums[k][v], 8);
      sum.x[v] += __shfl_xor_sync(kAllLanes, sum.x[v], 16);
    }
    if (lane_of() < 8) store<4>(shared + (warp_of() * kNumbers + k) * 32 + 4 * lane_of(), sum);
  }
  __syncthreads();
  for (int k = warp_of(); k < kNumbers; k += kWarps) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[(warp * kNumbers + k) * 32 + lane_of()];
    done(k, sum);
  }
}

constexpr int kSamples = 64;  // rows whose mean is what all others are taken about
static_assert(kSamples <= kThreads, "a thread a row");
// Row k of these, one of each 64th of all rows, at a place that repeats in no crystal's order.
SRCGCNN_DEVICE int sample_row(int k, int64_t n_rows) {
  const int64_t samples = n_rows < kSamples ? n_rows : kSamples, from = k * n_rows / samples;
  const uint64_t some = uint32_t(k) * 0x9e3779b1u, room = uint64_t((k + 1) * n_rows / samples - from);
  return int(from + int64_t(some * room >> 32));
}

// The mean of x of some rows, weighted as all are, for four channels; found about the first of them, so that equal rows have
// zeros left. weights (64), rows (64) and sums (4 times the threads) in shared memory.
SRCGCNN_DEVICE Channels<4> sample_mean(const DeviceConv& g, int channel, bool by_four, float* weights, int* rows, float* sums) {
  const int samples = g.n_rows < kSamples ? int(g.n_rows) : kSamples, k = int(threadIdx.x), share = k / 8;
  if (k < samples) {
    rows[k] = sample_row(k, g.n_rows);
    weights[k] = g.row_weight[rows[k]];
  }
  __syncthreads();
  const auto first = four_of(g.x + int64_t(rows[0]) * g.F, channel, g.F, by_four);
  Channels<4> sum = {};
#pragma unroll
  for (int t = 0; t < kSamples; t += kThreads / 8) {
    const int row = t + share < samples ? t + share : 0;
    const float weight = t + share < samples ? weights[row] : 0.0f;
    const auto x = four_of(g.x + int64_t(rows[row]) * g.F, channel, g.F, by_four);
#pragma unroll
    for (int v = 0; v < 4; ++v) sum.x[v] = fmaf(weight, x.x[v] - first.x[v], sum.x[v]);
  }
  store<4>(sums + 4 * k, sum);
  __syncthreads();
  float all = 0.0f;
  sum = {};
#pragma unroll 8
  for (int t = 0; t < samples; ++t) all += weights[t];
#pragma unroll 4
  for (int t = 0; t < kThreads / 8; ++t) add_to(sum, load<4>(sums + 4 * (8 * t + k % 8)));
#pragma unroll
  for (int v = 0; v < 4; ++v) sum.x[v] = first.x[v] + (all > 0 ? sum.x[v] / all : 0.0f);
  return sum;
}

__global__ void __launch_bounds__(kThreads) column_sums(const DeviceConv g) {
  constexpr int kAhead = 4;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks) * kChunk, channel = chunk + four_channels_of();
  const int64_t program = blockIdx.x / chunks, apart = g.programs * kRowsAtOnce;
  const bool by_four = in_fours(g.F, g.x);
  Channels<4> centre = {};
  if (g.out_x) {
    centre = sample_mean(g, channel, by_four, shared, reinterpret_cast<int*>(shared) + kSamples, shared + 2 * kSamples);
    if (program == 0 && threadIdx.x < 8) store_four(g.out_x, channel, g.F, g.F % 4 == 0, centre);
    __syncthreads();
  }
  float sums[3][4] = {};
#pragma unroll 1
  for (int64_t first = first_row(program); first < g.n_rows; first += kAhead * apart) {
    Channels<4> x[kAhead];
    float u[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart;
      const bool there = row < g.n_rows;
      x[k] = there ? four_of(g.x + row * g.F, channel, g.F, by_four) : centre;
      u[k] = there ? g.row_weight[row] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float y = x[k].x[v] - centre.x[v];
        sums[0][v] = fmaf(u[k], y, sums[0][v]);
        sums[1][v] = fmaf(u[k] * y, y, sums[1][v]);
        sums[2][v] += u[k];
      }
  }
  add_rows(shared, sums, [&](int k, float sum) {
    const int64_t c = chunk + lane_of();
    if (c < g.F) g.out[(program * 3 + k) * g.F + c] = sum;
  });
}

// A running statistic towards that of a batch, as torch.lerp rounds it.
SRCGCNN_DEVICE void move(float& running, float to, float by) {
  running = by < 0.5f ? fmaf(by, to - running, running) : to - (to - running) * (1 - by);
}

// A warp a row, a lane two Gaussians of 64.
__global__ void __launch_bounds__(kThreads, 12) edge_sum(const DeviceConv g) {
  const int K = int(g.n_features);
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp_of(); row < g.n_rows; row += int64_t(gridDim.x) * kWarps) {
    const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
    const bool bad = begin < 0 || end < begin || end > g.n_edges;
    // The same in all lanes, which only a reduction lets the compiler see.
    const int degree = __reduce_max_sync(kAllLanes, bad ? 0 : int(end - begin));
    for (int first = 0; first < K; first += 64) {
      const int k = first + lane_of();
      float sum[2] = {}, weights = 0.0f;
      if (bad) sum[0] = sum[1] = weights = NAN;
      for (int from = 0; from < degree; from += 32) {  // of which a lane reads one
        const int at = int(begin) + from + lane_of(), count = degree - from < 32 ? degree - from : 32;
        float my_u = 0.0f, my_weight = 0.0f;
        int my_number = 0;
        if (lane_of() < count) {
          const int i = g.other[at], e = g.number ? g.number[at] : at;
          const bool good = unsigned(i) < uint64_t(g.n_rows) && unsigned(e) < uint64_t(g.n_edges);
          my_number = good ? e : 0;
          my_weight = !good ? NAN : g.row_weight ? g.row_weight[i] : 1.0f;
          if (g.distance) my_u = (g.distance[my_number] - g.dmin) * g.inverse_step - float(first);
        }
        const auto add = [&](int t, float first_value, float second_value) {
          const float w = __shfl_sync(kAllLanes, my_weight, t);
          sum[0] = fmaf(w, first_value, sum[0]);
          sum[1] = fmaf(w, second_value, sum[1]);
          weights += w;
        };
        if (g.distance) {
#pragma unroll 4
          for (int t = 0; t < count; ++t) {
            const float u = __shfl_sync(kAllLanes, my_u, t);
            add(t, gaussian(u, float(lane_of())), gaussian(u, float(lane_of() + 32)));
          }
        } else {
#pragma unroll 4
          for (int t = 0; t < count; ++t) {
            const float* of = g.features + int64_t(__shfl_sync(kAllLanes, my_number, t)) * K;
            add(t, k < K ? of[k] : 0.0f, k + 32 < K ? of[k + 32] : 0.0f);
          }
        }
      }
      float* out = g.out + row * K;
      if (k < K) out[k] = sum[0];
      if (k + 32 < K) out[k + 32] = sum[1];
      if (g.out_degree && k == 0) g.out_degree[row] = weights;
    }
  }
}

// Sums of w e^T e over the edges, of 48 Gaussians on either side. Of these only tiles that some edge reaches with both
// sides: they are two tiles of 8 apart at most.
using GramSums = float[kTerms / 16][kSteps][4];
template <bool kRelaxed>
SRCGCNN_DEVICE void add_gram(GramSums& sums, const DeviceConv& g, const Record& record, const Reach& reach, int left,
                             int right) {
  const bool all = !g.distance;
  const auto weight = of_edges(record.weight);
  const Terms of_left(record.u, record.number, left), of_right(record.u, record.number, right);
  // Tiles of 8 that are in reach, counted from the first on either side.
  const int rows_from = reach.from - left / 8, rows_to = reach.to - left / 8;
  const int from = reach.from - right / 8, to = reach.to - right / 8, apart = (right - left) / 8;
  Operand<kRelaxed, 4> a[kTerms / 16];
#pragma unroll
  for (int tile = 0; tile < kTerms / 16; ++tile) {
    if (!all && (2 * tile + 1 < rows_from || 2 * tile >= rows_to)) continue;
    float e[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      of_left.read(e[half], g, 16 * tile + 8 * half);
#pragma unroll
      for (int n = 0; n < 4; ++n) e[half][n] *= weight.x[n];
    }
    a[tile] = left_side<kRelaxed>(e[0], e[1]);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (!all && (step < from || step >= to)) continue;
    float e[4];
    of_right.read(e, g, 8 * step);
    const auto b = right_side<kRelaxed>(e);
#pragma unroll
    for (int tile = 0; tile < kTerms / 16; ++tile) {
      if (!all && (2 * tile + 1 < rows_from || 2 * tile >= rows_to)) continue;
      if (!all && (step + apart > 2 * tile + 3 || step + apart < 2 * tile - 2)) continue;
      add_product(sums[tile][step], a[tile], b);
    }
  }
}

// A block is one of `programs`, for 48 Gaussians on either side.
__global__ void __launch_bounds__(kThreads, 2) edge_gram(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  const int parts = int(g.n_features + kTerms - 1) / kTerms, right = int(blockIdx.x % parts) * kTerms;
  const int program = int(blockIdx.x / parts % g.programs), left = int(blockIdx.x / parts / g.programs) * kTerms;
  Record& record = *reinterpret_cast<Record*>(shared + warp_of() * kRecord);
  GramSums sums = {};
  for (int number = program * kWarps + warp_of(); number < tasks_of(g); number += int(g.programs) * kWarps) {
    const Task task(g, number, record);
    for_tiles<Weight::kOwn>(g, task, record, [&](unsigned, int, const Reach& reach, auto send) {
      send(0);
      if (g.relaxed)
        add_gram<true>(sums, g, record, reach, left, right);
      else
        add_gram<false>(sums, g, record, reach, left, right);
      send(1);
    });
  }
  float* total = shared;
  add_warps<kTerms / 16 * kSteps * 4>(total, &sums[0][0][0]);
  for (int k = int(threadIdx.x); k < kTerms * kTerms; k += kThreads) {
    const int lane = k % 32, number = k / 32 % 4, step = k / 128 % kSteps, tile = k / 128 / kSteps;
    const int row = left + 16 * tile + lane / 4 + number / 2 * 8, column = right + 8 * step + lane % 4 * 2 + number % 2;
    if (row < g.n_features && column < g.n_features)
      g.out[(int64_t(program) * g.n_features + row) * g.n_features + column] = total[k];
  }
}

// What the norm of the messages does to four channels; zeros beyond the last.
struct Norms {
  Channels<4> scale = {}, shift = {}, mean = {}, rstd = {};
  SRCGCNN_DEVICE void put(int v, const Norm& norm) {
    scale.x[v] = norm.scale;
    shift.x[v] = norm.shift;
    mean.x[v] = norm.mean;
    rstd.x[v] = norm.rstd;
  }
};

__global__ void __launch_bounds__(kThreads) finish(const DeviceConv g) {
  constexpr int kAhead = 2;
  const int chunks = int(g.width / kChunk), channel = int(blockIdx.x % chunks) * kChunk + four_channels_of();
  const int64_t program = blockIdx.x / chunks, apart = g.programs * kRowsAtOnce;
  const bool by_four = in_fours(g.F, g.h) && in_fours(g.F, g.m) && in_fours(g.F, g.out);
  Norms norms;
#pragma unroll 1
  for (int v = 0; v < 4 && channel + v < g.F; ++v) {
    const int64_t c = channel + v;
    const double count = g.totals[2 * g.F + c], rest = g.totals[c] / count, mean = g.x[c] + rest;
    double var = g.totals[g.F + c] / count - rest * rest;
    if (var < 0) var = 0;
    const Norm norm(g, c, mean, var);
#pragma unroll
    for (int at = 0; at < 4; ++at)
      if (at == v) norms.put(at, norm);
    if (program != 0 || threadIdx.x >= 8) continue;
    g.out_m[c] = float(mean);
    g.out_x[c] = float(var);
    if (g.new_norm) keep(g, c, norm);
    if (g.running_mean2) {
      move(g.running_mean2[c], float(mean), g.momentum2);
      move(g.running_var2[c], float(var * (count / (count - 1))), g.momentum2);
    }
  }
#pragma unroll 1
  for (int64_t first = first_row(program); first < g.n_rows; first += kAhead * apart) {
    Channels<4> h[kAhead], m[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart, at = row < g.n_rows ? row : first;
      h[k] = four_of(g.h + at * g.F, channel, g.F, by_four);
      m[k] = four_of(g.m + at * g.F, channel, g.F, by_four);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart;
      if (row >= g.n_rows) break;
#pragma unroll
      for (int v = 0; v < 4; ++v) h[k].x[v] = finished(h[k].x[v], m[k].x[v], norms.scale.x[v], norms.shift.x[v]);
      store_four(g.out + row * g.F, channel, g.F, by_four, h[k]);
    }
  }
}

// Features of the rows after some steps, as `finish` made them from the messages that are kept.
__global__ void __launch_bounds__(kThreads) features_of_rows(const DeviceConv g) {
  constexpr int kAhead = 2;
  const int chunks = int(g.width / kChunk), channel = int(blockIdx.x % chunks) * kChunk + four_channels_of();
  const int64_t program = blockIdx.x / chunks, apart = g.programs * kRowsAtOnce, given = g.other ? g.n_edges : g.n_rows;
  const bool by_four = in_fours(g.F, g.h) && in_fours(g.F, g.m) && in_fours(g.F, g.a) && in_fours(g.F, g.out);
#pragma unroll 1
  for (int64_t first = first_row(program); first < g.n_rows; first += kAhead * apart) {
    Channels<4> h[kAhead];
    int64_t from[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart, at = row < g.n_rows ? row : first;
      from[k] = g.other ? g.other[at] : at;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool there = uint64_t(from[k]) < uint64_t(given);
      h[k] = four_of(g.h + (there ? from[k] : 0) * g.F, channel, g.F, by_four);
#pragma unroll
      for (int v = 0; v < 4; ++v) h[k].x[v] = there ? h[k].x[v] : NAN;
    }
#pragma unroll 1
    for (int64_t t = 0; t < g.columns; ++t) {
      const float *scales = g.a + 2 * t * g.F, *m = g.m + t * g.n_rows * g.F;
      const auto scale = four_of(scales, channel, g.F, by_four), shift = four_of(scales + g.F, channel, g.F, by_four);
      Channels<4> sum[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t row = first + k * apart;
        sum[k] = four_of(m + (row < g.n_rows ? row : first) * g.F, channel, g.F, by_four);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
#pragma unroll
        for (int v = 0; v < 4; ++v) h[k].x[v] = finished(h[k].x[v], sum[k].x[v], scale.x[v], shift.x[v]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart;
      if (row < g.n_rows) store_four(g.out + row * g.F, channel, g.F, by_four, h[k]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_backward(const DeviceConv g) {
  constexpr int kAhead = 2;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks) * kChunk, channel = chunk + four_channels_of();
  const int64_t program = blockIdx.x / chunks, apart = g.programs * kRowsAtOnce;
  const bool by_four = in_fours(g.F, g.h) && in_fours(g.F, g.m) && in_fours(g.F, g.grad) && in_fours(g.F, g.out);
  const bool m_by_four = in_fours(g.width, g.out_m);
  Norms norms;
#pragma unroll
  for (int v = 0; v < 4; ++v)
    if (channel + v < g.F) norms.put(v, Norm(g, channel + v));
  float sums[4][4] = {};
#pragma unroll 1
  for (int64_t first = first_row(program); first < g.n_rows; first += kAhead * apart) {
    Channels<4> h[kAhead], m[kAhead], d[kAhead];
    float w[kAhead], edges[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart, at = row < g.n_rows ? row : first;
      h[k] = four_of(g.h + at * g.F, channel, g.F, by_four);
      m[k] = four_of(g.m + at * g.F, channel, g.F, by_four);
      d[k] = four_of(g.grad + at * g.F, channel, g.F, by_four);
      w[k] = g.row_weight[at];
      edges[k] = float(g.ptr[at + 1] - g.ptr[at]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart;
      if (row >= g.n_rows) break;
      Channels<4> scaled;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float u = h[k].x[v] + fmaf(m[k].x[v], norms.scale.x[v], norms.shift.x[v]);
        d[k].x[v] *= softplus_slope2<DeviceMath>(u * DeviceMath::log2e);
        scaled.x[v] = d[k].x[v] * norms.scale.x[v];
        sums[0][v] += d[k].x[v];
        sums[1][v] = fmaf(d[k].x[v], (m[k].x[v] - norms.mean.x[v]) * norms.rstd.x[v], sums[1][v]);
        sums[2][v] += w[k];
        sums[3][v] = fmaf(w[k], edges[k], sums[3][v]);
      }
      store_four(g.out + row * g.F, channel, g.F, by_four, d[k]);
      if (g.out_m) store_four(g.out_m + row * g.width, channel, g.width, m_by_four, scaled);
    }
  }
  add_rows(shared, sums, [&](int k, float sum) {
    const int64_t c = chunk + lane_of();
    if (c < g.F) g.out_x[(program * 4 + k) * g.F + c] = sum;
  });
}

__global__ void __launch_bounds__(kThreads) correct(const DeviceConv g) {
  constexpr int kAhead = 4;
  const int64_t blocks = (g.columns + kChunk - 1) / kChunk, c = blockIdx.x % blocks * kChunk + four_channels_of();
  const int64_t program = blockIdx.x / blocks, apart = g.programs * kRowsAtOnce;
  const int64_t from_stride = g.var2 ? g.columns : g.stride, written = g.var2 ? g.stride : g.columns;
  const bool by_four = g.columns % 4 == 0 && in_fours(from_stride, g.grad) && in_fours(g.stride, g.out) &&
                       (!g.c1 || in_fours(from_stride, g.x));
  Channels<4> c1 = {}, c2 = {}, a = {}, mean = {};
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    if (c + v >= g.columns) continue;
    const float count = g.count ? *g.count : 1.0f;
    if (g.c1) c1.x[v] = g.c1[c + v] / count;
    if (g.c2) c2.x[v] = g.c2[c + v] / count;
    if (g.var2) {
      const Norm norm(g, c + v);
      a.x[v] = norm.scale;
      c2.x[v] *= norm.rstd;
      mean.x[v] = norm.mean;
    } else {
      a.x[v] = g.a[c + v];
    }
  }
#pragma unroll 1
  for (int64_t first = first_row(program); first < g.n_rows; first += kAhead * apart) {
    Channels<4> d[kAhead], x[kAhead];
    float w[kAhead], times[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart, at = row < g.n_rows ? row : first;
      d[k] = four_of(g.grad + at * from_stride, c, g.columns, by_four);
      if (!g.c1) continue;
      x[k] = four_of(g.x + at * from_stride, c, g.columns, by_four);
      w[k] = g.row_weight[at];
      times[k] = g.degree ? g.degree[at] : g.ptr ? float(g.ptr[at + 1] - g.ptr[at]) : 1.0f;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart;
      if (row >= g.n_rows) break;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (g.c1) d[k].x[v] -= w[k] * fmaf(x[k].x[v] - mean.x[v], c2.x[v], times[k] * c1.x[v]);
        d[k].x[v] = c + v < g.columns ? a.x[v] * d[k].x[v] : 0.0f;  // zeros beyond the channels of m
      }
      store_four(g.out + row * g.stride, c, written, by_four, d[k]);
    }
  }
}

}  // namespace srcgcnn
