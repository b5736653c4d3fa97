// How a pass over tokens on a CPU is divided: tasks for threads, and tiles of tokens that fit the second-level cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "rows.h"

namespace steel::cpu {

using Floats = std::unique_ptr<float[]>;

inline Floats floats(int64_t count) { return Floats(new float[std::max<int64_t>(count, 1)]); }

// Tokens of a piece. Every piece has sums of its own [S, d], so pieces grow with S: 1/4 of the tokens' memory at most.
inline int64_t longest_piece(const Sizes& sizes) { return std::max<int64_t>(256, 4 * sizes.slots); }

// Tokens of a tile: more where a tile's products have to pay for reading and writing many rows of sums.
inline int64_t tile_length(const Sizes& sizes) { return sizes.slots < 24 ? 24 : 64; }

// Tokens whose results are written at once: few where they are a stream to memory, all of a tile where the sums' terms are
// too many for the first-level cache.
inline int64_t tokens_at_once(const Sizes& sizes) { return sizes.slots < 24 ? 8 : tile_length(sizes); }

// Runs task(0), ..., task(count - 1) on torch's threads.
template <typename Task>
void parallel(int64_t count, const Task& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(index);
  });
}

// The pieces of all sequences: those of sequence b's block k are all[begin(b, k)] up to all[begin(b, k + 1)], and those
// of no block are `block` R.
class Pieces {
 public:
  struct Task {
    int64_t sequence;
    Piece piece;
  };
  std::vector<Task> all;

  Pieces(const Sizes& sizes, const int64_t* starts, const int64_t* ends)
      : blocks_(sizes.blocks), plans_(sizes.plans), first_(sizes.plans * (sizes.blocks + 2)), base_(sizes.batch + 1) {
    const int64_t longest = longest_piece(sizes);
    std::vector<Piece> pieces(most_pieces(sizes.length, blocks_, longest));
    for (int64_t b = 0; b < sizes.batch; ++b) {
      const int64_t plan = plan_of(b);
      int64_t* first = &first_[plan * (blocks_ + 2)];
      if (b == plan) cut_pieces(starts + plan * blocks_, ends + plan * blocks_, blocks_, sizes.length, longest, pieces.data(), first);
      base_[b] = count();
      for (int64_t p = 0; p < first[blocks_ + 1]; ++p) all.push_back({b, pieces[p]});
    }
  }
  int64_t count() const { return static_cast<int64_t>(all.size()); }
  int64_t begin(int64_t b, int64_t block) const { return base_[b] + first_[plan_of(b) * (blocks_ + 2) + block]; }
  int64_t plan_of(int64_t b) const { return plans_ == 1 ? 0 : b; }

 private:
  int64_t blocks_, plans_;
  std::vector<int64_t> first_, base_;
};

// Rows of float32 where they are, or widened into `buffer`.
inline const float* as_floats(const float* rows, int64_t, float*) { return rows; }

inline const float* as_floats(const BFloat16* rows, int64_t count, float* buffer) {
  row_kernels().widen(rows, buffer, count);
  return buffer;
}

inline const float* as_floats(const Float16* rows, int64_t count, float* buffer) {
  row_kernels().widen_half(rows, buffer, count);
  return buffer;
}

template <typename T>
std::vector<const T*> row_pointers(const T* rows, int64_t count, int64_t width) {
  std::vector<const T*> pointers(count);
  for (int64_t row = 0; row < count; ++row) pointers[row] = rows + row * width;
  return pointers;
}

// to = before * to + added * part, on one row.
inline void add_row(float* to, float before, const float* part, float added, int64_t width) {
  token_kernels<float>().gather({width, 1, to, to, &before, 1, &part, &added, 0, 0});
}

}  // namespace steel::cpu
