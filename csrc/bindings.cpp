// Registers the kernels as torch operators; `import steel_megatron._C` loads them. Shapes and gradients:
// steel_megatron/ops/kernels.py.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <torch/library.h>

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "soft_moe_cpu.h"
#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "soft_moe_cuda.h"
#endif

namespace steel {
namespace {

using at::Tensor;

at::TensorOptions float_like(const Tensor& x) { return x.options().dtype(at::kFloat); }

void check_same_device(const Tensor& x, const Tensor& other, const char* name) {
  TORCH_CHECK(other.device() == x.device(), "soft_moe: ", name, " is on ", other.device(), ", the tokens on ", x.device());
}

void check_shape(const Tensor& tensor, at::IntArrayRef shape, at::ScalarType type, const char* name) {
  TORCH_CHECK(
      tensor.sizes() == shape && tensor.scalar_type() == type, "soft_moe: ", name, " is ", tensor.scalar_type(), " of shape ",
      tensor.sizes(), "; it must be ", type, " of shape ", shape);
}

void check_type(const Tensor& tensor, const char* name) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "soft_moe: ", name, " is ", type,
      "; the kernels compute float32, bfloat16 and float16");
}

// Blocks are checked where that costs no wait for a device; the CUDA kernels stay within memory whatever they are.
void check_blocks(const Tensor& starts, const Tensor& ends, const Sizes& n) {
  if (!starts.is_cpu()) return;
  const int64_t *start = starts.const_data_ptr<int64_t>(), *end = ends.const_data_ptr<int64_t>();
  for (int64_t at = 0; at < n.plans * n.blocks; ++at) {
    const int64_t k = at % n.blocks;
    const bool within = 0 <= start[at] && start[at] <= end[at] && end[at] <= n.length;
    const bool follows = k == 0 || (start[at] == start[at - 1] && end[at - 1] <= end[at]) || end[at - 1] <= start[at];
    TORCH_CHECK(
        within && follows, "soft_moe: block ", k, " of row ", at / n.blocks, " goes from starts = ", start[at], " to ends = ",
        end[at], "; blocks must be within the ", n.length, " tokens, and either go on from the one before (the same start) ",
        "or start at or after its end");
  }
}

// What a pass allocates at most is counted in int64: the sums of every piece, in bytes.
void check_product(const Sizes& n) {
  int64_t bytes = sizeof(float), pieces = 0;
  const bool overflow = __builtin_mul_overflow(n.blocks, int64_t{2}, &pieces) || __builtin_add_overflow(pieces, n.length, &pieces) ||
                        __builtin_add_overflow(pieces, int64_t{1}, &pieces) || __builtin_mul_overflow(bytes, pieces, &bytes) ||
                        __builtin_mul_overflow(bytes, std::max<int64_t>(n.batch, 1), &bytes) ||
                        __builtin_mul_overflow(bytes, 2 * n.slots, &bytes) ||
                        __builtin_mul_overflow(bytes, std::max<int64_t>(n.width, 1), &bytes);
  TORCH_CHECK(
      !overflow, "soft_moe: [B, T, d, S, R] = [", n.batch, ", ", n.length, ", ", n.width, ", ", n.slots, ", ", n.blocks,
      "] is more than memory can be addressed for");
}

// A new tensor. The system hands out memory in pages of 4 KiB, which takes longer than to fill them; it is asked for pages
// of 2 MiB where a tensor is large (transparent huge pages, Linux).
Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor tensor = at::empty(shape, options);
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (tensor.is_cpu() && tensor.nbytes() >= 4 * kPage) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + tensor.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice: whether it is taken is no matter
  }
#endif
  return tensor;
}

// What the passes are called with: T's pointers, and a device's extra arguments.
template <typename T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* out(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls pass(type tag) with float, BFloat16 or Float16.
template <typename Pass>
void for_type(const Tensor& x, const Pass& pass) {
  if (x.scalar_type() == at::kFloat) {
    pass(float());
  } else if (x.scalar_type() == at::kHalf) {
    pass(Float16());
  } else {
    pass(BFloat16());
  }
}

#ifdef WITH_CUDA
Tensor scratch_for(cuda::Pass pass, const Sizes& sizes, const Tensor& x) {
  return at::empty({cuda::scratch_bytes(pass, sizes)}, x.options().dtype(at::kByte));
}
#endif

Sizes check_dispatch(const Tensor& x, const Tensor& keys, const Tensor& starts, const Tensor& ends) {
  check_type(x, "x");
  TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1, "soft_moe: x has shape ", x.sizes(), "; it must be [B, T >= 1, d]");
  TORCH_CHECK(keys.dim() == 2 && keys.size(1) >= 1, "soft_moe: keys have shape ", keys.sizes(), "; they must be [d, S >= 1]");
  TORCH_CHECK(
      starts.dim() == 2 && starts.size(1) >= 1 && (starts.size(0) == 1 || starts.size(0) == x.size(0)),
      "soft_moe: starts has shape ", starts.sizes(), "; it must be [1 or B = ", x.size(0), ", R >= 1]");
  check_shape(keys, {x.size(2), keys.size(1)}, at::kFloat, "keys");
  check_shape(starts, starts.sizes(), at::kLong, "starts");
  check_shape(ends, starts.sizes(), at::kLong, "ends");
  check_same_device(x, keys, "keys");
  check_same_device(x, starts, "starts");
  check_same_device(x, ends, "ends");
  const Sizes sizes{x.size(0), x.size(1), x.size(2), keys.size(1), starts.size(1), starts.size(0)};
  check_product(sizes);
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> dispatch(
    const Tensor& x_, const Tensor& keys, const Tensor& starts_, const Tensor& ends_, bool mix_normalized) {
  const Sizes n = check_dispatch(x_, keys, starts_, ends_);
  const Tensor x = x_.contiguous(), rows = keys.t().contiguous(), starts = starts_.contiguous(), ends = ends_.contiguous();
  check_blocks(starts, ends, n);
  Tensor slots = empty({n.batch, n.blocks, n.slots, n.width}, float_like(x));
  Tensor logits = empty({n.batch, n.length, n.slots}, float_like(x));
  Tensor lse = empty({n.batch, n.blocks, n.slots}, float_like(x));
  for_type(x, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (x.is_cuda()) {
      const c10::cuda::CUDAGuard guard(x.device());
      Tensor scratch = scratch_for(cuda::Pass::kDispatchForward, n, x);
      C10_CUDA_CHECK(cuda::dispatch_forward<T>(
          n, in<T>(x), in<float>(rows), in<int64_t>(starts), in<int64_t>(ends), mix_normalized, out<float>(slots),
          out<float>(logits), out<float>(lse), out<void>(scratch), c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::dispatch_forward<T>(
        n, in<T>(x), in<float>(rows), in<int64_t>(starts), in<int64_t>(ends), mix_normalized, out<float>(slots),
        out<float>(logits), out<float>(lse));
  });
  return {slots, logits, lse};
}

std::tuple<Tensor, Tensor> dispatch_backward(
    const Tensor& grad_slots_, const Tensor& grad_logits_, const Tensor& grad_lse_, const Tensor& x_, const Tensor& keys,
    const Tensor& starts_, const Tensor& ends_, bool mix_normalized, const Tensor& slots_, const Tensor& logits_,
    const Tensor& lse_) {
  const Sizes n = check_dispatch(x_, keys, starts_, ends_);
  check_shape(grad_slots_, {n.batch, n.blocks, n.slots, n.width}, at::kFloat, "the gradient of slots");
  check_shape(grad_logits_, {n.batch, n.length, n.slots}, at::kFloat, "the gradient of logits");
  check_shape(grad_lse_, {n.batch, n.blocks, n.slots}, at::kFloat, "the gradient of lse");
  check_shape(slots_, grad_slots_.sizes(), at::kFloat, "slots");
  check_shape(logits_, grad_logits_.sizes(), at::kFloat, "logits");
  check_shape(lse_, grad_lse_.sizes(), at::kFloat, "lse");
  for (const Tensor* tensor : {&grad_slots_, &grad_logits_, &grad_lse_, &slots_, &logits_, &lse_}) {
    check_same_device(x_, *tensor, "a result or its gradient");
  }
  const Tensor grad_slots = grad_slots_.contiguous(), grad_logits = grad_logits_.contiguous();
  const Tensor grad_lse = grad_lse_.contiguous(), x = x_.contiguous(), rows = keys.t().contiguous();
  const Tensor starts = starts_.contiguous(), ends = ends_.contiguous();
  const Tensor slots = slots_.contiguous(), logits = logits_.contiguous(), lse = lse_.contiguous();
  check_blocks(starts, ends, n);
  Tensor grad_x = empty(x.sizes(), x.options()), grad_rows = empty(rows.sizes(), rows.options());
  for_type(x, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (x.is_cuda()) {
      const c10::cuda::CUDAGuard guard(x.device());
      Tensor scratch = scratch_for(cuda::Pass::kDispatchBackward, n, x);
      C10_CUDA_CHECK(cuda::dispatch_backward<T>(
          n, in<float>(grad_slots), in<float>(grad_logits), in<float>(grad_lse), in<T>(x), in<float>(rows),
          in<int64_t>(starts), in<int64_t>(ends), mix_normalized, in<float>(slots), in<float>(logits), in<float>(lse),
          out<T>(grad_x), out<float>(grad_rows), out<void>(scratch), c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::dispatch_backward<T>(
        n, in<float>(grad_slots), in<float>(grad_logits), in<float>(grad_lse), in<T>(x), in<float>(rows),
        in<int64_t>(starts), in<int64_t>(ends), mix_normalized, in<float>(slots), in<float>(logits), in<float>(lse),
        out<T>(grad_x), out<float>(grad_rows));
  });
  return {grad_x, grad_rows.t().contiguous()};
}

Sizes check_combine(const Tensor& outputs, const Tensor& logits, const Tensor& block_of_token) {
  check_type(outputs, "outputs");
  TORCH_CHECK(
      outputs.dim() == 4 && outputs.size(1) >= 1 && outputs.size(2) >= 1, "soft_moe: outputs have shape ", outputs.sizes(),
      "; they must be [B, R >= 1, S >= 1, d]");
  TORCH_CHECK(
      logits.dim() == 3 && logits.size(1) >= 1, "soft_moe: logits have shape ", logits.sizes(), "; they must be [B, T >= 1, S]");
  check_shape(logits, {outputs.size(0), logits.size(1), outputs.size(2)}, at::kFloat, "logits");
  const bool rows_fit = block_of_token.dim() == 2 && (block_of_token.size(0) == 1 || block_of_token.size(0) == outputs.size(0));
  TORCH_CHECK(
      rows_fit, "soft_moe: block_of_token has shape ", block_of_token.sizes(), "; it must be [1 or B = ", outputs.size(0),
      ", T = ", logits.size(1), "]");
  check_shape(block_of_token, {block_of_token.size(0), logits.size(1)}, at::kLong, "block_of_token");
  check_same_device(outputs, logits, "logits");
  check_same_device(outputs, block_of_token, "block_of_token");
  const Sizes sizes{
      outputs.size(0), logits.size(1), outputs.size(3), outputs.size(2), outputs.size(1), block_of_token.size(0)};
  check_product(sizes);
  return sizes;
}

// Where the tokens that read each block end: [N, R]. The blocks of successive tokens ascend.
Tensor ends_of_readers(const Tensor& block_of_token, const Sizes& n) {
  const Tensor blocks = block_of_token.contiguous();
  if (blocks.is_cpu()) {
    const int64_t* block = blocks.const_data_ptr<int64_t>();
    for (int64_t at = 0; at < n.plans * n.length; ++at) {
      const int64_t t = at % n.length;
      TORCH_CHECK(
          (t == 0 ? 0 : block[at - 1]) <= block[at] && block[at] < n.blocks, "soft_moe: block_of_token[", at / n.length, ", ", t,
          "] = ", block[at], "; blocks must ascend from 0 and stay below R = ", n.blocks);
    }
  }
  const Tensor every = at::arange(n.blocks, blocks.options()).expand({n.plans, n.blocks}).contiguous();
  return at::searchsorted(blocks, every, /*out_int32=*/false, /*right=*/true);
}

Tensor combine(const Tensor& outputs_, const Tensor& logits_, const Tensor& block_of_token) {
  const Sizes n = check_combine(outputs_, logits_, block_of_token);
  const Tensor outputs = outputs_.contiguous(), logits = logits_.contiguous(), reads = ends_of_readers(block_of_token, n);
  Tensor y = empty({n.batch, n.length, n.width}, outputs.options());
  for_type(outputs, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (outputs.is_cuda()) {
      const c10::cuda::CUDAGuard guard(outputs.device());
      Tensor scratch = scratch_for(cuda::Pass::kCombineForward, n, outputs);
      C10_CUDA_CHECK(cuda::combine_forward<T>(
          n, in<T>(outputs), in<float>(logits), in<int64_t>(reads), out<T>(y), out<void>(scratch),
          c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::combine_forward<T>(n, in<T>(outputs), in<float>(logits), in<int64_t>(reads), out<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& grad_y_, const Tensor& outputs_, const Tensor& logits_, const Tensor& block_of_token) {
  const Sizes n = check_combine(outputs_, logits_, block_of_token);
  check_shape(grad_y_, {n.batch, n.length, n.width}, outputs_.scalar_type(), "the gradient of y");
  check_same_device(outputs_, grad_y_, "the gradient of y");
  const Tensor grad_y = grad_y_.contiguous(), outputs = outputs_.contiguous(), logits = logits_.contiguous();
  const Tensor reads = ends_of_readers(block_of_token, n);
  Tensor grad_outputs = empty(outputs.sizes(), outputs.options());
  Tensor grad_logits = empty(logits.sizes(), logits.options());
  for_type(outputs, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (outputs.is_cuda()) {
      const c10::cuda::CUDAGuard guard(outputs.device());
      Tensor scratch = scratch_for(cuda::Pass::kCombineBackward, n, outputs);
      C10_CUDA_CHECK(cuda::combine_backward<T>(
          n, in<T>(grad_y), in<T>(outputs), in<float>(logits), in<int64_t>(reads), out<T>(grad_outputs),
          out<float>(grad_logits), out<void>(scratch), c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::combine_backward<T>(
        n, in<T>(grad_y), in<T>(outputs), in<float>(logits), in<int64_t>(reads), out<T>(grad_outputs),
        out<float>(grad_logits));
  });
  return {grad_outputs, grad_logits};
}

}  // namespace

TORCH_LIBRARY(steel_megatron, library) {
  library.def(
      "soft_moe_dispatch(Tensor x, Tensor keys, Tensor starts, Tensor ends, bool mix_normalized) "
      "-> (Tensor slots, Tensor logits, Tensor lse)");
  library.def(
      "soft_moe_dispatch_backward(Tensor grad_slots, Tensor grad_logits, Tensor grad_lse, Tensor x, Tensor keys, "
      "Tensor starts, Tensor ends, bool mix_normalized, Tensor slots, Tensor logits, Tensor lse) -> (Tensor grad_x, Tensor grad_keys)");
  library.def("soft_moe_combine(Tensor outputs, Tensor logits, Tensor block_of_token) -> Tensor y");
  library.def(
      "soft_moe_combine_backward(Tensor grad_y, Tensor outputs, Tensor logits, Tensor block_of_token) "
      "-> (Tensor grad_outputs, Tensor grad_logits)");
}

void register_kernels(torch::Library& library) {
  library.impl("soft_moe_dispatch", &dispatch);
  library.impl("soft_moe_dispatch_backward", &dispatch_backward);
  library.impl("soft_moe_combine", &combine);
  library.impl("soft_moe_combine_backward", &combine_backward);
}

TORCH_LIBRARY_IMPL(steel_megatron, CPU, library) { register_kernels(library); }
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(steel_megatron, CUDA, library) { register_kernels(library); }
#endif

}  // namespace steel

#ifdef WITH_CUDA
constexpr int kWithCuda = 1;
#else
constexpr int kWithCuda = 0;
#endif

// The module itself holds nothing but the constant; loading it registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Compiled Soft-MoE routing kernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "WITH_CUDA", kWithCuda) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
