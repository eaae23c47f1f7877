// Small matrix products on packed operands, for blocks of rows that stay in cache.
#pragma once
#include <string.h>

#include "simd.h"

namespace srcgcnn::SRCGCNN_LEVEL {

// Vectors of a panel and rows of a tile: as many accumulators as the registers hold, or as Arm's four multiply-adds a clock
// need, which take four clocks.
constexpr int kPanel = SRCGCNN_VECTOR_BYTES == 64 ? 4 : 2;
#if defined(__aarch64__)
constexpr int kTile = 8;
#else
constexpr int kTile = SRCGCNN_VECTOR_BYTES >= 32 ? 6 : 4;
#endif

// Columns are split into panels of kPanel vectors (the last may be narrower); each is stored contiguously, k by k.
template <class T>
struct Packed {
  const T* data;
  int depth, width;

  SRCGCNN_INLINE const T* panel(int column) const { return data + int64_t(depth) * column; }
};

// Where element (k, column) of a matrix (depth, width) is stored.
template <class T>
SRCGCNN_INLINE int64_t packed_at(int depth, int width, int k, int column) {
  constexpr int P = kPanel * Simd<T>::width;
  const int first = column / P * P, wide = width - first < P ? width - first : P;
  return int64_t(depth) * first + int64_t(k) * wide + (column - first);
}

// Column c becomes scale * from[0..depth).
template <class T>
void pack_column(T* to, int depth, int width, int column, const T* from, T scale) {
  T* at = to + packed_at<T>(depth, width, 0, column);
  const int64_t stride = packed_at<T>(depth, width, 1, column) - packed_at<T>(depth, width, 0, column);
  for (int k = 0; k < depth; ++k) at[k * stride] = scale * from[k];
}

// Row k becomes from[0..width).
template <class T>
void pack_row(T* to, int depth, int width, int k, const T* from) {
  constexpr int P = kPanel * Simd<T>::width;
  for (int c = 0; c < width; c += P)
    memcpy(to + packed_at<T>(depth, width, k, c), from + c, (width - c < P ? width - c : P) * sizeof(T));
}

template <class T, int R, int NV>
SRCGCNN_INLINE void tile_nn(const T* a, int64_t lda, const T* b, int depth, T* c, int64_t ldc, const T* start,
                            bool accumulate) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width;
  V sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v)
      sum[r][v] = accumulate ? load(c + r * ldc + v * W) : start ? load(start + v * W) : V{};
  for (int k = 0; k < depth; ++k) {
    V w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load(b + k * NV * W + v * W);
    for (int r = 0; r < R; ++r) {
      const V x = splat(a[r * lda + k]);
      for (int v = 0; v < NV; ++v) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(c + r * ldc + v * W, sum[r][v]);
}

template <class T, int NV>
void panel_nn(const T* a, int64_t lda, const T* b, int depth, T* c, int64_t ldc, int64_t rows, const T* start,
              bool accumulate) {
  int64_t i = 0;
  for (; i + kTile <= rows; i += kTile)
    tile_nn<T, kTile, NV>(a + i * lda, lda, b, depth, c + i * ldc, ldc, start, accumulate);
  for (; i + 2 <= rows; i += 2) tile_nn<T, 2, NV>(a + i * lda, lda, b, depth, c + i * ldc, ldc, start, accumulate);
  for (; i < rows; ++i) tile_nn<T, 1, NV>(a + i * lda, lda, b, depth, c + i * ldc, ldc, start, accumulate);
}

// C (rows, width) = start + A (rows, depth) B, or C += A B. The columns of C may lie in groups: `group` columns to a row
// of ldc, and the next ones `group_stride` numbers on; `group` is the width or a multiple of a panel.
template <class T>
void gemm_nn(const T* a, int64_t lda, Packed<T> b, T* c, int64_t ldc, int64_t rows, const T* start, bool accumulate,
             int group = 1 << 30, int64_t group_stride = 0) {
  constexpr int W = Simd<T>::width;
  for (int x = 0; x < b.width; x += kPanel * W) {
    const T* from = start ? start + x : nullptr;
    T* to = c + x / group * group_stride + x % group;
    switch ((b.width - x) / W) {
      case 1: panel_nn<T, 1>(a, lda, b.panel(x), b.depth, to, ldc, rows, from, accumulate); break;
#if SRCGCNN_VECTOR_BYTES == 64
      case 2: panel_nn<T, 2>(a, lda, b.panel(x), b.depth, to, ldc, rows, from, accumulate); break;
      case 3: panel_nn<T, 3>(a, lda, b.panel(x), b.depth, to, ldc, rows, from, accumulate); break;
#endif
      default: panel_nn<T, kPanel>(a, lda, b.panel(x), b.depth, to, ldc, rows, from, accumulate);
    }
  }
}

template <class T, int R, int NV>
SRCGCNN_INLINE void tile_tn(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows) {
  using V = typename Simd<T>::V;
  constexpr int W = Simd<T>::width;
  V sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = load(c + r * ldc + v * W);
  for (int64_t k = 0; k < rows; ++k) {
    V w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load(b + k * ldb + v * W);
    for (int r = 0; r < R; ++r) {
      const V x = splat(a[k * lda + r]);
      for (int v = 0; v < NV; ++v) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) store(c + r * ldc + v * W, sum[r][v]);
}

template <class T, int NV>
void panel_tn(const T* a, int64_t lda, int depth, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows) {
  int r = 0;
  for (; r + kTile <= depth; r += kTile) tile_tn<T, kTile, NV>(a + r, lda, b, ldb, c + r * ldc, ldc, rows);
  for (; r + 2 <= depth; r += 2) tile_tn<T, 2, NV>(a + r, lda, b, ldb, c + r * ldc, ldc, rows);
  for (; r < depth; ++r) tile_tn<T, 1, NV>(a + r, lda, b, ldb, c + r * ldc, ldc, rows);
}

// C (depth, width) += A (rows, depth)^T B (rows, width).
template <class T>
void gemm_tn(const T* a, int64_t lda, int depth, const T* b, int64_t ldb, int width, T* c, int64_t ldc, int64_t rows) {
  constexpr int W = Simd<T>::width;
  for (int x = 0; x < width; x += kPanel * W) {
    switch ((width - x) / W) {
      case 1: panel_tn<T, 1>(a, lda, depth, b + x, ldb, c + x, ldc, rows); break;
#if SRCGCNN_VECTOR_BYTES == 64
      case 2: panel_tn<T, 2>(a, lda, depth, b + x, ldb, c + x, ldc, rows); break;
      case 3: panel_tn<T, 3>(a, lda, depth, b + x, ldb, c + x, ldc, rows); break;
#endif
      default: panel_tn<T, kPanel>(a, lda, depth, b + x, ldb, c + x, ldc, rows);
    }
  }
}

}  // namespace srcgcnn::SRCGCNN_LEVEL
