// The order of a weight of integers, and how it is packed once, when it is loaded. Plain C++ for every processor.
//
// Panel: [I / s][64 outputs] words of 32 bits, s = 32 / bits inputs a word. Seen as two halves of 16 bits, the halves'
// j-th bytes (or nibbles) are the inputs 2j and 2j + 1: shifting both halves alike brings out a pair of neighbouring
// inputs in the place where the processor's 16-bit dot product wants it. 4-bit values are stored plus 8.
//
// 12 bits: three words hold eight inputs, again in halves. The upper 12 bits of the words' halves are the inputs 0 to
// 5, and their lower 4 bits, one after another, are the inputs 6 and 7 (round_bf16 packs them, linear_quantized.h).
#pragma once
#include <stdint.h>

#include "panel.h"
#include "parallel.h"

namespace {

inline uint32_t quantized_word(int bits, const int8_t* value) {
  uint32_t word = 0, mask = bits == 8 ? 255 : 15;
  int offset = bits == 8 ? 0 : 8;
  for (int i = 0; i < 32 / bits; i++)
    word |= ((uint32_t)(value[i] + offset) & mask) << (i % 2 * 16 + i / 2 * bits);
  return word;
}

inline void pack_quantized(int bits, const int8_t* value_OI, uint32_t* packed, int64_t outputs, int64_t inputs) {
  const int64_t step = 32 / bits, words = inputs / step;
  int64_t panels = (outputs + kPanel - 1) / kPanel;
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kPanel; o < end * kPanel; o++) {
      uint32_t* column = packed + o / kPanel * kPanel * words + o % kPanel;
      for (int64_t k = 0; k < words; k++)
        column[k * kPanel] = o < outputs ? quantized_word(bits, value_OI + o * inputs + k * step) : 0;
    }
  });
}

}  // namespace
