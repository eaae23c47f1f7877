// Training on the GPU: the parts of a convolution that torch.mm does not do. C linkage, device pointers, sizes, a stream.
#pragma once
#include <stdint.h>

namespace srcgcnn {

// What one of the functions below takes; those it does not name may be null. N rows, E edges, F channels, K Gaussians,
// W = F rounded up to whole chunks of 32. Edges come by receiver (ptr, other = row_ptr, sender; number null), or by
// sender (ptr, other = col_ptr, receiver; number of each edge in the other order). ops/cuda_conv.py has the same order.
struct DeviceConv {
  const float* distance;  // (E), or null: then term and features are given
  const void* term;       // (E, 2W) = features w_e, stored as `half` says
  const float* features;  // (E, K)
  const int32_t *ptr, *other, *number;
  const void* pq;                 // (N, 4W): x_ij = p_i + q_j + r_ij, stored as `half` says
  const float* filter;            // (W / 32, K / 8 up to whole, 4, 2, 32, 4): w_e, high and low, as a product reads it
  const float *gamma1, *beta1;    // (2F)
  const float *weight, *bias;     // (2F, 2F + K), (2F) or null
  const float *mean1, *var1;      // (2F)
  const float *gamma2, *beta2;    // (F)
  const float *mean2, *var2;      // (F)
  const float* h;                 // (N, F)
  const float* m;                 // (N, F)
  const float* grad;              // (N, F) of the output, or what `correct` corrects
  const float* d_m;               // (N, W)
  const float* x;                 // of `correct`
  const float *row_weight, *degree;  // (N)
  const float *a, *c1, *c2;
  const float* count;                    // () by which c1 and c2 are divided, or null
  const float *by_receiver, *by_sender;  // (N, K): sum_j e_ij, sum_i w_i e_ij
  float* product;                        // (F, P), P = 3F + 2K + 2: the Gram matrix of gram.cuh
  const double* totals;                  // (3, F): sums over the parts of column_sums
  const double *e_sum, *e_gram;          // (K), (K, K): sums of w e and w e^T e
  float* out;
  float *out_m, *out_x, *out_degree, *out_gamma, *out_filter, *out_edge;
  // Of the functions that are a whole layer or what a graph needs: see below.
  const int32_t *receiver, *col_ptr;
  const int64_t* order;
  float *new_mean1, *new_var1, *new_mean2, *new_var2;      // statistics of the batch
  float* new_norm;  // (2, F): scale and shift of bn2, as the layer's output has them
  float *running_mean1, *running_var1, *running_mean2, *running_var2;  // those that move towards them, or null
  float *d_weight, *d_bias, *d_gamma1, *d_beta1, *d_gamma2, *d_beta2;
  int32_t *out_receiver, *out_number, *out_col_ptr;
  double *out_sum, *out_gram;
  void* space;
  int64_t n_rows, n_edges, n_features, F, width, programs, stride, columns;
  int64_t train1, train2;
  int64_t relaxed;  // one TF32 product, not three
  int64_t half;     // pq and term are bfloat16, not float32
  int64_t all;       // channels of the layer, of which F are at hand, from where gamma1, weight … point on
  int64_t m_stride;  // of the rows of d_m
  int64_t at_once;   // bytes of pq that a layer backward has at a time, if chunks of its channels can go one after the other
  float dmin, inverse_step;
  float eps;  // of bn2, where both norms take part
  float eps1, momentum1, momentum2;
};

}  // namespace srcgcnn

// Functions return null, or CUDA's message. `programs` blocks share out the rows where partial sums are kept, a part of
// each, whatever the GPU: so bits do not depend on it. An index that leaves its array is not followed; its row becomes NaN.
//
// edge_sum       out (N, K) = sum of e over the edges of a row; with row_weight, each times that of its other end, and
//                out_degree (N) the sum of these
// edge_gram      out (programs, K, K): sums of w e^T e
// column_sums    out (programs, 3, F): sums of w x, w x^2 and w over the rows of x (N, F); with out_x (F), less the mean of 64
//                rows, which goes there
// neighbors      out_x (F) = c, the mean of h_i over the edges of 64 rows; out (N, F) = sum_j (h_j - c); out_m (1 for 32 rows, at
//                most 1056): w degree of the rows of a block
// gate_sum       out_m (N, F) = m_i = sum_j sigmoid(y[:F]) softplus(y[F:]), y = gamma1 x + beta1; out (N, F) =
//                softplus(h + bn2(m)); either may be null
// finish         out = softplus(h + bn2(m)), out_m, out_x (F): mean and biased variance of m, from totals (of m less x)
// finish_backward  out (N, F) = du, the gradient at h + bn2(m), out_m (N, W) = scale du or null; out_x (programs, 4, F): sums
//                of du, of du times m normalised, of w and of w times the row's edges
// correct        out = a (grad - w (degree c1 + c2 x)): rows of `columns` numbers, `stride` apart;
//                degree null: the row's edges by ptr, or 1; c1 null: a grad. With var2 x is normalised first, a is the scale of
//                bn2, rows of grad and x are together, and out gets zeros up to its stride
// backward_receivers  with dy = the gradient at y: out (N, 4F), its first two quarters: sum_j dy; out_x, or null: likewise
//                sum_j x; out_gamma (programs, 2, 2F): sums of dy x and of dy; out_filter (programs, K, 2F): sums of e dy; out_edge
//                (E, 2F), or null: dy
// backward_senders  out (N, 4F), its last two quarters: a (sum_i dy - degree c1 - c2 sum_i w_i x); row_weight null: no c
//
// The others launch several kernels, in a space that srcgcnn_cuda_space asks for.
//
// edge_moments   degree = out_degree (N), out, out_x (N, K): edge_sum by sender, by receiver, by sender; out_sum (3, K): sums over
//                rows, of which the first is that of w e; out_gram (K, K)
// transpose      out_receiver, out_number (E), out_col_ptr (N + 1): the edges by sender, from `order`, which sorts them, and
//                `other`, their senders in this order
// table_sums     out (E, F) of a table of E rows: for each the sum of the rows of grad (N, F) that it stands for, those whose number
//                `other` (N) is its own; others are left out; out_x (programs, E, F) is for parts of the sums
// mean           out (B, F): the mean of the rows x (E, F) of each of B = n_rows crystals, whose first rows are ptr, by row_weight;
//                0 where these are 0, as in what a batch is padded with
// mean_backward  out (E, F): the gradient at x from grad (B, F), NaN at rows of no crystal
// linear         out = pq, out_x = term, out_filter = filter, out_edge (K, 2F) = w_e rstd: what x of an edge follows from
// features       out (N, F): h, or of a table h (E, F) the rows `other` (N), after `columns` steps h <- softplus(h + scale m + shift)
//                with m (steps, N, F) and scale and shift a (steps, 2, F); those that a backward needs of its forward
// layer          out, out_m (N, F): softplus(h + bn2(m)), which may take the place of h, and m; new_norm; with train1 new_mean1,
//                new_var1 and product (F, P), with train2 new_mean2, new_var2, and moved running ones
// layer_backward d_h = out (N, F), which may take the place of grad, d_weight … d_beta2 from grad, h, m, the statistics used and
//                product (null: made again);
//                out_edge (E, 2F), or null: dy
#define SRCGCNN_CONV_FUNCTIONS(DO)                                                                               \
  DO(edge_sum) DO(edge_gram) DO(column_sums) DO(neighbors) DO(gate_sum) DO(finish) DO(finish_backward)           \
  DO(correct) DO(backward_receivers) DO(backward_senders) DO(edge_moments) DO(transpose) DO(mean)                \
  DO(mean_backward) DO(table_sums) DO(linear) DO(features) DO(layer) DO(layer_backward)
#define SRCGCNN_CONV(name) const char* srcgcnn_cuda_##name(const srcgcnn::DeviceConv* given, void* stream);
extern "C" {
SRCGCNN_CONV_FUNCTIONS(SRCGCNN_CONV)
// Bytes of the space that edge_moments (0), layer (1), layer_backward (2) or linear (3) take.
int64_t srcgcnn_cuda_space(const srcgcnn::DeviceConv* given, int which);
}
