// Products of many rows where the processor multiplies fp32 alone: both sides are first put in order as fp32.
//
// Left side: blocks of `mr` rows, inside a block input by input, so that a tile reads one stream (rows a page apart
// would share a set of the L1 cache). Right side: a slice of kTileWidth outputs of a piece of a panel, widened into
// 16 KB that stay in the L1 cache while all rows of a chunk pass by; so a weight is widened once per chunk, not once
// per tile. A tile of 6 rows by two vectors has 12 sums: with two vectors of weights and an input, AVX2's registers.
#pragma once
#include "multiply.h"
#include "panel.h"
#include "parallel.h"

namespace {

constexpr int kFewRows = 2;                     // up to here memory decides, and the panel is read as it is
constexpr int kTileRows = 6, kTileVectors = 2;  // sums per tile: rows x vectors
constexpr int kTileWidth = kTileVectors * W;
constexpr int kTileDepth = 256;                 // inputs per piece

// Rows per tile such that all tiles are about equally high.
INLINE int tile_height(int64_t rows) {
  int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  return tiles ? (int)((rows + tiles - 1) / tiles) : 1;
}

// out: blocks of mr rows one after another, each [inputs][rows of the block].
template <class T>
void order_rows(const T* x, int64_t x_stride, int64_t rows, int64_t inputs, int mr, float* out) {
  parallel_for((rows + mr - 1) / mr, 32768 / inputs + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * mr; row < end * mr && row < rows; row++) {
      int64_t first = row / mr * mr, height = rows - first < mr ? rows - first : mr;
      float* to = out + first * inputs + row - first;
      for_each_vector(inputs, [&](int64_t i, int n) {
        F32 v = load(x + row * x_stride + i, n);
        for (int j = 0; j < n; j++) to[(i + j) * height] = v[j];
      });
    }
  });
}

// One slice of a panel, [depth][kTileWidth] fp32.
INLINE void widen_slice(const bf16* panel, int depth, float* slice) {
  for (int k = 0; k < depth; k += 2, panel += 2 * kPanel, slice += 2 * kTileWidth)
    for (int n = 0; n < kTileWidth; n += W) {
      U32 pair = load_as<U32>(panel + 2 * n);
      store_as(slice + n, pair << 16);
      store_as(slice + kTileWidth + n, pair & 0xffff0000);
    }
}
template <class T> INLINE void widen_slice(const T* panel, int depth, float* slice) {
  for (int k = 0; k < depth; k++, panel += kPanel, slice += kTileWidth)
    for (int n = 0; n < kTileWidth; n += W) store(slice + n, load(panel + n));
}

// sums[MR, kTileWidth] += x[depth, MR]^T slice[depth, kTileWidth]. Meanwhile `ahead`, and what follows it, is fetched
// from memory, so many bytes with every input.
template <int MR>
void tile(const float* x, const float* slice, int depth, float* sums, const char* ahead, int bytes) {
  F32 acc[MR][kTileVectors] = {};
  for (int k = 0; k < depth; k++, x += MR, slice += kTileWidth, ahead += bytes) {
    __builtin_prefetch(ahead, 0, 2);
    F32 right[kTileVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kTileVectors; n++) right[n] = load(slice + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int n = 0; n < kTileVectors; n++) acc[r][n] += x[r] * right[n];
  }
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < kTileVectors; n++) {
      float* sum = sums + r * kPanel + n * W;
      store(sum, load(sum) + acc[r][n]);
    }
}

// sums[rows, kPanel] += x[rows, k ... k + depth] panel; x is in blocks of mr rows. The tiles share the fetching of
// the next piece.
template <class T>
void tile_panel(const float* x, int64_t inputs, int64_t k, const T* panel, int depth, int mr, int rows, float* sums) {
  typedef void (*Tile)(const float*, const float*, int, float*, const char*, int);
  static constexpr Tile kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  alignas(64) float slice[kTileDepth * kTileWidth];
  int tiles = kPanel / kTileWidth * ((rows + mr - 1) / mr), bytes = (int)(kPanel * sizeof(T) + tiles - 1) / tiles;
  const char* ahead = (const char*)(panel + (int64_t)depth * kPanel);
  for (int column = 0; column < kPanel; column += kTileWidth) {
    widen_slice(panel + column * kInterleave<T>, depth, slice);
    for (int row = 0; row < rows; row += mr, ahead += depth * bytes) {
      int height = rows - row < mr ? rows - row : mr;
      kTiles[height](x + row * inputs + k * height, slice, depth, sums + row * kPanel + column, ahead, bytes);
    }
  }
}

}  // namespace
