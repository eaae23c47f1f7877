// CUDA launchers: C linkage, device pointers, sizes and the stream. nullptr on success, else CUDA's message.
#pragma once
#include <cuda_runtime.h>

extern "C" const char* srcgcnn_cuda_gate_sum(float* m, const float* p, const float* q, const float* w_e,
                                             const float* distance, const int* sender, const int* row_ptr,
                                             long long n_rows, int n_features, float dmin, float step, int width,
                                             cudaStream_t stream);
