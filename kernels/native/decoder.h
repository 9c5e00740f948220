// All layers of a step in one call: the ops that engine/model/layers runs one by one, without Python between them. A
// decode step of a small model is a hundred ops of some 10 us, and what lies between two of them costs about as much;
// nor do the worker threads fall asleep in the gaps.
#pragma once
#include <string.h>

#include "buffer.h"
#include "ops.h"
#include "parallel.h"

// A packed weight: of floats where bits is 0, else as in QuantizedArgs.
struct LinearWeight {
  const void* packed;
  const void* scale;
  const int8_t* zero;
  const void* bias_O;
  int64_t inputs, outputs, group, bits, scale_dtype;
};

// Norms are null where a layer has none.
struct DecoderLayer {
  LinearWeight qkv, o, gate_up, down;
  const void *input_norm_E, *attention_out_norm_E, *mlp_norm_E, *mlp_out_norm_E, *q_norm_D, *k_norm_D;
  const float* cos_sin_MR;
  void* kv_N2GPD;
  int64_t rotary_dim, window;
};

struct Decoder {
  const DecoderLayer* layers;
  const void* final_norm_E;
  int64_t num_layers, hidden, heads, kv_heads, dim, block;
  int dtype, activation, int8_kv;
  float eps, norm_offset, scale, softcap;
};

// Tokens and the sequences that they belong to.
struct Queries {
  const int32_t *page_table_SB, *query_start_S1, *seq_len_S;
  int64_t tokens, seqs, page_table_stride;
};

// One step. residual_TE holds the embeddings, and is written; out_WE gets the final norm's result of the wanted tokens:
// all, or fewer, of which wanted_W has the indices, ascending. The last layer goes on with them alone.
struct DecoderStep {
  void *residual_TE, *out_WE;
  const int64_t *position_T, *slot_T, *wanted_W;
  Queries all, wanted;
};

namespace {

class DecoderRun {
 public:
  typedef void (*Attention)(int dtype, const AttentionArgs& args);

  DecoderRun(const Ops& ops, Attention attention, const Decoder& d, const DecoderStep& step)
      : ops_(ops), attention_(attention), d_(d), step_(step), now_(step.all), size_(d.dtype == kF32 ? 4 : 2),
        heads_size_((d.heads + 2 * d.kv_heads) * d.dim) {}

  void run() {
    const void* delta = nullptr;  // what the layer below handed on, not yet in the residual
    for (int64_t i = 0; i < d_.num_layers; i++) delta = layer(d_.layers[i], delta, i + 1 == d_.num_layers);
    if (now_.tokens > 0) norm(delta, d_.final_norm_E, step_.residual_TE, step_.out_WE);
  }

 private:
  const void* layer(const DecoderLayer& l, const void* delta, bool last) {
    static thread_local Buffer<char> x, attended, added, hidden;
    char* x_TE = room(x, d_.hidden);
    char* added_TE = room(added, d_.hidden);
    if (delta) norm(delta, l.input_norm_E, step_.residual_TE, x_TE);
    else norm(step_.residual_TE, l.input_norm_E, nullptr, x_TE);
    char* q_TXD = project(l, x_TE);
    if (last && step_.wanted.tokens < now_.tokens) keep_wanted(q_TXD);
    if (now_.tokens == 0) return nullptr;
    char* attended_THD = room(attended, d_.heads * d_.dim);
    attend(l, q_TXD, attended_THD);
    linear(l.o, attended_THD, added_TE);
    if (l.attention_out_norm_E) norm(added_TE, l.attention_out_norm_E, nullptr, added_TE);
    norm(added_TE, l.mlp_norm_E, step_.residual_TE, x_TE);
    char* hidden_TF = room(hidden, l.down.inputs);
    gated(l, x_TE, hidden_TF);
    linear(l.down, hidden_TF, added_TE);
    if (l.mlp_out_norm_E) norm(added_TE, l.mlp_out_norm_E, nullptr, added_TE);
    return added_TE;
  }

  // Queries, keys and values of every token; the keys and values are written.
  char* project(const DecoderLayer& l, const void* x_TE) {
    static thread_local Buffer<char> qkv;
    char* q = room(qkv, heads_size_);
    char *k = q + d_.heads * d_.dim * size_, *v = k + d_.kv_heads * d_.dim * size_;
    linear(l.qkv, x_TE, q);
    if (l.q_norm_D) {
      head_norms(q, l.q_norm_D, d_.heads);
      head_norms(k, l.k_norm_D, d_.kv_heads);
    }
    ops_.rotary(d_.dtype, q, k, l.cos_sin_MR, step_.position_T, now_.tokens, heads_size_, d_.dim, heads_size_, d_.dim,
                (int)d_.heads, (int)d_.kv_heads, (int)l.rotary_dim);
    ops_.write_kv(d_.dtype, k, v, l.kv_N2GPD, step_.slot_T, now_.tokens, heads_size_, d_.dim, heads_size_, d_.dim,
                  (int)d_.kv_heads, (int)d_.block, (int)d_.dim, d_.int8_kv);
    return q;
  }

  // Nobody reads what the last layer makes of the other tokens. Rows move up in place, which ascending indices allow.
  void keep_wanted(char* q_TXD) {
    const int64_t q_bytes = heads_size_ * size_, residual_bytes = d_.hidden * size_;
    char* residual = (char*)step_.residual_TE;
    for (int64_t i = 0; i < step_.wanted.tokens; i++) {
      const int64_t from = step_.wanted_W[i];
      if (from == i) continue;
      memcpy(q_TXD + i * q_bytes, q_TXD + from * q_bytes, d_.heads * d_.dim * size_);
      memcpy(residual + i * residual_bytes, residual + from * residual_bytes, residual_bytes);
    }
    now_ = step_.wanted;
  }

  void attend(const DecoderLayer& l, const char* q_TXD, void* out_THD) {
    attention_(d_.dtype, {out_THD, q_TXD, l.kv_N2GPD, now_.page_table_SB, now_.query_start_S1, now_.seq_len_S,
                          now_.page_table_stride, heads_size_, d_.dim, (int)now_.tokens, (int)now_.seqs, (int)d_.heads,
                          (int)d_.kv_heads, (int)d_.block, (int)d_.dim, (int)l.window, d_.scale, d_.softcap, d_.int8_kv});
  }

  void gated(const DecoderLayer& l, const void* x_TE, void* y_TF) {
    static thread_local Buffer<char> gate_up;
    char* gate_up_T2F = room(gate_up, l.gate_up.outputs);
    linear(l.gate_up, x_TE, gate_up_T2F);
    ops_.gate_mul(d_.dtype, d_.activation, gate_up_T2F, y_TF, now_.tokens, l.down.inputs);
  }

  void linear(const LinearWeight& w, const void* x, void* y) {
    if (w.bits == 0) return ops_.linear(d_.dtype, {x, w.packed, w.bias_O, y, now_.tokens, w.inputs, w.outputs, w.inputs});
    ops_.linear_quantized(d_.dtype, {x, (const uint32_t*)w.packed, w.scale, w.zero, w.bias_O, y, now_.tokens, w.inputs,
                                     w.outputs, w.inputs, w.group, (int)w.bits, (int)w.scale_dtype});
  }

  void norm(const void* x, const void* weight, void* residual, void* y) {
    ops_.rms_norm(d_.dtype, x, weight, residual, y, now_.tokens, 1, d_.hidden, d_.hidden, 0, d_.eps, d_.norm_offset);
  }

  // Of every head of the fused projection, in place; so many elements a thread as in elementwise.h.
  void head_norms(char* x, const void* weight, int64_t heads) {
    parallel_for(now_.tokens, 1 + 32768 / (heads * d_.dim), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        char* row = x + t * heads_size_ * size_;
        ops_.rms_norm(d_.dtype, row, weight, nullptr, row, heads, 1, d_.dim, d_.dim, 0, d_.eps, d_.norm_offset);
      }
    });
  }

  char* room(Buffer<char>& buffer, int64_t width) {
    buffer.reserve(now_.tokens * width * size_);
    return buffer.data;
  }

  const Ops& ops_;
  Attention attention_;
  const Decoder& d_;
  const DecoderStep& step_;
  Queries now_;  // the tokens that are computed: all, and after keep_wanted those
  int64_t size_, heads_size_;
};

}  // namespace
