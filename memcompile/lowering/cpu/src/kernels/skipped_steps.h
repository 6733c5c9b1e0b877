// What rows have missed of AdamW's steps, as skipped_steps.py has it: a term is what its step alone decides, looked up, times
// powers of the betas.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace memcompile {

// The table of rate_history.py: an entry for each change of the rates.
class Rates {
 public:
  enum Factor { kDecay, kBeta1, kBeta2 };
  static constexpr int64_t kColumns = 8;

  Rates(const double* entries, int64_t count) : entries_(entries), count_(count), same_betas_(count) {
    for (int64_t e = 1; e < count; ++e) {
      const bool same = log(e, kBeta1) == log(e - 1, kBeta1) && log(e, kBeta2) == log(e - 1, kBeta2);
      same_betas_[e] = same ? same_betas_[e - 1] : e;
    }
  }

  // The entry of a step; step 0 is before all.
  int64_t entry_of(int64_t step) const {
    int64_t first = 0, last = count_;  // the entry that is looked for is in [first, last)
    while (last - first > 1) {
      const int64_t middle = (first + last) / 2;
      (start(middle) <= double(step) ? first : last) = middle;
    }
    return first;
  }

  double start(int64_t entry) const { return entries_[entry * kColumns]; }
  double lr(int64_t entry) const { return entries_[entry * kColumns + 1]; }
  double log(int64_t entry, Factor factor) const { return entries_[entry * kColumns + 2 + 2 * factor]; }
  // The first of the entries up to this one that have its betas.
  int64_t same_betas(int64_t entry) const { return same_betas_[entry]; }

  // The logarithm of the product of a factor over the steps after + 1 to `until`, which are in the entries given.
  double log_product(Factor factor, int64_t after, int64_t after_entry, int64_t until, int64_t until_entry) const {
    if (after_entry == until_entry) return double(until - after) * log(until_entry, factor);
    return total(factor, until, until_entry) - total(factor, after, after_entry);
  }

 private:
  double total(Factor factor, int64_t step, int64_t entry) const {
    return entries_[entry * kColumns + 3 + 2 * factor] + (double(step + 1) - start(entry)) * log(entry, factor);
  }

  const double* entries_;
  int64_t count_;
  std::vector<int64_t> same_betas_;
};

// What rows have missed: an entry for each of the ascending steps `starts` that they were last touched in, below `until`.
class SkippedSteps {
 public:
  SkippedSteps(const Rates& rates, const int64_t* starts, int64_t count, int64_t until, int64_t terms)
      : rates_(rates), starts_(starts), until_(until), terms_(terms), last_entry_(rates.entry_of(until)), first_(count) {
    int64_t after = -1;
    for (int64_t i = 0; i < count; ++i) {
      after = std::max(after, starts[i]);
      first_[i] = steps() - (after - starts[i]);
      for (; after < std::min(starts[i] + terms, until); ++after) steps_.push_back(after + 1);
    }
    entries_.resize(steps());
    rates_of_.resize(steps());
    roots_.resize(steps());
  }

  // How many steps are in any entry. What each decides must be made first, in any order.
  int64_t steps() const { return int64_t(steps_.size()); }

  void make_steps(int64_t begin, int64_t end) {
    int64_t entry = begin < end ? rates_.entry_of(steps_[begin]) : 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = steps_[i];
      while (entry < last_entry_ && rates_.start(entry + 1) <= double(k)) ++entry;
      const double log_p = rates_.log_product(Rates::kDecay, k, entry, until_, last_entry_);
      entries_[i] = entry;
      rates_of_[i] = std::exp(log_p) * rates_.lr(entry) / without_power(k, entry, Rates::kBeta1);
      roots_[i] = 1 / std::sqrt(without_power(k, entry, Rates::kBeta2));
    }
  }

  // Of one entry after another, on one thread.
  class Maker {
   public:
    explicit Maker(const SkippedSteps& all) : all_(all), c_(all.terms_), a_(all.terms_), power1_(all.terms_), power2_(all.terms_) {}

    // The panels of entry i, each a centre and moments.
    template <int64_t moments>
    std::vector<double> panels(int64_t i) {
      const int64_t place = all_.first_[i];
      length_ = std::min(all_.terms_, all_.until_ - all_.starts_[i]);
      make_powers(all_.starts_[i], all_.entries_.data() + place);
      while (length_ > 1 && power1_[length_ - 1] < kLeast) --length_;
      double *c = c_.data(), *a = a_.data();
      for (int64_t j = 0; j < length_; ++j) c[j] = all_.rates_of_[place + j] * power1_[j];
      for (int64_t j = 0; j < length_; ++j) a[j] = all_.roots_[place + j] * power2_[j];
      double highest = a[0], lowest = a[length_ - 1];
      if (!falls_) {
        highest = *std::max_element(a, a + length_);
        lowest = *std::min_element(a, a + length_);
      }
      const int64_t count = 1 + int64_t(std::log(highest / lowest) / ratio());
      const auto top = [&](int64_t panel) { return highest * std::exp(-ratio() * double(panel)); };
      std::vector<double> out(count * (1 + moments));
      for (int64_t p = 0; p < count; ++p) out[p * (1 + moments)] = top(p) / (1 + kHalfWidth);
      for (int64_t first = 0, last; first < length_; first = last) {
        const int64_t p = std::min(count - 1, int64_t(std::log(highest / a[first]) / ratio()));
        const double above = p == 0 ? INFINITY : top(p) * (1 + kSlack), below = p + 1 == count ? 0 : top(p + 1) * (1 - kSlack);
        const auto is_in = [&](double x) { return x >= below && x <= above; };
        double *next = a + first + 1, *end = a + length_;
        last = (falls_ ? std::partition_point(next, end, is_in) : std::find_if_not(next, end, is_in)) - a;
        add_terms<moments>(a + first, c + first, last - first, out.data() + p * (1 + moments));
      }
      return out;
    }

   private:
    static constexpr double kHalfWidth = 1.0 / 16, kSlack = 1e-12, kLeast = 1e-290;
    static double ratio() { return std::log((1 + kHalfWidth) / (1 - kHalfWidth)); }

    // The products of the betas, beta2's root, over the steps from start + 1 to each: powers, where the betas stay. Then
    // the a fall from term to term.
    void make_powers(int64_t start, const int64_t* entries) {
      const Rates& rates = all_.rates_;
      const int64_t betas = rates.same_betas(entries[0]);
      falls_ = betas == rates.same_betas(entries[length_ - 1]);
      if (falls_ && betas == made_for_ && made_ >= length_) return;
      made_for_ = falls_ ? betas : -1;
      made_ = length_;
      const int64_t start_entry = rates.entry_of(start);
      for (int64_t j = 0; j < length_; ++j) {
        const auto log = [&](Rates::Factor factor) {
          if (falls_) return double(j + 1) * rates.log(betas, factor);
          return rates.log_product(factor, start, start_entry, start + 1 + j, entries[j]);
        };
        power1_[j] = std::exp(log(Rates::kBeta1));
        power2_[j] = std::exp(log(Rates::kBeta2) / 2);
      }
    }

    // moments[i] += sum of c * (-d)**i, d = a / centre - 1
    template <int64_t moments>
    static void add_terms(const double* a, const double* c, int64_t count, double* panel) {
      constexpr int64_t lanes = kLanes<double>;
      const double inverse = 1 / panel[0];
      Vector<double> sums[moments] = {};
      const auto add = [&](Vector<double> term, Vector<double> scaled) {
        const Vector<double> minus_d = 1 - scaled * inverse;
        for (int64_t i = 0; i < moments; ++i, term *= minus_d) sums[i] += term;
      };
      int64_t j = 0;
      for (; j + lanes <= count; j += lanes) add(load(c + j), load(a + j));
      double rest[2][lanes] = {};
      std::copy(c + j, c + count, rest[0]);
      std::copy(a + j, a + count, rest[1]);
      add(load(rest[0]), load(rest[1]));
      for (int64_t i = 0; i < moments; ++i) panel[1 + i] += sum_of_lanes<double>(sums[i]);
    }

    const SkippedSteps& all_;
    std::vector<double> c_, a_, power1_, power2_;  // of each term
    int64_t made_for_ = -1, made_ = 0;             // the entry whose betas the powers are of, and how many
    int64_t length_ = 0;
    bool falls_ = true;
  };

 private:
  // 1 - beta**k
  double without_power(int64_t k, int64_t entry, Rates::Factor factor) const {
    const double log = double(k) * rates_.log(entry, factor);
    return log < -40 ? 1 : -std::expm1(log);  // e**-40 is below half a rounding of 1
  }

  const Rates& rates_;
  const int64_t* starts_;
  int64_t until_, terms_, last_entry_;
  std::vector<int64_t> first_;            // of each entry, its first step's place
  std::vector<int64_t> steps_, entries_;  // all that any entry sums over, ascending, and whose rates they have
  std::vector<double> rates_of_, roots_;  // P(k+1..until) * lr / (1 - beta1**k) and 1 / sqrt(1 - beta2**k)
};

}  // namespace memcompile
