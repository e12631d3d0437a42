#pragma once
// What the launcher in gather_linear.cpp calls: leaf kernels over raw pointers, one table per SIMD level and dtype.
#include <stdint.h>

#include "../half.h"
#include "gather_mul_table.h"
#include "simd_level.h"

namespace geo {

// One pass over the edges in the order of a CSR. Each edge e of segment i gathers the row in_index[e] of `in` and adds
// (basis[e] W^T) * in to row i of `out`; with `own`, it also forms the product own[i] * in and from it the gradients of
// basis and of weight. Rows of nodes are [O, pitch] in the accumulation type T, pitch a multiple of the SIMD width, zero
// beyond C.
template <class S>
struct GatherLinear {
  using T = typename accumulate<S>::type;
  const T* in;
  const T* own;  // null unless dbasis or dweight is wanted
  T* out;        // null unless wanted
  const S* basis;
  S* dbasis;            // null unless wanted
  const T* by_basis;    // W packed for basis W^T: depth B, columns C
  const T* by_channel;  // W packed for (x g) W: depth C, columns B; null unless dbasis is wanted
  const int64_t *ptr, *perm, *in_index;  // perm may be null
  int64_t num_edges, num_segments, num_in, O, basis_O, B, C, pitch;
  bool stream;  // store dbasis past the caches; it is aligned to 64 bytes
};

template <class S>
struct GatherLinearChunk {
  using T = typename accumulate<S>::type;
  int64_t begin, end;  // positions in the order of the CSR
  bool last;
  T* head;     // [O, pitch]: the part of a segment that an earlier chunk began
  T* dweight;  // [B, pitch], or null
  T* scratch;  // as many elements as scratch() says
};

template <class S>
struct GatherLinearTable {
  using T = typename accumulate<S>::type;
  int64_t lanes;  // elements of a SIMD vector
  // W [depth, columns] with the given strides, in panels a few vectors wide; packed_size elements
  int64_t (*packed_size)(int64_t depth, int64_t columns);
  void (*pack)(T* to, const T* from, int64_t depth, int64_t columns, int64_t depth_stride, int64_t column_stride);
  int64_t (*scratch)(const GatherLinear<S>&);
  Outcome (*run)(const GatherLinear<S>&, const GatherLinearChunk<S>&);
};

GEO_DECLARE_TABLE(GatherLinearTable<float>, gather_linear_float)
GEO_DECLARE_TABLE(GatherLinearTable<double>, gather_linear_double)
GEO_DECLARE_TABLE(GatherLinearTable<bfloat16>, gather_linear_bfloat16)
GEO_DECLARE_TABLE(GatherLinearTable<float16>, gather_linear_float16)

}  // namespace geo
