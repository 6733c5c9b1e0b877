// Hits in the order of their slots, by a stable radix sort that is the same on any number of threads; and what they sum to,
// a slot's hits at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "rows.h"

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
    const auto for_each_hit = [&](const auto& f) {  // f(counter of its digit in its chunk, i)
      parallel(0, chunks, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) f(next[c * digits + digit(i)], i);
        }
      });
    };
    std::fill(next.begin(), next.end(), 0);
    for_each_hit([](int64_t& counter, int64_t) { ++counter; });
    int64_t total = 0;
    for (int64_t d = 0; d < digits; ++d) {
      for (int64_t c = 0; c < chunks; ++c) total += std::exchange(next[c * digits + d], total);
    }
    for_each_hit([&](int64_t& place, int64_t i) {
      to.slots[place] = keys[i];
      to.hits[place++] = pass == 0 ? i : from.hits[i];
    });
    std::swap(from, to);
  }
  return from;
}

// Where the runs of equal slots end: run i of them is from ends[i] to ends[i + 1].
template <class Slot>
std::vector<int64_t> ends_of_runs(const Slot* sorted, int64_t count) {
  std::vector<int64_t> ends{0};
  for (int64_t i = 1; i <= count; ++i) {
    if (i == count || sorted[i] != sorted[i - 1]) ends.push_back(i);
  }
  return ends;
}

// Sums of the sorted hits from `first` to `last`, a run at a time and in order, so that the next run's rows are fetched ahead.
// Each hit adds its weight times the gradient of the token that it is of.
template <class Row>
class HitSums {
 public:
  HitSums(const int64_t* hits, const Sum<Row>* weights, int64_t hits_a_token, const Table<Row>& grad, int64_t first, int64_t last)
      : grad_(grad), first_(first), last_(last), tokens_(last - first), weights_(last - first), sums_(grad.dim) {
    for (int64_t i = first; i < last; ++i) {
      tokens_[i - first] = hits[i] / hits_a_token;
      weights_[i - first] = weights[hits[i]];
    }
  }

  int64_t dim() const { return grad_.dim; }

  void sum(int64_t begin, int64_t end, Row* out) {
    const int64_t at = begin - first_;
    sums_.weighted_sum(grad_, tokens_.data() + at, weights_.data() + at, end - begin, last_ - begin, out);
  }

 private:
  Table<Row> grad_;
  int64_t first_, last_;
  std::vector<int64_t> tokens_;
  std::vector<Sum<Row>> weights_;
  RowSums<Row> sums_;
};

}  // namespace memcompile
