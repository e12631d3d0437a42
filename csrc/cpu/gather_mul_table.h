#pragma once
// What the launchers in gather_mul.cpp call: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

struct Outcome {  // of a leaf: -1, or which index (segments.h: Fault) was out of range, and where
  int fault;
  int64_t position;
};

// A feature row seen as `num_planes` planes of rows x cols; plane q starts at x_offset[q] in a row of x and at
// w_offset[q] in a row of w. Element (r, c) of a plane is r * cols + c in x and r * w_row + c * w_col in w, with
// w_col 0 or 1: everything that sharing can do to the two innermost groups of axes.
struct Planes {
  int64_t num_planes, rows, cols, w_row, w_col;
  const int64_t* x_offset;
  const int64_t* w_offset;
};

// out[i] = sum of x[src[e]] * w[e] over e = perm[k], ptr[i] <= k < ptr[i + 1]. Null src, perm: e itself; null w: ones.
struct GatherMulSum {
  const void* x;
  const void* w;
  void* out;
  const int64_t* src;
  const int64_t* ptr;
  const int64_t* perm;
  int64_t num_src, num_edges, num_features, num_weights;
  Planes planes;
  bool mean;
  bool huge_rows;  // prefetch rows ahead: they do not fit the caches
};

// out[e] = x[src[e]] * g[dst[e]], summed over the features that share an element of the output row.
struct GatherMul {
  const void* x;
  const void* g;
  void* out;
  const int64_t* src;
  const int64_t* dst;
  int64_t num_src, num_dst, num_features, num_weights;
  Planes planes;
  bool stream;  // store past the caches
};

struct GatherMulTable {
  // segments [first, last) to out; `scratch` holds one row of features in the accumulation type
  Outcome (*sum_segments)(const GatherMulSum&, int64_t first, int64_t last, void* scratch);
  // edges [begin, end) of the CSR order to one row of features in the accumulation type
  Outcome (*sum_edges)(const GatherMulSum&, int64_t begin, int64_t end, void* row);
  // out[i] = the sum of `count` such rows (divided by `length` for a mean)
  void (*sum_rows)(const GatherMulSum&, int64_t i, const void* rows, int64_t count, int64_t length);
  // edges [begin, end); `scratch` holds one row of weights in the accumulation type
  Outcome (*product)(const GatherMul&, int64_t begin, int64_t end, void* scratch);
};

GEO_DECLARE_TABLE(GatherMulTable, gather_mul_float)
GEO_DECLARE_TABLE(GatherMulTable, gather_mul_double)
GEO_DECLARE_TABLE(GatherMulTable, gather_mul_bfloat16)
GEO_DECLARE_TABLE(GatherMulTable, gather_mul_float16)

}  // namespace geo
