// The four passes of Soft-MoE routing on a GPU, without torch's headers. Notation as in soft_moe.h, arguments as in
// soft_moe_cpu.h; every pointer is device memory, everything is launched on `stream` and nothing waits for it. T is float
// or BFloat16. `scratch` has as many bytes as scratch_bytes() says, aligned to 16.
#pragma once

#include <cuda_runtime_api.h>

#include "soft_moe.h"

namespace steel::cuda {

// Enough for each of the four passes.
int64_t scratch_bytes(const Sizes& sizes);

template <typename T>
cudaError_t dispatch_forward(
    const Sizes& sizes, const T* x, const float* keys, const int64_t* ends, bool mix_normalized, float* slots,
    float* logits, float* lse, void* scratch, cudaStream_t stream);

template <typename T>
cudaError_t dispatch_backward(
    const Sizes& sizes, const float* grad_slots, const float* grad_logits, const T* x, const float* keys,
    const int64_t* ends, bool mix_normalized, const float* slots, const float* logits, const float* lse, T* grad_x,
    float* grad_keys, void* scratch, cudaStream_t stream);

template <typename T>
cudaError_t combine_forward(
    const Sizes& sizes, const T* outputs, const float* logits, const int64_t* ends, T* y, cudaStream_t stream);

template <typename T>
cudaError_t combine_backward(
    const Sizes& sizes, const T* grad_y, const T* outputs, const float* logits, const int64_t* ends, T* grad_outputs,
    float* grad_logits, void* scratch, cudaStream_t stream);

}  // namespace steel::cuda
