// The kernels of combine, for soft_moe_cuda.cu alone.
#pragma once

#include "cuda_tiles.h"

namespace steel::cuda {

struct CombineScratch {
  float* weights;  // [B, T, S], C
  float* sums;     // [B, pieces, S, d], only in the backward pass

  CombineScratch(const Sizes& n, Arena& arena, bool backward) {
    weights = arena.take<float>(n.batch * n.length * n.slots);
    sums = arena.take<float>(backward ? n.batch * cut_into_chunks(n).pieces * n.slots * n.width : 0);
  }
};

// weights = softmax over the slots of each token's logits
__global__ void __launch_bounds__(kThreads) softmax_kernel(
    int64_t tokens, int64_t slots, const float* __restrict__ logits, float* __restrict__ weights) {
  const int64_t token = warp_row();
  if (token >= tokens) return;
  logits += token * slots;
  weights += token * slots;
  float max = -INFINITY, sum = 0.0f;
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) max = fmaxf(max, logits[j]);
  max = warp_max(max);
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) sum += expf(logits[j] - max);
  sum = warp_sum(sum);
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) weights[j] = expf(logits[j] - max) / sum;
}

// Through that softmax: gradients_j = weight_j (gradients_j - sum over i of weight_i gradients_i)
__global__ void __launch_bounds__(kThreads) softmax_backward_kernel(
    int64_t tokens, int64_t slots, const float* __restrict__ weights, float* __restrict__ gradients) {
  const int64_t token = warp_row();
  if (token >= tokens) return;
  weights += token * slots;
  gradients += token * slots;
  float mean = 0.0f;
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) mean += weights[j] * gradients[j];
  mean = warp_sum(mean);
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) gradients[j] = weights[j] * (gradients[j] - mean);
}

// The block that tokens read. All tokens read one; the last, where `reads` is wrong.
__device__ __forceinline__ TokenRun readers_at(const Sizes& n, const int64_t* reads, int64_t token, int64_t limit) {
  const TokenRun run = run_at(nullptr, reads, n.blocks, token, limit);
  return TokenRun{run.block < 0 ? n.blocks - 1 : run.block, run.end};
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) combine_kernel(
    Sizes n, Cut cut, const T* __restrict__ outputs, const float* __restrict__ weights, const int64_t* __restrict__ reads,
    T* __restrict__ y) {
  const Place place = find_place<V>(n, cut, 1);
  const int width = static_cast<int>(n.width);
  reads = plan_of(n, reads, place.b);
  for (int64_t t = place.begin; t < place.end;) {
    const TokenRun run = readers_at(n, reads, t, place.end);
    const T* rows = outputs + (place.b * n.blocks + run.block) * n.slots * width;
    for (; t < run.end; t += kGroup) {
      const int count = static_cast<int>(run.end - t < kGroup ? run.end - t : kGroup);
      const int64_t token = place.b * n.length + t;
      int offset[kGroup];
      weight_offsets(0, count, static_cast<int>(n.slots), offset);
      for (int strip = 0; strip < kThreadColumns<V> / V; ++strip) {
        const int column = column_of<V>(place.first_column, strip);
        if (column >= width) continue;
        float out[kGroup][V] = {};
        add_rows<V>(weights + token * n.slots, offset, rows + column, n.slots, width, out);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (i < count) store(out[i], y + (token + i) * width + column);
        }
      }
    }
    t = run.end;
  }
}

// Where the tokens that read block k begin; they end at reads[k].
__device__ __forceinline__ int64_t readers_begin(const int64_t* reads, int64_t k) { return k > 0 ? reads[k - 1] : 0; }

__device__ __forceinline__ bool is_one_piece(const int64_t* reads, int64_t k, const Cut& cut) {
  const int64_t begin = readers_begin(reads, k), end = reads[k];
  return begin < end && begin >> cut.shift == (end - 1) >> cut.shift;
}

// The gradient of the weights, dY_t . F_j, and sums over tokens of C_tj dY_t.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) combine_backward_kernel(
    Sizes n, Cut cut, const T* __restrict__ grad_y, const T* __restrict__ outputs, const float* __restrict__ all_weights,
    const int64_t* __restrict__ reads, float* __restrict__ grad_weights, float* __restrict__ sums,
    T* __restrict__ grad_outputs) {
  __shared__ Dots dots;
  __shared__ TileWeights weights;
  const Place place = find_place<V>(n, cut, cut.slot_tiles);
  const int width = static_cast<int>(n.width);
  reads = plan_of(n, reads, place.b);
  ColumnSums<V> totals = {};
  for (int64_t t = place.begin; t < place.end;) {
    const TokenRun run = readers_at(n, reads, t, place.end);
    const int64_t at = (place.b * n.blocks + run.block) * n.slots + place.first_slot;
    for (; t < run.end; t += kTileTokens) {
      const int count = tile_count(t, run.end), i = threadIdx.x / kTileSlots, s = threadIdx.x % kTileSlots;
      const int64_t token = place.b * n.length + t, slot = (token + i) * n.slots + place.first_slot + s;
      const bool mine = i < count && s < place.slots;
      const T* rows = grad_y + token * width;
      tile_dots<V>(rows, count, outputs + at * width, place.slots, width, dots);
      __syncthreads();
      if (i < kTileTokens) weights[i][s] = mine ? all_weights[slot] : 0.0f;
      if (mine && place.first_column == 0) grad_weights[slot] = dots.dot[i][s];
      __syncthreads();
      add_tile<V>(rows, count, weights, place.first_column, width, totals);
    }
    t = run.end;
    if (is_one_piece(reads, run.block, cut)) {
      flush<V>(totals, place.slots, place.first_column, width, grad_outputs + at * width);
    } else {
      const int64_t piece = (place.b * cut.pieces + place.chunk + run.block) * n.slots + place.first_slot;
      flush<V>(totals, place.slots, place.first_column, width, sums + piece * width);
    }
  }
}

// grad_outputs[b, k] = the sum of block k's pieces, where combine_backward_kernel has not written it already.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_blocks_kernel(
    Sizes n, Cut cut, int64_t parts, const int64_t* __restrict__ reads, const float* __restrict__ sums,
    T* __restrict__ grad_outputs) {
  const int64_t row = n.slots * n.width, part = blockIdx.x % parts, k = blockIdx.x / parts % n.blocks;
  const int64_t b = blockIdx.x / parts / n.blocks;
  reads = plan_of(n, reads, b);
  if (is_one_piece(reads, k, cut)) return;
  const int64_t begin = readers_begin(reads, k) > 0 ? readers_begin(reads, k) : 0;
  const int64_t end = reads[k] < n.length ? reads[k] : n.length;
  const int64_t pieces = begin < end ? ((end - 1) >> cut.shift) - (begin >> cut.shift) + 1 : 0;
  const float* first = sums + (b * cut.pieces + (begin >> cut.shift) + k) * row;
  for (int64_t strip = part * kWarp; strip < row; strip += parts * kWarp) {
    const int64_t element = strip + threadIdx.x % kWarp;
    const float sum = sum_of_rows(first + element, pieces, row, element < row);
    if (threadIdx.x < kWarp && element < row) grad_outputs[(b * n.blocks + k) * row + element] = from_float<T>(sum);
  }
}

}  // namespace steel::cuda
