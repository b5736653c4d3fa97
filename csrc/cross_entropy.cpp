// Cross entropy of a few rows of logits on a CPU, and sums of a narrower type: each number is read once for a result and
// converted in registers, where torch makes a pass over memory for every operation. Shapes: steel_megatron/ops/cross_entropy.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"
#include "tiles.h"

namespace steel::cpu {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 1024;  // floats: small enough for the first-level cache

void put_back(const float*, int64_t, float*) {}
void put_back(const float* from, int64_t count, BFloat16* to) { row_kernels().narrow(from, to, count); }
void put_back(const float* from, int64_t count, Float16* to) { row_kernels().narrow_half(from, to, count); }

template <typename Task>
void for_blocks(int64_t count, const Task& task) {
  for (int64_t at = 0; at < count; at += kBlock) task(at, std::min(kBlock, count - at));
}

// Calls pass with a pointer of the tensor's type.
template <typename Pass>
void with_type(const Tensor& tensor, const Pass& pass) {
  void* data = tensor.mutable_data_ptr();
  if (tensor.scalar_type() == at::kFloat) return pass(static_cast<float*>(data));
  if (tensor.scalar_type() == at::kBFloat16) return pass(static_cast<BFloat16*>(data));
  pass(static_cast<Float16*>(data));
}

void check(const Tensor& logits, int64_t columns) {
  const auto type = logits.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "cross_entropy: logits are ", type);
  TORCH_CHECK(
      logits.dim() == 2 && logits.is_contiguous() && 0 <= columns && columns <= logits.size(1), "cross_entropy: logits of shape ",
      logits.sizes(), " with ", columns, " columns");
}

Tensor statistics(const Tensor& logits, const Tensor& labels, int64_t columns) {
  check(logits, columns);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const Tensor own_labels = labels.contiguous();
  TORCH_CHECK(own_labels.scalar_type() == at::kLong && own_labels.numel() == rows, "cross_entropy: labels ", labels.sizes());
  Tensor result = at::empty({3, rows}, logits.options().dtype(at::kFloat));
  const int64_t* label = own_labels.const_data_ptr<int64_t>();
  float* to = result.mutable_data_ptr<float>();
  with_type(logits, [&](auto* data) {
    parallel(rows, [&](int64_t row) {
      float scratch[kBlock];
      const auto* values = data + row * width;
      float most = -std::numeric_limits<float>::infinity();
      double sum = 0, exponentials = 0;
      for_blocks(columns, [&](int64_t at, int64_t count) {
        most = std::max(most, row_kernels().largest(as_floats(values + at, count, scratch), count));
      });
      for_blocks(columns, [&](int64_t at, int64_t count) {
        const float* block = as_floats(values + at, count, scratch);
        exponentials += row_kernels().exponential_sum(block, count, most);
        sum += row_kernels().sum(block, count);
      });
      const bool here = 0 <= label[row] && label[row] < columns;
      to[row] = columns == 0 ? most : most + static_cast<float>(std::log(exponentials));
      to[rows + row] = here ? to_float(values[label[row]]) : 0.0f;
      to[2 * rows + row] = static_cast<float>(sum);
    });
  });
  return result;
}

void gradient_(
    Tensor& logits, const Tensor& labels, int64_t columns, const Tensor& lse, const Tensor& factors, double smoothing,
    int64_t vocabulary) {
  check(logits, columns);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const Tensor own_labels = labels.contiguous(), own_lse = lse.contiguous(), own_factors = factors.contiguous();
  TORCH_CHECK(
      own_labels.numel() == rows && own_lse.numel() == rows && own_factors.numel() == rows &&
          own_labels.scalar_type() == at::kLong && own_lse.scalar_type() == at::kFloat && own_factors.scalar_type() == at::kFloat,
      "cross_entropy: labels ", labels.sizes(), ", lse ", lse.sizes(), " and factors ", factors.sizes(), " for ", rows, " rows");
  const int64_t* label = own_labels.const_data_ptr<int64_t>();
  const float *shift = own_lse.const_data_ptr<float>(), *factor = own_factors.const_data_ptr<float>();
  with_type(logits, [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    parallel(rows, [&](int64_t row) {
      float scratch[kBlock];
      T* values = data + row * width;
      const float offset = -factor[row] * static_cast<float>(smoothing / static_cast<double>(vocabulary));
      const float at_label = -factor[row] * static_cast<float>(1.0 - smoothing);
      for_blocks(columns, [&](int64_t at, int64_t count) {
        float* block = const_cast<float*>(as_floats(values + at, count, scratch));
        row_kernels().softmax(block, count, shift[row], factor[row], offset);
        if (at <= label[row] && label[row] < at + count) block[label[row] - at] += at_label;
        put_back(block, count, values + at);
      });
      std::fill(values + columns, values + width, T{});
    });
  });
}

void add_(Tensor& sum, const Tensor& addend) {
  TORCH_CHECK(
      sum.scalar_type() == at::kFloat && sum.is_contiguous() && addend.is_contiguous() && sum.sizes() == addend.sizes(),
      "add_: ", sum.scalar_type(), " ", sum.sizes(), " and ", addend.scalar_type(), " ", addend.sizes());
  float* to = sum.mutable_data_ptr<float>();
  with_type(addend, [&](auto* data) {
    at::parallel_for(0, sum.numel(), 16 * kBlock, [&](int64_t begin, int64_t end) {
      float scratch[kBlock];
      for_blocks(end - begin, [&](int64_t at, int64_t count) {
        const float* block = as_floats(data + begin + at, count, scratch);
        row_kernels().add(block, to + begin + at, count);
      });
    });
  });
}

TORCH_LIBRARY_FRAGMENT(steel_megatron, library) {
  library.def("cross_entropy_statistics(Tensor logits, Tensor labels, int columns) -> Tensor");
  library.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, int columns, Tensor lse, Tensor factors, float smoothing, "
      "int vocabulary) -> ()");
  library.def("add_(Tensor(a!) sum, Tensor addend) -> ()");
}

TORCH_LIBRARY_IMPL(steel_megatron, CPU, library) {
  library.impl("cross_entropy_statistics", &statistics);
  library.impl("cross_entropy_gradient_", &gradient_);
  library.impl("add_", &add_);
}

}  // namespace
}  // namespace steel::cpu
