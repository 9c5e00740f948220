// linear: y = x W^T + bias, with W packed once into panels of 64 outputs.
//
// Panel: [I / i][64][i], i = 2 for bf16 and 1 else (multiply.h); the last panel is padded with zero outputs. A panel
// is one stream of memory, which is all that counts for few rows; for many rows it is cut along I into pieces that
// stay in the L2 cache while blocks of MR rows pass by. Sums are fp32, whatever the types; each piece is summed on
// its own, which also keeps the rounding error of long rows down. A row's result does not depend on the others.
//
// Where the processor multiplies floats alone, more than a few rows take another way (linear_tiles.h).
#pragma once
#include "buffer.h"
#include "linear_tiles.h"
#include "multiply.h"
#include "ops.h"
#include "parallel.h"

namespace {

constexpr int kChunkRows = 48;    // rows per work item at most: their sums take 12 KB
// Inputs per piece: 64 * 512 bf16 weights are 64 KB. Where tiles take over for more rows, the same as theirs.
template <class M> constexpr int kDepth = sizeof(typename M::Left) == sizeof(float) ? kTileDepth : 512;

// sums[MR, NR * W] += x[MR, depth] panel[depth, columns]
template <class M, int MR, int NR>
void panel_block(const typename M::Left* x, int64_t x_stride, const typename M::Stored* panel, int depth, float* sums) {
  F32 acc[MR][NR] = {};
  for (int k = 0; k < depth; k += M::I) {
    typename M::Right right[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      const typename M::Stored* p = panel + ((int64_t)k * kPanel + n * W * M::I);
      right[n] = M::load_right(p);
      if (MR <= 4) __builtin_prefetch((const char*)p + 4096, 0, 3);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) acc[r][n] = M::fma(acc[r][n], x + r * x_stride + k, right[n]);
  }
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NR; n++) {
      float* sum = sums + r * kPanel + n * W;
      store(sum, load(sum) + acc[r][n]);
    }
}

// Vectors of outputs per pass: a single row takes the whole panel at once, one stream with eight sums to overlap.
template <int MR> constexpr int kColumns = W == 8 ? (MR == 1 ? 8 : MR == 2 ? 4 : kNR) : kNR;

template <class M, int MR>
INLINE void panel_rows(const typename M::Left* x, int64_t x_stride, const typename M::Stored* panel, int depth,
                       float* sums, int rows) {
  if constexpr (MR > 0) {
    for (; rows >= MR; rows -= MR, x += MR * x_stride, sums += MR * kPanel)
      for (int column = 0; column < kPanel; column += kColumns<MR> * W)
        panel_block<M, MR, kColumns<MR>>(x, x_stride, panel + column * M::I, depth, sums + column);
    panel_rows<M, MR - 1>(x, x_stride, panel, depth, sums, rows);
  }
}

template <class T, class Args>
void store_panel(const Args& a, const float* sums, int64_t row, int rows, int64_t output) {
  int64_t width = a.outputs - output < kPanel ? a.outputs - output : kPanel;
  const T* bias = (const T*)a.bias_O + output;
  for (int r = 0; r < rows; r++)
    for_each_vector(width, [&](int64_t c, int n) {
      F32 y = load(sums + r * kPanel + c, n);
      if (a.bias_O) y += load(bias + c, n);
      store((T*)a.y_TO + (row + r) * a.outputs + output + c, y, n);
    });
}

// Rows of x in the type that multiplies: as they are if that is their own, else converted once per item.
INLINE const float* left_rows(const float* x, int64_t& stride, int, int64_t, Buffer<float>&) { (void)stride; return x; }
#if defined(__AVX512BF16__)
INLINE const bf16* left_rows(const bf16* x, int64_t& stride, int, int64_t, Buffer<bf16>&) { (void)stride; return x; }
#endif
template <class T>
const float* left_rows(const T* x, int64_t& stride, int rows, int64_t inputs, Buffer<float>& buffer) {
  buffer.reserve(rows * inputs);
  for (int r = 0; r < rows; r++)
    for_each_vector(inputs, [&](int64_t i, int n) { store(buffer.data + r * inputs + i, load(x + r * stride + i, n), n); });
  stride = inputs;
  return buffer.data;
}

template <class M>
void linear_item(const LinearArgs& a, int64_t row, int rows, int64_t first_panel, int64_t end_panel) {
  typedef typename M::Stored T;
  static thread_local Buffer<typename M::Left> buffer;
  int64_t stride = a.x_stride;
  const typename M::Left* x = left_rows((const T*)a.x_TI + row * stride, stride, rows, a.inputs, buffer);
  for (int64_t panel = first_panel; panel < end_panel; panel++) {
    alignas(64) float sums[kChunkRows * kPanel];
    memset(sums, 0, rows * kPanel * sizeof(float));
    for (int64_t k = 0; k < a.inputs; k += kDepth<M>) {
      int depth = a.inputs - k < kDepth<M> ? (int)(a.inputs - k) : kDepth<M>;
      panel_rows<M, kMR>(x + k, stride, (const T*)a.packed + (panel * a.inputs + k) * kPanel, depth, sums, rows);
    }
    store_panel<T>(a, sums, row, rows, panel * kPanel);
  }
}

// The same with tiles, for rows that were put in order.
template <class T>
void linear_tiles_item(const LinearArgs& a, const float* ordered, int mr, int64_t row, int rows, int64_t first_panel,
                       int64_t end_panel) {
  for (int64_t panel = first_panel; panel < end_panel; panel++) {
    alignas(64) float sums[kChunkRows * kPanel];
    memset(sums, 0, rows * kPanel * sizeof(float));
    for (int64_t k = 0; k < a.inputs; k += kTileDepth) {
      int depth = a.inputs - k < kTileDepth ? (int)(a.inputs - k) : kTileDepth;
      tile_panel(ordered + row * a.inputs, a.inputs, k, (const T*)a.packed + (panel * a.inputs + k) * kPanel, depth, mr,
                 rows, sums);
    }
    store_panel<T>(a, sums, row, rows, panel * kPanel);
  }
}

// Calls f(row, rows, panel, end_panel) for pieces of the result: row chunks times groups of panels, handed out as
// threads become free. Rows come in chunks of whole blocks of mr.
template <class F>
void for_each_panel_group(int64_t all_rows, int64_t inputs, int64_t outputs, int mr, const F& f) {
  int64_t chunk_rows = kChunkRows / mr * mr, chunks = (all_rows + chunk_rows - 1) / chunk_rows;
  int64_t panels = (outputs + kPanel - 1) / kPanel, group = panels * chunks / (quire_threads() * 8);
  group = group < 1 ? 1 : group > 16 ? 16 : group;
  int64_t groups = (panels + group - 1) / group;
  bool tiny = inputs * outputs * all_rows < 65536;
  for_each_item(groups * chunks, tiny ? 1 : quire_threads(), [&](int64_t item) {
    int64_t row = item / groups * chunk_rows, panel = item % groups * group;
    int rows = all_rows - row < chunk_rows ? (int)(all_rows - row) : (int)chunk_rows;
    f(row, rows, panel, panel + group < panels ? panel + group : panels);
  });
}

template <class M> void linear_of(const LinearArgs& a) {
  typedef typename M::Stored T;
  static thread_local Buffer<float> buffer;
  const float* ordered = nullptr;
  int mr = tile_height(a.rows);
  if (sizeof(typename M::Left) == sizeof(float) && a.rows > kFewRows) {
    buffer.reserve(a.rows * a.inputs);
    order_rows((const T*)a.x_TI, a.x_stride, a.rows, a.inputs, mr, buffer.data);
    ordered = buffer.data;
  }
  for_each_panel_group(a.rows, a.inputs, a.outputs, mr, [&](int64_t row, int rows, int64_t panel, int64_t end) {
    if (ordered) linear_tiles_item<T>(a, ordered, mr, row, rows, panel, end);
    else linear_item<M>(a, row, rows, panel, end);
  });
}

void linear(int dtype, const LinearArgs& args) {
  auto f = dtype == kF32 ? linear_of<MulF32> : dtype == kBF16 ? linear_of<MulBF16> : linear_of<MulF16>;
  f(args);
}

template <class T> void pack_linear_of(const void* weight_OI, void* packed, int64_t outputs, int64_t inputs) {
  constexpr int I = kInterleave<T>;
  int64_t panels = (outputs + kPanel - 1) / kPanel;
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kPanel; o < end * kPanel; o++) {
      T* column = (T*)packed + o / kPanel * kPanel * inputs + o % kPanel * I;
      const T* row = (const T*)weight_OI + o * inputs;
      for (int64_t i = 0; i < inputs; i += I) {
        if (o < outputs) memcpy(column + i * kPanel, row + i, I * sizeof(T));
        else memset(column + i * kPanel, 0, I * sizeof(T));
      }
    }
  });
}

void pack_linear(int dtype, const void* weight_OI, void* packed, int64_t outputs, int64_t inputs) {
  auto f = dtype == kF32 ? pack_linear_of<float> : dtype == kBF16 ? pack_linear_of<bf16> : pack_linear_of<fp16>;
  f(weight_OI, packed, outputs, inputs);
}

}  // namespace
