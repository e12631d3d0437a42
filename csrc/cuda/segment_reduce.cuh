#pragma once
// Reductions of segments of rows: sums, products, extremes, and the weighted sums of gather_mul.
//
// A lane holds V neighbouring columns, 16 bytes where rows allow it; `lanes` lanes side by side cover a tile of columns, and
// the other lanes of those that share a segment take further rows, merged by a tree of shuffles. Who shares it is decided by
// its own length: a team of some lanes of a warp, the warp, or the block; hubs are cut into pieces (segments.h), a block
// each. So the order in which the rows of a segment are combined depends on its length and on the width alone.
#include "../gather_mul.h"
#include "device.h"

namespace geo {
namespace reduce {

constexpr int kWarpBits = 5, kWarp = 1 << kWarpBits, kWarps = 8;  // threads of a warp, warps of a block
template <int V>
constexpr int kAhead = V == 1 ? 8 : 4;  // rows that a lane reads at once
constexpr int kBytes = 16;              // the widest load

// V elements that are loaded and stored together.
template <typename S, int V>
struct alignas(sizeof(S) * V < kBytes ? sizeof(S) * V : kBytes) Pack {
  S at[V];
};

template <size_t bytes>
struct word;
template <>
struct word<2> {
  typedef unsigned short type;
};
template <>
struct word<4> {
  typedef unsigned type;
};
template <>
struct word<8> {
  typedef uint2 type;
};
template <>
struct word<16> {
  typedef uint4 type;
};

template <typename S>
struct Job {
  const S *x, *w;                      // w: weights of edges, see gather_mul.h
  const int64_t *ptr, *perm, *source;  // perm, source null: the place, the edge itself
  S* out;
  int64_t* arg;                        // of extremes; null: not wanted
  int64_t num_rows, num_edges, num_segments, width;  // num_rows of x
  bool mean, largest;
  FeatureLayout layout;
  long long* flag;
};

// How threads are laid over segments.
struct Shape {
  int lane_bits, team_bits;  // 2^lane_bits lanes over columns, 2^team_bits lanes share a short segment
  int medium, long_;         // lengths from which on a warp takes a segment, and a block
  int per_block;             // segments that a block takes at a time
  int64_t tiles, slots, groups;
};

template <typename S>
constexpr int columns_of = kBytes / int(sizeof(S));

// The columns of a lane, the first of which is f and stands at `first`.
template <bool kPacked>
__device__ __forceinline__ int64_t column(int64_t f, int j, int lanes) {
  return kPacked ? f + j : f + j * lanes;
}
template <int V, bool kPacked, typename T>
__device__ __forceinline__ void load_columns(const T* first, int64_t f, int lanes, int64_t width, Pack<T, V>& to) {
  if constexpr (kPacked) {
    to = *reinterpret_cast<const Pack<T, V>*>(first);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (f + j * lanes < width) to.at[j] = first[j * lanes];
  }
}
template <int V, bool kPacked, typename T>
__device__ __forceinline__ void store_columns(T* first, int64_t f, int lanes, int64_t width, const Pack<T, V>& from) {
  if constexpr (kPacked) {
    using Word = typename word<(sizeof(from) < kBytes ? sizeof(from) : kBytes)>::type;
    Word words[sizeof(from) / sizeof(Word)];
    memcpy(words, &from, sizeof(from));
#pragma unroll
    for (int k = 0; k < int(sizeof(from) / sizeof(Word)); ++k) reinterpret_cast<Word*>(first)[k] = words[k];
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (f + j * lanes < width) first[j * lanes] = from.at[j];
  }
}

// -- what is reduced to what -------------------------------------------------------------------------------------------
// A Cell is what is known of some rows of a column; merge() may be called in any order. A Piece is that of a piece of a hub.
template <typename S>
struct Sum {
  using T = typename accumulate<S>::type;
  using Cell = T;
  using Piece = T;
  static constexpr bool kWeighted = false, kHasRow = false, kZeroIsNeutral = true;
  __device__ static Cell empty() { return 0; }
  __device__ static void add(const Job<S>&, Cell& cell, T x, int) { cell += x; }
  __device__ static Cell merge(const Job<S>&, Cell a, Cell b) { return a + b; }
  __device__ static Cell shuffle(Cell a, int step) { return __shfl_xor_sync(~0u, a, step); }
  __device__ static Piece piece(const Job<S>&, Cell a, int64_t) { return a; }
  __device__ static Piece append(const Job<S>& job, Piece a, Piece b) { return merge(job, a, b); }
  __device__ static S value(const Job<S>& job, Piece a, int64_t length) {
    S out;
    narrow(job.mean && length > 1 ? a / T(length) : a, &out);
    return out;
  }
};

template <typename S>
struct WeightedSum : Sum<S> {
  static constexpr bool kWeighted = true;
};

// In float64: where many lanes multiply few factors near 1 each, float32 rounds most products down.
template <typename S>
struct Product {
  using Cell = double;
  using Piece = double;
  static constexpr bool kWeighted = false, kHasRow = false, kZeroIsNeutral = false;
  __device__ static Cell empty() { return 1; }
  __device__ static void add(const Job<S>&, Cell& cell, Cell x, int) { cell *= x; }
  __device__ static Cell merge(const Job<S>&, Cell a, Cell b) { return a * b; }
  __device__ static Cell shuffle(Cell a, int step) { return __shfl_xor_sync(~0u, a, step); }
  __device__ static Piece piece(const Job<S>&, Cell a, int64_t) { return a; }
  __device__ static Piece append(const Job<S>&, Piece a, Piece b) { return a * b; }
  __device__ static S value(const Job<S>&, Piece a, int64_t) {
    S out;
    narrow(typename accumulate<S>::type(a), &out);
    return out;
  }
};

// The first of several extremes; the first NaN over all numbers.
template <typename S>
struct Extreme {
  using T = typename accumulate<S>::type;
  static constexpr bool kWeighted = false, kHasRow = true, kZeroIsNeutral = false;
  static constexpr int kNone = -1;
  struct Cell {
    T value;
    int at;  // counted from where reading began
  };
  struct Piece {
    T value;
    int64_t row;  // num_rows: none
  };
  // Whether a later value takes over.
  __device__ static bool beats(const Job<S>& job, T later, T best) {
    return best == best && (later != later || (job.largest ? later > best : later < best));
  }
  __device__ static Cell empty() { return {0, kNone}; }
  __device__ static void add(const Job<S>& job, Cell& cell, T x, int at) {
    if (cell.at == kNone || beats(job, x, cell.value)) cell = {x, at};
  }
  __device__ static Cell merge(const Job<S>& job, const Cell& a, const Cell& b) {
    const bool swap = unsigned(b.at) < unsigned(a.at);  // kNone comes last
    const T first = swap ? b.value : a.value, later = swap ? a.value : b.value;
    const int first_at = swap ? b.at : a.at, later_at = swap ? a.at : b.at;
    const bool takes = later_at != kNone && beats(job, later, first);
    return {takes ? later : first, takes ? later_at : first_at};
  }
  __device__ static Cell shuffle(const Cell& a, int step) {
    return {__shfl_xor_sync(~0u, a.value, step), __shfl_xor_sync(~0u, a.at, step)};
  }
  __device__ static Piece piece(const Job<S>& job, const Cell& a, int64_t begin) {
    if (a.at == kNone) return {0, job.num_rows};
    return {a.value, job.perm ? job.perm[begin + a.at] : begin + a.at};
  }
  __device__ static Piece append(const Job<S>& job, const Piece& a, const Piece& b) {
    if (b.row == job.num_rows) return a;
    return a.row == job.num_rows || beats(job, b.value, a.value) ? b : a;
  }
  __device__ static S value(const Job<S>&, const Piece& a, int64_t) {
    S out;
    narrow(a.value, &out);
    return out;
  }
};

// -- reading -----------------------------------------------------------------------------------------------------------
// The rows of x, and of w, at kAhead places that are `step` apart, where there are so many and their entries are good.
template <typename Op, int V, bool kPacked, typename S>
struct Rows {
  Pack<S, V> x[kAhead<V>];
  Pack<S, V> w[Op::kWeighted ? kAhead<V> : 1];
  bool good[kAhead<V>];

  template <bool kAll>
  __device__ __forceinline__ void read_sorted(const Job<S>& job, const S* row, int64_t stride, int left, int step, int64_t f,
                                              int lanes) {
#pragma unroll
    for (int u = 0; u < kAhead<V>; ++u, row += stride) {
      good[u] = kAll || u * step < left;
      if (good[u]) load_columns<V, kPacked>(row, f, lanes, job.width, x[u]);
    }
  }

  __device__ __forceinline__ void read(const Job<S>& job, int64_t place, int left, int step, int64_t f, int lanes,
                                       const int (&weight)[V]) {
    int64_t edge[kAhead<V>], row[kAhead<V>];
#pragma unroll
    for (int u = 0; u < kAhead<V>; ++u) {
      good[u] = u * step < left;
      edge[u] = good[u] && job.perm ? job.perm[place + u * step] : place + u * step;
    }
#pragma unroll
    for (int u = 0; u < kAhead<V>; ++u)
      if (good[u] && uint64_t(edge[u]) >= uint64_t(job.num_edges)) {
        note_fault(job.flag, kEdgePerm, place + u * step);
        good[u] = false;
      }
#pragma unroll
    for (int u = 0; u < kAhead<V>; ++u) row[u] = Op::kWeighted && good[u] ? job.source[edge[u]] : edge[u];
    if constexpr (Op::kWeighted) {
#pragma unroll
      for (int u = 0; u < kAhead<V>; ++u)
        if (good[u] && uint64_t(row[u]) >= uint64_t(job.num_rows)) {
          note_fault(job.flag, kSrcIndex, edge[u]);
          good[u] = false;
        }
    }
#pragma unroll
    for (int u = 0; u < kAhead<V>; ++u) {
      if (!good[u]) continue;
      load_columns<V, kPacked>(job.x + row[u] * job.width + f, f, lanes, job.width, x[u]);
      if constexpr (Op::kWeighted) {
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (column<kPacked>(f, j, lanes) < job.width) w[u].at[j] = job.w[edge[u] * job.layout.num_weights + weight[j]];
      }
    }
  }

  // Adds them; the first is number `at`. Rows and columns that were not read are 0, and such columns are not written.
  __device__ __forceinline__ void add_to(const Job<S>& job, typename Op::Cell (&cell)[V], int at, int step) const {
#pragma unroll
    for (int u = 0; u < kAhead<V>; ++u) {
      if (!Op::kZeroIsNeutral && !good[u]) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        auto value = widen(x[u].at[j]);
        if constexpr (Op::kWeighted) value *= widen(w[u].at[j]);
        Op::add(job, cell[j], value, at + u * step);
      }
    }
  }
};

// Adds every `step`th of `length` rows from place `begin` on, the first being number `first`.
template <typename Op, int V, bool kPacked, typename S>
__device__ __forceinline__ void read_rows(const Job<S>& job, int64_t begin, int length, int first, int step, int64_t f,
                                          int lanes, const int (&weight)[V], typename Op::Cell (&cell)[V]) {
  if (Op::kWeighted || job.perm) {
#pragma unroll 1
    for (int at = first; at < length; at += kAhead<V> * step) {
      Rows<Op, V, kPacked, S> rows{};
      rows.read(job, begin + at, length - at, step, f, lanes, weight);
      rows.add_to(job, cell, at, step);
    }
  } else {
    const S* row = job.x + (begin + first) * job.width + f;
    const int64_t stride = step * job.width;
    int at = first;
#pragma unroll 1
    for (; at + (kAhead<V> - 1) * step < length; at += kAhead<V> * step, row += kAhead<V> * stride) {
      Rows<Op, V, kPacked, S> rows{};
      rows.template read_sorted<true>(job, row, stride, length - at, step, f, lanes);
      rows.add_to(job, cell, at, step);
    }
    if (at < length) {
      Rows<Op, V, kPacked, S> rows{};
      rows.template read_sorted<false>(job, row, stride, length - at, step, f, lanes);
      rows.add_to(job, cell, at, step);
    }
  }
}

// Merges the cells of the lanes that hold the same columns, out of `span` lanes.
template <typename Op, int V, typename S>
__device__ __forceinline__ void merge_lanes(const Job<S>& job, typename Op::Cell (&cell)[V], int lanes, int span) {
#pragma unroll 1
  for (int step = lanes; step < span; step *= 2) {
#pragma unroll
    for (int j = 0; j < V; ++j) cell[j] = Op::merge(job, cell[j], Op::shuffle(cell[j], step));
  }
}

template <typename Op, int V, bool kPacked, typename S>
__device__ __forceinline__ void write_segment(const Job<S>& job, const typename Op::Cell (&cell)[V], int64_t i,
                                              int64_t begin, int64_t length, int64_t f, int lanes) {
  Pack<S, V> out;
  Pack<int64_t, V> arg;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const auto piece = Op::piece(job, cell[j], begin);
    out.at[j] = Op::value(job, piece, length);
    if constexpr (Op::kHasRow) arg.at[j] = piece.row;
  }
  store_columns<V, kPacked>(job.out + i * job.width + f, f, lanes, job.width, out);
  if constexpr (Op::kHasRow)
    if (job.arg) store_columns<V, kPacked>(job.arg + i * job.width + f, f, lanes, job.width, arg);
}

// The offsets of a lane's columns in a weight row.
template <int V, bool kPacked>
__device__ void weight_offsets(const FeatureLayout& layout, int64_t f, int lanes, int (&weight)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    uint32_t rest = uint32_t(column<kPacked>(f, j, lanes)), offset = 0;
    for (int k = layout.num_groups - 1; k >= 0; --k) {
      offset += rest % uint32_t(layout.size[k]) * uint32_t(layout.stride[k]);
      rest /= uint32_t(layout.size[k]);
    }
    weight[j] = int(offset);
  }
}

// Blocks of a multiprocessor: as many as leave room for the registers.
template <typename Op, int V>
constexpr int min_blocks = V == 8 ? 2 : V > 1 || Op::kWeighted ? 3 : 4;

// -- kernels -----------------------------------------------------------------------------------------------------------
// Items are the pieces of hubs, first since they take longest, and then groups of segments; of either, a tile of columns.
// Of a group each team takes its short segment, then each warp together those of medium length, then the block the long
// ones.
template <typename Op, int V, bool kPacked, typename S>
__global__ void __launch_bounds__(kWarp* kWarps, (min_blocks<Op, V>))
    segments_kernel(const __grid_constant__ Job<S> job, const __grid_constant__ Shape shape, typename Op::Piece* pieces) {
  __shared__ typename Op::Cell of_warp[kWarps][kWarp][V];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, lanes = 1 << shape.lane_bits;
  int weight[V] = {};
  int64_t last_tile = -1;
  for (int64_t item = blockIdx.x; item < (shape.slots + shape.groups) * shape.tiles; item += gridDim.x) {
    const int64_t unit = shape.tiles == 1 ? item : item / shape.tiles, tile = item - unit * shape.tiles;
    const int64_t f = (tile << shape.lane_bits) * V + (lane & (lanes - 1)) * (kPacked ? V : 1);
    const bool inside = f < job.width, is_piece = unit < shape.slots;
    if (Op::kWeighted && tile != last_tile) weight_offsets<V, kPacked>(job.layout, f, lanes, weight);
    last_tile = tile;

    const int64_t group = (unit - shape.slots) * shape.per_block;
    int number = threadIdx.x >> shape.team_bits;  // of a segment in its group
    int64_t from = 0, to = 0;                     // the rows to be read next, by `span` lanes or by the block
    int span = kWarp;
    bool by_block = is_piece, has_one = true, is_long = false;
    unsigned medium = 0;
    if (is_piece) {
      int64_t i, k, begin, end;
      if (!piece_of(job.ptr, job.num_segments, job.num_edges, unit, i, k, begin, end)) continue;
      from = piece_begin(begin, k), to = piece_end(begin, end, k);
    } else {
      span = 1 << shape.team_bits;
      const bool mine = number < shape.per_block && group + number < job.num_segments;
      if (mine) segment_range(job.ptr, group + number, job.num_edges, from, to);
      has_one = mine && to - from < shape.medium;
      is_long = to - from >= shape.long_ && !is_hub(from, to);
      medium = __ballot_sync(~0u, to - from >= shape.medium && to - from < shape.long_ && (lane & (span - 1)) == 0);
      if (!has_one) to = from;
    }

    while (true) {
      typename Op::Cell cell[V];
#pragma unroll
      for (int j = 0; j < V; ++j) cell[j] = Op::empty();
      const int thread = by_block ? threadIdx.x : lane & (span - 1), step = by_block ? kWarp * kWarps : span;
      read_rows<Op, V, kPacked>(job, from, inside ? int(to - from) : 0, thread >> shape.lane_bits, step >> shape.lane_bits, f,
                                lanes, weight, cell);
      merge_lanes<Op, V>(job, cell, lanes, span);
      if (by_block) {
        __syncthreads();  // of_warp may still be read
#pragma unroll
        for (int j = 0; j < V; ++j) of_warp[warp][lane][j] = cell[j];
        __syncthreads();
#pragma unroll 1
        for (int w = 1; w < kWarps && warp == 0; ++w) {
#pragma unroll
          for (int j = 0; j < V; ++j) cell[j] = Op::merge(job, cell[j], of_warp[w][lane][j]);
        }
      }
      if (has_one && inside && thread < lanes) {
        if (is_piece) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            if (column<kPacked>(f, j, lanes) < job.width)
              pieces[unit * job.width + column<kPacked>(f, j, lanes)] = Op::piece(job, cell[j], from);
        } else {
          write_segment<Op, V, kPacked>(job, cell, group + number, from, to - from, f, lanes);
        }
      }
      if (is_piece) break;
      if (medium) {
        number = (warp * kWarp + __ffs(medium) - 1) >> shape.team_bits;
        medium &= medium - 1;
        segment_range(job.ptr, group + number, job.num_edges, from, to);
        span = kWarp;
        has_one = true;
        continue;
      }
      if (!by_block) {
        if (!__syncthreads_or(is_long)) break;
        number = -1;
        span = kWarp;
        by_block = has_one = true;
      }
      bool found = false;
      while (!found && ++number < shape.per_block && group + number < job.num_segments) {
        segment_range(job.ptr, group + number, job.num_edges, from, to);
        found = to - from >= shape.long_ && !is_hub(from, to);
      }
      if (!found) break;
    }
  }
}

// Hubs: their pieces in order, a thread a column.
template <typename Op, typename S>
__global__ void hubs_kernel(const __grid_constant__ Job<S> job, const typename Op::Piece* __restrict__ pieces, int64_t tiles) {
  GEO_FOR_ITEMS(slot, f, num_slots(job.num_edges), job.width, tiles) {
    int64_t i, k, begin, end;
    if (!piece_of(job.ptr, job.num_segments, job.num_edges, slot, i, k, begin, end) || k > 0) continue;
    auto total = pieces[slot * job.width + f];
    const int64_t num = num_pieces(begin, end);
#pragma unroll 8
    for (k = 1; k < num; ++k) total = Op::append(job, total, pieces[(slot + k) * job.width + f]);
    job.out[i * job.width + f] = Op::value(job, total, end - begin);
    if constexpr (Op::kHasRow)
      if (job.arg) job.arg[i * job.width + f] = total.row;
  }
}

// -- launching ---------------------------------------------------------------------------------------------------------
// Bits of the least power of two that is at least n.
inline int bits_for(int64_t n, int most) {
  int bits = 0;
  while (bits < most && int64_t(1) << bits < n) ++bits;
  return bits;
}

template <typename Op, int V, bool kPacked, typename S>
void launch_shaped(const Job<S>& job, const Tensor& like) {
  using Piece = typename Op::Piece;
  const cudaStream_t stream = current_stream(like);
  Shape shape{};
  shape.lane_bits = bits_for((job.width + V - 1) / V, kWarpBits);
  shape.team_bits = std::clamp(shape.lane_bits + 1, 2, kWarpBits);
  shape.medium = 16 << (shape.team_bits - shape.lane_bits);
  shape.long_ = 32 << (kWarpBits - shape.lane_bits);
  const int64_t columns = V << shape.lane_bits;
  shape.tiles = (job.width + columns - 1) / columns;
  shape.slots = job.num_edges < 2 * kHubChunk ? 0 : num_slots(job.num_edges);
  const int teams = kWarp * kWarps >> shape.team_bits;
  // fewer at a time where most are long, and the block takes one after the other
  const int64_t mean = job.num_edges / job.num_segments + 1;
  shape.per_block = int(std::clamp<int64_t>(16 * shape.long_ / mean, 1, teams));
  shape.groups = (job.num_segments + shape.per_block - 1) / shape.per_block;

  Tensor buffer = like;
  Piece* pieces = nullptr;
  if (shape.slots) {
    buffer = torch::stable::new_empty(like, {shape.slots * job.width * int64_t(sizeof(Piece))}, ScalarType::Byte);
    pieces = static_cast<Piece*>(buffer.mutable_data_ptr());
  }
  // offsets of weights are found once per block
  const int64_t most = Op::kWeighted ? int64_t(1) << 12 : int64_t(1) << 20;
  const auto grid = unsigned(std::min((shape.slots + shape.groups) * shape.tiles, most));
  segments_kernel<Op, V, kPacked><<<grid, kWarp * kWarps, 0, stream>>>(job, shape, pieces);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (shape.slots == 0) return;
  const Launch hubs(shape.slots, job.width);
  hubs_kernel<Op><<<hubs.grid, hubs.block, 0, stream>>>(job, pieces, hubs.tiles);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Op, typename S>
void launch(const Job<S>& job, const Tensor& like) {
  constexpr int V = columns_of<S>;
  if (job.num_segments == 0 || job.width == 0) return;
  STD_TORCH_CHECK(job.width < (int64_t(1) << 31), "geo: a row has ", job.width, " elements, which is too many");
  if (job.width == 1)
    launch_shaped<Op, 1, true>(job, like);
  else if (job.width % V == 0 && reinterpret_cast<uintptr_t>(job.x) % kBytes == 0)
    launch_shaped<Op, V, true>(job, like);
  else
    launch_shaped<Op, V, false>(job, like);
}

}  // namespace reduce
}  // namespace geo
