// Vectors of one SIMD level and their transcendentals, on the compiler's vector extensions (gcc, clang; any processor).
#pragma once
#include <cstdint>

#include "../gate.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SRCGCNN_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SRCGCNN_VECTOR_BYTES 32
#else
#define SRCGCNN_VECTOR_BYTES 16
#endif

namespace srcgcnn::SRCGCNN_LEVEL {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(SRCGCNN_VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(SRCGCNN_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(SRCGCNN_VECTOR_BYTES)));
  static constexpr int width = SRCGCNN_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(SRCGCNN_VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(SRCGCNN_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(SRCGCNN_VECTOR_BYTES)));
  static constexpr int width = SRCGCNN_VECTOR_BYTES / 8;
};

using F32 = Simd<float>::V;
using F64 = Simd<double>::V;

template <class T>
SRCGCNN_INLINE typename Simd<T>::V load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}
template <class T>
SRCGCNN_INLINE void store(T* p, typename Simd<T>::V v) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}
template <class T>
SRCGCNN_INLINE typename Simd<T>::V splat(T x) {
  return typename Simd<T>::V{} + x;
}

// The arithmetic that gate.h asks for.
struct MathF32 {
  typedef Simd<float>::I I;
  static constexpr float ln2 = float(kLn2);
  static constexpr float max_exponent = 126.0f;

  static SRCGCNN_INLINE F32 abs(F32 x) { return (F32)((I)x & 0x7fffffff); }
  // The greater and the smaller one, b where either is not a number: one instruction, which gcc does not find.
  static SRCGCNN_INLINE F32 max(F32 a, F32 b) {
#if SRCGCNN_VECTOR_BYTES == 64
    return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif SRCGCNN_VECTOR_BYTES == 32
    return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (F32)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
  }
  static SRCGCNN_INLINE F32 min(F32 a, F32 b) {
#if SRCGCNN_VECTOR_BYTES == 64
    return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#elif SRCGCNN_VECTOR_BYTES == 32
    return (F32)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (F32)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
  }
  static SRCGCNN_INLINE F32 max0(F32 x) { return max(F32{}, x); }
  static SRCGCNN_INLINE F32 at_most(F32 x) { return min(F32{} + max_exponent, x); }
  static SRCGCNN_INLINE F32 tail(F32, F32 t) { return t; }  // the difference is below float's resolution
  static SRCGCNN_INLINE F32 select_nonnegative(F32 c, F32 a, F32 b) { return c >= 0 ? a : b; }

  // Relative error 2e-9 before rounding; results below 2^-126 are zero.
  static SRCGCNN_INLINE F32 exp2(F32 x) {
#if SRCGCNN_VECTOR_BYTES == 64
    const F32 r = (F32)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x); scalef takes the floor itself
    F32 p = F32{} + 2.170225546e-04f;
    p = p * r + 1.243968783e-03f;
    p = p * r + 9.678840996e-03f;
    p = p * r + 5.548334198e-02f;
    p = p * r + 2.402298363e-01f;
    p = p * r + 6.931469838e-01f;
    p = p * r + 1.0f;
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    x = at_most(max(F32{} - max_exponent, x));
    const F32 magic = F32{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const F32 shifted = x + magic;
    const F32 r = x - (shifted - magic);
    F32 p = F32{} + 1.534581201e-04f;
    p = p * r + 1.339993122e-03f;
    p = p * r + 9.618488957e-03f;
    p = p * r + 5.550328777e-02f;
    p = p * r + 2.402264689e-01f;
    p = p * r + 6.931472057e-01f;
    p = p * r + 1.0f;
    return (F32)((I)p + (((I)shifted - (I)magic) << 23));
#endif
  }

  // log2(1 + t), relative error 3e-8 before rounding.
  static SRCGCNN_INLINE F32 log2_1p(F32 t) {
    F32 p = F32{} + 7.549182125e-03f;
    p = p * t - 4.256706190e-02f;
    p = p * t + 1.128561932e-01f;
    p = p * t - 1.971189698e-01f;
    p = p * t + 2.756414122e-01f;
    p = p * t - 3.584084724e-01f;
    p = p * t + 4.806929573e-01f;
    p = p * t - 7.213402080e-01f;
    p = p * t + 1.442694997e+00f;
    return p * t;
  }

  // log2(1 + t) for t in [0, 2^125]; what the sum 1 + t loses to rounding is added back, so small t keep their digits.
  static SRCGCNN_INLINE F32 log2_1p_wide(F32 t, F32 inverse) {
    const F32 x = t + 1.0f;
    const F32 lost = (t - (x - 1.0f)) * inverse;
#if SRCGCNN_VECTOR_BYTES == 64
    const F32 exponent = (F32)_mm512_getexp_ps((__m512)x);
    const F32 mantissa = (F32)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
#else
    const F32 exponent = __builtin_convertvector(((I)x >> 23) - 127, F32);
    const F32 mantissa = (F32)(((I)x & 0x7fffff) | 0x3f800000);
#endif
    return lost * float(kLog2e) + (exponent + log2_1p(mantissa - 1.0f));
  }

  static SRCGCNN_INLINE F32 reciprocal_estimate(F32 x) {
#if SRCGCNN_VECTOR_BYTES == 64
    return (F32)_mm512_rcp14_ps((__m512)x);
#else
    return 1.0f / x;
#endif
  }

  static SRCGCNN_INLINE F32 reciprocal(F32 x) {
#if SRCGCNN_VECTOR_BYTES == 64
    const F32 y = (F32)_mm512_rcp14_ps((__m512)x);  // 14 bits, doubled by one Newton step
    return y + y * (1.0f - x * y);
#else
    return 1.0f / x;
#endif
  }
};

struct MathF64 {
  typedef Simd<double>::I I;
  static constexpr double ln2 = kLn2;
  static constexpr double max_exponent = 1022.0;

  static SRCGCNN_INLINE F64 abs(F64 x) { return (F64)((I)x & INT64_MAX); }
  static SRCGCNN_INLINE F64 max(F64 a, F64 b) { return a > b ? a : b; }
  static SRCGCNN_INLINE F64 min(F64 a, F64 b) { return a < b ? a : b; }
  static SRCGCNN_INLINE F64 max0(F64 x) { return max(F64{}, x); }
  static SRCGCNN_INLINE F64 at_most(F64 x) { return min(F64{} + max_exponent, x); }
  static SRCGCNN_INLINE F64 tail(F64 c2, F64 t) { return c2 > 20 * kLog2e ? F64{} : t; }
  static SRCGCNN_INLINE F64 select_nonnegative(F64 c, F64 a, F64 b) { return c >= 0 ? a : b; }

  // exp(r ln 2) by Taylor to degree 13 after reduction: below one unit in the last place before rounding.
  static SRCGCNN_INLINE F64 exp2(F64 x) {
    x = x > -max_exponent ? x : F64{} - max_exponent;
    const F64 magic = F64{} + 6755399441055744.0;  // 1.5 * 2^52
    const F64 shifted = x + magic;
    const F64 r = (x - (shifted - magic)) * kLn2;
    F64 p = F64{} + 1.0 / 6227020800.0;
    constexpr double inverse_factorial[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                                            1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,     1.0 / 120.0,
                                            1.0 / 24.0,        1.0 / 6.0,        0.5,             1.0,
                                            1.0};
    for (double c : inverse_factorial) p = p * r + c;
    return (F64)((I)p + (((I)shifted - (I)magic) << 52));
  }

  // log2(1 + t) as 2 artanh(t / (2 + t)) log2(e); the series is cut at 2e-18.
  static SRCGCNN_INLINE F64 log2_1p(F64 t) {
    const F64 s = t / (t + 2.0);
    const F64 s2 = s * s;
    F64 p = F64{} + 1.0 / 33.0;
    for (int k = 15; k >= 0; --k) p = p * s2 + 1.0 / (2 * k + 1);
    return (2.0 * kLog2e) * s * p;
  }

  static SRCGCNN_INLINE F64 reciprocal(F64 x) { return 1.0 / x; }
};

template <class T>
struct MathOf;
template <>
struct MathOf<float> {
  using M = MathF32;
};
template <>
struct MathOf<double> {
  using M = MathF64;
};

// Denormal numbers cost a hundred cycles each: treat them as zero while a kernel runs, and leave the thread as it was.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace srcgcnn::SRCGCNN_LEVEL
