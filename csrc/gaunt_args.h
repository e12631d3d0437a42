#pragma once
// What both launchers of gaunt_product check and choose.
#include <algorithm>
#include <optional>
#include <string>

#include "dispatch.h"
#include "gaunt.h"

namespace geo {

struct GauntArguments {
  const Tensor &x, &y;
  const std::optional<Tensor>&scale_x, &scale_y, &scale_out;
  int64_t lmax_x, lmax_y, lmax_out, channels;
};

// Returns the channels of the product: `channels`, or all that are summed where that is one.
inline int64_t check_gaunt(const char* op, const GauntArguments& a) {
  constexpr int64_t kMost = 128;
  const Tensor& x = a.x;
  int64_t C = a.channels;
  STD_TORCH_CHECK(C >= 0, op, ": channels must not be negative");
  const auto check = [&](const Tensor& t, const char* name, int64_t lmax, int64_t rows, bool shared) {
    STD_TORCH_CHECK(0 <= lmax && lmax <= kMost, op, ": a degree lies in [0, ", kMost, "], got ", lmax);
    STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == rows && (t.size(0) == x.size(0) || (shared && t.size(0) == 1)), op, ": ",
                    name, " must be [R, ", rows, ", C]");
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": all tensors must have one dtype");
    STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), op, ": all tensors must be on one device");
    if (t.size(2) == 1) return;
    STD_TORCH_CHECK(C == 1 || C == t.size(2), op, ": ", name, " has ", t.size(2), " channels, others ", C);
    C = t.size(2);
  };
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [R, (L+1)^2, C]");
  check(x, "x", a.lmax_x, (a.lmax_x + 1) * (a.lmax_x + 1), false);
  check(a.y, "y", a.lmax_y, (a.lmax_y + 1) * (a.lmax_y + 1), false);
  if (a.scale_x) check(*a.scale_x, "scale_x", a.lmax_x, a.lmax_x + 1, true);
  if (a.scale_y) check(*a.scale_y, "scale_y", a.lmax_y, a.lmax_y + 1, true);
  STD_TORCH_CHECK(0 <= a.lmax_out && a.lmax_out <= kMost, op, ": a degree lies in [0, ", kMost, "], got ", a.lmax_out);
  if (a.scale_out) check(*a.scale_out, "scale_out", a.lmax_out, a.lmax_out + 1, true);
  return C;
}

// 'auto': straight kernels where there are any; lists of couplings while they are shorter than about the separable form.
inline bool gaunt_takes_sparse(int64_t lmax_x, int64_t lmax_y, int64_t lmax_out, bool) {
  return has_straight(int(lmax_x), int(lmax_y), int(lmax_out));
}

}  // namespace geo
