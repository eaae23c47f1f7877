// m_i = sum_j sigmoid(y_ij[:F]) softplus(y_ij[F:]), y_ij = p_i + q_j + e_ij w_e. One block a row, one thread a channel;
// edges are summed in order, without atomics.
#include "gate_sum.h"

#include "../gate.h"

namespace {

struct DeviceMath {
  static __device__ __forceinline__ float exp2(float x) { return exp2f(x); }
  static __device__ __forceinline__ float log2_1p(float t) { return log1pf(t) * float(srcgcnn::kLog2e); }
  static __device__ __forceinline__ float reciprocal(float x) { return __frcp_rn(x); }
  static __device__ __forceinline__ float abs(float x) { return fabsf(x); }
  static __device__ __forceinline__ float max0(float x) { return x > 0.0f ? x : 0.0f; }
  static __device__ __forceinline__ float tail(float, float t) { return t; }
  static __device__ __forceinline__ float at_most(float x) { return fminf(x, 126.0f); }
};

constexpr int kReach = 9;  // Gaussians in reach of a distance; those left out are below 2e-9

__global__ void gate_sum_kernel(float* __restrict__ m, const float* __restrict__ p, const float* __restrict__ q,
                                const float* __restrict__ w_e, const float* __restrict__ distance,
                                const int* __restrict__ sender, const int* __restrict__ row_ptr, int n_features,
                                float dmin, float inverse_step, int width) {
  const long long row = blockIdx.x;
  const int begin = row_ptr[row], end = row_ptr[row + 1];
  const int count = n_features < kReach ? n_features : kReach;
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    const float* p_i = p + row * 2 * width;
    float sum = 0.0f;
    for (int e = begin; e < end; ++e) {
      const float u = (distance[e] - dmin) * inverse_step;
      const float lowest = fminf(fmaxf(u + 0.5f - kReach / 2, 0.0f), float(n_features - count));
      const int first = int(lowest);
      const float* q_j = q + (long long)sender[e] * 2 * width;
      float f = p_i[c] + q_j[c], s = p_i[width + c] + q_j[width + c];
      for (int k = first; k < first + count; ++k) {
        const float x = u - k;
        const float a = __expf(-x * x);
        f = fmaf(a, w_e[(long long)k * 2 * width + c], f);
        s = fmaf(a, w_e[(long long)k * 2 * width + width + c], s);
      }
      sum += srcgcnn::gate2<DeviceMath>(f * float(-srcgcnn::kLog2e), s * float(srcgcnn::kLog2e));
    }
    m[row * width + c] = sum * float(srcgcnn::kLn2);
  }
}

}  // namespace

extern "C" const char* srcgcnn_cuda_gate_sum(float* m, const float* p, const float* q, const float* w_e,
                                             const float* distance, const int* sender, const int* row_ptr,
                                             long long n_rows, int n_features, float dmin, float step, int width,
                                             cudaStream_t stream) {
  if (n_rows == 0) return nullptr;
  const int threads = width < 256 ? (width + 31) / 32 * 32 : 256;
  gate_sum_kernel<<<static_cast<unsigned>(n_rows), threads, 0, stream>>>(m, p, q, w_e, distance, sender, row_ptr,
                                                                         n_features, dmin, 1.0f / step, width);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
