// The CUDA kernels, emulated on a CPU, as plain C functions for ctypes. Types: 0 float32, 1 bfloat16, 2 float16.
#include "soft_moe_cuda.cu"

using steel::BFloat16;
using steel::Float16;
using steel::Sizes;

namespace {

template <typename Run>
int for_type(int type, const Run& run) {
  if (type == 0) return run(float());
  return type == 1 ? run(BFloat16()) : run(Float16());
}

template <typename T>
const T* in(const void* rows) {
  return static_cast<const T*>(rows);
}

template <typename T>
T* out(void* rows) {
  return static_cast<T*>(rows);
}

}  // namespace

extern "C" {

void set_seed(unsigned seed) { emulation::random_order.seed(seed); }

// Passes in the order of steel::cuda::Pass.
int64_t scratch_bytes(int pass, const Sizes* sizes) {
  return steel::cuda::scratch_bytes(static_cast<steel::cuda::Pass>(pass), *sizes);
}

int dispatch_forward(
    const Sizes* sizes, int type, const void* x, const float* keys, const int64_t* starts, const int64_t* ends,
    bool mix_normalized, float* slots, float* logits, float* lse, void* scratch) {
  return for_type(type, [&](auto tag) {
    using T = decltype(tag);
    return steel::cuda::dispatch_forward<T>(
        *sizes, in<T>(x), keys, starts, ends, mix_normalized, slots, logits, lse, scratch, nullptr);
  });
}

int dispatch_backward(
    const Sizes* sizes, int type, const float* grad_slots, const float* grad_logits, const float* grad_lse, const void* x,
    const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized, const float* slots,
    const float* logits, const float* lse, void* grad_x, float* grad_keys, void* scratch) {
  return for_type(type, [&](auto tag) {
    using T = decltype(tag);
    return steel::cuda::dispatch_backward<T>(
        *sizes, grad_slots, grad_logits, grad_lse, in<T>(x), keys, starts, ends, mix_normalized, slots, logits, lse,
        out<T>(grad_x), grad_keys, scratch, nullptr);
  });
}

int combine_forward(
    const Sizes* sizes, int type, const void* outputs, const float* logits, const int64_t* reads, void* y, void* scratch) {
  return for_type(type, [&](auto tag) {
    using T = decltype(tag);
    return steel::cuda::combine_forward<T>(*sizes, in<T>(outputs), logits, reads, out<T>(y), scratch, nullptr);
  });
}

int combine_backward(
    const Sizes* sizes, int type, const void* grad_y, const void* outputs, const float* logits, const int64_t* reads,
    void* grad_outputs, float* grad_logits, void* scratch) {
  return for_type(type, [&](auto tag) {
    using T = decltype(tag);
    return steel::cuda::combine_backward<T>(
        *sizes, in<T>(grad_y), in<T>(outputs), logits, reads, out<T>(grad_outputs), grad_logits, scratch, nullptr);
  });
}

// For the test of the conversions that the processor does on a GPU.
uint16_t float16_bits(float value) { return steel::from_float<Float16>(value).bits; }
float float16_value(uint16_t bits) { return steel::to_float(Float16{bits}); }

// Element-wise, many at once.
void to_float16(const float* values, int64_t count, uint16_t* bits) {
  for (int64_t i = 0; i < count; ++i) bits[i] = float16_bits(values[i]);
}

void from_float16(const uint16_t* bits, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = float16_value(bits[i]);
}

}  // extern "C"
