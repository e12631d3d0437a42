#pragma once
// What both launchers of gaunt_product check and choose.
#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "gaunt.h"

namespace geo {

// Where the degrees of x, y and the output begin in rows of e3nn's layout (-1: absent), and how many channels x and y have;
// rows of the output have `size` elements.
struct GauntLayout {
  const std::vector<int64_t>&x, &y, &out;
  int64_t mul_x, mul_y, size;
};

struct GauntArguments {
  const Tensor &x, &y;
  const std::optional<Tensor>&scale_x, &scale_y, &scale_out;
  int64_t lmax_x, lmax_y, lmax_out, channels;
  const GauntLayout* layout;  // null: x and y are [R, (L+1)^2, C]
};

// Returns the channels of the product: `channels`, or all that are summed where that is one.
inline int64_t check_gaunt(const char* op, const GauntArguments& a) {
  constexpr int64_t kMost = 128;
  const Tensor& x = a.x;
  int64_t C = a.channels;
  STD_TORCH_CHECK(C >= 0, op, ": channels must not be negative");
  const auto agree = [&](const char* name, int64_t channels) {
    if (channels == 1) return;
    STD_TORCH_CHECK(C == 1 || C == channels, op, ": ", name, " has ", channels, " channels, others ", C);
    C = channels;
  };
  const auto same = [&](const Tensor& t, int64_t lmax) {
    STD_TORCH_CHECK(0 <= lmax && lmax <= kMost, op, ": a degree lies in [0, ", kMost, "], got ", lmax);
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": all tensors must have one dtype");
    STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), op, ": all tensors must be on one device");
  };
  const auto check = [&](const Tensor& t, const char* name, int64_t lmax, int64_t rows, bool shared) {
    same(t, lmax);
    STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == rows && (t.size(0) == x.size(0) || (shared && t.size(0) == 1)), op, ": ",
                    name, " must be [R, ", rows, ", C]");
    agree(name, t.size(2));
  };
  const auto check_blocks = [&](const char* name, const std::vector<int64_t>& starts, int64_t lmax, int64_t mul, int64_t size) {
    STD_TORCH_CHECK(int64_t(starts.size()) == lmax + 1 && mul >= 0, op, ": ", name, " needs a start for each degree");
    for (int64_t l = 0; l <= lmax; ++l)
      STD_TORCH_CHECK(starts[size_t(l)] >= -1 && (starts[size_t(l)] < 0 || starts[size_t(l)] + mul * (2 * l + 1) <= size), op,
                      ": a block of ", name, " lies outside its rows");
  };
  if (a.layout) {
    const GauntLayout& layout = *a.layout;
    same(x, a.lmax_x);
    same(a.y, a.lmax_y);
    STD_TORCH_CHECK(x.dim() == 2 && a.y.dim() == 2 && a.y.size(0) == x.size(0), op, ": x and y must be [R, F]");
    check_blocks("x", layout.x, a.lmax_x, layout.mul_x, x.size(1));
    check_blocks("y", layout.y, a.lmax_y, layout.mul_y, a.y.size(1));
    check_blocks("the output", layout.out, a.lmax_out, a.channels, layout.size);
    agree("x", layout.mul_x);
    agree("y", layout.mul_y);
  } else {
    STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [R, (L+1)^2, C]");
    check(x, "x", a.lmax_x, (a.lmax_x + 1) * (a.lmax_x + 1), false);
    check(a.y, "y", a.lmax_y, (a.lmax_y + 1) * (a.lmax_y + 1), false);
  }
  if (a.scale_x) check(*a.scale_x, "scale_x", a.lmax_x, a.lmax_x + 1, true);
  if (a.scale_y) check(*a.scale_y, "scale_y", a.lmax_y, a.lmax_y + 1, true);
  STD_TORCH_CHECK(0 <= a.lmax_out && a.lmax_out <= kMost, op, ": a degree lies in [0, ", kMost, "], got ", a.lmax_out);
  if (a.scale_out) check(*a.scale_out, "scale_out", a.lmax_out, a.lmax_out + 1, true);
  return C;
}

// Vector operations of the list of couplings and of the separable form, per sample.
struct GauntCost {
  int64_t sparse, separable;
};
inline GauntCost gaunt_cost(int L1, int L2, int L3, bool bracket) {
  GauntCost cost{0, 0};
  for (int l1 = 0; l1 <= L1; ++l1)
    for (int m1 = -l1; m1 <= l1; ++m1)
      for (int l2 = 0; l2 <= L2; ++l2)
        for (int m2 = -l2; m2 <= l2; ++m2) {
          const int i = l1 * l1 + l1 + m1, j = l2 * l2 + l2 + m2;
          if (i > j && i < square(L2 + 1) && j < square(L1 + 1)) continue;  // stands with (j, i)
          const int a = m1 < 0 ? -m1 : m1, b = m2 < 0 ? -m2 : m2, orders[2] = {a + b, a < b ? b - a : a - b};
          const bool sine = ((m1 < 0) != (m2 < 0)) != bracket;  // of the output's azimuth
          int64_t terms = 0;
          for (int k = 0; k < (orders[0] == orders[1] ? 1 : 2); ++k) {
            if (sine && orders[k] == 0) continue;
            for (int l3 = larger(orders[k], l1 > l2 ? l1 - l2 : l2 - l1); l3 <= smaller(L3, l1 + l2); ++l3)
              terms += (l1 + l2 + l3 + bracket) % 2 == 0;
          }
          if (terms) cost.sparse += 2 + terms;
        }
  const int64_t half = polar_half(L1 + L2 + L3), fields = bracket ? 2 : 1;
  int64_t products = 0;
  for (int c = 0; c <= L3; ++c)
    products += 4 * (larger(0, smaller(L1, c + L2) - larger(0, c - L2) + 1) + larger(0, smaller(L1, L2 - c)));
  cost.separable = fields * half * (square(L1 + 1) + square(L2 + 1)) + half * square(L3 + 1) +
                   polar_nodes(L1 + L2 + L3) * fields * products;
  return cost;
}

// 'auto': straight kernels where there are any, else the shorter list of operations. Operations of a list are worth as many
// of the separable form, and those of brackets 0.7: the crossover measured on a CPU (benchmarks/tensor_products.md).
inline bool gaunt_takes_sparse(int64_t lmax_x, int64_t lmax_y, int64_t lmax_out, bool bracket) {
  constexpr int64_t kMostSparse = 12;
  if (std::max({lmax_x, lmax_y, lmax_out}) > kMostSparse) return false;
  const int L1 = int(lmax_x), L2 = int(lmax_y), L3 = int(lmax_out);
  if (has_straight(L1, L2, L3)) return true;
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, bool>, bool> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, is_new] = kept.try_emplace({L1, L2, L3, bracket}, false);
  if (is_new) {
    const GauntCost cost = gaunt_cost(L1, L2, L3, bracket);
    place->second = cost.sparse * 10 <= cost.separable * (bracket ? 7 : 10);
  }
  return place->second;
}

}  // namespace geo
