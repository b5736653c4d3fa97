#include "rows.h"

#include <cstdlib>
#include <string>
#include <type_traits>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions that are inlined only

// One source for every vector width: the templates below are inlined into functions that are each compiled for one
// instruction set, and row_kernels() picks a set of functions at run time. No part of the build needs -march.
#define STEEL_FLATTEN inline __attribute__((always_inline))

namespace steel::cpu {
namespace {

// What a machine has: floats of one vector, and an instruction that rounds to bfloat16 (AVX512-BF16).
template <int kWidth, bool kRounds = false>
struct Machine {
  static constexpr int width = kWidth;
  static constexpr bool rounds = kRounds;
};

template <typename Number, int W>
struct VectorOf {
  typedef Number type __attribute__((vector_size(W * sizeof(Number))));
};
template <int W>
using Vector = VectorOf<float, W>;
template <int W>
using Bits = typename VectorOf<uint32_t, W>::type;
template <int W>
using Halves = typename VectorOf<uint16_t, W>::type;

template <typename To, typename From>
STEEL_FLATTEN To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <int W>
STEEL_FLATTEN void load(typename Vector<W>::type& vector, const float* from) {
  __builtin_memcpy(&vector, from, sizeof(vector));
}

template <int W>
STEEL_FLATTEN Bits<W> load_halves(const void* from) {
  Halves<W> halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  if constexpr (W == 16) {  // gcc 12 has it in two steps
    Bits<W> bits;
    asm("vpmovzxwd %1, %0" : "=v"(bits) : "vm"(halves));
    return bits;
  } else {
    return __builtin_convertvector(halves, Bits<W>);
  }
}

template <int W>
STEEL_FLATTEN void load(typename Vector<W>::type& vector, const BFloat16* from) {
  vector = same_bits<typename Vector<W>::type>(load_halves<W>(from) << 16);
}

// As to_float() of soft_moe.h.
template <int W>
STEEL_FLATTEN void load(typename Vector<W>::type& vector, const Float16* from) {
  const Bits<W> half = load_halves<W>(from), size = half & 0x7fffu;
  const Bits<W> exponent = size >= 0x7c00u ? size - size + (0xffu - 0x1fu) : size - size + 112u;
  const Bits<W> normal = (size << 13) + (exponent << 23);
  typedef typename VectorOf<int32_t, W>::type Integers;
  const auto small = __builtin_convertvector(same_bits<Integers>(size), typename Vector<W>::type) * 0x1p-24f;
  vector = same_bits<typename Vector<W>::type>((size < 0x400u ? same_bits<Bits<W>>(small) : normal) | ((half & 0x8000u) << 16));
}

template <class M>
STEEL_FLATTEN void store(float* to, const typename Vector<M::width>::type& vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

template <class M>
STEEL_FLATTEN void store(BFloat16* to, const typename Vector<M::width>::type& vector) {
  constexpr int W = M::width;
  Halves<W> halves;
  if constexpr (M::rounds) {
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(vector));
  } else {  // as from_float() of soft_moe.h
    const Bits<W> bits = same_bits<Bits<W>>(vector), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    halves = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? bits - bits + 0x7fc0u : rounded, Halves<W>);
  }
  __builtin_memcpy(to, &halves, sizeof(halves));
}

template <class M>
STEEL_FLATTEN void store(Float16* to, const typename Vector<M::width>::type& vector) {  // as from_float() of soft_moe.h
  constexpr int W = M::width;
  const Bits<W> bits = same_bits<Bits<W>>(vector), size = bits & 0x7fffffffu, zero = bits - bits;
  const auto shifted = same_bits<typename Vector<W>::type>(size) + 0.5f;
  Bits<W> half = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  half = size < 0x38800000u ? same_bits<Bits<W>>(shifted) - 0x3f000000u : half;
  half = size >= 0x477ff000u ? zero + 0x7c00u : half;
  half = size > 0x7f800000u ? zero + 0x7e00u : half;
  const Halves<W> halves = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves<W>);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

template <int W, int... kLanes>
STEEL_FLATTEN float total(const typename Vector<W>::type& vector, std::integer_sequence<int, kLanes...>) {
  const typename Vector<W / 2>::type halves = __builtin_shufflevector(vector, vector, kLanes...) +
                                              __builtin_shufflevector(vector, vector, (W / 2 + kLanes)...);
  if constexpr (W == 2) {
    return halves[0];
  } else {
    return total<W / 2>(halves, std::make_integer_sequence<int, W / 4>());
  }
}

template <int W>
STEEL_FLATTEN float total(const typename Vector<W>::type& vector) {
  return total<W>(vector, std::make_integer_sequence<int, W / 2>());
}

// ---- dots: a block of I x J results is kept in registers over the whole width ----

template <int W, int I, int J, typename T>
STEEL_FLATTEN void dots_block(const T* a, const float* b, int64_t width, float* out, int64_t out_stride) {
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
      for (int64_t rest = column; rest < width; ++rest) sum += to_float(a[i * width + rest]) * b[j * width + rest];
      out[i * out_stride + j] = sum;
    }
  }
}

// Rows of b outermost: they stay in the first-level cache while the rows of a go by.
template <int W, int J, typename T>
STEEL_FLATTEN void dots_columns(const T* a, int64_t rows_a, const float* b, int64_t width, float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows_a; i += 4) dots_block<W, 4, J>(a + i * width, b, width, out + i * out_stride, out_stride);
  for (; i < rows_a; ++i) dots_block<W, 1, J>(a + i * width, b, width, out + i * out_stride, out_stride);
}

template <int W, typename T>
STEEL_FLATTEN void dots(const T* a, int64_t rows_a, const float* b, int64_t rows_b, int64_t width, float* out) {
  int64_t j = 0;
  if constexpr (W == 16) {  // AVX-512 has registers for 4 x 6 results, others for 4 x 3
    for (; j + 6 <= rows_b; j += 6) dots_columns<W, 6>(a, rows_a, b + j * width, width, out + j, rows_b);
  }
  for (; j + 3 <= rows_b; j += 3) dots_columns<W, 3>(a, rows_a, b + j * width, width, out + j, rows_b);
  for (; j < rows_b; ++j) dots_columns<W, 1>(a, rows_a, b + j * width, width, out + j, rows_b);
}

template <int W, typename T>
STEEL_FLATTEN float sum_of_squares(const T* row, int64_t width) {
  typename Vector<W>::type sums[4] = {}, part;
  int64_t column = 0;
  for (; column + 4 * W <= width; column += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      load<W>(part, row + column + v * W);
      sums[v] += part * part;
    }
  }
  float sum = total<W>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; column < width; ++column) sum += to_float(row[column]) * to_float(row[column]);
  return sum;
}

constexpr size_t kLine = 64;  // bytes that come from memory at once

// ---- mix: a block of I rows x V vectors is kept in registers over all terms ----

template <class M, int I, int V, typename Term, typename Out>
STEEL_FLATTEN void mix_block(const Mix<Term, Out>& mix, int64_t row, int64_t column) {
  constexpr int W = M::width;
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
    const Term* from = mix.terms[term] + column;
    for (int v = 0; v < V; ++v) load<W>(part[v], from + v * W);
    if (sizeof(Out) == 4 && I > 1 && mix.ahead != 0 && row == 0) {
      for (int v = 0; v < V; v += kLine / (W * sizeof(Term))) __builtin_prefetch(from + mix.ahead + v * W);
    }
    for (int i = 0; i < I; ++i) {
      const float coefficient = coefficients[i * mix.row_stride + term * mix.term_stride];
      for (int v = 0; v < V; ++v) sums[i][v] += part[v] * coefficient;
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int v = 0; v < V; ++v) store<M>(mix.out + (row + i) * mix.width + column + v * W, sums[i][v]);
  }
}

template <class M, int V, typename Term, typename Out>
STEEL_FLATTEN void mix_columns(const Mix<Term, Out>& mix, int64_t column) {
  int64_t row = 0;
  if constexpr (M::width == 16) {
    for (; row + 6 <= mix.rows; row += 6) mix_block<M, 6, V>(mix, row, column);
  }
  for (; row + 4 <= mix.rows; row += 4) mix_block<M, 4, V>(mix, row, column);
  for (; row + 2 <= mix.rows; row += 2) mix_block<M, 2, V>(mix, row, column);
  for (; row < mix.rows; ++row) mix_block<M, 1, V>(mix, row, column);
}

template <class M, typename Term, typename Out>
STEEL_FLATTEN void mix_all(const Mix<Term, Out>& mix) {
  constexpr int W = M::width;
  int64_t column = 0;
  constexpr int V = W == 16 ? 4 : 3;
  for (; column + V * W <= mix.width; column += V * W) mix_columns<M, V>(mix, column);
  for (; column + W <= mix.width; column += W) mix_columns<M, 1>(mix, column);
  for (; column < mix.width; ++column) mix_columns<Machine<1>, 1>(mix, column);
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
    store<Machine<W>>(values + at, x * factor + offset);
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

// NAME: a namespace; TARGET: the attribute that lets the compiler use the instruction set; the rest: a Machine.
#define STEEL_ROW_KERNELS(NAME, TARGET, ...)                                                                         \
  namespace NAME {                                                                                                   \
  using M = Machine<__VA_ARGS__>;                                                                                    \
  TARGET void run_exponentials(float* values, int64_t count) { softmax<M::width>(values, count, 0, 1, 0); } \
  TARGET float run_sum(const float* values, int64_t count) { return sum<M::width>(values, count); } \
  TARGET void run_add(const float* values, float* to, int64_t count) { add(values, to, count); } \
  TARGET float run_largest(const float* values, int64_t count) { return largest<M::width>(values, count); } \
  TARGET float run_exponential_sum(const float* values, int64_t count, float shift) { \
    return exponential_sum<M::width>(values, count, shift); \
  } \
  TARGET void run_softmax(float* values, int64_t count, float shift, float factor, float offset) { \
    softmax<M::width>(values, count, shift, factor, offset); \
  } \
  TARGET void run_widen(const BFloat16* from, float* to, int64_t count) { widen(from, to, count); } \
  TARGET void run_narrow(const float* from, BFloat16* to, int64_t count) { narrow(from, to, count); } \
  TARGET void run_widen_half(const Float16* from, float* to, int64_t count) { widen(from, to, count); } \
  TARGET void run_narrow_half(const float* from, Float16* to, int64_t count) { narrow(from, to, count); } \
  constexpr RowKernels row_kernels{run_exponentials, run_sum, run_add, run_largest, run_exponential_sum, run_softmax, run_widen, run_narrow, run_widen_half, run_narrow_half}; \
  template <typename T>                                                                                              \
  TARGET void run_dots(const T* a, int64_t rows_a, const float* b, int64_t rows_b, int64_t width, float* out) {      \
    dots<M::width>(a, rows_a, b, rows_b, width, out);                                                                \
  }                                                                                                                  \
  template <typename T>                                                                                              \
  TARGET float run_sum_of_squares(const T* row, int64_t width) {                                                     \
    return sum_of_squares<M::width>(row, width);                                                                     \
  }                                                                                                                  \
  template <typename Term, typename Out>                                                                             \
  TARGET void run_mix(const Mix<Term, Out>& mix) {                                                                   \
    mix_all<M>(mix);                                                                                                 \
  }                                                                                                                  \
  template <typename T> \
  constexpr TokenKernels<T> token_kernels{run_dots<T>, run_sum_of_squares<T>, run_mix<T, float>, run_mix<float, T>}; \
  }

#define STEEL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
STEEL_ROW_KERNELS(plain, , 4)
#ifdef __x86_64__
STEEL_ROW_KERNELS(avx2, __attribute__((target("avx2,fma"))), 8)
STEEL_ROW_KERNELS(avx512, __attribute__((target(STEEL_AVX512))), 16)
STEEL_ROW_KERNELS(avx512_bf16, __attribute__((target(STEEL_AVX512 ",avx512bf16"))), 16, true)
#endif

enum class Has { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

Has pick() {
#ifdef __x86_64__
  // The variable with which torch, too, is held to less than the machine has.
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = variable == nullptr ? "avx512" : variable;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512 && most == "avx512") {
    return variable == nullptr && __builtin_cpu_supports("avx512bf16") ? Has::kAvx512Bf16 : Has::kAvx512;
  }
  if (has_avx2 && (most == "avx512" || most == "avx2")) return Has::kAvx2;
#endif
  return Has::kPlain;
}

Has machine() {
  static const Has picked = pick();
  return picked;
}

}  // namespace

const RowKernels& row_kernels() {
#ifdef __x86_64__
  if (machine() >= Has::kAvx512) return avx512::row_kernels;
  if (machine() == Has::kAvx2) return avx2::row_kernels;
#endif
  return plain::row_kernels;
}

template <typename T>
const TokenKernels<T>& token_kernels() {
#ifdef __x86_64__
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (machine() == Has::kAvx512Bf16) return avx512_bf16::token_kernels<T>;
  }
  if (machine() >= Has::kAvx512) return avx512::token_kernels<T>;
  if (machine() == Has::kAvx2) return avx2::token_kernels<T>;
#endif
  return plain::token_kernels<T>;
}

template const TokenKernels<float>& token_kernels();
template const TokenKernels<BFloat16>& token_kernels();
template const TokenKernels<Float16>& token_kernels();

}  // namespace steel::cpu
