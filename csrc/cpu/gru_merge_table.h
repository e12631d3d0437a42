#pragma once
// What the launcher in gru_merge.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
//
// Pairs are taken in panels, with features along the lanes. Rows of features are filled up to whole vectors ("wide"), the
// weights with zeros.
//
// The gates r and z of both ways of a pair (a, b) need W a + U b and W b + U a, which are the sum and the difference of
// (W + U) / 2 (a + b) and (W - U) / 2 (a - b): half the products. So the six matrices here, in this order, are those two of
// r and z, (W_r + U_r) / 2, (W_z + U_z) / 2, (W_r - U_r) / 2, (W_z - U_z) / 2, and W_n and U_n.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

constexpr int64_t kMergePairs = 48;  // of a panel

struct GRUMergeJob {
  int64_t features, wide, rows;
  const int64_t *left, *right;
  const void* x;       // [R, F]
  const void* weight;  // of each vector of outputs [F, 4, lanes] and [F, 2, lanes], the first four matrices and the others
  const void* bias;    // [wide / lanes, 4, lanes]: of r and z both, of n the input's and the state's
  void* out;           // [P, F]
  // of the gradient
  const void* grad;  // [P, F]
  const void* back;  // [6 F, wide], the matrices, or null without sides
  void* sides;       // [2 P, F], the gradients of the left rows and of the right ones, or null
  int64_t pairs;
};

// Which entry of left (fault 0) or right (1) is out of range, if any (-1): the first one, of a pair the left one.
struct MergeOutcome {
  int fault;
  int64_t position;
};

struct GRUMergeTable {
  int64_t lanes;
  // How many numbers: of `scratch`, and of `sums`, [6 F, wide] and [4, wide], the gradients of the matrices and of the
  // biases. Both are aligned to 64 bytes; sums, which may be null, are added to.
  int64_t (*scratch)(const GRUMergeJob&, bool backward);
  MergeOutcome (*forward)(const GRUMergeJob&, int64_t begin, int64_t end, void* scratch);
  MergeOutcome (*backward)(const GRUMergeJob&, int64_t begin, int64_t end, void* scratch, void* sums);
};

GEO_DECLARE_TABLE(GRUMergeTable, gru_merge_float)
GEO_DECLARE_TABLE(GRUMergeTable, gru_merge_double)

}  // namespace geo
