// The kernels of dispatch, for soft_moe_cuda.cu alone.
#pragma once

#include "cuda_tiles.h"

namespace steel::cuda {

struct DispatchScratch {
  Running* running;  // [B, pieces, S]
  float* sums;       // [B, pieces, S, d]

  DispatchScratch(const Sizes& n, Arena& arena) {
    const int64_t rows = n.batch * cut_into_chunks(n).pieces * n.slots;
    running = arena.take<Running>(rows);
    sums = arena.take<float>(rows * n.width);
  }
};

struct DispatchBackwardScratch {
  float* scanned;       // [B, R, S, d], A of SOFT_MOE's reverse scan
  float* scanned_dot;   // [B, R, S], a
  float* sums;          // [B, chunks, S, d]
  float* key_weights;   // [B, T, S], only where there are more slots than a tile has
  float* slot_weights;  // [B, T, S]
  float* x_shares;      // [B, T, tiles of slots]

  DispatchBackwardScratch(const Sizes& n, Arena& arena) {
    const Cut cut = cut_into_chunks(n);
    const int64_t rows = n.batch * n.blocks * n.slots, tokens = cut.slot_tiles > 1 ? n.batch * n.length : 0;
    scanned = arena.take<float>(rows * n.width);
    scanned_dot = arena.take<float>(rows);
    sums = arena.take<float>(n.batch * cut.chunks * n.slots * n.width);
    key_weights = arena.take<float>(tokens * n.slots);
    slot_weights = arena.take<float>(tokens * n.slots);
    x_shares = arena.take<float>(tokens * cut.slot_tiles);
  }
};

// ---- dispatch, forward ----

// Folds a tile into the running maximum and sum of a slot, a warp per slot with a token per lane. Writes logits, the
// tokens' weights exp(l_tj - maximum), times 1 / |x_t| if normalized tokens are mixed, and what sums so far are to be
// multiplied with.
__device__ __forceinline__ void fold_tile(
    const Dots& dots, int count, int slots, bool mix_normalized, Running& total, TileWeights& weights,
    float (&carry)[kTileSlots], float* logits, int64_t stride) {
  const int t = threadIdx.x % kWarp, s = threadIdx.x / kWarp;
  const bool mine = t < count && s < slots;
  const float inverse = mine ? inverse_norm(dots.squares[t]) : 0.0f;
  const float logit = mine ? dots.dot[t][s] * inverse : -INFINITY;
  if (mine && logits != nullptr) logits[t * stride + s] = logit;
  Running part{fmaxf(warp_max(logit), total.max), 0.0f};  // one maximum for both: what is added needs no factor
  const float weight = exp_below(logit, part.max);
  part.sum = warp_sum(weight);
  const float before = merge(total, part).before;
  if (t < kTileTokens) weights[t][s] = mix_normalized ? weight * inverse : weight;
  if (t == 0) carry[s] = before;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) dispatch_kernel(
    Sizes n, Cut cut, const T* __restrict__ x, const float* __restrict__ keys, const int64_t* __restrict__ starts,
    const int64_t* __restrict__ ends, bool mix_normalized, float* __restrict__ logits, Running* __restrict__ running,
    float* __restrict__ sums) {
  __shared__ Dots dots;
  __shared__ TileWeights weights;
  __shared__ float carry[kTileSlots];
  const Place place = find_place<V>(n, cut, cut.slot_tiles);
  const int width = static_cast<int>(n.width);
  starts = plan_of(n, starts, place.b);
  ends = plan_of(n, ends, place.b);
  ColumnSums<V> totals = {};
  for (int64_t t = place.begin; t < place.end;) {
    const TokenRun run = run_at(starts, ends, n.blocks, t, place.end);
    Running total = nothing_yet();  // of this warp's slot
    for (; t < run.end; t += kTileTokens) {
      const int count = tile_count(t, run.end);
      const int64_t token = place.b * n.length + t;
      const T* rows = x + token * width;
      tile_dots<V>(rows, count, keys + place.first_slot * width, place.slots, width, dots);
      __syncthreads();
      float* const to = place.first_column == 0 ? logits + token * n.slots + place.first_slot : nullptr;
      fold_tile(dots, count, place.slots, mix_normalized, total, weights, carry, to, n.slots);
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kTileSlots; ++s) {
        const float factor = carry[s];
#pragma unroll
        for (int c = 0; c < kThreadColumns<V>; ++c) totals[s][c] *= factor;
      }
      if (run.block >= 0) add_tile<V>(rows, count, weights, place.first_column, width, totals);
    }
    t = run.end;
    if (run.block < 0) continue;  // nothing was added
    const int64_t at = (place.b * cut.pieces + place.chunk + run.block) * n.slots + place.first_slot;
    flush<V>(totals, place.slots, place.first_column, width, sums + at * width);
    const int s = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0 && s < place.slots && place.first_column == 0) running[at + s] = total;
  }
}

// Adds the pieces of one sequence, slot and column in order; writes slots and log-sum-exp of every block.
__global__ void __launch_bounds__(kThreads) merge_kernel(
    Sizes n, Cut cut, const int64_t* __restrict__ starts, const int64_t* __restrict__ ends,
    const Running* __restrict__ running, const float* __restrict__ sums, float* __restrict__ slots,
    float* __restrict__ lse) {
  const int64_t element = thread_element(), column = element % n.width, j = element / n.width % n.slots;
  const int64_t b = element / n.width / n.slots;
  if (b >= n.batch) return;
  starts = plan_of(n, starts, b);
  ends = plan_of(n, ends, b);
  Running total = nothing_yet();
  float sum = 0.0f;
  for (int64_t k = 0; k < n.blocks; ++k) {
    if (!goes_on(starts, k)) {
      total = nothing_yet();
      sum = 0.0f;
    }
    const int64_t begin = block_begin(starts, ends, k) > 0 ? block_begin(starts, ends, k) : 0;
    const int64_t end = ends[k] < n.length ? ends[k] : n.length;
    const int64_t pieces = begin < end ? ((end - 1) >> cut.shift) - (begin >> cut.shift) + 1 : 0;
    const int64_t first = (b * cut.pieces + (begin >> cut.shift) + k) * n.slots + j;
#pragma unroll 4
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t at = first + p * n.slots;
      const float part = sums[at * n.width + column];
      const Factors factors = merge(total, running[at]);
      sum = sum * factors.before + part * factors.added;
    }
    const int64_t at = (b * n.blocks + k) * n.slots + j;
    slots[at * n.width + column] = total.sum == 0.0f ? 0.0f : sum / total.sum;
    if (column == 0) lse[at] = log_sum_exp(total);
  }
}

// ---- dispatch, backward ----

// What a tile's tokens do with their gradients: dl_tj / |x_t|, what A_j is multiplied with, and x's own share.
struct TileGradients {
  TileWeights key_weights, slot_weights;
  float x_shares[kTileTokens];
};

// With A, a of the block (block_lse is nullptr where the tokens feed none), w_tj = exp(l_tj - lse_j):
//   dl_tj = grad_logit_tj + w_tj (v_t . A_j - a_j)      g_t = sum_j dl_tj key_j, and w_tj A_j if v is u
//   dx_t = (g_t - u_t (u_t . g_t)) / |x_t|, and sum_j w_tj A_j if v is x
// A thread per token and slot; u . g comes from the dot products at hand.
__device__ __forceinline__ void tile_gradients(
    const Dots& dots, int count, int slots, bool mix_normalized, const float* grad_logits, const float* logits,
    int64_t stride, const float* block_lse, const float* block_dot, TileGradients& tile) {
  if (threadIdx.x >= kTileTokens * kTileSlots) return;
  const int t = threadIdx.x / kTileSlots, s = threadIdx.x % kTileSlots;
  float gradient = 0.0f, weight = 0.0f, along_u = 0.0f;
  const float squares = t < count ? dots.squares[t] : 1.0f, inverse = inverse_norm(squares);
  const float mixed_scale = mix_normalized ? inverse : 1.0f;
  if (t < count && s < slots) {
    const float logit = logits[t * stride + s];
    gradient = grad_logits[t * stride + s];
    if (block_lse != nullptr) {
      const float mixed_dot = dots.dot[t][s] * mixed_scale;
      weight = exp_below(logit, block_lse[s]);
      gradient += weight * (mixed_dot - block_dot[s]);
      if (mix_normalized) along_u = weight * mixed_dot;
    }
    along_u += gradient * logit;
  }
#pragma unroll
  for (int offset = kTileSlots / 2; offset > 0; offset /= 2) along_u += __shfl_xor_sync(0xffffffffu, along_u, offset);
  tile.key_weights[t][s] = gradient * inverse;
  tile.slot_weights[t][s] = weight * mixed_scale;
  if (s == 0) tile.x_shares[t] = -along_u * radial_factor(squares);
}

// grad_x of up to kGroup tokens in V columns, from all slots; `column` is where they begin.
template <typename T, int V>
__device__ __forceinline__ void write_grad_x(
    const float (&values)[kGroup][V], const float (&x_share)[kGroup], const float* key_weights, const float* slot_weights,
    const int (&offset)[kGroup], const float* keys, const float* scanned, int64_t slots, int width, int column, int count,
    T* grad_x) {
  float out[kGroup][V];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) out[i][v] = x_share[i] * values[i][v];
  }
  add_rows<V>(key_weights, offset, keys + column, slots, width, out);
  if (scanned != nullptr) add_rows<V>(slot_weights, offset, scanned + column, slots, width, out);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) store(out[i], grad_x + static_cast<int64_t>(i) * width + column);
  }
}

// The rows of kGroup tokens in V columns; past the last token, the last token's.
template <int V, typename T>
__device__ __forceinline__ void load_group(const T* x, int first, int count, int width, int column, float (&to)[kGroup][V]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    load(x + static_cast<int64_t>(first + i < count ? first + i : count - 1) * width + column, to[i]);
  }
}

// The keys' gradient of a chunk, and grad_x where one tile has all slots; else what grad_x_kernel needs for it.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) dispatch_backward_kernel(
    Sizes n, Cut cut, const float* __restrict__ grad_logits, const T* __restrict__ x, const float* __restrict__ keys,
    const int64_t* __restrict__ starts, const int64_t* __restrict__ ends, bool mix_normalized,
    const float* __restrict__ logits, const float* __restrict__ lse, DispatchBackwardScratch scratch,
    T* __restrict__ grad_x) {
  __shared__ Dots dots;
  __shared__ TileGradients tile;
  const int64_t tiles = cut.slot_tiles;
  const Place place = find_place<V>(n, cut, tiles);
  const int width = static_cast<int>(n.width);
  starts = plan_of(n, starts, place.b);
  ends = plan_of(n, ends, place.b);
  ColumnSums<V> totals = {};
  for (int64_t t = place.begin; t < place.end;) {
    const TokenRun run = run_at(starts, ends, n.blocks, t, place.end);
    const bool feeds = run.block >= 0;
    const int64_t at = (place.b * n.blocks + run.block) * n.slots + place.first_slot;
    const float* scanned = feeds ? scratch.scanned + at * width : nullptr;
    for (; t < run.end; t += kTileTokens) {
      const int count = tile_count(t, run.end);
      const int64_t token = place.b * n.length + t, slot = token * n.slots + place.first_slot;
      const T* rows = x + token * width;
      tile_dots<V>(rows, count, scanned, feeds ? place.slots : 0, width, dots);
      __syncthreads();
      tile_gradients(
          dots, count, place.slots, mix_normalized, grad_logits + slot, logits + slot, n.slots,
          feeds ? lse + at : nullptr, scratch.scanned_dot + at, tile);
      __syncthreads();
      if (tiles > 1 && place.first_column == 0 && static_cast<int>(threadIdx.x) < count * kTileSlots) {
        const int i = threadIdx.x / kTileSlots, s = threadIdx.x % kTileSlots;
        if (s < place.slots) {
          scratch.key_weights[slot + i * n.slots + s] = tile.key_weights[i][s];
          scratch.slot_weights[slot + i * n.slots + s] = tile.slot_weights[i][s];
        }
        if (s == 0) scratch.x_shares[(token + i) * tiles + place.first_slot / kTileSlots] = tile.x_shares[i];
      }
#pragma unroll
      for (int strip = 0; strip < kThreadColumns<V> / V; ++strip) {
        const int column = column_of<V>(place.first_column, strip);
        if (column >= width) continue;
        for (int first = 0; first < count; first += kGroup) {
          float values[kGroup][V], x_share[kGroup];
          load_group<V>(rows, first, count, width, column, values);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            x_share[i] = tile.x_shares[first + i];
#pragma unroll
            for (int s = 0; s < kTileSlots; ++s) {
              const float weight = tile.key_weights[first + i][s];  // 0 past the last token
#pragma unroll
              for (int v = 0; v < V; ++v) totals[s][strip * V + v] += weight * values[i][v];
            }
          }
          if (tiles > 1) continue;
          int offset[kGroup];
          weight_offsets(first, count, kTileSlots, offset);
          write_grad_x<T, V>(
              values, x_share, tile.key_weights[0], tile.slot_weights[0], offset, keys, scanned, place.slots, width, column,
              count - first, grad_x + (token + first) * width);
        }
      }
    }
    t = run.end;
  }
  const int64_t at = (place.b * cut.chunks + place.chunk) * n.slots + place.first_slot;
  flush<V>(totals, place.slots, place.first_column, width, scratch.sums + at * width);
}

// grad_x where more than one tile of slots adds to it.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) grad_x_kernel(
    Sizes n, Cut cut, const T* __restrict__ x, const float* __restrict__ keys, const int64_t* __restrict__ starts,
    const int64_t* __restrict__ ends, DispatchBackwardScratch scratch, T* __restrict__ grad_x) {
  const int64_t tiles = cut.slot_tiles;
  const Place place = find_place<V>(n, cut, 1);
  const int width = static_cast<int>(n.width);
  starts = plan_of(n, starts, place.b);
  ends = plan_of(n, ends, place.b);
  for (int64_t t = place.begin; t < place.end;) {
    const TokenRun run = run_at(starts, ends, n.blocks, t, place.end);
    const float* scanned =
        run.block < 0 ? nullptr : scratch.scanned + (place.b * n.blocks + run.block) * n.slots * width;
    for (; t < run.end; t += kGroup) {
      const int count = static_cast<int>(run.end - t < kGroup ? run.end - t : kGroup);
      const int64_t token = place.b * n.length + t;
      int offset[kGroup];
      weight_offsets(0, count, static_cast<int>(n.slots), offset);
      float x_share[kGroup] = {};
      for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          x_share[i] += scratch.x_shares[(token + (i < count ? i : count - 1)) * tiles + tile];
        }
      }
      for (int strip = 0; strip < kThreadColumns<V> / V; ++strip) {
        const int column = column_of<V>(place.first_column, strip);
        if (column >= width) continue;
        float values[kGroup][V];
        load_group<V>(x + token * width, 0, count, width, column, values);
        write_grad_x<T, V>(
            values, x_share, scratch.key_weights + token * n.slots, scratch.slot_weights + token * n.slots, offset, keys,
            scanned, n.slots, width, column, count, grad_x + token * width);
      }
    }
    t = run.end;
  }
}

// dots = slot . its gradient - the gradient of its log-sum-exp, a warp per slot
__global__ void __launch_bounds__(kThreads) slot_dots_kernel(
    int64_t rows, int64_t width, const float* __restrict__ slots, const float* __restrict__ grad_slots,
    const float* __restrict__ grad_lse, float* __restrict__ dots) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  float dot = 0.0f;
  for (int64_t column = threadIdx.x % kWarp; column < width; column += kWarp) {
    dot += slots[row * width + column] * grad_slots[row * width + column];
  }
  dot = warp_sum(dot);
  if (threadIdx.x % kWarp == 0) dots[row] = dot - grad_lse[row];
}

// The reverse scan over the blocks of each sequence, slot and column; block k + 1 counts where it goes on from block k:
//   A_k = grad_slot_k + exp(lse_k - lse_(k+1)) A_(k+1)        a_k = dot_k + exp(lse_k - lse_(k+1)) a_(k+1)
// `scanned_dot` holds dot_k before, a_k after.
__global__ void __launch_bounds__(kThreads) scan_kernel(
    Sizes n, const int64_t* __restrict__ starts, const float* __restrict__ grad_slots, const float* __restrict__ lse,
    float* __restrict__ scanned, float* __restrict__ scanned_dot) {
  const int64_t element = thread_element(), column = element % n.width, j = element / n.width % n.slots;
  const int64_t b = element / n.width / n.slots;
  if (b >= n.batch) return;
  starts = plan_of(n, starts, b);
  float sum = 0.0f, dot = 0.0f;
#pragma unroll 4
  for (int64_t k = n.blocks - 1; k >= 0; --k) {
    const int64_t at = (b * n.blocks + k) * n.slots + j;
    const bool goes = k + 1 < n.blocks && goes_on(starts, k + 1);
    const float factor = goes ? exp_below(lse[at], lse[at + n.slots]) : 0.0f;
    const float gradient = grad_slots[at * n.width + column];
    sum = goes ? gradient + factor * sum : gradient;
    scanned[at * n.width + column] = sum;
    if (column == 0) scanned_dot[at] = dot = goes ? scanned_dot[at] + factor * dot : scanned_dot[at];
  }
}

__global__ void __launch_bounds__(kThreads) sum_keys_kernel(
    int64_t rows, int64_t row, const float* __restrict__ sums, float* __restrict__ grad_keys) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const float sum = sum_of_rows(sums + element, rows, row, element < row);
  if (threadIdx.x < kWarp && element < row) grad_keys[element] = sum;
}

}  // namespace steel::cuda
