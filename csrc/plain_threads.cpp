// The parallel loops of our kernels on plain threads, to be preloaded by `make sanitize-threads`: the thread sanitizer
// knows when a thread is started and joined, and cannot know what OpenMP, which is not built for it, waits for. Torch's
// own loops stay on one thread, whatever a test asks for.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

namespace at {
__attribute__((visibility("default"))) void set_num_threads(int) {}
}  // namespace at

extern "C" AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = kThreads;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f,
                                              void* context) {
  const int64_t step = std::max<int64_t>({1, grain, (end - begin + kThreads - 1) / kThreads});
  std::vector<std::thread> threads;
  for (; begin < end; begin += step)
    threads.emplace_back([=] { f(begin, std::min(begin + step, end), context); });
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
