// Combine on a CPU: every token's mean of the slots' results. As in soft_moe_cpu.cpp, what is summed over tokens is
// summed per piece, and the pieces' sums are added in their order, so that threads do not change a result.
#include "soft_moe_cpu.h"
#include "tiles.h"

namespace steel::cpu {
namespace {

// The tokens that read block k: from where those of block k - 1 end.
Pieces reading_pieces(const Sizes& sizes, const int64_t* reads) {
  std::vector<int64_t> starts(sizes.plans * sizes.blocks);
  for (int64_t at = 0; at < sizes.plans * sizes.blocks; ++at) starts[at] = at % sizes.blocks == 0 ? 0 : reads[at - 1];
  return Pieces(sizes, starts.data(), reads);
}

// weights[t, j] = softmax over the S logits of each token
void softmax(const float* logits, int64_t tokens, int64_t slots, float* weights) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = logits + t * slots;
    const float max = *std::max_element(row, row + slots);
    for (int64_t j = 0; j < slots; ++j) weights[t * slots + j] = row[j] - max;
  }
  row_kernels().exponentials(weights, tokens * slots);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = weights + t * slots;
    float sum = 0.0f;
    for (int64_t j = 0; j < slots; ++j) sum += row[j];
    const float scale = 1.0f / sum;
    for (int64_t j = 0; j < slots; ++j) row[j] *= scale;
  }
}

}  // namespace

template <typename T>
void combine_forward(const Sizes& sizes, const T* outputs, const float* logits, const int64_t* reads, T* y) {
  const int64_t d = sizes.width, S = sizes.slots, tile = tile_length(sizes), at_once = tokens_at_once(sizes);
  const Pieces pieces = reading_pieces(sizes, reads);
  parallel(pieces.count(), [&](int64_t task) {
    const auto& [b, piece] = pieces.all[task];
    if (piece.block < 0) return;
    const Floats buffer = floats(sizeof(T) == sizeof(float) ? 0 : S * d);
    const auto terms = row_pointers(as_floats(outputs + (b * sizes.blocks + piece.block) * S * d, S * d, buffer.get()), S, d);
    const Floats weights = floats(tile * S);
    for (int64_t begin = piece.begin; begin < piece.end; begin += tile) {
      const int64_t tokens = b * sizes.length + begin, count = std::min(tile, piece.end - begin);
      softmax(logits + tokens * S, count, S, weights.get());
      for (int64_t t = 0; t < count; t += at_once) {
        const int64_t some = std::min(at_once, count - t);
        token_kernels<T>().spread({d, some, y + (tokens + t) * d, nullptr, nullptr, S, terms.data(), &weights[t * S], S, 1});
      }
    }
  });
}

template <typename T>
void combine_backward(
    const Sizes& sizes, const T* grad_y, const T* outputs, const float* logits, const int64_t* reads, T* grad_outputs,
    float* grad_logits) {
  const int64_t d = sizes.width, S = sizes.slots, R = sizes.blocks, tile = tile_length(sizes);
  const Pieces pieces = reading_pieces(sizes, reads);
  const Floats sums = floats(pieces.count() * S * d);
  parallel(pieces.count(), [&](int64_t task) {
    const auto& [b, piece] = pieces.all[task];
    if (piece.block < 0) return;
    const Floats buffer = floats(sizeof(T) == sizeof(float) ? 0 : S * d);
    const float* block_rows = as_floats(outputs + (b * R + piece.block) * S * d, S * d, buffer.get());
    const Floats weights = floats(tile * S);
    const std::vector<float> ones(S, 1.0f);
    for (int64_t begin = piece.begin; begin < piece.end; begin += tile) {
      const int64_t tokens = b * sizes.length + begin, count = std::min(tile, piece.end - begin), at = tokens * S;
      const T* rows = grad_y + tokens * d;
      token_kernels<T>().dots(rows, count, block_rows, S, d, grad_logits + at);
      softmax(logits + at, count, S, weights.get());
      for (int64_t t = 0; t < count; ++t) {
        float *weight = &weights[t * S], *gradient = grad_logits + at + t * S, mean = 0.0f;
        for (int64_t j = 0; j < S; ++j) mean += weight[j] * gradient[j];
        for (int64_t j = 0; j < S; ++j) gradient[j] = weight[j] * (gradient[j] - mean);
      }
      const auto terms = row_pointers(rows, count, d);
      float* sum = &sums[task * S * d];
      const float* base = begin == piece.begin ? nullptr : sum;
      token_kernels<T>().gather({d, S, sum, base, ones.data(), count, terms.data(), weights.get(), 1, S, count * d});
    }
  });
  parallel(sizes.batch * R * S, [&](int64_t task) {
    const int64_t b = task / (R * S), k = task / S % R, j = task % S;
    std::vector<const float*> parts;
    for (int64_t p = pieces.begin(b, k); p < pieces.begin(b, k + 1); ++p) parts.push_back(&sums[(p * S + j) * d]);
    const std::vector<float> ones(parts.size(), 1.0f);
    const auto count = static_cast<int64_t>(parts.size());
    token_kernels<T>().spread({d, 1, grad_outputs + task * d, nullptr, nullptr, count, parts.data(), ones.data(), 0, 1});
  });
}

#define STEEL_INSTANTIATE(T)                                                                                           \
  template void combine_forward<T>(const Sizes&, const T*, const float*, const int64_t*, T*);                          \
  template void combine_backward<T>(const Sizes&, const T*, const T*, const float*, const int64_t*, T*, float*);

STEEL_INSTANTIATE(float)
STEEL_INSTANTIATE(BFloat16)
STEEL_INSTANTIATE(Float16)

}  // namespace steel::cpu
