// The flag of indices found out of range, and the check of ptr.
#include "device.h"

#include <mutex>

namespace geo {
namespace {

__global__ void read_flag_kernel(long long* flag, int64_t* out) {
  const int i = threadIdx.x;
  out[i] = flag[i] == kNoPosition ? -1 : flag[i];
  flag[i] = kNoPosition;
}

__global__ void check_ptr_kernel(const int64_t* ptr, int64_t num_segments, int64_t num_edges, long long* flag) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i <= num_segments;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t low = i == num_segments ? num_edges : i ? ptr[i - 1] : 0;
    const int64_t high = i == 0 && num_segments ? 0 : num_edges;
    if (ptr[i] < low || ptr[i] > high) note_fault(flag, kPtr, i);
  }
}

// The positions noted on the device of `like` since the last call, -1 where none, and the flag cleared.
Tensor bounds_flag_cuda(const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  Tensor out = torch::stable::new_empty(like, {kNumFaults}, ScalarType::Long);
  read_flag_kernel<<<1, kNumFaults, 0, current_stream(like)>>>(fault_flag(like.get_device_index()), write<int64_t>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

long long* fault_flag(int device) {
  constexpr int kMaxDevices = 64;
  static long long* flags[kMaxDevices] = {};
  static std::mutex mutex;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "geo: device index ", device, " is not below ", kMaxDevices);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!flags[device]) {  // the caller holds a DeviceGuard
    STD_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&flags[device]), kNumFaults * sizeof(long long)));
    STD_CUDA_CHECK(cudaMemset(flags[device], 0x7f, kNumFaults * sizeof(long long)));
  }
  return flags[device];
}

void check_ptr_cuda(const char* op, const Tensor& ptr, int64_t num_edges) {
  check_index_dtype(ptr, op, "ptr");
  const int64_t num_segments = ptr.numel() - 1;
  STD_TORCH_CHECK(num_segments >= 0, op, ": ptr must not be empty");
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>((num_segments + 256) / 256, 1, 1024));
  check_ptr_kernel<<<blocks, 256, 0, current_stream(ptr)>>>(index_data(ptr), num_segments, num_edges,
                                                            fault_flag(ptr.get_device_index()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace geo

STABLE_TORCH_LIBRARY_IMPL(geo, CUDA, m) { m.impl("bounds_flag", TORCH_BOX(&geo::bounds_flag_cuda)); }
