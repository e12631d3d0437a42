#pragma once
// The arguments of pair_mlp, checked and contiguous, for every backend.
#include <initializer_list>
#include <vector>

#include "dispatch.h"

namespace geo {

struct PairMLPArgs {
  Tensor eigvecs, filters, ptr, params;
  std::vector<int64_t> widths;  // of the input of each layer, and of the last one's output; layer 0 are the filters
  bool leading;                 // there is a bias of layer 0, and a ReLU behind it
  int64_t nodes, graphs;

  PairMLPArgs(const char* op, const Tensor& eigvecs_, const Tensor& filters_, const Tensor& ptr_, const Tensor& params_,
              const std::vector<int64_t>& layers, bool leading_)
      : eigvecs(made_contiguous(eigvecs_)), filters(made_contiguous(filters_)), ptr(made_contiguous(ptr_)),
        params(made_contiguous(params_)), leading(leading_) {
    STD_TORCH_CHECK(eigvecs.dim() == 2 && filters.dim() == 3 && params.dim() == 1, op,
                    ": eigvecs must be [N, K], filters [B, K, M] and params have one axis");
    check_index_dtype(ptr, op, "ptr");
    nodes = eigvecs.size(0);
    graphs = filters.size(0);
    STD_TORCH_CHECK(ptr.numel() == graphs + 1 && filters.size(1) == eigvecs.size(1), op, ": filters must be [B, K, M]");
    check_like_eigvecs(op, filters);
    check_like_eigvecs(op, ptr, false);
    check_like_eigvecs(op, params);
    widths = {eigvecs.size(1), filters.size(2)};
    int64_t size = leading ? widths[1] : 0;
    for (int64_t out : layers) {
      STD_TORCH_CHECK(out >= 0, op, ": widths must not be negative");
      size += (widths.back() + 1) * out;
      widths.push_back(out);
    }
    STD_TORCH_CHECK(params.numel() == size, op, ": params must have ", size, " entries for these widths");
  }
  int64_t num_layers() const { return int64_t(widths.size()) - 1; }

  // The gradient of the result.
  Tensor grad(const char* op, const Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == nodes && grad.size(1) == widths.back(), op,
                    ": grad must be of the shape of the result");
    check_like_eigvecs(op, grad);
    return made_contiguous(grad);
  }

  Tensor buffer(std::initializer_list<int64_t> sizes) const { return torch::stable::new_empty(eigvecs, sizes); }

  // f(T{}), float or double
  template <class F>
  void dispatch(const char* op, F&& f) const {
    if (eigvecs.scalar_type() == ScalarType::Float) return f(float{});
    STD_TORCH_CHECK(eigvecs.scalar_type() == ScalarType::Double, op, ": not implemented for dtype ",
                    torch::headeronly::toString(eigvecs.scalar_type()), ", only for float32 and float64");
    f(double{});
  }

 private:
  void check_like_eigvecs(const char* op, const Tensor& t, bool floating = true) const {
    STD_TORCH_CHECK(t.is_cuda() == eigvecs.is_cuda(), op, ": all tensors must be on one device");
    STD_TORCH_CHECK(!floating || t.scalar_type() == eigvecs.scalar_type(), op,
                    ": all floating tensors must have one dtype");
  }
};

}  // namespace geo
