// The ops, as one table of function pointers per instruction set. Signatures: library.cpp, where they are exported.
#pragma once
#include <stdint.h>

enum Dtype { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum Activation { kSilu = 0, kGeluTanh = 1 };

// One call of paged attention. Names and shapes are those of kernels/README.md; strides are in elements.
struct AttentionArgs {
  void* out_THD;
  const void* q_THD;
  const void* kv_N2GPD;
  const int32_t* page_table_SB;
  const int32_t* query_start_S1;
  const int32_t* seq_len_S;
  int64_t page_table_stride, q_stride, q_head_stride;
  int tokens, seqs, heads, kv_heads, block, dim, window;
  float scale, softcap;
  int int8_kv;  // the memory is int8 with factors (write_kv.h), whatever the dtype of q and out
};

// y = x W^T + bias. `packed` is what pack_linear wrote for W; bias_O may be null.
struct LinearArgs {
  const void *x_TI, *packed, *bias_O;
  void* y_TO;
  int64_t rows, inputs, outputs, x_stride;
};

// The same for a weight of integers. scale and zero are [panels, groups, 64], scale in `scale_dtype`; zero may be null;
// a group is `group` inputs. bits: 12 or 8 (signed), or 4 (0 to 15, standing for -8 to 7).
struct QuantizedArgs {
  const void* x_TI;
  const uint32_t* packed;
  const void* scale;
  const int8_t* zero;
  const void* bias_O;
  void* y_TO;
  int64_t rows, inputs, outputs, x_stride, group;
  int bits, scale_dtype;
};

struct SampleArgs {
  const float* logits_SV;
  const float* temperature_S;
  const int32_t* top_k_S;
  const float *top_p_S, *min_p_S;
  const int64_t *seed_S, *position_S;
  int64_t* token_S;
  int64_t rows, vocabulary;
  int all_greedy, any_filter;
};

struct PenalizeArgs {
  float* logits_SV;
  const int64_t* row_S;
  const int32_t* output_count_UV;
  const uint8_t* prompt_seen_UV;
  const float *presence_S, *frequency_S, *repetition_S;
  int64_t rows, vocabulary;
};

struct MaskTokensArgs {
  float* logits_SV;
  const uint32_t* words_KW;
  const int64_t* row_K;
  int64_t rows, words, vocabulary;
};

struct LogprobsArgs {
  const float* logits_SV;
  const int64_t* token_S;
  float* chosen_S;
  int64_t* top_ids_SK;
  float* top_SK;
  int64_t rows, vocabulary, top;
};

struct Ops {
  void (*paged_attention)(int dtype, const AttentionArgs& args);
  void (*write_kv)(int dtype, const void* k_TGD, const void* v_TGD, void* kv_N2GPD, const int64_t* slot_T,
                   int64_t tokens, int64_t k_stride, int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride,
                   int kv_heads, int block, int dim, int int8_kv);
  void (*rms_norm)(int dtype, const void* x_TE, const void* weight_E, void* residual_TE, void* y_TE, int64_t rows,
                   int64_t inner, int64_t size, int64_t x_stride, int64_t x_inner_stride, float eps, float offset);
  void (*rotary)(int dtype, void* q_THD, void* k_TGD, const float* cos_sin_MR, const int64_t* position_T,
                 int64_t tokens, int64_t q_stride, int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride,
                 int heads, int kv_heads, int rotary_dim);
  void (*gate_mul)(int dtype, int activation, const void* gate_up_T2F, void* y_TF, int64_t rows, int64_t size);
  void (*linear)(int dtype, const LinearArgs& args);
  void (*sample)(const SampleArgs& args);
  void (*penalize)(const PenalizeArgs& args);
  void (*mask_tokens)(const MaskTokensArgs& args);
  void (*logprobs)(const LogprobsArgs& args);
  void (*pack_linear)(int dtype, const void* weight_OI, void* packed, int64_t outputs, int64_t inputs);
  void (*linear_quantized)(int dtype, const QuantizedArgs& args);
  void (*round_bf16)(const void* weight_OI, uint32_t* packed, uint16_t* scale, int64_t outputs, int64_t inputs,
                     int64_t group);
  void (*quantize_weights)(int dtype, int bits, const void* weight_OI, int8_t* value_OI, float* scale_OG,
                           int64_t outputs, int64_t inputs, int64_t group);
};

extern const Ops ops_generic, ops_avx2, ops_avx512, ops_avx512_vnni, ops_avx512_bf16;
