// Weighted sums of rows, and dots with rows, as they are after the steps that they missed: stale_rows.py. As in rows.h some
// rows are read side by side, and a little of each ahead; they are corrected a vector at a time, where they are summed. They
// are four, of three tables each: rows of 4 KiB share the sets of a first-level cache, and eight took 30% longer. Nothing is
// written but the results.
#pragma once

#include <algorithm>
#include <vector>

#include "row_updates.h"

namespace memcompile {

template <class Value, class State>
class StaleRows {
 public:
  using S = Sum<Value>;

  StaleRows(const Value* values, const State* exp_avg, const State* exp_avg_sq, int64_t dim, const MissedSteps<S>* entries, S eps)
      : x_(values), m_(exp_avg), v_(exp_avg_sq), dim_(dim), entries_(entries), eps_(eps), zeros_(dim) {}

  // The room that a row of sums takes: whole vectors.
  int64_t room() const { return (dim_ + kLanes<S> - 1) / kLanes<S> * kLanes<S>; }

  // sums[room] = sum over i < count of weights[i] * row numbers[i] by what it has missed. Of the numbers and missed_steps `known` are there:
  // those after count are wanted next. Long sums are taken in parts, whose roundings do not add up; part[room] is scratch.
  template <class Number>
  void weighted_sum(const Number* numbers, const int64_t* missed_steps, const S* weights, int64_t count, int64_t known, S* part, S* sums) const {
    std::fill_n(sums, room(), S(0));
    for (int64_t first = 0; first < count;) {
      const int64_t last = std::min(count, first + kPart);
      S* to = count <= kPart ? sums : part;
      std::fill_n(to, room(), S(0));
      for (; first + kTogether <= last; first += kTogether) {
        add_group(group<kTogether>(numbers, missed_steps, first, known), weights + first, to);
      }
      for (; first < last; ++first) add_group(group<1>(numbers, missed_steps, first, known), weights + first, to);
      for (int64_t c = 0; to == part && c < room(); c += kLanes<S>) store(sums + c, load(sums + c) + load(part + c));
    }
  }

  // out[i] = row numbers[i] by what it has missed . vector[room], for i < count; `known` as above.
  template <class Number>
  void dots(const Number* numbers, const int64_t* missed_steps, int64_t count, int64_t known, const S* vector, S* out) const {
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) {
      dots_of_group(group<kTogether>(numbers, missed_steps, i, known), vector, out + i);
    }
    for (; i < count; ++i) dots_of_group(group<1>(numbers, missed_steps, i, known), vector, out + i);
  }

 private:
  static constexpr int64_t kTogether = 4, kPart = 16 * kTogether;  // rows
  static constexpr int64_t kAhead = 1024;                         // bytes of a row of sums

  // Where a row and its moments are; without panels nothing but its values is read.
  struct Place {
    const Value* x;
    const State *m, *v;
    MissedSteps<S> missed;
  };

  template <int64_t size>
  struct Group {
    Place row[size], next[size];
    bool moved = false;
  };

  template <int64_t size, class Number>
  Group<size> group(const Number* numbers, const int64_t* missed_steps, int64_t first, int64_t known) const {
    Group<size> out;
    const auto place = [&](int64_t i) {
      const MissedSteps<S>& missed = entries_[missed_steps[i]];
      const int64_t at = int64_t(numbers[i]) * dim_;
      return Place{x_ + at, missed.count ? m_ + at : zeros_.data(), missed.count ? v_ + at : zeros_.data(), missed};
    };
    for (int64_t z = 0; z < size; ++z) {
      out.row[z] = place(first + z);
      out.next[z] = place(std::min(first + size + z, known - 1));
      out.moved |= out.row[z].missed.count > 0;
    }
    return out;
  }

  template <int64_t size>
  __attribute__((noinline)) void add_group(const Group<size>& rows, const S* weights, S* to) const {
    Vector<S> sum, weight[size];
    for (int64_t z = 0; z < size; ++z) weight[z] = splat(weights[z]);
    for_each_vector_of(
        rows, [&](int64_t c) __attribute__((always_inline)) { sum = load(to + c); },
        [&](int64_t z, int64_t, Vector<S> x) __attribute__((always_inline)) { sum += weight[z] * x; },
        [&](int64_t c) __attribute__((always_inline)) { store(to + c, sum); });
  }

  template <int64_t size>
  __attribute__((noinline)) void dots_of_group(const Group<size>& rows, const S* vector, S* out) const {
    Vector<S> dot[size] = {}, other[size] = {}, y;  // taken in turns: roundings do not add up so fast
    for_each_vector_of(
        rows, [&](int64_t c) __attribute__((always_inline)) { y = load(vector + c); },
        [&](int64_t z, int64_t, Vector<S> x) __attribute__((always_inline)) {
          const Vector<S> sum = other[z] + x * y;
          other[z] = dot[z];
          dot[z] = sum;
        },
        [](int64_t) {});
    for (int64_t z = 0; z < size; ++z) out[z] = sum_of_lanes<S>(dot[z] + other[z]);
  }

  // start(c), f(z, c, vector of row z) for each row, end(c), for each column c that a vector begins with.
  template <int64_t size, class Start, class F, class End>
  __attribute__((always_inline)) void for_each_vector_of(const Group<size>& rows, const Start& start, const F& f, const End& end) const {
    rows.moved ? run<true>(rows, start, f, end) : run<false>(rows, start, f, end);
  }

  template <bool moved, int64_t size, class Start, class F, class End>
  __attribute__((always_inline)) void run(const Group<size>& rows, const Start& start, const F& f, const End& end) const {
    constexpr int64_t lanes = kLanes<S>;
    const S eps = eps_;
    const auto current = [eps](const Place& row, const Value* x, const State* m, const State* v) __attribute__((always_inline)) {
      const Vector<S> kept = load_lanes(x) * row.missed.decay[0];
      if constexpr (!moved) return kept;
      return kept - load_lanes(m) * steps_a_moment(row.missed, square_root(load_lanes(v)), eps);
    };
    // A constant distance lies between what is fetched and what is read: at first of the same rows, then of the next.
    const int64_t whole = dim_ / lanes * lanes, distance = std::min<int64_t>(kAhead / sizeof(S), whole);
    const auto columns = [&](const Place* ahead, int64_t offset, int64_t c, int64_t last) __attribute__((always_inline)) {
      for (; c < last; c += lanes) {
        start(c);
        for (int64_t z = 0; z < size; ++z) {
          __builtin_prefetch(ahead[z].x + c + offset, 0, 0);
          if constexpr (moved) {
            __builtin_prefetch(ahead[z].m + c + offset, 0, 0);
            __builtin_prefetch(ahead[z].v + c + offset, 0, 0);
          }
          f(z, c, current(rows.row[z], rows.row[z].x + c, rows.row[z].m + c, rows.row[z].v + c));
        }
        end(c);
      }
    };
    columns(rows.row, distance, 0, whole - distance);
    columns(rows.next, distance - whole, whole - distance, whole);
    if (whole == dim_) return;
    start(whole);
    for (int64_t z = 0; z < size; ++z) {
      const Place& row = rows.row[z];
      Tail<Value> x(row.x + whole, dim_ - whole);
      Tail<State> m(row.m + whole, dim_ - whole), v(row.v + whole, dim_ - whole);
      f(z, whole, current(row, x.data(), m.data(), v.data()));
    }
    end(whole);
  }

  const Value* x_;
  const State *m_, *v_;
  int64_t dim_;
  const MissedSteps<S>* entries_;
  S eps_;
  std::vector<State> zeros_;  // moments that are not read
};

}  // namespace memcompile
