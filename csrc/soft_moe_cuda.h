// The four passes of Soft-MoE routing on a GPU, without torch's headers. Notation as in soft_moe.h, arguments as in
// soft_moe_cpu.h; every pointer is device memory, everything is launched on `stream` and nothing waits for it. T is float,
// BFloat16 or Float16. `scratch` has as many bytes as scratch_bytes() says for the pass, aligned to 16. Wrong starts, ends
// or reads give wrong numbers, but no access outside the arrays.
#pragma once

#include <cuda_runtime_api.h>

#include "soft_moe.h"

namespace steel::cuda {

enum class Pass { kDispatchForward, kDispatchBackward, kCombineForward, kCombineBackward };

int64_t scratch_bytes(Pass pass, const Sizes& sizes);

// x [B, T, d], keys [S, d], starts and ends [N, R] -> slots [B, R, S, d], logits [B, T, S], lse [B, R, S]
template <typename T>
cudaError_t dispatch_forward(
    const Sizes& sizes, const T* x, const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized,
    float* slots, float* logits, float* lse, void* scratch, cudaStream_t stream);

// The gradients of slots, logits and lse, and what the forward pass was given and gave -> grad_x [B, T, d],
// grad_keys [S, d]
template <typename T>
cudaError_t dispatch_backward(
    const Sizes& sizes, const float* grad_slots, const float* grad_logits, const float* grad_lse, const T* x,
    const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized, const float* slots,
    const float* logits, const float* lse, T* grad_x, float* grad_keys, void* scratch, cudaStream_t stream);

// outputs [B, R, S, d], logits [B, T, S], reads [N, R] -> y [B, T, d]
template <typename T>
cudaError_t combine_forward(
    const Sizes& sizes, const T* outputs, const float* logits, const int64_t* reads, T* y, void* scratch,
    cudaStream_t stream);

// grad_y [B, T, d] -> grad_outputs [B, R, S, d], grad_logits [B, T, S]
template <typename T>
cudaError_t combine_backward(
    const Sizes& sizes, const T* grad_y, const T* outputs, const float* logits, const int64_t* reads, T* grad_outputs,
    float* grad_logits, void* scratch, cudaStream_t stream);

}  // namespace steel::cuda
