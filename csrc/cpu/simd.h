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
  return x - typename Simd<T>::V{};  // x itself, which 0 + x of a negative zero is not: the sum would be formed
}

// The arithmetic that gate.h asks for.
struct MathF32 {
  typedef Simd<float>::I I;
  static constexpr float ln2 = float(kLn2), log2e = float(kLog2e);
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
  static SRCGCNN_INLINE F32 at_most_alone(F32 x) { return at_most(x); }
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

  // The same as a fraction, without its factor t over the line: relative error 4.3e-8 before rounding.
  static SRCGCNN_INLINE Fraction<F32> log2_1p_per_t(F32 t) {
    F32 over = F32{} - 3.4501634e-03f;
    over = over * t + 6.223892e-02f;
    over = over * t + 1.0480007f;
    over = over * t + 1.442695f;
    F32 under = F32{} + 3.2306895e-01f;
    under = under * t + 1.2264156f;
    under = under * t + 1.0f;
    return {over, under};
  }
  static SRCGCNN_INLINE Fraction<F32> log2_1p_fraction(F32 t) {
    const auto y = log2_1p_per_t(t);
    return {y.over * t, y.under};
  }

  // log2(1 + t) for t in [0, 2^125]; what the sum 1 + t loses to rounding is added back, so small t keep their digits.
#if SRCGCNN_VECTOR_BYTES == 64
  // 1 + t = 2^e m; m is brought near 1 by a factor from a table of 32, kept in registers, whose logarithm is known. The
  // first factor is 1, so that nothing cancels near t = 0. Relative error 8e-9 before rounding.
  static SRCGCNN_INLINE F32 log2_1p_wide(F32 t) {
    alignas(64) static constexpr float factor[32] = {
        1.0f, 0.95539242f, 0.927651346f, 0.901281774f, 0.87694639f, 0.853185833f, 0.831251144f, 0.810273588f,
        0.79007715f, 0.770989299f, 0.7531358f, 0.73562789f, 0.719132662f, 0.703082919f, 0.688240647f, 0.673566699f,
        0.659904778f, 0.646638274f, 0.633625805f, 0.62148422f, 0.609453261f, 0.598243952f, 0.587117136f, 0.576604724f,
        0.566221654f, 0.556342959f, 0.546850145f, 0.537727296f, 0.528929532f, 0.520186424f, 0.511869788f, 0.504023492f};
    alignas(64) static constexpr float logarithm[32] = {  // -log2 of the factor, which was chosen so that it is a float
        0.0f, 0.0658346638f, 0.108345419f, 0.149949878f, 0.189439446f, 0.229068086f, 0.266643673f, 0.303518981f,
        0.339934558f, 0.375217259f, 0.40901807f, 0.442951918f, 0.475670159f, 0.508233249f, 0.539014995f, 0.570107281f,
        0.599670231f, 0.628969193f, 0.658297002f, 0.686210334f, 0.71441251f, 0.741194189f, 0.768279731f, 0.794345438f,
        0.820561171f, 0.845953584f, 0.870782554f, 0.895053387f, 0.918852568f, 0.942899346f, 0.966151237f, 0.988437116f};
    const __m512 x = (__m512)(t + 1.0f);
    const __m512i place = _mm512_srli_epi32((__m512i)x, 18);  // the five leading bits of the mantissa count
    const __m512 c = _mm512_permutex2var_ps(_mm512_load_ps(factor), place, _mm512_load_ps(factor + 16));
    const __m512 l = _mm512_permutex2var_ps(_mm512_load_ps(logarithm), place, _mm512_load_ps(logarithm + 16));
    const __m512 one = _mm512_set1_ps(1.0f), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    // m - 1; where e = 0 that is t itself, without what the sum loses to rounding.
    const __m512 rest = _mm512_mask_sub_ps((__m512)t, _mm512_cmp_ps_mask(x, _mm512_set1_ps(2.0f), _CMP_GE_OQ), m, one);
    const F32 r = (F32)_mm512_fmadd_ps(rest, c, _mm512_sub_ps(c, one));
    F32 p = F32{} - 3.520099046e-01f;
    p = p * r + 4.809535217e-01f;
    p = p * r - 7.213493833e-01f;
    p = p * r + 1.442695038e+00f;
    return p * r + ((F32)_mm512_getexp_ps(x) + (F32)l);
  }
  static SRCGCNN_INLINE Fraction<F32> log2_1p_wide_fraction(F32 t) {
    return {log2_1p_wide(t), F32{} + 1.0f};
  }
#else
  struct Parts {
    F32 exponent, rest;
  };
  // 1 + t = 2^exponent (1 + rest); where the exponent is 0 the rest is t itself. A NaN stays one.
  static SRCGCNN_INLINE Parts parts_of_1p(F32 t) {
    const F32 x = t + 1.0f;
    const F32 mantissa = (F32)(((I)x & 0x7fffff) | 0x3f800000);
    return {__builtin_convertvector(((I)x >> 23) - 127, F32), x >= 2.0f ? mantissa - 1.0f : t};
  }
  static SRCGCNN_INLINE F32 log2_1p_wide(F32 t) {
    const auto x = parts_of_1p(t);
    return x.exponent + log2_1p(x.rest);
  }
  static SRCGCNN_INLINE Fraction<F32> log2_1p_wide_fraction(F32 t) {
    const auto x = parts_of_1p(t);
    const auto y = log2_1p_per_t(x.rest);
    return {y.over * x.rest + x.exponent * y.under, y.under};
  }
#endif

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
  static constexpr double ln2 = kLn2, log2e = kLog2e;
  static constexpr double max_exponent = 1022.0;

  static SRCGCNN_INLINE F64 abs(F64 x) { return (F64)((I)x & INT64_MAX); }
  static SRCGCNN_INLINE F64 max(F64 a, F64 b) { return a > b ? a : b; }
  static SRCGCNN_INLINE F64 min(F64 a, F64 b) { return a < b ? a : b; }
  static SRCGCNN_INLINE F64 max0(F64 x) { return max(F64{}, x); }
  static SRCGCNN_INLINE F64 at_most(F64 x) { return min(F64{} + max_exponent, x); }
  static SRCGCNN_INLINE F64 at_most_alone(F64 x) { return at_most(x); }
  static SRCGCNN_INLINE F64 tail(F64 c2, F64 t) { return c2 > 20 * kLog2e ? F64{} : t; }
  static SRCGCNN_INLINE F64 select_nonnegative(F64 c, F64 a, F64 b) { return c >= 0 ? a : b; }

  // exp(r ln 2) by Taylor to degree 13 after reduction: below one unit in the last place before rounding.
  static SRCGCNN_INLINE F64 exp2(F64 x) {
    x = x < -max_exponent ? F64{} - max_exponent : x;  // what is no number stays so
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

  static SRCGCNN_INLINE Fraction<F64> log2_1p_fraction(F64 t) { return {log2_1p(t), F64{} + 1.0}; }

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
class [[maybe_unused]] FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (1u << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace srcgcnn::SRCGCNN_LEVEL
