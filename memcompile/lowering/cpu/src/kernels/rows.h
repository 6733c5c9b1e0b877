// Weighted sums of rows, and dots with rows, that are far apart in memory. Eight rows are read side by side: so many
// misses are in flight at once, and a sum is loaded and stored once in eight rows. A little of each is fetched ahead, its
// end with the start of the eight that follow; past the second-level cache, which none of them would be found in again.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace memcompile {

inline constexpr int64_t kSideBySide = 8;
inline constexpr int64_t kCacheLine = 64;
inline constexpr int64_t kAhead = 1024;  // bytes of a row; whole rows ahead overflow the first-level cache, 20% slower

// The rows of a table, by number; offsets are 64-bit throughout.
template <class Row>
struct Table {
  const Row* data;
  int64_t stride;  // elements from a row to the next
  int64_t dim;

  const Row* row(int64_t number) const { return data + number * stride; }
};

// `size` of `count` rows from the first on, and as many that follow of the `known` ones; the last one again where there
// are no more. What follows is of the same table, or of one that is given.
template <class Row, int64_t size = kSideBySide>
struct RowGroup {
  const Row* row[size];
  const Row* next[size];

  template <class Number>
  RowGroup(const Table<Row>& table, const Number* numbers, int64_t first, int64_t count, int64_t known)
      : RowGroup(table, first, count, table, first + size, known, numbers) {}

  template <class Number>
  RowGroup(const Table<Row>& table, int64_t first, int64_t count, const Table<Row>& next_table, int64_t next_first,
           int64_t known, const Number* numbers) {
    for (int64_t z = 0; z < size; ++z) {
      row[z] = table.row(int64_t(numbers[std::min(first + z, count - 1)]));
      next[z] = next_table.row(int64_t(numbers[std::min(next_first + z, known - 1)]));
    }
  }

  // f(c) for each pair of columns from c on, with a constant distance between what is fetched and what is read.
  template <class F>
  __attribute__((always_inline)) void for_each_pair(int64_t dim, const F& f) const {
    const int64_t whole = dim / kPair<Row> * kPair<Row>, distance = std::min<int64_t>(kAhead / sizeof(Row), whole);
    int64_t c = 0;
    for (; c + distance < whole; c += kPair<Row>) {
      prefetch(row, c + distance);
      f(c);
    }
    for (; c < whole; c += kPair<Row>) {
      prefetch(next, c + distance - whole);
      f(c);
    }
  }

 private:
  // Inlined: GCC takes a function that only prefetches for one without an effect, and drops the call.
  __attribute__((always_inline)) static void prefetch(const Row* const* rows, int64_t column) {
    for (int64_t z = 0; z < size; ++z) {
      const char* p = reinterpret_cast<const char*>(rows[z] + column);
      for (int64_t byte = 0; byte < kPair<Row> * int64_t(sizeof(Row)); byte += kCacheLine) __builtin_prefetch(p + byte, 0, 0);
    }
  }
};

// sums = from + weights[z] * row z, for z < size. Inlined, the group is a copy that stores to the sums cannot change, and its
// pointers are not read again after each.
template <int64_t size, class Row>
__attribute__((always_inline)) inline void add_rows(RowGroup<Row, size> group, const Sum<Row>* weights, int64_t dim, const Sum<Row>* from, Sum<Row>* sums) {
  using S = Sum<Row>;
  Vector<S> weight[size];
  for (int64_t z = 0; z < size; ++z) weight[z] = splat(weights[z]);
  group.for_each_pair(dim, [&](int64_t c) __attribute__((always_inline)) {
    Pair<S> sum = load_pair(from + c);
    for (int64_t z = 0; z < size; ++z) {
      const Pair<S> x = load_pair(group.row[z] + c);
      sum.a += weight[z] * x.a;
      sum.b += weight[z] * x.b;
    }
    store_pair(sums + c, sum);
  });
  for (int64_t c = dim / kPair<Row> * kPair<Row>; c < dim; ++c) {
    S sum = from[c];
    for (int64_t z = 0; z < size; ++z) sum += weights[z] * S(group.row[z][c]);
    sums[c] = sum;
  }
}

// Room for sums of rows of one length. Long sums are taken in parts, whose roundings do not add up.
template <class Row>
class RowSums {
 public:
  using S = Sum<Row>;

  explicit RowSums(int64_t dim) : dim_(dim), zeros_(dim), part_(dim), total_(dim) {}

  // out = sum over i < count of weights[i] * table.row(numbers[i]). Of the numbers, `known` are there: those after count
  // are of the rows that are wanted next, which are fetched ahead.
  template <class Number>
  void weighted_sum(Table<Row> table, const Number* numbers, const S* weights, int64_t count, int64_t known, Row* out) {
    const auto add = [=, dim = dim_]<int64_t size>(std::integral_constant<int64_t, size>, int64_t first, int64_t last, const S* from, S* to) __attribute__((always_inline)) {
      add_rows<size>(RowGroup<Row, size>(table, numbers, first, last, known), weights + first, dim, from, to);
    };
    sum_groups(count, out, add);
  }

  // out = what add(its size, first, last, from, to) adds up, of groups of up to kSideBySide of `count` rows: each adds that of the rows
  // from `first` on to `from`, and stores it to `to`; rows past `last` are of another group.
  template <class Add>
  __attribute__((always_inline)) void sum_groups(int64_t count, Row* out, const Add& add) {
    const S* sum = count == 0 ? zeros_.data() : part_.data();
    if (count <= kPart) {
      add_part(0, count, add);
    } else {
      sum = total_.data();
      std::fill(total_.begin(), total_.end(), S(0));
      for (int64_t first = 0; first < count; first += kPart) {
        add_part(first, std::min(first + kPart, count), add);
        for (int64_t c = 0; c < dim_; ++c) total_[c] += part_[c];
      }
    }
    int64_t c = 0;
    for (; c + kPair<Row> <= dim_; c += kPair<Row>) store_pair(out + c, load_pair(sum + c));
    for (; c < dim_; ++c) out[c] = Row(sum[c]);
  }

 private:
  static constexpr int64_t kPart = 8 * kSideBySide;  // rows

  template <class Add>
  void add_part(int64_t first, int64_t last, Add add) {
    const S* from = zeros_.data();
    const auto group = [&]<int64_t size>(std::integral_constant<int64_t, size> constant) __attribute__((always_inline)) {
      add(constant, first, last, from, part_.data());
      from = part_.data();
      first += size;
    };
    while (first + kSideBySide <= last) group(std::integral_constant<int64_t, kSideBySide>{});
    if (first + 4 <= last) group(std::integral_constant<int64_t, 4>{});
    if (first + 2 <= last) group(std::integral_constant<int64_t, 2>{});
    if (first < last) group(std::integral_constant<int64_t, 1>{});
  }

  int64_t dim_;
  std::vector<S> zeros_, part_, total_;
};

// copy [dim] = vector, in the order that pairs have.
template <class Row>
void copy_in_pairs(const Row* vector, int64_t dim, Sum<Row>* copy) {
  int64_t c = 0;
  for (; c + kPair<Row> <= dim; c += kPair<Row>) store_pair(copy + c, load_pair(vector + c));
  for (; c < dim; ++c) copy[c] = vector[c];
}

// out[z] = row z . copy, for z < count; the copy as above.
template <int64_t size, class Row>
__attribute__((always_inline)) inline void dots_of_group(RowGroup<Row, size> group, const Sum<Row>* copy, int64_t dim, int64_t count, Sum<Row>* out) {
  using S = Sum<Row>;
  Pair<S> dot[size] = {};
  group.for_each_pair(dim, [&](int64_t c) __attribute__((always_inline)) {
    const Pair<S> y = load_pair(copy + c);
    for (int64_t z = 0; z < size; ++z) {
      const Pair<S> x = load_pair(group.row[z] + c);
      dot[z].a += x.a * y.a;
      dot[z].b += x.b * y.b;
    }
  });
  for (int64_t z = 0; z < count; ++z) {
    S sum = sum_of_lanes<S>(dot[z].a + dot[z].b);
    for (int64_t c = dim / kPair<Row> * kPair<Row>; c < dim; ++c) sum += copy[c] * S(group.row[z][c]);
    out[z] = sum;
  }
}

// out[i] = table.row(numbers[i]) . vector, for i < count; `known` as in RowSums; copy [dim] is scratch.
template <class Row, class Number>
void dots_with_rows(const Table<Row>& table, const Number* numbers, int64_t count, int64_t known, const Row* vector,
                    Sum<Row>* copy, Sum<Row>* out) {
  const int64_t dim = table.dim;
  copy_in_pairs(vector, dim, copy);
  for (int64_t first = 0; first < count; first += kSideBySide) {
    const RowGroup<Row> group(table, numbers, first, count, known);
    dots_of_group<kSideBySide>(group, copy, dim, std::min(kSideBySide, count - first), out + first);
  }
}

}  // namespace memcompile
