// Vectors of one SIMD level and their transcendentals, on the compiler's vector extensions (gcc, clang; any processor).
#pragma once
#include <cstdint>

#include "../gate.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define SRCGCNN_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SRCGCNN_VECTOR_BYTES 32
#else
#define SRCGCNN_VECTOR_BYTES 16
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
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
struct VectorMath {
#define SRCGCNN_VECTOR_HELPERS(V, I, SIGN)                                        \
    static SRCGCNN_INLINE V abs(V x) { return (V)((I)x & ~(SIGN)); }                      \
    static SRCGCNN_INLINE V max0(V x) { return x > 0 ? x : V{}; }                         \
    static SRCGCNN_INLINE V select_nonnegative(V c, V a, V b) { return c >= 0 ? a : b; }
  SRCGCNN_VECTOR_HELPERS(F32, Simd<float>::I, (Simd<float>::I{} + INT32_MIN))
  SRCGCNN_VECTOR_HELPERS(F64, Simd<double>::I, (Simd<double>::I{} + INT64_MIN))
#undef SRCGCNN_VECTOR_HELPERS

  // exp on [-87, 88], relative error 3e-8 before rounding; the argument is clamped there, so no result is denormal.
  static SRCGCNN_INLINE F32 exp(F32 x) {
    x = x < -87.0f ? F32{} - 87.0f : x;
    x = x > 88.0f ? F32{} + 88.0f : x;
    const F32 magic = F32{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const F32 shifted = x * 1.44269504f + magic;
    const F32 n = shifted - magic;
    F32 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F32 p = F32{} + 1.383683560e-03f;
    p = p * r + 8.374824057e-03f;
    p = p * r + 4.166822619e-02f;
    p = p * r + 1.666642007e-01f;
    p = p * r + 4.999999208e-01f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    typedef Simd<float>::I I;
    return (F32)((I)p + (((I)shifted - (I)magic) << 23));
  }

  // log(1 + t) for t in [0, 1], relative error 5e-9 before rounding.
  static SRCGCNN_INLINE F32 log1p_unit(F32 t) {
    F32 p = F32{} - 3.244025177e-03f;
    p = p * t + 1.985146236e-02f;
    p = p * t - 5.695953425e-02f;
    p = p * t + 1.060365488e-01f;
    p = p * t - 1.530559257e-01f;
    p = p * t + 1.967593926e-01f;
    p = p * t - 2.495413366e-01f;
    p = p * t + 3.332996242e-01f;
    p = p * t - 4.999990242e-01f;
    p = p * t + 9.999999953e-01f;
    return p * t;
  }

  static SRCGCNN_INLINE F32 reciprocal(F32 x) {
#if SRCGCNN_VECTOR_BYTES == 64
    const F32 y = (F32)_mm512_rcp14_ps((__m512)x);  // 14 bits, doubled by one Newton step
    return y + y * (1.0f - x * y);
#else
    return 1.0f / x;
#endif
  }

  // exp on [-708, 709], Taylor to degree 13 after reduction: below one unit in the last place before rounding.
  static SRCGCNN_INLINE F64 exp(F64 x) {
    x = x < -708.0 ? F64{} - 708.0 : x;
    x = x > 709.0 ? F64{} + 709.0 : x;
    const F64 magic = F64{} + 6755399441055744.0;  // 1.5 * 2^52
    const F64 shifted = x * 1.4426950408889634 + magic;
    const F64 n = shifted - magic;
    F64 r = x - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    F64 p = F64{} + 1.0 / 6227020800.0;
    constexpr double inverse_factorial[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                                            1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,     1.0 / 120.0,
                                            1.0 / 24.0,        1.0 / 6.0,        0.5,             1.0,
                                            1.0};
    for (double c : inverse_factorial) p = p * r + c;
    typedef Simd<double>::I I;
    return (F64)((I)p + (((I)shifted - (I)magic) << 52));
  }

  // log(1 + t) for t in [0, 1] as 2 artanh(t / (2 + t)); the series is cut at 2e-18.
  static SRCGCNN_INLINE F64 log1p_unit(F64 t) {
    const F64 s = t / (t + 2.0);
    const F64 s2 = s * s;
    F64 p = F64{} + 1.0 / 33.0;
    for (int k = 15; k >= 0; --k) p = p * s2 + 1.0 / (2 * k + 1);
    return 2.0 * s * p;
  }

  static SRCGCNN_INLINE F64 reciprocal(F64 x) { return 1.0 / x; }
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
