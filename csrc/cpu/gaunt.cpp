// CPU launcher of gaunt_product.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../gaunt_args.h"
#include "../gaunt_tables.h"
#include "gaunt_table.h"
#include "parallel.h"

namespace geo {
namespace {

const GauntTable<float>& table(float) { return choose_table(GEO_TABLES(gaunt_float)); }
const GauntTable<double>& table(double) { return choose_table(GEO_TABLES(gaunt_double)); }
const GauntTable<bfloat16>& table(bfloat16) { return choose_table(GEO_TABLES(gaunt_bfloat16)); }
const GauntTable<float16>& table(float16) { return choose_table(GEO_TABLES(gaunt_float16)); }

Tensor gaunt_product_cpu(const Tensor& x_, const Tensor& y_, const std::optional<Tensor>& scale_x_,
                         const std::optional<Tensor>& scale_y_, const std::optional<Tensor>& scale_out_, int64_t lmax_x,
                         int64_t lmax_y, int64_t lmax_out, int64_t channels, bool bracket, std::string method) {
  constexpr const char* op = "gaunt_product";
  STD_TORCH_CHECK(method == "auto" || method == "sparse" || method == "separable", op, ": no method '", method, "'");
  const bool sparse = method == "auto" ? gaunt_takes_sparse(lmax_x, lmax_y, lmax_out, bracket) : method == "sparse";
  const GauntArguments given{x_, y_, scale_x_, scale_y_, scale_out_, lmax_x, lmax_y, lmax_out, channels};
  const int64_t C = check_gaunt(op, given), rows = x_.size(0);
  Tensor out = torch::stable::new_empty(x_, {rows, (lmax_out + 1) * (lmax_out + 1), channels});
  if (out.numel() == 0) return out;
  if (C == 0) return torch::stable::zero_(out);
  const Tensor x = made_contiguous(x_), y = made_contiguous(y_);
  const auto made = [&](const std::optional<Tensor>& scale) {
    return scale ? std::optional<Tensor>(made_contiguous(*scale)) : std::nullopt;
  };
  const auto scale_x = made(scale_x_), scale_y = made(scale_y_), scale_out = made(scale_out_);
  dispatch_floating(x.scalar_type(), op, [&](auto zero) {
    using S = decltype(zero);
    using T = typename accumulate<S>::type;
    const GauntTable<S>& leaf = table(S{});
    Gaunt<S> job{};
    const auto operand = [&](const Tensor* data, const std::optional<Tensor>& scale, int64_t lmax) {
      GauntOperand<S> found{};
      found.lmax = int(lmax);
      if (data) {
        found.data = read<S>(*data);
        found.channels = data->size(2);
      }
      if (scale) {
        found.scale = read<S>(*scale);
        found.scale_channels = scale->size(2);
        found.scale_row = scale->size(0) == 1 ? 0 : (lmax + 1) * scale->size(2);
      }
      return found;
    };
    job.x = operand(&x, scale_x, lmax_x);
    job.y = operand(&y, scale_y, lmax_y);
    job.z = operand(nullptr, scale_out, lmax_out);
    job.out = write<S>(out);
    job.C = C;
    job.sum = channels == 1 && C != 1;
    job.samples = !job.sum && C < leaf.lanes;
    job.product.bracket = bracket;
    const int L1 = job.product.L1 = int(lmax_x), L2 = job.product.L2 = int(lmax_y), L3 = job.product.L3 = int(lmax_out);
    if (!sparse) {
      job.product.form = GauntForm::kSeparable;
      const auto& tables = kept_tables<SeparableTables<T>>(L1, L2, L3, bracket, make_separable<T>);
      for (int slot = 0; slot < 2; ++slot)
        for (int field = 0; field < 2; ++field) job.product.in[slot][field] = tables.in[slot][field].data();
      job.product.polar_out = tables.out.data();
    } else if (std::is_same_v<T, float> && has_straight(L1, L2, L3)) {
      job.product.form = GauntForm::kStraight;
    } else {
      job.product.form = GauntForm::kSparse;
      const auto& tables = kept_tables<SparseTables<T>>(L1, L2, L3, bracket, make_sparse<T>);
      job.product.num_pairs = int(tables.i.size());
      job.product.i = tables.i.data();
      job.product.j = tables.j.data();
      job.product.both = tables.both.data();
      job.product.ptr = tables.ptr.data();
      job.product.pair = tables.pair.data();
      job.product.value = tables.value.data();
    }
    const int64_t row_bytes = (x.numel() + y.numel() + out.numel()) / rows * int64_t(sizeof(S));
    const int64_t total = job.samples ? rows * C : rows;
    int64_t block = std::max<int64_t>(1, (int64_t(1) << 17) / row_bytes);
    if (job.samples) block = std::max<int64_t>(1, block * C / leaf.lanes) * leaf.lanes;
    advise_huge_pages(job.out, out.numel() * int64_t(sizeof(S)));
    const int64_t size = (leaf.scratch(job) + 15) / 16 * 16;
    std::vector<T> scratch(size_t(max_threads(total, block) * size) + 64 / sizeof(T));
    T* first = aligned(scratch);
    parallel_blocks(total, block, [&](int64_t thread, int64_t begin, int64_t end) {
      leaf.run(job, begin, end, first + thread * size);
    });
  });
  return out;
}

std::string gaunt_auto_cpu(const Tensor&, int64_t lmax_x, int64_t lmax_y, int64_t lmax_out, bool bracket) {
  return gaunt_takes_sparse(lmax_x, lmax_y, lmax_out, bracket) ? "sparse" : "separable";
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gaunt_product", TORCH_BOX(&geo::gaunt_product_cpu));
  m.impl("gaunt_auto", TORCH_BOX(&geo::gaunt_auto_cpu));
}
