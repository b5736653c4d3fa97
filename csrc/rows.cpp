#include "rows.h"

#include <cstdlib>
#include <string>

// One source for every vector width: the templates below are inlined into functions that are each compiled for one
// instruction set, and row_kernels() picks a set of functions at run time. No part of the build needs -march.
#define STEEL_FLATTEN inline __attribute__((always_inline))

namespace steel::cpu {
namespace {

template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(W * sizeof(float))));
};

template <int W>
STEEL_FLATTEN void load(typename Vector<W>::type& vector, const float* from) {
  __builtin_memcpy(&vector, from, sizeof(vector));
}

template <int W>
STEEL_FLATTEN void store(float* to, const typename Vector<W>::type& vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

template <int W>
STEEL_FLATTEN float total(const typename Vector<W>::type& vector) {
  float lanes[W];
  store<W>(lanes, vector);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// ---- dots: a block of I x J results is kept in registers over the whole width ----

template <int W, int I, int J>
STEEL_FLATTEN void dots_block(const float* a, const float* b, int64_t width, float* out, int64_t out_stride) {
  typename Vector<W>::type sums[I][J] = {};
  int64_t column = 0;
  for (; column + W <= width; column += W) {
    typename Vector<W>::type right[J], left;
    for (int j = 0; j < J; ++j) load<W>(right[j], b + j * width + column);
    for (int i = 0; i < I; ++i) {
      load<W>(left, a + i * width + column);
      for (int j = 0; j < J; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < J; ++j) {
      float sum = total<W>(sums[i][j]);
      for (int64_t rest = column; rest < width; ++rest) sum += a[i * width + rest] * b[j * width + rest];
      out[i * out_stride + j] = sum;
    }
  }
}

// Rows of b outermost: they stay in the first-level cache while the rows of a go by.
template <int W, int J>
STEEL_FLATTEN void dots_columns(const float* a, int64_t rows_a, const float* b, int64_t width, float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows_a; i += 4) dots_block<W, 4, J>(a + i * width, b, width, out + i * out_stride, out_stride);
  for (; i < rows_a; ++i) dots_block<W, 1, J>(a + i * width, b, width, out + i * out_stride, out_stride);
}

template <int W>
STEEL_FLATTEN void dots(const float* a, int64_t rows_a, const float* b, int64_t rows_b, int64_t width, float* out) {
  int64_t j = 0;
  if (W == 16) {  // AVX-512 has registers for 4 x 6 results, others for 4 x 3
    for (; j + 6 <= rows_b; j += 6) dots_columns<W, 6>(a, rows_a, b + j * width, width, out + j, rows_b);
  }
  for (; j + 3 <= rows_b; j += 3) dots_columns<W, 3>(a, rows_a, b + j * width, width, out + j, rows_b);
  for (; j < rows_b; ++j) dots_columns<W, 1>(a, rows_a, b + j * width, width, out + j, rows_b);
}

template <int W>
STEEL_FLATTEN float sum_of_squares(const float* row, int64_t width) {
  typename Vector<W>::type sums[4] = {}, part;
  int64_t column = 0;
  for (; column + 4 * W <= width; column += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      load<W>(part, row + column + v * W);
      sums[v] += part * part;
    }
  }
  float sum = total<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; column < width; ++column) sum += row[column] * row[column];
  return sum;
}

// ---- mix: a block of I rows x V vectors is kept in registers over all terms ----

template <int W, int I, int V>
STEEL_FLATTEN void mix_block(const Mix& mix, int64_t row, int64_t column) {
  typename Vector<W>::type sums[I][V] = {}, part[V];
  const float* coefficients = mix.coefficients + row * mix.row_stride;
  if (mix.base != nullptr) {
    for (int i = 0; i < I; ++i) {
      for (int v = 0; v < V; ++v) {
        load<W>(part[v], mix.base + (row + i) * mix.width + column + v * W);
        sums[i][v] = part[v] * mix.base_scale[row + i];
      }
    }
  }
  for (int64_t term = 0; term < mix.count; ++term) {
    for (int v = 0; v < V; ++v) load<W>(part[v], mix.terms[term] + column + v * W);
    for (int i = 0; i < I; ++i) {
      const float coefficient = coefficients[i * mix.row_stride + term * mix.term_stride];
      for (int v = 0; v < V; ++v) sums[i][v] += part[v] * coefficient;
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int v = 0; v < V; ++v) store<W>(mix.out + (row + i) * mix.width + column + v * W, sums[i][v]);
  }
}

template <int W, int V>
STEEL_FLATTEN void mix_columns(const Mix& mix, int64_t column) {
  int64_t row = 0;
  if (W == 16) {
    for (; row + 6 <= mix.rows; row += 6) mix_block<W, 6, V>(mix, row, column);
  }
  for (; row + 4 <= mix.rows; row += 4) mix_block<W, 4, V>(mix, row, column);
  for (; row + 2 <= mix.rows; row += 2) mix_block<W, 2, V>(mix, row, column);
  for (; row < mix.rows; ++row) mix_block<W, 1, V>(mix, row, column);
}

template <int W>
STEEL_FLATTEN void mix_all(const Mix& mix) {
  int64_t column = 0;
  if (W == 16) {
    for (; column + 4 * W <= mix.width; column += 4 * W) mix_columns<W, 4>(mix, column);
  }
  for (; column + 3 * W <= mix.width; column += 3 * W) mix_columns<W, 3>(mix, column);
  for (; column + W <= mix.width; column += W) mix_columns<W, 1>(mix, column);
  for (; column < mix.width; ++column) mix_columns<1, 1>(mix, column);
}

// ---- exponentials: 2^n * exp(r) with |r| <= ln(2) / 2, exp(r) by a polynomial (that of Cephes' expf) ----

template <int W>
STEEL_FLATTEN void exponentiate(typename Vector<W>::type& x) {
  typedef int32_t Integers __attribute__((vector_size(W * sizeof(int32_t))));
  const Integers nothing = x < -87.0f;
  x = x < -87.0f ? x - x - 87.0f : x;  // x - x keeps a NaN
  x = x > 88.0f ? x - x + 88.0f : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no digits behind the point
  const typename Vector<W>::type shifted = x * 1.44269504f + round, n = shifted - round;
  const typename Vector<W>::type r = x - n * 0.693359375f + n * 2.12194440e-4f;
  typename Vector<W>::type sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * (r * r) + r + 1.0f;
  Integers power;
  __builtin_memcpy(&power, &shifted, sizeof(power));
  power = (power - 0x4b400000 + 127) << 23;
  typename Vector<W>::type scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  x = nothing ? x - x : sum * scale;
}

// value -> factor * exp(value - shift) + offset
template <int W>
STEEL_FLATTEN void softmax(float* values, int64_t count, float shift, float factor, float offset) {
  typename Vector<W>::type x;
  int64_t at = 0;
  for (; at + W <= count; at += W) {
    load<W>(x, values + at);
    x -= shift;
    exponentiate<W>(x);
    store<W>(values + at, x * factor + offset);
  }
  for (; at < count; ++at) {
    x = typename Vector<W>::type{} + (values[at] - shift);
    exponentiate<W>(x);
    values[at] = x[0] * factor + offset;
  }
}

template <int W>
STEEL_FLATTEN float exponential_sum(const float* values, int64_t count, float shift) {
  typename Vector<W>::type sums[2] = {}, x;
  int64_t at = 0;
  for (; at + 2 * W <= count; at += 2 * W) {
    for (int v = 0; v < 2; ++v) {
      load<W>(x, values + at + v * W);
      x -= shift;
      exponentiate<W>(x);
      sums[v] += x;
    }
  }
  float sum = total<W>(sums[0] + sums[1]);
  for (; at < count; ++at) {
    x = typename Vector<W>::type{} + (values[at] - shift);
    exponentiate<W>(x);
    sum += x[0];
  }
  return sum;
}

template <int W>
STEEL_FLATTEN float sum(const float* values, int64_t count) {
  typename Vector<W>::type sums[2] = {}, x;
  int64_t at = 0;
  for (; at + 2 * W <= count; at += 2 * W) {
    for (int v = 0; v < 2; ++v) {
      load<W>(x, values + at + v * W);
      sums[v] += x;
    }
  }
  float result = total<W>(sums[0] + sums[1]);
  for (; at < count; ++at) result += values[at];
  return result;
}

STEEL_FLATTEN void add(const float* values, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += values[i];
}

template <int W>
STEEL_FLATTEN float largest(const float* values, int64_t count) {
  typename Vector<W>::type x, most = typename Vector<W>::type{} + values[0];
  int64_t at = 0;
  for (; at + W <= count; at += W) {
    load<W>(x, values + at);
    most = x > most ? x : most;
  }
  float result = values[0];
  for (int lane = 0; lane < W; ++lane) result = most[lane] > result ? most[lane] : result;
  for (; at < count; ++at) result = values[at] > result ? values[at] : result;
  return result;
}

template <typename T>
STEEL_FLATTEN void widen(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <typename T>
STEEL_FLATTEN void narrow(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
}

// NAME: a namespace; WIDTH: floats of one vector; TARGET: the attribute that lets the compiler use the instruction set.
#define STEEL_ROW_KERNELS(NAME, WIDTH, TARGET)                                                                   \
  namespace NAME {                                                                                               \
  TARGET void run_dots(const float* a, int64_t rows_a, const float* b, int64_t rows_b, int64_t width, float* out) { \
    dots<WIDTH>(a, rows_a, b, rows_b, width, out);                                                               \
  }                                                                                                              \
  TARGET float run_sum_of_squares(const float* row, int64_t width) { return sum_of_squares<WIDTH>(row, width); } \
  TARGET void run_mix(const Mix& mix) { mix_all<WIDTH>(mix); }                                                   \
  TARGET void run_exponentials(float* values, int64_t count) { softmax<WIDTH>(values, count, 0, 1, 0); }         \
  TARGET float run_sum(const float* values, int64_t count) { return sum<WIDTH>(values, count); }                 \
  TARGET void run_add(const float* values, float* to, int64_t count) { add(values, to, count); }                 \
  TARGET float run_largest(const float* values, int64_t count) { return largest<WIDTH>(values, count); }         \
  TARGET float run_exponential_sum(const float* values, int64_t count, float shift) {                            \
    return exponential_sum<WIDTH>(values, count, shift);                                                         \
  }                                                                                                              \
  TARGET void run_softmax(float* values, int64_t count, float shift, float factor, float offset) {               \
    softmax<WIDTH>(values, count, shift, factor, offset);                                                        \
  }                                                                                                              \
  TARGET void run_widen(const BFloat16* from, float* to, int64_t count) { widen(from, to, count); }              \
  TARGET void run_narrow(const float* from, BFloat16* to, int64_t count) { narrow(from, to, count); }            \
  TARGET void run_widen_half(const Float16* from, float* to, int64_t count) { widen(from, to, count); }          \
  TARGET void run_narrow_half(const float* from, Float16* to, int64_t count) { narrow(from, to, count); }        \
  constexpr RowKernels kernels{run_dots,    run_sum_of_squares,  run_mix,     run_exponentials, run_sum,    run_add, \
                               run_largest, run_exponential_sum, run_softmax, run_widen,        run_narrow,          \
                               run_widen_half, run_narrow_half};                                                 \
  }

STEEL_ROW_KERNELS(plain, 4, )
#ifdef __x86_64__
STEEL_ROW_KERNELS(avx2, 8, __attribute__((target("avx2,fma"))))
STEEL_ROW_KERNELS(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#endif

const RowKernels& pick() {
#ifdef __x86_64__
  // The variable with which torch, too, is held to less than the machine has.
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = variable == nullptr ? "avx512" : variable;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512 && most == "avx512") return avx512::kernels;
  if (has_avx2 && (most == "avx512" || most == "avx2")) return avx2::kernels;
#endif
  return plain::kernels;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& picked = pick();
  return picked;
}

}  // namespace steel::cpu
