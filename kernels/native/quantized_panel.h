// The order of a weight of integers, and how it is packed once, when it is loaded. Plain C++ for every processor.
//
// Panel: [I / s][64 outputs] words of 32 bits, s = 32 / bits inputs a word. Seen as two halves of 16 bits, the halves'
// j-th bytes (or nibbles) are the inputs 2j and 2j + 1: shifting both halves alike brings out a pair of neighbouring
// inputs in the place where the processor's 16-bit dot product wants it. 4-bit values are stored plus 8.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "parallel.h"

namespace {

constexpr int kQuantizedPanel = 64;

inline uint32_t quantized_word(int bits, const int8_t* value) {
  uint32_t word = 0, mask = bits == 8 ? 255 : 15;
  int offset = bits == 8 ? 0 : 8;
  for (int i = 0; i < 32 / bits; i++)
    word |= ((uint32_t)(value[i] + offset) & mask) << (i % 2 * 16 + i / 2 * bits);
  return word;
}

// bf16 weights as 12-bit integers in 16 bits, in groups of `group` inputs with a power of two as scale: exact for
// every weight down to a sixteenth of its group's largest. scale: [panels, inputs / group, 64].
inline void round_bf16(const uint16_t* weight_OI, uint32_t* packed, float* scale, int64_t outputs, int64_t inputs,
                       int64_t group) {
  auto widen = [](uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
  };
  int64_t panels = (outputs + kQuantizedPanel - 1) / kQuantizedPanel, words = inputs / 2, groups = inputs / group;
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kQuantizedPanel; o < end * kQuantizedPanel; o++) {
      int64_t panel = o / kQuantizedPanel, column = o % kQuantizedPanel;
      uint32_t* to = packed + panel * kQuantizedPanel * words + column;
      for (int64_t g = 0; g < groups; g++) {
        const uint16_t* w = weight_OI + o * inputs + g * group;
        uint16_t top = 0;
        for (int64_t i = 0; o < outputs && i < group; i++) top = (w[i] & 0x7fff) > top ? w[i] & 0x7fff : top;
        int exponent = (top >> 7) - 127;  // the largest is 2^exponent to 2^(exponent + 1)
        float step = exponent < -110 ? 0x1p-120f : ldexpf(1.0f, exponent - 10), per_step = 1 / step;
        scale[(panel * groups + g) * kQuantizedPanel + column] = step;
        for (int64_t i = 0; i < group; i += 2) {
          uint32_t word = 0;
          for (int j = 0; j < 2 && o < outputs; j++) {
            float q = rintf(widen(w[i + j]) * per_step);
            word |= (uint32_t)(uint16_t)(int16_t)(q > 2047 ? 2047 : q < -2047 ? -2047 : q) << (16 * j);
          }
          to[(g * group + i) / 2 * kQuantizedPanel] = word;
        }
      }
    }
  });
}

inline void pack_quantized(int bits, const int8_t* value_OI, uint32_t* packed, int64_t outputs, int64_t inputs) {
  const int64_t step = 32 / bits, words = inputs / step;
  int64_t panels = (outputs + kQuantizedPanel - 1) / kQuantizedPanel;
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kQuantizedPanel; o < end * kQuantizedPanel; o++) {
      uint32_t* column = packed + o / kQuantizedPanel * kQuantizedPanel * words + o % kQuantizedPanel;
      for (int64_t k = 0; k < words; k++)
        column[k * kQuantizedPanel] = o < outputs ? quantized_word(bits, value_OI + o * inputs + k * step) : 0;
    }
  });
}

}  // namespace
