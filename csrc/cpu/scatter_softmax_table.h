#pragma once
// What the launcher in scatter_softmax.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

// Rows [E, width] and segments [N, width], contiguous; T is the accumulation type of the rows' type S. Segment index[e]
// holds row e. A pass reads the entries [begin, end) of the rows, of E * width in all, in their order.
struct ScatterJob {
  const int64_t* index;
  int64_t num_rows, size, width;
  const void* x;      // rows of S: the input; the output for the gradient of softmax
  const void* g;      // gradient: rows of S, for log-sum-exp segments of T
  const void* level;  // segments of T: the log-sum-exp
  void* out;          // rows of S
  bool log;
};

// What a table of sums of exponentials is filled with: adding one, of 0 even, makes it +0 or more.
template <class T>
constexpr T kNoSum = T(-0.0);

// Tables are segments of T. A pass that fills one may be called before the index was checked: it returns the first row out
// of range, or -1.
struct ScatterSoftmaxTable {
  int64_t (*maximum)(const ScatterJob&, int64_t begin, int64_t end, void* max);
  // Adds exp(x - max), without max exp(x). For softmax of float and double they are left in `out`. `last`, where it is not
  // null, is left with the last x of each segment.
  int64_t (*sum)(const ScatterJob&, int64_t begin, int64_t end, const void* max, void* sum, void* last);
  void (*softmax)(const ScatterJob&, int64_t begin, int64_t end, const void* max, const void* divisor);
  int64_t (*grad_sum)(const ScatterJob&, int64_t begin, int64_t end, void* sum);
  void (*softmax_grad)(const ScatterJob&, int64_t begin, int64_t end, const void* sum);
  int64_t (*logsumexp_grad)(const ScatterJob&, int64_t begin, int64_t end);

  // Of the entries [begin, end) of tables: whole vectors, but for the last. `parts` tables, of `entries` each, are merged
  // into the first, in order; false where one of the sums could not be used if it were one of exponentials without maximum.
  bool (*merge)(void* sums, int64_t parts, int64_t entries, int64_t begin, int64_t end);
  void (*merge_last)(const void* sums, void* lasts, int64_t parts, int64_t entries, int64_t begin, int64_t end);
  void (*merge_maximum)(void* maxima, int64_t parts, int64_t entries, int64_t begin, int64_t end);
  void (*divisor)(const void* max, void* sum, int64_t begin, int64_t end, bool log);
  // With max or, where it is not null, last: that is the result where it is all there is to the sum.
  void (*logsumexp)(const void* max, const void* sum, const void* last, int64_t begin, int64_t end, void* out);
};

GEO_DECLARE_TABLE(ScatterSoftmaxTable, scatter_softmax_float)
GEO_DECLARE_TABLE(ScatterSoftmaxTable, scatter_softmax_double)
GEO_DECLARE_TABLE(ScatterSoftmaxTable, scatter_softmax_bfloat16)
GEO_DECLARE_TABLE(ScatterSoftmaxTable, scatter_softmax_float16)

}  // namespace geo
