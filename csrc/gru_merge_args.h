#pragma once
// The arguments of gru_merge, checked and contiguous, for every backend.
#include <initializer_list>

#include "dispatch.h"

namespace geo {

struct GRUMergeArgs {
  Tensor x, left, right, weight, bias;
  int64_t rows, pairs, features;

  GRUMergeArgs(const char* op, const Tensor& x_, const Tensor& left_, const Tensor& right_, const Tensor& weight_,
               const Tensor& bias_)
      : x(made_contiguous(x_)), left(made_contiguous(left_)), right(made_contiguous(right_)),
        weight(made_contiguous(weight_)), bias(made_contiguous(bias_)) {
    STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [R, F]");
    check_index_dtype(left, op, "left");
    check_index_dtype(right, op, "right");
    rows = x.size(0);
    pairs = left.numel();
    features = x.size(1);
    STD_TORCH_CHECK(right.numel() == pairs, op, ": left and right must have equal length");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 6 * features && weight.size(1) == features, op,
                    ": weight must be [6 F, F]");
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == 6 * features, op, ": bias must be [6 F]");
    for (const Tensor* t : {&left, &right, &weight, &bias})
      STD_TORCH_CHECK(t->is_cuda() == x.is_cuda(), op, ": all tensors must be on one device");
    for (const Tensor* t : {&weight, &bias}) check_dtype(op, *t);
  }

  // The gradient of the result.
  Tensor grad(const char* op, const Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == pairs && grad.size(1) == features && grad.is_cuda() == x.is_cuda(),
                    op, ": grad must be of the shape of the result");
    check_dtype(op, grad);
    return made_contiguous(grad);
  }

  Tensor buffer(std::initializer_list<int64_t> sizes) const { return torch::stable::new_empty(x, sizes); }

  // f(T{}), float or double
  template <class F>
  void dispatch(const char* op, F&& f) const {
    if (x.scalar_type() == ScalarType::Float) return f(float{});
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, op, ": not implemented for dtype ",
                    torch::headeronly::toString(x.scalar_type()), ", only for float32 and float64");
    f(double{});
  }

 private:
  void check_dtype(const char* op, const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": all floating tensors must have one dtype");
  }
};

}  // namespace geo
