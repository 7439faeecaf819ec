// Shared by the operators over vocabulary rows: views of [B, T, V] logits and of per-token tensors, and the distribution of rows to
// threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

#include "rows.h"

namespace grpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Requests huge pages for memory that is not in use yet: page faults on 64,000 small pages cost more than the whole loss.
inline void use_huge_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * static_cast<uintptr_t>(x.element_size());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = end & ~(kHugePage - 1);
  if (last > first + 4 * kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory for a gradient of the shape of the logits.
inline Tensor new_gradient(const Tensor& logits) {
  Tensor gradient = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
  use_huge_pages(gradient);
  return gradient;
}

inline Tensor unit_stride(const Tensor& logits) { return logits.stride(2) == 1 ? logits : torch::stable::contiguous(logits); }

inline RowType row_type(const char* name, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "grpo_fast: ", name,
                  " has the wrong dtype; expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? RowType::kFloat32 : type == ScalarType::BFloat16 ? RowType::kBFloat16 : RowType::kFloat16;
}

struct Rows {  // [B, T or T + 1, V] logits or their gradient; position T, if there is one, predicts no token
  char* data;
  int64_t sequences, positions, vocabulary, sequence_stride, position_stride, element;
  RowType type;

  explicit Rows(const Tensor& tensor)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        sequences(tensor.size(0)),
        positions(tensor.size(1)),
        vocabulary(tensor.size(2)),
        sequence_stride(tensor.stride(0)),
        position_stride(tensor.stride(1)),
        element(tensor.scalar_type() == ScalarType::Float ? 4 : 2),
        type(row_type("logits", tensor.scalar_type())) {}
  // The rows of a bfloat16 gradient that begin where those of float32 logits begin.
  Rows in_bfloat16() const {
    STD_TORCH_CHECK(type == RowType::kFloat32, "grpo_fast: bfloat16_gradient needs float32 logits");
    Rows out = *this;
    out.sequence_stride *= 2, out.position_stride *= 2, out.element = 2, out.type = RowType::kBFloat16;
    return out;
  }
  void* at(int64_t b, int64_t t) const { return data + (b * sequence_stride + t * position_stride) * element; }
  void clear(int64_t b, int64_t t) const { std::memset(at(b, t), 0, static_cast<size_t>(vocabulary * element)); }
};

// The sizes of a call, checked where memory is read: the Python functions check them too, but the operators can be called directly.
struct TokenShape {
  int64_t sequences, tokens;
  bool on_cpu;
  int64_t device;

  TokenShape(const Tensor& logits, const Tensor& token_ids)
      : sequences(0), tokens(0), on_cpu(logits.is_cpu()), device(logits.get_device_index()) {
    STD_TORCH_CHECK(logits.dim() == 3, "grpo_fast: logits have ", logits.dim(), " dimensions; expected [B, T, V] or [B, T + 1, V]");
    STD_TORCH_CHECK(token_ids.dim() == 2, "grpo_fast: token_ids have ", token_ids.dim(), " dimensions; expected [B, T]");
    sequences = token_ids.size(0), tokens = token_ids.size(1);
    STD_TORCH_CHECK(logits.size(0) == sequences && (logits.size(1) == tokens || logits.size(1) == tokens + 1), "grpo_fast: logits are [",
                    logits.size(0), ", ", logits.size(1), ", V] and token_ids [", sequences, ", ", tokens,
                    "]; expected logits [B, T, V] or [B, T + 1, V] with token_ids [B, T]");
  }
};

template <typename T>
constexpr ScalarType scalar_type_of() {
  static_assert(std::is_same_v<T, bool> || std::is_same_v<T, int64_t> || std::is_same_v<T, float>, "per-token tensors have these types");
  return std::is_same_v<T, bool> ? ScalarType::Bool : std::is_same_v<T, int64_t> ? ScalarType::Long : ScalarType::Float;
}

template <typename T>
struct PerToken {  // a [B, T] tensor, one that broadcasts to it, or none
  const T* data = nullptr;
  int64_t sequence_stride = 0, token_stride = 0;

  PerToken(const char* name, const Tensor& x, const TokenShape& shape) : data(static_cast<const T*>(x.const_data_ptr())) {
    STD_TORCH_CHECK(x.scalar_type() == scalar_type_of<T>(), "grpo_fast: ", name, " has the wrong dtype; expected ",
                    std::is_same_v<T, bool>      ? "bool"
                    : std::is_same_v<T, int64_t> ? "int64"
                                                 : "float32");
    STD_TORCH_CHECK(x.is_cpu() == shape.on_cpu && x.get_device_index() == shape.device, "grpo_fast: ", name,
                    " is not on the device of the logits");
    if (x.dim() == 0) return;
    STD_TORCH_CHECK(x.dim() == 2 && (x.size(0) == shape.sequences || x.size(0) == 1) && (x.size(1) == shape.tokens || x.size(1) == 1),
                    "grpo_fast: ", name, " has the wrong shape; expected [B, T] = [", shape.sequences, ", ", shape.tokens,
                    "], or one that broadcasts to it");
    if (x.size(0) > 1) sequence_stride = x.stride(0);
    if (x.size(1) > 1) token_stride = x.stride(1);
  }
  PerToken(const char* name, const std::optional<Tensor>& x, const TokenShape& shape) {
    if (x.has_value()) *this = PerToken(name, *x, shape);
  }
  bool given() const { return data != nullptr; }
  T at(int64_t b, int64_t t, T otherwise = T()) const { return given() ? data[b * sequence_stride + t * token_stride] : otherwise; }
};

struct Tokens {  // which tokens are unmasked, and how their logits are scored
  PerToken<int64_t> ids;
  PerToken<bool> mask;
  PerToken<float> temperatures;
  RowTransform shared;

  Tokens(const TokenShape& shape, const Tensor& token_ids, const Tensor& mask, const std::optional<Tensor>& temperatures,
         RowTransform shared)
      : ids("token_ids", token_ids, shape), mask("mask", mask, shape), temperatures("temperatures", temperatures, shape), shared(shared) {}
  bool in_vocabulary(int64_t b, int64_t t, int64_t vocabulary) const { return ids.at(b, t) >= 0 && ids.at(b, t) < vocabulary; }
  RowTransform transform(int64_t b, int64_t t) const {
    RowTransform own = shared;
    if (temperatures.given()) own.temperature = temperatures.at(b, t);
    return own;
  }
};

inline Tensor like_tokens(const Tensor& token_ids) {
  return torch::stable::new_empty(token_ids, {token_ids.size(0), token_ids.size(1)}, ScalarType::Float);
}

// The statistics of a token whose id is out of range: nothing is read, and the loss becomes NaN.
inline RowStatistics no_statistics() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return {nan, nan, nan, nan, nan};
}

// Calls work(row) for every row in [0, count). Threads take short runs of rows, so that masked stretches do not leave a thread idle. Each
// row writes its own results only, so they do not depend on the thread.
template <typename Work>
void for_each_row(int64_t count, int64_t vocabulary, const Work& work) {
  const int64_t run = std::max<int64_t>(1, 32768 / std::max<int64_t>(vocabulary, 1)), threads = torch::stable::get_num_threads();
  if (threads == 1 || count <= run) {
    for (int64_t row = 0; row < count; row++) work(row);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, (count + run - 1) / run), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(run)) < count;)
      for (int64_t row = begin, end = std::min(begin + run, count); row < end; row++) work(row);
  });
}

}  // namespace grpo_fast
