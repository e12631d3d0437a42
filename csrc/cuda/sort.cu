// The CUDA launcher of csr_from_index: a stable radix sort of (segment, row) pairs.
#include "device.h"

#include <cub/device/device_radix_sort.cuh>

namespace geo {
namespace {

constexpr int kThreads = 256;

unsigned grid_of(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, int64_t(1) << 16));
}

// Key of a row: its segment, or `size` where its entry is bad.
template <typename U>
__global__ void keys_kernel(const int64_t* __restrict__ index, int64_t num_rows, int64_t size, U* __restrict__ keys,
                            U* __restrict__ rows, long long* flag) {
  for (int64_t e = blockIdx.x * int64_t(kThreads) + threadIdx.x; e < num_rows; e += gridDim.x * int64_t(kThreads)) {
    const int64_t i = index[e];
    const bool inside = i >= 0 && i < size;
    if (!inside) note_fault(flag, kDstIndex, e);
    keys[e] = U(inside ? i : size);
    rows[e] = U(e);
  }
}

template <typename U>
__global__ void csr_kernel(const U* __restrict__ keys, const U* __restrict__ rows, int64_t num_rows, int64_t size,
                           int64_t* __restrict__ ptr, int64_t* __restrict__ perm) {
  for (int64_t t = blockIdx.x * int64_t(kThreads) + threadIdx.x; t < max(num_rows, size + 1);
       t += gridDim.x * int64_t(kThreads)) {
    if (t < num_rows) perm[t] = int64_t(rows[t]);
    if (t > size) continue;
    int64_t low = 0, high = num_rows;  // the first key that is at least t
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (int64_t(keys[middle]) < t)
        low = middle + 1;
      else
        high = middle;
    }
    ptr[t] = low;
  }
}

// U holds a segment and a row.
template <typename U>
void sort(const Tensor& index, int64_t size, int64_t* ptr, int64_t* perm) {
  const int64_t num_rows = index.numel();
  const cudaStream_t stream = current_stream(index);
  Tensor buffer = torch::stable::new_empty(index, {4 * num_rows * int64_t(sizeof(U))}, ScalarType::Byte);
  U* keys = static_cast<U*>(buffer.mutable_data_ptr());
  U *rows = keys + num_rows, *sorted_keys = rows + num_rows, *sorted_rows = sorted_keys + num_rows;
  if (num_rows > 0) {
    keys_kernel<U><<<grid_of(num_rows), kThreads, 0, stream>>>(index_data(index), num_rows, size, keys, rows,
                                                               fault_flag(index.get_device_index()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    int bits = 1;
    while (size >> bits) ++bits;
    size_t bytes = 0;
    const auto pass = [&](void* temporary) {
      STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, rows, sorted_rows, U(num_rows), 0,
                                                     bits, stream));
    };
    pass(nullptr);  // tells the size
    Tensor temporary = torch::stable::new_empty(index, {std::max<int64_t>(1, int64_t(bytes))}, ScalarType::Byte);
    pass(temporary.mutable_data_ptr());
  }
  csr_kernel<U><<<grid_of(std::max(num_rows, size + 1)), kThreads, 0, stream>>>(sorted_keys, sorted_rows, num_rows, size,
                                                                                ptr, perm);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor> csr_from_index_cuda(const Tensor& index_, int64_t size) {
  constexpr const char* op = "csr_from_index";
  const DeviceGuard guard(index_.get_device_index());
  check_index_dtype(index_, op, "index");
  STD_TORCH_CHECK(index_.is_cuda(), op, ": index must be on the GPU");
  STD_TORCH_CHECK(size >= 0, op, ": size must not be negative, got ", size);
  const Tensor index = torch::stable::contiguous(index_);
  const int64_t num_rows = index.numel();
  Tensor ptr = torch::stable::new_empty(index, {size + 1}), perm = torch::stable::new_empty(index, {num_rows});
  if (std::max(num_rows, size) <= int64_t(UINT32_MAX))
    sort<uint32_t>(index, size, write<int64_t>(ptr), write<int64_t>(perm));
  else
    sort<uint64_t>(index, size, write<int64_t>(ptr), write<int64_t>(perm));
  return {ptr, perm};
}

}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) { m.impl("csr_from_index", TORCH_BOX(&geo::csr_from_index_cuda)); }
