// Rows that are pairs (u, v): a token's dots with one of them decide by what weights the others are summed. A group of rows is read
// once, both halves one after the other, so that the second is fetched while the first is read, and the next group's first while
// the second is.
#pragma once

#include <cmath>
#include <vector>

#include "rows.h"

namespace memcompile {

// z * Phi(z) and its derivative, Phi the normal distribution function.
template <class S>
struct Gelu {
  S value, slope;

  explicit Gelu(S z) {
    const S below = S(0.5) * std::erfc(z * S(-0.70710678118654752440));  // Phi(z)
    value = z * below;
    slope = below + z * S(0.39894228040143267794) * std::exp(S(-0.5) * z * z);
  }
};

// Of tables whose rows are halves of the same rows: `dotted`, of which dots are taken, and `summed`.
template <class Row>
class PairSums {
 public:
  using S = Sum<Row>;

  PairSums(const Table<Row>& dotted, const Table<Row>& summed)
      : dotted_(dotted), summed_(summed), copy_(dotted.dim), sums_(summed.dim) {}

  // out = sum over i < count of weight(i, dotted row . vector) * summed row, of the rows numbers[i]; `known` as in RowSums.
  template <class Number, class Weight>
  void weighted_sum(const Number* numbers, int64_t count, int64_t known, const Row* vector, const Weight& weight, Row* out) {
    const Table<Row> dotted = dotted_, summed = summed_;  // which no store changes
    S* const copy = copy_.data();
    copy_in_pairs(vector, dotted.dim, copy);
    const auto add = [=]<int64_t size>(std::integral_constant<int64_t, size>, int64_t first, int64_t last, const S* from, S* to) __attribute__((always_inline)) {
      S weights[size];
      const RowGroup<Row, size> first_half(dotted, first, last, summed, first, last, numbers);
      dots_of_group<size>(first_half, copy, dotted.dim, size, weights);
      for (int64_t z = 0; z < size; ++z) weights[z] = weight(first + z, weights[z]);
      add_rows<size>(RowGroup<Row, size>(summed, first, last, dotted, first + size, known, numbers), weights, summed.dim, from, to);
    };
    sums_.sum_groups(count, out, add);
  }

 private:
  Table<Row> dotted_, summed_;
  std::vector<S> copy_;
  RowSums<Row> sums_;
};

}  // namespace memcompile
