// How fast this machine reads whole rows at random: rows.h's order of loads and prefetches, and nothing else done with them.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/rows.h"

namespace {

using memcompile::kLanes;
using Word = int64_t;
using Words = memcompile::Vector<Word>;

using memcompile::kCacheLine;
using memcompile::kSideBySide;

template <bool kPrefetch>
Word read(const char* table, int64_t row_bytes, const int64_t* rows, int64_t count) {
  Words seen[kSideBySide] = {};
  for (int64_t first = 0; first + kSideBySide <= count; first += kSideBySide) {
    const bool last = first + 2 * kSideBySide > count;
    const char *row[kSideBySide], *next[kSideBySide];
    for (int64_t z = 0; z < kSideBySide; ++z) {
      row[z] = table + rows[first + z] * row_bytes;
      next[z] = last ? row[z] : table + rows[first + kSideBySide + z] * row_bytes;
    }
    const int64_t distance = std::min(memcompile::kAhead, row_bytes);
    for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine) {
      if constexpr (kPrefetch) {
        const bool inside = byte + distance < row_bytes;
        for (int64_t z = 0; z < kSideBySide; ++z) {
          __builtin_prefetch(inside ? row[z] + byte + distance : next[z] + byte + distance - row_bytes, 0, 0);
        }
      }
      for (int64_t z = 0; z < kSideBySide; ++z) {
        for (int64_t part = 0; part < kCacheLine; part += memcompile::kVectorBytes) {
          seen[z] |= memcompile::load(reinterpret_cast<const Word*>(row[z] + byte + part));
        }
      }
    }
  }
  Words all = {};
  for (const Words& some : seen) all |= some;
  Word word = 0;
  for (int64_t i = 0; i < kLanes<Word>; ++i) word |= all[i];
  return word;
}

}  // namespace

// Seconds that so many threads take to read `count` rows of `row_bytes`, a multiple of 64; `seen` keeps the loads alive.
extern "C" __attribute__((visibility("default"))) double read_rows(const char* table, int64_t row_bytes, const int64_t* rows,
                                                                   int64_t count, int64_t threads, bool prefetch, int64_t* seen) {
  using Clock = std::chrono::steady_clock;
  std::vector<Word> word(threads);
  // New threads share a processor until the scheduler has spread them, and PyTorch's look for more work for a while.
  const Clock::time_point start = Clock::now() + std::chrono::milliseconds(20);
  const auto part = [&](int64_t thread) {
    const int64_t begin = count / kSideBySide * thread / threads * kSideBySide;
    const int64_t end = count / kSideBySide * (thread + 1) / threads * kSideBySide;
    while (Clock::now() < start) {
    }
    word[thread] = (prefetch ? read<true> : read<false>)(table, row_bytes, rows + begin, end - begin);
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
  part(0);
  for (std::thread& other : others) other.join();
  const std::chrono::duration<double> taken = Clock::now() - start;
  *seen = 0;
  for (const Word some : word) *seen |= some;
  return taken.count();
}
