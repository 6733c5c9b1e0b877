// How fast this machine reads and writes whole rows at random in tables of one shape, with nothing else done with them.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/rows.h"

namespace {

using Word = int64_t;
constexpr int64_t kRowsAhead = 4;

// The rows [begin, end) of a list, one after the other as an optimizer has them; all tables at once, as it needs them.
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

}  // namespace

// Seconds that so many threads take for `count` distinct rows of `row_bytes`, a multiple of 64.
extern "C" __attribute__((visibility("default"))) double update_rows(char* const* tables, int64_t num_tables, int64_t row_bytes,
                                                                     const int64_t* rows, int64_t count, int64_t threads) {
  using Clock = std::chrono::steady_clock;
  // New threads share a processor until the scheduler has spread them.
  const Clock::time_point start = Clock::now() + std::chrono::milliseconds(20);
  const auto part = [&](int64_t thread) {
    while (Clock::now() < start) {
    }
    update(tables, num_tables, row_bytes, rows, count * thread / threads, count * (thread + 1) / threads);
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
  part(0);
  for (std::thread& other : others) other.join();
  const std::chrono::duration<double> taken = Clock::now() - start;
  return taken.count();
}
