// Stands in for <cuda_runtime.h>, so that g++ compiles a .cu file and its kernels run on the CPU: the logic of a kernel without a GPU.
//
// A block's threads are fibers of one OS thread, which change places only at __syncthreads and at shuffles. A warp runs until __syncthreads
// stops it before another gets its turn, first warp first or, with CUDA_ON_HOST_REVERSED set, last warp first: warps are as far apart as
// the barriers let them be, so a missing one shows. A barrier that not all threads reach ends the process. Blocks run one after another, so
// __shared__ is a static variable. Only what our kernels use is here; a launch `kernel<<<grid, block, shared, stream>>>(arguments)` must
// have been rewritten to cuda_on_host::launch(kernel, grid, ..., arguments).
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;
inline bool progress;
inline Barrier block_barrier, warp_barriers[32];
inline double shuffled[32][32];
inline int launches = 0;

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  } else {
    while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
  }
}

inline void run_fiber() {
  body();
  fibers[current].done = progress = true;
}

inline void run_block(unsigned threads) {
  constexpr size_t kStack = 64 * 1024;
  block_barrier = {threads};
  for (unsigned warp = 0; warp < 32; ++warp) warp_barriers[warp] = {32};
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const bool reversed = std::getenv("CUDA_ON_HOST_REVERSED") != nullptr;
  const unsigned warps = threads / 32;
  for (unsigned done = 0; done < threads;) {
    bool stuck = true;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = reversed ? warps - 1 - i : i;
      do {
        progress = false;
        for (unsigned lane = 0; lane < 32; ++lane) {
          current = warp * 32 + (reversed ? 31 - lane : lane);
          if (fibers[current].done) continue;
          threadIdx.x = current;
          swapcontext(&scheduler, &fibers[current].context);
          done += fibers[current].done;
        }
        stuck = stuck && !progress;
      } while (progress);
    }
    if (done < threads && stuck) {
      std::fprintf(stderr, "cuda_on_host: deadlock: threads of one block wait at different barriers\n");
      std::abort();
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t blocks, unsigned threads, size_t, cudaStream_t, Arguments... arguments) {
  ++launches;
  body = [&] { kernel(arguments...); };
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    run_block(threads);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block_barrier); }

inline double __shfl_xor_sync(unsigned, double x, int distance) {
  using namespace cuda_on_host;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  shuffled[warp][lane] = x;
  wait(warp_barriers[warp]);
  const double other = shuffled[warp][lane ^ distance];
  wait(warp_barriers[warp]);
  return other;
}

extern "C" int cuda_on_host_launches() { return cuda_on_host::launches; }
