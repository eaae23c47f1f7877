// Inference on the GPU: C linkage, device pointers, sizes, a stream. Functions return null, or CUDA's message.
#pragma once
#include <stdint.h>

namespace srcgcnn {

// A batch of graphs, edges sorted by receiver.
struct DeviceGraph {
  const float* distance;   // (E)
  const float* edge_term;  // (E, 2 width) = features w_e, or null: then from the distance
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

}  // namespace srcgcnn

// The kernels exist for the widths 32, 64 and 128, of which the last channels are zero where F is smaller.
// prepared_size: numbers that `prepared` takes: the weights in the order of the tensor cores, then, from filter_at on, the
// filter (K, 2 width), scales and shifts. With `shared` all steps have one weight. scratch_size: numbers of `scratch`.
// image: whether the kernels were built for the current device.
#define SRCGCNN_STACK(W)                                                                                               \
  const char* srcgcnn_cuda_image_##W();                                                                                \
  int64_t srcgcnn_cuda_prepared_size_##W(int n_features, int n_steps, bool shared);                                    \
  int64_t srcgcnn_cuda_filter_at_##W();                                                                                \
  const char* srcgcnn_cuda_scratch_size_##W(int64_t* size, int64_t n_rows);                                            \
  const char* srcgcnn_cuda_prepare_##W(float* prepared, const srcgcnn::DeviceLayer* layers, int n_steps, bool shared,  \
                                       int F, const srcgcnn::DeviceGraph* graph, void* stream);                        \
  const char* srcgcnn_cuda_stack_##W(float* out, float* scratch, const srcgcnn::DeviceFeatures* h,                     \
                                     const float* prepared, int n_steps, bool shared, int F, bool relaxed,             \
                                     const srcgcnn::DeviceGraph* graph, void* stream);
extern "C" {
SRCGCNN_STACK(32)
SRCGCNN_STACK(64)
SRCGCNN_STACK(128)
}
