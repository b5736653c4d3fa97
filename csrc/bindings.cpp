// Registers the kernels as torch operators; `import steel_megatron._C` loads them. Shapes and gradients:
// steel_megatron/ops/kernels.py.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <torch/library.h>

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
  TORCH_CHECK(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, "soft_moe: ", name, " is ",
      tensor.scalar_type(), "; the kernels compute float32 and bfloat16");
}

// The ends are checked where that costs no wait for a device; the CUDA kernels stay within memory whatever they are.
void check_ends(const Tensor& ends, int64_t length) {
  if (!ends.is_cpu()) return;
  const int64_t* end = ends.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < ends.numel(); ++k) {
    const int64_t smallest = k == 0 ? 1 : end[k - 1];
    TORCH_CHECK(
        smallest <= end[k] && end[k] <= length, "soft_moe: refresh[", k, "] = ", end[k], "; it must be within ", smallest,
        " and ", length, " (refresh points ascend and end within the sequence)");
  }
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

// Calls pass(type tag) with float or BFloat16.
template <typename Pass>
void for_type(const Tensor& x, const Pass& pass) {
  if (x.scalar_type() == at::kFloat) {
    pass(float());
  } else {
    pass(BFloat16());
  }
}

#ifdef WITH_CUDA
Tensor scratch_for(const Sizes& sizes, const Tensor& x) {
  return at::empty({cuda::scratch_bytes(sizes)}, x.options().dtype(at::kByte));
}
#endif

Sizes check_dispatch(const Tensor& x, const Tensor& keys, const Tensor& refresh) {
  check_type(x, "x");
  TORCH_CHECK(x.dim() == 3 && x.size(1) >= 1, "soft_moe: x has shape ", x.sizes(), "; it must be [B, T >= 1, d]");
  TORCH_CHECK(keys.dim() == 2 && keys.size(1) >= 1, "soft_moe: keys have shape ", keys.sizes(), "; they must be [d, S >= 1]");
  TORCH_CHECK(
      refresh.dim() == 1 && refresh.size(0) >= 1, "soft_moe: refresh has shape ", refresh.sizes(), "; it must be [R >= 1]");
  check_shape(keys, {x.size(2), keys.size(1)}, at::kFloat, "keys");
  check_shape(refresh, refresh.sizes(), at::kLong, "refresh");
  check_same_device(x, keys, "keys");
  check_same_device(x, refresh, "refresh");
  return Sizes{x.size(0), x.size(1), x.size(2), keys.size(1), refresh.size(0)};
}

std::tuple<Tensor, Tensor, Tensor> dispatch(const Tensor& x_, const Tensor& keys, const Tensor& refresh, bool mix_normalized) {
  const Sizes n = check_dispatch(x_, keys, refresh);
  const Tensor x = x_.contiguous(), rows = keys.t().contiguous(), ends = refresh.contiguous();
  check_ends(ends, n.length);
  Tensor slots = at::empty({n.batch, n.refreshes, n.slots, n.width}, float_like(x));
  Tensor logits = at::empty({n.batch, n.length, n.slots}, float_like(x));
  Tensor lse = at::empty({n.batch, n.refreshes, n.slots}, float_like(x));
  for_type(x, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (x.is_cuda()) {
      const c10::cuda::CUDAGuard guard(x.device());
      Tensor scratch = scratch_for(n, x);
      C10_CUDA_CHECK(cuda::dispatch_forward<T>(
          n, in<T>(x), in<float>(rows), in<int64_t>(ends), mix_normalized, out<float>(slots), out<float>(logits),
          out<float>(lse), out<void>(scratch), c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::dispatch_forward<T>(
        n, in<T>(x), in<float>(rows), in<int64_t>(ends), mix_normalized, out<float>(slots), out<float>(logits),
        out<float>(lse));
  });
  return {slots, logits, lse};
}

std::tuple<Tensor, Tensor> dispatch_backward(
    const Tensor& grad_slots_, const Tensor& grad_logits_, const Tensor& x_, const Tensor& keys, const Tensor& refresh,
    bool mix_normalized, const Tensor& slots_, const Tensor& logits_, const Tensor& lse_) {
  const Sizes n = check_dispatch(x_, keys, refresh);
  check_shape(grad_slots_, {n.batch, n.refreshes, n.slots, n.width}, at::kFloat, "the gradient of slots");
  check_shape(grad_logits_, {n.batch, n.length, n.slots}, at::kFloat, "the gradient of logits");
  check_shape(slots_, grad_slots_.sizes(), at::kFloat, "slots");
  check_shape(logits_, grad_logits_.sizes(), at::kFloat, "logits");
  check_shape(lse_, {n.batch, n.refreshes, n.slots}, at::kFloat, "lse");
  const Tensor grad_slots = grad_slots_.contiguous(), grad_logits = grad_logits_.contiguous();
  const Tensor x = x_.contiguous(), rows = keys.t().contiguous(), ends = refresh.contiguous();
  const Tensor slots = slots_.contiguous(), logits = logits_.contiguous(), lse = lse_.contiguous();
  check_ends(ends, n.length);
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_rows = at::empty(rows.sizes(), rows.options());
  for_type(x, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (x.is_cuda()) {
      const c10::cuda::CUDAGuard guard(x.device());
      Tensor scratch = scratch_for(n, x);
      C10_CUDA_CHECK(cuda::dispatch_backward<T>(
          n, in<float>(grad_slots), in<float>(grad_logits), in<T>(x), in<float>(rows), in<int64_t>(ends), mix_normalized,
          in<float>(slots), in<float>(logits), in<float>(lse), out<T>(grad_x), out<float>(grad_rows), out<void>(scratch),
          c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::dispatch_backward<T>(
        n, in<float>(grad_slots), in<float>(grad_logits), in<T>(x), in<float>(rows), in<int64_t>(ends), mix_normalized,
        in<float>(slots), in<float>(logits), in<float>(lse), out<T>(grad_x), out<float>(grad_rows));
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
  check_shape(block_of_token, {logits.size(1)}, at::kLong, "block_of_token");
  check_same_device(outputs, logits, "logits");
  check_same_device(outputs, block_of_token, "block_of_token");
  return Sizes{outputs.size(0), logits.size(1), outputs.size(3), outputs.size(2), outputs.size(1)};
}

// Where the tokens of each block end: [R]. The blocks of successive tokens ascend.
Tensor ends_of_blocks(const Tensor& block_of_token, const Sizes& n) {
  const Tensor blocks = block_of_token.contiguous();
  if (blocks.is_cpu()) {
    const int64_t* block = blocks.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < n.length; ++t) {
      TORCH_CHECK(
          (t == 0 ? 0 : block[t - 1]) <= block[t] && block[t] < n.refreshes, "soft_moe: block_of_token[", t, "] = ", block[t],
          "; blocks must ascend from 0 and stay below R = ", n.refreshes);
    }
  }
  return at::searchsorted(blocks, at::arange(n.refreshes, blocks.options()), /*out_int32=*/false, /*right=*/true);
}

Tensor combine(const Tensor& outputs_, const Tensor& logits_, const Tensor& block_of_token) {
  const Sizes n = check_combine(outputs_, logits_, block_of_token);
  const Tensor outputs = outputs_.contiguous(), logits = logits_.contiguous(), ends = ends_of_blocks(block_of_token, n);
  Tensor y = at::empty({n.batch, n.length, n.width}, outputs.options());
  for_type(outputs, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (outputs.is_cuda()) {
      const c10::cuda::CUDAGuard guard(outputs.device());
      C10_CUDA_CHECK(cuda::combine_forward<T>(
          n, in<T>(outputs), in<float>(logits), in<int64_t>(ends), out<T>(y), c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::combine_forward<T>(n, in<T>(outputs), in<float>(logits), in<int64_t>(ends), out<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& grad_y_, const Tensor& outputs_, const Tensor& logits_, const Tensor& block_of_token) {
  const Sizes n = check_combine(outputs_, logits_, block_of_token);
  check_shape(grad_y_, {n.batch, n.length, n.width}, outputs_.scalar_type(), "the gradient of y");
  const Tensor grad_y = grad_y_.contiguous(), outputs = outputs_.contiguous(), logits = logits_.contiguous();
  const Tensor ends = ends_of_blocks(block_of_token, n);
  Tensor grad_outputs = at::empty(outputs.sizes(), outputs.options());
  Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  for_type(outputs, [&](auto tag) {
    using T = decltype(tag);
#ifdef WITH_CUDA
    if (outputs.is_cuda()) {
      const c10::cuda::CUDAGuard guard(outputs.device());
      Tensor scratch = scratch_for(n, outputs);
      C10_CUDA_CHECK(cuda::combine_backward<T>(
          n, in<T>(grad_y), in<T>(outputs), in<float>(logits), in<int64_t>(ends), out<T>(grad_outputs),
          out<float>(grad_logits), out<void>(scratch), c10::cuda::getCurrentCUDAStream()));
      return;
    }
#endif
    cpu::combine_backward<T>(
        n, in<T>(grad_y), in<T>(outputs), in<float>(logits), in<int64_t>(ends), out<T>(grad_outputs),
        out<float>(grad_logits));
  });
  return {grad_outputs, grad_logits};
}

}  // namespace

TORCH_LIBRARY(steel_megatron, library) {
  library.def(
      "soft_moe_dispatch(Tensor x, Tensor keys, Tensor refresh, bool mix_normalized) "
      "-> (Tensor slots, Tensor logits, Tensor lse)");
  library.def(
      "soft_moe_dispatch_backward(Tensor grad_slots, Tensor grad_logits, Tensor x, Tensor keys, Tensor refresh, "
      "bool mix_normalized, Tensor slots, Tensor logits, Tensor lse) -> (Tensor grad_x, Tensor grad_keys)");
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
