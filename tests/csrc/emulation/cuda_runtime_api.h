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

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32, kBlockThreads = 128, kStackBytes = 64 * 1024;

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t exchanged[kWarpSize];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Barrier* waits_for = nullptr;
  long until_after = 0;
  bool done = false;

  bool can_run() const { return !done && (waits_for == nullptr || waits_for->generation > until_after); }
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers{kBlockThreads};
  std::vector<Warp> warps{kBlockThreads / kWarpSize};
  Barrier barrier;
  int running = 0;
  std::function<void()> kernel;
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
  block->barrier = Barrier{kBlockThreads};
  for (Warp& warp : block->warps) warp.barrier = Barrier{kWarpSize};
  for (Fiber& fiber : block->fibers) {
    fiber.done = false;
    fiber.waits_for = nullptr;
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
void launch(void (*kernel)(Parameters...), dim3 blocks, cudaStream_t, Arguments... arguments) {
  Block whole;
  block = &whole;
  gridDim = blocks;
  blockDim = dim3(kBlockThreads);
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (!run_block([&] { kernel(arguments...); })) {
          std::fprintf(stderr, "cuda emulation: threads of block (%u, %u, %u) wait for ever\n", x, y, z);
          last_error = cudaErrorLaunchFailure;
          block = nullptr;
          return;
        }
      }
    }
  }
  block = nullptr;
}

// What lane `source` of this thread's warp hands in; the lanes meet before it is read and again before the next exchange.
template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = block->warps[block->running / kWarpSize];
  std::memcpy(&warp.exchanged[block->running % kWarpSize], &value, sizeof(T));
  wait(warp.barrier);
  std::memcpy(&value, &warp.exchanged[source % kWarpSize], sizeof(T));
  wait(warp.barrier);
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
