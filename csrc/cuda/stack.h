// Inference on the GPU: C linkage, device pointers, sizes, a stream. Functions return null, or CUDA's message.
#pragma once
#include <stdint.h>

namespace srcgcnn {

// A batch of graphs, edges sorted by receiver.
struct DeviceGraph {
  const float* distance;  // (E)
  const void* edge_term;  // (E, 2 width) = features w_e, stored as the plan says, or null: then from the distance
  const int32_t* sender;
  const int32_t* row_ptr;
  const int32_t* crystal_ptr;
  int64_t n_rows, n_edges, n_crystals;
  int32_t n_features;
  float dmin, inverse_step;
};

// One convolution with fixed statistics, as cpu/kernels.h has it.
struct DeviceLayer {
  const float *weight, *bias, *gamma1, *beta1, *gamma2, *beta2, *mean1, *var1, *mean2, *var2;
  double eps1, eps2;
};

// Features of the rows: (N, F), or with `species` (N) a table (n_table, F).
struct DeviceFeatures {
  const float* data;
  const int32_t* species;
  int64_t n_table;
};

// A linear map: weight (out, in), bias (out) or null.
struct DeviceDense {
  const float *weight, *bias;
};

enum DevicePrecision { kFloat32, kTf32, kBfloat16 };  // of products; the last also of what edges read
constexpr int kMostReadout = 16, kWidestReadout = 1024;

// What a call computes, and its sizes.
struct DevicePlan {
  int32_t F, n_steps, n_features;  // n_steps: at least 1; n_features: of an edge
  int32_t precision;               // DevicePrecision
  int32_t shared;                  // all steps have one weight
  int32_t n_table, n_atom;         // a table (n_table, n_atom) that an embedding makes (n_table, F); 0: there is none
  int32_t n_readout;               // linear maps after the mean over a crystal; 0: the mean leaves, -1: the rows leave
  int32_t readout[kMostReadout + 1];  // F, then what each gives
};

}  // namespace srcgcnn

// The kernels exist for the widths 32, 64 and 128, of which the last channels are zero where F is smaller.
// image: whether the kernels were built for the current device. prepared_size: numbers that `prepared` takes: the weights
// in the order of the tensor cores, then, from filter_at on, the filter (K, 2 width), scales and shifts, the embedded
// table, the readout. scratch_size: numbers of `scratch`. prepare: `table` goes through `embedding` where the plan has
// one. stack: out (N, F), or, with a readout, (B, O); with an embedding h is that of `prepared`, and h->data is not read.
#define SRCGCNN_STACK(W)                                                                                               \
  const char* srcgcnn_cuda_image_##W();                                                                                \
  int64_t srcgcnn_cuda_prepared_size_##W(const srcgcnn::DevicePlan* plan);                                             \
  int64_t srcgcnn_cuda_filter_at_##W(const srcgcnn::DevicePlan* plan);                                                 \
  const char* srcgcnn_cuda_scratch_size_##W(int64_t* size, const srcgcnn::DevicePlan* plan, int64_t n_rows,            \
                                           int64_t n_crystals);                                                        \
  const char* srcgcnn_cuda_prepare_##W(float* prepared, const srcgcnn::DevicePlan* plan,                               \
                                       const srcgcnn::DeviceLayer* layers, const float* table,                         \
                                       const srcgcnn::DeviceDense* embedding, const srcgcnn::DeviceDense* readout,     \
                                       const srcgcnn::DeviceGraph* graph, void* stream);                               \
  const char* srcgcnn_cuda_stack_##W(float* out, float* scratch, const srcgcnn::DeviceFeatures* h,                     \
                                     const float* row_weight, const float* prepared, const srcgcnn::DevicePlan* plan,  \
                                     const srcgcnn::DeviceGraph* graph, void* stream);
extern "C" {
SRCGCNN_STACK(32)
SRCGCNN_STACK(64)
SRCGCNN_STACK(128)
}
