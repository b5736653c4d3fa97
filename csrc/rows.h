// The small matrix products that routing on a CPU consists of, on rows of floats, for the widest vectors of the machine.
#pragma once

#include <cstdint>

#include "soft_moe.h"

namespace steel::cpu {

// out_i = base_scale_i * base_i + sum over k of coefficients[i * row_stride + k * term_stride] * terms_k
struct Mix {
  int64_t width;
  int64_t rows;
  float* out;                    // [rows, width]; may be `base`
  const float* base;             // [rows, width]; nullptr for zeros
  const float* base_scale;       // [rows]
  int64_t count;                 // of terms
  const float* const* terms;     // pointers to rows of `width` floats
  const float* coefficients;
  int64_t row_stride, term_stride;
};

struct RowKernels {
  // out[i * rows_b + j] = a_i . b_j, with rows [rows_a, width] and [rows_b, width]
  void (*dots)(const float* a, int64_t rows_a, const float* b, int64_t rows_b, int64_t width, float* out);
  float (*sum_of_squares)(const float* row, int64_t width);
  void (*mix)(const Mix& mix);
  void (*exponentials)(float* values, int64_t count);  // in place; below exp(-87) is 0
  float (*sum)(const float* values, int64_t count);
  void (*add)(const float* values, float* to, int64_t count);
  float (*largest)(const float* values, int64_t count);
  float (*exponential_sum)(const float* values, int64_t count, float shift);  // of exp(value - shift)
  // value -> factor * exp(value - shift) + offset, in place
  void (*softmax)(float* values, int64_t count, float shift, float factor, float offset);
  void (*widen)(const BFloat16* from, float* to, int64_t count);
  void (*narrow)(const float* from, BFloat16* to, int64_t count);
  void (*widen_half)(const Float16* from, float* to, int64_t count);
  void (*narrow_half)(const float* from, Float16* to, int64_t count);
};

// The kernels for what the machine has; ATEN_CPU_CAPABILITY (default, avx2, avx512) holds them to less, as it does torch.
const RowKernels& row_kernels();

}  // namespace steel::cpu
