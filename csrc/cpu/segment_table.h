#pragma once
// What segment.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "gather_mul_table.h"
#include "simd_level.h"

namespace geo {

// Segment i holds the rows perm[ptr[i]:ptr[i + 1]] of src [num_rows, width]; null perm: the places themselves.
struct SegmentArgs {
  const void* src;
  void* out;
  int64_t* arg;  // of the extremes
  const int64_t* ptr;
  const int64_t* perm;
  int64_t num_rows, width;
  bool mean;
};

// Rows of src [num_rows, width] to be added to the rows index[e] of an output [size, width].
struct ScatterArgs {
  const void* src;
  const int64_t* index;
  int64_t num_rows, size, width;
};

enum Combine { kSum, kProduct, kLeast, kGreatest, kMinimum, kMaximum };  // places below; the last two tell the row, too

// Leaves check perm and index while they read.
struct SegmentTable {
  // segments [first, last) to out, and to arg
  Outcome (*reduce[6])(const SegmentArgs&, int64_t first, int64_t last);
  // places [begin, end) to one row: in the accumulation type, or, with arg, in that of src
  Outcome (*piece[6])(const SegmentArgs&, int64_t begin, int64_t end, void* row, int64_t* arg);
  // out[index[e]] += src[e] (*=) for e in [begin, end), in order; out is in the accumulation type; counts rows, if not null
  Outcome (*take[2])(const ScatterArgs&, int64_t begin, int64_t end, void* out, int32_t* count);
  // best[index[e]] = max(best[index[e]], rank of src[e] << 32 | ~(e - begin)), for at most 32 bits a value, 2^32 rows
  // and 4 columns: of equal values the first row wins
  Outcome (*rank)(const ScatterArgs&, int64_t begin, int64_t end, bool largest, uint64_t* best);
};
GEO_DECLARE_TABLE(SegmentTable, segment_float)
GEO_DECLARE_TABLE(SegmentTable, segment_double)
GEO_DECLARE_TABLE(SegmentTable, segment_bfloat16)
GEO_DECLARE_TABLE(SegmentTable, segment_float16)

// Rows of `bytes` bytes of any type.
struct RowsArgs {
  const char* from;
  char* to;
  const int64_t* ptr;
  const int64_t* perm;
  const int64_t* index;
  int64_t num_segments, num_rows, bytes;
  bool stream;  // store past the caches
};
struct RowsTable {
  Outcome (*take)(const RowsArgs&, int64_t begin, int64_t end);    // to[e] = from[index[e]]
  Outcome (*spread)(const RowsArgs&, int64_t begin, int64_t end);  // to[k or perm[k]] = from[segment of k]
};
GEO_DECLARE_TABLE(RowsTable, segment_rows)

}  // namespace geo
