// The GPU instructions that the cluster kernel uses (PTX ISA 8.1, compute capability 9.0), one function each. The tests replace this file
// by tests/cuda_on_host/cluster_primitives.h and run the same kernel on the CPU, so everything that only a GPU has belongs here.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace grpo_fast {
namespace gpu {

using Barrier = uint64_t;  // an mbarrier in shared memory

struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define GF_HAS_CLUSTERS 1

extern __shared__ __align__(128) char dynamic_shared[];
__device__ __forceinline__ char* shared_memory() { return dynamic_shared; }
__device__ __forceinline__ uint32_t address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}
// Between the inits and the cluster barrier: makes the barriers visible to other blocks and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
// Arrives, and makes the phase also wait for this many bytes of bulk copies or messages.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
#define GF_WAIT(barrier, parity, scope)                                                                                                \
  uint32_t done;                                                                                                                       \
  do {                                                                                                                                 \
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" \
                 : "=r"(done)                                                                                                          \
                 : "r"(address(barrier)), "r"(parity)                                                                                  \
                 : "memory");                                                                                                          \
  } while (!done)
// Waits until the phase of this parity is complete. Writes of threads of this block before their arrival, and bulk copies, are visible
// afterwards.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) { GF_WAIT(barrier, parity, "cta"); }
// The same for what other blocks have sent. Separate, because on sm_90 each such wait invalidates L1 (CCTL.IVALL, counted by
// tools/sass.py).
__device__ __forceinline__ void barrier_wait_cluster(Barrier* barrier, uint32_t parity) { GF_WAIT(barrier, parity, "cluster"); }
#undef GF_WAIT

// Writes four floats to `slot` of block `rank`, which count as 16 bytes at `barrier` there. Both addresses are those of this block. An
// asynchronous store, because an ordinary store followed by an arrival needs a fence of the whole GPU on sm_90 (MEMBAR, counted as well).
__device__ __forceinline__ void send(float4 value, float4* slot, Barrier* barrier, uint32_t rank) {
  uint32_t remote_slot, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_slot) : "r"(address(slot)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(address(barrier)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote_slot),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_barrier)
               : "memory");
}

// Bulk copies: both addresses and the number of bytes are multiples of 16.
__device__ __forceinline__ void load_bulk(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(address(barrier))
               : "memory");
}
__device__ __forceinline__ void store_bulk(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)), "r"(address(shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until the bulk stores of this thread have read shared memory (store_wait_read) or are complete (store_wait).
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders a thread's own accesses to shared memory before a bulk copy of the same bytes.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {  // ignores NaN
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

__device__ __forceinline__ float exp2_approx(float t) {  // 2 ulp; 2^-inf is 0
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
}
__device__ __forceinline__ float divide_approx(float a, float b) { return __fdividef(a, b); }  // 2 ulp

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Rounded to the nearest, ties to even.
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, BFloat* out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x)); }
__device__ __forceinline__ void from_float(float x, Half* out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x)); }

// A 32-bit word as two values.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<BFloat>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<Half>(uint32_t word) {
  return make_float2(to_float(Half{static_cast<uint16_t>(word)}), to_float(Half{static_cast<uint16_t>(word >> 16)}));
}
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
// The larger of each of the two; ignores NaN.
template <typename T>
__device__ __forceinline__ uint32_t max_two(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_two<BFloat>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
template <>
__device__ __forceinline__ uint32_t max_two<Half>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }
#endif

}  // namespace gpu
}  // namespace grpo_fast
