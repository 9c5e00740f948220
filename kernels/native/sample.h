// sample, penalize, mask_tokens, logprobs: what happens to one row of fp32 logits. The rules are in kernels/sample/README.md.
//
// No sort: top-k and top-p are one search for the logit at which the weights of the likelier ones, counted from the
// top, reach a target. Weight 1 and target k is top-k, weight exp((x - m) / T) and target p * total is top-p.
#pragma once
#include "buffer.h"
#include "ops.h"
#include "parallel.h"
#include "simd.h"

namespace {

// ---- scans of a row

INLINE float row_max(const float* x, int64_t size) {
  F32 top = splat(-INFINITY);
  for_each_vector(size, [&](int64_t i, int n) {
    F32 v = n == W ? load(x + i) : splat(x[i]);
    if (n < W) for (int lane = 1; lane < n; lane++) v[lane] = x[i + lane];
    top = v > top ? v : top;  // NaN is never larger
  });
  return max_lanes(top);
}

// argmax of score(i, lanes) over the row, lowest index on ties; NaN never wins.
template <class F> INLINE int64_t row_argmax(int64_t size, const F& score) {
  F32 best = splat(-INFINITY);
  I32 best_id = {};
  I32 lanes = iota();
  for_each_vector(size, [&](int64_t i, int n) {
    F32 s = score(i, n);
    if (n < W) s = lanes < n ? s : splat(-INFINITY);
    I32 better = s > best;
    best = better ? s : best;
    best_id = better ? lanes + (int)i : best_id;
  });
  float top = -INFINITY;
  int id = 0;
  for (int lane = 0; lane < W; lane++)
    if (best[lane] > top || (best[lane] == top && top > -INFINITY && best_id[lane] < id)) top = best[lane], id = best_id[lane];
  return id;
}

// ---- the noise: a hash of (seed, position, token id), as uniform, as Gumbel

INLINE U32 mix(U32 x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

INLINE uint32_t row_key(uint32_t key, int64_t seed, int64_t position) {
  const uint32_t words[] = {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)position, (uint32_t)(position >> 32)};
  U32 h = U32{} + key;
  for (uint32_t word : words) h = mix(h ^ word);
  return h[0];
}

// log(x) of positive normal x: x = 2^e * m with m in [sqrt(1/2), sqrt(2)), log m as a polynomial (Cephes).
INLINE F32 log_vec(F32 x) {
  U32 bits = (U32)x - 0x3f3504f3u;
  F32 e = __builtin_convertvector((I32)bits >> 23, F32);
  F32 f = (F32)((bits & 0x7fffff) + 0x3f3504f3u) - 1.0f;
  F32 p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  F32 square = f * f;
  return f + (p * f * square + e * -2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
}

INLINE F32 gumbel(U32 id, uint32_t k0, uint32_t k1) {
  U32 h = mix(mix(id ^ k0) ^ k1);
  F32 u = __builtin_convertvector(h, F32) * 0x1p-32f + 0x1p-33f;
  u = u > 1.0f - 0x1p-24f ? splat(1.0f - 0x1p-24f) : u;
  // log1p(-u) = -u log(w) / (w - 1) with w = 1 - u as rounded (Kahan); for w = 1 it is -u.
  F32 w = 1.0f - u, divisor = 1.0f - w;
  F32 exponential = divisor > 0.0f ? log_vec(w) * u / (divisor > 0.0f ? -divisor : splat(-1.0f)) : u;
  return -log_vec(exponential);
}

// ---- the search

// Keys in descending order of the logits: the largest logit has the smallest key; NaN comes last.
INLINE uint32_t descending_key(float x) {
  uint32_t u;
  if (x != x) return 0xffffffffu;
  memcpy(&u, &x, 4);
  return u >> 31 ? u : 0x7fffffffu - u;
}
INLINE float key_value(uint32_t key) {
  uint32_t u = key >> 31 ? key : 0x7fffffffu - key;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

struct Candidate { uint32_t key; float weight; };

// The largest logit down to which the candidates' weights reach the target. Three passes over what is left, by 11, 11
// and 10 bits of the key: each keeps the candidates of the one bucket in which the target is reached.
float reach(Candidate* c, int64_t size, double target) {
  static thread_local double weight[2048];
  uint32_t prefix = 0;
  for (int shift = 21, width = 11;; shift -= width) {
    uint32_t mask = (1u << width) - 1;
    memset(weight, 0, sizeof weight);
    int last = 0;
    for (int64_t i = 0; i < size; i++) {
      int bucket = c[i].key >> shift & mask;
      weight[bucket] += c[i].weight;
      last = bucket > last ? bucket : last;
    }
    int bucket = 0;
    // At the end of the row the target may be missed by rounding: then everything is kept.
    for (; bucket < last && !(weight[bucket] > 0 && weight[bucket] >= target); bucket++) target -= weight[bucket];
    prefix = prefix << width | bucket;
    if (shift == 0) return key_value(prefix);
    int64_t left = 0;
    for (int64_t i = 0; i < size; i++)
      if ((c[i].key >> shift & mask) == (uint32_t)bucket) c[left++] = c[i];
    size = left;
    if (shift == 10) width = 10;
  }
}

struct Filter { int top_k; float top_p, min_p; double temperature; };

int64_t kth_candidates(const float* x, int64_t size, int k, Buffer<Candidate>& buffer, float* threshold) {
  buffer.reserve(size);
  for (int64_t i = 0; i < size; i++) buffer.data[i] = {descending_key(x[i]), 1.0f};
  *threshold = reach(buffer.data, size, k);
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i++)
    if (x[i] >= *threshold) buffer.data[kept++] = {descending_key(x[i]), 1.0f};
  return kept;
}

float lowest_kept(const float* x, int64_t size, float top, const Filter& filter) {
  static thread_local Buffer<Candidate> buffer;
  if (!isfinite(top)) return top;
  float threshold = -INFINITY;
  int64_t kept = -1;
  if (filter.top_k > 0 && filter.top_k < size) kept = kth_candidates(x, size, filter.top_k, buffer, &threshold);
  if (filter.top_p < 1) {
    if (kept < 0) {
      buffer.reserve(size);
      for (kept = 0; kept < size; kept++) buffer.data[kept].key = descending_key(x[kept]);
    }
    double total = 0;
    float factor = (float)(1.44269504 / filter.temperature);
    for (int64_t i = 0; i < kept; i += W) {
      int n = kept - i < W ? (int)(kept - i) : W;
      F32 logit = {};
      for (int lane = 0; lane < n; lane++) logit[lane] = key_value(buffer.data[i + lane].key);
      F32 w = exp2_vec((logit - top) * factor);
      for (int lane = 0; lane < n; lane++) {
        float weight = w[lane] == w[lane] ? w[lane] : 0.0f;
        buffer.data[i + lane].weight = weight, total += weight;
      }
    }
    threshold = reach(buffer.data, kept, filter.top_p * total);
  }
  if (filter.min_p > 0) {
    double log_p = log((double)filter.min_p);
    float lowest = top + (float)(filter.temperature * (log_p < 0 ? log_p : 0));
    threshold = lowest > threshold ? lowest : threshold;
  }
  return threshold;
}

int64_t sample_row(const SampleArgs& a, int64_t s) {
  const float* x = a.logits_SV + s * a.vocabulary;
  if (a.all_greedy || !(a.temperature_S[s] > 0))
    return row_argmax(a.vocabulary, [&](int64_t i, int n) { return load(x + i, n); });
  double temperature = a.temperature_S[s] > 1e-6 ? a.temperature_S[s] : 1e-6;
  float inverse = (float)(1.0 / temperature), threshold = -INFINITY;
  if (a.any_filter)
    threshold = lowest_kept(x, a.vocabulary, row_max(x, a.vocabulary),
                            {a.top_k_S[s], a.top_p_S[s], a.min_p_S[s], temperature});
  uint32_t k0 = row_key(0x9e3779b9u, a.seed_S[s], a.position_S[s]);
  uint32_t k1 = row_key(0x85ebca6bu, a.seed_S[s], a.position_S[s]);
  U32 lanes = (U32)iota();
  return row_argmax(a.vocabulary, [&](int64_t i, int n) {
    F32 logit = load(x + i, n);
    F32 score = logit * inverse + gumbel(lanes + (uint32_t)i, k0, k1);
    return logit < threshold ? splat(-INFINITY) : score;
  });
}

void sample(const SampleArgs& a) {
  for_each_item(a.rows, quire_threads(), [&](int64_t s) { a.token_S[s] = sample_row(a, s); });
}

// ---- penalize

void penalize(const PenalizeArgs& a) {
  for_each_item(a.rows, quire_threads(), [&](int64_t s) {
    if (a.row_S[s] < 0) return;
    float* x = a.logits_SV + s * a.vocabulary;
    const int32_t* count = a.output_count_UV + a.row_S[s] * a.vocabulary;
    const uint8_t* prompt = a.prompt_seen_UV + a.row_S[s] * a.vocabulary;
    float presence = a.presence_S[s], frequency = a.frequency_S[s], repetition = a.repetition_S[s];
    for (int64_t i = 0; i < a.vocabulary; i++) {
      float y = x[i];
      if (count[i] > 0 || prompt[i]) y = y > 0 ? y / repetition : y * repetition;
      y -= frequency * count[i];
      x[i] = y - (count[i] > 0 ? presence : 0.0f);
    }
  });
}

// ---- mask_tokens

// One word's tokens: a loop of a fixed length without branches, which compilers turn into vectors.
INLINE void mask_word(float* x, uint32_t allowed, int64_t count) {
  if (allowed == 0xffffffffu) return;
  if (count < 32) {
    for (int64_t i = 0; i < count; i++) x[i] = allowed >> i & 1 ? x[i] : -INFINITY;
    return;
  }
  for (int i = 0; i < 32; i++) x[i] = allowed >> i & 1 ? x[i] : -INFINITY;
}

void mask_tokens(const MaskTokensArgs& a) {
  parallel_for(a.rows, 1 + (1 << 17) / a.vocabulary, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++) {
      float* x = a.logits_SV + a.row_K[k] * a.vocabulary;
      const uint32_t* words = a.words_KW + k * a.words;
      for (int64_t begin = 0; begin < a.vocabulary; begin += 32)
        mask_word(x + begin, words[begin / 32], a.vocabulary - begin);
    }
  });
}

// ---- logprobs

void logprobs_row(const LogprobsArgs& a, int64_t s) {
  static thread_local Buffer<Candidate> buffer;
  const float* x = a.logits_SV + s * a.vocabulary;
  float top = row_max(x, a.vocabulary);
  double total = 0;
  for (int64_t begin = 0; begin < a.vocabulary; begin += 4096) {  // fp32 sums of parts, fp64 sum of those
    int64_t end = begin + 4096 < a.vocabulary ? begin + 4096 : a.vocabulary;
    F32 sum = {};
    for_each_vector(end - begin, [&](int64_t i, int n) {
      F32 e = exp_vec(load(x + begin + i, n) - top);
      sum += n == W ? e : iota() < n ? e : F32{};
    });
    total += sum_lanes(sum);
  }
  float norm = top + (float)log(total);
  a.chosen_S[s] = x[a.token_S[s]] - norm;
  if (a.top <= 0) return;
  float threshold;
  buffer.reserve(a.vocabulary);
  kth_candidates(x, a.vocabulary, a.top, buffer, &threshold);
  int64_t* ids = a.top_ids_SK + s * a.top;
  float* best = a.top_SK + s * a.top;
  int64_t held = 0;
  for (int pass = 0; pass < 2; pass++)  // those above the border all have a place; equal ones share what is left
    for (int64_t i = 0; i < a.vocabulary && held < a.top; i++) {
      if (pass == 0 ? !(x[i] > threshold) : x[i] != threshold) continue;
      int64_t at = held++;
      for (; at > 0 && best[at - 1] < x[i]; at--) best[at] = best[at - 1], ids[at] = ids[at - 1];
      best[at] = x[i], ids[at] = i;
    }
  for (; held < a.top; held++) best[held] = NAN, ids[held] = 0;  // only with NaN logits
  for (int64_t k = 0; k < a.top; k++) best[k] -= norm;
}

void logprobs(const LogprobsArgs& a) {
  for_each_item(a.rows, quire_threads(), [&](int64_t s) { logprobs_row(a, s); });
}

}  // namespace
