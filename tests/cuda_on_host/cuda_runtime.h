// Replaces <cuda_runtime.h> in the tests, so that g++ compiles a .cu file and its kernels run on the CPU: the logic of a kernel without a
// GPU.
//
// The threads of a cluster are fibers of one OS thread, which switch only where they wait: at barriers and at shuffles. A warp runs until
// it waits before another warp runs: the first warp first, with CUDA_ON_HOST_REVERSED the last warp first, or, with CUDA_ON_HOST_SEED other
// than 0, in a random order made from the seed. So warps are as far apart as the barriers allow, and a missing barrier shows. A barrier
// that not all threads reach ends the process. Clusters run one after another; a block without clusters is a cluster of one, so __shared__
// is a static variable there. With CUDA_ON_HOST_PROXIES it is recorded which thread last changed each byte of dynamic shared memory, and
// whether it has fenced that byte for the copy engine. Only what the kernels of this project use is implemented; a launch
// `kernel<<<grid, block, shared, stream>>>(arguments)` must have been rewritten to cuda_on_host::launch(kernel, grid, ..., arguments).
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
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

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started, done;
  unsigned stores = 0;  // bulk stores in flight
};

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};

struct Block {
  Barrier barrier, warps[32];
  double shuffled[32][32];
  std::vector<char> memory;  // dynamic shared
  char* shared = nullptr;
  std::vector<char> seen;          // its content when a thread last stopped; empty without CUDA_ON_HOST_PROXIES
  std::vector<unsigned> unfenced;  // the thread that changed a byte since, plus 1; 0: the copy engine may read it
};

struct Copy {  // a bulk copy, carried out some time after it was requested
  std::function<void()> run;
};

inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<Block>> blocks;
inline std::vector<Copy> copies;
inline std::vector<const void*> message_barriers;  // barriers at which messages of other blocks were counted
inline Barrier cluster_barrier;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline std::function<void()> body;
inline unsigned current, threads_per_block;
inline bool progress;
inline int launches = 0;
inline std::mt19937 dice;
inline unsigned seed = 0;

inline bool chance(unsigned percent) { return seed != 0 && dice() % 100 < percent; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (thread %u)\n", what, current);
  std::abort();
}

inline bool counts_messages(const void* barrier) {
  return std::find(message_barriers.begin(), message_barriers.end(), barrier) != message_barriers.end();
}
inline unsigned block_index() { return current / threads_per_block; }
inline Block& block() { return *blocks[block_index()]; }
inline bool block_left(unsigned index) {  // whether any of its threads has returned
  for (unsigned i = 0; i < threads_per_block; ++i)
    if (fibers[index * threads_per_block + i].done) return true;
  return false;
}

// Attributes every change of the block's memory since the last call to the running thread.
inline void note_writes() {
  Block& here = block();
  for (size_t i = 0; i < here.seen.size(); ++i) {
    if (here.seen[i] != here.memory[i]) here.seen[i] = here.memory[i], here.unfenced[i] = current + 1;
  }
}
// Changes by the copy engine and by messages of other blocks, which no thread made.
inline void note_arrival(Block& block, const void* first, size_t bytes) {
  if (block.seen.empty()) return;
  const size_t at = static_cast<size_t>(static_cast<const char*>(first) - block.memory.data());
  std::copy_n(block.memory.begin() + static_cast<std::ptrdiff_t>(at), bytes, block.seen.begin() + static_cast<std::ptrdiff_t>(at));
  std::fill_n(block.unfenced.begin() + static_cast<std::ptrdiff_t>(at), bytes, 0u);
}
inline bool all_fenced(const Block& block, const void* first, size_t bytes) {
  if (block.seen.empty()) return true;
  const auto at = block.unfenced.begin() + (static_cast<const char*>(first) - block.memory.data());
  return std::all_of(at, at + static_cast<std::ptrdiff_t>(bytes), [](unsigned by) { return by == 0; });
}

inline void yield() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  } else {
    while (barrier.generation == generation) yield();
  }
}

inline void run_fiber() {
  body();
  fibers[current].done = progress = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {  // _setjmp instead of swapcontext, which makes a system call each time
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Carries out one of the pending copies, chosen at random; in the first two orders all of them, last first.
inline bool run_copies() {
  bool any = false;
  while (!copies.empty() && (seed == 0 || !any || chance(50))) {
    const size_t which = seed == 0 ? copies.size() - 1 : dice() % copies.size();
    std::swap(copies[which], copies.back());
    const Copy copy = std::move(copies.back());
    copies.pop_back();
    copy.run();
    any = true;
  }
  return any;
}

inline void run_cluster(unsigned first_block, unsigned size, unsigned threads, size_t shared) {
  constexpr size_t kStack = 64 * 1024;
  threads_per_block = threads;
  while (blocks.size() < size) blocks.push_back(std::make_unique<Block>());
  for (unsigned b = 0; b < size; ++b) {
    Block& block = *blocks[b];
    block.barrier = {threads};
    for (Barrier& warp : block.warps) warp = {32};
    block.memory.assign(shared + 128, static_cast<char>(0xff));  // NaN until it is written
    const bool watched = std::getenv("CUDA_ON_HOST_PROXIES") != nullptr;
    block.seen = watched ? block.memory : std::vector<char>();
    block.unfenced.assign(block.seen.size(), 0);
    block.shared = block.memory.data() + (128 - reinterpret_cast<uintptr_t>(block.memory.data()) % 128) % 128;
  }
  const unsigned all = size * threads;
  message_barriers.clear();
  cluster_barrier = {all};
  if (fibers.size() < all) fibers.resize(all);
  for (unsigned thread = 0; thread < all; ++thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    fiber.started = fiber.done = false;
    fiber.stores = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const bool reversed = std::getenv("CUDA_ON_HOST_REVERSED") != nullptr;
  const char* seed_text = std::getenv("CUDA_ON_HOST_SEED");
  seed = seed_text ? static_cast<unsigned>(std::atoi(seed_text)) : 0;
  if (seed != 0) dice.seed(seed);
  std::vector<unsigned> order(all / 32);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = reversed ? static_cast<unsigned>(order.size()) - 1 - i : i;
  for (unsigned done = 0; done < all;) {
    bool stuck = true;
    if (seed != 0) std::shuffle(order.begin(), order.end(), dice);
    for (const unsigned warp : order) {
      do {
        progress = false;
        for (unsigned lane = 0; lane < 32; ++lane) {
          current = warp * 32 + (reversed ? 31 - lane : lane);
          if (fibers[current].done) continue;
          threadIdx.x = current % threads;
          blockIdx.x = first_block + current / threads;
          resume(fibers[current]);
          note_writes();
          done += fibers[current].done;
        }
        stuck = stuck && !progress;
      } while (progress && !chance(30));
      if (chance(30) && run_copies()) stuck = false;
    }
    if ((seed == 0 || stuck) && run_copies()) stuck = false;
    if (done < all && stuck) fail("deadlock: threads wait at different barriers");
  }
  if (!copies.empty()) fail("the kernel returned before its copies were done");
}

template <typename Kernel, typename... Arguments>
void launch_clusters(Kernel kernel, int64_t count, unsigned size, unsigned threads, size_t shared, const Arguments&... arguments) {
  ++launches;
  body = [&] { kernel(arguments...); };
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(count);
  for (int64_t first = 0; first < count; first += size) run_cluster(static_cast<unsigned>(first), size, threads, shared);
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t count, unsigned threads, size_t shared, cudaStream_t, Arguments... arguments) {
  launch_clusters(kernel, count, 1, threads, shared, arguments...);
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block().barrier); }
inline void __syncwarp() { cuda_on_host::wait(cuda_on_host::block().warps[threadIdx.x / 32]); }

inline double __shfl_xor_sync(unsigned, double x, int distance) {
  using namespace cuda_on_host;
  Block& here = block();
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  here.shuffled[warp][lane] = x;
  wait(here.warps[warp]);
  const double other = here.shuffled[warp][lane ^ static_cast<unsigned>(distance)];
  wait(here.warps[warp]);
  return other;
}

extern "C" int cuda_on_host_launches() { return cuda_on_host::launches; }

// The API that a launch of clusters uses. CUDA_ON_HOST_CLUSTERS (default 3) are resident at once.
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension };
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 232448;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  const char* text = std::getenv("CUDA_ON_HOST_CLUSTERS");
  *clusters = text ? std::atoi(text) : 3;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const unsigned size = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  cuda_on_host::launch_clusters(kernel, config->gridDim.x, size, config->blockDim.x, config->dynamicSmemBytes, arguments...);
  return cudaSuccess;
}
