// One tile of paged attention: some query rows of one sequence and kv head against a range of its keys.
//
// The tile walks its keys in steps of 64 tokens with the online softmax (Milakov and Gimelshein 2018, the inner
// loop of FlashAttention): scores S = Q K^T, new row maxima, P = 2^(S - max), O = O * rescale + P V. K and V are
// read where they lie; a step is four granules of 16 tokens, each within one block. Both products run in register
// tiles of MR rows times NR vectors: a scalar (or bf16 pair) of the left side is broadcast, a vector of the right
// side is loaded once for all MR rows. Decode and prefill differ only in how many rows there are.
#pragma once
#include "multiply.h"
#include "ops.h"
#include "quantize.h"

namespace {

constexpr int kGranule = 16, kStepGranules = 4, kStep = kGranule * kStepGranules;
constexpr int kMaxRows = 48;
// Finite, so that a row without any key yet never computes inf - inf.
constexpr float kNoMax = -1e30f, kMasked = -INFINITY;

// Whether keys and values have a factor per token (quantize.h).
template <class M> constexpr bool kHasFactors = false;
template <> constexpr bool kHasFactors<MulInt8> = true;

INLINE F32 as_float(F32 v) { return v; }
INLINE F32 as_float(I32 v) { return __builtin_convertvector(v, F32); }
template <class M> struct SumOf { typedef F32 type; };
template <> struct SumOf<MulInt8> { typedef I32 type; };
template <class M> using Sum = typename SumOf<M>::type;

// ---- the tile's state, on the stack of the thread that runs it

template <class M> struct Tile {
  int rows, dim;
  alignas(64) typename M::Left q[kMaxRows * kMaxDim];  // [rows, D], divided by q_factor
  alignas(64) float out[kMaxRows * kMaxDim];           // [rows, D], not yet divided by sum
  alignas(64) float scores[kMaxRows * kStep];
  alignas(64) typename M::Left p[kMaxRows * kStep];  // divided by p_factor
  float max[kMaxRows], sum[kMaxRows], rescale[kMaxRows], q_factor[kMaxRows], p_factor[kMaxRows];
  int first_key[kMaxRows], end_key[kMaxRows];  // row r sees keys [first_key, end_key)
};

// Where the keys and values of up to four granules lie, and their factors if there are any.
template <class M> struct Granules {
  const typename M::Stored *k[kStepGranules], *v[kStepGranules];
  const float *k_factor[kStepGranules], *v_factor[kStepGranules];
  int first, count;  // values below the first are not wanted
};

// The keys of one step, and those of the next one (to prefetch).
template <class M> struct Step {
  Granules<M> now, next;
  int tokens;  // at most now.count * 16: what lies past them must not be used
};

// Rows of the register tile: in AVX2, more than linear.h's where a vector of the right side is one register.
template <class M> constexpr int kAttentionRows = W == 8 && sizeof(typename M::Right) == sizeof(F32) ? 6 : kMR;

// Vectors in a row of the register tile. Few rows leave registers for more vectors, and need them: a sum is ready
// for its next product after 4 cycles only.
constexpr int vectors(int rows) { return W == 8 && rows <= 2 ? 8 / rows : kNR; }

// ---- scores[MR, NR * W] = Q[MR, D] K^T, columns [column, column + NR * W)

template <class M, int MR, int NR, bool kPrefetch>
void score_block(Tile<M>& tile, const Step<M>& step, int row, int column, int block) {
  constexpr int kVectors = kGranule / W, kGranules = NR > kVectors ? NR / kVectors : 1;
  const typename M::Left* q = tile.q + row * tile.dim;
  const typename M::Stored *k[kGranules], *next[kGranules];
  for (int g = 0; g < kGranules; g++) {
    k[g] = step.now.k[column / kGranule + g] + column % kGranule * M::I;
    next[g] = step.next.k[column / kGranule + g] + column % kGranule * M::I;
  }
  int dim = tile.dim;
  Sum<M> acc[MR][NR] = {};
  for (int d = 0; d < dim; d += M::I) {
    typename M::Right right[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      right[n] = M::load_right(k[n / kVectors] + (int64_t)d * block + n % kVectors * (W * M::I));
      // A granule's part of a row is a cache line, or half of one.
      if (kPrefetch && n % kVectors == 0) __builtin_prefetch(next[n / kVectors] + (int64_t)d * block, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) acc[r][n] = M::fma(acc[r][n], q + r * dim + d, right[n]);
  }
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NR; n++) store(tile.scores + (row + r) * kStep + column + n * W, as_float(acc[r][n]));
}

// ---- out[MR, NR * W] = out * rescale + P[MR, tokens] V, dims [d, d + NR * W)

template <class M, int MR, int NR, bool kPrefetch>
void value_block(Tile<M>& tile, const Step<M>& step, int row, int d) {
  constexpr int kBytes = W * M::I * sizeof(typename M::Stored);  // of a vector in memory
  const typename M::Left* p = tile.p + row * kStep;
  int dim = tile.dim;
  Sum<M> acc[MR][NR] = {};
  for (int g = step.now.first; g < step.now.count; g++) {
    int tokens = step.tokens - g * kGranule < kGranule ? step.tokens - g * kGranule : kGranule;
    const typename M::Stored *v = step.now.v[g] + d * M::I, *next = step.next.v[g] + d * M::I;
    int t = 0;
    for (; t + M::I <= tokens; t += M::I) {
      typename M::Right right[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) {
        right[n] = M::load_right(v + t * dim + n * W * M::I);
        if (kPrefetch && n * kBytes % 64 == 0) __builtin_prefetch(next + t * dim + n * W * M::I, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) acc[r][n] = M::fma(acc[r][n], p + r * kStep + g * kGranule + t, right[n]);
    }
    if (t < tokens)  // the last token of an odd length has no partner: what lies there may be NaN
      for (int n = 0; n < NR; n++) {
        typename M::Right right = M::load_first(v + t * dim + n * W * M::I);
        for (int r = 0; r < MR; r++) acc[r][n] = M::fma(acc[r][n], p + r * kStep + g * kGranule + t, right);
      }
  }
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NR; n++) {
      float* out = tile.out + (row + r) * dim + d + n * W;
      store(out, load(out) * tile.rescale[row + r] + as_float(acc[r][n]) * tile.p_factor[row + r]);
    }
}

// ---- pick the register tile: whole ones first, then what is left over

template <class M, int MR> void score_rows(Tile<M>& tile, const Step<M>& step, int row, int block) {
  constexpr bool kPrefetch = MR <= 2;  // few rows: memory decides; many: the next step comes from a near cache
  constexpr int kWide = vectors(MR);
  int columns = step.now.count * kGranule, column = 0;
  for (; column + kWide * W <= columns; column += kWide * W)
    score_block<M, MR, kWide, kPrefetch>(tile, step, row, column, block);
  for (; column < columns; column += W) score_block<M, MR, 1, kPrefetch>(tile, step, row, column, block);
}

template <class M, int MR> void value_rows(Tile<M>& tile, const Step<M>& step, int row) {
  constexpr bool kPrefetch = MR <= 2;
  constexpr int kWide = vectors(MR);
  int d = 0;
  for (; d + kWide * W <= tile.dim; d += kWide * W) value_block<M, MR, kWide, kPrefetch>(tile, step, row, d);
  for (; d < tile.dim; d += W) value_block<M, MR, 1, kPrefetch>(tile, step, row, d);
}

template <class M, int MR> INLINE void for_row_blocks(Tile<M>& tile, const Step<M>& step, int row, int block,
                                                      bool scores) {
  if constexpr (MR > 0) {
    for (; row + MR <= tile.rows; row += MR) {
      if (scores) score_rows<M, MR>(tile, step, row, block);
      else value_rows<M, MR>(tile, step, row);
    }
    for_row_blocks<M, MR - 1>(tile, step, row, block, scores);
  }
}

// ---- softmax of one row of one step

// The weights of a step times the factors of its values, as whole numbers. In place; returns what divides them.
INLINE float weigh_values(float* p, int16_t* q, const Granules<MulInt8>& values) {
  for (int c = 0; c < values.count * kGranule; c += W) {
    F32 weight = load(p + c), factor = load(values.v_factor[c / kGranule] + c % kGranule);
    store(p + c, weight > 0.0f ? weight * factor : F32{});  // the factor of an unused slot may be NaN
  }
  return quantize<32767>(p, q, values.count * kGranule);
}

// Keys are counted from the step's first one. scale includes log2(e): the exponentials are powers of two.
template <class M> void softmax_row(Tile<M>& tile, const Step<M>& step, int row, int first_key, float scale,
                                    float softcap) {
  float* scores = tile.scores + row * kStep;
  int lo = tile.first_key[row] - first_key, hi = tile.end_key[row] - first_key;
  int columns = step.now.count * kGranule;
  bool masked = lo > 0 || hi < columns;
  F32 top = splat(tile.max[row]);
  for (int c = 0; c < columns; c += W) {
    F32 s = load(scores + c) * scale;
    if constexpr (kHasFactors<M>) s *= load(step.now.k_factor[c / kGranule] + c % kGranule) * tile.q_factor[row];
    if (softcap > 0) s = softcap * tanh_vec(s / softcap);
    if (masked) {
      I32 key = iota() + c;
      s = ((key >= lo) & (key < hi)) ? s : splat(kMasked);
    }
    store(scores + c, s);
    top = max(top, s);
  }
  float new_max = max_lanes(top);
  F32 total = {};
  for (int c = 0; c < columns; c += W) {
    F32 p = exp2_vec(load(scores + c) - new_max);
    total += p;
    if constexpr (kHasFactors<M>) store(scores + c, p);
    else store_left(tile.p + row * kStep + c, p);
  }
  if constexpr (kHasFactors<M>) tile.p_factor[row] = weigh_values(scores, tile.p + row * kStep, step.now);
  float rescale = exp2f(tile.max[row] - new_max);
  tile.rescale[row] = rescale;
  tile.sum[row] = tile.sum[row] * rescale + sum_lanes(total);
  tile.max[row] = new_max;
}

template <class M> void attend_step(Tile<M>& tile, const Step<M>& step, int first_key, int block, float scale,
                                    float softcap) {
  if constexpr (kHasFactors<M>)
    for (int g = 0; g < kStepGranules; g++) {
      __builtin_prefetch(step.next.k_factor[g], 0, 2);
      __builtin_prefetch(step.next.v_factor[g], 0, 2);
    }
  for_row_blocks<M, kAttentionRows<M>>(tile, step, 0, block, true);
  for (int row = 0; row < tile.rows; row++) softmax_row(tile, step, row, first_key, scale, softcap);
  for_row_blocks<M, kAttentionRows<M>>(tile, step, 0, block, false);
}

}  // namespace
