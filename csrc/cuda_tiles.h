// What the CUDA passes are made of.
//
// A sequence is worked on in chunks of 2^shift tokens, a block of threads each, and a chunk in tiles: kTileTokens tokens,
// kTileSlots slots and kTileColumns columns. A tile's rows are read twice, first by a warp per two tokens for their dot
// products over the whole width, then by a thread per few columns for sums over tokens that stay in registers; the second
// time they are in a cache. More slots or columns than a tile has are worked on by further blocks of threads at about the
// same time. Within a chunk, sums end where a block of tokens ends, and the part of block k that is in chunk c is piece
// c + k of its sequence: the number grows with the tokens, so no two parts share it. Pieces are added in their order and
// there are no atomics: a result is the same in every run.
//
// V is the number of columns a thread reads at once: 4 where rows and pointers are aligned to that, else 1.
#pragma once

#include "soft_moe_cuda.h"

namespace steel::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr int kWarpTokens = 2;  // that read a row of keys together
constexpr int kTileTokens = kWarps * kWarpTokens;
constexpr int kTileSlots = 8;
template <int V>
constexpr int kThreadColumns = V == 1 ? 4 : 8;
template <int V>
constexpr int kTileColumns = kThreads * kThreadColumns<V>;
constexpr int kGroup = 4;                      // tokens whose columns a thread works on at once
constexpr int64_t kWidest = int64_t{1} << 27;  // so that 8 rows are within reach of an int
static_assert(kTileSlots == kWarps && kTileTokens <= kWarp);

// ---- launches ----

// Launches kernels of kThreads threads a block in their order, none after an error.
struct Launches {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) {
    if (error != cudaSuccess || blocks == 0) return;
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
#ifdef __CUDACC__
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
#else
    emulation::launch(kernel, static_cast<unsigned>(blocks), kThreads, arguments...);  // tests/csrc
#endif
    error = cudaGetLastError();
  }
};

// ---- scratch memory ----

// Hands out parts of the scratch memory, or adds up how much that is.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    char* const place = base + used;
    used += divide_up(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return reinterpret_cast<T*>(place);
  }
};

// ---- which tokens, slots and columns ----

// The element of this thread, and the token or row of this warp, among all of the grid's.
__device__ __forceinline__ int64_t thread_element() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t warp_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

struct Cut {
  int shift;                             // a chunk has 2^shift tokens
  int64_t chunks, pieces;                // of a sequence
  int64_t slot_tiles;
};

// Chunks are as long as leaves a GPU enough of them, and at least 4 S, so that sums of S rows per chunk are little beside
// the tokens.
inline Cut cut_into_chunks(const Sizes& n) {
  const int64_t for_blocks = n.batch * n.length / 512 < 256 ? n.batch * n.length / 512 : 256;
  const int64_t wanted = 4 * n.slots > for_blocks ? 4 * n.slots : for_blocks;
  int shift = 5;
  while ((int64_t{1} << shift) < wanted) ++shift;
  const int64_t chunks = divide_up(n.length, int64_t{1} << shift);
  return Cut{shift, chunks, chunks + n.blocks, divide_up(n.slots, kTileSlots)};
}

// What one block of threads works on.
struct Place {
  int64_t b, chunk, begin, end;  // a sequence, and tokens of it
  int64_t first_slot;
  int slots, first_column;
};

template <int V>
int64_t count_places(const Sizes& n, const Cut& cut, int64_t slot_tiles) {
  return slot_tiles * divide_up(n.width, kTileColumns<V>) * cut.chunks * n.batch;
}

// Neighbours work on other slots and columns of the same tokens, which then are in the second-level cache.
template <int V>
__device__ __forceinline__ Place find_place(const Sizes& n, const Cut& cut, int64_t slot_tiles) {
  const unsigned slots = static_cast<unsigned>(slot_tiles);
  const unsigned columns = static_cast<unsigned>(divide_up(n.width, kTileColumns<V>));
  const unsigned chunks = static_cast<unsigned>(cut.chunks);  // their product is a grid's size
  Place place;
  place.first_slot = static_cast<int64_t>(blockIdx.x % slots) * kTileSlots;
  place.first_column = static_cast<int>(blockIdx.x / slots % columns) * kTileColumns<V>;
  place.chunk = blockIdx.x / slots / columns % chunks;
  place.b = blockIdx.x / slots / columns / chunks;
  place.begin = place.chunk << cut.shift;
  const int64_t end = place.begin + (int64_t{1} << cut.shift);
  place.end = end < n.length ? end : n.length;
  place.slots = static_cast<int>(n.slots - place.first_slot < kTileSlots ? n.slots - place.first_slot : kTileSlots);
  return place;
}

// The row of starts, ends or reads of sequence b.
__device__ __forceinline__ const int64_t* plan_of(const Sizes& n, const int64_t* plans, int64_t b) {
  return n.plans == 1 ? plans : plans + b * n.blocks;
}

struct TokenRun {
  int64_t block, end;  // the tokens up to here belong to this block, or to none (-1)
};

// The run that begins at a token. It goes on for a token at least, whatever starts and ends are.
__device__ __forceinline__ TokenRun run_at(
    const int64_t* starts, const int64_t* ends, int64_t blocks, int64_t token, int64_t limit) {
  const int64_t k = block_after(ends, blocks, token);
  if (k == blocks) return TokenRun{-1, limit};
  const bool inside = starts == nullptr || starts[k] <= token;
  const int64_t end = inside ? ends[k] : starts[k];
  return TokenRun{inside ? k : -1, end < limit ? end : limit};
}

__device__ __forceinline__ int tile_count(int64_t token, int64_t end) {
  return static_cast<int>(end - token < kTileTokens ? end - token : kTileTokens);
}

// ---- rows ----

template <typename T, int V>
struct alignas(V * sizeof(T)) Packed {
  T at[V];
};

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  const Packed<T, V> packed = *reinterpret_cast<const Packed<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_float(packed.at[v]);
}

template <int V, typename T>
__device__ __forceinline__ void store(const float (&from)[V], T* to) {
  Packed<T, V> packed;
#pragma unroll
  for (int v = 0; v < V; ++v) packed.at[v] = from_float<T>(from[v]);
  *reinterpret_cast<Packed<T, V>*>(to) = packed;
}

template <typename T>
bool can_pack(const T* rows) {
  return reinterpret_cast<uintptr_t>(rows) % (4 * sizeof(T)) == 0;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// The first of V columns that this thread has in a strip of a tile.
template <int V>
__device__ __forceinline__ int column_of(int first_column, int strip) {
  return first_column + (strip * kThreads + static_cast<int>(threadIdx.x)) * V;
}

// The sum over `rows` rows of one of 32 columns, in the first warp's threads: warp w adds the rows w, w + 8, ...
__device__ __forceinline__ float sum_of_rows(const float* __restrict__ from, int64_t rows, int64_t stride, bool inside) {
  __shared__ float parts[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t row = warp; row < rows; row += kWarps) {
    if (inside) sum += from[row * stride];
  }
  __syncthreads();
  parts[warp][lane] = sum;
  __syncthreads();
  for (int other = 1; other < kWarps; ++other) sum += parts[other][lane];
  return sum;
}

// ---- the two halves of a tile ----

struct Dots {
  float dot[kTileTokens][kTileSlots];  // x_t . row_s
  float squares[kTileTokens];          // |x_t|^2
};

// Fills `dots` for `count` tokens and `slots` rows.
template <int V, typename T, typename Row>
__device__ __forceinline__ void tile_dots(const T* x, int count, const Row* rows, int slots, int width, Dots& dots) {
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kWarpTokens;
  if (first >= count) return;
  int64_t offset[kWarpTokens];
  float sums[kWarpTokens][kTileSlots] = {}, squares[kWarpTokens] = {};
#pragma unroll
  for (int i = 0; i < kWarpTokens; ++i) {
    offset[i] = static_cast<int64_t>(first + i < count ? first + i : count - 1) * width;
  }
  for (int column = lane * V; column < width; column += kWarp * V) {
    float values[kWarpTokens][V];
#pragma unroll
    for (int i = 0; i < kWarpTokens; ++i) {
      load(x + offset[i] + column, values[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) squares[i] += values[i][v] * values[i][v];
    }
#pragma unroll
    for (int s = 0; s < kTileSlots; ++s) {
      if (s >= slots) continue;
      float row[V];
      load(rows + s * width + column, row);
#pragma unroll
      for (int i = 0; i < kWarpTokens; ++i) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[i][s] += values[i][v] * row[v];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWarpTokens; ++i) {
    const float total_squares = warp_sum(squares[i]);
    if (lane == 0) dots.squares[first + i] = total_squares;
#pragma unroll
    for (int s = 0; s < kTileSlots; ++s) {
      if (s >= slots) continue;
      const float total = warp_sum(sums[i][s]);
      if (lane == 0) dots.dot[first + i][s] = total;
    }
  }
}

using TileWeights = float[kTileTokens][kTileSlots];
template <int V>
using ColumnSums = float[kTileSlots][kThreadColumns<V>];

// sums_s = sums_s + sum over the tile's tokens of weights[t][s] * x_t, in this thread's columns.
template <int V, typename T>
__device__ __forceinline__ void add_tile(
    const T* x, int count, const TileWeights& weights, int first_column, int width, ColumnSums<V>& sums) {
#pragma unroll
  for (int strip = 0; strip < kThreadColumns<V> / V; ++strip) {
    const int column = column_of<V>(first_column, strip);
    if (column >= width) continue;
#pragma unroll V
    for (int t = 0; t < count; ++t) {
      float values[V];
      load(x + static_cast<int64_t>(t) * width + column, values);
#pragma unroll
      for (int s = 0; s < kTileSlots; ++s) {
        const float weight = weights[t][s];
#pragma unroll
        for (int v = 0; v < V; ++v) sums[s][strip * V + v] += weight * values[v];
      }
    }
  }
}

// Writes the sums to `slots` rows, and begins new ones.
template <int V, typename T>
__device__ __forceinline__ void flush(ColumnSums<V>& sums, int slots, int first_column, int width, T* rows) {
#pragma unroll
  for (int strip = 0; strip < kThreadColumns<V> / V; ++strip) {
    const int column = column_of<V>(first_column, strip);
#pragma unroll
    for (int s = 0; s < kTileSlots; ++s) {
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[v] = sums[s][strip * V + v];
        sums[s][strip * V + v] = 0.0f;
      }
      if (column < width && s < slots) store(values, rows + s * width + column);
    }
  }
}

// out_i = out_i + sum over j of weights[offset_i + j] * row_j, in the columns that `rows` points to.
template <int V, typename Row>
__device__ __forceinline__ void add_rows(
    const float* weights, const int (&offset)[kGroup], const Row* rows, int64_t slots, int width, float (&out)[kGroup][V]) {
#pragma unroll 2
  for (int64_t j = 0; j < slots; ++j) {
    float row[V];
    load(rows + j * width, row);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float weight = weights[offset[i] + j];
#pragma unroll
      for (int v = 0; v < V; ++v) out[i][v] += weight * row[v];
    }
  }
}

// Where the weights of the tokens first, ..., first + 3 are; past the last token, the last token's.
__device__ __forceinline__ void weight_offsets(int first, int count, int stride, int (&offset)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) offset[i] = (first + i < count ? first + i : count - 1) * stride;
}

}  // namespace steel::cuda
