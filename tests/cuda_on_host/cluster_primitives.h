// Replaces csrc/cuda/cluster_primitives.h in the tests: its functions on the CPU. Bulk copies and messages to other blocks are carried out
// some time after they were requested, in another order; until then their target holds NaN. What would be an error on hardware ends the
// process: an address or a size that is not a multiple of 16, an arrival too many, a message to a block that has returned.
#pragma once
#include <cuda_runtime.h>

#define GF_HAS_CLUSTERS 1

namespace grpo_fast {
namespace gpu {

using Barrier = uint64_t;
struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

struct BarrierState {
  uint16_t expected, pending;
  int32_t parity_and_bytes;  // bytes * 2 + the running phase's parity
};
static_assert(sizeof(BarrierState) == sizeof(Barrier), "an mbarrier has 64 bits");

inline void complete_if_over(BarrierState* state) {
  if (state->pending != 0 || (state->parity_and_bytes >> 1) != 0) return;
  state->pending = state->expected;
  state->parity_and_bytes ^= 1;
  cuda_on_host::progress = true;
}
inline BarrierState* state_of(Barrier* barrier) { return reinterpret_cast<BarrierState*>(barrier); }
inline void sometimes_yield() {
  if (!cuda_on_host::chance(20)) return;
  cuda_on_host::progress = true;
  cuda_on_host::yield();
}

inline char* shared_memory() { return cuda_on_host::block().shared; }
inline uint32_t cluster_size() { return cuda_on_host::cluster_barrier.size / cuda_on_host::threads_per_block; }
inline uint32_t cluster_rank() { return cuda_on_host::block_index(); }
inline void cluster_barrier() { cuda_on_host::wait(cuda_on_host::cluster_barrier); }

inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  *state_of(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void barrier_init_fence() {}
inline void arrive(Barrier* barrier, uint32_t bytes) {
  BarrierState* state = state_of(barrier);
  if (state->pending == 0) cuda_on_host::fail("an arrival too many at an mbarrier");
  state->parity_and_bytes += static_cast<int32_t>(bytes) * 2;
  state->pending--;
  complete_if_over(state);
}
inline void barrier_arrive(Barrier* barrier) {
  arrive(barrier, 0);
  sometimes_yield();
}
inline void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) { arrive(barrier, bytes); }
inline void barrier_wait_cluster(Barrier* barrier, uint32_t parity) {
  sometimes_yield();
  while ((static_cast<uint32_t>(state_of(barrier)->parity_and_bytes) & 1) == parity) cuda_on_host::yield();
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  barrier_wait_cluster(barrier, parity);
  if (cuda_on_host::counts_messages(barrier)) cuda_on_host::fail("a wait of the block's scope for what other blocks have sent");
}

inline void complete(Barrier* barrier, uint32_t bytes) {
  state_of(barrier)->parity_and_bytes -= static_cast<int32_t>(bytes) * 2;
  complete_if_over(state_of(barrier));
}
inline void send(float4 value, float4* slot, Barrier* barrier, uint32_t rank) {
  char *own = shared_memory(), *other = cuda_on_host::blocks[rank]->shared;
  auto* there = reinterpret_cast<float4*>(other + (reinterpret_cast<char*>(slot) - own));
  auto* counted = reinterpret_cast<Barrier*>(other + (reinterpret_cast<char*>(barrier) - own));
  if (!cuda_on_host::counts_messages(counted)) cuda_on_host::message_barriers.push_back(counted);
  *there = make_float4(NAN, NAN, NAN, NAN);
  cuda_on_host::note_arrival(*cuda_on_host::blocks[rank], there, sizeof(float4));
  cuda_on_host::copies.push_back({[=] {
    if (cuda_on_host::block_left(rank)) cuda_on_host::fail("a message to a block that has returned");
    *there = value;
    cuda_on_host::note_arrival(*cuda_on_host::blocks[rank], there, sizeof(float4));
    complete(counted, sizeof(float4));
  }});
}

inline void check_bulk(const void* a, const void* b, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(a) % 16 || reinterpret_cast<uintptr_t>(b) % 16 || bytes % 16 || bytes == 0) {
    cuda_on_host::fail("a bulk copy of other than whole, aligned 16 bytes");
  }
}
inline void load_bulk(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  check_bulk(shared, global, bytes);
  cuda_on_host::Block* here = &cuda_on_host::block();
  std::memset(shared, 0xff, bytes);
  cuda_on_host::note_arrival(*here, shared, bytes);
  cuda_on_host::copies.push_back({[=] {
    std::memcpy(shared, global, bytes);
    cuda_on_host::note_arrival(*here, shared, bytes);
    complete(barrier, bytes);
  }});
}
inline void store_bulk(void* global, const void* shared, uint32_t bytes) {
  check_bulk(shared, global, bytes);
  const unsigned thread = cuda_on_host::current;
  cuda_on_host::note_writes();
  if (!cuda_on_host::all_fenced(cuda_on_host::block(), shared, bytes)) {
    cuda_on_host::fail("a bulk copy of what a thread has written and not fenced");
  }
  ++cuda_on_host::fibers[thread].stores;
  cuda_on_host::copies.push_back({[=] {
    std::memcpy(global, shared, bytes);
    --cuda_on_host::fibers[thread].stores;
    cuda_on_host::progress = true;
  }});
}
inline void store_commit() {}
inline void store_wait_read() {
  while (cuda_on_host::fibers[cuda_on_host::current].stores > 0) cuda_on_host::yield();
}
inline void store_wait() { store_wait_read(); }
inline void fence_async() {
  cuda_on_host::note_writes();
  for (unsigned& by : cuda_on_host::block().unfenced) by = by == cuda_on_host::current + 1 ? 0 : by;
}

inline void warp_barrier() { cuda_on_host::wait(cuda_on_host::block().warps[threadIdx.x / 32]); }
template <typename Combine>
float warp_tree(float x, const Combine& combine) {  // the tree of the shuffles, with one synchronization of the lanes instead of five
  cuda_on_host::Block& block = cuda_on_host::block();
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  block.shuffled[warp][lane] = x;
  warp_barrier();
  float value[32];
  for (unsigned i = 0; i < 32; ++i) value[i] = static_cast<float>(block.shuffled[warp][i]);
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    float next[32];
    for (unsigned i = 0; i < 32; ++i) next[i] = combine(value[i], value[i ^ distance]);
    std::copy(next, next + 32, value);
  }
  warp_barrier();
  return value[lane];
}
inline float warp_sum(float x) {
  return warp_tree(x, [](float a, float b) { return a + b; });
}
inline float warp_max(float x) {
  return warp_tree(x, [](float a, float b) { return std::fmax(a, b); });
}

inline float exp2_approx(float t) {  // flushes subnormal results to zero, as the instruction does
  const float e = std::exp2(t);
  return e < 1.17549435e-38f ? 0.0f : e;
}
inline float divide_approx(float a, float b) { return a / b; }

template <typename To, typename From>
To bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline uint32_t float_bits(float x) { return bits<uint32_t>(x); }
inline float bits_float(uint32_t x) { return bits<float>(x); }

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) { return bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float special = mantissa ? NAN : INFINITY;
  const float a =
      exponent == 31 ? special : std::ldexp(static_cast<float>(exponent ? 1024 + mantissa : mantissa), std::max(exponent, 1) - 25);
  return x.bits & 0x8000 ? -a : a;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat* out) {
  const uint32_t u = bits<uint32_t>(x);
  out->bits = static_cast<uint16_t>(x != x ? 0x7fff : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_float(float x, Half* out) {
  const float a = std::fabs(x);
  int exponent = 0;
  std::frexp(a, &exponent);
  exponent = std::max(exponent - 11, -24);  // of the last digit
  const int finite = a == 0         ? 0
                     : a < 65520.0f ? (exponent + 24) * 1024 + static_cast<int>(std::nearbyint(std::ldexp(a, -exponent)))
                                    : 0x7c00;
  out->bits = static_cast<uint16_t>((x != x ? 0x7fff : finite) | (std::signbit(x) ? 0x8000 : 0));
}
template <typename T>
float2 unpack(uint32_t word) {
  return {to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})};
}
template <typename T>
uint32_t pack(float low, float high) {
  T a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
template <typename T>
uint32_t max_two(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(std::fmax(x.x, y.x), std::fmax(x.y, y.y));
}

}  // namespace gpu
}  // namespace grpo_fast
