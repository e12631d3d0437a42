// CUDA kernel of pack_irreps: one thread an element of the result.
#include "../irreps.h"

#include "device.h"

namespace geo {
namespace {

constexpr int kMostBlocks = 64;

struct Blocks {
  int count;
  int64_t n[kMostBlocks], start[kMostBlocks], row[kMostBlocks];
};

template <class S>
__global__ void pack_irreps_kernel(const S* __restrict__ x, S* __restrict__ out, const Blocks blocks, int64_t count,
                                   int64_t rows, int64_t mul, int64_t size, bool inverse) {
  const int64_t width = inverse ? size : rows * mul;
  for (int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; at < count * width;
       at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = at / width, e = at % width;
    S value{};
    if (inverse) {
      for (int b = 0; b < blocks.count; ++b) {
        const int64_t k = e - blocks.start[b];
        if (blocks.start[b] >= 0 && k >= 0 && k < mul * blocks.n[b])
          value = x[(i * rows + blocks.row[b] + k % blocks.n[b]) * mul + k / blocks.n[b]];
      }
    } else {
      const int64_t row = e / mul, c = e % mul;
      int b = 0;
      while (b + 1 < blocks.count && row >= blocks.row[b + 1]) ++b;
      if (blocks.start[b] >= 0) value = x[i * size + blocks.start[b] + c * blocks.n[b] + row - blocks.row[b]];
    }
    out[at] = value;
  }
}

Tensor pack_irreps_cuda(const Tensor& x_, std::vector<int64_t> degrees, std::vector<int64_t> starts, int64_t mul,
                        int64_t size, bool inverse) {
  constexpr const char* op = "pack_irreps";
  int64_t rows;
  const std::vector<IrrepsBlock> found = irreps_blocks(op, degrees, starts, mul, size, &rows);
  STD_TORCH_CHECK(inverse ? x_.dim() == 3 && x_.size(1) == rows && x_.size(2) == mul : x_.dim() == 2 && x_.size(1) == size,
                  op, ": x does not fit the blocks");
  STD_TORCH_CHECK(found.size() <= kMostBlocks, op, ": at most ", kMostBlocks, " blocks, got ", found.size());
  const Tensor x = made_contiguous(x_);
  const int64_t count = x.size(0);
  Tensor out = inverse ? torch::stable::new_empty(x, {count, size}) : torch::stable::new_empty(x, {count, rows, mul});
  if (out.numel() == 0) return out;
  if (mul == 0) return torch::stable::zero_(out);
  Blocks blocks{};
  blocks.count = int(found.size());
  for (size_t b = 0; b < found.size(); ++b) {
    blocks.n[b] = found[b].n;
    blocks.start[b] = found[b].start;
    blocks.row[b] = found[b].row;
  }
  const DeviceGuard guard(x.get_device_index());
  const int64_t grid = std::min<int64_t>((out.numel() + 255) / 256, 1 << 20);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    pack_irreps_kernel<S><<<unsigned(grid), 256, 0, current_stream(x)>>>(read<S>(x), write<S>(out), blocks, count, rows, mul,
                                                                         size, inverse);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) { m.impl("pack_irreps", TORCH_BOX(&geo::pack_irreps_cuda)); }
