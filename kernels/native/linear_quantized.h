// linear for weights in integers of 4, 8 or 12 bits, packed as quantized_panel.h says.
//
// Inputs are rounded to 15 bits (14 for 12-bit weights), each piece of a row with a scale of its own: far finer than
// bf16, so what is lost is what the weights lost. Products are then 16 by 16 bits, summed in 32 bits without error:
// twice the work per instruction of fp32, and sums that are the same on every processor. A piece is a group of the
// weight, or 256 inputs where groups are longer: 256 * 127 * 16383 and 64 * 2047 * 8191 stay below 2^30. Its sum
// becomes fp32 with both scales.
//
// The weight stands for (value - zero) * scale. Where values are stored plus 8, or have a zero, many rows share values
// that it was taken off; for few (8 + zero) times the sum of the piece's inputs is taken off the piece's sum.
#pragma once
#include "buffer.h"
#include "linear.h"
#include "ops.h"
#include "quantize.h"

namespace {

constexpr int kPieceInputs = kMaxDim;
template <int Bits> constexpr int kInputSteps = Bits == 12 ? 8191 : 16383;
// The unit of a panel: so many words of an output hold so many of its inputs.
template <int Bits> constexpr int kUnitWords = Bits == 12 ? 3 : 1;
template <int Bits> constexpr int kUnitInputs = kUnitWords<Bits> * 32 / Bits;

typedef int16_t Halves __attribute__((vector_size(W * 4)));
typedef uint16_t UHalves __attribute__((vector_size(W * 4)));

// The pairs of inputs of one unit, for W outputs. p: the first of the unit's words.
template <int Bits> INLINE void unpack_pairs(const uint32_t* p, I32 (&pair)[kUnitInputs<Bits> / 2]) {
  Halves words = load_as<Halves>(p);
  if constexpr (Bits == 12) {
    Halves second = load_as<Halves>(p + kPanel), third = load_as<Halves>(p + 2 * kPanel);
    pair[0] = (I32)(words >> 4), pair[1] = (I32)(second >> 4), pair[2] = (I32)(third >> 4);
    pair[3] = (I32)((words << 12) >> 4 | (second & 15) << 4 | (third & 15));
  } else if constexpr (Bits == 8) {
    pair[0] = (I32)((words << 8) >> 8), pair[1] = (I32)(words >> 8);
  } else {
    for (int j = 0; j < 4; j++) pair[j] = (I32)((UHalves)words >> (uint16_t)(4 * j) & (uint16_t)15);
  }
}

// Eight inputs of 12 bits as three words (quantized_panel.h), of which every 64th is this output's.
INLINE void pack_unit(const int16_t* steps, uint32_t* words) {
  uint32_t word[3] = {};
  for (int half = 0; half < 2; half++) {
    const int16_t* step = steps + half;
    for (int w = 0; w < 3; w++)
      word[w] |= (uint32_t)(uint16_t)(step[2 * w] << 4 | (step[6] >> (8 - 4 * w) & 15)) << 16 * half;
  }
  for (int w = 0; w < 3; w++) words[w * kPanel] = word[w];
}

// One output's group of bf16 weights as 12-bit integers; returns what they are multiplied with, a power of two. Exact
// for every weight down to an eighth of the largest, within half a step of it for smaller ones. NaN where a weight is not finite. words: every 64th is this
// output's.
INLINE float round_group(const bf16* w, int inputs, uint32_t* words) {
  alignas(64) int16_t steps[kPieceInputs];
  F32 largest = {}, check = {};
  for (int i = 0; i < inputs; i += W) {
    largest = max(largest, (F32)((U32)load(w + i) & 0x7fffffff));
    check += load(w + i) * 0.0f;
  }
  float top = max_lanes(largest), finite = sum_lanes(check);
  if (finite != 0.0f) return finite;
  int exponent = ilogbf(top + 0x1p-110f);
  float per_step = ldexpf(1.0f, 10 - exponent);  // the largest becomes 1024 to 2047, or 2048 by rounding
  for (int i = 0; i < inputs; i += W) {
    I32 step = nearest(load(w + i) * per_step);
    store_narrow(steps + i, step > 2047 ? I32{} + 2047 : step < -2047 ? I32{} - 2047 : step);
  }
  for (int i = 0; i < inputs; i += 8) pack_unit(steps + i, words + i / 8 * 3 * kPanel);
  return 1.0f / per_step;
}

// packed and scale as in QuantizedArgs, scale in bf16, in groups of `group` inputs, a multiple of 16 up to 256.
void round_bf16(const void* weight_OI, uint32_t* packed, uint16_t* scale, int64_t outputs, int64_t inputs, int64_t group) {
  int64_t groups = inputs / group;
  parallel_for((outputs + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    memset(packed + begin * kPanel * inputs * 3 / 8, 0, (end - begin) * kPanel * inputs * 3 / 2);
    memset(scale + begin * kPanel * groups, 0, (end - begin) * kPanel * groups * sizeof(uint16_t));
    for (int64_t o = begin * kPanel; o < end * kPanel && o < outputs; o++)
      for (int64_t g = 0; g < groups; g++) {
        uint32_t* words = packed + (o / kPanel * inputs + g * group) / 8 * 3 * kPanel + o % kPanel;
        float step = round_group((const bf16*)weight_OI + o * inputs + g * group, (int)group, words);
        // A power of two, or NaN: the upper half of the float says it all.
        scale[(o / kPanel * groups + g) * kPanel + o % kPanel] = load_as<uint32_t>(&step) >> 16;
      }
  });
}

// The left side: rounded rows, their scales and sums. Pairs are in blocks of mr rows, inside a block pair by pair.
struct RoundedRows {
  int32_t* pair;
  float* scale;  // [pieces, rows]
  int32_t* sum;
  int64_t inputs, rows;
  int mr;
};

// One row's piece. out: the piece's first pair of this row; pairs are `stride` apart. What is not finite makes the
// scale, and so the row, NaN.
template <int kTop, class T>
void round_piece(const T* x, int inputs, int32_t* out, int64_t stride, float* scale, int32_t* sum) {
  alignas(64) int16_t steps[kPieceInputs];
  *scale = quantize_row<kTop>(x, steps, inputs);
  int32_t total = 0;
  for (int i = 0; i < inputs; i += 2) {
    out[i / 2 * stride] = load_as<int32_t>(steps + i);
    total += steps[i] + steps[i + 1];
  }
  *sum = total;
}

template <int kTop, class T> void round_rows(const QuantizedArgs& a, int64_t piece, const RoundedRows& to) {
  parallel_for((a.rows + to.mr - 1) / to.mr, 32768 / a.inputs + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * to.mr; row < end * to.mr && row < a.rows; row++) {
      int64_t first = row / to.mr * to.mr, height = a.rows - first < to.mr ? a.rows - first : to.mr;
      const T* x = (const T*)a.x_TI + row * a.x_stride;
      int32_t* pair = to.pair + first * a.inputs / 2 + row - first;
      for (int64_t p = 0, k = 0; k < a.inputs; p++, k += piece) {
        int inputs = a.inputs - k < piece ? (int)(a.inputs - k) : (int)piece;
        round_piece<kTop>(x + k, inputs, pair + k / 2 * height, height, to.scale + p * to.rows + row,
                    to.sum + p * to.rows + row);
      }
    }
  });
}

// One piece of one panel: what a tile needs besides the values.
struct Piece {
  const char* weight_scale;  // [64] in scale_dtype
  const int8_t* zero;        // [64] or null
  const float* row_scale;    // [rows]
  const int32_t* row_sum;    // [rows]
  int scale_dtype;
  int offset;  // what stored values are above their own: 8 or 0

  INLINE F32 load_scale(int column) const {
    if (scale_dtype == kF32) return load((const float*)weight_scale + column);
    return scale_dtype == kBF16 ? load((const bf16*)weight_scale + column) : load((const fp16*)weight_scale + column);
  }
};

// What stored values are above their own, of the outputs from `column` on.
INLINE I32 load_zero(const Piece& p, int column) {
  typedef int8_t I8 __attribute__((vector_size(W)));
  I32 zero = p.offset + I32{};
  return p.zero ? zero + __builtin_convertvector(load_as<I8>(p.zero + column), I32) : zero;
}

// sums[MR, NR * W] += acc in floats. `sums` is that of the first row and column.
template <int MR, int NR> INLINE void add_scaled(const Piece& p, int row, int column, I32 (&acc)[MR][NR], float* sums) {
  const float* row_scale = p.row_scale + row;
#pragma GCC unroll 8
  for (int n = 0; n < NR; n++) {
    F32 scale = p.load_scale(column + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      float* sum = sums + r * kPanel + n * W;
      store(sum, load(sum) + __builtin_convertvector(acc[r][n], F32) * (scale * row_scale[r]));
    }
  }
}

// Few rows: the panel is read as it is, NR vectors wide. sums: [row][64], from `column` on.
template <int Bits, int MR, int NR>
void packed_tile(const int32_t* x, const uint32_t* panel, int inputs, const Piece& p, int column, float* sums) {
  constexpr int kPairs = kUnitInputs<Bits> / 2;
  I32 acc[MR][NR] = {};
  for (int k = 0; k < inputs; k += kUnitInputs<Bits>, panel += kUnitWords<Bits> * kPanel, x += kPairs * MR) {
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      const uint32_t* words = panel + column + n * W;
      for (int w = 0; w < kUnitWords<Bits>; w++) __builtin_prefetch((const char*)(words + w * kPanel) + 4096, 0, 3);
      I32 right[kPairs];
      unpack_pairs<Bits>(words, right);
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; j++)
#pragma GCC unroll 4
        for (int r = 0; r < MR; r++) acc[r][n] = dot_pairs(acc[r][n], right[j], x[j * MR + r] + I32{});
    }
  }
  if (p.offset || p.zero)
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      I32 zero = load_zero(p, column + n * W);
#pragma GCC unroll 4
      for (int r = 0; r < MR; r++) acc[r][n] -= zero * p.row_sum[r];
    }
  add_scaled<MR, NR>(p, 0, column, acc, sums + column);
}

template <int Bits, int MR>
void packed_tiles(const int32_t* x, const uint32_t* panel, int inputs, const Piece& p, float* sums) {
  constexpr int kAll = kPanel / W, NR = MR == 1 && kAll <= 8 ? kAll : kAll < 4 ? kAll : MR == 2 ? 4 : 2;
  for (int column = 0; column < kPanel; column += NR * W) packed_tile<Bits, MR, NR>(x, panel, inputs, p, column, sums);
}

// Many rows: a slice's pairs are unpacked once per chunk of rows, [inputs / 2][kTileWidth].
template <int Bits> INLINE void unpack_slice(const uint32_t* panel, int inputs, const Piece& p, int column, int32_t* slice) {
  constexpr int kPairs = kUnitInputs<Bits> / 2;
  Halves zero[kTileVectors] = {};
  if (p.offset || p.zero)
    for (int n = 0; n < kTileVectors; n++) {
      I32 z = load_zero(p, column + n * W);
      zero[n] = (Halves)((z & 0xffff) | z << 16);
    }
  panel += column;
  for (int k = 0; k < inputs; k += kUnitInputs<Bits>, panel += kUnitWords<Bits> * kPanel, slice += kPairs * kTileWidth)
    for (int n = 0; n < kTileWidth; n += W) {
      I32 right[kPairs];
      unpack_pairs<Bits>(panel + n, right);
      for (int j = 0; j < kPairs; j++)
        store_as(slice + j * kTileWidth + n, Bits == 12 ? (Halves)right[j] : (Halves)right[j] - zero[n / W]);
    }
}

template <int MR>
void pair_tile(const int32_t* x, const int32_t* slice, int inputs, const Piece& p, int row, int column, float* sums,
               const char* ahead, int bytes) {
  I32 acc[MR][kTileVectors] = {};
  for (int k = 0; k < inputs; k += 2, x += MR, slice += kTileWidth, ahead += bytes) {
    __builtin_prefetch(ahead, 0, 2);
    I32 right[kTileVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kTileVectors; n++) right[n] = load_as<I32>(slice + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int n = 0; n < kTileVectors; n++) acc[r][n] = dot_pairs(acc[r][n], right[n], x[r] + I32{});
  }
  add_scaled<MR, kTileVectors>(p, row, column, acc, sums + row * kPanel + column);
}

// sums[rows, kPanel] += one piece. x: the rows' first block; its inputs begin at k.
template <int Bits>
void quantized_piece(const int32_t* x, int64_t inputs, int64_t k, const uint32_t* panel, int depth, const Piece& p,
                     int mr, int rows, float* sums) {
  if (rows <= kFewRows && mr == rows) {
    typedef void (*Few)(const int32_t*, const uint32_t*, int, const Piece&, float*);
    static constexpr Few kFew[] = {nullptr, packed_tiles<Bits, 1>, packed_tiles<Bits, 2>, packed_tiles<Bits, 3>,
                                   packed_tiles<Bits, 4>};
    return kFew[rows](x + k / 2 * rows, panel, depth, p, sums);
  }
  typedef void (*Tile)(const int32_t*, const int32_t*, int, const Piece&, int, int, float*, const char*, int);
  static constexpr Tile kTiles[] = {nullptr,      pair_tile<1>, pair_tile<2>, pair_tile<3>,
                                    pair_tile<4>, pair_tile<5>, pair_tile<6>};
  alignas(64) int32_t slice[kPieceInputs / 2 * kTileWidth];
  int tiles = kPanel / kTileWidth * ((rows + mr - 1) / mr), bytes = (kPanel * Bits / 4 + tiles - 1) / tiles;
  const char* ahead = (const char*)panel + (int64_t)depth * kPanel * Bits / 8;
  for (int column = 0; column < kPanel; column += kTileWidth) {
    unpack_slice<Bits>(panel, depth, p, column, slice);
    for (int row = 0; row < rows; row += mr, ahead += depth / 2 * bytes) {
      int height = rows - row < mr ? rows - row : mr;
      kTiles[height](x + (row * inputs + k * height) / 2, slice, depth, p, row, column, sums, ahead, bytes);
    }
  }
}

template <class T, int Bits>
void quantized_item(const QuantizedArgs& a, const RoundedRows& left, int64_t piece, int64_t row, int rows,
                    int64_t first_panel, int64_t end_panel) {
  int64_t groups = a.inputs / a.group, words = a.inputs * Bits / 32;
  for (int64_t panel = first_panel; panel < end_panel; panel++) {
    alignas(64) float sums[kChunkRows * kPanel];
    memset(sums, 0, rows * kPanel * sizeof(float));
    for (int64_t i = 0, k = 0; k < a.inputs; i++, k += piece) {
      int depth = a.inputs - k < piece ? (int)(a.inputs - k) : (int)piece;
      int64_t at = (panel * groups + k / a.group) * kPanel, first = i * a.rows + row;
      Piece p = {(const char*)a.scale + at * (a.scale_dtype == kF32 ? 4 : 2), a.zero ? a.zero + at : nullptr,
                 left.scale + first, left.sum + first, a.scale_dtype, Bits == 4 ? 8 : 0};
      quantized_piece<Bits>(left.pair + row * a.inputs / 2, a.inputs, k, a.packed + (panel * words + k * Bits / 32) * kPanel,
                            depth, p, left.mr, rows, sums);
    }
    store_panel<T>(a, sums, row, rows, panel * kPanel);
  }
}

template <class T, int Bits> void linear_quantized_of(const QuantizedArgs& a) {
  static thread_local Buffer<int32_t> pairs, row_sums;
  static thread_local Buffer<float> scales;
  int64_t piece = a.group < kPieceInputs ? a.group : kPieceInputs, pieces = (a.inputs + piece - 1) / piece;
  pairs.reserve(a.rows * a.inputs / 2), row_sums.reserve(a.rows * pieces), scales.reserve(a.rows * pieces);
  RoundedRows left = {pairs.data, scales.data, row_sums.data, a.inputs, a.rows, tile_height(a.rows)};
  round_rows<kInputSteps<Bits>, T>(a, piece, left);
  for_each_panel_group(a.rows, a.inputs, a.outputs, left.mr, [&](int64_t row, int rows, int64_t panel, int64_t end) {
    quantized_item<T, Bits>(a, left, piece, row, rows, panel, end);
  });
}

template <class T> void linear_quantized_in(const QuantizedArgs& a) {
  auto f = a.bits == 12 ? linear_quantized_of<T, 12> : a.bits == 8 ? linear_quantized_of<T, 8> : linear_quantized_of<T, 4>;
  f(a);
}

void linear_quantized(int dtype, const QuantizedArgs& args) {
  auto f = dtype == kF32 ? linear_quantized_in<float> : dtype == kBF16 ? linear_quantized_in<bf16> : linear_quantized_in<fp16>;
  f(args);
}

}  // namespace
