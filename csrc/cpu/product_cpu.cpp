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

const ProductKernel& product_kernel(RowType a, RowType b) {
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

using Floats = std::unique_ptr<float, FreeAligned>;
Floats new_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t(64))));
}

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
  const ProductCall call{operand("a", a, 0), operand("b", b, 1), a.size(1)};
  const int64_t m = a.size(0), n = b.size(1);
  STD_TORCH_CHECK(b.size(0) == call.k, "grpo_fast: a is [", m, ", ", call.k, "] and b is [", b.size(0), ", ", n,
                  "]; expected a.size(1) = b.size(0)");
  STD_TORCH_CHECK(out.is_cpu(), "grpo_fast: out is not on the CPU");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == m && out.size(1) == n, "grpo_fast: out has the wrong shape; expected [", m, ", ", n,
                  "]");
  STD_TORCH_CHECK((n <= 1 || out.stride(1) == 1) && (m <= 1 || out.stride(0) >= n),
                  "grpo_fast: out must have contiguous rows that do not overlap; its strides are [", out.stride(0), ", ", out.stride(1),
                  "]");
  const RowType type = row_type("out", out.scalar_type());
  std::vector<float> bias;
  if (bias_in.has_value()) {
    STD_TORCH_CHECK(!accumulate, "grpo_fast: bias is what the sums begin with; with accumulate they begin with out");
    STD_TORCH_CHECK(bias_in->is_cpu() && bias_in->scalar_type() == ScalarType::Float && bias_in->dim() == 1 && bias_in->size(0) == n,
                    "grpo_fast: bias must be float32 [", n, "] on the CPU");
    const float* values = static_cast<const float*>(bias_in->const_data_ptr());
    for (int64_t j = 0; j < n; j++) bias.push_back(values[j * bias_in->stride(0)]);
  }
  if (m == 0 || n == 0) return;
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t out_stride = m > 1 ? out.stride(0) : n, element = type == RowType::kFloat32 ? 4 : 2;

  const ProductKernel& kernel = product_kernel(call.a.type, call.b.type);
  Tiles tiles(m, n);
  const int64_t count = tiles.count(m, n);
  const auto tile_at = [&](int64_t number) {  // those that need the same part of b follow one another
    const int64_t m0 = number % tiles.down * tiles.rows, n0 = number / tiles.down * tiles.columns;
    return Tile{m0, std::min(m, m0 + tiles.rows), n0, std::min(n, n0 + tiles.columns)};
  };

  // An operand that many tiles share is packed once, if it is small.
  constexpr int64_t kLargest = int64_t(4) << 20;
  const int64_t of_a = packed_size(tiles.rows, kTileRows, call.k), of_b = packed_size(tiles.columns, kTileColumns, call.k);
  const Floats all_a = tiles.across > 1 && of_a * tiles.down <= kLargest ? new_floats(of_a * tiles.down) : Floats();
  const Floats all_b = tiles.down > 1 && of_b * tiles.across <= kLargest ? new_floats(of_b * tiles.across) : Floats();
  if (all_a || all_b) {
    torch::stable::parallel_for(0, std::max(tiles.down, tiles.across), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        if (all_a && i < tiles.down) kernel.pack_a(call, i * tiles.rows, std::min(m, (i + 1) * tiles.rows), all_a.get() + i * of_a);
        if (all_b && i < tiles.across) kernel.pack_b(call, i * tiles.columns, std::min(n, (i + 1) * tiles.columns), all_b.get() + i * of_b);
      }
    });
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const int64_t room_a = block_size(tiles.rows, kTileRows), room_b = block_size(tiles.columns, kTileColumns);
    const Floats buffer = new_floats(room_a + room_b + tiles.rows * tiles.columns);
    float* sums = buffer.get() + room_a + room_b;
    for (int64_t number = begin; number < end; number++) {
      const Tile tile = tile_at(number), next = tile_at(std::min(number + 1, count - 1));
      const int64_t rows = tile.m1 - tile.m0, columns = tile.n1 - tile.n0, stride = tiles.columns;
      const Packed packed{all_a ? all_a.get() + number % tiles.down * of_a : nullptr,
                          all_b ? all_b.get() + number / tiles.down * of_b : nullptr, buffer.get(), buffer.get() + room_a,
                          !accumulate && bias.empty()};
      const ProductOutput place{data + (tile.m0 * out_stride + tile.n0) * element, out_stride, type};
      const Tile* following = number + 1 < end ? &next : nullptr;
      if (accumulate && type == RowType::kFloat32) {
        kernel.add(call, tile, packed, reinterpret_cast<float*>(place.data), out_stride, following);
        continue;
      }
      if (accumulate) kernel.load(sums, stride, rows, columns, place);
      for (int64_t i = 0; i < rows && (!bias.empty() || (packed.from_zero && call.k == 0)); i++) {
        if (bias.empty())
          std::fill_n(sums + i * stride, columns, 0.0f);
        else
          std::copy(bias.begin() + tile.n0, bias.begin() + tile.n1, sums + i * stride);
      }
      kernel.add(call, tile, packed, sums, stride, following);
      kernel.store(sums, stride, rows, columns, place);
    }
  });
}

void use_huge_pages_cpu(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "grpo_fast: x must be contiguous");
  use_huge_pages(x);
}
