// sigmoid(f) * softplus(c) and its derivatives, once for scalars, SIMD vectors and CUDA, in base 2: the arguments are
// f2 = -f log2(e) and c2 = c log2(e), scalings that callers fold into their linear maps.
// M supplies the arithmetic of V: exp2 (right from -inf to max_exponent), log2_1p (argument in [0, 1]; log2_1p_fraction as a
// Fraction), reciprocal, abs, max0, at_most (a bound; at_most_alone where infinity would do, as its reciprocal is 0),
// tail(c2, t) = t, or 0 where c > 20 (PyTorch's threshold), select_nonnegative(c, a, b) = c >= 0 ? a : b, and the constants ln2
// and log2e of its scalar type; for the gate of exponentials also log2_1p_wide and log2_1p_wide_fraction, right for any finite
// argument that is not negative.
#pragma once

#ifdef __CUDACC__
#define SRCGCNN_INLINE __host__ __device__ __forceinline__
#else
#define SRCGCNN_INLINE inline __attribute__((always_inline))
#endif

namespace srcgcnn {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// softplus(c): right at both ends, c for large c and exp(c) for very negative c, without overflow. What is linear in c keeps
// its digits.
template <class M, class V>
SRCGCNN_INLINE V softplus(V c) {
  const V c2 = c * M::log2e;
  return M::max0(c) + M::log2_1p(M::tail(c2, M::exp2(-M::abs(c2)))) * M::ln2;
}

// A number as a fraction, so that the sigmoid that it is multiplied by shares its division.
template <class V>
struct Fraction {
  V over, under;
};

// sigmoid(f) softplus(c) / ln(2)
template <class M, class V>
SRCGCNN_INLINE V gate2(V f2, V c2) {
  const auto log = M::log2_1p_fraction(M::tail(c2, M::exp2(-M::abs(c2))));
  return (M::max0(c2) * log.under + log.over) * M::reciprocal(M::exp2(M::at_most_alone(f2)) * log.under + log.under);
}

// d softplus(c) / dc
template <class M, class V>
SRCGCNN_INLINE V softplus_slope2(V c2) {
  const V t = M::tail(c2, M::exp2(-M::abs(c2)));
  const V r = M::reciprocal(t + 1);
  return M::select_nonnegative(c2, r, t * r);
}

template <class V>
struct GateGradient {
  V d_filter, d_core;
};

// Derivatives with respect to f and c themselves. Both exponentials serve both; 1 - sigmoid is formed without
// cancellation.
template <class M, class V>
SRCGCNN_INLINE GateGradient<V> gate_gradient2(V f2, V c2) {
  const V u = M::exp2(M::at_most(f2));
  const V s = M::reciprocal(u + 1);
  const V t = M::tail(c2, M::exp2(-M::abs(c2)));
  const V softplus = (M::max0(c2) + M::log2_1p(t)) * M::ln2;
  const V r = M::reciprocal(t + 1);
  return {s * softplus * (u * s), s * M::select_nonnegative(c2, r, t * r)};
}

// The same gate and its derivatives from exponentials, u = 2^f2 and t = 2^c2, both finite. Where f2 and c2 are sums, the
// exponentials of their terms are formed once per term instead of once per sum.
template <class M, class V>
SRCGCNN_INLINE V gate_of_powers(V u, V t) {
  const auto log = M::log2_1p_wide_fraction(t);
  return log.over * M::reciprocal(u * log.under + log.under);
}

template <class M, class V>
SRCGCNN_INLINE GateGradient<V> gate_gradient_of_powers(V u, V t) {
  const V s = M::reciprocal(u + 1), r = M::reciprocal(t + 1);
  return {s * (M::log2_1p_wide(t) * M::ln2) * (u * s), s * (t * r)};
}

}  // namespace srcgcnn
