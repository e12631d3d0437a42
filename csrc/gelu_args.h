#pragma once
// What both launchers check.
#include <optional>

#include "dispatch.h"

namespace geo {

inline void check_gelu(const char* op, int64_t order, int64_t most, const Tensor& x, const std::optional<Tensor>& g) {
  STD_TORCH_CHECK(0 <= order && order <= most, op, ": order must be in [0, ", most, "], got ", order);
  if (!g) return;
  STD_TORCH_CHECK(g->scalar_type() == x.scalar_type(), op, ": all tensors must have one dtype");
  bool same = g->dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = g->size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": all tensors must have one shape");
}

}  // namespace geo
