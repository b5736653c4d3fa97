// The kernels of each pass in their order. A pass reads its tokens from memory once, and writes arrays as large once;
// cuda_tiles.h says how.
#include "cuda_combine.h"
#include "cuda_dispatch.h"

namespace steel::cuda {
namespace {

// Calls pass(V) as a constant: 4 if that many columns can be read at once.
template <typename Pass, typename... Pointers>
void for_columns(int64_t width, const Pass& pass, Pointers... rows) {
  if (width % 4 == 0 && (can_pack(rows) && ...)) {
    pass(std::integral_constant<int, 4>());
  } else {
    pass(std::integral_constant<int, 1>());
  }
}

}  // namespace

int64_t scratch_bytes(Pass pass, const Sizes& n) {
  Arena arena{nullptr};
  switch (pass) {
    case Pass::kDispatchForward:
      DispatchScratch(n, arena);
      break;
    case Pass::kDispatchBackward:
      DispatchBackwardScratch(n, arena);
      break;
    case Pass::kCombineForward:
    case Pass::kCombineBackward:
      CombineScratch(n, arena, pass == Pass::kCombineBackward);
  }
  return arena.used;
}

template <typename T>
cudaError_t dispatch_forward(
    const Sizes& n, const T* x, const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized,
    float* slots, float* logits, float* lse, void* memory, cudaStream_t stream) {
  if (n.width > kWidest) return cudaErrorInvalidValue;
  Arena arena{static_cast<char*>(memory)};
  const DispatchScratch scratch(n, arena);
  const Cut cut = cut_into_chunks(n);
  Launches launch{stream};
  for_columns(
      n.width,
      [&](auto columns) {
        constexpr int V = columns.value;
        launch(
            dispatch_kernel<T, V>, count_places<V>(n, cut, cut.slot_tiles), n, cut, x, keys, starts, ends, mix_normalized,
            logits, scratch.running, scratch.sums);
      },
      x, keys);
  launch(
      merge_kernel, divide_up(n.batch * n.slots * n.width, kThreads), n, cut, starts, ends, scratch.running, scratch.sums,
      slots, lse);
  return launch.error;
}

template <typename T>
cudaError_t dispatch_backward(
    const Sizes& n, const float* grad_slots, const float* grad_logits, const float* grad_lse, const T* x,
    const float* keys, const int64_t* starts, const int64_t* ends, bool mix_normalized, const float* slots,
    const float* logits, const float* lse, T* grad_x, float* grad_keys, void* memory, cudaStream_t stream) {
  if (n.width > kWidest) return cudaErrorInvalidValue;
  Arena arena{static_cast<char*>(memory)};
  const DispatchBackwardScratch scratch(n, arena);
  const Cut cut = cut_into_chunks(n);
  const int64_t rows = n.batch * n.blocks * n.slots, row = n.slots * n.width;
  Launches launch{stream};
  launch(slot_dots_kernel, divide_up(rows, kWarps), rows, n.width, slots, grad_slots, grad_lse, scratch.scanned_dot);
  launch(
      scan_kernel, divide_up(n.batch * row, kThreads), n, starts, grad_slots, lse, scratch.scanned, scratch.scanned_dot);
  for_columns(
      n.width,
      [&](auto columns) {
        constexpr int V = columns.value;
        launch(
            dispatch_backward_kernel<T, V>, count_places<V>(n, cut, cut.slot_tiles), n, cut, grad_logits, x, keys, starts,
            ends, mix_normalized, logits, lse, scratch, grad_x);
        if (cut.slot_tiles == 1) return;
        launch(grad_x_kernel<T, V>, count_places<V>(n, cut, 1), n, cut, x, keys, starts, ends, scratch, grad_x);
      },
      x, keys, static_cast<const T*>(grad_x));
  launch(sum_keys_kernel, divide_up(row, kWarp), n.batch * cut.chunks, row, scratch.sums, grad_keys);
  return launch.error;
}

template <typename T>
cudaError_t combine_forward(
    const Sizes& n, const T* outputs, const float* logits, const int64_t* reads, T* y, void* memory, cudaStream_t stream) {
  if (n.width > kWidest) return cudaErrorInvalidValue;
  Arena arena{static_cast<char*>(memory)};
  const CombineScratch scratch(n, arena, false);
  const Cut cut = cut_into_chunks(n);
  const int64_t tokens = n.batch * n.length;
  Launches launch{stream};
  launch(softmax_kernel, divide_up(tokens, kWarps), tokens, n.slots, logits, scratch.weights);
  for_columns(
      n.width,
      [&](auto columns) {
        constexpr int V = columns.value;
        launch(combine_kernel<T, V>, count_places<V>(n, cut, 1), n, cut, outputs, scratch.weights, reads, y);
      },
      outputs, static_cast<const T*>(y));
  return launch.error;
}

template <typename T>
cudaError_t combine_backward(
    const Sizes& n, const T* grad_y, const T* outputs, const float* logits, const int64_t* reads, T* grad_outputs,
    float* grad_logits, void* memory, cudaStream_t stream) {
  if (n.width > kWidest) return cudaErrorInvalidValue;
  Arena arena{static_cast<char*>(memory)};
  const CombineScratch scratch(n, arena, true);
  const Cut cut = cut_into_chunks(n);
  const int64_t tokens = n.batch * n.length, strips = divide_up(n.slots * n.width, kWarp);
  Launches launch{stream};
  launch(softmax_kernel, divide_up(tokens, kWarps), tokens, n.slots, logits, scratch.weights);
  for_columns(
      n.width,
      [&](auto columns) {
        constexpr int V = columns.value;
        launch(
            combine_backward_kernel<T, V>, count_places<V>(n, cut, cut.slot_tiles), n, cut, grad_y, outputs,
            scratch.weights, reads, grad_logits, scratch.sums, grad_outputs);
      },
      grad_y, outputs, static_cast<const T*>(grad_outputs));
  launch(softmax_backward_kernel, divide_up(tokens, kWarps), tokens, n.slots, scratch.weights, grad_logits);
  // With few blocks, many threads for each of them.
  const int64_t wanted = 1 + 512 / (n.batch * n.blocks + 1), parts = wanted < strips ? wanted : strips;
  launch(sum_blocks_kernel<T>, n.batch * n.blocks * parts, n, cut, parts, reads, scratch.sums, grad_outputs);
  return launch.error;
}

#define STEEL_INSTANTIATE(T)                                                                                          \
  template cudaError_t dispatch_forward<T>(                                                                           \
      const Sizes&, const T*, const float*, const int64_t*, const int64_t*, bool, float*, float*, float*, void*,      \
      cudaStream_t);                                                                                                  \
  template cudaError_t dispatch_backward<T>(                                                                          \
      const Sizes&, const float*, const float*, const float*, const T*, const float*, const int64_t*, const int64_t*, \
      bool, const float*, const float*, const float*, T*, float*, void*, cudaStream_t);                               \
  template cudaError_t combine_forward<T>(                                                                            \
      const Sizes&, const T*, const float*, const int64_t*, T*, void*, cudaStream_t);                                 \
  template cudaError_t combine_backward<T>(                                                                           \
      const Sizes&, const T*, const T*, const float*, const int64_t*, T*, float*, void*, cudaStream_t);

STEEL_INSTANTIATE(float)
STEEL_INSTANTIATE(BFloat16)
STEEL_INSTANTIATE(Float16)

}  // namespace steel::cuda
