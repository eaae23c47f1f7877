// Training: the edge passes of a convolution, and the node kernels around them.
//
// A warp takes 16 edges at a time, for 32 of the F channels. r = w_e e(d) of 16 edges is a product on the tensor cores,
// whose operand e(d) is formed in registers, and of which only the steps in reach of the distances are done. There q (or p)
// of the other end is gathered and the gate formed. By receiver a tile has two edges of each of 8 rows, whose sums stay in
// registers. By sender it has the next 16 edges of 16 rows, and what is summed over a row goes through shared memory, where
// each lane walks its columns of the edges in their order. So no sum depends on the order of threads, of warps or of blocks.
// Nothing of an edge is stored. In sum e dy^T a lane's dy are an operand as they are. The tensor cores cut sums off: so none
// there is longer than a few products, small ones first, and the rest is added in float32.
#pragma once
#include "conv.h"
#include "device.cuh"

namespace srcgcnn {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChunk = 32;           // channels of a block
constexpr int kTile = 16;            // edges that a warp takes at a time
constexpr int kTaskRows = 16;        // whose edges these are, where they are packed
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

// Gaussians in reach of a distance: the first and the last one, before they are known to exist.
struct Span {
  static constexpr int kMost = 1 << 20;
  int low, high;
  SRCGCNN_DEVICE Span() : low(kMost), high(0) {}  // none
  SRCGCNN_DEVICE explicit Span(float u)
      : low(int(u < -5.0f ? float(kMost) : fminf(fmaxf(u - 4.5f, 0.0f), float(kMost)))),  // 0 for a NaN
        high(int(fmaxf(fminf(u + 4.5f, float(kMost)), 0.0f))) {}                          // all for a NaN
};
// Steps of 8 Gaussians that are in reach of some lane's distance: [from, to).
struct Reach {
  int from, to;
  SRCGCNN_DEVICE Reach(const DeviceConv& g, const Span& of) {
    const unsigned last = unsigned(g.n_features) - 1;
    const unsigned first = __reduce_min_sync(kAllLanes, of.low), end = __reduce_max_sync(kAllLanes, of.high);
    from = int((first < last ? first : last) / 8);
    to = int((end < last ? end : last) / 8 + 1);
  }
};

// What a lane has of 16 edges after a product. Wide: edges lane / 4 and the one 8 later, of each the eight channels from
// 8 (lane % 4) on; four lanes gather a line of a row, and no fewer do with less work of the cache.
// Tall: edges 2 (lane % 4), the next one, and those 8 later, of each the four channels from 4 (lane / 4) on: as they are an
// operand of a product whose sums are over edges.
struct Wide {
  static constexpr int kEdges = 2, kChannels = 8;
  float filter[2][8], core[2][8];
  static SRCGCNN_DEVICE int edge(int k) { return lane_of() / 4 + 8 * k; }
  static SRCGCNN_DEVICE int channel() { return lane_of() % 4 * 8; }
};
struct Tall {
  static constexpr int kEdges = 4, kChannels = 4;
  float filter[4][4], core[4][4];
  static SRCGCNN_DEVICE int edge(int k) { return 2 * (lane_of() % 4) + k % 2 + k / 2 * 8; }
  static SRCGCNN_DEVICE int channel() { return lane_of() / 4 * 4; }
};
template <int N, class T>
struct Numbers {
  T x[N];
};
// Numbers of a lane's edges.
template <class Layout, class T>
SRCGCNN_DEVICE Numbers<Layout::kEdges, T> of_edges(const T (&all)[kTile]) {
  struct alignas(2 * sizeof(T)) Two {
    T x[2];
  };
  Numbers<Layout::kEdges, T> found;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (Layout::kEdges == 2) {
      found.x[half] = all[Layout::edge(half)];
      continue;
    }
    const Two two = *reinterpret_cast<const Two*>(all + Layout::edge(2 * half));
    found.x[Layout::kEdges / 2 * half] = two.x[0];
    found.x[Layout::kEdges / 2 * half + Layout::kEdges / 4] = two.x[1];
  }
  return found;
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

template <int V, class T>
SRCGCNN_DEVICE void load_channels(float (&x)[V], const T* from) {
#pragma unroll
  for (int v = 0; v < V; v += 4) {
    const auto four = load<4>(from + v);
#pragma unroll
    for (int n = 0; n < 4; ++n) x[v + n] = four.x[n];
  }
}

// The product of 16 edges' Gaussians with the filter, of which a lane reads filter and core of channels j, 4 + j, 8 + j, ...
// at once. Tall: these are the rows of a left side, first the filter's, and the right sides are the first and the last 8
// edges. Wide: they are the columns of two right sides, and the left one is the edges.
template <bool kRelaxed, class Layout>
struct Product {
  static constexpr bool kTall = Layout::kEdges == 4;
  float sum[4][2][4], small[4][2][4];

  static SRCGCNN_DEVICE void multiply(float (&to)[4], const Channels<4>& w, const float (&e)[2][2], int side) {
    if constexpr (kTall)
      device::mma(to, w.x, e[side]);
    else
      device::mma(to, {e[0][0], e[1][0], e[0][1], e[1][1]}, {w.x[2 * side], w.x[2 * side + 1]});
  }
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
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int v = 0; v < 4 && kFirst; ++v) sum[j][side][v] = small[j][side][v] = 0.0f;
        multiply(sum[j][side], w, e, side);
      }
      if (kRelaxed) continue;
      const auto w_low = load<4>(at + j * 256 + 128);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        multiply(small[j][side], w, low, side);
        multiply(small[j][side], w_low, e, side);
      }
    }
  }
  SRCGCNN_DEVICE Product(Layout& r, const float* weights, const float (&u)[2], const Reach& reach) {
    const float* at = weights + 1024 * reach.from;
    float k = float(8 * reach.from + lane_of() % 4);
    const float end = float(8 * reach.to - 8);
    add<true>(at, u, k);  // of zeros, if none is in reach
#pragma unroll 1
    while (k < end) add<false>(at += 1024, u, k += 8.0f);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float x = sum[j][side][v] + small[j][side][v];
          if constexpr (kTall)
            (v < 2 ? r.filter : r.core)[2 * side + v % 2][j] = x;
          else
            (side ? r.core : r.filter)[v / 2][v % 2 * 4 + j] = x;
        }
  }
};

// r of 16 edges for the chunk's channels; NaN where the other end is outside. T: how pq and term are stored.
template <class T, class Layout>
SRCGCNN_DEVICE void edge_terms(Layout& r, const DeviceConv& g, const float (&u_of)[kTile], const int (&number_of)[kTile],
                               const Reach& reach, int chunk) {
  if (g.term) {
    const auto u = of_edges<Layout>(u_of);
    const auto number = of_edges<Layout>(number_of);
    const T* table = static_cast<const T*>(g.term) + chunk * kChunk + Layout::channel();
    const int stride = int(2 * g.width * sizeof(T));
#pragma unroll
    for (int k = 0; k < Layout::kEdges; ++k) {
      const T* at = row_at(table, number.x[k], stride);
      load_channels(r.filter[k], at);
      load_channels(r.core[k], at + g.width);
      const float poison = u.x[k] - u.x[k];
#pragma unroll
      for (int v = 0; v < Layout::kChannels; ++v) {
        r.filter[k][v] += poison;
        r.core[k][v] += poison;
      }
    }
    return;
  }
  const float u[2] = {u_of[lane_of() / 4], u_of[lane_of() / 4 + 8]};
  const int order = Layout::kEdges == 2 ? int(g.width / kChunk) : 0;
  const float* weights = g.filter + int64_t(order + chunk) * (int(g.n_features + 7) / 8 * 1024) + lane_of() * 4;
  if (g.relaxed)
    Product<true, Layout>(r, weights, u, reach);
  else
    Product<false, Layout>(r, weights, u, reach);
}

// Numbers of a row of pq (0 filter of p, 1 core of p, 2 and 3 of q) added to x. `pq`: the first row's of these channels.
template <int V, class T>
SRCGCNN_DEVICE void add_row(float (&filter)[V], float (&core)[V], const T* pq, int64_t width, int row, int which) {
  const T* at = row_at(pq + which * width, row, int(4 * width * sizeof(T)));
  float f[V], c[V];
  load_channels(f, at);
  load_channels(c, at + width);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    filter[v] += f[v];
    core[v] += c[v];
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
// y of V channels from `channel` on, in these units.
template <int V>
struct Scaling {
  float gamma_f[V], gamma_c[V], beta_f[V], beta_c[V];
  SRCGCNN_DEVICE Scaling(const float* vectors, int channel) {
    load_channels(gamma_f, vectors + channel);
    load_channels(gamma_c, vectors + kChunk + channel);
    load_channels(beta_f, vectors + 2 * kChunk + channel);
    load_channels(beta_c, vectors + 3 * kChunk + channel);
  }
  SRCGCNN_DEVICE float filter(float x, int v) const { return fmaf(x, gamma_f[v], beta_f[v]); }
  SRCGCNN_DEVICE float core(float x, int v) const { return fmaf(x, gamma_c[v], beta_c[v]); }
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
    const Reach reach(g, Span(edges.publish(g, record, left)));
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

// Eight rows, of each of which a tile has two edges: so what is summed over a row stays with the lanes that have its edges,
// and where rows are sorted by distance, those of a tile are alike. Lane l has row first + l % 8, or the last one.
constexpr int kRows = 8;
SRCGCNN_DEVICE int eights_of(const DeviceConv& g) { return int((g.n_rows + kRows - 1) / kRows); }
struct Rows {
  int first, row, begin, degree, most;  // the row's first edge, how many it has, -1 if nobody knows; the largest degree
  SRCGCNN_DEVICE Rows(const DeviceConv& g, int number) : first(number * kRows) {
    const int at = first + lane_of() % kRows, end = int(g.n_rows) - 1;
    row = at < end ? at : end;
    const int64_t from = g.ptr[row], to = g.ptr[int64_t(row) + 1];
    const bool bad = from < 0 || to < from || to > g.n_edges;
    begin = int(from);
    degree = bad ? -1 : at > end ? 0 : int(to - from);
    most = __reduce_max_sync(kAllLanes, degree);
  }
};

// Of two tiles, what lanes tell each other: row 0's edge, ..., row 7's edge, row 0's next edge, ...
struct Pair {
  alignas(16) int other[2][kTile];  // can be followed
  alignas(16) float u[2][kTile];    // as of a record
  alignas(16) int number[2][kTile];
};
constexpr int kPair = int(sizeof(Pair) / sizeof(float));

// The tiles of these rows: each(n, which of the pair, reach) has their edges number n and n + 1.
template <class Each>
SRCGCNN_DEVICE void for_edges(const DeviceConv& g, const Rows& rows, Pair& pair, Each each) {
  const int ahead = lane_of() / kRows;  // lanes 16 and on have the second tile
  int other = 0;
  float distance = g.dmin;
  const auto send = [&](int n) {
    const int place = rows.begin + n + ahead;
    if (n + ahead >= rows.degree) return;
    other = g.other[place];
    if (g.distance) distance = g.distance[place];
  };
  send(0);
  Span span;
  for (int n = 0; n < rows.most; n += 2) {
    const int which = n / 2 % 2;
    if (which == 0) {
      const bool live = n + ahead < rows.degree, good = live && unsigned(other) < uint64_t(g.n_rows);
      const float u = good ? (distance - g.dmin) * g.inverse_step : live ? NAN : -1e3f;
      __syncwarp();
      (&pair.other[0][0])[lane_of()] = good ? other : rows.row;
      (&pair.u[0][0])[lane_of()] = u;
      (&pair.number[0][0])[lane_of()] = good ? rows.begin + n + ahead : 0;
      __syncwarp();
      span = Span(u);
      send(n + 4);
    }
    each(n, which, Reach(g, ahead / 2 == which ? span : Span()));
  }
}

// Four channels of a row of F, of which those from `channel` on that there are.
SRCGCNN_DEVICE void store_channels(float* row, int channel, int64_t F, const float (&x)[4]) {
  if (F % 4 == 0) {
    if (channel < F) store<4>(row + channel, {{x[0], x[1], x[2], x[3]}});
    return;
  }
#pragma unroll 1
  for (int v = 0; v < 4 && channel + v < F; ++v) row[channel + v] = v < 2 ? (v ? x[1] : x[0]) : v < 3 ? x[2] : x[3];
}
SRCGCNN_DEVICE Channels<4> read_channels(const float* row, int channel, int64_t F) {
  if (F % 4 == 0) return channel < F ? load<4>(row + channel) : Channels<4>{};
  Channels<4> x;
#pragma unroll
  for (int v = 0; v < 4; ++v) x.x[v] = channel + v < F ? row[channel + v] : 0.0f;
  return x;
}

// gamma p + beta of the lane's part of a row, so that y = gamma (q + r) + this; kept in shared memory, four numbers of each
// lane side by side.
constexpr int kScaledSize = kRows * 2 * kChunk;
template <int V, class T>
SRCGCNN_DEVICE void scale_row(float* scaled, const T* pq, int64_t width, int row, const float* vectors, int channel) {
  const T* at = row_at(pq, row, int(4 * width * sizeof(T)));
#pragma unroll
  for (int v = 0; v < V; v += 4) {
    const Scaling<4> y(vectors, channel + v);
    auto f = load<4>(at + v), c = load<4>(at + width + v);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      f.x[n] = y.filter(f.x[n], n);
      c.x[n] = y.core(c.x[n], n);
    }
    store<4>(scaled + 64 * v + 4 * lane_of(), f);
    store<4>(scaled + 64 * v + 128 + 4 * lane_of(), c);
  }
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 4) gate_sum(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks);
  float* norms = shared + kVectors;
  float* scaled = norms + kNorms + warp_of() * (kScaledSize + kPair);
  Pair& pair = *reinterpret_cast<Pair*>(scaled + kScaledSize);
  if (g.out && warp_of() == 0 && chunk * kChunk + lane_of() < g.F) {
    const Norm norm(g, chunk * kChunk + lane_of());
    norms[lane_of()] = norm.scale;
    norms[kChunk + lane_of()] = norm.shift;
  }
  read_vectors(shared, g, chunk);
  const int number = int(blockIdx.x / chunks) * kWarps + warp_of();
  if (number >= eights_of(g)) return;
  const Rows rows(g, number);
  const T* pq = static_cast<const T*>(g.pq) + chunk * kChunk + Wide::channel();
  const int degree = __shfl_sync(kAllLanes, rows.degree, Wide::edge(0));
  const int mine = __shfl_sync(kAllLanes, rows.row, Wide::edge(0));
  float sum[8];
  scale_row<8>(scaled, pq, g.width, mine, shared, Wide::channel());
#pragma unroll
  for (int v = 0; v < 8; ++v) sum[v] = degree < 0 ? NAN : 0.0f;
  for_edges(g, rows, pair, [&](int n, int which, const Reach& reach) {
    Wide x;
    edge_terms<T>(x, g, pair.u[which], pair.number[which], reach, chunk);
    const auto other = of_edges<Wide>(pair.other[which]);
#pragma unroll
    for (int k = 0; k < 2; ++k) add_row(x.filter[k], x.core[k], pq, g.width, other.x[k], 2);
#pragma unroll
    for (int v = 0; v < 8; v += 4) {
      const auto gamma_f = load<4>(shared + Wide::channel() + v), f = load<4>(scaled + 64 * v + 4 * lane_of());
      const auto gamma_c = load<4>(shared + kChunk + Wide::channel() + v);
      const auto c = load<4>(scaled + 64 * v + 128 + 4 * lane_of());
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float y_f = fmaf(x.filter[k][v + i], gamma_f.x[i], f.x[i]);
          const float y_c = fmaf(x.core[k][v + i], gamma_c.x[i], c.x[i]);
          const float message = gate2<DeviceMath>(y_f, y_c);
          if (n + k < degree) sum[v + i] += message;
        }
    }
  });
  const int64_t row = rows.first + Wide::edge(0);
  if (row >= g.n_rows) return;
#pragma unroll
  for (int v = 0; v < 8; v += 4) {
    float m[4] = {sum[v], sum[v + 1], sum[v + 2], sum[v + 3]};
    const int channel = chunk * kChunk + Wide::channel() + v;
#pragma unroll
    for (int n = 0; n < 4; ++n) m[n] *= DeviceMath::ln2;
    if (g.out_m) store_channels(g.out_m + row * g.F, channel, g.F, m);
    if (!g.out) continue;
    const auto h = read_channels(g.h + row * g.F, channel, g.F);
    const auto scale = load<4>(norms + Wide::channel() + v), shift = load<4>(norms + kChunk + Wide::channel() + v);
#pragma unroll
    for (int n = 0; n < 4; ++n) m[n] = finished(h.x[n], m[n], scale.x[n], shift.x[n]);
    store_channels(g.out + row * g.F, channel, g.F, m);
  }
}

// By sender: w_i x and dy, the gradients at y, of a lane's edges go to shared memory: of an edge x filter, x core, dy
// filter, dy core. Edges that are not there leave zeros.
template <class T>
SRCGCNN_DEVICE void gradients(float* tile, Wide& x, const DeviceConv& g, int count, const Record& record, int chunk,
                              const float* vectors) {
  const int channel = chunk * kChunk + Wide::channel();
  const T* pq = static_cast<const T*>(g.pq) + channel;
  const auto ends = of_edges<Wide>(record.ends);
  float upstream[2][8];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int own = ends.x[k].row, other = ends.x[k].other;
    add_row(x.filter[k], x.core[k], pq, g.width, own, 2);
    add_row(x.filter[k], x.core[k], pq, g.width, other, 0);
    load_channels(upstream[k], row_at(g.d_m + channel, other, int(g.width * sizeof(float))));
  }
  __syncwarp();  // lest the compiler send for all at once, with registers that it has not
  if (count < kTile) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int v = 0; v < 8; ++v)
        if (Wide::edge(k) >= count) upstream[k][v] = 0.0f;
  }
#pragma unroll
  for (int v = 0; v < 8; v += 4) {
    const Scaling<4> y(vectors, Wide::channel() + v);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float weight = record.weight[Wide::edge(k)];
      Channels<4> out[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float x_f = x.filter[k][v + n], x_c = x.core[k][v + n];
        const auto d = gate_gradient2<DeviceMath>(y.filter(x_f, n), y.core(x_c, n));
        out[0].x[n] = weight * x_f;
        out[1].x[n] = weight * x_c;
        out[2].x[n] = upstream[k][v + n] * d.d_filter;
        out[3].x[n] = upstream[k][v + n] * d.d_core;
      }
      float* at = tile + Wide::edge(k) * kTileStride + Wide::channel() + v;
#pragma unroll
      for (int part = 0; part < 4; ++part) store<4>(at + part * kChunk, out[part]);
    }
  }
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
  Numbers<4, float> u;  // less that of the first of them
  const int (&number_of)[kTile];
  int first;
  SRCGCNN_DEVICE Terms(const float (&u_of)[kTile], const int (&numbers)[kTile], int of)
      : u(of_edges<Tall>(u_of)), number_of(numbers), first(of + lane_of() / 4) {
#pragma unroll
    for (int n = 0; n < 4; ++n) u.x[n] -= float(first);
  }
  SRCGCNN_DEVICE void read(float (&e)[4], const DeviceConv& g, int later) const {
    if (g.distance) {
#pragma unroll
      for (int n = 0; n < 4; ++n) e[n] = gaussian(u.x[n], float(later));
      return;
    }
    const auto number = of_edges<Tall>(number_of);
    const int k = first + later < g.n_features ? first + later : 0;  // nobody reads the sums of others
#pragma unroll
    for (int n = 0; n < 4; ++n) e[n] = g.features[int64_t(number.x[n]) * g.n_features + k];
  }
};

// Sums of dy e^T over the edges, of 48 Gaussians: of each 8 four tiles as `product` has them on its left side, with the
// Gaussians in the edges' place. They stay in shared memory, four numbers of each lane.
constexpr int kFilterSums = kSteps * 4 * 128;
template <bool kRelaxed>
SRCGCNN_DEVICE void add_filter(float* sums, const Tall& dy, const DeviceConv& g, const Terms& e, const Reach& reach,
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
  float rows[kScaledSize];  // of a task: gamma p + beta, then sums
  float by[4][4 * 32];        // sums of dy x, filter and core, and of dy
  Pair pair;
};
constexpr int kReceivers = int(sizeof(Receivers) / sizeof(float));

// A block is one of `programs`, for one chunk of channels and one block of 48 Gaussians.
template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 3) backward_receivers(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), channel = chunk * kChunk + Tall::channel();
  const int program = int(blockIdx.x / chunks % g.programs);
  const int first_term = int(blockIdx.x / chunks / g.programs) * kTerms;
  Receivers* warps = reinterpret_cast<Receivers*>(shared + kVectors);
  Receivers& mine = warps[warp_of()];
  read_vectors(shared, g, chunk);
  for (int k = 0; k < kFilterSums; k += 128) store<4>(mine.filter + k + 4 * lane_of(), {});
  for (int k = 0; k < 4; ++k) store<4>(mine.by[k] + 4 * lane_of(), {});
  const T* pq = static_cast<const T*>(g.pq) + channel;
  for (int number = program * kWarps + warp_of(); number < eights_of(g); number += int(g.programs) * kWarps) {
    const Rows rows(g, number);
    int degree[2];  // of the rows of the lane's first two edges, and of its last two
    float upstream[2][4], of_gamma[2][4] = {};
    float dy_sum[2][2][4], x_sum[2][2][4];  // over a row, filter and core; of x less p
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      degree[r] = __shfl_sync(kAllLanes, rows.degree, Tall::edge(r));
      const int row = __shfl_sync(kAllLanes, rows.row, Tall::edge(r));
      load_channels(upstream[r], row_at(g.d_m + channel, row, int(g.width * sizeof(float))));
      scale_row<4>(mine.rows + 256 * r, pq, g.width, row, shared, Tall::channel());
#pragma unroll
      for (int v = 0; v < 4; ++v)
#pragma unroll
        for (int part = 0; part < 2; ++part) dy_sum[r][part][v] = x_sum[r][part][v] = degree[r] < 0 ? NAN : 0.0f;
    }
    for_edges(g, rows, mine.pair, [&](int n, int which, const Reach& reach) {
      Tall x;
      edge_terms<T>(x, g, mine.pair.u[which], mine.pair.number[which], reach, chunk);
      const auto other = of_edges<Tall>(mine.pair.other[which]);
#pragma unroll
      for (int k = 0; k < 4; ++k) add_row(x.filter[k], x.core[k], pq, g.width, other.x[k], 2);
      const auto gamma_f = load<4>(shared + Tall::channel()), gamma_c = load<4>(shared + kChunk + Tall::channel());
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = k % 2;
        const bool live = n + k / 2 < degree[r];
        const float* scaled = mine.rows + 256 * r + 4 * lane_of();
        const auto f = load<4>(scaled), c = load<4>(scaled + 128);
        if (!live)
#pragma unroll
          for (int v = 0; v < 4; ++v) upstream[r][v] = 0.0f;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float &x_f = x.filter[k][v], &x_c = x.core[k][v];
          const float y_f = fmaf(x_f, gamma_f.x[v], f.x[v]), y_c = fmaf(x_c, gamma_c.x[v], c.x[v]);
          const auto d = gate_gradient2<DeviceMath>(y_f, y_c);
          const float dy_f = upstream[r][v] * d.d_filter, dy_c = upstream[r][v] * d.d_core;
          of_gamma[0][v] = fmaf(dy_f, x_f, of_gamma[0][v]);
          of_gamma[1][v] = fmaf(dy_c, x_c, of_gamma[1][v]);
          if (live) {
            x_sum[r][0][v] += x_f;
            x_sum[r][1][v] += x_c;
            dy_sum[r][0][v] += dy_f;
            dy_sum[r][1][v] += dy_c;
          }
          x_f = dy_f;
          x_c = dy_c;
        }
      }
      if (g.out_edge && first_term == 0) {
#pragma unroll 1
        for (int k = 0; k < 4; ++k) {
          if (n + k / 2 >= (k % 2 ? degree[1] : degree[0])) continue;
          const int place = g.ptr[rows.first + Tall::edge(k % 2)] + n + k / 2;
          float* to = g.out_edge + int64_t(place) * 2 * g.F;
          const auto four = [&](const float(&of)[4][4]) {
            Channels<4> y;
#pragma unroll
            for (int v = 0; v < 4; ++v) y.x[v] = k < 2 ? (k ? of[1][v] : of[0][v]) : k < 3 ? of[2][v] : of[3][v];
            return y;
          };
          store_channels(to, channel, g.F, four(x.filter).x);
          store_channels(to + g.F, channel, g.F, four(x.core).x);
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
      __syncwarp();
#pragma unroll
      for (int k = 0; k < 16; ++k)
        mine.rows[32 * k + lane_of()] = (part ? x_sum : dy_sum)[k / 8][k / 4 % 2][k % 4];
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
        const int64_t row = rows.first + Tall::edge(r);
        if (row >= g.n_rows) continue;
        float p_f[4] = {}, p_c[4] = {}, of_filter[4], of_core[4];
        add_row(p_f, p_c, pq, g.width, int(row), 0);
        const float edges = part ? float(g.ptr[row + 1] - g.ptr[row]) : 0.0f;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          of_filter[v] = mine.rows[256 * r + 32 * v + lane_of()];
          of_core[v] = mine.rows[256 * r + 128 + 32 * v + lane_of()];
          if (part) {
            of_filter[v] = fmaf(edges, p_f[v], of_filter[v]);
            of_core[v] = fmaf(edges, p_c[v], of_core[v]);
            continue;
          }
          by[0].x[v] = fmaf(p_f[v], of_filter[v], by[0].x[v]);
          by[1].x[v] = fmaf(p_c[v], of_core[v], by[1].x[v]);
          by[2].x[v] += of_filter[v];
          by[3].x[v] += of_core[v];
        }
        if (first_term) continue;
        float* to = part ? g.out_x + row * 2 * g.F : g.out + row * 4 * g.F;
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
      if (lane_of() % 4 == 0) mine.rows[k * kChunk + Tall::channel() + v] = x;
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
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp].rows[warp_of() * kChunk + lane_of()];
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
    Wide x;
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

__global__ void __launch_bounds__(kThreads) column_sums(const DeviceConv g) {
  constexpr int kAhead = 4;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks) * kChunk, channel = chunk + four_channels_of();
  const int64_t program = blockIdx.x / chunks, apart = g.programs * kRowsAtOnce;
  const bool by_four = in_fours(g.F, g.x);
  Channels<4> centre = {};
#pragma unroll
  for (int v = 0; v < 4; ++v)
    if (g.totals && channel + v < g.F) centre.x[v] = float(g.totals[channel + v] / g.totals[3 * g.F + channel + v]);
  float sums[4][4] = {};
#pragma unroll 1
  for (int64_t first = first_row(program); first < g.n_rows; first += kAhead * apart) {
    Channels<4> x[kAhead];
    float u[kAhead], degree[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * apart;
      const bool there = row < g.n_rows;
      x[k] = there ? four_of(g.x + row * g.F, channel, g.F, by_four) : centre;
      u[k] = there ? g.row_weight[row] : 0.0f;
      degree[k] = there && g.degree ? g.degree[row] : 0.0f;
      if (!g.ptr || !there) continue;
      const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
      u[k] *= begin < 0 || end < begin || end > g.n_edges ? NAN : float(end - begin);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float y = x[k].x[v] - centre.x[v];
        sums[0][v] = fmaf(u[k], y, sums[0][v]);
        sums[1][v] = fmaf(degree[k], y, sums[1][v]);
        sums[2][v] = fmaf(u[k] * y, y, sums[2][v]);
        sums[3][v] += u[k];
      }
  }
  add_rows(shared, sums, [&](int k, float sum) {
    const int64_t c = chunk + lane_of();
    if (c < g.F) g.out[(program * 4 + k) * g.F + c] = sum;
  });
}

constexpr int kGramRows = 32;  // of a block, neighbours, as edges stay within a crystal

// h less its mean, and its neighbours', to out_x and the first 3F numbers of out; a lane V channels. Lanes read the numbers of
// the neighbours, four of which are on their way at a time.
template <int V>
SRCGCNN_DEVICE void gram_channels(const DeviceConv& g, const float* centre, int64_t row, int64_t begin, int count,
                                  float by_own, float w, float in_degree, float* out) {
  const int F = int(g.F);
  const float* h = g.h;
  for (int first = 0; first < F; first += 32 * V) {
    const int c = first + V * lane_of(), at = c < F ? c : 0;
    const auto mean = load<V>(centre + at);
    auto x = load<V>(h + row * F + at);
    float sum[V] = {};
    for (int from = 0; from < count; from += 32) {
      int other = from + lane_of() < count ? g.other[begin + from + lane_of()] : 0;
      if (unsigned(other) >= uint64_t(g.n_rows)) other = -1;
      const int here = count - from < 32 ? count - from : 32;
      for (int k = 0; k < here; k += 4) {
        Channels<V> y[4];
        int j[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          j[t] = __shfl_sync(kAllLanes, other, k + t);
          y[t] = load<V>(h + int64_t(j[t] < 0 ? 0 : j[t]) * F + at);
        }
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (k + t < here) sum[v] += j[t] < 0 ? NAN : y[t].x[v] - mean.x[v];
      }
    }
    if (c >= F) continue;
    Channels<V> own, around, into;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      x.x[v] -= mean.x[v];
      own.x[v] = by_own * x.x[v];
      around.x[v] = w * sum[v];
      into.x[v] = in_degree * x.x[v];
    }
    store<V>(g.out_x + row * F + c, x);
    store<V>(out + c, own);
    store<V>(out + F + c, around);
    store<V>(out + 2 * F + c, into);
  }
}

// A warp a row.
__global__ void __launch_bounds__(kThreads, 8) gram_rows(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  float *centre = shared, *e_mean = shared + g.F;
  const double count = g.totals[3 * g.F];
  for (int64_t c = threadIdx.x; c < g.F; c += kThreads) centre[c] = float(g.totals[c] / count);
  for (int64_t k = threadIdx.x; k < g.n_features; k += kThreads) e_mean[k] = float(g.e_sum[k] / count);
  __syncthreads();
  const int64_t F = g.F, K = g.n_features, columns = 3 * F + 2 * K + 2, stride = g.stride ? g.stride : columns;
  const bool in_pairs = F % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(g.h) % 8 == 0;
  for (int r = warp_of(); r < kGramRows; r += kWarps) {
    const int64_t row = int64_t(blockIdx.x) * kGramRows + r;
    if (row >= g.n_rows) return;
    const int64_t begin = g.ptr[row], end = g.ptr[row + 1];
    const bool bad = begin < 0 || end < begin || end > g.n_edges;
    const float w = g.row_weight[row], degree = bad ? NAN : float(end - begin), in_degree = g.degree[row];
    float* out = g.out + row * stride;
    const int n = bad ? 0 : int(end - begin);
    if (in_pairs)
      gram_channels<2>(g, centre, row, begin, n, w * degree, w, in_degree, out);
    else
      gram_channels<1>(g, centre, row, begin, n, w * degree, w, in_degree, out);
    for (int64_t k = lane_of(); k < K; k += 32) {
      out[3 * F + k] = w * fmaf(-degree, e_mean[k], g.by_receiver[row * K + k]);
      out[3 * F + K + k] = fmaf(-in_degree, e_mean[k], g.by_sender[row * K + k]);
    }
    if (lane_of() < 2) out[columns - 2 + lane_of()] = lane_of() ? in_degree : w * degree;
  }
}

// A running statistic towards that of a batch, as torch.lerp rounds it.
SRCGCNN_DEVICE void move(float& running, float to, float by) {
  running = by < 0.5f ? fmaf(by, to - running, running) : to - (to - running) * (1 - by);
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
    const double mean = sums[2 * kThreads] + shift;
    g.out[n] = float(mean);
    g.out_x[n] = var < 0 ? 0.0f : float(var);
    if (g.running_mean1) {
      move(g.running_mean1[n], float(mean + (g.bias ? g.bias[n] : 0.0f)), g.momentum1);
      move(g.running_var1[n], float((var < 0 ? 0 : var) * (count / (count - 1))), g.momentum1);
    }
  }
}

SRCGCNN_DEVICE float rstd_of(const DeviceConv& g, int64_t n) { return float(1 / sqrt(double(g.var1[n]) + g.eps)); }

__global__ void __launch_bounds__(kThreads) scale_weights(const DeviceConv g) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t F = g.F, W = g.width, K = g.n_features, columns = 2 * F + K, steps = (K + 7) / 8;
  for (int64_t x = thread; g.out && x < 4 * W * F; x += threads) {  // rows: p filter, p core, q filter, q core
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
  const int64_t ordered = W / kChunk * steps * 1024;
  for (int64_t x = thread; x < ordered / 2; x += threads) {  // chunk, step, tile, lane, number: see Product
    const int64_t number = x % 4, lane = x / 4 % 32, tile = x / 128 % 4;
    const int64_t c = x / 512 / steps * kChunk + lane / 4 * 4 + tile, n = number % 2 * F + c;
    const int64_t k = x / 512 % steps * 8 + lane % 4 + number / 2 * 4;
    const float weight = c < F && k < K ? g.weight[n * columns + 2 * F + k] * rstd_of(g, n) : 0.0f;
    float* at = g.out_filter + x / 128 * 256 + lane * 4;
    float high, low;
    split(weight, high, low);
    if (weight != weight) high = weight;
    at[number] = high;
    at[128 + number] = low;
    const int64_t wide = ordered + number % 2 * 2 + number / 2;
    at[wide] = high;
    at[128 + wide] = low;
  }
  for (int64_t n = thread; n < 2 * F; n += threads) g.out_gamma[n] = rstd_of(g, n);
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
  const auto weight = of_edges<Tall>(record.weight);
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
    const double count = g.totals[3 * g.F + c], rest = g.more_totals[c] / count;
    const double mean = double(float(g.totals[c] / count)) + rest;  // as column_sums rounds it
    double var = g.more_totals[2 * g.F + c] / count - rest * rest;
    if (var < 0) var = 0;
    const Norm norm(g, c, mean, var);
#pragma unroll
    for (int at = 0; at < 4; ++at)
      if (at == v) norms.put(at, norm);
    if (program != 0 || threadIdx.x >= 8) continue;
    g.out_m[c] = float(mean);
    g.out_x[c] = float(var);
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
                       (!g.c1 || in_fours(g.columns, g.x));
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
      x[k] = four_of(g.x + at * g.columns, c, g.columns, by_four);
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
