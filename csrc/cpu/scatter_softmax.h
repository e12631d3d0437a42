#pragma once
// Softmax and log-sum-exp of rows in any order, by the segment of each: src [E, *F], contiguous, and index
// [E] in [0, size). What is wrong with the index is reported for `op` as one of the argument `name`.
#include "../dispatch.h"

namespace geo {

// Whether rows this narrow are better taken in their order than through a permutation.
bool takes_rows_in_order(int64_t width);

Tensor softmax_by_index(const char* op, const char* name, const Tensor& src, const Tensor& index, int64_t size, bool log);
Tensor softmax_grad_by_index(const char* op, const char* name, const Tensor& grad, const Tensor& out, const Tensor& index,
                             int64_t size, bool log);
// Unless `single_rows`, the caller puts the rows in place that are alone in their segment: here they are a few eps off.
Tensor logsumexp_by_index(const char* op, const char* name, const Tensor& src, const Tensor& index, int64_t size,
                          bool single_rows);
Tensor logsumexp_grad_by_index(const char* op, const char* name, const Tensor& grad, const Tensor& src, const Tensor& out,
                               const Tensor& index, int64_t size);

}  // namespace geo
