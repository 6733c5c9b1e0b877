// The k largest of n numbers, exactly, by (number descending, index ascending), NaN above all numbers and -0.0 as 0.0.
//
// Numbers become integers of the same order. A bound that at least k and not many more of them reach is found by
// bisection: on the maxima of groups, which are few, since k groups with a maximum over the bound hold k numbers over
// it. What reaches the bound is ranked by counting. Nothing is read back more often than once, and there is no branch
// on data but for the bits of a mask.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace memcompile {

// The integer of a number's width.
template <class Score>
using OrderKey = std::conditional_t<std::is_same_v<Score, float>, int32_t, int64_t>;

template <class Score>
inline OrderKey<Score> order_key(Score x) {
  using Key = OrderKey<Score>;
  if (x != x) return std::numeric_limits<Key>::max();
  x += Score(0);
  Key bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> (8 * sizeof bits - 1)) & std::numeric_limits<Key>::max());
}

template <class Score>
class Selector {
 public:
  using Key = OrderKey<Score>;

  // Room for one thread: up to n scores, of which k are wanted.
  Selector(int64_t n, int64_t k)
      : groups_(round_up(std::max<int64_t>(2 * k, kBlock))),
        keys_(round_up(n)),
        maxima_(groups_),
        found_(round_up(n)),
        index_(round_up(n)),
        rank_(kCounted),
        order_(std::max(n, kCounted)) {}

  // ranked[r] = index of the r-th largest of scores[0..n), r < k <= n.
  void select(const Score* scores, int64_t n, int64_t k, int32_t* ranked) {
    const int64_t padded = round_up(n);
    for (int64_t i = 0; i < n; ++i) keys_[i] = order_key(scores[i]);
    std::fill(keys_.begin() + n, keys_.begin() + padded, kLowest);
    const Key bound = padded >= 4 * groups_ ? bound_of(maxima_of_groups(padded), groups_, groups_, k)
                                            : bound_of(keys_.data(), n, padded, k);
    int64_t count = 0;
    for (int64_t i = 0; i < padded; i += kBlock) {
      for (uint64_t mask = at_least(keys_.data() + i, bound); mask != 0; mask &= mask - 1) {
        index_[count] = int32_t(i + __builtin_ctzll(mask));
        found_[count] = keys_[index_[count]];
        ++count;
      }
    }
    if (count <= kCounted) {
      rank_by_counting(count, k, ranked);
    } else {
      rank_by_sorting(count, k, ranked);
    }
  }

 private:
  static constexpr int64_t kBlock = 64;
  static constexpr int64_t kCounted = 256;  // counting takes count**2 comparisons, a vector of them at a time
  static constexpr Key kLowest = std::numeric_limits<Key>::min();  // no number has this key

  static int64_t round_up(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

  // maxima[g] of keys g, g + groups, g + 2 * groups, ...
  const Key* maxima_of_groups(int64_t padded) {
    std::copy_n(keys_.begin(), groups_, maxima_.begin());
    for (int64_t start = groups_; start < padded; start += groups_) {
      const int64_t width = std::min(groups_, padded - start);
      for (int64_t g = 0; g < width; ++g) maxima_[g] = std::max(maxima_[g], keys_[start + g]);
    }
    return maxima_.data();
  }

  // A bound that at least k of keys[0..n) reach: the k-th largest, or lower while few more reach it.
  static Key bound_of(const Key* keys, int64_t n, int64_t padded, int64_t k) {
    Key low = keys[0], high = keys[0];  // the answer is in low..high
    for (int64_t i = 1; i < n; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    while (low < high) {
      const Key middle = Key(low + (std::make_unsigned_t<Key>(high) - std::make_unsigned_t<Key>(low)) / 2 + 1);
      const int64_t reached = count_at_least(keys, padded, middle);
      if (reached < k) {
        high = middle - 1;
      } else {
        low = middle;
        if (reached <= k + k / 4) break;
      }
    }
    return low;
  }

  static int64_t count_at_least(const Key* keys, int64_t padded, Key bound) {
    Vector<Key> counts{};
    const Vector<Key> bounds = splat(bound);
    for (int64_t i = 0; i < padded; i += kLanes<Key>) counts -= load(keys + i) >= bounds;
    return int64_t(sum_of_lanes<Key>(counts));
  }

  // An element's rank is how many stand before it. Found elements are in the order of their indices.
  void rank_by_counting(int64_t count, int64_t k, int32_t* ranked) {
    // Without ties the ranks are 0..count-1, and their sum tells.
    if (count_before<false>(count) != count * (count - 1) / 2) count_before<true>(count);
    for (int64_t i = 0; i < count; ++i) order_[rank_[i]] = index_[i];
    std::copy_n(order_.begin(), k, ranked);
  }

  // rank_[i] = how many of the found are larger than the i-th, or equal and before it; returns the sum of all.
  template <bool ties>
  int64_t count_before(int64_t count) {
    constexpr int64_t lanes = kLanes<Key>;
    Vector<Key> lane;
    for (int64_t i = 0; i < lanes; ++i) lane[i] = Key(i);
    int64_t total = 0;
    for (int64_t first = 0; first < count; first += lanes) {
      const Vector<Key> mine = load(found_.data() + first), place = lane + Key(first);
      Vector<Key> rank{};
      for (int64_t j = 0; j < count; ++j) {
        const Vector<Key> other = splat(found_[j]);
        rank -= other > mine;
        if constexpr (ties) rank -= (other == mine) & (place > Key(j));
      }
      store(rank_.data() + first, rank);
      for (int64_t i = first; i < std::min(first + lanes, count); ++i) total += int64_t(rank_[i]);
    }
    return total;
  }

  // Where ties let many through.
  void rank_by_sorting(int64_t count, int64_t k, int32_t* ranked) {
    for (int64_t i = 0; i < count; ++i) order_[i] = int32_t(i);
    std::partial_sort(order_.begin(), order_.begin() + k, order_.begin() + count, [&](int32_t a, int32_t b) {
      return found_[a] != found_[b] ? found_[a] > found_[b] : a < b;
    });
    for (int64_t r = 0; r < k; ++r) ranked[r] = index_[order_[r]];
  }

  int64_t groups_;
  std::vector<Key> keys_, maxima_, found_;
  std::vector<int32_t> index_;
  std::vector<Key> rank_;
  std::vector<int32_t> order_;
};

}  // namespace memcompile
