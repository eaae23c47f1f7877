// Products of rows on the tensor cores, and the sums and small vectors of a layer that are left between its passes.
//
// Both products take float32 as the sum of two TF32 numbers. The tensor cores cut off what does not fit their sums, so a
// sum begins at zero, takes the six products of 16 numbers, small ones first, and is then added in float32. Which lane
// holds which number is chosen so that it reads four neighbours at once.
#pragma once
#include "conv.h"
#include "device.cuh"

namespace srcgcnn {

constexpr int kInner = 16;         // numbers of a sum that are multiplied at a time
constexpr int kProductRows = 32;   // of a warp of multiply_rows
constexpr int kProductColumns = 64;
constexpr int kLeft = 32, kRight = 64;  // columns of a warp of multiply_columns

// out (N, columns) = a (N, inner) b + shift + add, stored as kHalf says. b was ordered by order_weights.
struct RowProduct {
  const float *a, *b, *shift, *add;  // add (N, columns); either may be null
  void* out;
  int64_t n_rows, inner, columns;
  int relaxed, by_four;  // by_four: rows of a are vectors of four, aligned
};
// out (programs, left, right): sums of a^T b over the rows of a program; a (N, left), b (N, right), `stride` apart.
struct ColumnProduct {
  const float *a, *b;
  float* out;
  int64_t n_rows, left, right, a_stride, b_stride, programs;
  int a_by_four, b_by_four;
};
// Parts (parts, n) added up in their order: `exact` and `rounded` (n), either null.
struct PartSum {
  const float* parts;
  double* exact;
  float* rounded;
  int64_t n, n_parts;
};
constexpr int kMostSums = 4;
struct PartSums {
  PartSum of[kMostSums];
};

SRCGCNN_DEVICE Channels<4> four_of(const float* row, int64_t at, int64_t n, bool by_four) {
  if (by_four) return at < n ? load<4>(row + at) : Channels<4>{};
  Channels<4> x;
#pragma unroll
  for (int v = 0; v < 4; ++v) x.x[v] = at + v < n ? row[at + v] : 0.0f;
  return x;
}
// Relaxed: `high` alone, of which a NaN stays one.
SRCGCNN_DEVICE void split_or_round(float x, bool relaxed, float& high, float& low) {
  split(x, high, low);
  if (relaxed && x != x) high = x;
}

SRCGCNN_DEVICE void store_one(float* p, float x) { *p = x; }
SRCGCNN_DEVICE void store_one(Bfloat16* p, float x) { p->bits = uint16_t(device::to_bfloat16(x, 0.0f)); }

template <bool kHalf>
__global__ void __launch_bounds__(128, 3) multiply_rows(const RowProduct g) {
  using T = typename Storage<kHalf>::type;
  const int group = lane_of() / 4, in_group = lane_of() % 4;
  const int blocks = int((g.columns + kProductColumns - 1) / kProductColumns), block = int(blockIdx.x % blocks);
  const int64_t first = (int64_t(blockIdx.x / blocks) * 4 + warp_of()) * kProductRows;
  if (first >= g.n_rows) return;
  const int steps = int((g.inner + kInner - 1) / kInner);
  const float* rows[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const int64_t row = first + group + 8 * v;
    rows[v] = g.a + (row < g.n_rows ? row : g.n_rows - 1) * g.inner;
  }
  const float* weights = g.b + (int64_t(block) * steps * 8 * 32 + lane_of()) * 8;
  float sums[2][8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    float high[2][2][4], low[2][2][4];  // tile of 16 rows, half of the 16 numbers
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const auto x = four_of(rows[v], step * kInner + 4 * in_group, g.inner, g.by_four);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        split_or_round(x.x[k], g.relaxed, high[v / 2][k / 2][k % 2 * 2 + v % 2], low[v / 2][k / 2][k % 2 * 2 + v % 2]);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n, weights += 32 * 8) {
      const auto w0 = load<4>(weights), w1 = load<4>(weights + 4);
      const float b0[2] = {w0.x[0], w0.x[1]}, b0_low[2] = {w0.x[2], w0.x[3]};
      const float b1[2] = {w1.x[0], w1.x[1]}, b1_low[2] = {w1.x[2], w1.x[3]};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        float d[4] = {}, first_half[4] = {}, second_half[4] = {};  // small ones together, large ones by themselves
        if (!g.relaxed) {
          device::mma(d, low[tile][0], b0);
          device::mma(d, low[tile][1], b1);
          device::mma(d, high[tile][0], b0_low);
          device::mma(d, high[tile][1], b1_low);
        }
        device::mma(first_half, high[tile][0], b0);
        device::mma(second_half, high[tile][1], b1);
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[tile][n][v] += (first_half[v] + second_half[v]) + d[v];
      }
    }
  }
  const bool in_pairs = g.columns % 2 == 0;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 16 * tile + 8 * half + group;
      if (row >= g.n_rows) continue;
      T* out = static_cast<T*>(g.out) + row * g.columns;
      const float* add = g.add ? g.add + row * g.columns : nullptr;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int64_t c = block * kProductColumns + 8 * n + 2 * in_group;
        Channels<2> y;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          y.x[v] = sums[tile][n][2 * half + v];
          if (c + v >= g.columns) continue;
          if (g.shift) y.x[v] += g.shift[c + v];
          if (add) y.x[v] += add[c + v];
        }
        if (in_pairs) {
          if (c < g.columns) store<2>(out + c, y);
        } else {
#pragma unroll
          for (int v = 0; v < 2; ++v)
            if (c + v < g.columns) store_one(out + c + v, y.x[v]);
        }
      }
    }
}

// Three products even where one would do: memory bounds it. The columns of a and b that a lane reads, four neighbours, belong
// to the tiles as the comments say.
__global__ void __launch_bounds__(128, 3) multiply_columns(const ColumnProduct g) {
  const int group = lane_of() / 4, in_group = lane_of() % 4;
  const int64_t lefts = (g.left + kLeft - 1) / kLeft, rights = (g.right + kRight - 1) / kRight;
  const int64_t blocks = (lefts * rights + 3) / 4, program = blockIdx.x / blocks;
  const int64_t tile = blockIdx.x % blocks * 4 + warp_of();
  if (tile >= lefts * rights) return;
  const int64_t left = tile % lefts * kLeft + 4 * group, right = tile / lefts * kRight + 4 * group;
  float sums[2][8][4] = {};
#pragma unroll 1
  for (int64_t first = program * kInner; first < g.n_rows; first += g.programs * kInner) {
    float high[2][2][4], low[2][2][4];  // tile of 16 columns (4 group + 2 tile, + 1), half of the rows
#pragma unroll
    for (int v = 0; v < 4; ++v) {  // rows in_group + 4 v
      const int64_t row = first + in_group + 4 * v;
      const auto x = row < g.n_rows ? four_of(g.a + row * g.a_stride, left, g.left, g.a_by_four) : Channels<4>{};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        split(x.x[k], high[k / 2][v / 2][v % 2 * 2 + k % 2], low[k / 2][v / 2][v % 2 * 2 + k % 2]);
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      float b[4][2][2], b_low[4][2][2];  // tile of 8 columns (32 q + 4 group + tile), half of the rows
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int64_t row = first + in_group + 4 * v;
        const auto x =
            row < g.n_rows ? four_of(g.b + row * g.b_stride, right + 32 * q, g.right, g.b_by_four) : Channels<4>{};
#pragma unroll
        for (int k = 0; k < 4; ++k) split(x.x[k], b[k][v / 2][v % 2], b_low[k][v / 2][v % 2]);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float d[4] = {};
          device::mma(d, low[m][0], b[n][0]);
          device::mma(d, low[m][1], b[n][1]);
          device::mma(d, high[m][0], b_low[n][0]);
          device::mma(d, high[m][1], b_low[n][1]);
          device::mma(d, high[m][0], b[n][0]);
          device::mma(d, high[m][1], b[n][1]);
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[m][4 * q + n][v] += d[v];
        }
    }
  }
  // A lane has rows 4 group + 2 m + half of the block, and of each 32 columns the eight from 8 in_group on.
  float* out = g.out + program * g.left * g.right;
  const int64_t column = tile / lefts * kRight + 8 * in_group;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = left + 2 * m + half;
      if (row >= g.left) continue;
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int v = 0; v < 2; ++v)
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int64_t c = column + 32 * q + 4 * v + n;
            if (c < g.right) out[row * g.right + c] = sums[m][4 * q + n][2 * half + v];
          }
    }
}

// Warps take every fourth part; their sums are then added in order. A lane a number.
__global__ void __launch_bounds__(128) add_parts(const __grid_constant__ PartSums g) {
  SRCGCNN_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  int64_t block = blockIdx.x;
  int which = 0;
#pragma unroll
  for (int k = 0; k < kMostSums - 1; ++k) {
    const int64_t blocks = (g.of[k].n + 31) / 32;
    if (which == k && block >= blocks) {
      block -= blocks;
      ++which;
    }
  }
  const PartSum& s = g.of[which];
  const int64_t at = block * 32 + lane_of();
  double sum = 0;
  if (at < s.n) {
#pragma unroll 8
    for (int64_t part = warp_of(); part < s.n_parts; part += 4) sum += s.parts[part * s.n + at];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_of() || at >= s.n) return;
  for (int warp = 1; warp < 4; ++warp) sum += sums[32 * warp + lane_of()];
  if (s.exact) s.exact[at] = sum;
  if (s.rounded) s.rounded[at] = float(sum);
}

// Where number `x` of a product's ordered right side comes from: 64 columns, steps of 16, 8 tiles, lanes, 8 numbers.
struct Ordered {
  int64_t inner, column;
  bool low;
  SRCGCNN_DEVICE Ordered(int64_t x, int64_t steps) {
    const int number = int(x % 8), lane = int(x / 8 % 32), tile = int(x / 256 % 8);
    const int64_t step = x / 2048 % steps, block = x / 2048 / steps;
    inner = step * kInner + lane % 4 * 4 + number / 4 * 2 + number % 2;
    column = block * kProductColumns + tile * 8 + lane / 4;
    low = number / 2 % 2;
  }
};
SRCGCNN_HOST_DEVICE int64_t ordered_size(int64_t inner, int64_t columns) {
  return (columns + kProductColumns - 1) / kProductColumns * ((inner + kInner - 1) / kInner) * 2048;
}
SRCGCNN_DEVICE float ordered(float x, bool low, bool relaxed) {
  float high, rest;
  split_or_round(x, relaxed, high, rest);
  return low ? rest : high;
}


SRCGCNN_DEVICE float rstd1_of(const DeviceConv& g, int64_t n) { return float(1 / sqrt(double(g.var1[n]) + g.eps1)); }

// The weights as right sides of products: out, of h for pq; out_x, of the gradient at pq for that at h; out_edge, of given
// features for term. The latter two may be null.
__global__ void __launch_bounds__(128) order_weights(const DeviceConv g) {
  const int64_t thread = int64_t(blockIdx.x) * 128 + threadIdx.x, threads = int64_t(gridDim.x) * 128;
  const int64_t F = g.F, W = g.width, K = g.n_features, columns = 2 * F + K;
  for (int64_t x = thread; x < ordered_size(F, 4 * W); x += threads) {  // columns: p filter, p core, q filter, q core
    const Ordered o(x, (F + kInner - 1) / kInner);
    const int64_t c = o.column % W, n = o.column / W % 2 * F + c;
    const bool there = o.inner < F && c < F && o.column < 4 * W;
    const float w = there ? g.weight[n * columns + o.column / (2 * W) * F + o.inner] * rstd1_of(g, n) : 0.0f;
    g.out[x] = ordered(w, o.low, g.relaxed);
  }
  for (int64_t x = thread; g.out_x && x < ordered_size(4 * F, F); x += threads) {
    const Ordered o(x, (4 * F + kInner - 1) / kInner);
    const bool there = o.inner < 4 * F && o.column < F;
    const float w = there ? g.weight[o.inner % (2 * F) * columns + o.inner / (2 * F) * F + o.column] : 0.0f;
    g.out_x[x] = ordered(w, o.low, g.relaxed);
  }
  for (int64_t x = thread; g.out_edge && x < ordered_size(K, 2 * W); x += threads) {
    const Ordered o(x, (K + kInner - 1) / kInner);
    const int64_t c = o.column % W, n = o.column / W * F + c;
    const bool there = o.inner < K && c < F && o.column < 2 * W;
    const float w = there ? g.weight[n * columns + 2 * F + o.inner] * rstd1_of(g, n) : 0.0f;
    g.out_edge[x] = ordered(w, o.low, g.relaxed);
  }
}

// From the sums `totals` (2, 2F) of dy x and dy and `a` (4, F) of finish_backward: out (3, 2F) = a, c1 and c2 of `correct`;
// the gradients of vectors.
__global__ void __launch_bounds__(128) vector_gradients(const DeviceConv g) {
  const int64_t n = int64_t(blockIdx.x) * 128 + threadIdx.x, F = g.F;
  if (n >= 2 * F) return;
  const float a = g.gamma1[n] * rstd1_of(g, n), edges = g.a[3 * F];
  const double d_gamma = g.totals[n], d_beta = g.totals[2 * F + n];
  g.out[n] = a;
  g.out[2 * F + n] = float(d_beta / edges);
  g.out[4 * F + n] = float(d_gamma / edges);
  g.d_gamma1[n] = float(d_gamma);
  g.d_beta1[n] = float(d_beta);
  if (g.d_bias) g.d_bias[n] = g.train1 ? 0.0f : float(d_beta) * a;
  if (n >= F) return;
  g.d_beta2[n] = g.a[n];
  g.d_gamma2[n] = g.a[F + n];
}

// A block a column of z. d_weight from x (4F, F), the product of the gradient at pq with h, and grad (K, 2F), the sums of
// e dy, less sum_ij w_i e_ij (c1 + c2 x_ij) where statistics are the batch's: which the Gram matrix holds, as the sum of
// w_i x_ij is zero. a, c1, c2 (2F); totals (4, F) of finish_backward.
__global__ void __launch_bounds__(128) weight_gradient(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int64_t F = g.F, K = g.n_features, columns = 2 * F + K, n = blockIdx.x, gram = 3 * F + 2 * K + 2;
  const float* w = g.weight + n * columns;
  float* out = g.d_weight + n * columns;
  for (int64_t k = threadIdx.x; k < 2 * F; k += 128) out[k] = g.x[(k / F * 2 * F + n) * F + k % F];
  for (int64_t first = 0; first < K; first += 32) {
    const int64_t k = first + lane_of();
    double sum = 0;
    if (g.train1 && k < K) {
      for (int64_t f = warp_of(); f < F; f += 4) {
        const float* row = g.product + f * gram + 3 * F + k;
        sum += double(w[f]) * row[0] + double(w[F + f]) * row[K];
      }
      const double mean = g.e_sum[k] / g.totals[3 * F];
      for (int64_t l = warp_of(); l < K; l += 4) sum += w[2 * F + l] * (g.e_gram[l * K + k] - mean * g.e_sum[l]);
    }
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp_of() || k >= K) continue;
    double d = g.grad[k * 2 * F + n];
    if (g.train1) {
      for (int warp = 1; warp < 4; ++warp) sum += sums[32 * warp + lane_of()];
      d -= g.e_sum[k] * g.c1[n] + sum * rstd1_of(g, n) * g.c2[n];
    }
    out[2 * F + k] = float(d * g.a[n]);
  }
}

// The edges by sender, from their order (E) and their senders in it, `other`: receivers, numbers, first edges.
__global__ void __launch_bounds__(128) transpose_index(const DeviceConv g) {
  const int64_t thread = int64_t(blockIdx.x) * 128 + threadIdx.x, threads = int64_t(gridDim.x) * 128;
  for (int64_t t = thread; t < g.n_edges; t += threads) {
    const int64_t edge = g.order[t];
    int64_t low = 0, high = g.n_rows;  // rows that end at it or before
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (g.ptr[middle + 1] <= edge)
        low = middle + 1;
      else
        high = middle;
    }
    g.out_receiver[t] = int32_t(low);
    g.out_number[t] = int32_t(edge);
  }
  for (int64_t row = thread; row <= g.n_rows; row += threads) {
    int64_t low = 0, high = g.n_edges;  // edges of senders before it
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (g.other[middle] < row)
        low = middle + 1;
      else
        high = middle;
    }
    g.out_col_ptr[row] = int32_t(low);
  }
}

// Rows of a crystal, of which there are n_rows (of rows n_edges), and their weight; false: its pointers are bad.
SRCGCNN_DEVICE bool crystal_of(const DeviceConv& g, int64_t crystal, int64_t& begin, int64_t& end, float& weight) {
  begin = g.ptr[crystal];
  end = g.ptr[crystal + 1];
  if (begin < 0 || end < begin || end > g.n_edges) return false;
  weight = 0.0f;
  for (int64_t row = begin; row < end; ++row) weight += g.row_weight[row];
  return true;
}

// A block a crystal: warps take every fourth row, and their sums are added in order.
__global__ void __launch_bounds__(128) crystal_mean(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  int64_t begin, end;
  float weight;
  const bool good = crystal_of(g, blockIdx.x, begin, end, weight);
  for (int64_t first = 0; first < g.F; first += 32) {
    const int64_t channel = first + lane_of();
    float sum = 0.0f;
    if (good && channel < g.F)
      for (int64_t row = begin + warp_of(); row < end; row += 4)
        sum = fmaf(g.row_weight[row], g.x[row * g.F + channel], sum);
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (warp_of() || channel >= g.F) continue;
    for (int warp = 1; warp < 4; ++warp) sum += shared[32 * warp + lane_of()];
    g.out[blockIdx.x * g.F + channel] = !good ? NAN : begin == end ? 0.0f : sum / weight;
  }
}

// The gradient at each of its rows from that at its mean.
__global__ void __launch_bounds__(128) crystal_mean_backward(const DeviceConv g) {
  int64_t begin, end;
  float weight;
  if (!crystal_of(g, blockIdx.x, begin, end, weight)) return;
  for (int64_t row = begin + warp_of(); row < end; row += 4) {
    const float share = g.row_weight[row] / weight;
    for (int64_t channel = lane_of(); channel < g.F; channel += 32)
      g.out[row * g.F + channel] = share * g.grad[blockIdx.x * g.F + channel];
  }
}

}  // namespace srcgcnn
