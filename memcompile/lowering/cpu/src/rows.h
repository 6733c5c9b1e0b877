// Weighted sums of rows, and dots with rows, that are far apart in memory. Eight rows are read side by side: so many
// misses are in flight at once, and a sum is loaded and stored once in eight rows. The next eight are fetched ahead, past
// the second-level cache, which none of them would be found in again.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace memcompile {

inline constexpr int64_t kSideBySide = 8;
inline constexpr int64_t kCacheLine = 64;

// The rows of a table, by number; offsets are 64-bit throughout.
template <class Row>
struct Table {
  const Row* data;
  int64_t stride;  // elements from a row to the next
  int64_t dim;

  const Row* row(int64_t number) const { return data + number * stride; }
};

// Up to eight rows from the first on, and the eight that follow; the last one again where there are no more.
template <class Row>
struct RowGroup {
  const Row* row[kSideBySide];
  const Row* ahead[kSideBySide];

  template <class Number>
  RowGroup(const Table<Row>& table, const Number* numbers, int64_t first, int64_t count) {
    for (int64_t z = 0; z < kSideBySide; ++z) {
      row[z] = table.row(int64_t(numbers[std::min(first + z, count - 1)]));
      ahead[z] = table.row(int64_t(numbers[std::min(first + kSideBySide + z, count - 1)]));
    }
  }

  // Asks for what a pair of columns takes of the following rows. Inlined: GCC takes a function that only prefetches for
  // one without an effect, and drops the call.
  __attribute__((always_inline)) void prefetch(int64_t column) const {
    for (int64_t z = 0; z < kSideBySide; ++z) {
      const char* p = reinterpret_cast<const char*>(ahead[z] + column);
      for (int64_t byte = 0; byte < kPair<Row> * int64_t(sizeof(Row)); byte += kCacheLine) __builtin_prefetch(p + byte, 0, 0);
    }
  }
};

// sums += weights[z] * row z, for z < size. Inlined, the group is a copy that stores to the sums cannot change, and its
// pointers are not read again behind each.
template <int64_t size, class Row>
__attribute__((always_inline)) inline void add_rows(RowGroup<Row> group, const Sum<Row>* weights, int64_t dim, Sum<Row>* sums) {
  using S = Sum<Row>;
  Vector<S> weight[size];
  for (int64_t z = 0; z < size; ++z) weight[z] = splat(weights[z]);
  int64_t c = 0;
  for (; c + kPair<Row> <= dim; c += kPair<Row>) {
    group.prefetch(c);
    Pair<S> sum = load_pair(sums + c);
    for (int64_t z = 0; z < size; ++z) {
      const Pair<S> x = load_pair(group.row[z] + c);
      sum.a += weight[z] * x.a;
      sum.b += weight[z] * x.b;
    }
    store_pair(sums + c, sum);
  }
  for (; c < dim; ++c) {
    for (int64_t z = 0; z < size; ++z) sums[c] += weights[z] * to_sum(group.row[z][c]);
  }
}

// Room for sums of rows of one length. Long sums are taken in parts, whose roundings do not add up.
template <class Row>
class RowSums {
 public:
  using S = Sum<Row>;

  explicit RowSums(int64_t dim) : dim_(dim), part_(dim), total_(dim) {}

  // out = sum over i < count of weights[i] * table.row(numbers[i]).
  template <class Number>
  void weighted_sum(const Table<Row>& table, const Number* numbers, const S* weights, int64_t count, Row* out) {
    std::fill(total_.begin(), total_.end(), S(0));
    for (int64_t first = 0; first < count; first += kPart) {
      std::fill(part_.begin(), part_.end(), S(0));
      add_part(table, numbers, weights, first, std::min(first + kPart, count), count);
      for (int64_t c = 0; c < dim_; ++c) total_[c] += part_[c];
    }
    int64_t c = 0;
    for (; c + kPair<Row> <= dim_; c += kPair<Row>) store_pair(out + c, load_pair(total_.data() + c));
    for (; c < dim_; ++c) from_sum(total_[c], out + c);
  }

 private:
  static constexpr int64_t kPart = 8 * kSideBySide;  // rows

  template <class Number>
  void add_part(const Table<Row>& table, const Number* numbers, const S* weights, int64_t first, int64_t last, int64_t count) {
    const auto add = [&]<int64_t size>(std::integral_constant<int64_t, size>) {
      add_rows<size>(RowGroup<Row>(table, numbers, first, count), weights + first, dim_, part_.data());
      first += size;
    };
    while (first + kSideBySide <= last) add(std::integral_constant<int64_t, kSideBySide>{});
    if (first + 4 <= last) add(std::integral_constant<int64_t, 4>{});
    if (first + 2 <= last) add(std::integral_constant<int64_t, 2>{});
    if (first < last) add(std::integral_constant<int64_t, 1>{});
  }

  int64_t dim_;
  std::vector<S> part_, total_;
};

// out[i] = table.row(numbers[i]) . vector, for i < count; copy [dim] is scratch.
template <class Row, class Number>
void dots_with_rows(const Table<Row>& table, const Number* numbers, int64_t count, const Row* vector, Sum<Row>* copy,
                    Sum<Row>* out) {
  using S = Sum<Row>;
  const int64_t dim = table.dim, whole = dim / kPair<Row> * kPair<Row>;
  for (int64_t c = 0; c < whole; c += kPair<Row>) store_pair(copy + c, load_pair(vector + c));
  for (int64_t first = 0; first < count; first += kSideBySide) {
    const RowGroup<Row> group(table, numbers, first, count);
    Pair<S> dot[kSideBySide] = {};
    for (int64_t c = 0; c < whole; c += kPair<Row>) {
      group.prefetch(c);
      const Pair<S> y = load_pair(copy + c);
      for (int64_t z = 0; z < kSideBySide; ++z) {
        const Pair<S> x = load_pair(group.row[z] + c);
        dot[z].a += x.a * y.a;
        dot[z].b += x.b * y.b;
      }
    }
    for (int64_t z = 0; z < std::min(kSideBySide, count - first); ++z) {
      S sum = sum_of_lanes<S>(dot[z].a + dot[z].b);
      for (int64_t c = whole; c < dim; ++c) sum += to_sum(vector[c]) * to_sum(group.row[z][c]);
      out[first + z] = sum;
    }
  }
}

}  // namespace memcompile
