// Each pass is a few small kernels. Two shapes do all the work on vectors of d numbers:
//   - a warp per token: lanes stride over d for dot products, or over the slots for what is one number per slot;
//   - weighted_sums: a thread per column of d, with the weights of a tile of tokens in shared memory.
// Sums over tokens are made per piece (soft_moe.h) and the pieces' sums added in their order, so there are no atomics and
// results are the same in every run. Whole warps take every branch that leads to a shuffle.
#include "soft_moe_cuda.h"

namespace steel::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;                   // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr int kTileTokens = 32;             // whose weights are in shared memory at once
constexpr int kTileSlots = 8;               // sums that a thread keeps in registers
constexpr int kStrip = 4;                   // columns of a lane that share a weight
constexpr int64_t kLongestPiece = 128;      // tokens

#ifdef __CUDACC__
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, cudaStream_t stream, Arguments... arguments) {
  if (blocks.x > 0 && blocks.y > 0 && blocks.z > 0) kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
}
#else
using emulation::launch;  // tests/csrc/cuda_emulation.h runs the same source on a CPU
#endif

dim3 blocks_for(int64_t count, int64_t per_block, int64_t y = 1, int64_t z = 1) {
  return dim3(
      static_cast<unsigned>(divide_up(count, per_block)), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

__device__ float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// The same sum in every thread of the block, from one value of each. `shared` has kWarps floats.
__device__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  __syncthreads();  // nobody reads the sum before any more
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

template <typename A, typename B>
__device__ float warp_dot(const A* a, const B* b, int64_t width) {
  float sum = 0.0f;
  for (int64_t column = threadIdx.x % kWarp; column < width; column += kWarp) sum += to_float(a[column]) * to_float(b[column]);
  return warp_sum(sum);
}

// The token of this warp among all B * T; past the last for warps that have none.
__device__ int64_t warp_token() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// The element of this thread among all of a 1-D grid's.
__device__ int64_t thread_element() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// ---- what a pass keeps in its scratch memory ----

struct Cut {
  Piece* pieces;        // [most]
  int64_t* first;       // [R + 2]
  int64_t most;         // an upper bound of the number of pieces, known without waiting for the device
};

struct Scratch {
  Cut cut;
  Running* running;     // [B, most, S]
  float* sums;          // [B, most, S, d]
  float* token_numbers; // [B, T]
  float* shares;        // [B, T, S]
  float* scanned;       // [B, R, S, d]
  float* scanned_dot;   // [B, R, S]
  int64_t bytes;
};

Scratch lay_out(const Sizes& n, void* memory) {
  char* const base = static_cast<char*>(memory);
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    char* const place = base + used;
    used += divide_up(bytes, 16) * 16;
    return place;
  };
  const int64_t most = most_pieces(n.length, n.refreshes, kLongestPiece), slot_rows = n.batch * n.refreshes * n.slots;
  const int64_t number = sizeof(float), tokens = n.batch * n.length;
  Scratch scratch;
  scratch.cut.most = most;
  scratch.cut.pieces = reinterpret_cast<Piece*>(take(most * sizeof(Piece)));
  scratch.cut.first = reinterpret_cast<int64_t*>(take((n.refreshes + 2) * sizeof(int64_t)));
  scratch.running = reinterpret_cast<Running*>(take(n.batch * most * n.slots * sizeof(Running)));
  scratch.sums = reinterpret_cast<float*>(take(n.batch * most * n.slots * n.width * number));
  scratch.token_numbers = reinterpret_cast<float*>(take(tokens * number));
  scratch.shares = reinterpret_cast<float*>(take(tokens * n.slots * number));
  scratch.scanned = reinterpret_cast<float*>(take(slot_rows * n.width * number));
  scratch.scanned_dot = reinterpret_cast<float*>(take(slot_rows * number));
  scratch.bytes = used;
  return scratch;
}

__global__ void cut_kernel(Sizes n, const int64_t* ends, Cut cut) {
  if (thread_element() == 0) cut_pieces(ends, n.refreshes, n.length, kLongestPiece, cut.pieces, cut.first);
}

// ---- sums over tokens ----

// sums[b, p, j] = sum over piece p's tokens of weight(b, p, t, j) * x_t. One block: one piece, kThreads columns, and
// kTileSlots slots of one sequence.
template <typename T, typename Weight>
__global__ void weighted_sums(Sizes n, const T* x, Cut cut, int64_t groups, Weight weight, float* sums) {
  __shared__ float weights[kTileTokens][kTileSlots];
  const int64_t p = blockIdx.x, slot_tiles = divide_up(n.slots, kTileSlots);
  const int64_t b = blockIdx.z / slot_tiles, first_slot = blockIdx.z % slot_tiles * kTileSlots;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (p >= cut.first[groups]) return;
  const Piece piece = cut.pieces[p];
  float totals[kTileSlots] = {};
  for (int64_t begin = piece.begin; begin < piece.end; begin += kTileTokens) {
    const int count = static_cast<int>(piece.end - begin < kTileTokens ? piece.end - begin : kTileTokens);
    __syncthreads();
    for (int i = threadIdx.x; i < count * kTileSlots; i += kThreads) {
      const int64_t j = first_slot + i % kTileSlots;
      weights[i / kTileSlots][i % kTileSlots] = j < n.slots ? weight(b, p, begin + i / kTileSlots, j) : 0.0f;
    }
    __syncthreads();
    if (column >= n.width) continue;
    const T* rows = x + (b * n.length + begin) * n.width + column;
    for (int t = 0; t < count; ++t) {
      const float value = to_float(rows[t * n.width]);
#pragma unroll
      for (int s = 0; s < kTileSlots; ++s) totals[s] += weights[t][s] * value;
    }
  }
  if (column >= n.width) return;
#pragma unroll
  for (int s = 0; s < kTileSlots; ++s) {
    if (first_slot + s < n.slots) sums[((b * cut.most + p) * n.slots + first_slot + s) * n.width + column] = totals[s];
  }
}

// Launches weighted_sums for the pieces of groups 0, ..., groups - 1.
template <typename T, typename Weight>
void sum_tokens(const Sizes& n, const T* x, const Scratch& scratch, int64_t groups, Weight weight, cudaStream_t stream) {
  const dim3 blocks(
      static_cast<unsigned>(scratch.cut.most), static_cast<unsigned>(divide_up(n.width, kThreads)),
      static_cast<unsigned>(n.batch * divide_up(n.slots, kTileSlots)));
  launch(weighted_sums<T, Weight>, blocks, stream, n, x, scratch.cut, groups, weight, scratch.sums);
}

struct DispatchWeight {  // exp(l_tj - maximum of the piece), and 1 / |x_t| if normalized tokens are mixed
  Sizes n;
  const float* logits;
  const Running* running;
  const float* inverse;  // nullptr for raw tokens
  int64_t most;

  __device__ float operator()(int64_t b, int64_t p, int64_t t, int64_t j) const {
    const int64_t token = b * n.length + t;
    const float weight = expf(logits[token * n.slots + j] - running[(b * most + p) * n.slots + j].max);
    return inverse == nullptr ? weight : weight * inverse[token];
  }
};

struct CombineWeight {  // C_tj
  Sizes n;
  const float* logits;
  const float* token_lse;

  __device__ float operator()(int64_t b, int64_t, int64_t t, int64_t j) const {
    const int64_t token = b * n.length + t;
    return expf(logits[token * n.slots + j] - token_lse[token]);
  }
};

struct KeyWeight {  // gradient of l_tj, and 1 / |x_t|
  Sizes n;
  const float* shares;
  const float* inverse;

  __device__ float operator()(int64_t b, int64_t, int64_t t, int64_t j) const {
    const int64_t token = b * n.length + t;
    return shares[token * n.slots + j] * inverse[token];
  }
};

// ---- dispatch, forward ----

template <typename T>
__global__ void logits_kernel(Sizes n, const T* x, const float* keys, float* logits, float* inverse) {
  const int64_t token = warp_token();
  if (token >= n.batch * n.length) return;
  const T* row = x + token * n.width;
  const float scale = inverse_norm(warp_dot(row, row, n.width));
  for (int64_t j = 0; j < n.slots; ++j) {
    const float dot = warp_dot(row, keys + j * n.width, n.width);
    if (threadIdx.x % kWarp == 0) logits[token * n.slots + j] = dot * scale;
  }
  if (threadIdx.x % kWarp == 0) inverse[token] = scale;
}

// The largest logit and the sum of exponentials of every piece and slot.
__global__ void running_kernel(Sizes n, const float* logits, Cut cut, Running* running) {
  const int64_t element = thread_element(), j = element % n.slots, p = element / n.slots % cut.most;
  const int64_t b = element / n.slots / cut.most;
  if (b >= n.batch || p >= cut.first[n.refreshes]) return;
  const float* column = logits + b * n.length * n.slots + j;
  Running total = nothing_yet();
  for (int64_t t = cut.pieces[p].begin; t < cut.pieces[p].end; ++t) total.max = fmaxf(total.max, column[t * n.slots]);
  for (int64_t t = cut.pieces[p].begin; t < cut.pieces[p].end; ++t) total.sum += expf(column[t * n.slots] - total.max);
  running[element] = total;
}

// Adds the pieces of one sequence, slot and column in order; writes slots and log-sum-exp at every refresh point.
__global__ void merge_kernel(Sizes n, Cut cut, const Running* running, const float* sums, float* slots, float* lse) {
  const int64_t element = thread_element(), column = element % n.width, j = element / n.width % n.slots;
  const int64_t b = element / n.width / n.slots;
  if (b >= n.batch) return;
  Running total = nothing_yet();
  float sum = 0.0f;
  for (int64_t k = 0; k < n.refreshes; ++k) {
    for (int64_t p = cut.first[k]; p < cut.first[k + 1]; ++p) {
      const int64_t at = (b * cut.most + p) * n.slots + j;
      const Factors factors = merge(total, running[at]);
      sum = sum * factors.before + sums[at * n.width + column] * factors.added;
    }
    const int64_t at = (b * n.refreshes + k) * n.slots + j;
    slots[at * n.width + column] = sum / total.sum;
    if (column == 0) lse[at] = log_sum_exp(total);
  }
}

// ---- dispatch, backward ----

// The reverse scan over refresh points, a block per sequence and slot:
//   A_k = grad_slot_k + exp(lse_k - lse_(k+1)) A_(k+1)        a_k = slot_k . grad_slot_k + exp(...) a_(k+1)
__global__ void scan_kernel(
    Sizes n, const float* grad_slots, const float* slots, const float* lse, float* scanned, float* scanned_dot) {
  __shared__ float shared[kWarps];
  const int64_t b = blockIdx.x / n.slots, j = blockIdx.x % n.slots;
  float dot = 0.0f;
  for (int64_t k = n.refreshes - 1; k >= 0; --k) {
    const int64_t at = (b * n.refreshes + k) * n.slots + j, next = at + n.slots;
    const bool last = k == n.refreshes - 1;
    const float factor = last ? 0.0f : expf(lse[at] - lse[next]);
    float part = 0.0f;
    for (int64_t column = threadIdx.x; column < n.width; column += kThreads) {
      const float gradient = grad_slots[at * n.width + column];
      part += slots[at * n.width + column] * gradient;
      scanned[at * n.width + column] = last ? gradient : gradient + factor * scanned[next * n.width + column];
    }
    dot = block_sum(part, shared) + factor * dot;
    if (threadIdx.x == 0) scanned_dot[at] = dot;
  }
}

// The gradient of one token a warp, with A, a of its group and w_tj = exp(l_tj - lse_j), w = 0 where it feeds no slot:
//   dl_tj = grad_logit_tj + w_tj (v_t . A_j - a_j)      g_t = sum_j dl_tj key_j, and w_tj A_j if v is u
//   dx_t = (g_t - u_t (u_t . g_t)) / |x_t|, and sum_j w_tj A_j if v is x
template <typename T>
__global__ void dispatch_backward_kernel(
    Sizes n, const float* grad_logits, const T* x, const float* keys, const int64_t* ends, bool mix_normalized,
    const float* logits, const float* lse, const float* scanned, const float* scanned_dot, T* grad_x, float* shares,
    float* inverse) {
  const int64_t token = warp_token();
  if (token >= n.batch * n.length) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t b = token / n.length, group = group_of(ends, n.refreshes, token % n.length);
  const bool feeds_slots = group < n.refreshes;
  const int64_t at = (b * n.refreshes + (feeds_slots ? group : 0)) * n.slots;
  const T* row = x + token * n.width;
  const float squares = warp_dot(row, row, n.width), scale = inverse_norm(squares);
  const float mixed_scale = mix_normalized ? scale : 1.0f;
  float along_u = 0.0f;  // u . g, from the dot products at hand
  for (int64_t j = 0; j < n.slots; ++j) {
    const float logit = logits[token * n.slots + j];
    float gradient = grad_logits[token * n.slots + j];
    if (feeds_slots) {
      const float mixed_dot = warp_dot(row, scanned + (at + j) * n.width, n.width) * mixed_scale;
      const float weight = expf(logit - lse[at + j]);
      gradient += weight * (mixed_dot - scanned_dot[at + j]);
      if (mix_normalized) along_u += weight * mixed_dot;
    }
    along_u += gradient * logit;
    if (lane == j % kWarp) shares[token * n.slots + j] = gradient;  // the lane that reads it below
  }
  if (lane == 0) inverse[token] = scale;

  const float x_share = -along_u * radial_factor(squares);
  for (int64_t strip = 0; strip < n.width; strip += kStrip * kWarp) {
    float sums[kStrip] = {};
    for (int64_t first = 0; first < n.slots; first += kWarp) {
      const int64_t own = first + lane;
      const float own_key = own < n.slots ? shares[token * n.slots + own] * scale : 0.0f;
      const float own_slot =
          own < n.slots && feeds_slots ? expf(logits[token * n.slots + own] - lse[at + own]) * mixed_scale : 0.0f;
      for (int64_t j = first; j < n.slots && j < first + kWarp; ++j) {
        const float key = __shfl_sync(0xffffffffu, own_key, static_cast<int>(j - first));
        const float slot = __shfl_sync(0xffffffffu, own_slot, static_cast<int>(j - first));
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          const int64_t column = strip + i * kWarp + lane;
          if (column >= n.width) continue;
          sums[i] += key * keys[j * n.width + column];
          if (feeds_slots) sums[i] += slot * scanned[(at + j) * n.width + column];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int64_t column = strip + i * kWarp + lane;
      if (column >= n.width) continue;
      grad_x[token * n.width + column] = from_float<T>(sums[i] + x_share * to_float(row[column]));
    }
  }
}

// grad_keys[j] = the pieces' sums of all sequences, in order.
__global__ void sum_keys_kernel(Sizes n, Cut cut, const float* sums, float* grad_keys) {
  const int64_t element = thread_element(), row = n.slots * n.width;
  if (element >= row) return;
  float total = 0.0f;
  for (int64_t b = 0; b < n.batch; ++b) {
    for (int64_t p = 0; p < cut.first[n.refreshes + 1]; ++p) total += sums[(b * cut.most + p) * row + element];
  }
  grad_keys[element] = total;
}

// ---- combine ----

// log of the sum over slots of exp(l_tj), the same in every lane.
__device__ float token_log_sum_exp(const float* logits, int64_t slots) {
  Running total = nothing_yet();
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) total.max = fmaxf(total.max, logits[j]);
  total.max = warp_max(total.max);
  for (int64_t j = threadIdx.x % kWarp; j < slots; j += kWarp) total.sum += expf(logits[j] - total.max);
  total.sum = warp_sum(total.sum);
  return log_sum_exp(total);
}

// The block that a token reads; blocks end within the sequence, so it is one of the R.
__device__ int64_t block_read(const Sizes& n, const int64_t* ends, int64_t token) {
  const int64_t group = group_of(ends, n.refreshes, token % n.length);
  return group < n.refreshes ? group : n.refreshes - 1;
}

template <typename T>
__global__ void combine_kernel(Sizes n, const T* outputs, const float* logits, const int64_t* ends, T* y) {
  const int64_t token = warp_token();
  if (token >= n.batch * n.length) return;
  const int lane = threadIdx.x % kWarp;
  const T* rows = outputs + (token / n.length * n.refreshes + block_read(n, ends, token)) * n.slots * n.width;
  const float* token_logits = logits + token * n.slots;
  const float lse = token_log_sum_exp(token_logits, n.slots);
  for (int64_t strip = 0; strip < n.width; strip += kStrip * kWarp) {
    float sums[kStrip] = {};
    for (int64_t first = 0; first < n.slots; first += kWarp) {
      const float own = first + lane < n.slots ? expf(token_logits[first + lane] - lse) : 0.0f;
      for (int64_t j = first; j < n.slots && j < first + kWarp; ++j) {
        const float weight = __shfl_sync(0xffffffffu, own, static_cast<int>(j - first));
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          const int64_t column = strip + i * kWarp + lane;
          if (column < n.width) sums[i] += weight * to_float(rows[j * n.width + column]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int64_t column = strip + i * kWarp + lane;
      if (column < n.width) y[token * n.width + column] = from_float<T>(sums[i]);
    }
  }
}

// grad_logits through the softmax over slots, and each token's log-sum-exp for the weights of combine_backward's sums.
template <typename T>
__global__ void combine_backward_kernel(
    Sizes n, const T* grad_y, const T* outputs, const float* logits, const int64_t* ends, float* grad_logits,
    float* token_lse) {
  const int64_t token = warp_token();
  if (token >= n.batch * n.length) return;
  const int lane = threadIdx.x % kWarp;
  const T* rows = outputs + (token / n.length * n.refreshes + block_read(n, ends, token)) * n.slots * n.width;
  const float* token_logits = logits + token * n.slots;
  float* gradients = grad_logits + token * n.slots;
  const float lse = token_log_sum_exp(token_logits, n.slots);
  float mean = 0.0f;
  for (int64_t j = 0; j < n.slots; ++j) {
    const float dot = warp_dot(grad_y + token * n.width, rows + j * n.width, n.width);
    mean += expf(token_logits[j] - lse) * dot;
    if (lane == j % kWarp) gradients[j] = dot;  // the lane that reads it below
  }
  for (int64_t j = lane; j < n.slots; j += kWarp) gradients[j] = expf(token_logits[j] - lse) * (gradients[j] - mean);
  if (lane == 0) token_lse[token] = lse;
}

// grad_outputs[b, k, j] = the sums of block k's pieces, in order.
template <typename T>
__global__ void sum_blocks_kernel(Sizes n, Cut cut, const float* sums, T* grad_outputs) {
  const int64_t element = thread_element(), row = n.slots * n.width, k = element / row % n.refreshes;
  const int64_t b = element / row / n.refreshes;
  if (b >= n.batch) return;
  float total = 0.0f;
  for (int64_t p = cut.first[k]; p < cut.first[k + 1]; ++p) total += sums[(b * cut.most + p) * row + element % row];
  grad_outputs[element] = from_float<T>(total);
}

}  // namespace

int64_t scratch_bytes(const Sizes& sizes) { return lay_out(sizes, nullptr).bytes; }

template <typename T>
cudaError_t dispatch_forward(
    const Sizes& n, const T* x, const float* keys, const int64_t* ends, bool mix_normalized, float* slots, float* logits,
    float* lse, void* memory, cudaStream_t stream) {
  const Scratch scratch = lay_out(n, memory);
  const Cut cut = scratch.cut;
  float* inverse = scratch.token_numbers;
  launch(cut_kernel, dim3(1), stream, n, ends, cut);
  launch(logits_kernel<T>, blocks_for(n.batch * n.length, kWarps), stream, n, x, keys, logits, inverse);
  launch(running_kernel, blocks_for(n.batch * cut.most * n.slots, kThreads), stream, n, logits, cut, scratch.running);
  const DispatchWeight weight{n, logits, scratch.running, mix_normalized ? inverse : nullptr, cut.most};
  sum_tokens(n, x, scratch, n.refreshes, weight, stream);
  const dim3 blocks = blocks_for(n.batch * n.slots * n.width, kThreads);
  launch(merge_kernel, blocks, stream, n, cut, scratch.running, scratch.sums, slots, lse);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch_backward(
    const Sizes& n, const float* grad_slots, const float* grad_logits, const T* x, const float* keys, const int64_t* ends,
    bool mix_normalized, const float* slots, const float* logits, const float* lse, T* grad_x, float* grad_keys,
    void* memory, cudaStream_t stream) {
  const Scratch scratch = lay_out(n, memory);
  float* inverse = scratch.token_numbers;
  launch(cut_kernel, dim3(1), stream, n, ends, scratch.cut);
  launch(
      scan_kernel, blocks_for(n.batch * n.slots, 1), stream, n, grad_slots, slots, lse, scratch.scanned,
      scratch.scanned_dot);
  launch(
      dispatch_backward_kernel<T>, blocks_for(n.batch * n.length, kWarps), stream, n, grad_logits, x, keys, ends,
      mix_normalized, logits, lse, scratch.scanned, scratch.scanned_dot, grad_x, scratch.shares, inverse);
  sum_tokens(n, x, scratch, n.refreshes + 1, KeyWeight{n, scratch.shares, inverse}, stream);
  launch(sum_keys_kernel, blocks_for(n.slots * n.width, kThreads), stream, n, scratch.cut, scratch.sums, grad_keys);
  return cudaGetLastError();
}

template <typename T>
cudaError_t combine_forward(
    const Sizes& n, const T* outputs, const float* logits, const int64_t* ends, T* y, cudaStream_t stream) {
  launch(combine_kernel<T>, blocks_for(n.batch * n.length, kWarps), stream, n, outputs, logits, ends, y);
  return cudaGetLastError();
}

template <typename T>
cudaError_t combine_backward(
    const Sizes& n, const T* grad_y, const T* outputs, const float* logits, const int64_t* ends, T* grad_outputs,
    float* grad_logits, void* memory, cudaStream_t stream) {
  const Scratch scratch = lay_out(n, memory);
  float* token_lse = scratch.token_numbers;
  launch(cut_kernel, dim3(1), stream, n, ends, scratch.cut);
  launch(
      combine_backward_kernel<T>, blocks_for(n.batch * n.length, kWarps), stream, n, grad_y, outputs, logits, ends,
      grad_logits, token_lse);
  sum_tokens(n, grad_y, scratch, n.refreshes, CombineWeight{n, logits, token_lse}, stream);
  const dim3 blocks = blocks_for(n.batch * n.refreshes * n.slots * n.width, kThreads);
  launch(sum_blocks_kernel<T>, blocks, stream, n, scratch.cut, scratch.sums, grad_outputs);
  return cudaGetLastError();
}

#define STEEL_INSTANTIATE(T)                                                                                         \
  template cudaError_t dispatch_forward<T>(                                                                          \
      const Sizes&, const T*, const float*, const int64_t*, bool, float*, float*, float*, void*, cudaStream_t);      \
  template cudaError_t dispatch_backward<T>(                                                                         \
      const Sizes&, const float*, const float*, const T*, const float*, const int64_t*, bool, const float*,          \
      const float*, const float*, T*, float*, void*, cudaStream_t);                                                  \
  template cudaError_t combine_forward<T>(const Sizes&, const T*, const float*, const int64_t*, T*, cudaStream_t);   \
  template cudaError_t combine_backward<T>(                                                                          \
      const Sizes&, const T*, const T*, const float*, const int64_t*, T*, float*, void*, cudaStream_t);

STEEL_INSTANTIATE(float)
STEEL_INSTANTIATE(BFloat16)

}  // namespace steel::cuda
