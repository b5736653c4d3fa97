// The CUDA kernels, emulated on a CPU, as plain C functions for ctypes. Types: 0 float32, 1 bfloat16.
#include "soft_moe_cuda.cu"

using steel::BFloat16;
using steel::Sizes;

extern "C" {

void set_seed(unsigned seed) { emulation::random_order.seed(seed); }

int64_t scratch_bytes(const Sizes* sizes) { return steel::cuda::scratch_bytes(*sizes); }

int dispatch_forward(
    const Sizes* sizes, int type, const void* x, const float* keys, const int64_t* ends, bool mix_normalized, float* slots,
    float* logits, float* lse, void* scratch) {
  const auto run = [&](auto* typed) {
    return steel::cuda::dispatch_forward(*sizes, typed, keys, ends, mix_normalized, slots, logits, lse, scratch, nullptr);
  };
  return type == 0 ? run(static_cast<const float*>(x)) : run(static_cast<const BFloat16*>(x));
}

int dispatch_backward(
    const Sizes* sizes, int type, const float* grad_slots, const float* grad_logits, const void* x, const float* keys,
    const int64_t* ends, bool mix_normalized, const float* slots, const float* logits, const float* lse, void* grad_x,
    float* grad_keys, void* scratch) {
  const auto run = [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    return steel::cuda::dispatch_backward<T>(
        *sizes, grad_slots, grad_logits, typed, keys, ends, mix_normalized, slots, logits, lse, static_cast<T*>(grad_x),
        grad_keys, scratch, nullptr);
  };
  return type == 0 ? run(static_cast<const float*>(x)) : run(static_cast<const BFloat16*>(x));
}

int combine_forward(const Sizes* sizes, int type, const void* outputs, const float* logits, const int64_t* ends, void* y) {
  const auto run = [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    return steel::cuda::combine_forward<T>(*sizes, typed, logits, ends, static_cast<T*>(y), nullptr);
  };
  return type == 0 ? run(static_cast<const float*>(outputs)) : run(static_cast<const BFloat16*>(outputs));
}

int combine_backward(
    const Sizes* sizes, int type, const void* grad_y, const void* outputs, const float* logits, const int64_t* ends,
    void* grad_outputs, float* grad_logits, void* scratch) {
  const auto run = [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    return steel::cuda::combine_backward<T>(
        *sizes, static_cast<const T*>(grad_y), typed, logits, ends, static_cast<T*>(grad_outputs), grad_logits, scratch,
        nullptr);
  };
  return type == 0 ? run(static_cast<const float*>(outputs)) : run(static_cast<const BFloat16*>(outputs));
}

}  // extern "C"
