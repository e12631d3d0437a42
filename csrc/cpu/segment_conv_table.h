#pragma once
// What the launcher in segment_conv.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

struct SegmentConv {
  const void* x;
  const void* other;   // out, which is written, or the gradient
  const void* weight;  // [K, E], in the accumulation type, as are bias [E] (or null) and sums
  const void* bias;
  const int64_t* ptr;
  int64_t E, K;
  bool reverse;
};

// Rows [begin, end), of which the first is in this segment.
struct SegmentConvTable {
  void (*conv)(const SegmentConv&, int64_t segment, int64_t begin, int64_t end);
  void (*weight)(const SegmentConv&, int64_t segment, int64_t begin, int64_t end, void* sum);  // adds to sum [K, E]
};

GEO_DECLARE_TABLE(SegmentConvTable, segment_conv_float)
GEO_DECLARE_TABLE(SegmentConvTable, segment_conv_double)
GEO_DECLARE_TABLE(SegmentConvTable, segment_conv_bfloat16)
GEO_DECLARE_TABLE(SegmentConvTable, segment_conv_float16)

}  // namespace geo
