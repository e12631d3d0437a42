#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace geo {

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kHuge = int64_t(1) << 21, kLeast = int64_t(1) << 18, kMost = int64_t(1) << 25;
  if (bytes < kLeast) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) + kPage - 1) & ~(kPage - 1);
  // Advice: where the kernel does not take it, nothing is lost. Up to 32 MiB the pages are also made at once, which
  // saves the faults; beyond that the threads, which fault side by side, are faster than this one.
  if (bytes >= kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  if (bytes <= kMost) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#else
  (void)kMost;
#endif
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace geo
