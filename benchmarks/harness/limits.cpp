// How fast this machine reads whole rows at random, and reads and writes them: rows.h's order of loads and prefetches, and
// nothing else done with the rows.
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
constexpr int64_t kRowsAhead = 4;  // of which lines are prefetched, where rows are written

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

// Reads and writes the rows [begin, end) of a list, one after the other as an optimizer has them; of all tables together, as
// it needs them.
void update(char* const* tables, int64_t count, int64_t row_bytes, const int64_t* rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t next = rows[std::min(i + kRowsAhead, end - 1)] * row_bytes;
    for (int64_t byte = 0; byte < row_bytes; byte += memcompile::kCacheLine) {
      for (int64_t table = 0; table < count; ++table) {
        __builtin_prefetch(tables[table] + next + byte, 1);
        for (int64_t part = 0; part < memcompile::kCacheLine; part += memcompile::kVectorBytes) {
          Word* words = reinterpret_cast<Word*>(tables[table] + rows[i] * row_bytes + byte + part);
          memcompile::store(words, ~memcompile::load(words));
        }
      }
    }
  }
}

// Seconds of `part(thread)` on so many threads, which begin together.
template <typename Part>
double seconds_of(int64_t threads, const Part& part) {
  using Clock = std::chrono::steady_clock;
  // New threads share a processor until the scheduler has spread them, and PyTorch's look for more work for a while.
  const Clock::time_point start = Clock::now() + std::chrono::milliseconds(20);
  const auto wait_and_run = [&](int64_t thread) {
    while (Clock::now() < start) {
    }
    part(thread);
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(wait_and_run, thread);
  wait_and_run(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Seconds that so many threads take to read `count` rows of `row_bytes`, a multiple of 64; `seen` keeps the loads alive.
EXPORTED double read_rows(const char* table, int64_t row_bytes, const int64_t* rows, int64_t count, int64_t threads,
                          bool prefetch, int64_t* seen) {
  std::vector<Word> word(threads);
  const double seconds = seconds_of(threads, [&](int64_t thread) {
    const int64_t begin = count / kSideBySide * thread / threads * kSideBySide;
    const int64_t end = count / kSideBySide * (thread + 1) / threads * kSideBySide;
    word[thread] = (prefetch ? read<true> : read<false>)(table, row_bytes, rows + begin, end - begin);
  });
  *seen = 0;
  for (const Word some : word) *seen |= some;
  return seconds;
}

// Seconds that so many threads take to read and write `count` distinct rows of `row_bytes`, a multiple of 64, of each table.
EXPORTED double update_rows(char* const* tables, int64_t num_tables, int64_t row_bytes, const int64_t* rows, int64_t count,
                            int64_t threads) {
  return seconds_of(threads, [&](int64_t thread) {
    update(tables, num_tables, row_bytes, rows, count * thread / threads, count * (thread + 1) / threads);
  });
}
