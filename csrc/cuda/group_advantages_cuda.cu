// Group-relative advantages on the GPU: a warp or a block per group runs ../group_advantages.h, in one launch for any number of groups.
//
// Bitwise the same from run to run: each thread takes its rows in order, threads are combined in a fixed tree, and there are no atomics.
// Where a statistic of the whole batch is needed (scale "batch" or "tokens", GDPO), one block runs both stages of a small batch in the same
// launch; a large batch takes a second launch, in which every block combines the moments of the groups itself, in the same order.
#include <cuda_runtime.h>

#include <algorithm>

#include "../group_advantages.h"

namespace {

using grpo_fast::GroupAdvantagesArgs;

constexpr int kWarpSize = 32;
constexpr int64_t kRowsPerWarp = 512;    // on average; longer groups get a block each
constexpr int64_t kRowsOneBlock = 8192;  // up to here one block for both stages beats a second launch
constexpr int64_t kMaxBlocks = 65536;    // a block then takes several groups

struct Sum {
  __device__ static double combine(double a, double b) { return a + b; }
};
struct Min {
  __device__ static double combine(double a, double b) { return a < b ? a : b; }
};
struct Max {
  __device__ static double combine(double a, double b) { return a > b ? a : b; }
};

// kWarps warps that share one group. `partials` is the block's scratch of kWarps doubles, unused by a single warp.
template <int kWarps>
struct Team {
  double* partials;

  __device__ int64_t rank() const { return threadIdx.x % (kWarps * kWarpSize); }
  __device__ int64_t size() const { return kWarps * kWarpSize; }
  __device__ double sum(double x) const { return all<Sum>(x); }
  __device__ double min(double x) const { return all<Min>(x); }
  __device__ double max(double x) const { return all<Max>(x); }
  __device__ void sync() const { kWarps == 1 ? __syncwarp() : __syncthreads(); }

  template <typename Op>
  __device__ double all(double x) const {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = Op::combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
    if (kWarps == 1) return x;
    __syncthreads();  // the partials of the reduction before have been read
    if (threadIdx.x % kWarpSize == 0) partials[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    double total = partials[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total = Op::combine(total, partials[warp]);
    return total;
  }
};

enum Stages { kNormalize = 1, kScale = 2 };

template <int kTeamWarps, int kBlockWarps>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize, 1)
    _group_advantages_kernel(const __grid_constant__ GroupAdvantagesArgs args, int stages) {
  static_assert(kTeamWarps == 1 || kTeamWarps == kBlockWarps, "a team is a warp or the whole block");
  __shared__ double partials[kBlockWarps];
  constexpr int kTeams = kBlockWarps / kTeamWarps;
  if (stages & kNormalize) {
    const Team<kTeamWarps> team{partials};
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / (kTeamWarps * kWarpSize);
    for (int64_t g = first; g < args.num_groups; g += static_cast<int64_t>(gridDim.x) * kTeams) normalize_group(team, args, g);
  }
  if (stages & kScale) {
    __syncthreads();  // one block for both stages: its groups are done; two launches: the first has finished
    const grpo_fast::BatchScale batch = batch_scale(Team<kBlockWarps>{partials}, args);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < args.num_rows; row += stride) {
      scale_row(args, row, batch);
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kTeamWarps, int kBlockWarps>
cudaError_t launch(const GroupAdvantagesArgs& args, cudaStream_t stream) {
  constexpr int kThreads = kBlockWarps * kWarpSize;
  const bool one_block = args.uses_batch() && args.num_rows <= kRowsOneBlock && args.num_groups <= kRowsOneBlock;
  const int64_t blocks = one_block ? 1 : std::min(kMaxBlocks, ceil_div(args.num_groups, kBlockWarps / kTeamWarps));
  const int stages = one_block ? kNormalize | kScale : kNormalize;
  _group_advantages_kernel<kTeamWarps, kBlockWarps><<<blocks, kThreads, 0, stream>>>(args, stages);
  if (args.uses_batch() && !one_block) {
    // Few blocks: each of them reads all groups' moments before its first row.
    const int64_t scale_blocks = std::min<int64_t>(128, ceil_div(args.num_rows, kThreads));
    if (scale_blocks > 0) _group_advantages_kernel<kTeamWarps, kBlockWarps><<<scale_blocks, kThreads, 0, stream>>>(args, kScale);
  }
  return cudaGetLastError();
}

}  // namespace

// Returns null, or CUDA's error message.
extern "C" const char* group_advantages_cuda_launch(const GroupAdvantagesArgs* args, void* stream) {
  const bool short_groups = args->num_rows <= kRowsPerWarp * args->num_groups;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = short_groups ? launch<1, 8>(*args, cuda_stream) : launch<16, 16>(*args, cuda_stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
