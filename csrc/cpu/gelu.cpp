// CPU launchers of gelu_mul and gelu_mul_grad.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../gelu_args.h"
#include "gelu_table.h"
#include "parallel.h"

namespace geo {
namespace {

constexpr int64_t kBlock = 1 << 13;  // elements; a multiple of every vector, so that lanes do not depend on the threads

const GeluTable& table(float) { return choose_table(GEO_TABLES(gelu_float)); }
const GeluTable& table(double) { return choose_table(GEO_TABLES(gelu_double)); }
const GeluTable& table(bfloat16) { return choose_table(GEO_TABLES(gelu_bfloat16)); }
const GeluTable& table(float16) { return choose_table(GEO_TABLES(gelu_float16)); }

Tensor gelu_mul_cpu(const Tensor& x_, const std::optional<Tensor>& g_, int64_t order) {
  constexpr const char* op = "gelu_mul";
  check_gelu(op, order, kGeluOrders, x_, g_);
  const Tensor x = made_contiguous(x_), g = g_ ? made_contiguous(*g_) : x;
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Gelu job{};
  job.order = order;
  job.poly = gelu_polynomial(int(order));
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GeluTable& leaf = table(S{});
    job.x = read<S>(x);
    job.g = g_ ? read<S>(g) : nullptr;
    job.out = write<S>(out);
    advise_huge_pages(job.out, out.numel() * int64_t(sizeof(S)));
    parallel_blocks(x.numel(), kBlock, [&](int64_t, int64_t begin, int64_t end) { leaf.mul(job, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> gelu_mul_grad_cpu(const Tensor& x_, const Tensor& g_, const Tensor& h_, int64_t order) {
  constexpr const char* op = "gelu_mul_grad";
  check_gelu(op, order, kGeluOrders - 1, x_, g_);
  check_gelu(op, order, kGeluOrders - 1, x_, h_);
  const Tensor x = made_contiguous(x_), g = made_contiguous(g_), h = made_contiguous(h_);
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dg = torch::stable::new_empty(x, x.sizes());
  Gelu job{};
  job.order = order;
  job.poly = gelu_polynomial(int(order));
  job.next = gelu_polynomial(int(order) + 1);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    const GeluTable& leaf = table(S{});
    job.x = read<S>(x);
    job.g = read<S>(g);
    job.h = read<S>(h);
    job.out = write<S>(dg);
    job.dx = write<S>(dx);
    advise_huge_pages(job.out, dg.numel() * int64_t(sizeof(S)));
    advise_huge_pages(job.dx, dx.numel() * int64_t(sizeof(S)));
    parallel_blocks(x.numel(), kBlock, [&](int64_t, int64_t begin, int64_t end) { leaf.grad(job, begin, end); });
  });
  return {dx, dg};
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gelu_mul", TORCH_BOX(&geo::gelu_mul_cpu));
  m.impl("gelu_mul_grad", TORCH_BOX(&geo::gelu_mul_grad_cpu));
}
