// How each element type multiplies. Every product here (attention's two, the linear layer) has one shape: a scalar
// of the left side, or a pair of them for bf16, times a vector of the right side, added to a vector of fp32 sums.
//
// The right side is stored with I neighbouring elements of the summed dimension side by side: 2 for bf16, so that a
// pair fits one 32-bit lane as AVX512-BF16's dot product wants it (elsewhere a shift and a mask split it), else 1.
#pragma once
#include "simd.h"

namespace {

template <class T> constexpr int kInterleave = 1;
template <> constexpr int kInterleave<bf16> = 2;

// Register tile: MR * NR sums, NR vectors of the right side and one of the left must fit the registers.
constexpr int kMR = W == 16 ? 6 : 4, kNR = W == 16 ? 4 : 2;

// Stored: type in memory. Left: what left-hand rows are converted to. load_first: only the first of I elements.
struct MulF32 {
  typedef float Stored;
  typedef float Left;
  static constexpr int I = kInterleave<Stored>;
  struct Right { F32 v; };
  static INLINE Right load_right(const Stored* p) { return {load(p)}; }
  static INLINE Right load_first(const Stored* p) { return {load(p)}; }
  static INLINE F32 fma(F32 acc, const Left* a, Right b) { return acc + a[0] * b.v; }
};

struct MulF16 {
  typedef fp16 Stored;
  typedef float Left;
  static constexpr int I = kInterleave<Stored>;
  struct Right { F32 v; };
  static INLINE Right load_right(const Stored* p) { return {load(p)}; }
  static INLINE Right load_first(const Stored* p) { return {load(p)}; }
  static INLINE F32 fma(F32 acc, const Left* a, Right b) { return acc + a[0] * b.v; }
};

#if defined(__AVX512BF16__)
struct MulBF16 {
  typedef bf16 Stored;
  typedef bf16 Left;
  static constexpr int I = kInterleave<Stored>;
  struct Right { U32 v; };
  static INLINE Right load_right(const Stored* p) { return {load_as<U32>(p)}; }
  static INLINE Right load_first(const Stored* p) { return {load_as<U32>(p) & 0xffff}; }
  static INLINE F32 fma(F32 acc, const Left* a, Right b) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(load_as<int>(a)), (__m512bh)b.v);
  }
};
#else
struct MulBF16 {
  typedef bf16 Stored;
  typedef float Left;
  static constexpr int I = kInterleave<Stored>;
  struct Right { F32 first, second; };
  static INLINE Right load_right(const Stored* p) {
    U32 pair = load_as<U32>(p);
    return {(F32)(pair << 16), (F32)(pair & 0xffff0000)};
  }
  static INLINE Right load_first(const Stored* p) { return {(F32)(load_as<U32>(p) << 16), F32{}}; }
  static INLINE F32 fma(F32 acc, const Left* a, Right b) { return acc + a[0] * b.first + a[1] * b.second; }
};
#endif

INLINE void store_left(float* p, F32 v) { store(p, v); }
INLINE void store_left(bf16* p, F32 v) { store(p, v); }

}  // namespace
