#pragma once
// What the launcher in pair_mlp.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
//
// Pairs are taken in panels, through all layers, with features along the lanes. Rows of features are filled up to whole
// vectors ("wide"), the weights with zeros.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

// Layer 0 are the filters, with one matrix for each graph.
struct PairLayer {
  int64_t in, out, wide_in, wide_out;
  bool relu;
  const void* weight;      // [in, wide_out], of layer 0 [B, in, wide_out]
  const void* transposed;  // [out, wide_in], of layer 0 [B, out, wide_in], or null where eigenvectors get no gradient
  const void* bias;        // [wide_out]
  int64_t sum;             // place of the gradient among a task's sums: [in + 1, wide_out], the bias's in the last row
};

struct PairJob {
  const PairLayer* layers;
  int64_t num_layers;
  const void* eigvecs;  // [N, wide_in of layer 0]
  const void* grad;     // [N, wide_out of the last layer], as out
  const void* zeros;    // as long as the widest row
  void *out, *deigvecs;  // added to
};

// Pairs of the rows [row, row_end) with the columns [column, column_end): two blocks that do not meet, or one, of which each
// pair is taken once.
struct PairBlock {
  int64_t graph, row, row_end, column, column_end;
};

struct PairMLPTable {
  int64_t lanes;
  int64_t (*scratch)(const PairJob&, bool backward);  // how many numbers
  // scratch: aligned to 64 bytes. sums are added to.
  void (*forward)(const PairJob&, const PairBlock&, void* scratch);
  void (*backward)(const PairJob&, const PairBlock&, void* scratch, void* sums);
};

GEO_DECLARE_TABLE(PairMLPTable, pair_mlp_float)
GEO_DECLARE_TABLE(PairMLPTable, pair_mlp_double)

}  // namespace geo
