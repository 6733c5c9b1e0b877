// Hits in the order of their slots, by a stable radix sort that is the same on any number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "simd.h"

namespace memcompile {

// hits[i] is the position of the i-th hit by (slot, position); slots[i] is its slot.
template <class Slot>
struct SortedHits {
  std::unique_ptr<Slot[]> slots;
  std::unique_ptr<int64_t[]> hits;
};

// Sorts `count` slots in 0..num_slots. `parallel(begin, end, f)` runs f(begin', end') over parts of a range.
template <class Slot, class Parallel>
SortedHits<Slot> sort_by_slot(const Slot* slots, int64_t count, int64_t num_slots, int64_t threads,
                              const Parallel& parallel) {
  constexpr int kMostBits = 11;  // 2,048 counters stay in the first-level cache
  const int bits = num_slots > 1 ? 64 - __builtin_clzll(uint64_t(num_slots - 1)) : 1;
  const int passes = (bits + kMostBits - 1) / kMostBits, width = (bits + passes - 1) / passes;
  const int64_t digits = int64_t(1) << width;
  const int64_t chunks = std::max<int64_t>(1, std::min(threads, count >> 14)), chunk = (count + chunks - 1) / chunks;

  SortedHits<Slot> from{std::make_unique_for_overwrite<Slot[]>(count), std::make_unique_for_overwrite<int64_t[]>(count)};
  SortedHits<Slot> to{std::make_unique_for_overwrite<Slot[]>(count), std::make_unique_for_overwrite<int64_t[]>(count)};
  std::vector<int64_t> next(chunks * digits);
  for (int pass = 0; pass < passes; ++pass) {
    const Slot* keys = pass == 0 ? slots : from.slots.get();
    const auto digit = [&](int64_t i) { return int64_t(uint64_t(keys[i]) >> (pass * width)) & (digits - 1); };
    std::fill(next.begin(), next.end(), 0);
    parallel(0, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        int64_t* counts = next.data() + c * digits;
        for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) ++counts[digit(i)];
      }
    });
    int64_t total = 0;
    for (int64_t d = 0; d < digits; ++d) {
      for (int64_t c = 0; c < chunks; ++c) total += std::exchange(next[c * digits + d], total);
    }
    parallel(0, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        int64_t* place = next.data() + c * digits;
        for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) {
          const int64_t p = place[digit(i)]++;
          to.slots[p] = keys[i];
          to.hits[p] = pass == 0 ? i : from.hits[i];
        }
      }
    });
    std::swap(from, to);
  }
  return from;
}

}  // namespace memcompile
