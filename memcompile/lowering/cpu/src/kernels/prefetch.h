// Asks the system for the pages of rows that are read next, where they lie in a file that is mapped. Nothing waits for them.
// Without madvise nothing is asked.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace memcompile {

using PageRun = std::pair<uintptr_t, uintptr_t>;  // the first of some pages, by number, and the last, included

class MappedRows {
 public:
  // Rows of `size` bytes, `stride` bytes apart.
  MappedRows(const void* table, int64_t stride, int64_t size)
      : table_(reinterpret_cast<uintptr_t>(table)), stride_(stride), size_(size) {
#if defined(MADV_WILLNEED)
    page_ = sysconf(_SC_PAGESIZE);
#endif
  }

  PageRun pages_of(int64_t row) const {
    const uintptr_t start = table_ + row * stride_;
    return {start / page_, (start + std::max<int64_t>(size_, 1) - 1) / page_};
  }

  // The pages of all rows, ascending and each once.
  template <class Slot>
  std::vector<PageRun> pages_of(const Slot* rows, int64_t count) const {
    std::vector<PageRun> runs(count);
    std::transform(rows, rows + count, runs.begin(), [&](Slot row) { return pages_of(row); });
    std::sort(runs.begin(), runs.end());
    int64_t last = -1;
    for (const PageRun run : runs) {
      if (last >= 0 && run.first <= runs[last].second + 1) {
        runs[last].second = std::max(runs[last].second, run.second);
      } else {
        runs[++last] = run;
      }
    }
    runs.resize(last + 1);
    return runs;
  }

  void ask(PageRun run) const {
#if defined(MADV_WILLNEED)
    madvise(reinterpret_cast<void*>(run.first * page_), (run.second - run.first + 1) * page_, MADV_WILLNEED);
#endif
  }

  // Whether all of these rows seem to be in memory, by a sample, which is asked for. A call for pages that are there takes
  // half a microsecond, and one that has to read at least three; mincore would tell too, but only the file's owner.
  template <class Slot>
  bool are_there(const Slot* rows, int64_t count) const {
    constexpr int64_t kSample = 128;
    constexpr auto kSlow = std::chrono::nanoseconds(1500);
    if (count <= 2 * kSample) return false;  // then asking for all is no dearer
    int64_t slow = 0;
    for (int64_t i = 0; i < kSample; ++i) {
      const auto start = std::chrono::steady_clock::now();
      ask(pages_of(rows[i * (count / kSample)]));
      slow += std::chrono::steady_clock::now() - start > kSlow;
    }
    return slow <= 1;  // one may have been interrupted
  }

 private:
  uintptr_t table_, page_ = 4096;
  int64_t stride_, size_;
};

}  // namespace memcompile
