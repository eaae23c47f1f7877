// Training on the GPU: the parts of a convolution that torch.mm does not do. C linkage, device pointers, sizes, a stream.
#pragma once
#include <stdint.h>

namespace srcgcnn {

// What one of the functions below takes; those it does not name may be null. N rows, E edges, F channels, K Gaussians,
// W = F rounded up to whole chunks of 32. Edges come by receiver (ptr, other = row_ptr, sender; number null), or by
// sender (ptr, other = col_ptr, receiver; number of each edge in the other order). ops/cuda_conv.py has the same order.
struct DeviceConv {
  const float* distance;  // (E), or null: then term and features are given
  const float* term;      // (E, 2W) = features w_e
  const float* features;  // (E, K)
  const int32_t *ptr, *other, *number;
  const float* pq;                // (N, 4W): x_ij = p_i + q_j + r_ij
  const float* filter;            // (W / 32, K / 8 up to whole, 8, 32, 2): w_e as the lanes of a product read it
  const float *gamma1, *beta1;    // (2F)
  const float *scale2, *shift2;   // (F)
  const float *mean2, *rstd2;     // (F)
  const float* h;                 // (N, F)
  const float* m;                 // (N, F)
  const float* grad;              // (N, F) of the output, or what `correct` corrects
  const float* d_m;               // (N, W)
  const float* x;                 // of `correct`
  const float *row_weight, *degree;  // (N)
  const float *a, *c1, *c2;
  float* out;
  float *out_m, *out_x, *out_degree, *out_gamma, *out_filter, *out_edge;
  int64_t n_rows, n_edges, n_features, F, width, programs, stride, columns;
  int64_t relaxed;  // one TF32 product, not three
  float dmin, inverse_step;
};

}  // namespace srcgcnn

// Functions return null, or CUDA's message. `programs` blocks share out the rows where partial sums are kept, a part of
// each, whatever the GPU: so bits do not depend on it. An index that leaves its array is not followed; its row becomes NaN.
//
// neighbor_sum   out (N, F) = sum_j h_j
// edge_sum       out (N, K) = sum of e over the edges of a row; with row_weight, each times that of its other end, and
//                out_degree (N) the sum of these
// edge_gram      out (programs, K, K): sums of w e^T e
// gate_sum       out_m (N, F) = m_i = sum_j sigmoid(y[:F]) softplus(y[F:]), y = gamma1 x + beta1; out (N, F) =
//                softplus(h + scale2 m + shift2); either may be null
// finish         out = softplus(h + scale2 m + shift2)
// finish_backward  out (N, F) = du, the gradient at the argument of that softplus; out_x (2, programs, F): sums of du and
//                of du (m - mean2) rstd2
// correct        out = a (grad - w (degree c1 + c2 (x - mean2) rstd2)): rows of `columns` numbers, `stride` apart, those
//                of x together; degree null: 1; mean2 null: x as it is
// backward_receivers  with dy = the gradient at y: out (N, 4F), its first two quarters: sum_j dy; out_x (N, 2F), or null:
//                sum_j x; out_gamma (programs, 2F): sums of dy x; out_filter (programs, K, 2F): sums of e dy; out_edge
//                (E, 2F), or null: dy
// backward_senders  out (N, 4F), its last two quarters: a (sum_i dy - degree c1 - c2 sum_i w_i x); row_weight null: no c
#define SRCGCNN_CONV_FUNCTIONS(DO)                                                                           \
  DO(neighbor_sum) DO(edge_sum) DO(edge_gram) DO(gate_sum) DO(finish) DO(finish_backward) DO(correct) \
  DO(backward_receivers) DO(backward_senders)
#define SRCGCNN_CONV(name) const char* srcgcnn_cuda_##name(const srcgcnn::DeviceConv* given, void* stream);
extern "C" {
SRCGCNN_CONV_FUNCTIONS(SRCGCNN_CONV)
}
