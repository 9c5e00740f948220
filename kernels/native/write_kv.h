// write_kv: scatter new keys and values into their slots. The layout inside a slab is decided here.
//
// A slab holds the K (or V) of one block and one kv head. With I = 2 for bf16 and int8 and 1 for fp32 and fp16:
//   K: [D / I][P][I]   one vector = W tokens, I neighbouring dims of each
//   V: [P / I][D][I]   one vector = W dims, I neighbouring tokens of each
// so each is the right side of its product as multiply.h wants it: K is summed over dims, V over tokens.
// An int8 slab ends with the factors of its tokens, [P] fp32.
#pragma once
#include "multiply.h"
#include "parallel.h"
#include "quantize.h"

namespace {

template <> constexpr int kInterleave<int8_t> = MulInt8::I;

// T is only copied, so 16-bit types differ in I alone.
template <class T, int I> INLINE void write_token(const T* k_D, const T* v_D, T* k_slab, T* v_slab, int offset,
                                                  int block, int dim) {
  for (int d = 0; d < dim; d += I) memcpy(k_slab + (int64_t)d * block + offset * I, k_D + d, I * sizeof(T));
  T* v_row = v_slab + (int64_t)(offset / I) * dim * I + offset % I;
  for (int d = 0; d < dim; d++) v_row[d * I] = v_D[d];
}

// S: what is stored, T itself or int8.
template <class S, class T> INLINE void write_head(const T* k_D, const T* v_D, S* k_slab, S* v_slab, int offset,
                                                   int block, int dim) {
  if constexpr (sizeof(S) == sizeof(T)) {
    write_token<T, kInterleave<T>>(k_D, v_D, k_slab, v_slab, offset, block, dim);
  } else {
    alignas(64) int8_t k[kMaxDim], v[kMaxDim];
    ((float*)(k_slab + (int64_t)block * dim))[offset] = quantize_row<127>(k_D, k, dim);
    ((float*)(v_slab + (int64_t)block * dim))[offset] = quantize_row<127>(v_D, v, dim);
    write_token<int8_t, kInterleave<int8_t>>(k, v, k_slab, v_slab, offset, block, dim);
  }
}

template <class S, class T> void write_kv_of(const void* k_, const void* v_, void* kv_, const int64_t* slot_T,
                                             int64_t tokens, int64_t k_stride, int64_t k_head_stride,
                                             int64_t v_stride, int64_t v_head_stride, int kv_heads, int block,
                                             int dim) {
  const T *k = (const T*)k_, *v = (const T*)v_;
  int64_t slab = (int64_t)block * (dim + (sizeof(S) == 1 ? kFactorBytes : 0)), half = slab * kv_heads;
  // Neighbouring tokens share cache lines of a slab, so a thread takes a run of tokens.
  parallel_for(tokens, 1 + 16384 / (kv_heads * dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (slot_T[t] < 0) continue;
      S* k_block = (S*)kv_ + (slot_T[t] / block) * 2 * half;
      for (int g = 0; g < kv_heads; g++)
        write_head<S, T>(k + t * k_stride + g * k_head_stride, v + t * v_stride + g * v_head_stride,
                         k_block + g * slab, k_block + half + g * slab, slot_T[t] % block, block, dim);
    }
  });
}

void write_kv(int dtype, const void* k, const void* v, void* kv, const int64_t* slot_T, int64_t tokens,
              int64_t k_stride, int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride, int kv_heads, int block,
              int dim, int int8_kv) {
  auto f = dtype == kF32    ? write_kv_of<float, float>
           : dtype == kBF16 ? write_kv_of<bf16, bf16>
                            : write_kv_of<fp16, fp16>;
  if (int8_kv)
    f = dtype == kF32    ? write_kv_of<int8_t, float>
        : dtype == kBF16 ? write_kv_of<int8_t, bf16>
                         : write_kv_of<int8_t, fp16>;
  f(k, v, kv, slot_T, tokens, k_stride, k_head_stride, v_stride, v_head_stride, kv_heads, block, dim);
}

}  // namespace
