// Paged attention: cuts a batch into tiles, shares them out over the threads, merges split sequences.
//
// Rows of a (sequence, kv head) are its query tokens times the query heads of the group, token-major, so one tile
// kernel serves decode (one token) and prefill. A tile takes up to 48 rows. Where there are fewer tiles than work
// for all threads (one long sequence), a tile's keys are split as well; the last part to finish merges the parts.
#pragma once
#include "attention_tile.h"
#include "buffer.h"
#include "parallel.h"

namespace {

struct Item {
  int seq, kv_head, row, rows;  // rows [row, row + rows) of this sequence and kv head
  int key, end_key;             // the keys this item reads
  int parts, part;              // parts > 1: the item writes partial results
  int64_t partial;              // offset of its group's partial results, in rows
  int group;                    // index of its group's counter of finished parts
};

struct Plan {
  Buffer<Item> items;
  Buffer<float> partials;  // per row: D outputs, max, sum
  Buffer<int> done;        // per group: parts finished
  int64_t partial_rows = 0;
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
    f(row, n, round_down(rows.first_key(row, a.window), kGranule), rows.end_key(row + n - 1));
  }
}

// About four items per thread balance the threads; a part below 512 keys would not pay for its merge.
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
        if (end < key) end = key;  // a sequence without keys: its rows are 0
        int64_t wanted = threads > 1 ? (int64_t)rows * (end - key) / share + 1 : 1;
        int most = (end - key) / 512 + 1, parts = wanted < most ? (int)wanted : most;
        int part_keys = round_down((end - key + parts - 1) / parts + kStep - 1, kStep);
        parts = part_keys > 0 ? (end - key + part_keys - 1) / part_keys : 1;
        for (int part = 0; part < parts; part++) {
          int from = key + part * part_keys, to = part + 1 < parts ? from + part_keys : end;
          plan.items.push({seq, head, row, rows, from, to, parts, part, plan.partial_rows, (int)plan.done.size});
        }
        if (parts == 1) return;
        plan.done.push(0);
        plan.partial_rows += parts * rows;
      });
  plan.partials.reserve(plan.partial_rows * (a.dim + 2));
}

template <class M> struct Pages {
  const typename M::Stored* kv;
  const int32_t* page_table;
  int64_t slab, block_stride, v_offset;
  int block, dim, end_key;

  Pages(const AttentionArgs& a, const Item& item) {
    block = a.block, dim = a.dim, end_key = item.end_key;
    slab = (int64_t)block * (dim + (kHasFactors<M> ? kFactorBytes : 0));
    v_offset = slab * a.kv_heads, block_stride = 2 * v_offset;
    kv = (const typename M::Stored*)a.kv_N2GPD + item.kv_head * slab;
    page_table = a.page_table_SB + item.seq * a.page_table_stride;
  }

  // Finds the granules of keys [key, key + 64) that the item needs. Absent ones repeat the last, or stay as they
  // were where none is needed, so that a prefetch always has an address.
  void locate(int key, Granules<M>& to) const {
    int n = 0;
    for (; n < kStepGranules && key + n * kGranule < end_key; n++) locate_granule(key + n * kGranule, to, n);
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
  memset(tile.out, 0, sizeof(float) * item.rows * a.dim);
  for (int r = 0; r < item.rows; r++) {
    int row = item.row + r, head = item.kv_head * rows.group + row % rows.group;
    const T* q = (const T*)a.q_THD + (rows.query_start + row / rows.group) * a.q_stride + head * a.q_head_stride;
    tile.q_factor[r] = load_left(q, tile.q + r * a.dim, a.dim);
    tile.p_factor[r] = 1;
    tile.max[r] = kNoMax, tile.sum[r] = 0;
    tile.first_key[r] = rows.first_key(row, a.window), tile.end_key[r] = rows.end_key(row);
  }
}

template <class M> void attend_keys(Tile<M>& tile, const AttentionArgs& a, const Item& item) {
  constexpr float kLog2e = 1.44269504f;
  Pages<M> pages(a, item);
  Step<M> step;
  pages.locate(item.key, step.now);
  step.next = step.now;
  for (int key = item.key; key < item.end_key; key += kStep) {
    step.tokens = item.end_key - key < kStep ? item.end_key - key : kStep;
    pages.locate(key + kStep, step.next);
    attend_step(tile, step, key, a.block, a.scale * kLog2e, a.softcap * kLog2e);
    step.now = step.next;
  }
}

template <class T> INLINE void store_row(const AttentionArgs& a, const Item& item, const Rows& rows, int r,
                                         const float* out, float factor) {
  int row = item.row + r, head = item.kv_head * rows.group + row % rows.group;
  T* y = (T*)a.out_THD + ((int64_t)(rows.query_start + row / rows.group) * a.heads + head) * a.dim;
  for (int d = 0; d < a.dim; d += W) store(y + d, load(out + d) * factor);
}

template <class T> void merge_parts(const AttentionArgs& a, const Item& item, const Rows& rows, const float* partials) {
  int64_t width = a.dim + 2;
  for (int r = 0; r < item.rows; r++) {
    float top = kNoMax, sum = 0;
    for (int part = 0; part < item.parts; part++) {
      const float* row = partials + (item.partial + part * item.rows + r) * width;
      top = row[a.dim] > top ? row[a.dim] : top;
    }
    alignas(64) float out[kMaxDim] = {};
    for (int part = 0; part < item.parts; part++) {
      const float* row = partials + (item.partial + part * item.rows + r) * width;
      float factor = exp2f(row[a.dim] - top);
      sum += row[a.dim + 1] * factor;
      for (int d = 0; d < a.dim; d += W) store(out + d, load(out + d) + load(row + d) * factor);
    }
    store_row<T>(a, item, rows, r, out, inverse(sum));
  }
}

template <class M, class T> void run_item(Plan& plan, const AttentionArgs& a, const Item& item) {
  Tile<M> tile;
  Rows rows(a, item.seq);
  load_tile<M, T>(tile, a, item, rows);
  attend_keys(tile, a, item);
  if (item.parts == 1) {
    for (int r = 0; r < item.rows; r++) store_row<T>(a, item, rows, r, tile.out + r * a.dim, inverse(tile.sum[r]));
    return;
  }
  float* partial = plan.partials.data + (item.partial + item.part * item.rows) * (int64_t)(a.dim + 2);
  for (int r = 0; r < item.rows; r++, partial += a.dim + 2) {
    memcpy(partial, tile.out + r * a.dim, a.dim * sizeof(float));
    partial[a.dim] = tile.max[r], partial[a.dim + 1] = tile.sum[r];
  }
  if (__atomic_add_fetch(&plan.done.data[item.group], 1, __ATOMIC_ACQ_REL) == item.parts)
    merge_parts<T>(a, item, rows, plan.partials.data);
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
