// Rounding a weight to integers of 8 or 4 bits, symmetric around zero, a group of inputs at a time. What is chosen, and
// why, is said in kernels/linear/quantized.py, whose torch code this repeats for speed.
#pragma once
#include "ops.h"
#include "parallel.h"
#include "quantize.h"

namespace {

constexpr float kInt4Reach = 8.3f, kTinyScale = 1e-30f;

INLINE F32 min(F32 a, F32 b) { return -max(-a, -b); }

constexpr float kLeastHalf = 0x1p-14f, kMostHalf = 65504;  // where fp16 has all its bits

// Rounded to fp16, which a packed weight then needs no more than; as it is where fp16 is too narrow.
INLINE float as_half(float x) {
  fp16 halves[W];
  store(halves, splat(x));
  return fabsf(x) >= kLeastHalf && fabsf(x) <= kMostHalf ? load(halves)[0] : x;
}

// value = w / scale, to the nearest in [low, high]. f(i, n, value) is told of each vector.
template <class T, class F> INLINE void round_weights(const T* w, int64_t size, float scale, int low, int high, const F& f) {
  for_each_vector(size, [&](int64_t i, int n) {
    I32 value = nearest(load(w + i, n) / splat(scale));
    value = value < low ? I32{} + low : value > high ? I32{} + high : value;
    f(i, n, value);
  });
}

INLINE void store_bytes(int8_t* to, I32 value, int n) {
  int8_t bytes[W];
  store_narrow(bytes, value);
  memcpy(to, bytes, n);
}

template <class T> float round_int8(const T* w, int64_t size, int8_t* value) {
  F32 top = {};
  for_each_vector(size, [&](int64_t i, int n) { top = max(top, (F32)((U32)load(w + i, n) & 0x7fffffff)); });
  float largest = max_lanes(top), scale = (largest < kTinyScale ? kTinyScale : largest) / 127;
  round_weights(w, size, scale, -127, 127, [&](int64_t i, int n, I32 v) { store_bytes(value + i, v, n); });
  return scale;
}

template <class T> float round_int4(const T* w, int64_t size, int8_t* value) {
  F32 tops = {}, bottoms = {}, products = {}, squares = {};
  for_each_vector(size, [&](int64_t i, int n) {
    tops = max(tops, load(w + i, n)), bottoms = min(bottoms, load(w + i, n));
  });
  float top = max_lanes(tops), bottom = -max_lanes(-bottoms), largest = top > -bottom ? top : bottom;
  float scale = fabsf(largest) < kTinyScale ? kTinyScale : largest / -kInt4Reach;
  round_weights(w, size, scale, -8, 7, [&](int64_t i, int n, I32 v) {
    store_bytes(value + i, v, n);
    F32 steps = __builtin_convertvector(v, F32);
    products += load(w + i, n) * steps, squares += steps * steps;
  });
  float square = sum_lanes(squares), fitted = sum_lanes(products) / (square < 1 ? 1 : square);
  return as_half(fitted == 0 ? scale : fitted);
}

template <class T> void quantize_weights_of(int bits, const void* weight_OI, int8_t* value_OI, float* scale_OG,
                                            int64_t outputs, int64_t inputs, int64_t group) {
  int64_t groups = inputs / group;
  parallel_for(outputs, 1 + 65536 / inputs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; i++) {
      const T* w = (const T*)weight_OI + i * group;
      scale_OG[i] = bits == 8 ? round_int8(w, group, value_OI + i * group) : round_int4(w, group, value_OI + i * group);
    }
  });
}

// value_OI: one value a byte. `group` divides the inputs.
void quantize_weights(int dtype, int bits, const void* weight_OI, int8_t* value_OI, float* scale_OG, int64_t outputs,
                      int64_t inputs, int64_t group) {
  auto f = dtype == kF32 ? quantize_weights_of<float> : dtype == kBF16 ? quantize_weights_of<bf16> : quantize_weights_of<fp16>;
  f(bits, weight_OI, value_OI, scale_OG, outputs, inputs, group);
}

}  // namespace
