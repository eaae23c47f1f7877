// The CPU kernels as the binding sees them: pointers, sizes, threads. One table per SIMD level and scalar type.
#pragma once
#include <cstdint>

namespace srcgcnn {

// A batch of graphs, edges sorted by receiver. Edge vectors are `features` (n_edges, n_features), or, where that is
// null, the Gaussians exp(-((distance - dmin - k step) / step)^2).
template <class T>
struct Edges {
  const T* distance;
  const T* features;
  const int32_t* sender;
  const int32_t* row_ptr;
  const int32_t* crystal_ptr;
  int64_t n_rows, n_edges, n_crystals;
  int n_features;
  T dmin, step;
};

template <class T>
struct Kernels {
  // m (N, F) from p, q (N, 2F) and w_e (K, 2F): m_i = sum_j sigmoid(y[:F]) softplus(y[F:]), y = p_i + q_j + e_ij w_e.
  void (*gate_sum)(T* m, const T* p, const T* q, const T* w_e, const Edges<T>& edges, int width, int threads);
  // Gradients of the above at grad (N, F). dq must hold zeros; d_edge (per distance, or per feature) may be null.
  void (*gate_sum_backward)(T* dp, T* dq, T* dw_e, T* d_edge, const T* grad, const T* p, const T* q, const T* w_e,
                            const Edges<T>& edges, int width, int threads);
  // out (N, F): sums of h over the senders of each row, or (transposed) over its receivers.
  void (*neighbor_sum)(T* out, const T* h, const Edges<T>& edges, int width, bool transpose, int threads);
  // sum_j e_ij and sum_i w_i e_ij (N, K); sum_ij w_i e_ij^T e_ij (K, K), accumulated in double.
  void (*edge_moments)(T* by_receiver, T* by_sender, double* gram, const T* row_weight, const Edges<T>& edges,
                       int threads);
};

struct Level {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

#if defined(__x86_64__)
extern const Level level_v2, level_v3, level_v4;
#else
extern const Level level_portable;
#endif

}  // namespace srcgcnn
