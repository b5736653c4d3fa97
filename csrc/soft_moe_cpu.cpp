// Each pass reads the tokens once, in tiles that fit the second-level cache. A sequence is cut into pieces that depend on
// the ends alone; what is summed over tokens is summed per piece, and the pieces' sums are added in their order. So a
// result does not depend on the number of threads, and slots do not depend on the tokens behind their refresh point.
#include "soft_moe_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "rows.h"

namespace steel::cpu {
namespace {

constexpr int64_t kTile = 16;  // tokens

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[std::max<int64_t>(count, 1)]); }

// Tokens of a piece. Every piece has sums of its own [S, d], so pieces grow with S: 1/4 of the tokens' memory at most.
int64_t longest_piece(const Sizes& sizes) { return std::max<int64_t>(256, 4 * sizes.slots); }

struct Pieces {
  std::vector<Piece> all;
  std::vector<int64_t> first;  // of each group, and the number of pieces

  Pieces(const Sizes& sizes, const int64_t* ends)
      : all(most_pieces(sizes.length, sizes.refreshes, longest_piece(sizes))), first(sizes.refreshes + 2) {
    cut_pieces(ends, sizes.refreshes, sizes.length, longest_piece(sizes), all.data(), first.data());
    all.resize(first.back());
  }
  int64_t count() const { return static_cast<int64_t>(all.size()); }
};

// Runs task(0), ..., task(count - 1) on torch's threads.
template <typename Task>
void parallel(int64_t count, const Task& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) task(index);
  });
}

// Rows of float32 where they are, or widened into `buffer`.
const float* as_floats(const float* rows, int64_t, float*) { return rows; }

const float* as_floats(const BFloat16* rows, int64_t count, float* buffer) {
  row_kernels().widen(rows, buffer, count);
  return buffer;
}

template <typename T>
int64_t buffer_size(int64_t count) {
  return sizeof(T) == sizeof(float) ? 0 : count;
}

// Where to write rows of float32 that become rows of T by finish().
float* target(float* rows, float*) { return rows; }
float* target(BFloat16*, float* buffer) { return buffer; }
void finish(const float*, float*, int64_t) {}
void finish(const float* buffer, BFloat16* rows, int64_t count) { row_kernels().narrow(buffer, rows, count); }

// All of a [B, R, S, d] as float32.
template <typename T>
struct Widened {
  Floats buffer;
  const float* rows;

  Widened(const T* from, const Sizes& sizes) {
    const int64_t parts = sizes.batch * sizes.refreshes, part = sizes.slots * sizes.width;
    buffer = floats(buffer_size<T>(parts * part));
    rows = buffer.get();
    if (sizeof(T) == sizeof(float)) {
      rows = as_floats(from, 0, nullptr);
    } else {
      parallel(parts, [&](int64_t p) { as_floats(from + p * part, part, buffer.get() + p * part); });
    }
  }
};

std::vector<const float*> row_pointers(const float* rows, int64_t count, int64_t width) {
  std::vector<const float*> pointers(count);
  for (int64_t row = 0; row < count; ++row) pointers[row] = rows + row * width;
  return pointers;
}

// to = before * to + added * part, on one row.
void add_row(float* to, float before, const float* part, float added, int64_t width) {
  row_kernels().mix({width, 1, to, to, &before, 1, &part, &added, 0, 0});
}

// weights[j] = softmax over the S logits of one token
void softmax(const float* logits, int64_t slots, float* weights) {
  const float max = *std::max_element(logits, logits + slots);
  float sum = 0.0f;
  for (int64_t j = 0; j < slots; ++j) sum += weights[j] = expf(logits[j] - max);
  for (int64_t j = 0; j < slots; ++j) weights[j] /= sum;
}

// ---- dispatch ----

// Logits of one piece's tokens, and their running maximum, sum of exponentials and weighted sum for every slot.
template <typename T>
void dispatch_piece(
    const Sizes& sizes, const T* x, const float* keys, const Piece& piece, bool feeds_slots, bool mix_normalized,
    float* logits, Running* running, float* sums) {
  const auto [d, S] = std::pair(sizes.width, sizes.slots);
  const Floats buffer = floats(buffer_size<T>(kTile * d)), weights = floats(kTile * S), carry = floats(S);
  std::fill(running, running + S, nothing_yet());
  float inverse[kTile];
  for (int64_t begin = piece.begin; begin < piece.end; begin += kTile) {
    const int64_t count = std::min(kTile, piece.end - begin);
    const float* rows = as_floats(x + begin * d, count * d, buffer.get());
    float* tile = logits + begin * S;
    row_kernels().dots(rows, count, keys, S, d, tile);
    for (int64_t t = 0; t < count; ++t) {
      inverse[t] = inverse_norm(row_kernels().sum_of_squares(rows + t * d, d));
      for (int64_t j = 0; j < S; ++j) tile[t * S + j] *= inverse[t];
    }
    if (!feeds_slots) continue;
    for (int64_t j = 0; j < S; ++j) {
      Running part = nothing_yet();
      for (int64_t t = 0; t < count; ++t) part.max = fmaxf(part.max, tile[t * S + j]);
      part.max = fmaxf(part.max, running[j].max);  // one maximum for both: what is added needs no factor
      for (int64_t t = 0; t < count; ++t) {
        const float weight = expf(tile[t * S + j] - part.max);
        part.sum += weight;
        weights[t * S + j] = mix_normalized ? weight * inverse[t] : weight;
      }
      carry[j] = merge(running[j], part).before;
    }
    const auto terms = row_pointers(rows, count, d);
    const float* base = begin == piece.begin ? nullptr : sums;
    row_kernels().mix({d, S, sums, base, carry.get(), count, terms.data(), weights.get(), 1, S});
  }
}

// Adds the pieces of one sequence and one slot in order; writes slots and log-sum-exp at every refresh point.
void merge_pieces(
    const Sizes& sizes, const Pieces& pieces, const Running* running, const float* sums, float* slots, float* lse) {
  const int64_t d = sizes.width, S = sizes.slots;
  const Floats row = floats(d);
  std::fill(row.get(), row.get() + d, 0.0f);
  Running total = nothing_yet();
  for (int64_t k = 0; k < sizes.refreshes; ++k) {
    for (int64_t p = pieces.first[k]; p < pieces.first[k + 1]; ++p) {
      const Factors factors = merge(total, running[p * S]);
      add_row(row.get(), factors.before, sums + p * S * d, factors.added, d);
    }
    const float scale = 1.0f / total.sum;
    row_kernels().mix({d, 1, slots + k * S * d, row.get(), &scale, 0, nullptr, nullptr, 0, 0});
    lse[k * S] = log_sum_exp(total);
  }
}

// The reverse scan of one sequence and one slot:
//   A_k = grad_slot_k + exp(lse_k - lse_(k+1)) A_(k+1)        a_k = slot_k . grad_slot_k + exp(...) a_(k+1)
void scan_back(
    const Sizes& sizes, const float* grad_slots, const float* slots, const float* lse, float* scanned, float* scanned_dot) {
  const int64_t d = sizes.width, S = sizes.slots, last = sizes.refreshes - 1;
  for (int64_t k = last; k >= 0; --k) {
    const float* gradient = grad_slots + k * S * d;
    float* row = scanned + k * S * d;
    row_kernels().dots(slots + k * S * d, 1, gradient, 1, d, scanned_dot + k * S);
    const float one = 1.0f, factor = k == last ? 0.0f : expf(lse[k * S] - lse[(k + 1) * S]);
    const float* later = k == last ? nullptr : row + S * d;
    row_kernels().mix({d, 1, row, later, &factor, 1, &gradient, &one, 0, 0});
    if (k != last) scanned_dot[k * S] += factor * scanned_dot[(k + 1) * S];
  }
}

// What a tile's tokens need in the backward pass of dispatch; all of one group.
struct TileGradient {
  Floats dots, keys_share, coefficients;
  float inverse[kTile], x_share[kTile];

  TileGradient(int64_t slots)
      : dots(floats(kTile * slots)), keys_share(floats(kTile * slots)), coefficients(floats(kTile * 2 * slots)) {}

  // With A, a of the group (nullptr where the tokens feed no slot), w_tj = exp(l_tj - lse_j):
  //   dl_tj = grad_logit_tj + w_tj (v_t . A_j - a_j)      g_t = sum_j dl_tj key_j, and w_tj A_j if v is u
  //   dx_t = (g_t - u_t (u_t . g_t)) / |x_t|, and sum_j w_tj A_j if v is x
  void compute(
      const Sizes& sizes, const float* rows, int64_t count, bool mix_normalized, const float* grad_logits,
      const float* logits, const float* lse, const float* scanned, const float* scanned_dot) {
    const int64_t d = sizes.width, S = sizes.slots;
    if (scanned != nullptr) row_kernels().dots(rows, count, scanned, S, d, dots.get());
    for (int64_t t = 0; t < count; ++t) {
      const float squares = row_kernels().sum_of_squares(rows + t * d, d);
      const float mixed_scale = mix_normalized ? inverse_norm(squares) : 1.0f;
      inverse[t] = inverse_norm(squares);
      float along_u = 0.0f;  // u . g, from the dot products at hand
      for (int64_t j = 0; j < S; ++j) {
        float gradient = grad_logits[t * S + j], weight = 0.0f;
        if (scanned != nullptr) {
          const float mixed_dot = dots[t * S + j] * mixed_scale;
          weight = expf(logits[t * S + j] - lse[j]);
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

// One run of tokens: writes their gradients, and adds up the keys' gradient from them.
template <typename T>
void dispatch_backward_run(
    const Sizes& sizes, int64_t run_begin, int64_t run_end, const T* x, const float* keys, const int64_t* ends,
    bool mix_normalized, const float* grad_logits, const float* logits, const float* lse, const float* scanned,
    const float* scanned_dot, T* grad_x, float* grad_keys) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.refreshes;
  const Floats buffer = floats(buffer_size<T>(kTile * d)), result = floats(buffer_size<T>(kTile * d));
  TileGradient tile(S);
  const std::vector<float> ones(S, 1.0f);
  std::vector<const float*> terms = row_pointers(keys, 2 * S, d);  // the second half is replaced for every group
  int64_t group = group_of(ends, R, run_begin);
  for (int64_t begin = run_begin, end = 0; begin < run_end; begin = end) {
    while (group < R && ends[group] <= begin) ++group;
    end = std::min({begin + kTile, run_end, group < R ? ends[group] : run_end});
    const int64_t count = end - begin, at_group = group * S;
    const float* rows = as_floats(x + begin * d, count * d, buffer.get());
    const float* group_rows = group < R ? scanned + at_group * d : nullptr;
    tile.compute(
        sizes, rows, count, mix_normalized, grad_logits + begin * S, logits + begin * S, lse + at_group, group_rows,
        scanned_dot + at_group);
    const auto token_terms = row_pointers(rows, count, d);
    const float* base = begin == run_begin ? nullptr : grad_keys;
    row_kernels().mix({d, S, grad_keys, base, ones.data(), count, token_terms.data(), tile.keys_share.get(), 1, S});
    if (group < R) {
      for (int64_t j = 0; j < S; ++j) terms[S + j] = group_rows + j * d;
    }
    float* out = target(grad_x + begin * d, result.get());
    const int64_t term_count = group < R ? 2 * S : S;
    for (int64_t t = 0; t < count; t += 4) {  // few rows at a time, so that each is written as one stream
      row_kernels().mix(
          {d, std::min<int64_t>(4, count - t), out + t * d, rows + t * d, tile.x_share + t, term_count, terms.data(),
           tile.coefficients.get() + t * 2 * S, 2 * S, 1});
    }
    finish(out, grad_x + begin * d, count * d);
  }
}

}  // namespace

template <typename T>
void dispatch_forward(
    const Sizes& sizes, const T* x, const float* keys, const int64_t* ends, bool mix_normalized, float* slots,
    float* logits, float* lse) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.refreshes;
  const Pieces pieces(sizes, ends);
  const int64_t P = pieces.count();
  const Floats sums = floats(sizes.batch * P * S * d);
  std::vector<Running> running(sizes.batch * P * S);
  parallel(sizes.batch * P, [&](int64_t task) {
    const int64_t b = task / P;
    const Piece& piece = pieces.all[task % P];
    dispatch_piece(
        sizes, x + b * sizes.length * d, keys, piece, piece.group < R, mix_normalized, logits + b * sizes.length * S,
        running.data() + task * S, sums.get() + task * S * d);
  });
  parallel(sizes.batch * S, [&](int64_t task) {
    const int64_t b = task / S, j = task % S, piece = b * P * S + j, refresh = b * R * S + j;
    merge_pieces(sizes, pieces, &running[piece], &sums[piece * d], slots + refresh * d, lse + refresh);
  });
}

template <typename T>
void dispatch_backward(
    const Sizes& sizes, const float* grad_slots, const float* grad_logits, const T* x, const float* keys,
    const int64_t* ends, bool mix_normalized, const float* slots, const float* logits, const float* lse, T* grad_x,
    float* grad_keys) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.refreshes, length = sizes.length;
  const Floats scanned = floats(sizes.batch * R * S * d), scanned_dot = floats(sizes.batch * R * S);
  parallel(sizes.batch * S, [&](int64_t task) {
    const int64_t at = task / S * R * S + task % S;
    scan_back(sizes, grad_slots + at * d, slots + at * d, lse + at, &scanned[at * d], &scanned_dot[at]);
  });
  const int64_t longest = longest_piece(sizes), runs = divide_up(length, longest);
  const Floats sums = floats(sizes.batch * runs * S * d);
  parallel(sizes.batch * runs, [&](int64_t task) {
    const int64_t b = task / runs, begin = task % runs * longest, end = std::min(begin + longest, length);
    const int64_t tokens = b * length, refresh = b * R * S;
    dispatch_backward_run(
        sizes, begin, end, x + tokens * d, keys, ends, mix_normalized, grad_logits + tokens * S, logits + tokens * S,
        lse + refresh, &scanned[refresh * d], &scanned_dot[refresh], grad_x + tokens * d, &sums[task * S * d]);
  });
  parallel(S, [&](int64_t j) {
    std::fill(grad_keys + j * d, grad_keys + (j + 1) * d, 0.0f);
    for (int64_t run = 0; run < sizes.batch * runs; ++run) add_row(grad_keys + j * d, 1.0f, &sums[(run * S + j) * d], 1.0f, d);
  });
}

template <typename T>
void combine_forward(const Sizes& sizes, const T* outputs, const float* logits, const int64_t* ends, T* y) {
  const int64_t d = sizes.width, S = sizes.slots;
  const Widened<T> wide(outputs, sizes);
  const Pieces pieces(sizes, ends);
  const int64_t P = pieces.count();
  parallel(sizes.batch * P, [&](int64_t task) {
    const Piece& piece = pieces.all[task % P];
    const int64_t tokens = task / P * sizes.length;
    const auto terms = row_pointers(wide.rows + (task / P * sizes.refreshes + piece.group) * S * d, S, d);
    const Floats weights = floats(kTile * S), result = floats(buffer_size<T>(kTile * d));
    for (int64_t begin = piece.begin; begin < piece.end; begin += 4) {
      const int64_t count = std::min<int64_t>(4, piece.end - begin);
      for (int64_t t = 0; t < count; ++t) softmax(logits + (tokens + begin + t) * S, S, &weights[t * S]);
      T* rows = y + (tokens + begin) * d;
      float* out = target(rows, result.get());
      row_kernels().mix({d, count, out, nullptr, nullptr, S, terms.data(), weights.get(), S, 1});
      finish(out, rows, count * d);
    }
  });
}

template <typename T>
void combine_backward(
    const Sizes& sizes, const T* grad_y, const T* outputs, const float* logits, const int64_t* ends, T* grad_outputs,
    float* grad_logits) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.refreshes;
  const Widened<T> wide(outputs, sizes);
  const Pieces pieces(sizes, ends);
  const int64_t P = pieces.count();
  const Floats sums = floats(sizes.batch * P * S * d);
  parallel(sizes.batch * P, [&](int64_t task) {
    const Piece& piece = pieces.all[task % P];
    const int64_t tokens = task / P * sizes.length;
    const float* group_rows = wide.rows + (task / P * R + piece.group) * S * d;
    const Floats weights = floats(kTile * S), buffer = floats(buffer_size<T>(kTile * d));
    const std::vector<float> ones(S, 1.0f);
    for (int64_t begin = piece.begin; begin < piece.end; begin += kTile) {
      const int64_t count = std::min(kTile, piece.end - begin), at = (tokens + begin) * S;
      const float* rows = as_floats(grad_y + (tokens + begin) * d, count * d, buffer.get());
      row_kernels().dots(rows, count, group_rows, S, d, grad_logits + at);
      for (int64_t t = 0; t < count; ++t) {
        float *weight = &weights[t * S], *gradient = grad_logits + at + t * S, mean = 0.0f;
        softmax(logits + at + t * S, S, weight);
        for (int64_t j = 0; j < S; ++j) mean += weight[j] * gradient[j];
        for (int64_t j = 0; j < S; ++j) gradient[j] = weight[j] * (gradient[j] - mean);
      }
      const auto terms = row_pointers(rows, count, d);
      float* sum = &sums[task * S * d];
      const float* base = begin == piece.begin ? nullptr : sum;
      row_kernels().mix({d, S, sum, base, ones.data(), count, terms.data(), weights.get(), 1, S});
    }
  });
  parallel(sizes.batch * R * S, [&](int64_t task) {
    const int64_t b = task / (R * S), k = task / S % R, j = task % S;
    const Floats result = floats(buffer_size<T>(d));
    float* out = target(grad_outputs + task * d, result.get());
    std::fill(out, out + d, 0.0f);
    for (int64_t p = pieces.first[k]; p < pieces.first[k + 1]; ++p) {
      add_row(out, 1.0f, &sums[((b * P + p) * S + j) * d], 1.0f, d);
    }
    finish(out, grad_outputs + task * d, d);
  });
}

#define STEEL_INSTANTIATE(T)                                                                                        \
  template void dispatch_forward<T>(                                                                                \
      const Sizes&, const T*, const float*, const int64_t*, bool, float*, float*, float*);                          \
  template void dispatch_backward<T>(                                                                               \
      const Sizes&, const float*, const float*, const T*, const float*, const int64_t*, bool, const float*,         \
      const float*, const float*, T*, float*);                                                                      \
  template void combine_forward<T>(const Sizes&, const T*, const float*, const int64_t*, T*);                       \
  template void combine_backward<T>(                                                                                \
      const Sizes&, const T*, const T*, const float*, const int64_t*, T*, float*);

STEEL_INSTANTIATE(float)
STEEL_INSTANTIATE(BFloat16)

}  // namespace steel::cpu
