#pragma once
// Launching on torch's stream, and the flag in which kernels note an index out of range.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <tuple>

#include "../dispatch.h"
#include "../segments.h"

namespace geo {

using torch::stable::accelerator::DeviceGuard;

constexpr int kNumFaults = 4;                                  // Fault in segments.h
constexpr long long kNoPosition = 0x7f7f7f7f7f7f7f7fll;        // what memset of 0x7f leaves

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The flag of a device: for each kind of fault the least position seen since it was last read.
long long* fault_flag(int device);

__device__ __forceinline__ void note_fault(long long* flag, int fault, int64_t position) {
  atomicMin(flag + fault, static_cast<long long>(position));
}

// The edges of segment i, cut to [0, num_edges] so that a bad ptr, which check_ptr_cuda notes, is never read through.
__device__ __forceinline__ void segment_range(const int64_t* ptr, int64_t i, int64_t num_edges, int64_t& begin,
                                              int64_t& end) {
  begin = min(max(ptr[i], int64_t(0)), num_edges);
  end = min(max(ptr[i + 1], begin), num_edges);
}

// Which piece k of which hub i has this slot, and the edges of the hub; false where none has.
__device__ __forceinline__ bool piece_of(const int64_t* ptr, int64_t num_segments, int64_t num_edges, int64_t slot,
                                         int64_t& i, int64_t& k, int64_t& begin, int64_t& end) {
  i = slot_owner(ptr, num_segments, slot);
  segment_range(ptr, i, num_edges, begin, end);
  k = slot - first_slot(begin);
  return is_hub(begin, end) && k >= 0 && k < num_pieces(begin, end);
}

// Note every entry of ptr that breaks the rise from 0 to num_edges.
void check_ptr_cuda(const char* op, const Tensor& ptr, int64_t num_edges);

// (ptr, perm) of an index (sort.cu). Rows with a bad entry, which are noted, come last, behind all segments.
std::tuple<Tensor, Tensor> csr_from_index_cuda(const Tensor& index, int64_t size);

// Blocks of `threads` threads, rows of which run along the features: x features of a tile, y items at a time.
struct Launch {
  dim3 grid, block;
  int64_t tiles;  // of features
  Launch(int64_t items, int64_t features, int threads = 256) {
    unsigned x = 1;
    while (x < features && x < 128) x *= 2;
    block = dim3(x, threads / x);
    tiles = (features + x - 1) / x;
    const int64_t blocks = (items * tiles + block.y - 1) / block.y;
    grid = dim3(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, int64_t(1) << 20)));
  }
};

// In a kernel launched so: for each item and each of this thread's features.
#define GEO_FOR_ITEMS(item, feature, num_items, num_features, tiles)                                              \
  for (int64_t work_ = blockIdx.x * int64_t(blockDim.y) + threadIdx.y; work_ < (num_items) * (tiles);             \
       work_ += int64_t(gridDim.x) * blockDim.y)                                                                  \
    if (const int64_t item = work_ / (tiles), feature = work_ % (tiles) * blockDim.x + threadIdx.x; feature < (num_features))

}  // namespace geo
