// Included last by each isa_*.cpp: every op, compiled for that file's instruction set.
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "linear_quantized.h"
#include "ops.h"
#include "quantize_weights.h"
#include "sample.h"
#include "write_kv.h"

#define QUIRE_OPS {paged_attention, write_kv, rms_norm, rotary, gate_mul, linear, sample, penalize, mask_tokens, logprobs, pack_linear, linear_quantized, round_bf16, quantize_weights}
