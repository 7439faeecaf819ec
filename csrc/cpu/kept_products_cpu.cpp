// The operators kept_logits, kept_hidden_gradient and add_kept_weight_gradient_ on the CPU: an LM head at the ids of kept sets.
#include <algorithm>
#include <vector>

#include "../ops.h"
#include "kept_products.h"
#include "token_rows.h"

namespace grpo_fast {

const KeptProducts& kept_products(RowType type) {
  const int index = static_cast<int>(type);
#if defined(__x86_64__) && defined(__GNUC__)
  if (instruction_set() == 2) return kKeptAvx512[index];
  if (instruction_set() == 1) return kKeptAvx2[index];
#endif
  return kKeptPortable[index];
}

namespace {

struct Matrix {  // [R, C] of float32, bfloat16 or float16, with unit stride along its rows
  const char* data;
  int64_t rows, size, stride, element;
  RowType type;

  Matrix(const char* name, const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        rows(0),
        size(0),
        stride(0),
        element(x.scalar_type() == ScalarType::Float ? 4 : 2),
        type(row_type(name, x.scalar_type())) {
    STD_TORCH_CHECK(x.is_cpu(), "grpo_fast: ", name, " is not on the CPU");
    STD_TORCH_CHECK(x.dim() == 2, "grpo_fast: ", name, " has ", x.dim(), " dimensions; expected two");
    rows = x.size(0), size = x.size(1), stride = x.stride(0);
    STD_TORCH_CHECK(size <= 1 || x.stride(1) == 1, "grpo_fast: ", name, " must be contiguous along its last dimension");
  }
  const void* at(int64_t row) const { return data + row * stride * element; }
};

struct Columns {  // int64 [n, K]: ids of the weight's rows, negative where there is none
  const int64_t* data;
  int64_t tokens, count;

  Columns(const Tensor& columns, int64_t tokens_expected, int64_t vocabulary)
      : data(static_cast<const int64_t*>(columns.const_data_ptr())), tokens(0), count(0) {
    STD_TORCH_CHECK(columns.is_cpu() && columns.scalar_type() == ScalarType::Long && columns.dim() == 2 && columns.is_contiguous(),
                    "grpo_fast: columns must be contiguous int64 [n, K] on the CPU");
    tokens = columns.size(0), count = columns.size(1);
    STD_TORCH_CHECK(tokens == tokens_expected, "grpo_fast: columns have ", tokens, " rows; expected ", tokens_expected);
    for (int64_t i = 0; i < tokens * count; i++)
      STD_TORCH_CHECK(data[i] < vocabulary, "grpo_fast: columns hold ", data[i], "; expected less than ", vocabulary,
                      ", the rows of the weight");
  }
  const int64_t* at(int64_t token) const { return data + token * count; }
};

const float* values_of(const char* name, const Tensor& x, int64_t rows, int64_t size) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.is_contiguous() && x.size(0) == rows && x.size(1) == size,
      "grpo_fast: ", name, " must be contiguous float32 [", rows, ", ", size, "] on the CPU");
  return static_cast<const float*>(x.const_data_ptr());
}

// Calls work(begin, end, buffer) for ranges of [0, count), in parallel. The buffer holds one row of float32.
template <typename Work>
void for_each_range(int64_t count, int64_t cost, int64_t size, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(cost, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(static_cast<size_t>(size));
    work(begin, end, buffer.data());
  });
}

}  // namespace
}  // namespace grpo_fast

using namespace grpo_fast;

Tensor kept_logits_cpu(const Tensor& hidden_in, const Tensor& weight_in, const Tensor& columns_in) {
  const Matrix hidden("hidden", hidden_in), weight("weight", weight_in);
  STD_TORCH_CHECK(hidden.size == weight.size, "grpo_fast: hidden has rows of ", hidden.size, " and weight of ", weight.size);
  const Columns columns(columns_in, hidden.rows, weight.rows);
  Tensor logits = torch::stable::new_empty(columns_in, {columns.tokens, columns.count}, ScalarType::Float);
  float* out = logits.mutable_data_ptr<float>();
  const KeptProducts &of_hidden = kept_products(hidden.type), &of_weight = kept_products(weight.type);
  for_each_range(columns.tokens, columns.count * weight.size, hidden.size, [&](int64_t begin, int64_t end, float* row) {
    for (int64_t n = begin; n < end; n++) {
      of_hidden.to_float(hidden.at(n), hidden.size, row);
      of_weight.logits(row, weight.data, weight.stride, weight.size, columns.at(n), columns.count, out + n * columns.count);
    }
  });
  return logits;
}

Tensor kept_hidden_gradient_cpu(const Tensor& gradient_in, const Tensor& weight_in, const Tensor& columns_in) {
  STD_TORCH_CHECK(gradient_in.dim() == 2, "grpo_fast: gradient has ", gradient_in.dim(), " dimensions; expected [n, K]");
  const Matrix weight("weight", weight_in);
  const Columns columns(columns_in, gradient_in.size(0), weight.rows);
  const float* gradient = values_of("gradient", gradient_in, columns.tokens, columns.count);
  Tensor result = torch::stable::new_empty(gradient_in, {columns.tokens, weight.size});
  float* out = result.mutable_data_ptr<float>();
  const KeptProducts& kernels = kept_products(weight.type);
  for_each_range(columns.tokens, columns.count * weight.size, 0, [&](int64_t begin, int64_t end, float*) {
    for (int64_t n = begin; n < end; n++) {
      float* row = out + n * weight.size;
      std::fill(row, row + weight.size, 0.0f);
      kernels.add_rows(gradient + n * columns.count, weight.data, weight.stride, weight.size, columns.at(n), columns.count, row);
    }
  });
  return result;
}

void add_kept_weight_gradient_cpu(Tensor into, const Tensor& gradient_in, const Tensor& hidden_in, const Tensor& columns_in) {
  const Matrix hidden("hidden", hidden_in), total("into", into);
  STD_TORCH_CHECK(total.type == RowType::kFloat32 && total.size == hidden.size, "grpo_fast: into must be float32 [V, ", hidden.size, "]");
  const Columns columns(columns_in, hidden.rows, total.rows);
  const float* gradient = values_of("gradient", gradient_in, columns.tokens, columns.count);
  float* out = into.mutable_data_ptr<float>();

  std::vector<int64_t> places;  // of the gradient, in the order of their columns, those of a column in the order of the tokens
  places.reserve(static_cast<size_t>(columns.tokens * columns.count));
  for (int64_t i = 0; i < columns.tokens * columns.count; i++)
    if (columns.data[i] >= 0) places.push_back(i);
  std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return columns.data[a] < columns.data[b]; });
  std::vector<int64_t> firsts;  // where each column begins
  for (size_t i = 0; i < places.size(); i++)
    if (i == 0 || columns.data[places[i]] != columns.data[places[i - 1]]) firsts.push_back(static_cast<int64_t>(i));
  const int64_t distinct = static_cast<int64_t>(firsts.size());
  firsts.push_back(static_cast<int64_t>(places.size()));

  const KeptProducts& kernels = kept_products(hidden.type);
  for_each_range(distinct, 2 * hidden.size, 0, [&](int64_t begin, int64_t end, float*) {
    std::vector<float> factors;
    std::vector<int64_t> tokens;
    for (int64_t c = begin; c < end; c++) {
      factors.clear(), tokens.clear();
      for (int64_t i = firsts[c]; i < firsts[c + 1]; i++) {
        factors.push_back(gradient[places[i]]);
        tokens.push_back(places[i] / columns.count);
      }
      float* row = out + columns.data[places[firsts[c]]] * total.stride;
      kernels.add_rows(factors.data(), hidden.data, hidden.stride, hidden.size, tokens.data(), static_cast<int64_t>(tokens.size()), row);
    }
  });
}
