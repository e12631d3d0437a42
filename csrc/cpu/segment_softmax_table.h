#pragma once
// What the launcher in segment_softmax.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

// Rows [E, width] and segments [N, width], contiguous; T is the accumulation type of the rows' type S. Segment i holds
// the rows perm[ptr[i]:ptr[i + 1]] (null perm: the places are the rows).
struct SegmentJob {
  const int64_t* ptr;
  const int64_t* perm;
  int64_t num_edges, width;
  const void* x;     // rows of S: the input; the output for the gradient of softmax
  const void* g;     // gradient: rows of S, for log-sum-exp segments of T
  const void* level;  // segments of T: the log-sum-exp
  void* out;         // rows of S for softmax and gradients; segments of T for log-sum-exp, of S for std
  void* mean;        // segments of T
  bool log, unbiased;
};

// A hub is read in pieces: each leaves `parts` rows of T, which finish() merges into the first piece's, before rows are
// written with it. Where parts is 0 rows are written at once, and where write is null there are none to write.
struct SegmentKernel {
  int parts;
  void (*run)(const SegmentJob&, int64_t first, int64_t last);  // whole segments
  void (*piece)(const SegmentJob&, int64_t begin, int64_t end, void* state);
  void (*finish)(const SegmentJob&, int64_t segment, void* states);
  void (*write)(const SegmentJob&, int64_t segment, int64_t begin, int64_t end, const void* state);
};

struct SegmentSoftmaxTable {
  SegmentKernel softmax, softmax_grad, logsumexp, logsumexp_grad, std;
};

GEO_DECLARE_TABLE(SegmentSoftmaxTable, segment_softmax_float)
GEO_DECLARE_TABLE(SegmentSoftmaxTable, segment_softmax_double)
GEO_DECLARE_TABLE(SegmentSoftmaxTable, segment_softmax_bfloat16)
GEO_DECLARE_TABLE(SegmentSoftmaxTable, segment_softmax_float16)

}  // namespace geo
