// How rows of floats become whole numbers with one factor each, and how those multiply: for int8 keys and values, and
// for the inputs of quantised linears.
//
// A key or value of one token and kv head is D bytes and a factor, max |x| / 127. The other side of each product
// (a query, the weights of a step) becomes int16, so int16 pairs times int8 pairs add up in int32 without a loss:
// 32767 * 127 * 256 < 2^31. Factors are applied to sums, never to elements.
#pragma once
#include "simd.h"

namespace {

constexpr int kMaxDim = 256;
constexpr int kFactorBytes = sizeof(float);

typedef int16_t I16 __attribute__((vector_size(W * 4)));  // 2 W lanes
typedef int8_t I8 __attribute__((vector_size(W * 2)));

// acc + a.low * b.low + a.high * b.high in each lane, of signed halves.
INLINE I32 dot_pairs(I32 acc, I32 a, I32 b) {
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return acc + (I32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (I32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

struct MulInt8 {
  typedef int8_t Stored;
  typedef int16_t Left;
  static constexpr int I = 2;
  struct Right { I16 v; };
  static INLINE Right load_right(const Stored* p) { return {__builtin_convertvector(load_as<I8>(p), I16)}; }
  // What lies past the last token is some number, and its weight is 0.
  static INLINE Right load_first(const Stored* p) { return load_right(p); }
  static INLINE I32 fma(I32 acc, const Left* a, Right b) { return dot_pairs(acc, load_as<int>(a) + I32{}, (I32)b.v); }
};

typedef int16_t I16Half __attribute__((vector_size(W * 2)));
typedef int8_t I8Quarter __attribute__((vector_size(W)));
INLINE void store_narrow(int16_t* p, I32 v) { store_as(p, __builtin_convertvector(v, I16Half)); }
INLINE void store_narrow(int8_t* p, I32 v) { store_as(p, __builtin_convertvector(v, I8Quarter)); }

INLINE I32 nearest(F32 v) {
#if defined(__AVX512F__)
  return (I32)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (I32)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (I32)_mm_cvtps_epi32((__m128)v);
#else
  return (I32)(v + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: adding it leaves the integer in the low bits
#endif
}

// Writes x / factor, rounded to the nearest of [-kTop, kTop], and returns the factor. n is a multiple of W.
// A number that is not finite makes the factor NaN, and so all that is computed with it.
template <int kTop, class Q> INLINE float quantize(const float* x, Q* q, int n) {
  F32 top = {}, check = {};
  for (int i = 0; i < n; i += W) {
    F32 v = load(x + i);
    top = max(top, (F32)((U32)v & 0x7fffffff));
    check += v * 0.0f;
  }
  float largest = max_lanes(top);
  float inverse = largest > 1e-30f ? kTop / largest : 0.0f;
  for (int i = 0; i < n; i += W) store_narrow(q + i, nearest(load(x + i) * inverse));
  return largest / kTop + sum_lanes(check);
}

// The same for n <= kMaxDim elements of any type; q has room for whole vectors.
template <int kTop, class T, class Q> INLINE float quantize_row(const T* x, Q* q, int n) {
  alignas(64) float row[kMaxDim];
  for_each_vector(n, [&](int64_t i, int part) { store(row + i, load(x + i, part)); });  // whole vectors: 0 after the last
  return quantize<kTop>(row, q, (n + W - 1) / W * W);
}

}  // namespace
