// Training: the edge passes of a convolution, and the node kernels around them.
//
// A warp takes 16 edges at a time for 32 of the F channels: of four rows four each, a quad. r = w_e e(d) of 16 edges is a
// product on the tensor cores, whose operand e(d) is formed in registers, and of which only the steps in reach of the
// distances are done. The product leaves a lane 4 channels of a quad, filter and core; there q (or p) of the other ends, which
// were sent for before, is added and the gate formed. By receiver, a row's quads are always the same lanes', which keep what
// is summed over it; by sender, quads' sums pass through shared memory, where each lane then walks its columns of them in
// their order. So no sum depends on the order of threads, of warps or of blocks. Nothing of an edge is stored.
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
  alignas(16) Row rows[kTaskRows];
  alignas(16) int last[32];  // of lane l's row, the last edge's number within the task, or -1
  alignas(16) float u[kTile];  // distance in units of the Gaussians; NaN if the other end is outside, far off if there is no edge
  alignas(16) float weight[kTile];
  alignas(16) int number[kTile];
};
constexpr int kRecord = int(sizeof(Record) / sizeof(float));

SRCGCNN_DEVICE int tasks_of(const DeviceConv& g) { return int((g.n_rows + kTaskRows - 1) / kTaskRows); }

// The edges of 16 rows. Lane l has row first + l.
struct Task {
  int first, total;

  SRCGCNN_DEVICE Task(const DeviceConv& g, int number, Record& record)
      : first(number * kTaskRows) {
    const int lane = lane_of();
    int begin = 0, degree = 0;
    if (lane < kTaskRows && first + lane < g.n_rows) {
      const int* ptr = g.ptr + first;
      const int64_t from = ptr[lane], to = ptr[lane + 1];
      const bool bad = from < 0 || to < from || to > g.n_edges || to - from > kMostDegree;
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

// An edge, read in two halves: what addresses follow from, and what is there.
struct ReadEdge {
  int row, other, number;  // -1: it, or its other end, is outside
  float distance, weight;

  SRCGCNN_DEVICE void ask(const DeviceConv& g, int of_row, int place) {
    row = of_row;
    other = g.other[place];
    number = g.number ? g.number[place] : place;
  }
  template <bool kOfOther>
  SRCGCNN_DEVICE void read(const DeviceConv& g) {
    if (unsigned(other) >= uint64_t(g.n_rows) || unsigned(number) >= uint64_t(g.n_edges)) {
      other = row;
      number = -1;
    }
    const int at = number < 0 ? 0 : number;
    distance = g.distance ? g.distance[at] : g.dmin;
    weight = g.row_weight ? g.row_weight[kOfOther ? other : row] : 1.0f;
  }
};

// 16 edges of a task, of which lanes l and l + 16 have number l; where there are fewer, the last one again.
struct Edges : ReadEdge {
  int passed = 0;  // rows with edges that end before them

  // First half of reading those from number `from` of the task on, `count` or more: what the second's addresses follow from.
  SRCGCNN_DEVICE void begin(const DeviceConv& g, const Record& record, int from, int count) {
    const int k = lane_of() & (kTile - 1), at = k < count ? k : count - 1;
    const unsigned slot = unsigned(record.last[lane_of()] - from);
    const unsigned last = __reduce_or_sync(kAllLanes, slot < unsigned(kTile) ? 1u << slot : 0u);
    const Record::Row found = record.rows[passed + __popc(last & ((1u << at) - 1))];
    passed += __popc(last);
    ask(g, found.row, found.shift + from + at);
  }
  SRCGCNN_DEVICE void end(const DeviceConv& g) { read<false>(g); }
  // To the record; u of this lane's edge.
  SRCGCNN_DEVICE float publish(const DeviceConv& g, Record& record, int count) const {
    const int k = lane_of();
    const bool live = (k & (kTile - 1)) < count;
    const float u = number < 0 ? NAN : live ? (distance - g.dmin) * g.inverse_step : -1e3f;
    if (k < kTile) {
      record.u[k] = u;
      record.weight[k] = live ? weight : 0.0f;
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

// gamma and beta of the chunk's channels times -log2(e) (filter) and log2(e) (core), for the block; zeros beyond F.
SRCGCNN_DEVICE void read_vectors(float* vectors, const DeviceConv& g, int chunk) {
#pragma unroll 1
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

// The tiles of a task: each(reach, send); send(0) and, while other work passes, send(1) send for the halves of the next
// tile's edges.
template <class Each>
SRCGCNN_DEVICE void for_tiles(const DeviceConv& g, const Task& task, Record& record, Each each) {
  if (task.total == 0) return;
  Edges edges;
  edges.begin(g, record, 0, task.total);
  edges.end(g);
  for (int left = task.total; left > 0; left -= kTile) {
    const Reach reach(g, edges.publish(g, record, left));
    __syncwarp();
    const bool more = left > kTile;
    each(reach, [&](int half) {
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

// Edges of four rows, four of each at a time, a quad: of a tile a lane has the channels of one row's quad, and keeps what is
// summed over the row. Which quad, and which edge of which quad it reads; where that is for `of_edges`.
constexpr int kQuads = kTile / 4;
SRCGCNN_DEVICE int quad_of() { return lane_of() % kQuads; }
SRCGCNN_DEVICE int read_quad() { return lane_of() % 8 / 2; }
SRCGCNN_DEVICE int read_edge() { return lane_of() % 2 + lane_of() / 8 % 2 * 2; }
SRCGCNN_DEVICE int place_of(int quad, int k) { return 2 * quad + k % 2 + k / 2 * 8; }

// Rows of 32 channels in shared memory, in pieces of 16 bytes: row `at` is quad at % 4's.
template <class T>
constexpr int kOfPiece = 16 / int(sizeof(T));  // its numbers
template <class T>
constexpr int kPieces = kChunk / kOfPiece<T>;  // of a row
// Where a piece is, so that lanes that read together find theirs in different banks.
template <class T>
SRCGCNN_DEVICE int piece_at(int piece, int quad) {
  return (piece ^ (sizeof(T) == 4 ? 2 * quad : quad & 2)) * kOfPiece<T>;
}
// A lane's four channels of row 4 k + its quad.
template <class T>
SRCGCNN_DEVICE Channels<4> own_channels(const T* rows, int k) {
  const int piece = channel_of() / kOfPiece<T>;
  return load<4>(rows + (4 * k + quad_of()) * kChunk + piece_at<T>(piece, quad_of()) + channel_of() % kOfPiece<T>);
}
// kCount quads' k-th rows, k from 0 on, filter and core, on their way there from `table`, whose filter's first row's first
// channel it names; of(quad, k) says which row.
template <int kCount, class T, class Of>
SRCGCNN_DEVICE void send_rows(T (&to)[2][kCount * kQuads * kChunk], const T* table, int64_t width, Of of) {
  constexpr int kAtOnce = 32 / kPieces<T>;
  const int piece = lane_of() % kPieces<T>, stride = int(4 * width * sizeof(T));
  table += piece * kOfPiece<T>;
  if constexpr (kCount * kQuads < kAtOnce) {  // half of the lanes the core
    const int half = lane_of() / 16, at = lane_of() / kPieces<T> % kQuads;
    device::copy_async<true>(to[half] + at * kChunk + piece_at<T>(piece, at), row_at(table + half * width, of(at, 0), stride),
                             true);
  } else {
#pragma unroll
    for (int first = 0; first < kCount * kQuads; first += kAtOnce) {
      const int at = first + lane_of() / kPieces<T>;
      const T* from = row_at(table, of(at % kQuads, at / kQuads), stride);
      device::copy_async<true>(to[0] + at * kChunk + piece_at<T>(piece, at % kQuads), from, true);
      device::copy_async<true>(to[1] + at * kChunk + piece_at<T>(piece, at % kQuads), from + width, true);
    }
  }
}

// Of two such tiles, what lanes tell each other.
struct Pair {
  alignas(16) int other[2][kTile];  // can be followed
  alignas(16) float u[2][kTile];    // as of a record
  alignas(16) int number[2][kTile];
};
constexpr int kPair = int(sizeof(Pair) / sizeof(float));

SRCGCNN_DEVICE int groups_of(const DeviceConv& g) { return int((g.n_rows + kQuads - 1) / kQuads); }

// Groups of four rows, from the first on, every step-th: begin(group, edges of the lane's row), each(first edge of the quads,
// which of the pair, reach), end(group). What is known of the next group is read meanwhile.
struct RowEdges {
  int begin, degree;  // the row's first edge, how many it has, -1 if nobody knows
};
template <class Begin, class Each, class End>
SRCGCNN_DEVICE void for_groups(const DeviceConv& g, Pair& pair, int first, int step, int end, Begin begin, Each each,
                               End done) {
  const int ahead = kQuads * (lane_of() / kTile) + read_edge();  // lanes 16 and on have the second tile
  const auto edges_of = [&](int group) {
    const int at = kQuads * group + read_quad(), last = int(g.n_rows) - 1, row = at < last ? at : last;
    const int64_t from = g.ptr[row], to = g.ptr[int64_t(row) + 1];
    const bool bad = from < 0 || to < from || to > g.n_edges;
    return RowEdges{int(from), bad ? -1 : at > last ? 0 : int(to - from)};
  };
  RowEdges now = edges_of(first), next = edges_of(first + step);
  int other = 0;
  float distance = g.dmin;
  const auto send = [&](int k) {
    const int place = now.begin + k + ahead;
    if (k + ahead >= now.degree) return;
    other = g.other[place];
    if (g.distance) distance = g.distance[place];
  };
  send(0);
  for (int group = first; group < end; group += step) {
    const int from = 2 * quad_of();  // a lane that reads of this quad
    const RowEdges own{__shfl_sync(kAllLanes, now.begin, from), __shfl_sync(kAllLanes, now.degree, from)};
    const int most = __reduce_max_sync(kAllLanes, now.degree);
    const auto advance = [&] {
      now = next;
      next = edges_of(group + 2 * step);
      send(0);
    };
    begin(group, own);
    float u = 0.0f;
    for (int k = 0; k < most; k += kQuads) {
      const int which = k / kQuads % 2;
      __syncwarp();
      if (which == 0) {
        const int row = kQuads * group + read_quad();
        const bool live = k + ahead < now.degree, good = live && unsigned(other) < uint64_t(g.n_rows);
        u = good ? (distance - g.dmin) * g.inverse_step : live ? NAN : -1e3f;
        (&pair.other[0][0])[lane_of()] = good ? other : row < g.n_rows ? row : 0;
        (&pair.u[0][0])[lane_of()] = u;
        (&pair.number[0][0])[lane_of()] = good ? now.begin + k + ahead : 0;
        __syncwarp();
        if (k + 2 * kQuads < most)
          send(k + 2 * kQuads);
        else
          advance();
      }
      each(k, which, Reach(g, lane_of() / kTile == which ? u : -1e3f));
    }
    if (most <= 0) advance();
    done(group);
  }
}

// Four channels of a row of F, of which those from `channel` on that there are; apart: rows are multiples of it.
SRCGCNN_DEVICE void store_channels(float* row, int channel, int64_t F, const float (&x)[4], int64_t apart = 0) {
  if (F % 4 == 0 && apart % 4 == 0) {
    if (channel < F) device::store_four(row + channel, x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll 1
  for (int v = 0; v < 4 && channel + v < F; ++v) row[channel + v] = v < 2 ? (v ? x[1] : x[0]) : v < 3 ? x[2] : x[3];
}
// Are rows of `stride` numbers vectors of four? Memory of ours is aligned; what a caller gives may begin anywhere.
SRCGCNN_DEVICE bool in_fours(int64_t stride, const float* x) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// gamma p + beta of four channels, so that y = gamma (q + r) + this.
struct Own {
  Channels<4> filter, core;
  SRCGCNN_DEVICE void set(const Channels<4>& p_filter, const Channels<4>& p_core, const float* vectors) {
    const Scaling y(vectors);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      filter.x[v] = y.filter(p_filter.x[v], v);
      core.x[v] = y.core(p_core.x[v], v);
    }
  }
};

// What a warp of gate_sum keeps in shared memory.
template <class T>
struct GateTile {
  alignas(16) T p[2][kQuads * kChunk];
  alignas(16) T q[2][kTile * kChunk];
  Pair pair;
};
template <class T>
constexpr int kGateTile = int(sizeof(GateTile<T>) / sizeof(float));

// Blocks share out the rows, for one chunk of channels each.
constexpr int64_t kGateBlocks = 4;  // of a multiprocessor
template <bool kHalf>
__global__ void __launch_bounds__(kThreads, kGateBlocks) gate_sum(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), channel = chunk * kChunk + channel_of();
  float* norms = shared + kVectors;
  GateTile<T>& mine = reinterpret_cast<GateTile<T>*>(norms + kNorms)[warp_of()];
  if (g.out && warp_of() == 0 && chunk * kChunk + lane_of() < g.F) {
    const Norm norm(g, chunk * kChunk + lane_of());
    norms[lane_of()] = norm.scale;
    norms[kChunk + lane_of()] = norm.shift;
    if (g.new_norm && int(blockIdx.x) < chunks) keep(g, chunk * kChunk + lane_of(), norm);
  }
  read_vectors(shared, g, chunk);
  const int64_t block = blockIdx.x / chunks, blocks = gridDim.x / chunks, groups = groups_of(g);
  const int first = int(groups * block / blocks) + warp_of(), end = int(groups * (block + 1) / blocks);
  if (first >= end) return;
  const T* p = static_cast<const T*>(g.pq) + chunk * kChunk;
  const auto send_p = [&](int group) {
    send_rows<1>(mine.p, p, g.width, [&](int quad, int) {
      const int row = kQuads * group + quad;
      return row < g.n_rows ? row : int(g.n_rows) - 1;
    });
    device::commit_copies();
  };
  Own y;
  float sum[4];
  int degree;
  send_p(first);
  for_groups(
      g, mine.pair, first, kWarps, end,
      [&](int group, const RowEdges& edges) {
        degree = edges.degree;
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[v] = degree < 0 ? NAN : 0.0f;
        device::wait_for_copies<0>();
        __syncwarp();
        y.set(own_channels(mine.p[0], 0), own_channels(mine.p[1], 0), shared);
        __syncwarp();
        send_p(group + kWarps);
      },
      [&](int n, int which, const Reach& reach) {
        send_rows<4>(mine.q, p + 2 * g.width, g.width,
                     [&](int quad, int k) { return mine.pair.other[which][place_of(quad, k)]; });
        device::commit_copies();
        Values x;
        edge_terms<T>(x, g, mine.pair.u[which], mine.pair.number[which], reach, chunk);
        device::wait_for_copies<0>();
        __syncwarp();
        const auto gamma_f = load<4>(shared + channel_of()), gamma_c = load<4>(shared + kChunk + channel_of());
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const auto f = own_channels(mine.q[0], k), c = own_channels(mine.q[1], k);
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const float y_f = fmaf(f.x[v] + x.filter[k][v], gamma_f.x[v], y.filter.x[v]);
            const float y_c = fmaf(c.x[v] + x.core[k][v], gamma_c.x[v], y.core.x[v]);
            const float message = gate2<DeviceMath>(y_f, y_c);
            if (n + k < degree) sum[v] += message;
          }
        }
      },
      [&](int group) {
        const int64_t row = kQuads * int64_t(group) + quad_of();
        if (row >= g.n_rows) return;
        float m[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) m[v] = sum[v] * DeviceMath::ln2;
        if (g.out_m) store_channels(g.out_m + row * g.F, channel, g.F, m);
        if (!g.out) return;
        const auto h = four_of(g.h + row * g.F, channel, g.F, in_fours(g.F, g.h));
        const auto scale = load<4>(norms + channel_of()), shift = load<4>(norms + kChunk + channel_of());
#pragma unroll
        for (int v = 0; v < 4; ++v) m[v] = finished(h.x[v], m[v], scale.x[v], shift.x[v]);
        store_channels(g.out + row * g.F, channel, g.F, m);
      });
  device::wait_for_copies<0>();
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
  float by[4][4 * 32];  // sums of dy x, filter and core, and of dy; in the end those over all rows
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
  const int64_t groups = groups_of(g);
  const int first = int(groups * program / g.programs) + warp_of(), end = int(groups * (program + 1) / g.programs);
  const T* pq = static_cast<const T*>(g.pq) + channel;
  const int stride = int(4 * g.width * sizeof(T));
  // Of a lane's row; p and what comes from above of the next group are on their way.
  Channels<4> p_f, p_c, upstream, next_f, next_c, next_upstream;
  const auto send = [&](int group) {
    const int at = kQuads * group + quad_of(), row = at < g.n_rows ? at : int(g.n_rows) - 1;
    next_f = row_of<4>(pq, row, stride);
    next_c = row_of<4>(pq + g.width, row, stride);
    next_upstream = row_of<4>(g.d_m + channel, row, int(g.m_stride * sizeof(float)));
  };
  Own y;
  RowEdges edges;
  float dy_sum[2][4], x_sum[2][4], of_gamma[2][4];  // filter and core, over a row; of x less p
  if (first < end) {
    send(first);
    for_groups(
        g, mine.pair, first, kWarps, end,
        [&](int group, const RowEdges& found) {
          edges = found;
          p_f = next_f;
          p_c = next_c;
          upstream = next_upstream;
          send(group + kWarps);
          y.set(p_f, p_c, shared);
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            dy_sum[0][v] = dy_sum[1][v] = x_sum[0][v] = x_sum[1][v] = edges.degree < 0 ? NAN : 0.0f;
            of_gamma[0][v] = of_gamma[1][v] = 0.0f;
          }
        },
        [&](int n, int which, const Reach& reach) {
          Values q, x;  // q is on its way while r is formed
          const auto other = of_edges(mine.pair.other[which]);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const auto f = row_of<4>(pq + 2 * g.width, other.x[k], stride), c = row_of<4>(pq + 3 * g.width, other.x[k], stride);
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              q.filter[k][v] = f.x[v];
              q.core[k][v] = c.x[v];
            }
          }
          edge_terms<T>(x, g, mine.pair.u[which], mine.pair.number[which], reach, chunk);
          const auto gamma_f = load<4>(shared + channel_of()), gamma_c = load<4>(shared + kChunk + channel_of());
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const bool live = n + k < edges.degree;
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              float &x_f = x.filter[k][v], &x_c = x.core[k][v];
              x_f += q.filter[k][v];
              x_c += q.core[k][v];
              const auto d = gate_gradient2<DeviceMath>(fmaf(x_f, gamma_f.x[v], y.filter.x[v]),
                                                        fmaf(x_c, gamma_c.x[v], y.core.x[v]));
              const float from_above = live ? upstream.x[v] : 0.0f;
              const float dy_f = from_above * d.d_filter, dy_c = from_above * d.d_core;
              of_gamma[0][v] = fmaf(dy_f, x_f, of_gamma[0][v]);
              of_gamma[1][v] = fmaf(dy_c, x_c, of_gamma[1][v]);
              if (live) {
                x_sum[0][v] += x_f;
                x_sum[1][v] += x_c;
                dy_sum[0][v] += dy_f;
                dy_sum[1][v] += dy_c;
              }
              x_f = dy_f;
              x_c = dy_c;
            }
          }
          if (g.out_edge && first_term == 0) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (n + k >= edges.degree) continue;
              float* to = g.out_edge + int64_t(edges.begin + n + k) * 2 * g.all;
              store_channels(to, channel, g.F, x.filter[k], g.all);
              store_channels(to + g.all, channel, g.F, x.core[k], g.all);
            }
          }
          const Terms e(mine.pair.u[which], mine.pair.number[which], first_term);
          if (g.relaxed)
            add_filter<true>(mine.filter, x, g, e, reach, first_term);
          else
            add_filter<false>(mine.filter, x, g, e, reach, first_term);
        },
        [&](int group) {
          const int64_t row = kQuads * int64_t(group) + quad_of();
          if (row >= g.n_rows) return;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            of_gamma[0][v] = fmaf(p_f.x[v], dy_sum[0][v], of_gamma[0][v]);
            of_gamma[1][v] = fmaf(p_c.x[v], dy_sum[1][v], of_gamma[1][v]);
          }
          add<4>(mine.by[0] + 4 * lane_of(), of_gamma[0]);
          add<4>(mine.by[1] + 4 * lane_of(), of_gamma[1]);
          add<4>(mine.by[2] + 4 * lane_of(), dy_sum[0]);
          add<4>(mine.by[3] + 4 * lane_of(), dy_sum[1]);
          if (first_term) return;
          float* to = g.out + row * 4 * g.F;
          store_channels(to, channel, g.F, dy_sum[0]);
          store_channels(to + g.F, channel, g.F, dy_sum[1]);
          if (!g.out_x) return;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            x_sum[0][v] = fmaf(float(edges.degree), p_f.x[v], x_sum[0][v]);
            x_sum[1][v] = fmaf(float(edges.degree), p_c.x[v], x_sum[1][v]);
          }
          float* to_x = g.out_x + row * 4 * g.F;
          store_channels(to_x, channel, g.F, x_sum[0]);
          store_channels(to_x + g.F, channel, g.F, x_sum[1]);
        });
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    auto sum = load<4>(mine.by[k] + 4 * lane_of());
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      sum.x[v] += __shfl_xor_sync(kAllLanes, sum.x[v], 1);
      sum.x[v] += __shfl_xor_sync(kAllLanes, sum.x[v], 2);
    }
    __syncwarp();  // all have read
    if (lane_of() % 4 == 0) store(mine.by[k] + channel_of(), sum);
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
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp].by[warp_of()][lane_of()];
  if (c < g.F && first_term == 0) g.out_gamma[(int64_t(program) * 4 + warp_of()) * g.F + c] = sum;
}

// By sender. In-degrees differ much (where rows stand for others, from none to hundreds), so a block's warps have equal shares
// of the edges of 64 rows. A row's edges are taken four at a time, a quad: a lane's edges of a tile are one.
constexpr int kSenderRows = 64, kSenderWarps = 8;
constexpr int kRowSums = 4 * kChunk;  // w_i x, filter and core, and dy, filter and core
// Where numbers 4 piece .. + 3 of the sums of a quad are, so that lanes that write together do so in different banks.
SRCGCNN_DEVICE int sums_at(int quad, int piece) { return quad * kRowSums + (piece ^ 2 * quad) * 4; }

struct Senders {
  struct Row {
    int row, shift, end;  // one with edges: of quad q its first edge is shift + 4 q, and before `end`
    float degree;
  };
  alignas(16) Row rows[kSenderRows];
  alignas(16) float heads[kSenderWarps - 1][kRowSums];  // of a row that began in an earlier warp's share and ends in that of warp k + 1
};
constexpr int kSenders = int(sizeof(Senders) / sizeof(float));

// What a warp has in shared memory of the 16 edges at hand, in their order for `of_edges`.
template <class T>
struct SenderTile {
  struct Edges {
    alignas(16) float u[kTile];  // as of a record
    alignas(16) int number[kTile];
  };
  union {
    Edges edges;
    alignas(16) float sums[kQuads * kRowSums];  // of the quads, then of the rows that end in them
  };
  alignas(16) float weight[kTile];
  // Rows of 32 channels, in pieces of 16 bytes: the k-th edge of quad q is row 4 k + q. Filter, then core.
  alignas(16) float upstream[kTile * kChunk];
  alignas(16) T p[2][kTile * kChunk];
  alignas(16) T q[2][kQuads * kChunk];
};
template <class T>
constexpr int kSenderTile = int(sizeof(SenderTile<T>) / sizeof(float));

// 16 edges of a block's rows, of which lanes l and l + 16 have that of place l for `of_edges`.
struct SenderEdges : ReadEdge {
  int passed;  // rows with edges that end before them
  unsigned last;  // bit q: quad q is the last of its row
  bool live;

  // First half of reading tile `tile`: what the second's addresses follow from. my_last: the last quads of a lane's rows.
  SRCGCNN_DEVICE void begin(const DeviceConv& g, const Senders& senders, int tile, const int (&my_last)[2], int n_rows) {
    unsigned ends = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned slot = unsigned(my_last[r] - kQuads * tile);
      ends |= slot < unsigned(kQuads) ? 1u << slot : 0u;
    }
    last = __reduce_or_sync(kAllLanes, ends);
    const int at = passed + __popc(last & ((1u << read_quad()) - 1));
    passed += __popc(last);
    const Senders::Row found = senders.rows[at < n_rows ? at : n_rows - 1];
    const int wanted = found.shift + 4 * (kQuads * tile + read_quad()) + read_edge();
    live = wanted < found.end;
    ask(g, found.row, live ? wanted : found.end - 1);
  }
  SRCGCNN_DEVICE void end(const DeviceConv& g) { read<true>(g); }
  // To shared memory; u of this lane's edge.
  template <class T>
  SRCGCNN_DEVICE float publish(const DeviceConv& g, SenderTile<T>& tile) const {
    const float u = number < 0 ? NAN : live ? (distance - g.dmin) * g.inverse_step : -1e3f;
    if (lane_of() < kTile) {
      tile.edges.u[lane_of()] = u;
      tile.edges.number[lane_of()] = number < 0 ? 0 : number;
      tile.weight[lane_of()] = live ? weight : 0.0f;
    }
    return u;
  }
  // Rows that the gates of these edges need, on their way to shared memory; zeros upstream of an edge that is not there.
  template <class T>
  SRCGCNN_DEVICE void send(const DeviceConv& g, SenderTile<T>& tile, int chunk) const {
    const T* p = static_cast<const T*>(g.pq) + chunk * kChunk;
    send_rows<4>(tile.p, p, g.width, [&](int quad, int k) { return __shfl_sync(kAllLanes, other, place_of(quad, k)); });
    send_rows<1>(tile.q, p + 2 * g.width, g.width,
                 [&](int quad, int) { return __shfl_sync(kAllLanes, row, place_of(quad, 0)); });
    const unsigned there = __ballot_sync(kAllLanes, live);
    const int piece = lane_of() % 8, quad = lane_of() / 8;
    const float* upstream = g.d_m + chunk * kChunk + piece * 4;
    float* to = tile.upstream + quad * kChunk + piece_at<float>(piece, quad);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int place = place_of(quad, k), from = __shfl_sync(kAllLanes, other, place);
      device::copy_async<true>(to + 4 * k * kChunk, row_at(upstream, from, int(g.m_stride * sizeof(float))), there >> place & 1);
    }
  }
};

// Sums over a lane's quad to shared memory, of w_i x and of dy, from x less p and q.
template <class T>
SRCGCNN_DEVICE void sum_quad(SenderTile<T>& tile, const Values& r, const float* vectors) {
  const auto gamma_f = load<4>(vectors + channel_of()), gamma_c = load<4>(vectors + kChunk + channel_of());
  auto y_f = load<4>(vectors + 2 * kChunk + channel_of()), y_c = load<4>(vectors + 3 * kChunk + channel_of());
  const auto weights = of_edges(tile.weight);
  const float weight = (weights.x[0] + weights.x[1]) + (weights.x[2] + weights.x[3]);
  Channels<4> sums[4];
  {
    const auto q_f = own_channels(tile.q[0], 0), q_c = own_channels(tile.q[1], 0);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      y_f.x[v] = fmaf(q_f.x[v], gamma_f.x[v], y_f.x[v]);
      y_c.x[v] = fmaf(q_c.x[v], gamma_c.x[v], y_c.x[v]);
      sums[0].x[v] = weight * q_f.x[v];
      sums[1].x[v] = weight * q_c.x[v];
      sums[2].x[v] = sums[3].x[v] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto p_f = own_channels(tile.p[0], k), p_c = own_channels(tile.p[1], k);
    const auto upstream = own_channels(tile.upstream, k);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float x_f = p_f.x[v] + r.filter[k][v], x_c = p_c.x[v] + r.core[k][v];
      const auto d = gate_gradient2<DeviceMath>(fmaf(x_f, gamma_f.x[v], y_f.x[v]), fmaf(x_c, gamma_c.x[v], y_c.x[v]));
      sums[0].x[v] = fmaf(weights.x[k], x_f, sums[0].x[v]);
      sums[1].x[v] = fmaf(weights.x[k], x_c, sums[1].x[v]);
      sums[2].x[v] = fmaf(upstream.x[v], d.d_filter, sums[2].x[v]);
      sums[3].x[v] = fmaf(upstream.x[v], d.d_core, sums[3].x[v]);
    }
  }
  float* at = tile.sums + sums_at(quad_of(), lane_of() / 4);
#pragma unroll
  for (int part = 0; part < 4; ++part) store<4>(at + part * kChunk, sums[part]);
}

template <bool kHalf>
__global__ void __launch_bounds__(32 * kSenderWarps, 2) backward_senders(const DeviceConv g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int chunks = int(g.width / kChunk), chunk = int(blockIdx.x % chunks), warp = warp_of();
  float* correction = shared + kVectors;
  Senders& senders = *reinterpret_cast<Senders*>(correction + kCorrection);
  SenderTile<T>* tiles = reinterpret_cast<SenderTile<T>*>(correction + kCorrection + kSenders);
  SenderTile<T>& mine = tiles[warp];
  // Lane l has rows 2 l and 2 l + 1 of the block's.
  const int first = int(blockIdx.x / chunks) * kSenderRows, own = first + 2 * lane_of();
  int begin[2] = {}, degree[2] = {};
  bool bad[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (own + r >= g.n_rows) continue;
    const int* ptr = g.ptr + own;
    const int64_t from = ptr[r], to = ptr[r + 1];
    bad[r] = from < 0 || to < from || to > g.n_edges || to - from > kMostDegree;
    begin[r] = bad[r] ? 0 : int(from);
    degree[r] = bad[r] ? 0 : int(to - from);
  }
#pragma unroll 1
  for (int k = int(threadIdx.x); k < kCorrection; k += 32 * kSenderWarps) {
    const int c = chunk * kChunk + k % kChunk, which = k / (2 * kChunk);
    const float* from = which == 0 ? g.a : which == 1 ? g.c1 : g.c2;
    correction[k] = c < g.F && (which == 0 || g.row_weight) ? from[k / kChunk % 2 * g.F + c] : 0.0f;
  }
  read_vectors(shared, g, chunk);
  const int quads[2] = {(degree[0] + 3) / 4, (degree[1] + 3) / 4};
  int end = quads[0] + quads[1];  // quads up to the end of the lane's rows
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_sync(kAllLanes, end, lane_of() - d);
    end += lane_of() >= d ? below : 0;
  }
  const int total = __shfl_sync(kAllLanes, end, 31);
  const int my_last[2] = {quads[0] ? end - quads[1] - 1 : -1, quads[1] ? end - 1 : -1};
  const unsigned with_edges[2] = {__ballot_sync(kAllLanes, quads[0] > 0), __ballot_sync(kAllLanes, quads[1] > 0)};
  const auto below = [&](unsigned lanes) { return __popc(lanes & ((1u << lane_of()) - 1)); };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (warp != r || !quads[r]) continue;
    const int at = below(with_edges[0]) + below(with_edges[1]) + (r && quads[0]);
    senders.rows[at] = {own + r, begin[r] - 4 * (my_last[r] + 1 - quads[r]), begin[r] + degree[r],
                        g.row_weight ? g.degree[own + r] : 0.0f};
  }
  __syncthreads();
  // A row's gradient from its sums; half of the lanes, four channels each.
  const int half = lane_of() / 8 % 2, channel = chunk * kChunk + lane_of() % 8 * 4;
  const float* constants = correction + half * kChunk + lane_of() % 8 * 4;
  const auto done = [&](const Senders::Row& row, int quad) {
    const auto a = load<4>(constants);
    auto sum = load<4>(mine.sums + sums_at(quad, 16 + lane_of() % 16));
    if (g.row_weight) {
      const auto c1 = load<4>(constants + 2 * kChunk), c2 = load<4>(constants + 4 * kChunk);
      const auto x_sum = load<4>(mine.sums + sums_at(quad, lane_of() % 16));
#pragma unroll
      for (int v = 0; v < 4; ++v) sum.x[v] -= fmaf(row.degree, c1.x[v], x_sum.x[v] * c2.x[v]);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) sum.x[v] *= a.x[v];
    if (lane_of() < 16) store_channels(g.out + (int64_t(row.row) * 4 + 2 + half) * g.F, channel, g.F, sum.x);
  };
  // Rows without edges, or whose pointers are bad: 0 or NaN. A warp has 8, half of its lanes one at a time.
  const unsigned of_bad[2] = {__ballot_sync(kAllLanes, bad[0]), __ballot_sync(kAllLanes, bad[1])};
  for (unsigned left = ~(with_edges[0] & with_edges[1]) >> 4 * warp & 15; left; left &= left - 1) {
    const int lane = 4 * warp + __ffs(left) - 1, row = first + 2 * lane + lane_of() / 16;
    if ((lane_of() < 16 ? with_edges[0] : with_edges[1]) >> lane & 1 || row >= g.n_rows) continue;
    auto zero = load<4>(constants);
#pragma unroll
    for (int v = 0; v < 4; ++v) zero.x[v] *= (lane_of() < 16 ? of_bad[0] : of_bad[1]) >> lane & 1 ? NAN : 0.0f;
    store_channels(g.out + (int64_t(row) * 4 + 2 + half) * g.F, channel, g.F, zero.x);
  }
  // The warp's share of the tiles.
  const int all = (total + kQuads - 1) / kQuads, n_rows = __popc(with_edges[0]) + __popc(with_edges[1]);
  const auto share = [&](int warp) { return int(int64_t(all) * warp / kSenderWarps); };
  const int from = share(warp), to = share(warp + 1);
  const auto ends_at = [&](int quad) {
    return __ballot_sync(kAllLanes, my_last[0] == quad - 1 || my_last[1] == quad - 1) != 0;
  };
  bool within = from > 0 && !ends_at(kQuads * from);  // a row that began in an earlier share
  float sum[4] = {};
  SenderEdges edges;
  if (from < to) {
    edges.passed = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      edges.passed += __popc(__ballot_sync(kAllLanes, my_last[r] >= 0 && my_last[r] < kQuads * from));
    edges.begin(g, senders, from, my_last, n_rows);
    edges.end(g);
    edges.send(g, mine, chunk);
    device::commit_copies();
    for (int tile = from; tile < to; ++tile) {
      __syncwarp();
      const Reach reach(g, edges.publish(g, mine));
      const unsigned last = edges.last;
      int at = edges.passed - __popc(last);
      const bool more = tile + 1 < to;
      __syncwarp();
      if (more) edges.begin(g, senders, tile + 1, my_last, n_rows);
      Values x;
      edge_terms<T>(x, g, mine.edges.u, mine.edges.number, reach, chunk);
      if (more) edges.end(g);
      device::wait_for_copies<0>();
      __syncwarp();
      sum_quad(mine, x, shared);
      __syncwarp();
      if (more) edges.send(g, mine, chunk);
      device::commit_copies();
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        float* at = mine.sums + sums_at(q, lane_of());
        auto quad = load<4>(at);
#pragma unroll
        for (int v = 0; v < 4; ++v) quad.x[v] = sum[v] += quad.x[v];
        if (!(last >> q & 1)) continue;
        store<4>(at, quad);
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[v] = 0.0f;
      }
      __syncwarp();
      for (unsigned left = last; left; left &= left - 1, ++at) {
        const int quad = __ffs(left) - 1;
        if (within) {
          store<4>(senders.heads[warp - 1] + 4 * lane_of(), load<4>(mine.sums + sums_at(quad, lane_of())));
          within = false;
        } else {
          done(senders.rows[at], quad);
        }
      }
    }
    device::wait_for_copies<0>();
  }
  __syncwarp();
  // What is left belongs to a row that goes on in the next shares; the warp in whose share it began adds them up.
  store<4>(mine.sums + 4 * lane_of(), {{sum[0], sum[1], sum[2], sum[3]}});
  __syncthreads();
  if (from == to || within || kQuads * to >= total || ends_at(kQuads * to)) return;
  int last = total;  // quad of the row
#pragma unroll
  for (int r = 0; r < 2; ++r) last = my_last[r] >= kQuads * to && my_last[r] < last ? my_last[r] : last;
  last = __reduce_min_sync(kAllLanes, last);
  for (int next = warp + 1; next < kSenderWarps; ++next) {
    const bool ends = last < kQuads * share(next + 1);
    const auto more = load<4>((ends ? senders.heads[next - 1] : tiles[next].sums) + 4 * lane_of());
#pragma unroll
    for (int v = 0; v < 4; ++v) sum[v] += more.x[v];
    if (ends) break;
  }
  store<4>(mine.sums + 4 * lane_of(), {{sum[0], sum[1], sum[2], sum[3]}});
  __syncwarp();
  done(senders.rows[edges.passed], 0);
}

// Of column_sums, finish, finish_backward and correct: a block is one of `programs` for 32 channels, of 16 rows at a time, of
// which a lane has four channels of one; the rows that it reads before it goes on are `apart`.
constexpr int kRowsAtOnce = 4 * kWarps;
SRCGCNN_DEVICE int four_channels_of() { return lane_of() % 8 * 4; }
SRCGCNN_DEVICE int64_t first_row(int64_t program) { return program * kRowsAtOnce + 4 * warp_of() + lane_of() / 8; }

SRCGCNN_DEVICE void store_four(float* row, int64_t at, int64_t n, bool by_four, const Channels<4>& x) {
  if (by_four) {
    if (at < n) device::store_four(row + at, x.x[0], x.x[1], x.x[2], x.x[3]);
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
    for_tiles(g, task, record, [&](const Reach& reach, auto send) {
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
