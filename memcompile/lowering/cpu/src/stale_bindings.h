// The operators for rows that have missed steps, the reads of them and what they missed: what they are given is checked
// here, the loops are in stale_rows.h and skipped_steps.h.
#pragma once

#include <tuple>
#include <vector>

#include "kernels/skipped_steps.h"
#include "kernels/stale_rows.h"
#include "row_bindings.h"

namespace memcompile {
namespace {

// What the operators that read stale rows are given, checked: f(rows, slots, missed_steps) for the type of each.
template <class F>
void with_stale_rows(const Tensor& values, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& slots_given,
                     const Tensor& missed_given, const Tensor& decays, const Tensor& panels, double eps, const F& f) {
  STD_TORCH_CHECK(values.scalar_type() != ScalarType::Half, "memcompile: values must be float32, float64 or bfloat16");
  STD_TORCH_CHECK(is_table(values, values) && is_table(exp_avg, values) && is_table(exp_avg_sq, values) &&
                      exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
                  "memcompile: values, exp_avg and exp_avg_sq must be contiguous [slots, dim], the last two of one dtype");
  STD_TORCH_CHECK(is(missed_given, ScalarType::Long, {slots_given.size(0), slots_given.size(1)}),
                  "memcompile: missed_steps must be int64 as slots [tokens, hits]");
  const Tensor slots = torch::stable::contiguous(slots_given), missed_steps = torch::stable::contiguous(missed_given);
  with_value_type(values, [&]<class Value>(Value) {
    using S = Sum<Value>;
    std::vector<S> room;
    const std::vector<MissedSteps<S>> entries = missed_entries<S>(missed_steps, decays, panels, room);
    with_state_type<Value>(exp_avg, [&]<class State>(State) {
      const StaleRows<Value, State> rows(values.const_data_ptr<Value>(), exp_avg.const_data_ptr<State>(),
                                         exp_avg_sq.const_data_ptr<State>(), values.size(1), entries.data(), S(eps));
      with_slot_type(slots, [&]<class Slot>(Slot) {
        check_range("slot", slots.const_data_ptr<Slot>(), slots.numel(), values.size(0));
        f(rows, slots.const_data_ptr<Slot>(), missed_steps.const_data_ptr<int64_t>());
      });
    });
  });
}

Tensor stale_gather(const Tensor& values, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& slots,
                    const Tensor& weights_given, const Tensor& missed_steps, const Tensor& decays, const Tensor& panels,
                    double eps) {
  check_weights(slots, weights_given);
  const Tensor weights = as(weights_given, sum_type(values));
  const int64_t tokens = slots.size(0), hits = slots.size(1), dim = values.size(1);
  Tensor out = torch::stable::new_empty(values, {tokens, dim}, values.scalar_type());
  with_stale_rows(values, exp_avg, exp_avg_sq, slots, missed_steps, decays, panels, eps,
                  [&]<class Value, class State>(const StaleRows<Value, State>& rows, const auto* s, const int64_t* missed) {
    using S = Sum<Value>;
    const S* w = weights.const_data_ptr<S>();
    Value* y = out.mutable_data_ptr<Value>();
    parallel(tokens, 4 * hits * dim, [&](int64_t begin, int64_t end) {
      std::vector<S> part(rows.room()), sums(rows.room());
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * hits;
        rows.weighted_sum(s + first, missed + first, w + first, hits, (end - t) * hits, part.data(), sums.data());
        for (int64_t c = 0; c < dim; ++c) y[t * dim + c] = Value(sums[c]);
      }
    });
  });
  return out;
}

Tensor stale_dot(const Tensor& values, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& slots,
                 const Tensor& grad_given, const Tensor& missed_steps, const Tensor& decays, const Tensor& panels, double eps) {
  check_dot(values, slots, grad_given);
  const Tensor grad = as(grad_given, sum_type(values));
  const int64_t tokens = slots.size(0), hits = slots.size(1), dim = values.size(1);
  Tensor out = torch::stable::new_empty(values, {tokens, hits}, sum_type(values));
  with_stale_rows(values, exp_avg, exp_avg_sq, slots, missed_steps, decays, panels, eps,
                  [&]<class Value, class State>(const StaleRows<Value, State>& rows, const auto* s, const int64_t* missed) {
    using S = Sum<Value>;
    const S* u = grad.const_data_ptr<S>();
    S* dots = out.mutable_data_ptr<S>();
    parallel(tokens, 4 * hits * dim, [&](int64_t begin, int64_t end) {
      std::vector<S> vector(rows.room());
      for (int64_t t = begin; t < end; ++t) {
        std::copy(u + t * dim, u + (t + 1) * dim, vector.data());
        rows.dots(s + t * hits, missed + t * hits, hits, (end - t) * hits, vector.data(), dots + t * hits);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> skipped_steps(const Tensor& rates_given, const Tensor& starts_given, int64_t until, int64_t terms,
                                         int64_t moments) {
  STD_TORCH_CHECK(is(rates_given, ScalarType::Double, {kAny, Rates::kColumns}) && rates_given.numel() > 0,
                  "memcompile: rates must be float64 [changes, ", Rates::kColumns, "]");
  STD_TORCH_CHECK(is(starts_given, ScalarType::Long, {kAny}), "memcompile: starts must be int64 [n]");
  STD_TORCH_CHECK(terms > 0 && (moments == 7 || moments == 14), "memcompile: terms must be positive, and moments 7 or 14");
  const Tensor entries = torch::stable::contiguous(rates_given), starts = torch::stable::contiguous(starts_given);
  const int64_t count = starts.numel();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(count == 0 || (start[0] >= -1 && start[count - 1] <= until &&
                                 std::adjacent_find(start, start + count, std::greater_equal<>()) == start + count),
                  "memcompile: starts must be steps from -1 to ", until, ", ascending and each once");
  const Rates rates(entries.const_data_ptr<double>(), entries.size(0));
  Tensor decays = torch::stable::new_empty(entries, {count, 3}, ScalarType::Double);
  double* decay = decays.mutable_data_ptr<double>();
  const int64_t last_entry = rates.entry_of(until);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t after = std::max<int64_t>(start[i], 0), entry = rates.entry_of(after);
    for (const auto factor : {Rates::kDecay, Rates::kBeta1, Rates::kBeta2}) {
      const bool of_zero = start[i] < 0 && factor != Rates::kDecay;  // moments that row_adam need not read
      *decay++ = of_zero ? 1 : std::exp(rates.log_product(factor, after, entry, until, last_entry));
    }
  }
  const int64_t* const first = std::find_if(start, start + count, [](int64_t step) { return step >= 0; });
  const int64_t* const last = std::find(first, start + count, until);
  SkippedSteps all(rates, first, last - first, until, terms);
  parallel(all.steps(), 64, [&](int64_t begin, int64_t end) { all.make_steps(begin, end); });
  std::vector<std::vector<double>> made(last - first);  // the panels of each
  parallel(last - first, 8 * terms, [&](int64_t begin, int64_t end) {
    SkippedSteps::Maker maker(all);
    for (int64_t i = begin; i < end; ++i) made[i] = moments == 7 ? maker.panels<7>(i) : maker.panels<14>(i);
  });
  size_t most = 0;
  for (const std::vector<double>& some : made) most = std::max(most, some.size());
  Tensor panels = torch::stable::new_empty(entries, {count, int64_t(most) / (1 + moments), 1 + moments}, ScalarType::Double);
  double* out = panels.mutable_data_ptr<double>();
  std::fill_n(out, count * most, 0.0);
  for (size_t i = 0; i < made.size(); ++i) std::copy(made[i].begin(), made[i].end(), out + (first - start + i) * most);
  return {decays, panels};
}

}  // namespace
}  // namespace memcompile
