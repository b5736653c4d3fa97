// Enough of CUDA to run a .cu file on a CPU, found in place of the real header when the tests compile csrc/ with g++.
//
// The blocks of a grid run one after the other. The threads of a block are fibers that give way only at barriers and
// shuffles. Lanes run in a random order, and one warp, also picked at random, runs as far as it can before the next does:
// a kernel that misses a barrier gives wrong results. Threads that wait for others that never come end the launch with an
// error instead of a hang.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32, kStackBytes = 64 * 1024;

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t exchanged[2][kWarpSize];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Barrier* waits_for = nullptr;
  long until_after = 0;
  bool done = false;
  int exchanges = 0;

  bool can_run() const { return !done && (waits_for == nullptr || waits_for->generation > until_after); }
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int running = 0;
  std::function<void()> kernel;

  explicit Block(unsigned threads) : fibers(threads), warps(threads / kWarpSize) {}
};

inline Block* block = nullptr;
inline std::mt19937 random_order;
inline cudaError_t last_error = cudaSuccess;

inline void wait(Barrier& barrier) {
  Fiber& fiber = block->fibers[block->running];
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waits_for = &barrier;
  fiber.until_after = barrier.generation;
  swapcontext(&fiber.context, &block->scheduler);
}

inline void run_fiber() {
  block->kernel();
  block->fibers[block->running].done = true;
}

// Lets every thread of a warp that can run do so once, in a random order; false if none could.
inline bool run_warp(int first_thread) {
  int lanes[kWarpSize];
  std::iota(lanes, lanes + kWarpSize, 0);
  std::shuffle(lanes, lanes + kWarpSize, random_order);
  bool progress = false;
  for (int lane : lanes) {
    Fiber& fiber = block->fibers[first_thread + lane];
    if (!fiber.can_run()) continue;
    progress = true;
    fiber.waits_for = nullptr;
    block->running = first_thread + lane;
    threadIdx = dim3(static_cast<unsigned>(block->running), 0, 0);
    swapcontext(&block->scheduler, &fiber.context);
  }
  return progress;
}

// Runs all threads of one block, each warp as far ahead of the others as barriers let it; false if some wait for ever.
inline bool run_block(const std::function<void()>& kernel) {
  block->kernel = kernel;
  block->barrier = Barrier{static_cast<int>(block->fibers.size())};
  for (Warp& warp : block->warps) warp.barrier = Barrier{kWarpSize};
  for (Fiber& fiber : block->fibers) {
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &block->scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<int> order(block->warps.size());
  std::iota(order.begin(), order.end(), 0);
  for (bool progress = true; progress;) {
    progress = false;
    std::shuffle(order.begin(), order.end(), random_order);
    for (int warp : order) {
      while (run_warp(warp * kWarpSize)) progress = true;
    }
  }
  return std::all_of(block->fibers.begin(), block->fibers.end(), [](const Fiber& fiber) { return fiber.done; });
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  Block whole(threads);
  block = &whole;
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  for (unsigned index = 0; index < blocks && last_error == cudaSuccess; ++index) {
    blockIdx = dim3(index, 0, 0);
    if (!run_block([&] { kernel(arguments...); })) {
      std::fprintf(stderr, "cuda emulation: threads of block %u wait for ever\n", index);
      last_error = cudaErrorLaunchFailure;
    }
  }
  block = nullptr;
}

// What lane `source` of this thread's warp hands in. Two exchanges in turn have places of their own: no lane begins the
// one after the next before all have read this one's.
template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = block->warps[block->running / kWarpSize];
  uint64_t(&places)[kWarpSize] = warp.exchanged[block->fibers[block->running].exchanges++ % 2];
  std::memcpy(&places[block->running % kWarpSize], &value, sizeof(T));
  wait(warp.barrier);
  std::memcpy(&value, &places[source % kWarpSize], sizeof(T));
  return value;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

inline void __syncthreads() { emulation::wait(emulation::block->barrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value, source);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return emulation::exchange(value, static_cast<int>(threadIdx.x % emulation::kWarpSize) ^ lane_mask);
}
