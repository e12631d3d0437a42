#pragma once
// Tensors in, typed pointers out. Lambdas in place of macros: THO_DISPATCH_V2 splits its body at the bare commas of a
// <<<grid, block, 0, stream>>> launch.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "half.h"

namespace geo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// f(S{}) with the storage type of the tensor: float, double, bfloat16 or float16.
template <class F>
void dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default:
      STD_TORCH_CHECK(false, op, ": not implemented for dtype ", torch::headeronly::toString(dtype),
                      ", only for float32, float64, bfloat16 and float16");
  }
}

inline void check_index_dtype(const Tensor& index, const char* op, const char* name) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long, op, ": ", name,
                  " must be int64 with one axis");
}

// torch::stable::contiguous goes through the dispatcher by name: half a microsecond that most tensors need not spend.
inline Tensor made_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline const int64_t* index_data(const Tensor& index) { return static_cast<const int64_t*>(index.const_data_ptr()); }
template <class S>
const S* read(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
S* write(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

}  // namespace geo
