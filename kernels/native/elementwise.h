// The small ops between the matrix products: rms_norm, rotary, act(gate) * up. One pass over each row.
#pragma once
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int64_t kGrain = 32768;  // elements per thread below which a second thread costs more than it saves

INLINE int64_t row_grain(int64_t row_size) { return 1 + kGrain / (row_size + 1); }

// ---- rms_norm: y = (x + residual) / rms(x + residual) * (weight + offset); residual gets the sum

template <class T> void rms_norm_row(const T* x, const T* weight, T* residual, T* y, int64_t size, float eps,
                                     float offset) {
  F32 squares[2] = {};
  for_each_vector(size, [&](int64_t i, int n) {
    F32 v = load(x + i, n);
    if (residual) {
      store(residual + i, v + load(residual + i, n), n);
      v = load(residual + i, n);  // the norm is of what was stored
    }
    squares[i / W % 2] += v * v;
  });
  float scale = 1.0f / sqrtf(sum_lanes(squares[0] + squares[1]) / size + eps);
  const T* source = residual ? residual : x;
  for_each_vector(size, [&](int64_t i, int n) {
    store(y + i, load(source + i, n) * scale * (load(weight + i, n) + offset), n);
  });
}

template <class T> void rms_norm_of(const void* x, const void* weight, void* residual, void* y, int64_t rows,
                                    int64_t inner, int64_t size, int64_t x_stride, int64_t x_inner_stride, float eps,
                                    float offset) {
  parallel_for(rows, row_grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      rms_norm_row((const T*)x + t / inner * x_stride + t % inner * x_inner_stride, (const T*)weight,
                   residual ? (T*)residual + t * size : nullptr, (T*)y + t * size, size, eps, offset);
  });
}

void rms_norm(int dtype, const void* x, const void* weight, void* residual, void* y, int64_t rows, int64_t inner,
              int64_t size, int64_t x_stride, int64_t x_inner_stride, float eps, float offset) {
  auto f = dtype == kF32 ? rms_norm_of<float> : dtype == kBF16 ? rms_norm_of<bf16> : rms_norm_of<fp16>;
  f(x, weight, residual, y, rows, inner, size, x_stride, x_inner_stride, eps, offset);
}

// ---- rotary: turns the pair (x[i], x[i + R/2]) by the angle whose cos and sin are cs[i] and cs[i + R/2]

template <class T> INLINE void rotate_head(T* x, const float* cs, int half) {
  for_each_vector(half, [&](int64_t i, int n) {
    F32 a = load(x + i, n), b = load(x + half + i, n), c = load(cs + i, n), s = load(cs + half + i, n);
    store(x + i, a * c - b * s, n);
    store(x + half + i, b * c + a * s, n);
  });
}

template <class T> void rotary_of(void* q, void* k, const float* cos_sin_MR, const int64_t* position_T,
                                  int64_t tokens, int64_t q_stride, int64_t q_head_stride, int64_t k_stride,
                                  int64_t k_head_stride, int heads, int kv_heads, int rotary_dim) {
  parallel_for(tokens, row_grain((heads + kv_heads) * rotary_dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* cs = cos_sin_MR + position_T[t] * rotary_dim;
      for (int h = 0; h < heads; h++) rotate_head((T*)q + t * q_stride + h * q_head_stride, cs, rotary_dim / 2);
      for (int g = 0; g < kv_heads; g++) rotate_head((T*)k + t * k_stride + g * k_head_stride, cs, rotary_dim / 2);
    }
  });
}

void rotary(int dtype, void* q, void* k, const float* cos_sin_MR, const int64_t* position_T, int64_t tokens,
            int64_t q_stride, int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride, int heads, int kv_heads,
            int rotary_dim) {
  auto f = dtype == kF32 ? rotary_of<float> : dtype == kBF16 ? rotary_of<bf16> : rotary_of<fp16>;
  f(q, k, cos_sin_MR, position_T, tokens, q_stride, q_head_stride, k_stride, k_head_stride, heads, kv_heads, rotary_dim);
}

// ---- gate_mul: y = act(gate) * up, the two halves of one row

// x / (1 + e^-y). Below -87 e^-y leaves the range of exp2_vec; the factor is within 1e-37 of 0 there.
INLINE F32 times_sigmoid(F32 x, F32 y) { return x / (1.0f + exp_vec(y < -87.0f ? splat(87.0f) : -y)); }

struct Silu {
  static INLINE F32 of(F32 x) { return times_sigmoid(x, x); }
};
struct GeluTanh {
  // (1 + tanh(y)) / 2 is the sigmoid of 2y, which does not cancel where tanh is near -1.
  static INLINE F32 of(F32 x) { return times_sigmoid(x, 1.5957691216f * (x + 0.044715f * x * x * x)); }
};

template <class T, class Act> void gate_mul_of(const void* gate_up, void* y, int64_t rows, int64_t size) {
  // exp makes an element several times dearer than a copy, hence the smaller grain.
  parallel_for(rows * size, kGrain / 2, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin / size; t * size < end; t++) {
      int64_t from = begin > t * size ? begin - t * size : 0;
      int64_t to = end < (t + 1) * size ? end - t * size : size;
      const T* gate = (const T*)gate_up + t * 2 * size + from;
      for_each_vector(to - from, [&](int64_t i, int n) {
        store((T*)y + t * size + from + i, Act::of(load(gate + i, n)) * load(gate + size + i, n), n);
      });
    }
  });
}

template <class Act> void gate_mul_act(int dtype, const void* gate_up, void* y, int64_t rows, int64_t size) {
  auto f = dtype == kF32 ? gate_mul_of<float, Act> : dtype == kBF16 ? gate_mul_of<bf16, Act> : gate_mul_of<fp16, Act>;
  f(gate_up, y, rows, size);
}

void gate_mul(int dtype, int activation, const void* gate_up, void* y, int64_t rows, int64_t size) {
  auto f = activation == kGeluTanh ? gate_mul_act<GeluTanh> : gate_mul_act<Silu>;
  f(dtype, gate_up, y, rows, size);
}

}  // namespace
