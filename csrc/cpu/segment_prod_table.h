#pragma once
// What the launcher in segment_prod.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "gather_mul_table.h"
#include "simd_level.h"

namespace geo {

// out[e] = g[i] times the product of the rows of segment i other than e. Segment i holds the rows
// perm[ptr[i]:ptr[i + 1]] of x (null perm: the places themselves).
struct OthersJob {
  const int64_t* ptr;
  const int64_t* perm;
  int64_t num_rows, width;
  const void* x;  // [num_rows, width]
  const void* g;  // [N, width]
  void* out;      // [num_rows, width]
  const int64_t* index;  // the segment of each row, or null
  int64_t num_segments;
};

// `scratch` holds `scratch_lanes` numbers of the accumulation type for each row of the longest run of rows. Leaves check
// perm while they read.
struct OthersTable {
  int64_t scratch_lanes;
  Outcome (*run)(const OthersJob&, int64_t first, int64_t last, void* scratch);  // segments [first, last)
  // the places [begin, end) of a hub; rows of the accumulation type: the products of what comes before and after them
  Outcome (*piece)(const OthersJob&, int64_t segment, int64_t begin, int64_t end, const void* before, const void* after,
                   void* scratch);
  // The same of one column by index, where out has the accumulation type: two passes over the rows [begin, end) in the
  // order they stand, the second backwards. `products` [N] holds what comes before them, for the second pass after them.
  // The first checks index; without out it multiplies alone.
  Outcome (*first)(const OthersJob&, int64_t begin, int64_t end, void* products);
  void (*second)(const OthersJob&, int64_t begin, int64_t end, void* products);
};
GEO_DECLARE_TABLE(OthersTable, others_float)
GEO_DECLARE_TABLE(OthersTable, others_double)
GEO_DECLARE_TABLE(OthersTable, others_bfloat16)
GEO_DECLARE_TABLE(OthersTable, others_float16)

}  // namespace geo
