// Arithmetic of Soft-MoE routing that the CPU and the CUDA kernels share.
//
// Notation (Soft MoE, arXiv 2308.00951, section 2.1; steel_megatron/ops/reference.py says the same in PyTorch):
//   B, T, d   sequences, tokens of a sequence, hidden size
//   S, R      slots, blocks (sets of slots)
//   x_t, u_t  token t's vector, and x_t / max(|x_t|, 1e-12)
//   key_j     slot j's key
//   l_tj      u_t . key_j
//   starts, ends   [N, R] with N = 1 (the same for all sequences) or B: the slots of block k are a mean over the tokens
//             starts[k] <= t < ends[k]. Both ascend within a row, and a block either goes on from the one before (the same
//             start) or starts at or after its end. So every token is added to the sums of one block at most: block k adds
//             the tokens from block_begin() to ends[k] to what the block it goes on from had.
//   reads     [N, R]: block k is read by the tokens reads[k-1] <= t < reads[k] (reads[-1] = 0, reads[R-1] = T).
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
  int64_t batch, length, width, slots, blocks;  // B, T, d, S, R
  int64_t plans;                                // N: rows of starts, ends and reads
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

// ---- float16: 5 bits of exponent, 10 of mantissa; by the processor's own instructions on a GPU ----

struct Float16 {
  uint16_t bits;
};

STEEL_INLINE float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t exponent = (value.bits >> 10) & 0x1fu, mantissa = value.bits & 0x3ffu;
  float result = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormals
  if (exponent != 0) {
    const uint32_t bits = ((exponent == 0x1fu ? 0xffu : exponent + 112u) << 23) | (mantissa << 13);
    memcpy(&result, &bits, sizeof(result));
  }
  return (value.bits & 0x8000u) != 0 ? -result : result;
#endif
}

template <>
STEEL_INLINE Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (size >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above are nearer to infinity than to the largest float16
  } else if (size < 0x38800000u) {
    const float shifted = fabsf(value) + 0.5f;  // whose last bit is worth that of a subnormal: the sum rounds to it
    memcpy(&half, &shifted, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
#endif
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

// ---- blocks of tokens, and their pieces ----

// Whether block k goes on from block k - 1, and does not begin a document.
STEEL_INLINE bool goes_on(const int64_t* starts, int64_t k) { return k > 0 && starts[k] == starts[k - 1]; }

// The first token that block k adds to the sums of the block it goes on from.
STEEL_INLINE int64_t block_begin(const int64_t* starts, const int64_t* ends, int64_t k) {
  return k > 0 && ends[k - 1] > starts[k] ? ends[k - 1] : starts[k];
}

// The first block that ends after `token`; `blocks` if none does. The token feeds it if it starts at or before the token.
STEEL_INLINE int64_t block_after(const int64_t* ends, int64_t blocks, int64_t token) {
  int64_t low = 0, high = blocks;
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

// A run of tokens that is worked on at once: of one block, or of none (block = -1). Pieces depend on the blocks and a
// fixed longest piece only, never on the number of threads, so neither does the order in which their results are added.
struct Piece {
  int64_t begin, end, block;
};

STEEL_INLINE int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The most pieces that a sequence can have: R blocks and R + 1 gaps leave at most one unfilled piece each.
STEEL_INLINE int64_t most_pieces(int64_t length, int64_t blocks, int64_t longest) {
  return divide_up(length, longest) + 2 * blocks + 1;
}

STEEL_INLINE int64_t cut_run(int64_t begin, int64_t end, int64_t block, int64_t longest, Piece* pieces, int64_t count) {
  for (; begin < end; begin += longest) {
    pieces[count++] = Piece{begin, begin + longest < end ? begin + longest : end, block};
  }
  return count;
}

// Cuts one sequence into pieces of at most `longest` tokens, first those of the blocks, then the tokens that feed none
// (what is left of a document after its last block). Pieces of block k are first[k] up to first[k + 1], those without
// block first[R] up to first[R + 1], which is their number: never more than most_pieces(). Blocks that are out of order
// or reach past the sequence are moved to the nearest place that fits, so that no memory but the sequence's is touched.
STEEL_INLINE void cut_pieces(
    const int64_t* starts, const int64_t* ends, int64_t blocks, int64_t length, int64_t longest, Piece* pieces,
    int64_t* first) {
  for (int pass = 0; pass < 2; ++pass) {
    int64_t count = pass == 0 ? 0 : first[blocks], reached = 0;
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t start = starts[k] < reached ? reached : (starts[k] < length ? starts[k] : length);
      const int64_t end = ends[k] < start ? start : (ends[k] < length ? ends[k] : length);
      if (pass == 0) {
        first[k] = count;
        count = cut_run(start, end, k, longest, pieces, count);
      } else {
        count = cut_run(reached, start, -1, longest, pieces, count);
      }
      reached = end;
    }
    if (pass == 0) {
      first[blocks] = count;
    } else {
      first[blocks + 1] = cut_run(reached, length, -1, longest, pieces, count);
    }
  }
}

}  // namespace steel
