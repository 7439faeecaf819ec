// The loss with token-level ratios, on GPUs with thread-block clusters: logits are read once and the gradient is written once.
//
// A row stays on chip: each block of a cluster holds a slice of it in shared memory, in one stage of a ring. The warps of a block have
// roles:
//
//   loader    loads the inputs of a row (ids, mask, weights, the target's logit) and starts the bulk copy of its slice: `full`
//   consumers sum 2^t and t * 2^t over the slice, each warp separately: `summed`; later they overwrite it with the gradient: `done`
//   finisher  adds the sums of the block's warps, exchanges three numbers with the other blocks (`exchanged`), and computes the row's
//             statistics, loss, g and h: `ready`; in block 0 it also writes the results of the row
//   storer    starts the bulk copy of the gradient, and frees the stage when it has been read: `empty`
//
// Consumers sum row i + 1 before they write the gradient of row i, so that they do not wait for the exchange. No output of a row is written
// before every block has sent its sums, and a block reads all that it needs of the row from global memory before it sends: the gradient may
// overwrite the logits.
//
// Each warp first computes its own maximum, from shared memory and for 16-bit logits two at a time: half an instruction per logit. An
// estimate, as in kernels/fused/rowwise.py, would save that, but t = k * f - reference is rounded relative to its own size: with the
// largest logit at t = 12, entropies were off by 1e-6. The column of the target becomes -inf on chip, which excludes it from sums and
// gradient; its own gradient is stored separately. The elements before the first and after the last 16-byte boundary of a row (its edges)
// are handled one by one in block 0.
//
// The results are the same bits from run to run: no atomics, fixed orders, and the result of a row does not depend on its cluster.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "cluster_primitives.h"
#include "grpo_loss_cluster.h"

#ifndef GF_CONSUMER_WARPS  // the tests use fewer
#define GF_CONSUMER_WARPS 16
#endif
#ifndef GF_TOTAL_THREADS
#define GF_TOTAL_THREADS 512
#endif

namespace grpo_fast {
namespace {

constexpr int kConsumerWarps = GF_CONSUMER_WARPS, kConsumers = 32 * kConsumerWarps;
enum Role { kLoader, kFinisher, kStorer, kRoles };  // one warp each, then the consumers
constexpr int kThreads = 32 * kRoles + kConsumers;
constexpr int kMaxCluster = 8, kMaxStages = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(GF_HAS_CLUSTERS)
using namespace gpu;

constexpr int kMaxEdges = 16;
constexpr uint32_t kCopyBytes = 32768;  // of one bulk copy
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr float kExponentFloor = -1000.0f;  // lower bound of t in t * 2^t, which would be 0 * inf for a logit of -inf

enum Fill : int32_t { kCompute, kZeros, kNaNs };

struct RowSlot {  // the state of the row in a stage, shared by the roles
  // Written by the loader.
  float edges[kMaxEdges];
  int32_t head, edge_count;     // elements before the first boundary, and at both edges together; 0 except in block 0
  int32_t vectors;              // of this block's slice
  int32_t target, target_edge;  // the target's place in the slice or among the edges, or -1
  bool has_sums;                // computed, with an id in range; otherwise the row is not loaded
  bool direct;                  // logits and gradient have different 16-byte offsets: the gradient is stored element by element
  float k, slope;
  double f_target;  // double, because a soft cap multiplies its error by the cap
  float cap_slope;  // the soft cap's derivative at the target
  char *out_row, *out_slice;
  int64_t token;  // in [B * T], or -1
  uint32_t flags;
  PolicyToken<float> policy;
  // Written by the finisher.
  Fill fill;
  float pivot, constant, linear, at_target;
};

struct Shared {
  Barrier full[kMaxStages], empty[kMaxStages], ready[kMaxStages], done[kMaxStages], summed[2], exchanged[2];
  float4 warp_sums[2][kConsumerWarps];  // reference, sum 2^t, sum t * 2^t
  float4 packets[2][kMaxCluster];       // the same of each block
  RowSlot rows[kMaxStages];
};
constexpr int64_t kSharedHead = (sizeof(Shared) + 127) / 128 * 128;

struct RowSchedule {  // the rows of a cluster and their stages, the same in every role
  int64_t row, step, rows;
  int stages, stage = 0;
  uint32_t parity = 0;

  __device__ RowSchedule(const ClusterLossArgs& args, int stages)
      : row(blockIdx.x / cluster_size()), step(gridDim.x / cluster_size()), rows(args.sequences * args.positions), stages(stages) {}
  __device__ bool any() const { return row < rows; }
  __device__ void next() {
    row += step;
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

struct Exchanges {  // slots for the rows that have sums: two, in alternation
  int slot = 0;
  uint32_t parity = 0;
  __device__ void next() {
    slot ^= 1;
    if (slot == 0) parity ^= 1;
  }
};

// f(z): z, or tanh(z * cap_scale) with a soft cap: Cephes' polynomial near 0 (S. Moshier), 1 - 2 q elsewhere, q = e^-2|x| / (1 + e^-2|x|).
// cap_slope becomes q - q^2, a quarter of its derivative, which keeps its digits where f is almost 1 and 1 - f^2 has none.
template <bool kCapped>
__device__ __forceinline__ float scored(float z, float cap_scale, float* cap_slope) {
  if (!kCapped) return z;
  const float x = z * cap_scale, x2 = x * x, a = fabsf(x);
  float p = fmaf(x2, -5.70498872745e-3f, 2.06390887954e-2f);
  p = fmaf(x2, p, -5.37397155531e-2f);
  p = fmaf(x2, p, 1.33314422036e-1f);
  p = fmaf(x2, p, -3.33332819422e-1f);
  const float e = exp2_approx(a * static_cast<float>(-2 * kLog2E));
  const float q = divide_approx(e, 1.0f + e), large = copysignf(fmaf(q, -2.0f, 1.0f), x);
  *cap_slope = fmaf(-q, q, q);
  return a >= 0.625f ? large : fmaf(x * x2, p, x);  // NaN stays NaN
}

template <bool kCapped>
__device__ __forceinline__ float scored(float z, float cap_scale) {
  float cap_slope;
  return scored<kCapped>(z, cap_scale, &cap_slope);
}

// A vector of 16 bytes as floats, and back.
template <typename T>
struct Vector {
  static constexpr int kWidth = 8;
  static __device__ __forceinline__ void unpack_all(uint4 words, float (&x)[kWidth]) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack<T>(word[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ uint4 pack_all(const float (&x)[kWidth]) {
    return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
  }
  using Largest = uint32_t;  // two running maxima, which ignore NaN
  static __device__ __forceinline__ Largest least() { return pack<T>(-INFINITY, -INFINITY); }
  static __device__ __forceinline__ Largest larger(Largest top, uint4 words) {
    return max_two<T>(top, max_two<T>(max_two<T>(words.x, words.y), max_two<T>(words.z, words.w)));
  }
  static __device__ __forceinline__ float in_float(Largest top) {
    const float2 two = unpack<T>(top);
    return fmaxf(two.x, two.y);
  }
};
template <>
struct Vector<float> {
  static constexpr int kWidth = 4;
  static __device__ __forceinline__ void unpack_all(uint4 words, float (&x)[kWidth]) {
    x[0] = bits_float(words.x), x[1] = bits_float(words.y), x[2] = bits_float(words.z), x[3] = bits_float(words.w);
  }
  static __device__ __forceinline__ uint4 pack_all(const float (&x)[kWidth]) {
    return make_uint4(float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3]));
  }
  using Largest = float;
  static __device__ __forceinline__ Largest least() { return -INFINITY; }
  static __device__ __forceinline__ Largest larger(Largest top, uint4 words) {
    return fmaxf(top, fmaxf(fmaxf(bits_float(words.x), bits_float(words.y)), fmaxf(bits_float(words.z), bits_float(words.w))));
  }
  static __device__ __forceinline__ float in_float(Largest top) { return top; }
};

// Loader ---------------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Fetched {  // what the lanes of the loader have loaded of one row from global memory
  RowSlot row;    // the part that the loader writes
  float edge;     // of this lane
  const char* slice;
};

template <typename T, bool kCapped>
__device__ void fetch(const ClusterLossArgs& args, int64_t row, int64_t slice_vectors, uint32_t rank, int lane, Fetched<T>& out) {
  constexpr int kWidth = Vector<T>::kWidth;
  const int64_t b = row / args.positions, t = row % args.positions;
  RowSlot& slot = out.row;
  slot.token = t < args.length ? b * args.length + t : -1;
  slot.flags = 0;
  slot.policy.advantage = 0;
  if (slot.token >= 0 && args.mask.at(b, t)) {
    slot.policy.advantage = args.advantages.at(b, t);
    const bool active = args.all_active || slot.policy.advantage != 0;
    slot.flags = kCounts;
    if (active) slot.flags |= kActive;
    if (active || !args.only_active) slot.flags |= kComputed;
  }
  const bool computed = slot.flags & kComputed;
  const int64_t id = computed ? args.token_ids.at(b, t) : -1;
  slot.has_sums = id >= 0 && id < args.vocabulary;

  const char* in = args.logits + (b * args.logits_strides[0] + t * args.logits_strides[1]) * static_cast<int64_t>(sizeof(T));
  char* const gradient = args.gradient ? args.gradient : const_cast<char*>(args.logits);
  const int64_t* strides = args.gradient ? args.gradient_strides : args.logits_strides;
  slot.out_row = gradient + (b * strides[0] + t * strides[1]) * static_cast<int64_t>(sizeof(T));
  slot.direct = ((reinterpret_cast<uintptr_t>(in) ^ reinterpret_cast<uintptr_t>(slot.out_row)) & 15) != 0;
  // If the logits are not read, the alignment of the gradient determines the edges.
  if (!slot.has_sums) in = slot.out_row, slot.direct = false;

  const int64_t offset = static_cast<int64_t>((16 - (reinterpret_cast<uintptr_t>(in) & 15)) & 15) / static_cast<int64_t>(sizeof(T));
  const int64_t head = offset < args.vocabulary ? offset : args.vocabulary;
  const int64_t vectors = (args.vocabulary - head) / kWidth, tail = args.vocabulary - head - vectors * kWidth;
  const int64_t first = slice_vectors * rank, left = vectors - first;
  slot.vectors = static_cast<int32_t>(left < 0 ? 0 : left < slice_vectors ? left : slice_vectors);
  slot.head = rank == 0 ? static_cast<int32_t>(head) : 0;
  slot.edge_count = rank == 0 ? static_cast<int32_t>(head + tail) : 0;
  out.slice = in + (head + first * kWidth) * static_cast<int64_t>(sizeof(T));
  slot.out_slice = slot.out_row + (head + first * kWidth) * static_cast<int64_t>(sizeof(T));

  slot.target = slot.target_edge = -1;
  out.edge = 0;
  slot.k = args.k, slot.slope = args.slope, slot.f_target = 0;
  if (slot.has_sums) {
    const T* logits = reinterpret_cast<const T*>(in);
    const int64_t inside = id - head;
    if (inside >= 0 && inside < vectors * kWidth) {
      const int64_t in_slice = inside - first * kWidth;
      if (in_slice >= 0 && in_slice < slot.vectors * kWidth) slot.target = static_cast<int32_t>(in_slice);
    } else if (rank == 0) {
      slot.target_edge = static_cast<int32_t>(id < head ? id : id - vectors * kWidth);
    }
    if (lane < slot.edge_count) out.edge = to_float(logits[lane < slot.head ? lane : lane + vectors * kWidth]);
    slot.f_target = to_float(logits[id]);
    if (kCapped) {
      const double x = slot.f_target * args.cap_scale, e = exp(-2 * fabs(x)), c = (e + e) / (1 + e);
      slot.f_target = tanh(x), slot.cap_slope = static_cast<float>(c * (2 - c));
    }
    if (args.temperatures.given()) {
      const float temperature = args.temperatures.at(b, t);
      slot.k = args.k / temperature, slot.slope = args.slope / temperature;
    }
  }
  if (computed) {
    PolicyToken<float>& token = slot.policy;
    token.has_old = args.old_logprobs.given(), token.has_ref = args.ref_logprobs.given();
    token.old_logprob = args.old_logprobs.at(b, t), token.ref_logprob = args.ref_logprobs.at(b, t);
    token.rollout_weight = args.rollout_weights.at(b, t, 1.0f);
    token.weight = static_cast<float>(args.weights.at(b, t) * args.loss_scale);
    token.entropy_weight = static_cast<float>(args.entropy_weights.at(b, t) * args.loss_scale);
  }
}

template <typename T, bool kCapped>
__device__ void load_rows(const ClusterLossArgs& args, Shared& shared, char* slices, int64_t slice_vectors, int stages, int lane) {
  const uint32_t rank = cluster_rank();
  RowSchedule schedule(args, stages);
  Fetched<T> fetched;
  if (schedule.any()) fetch<T, kCapped>(args, schedule.row, slice_vectors, rank, lane, fetched);
  for (bool again = false; schedule.any();) {
    if (again) barrier_wait(&shared.empty[schedule.stage], schedule.parity ^ 1);
    RowSlot& slot = shared.rows[schedule.stage];
    if (lane == 0) slot = fetched.row;
    warp_barrier();  // the slot is complete before its edges are written
    if (lane < kMaxEdges) slot.edges[lane] = fetched.edge;
    warp_barrier();
    if (lane == 0) {
      const uint32_t bytes = fetched.row.has_sums ? 16u * static_cast<uint32_t>(fetched.row.vectors) : 0u;
      barrier_arrive_expect(&shared.full[schedule.stage], bytes);
      char* slice = slices + schedule.stage * slice_vectors * 16;
      for (uint32_t at = 0; at < bytes; at += kCopyBytes) {
        load_bulk(slice + at, fetched.slice + at, bytes - at < kCopyBytes ? bytes - at : kCopyBytes, &shared.full[schedule.stage]);
      }
    }
    schedule.next();
    again = again || schedule.stage == 0;
    if (schedule.any()) fetch<T, kCapped>(args, schedule.row, slice_vectors, rank, lane, fetched);  // overlaps with the use of the stage
  }
}

// Consumers ------------------------------------------------------------------------------------------------------------------------

// Whether this lane has an element of the edges other than the target.
__device__ __forceinline__ bool has_edge(const RowSlot& slot, int thread) { return thread < slot.edge_count && thread != slot.target_edge; }

__device__ __forceinline__ void add(float f, float k, float reference, float& e_sum, float& et_sum) {
  const float t = fmaf(f, k, -reference), e = exp2_approx(t);
  e_sum += e;
  et_sum = fmaf(e, fmaxf(t, kExponentFloor), et_sum);  // if t is NaN, so is e
}

// f of a vector without the target. The target is -inf on chip, but a soft cap would make it finite.
template <typename T, bool kCapped>
__device__ __forceinline__ void others(const RowSlot& slot, const uint4* slice, int v, float cap_scale, float (&f)[Vector<T>::kWidth]) {
  constexpr int kWidth = Vector<T>::kWidth;
  Vector<T>::unpack_all(slice[v], f);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) f[i] = scored<kCapped>(f[i], cap_scale);
  if (kCapped && slot.target >= 0 && slot.target / kWidth == v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) f[i] = i == slot.target % kWidth ? -INFINITY : f[i];
  }
}

// This warp's (reference, sum 2^t, sum t * 2^t), t = k * f - reference, in every lane; the reference is its largest k * f.
template <typename T, bool kCapped>
__device__ float4 sums(const RowSlot& slot, uint4* slice, int thread, float cap_scale) {
  constexpr int kWidth = Vector<T>::kWidth;
  if (slot.target >= 0 && slot.target / kWidth % kConsumers == thread) from_float(-INFINITY, reinterpret_cast<T*>(slice) + slot.target);
  const int vectors = slot.vectors;
  auto tops = Vector<T>::least();
#pragma unroll 4
  for (int v = thread; v < vectors; v += kConsumers) tops = Vector<T>::larger(tops, slice[v]);
  const bool edge = has_edge(slot, thread);
  float top = Vector<T>::in_float(tops);
  if (edge) top = fmaxf(top, slot.edges[thread]);
  const float k = slot.k;
  float reference = scored<kCapped>(warp_max(top), cap_scale) * k;  // f is increasing in z
  if (reference == -INFINITY) reference = 0;                        // all -inf: every term is 0
  float e_sum = 0, et_sum = 0;
#pragma unroll 2
  for (int v = thread; v < vectors; v += kConsumers) {
    float f[kWidth], e_vector = 0, et_vector = 0;
    others<T, kCapped>(slot, slice, v, cap_scale, f);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) add(f[i], k, reference, e_vector, et_vector);
    e_sum += e_vector;
    et_sum += et_vector;
  }
  add(edge ? scored<kCapped>(slot.edges[thread], cap_scale) : -INFINITY, k, reference, e_sum, et_sum);
  return make_float4(reference, warp_sum(e_sum), warp_sum(et_sum), 0);
}

template <typename T, bool kCapped, bool kEntropy>
__device__ __forceinline__ float derivative(float z, const RowSlot& slot, float cap_scale) {
  float cap_slope = 1.0f;
  const float f = scored<kCapped>(z, cap_scale, &cap_slope), t = fmaf(f, slot.k, -slot.pivot), e = exp2_approx(t);
  float d = kEntropy ? e * fmaf(fmaxf(t, kExponentFloor), slot.linear, slot.constant) : e * slot.constant;
  if (kCapped) d *= cap_slope;
  return d;
}

template <typename T, bool kCapped, bool kEntropy, bool kDirect>
__device__ void write_gradient(const RowSlot& shared_slot, uint4* slice, int64_t vocabulary, int thread, float cap_scale) {
  constexpr int kWidth = Vector<T>::kWidth;
  RowSlot slot;  // a copy in registers, which stores to the slice cannot alias
  slot.k = shared_slot.k, slot.pivot = shared_slot.pivot, slot.constant = shared_slot.constant, slot.linear = shared_slot.linear;
  const int vectors = shared_slot.vectors, target = shared_slot.target;
  T* const out = kDirect ? reinterpret_cast<T*>(shared_slot.out_slice) : reinterpret_cast<T*>(slice);
#pragma unroll 2
  for (int v = thread; v < vectors; v += kConsumers) {
    float d[kWidth];
    Vector<T>::unpack_all(slice[v], d);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) d[i] = derivative<T, kCapped, kEntropy>(d[i], slot, cap_scale);
    if (!kDirect) {
      slice[v] = Vector<T>::pack_all(d);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) from_float(d[i], out + static_cast<int64_t>(v) * kWidth + i);
    }
  }
  if (target >= 0 && target / kWidth % kConsumers == thread) from_float(shared_slot.at_target, out + target);
  if (thread < shared_slot.edge_count) {
    const int64_t column = thread < shared_slot.head ? thread : vocabulary - shared_slot.edge_count + thread;
    const float d = derivative<T, kCapped, kEntropy>(shared_slot.edges[thread], slot, cap_scale);
    from_float(thread == shared_slot.target_edge ? shared_slot.at_target : d, reinterpret_cast<T*>(shared_slot.out_row) + column);
  }
}

// A row whose logits are not needed: zeros, or NaN if the id is out of range.
template <typename T>
__device__ void fill_gradient(const RowSlot& slot, uint4* slice, int64_t vocabulary, int thread) {
  constexpr int kWidth = Vector<T>::kWidth;
  const float filling = slot.fill == kNaNs ? NAN : 0.0f;
  float all[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) all[i] = filling;
  const uint4 vector = Vector<T>::pack_all(all);
  for (int v = thread; v < slot.vectors; v += kConsumers) {
    if (!slot.direct) {
      slice[v] = vector;
    } else {
      T* const out = reinterpret_cast<T*>(slot.out_slice) + static_cast<int64_t>(v) * kWidth;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) from_float(filling, out + i);
    }
  }
  if (thread < slot.edge_count) {
    const int64_t column = thread < slot.head ? thread : vocabulary - slot.edge_count + thread;
    from_float(filling, reinterpret_cast<T*>(slot.out_row) + column);
  }
}

template <typename T, bool kCapped>
__device__ void consume_rows(const ClusterLossArgs& args, Shared& shared, char* slices, int64_t slice_vectors, int stages, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const auto slice_of = [&](const RowSchedule& schedule) { return reinterpret_cast<uint4*>(slices + schedule.stage * slice_vectors * 16); };
  Exchanges exchange;
  const auto take = [&](const RowSchedule& schedule) {
    barrier_wait(&shared.full[schedule.stage], schedule.parity);
    const RowSlot& slot = shared.rows[schedule.stage];
    if (!slot.has_sums) return;
    const float4 own = sums<T, kCapped>(slot, slice_of(schedule), thread, args.cap_scale);
    if (lane == 0) {
      shared.warp_sums[exchange.slot][warp] = own;
      barrier_arrive(&shared.summed[exchange.slot]);
    }
    exchange.next();
  };
  RowSchedule behind(args, stages), ahead = behind;
  if (ahead.any()) take(ahead);
  for (; behind.any(); behind.next()) {
    ahead.next();
    if (ahead.any()) take(ahead);
    barrier_wait(&shared.ready[behind.stage], behind.parity);
    const RowSlot& slot = shared.rows[behind.stage];
    if (args.gradient) {
      uint4* slice = slice_of(behind);
      if (slot.fill != kCompute) {
        fill_gradient<T>(slot, slice, args.vocabulary, thread);
      } else if (slot.linear != 0) {
        if (slot.direct) {
          write_gradient<T, kCapped, true, true>(slot, slice, args.vocabulary, thread, args.cap_scale);
        } else {
          write_gradient<T, kCapped, true, false>(slot, slice, args.vocabulary, thread, args.cap_scale);
        }
      } else if (slot.direct) {
        write_gradient<T, kCapped, false, true>(slot, slice, args.vocabulary, thread, args.cap_scale);
      } else {
        write_gradient<T, kCapped, false, false>(slot, slice, args.vocabulary, thread, args.cap_scale);
      }
    }
    fence_async();
    warp_barrier();
    if (lane == 0) barrier_arrive(&shared.done[behind.stage]);
  }
}

// Finisher -------------------------------------------------------------------------------------------------------------------------

// Combines the sums of several parts of a row, one per lane; every lane gets the result. A part without a finite term does not affect the
// reference.
__device__ float4 merge(float4 own, bool there) {
  const bool counts = there && own.y != 0;
  const float reference = warp_max(counts ? own.x : -INFINITY);
  if (reference == -INFINITY) return make_float4(-INFINITY, 0, 0, 0);
  const float d = counts ? own.x - reference : 0.0f, factor = counts ? exp2f(d) : 0.0f;
  return make_float4(reference, warp_sum(factor * (counts ? own.y : 0.0f)), warp_sum(factor * (counts ? fmaf(d, own.y, own.z) : 0.0f)), 0);
}

struct Statistics {
  float logprob, entropy;
  double lse2;  // log2 of the sum over the whole row
};

// As statistics_of in kernels/fused/rowwise.py, but sums and differences of logarithms are in double, which costs a few instructions.
__device__ Statistics statistics_of(float4 sums, double f_target, float k) {
  const double t_target = f_target * k;
  const double reference = sums.x == -INFINITY ? t_target : sums.x, relative = t_target - reference;
  const double log2_e = log2f(sums.y), d = log2_e - relative;
  const float tail = log1pf(exp2f(-fabsf(static_cast<float>(d))));
  Statistics out;
  out.logprob = -static_cast<float>((d > 0 ? d : d <= 0 ? 0 : d) * kLn2 + tail);
  const double total = (log2_e > relative ? log2_e : relative) + tail * kLog2E;
  const float p_log_p = out.logprob == -INFINITY ? 0.0f : expf(out.logprob) * out.logprob;
  const float others = sums.y == 0 ? 0.0f : exp2f(static_cast<float>(-total)) * static_cast<float>((sums.z - sums.y * total) * kLn2);
  out.entropy = -p_log_p - others;
  out.lse2 = reference + total;
  if (sums.y != sums.y) out.lse2 = NAN, out.logprob = out.entropy = NAN;
  return out;
}

template <bool kCapped>
__device__ void finish_rows(const ClusterLossArgs& args, Shared& shared, int stages, int lane) {
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  Exchanges exchange;
  for (RowSchedule schedule(args, stages); schedule.any(); schedule.next()) {
    barrier_wait(&shared.full[schedule.stage], schedule.parity);
    RowSlot& slot = shared.rows[schedule.stage];
    Statistics row{0, 0, 0};
    if (slot.has_sums) {
      barrier_wait(&shared.summed[exchange.slot], exchange.parity);
      const float4 none = make_float4(0, 0, 0, 0);
      if (lane == 0) barrier_arrive_expect(&shared.exchanged[exchange.slot], blocks * static_cast<uint32_t>(sizeof(float4)));
      const float4 block = merge(lane < kConsumerWarps ? shared.warp_sums[exchange.slot][lane] : none, lane < kConsumerWarps);
      if (lane < static_cast<int>(blocks)) send(block, &shared.packets[exchange.slot][rank], &shared.exchanged[exchange.slot], lane);
      barrier_wait_cluster(&shared.exchanged[exchange.slot], exchange.parity);
      const bool there = lane < static_cast<int>(blocks);
      row = statistics_of(merge(there ? shared.packets[exchange.slot][lane] : none, there), slot.f_target, slot.k);
      exchange.next();
    } else if (slot.flags & kComputed) {
      row = {NAN, NAN, NAN};
    }

    PolicyTerms<float> terms{};
    const uint32_t flags = slot.flags;
    const int64_t token = slot.token;
    if (flags & kComputed) terms = policy_terms(row.logprob, row.entropy, slot.policy, args.config);
    warp_barrier();  // all lanes have read the slot and the packets
    if (lane == 0) {
      slot.fill = terms.g == 0 && terms.h == 0 ? kZeros : slot.has_sums ? kCompute : kNaNs;
      const float g = terms.g, h = terms.h, slope = slot.slope, p = expf(row.logprob);
      slot.pivot = static_cast<float>(row.lse2);
      slot.constant = -(g + h * row.entropy) * slope * exp2f(static_cast<float>(slot.pivot - row.lse2));
      slot.linear = -h * static_cast<float>(kLn2) * slope;
      if (kCapped) slot.constant *= 4, slot.linear *= 4;  // scored() returns a quarter of the soft cap's derivative
      // From 1 - p = -expm1(log p), which is accurate also for p near 1.
      slot.at_target = (g * -expm1f(row.logprob) - (p > 0 ? h * p * (row.logprob + row.entropy) : 0.0f)) * slope;
      if (kCapped) slot.at_target *= slot.cap_slope;
      barrier_arrive(&shared.ready[schedule.stage]);
      if (rank == 0 && token >= 0) {
        args.logprobs[token] = row.logprob;
        args.entropy[token] = row.entropy;
        args.records[token] = {terms.loss, row.entropy, terms.ratio, terms.kl,
                               flags | (terms.clip_low ? kClipLow : 0u) | (terms.clip_high ? kClipHigh : 0u)};
      }
    }
    warp_barrier();
  }
}

// Storer ---------------------------------------------------------------------------------------------------------------------------

__device__ void store_rows(const ClusterLossArgs& args, Shared& shared, char* slices, int64_t slice_vectors, int stages) {
  for (RowSchedule schedule(args, stages); schedule.any(); schedule.next()) {
    barrier_wait(&shared.done[schedule.stage], schedule.parity);
    const RowSlot& slot = shared.rows[schedule.stage];
    if (args.gradient && !slot.direct) {
      const char* slice = slices + schedule.stage * slice_vectors * 16;
      const uint32_t bytes = 16u * static_cast<uint32_t>(slot.vectors);
      char* const out = slot.out_slice;
      for (uint32_t at = 0; at < bytes; at += kCopyBytes) {
        store_bulk(out + at, slice + at, bytes - at < kCopyBytes ? bytes - at : kCopyBytes);
      }
      store_commit();
      store_wait_read();
    }
    barrier_arrive(&shared.empty[schedule.stage]);
  }
  store_wait();
}
#endif  // GF_HAS_CLUSTERS

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads, 1)
    _grpo_loss_cluster_kernel(const __grid_constant__ ClusterLossArgs args, int64_t slice_vectors, int stages) {
#if defined(GF_HAS_CLUSTERS)
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  char* const slices = shared_memory() + kSharedHead;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 1);
      barrier_init(&shared.ready[stage], 1);
      barrier_init(&shared.done[stage], kConsumerWarps);
    }
    for (int slot = 0; slot < 2; ++slot) {
      barrier_init(&shared.summed[slot], kConsumerWarps);
      barrier_init(&shared.exchanged[slot], 1);
    }
    barrier_init_fence();
  }
  cluster_barrier();
  const int role = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (role == kLoader) {
    load_rows<T, kCapped>(args, shared, slices, slice_vectors, stages, lane);
  } else if (role == kFinisher) {
    finish_rows<kCapped>(args, shared, stages, lane);
  } else if (role == kStorer) {
    if (lane == 0) store_rows(args, shared, slices, slice_vectors, stages);
  } else {
    consume_rows<T, kCapped>(args, shared, slices, slice_vectors, stages, static_cast<int>(threadIdx.x) - 32 * kRoles);
  }
  warp_barrier();
  cluster_barrier();  // shared memory must remain valid until the other blocks have sent their messages
#else
  (void)args, (void)slice_vectors, (void)stages;  // never launched: see why_not()
#endif
}

// Adds the records of the tokens in one block: each thread its tokens in order, then a fixed tree.
__global__ void __launch_bounds__(GF_TOTAL_THREADS, 1)
    _grpo_loss_cluster_total_kernel(const TokenRecord* records, int64_t tokens, float* loss, float* metrics) {
  enum { kLoss = kTokenMetrics, kCounted, kCount, kSums };
  __shared__ double partials[kSums][GF_TOTAL_THREADS / 32];
  double sum[kSums] = {};
  constexpr int kAtOnce = 4;  // loads in flight per thread
  for (int64_t first = threadIdx.x; first < tokens; first += kAtOnce * GF_TOTAL_THREADS) {
    TokenRecord found[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t n = first + i * GF_TOTAL_THREADS;
      found[i] = n < tokens ? records[n] : TokenRecord{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const TokenRecord& r = found[i];
      const auto flag = [&](uint32_t which) { return (r.flags & which) != 0 ? 1.0 : 0.0; };
      sum[kCounted] += flag(kCounts);
      sum[kActiveFraction] += flag(kActive);
      if (!(r.flags & kComputed)) continue;
      sum[kCount] += 1;
      sum[kLoss] += r.loss;
      sum[kKl] += r.kl;
      sum[kEntropy] += r.entropy;
      sum[kRatioMean] += r.ratio;
      sum[kClipLowShare] += flag(kClipLow);
      sum[kClipHighShare] += flag(kClipHigh);
      if (r.ratio > sum[kRatioMax]) sum[kRatioMax] = r.ratio;
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < kSums; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, sum[i], distance);
      sum[i] = i == kRatioMax ? (other > sum[i] ? other : sum[i]) : sum[i] + other;
    }
    if (lane == 0) partials[i][warp] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kSums; ++i) {
    for (int w = 1; w < GF_TOTAL_THREADS / 32; ++w) {
      sum[i] = i == kRatioMax ? (partials[i][w] > sum[i] ? partials[i][w] : sum[i]) : sum[i] + partials[i][w];
    }
  }
  const double computed = sum[kCount] > 1 ? sum[kCount] : 1, counted = sum[kCounted] > 1 ? sum[kCounted] : 1;
  sum[kClipRegion] = sum[kClipLowShare] + sum[kClipHighShare];  // a token is in at most one of them
  for (int m = 0; m < kTokenMetrics; ++m) metrics[m] = static_cast<float>(sum[m] / (m == kActiveFraction ? counted : computed));
  metrics[kRatioMax] =
      static_cast<float>(sum[kRatioMean] == sum[kRatioMean] ? sum[kRatioMax] : sum[kRatioMean]);  // a maximum would ignore NaN
  *loss = static_cast<float>(sum[kLoss]);
}

// Launch ---------------------------------------------------------------------------------------------------------------------------

using Kernel = void (*)(ClusterLossArgs, int64_t, int);

Kernel kernel_of(LogitType type, bool capped) {
  switch (type) {
    case LogitType::kFloat32:
      return capped ? _grpo_loss_cluster_kernel<float, true> : _grpo_loss_cluster_kernel<float, false>;
    case LogitType::kBFloat16:
      return capped ? _grpo_loss_cluster_kernel<gpu::BFloat, true> : _grpo_loss_cluster_kernel<gpu::BFloat, false>;
    case LogitType::kFloat16:
      break;
  }
  return capped ? _grpo_loss_cluster_kernel<gpu::Half, true> : _grpo_loss_cluster_kernel<gpu::Half, false>;
}

constexpr int64_t kHead = 4096;  // shared memory per block besides the slices

#if defined(GF_HAS_CLUSTERS)
static_assert(kSharedHead <= kHead, "the head grew");
#endif

struct Device {
  int32_t shared_bytes = 0;  // available per block; 0: the kernel does not run on this device
  const char* why = nullptr;
};

Device ask(int32_t index) {
  Device out;
  int major = 0, optin = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (major < 9) {
    out.why = "the GPU has no thread-block clusters (compute capability 9.0 or newer expected)";
    return out;
  }
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel_of(LogitType::kBFloat16, false)) != cudaSuccess || attributes.ptxVersion < 90) {
    cudaGetLastError();
    out.why = "the extension was built without code for this GPU; rebuild it with 9.0 (or newer) in TORCH_CUDA_ARCH_LIST";
    return out;
  }
  out.shared_bytes = optin;
  return out;
}

const Device& device(int32_t index) {  // cached: the query costs more than a launch
  static std::mutex mutex;
  static std::map<int32_t, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) found = known.emplace(index, ask(index)).first;
  return found->second;
}

struct Shape {
  int64_t slice_vectors = 0;
  int cluster = 0, stages = 0;
  int64_t shared_bytes() const { return kHead + stages * slice_vectors * 16; }
};

// The smallest cluster that holds three rows on chip (one is loaded, one summed, one stored), or two rows in the largest cluster.
Shape shape_of(const ClusterLossArgs& args, int64_t shared_bytes) {
  const int64_t element = args.type == LogitType::kFloat32 ? 4 : 2, vectors = args.vocabulary / (16 / element);
  Shape shape;
  for (int wanted = 3; wanted >= 2; --wanted) {
    for (int cluster = args.force_cluster ? args.force_cluster : 1; cluster <= kMaxCluster; cluster *= 2) {
      // A multiple of 128 bytes, so that blocks do not share a cache line if rows begin on one.
      const int64_t slice = std::max<int64_t>(ceil_div(ceil_div(vectors, cluster), 8) * 8, 8);
      const int64_t available = std::min<int64_t>((shared_bytes - kHead) / (slice * 16), kMaxStages);
      const int64_t stages = args.force_stages ? args.force_stages : available;
      if (stages >= 2 && available >= (args.force_stages ? stages : wanted)) {  // with one stage the consumers would deadlock
        shape.slice_vectors = slice, shape.cluster = cluster, shape.stages = static_cast<int>(stages);
        return shape;
      }
      if (args.force_cluster) break;
    }
  }
  return shape;
}

// The number of clusters that can be resident on the device; cached per kernel and shape.
int64_t resident_clusters(Kernel kernel, const Shape& shape, int32_t index, const cudaLaunchConfig_t& config) {
  using Key = std::tuple<Kernel, int, int64_t, int32_t>;
  static std::mutex mutex;
  static std::map<Key, int64_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{kernel, shape.cluster, shape.shared_bytes(), index};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int clusters = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device(index).shared_bytes)) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    return 0;
  }
  return known.emplace(key, clusters).first->second;
}

}  // namespace
}  // namespace grpo_fast

extern "C" int64_t grpo_loss_cluster_row_bytes(int32_t index, const char** why) {
  using namespace grpo_fast;
  const Device& d = device(index);
  *why = d.why;
  return d.shared_bytes ? (d.shared_bytes - kHead) / 2 / 128 * 128 * kMaxCluster : 0;
}

extern "C" const char* grpo_loss_cluster_launch(const grpo_fast::ClusterLossArgs* args, void* stream) {
  using namespace grpo_fast;
  int index = 0;
  cudaGetDevice(&index);
  const Device& here = device(index);
  if (here.why) return here.why;
  const Shape shape = shape_of(*args, here.shared_bytes);
  if (shape.cluster == 0 && (args->force_cluster || args->force_stages))
    return "GRPO_FAST_CLUSTER names a shape that this GPU does not support; unset it";
  if (shape.cluster == 0) return "a row of these logits is longer than the shared memory of a cluster; leave impl at None";

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.cluster), 1, 1);
  config.blockDim = dim3(kThreads, 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes());
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const Kernel kernel = kernel_of(args->type, args->softcap);
  const int64_t resident = resident_clusters(kernel, shape, index, config), rows = args->sequences * args->positions;
  if (resident == 0) {
    cudaGetLastError();
    return "the GPU does not support a cluster of this size; leave impl at None";
  }
  cudaError_t error = cudaSuccess;
  if (rows > 0) {
    config.gridDim = dim3(static_cast<unsigned>(shape.cluster * std::min(rows, resident)), 1, 1);
    error = cudaLaunchKernelEx(&config, kernel, *args, shape.slice_vectors, shape.stages);
  }
  if (error == cudaSuccess) {
    config.gridDim = dim3(1, 1, 1);
    config.blockDim = dim3(GF_TOTAL_THREADS, 1, 1);
    config.dynamicSmemBytes = 0;
    config.numAttrs = 0;
    const TokenRecord* records = args->records;
    error =
        cudaLaunchKernelEx(&config, _grpo_loss_cluster_total_kernel, records, args->sequences * args->length, args->loss, args->metrics);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear the error, so that the next caller does not see it
  return cudaGetErrorString(error);
}
