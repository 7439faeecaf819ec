// The operator product_ on the CPU: checks, and the division of the result into tiles, which threads take.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../ops.h"
#include "product.h"
#include "token_rows.h"

namespace grpo_fast {
namespace {

ProductKernel product_kernel(RowType a, RowType b) {
#if defined(__x86_64__) && defined(__GNUC__)
  const int64_t isa = matrix_instruction_set();
#if defined(GF_HAS_AMX)
  if (isa == 3 && a == RowType::kBFloat16 && b == RowType::kBFloat16) return kProductAmx;
#endif
  if (isa >= 2) return kProductAvx512;
  if (isa == 1) return kProductAvx2;
#endif
  return kProductPortable;
}

ProductOperand operand(const char* name, const Tensor& x, int64_t outer_dimension) {
  STD_TORCH_CHECK(x.is_cpu(), "grpo_fast: ", name, " is not on the CPU");
  STD_TORCH_CHECK(x.dim() == 2, "grpo_fast: ", name, " has ", x.dim(), " dimensions; expected two");
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(outer_dimension), x.stride(1 - outer_dimension),
          row_type(name, x.scalar_type())};
}

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Halves the tiles until every thread has a few. The bits do not depend on it.
struct Tiles {
  int64_t rows, columns, down, across;

  Tiles(int64_t m, int64_t n) {
    constexpr int64_t kElements = int64_t(1) << 17;  // of the result: half a megabyte, to stay in the second-level cache
    rows = std::min<int64_t>(round_up(m, kTileRows), 256);
    columns = std::min<int64_t>(round_up(n, kTileColumns), std::min<int64_t>(960, kElements / rows / kTileColumns * kTileColumns));
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads()), wanted = threads > 1 ? 4 * threads : 1;
    while (count(m, n) < wanted && (rows > kTileRows || columns > kTileColumns)) {
      if (columns > rows && columns > kTileColumns)
        columns = round_up(columns / 2, kTileColumns);
      else if (rows > kTileRows)
        rows = round_up(rows / 2, kTileRows);
      else
        columns = round_up(columns / 2, kTileColumns);
    }
  }
  int64_t count(int64_t m, int64_t n) {
    down = (m + rows - 1) / rows, across = (n + columns - 1) / columns;
    return down * across;
  }
};

}  // namespace
}  // namespace grpo_fast

using namespace grpo_fast;

void product_cpu(Tensor out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias_in, bool accumulate) {
  ProductCall call{operand("a", a, 0), operand("b", b, 1), nullptr, 0, 0};
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  STD_TORCH_CHECK(b.size(0) == k, "grpo_fast: a is [", m, ", ", k, "] and b is [", b.size(0), ", ", n, "]; expected a.size(1) = b.size(0)");
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Float, "grpo_fast: out must be float32 on the CPU");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == m && out.size(1) == n, "grpo_fast: out has the wrong shape; expected [", m, ", ", n,
                  "]");
  STD_TORCH_CHECK((n <= 1 || out.stride(1) == 1) && (m <= 1 || out.stride(0) >= n),
                  "grpo_fast: out must have contiguous rows that do not overlap; its strides are [", out.stride(0), ", ", out.stride(1),
                  "]");
  std::vector<float> bias;
  if (bias_in.has_value()) {
    STD_TORCH_CHECK(!accumulate, "grpo_fast: bias is what the sums begin with; with accumulate they begin with out");
    STD_TORCH_CHECK(bias_in->is_cpu() && bias_in->scalar_type() == ScalarType::Float && bias_in->dim() == 1 && bias_in->size(0) == n,
                    "grpo_fast: bias must be float32 [", n, "] on the CPU");
    const float* values = static_cast<const float*>(bias_in->const_data_ptr());
    for (int64_t j = 0; j < n; j++) bias.push_back(values[j * bias_in->stride(0)]);
  }
  if (m == 0 || n == 0) return;
  call.out = out.mutable_data_ptr<float>(), call.out_stride = m > 1 ? out.stride(0) : n, call.k = k;

  const ProductKernel kernel = product_kernel(call.a.type, call.b.type);
  Tiles tiles(m, n);
  torch::stable::parallel_for(0, tiles.count(m, n), 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>(product_buffer_size(tiles.rows, tiles.columns)) * sizeof(float);
    const std::unique_ptr<float, FreeAligned> buffer(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
    for (int64_t tile = begin; tile < end; tile++) {  // those that need the same part of b follow one another
      const int64_t m0 = tile % tiles.down * tiles.rows, n0 = tile / tiles.down * tiles.columns;
      const int64_t m1 = std::min(m, m0 + tiles.rows), n1 = std::min(n, n0 + tiles.columns);
      for (int64_t i = m0; i < m1 && !accumulate; i++) {
        float* row = call.out + i * call.out_stride;
        if (bias.empty())
          std::fill(row + n0, row + n1, 0.0f);
        else
          std::copy(bias.begin() + n0, bias.begin() + n1, row + n0);
      }
      kernel(call, m0, m1, n0, n1, buffer.get());
    }
  });
}
