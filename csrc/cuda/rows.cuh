// Products of rows on the tensor cores, and the sums and small vectors of a layer that are left between its passes.
//
// float32 is the sum of two numbers of 16 bits in multiply_rows (Unit), of two TF32 numbers in multiply_columns. The tensor
// cores cut off what does not fit their sums, so a sum begins at zero, takes the products of 16 or 8 numbers, small ones first,
// and is then added in float32. Rows are on their way to shared memory while those before them are multiplied.
#pragma once
#include "conv.h"
#include "device.cuh"

namespace srcgcnn {

constexpr int kInner = 16;         // numbers of a sum that are multiplied at a time
constexpr int kProductRows = 32;   // of a warp of multiply_rows
constexpr int kProductColumns = 64;
constexpr int kOfStep = kInner * kProductColumns;  // words of the weights that kInner numbers are multiplied by
constexpr int kProductWarps = 12;  // of a block, the only one of its multiprocessor
constexpr int kPiece = 32;         // numbers of its rows that a warp has in shared memory, twice
constexpr int kPieceSize = kProductRows * kPiece;
constexpr int kLeft = 32, kRight = 64;  // columns of a warp of multiply_columns
constexpr int kColumnWarps = 8;         // of a block, at most
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kColumnBlocks = 1;  // of a multiprocessor: with two, two registers would spill there
#else
constexpr int kColumnBlocks = 2;
#endif
constexpr int kStageRows = 16, kStages = 3;
// Numbers of a row of a stage, those of b after those of a; it spreads four rows over the banks.
constexpr int kStageWidth = 320, kStageStride = kStageWidth + 8, kStageSize = kStageRows * kStageStride;

// out (N, columns) = a (N, inner) b + shift + add, stored as kHalf says. b was ordered by order_weights.
struct RowProduct {
  const float *a, *b, *shift, *add;  // add (N, columns), which may be out; shift and add may be null
  void* out;
  int64_t n_rows, inner, columns;
  int held;  // 64 columns each, whose weights a block keeps in shared memory; 0: none
  int by_four, out_by_four;  // by_four: rows of a are vectors of four, aligned; those of add and out
};
// out (programs, left, right): sums of a^T b over the rows of a program; a (N, left), b (N, right), `stride` apart.
struct ColumnProduct {
  const float *a, *b;
  float* out;
  int64_t n_rows;
  int left, right, a_stride, b_stride, programs;
  int lefts, rights, a_blocks, b_blocks;  // a block's warps; blocks of a program
  int steps;                              // 16 rows each, of all programs
  int teams;                              // of warps: one takes all 16 rows of a step, or two take eight each
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

// Numbers at .. at + 3 of a row of n to shared memory, zeros beyond it.
SRCGCNN_DEVICE void fetch_four(float* to, const float* row, int at, int n, bool by_four) {
  if (by_four)
    device::copy_async(to, row + (at < n ? at : 0), at < n);
  else
    store<4>(to, four_of(row, at, n, false));
}

SRCGCNN_DEVICE void store_one(float* p, float x) { *p = x; }
SRCGCNN_DEVICE void store_one(Bfloat16* p, float x) { p->bits = uint16_t(device::to_bfloat16(x, 0.0f)); }

// Each warp has a share of the products of 32 rows with 64 columns, those of the same rows one after the other. kHeld:
// weights are in shared memory, before the pieces of the warps' rows. A piece of a row is split in its place, in a unit of its
// own, by the lanes that multiply it. kRelaxed: one product, not three.
template <bool kHalf, bool kHeld, bool kRelaxed>
__global__ void __launch_bounds__(32 * kProductWarps, 1) multiply_rows(const __grid_constant__ RowProduct g) {
  using T = typename Storage<kHalf>::type;
  SRCGCNN_SHARED(shared);
  const int group = lane_of() / 4, in_group = lane_of() % 4;
  const int all = int((g.columns + kProductColumns - 1) / kProductColumns), held = kHeld ? g.held : all;
  const int slices = kHeld ? (all + held - 1) / held : 1, first_block = kHeld ? int(blockIdx.x) % slices * held : 0;
  const int blocks = !kHeld ? all : held < all - first_block ? held : all - first_block;
  const int steps = int((g.inner + kInner - 1) / kInner), pieces = (steps + 1) / 2;
  const int64_t units = (g.n_rows + kProductRows - 1) / kProductRows * blocks;
  const int64_t groups = gridDim.x / slices, ranks = groups * kProductWarps;
  const int64_t rank = warp_of() * groups + blockIdx.x / slices;
  const int64_t from = rank * units / ranks;
  const int count = int((rank + 1) * units / ranks - from);
  float* ring = shared + (kHeld ? held * steps * kOfStep : 0) + warp_of() * 2 * kPieceSize;
  const float* weights = g.b + int64_t(first_block) * steps * kOfStep;
  const float* inverse_of_columns = g.b + int64_t(all) * steps * kOfStep + first_block * kProductColumns;
  const auto read = [&](int tile, int piece, int slot) {
    const int own_row = lane_of() / 8, own_four = lane_of() % 8;
    const int at = piece * kPiece + 4 * own_four, inner = int(g.inner);
    const int64_t row = int64_t(tile) * kProductRows + own_row;
    float* to = ring + slot * kPieceSize + own_row * kPiece + (own_four ^ own_row % 2 * 4) * 4;
    if (g.by_four) {
      const bool there = at < inner;
      const float* x = g.a + row * inner + (there ? at : 0);
      const int size = inner * int(sizeof(float)), last = int(g.n_rows - 1 - row);  // beyond it rows are the last one
#pragma unroll
      for (int v = 0; v < kProductRows; v += 4)
        device::copy_async(to + v * kPiece, reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) +
                                                                          int64_t(v < last ? v : last) * size), there);
      return;
    }
#pragma unroll 1
    for (int v = 0; v < kProductRows; v += 4) {
      const int64_t n = row + v < g.n_rows ? row + v : g.n_rows - 1;
      Channels<4> x;
#pragma unroll
      for (int k = 0; k < 4; ++k) x.x[k] = at + k < inner ? g.a[n * inner + at + k] : 0.0f;
      store<4>(to + v * kPiece, x);
    }
  };
  const auto four_at = [&](int step) { return 4 * ((step * 4 + in_group) ^ group % 2 * 4); };  // of a lane's row, in a piece
  int tile = int(from / blocks), block = int(from % blocks), slot = 0;
  uint32_t inverses = 0;  // of the units of row group + 8 in_group in the two pieces, their first halves
  if (count > 0) read(tile, 0, 0);
  if (kHeld) {
    for (int x = int(threadIdx.x); x < blocks * steps * (kOfStep / 4); x += 32 * kProductWarps)
      device::copy_async(shared + 4 * x, weights + 4 * x, true);
    weights = shared;
  }
  device::commit_copies();
  device::wait_for_copies<0>();
  __syncthreads();
#pragma unroll 1
  for (int unit = 0; unit < count; ++unit) {
    float sums[2][8][4] = {};
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      device::wait_for_copies<0>();
      __syncwarp();
      // Two pieces are all of the rows, read for the first product with them, or else the next one takes the place of the last.
      const bool ends = piece + 1 == pieces, moves = ends && block + 1 == blocks;
      const int next = pieces == 1 && !moves ? slot : 1 - slot;
      if ((pieces > 2 || moves || (!ends && (block == 0 || unit == 0))) && !(ends && unit + 1 == count))
        read(tile + moves, ends ? 0 : piece + 1, next);
      device::commit_copies();
      float* rows = ring + slot * kPieceSize + group * kPiece;
      if (pieces > 2 || block == 0 || unit == 0) {  // read since the last product with these rows
        float own = 0.0f;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Channels<4> x[2][2];  // row, step
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            float most = 0.0f;
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              x[v][step] = load<4>(rows + 8 * (2 * m + v) * kPiece + four_at(step));
#pragma unroll
              for (int k = 0; k < 4; ++k) most = fmaxf(most, fabsf(x[v][step].x[k]));
            }
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
            const Unit unit_of_row(int(__float_as_uint(most)));
            if (in_group == 2 * m + v) own = unit_of_row.inverse;
#pragma unroll
            for (int k = 0; k < 8; ++k) x[v][k / 4].x[k % 4] *= unit_of_row.scale;
          }
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            Channels<4> high, low;
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // two pairs of each row
              uint32_t of_pair[2];
              split(x[k % 2][step].x[k / 2 * 2], x[k % 2][step].x[k / 2 * 2 + 1], of_pair[0], of_pair[1]);
              high.x[k] = __uint_as_float(of_pair[0]);
              low.x[k] = __uint_as_float(of_pair[1]);
            }
            store(rows + 16 * m * kPiece + four_at(step), high);
            store(rows + (16 * m + 8) * kPiece + four_at(step), low);
          }
        }
        inverses = slot ? __float_as_uint(own) | (inverses & 0xffff) : __float_as_uint(own) >> 16 | (inverses & 0xffff0000);
      }
      float of_row[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) of_row[v] = __uint_as_float(__shfl_sync(kAllLanes, slot ? inverses & 0xffff0000 : inverses << 16, group * 4 + v));
      const float* b = weights + (int64_t(block) * steps + 2 * piece) * kOfStep + 4 * lane_of();
      const int here = steps - 2 * piece < 2 ? 1 : 2;
#pragma unroll 1
      for (int step = 0; step < here; ++step, b += kOfStep) {
        uint32_t high[2][4], low[2][4];  // tiles of 16 rows
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const auto x = load<4>(rows + 16 * m * kPiece + four_at(step)), y = load<4>(rows + (16 * m + 8) * kPiece + four_at(step));
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            high[m][k] = __float_as_uint(x.x[k]);
            low[m][k] = __float_as_uint(y.x[k]);
          }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if (n == 4) __syncwarp();  // so that no more weights than these wait in registers
          const auto w = load<4>(b + n * 128);
          const uint32_t of_high[2] = {__float_as_uint(w.x[0]), __float_as_uint(w.x[1])};
          const uint32_t of_low[2] = {__float_as_uint(w.x[2]), __float_as_uint(w.x[3])};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            float d[4] = {};
            if (!kRelaxed) {
              device::mma_half(d, low[m], of_high);
              device::mma_half(d, high[m], of_low);
            }
            device::mma_half(d, high[m], of_high);
#pragma unroll
            for (int v = 0; v < 4; ++v) sums[m][n][v] = fmaf(d[v], of_row[2 * m + v / 2], sums[m][n][v]);
          }
        }
      }
      slot = next;
    }
    // A lane has columns 4 in_group .. + 3 of each 16.
    const int of_lane = int(device::known_late(unsigned(lane_of()))), own_columns = of_lane % 4 * 4, columns = int(g.columns);
    const int first_column = (first_block + block) * kProductColumns + own_columns;
    const int64_t row = int64_t(tile) * kProductRows + of_lane / 4, at = row * columns + first_column;
    const int there = int(g.n_rows - row < kProductRows ? g.n_rows - row : kProductRows);  // row + 8 v below it
    T* out = static_cast<T*>(g.out) + at;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      const int c = first_column + 8 * n;
      if (c >= columns) continue;
      const auto of_columns = load<4>(inverse_of_columns + block * kProductColumns + own_columns + 8 * n);
      Channels<4> shift = {};
      if (g.shift) shift = four_of(g.shift, c, columns, g.out_by_four);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (8 * v >= there) continue;
        Channels<4> y;
#pragma unroll
        for (int k = 0; k < 4; ++k) y.x[k] = fmaf(sums[v / 2][n + k / 2][v % 2 * 2 + k % 2], of_columns.x[k], shift.x[k]);
        if (g.out_by_four) {
          if (g.add) add_to(y, load<4>(g.add + at + 8 * v * columns + 8 * n));
          store<4>(out + 8 * v * columns + 8 * n, y);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (c + k >= columns) continue;
            if (g.add) y.x[k] += g.add[at + 8 * v * columns + 8 * n + k];
            store_one(out + 8 * v * columns + 8 * n + k, y.x[k]);
          }
        }
      }
    }
    if (++block == blocks) {
      block = 0;
      ++tile;
    }
  }
}

// What a warp adds for 8 rows: 32 columns of a, four of the eight tiles of 8 columns of b. Three products always.
SRCGCNN_DEVICE void add_products(float (&sums)[2][8][4], int q, const float (&high)[2][4], const float (&low)[2][4],
                                 const float (&right)[4][2], const float (&right_low)[4][2]) {
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float d[4] = {};
      device::mma(d, low[m], right[t]);
      device::mma(d, high[m], right_low[t]);
      device::mma(d, high[m], right[t]);
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[m][4 * q + t][v] += d[v];
    }
}
// done(row, column, four sums): a lane has rows 4 group + 2 m + half of the warp's 32, and of each 32 columns the eight from
// 8 in_group on.
template <class Done>
SRCGCNN_DEVICE void for_columns(const float (&sums)[2][8][4], int first_row, Done done) {
  const int group = lane_of() / 4, in_group = lane_of() % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          Channels<4> y;
#pragma unroll
          for (int t = 0; t < 4; ++t) y.x[t] = sums[m][4 * q + t][2 * half + v];
          done(first_row + 4 * group + 2 * m + half, 8 * in_group + 32 * q + 4 * v, y);
        }
}

constexpr int kColumnShared = (kStages * kStageSize + 2 * 32 * kColumnWarps) * int(sizeof(float));

// Three products even where one would do: memory bounds it. Each warp has 32 of the block's columns of a and 64 of b; a block
// reads 16 rows at a time, two ahead. The columns of a and b that a lane reads, four neighbours, belong to the tiles as the
// comments say.
template <bool kByFour>
__global__ void __launch_bounds__(32 * kColumnWarps, kColumnBlocks) multiply_columns(const __grid_constant__ ColumnProduct g) {
  SRCGCNN_SHARED(shared);
  const int group = lane_of() / 4, in_group = lane_of() % 4;
  const int block = int(blockIdx.x) % (g.a_blocks * g.b_blocks), program = int(blockIdx.x) / (g.a_blocks * g.b_blocks);
  const int first_left = block % g.a_blocks * kLeft * g.lefts, first_right = block / g.a_blocks * kRight * g.rights;
  const auto read = [&](int step) {
    const int64_t first = int64_t(program + step * g.programs) * kStageRows;
    const int rows = g.n_rows - first < kStageRows ? int(g.n_rows - first) : kStageRows;  // none, where negative
#pragma unroll 1
    for (int row = warp_of(); row < kStageRows; row += g.lefts * g.rights * g.teams) {
      float* to = shared + step % kStages * kStageSize + row * kStageStride;
      const int64_t at = row < rows ? int(first) + row : 0;
      const float* from = g.a + at * g.a_stride;
      const int left = row < rows ? g.left : 0, right = row < rows ? g.right : 0;
#pragma unroll 1
      for (int c = 4 * lane_of(); c < kLeft * g.lefts; c += 128) fetch_four(to + c, from, first_left + c, left, kByFour);
      from = g.b + at * g.b_stride;
      to += kLeft * g.lefts;
#pragma unroll 1
      for (int c = 4 * lane_of(); c < kRight * g.rights; c += 128) fetch_four(to + c, from, first_right + c, right, kByFour);
    }
    device::commit_copies();
  };
  const int team = warp_of() / (g.lefts * g.rights), own_left = warp_of() % g.lefts * kLeft;
  const int own_right = warp_of() / g.lefts % g.rights * kRight;
  const bool busy = first_left + own_left < g.left && first_right + own_right < g.right;
  int* place = reinterpret_cast<int*>(shared + kStages * kStageSize) + 2 * threadIdx.x;  // of the sums: registers are scarce
  place[0] = first_left + own_left;
  place[1] = first_right + own_right;
  float sums[2][8][4] = {};
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) read(step);
#pragma unroll 1
  for (int step = 0; program + step * g.programs < g.steps; ++step) {
    device::wait_for_copies<kStages - 2>();
    __syncthreads();
    read(step + kStages - 1);
    if (!busy) continue;
    const float* a = shared + step % kStages * kStageSize + (8 * team + in_group) * kStageStride + 4 * group;
    const float* b = a + kLeft * g.lefts + own_right;
    a += own_left;
#pragma unroll 1
    for (int half = g.teams; half <= 2; ++half, a += 8 * kStageStride, b += 8 * kStageStride) {
      float high[2][4], low[2][4];  // tile of 16 columns (4 group + 2 tile, + 1)
#pragma unroll
      for (int v = 0; v < 2; ++v) {  // rows in_group + 4 v
        const auto x = load<4>(a + 4 * v * kStageStride);
#pragma unroll
        for (int k = 0; k < 4; ++k) split(x.x[k], high[k / 2][v * 2 + k % 2], low[k / 2][v * 2 + k % 2]);
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float right[4][2], right_low[4][2];  // tile of 8 columns (32 q + 4 group + tile)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const auto x = load<4>(b + 4 * v * kStageStride + 32 * q);
#pragma unroll
          for (int k = 0; k < 4; ++k) split(x.x[k], right[k][v], right_low[k][v]);
        }
        add_products(sums, q, high, low, right, right_low);
      }
    }
  }
  device::wait_for_copies<0>();
  if (g.teams == 2) {  // the second one's sums are added to the first one's
    const int threads = 32 * g.lefts * g.rights;
    float* other = shared + int(threadIdx.x) % threads;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 64; ++k)
      if (team == 1) other[k * threads] = sums[k / 32][k / 4 % 8][k % 4];
    __syncthreads();
    if (team == 1) return;
#pragma unroll
    for (int k = 0; k < 64; ++k) sums[k / 32][k / 4 % 8][k % 4] += other[k * threads];
  }
  if (!busy) return;
  float* out = g.out + int64_t(program) * g.left * g.right;
  const int first_column = place[1];
  for_columns(sums, place[0], [&](int row, int c, const Channels<4>& y) {
    c += first_column;
    if (row >= g.left) return;
    if (g.right % 4 == 0) {
      if (c < g.right) store<4>(out + row * g.right + c, y);
    } else {
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (c + t < g.right) out[row * g.right + c + t] = y.x[t];
    }
  });
}

constexpr int kPartWarps = 16, kPartThreads = 32 * kPartWarps;

// Of n numbers, `apart` from each other, every step-th from `first` on, nine of them on their way at a time.
SRCGCNN_DEVICE double sum_of(const float* x, int64_t apart, int first, int step, int n) {
  constexpr int ahead = 9;
  double sum = 0;
#pragma unroll 1
  for (int part = first; part < n; part += ahead * step) {
    float value[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) value[k] = part + k * step < n ? x[(part + k * step) * apart] : 0.0f;
#pragma unroll
    for (int k = 0; k < ahead; ++k) sum += value[k];
  }
  return sum;
}
// 32 of the sums. Warps take every 16th part; their sums are then added in order. A lane a number.
SRCGCNN_DEVICE void add_parts_of(const PartSum& s, int64_t block, double* sums) {
  const int64_t at = block * 32 + lane_of();
  double sum = at < s.n ? sum_of(s.parts + at, s.n, warp_of(), kPartWarps, int(s.n_parts)) : 0;
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_of() || at >= s.n) return;
  for (int warp = 1; warp < kPartWarps; ++warp) sum += sums[32 * warp + lane_of()];
  if (s.exact) s.exact[at] = sum;
  if (s.rounded) s.rounded[at] = float(sum);
}

__global__ void __launch_bounds__(kPartThreads) add_parts(const __grid_constant__ PartSums g) {
  SRCGCNN_SHARED(shared);
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
  add_parts_of(g.of[which], block, reinterpret_cast<double*>(shared));
}

// A product's right side as multiply_rows reads it: words of pairs for 64 columns, steps of 16, 8 tiles, 32 lanes, then high and
// low ones of the lane's four numbers; after these the inverse unit of each column. Of two tiles a lane of the result has four
// neighbours.
SRCGCNN_HOST_DEVICE int64_t whole_columns(int64_t columns) {
  return (columns + kProductColumns - 1) / kProductColumns * kProductColumns;
}
SRCGCNN_HOST_DEVICE int64_t of_columns(int64_t inner) { return (inner + kInner - 1) / kInner * kOfStep; }  // 64 of them
SRCGCNN_HOST_DEVICE int64_t ordered_size(int64_t inner, int64_t columns) {
  return whole_columns(columns) * (of_columns(inner) / kProductColumns + 1);
}
// A warp a column, whose numbers are weight(0 .. inner).
template <class Weight>
SRCGCNN_DEVICE void order_column(float* to, int inner, int64_t column, int64_t columns, Weight weight) {
  const auto number = [&](int k) { return k < inner ? weight(k) : 0.0f; };
  int most = 0;
#pragma unroll 4
  for (int k = lane_of(); k < inner; k += 32) {
    const int bits = int(__float_as_uint(weight(k)) & 0x7fffffffu);
    most = bits > most ? bits : most;
  }
  const Unit unit(__reduce_max_sync(kAllLanes, most));
  const int c = int(column % kProductColumns), tile = c / 16 * 2 + c / 2 % 2, lane = c / 4 % 4 * 8 + c % 2 * 4;
  auto* words = reinterpret_cast<uint32_t*>(to + column / kProductColumns * of_columns(inner) + tile * 128 + lane * 4);
#pragma unroll 4
  for (int k = 2 * lane_of(); k < (inner + kInner - 1) / kInner * kInner; k += 64) {
    uint32_t high, low;
    split(number(k) * unit.scale, number(k + 1) * unit.scale, high, low);
    uint32_t* at = words + k / kInner * kOfStep + k % kInner / 4 * 4 + k / 2 % 2;
    at[0] = high;
    at[2] = low;
  }
  if (lane_of() == 0) to[whole_columns(columns) / kProductColumns * of_columns(inner) + column] = unit.inverse;
}

SRCGCNN_DEVICE float rstd1_of(const DeviceConv& g, int64_t n) { return float(1 / sqrt(double(g.var1[n]) + g.eps1)); }

// What x of an edge follows from, as the products read it: out, right side for pq; out_m (4W), its shift; out_filter, see
// `filter`; and, or null: out_x, right side for the gradient at h from that at pq; out_edge, for term from given features;
// out_gamma (K, 2F) = w_e / sqrt(var1 + eps1). One number a thread of all these, a column a warp of the right sides.
__global__ void __launch_bounds__(128) order_weights(const DeviceConv g) {
  const int64_t F = g.F, W = g.width, K = g.n_features, all = g.all, columns = 2 * all + K, steps = (K + 7) / 8;
  int64_t x = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (x < 32 * whole_columns(4 * W)) {  // columns: p filter, p core, q filter, q core
    const int64_t column = x / 32, c = column % W, n = column / W % 2 * all + c;
    const bool there = c < F && column < 4 * W;
    const float rstd = there ? rstd1_of(g, n) : 0.0f, *row = g.weight + n * columns + column / (2 * W) * all;
    order_column(g.out, int(all), column, 4 * W, [&](int k) { return there ? row[k] * rstd : 0.0f; });
    return;
  }
  x -= 32 * whole_columns(4 * W);
  if (x < 4 * W) {
    const int64_t c = x % W, n = x / W * all + c;
    const bool there = c < F && x < 2 * W;
    g.out_m[x] = there ? ((g.bias ? g.bias[n] : 0.0f) - g.mean1[n]) * rstd1_of(g, n) : 0.0f;
    return;
  }
  x -= 4 * W;
  if (x < W * steps * 16) {  // chunk of 32 channels, step, tile, lane, number: see Product
    const int64_t number = x % 4, lane = x / 4 % 32, tile = x / 128 % 4;
    const int64_t c = x / 512 / steps * 32 + lane / 4 * 4 + tile, n = number % 2 * all + c;
    const int64_t k = x / 512 % steps * 8 + lane % 4 + number / 2 * 4;
    const float weight = c < F && k < K ? g.weight[n * columns + 2 * all + k] * rstd1_of(g, n) : 0.0f;
    float* at = g.out_filter + x / 128 * 256 + x % 128;
    float high, low;
    split(weight, high, low);
    at[0] = weight == weight ? high : weight;
    at[128] = low;
    return;
  }
  x -= W * steps * 16;
  if (g.out_x) {
    if (x < 32 * whole_columns(all)) {
      const int64_t column = x / 32;
      const int of_half = int(F);
      order_column(g.out_x, 4 * of_half, column, all, [&](int k) {
        const int quarter = k / of_half;
        const int64_t n = quarter % 2 * all + k - quarter * of_half;
        return column < all ? g.weight[n * columns + quarter / 2 * all + column] * rstd1_of(g, n) : 0.0f;
      });
      return;
    }
    x -= 32 * whole_columns(all);
  }
  if (g.out_edge) {
    if (x < 32 * whole_columns(2 * W)) {
      const int64_t column = x / 32, c = column % W, n = column / W * all + c;
      const bool there = c < F && column < 2 * W;
      const float rstd = there ? rstd1_of(g, n) : 0.0f, *row = g.weight + n * columns + 2 * all;
      order_column(g.out_edge, int(K), column, 2 * W, [&](int k) { return there ? row[k] * rstd : 0.0f; });
      return;
    }
    x -= 32 * whole_columns(2 * W);
  }
  if (g.out_gamma && x < K * 2 * F) {
    const int64_t n = x / F % 2 * all + x % F;
    g.out_gamma[x] = g.weight[n * columns + 2 * all + x / (2 * F)] * rstd1_of(g, n);
  }
}
// Threads for all of it.
SRCGCNN_HOST_DEVICE int64_t ordered_numbers(const DeviceConv& g) {
  const int64_t F = g.F, W = g.width, K = g.n_features;
  return 32 * whole_columns(4 * W) + 4 * W + W * ((K + 7) / 8) * 16 + (g.out_x ? 32 * whole_columns(g.all) : 0) +
         (g.out_edge ? 32 * whole_columns(2 * W) : 0) + (g.out_gamma ? K * 2 * F : 0);
}

// What follows from the parts of backward_receivers, filter's sums and these: vectors (programs, 2, 2F), sums of dy x and of dy.
struct ReceiverSums {
  DeviceConv g;
  const float* vectors;
  PartSum filter;
};
// From these and `a` (4, all) of finish_backward, whose last row is one number: out (3, 2F) = a, c1 and c2 of `correct`; the
// gradients of vectors. A block 32 of their numbers, or of the filter's sums.
__global__ void __launch_bounds__(kPartThreads) vector_gradients(const __grid_constant__ ReceiverSums s) {
  SRCGCNN_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const DeviceConv& g = s.g;
  const int64_t F = g.F, blocks = (2 * F + 31) / 32, n = int64_t(blockIdx.x) * 32 + lane_of(), of_all = n / F * g.all + n % F;
  if (blockIdx.x >= blocks) {
    add_parts_of(s.filter, blockIdx.x - blocks, sums);
    return;
  }
  double d_gamma = 0, d_beta = 0;
  if (n < 2 * F) {
    d_gamma = sum_of(s.vectors + n, 4 * F, warp_of(), kPartWarps, int(g.programs));
    d_beta = sum_of(s.vectors + 2 * F + n, 4 * F, warp_of(), kPartWarps, int(g.programs));
  }
  sums[threadIdx.x] = d_gamma;
  sums[kPartThreads + threadIdx.x] = d_beta;
  __syncthreads();
  if (warp_of() || n >= 2 * F) return;
  for (int warp = 1; warp < kPartWarps; ++warp) {
    d_gamma += sums[32 * warp + lane_of()];
    d_beta += sums[kPartThreads + 32 * warp + lane_of()];
  }
  const float edges = g.a[3 * g.all];
  g.out[n] = g.gamma1[of_all];
  g.out[2 * F + n] = float(d_beta / edges);
  g.out[4 * F + n] = float(d_gamma / edges);
  g.d_gamma1[of_all] = float(d_gamma);
  g.d_beta1[of_all] = float(d_beta);
  if (g.d_bias) g.d_bias[of_all] = g.train1 ? 0.0f : float(d_beta) * g.gamma1[of_all] * rstd1_of(g, of_all);
  if (n >= F) return;
  g.d_beta2[n] = g.a[n];
  g.d_gamma2[n] = g.a[g.all + n];
}

// A block a column of z. d_weight from x (programs, 4F, all), parts of the product of the gradient at pq with h, and grad
// (K, 2F), the sums of e dy, less sum_ij w_i e_ij (c1 + c2 x_ij) where statistics are the batch's: which the Gram matrix holds, as the sum of
// w_i x_ij is zero. a, c1, c2 (2F); totals (4, F) of finish_backward.
__global__ void __launch_bounds__(kPartThreads) weight_gradient(const DeviceConv g) {
  SRCGCNN_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int F = int(g.F), K = int(g.n_features), all = int(g.all), columns = 2 * all + K, n = int(blockIdx.x);
  const int of_all = n / F * all + n % F;
  const float *w = g.weight + int64_t(of_all) * columns, rstd = rstd1_of(g, of_all);
  float* out = g.d_weight + int64_t(of_all) * columns;
  // Teams of threads take the parts in turn, a thread a number.
  const int numbers = 2 * all, at_once = numbers < kPartThreads ? numbers : kPartThreads, teams = kPartThreads / at_once;
  const int team = int(threadIdx.x) / at_once;
  for (int first = 0; first < numbers; first += at_once) {
    const int k = first + int(threadIdx.x) % at_once;
    const bool there = k < numbers && team < teams;
    const int half = there ? k / all : 0;
    const float* x = g.x + int64_t(half * 2 * F + n) * all + (there ? k - half * all : 0);
    double sum = there ? sum_of(x, int64_t(4) * F * all, team, teams, int(g.programs)) : 0;
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (!there || team) continue;
    for (int t = 1; t < teams; ++t) sum += sums[threadIdx.x + t * at_once];
    out[k] = float(sum * rstd);
  }
  for (int first = 0; first < K; first += 32) {
    const int k = first + lane_of();
    double sum = 0;
    if (g.train1 && k < K) {
      for (int f = warp_of(); f < all; f += kPartWarps) {
        const float* row = g.product + int64_t(f) * (3 * all + 2 * K + 2) + 3 * all + k;
        sum += double(w[f]) * row[0] + double(w[all + f]) * row[K];
      }
      const double mean = g.e_sum[k] / g.totals[3 * all];
      for (int l = warp_of(); l < K; l += kPartWarps) sum += w[2 * all + l] * (g.e_gram[l * K + k] - mean * g.e_sum[l]);
    }
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp_of() || k >= K) continue;
    double d = g.grad[k * 2 * F + n];
    if (g.train1) {
      for (int warp = 1; warp < kPartWarps; ++warp) sum += sums[32 * warp + lane_of()];
      d -= g.e_sum[k] * g.c1[n] + sum * rstd * g.c2[n];
    }
    out[2 * all + k] = float(d * g.a[n] * rstd);
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
    float sum = 0.0f, rounded = 0.0f;
    if (good && channel < g.F)
      for (int64_t row = begin + warp_of(); row < end; row += 4)
        add_exactly(g.row_weight[row], g.x[row * g.F + channel], sum, rounded);
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (warp_of() || channel >= g.F) continue;
    for (int warp = 1; warp < 4; ++warp) sum += shared[32 * warp + lane_of()];
    g.out[blockIdx.x * g.F + channel] = !good ? NAN : weight == 0 ? 0.0f : sum / weight;
  }
}

// The gradient at each of its rows from that at its mean; NaN where pointers are bad, and at rows that belong to no crystal.
__global__ void __launch_bounds__(128) crystal_mean_backward(const DeviceConv g) {
  int64_t begin, end;
  float weight;
  const bool good = crystal_of(g, blockIdx.x, begin, end, weight);
  const auto write = [&](int64_t from, int64_t to, bool known) {
    if (from < 0) from = 0;
    if (to > g.n_edges) to = g.n_edges;
    for (int64_t row = from + warp_of(); row < to; row += 4) {
      const float share = !known ? NAN : weight == 0 ? 0.0f : g.row_weight[row] / weight;
      for (int64_t channel = lane_of(); channel < g.F; channel += 32)
        g.out[row * g.F + channel] = share * g.grad[blockIdx.x * g.F + channel];
    }
  };
  write(begin, end, good);
  if (blockIdx.x == 0) write(0, begin, false);
  if (blockIdx.x + 1 == gridDim.x) write(end, g.n_edges, false);
}

constexpr int kMostTable = 128;  // rows of a table whose sums a block has in shared memory, for 32 channels and each of 4 warps
// Blocks that have each a share of a table of n rows, and the rows that these are.
SRCGCNN_HOST_DEVICE int64_t table_slices(int64_t n) { return (n + kMostTable - 1) / kMostTable; }
SRCGCNN_HOST_DEVICE int64_t table_share(int64_t n) { return (n + table_slices(n) - 1) / (n ? table_slices(n) : 1); }

// out_x (programs, U, F): of each of U = n_edges rows of a table the sum of the rows of grad (N, F) that `other` says are of it.
// A warp takes rows one after the other, a lane a channel; rows of one kind that follow one another are added in a register.
__global__ void __launch_bounds__(128) table_sums(const DeviceConv g) {
  constexpr int ahead = 8;
  SRCGCNN_SHARED(shared);
  const int chunks = int((g.F + 31) / 32), slices = int(table_slices(g.n_edges)), size = int(table_share(g.n_edges));
  const int channel = int(blockIdx.x) % chunks * 32 + lane_of(), first_kind = int(blockIdx.x) / chunks % slices * size;
  const int64_t program = int(blockIdx.x) / chunks / slices, shares = 4 * g.programs, share = program * 4 + warp_of();
  const int64_t begin = share * g.n_rows / shares, end = (share + 1) * g.n_rows / shares;
  float* table = shared + warp_of() * size * 32 + lane_of();
  for (int u = 0; u < size; ++u) table[32 * u] = 0.0f;
  int kind = -1;
  float sum = 0.0f;
  const auto put = [&] {
    if (unsigned(kind - first_kind) < unsigned(size) && kind >= 0) table[32 * (kind - first_kind)] += sum;
  };
#pragma unroll 1
  for (int64_t from = begin; from < end; from += 32) {
    const int own = from + lane_of() < end ? g.other[from + lane_of()] : -1, count = end - from < 32 ? int(end - from) : 32;
    const float* x = g.grad + from * g.F + channel;
#pragma unroll 1
    for (int k = 0; k < count; k += ahead) {
      float value[ahead];
#pragma unroll
      for (int t = 0; t < ahead; ++t) value[t] = k + t < count && channel < g.F ? x[(k + t) * g.F] : 0.0f;
#pragma unroll
      for (int t = 0; t < ahead; ++t) {
        const int next = __shfl_sync(kAllLanes, own, k + t);
        if (next != kind) {
          put();
          kind = next;
          sum = 0.0f;
        }
        sum += value[t];
      }
    }
  }
  put();
  __syncthreads();
  if (channel >= g.F) return;
  for (int u = warp_of(); u < size && first_kind + u < g.n_edges; u += 4) {
    const float* of_warps = shared + 32 * u + lane_of();
    float all = of_warps[0];
    for (int warp = 1; warp < 4; ++warp) all += of_warps[warp * size * 32];
    g.out_x[(program * g.n_edges + first_kind + u) * g.F + channel] = all;
  }
}

}  // namespace srcgcnn
