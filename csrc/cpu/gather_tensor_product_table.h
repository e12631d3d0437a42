#pragma once
// What the launcher in gather_tensor_product.cpp calls: leaf kernels over raw pointers, one table per SIMD level and dtype.
#include <stdint.h>

#include "../half.h"
#include "gather_mul_table.h"
#include "simd_level.h"

namespace geo {

// Where a block [mul, d] of a node's row stands in the packed row [d, pitch], pitch a multiple of the SIMD width.
struct ProductBlock {
  int64_t first, mul, d, packed, pitch;
};

// One path as the leaf runs it; offsets into the packed rows and the arrays of the job.
struct ProductPath {
  int64_t in, own, mul, pitch, d_in, d_own;
  int64_t sh, d_sh;
  int64_t weight, shared_weight;  // column in a row of weights, negative without weights; in the padded sums of a chunk
  int64_t matrix;                 // [d_own, d_in] in the edge's matrices
  int64_t terms;                  // in term_ptr: d_sh + 1 entries
};

// The matrices of all paths that read the same irrep of an edge, one after the other and padded to whole vectors.
struct ProductMatrices {
  int64_t sh, d_sh, matrix, size;
  int64_t coefficients;  // [d_sh, size]
};

// A nonzero coefficient of one component of sh: its entry in the path's matrix.
template <class T>
struct ProductTerm {
  int64_t entry;
  T coefficient;
};

// One pass over the edges in the order of a CSR. Each edge of segment i gathers the packed row in_index[e] of `in` and adds
// w M in to row i of `out`; with `own`, the gradients of sh and weight come from row i of `own`, row in_index[e] and M.
template <class S>
struct GatherProduct {
  using T = typename accumulate<S>::type;
  const T* in;   // packed
  const S* own;  // null unless dsh or dweight is wanted
  S* out;        // null unless wanted
  const S *sh, *weight;
  S *dsh, *dweight;        // null unless wanted; dweight also null where weights are shared
  int64_t weight_stride;   // 0 where all edges share the weights
  const ProductPath* paths;
  const ProductMatrices* matrices;
  const ProductBlock* own_blocks;
  const T* coefficients;
  const ProductTerm<T>* terms;
  const int64_t* term_ptr;
  int64_t num_paths, num_matrices, num_own_blocks, in_row, own_row, own_dim, dim_sh, dim_weight, num_shared;
  int64_t matrix_row, matrix_max, pitch_max;
  bool own_covered;                      // every column of out is in a block
  bool stream;                           // store dweight past the caches: it is large, and its rows are whole cache lines
  const int64_t *ptr, *perm, *in_index;  // perm may be null
  int64_t num_edges, num_segments, num_in;
};

template <class S>
struct GatherProductChunk {
  using T = typename accumulate<S>::type;
  int64_t begin, end;  // positions in the order of the CSR
  bool last;
  T *head, *tail;  // packed rows of out: the part of a segment that an earlier chunk began, or that a later one goes on with
  T* dweight;      // sums of shared weights, padded; or null
  T* scratch;      // as many elements as scratch() says
};

template <class S>
struct GatherProductTable {
  using T = typename accumulate<S>::type;
  int64_t lanes;  // elements of a SIMD vector
  // Rows of [mul, d] blocks to packed rows, and back; what stands in no block is left alone.
  void (*pack)(T* to, const S* from, const ProductBlock* blocks, int64_t num_blocks);
  void (*unpack)(S* to, const T* from, const ProductBlock* blocks, int64_t num_blocks);
  int64_t (*scratch)(const GatherProduct<S>&);
  Outcome (*run)(const GatherProduct<S>&, const GatherProductChunk<S>&);
};

GEO_DECLARE_TABLE(GatherProductTable<float>, gather_product_float)
GEO_DECLARE_TABLE(GatherProductTable<double>, gather_product_double)
GEO_DECLARE_TABLE(GatherProductTable<bfloat16>, gather_product_bfloat16)
GEO_DECLARE_TABLE(GatherProductTable<float16>, gather_product_float16)

}  // namespace geo
