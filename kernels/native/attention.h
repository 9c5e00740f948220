// Paged attention: cuts a batch into tiles, shares them out over the threads, merges split sequences.
//
// Rows of a (sequence, kv head) are its query tokens times the query heads of the group, token-major, so one tile
// kernel serves decode (one token) and prefill. A tile takes up to 48 rows.
//
// A row's keys are summed in parts of 512, which are folded together in order: the same sums whoever computes them, so
// that a result does not depend on what else is in the batch. Mostly one thread computes all parts of a tile. Where
// there are fewer tiles than work for all threads (one long sequence) several do, and the last to finish folds.
#pragma once
#include "attention_tile.h"
#include "buffer.h"
#include "parallel.h"

namespace {

constexpr int kPartKeys = 512;

struct Item {
  int seq, kv_head, row, rows;  // rows [row, row + rows) of this sequence and kv head: a tile
  int key, end_key;             // the keys of the tile
  int part, end_part, parts;    // the parts that this item computes, of how many
  int items;                    // of the tile; > 1: they leave the results of each part
  int64_t partial;              // where the tile's begin, in rows
  int tile;                     // index of the tile's counter of finished items

  int part_key(int i) const { return i == 0 ? key : (key / kPartKeys + i) * kPartKeys; }
  int part_end(int i) const { return i + 1 == parts ? end_key : part_key(i + 1); }
};

struct Plan {
  Buffer<Item> items;
  Buffer<float> partials;  // per part and row: D outputs, max, sum
  Buffer<int> done;        // per tile of several items: those finished
  int64_t partial_rows = 0;
};

// Sums over some keys: D outputs, not yet divided by the sum of the weights, which are powers of 2 below the maximum.
struct RowSum {
  float* out;
  float max, sum;
};

struct Rows {
  int query_start, query_len, seq_len, group;
  Rows(const AttentionArgs& a, int seq) {
    query_start = a.query_start_S1[seq];
    query_len = a.query_start_S1[seq + 1] - query_start;
    seq_len = a.seq_len_S[seq];
    group = a.heads / a.kv_heads;
  }
  int count() const { return query_len * group; }
  int position(int row) const { return seq_len - query_len + row / group; }
  int end_key(int row) const { return position(row) + 1; }
  int first_key(int row, int window) const {
    int first = end_key(row) - window;
    return window > 0 && first > 0 ? first : 0;
  }
};

// The end of the softmax: a row without any key is 0.
INLINE float inverse(float sum) { return sum == 0 ? 0.0f : 1.0f / sum; }
INLINE int round_down(int x, int unit) { return x - x % unit; }

// Calls f(row, rows, key, end_key) for every tile of a sequence, those with the most keys first.
template <class F> void for_each_tile(const AttentionArgs& a, int seq, const F& f) {
  Rows rows(a, seq);
  int tile = rows.group < kMaxRows ? round_down(kMaxRows, rows.group) : kMaxRows;
  for (int row = rows.count() > 0 ? round_down(rows.count() - 1, tile) : -1; row >= 0; row -= tile) {
    int n = rows.count() - row < tile ? rows.count() - row : tile;
    int key = round_down(rows.first_key(row, a.window), kStep), end = rows.end_key(row + n - 1);
    f(row, n, key, end < key ? key : end);  // a sequence without keys: its rows are 0
  }
}

// About four items per thread balance the threads.
void make_plan(Plan& plan, const AttentionArgs& a) {
  int threads = quire_threads();
  int64_t work = 0;
  for (int seq = 0; seq < a.seqs; seq++)
    for_each_tile(a, seq, [&](int, int rows, int key, int end) { work += (int64_t)rows * (end - key) * a.kv_heads; });
  int64_t share = work / (threads * 4) + 1;
  plan.items.size = plan.done.size = plan.partial_rows = 0;
  for (int seq = 0; seq < a.seqs; seq++)
    for (int head = 0; head < a.kv_heads; head++)
      for_each_tile(a, seq, [&](int row, int rows, int key, int end) {
        int64_t wanted = threads > 1 ? (int64_t)rows * (end - key) / share + 1 : 1;
        int parts = end > key ? (end - 1) / kPartKeys - key / kPartKeys + 1 : 1;
        int items = wanted < parts ? (int)wanted : parts;
        for (int i = 0; i < items; i++)
          plan.items.push({seq, head, row, rows, key, end, parts * i / items, parts * (i + 1) / items, parts, items,
                           plan.partial_rows, (int)plan.done.size});
        if (items == 1) return;
        plan.done.push(0);
        plan.partial_rows += parts * rows;
      });
  plan.partials.reserve(plan.partial_rows * (a.dim + 2));
}

template <class M> struct Pages {
  const typename M::Stored* kv;
  const int32_t* page_table;
  int64_t slab, block_stride, v_offset;
  int block, dim, first_key, end_key;

  Pages(const AttentionArgs& a, const Item& item) {
    block = a.block, dim = a.dim, end_key = item.end_key;
    first_key = round_down(Rows(a, item.seq).first_key(item.row, a.window), kGranule);
    slab = (int64_t)block * (dim + (kHasFactors<M> ? kFactorBytes : 0));
    v_offset = slab * a.kv_heads, block_stride = 2 * v_offset;
    kv = (const typename M::Stored*)a.kv_N2GPD + item.kv_head * slab;
    page_table = a.page_table_SB + item.seq * a.page_table_stride;
  }

  // Finds the granules of keys [key, key + 64) that the item needs. Those below a window repeat the first, those past the
  // end the last, or stay as they were where none is needed, so that a prefetch always has an address.
  void locate(int key, Granules<M>& to) const {
    int n = 0;
    to.first = first_key > key ? (first_key - key) / kGranule : 0;
    for (; n < kStepGranules && key + n * kGranule < end_key; n++)
      locate_granule(key + (n < to.first ? to.first : n) * kGranule, to, n);
    to.count = n;
    for (; n > 0 && n < kStepGranules; n++) {
      to.k[n] = to.k[n - 1], to.v[n] = to.v[n - 1];
      to.k_factor[n] = to.k_factor[n - 1], to.v_factor[n] = to.v_factor[n - 1];
    }
  }

  INLINE void locate_granule(int token, Granules<M>& to, int n) const {
    int offset = token % block;
    const typename M::Stored* base = kv + page_table[token / block] * block_stride;
    to.k[n] = base + offset * M::I;
    to.v[n] = base + v_offset + (int64_t)offset * dim;
    if constexpr (kHasFactors<M>) {
      const typename M::Stored* factors = base + (int64_t)block * dim;
      to.k_factor[n] = (const float*)factors + offset, to.v_factor[n] = (const float*)(factors + v_offset) + offset;
    }
  }
};

// Converts a query, and returns what it was divided by.
template <class T, class Left> INLINE float load_left(const T* x, Left* q, int dim) {
  for (int d = 0; d < dim; d += W) store_left(q + d, load(x + d));
  return 1;
}
template <class T> INLINE float load_left(const T* x, int16_t* q, int dim) { return quantize_row<32767>(x, q, dim); }

template <class M, class T> void load_tile(Tile<M>& tile, const AttentionArgs& a, const Item& item, const Rows& rows) {
  tile.rows = item.rows, tile.dim = a.dim;
  for (int r = 0; r < item.rows; r++) {
    int row = item.row + r, head = item.kv_head * rows.group + row % rows.group;
    const T* q = (const T*)a.q_THD + (rows.query_start + row / rows.group) * a.q_stride + head * a.q_head_stride;
    tile.q_factor[r] = load_left(q, tile.q + r * a.dim, a.dim);
    tile.p_factor[r] = 1;
    tile.first_key[r] = rows.first_key(row, a.window), tile.end_key[r] = rows.end_key(row);
  }
}

template <class M> INLINE void clear(Tile<M>& tile) {
  memset(tile.out, 0, sizeof(float) * tile.rows * tile.dim);
  for (int r = 0; r < tile.rows; r++) tile.max[r] = kNoMax, tile.sum[r] = 0;
}

// Computes one part from nothing. Not inlined: its loops are large, and called from three places.
template <class M>
__attribute__((noinline)) void attend_part(Tile<M>& tile, const AttentionArgs& a, const Item& item, int part) {
  constexpr float kLog2e = 1.44269504f;
  clear(tile);
  Pages<M> pages(a, item);
  Step<M> step;
  int key = item.part_key(part), end = item.part_end(part);
  pages.locate(key, step.now);
  step.next = step.now;
  for (; key < end; key += kStep) {
    step.tokens = end - key < kStep ? end - key : kStep;
    pages.locate(key + kStep, step.next);
    attend_step(tile, step, key, a.block, a.scale * kLog2e, a.softcap * kLog2e);
    step.now = step.next;
  }
}

template <class T> INLINE void store_row(const AttentionArgs& a, const Item& item, const Rows& rows, int r,
                                         const float* out, float sum) {
  int row = item.row + r, head = item.kv_head * rows.group + row % rows.group;
  T* y = (T*)a.out_THD + ((int64_t)(rows.query_start + row / rows.group) * a.heads + head) * a.dim;
  float factor = inverse(sum);
  for (int d = 0; d < a.dim; d += W) store(y + d, load(out + d) * factor);
}

// Adds a part to those before it. Not inlined: everywhere the same instructions, for the same bits.
__attribute__((noinline)) void fold(RowSum& total, const RowSum& part, int dim) {
  float top = part.max > total.max ? part.max : total.max;
  float before = exp2f(total.max - top), factor = exp2f(part.max - top);
  total.max = top, total.sum = total.sum * before + part.sum * factor;
  for (int d = 0; d < dim; d += W) store(total.out + d, load(total.out + d) * before + load(part.out + d) * factor);
}

// All parts of a tile, by one thread.
template <class M, class T> void run_tile(Tile<M>& tile, const AttentionArgs& a, const Item& item, const Rows& rows) {
  alignas(64) float out[kMaxRows * kMaxDim];
  RowSum total[kMaxRows];
  memset(out, 0, sizeof(float) * item.rows * a.dim);
  for (int r = 0; r < item.rows; r++) total[r] = {out + r * a.dim, kNoMax, 0};
  for (int part = 0; part < item.parts; part++) {
    attend_part(tile, a, item, part);
    for (int r = 0; r < item.rows; r++) fold(total[r], {tile.out + r * a.dim, tile.max[r], tile.sum[r]}, a.dim);
  }
  for (int r = 0; r < item.rows; r++) store_row<T>(a, item, rows, r, total[r].out, total[r].sum);
}

template <class T> void fold_parts(const AttentionArgs& a, const Item& item, const Rows& rows, float* partials) {
  int64_t width = a.dim + 2;
  for (int r = 0; r < item.rows; r++) {
    alignas(64) float out[kMaxDim] = {};
    RowSum total = {out, kNoMax, 0};
    for (int part = 0; part < item.parts; part++) {
      float* row = partials + (item.partial + part * item.rows + r) * width;
      fold(total, {row, row[a.dim], row[a.dim + 1]}, a.dim);
    }
    store_row<T>(a, item, rows, r, out, total.sum);
  }
}

template <class M, class T> void run_item(Plan& plan, const AttentionArgs& a, const Item& item) {
  Tile<M> tile;
  Rows rows(a, item.seq);
  load_tile<M, T>(tile, a, item, rows);
  if (item.parts == 1) {
    attend_part(tile, a, item, 0);
    for (int r = 0; r < item.rows; r++) store_row<T>(a, item, rows, r, tile.out + r * a.dim, tile.sum[r]);
    return;
  }
  if (item.items == 1) return run_tile<M, T>(tile, a, item, rows);
  for (int part = item.part; part < item.end_part; part++) {
    attend_part(tile, a, item, part);
    float* partial = plan.partials.data + (item.partial + part * item.rows) * (int64_t)(a.dim + 2);
    for (int r = 0; r < item.rows; r++, partial += a.dim + 2) {
      memcpy(partial, tile.out + r * a.dim, a.dim * sizeof(float));
      partial[a.dim] = tile.max[r], partial[a.dim + 1] = tile.sum[r];
    }
  }
  if (__atomic_add_fetch(&plan.done.data[item.tile], 1, __ATOMIC_ACQ_REL) == item.items)
    fold_parts<T>(a, item, rows, plan.partials.data);
}

template <class M, class T> void attention_of(const AttentionArgs& a) {
  static thread_local Plan plan;
  make_plan(plan, a);
  // A lambda cannot name a thread_local of another thread, so it takes the address.
  Plan* p = &plan;
  for_each_item(plan.items.size, quire_threads(), [&, p](int64_t i) { run_item<M, T>(*p, a, p->items.data[i]); });
}

void paged_attention(int dtype, const AttentionArgs& args) {
  if (args.int8_kv) {
    auto f = dtype == kF32    ? attention_of<MulInt8, float>
             : dtype == kBF16 ? attention_of<MulInt8, bf16>
                              : attention_of<MulInt8, fp16>;
    return f(args);
  }
  auto f = dtype == kF32    ? attention_of<MulF32, float>
           : dtype == kBF16 ? attention_of<MulBF16, bf16>
                            : attention_of<MulF16, fp16>;
  f(args);
}

}  // namespace
