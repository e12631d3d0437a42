#pragma once
// What the launcher in gaunt.cpp calls: leaf kernels over raw pointers, one table per SIMD level and dtype.
#include <stdint.h>

#include "../gaunt.h"
#include "../half.h"
#include "simd_level.h"

namespace geo {

// Coefficients [R, (lmax+1)^2, channels], or in e3nn's layout: degree l is a block [channels, 2l+1] from starts[l] on in rows
// of `row` elements, or absent (-1). And the factors of the degrees [R or 1, lmax+1, scale_channels], or null.
template <class S>
struct GauntOperand {
  const S* data;
  const S* scale;
  int64_t channels, scale_channels, scale_row;  // scale_row: elements from row to row, 0 where all share one
  int64_t row;
  const int64_t* starts;  // null: not in e3nn's layout
  int lmax;
};

enum class GauntForm { kStraight, kSparse, kSeparable };

// The product proper, of staged operands.
template <class T>
struct GauntProduct {
  int L1, L2, L3;
  bool bracket;
  GauntForm form;
  const T *in[2][2], *polar_out;  // SeparableTables
  int num_pairs;                  // SparseTables
  const int32_t *i, *j, *ptr, *pair;
  const uint8_t* both;
  const T* value;
};

template <class S>
struct Gaunt {
  GauntProduct<typename accumulate<S>::type> product;
  GauntOperand<S> x, y, z;  // z.data is null: the output stands beside it
  S* out;                   // laid out as z says; with `sum` one channel, the sum of all
  int64_t C;
  bool sum;
  bool samples;  // lanes run over rows and channels alike, not over the channels of one row: for few channels
};

template <class S>
struct GauntTable {
  int64_t lanes;
  int64_t (*scratch)(const Gaunt<S>&);  // elements that run needs, aligned to 64 bytes
  // rows [begin, end), or samples r * C + c from a multiple of `lanes` on
  void (*run)(const Gaunt<S>&, int64_t begin, int64_t end, typename accumulate<S>::type* scratch);
};

GEO_DECLARE_TABLE(GauntTable<float>, gaunt_float)
GEO_DECLARE_TABLE(GauntTable<double>, gaunt_double)
GEO_DECLARE_TABLE(GauntTable<bfloat16>, gaunt_bfloat16)
GEO_DECLARE_TABLE(GauntTable<float16>, gaunt_float16)

}  // namespace geo
