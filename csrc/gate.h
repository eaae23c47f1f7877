// sigmoid(f) * softplus(c) and its derivatives, once for scalars, SIMD vectors and CUDA.
// M supplies the arithmetic of V: exp, log1p_unit (argument in [0, 1]), reciprocal, abs, max0,
// select_nonnegative(c, a, b) = c >= 0 ? a : b.
#pragma once

#ifdef __CUDACC__
#define SRCGCNN_INLINE __host__ __device__ __forceinline__
#else
#define SRCGCNN_INLINE inline __attribute__((always_inline))
#endif

namespace srcgcnn {

template <class V>
struct GateGradient {
  V value, d_filter, d_core;
};

template <class M, class V>
SRCGCNN_INLINE V sigmoid(V f) {
  return M::reciprocal(M::exp(-f) + 1);
}

// Right at both ends: c for large c, exp(c) for very negative c, no overflow.
template <class M, class V>
SRCGCNN_INLINE V softplus(V c) {
  return M::max0(c) + M::log1p_unit(M::exp(-M::abs(c)));
}

template <class M, class V>
SRCGCNN_INLINE V gate(V f, V c) {
  return sigmoid<M>(f) * softplus<M>(c);
}

// Both exponentials serve the value and the derivatives; 1 - sigmoid(f) is formed without cancellation.
template <class M, class V>
SRCGCNN_INLINE GateGradient<V> gate_gradient(V f, V c) {
  const V u = M::exp(-f);
  const V s = M::reciprocal(u + 1);
  const V t = M::exp(-M::abs(c));
  const V value = s * (M::max0(c) + M::log1p_unit(t));
  const V r = M::reciprocal(t + 1);
  return {value, value * u * s, s * M::select_nonnegative(c, r, t * r)};
}

}  // namespace srcgcnn
