// Vectors of W floats, and the few operations the ops need on them.
//
// Built on gcc's vector extensions (clang lacks __builtin_shuffle), so one source serves every instruction set: W lanes is
// what the flags of the including file allow. Intrinsics appear only where the compiler cannot find the
// instruction. Everything is in an unnamed namespace: the same source is compiled once per instruction set, and
// the linker must never merge an AVX-512 copy into the portable one. For the same reason no std:: templates here.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F32 __attribute__((vector_size(W * 4)));
typedef int32_t I32 __attribute__((vector_size(W * 4)));
typedef uint32_t U32 __attribute__((vector_size(W * 4)));
typedef uint16_t U16 __attribute__((vector_size(W * 2)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class V> INLINE V load_as(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> INLINE void store_as(void* p, V v) { memcpy(p, &v, sizeof v); }

INLINE F32 splat(float x) { return x - F32{}; }
INLINE I32 iota() {
  I32 v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}
INLINE F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE float sum_lanes(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int half = W / 2; half > 0; half /= 2) v += __builtin_shuffle(v, iota() ^ half);
  return v[0];
#endif
}
INLINE float max_lanes(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  for (int half = W / 2; half > 0; half /= 2) v = max(v, __builtin_shuffle(v, iota() ^ half));
  return v[0];
#endif
}

// ---- element types: load W elements as floats, store W floats rounded to nearest even

INLINE F32 load(const float* p) { return load_as<F32>(p); }
INLINE void store(float* p, F32 v) { store_as(p, v); }

INLINE F32 load(const bf16* p) { return (F32)(__builtin_convertvector(load_as<U16>(p), U32) << 16); }

INLINE U16 to_bf16(F32 v) {
#if defined(__AVX512BF16__)
  return (U16)_mm512_cvtneps_pbh((__m512)v);
#else
  U32 u = (U32)v;
  U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  U32 is_nan = (U32)((u & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((is_nan & ((u >> 16) | 0x40)) | (~is_nan & rounded), U16);
#endif
}
INLINE void store(bf16* p, F32 v) { store_as(p, to_bf16(v)); }

INLINE F32 load(const fp16* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // Exponent and mantissa move up by 13 bits; the product with 2^112 corrects the exponent's bias and also
  // gives subnormals their value. Infinities and NaNs come out of it as 2^16 or more and get the top exponent.
  U32 h = __builtin_convertvector(load_as<U16>(p), U32);
  F32 magnitude = (F32)((h & 0x7fff) << 13) * 0x1p112f;
  U32 special = (U32)(magnitude >= 65536.0f) & 0x7f800000;
  return (F32)((U32)magnitude | special | ((h & 0x8000) << 16));
#endif
}
INLINE void store(fp16* p, F32 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  U32 u = (U32)v, sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  U32 normal = (a + 0xfff + ((a >> 13) & 1) - 0x38000000) >> 13;
  // Adding 0.5 lines the bits of a small value up with those of a subnormal half; the adder does the rounding.
  U32 subnormal = (U32)((F32)a + 0.5f) - 0x3f000000;
  U32 is_small = (U32)(a < 0x38800000), is_big = (U32)(a >= 0x477ff000), is_nan = (U32)(a > 0x7f800000);
  U32 h = (is_small & subnormal) | (~is_small & normal);
  h = (is_big & 0x7c00) | (~is_big & h);
  h = h | (is_nan & 0x0200);
  store_as(p, __builtin_convertvector(h | sign, U16));
#endif
}

// The last n < W elements of a row; absent lanes are zero.
template <class T> INLINE F32 load_part(const T* p, int n) {
  T part[W] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T> INLINE void store_part(T* p, F32 v, int n) {
  T part[W];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

// Calls f(offset, n) over [0, size): n == W for whole vectors, less for the last part.
template <class F> INLINE void for_each_vector(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, W);
  if (i < size) f(i, (int)(size - i));
}
template <class T> INLINE F32 load(const T* p, int n) { return n == W ? load(p) : load_part(p, n); }
template <class T> INLINE void store(T* p, F32 v, int n) {
  if (n == W) store(p, v);
  else store_part(p, v, n);
}

// ---- functions

// 2^x to 2 ulp for x < 128; 0 below -126; NaN stays NaN.
INLINE F32 exp2_vec(F32 x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  F32 shifted = x + kRound;
  F32 f = x - (shifted - kRound);
  F32 p = 1.5353362e-4f * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022647e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  F32 power = (F32)(((U32)shifted << 23) + 0x3f800000u);
  return x < -126.0f ? F32{} : p * power;
}
INLINE F32 exp_vec(F32 x) { return exp2_vec(x * 1.44269504f); }

INLINE F32 tanh_vec(F32 x) {
  // Near 0, where 1 - 2 / (e^2x + 1) cancels, the Taylor series.
  F32 square = x * x;
  F32 series = x + x * square * (-0.33333333f + square * (0.13333333f + square * (-0.053968254f + square * 0.021869489f)));
  F32 clamped = x > 20.0f ? splat(20.0f) : x < -20.0f ? splat(-20.0f) : x;
  F32 far = 1.0f - 2.0f / (exp_vec(2.0f * clamped) + 1.0f);
  return square < 0.0625f ? series : far;
}

}  // namespace
