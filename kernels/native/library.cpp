// The library's face: plain C over raw pointers. Chooses the instruction set once, by what the processor has.
//
// Every tensor is row-major. dtype: 0 fp32, 1 bf16, 2 fp16. Strides are in elements.
#include <string.h>

#include "decoder.h"
#include "ops.h"
#include "parallel.h"
#include "quantized_panel.h"

namespace {

struct Level {
  const char* name;
  const Ops* ops;
  bool supported;
};

#if defined(__x86_64__)
// What setup.py's AVX512 flags let the compiler use.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

Level g_levels[] = {
    {"generic", &ops_generic, true},
#if defined(__x86_64__)
    {"AVX2", &ops_avx2,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
    {"AVX512", &ops_avx512, has_avx512()},
    {"AVX512-VNNI", &ops_avx512_vnni, has_avx512() && __builtin_cpu_supports("avx512vnni")},
    {"AVX512-BF16", &ops_avx512_bf16,
     has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")},
#endif
};
constexpr int kLevels = sizeof g_levels / sizeof g_levels[0];

int best_level() {
  int best = 0;
  for (int i = 0; i < kLevels; i++)
    if (g_levels[i].supported) best = i;
  return best;
}

int g_level = best_level();

// Wide vectors need a head of whole vectors; odd multiples of 8 go to the 8-lane code.
const Ops& ops_for_dim(int dim) { return *g_levels[dim % 16 && g_level > 1 ? 1 : g_level].ops; }
const Ops& ops() { return *g_levels[g_level].ops; }

void paged_attention(int dtype, const AttentionArgs& args) {
  // Rows after the last sequence are padding: their result is 0.
  int64_t row_bytes = (int64_t)args.heads * args.dim * (dtype == kF32 ? 4 : 2);
  int64_t end = args.seqs > 0 ? args.query_start_S1[args.seqs] : 0;
  if (end < args.tokens) memset((char*)args.out_THD + end * row_bytes, 0, (args.tokens - end) * row_bytes);
  ops_for_dim(args.dim).paged_attention(dtype, args);
}

}  // namespace

EXPORT const char* quire_sources() { return QUIRE_SOURCES; }
EXPORT int quire_levels() { return kLevels; }
EXPORT int quire_level() { return g_level; }
EXPORT const char* quire_level_name(int level) { return g_levels[level].name; }

// Uses this level from now on. Returns 0, or -1 where the processor does not have it.
EXPORT int quire_set_level(int level) {
  if (level < 0 || level >= kLevels || !g_levels[level].supported) return -1;
  g_level = level;
  return 0;
}

EXPORT void quire_paged_attention(int dtype, void* out_THD, const void* q_THD, const void* kv_N2GPD,
                                  const int32_t* page_table_SB, const int32_t* query_start_S1,
                                  const int32_t* seq_len_S, int64_t page_table_stride, int64_t q_stride,
                                  int64_t q_head_stride, int tokens, int seqs, int heads, int kv_heads, int block, int dim,
                                  int window, float scale, float softcap, int int8_kv) {
  paged_attention(dtype, {out_THD, q_THD, kv_N2GPD, page_table_SB, query_start_S1, seq_len_S, page_table_stride, q_stride,
                          q_head_stride, tokens, seqs, heads, kv_heads, block, dim, window, scale, softcap, int8_kv});
}

EXPORT void quire_write_kv(int dtype, const void* k_TGD, const void* v_TGD, void* kv_N2GPD, const int64_t* slot_T,
                           int64_t tokens, int64_t k_stride, int64_t k_head_stride, int64_t v_stride,
                           int64_t v_head_stride, int kv_heads, int block, int dim, int int8_kv) {
  ops().write_kv(dtype, k_TGD, v_TGD, kv_N2GPD, slot_T, tokens, k_stride, k_head_stride, v_stride, v_head_stride,
                 kv_heads, block, dim, int8_kv);
}

// Blocks are opaque bytes. A block that is written is never also read in the same call.
EXPORT void quire_copy_blocks(void* kv_N2GPD, const int64_t* from, const int64_t* to, int64_t count,
                              int64_t block_bytes) {
  for (int64_t i = 0; i < count; i++)
    if (from[i] != to[i])
      memcpy((char*)kv_N2GPD + to[i] * block_bytes, (char*)kv_N2GPD + from[i] * block_bytes, block_bytes);
}

EXPORT void quire_rms_norm(int dtype, const void* x_TE, const void* weight_E, void* residual_TE, void* y_TE,
                           int64_t rows, int64_t inner, int64_t size, int64_t x_stride, int64_t x_inner_stride,
                           float eps, float offset) {
  ops().rms_norm(dtype, x_TE, weight_E, residual_TE, y_TE, rows, inner, size, x_stride, x_inner_stride, eps, offset);
}

EXPORT void quire_rotary(int dtype, void* q_THD, void* k_TGD, const float* cos_sin_MR, const int64_t* position_T,
                         int64_t tokens, int64_t q_stride, int64_t q_head_stride, int64_t k_stride,
                         int64_t k_head_stride, int heads, int kv_heads, int rotary_dim) {
  ops().rotary(dtype, q_THD, k_TGD, cos_sin_MR, position_T, tokens, q_stride, q_head_stride, k_stride, k_head_stride, heads,
               kv_heads, rotary_dim);
}

EXPORT void quire_gate_mul(int dtype, int activation, const void* gate_up_T2F, void* y_TF, int64_t rows,
                           int64_t size) {
  ops().gate_mul(dtype, activation, gate_up_T2F, y_TF, rows, size);
}

// `packed` has room for round_up(outputs, 64) * inputs elements; inputs must be even for bf16.
EXPORT void quire_pack_linear(int dtype, const void* weight_OI, void* packed, int64_t outputs, int64_t inputs) {
  ops().pack_linear(dtype, weight_OI, packed, outputs, inputs);
}

EXPORT void quire_linear(int dtype, const void* x_TI, const void* packed, const void* bias_O, void* y_TO, int64_t rows,
                         int64_t inputs, int64_t outputs, int64_t x_stride) {
  ops().linear(dtype, {x_TI, packed, bias_O, y_TO, rows, inputs, outputs, x_stride});
}

// `value_OI` int8, one value a byte; `packed` has room for round_up(outputs, 64) * inputs values of `bits` bits.
EXPORT void quire_pack_quantized(int bits, const int8_t* value_OI, uint32_t* packed, int64_t outputs, int64_t inputs) {
  pack_quantized(bits, value_OI, packed, outputs, inputs);
}

// `scale` has room for [panels, inputs / group, 64] in bf16; NaN where a weight is not finite.
EXPORT void quire_round_bf16(const void* weight_OI, uint32_t* packed, uint16_t* scale, int64_t outputs,
                             int64_t inputs, int64_t group) {
  ops().round_bf16(weight_OI, packed, scale, outputs, inputs, group);
}

EXPORT void quire_quantize_weights(int dtype, int bits, const void* weight_OI, int8_t* value_OI, float* scale_OG,
                                   int64_t outputs, int64_t inputs, int64_t group) {
  ops().quantize_weights(dtype, bits, weight_OI, value_OI, scale_OG, outputs, inputs, group);
}

EXPORT void quire_linear_quantized(int dtype, const void* x_TI, const uint32_t* packed, const void* scale,
                                   const int8_t* zero, const void* bias_O, void* y_TO, int64_t rows, int64_t inputs,
                                   int64_t outputs, int64_t x_stride, int64_t group, int bits,
                                   int scale_dtype) {
  ops().linear_quantized(dtype, {x_TI, packed, scale, zero, bias_O, y_TO, rows, inputs, outputs, x_stride, group, bits,
                               scale_dtype});
}

EXPORT void quire_decoder(const Decoder* decoder, const DecoderStep* step) {
  DecoderRun(ops(), paged_attention, *decoder, *step).run();
}

EXPORT void quire_sample(const float* logits_SV, const float* temperature_S, const int32_t* top_k_S,
                         const float* top_p_S, const float* min_p_S, const int64_t* seed_S, const int64_t* position_S,
                         int64_t* token_S, int64_t rows, int64_t vocabulary, int all_greedy, int any_filter) {
  ops().sample({logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, seed_S, position_S, token_S, rows, vocabulary,
                all_greedy, any_filter});
}

EXPORT void quire_penalize(float* logits_SV, const int64_t* row_S, const int32_t* output_count_UV,
                           const uint8_t* prompt_seen_UV, const float* presence_S, const float* frequency_S,
                           const float* repetition_S, int64_t rows, int64_t vocabulary) {
  ops().penalize({logits_SV, row_S, output_count_UV, prompt_seen_UV, presence_S, frequency_S, repetition_S, rows,
                  vocabulary});
}

EXPORT void quire_mask_tokens(float* logits_SV, const uint32_t* words_KW, const int64_t* row_K, int64_t rows,
                              int64_t words, int64_t vocabulary) {
  ops().mask_tokens({logits_SV, words_KW, row_K, rows, words, vocabulary});
}

EXPORT void quire_logprobs(const float* logits_SV, const int64_t* token_S, float* chosen_S, int64_t* top_ids_SK,
                           float* top_SK, int64_t rows, int64_t vocabulary, int64_t top) {
  ops().logprobs({logits_SV, token_S, chosen_S, top_ids_SK, top_SK, rows, vocabulary, top});
}
