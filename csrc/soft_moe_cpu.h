// The four passes of Soft-MoE routing on a CPU. Notation as in soft_moe.h; all arrays are contiguous, T is float,
// BFloat16 or Float16. Starts and ends are as soft_moe.h says, between 0 and T; the last column of reads is T.
#pragma once

#include "soft_moe.h"

namespace steel::cpu {

// x [B, T, d], keys [S, d], starts and ends [N, R] -> slots [B, R, S, d], logits [B, T, S], lse [B, R, S]
template <typename T>
void dispatch_forward(
    const Sizes& sizes, const T* x, const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized,
    float* slots, float* logits, float* lse);

// The gradients of slots, logits and lse, and what the forward pass was given and gave
// -> grad_x [B, T, d], grad_keys [S, d]
template <typename T>
void dispatch_backward(
    const Sizes& sizes, const float* grad_slots, const float* grad_logits, const float* grad_lse, const T* x,
    const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized, const float* slots,
    const float* logits, const float* lse, T* grad_x, float* grad_keys);

// outputs [B, R, S, d], logits [B, T, S], reads [N, R] -> y [B, T, d]
template <typename T>
void combine_forward(const Sizes& sizes, const T* outputs, const float* logits, const int64_t* reads, T* y);

// grad_y [B, T, d] -> grad_outputs [B, R, S, d], grad_logits [B, T, S]
template <typename T>
void combine_backward(
    const Sizes& sizes, const T* grad_y, const T* outputs, const float* logits, const int64_t* reads, T* grad_outputs,
    float* grad_logits);

}  // namespace steel::cpu
