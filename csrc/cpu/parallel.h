#pragma once
// Work shared among torch's threads, and what they found out of range.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../dispatch.h"
#include "../segments.h"

namespace geo {

// f(thread, begin, end) over [0, total) in blocks, handed out to torch's threads as they come free. Results must not
// depend on which thread gets which block. `thread` counts from 0 to max_threads(total, block) - 1.
inline int64_t max_threads(int64_t total, int64_t block) {
  const int64_t blocks = (total + block - 1) / block;
  return std::max<int64_t>(1, std::min<int64_t>(blocks, torch::stable::get_num_threads()));
}
template <class F>
void parallel_blocks(int64_t total, int64_t block, F&& f) {
  if (total <= 0) return;
  const int64_t threads = max_threads(total, block);
  if (threads == 1) return f(int64_t{0}, int64_t{0}, total);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread)
      for (int64_t begin = next.fetch_add(block); begin < total; begin = next.fetch_add(block))
        f(thread, begin, std::min(begin + block, total));
  });
}

// A place where an index was out of range. Leaf kernels return one and stop; the least of all blocks is reported, so
// the message does not depend on the threads.
struct Found {
  int fault = kNoFault;
  int64_t position = 0;
};
class Faults {
 public:
  void add(int fault, int64_t position) {
    if (fault == kNoFault) return;
    const int64_t key = (int64_t(fault) << 56) | position;
    int64_t seen = key_.load();
    while (key < seen && !key_.compare_exchange_weak(seen, key)) {
    }
  }
  Found first() const {
    const int64_t key = key_.load();
    if (key == kNone) return {};
    return {int(key >> 56), key & ((int64_t(1) << 56) - 1)};
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> key_{kNone};
};

// "op: name[position] = value is out of range [low, high]"; the Python wrapper turns this into an IndexError.
[[noreturn]] inline void raise_out_of_range(const char* op, const char* name, int64_t position, int64_t value,
                                            int64_t low, int64_t high) {
  STD_TORCH_CHECK(false, op, ": ", name, "[", position, "] = ", value, " is out of range [", low, ", ", high, "]");
  __builtin_unreachable();
}

// The bits of all segments' lengths. No branch, and no comparison, which a vector of int64 has not on every processor: this
// is run on every call.
inline int64_t length_bits(const int64_t* ptr, int64_t num_segments) {
  uint64_t bits = 0;  // unsigned: what stands in a bad ptr may overflow
  for (int64_t i = 0; i < num_segments; ++i) bits |= uint64_t(ptr[i + 1]) - uint64_t(ptr[i]);
  return int64_t(bits);
}
inline bool any_hub(const int64_t* ptr, int64_t num_segments) {
  static_assert((kHubChunk & (kHubChunk - 1)) == 0);
  return length_bits(ptr, num_segments) >= 2 * kHubChunk;
}

inline void check_ptr(const char* op, const int64_t* ptr, int64_t num_segments, int64_t num_edges) {
  if (num_segments >= 0 && ptr[0] == 0 && ptr[num_segments] == num_edges && length_bits(ptr, num_segments) >= 0) return;
  int64_t low = 0;
  for (int64_t i = 0; i <= num_segments; ++i) {
    const int64_t least = i == num_segments ? num_edges : low, most = i == 0 && num_segments ? 0 : num_edges;
    if (ptr[i] < least || ptr[i] > most) raise_out_of_range(op, "ptr", i, ptr[i], least, most);
    low = ptr[i];
  }
}

// Fill ptr [size + 1] if the index rises from 0 or more to less than `size`; false where it does not.
bool sorted_ptr(const int64_t* index, int64_t num_rows, int64_t size, int64_t* ptr);

// run(thread, i0, i1) for runs of ordinary segments, piece(thread, i, begin, end, slot) for the pieces of hubs, balanced
// by edges: segment i starts at unit ptr[i] + i, piece k of it kHubChunk * k units later.
template <class Run, class Piece>
void parallel_segments(const int64_t* ptr, int64_t num_segments, int64_t block, Run&& run, Piece&& piece) {
  if (num_segments <= 0) return;
  const int64_t num_edges = ptr[num_segments];
  const bool hubs = any_hub(ptr, num_segments);
  const auto from = [&](int64_t unit) {  // the first segment that starts there or later
    int64_t low = 0, high = num_segments;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (ptr[middle] + middle < unit)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel_blocks(num_edges + num_segments, block, [&](int64_t thread, int64_t begin, int64_t end) {
    int64_t low = from(begin);
    if (!hubs) {
      const int64_t last = from(end);
      if (low < last) run(thread, low, last);
      return;
    }
    if (low > 0 && is_hub(ptr[low - 1], ptr[low])) --low;  // some of its pieces may start here
    int64_t i = low;
    while (i < num_segments && ptr[i] + i < end) {
      if (is_hub(ptr[i], ptr[i + 1])) {
        const int64_t start = ptr[i] + i, pieces = num_pieces(ptr[i], ptr[i + 1]);
        for (int64_t k = 0; k < pieces; ++k) {
          const int64_t unit = start + k * kHubChunk;
          if (unit >= begin && unit < end)
            piece(thread, i, piece_begin(ptr[i], k), piece_end(ptr[i], ptr[i + 1], k), first_slot(ptr[i]) + k);
        }
        ++i;
        continue;
      }
      const int64_t first = i;
      while (i < num_segments && ptr[i] + i < end && !is_hub(ptr[i], ptr[i + 1])) ++i;
      run(thread, first, i);
    }
  });
}

// Rows that are not sorted by segment are cut into this many parts, each with an output of `size` segments of its own: so
// many, from the sizes alone, that filling and combining those costs little beside reading the rows.
constexpr int64_t kMaxParts = 16;
inline int64_t num_parts(int64_t num_rows, int64_t size) {
  int64_t parts = 1;
  while (parts < kMaxParts && parts * (size + 4096) * 16 <= num_rows) parts *= 2;
  return parts;
}

// Units of work (rows of `row_bytes`) handed out at a time: about a quarter megabyte.
inline int64_t block_of(int64_t row_bytes) {
  return std::clamp<int64_t>((int64_t(1) << 18) / std::max<int64_t>(1, row_bytes), 16, 1 << 15);
}

// The first element at a multiple of 64 bytes; the buffer is 64 bytes longer than what is used.
template <class T>
T* aligned(std::vector<T>& buffer) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t(63));
}

// A large fresh tensor costs a page fault every 4 KiB, more than writing it. Call this before its first touch: it asks for
// huge pages and, up to a size, for all of them at once.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace geo
