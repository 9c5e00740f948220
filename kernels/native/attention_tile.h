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
#include "write_kv.h"

namespace {

constexpr int kGranule = 16, kStepGranules = 4, kStep = kGranule * kStepGranules;
constexpr int kMaxRows = 48, kMaxDim = 256;
// Finite, so that a row without any key yet never computes inf - inf.
constexpr float kNoMax = -1e30f, kMasked = -INFINITY;

// ---- the tile's state, on the stack of the thread that runs it

template <class M> struct Tile {
  int rows, dim;
  alignas(64) typename M::Left q[kMaxRows * kMaxDim];  // [rows, D]
  alignas(64) float out[kMaxRows * kMaxDim];           // [rows, D], not yet divided by sum
  alignas(64) float scores[kMaxRows * kStep];
  alignas(64) typename M::Left p[kMaxRows * kStep];
  float max[kMaxRows], sum[kMaxRows], rescale[kMaxRows];
  int first_key[kMaxRows], end_key[kMaxRows];  // row r sees keys [first_key, end_key)
};

// The keys of one step: where the granules of K and V lie, and those of the next step (to prefetch).
template <class M> struct Step {
  const typename M::Stored *k[kStepGranules], *v[kStepGranules], *next_k[kStepGranules], *next_v[kStepGranules];
  int granules, tokens;  // tokens <= granules * 16: what lies past them must not be used
};

// ---- scores[MR, NR * W] = Q[MR, D] K^T, columns [column, column + NR * W)

template <class M, int MR, int NR, bool kPrefetch>
void score_block(Tile<M>& tile, const Step<M>& step, int row, int column, int block) {
  const typename M::Left* q = tile.q + row * tile.dim;
  const typename M::Stored *k[NR], *next[NR];
  for (int n = 0; n < NR; n++) {
    int token = column + n * W;
    k[n] = step.k[token / kGranule] + token % kGranule * M::I;
    next[n] = step.next_k[token / kGranule] + token % kGranule * M::I;
  }
  int dim = tile.dim;
  F32 acc[MR][NR] = {};
  for (int d = 0; d < dim; d += M::I) {
    typename M::Right right[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      right[n] = M::load_right(k[n] + (int64_t)d * block);
      if (kPrefetch) __builtin_prefetch(next[n] + (int64_t)d * block, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) acc[r][n] = M::fma(acc[r][n], q + r * dim + d, right[n]);
  }
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NR; n++) store(tile.scores + (row + r) * kStep + column + n * W, acc[r][n]);
}

// ---- out[MR, NR * W] = out * rescale + P[MR, tokens] V, dims [d, d + NR * W)

template <class M, int MR, int NR, bool kPrefetch>
void value_block(Tile<M>& tile, const Step<M>& step, int row, int d) {
  const typename M::Left* p = tile.p + row * kStep;
  float* out = tile.out + row * tile.dim + d;
  int dim = tile.dim;
  F32 acc[MR][NR];
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NR; n++) acc[r][n] = load(out + r * dim + n * W) * tile.rescale[row + r];
  for (int g = 0; g < step.granules; g++) {
    int tokens = step.tokens - g * kGranule < kGranule ? step.tokens - g * kGranule : kGranule;
    const typename M::Stored *v = step.v[g] + d * M::I, *next = step.next_v[g] + d * M::I;
    int t = 0;
    for (; t + M::I <= tokens; t += M::I) {
      typename M::Right right[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) {
        right[n] = M::load_right(v + t * dim + n * W * M::I);
        if (kPrefetch) __builtin_prefetch(next + t * dim + n * W * M::I, 0, 2);
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
    for (int n = 0; n < NR; n++) store(out + r * dim + n * W, acc[r][n]);
}

// ---- pick the register tile: whole ones first, then what is left over

template <class M, int MR> void score_rows(Tile<M>& tile, const Step<M>& step, int row, int block) {
  constexpr bool kPrefetch = MR <= 2;  // few rows: memory decides; many: the next step comes from a near cache
  int columns = step.granules * kGranule, column = 0;
  for (; column + kNR * W <= columns; column += kNR * W)
    score_block<M, MR, kNR, kPrefetch>(tile, step, row, column, block);
  for (; column < columns; column += W) score_block<M, MR, 1, kPrefetch>(tile, step, row, column, block);
}

template <class M, int MR> void value_rows(Tile<M>& tile, const Step<M>& step, int row) {
  constexpr bool kPrefetch = MR <= 2;
  int d = 0;
  for (; d + kNR * W <= tile.dim; d += kNR * W) value_block<M, MR, kNR, kPrefetch>(tile, step, row, d);
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

// Keys are counted from the step's first one. scale includes log2(e): the exponentials are powers of two.
template <class M> void softmax_row(Tile<M>& tile, int row, int first_key, int columns, float scale, float softcap) {
  float* scores = tile.scores + row * kStep;
  int lo = tile.first_key[row] - first_key, hi = tile.end_key[row] - first_key;
  bool masked = lo > 0 || hi < columns;
  F32 top = splat(tile.max[row]);
  for (int c = 0; c < columns; c += W) {
    F32 s = load(scores + c) * scale;
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
    store_left(tile.p + row * kStep + c, p);
  }
  float rescale = exp2f(tile.max[row] - new_max);
  tile.rescale[row] = rescale;
  tile.sum[row] = tile.sum[row] * rescale + sum_lanes(total);
  tile.max[row] = new_max;
}

template <class M> void attend_step(Tile<M>& tile, const Step<M>& step, int first_key, int block, float scale,
                                    float softcap) {
  for_row_blocks<M, kMR>(tile, step, 0, block, true);
  for (int row = 0; row < tile.rows; row++)
    softmax_row(tile, row, first_key, step.granules * kGranule, scale, softcap);
  for_row_blocks<M, kMR>(tile, step, 0, block, false);
}

}  // namespace
