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

Tensor product(const char* op, const GauntArguments& given, bool bracket, const std::string& method) {
  const int64_t lmax_x = given.lmax_x, lmax_y = given.lmax_y, lmax_out = given.lmax_out, channels = given.channels;
  const GauntLayout* layout = given.layout;
  STD_TORCH_CHECK(method == "auto" || method == "sparse" || method == "separable", op, ": no method '", method, "'");
  const bool sparse = method == "auto" ? gaunt_takes_sparse(lmax_x, lmax_y, lmax_out, bracket) : method == "sparse";
  const int64_t C = check_gaunt(op, given), rows = given.x.size(0), size = (lmax_out + 1) * (lmax_out + 1);
  Tensor out = layout ? torch::stable::new_empty(given.x, {rows, layout->size})
                      : torch::stable::new_empty(given.x, {rows, size, channels});
  if (out.numel() == 0) return out;
  int64_t filled = 0;  // of a row
  for (int64_t l = 0; l <= lmax_out; ++l) filled += layout && layout->out[size_t(l)] < 0 ? 0 : channels * (2 * l + 1);
  if (C == 0 || (layout && filled < layout->size)) torch::stable::zero_(out);
  if (C == 0) return out;
  const Tensor x = made_contiguous(given.x), y = made_contiguous(given.y);
  const auto made = [&](const std::optional<Tensor>& scale) {
    return scale ? std::optional<Tensor>(made_contiguous(*scale)) : std::nullopt;
  };
  const auto scale_x = made(given.scale_x), scale_y = made(given.scale_y), scale_out = made(given.scale_out);
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
        found.channels = layout ? 0 : data->size(2);
        found.row = data->numel() / rows;
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
    job.z.channels = channels;
    job.z.row = out.numel() / rows;
    if (layout) {
      job.x.channels = layout->mul_x;
      job.y.channels = layout->mul_y;
      job.x.starts = layout->x.data();
      job.y.starts = layout->y.data();
      job.z.starts = layout->out.data();
    }
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
    const int64_t needed = (leaf.scratch(job) + 15) / 16 * 16;
    std::vector<T> scratch(size_t(max_threads(total, block) * needed) + 64 / sizeof(T));
    T* first = aligned(scratch);
    parallel_blocks(total, block, [&](int64_t thread, int64_t begin, int64_t end) {
      leaf.run(job, begin, end, first + thread * needed);
    });
  });
  return out;
}

Tensor gaunt_product_cpu(const Tensor& x, const Tensor& y, const std::optional<Tensor>& scale_x,
                         const std::optional<Tensor>& scale_y, const std::optional<Tensor>& scale_out, int64_t lmax_x,
                         int64_t lmax_y, int64_t lmax_out, int64_t channels, bool bracket, std::string method) {
  return product("gaunt_product", {x, y, scale_x, scale_y, scale_out, lmax_x, lmax_y, lmax_out, channels, nullptr}, bracket,
                 method);
}

Tensor gaunt_product_irreps_cpu(const Tensor& x, const Tensor& y, const std::optional<Tensor>& scale_x,
                                const std::optional<Tensor>& scale_y, const std::optional<Tensor>& scale_out,
                                std::vector<int64_t> starts_x, std::vector<int64_t> starts_y,
                                std::vector<int64_t> starts_out, int64_t mul_x, int64_t mul_y, int64_t size,
                                int64_t channels, bool bracket, std::string method) {
  const GauntLayout layout{starts_x, starts_y, starts_out, mul_x, mul_y, size};
  const auto lmax = [](const std::vector<int64_t>& starts) { return int64_t(starts.size()) - 1; };
  return product("gaunt_product_irreps",
                 {x, y, scale_x, scale_y, scale_out, lmax(starts_x), lmax(starts_y), lmax(starts_out), channels, &layout},
                 bracket, method);
}

std::string gaunt_auto_cpu(const Tensor&, int64_t lmax_x, int64_t lmax_y, int64_t lmax_out, bool bracket) {
  return gaunt_takes_sparse(lmax_x, lmax_y, lmax_out, bracket) ? "sparse" : "separable";
}

}  // namespace
}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CPU, m) {
  m.impl("gaunt_product", TORCH_BOX(&geo::gaunt_product_cpu));
  m.impl("gaunt_product_irreps", TORCH_BOX(&geo::gaunt_product_irreps_cpu));
  m.impl("gaunt_auto", TORCH_BOX(&geo::gaunt_auto_cpu));
}
