// Arithmetic of Soft-MoE routing that the CPU and the CUDA kernels share.
//
// Notation (Soft MoE, arXiv 2308.00951, section 2.1; steel_megatron/ops/reference.py says the same in PyTorch):
//   B, T, d   sequences, tokens of a sequence, hidden size
//   S, R      slots, refresh points
//   x_t, u_t  token t's vector, and x_t / max(|x_t|, 1e-12)
//   key_j     slot j's key
//   l_tj      u_t . key_j
//   ends      R ascending token positions that cut a sequence into groups: group k is [ends[k-1], ends[k]), and group R
//             is what follows the last end. dispatch: ends are the refresh points, and slots k are a mean over groups
//             0..k. combine: group k are the tokens that read the slots of refresh k.
//
// Everything is computed in float32, whatever the type of the tokens.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define STEEL_INLINE __host__ __device__ __forceinline__
#else
#define STEEL_INLINE inline
#endif

namespace steel {

struct Sizes {
  int64_t batch, length, width, slots, refreshes;  // B, T, d, S, R
};

// ---- bfloat16: the upper half of a float32, rounded to nearest even ----

struct BFloat16 {
  uint16_t bits;
};

STEEL_INLINE float to_float(float value) { return value; }

STEEL_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
STEEL_INLINE T from_float(float value);

template <>
STEEL_INLINE float from_float<float>(float value) {
  return value;
}

template <>
STEEL_INLINE BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry a NaN's bits over to infinity
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

// ---- vectors scaled to length 1 ----

constexpr float kSmallestNorm = 1e-12f;

STEEL_INLINE float inverse_norm(float sum_of_squares) { return 1.0f / fmaxf(sqrtf(sum_of_squares), kSmallestNorm); }

// What u . (gradient of u) is multiplied with to get x's share of its own gradient,
//   dx = gradient / |x| - x * (u . gradient) / |x|^2.
// Below the smallest norm u is x times a constant, and the share is 0.
STEEL_INLINE float radial_factor(float sum_of_squares) {
  const float norm = sqrtf(sum_of_squares);
  return norm >= kSmallestNorm ? 1.0f / norm / norm : 0.0f;
}

// ---- softmax by parts (online softmax, arXiv 1805.02867) ----

// exp(a - b) for a <= b, where both may be the -infinity of "nothing yet".
STEEL_INLINE float exp_below(float a, float b) { return a == -INFINITY ? 0.0f : expf(a - b); }

struct Running {
  float max;  // of the logits so far, -infinity before the first
  float sum;  // of exp(logit - max)
};

STEEL_INLINE Running nothing_yet() { return Running{-INFINITY, 0.0f}; }

STEEL_INLINE float log_sum_exp(Running running) { return running.max + logf(running.sum); }

struct Factors {
  float before, added;  // what a weighted sum so far, and the one to be added, are multiplied with
};

STEEL_INLINE Factors merge(Running& running, Running part) {
  const float max = fmaxf(running.max, part.max);
  const Factors factors{exp_below(running.max, max), exp_below(part.max, max)};
  running = Running{max, running.sum * factors.before + part.sum * factors.added};
  return factors;
}

// ---- groups of tokens, and their pieces ----

// A run of tokens of one group that is worked on at once. Pieces depend on the ends and a fixed longest piece only,
// never on the number of threads, so neither does the order in which their results are added.
struct Piece {
  int64_t begin, end, group;
};

STEEL_INLINE int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The most pieces that a sequence can have: groups 0..groups leave at most one unfilled piece each.
STEEL_INLINE int64_t most_pieces(int64_t length, int64_t groups, int64_t longest) {
  return divide_up(length, longest) + groups + 1;
}

// The first group that ends after `token`; `groups` if none does.
STEEL_INLINE int64_t group_of(const int64_t* ends, int64_t groups, int64_t token) {
  int64_t low = 0, high = groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ends[middle] > token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Cuts groups 0..groups into pieces of at most `longest` tokens. Pieces of group k are first_piece[k] up to
// first_piece[k + 1]; first_piece has groups + 2 entries, the last of them the number of pieces. There are never more
// than most_pieces(): an end before the one it follows, or past the sequence, is moved to the nearest that fits.
STEEL_INLINE void cut_pieces(
    const int64_t* ends, int64_t groups, int64_t length, int64_t longest, Piece* pieces, int64_t* first_piece) {
  int64_t count = 0, begin = 0;
  for (int64_t group = 0; group <= groups; ++group) {
    first_piece[group] = count;
    const int64_t group_end = group < groups && ends[group] < length ? ends[group] : length;
    while (begin < group_end) {
      const int64_t end = begin + longest < group_end ? begin + longest : group_end;
      pieces[count++] = Piece{begin, end, group};
      begin = end;
    }
  }
  first_piece[groups + 1] = count;
}

}  // namespace steel
