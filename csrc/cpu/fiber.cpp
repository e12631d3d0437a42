// CPU launchers of fiber_mul_sum and fiber_outer.
#include "../fiber.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "fiber_table.h"
#include "parallel.h"

namespace geo {
namespace {

const FiberTable& table(float) { return choose_table(GEO_TABLES(fiber_float)); }
const FiberTable& table(double) { return choose_table(GEO_TABLES(fiber_double)); }
const FiberTable& table(bfloat16) { return choose_table(GEO_TABLES(fiber_bfloat16)); }
const FiberTable& table(float16) { return choose_table(GEO_TABLES(fiber_float16)); }

Tensor fiber_mul_sum_cpu(const Tensor& x_, const Tensor& kernel_, bool transposed) {
  constexpr const char* op = "fiber_mul_sum";
  STD_TORCH_CHECK(x_.dim() == 3 && kernel_.dim() == 3, op, ": x and kernel must have three axes");
  STD_TORCH_CHECK(x_.scalar_type() == kernel_.scalar_type(), op, ": x and kernel must have one dtype");
  const Tensor x = made_contiguous(x_), kernel = made_contiguous(kernel_);
  FiberSum job{};
  job.O = x.size(1);
  job.P = kernel.size(transposed ? 1 : 0);
  job.C = x.size(2);
  job.stride_p = transposed ? job.C : job.O * job.C;
  job.stride_o = transposed ? job.P * job.C : job.C;
  STD_TORCH_CHECK(kernel.size(transposed ? 0 : 1) == job.O && kernel.size(2) == job.C, op,
                  ": kernel must fit the orientations and channels of x");
  Tensor out = torch::stable::new_empty(x, {x.size(0), job.P, job.C});
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const FiberTable& leaf = table(S{});
    job.x = read<S>(x);
    job.kernel = read<S>(kernel);
    job.out = write<S>(out);
    advise_huge_pages(job.out, out.numel() * int64_t(sizeof(S)));
    const int64_t block = std::max<int64_t>(16, block_of((job.O + job.P) * job.C * int64_t(sizeof(S))) / 16 * 16);
    parallel_blocks(x.size(0), block, [&](int64_t, int64_t begin, int64_t end) { leaf.sum(job, begin, end); });
  });
  return out;
}

Tensor fiber_outer_cpu(const Tensor& a_, const Tensor& b_) {
  constexpr const char* op = "fiber_outer";
  STD_TORCH_CHECK(a_.dim() == 3 && b_.dim() == 3 && a_.size(0) == b_.size(0) && a_.size(2) == b_.size(2), op,
                  ": a must be [V, P, C] and b [V, O, C]");
  STD_TORCH_CHECK(a_.scalar_type() == b_.scalar_type(), op, ": a and b must have one dtype");
  const Tensor a = made_contiguous(a_), b = made_contiguous(b_);
  FiberOuter job{};
  job.P = a.size(1);
  job.O = b.size(1);
  job.C = a.size(2);
  const int64_t nodes = a.size(0), size = job.P * job.O * job.C, chunks = fiber_chunks(nodes);
  Tensor out = torch::stable::new_empty(a, {job.P, job.O, job.C});
  if (size == 0) return out;
  dispatch_floating(a.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const FiberTable& leaf = table(S{});
    job.a = read<S>(a);
    job.b = read<S>(b);
    std::vector<T> partial(chunks * size);
    parallel_blocks(chunks, 1, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        leaf.outer(job, nodes * k / chunks, nodes * (k + 1) / chunks, partial.data() + k * size);
    });
    S* to = write<S>(out);
    parallel_blocks(size, 8192, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t k = 1; k < chunks; ++k)
        for (int64_t i = begin; i < end; ++i) partial[i] += partial[k * size + i];
      for (int64_t i = begin; i < end; ++i) narrow(partial[i], to + i);
    });
  });
  return out;
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("fiber_mul_sum", TORCH_BOX(&geo::fiber_mul_sum_cpu));
  m.impl("fiber_outer", TORCH_BOX(&geo::fiber_outer_cpu));
}
