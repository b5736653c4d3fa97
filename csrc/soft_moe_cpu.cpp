// Dispatch on a CPU: tokens mixed into slots. Each pass reads the tokens once, in tiles that fit the second-level cache. A
// sequence is cut into pieces that depend on the blocks alone; what is summed over tokens is summed per piece, and the
// pieces' sums are added in their order. So a result does not depend on the number of threads, and slots do not depend
// on the tokens outside their block.
#include "soft_moe_cpu.h"

#include "tiles.h"

namespace steel::cpu {
namespace {

// ---- forward ----

// Logits of one piece's tokens, and their running maximum, sum of exponentials and weighted sum for every slot.
template <typename T>
void dispatch_piece(
    const Sizes& sizes, const T* x, const float* keys, const Piece& piece, bool mix_normalized, float* logits,
    Running* running, float* sums) {
  const int64_t d = sizes.width, S = sizes.slots, longest = tile_length(sizes);
  const Floats weights = floats(longest * S), carry = floats(S), inverse = floats(longest), max = floats(S);
  if (piece.block >= 0) std::fill(running, running + S, nothing_yet());
  for (int64_t begin = piece.begin; begin < piece.end; begin += longest) {
    const int64_t count = std::min(longest, piece.end - begin);
    const T* rows = x + begin * d;
    float* tile = logits + begin * S;
    token_kernels<T>().dots(rows, count, keys, S, d, tile);
    for (int64_t t = 0; t < count; ++t) {
      inverse[t] = inverse_norm(token_kernels<T>().sum_of_squares(rows + t * d, d));
      for (int64_t j = 0; j < S; ++j) tile[t * S + j] *= inverse[t];
    }
    if (piece.block < 0) continue;
    for (int64_t j = 0; j < S; ++j) max[j] = running[j].max;  // one maximum for both: what is added needs no factor
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < S; ++j) max[j] = std::max(max[j], tile[t * S + j]);
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < S; ++j) weights[t * S + j] = tile[t * S + j] - max[j];
    }
    row_kernels().exponentials(weights.get(), count * S);
    for (int64_t j = 0; j < S; ++j) {
      carry[j] = exp_below(running[j].max, max[j]);
      running[j] = Running{max[j], running[j].sum * carry[j]};
    }
    for (int64_t t = 0; t < count; ++t) {
      const float scale = mix_normalized ? inverse[t] : 1.0f;
      for (int64_t j = 0; j < S; ++j) {
        running[j].sum += weights[t * S + j];
        weights[t * S + j] *= scale;
      }
    }
    const auto terms = row_pointers(rows, count, d);
    const float* base = begin == piece.begin ? nullptr : sums;
    token_kernels<T>().gather({d, S, sums, base, carry.get(), count, terms.data(), weights.get(), 1, S, count * d});
  }
}

// Where the sums [S, d] of every piece are: a block's first piece has the place of its slots, the others scratch.
class PieceSums {
 public:
  PieceSums(const Sizes& sizes, const Pieces& pieces, float* slots) : rows_(pieces.count(), nullptr) {
    const int64_t size = sizes.slots * sizes.width;
    int64_t others = 0;
    for (int64_t b = 0; b < sizes.batch; ++b) others += pieces.begin(b, sizes.blocks) - pieces.begin(b, 0);
    scratch_ = floats(others * size);
    others = 0;
    for (int64_t b = 0; b < sizes.batch; ++b) {
      for (int64_t k = 0; k < sizes.blocks; ++k) {
        for (int64_t p = pieces.begin(b, k); p < pieces.begin(b, k + 1); ++p) {
          const bool first = p == pieces.begin(b, k);
          rows_[p] = first ? slots + (b * sizes.blocks + k) * size : &scratch_[others++ * size];
        }
      }
    }
  }
  float* operator[](int64_t piece) const { return rows_[piece]; }

 private:
  Floats scratch_;  // memory of the pieces that are not the first is never touched, and so never taken
  std::vector<float*> rows_;
};

// Adds the pieces of one sequence and one slot in order; writes slots and log-sum-exp at the end of every block.
void merge_pieces(
    const Sizes& sizes, const Pieces& pieces, int64_t b, int64_t j, const int64_t* starts, const Running* running,
    const PieceSums& sums, float* slots, float* lse) {
  const int64_t d = sizes.width, S = sizes.slots;
  const Floats row = floats(d);
  Running total = nothing_yet();
  for (int64_t k = 0; k < sizes.blocks; ++k) {
    if (!goes_on(starts, k)) {
      std::fill(row.get(), row.get() + d, 0.0f);
      total = nothing_yet();
    }
    for (int64_t p = pieces.begin(b, k); p < pieces.begin(b, k + 1); ++p) {
      const Factors factors = merge(total, running[p * S + j]);
      add_row(row.get(), factors.before, sums[p] + j * d, factors.added, d);
    }
    const bool empty = total.sum == 0.0f;
    const float scale = empty ? 0.0f : 1.0f / total.sum;
    token_kernels<float>().gather({d, 1, slots + (k * S + j) * d, row.get(), &scale, 0, nullptr, nullptr, 0, 0});
    lse[k * S + j] = empty ? -INFINITY : log_sum_exp(total);
  }
}

// ---- backward ----

// The reverse scan of one sequence and one slot, with f_k = exp(lse_k - lse_(k+1)) where block k + 1 goes on from k, else 0:
//   A_k = grad_slot_k + f_k A_(k+1)        a_k = slot_k . grad_slot_k - grad_lse_k + f_k a_(k+1)
void scan_back(
    const Sizes& sizes, const int64_t* starts, const float* grad_slots, const float* grad_lse, const float* slots,
    const float* lse, float* scanned, float* scanned_dot) {
  const int64_t d = sizes.width, S = sizes.slots;
  for (int64_t k = sizes.blocks - 1; k >= 0; --k) {
    const float* gradient = grad_slots + k * S * d;
    float* row = scanned + k * S * d;
    const bool goes = k + 1 < sizes.blocks && goes_on(starts, k + 1);
    const float one = 1.0f, factor = goes ? exp_below(lse[k * S], lse[(k + 1) * S]) : 0.0f;
    const float* later = factor == 0.0f ? nullptr : row + S * d;
    token_kernels<float>().dots(slots + k * S * d, 1, gradient, 1, d, scanned_dot + k * S);
    token_kernels<float>().gather({d, 1, row, later, &factor, 1, &gradient, &one, 0, 0});
    scanned_dot[k * S] -= grad_lse[k * S];
    if (later != nullptr) scanned_dot[k * S] += factor * scanned_dot[(k + 1) * S];
  }
}

// What a tile's tokens need in the backward pass; all of one block, or of none.
struct TileGradient {
  Floats dots, weights, keys_share, coefficients, inverse, x_share;

  TileGradient(int64_t tokens, int64_t slots)
      : dots(floats(tokens * slots)),
        weights(floats(tokens * slots)),
        keys_share(floats(tokens * slots)),
        coefficients(floats(tokens * 2 * slots)),
        inverse(floats(tokens)),
        x_share(floats(tokens)) {}

  // With A, a of the block (nullptr where the tokens feed no slot), w_tj = exp(l_tj - lse_j):
  //   dl_tj = grad_logit_tj + w_tj (v_t . A_j - a_j)      g_t = sum_j dl_tj key_j, and w_tj A_j if v is u
  //   dx_t = (g_t - u_t (u_t . g_t)) / |x_t|, and sum_j w_tj A_j if v is x
  template <typename T>
  void compute(
      const Sizes& sizes, const T* rows, int64_t count, bool mix_normalized, const float* grad_logits,
      const float* logits, const float* lse, const float* scanned, const float* scanned_dot) {
    const int64_t d = sizes.width, S = sizes.slots;
    if (scanned != nullptr) {
      token_kernels<T>().dots(rows, count, scanned, S, d, dots.get());
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t j = 0; j < S; ++j) weights[t * S + j] = logits[t * S + j] - lse[j];
      }
      row_kernels().exponentials(weights.get(), count * S);
    }
    for (int64_t t = 0; t < count; ++t) {
      const float squares = token_kernels<T>().sum_of_squares(rows + t * d, d);
      const float mixed_scale = mix_normalized ? inverse_norm(squares) : 1.0f;
      inverse[t] = inverse_norm(squares);
      float along_u = 0.0f;  // u . g, from the dot products at hand
      for (int64_t j = 0; j < S; ++j) {
        float gradient = grad_logits[t * S + j], weight = 0.0f;
        if (scanned != nullptr) {
          const float mixed_dot = dots[t * S + j] * mixed_scale;
          weight = weights[t * S + j];
          gradient += weight * (mixed_dot - scanned_dot[j]);
          if (mix_normalized) along_u += weight * mixed_dot;
        }
        along_u += gradient * logits[t * S + j];
        keys_share[t * S + j] = gradient * inverse[t];
        coefficients[t * 2 * S + j] = gradient * inverse[t];
        coefficients[t * 2 * S + S + j] = weight * mixed_scale;
      }
      x_share[t] = -along_u * radial_factor(squares);
    }
  }
};

// The tokens from `token` on that feed the same block, or none (R): a run's part.
int64_t end_of_part(const Sizes& sizes, const int64_t* starts, const int64_t* ends, int64_t token, int64_t& block) {
  block = block_after(ends, sizes.blocks, token);
  if (block == sizes.blocks) return sizes.length;
  if (starts[block] <= token) return ends[block];
  const int64_t next = starts[block];
  block = sizes.blocks;
  return next;
}

// One run of tokens: writes their gradients, and adds up the keys' gradient from them.
template <typename T>
void dispatch_backward_run(
    const Sizes& sizes, int64_t run_begin, int64_t run_end, const T* x, const float* keys, const int64_t* starts,
    const int64_t* ends, bool mix_normalized, const float* grad_logits, const float* logits, const float* lse,
    const float* scanned, const float* scanned_dot, T* grad_x, float* grad_keys) {
  const int64_t d = sizes.width, S = sizes.slots, longest = tile_length(sizes), at_once = tokens_at_once(sizes);
  TileGradient tile(longest, S);
  const std::vector<float> ones(S, 1.0f);
  std::vector<const float*> terms = row_pointers(keys, 2 * S, d);  // the second half is replaced for every block
  for (int64_t begin = run_begin, end = 0; begin < run_end; begin = end) {
    int64_t block = 0;
    end = std::min({end_of_part(sizes, starts, ends, begin, block), begin + longest, run_end});
    const bool feeds = block < sizes.blocks;
    const int64_t count = end - begin, at_block = feeds ? block * S : 0;
    const T* rows = x + begin * d;
    const float* block_rows = feeds ? scanned + at_block * d : nullptr;
    tile.compute(
        sizes, rows, count, mix_normalized, grad_logits + begin * S, logits + begin * S, lse + at_block, block_rows,
        scanned_dot + at_block);
    const auto token_terms = row_pointers(rows, count, d);
    const float* base = begin == run_begin ? nullptr : grad_keys;
    token_kernels<T>().gather({d, S, grad_keys, base, ones.data(), count, token_terms.data(), tile.keys_share.get(), 1, S, count * d});
    for (int64_t j = 0; feeds && j < S; ++j) terms[S + j] = block_rows + j * d;
    for (int64_t t = 0; t < count; t += at_once) {
      const int64_t some = std::min(at_once, count - t);
      token_kernels<T>().spread(
          {d, some, grad_x + (begin + t) * d, rows + t * d, &tile.x_share[t], feeds ? 2 * S : S, terms.data(), &tile.coefficients[t * 2 * S],
           2 * S, 1});
    }
  }
}

}  // namespace

template <typename T>
void dispatch_forward(
    const Sizes& sizes, const T* x, const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized,
    float* slots, float* logits, float* lse) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.blocks;
  const Pieces pieces(sizes, starts, ends);
  const PieceSums sums(sizes, pieces, slots);
  std::vector<Running> running(pieces.count() * S);
  parallel(pieces.count(), [&](int64_t task) {
    const auto& [b, piece] = pieces.all[task];
    dispatch_piece(
        sizes, x + b * sizes.length * d, keys, piece, mix_normalized, logits + b * sizes.length * S,
        running.data() + task * S, sums[task]);
  });
  parallel(sizes.batch * S, [&](int64_t task) {
    const int64_t b = task / S, j = task % S;
    const int64_t* row_starts = starts + pieces.plan_of(b) * R;
    merge_pieces(sizes, pieces, b, j, row_starts, running.data(), sums, slots + b * R * S * d, lse + b * R * S);
  });
}

template <typename T>
void dispatch_backward(
    const Sizes& sizes, const float* grad_slots, const float* grad_logits, const float* grad_lse, const T* x,
    const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized, const float* slots,
    const float* logits, const float* lse, T* grad_x, float* grad_keys) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.blocks, length = sizes.length;
  const auto plan_at = [&](int64_t b) { return sizes.plans == 1 ? 0 : b * R; };
  const Floats scanned = floats(sizes.batch * R * S * d), scanned_dot = floats(sizes.batch * R * S);
  parallel(sizes.batch * S, [&](int64_t task) {
    const int64_t b = task / S, at = b * R * S + task % S;
    scan_back(
        sizes, starts + plan_at(b), grad_slots + at * d, grad_lse + at, slots + at * d, lse + at, &scanned[at * d],
        &scanned_dot[at]);
  });
  // Runs, not pieces: of many short blocks each would need sums of its own.
  const int64_t longest = longest_piece(sizes), runs = divide_up(length, longest);
  const Floats sums = floats(sizes.batch * runs * S * d);
  parallel(sizes.batch * runs, [&](int64_t task) {
    const int64_t b = task / runs, begin = task % runs * longest, end = std::min(begin + longest, length);
    const int64_t tokens = b * length, block = b * R * S;
    dispatch_backward_run(
        sizes, begin, end, x + tokens * d, keys, starts + plan_at(b), ends + plan_at(b), mix_normalized,
        grad_logits + tokens * S, logits + tokens * S, lse + block, &scanned[block * d], &scanned_dot[block],
        grad_x + tokens * d, &sums[task * S * d]);
  });
  parallel(S, [&](int64_t j) {
    std::fill(grad_keys + j * d, grad_keys + (j + 1) * d, 0.0f);
    for (int64_t run = 0; run < sizes.batch * runs; ++run) add_row(grad_keys + j * d, 1.0f, &sums[(run * S + j) * d], 1.0f, d);
  });
}

#define STEEL_INSTANTIATE(T)                                                                                           \
  template void dispatch_forward<T>(                                                                                   \
      const Sizes&, const T*, const float*, const int64_t*, const int64_t*, bool, float*, float*, float*);             \
  template void dispatch_backward<T>(                                                                                  \
      const Sizes&, const float*, const float*, const float*, const T*, const float*, const int64_t*, const int64_t*,  \
      bool, const float*, const float*, const float*, T*, float*);

STEEL_INSTANTIATE(float)
STEEL_INSTANTIATE(BFloat16)
STEEL_INSTANTIATE(Float16)

}  // namespace steel::cpu
