// CPU launcher of pack_irreps.
#include "../irreps.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "irreps_table.h"
#include "parallel.h"

namespace geo {
namespace {

Tensor pack_irreps_cpu(const Tensor& x_, std::vector<int64_t> degrees, std::vector<int64_t> starts, int64_t mul,
                       int64_t size, bool inverse) {
  constexpr const char* op = "pack_irreps";
  int64_t rows;
  const std::vector<IrrepsBlock> blocks = irreps_blocks(op, degrees, starts, mul, size, &rows);
  STD_TORCH_CHECK(inverse ? x_.dim() == 3 && x_.size(1) == rows && x_.size(2) == mul : x_.dim() == 2 && x_.size(1) == size,
                  op, ": x does not fit the blocks");
  const Tensor x = made_contiguous(x_);
  const int64_t count = x.size(0), dense = rows * mul;
  Tensor out = inverse ? torch::stable::new_empty(x, {count, size}) : torch::stable::new_empty(x, {count, rows, mul});
  if (out.numel() == 0) return out;
  if (mul == 0) return torch::stable::zero_(out);
  int64_t filled = 0;
  for (const IrrepsBlock& block : blocks) filled += block.start < 0 ? 0 : mul * block.n;
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const IrrepsTable& leaf = choose_table(GEO_TABLES(irreps));
    // The leaf moves bits and writes to one side only.
    char* flat = reinterpret_cast<char*>(inverse ? write<S>(out) : const_cast<S*>(read<S>(x)));
    char* packed = reinterpret_cast<char*>(inverse ? const_cast<S*>(read<S>(x)) : write<S>(out));
    constexpr int64_t bytes = sizeof(S);
    advise_huge_pages(inverse ? flat : packed, out.numel() * bytes);
    parallel_blocks(count, block_of((size + dense) * bytes), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        char *to = flat + i * size * bytes, *row = packed + i * dense * bytes;
        if (inverse && filled < size) std::memset(to, 0, size_t(size * bytes));
        for (const IrrepsBlock& block : blocks) {
          char* place = row + block.row * mul * bytes;
          if (block.start >= 0)
            leaf.transpose(to + block.start * bytes, place, mul, block.n, bytes, inverse);
          else if (!inverse)
            std::memset(place, 0, size_t(block.n * mul * bytes));
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) { m.impl("pack_irreps", TORCH_BOX(&geo::pack_irreps_cpu)); }
