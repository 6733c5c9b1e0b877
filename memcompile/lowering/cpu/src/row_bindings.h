// The operators that update rows of tables in place, that read rows which have missed steps, and what these missed: what
// they are given is checked here, the loops are in row_updates.h, stale_rows.h and skipped_steps.h.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "kernels/row_updates.h"
#include "kernels/skipped_steps.h"
#include "kernels/stale_rows.h"
#include "tensors.h"

namespace memcompile {
namespace {

using Optional = std::optional<Tensor>;

bool is_table(const Tensor& table, const Tensor& like) {
  return table.dim() == 2 && like.dim() == 2 && has_shape(table, {like.size(0), like.size(1)}) && table.is_contiguous();
}

Optional contiguous(const Optional& tensor) {
  return tensor ? Optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// f(Value{}) for the type of the table.
template <class F>
void with_value_type(const Tensor& table, const F& f) {
  with_row_type(table, [&]<class Value>(Value value) {
    if constexpr (!std::is_same_v<Value, Half>) f(value);
  });
}

// f(State{}) for the type of the moments of a table of `Value`: that of their sums, or bf16 beside fp32.
template <class Value, class F>
void with_state_type(const Tensor& state, const F& f) {
  constexpr bool is_double = std::is_same_v<Value, double>;
  if (state.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float)) return f(Sum<Value>{});
  if constexpr (!is_double) {
    if (state.scalar_type() == ScalarType::BFloat16) return f(BFloat16{});
  }
  STD_TORCH_CHECK(false, "memcompile: exp_avg must have the dtype of the table's sums, or bfloat16 beside float32");
}

// The rows that an update is given, and their gradients, if any: [count, dim].
template <class Value>
struct UpdatedRows {
  Value* x;
  BFloat16* rounded;
  const Sum<Value>* grad;
  const int64_t* rows;
  int64_t count, dim;
  uint32_t seed;

  // Where the i-th row begins in its tables.
  int64_t at(int64_t i) const { return rows[i] * dim; }
  uint32_t key(int64_t i, RowTable table) const { return noise_key(rows[i], seed, table); }
  ValueRow<Value> operator[](int64_t i) const {
    return {x + at(i), rounded ? rounded + at(i) : nullptr, grad ? grad + i * dim : nullptr, key(i, kParam)};
  }
};

// What every update begins with, checked: f(rows) for the type of what is updated, the master where there is one.
template <class F>
void with_updated_rows(const Tensor& param, const Optional& master, const Tensor& rows_given, const Optional& grad_given,
                       int64_t seed, const F& f) {
  const ScalarType type = param.scalar_type();
  STD_TORCH_CHECK(is_table(param, param) && is_floating(param) && type != ScalarType::Half,
                  "memcompile: param must be contiguous [slots, dim] and float32, float64 or bfloat16");
  STD_TORCH_CHECK(!master || (is_table(*master, param) && master->scalar_type() == ScalarType::Float &&
                              type == ScalarType::BFloat16),
                  "memcompile: master must be float32 as param, which is then bfloat16");
  const int64_t count = rows_given.numel(), dim = param.size(1);
  STD_TORCH_CHECK(is(rows_given, ScalarType::Long, {count}), "memcompile: rows must be int64 [n]");
  STD_TORCH_CHECK(!grad_given || is(*grad_given, sum_type(param), {count, dim}),
                  "memcompile: grad must be [n, dim] in the dtype of the sums of param");
  const Tensor rows = torch::stable::contiguous(rows_given), table = master.value_or(param);
  const Optional grad = contiguous(grad_given);
  check_range("row", rows.const_data_ptr<int64_t>(), count, param.size(0));
  with_value_type(table, [&]<class Value>(Value) {
    f(UpdatedRows<Value>{table.mutable_data_ptr<Value>(), master ? param.mutable_data_ptr<BFloat16>() : nullptr,
                         grad ? grad->const_data_ptr<Sum<Value>>() : nullptr, rows.const_data_ptr<int64_t>(), count, dim,
                         uint32_t(seed)});
  });
}

// The entries that `missed_steps` numbers, of `decays` [entries, 3] and `panels` [entries, panels, 1 + moments]; `room` gets
// the panels in the type of sums.
template <class S>
std::vector<MissedSteps<S>> missed_entries(const Tensor& missed_steps, const Tensor& decays_given, const Tensor& panels_given,
                                           std::vector<S>& room) {
  constexpr int64_t size = 1 + MissedSteps<S>::kMoments;
  STD_TORCH_CHECK(is(decays_given, ScalarType::Double, {kAny, 3}),
                  "memcompile: decays must be float64 [entries, 3]");
  std::vector<MissedSteps<S>> out(decays_given.size(0));
  STD_TORCH_CHECK(is(panels_given, ScalarType::Double, {int64_t(out.size()), kAny, size}),
                  "memcompile: panels must be float64 [entries, panels, ", size, "]");
  check_range("missed_steps: entry", missed_steps.const_data_ptr<int64_t>(), missed_steps.numel(), int64_t(out.size()));
  const Tensor decays = torch::stable::contiguous(decays_given), panels = torch::stable::contiguous(panels_given);
  room.assign(panels.const_data_ptr<double>(), panels.const_data_ptr<double>() + panels.numel());
  for (size_t i = 0; i < out.size(); ++i) {
    const double* decay = decays.const_data_ptr<double>() + 3 * i;
    const S* first = room.data() + i * panels.size(1) * size;
    int64_t count = panels.size(1);  // those at the end have no moments: other entries have more panels
    while (count > 0 && std::all_of(first + (count - 1) * size + 1, first + count * size, [](S m) { return m == 0; })) --count;
    out[i] = {{S(decay[0]), S(decay[1]), S(decay[2])}, first, count};
  }
  return out;
}

void row_adam(const Tensor& param, Optional master, const Tensor& rows_given, Optional grad, int64_t seed,
              const Tensor& exp_avg, const Tensor& exp_avg_sq, Optional missed_given, Optional decays, Optional panels,
              const Tensor& numbers) {
  STD_TORCH_CHECK(is_table(exp_avg, param), "memcompile: exp_avg must be contiguous and of the shape of param");
  STD_TORCH_CHECK(is_table(exp_avg_sq, param) && exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
                  "memcompile: exp_avg_sq must be as exp_avg");
  STD_TORCH_CHECK(is(numbers, ScalarType::Double, {6}) && numbers.is_contiguous(), "memcompile: numbers must be float64 [6]");
  const bool late = missed_given.has_value();
  STD_TORCH_CHECK(late == decays.has_value() && late == panels.has_value(),
                  "memcompile: missed_steps, decays and panels must be there together");
  const Optional missed_steps = contiguous(missed_given);
  with_updated_rows(param, master, rows_given, grad, seed, [&]<class Value>(const UpdatedRows<Value>& rows) {
    using S = Sum<Value>;
    STD_TORCH_CHECK(!late || is(*missed_steps, ScalarType::Long, {rows.count}),
                    "memcompile: missed_steps must be int64 as rows");
    std::vector<S> room;
    std::vector<MissedSteps<S>> entries;
    if (late) entries = missed_entries<S>(*missed_steps, *decays, *panels, room);
    const int64_t* entry = late ? missed_steps->const_data_ptr<int64_t>() : nullptr;
    with_state_type<Value>(exp_avg, [&]<class State>(State) {
      const AdamUpdate<Value, State> update(numbers.const_data_ptr<double>());
      State* m = exp_avg.mutable_data_ptr<State>();
      State* v = exp_avg_sq.mutable_data_ptr<State>();
      parallel(rows.count, 4 * rows.dim, [&](int64_t begin, int64_t end) {
        const auto decays_alone = [&](int64_t i) { return late && !rows.grad && entries[entry[i]].is_decay_alone(); };
        for (int64_t i = begin; i < end; ++i) {
          if (decays_alone(i)) {
            update_sgd(rows[i], rows.dim, entries[entry[i]].decay[0], S(0));
            continue;
          }
          // What comes next is fetched ahead: of a row that only decays, nothing but the value is read.
          const int64_t after = std::min(i + 1, end - 1), at = rows.at(i), next = rows.at(after);
          const int64_t next_moments = decays_alone(after) ? at : next;
          update.run({rows[i], m + at, v + at, rows.key(i, kExpAvg), rows.key(i, kExpAvgSq), late ? &entries[entry[i]] : nullptr,
                      rows.x + next, m + next_moments, v + next_moments}, rows.dim);
        }
      });
    });
  });
}

void row_adagrad(const Tensor& param, Optional master, const Tensor& rows_given, const Tensor& grad, int64_t seed,
                 const Tensor& squares, double lr, double eps, double weight_decay, bool decoupled) {
  STD_TORCH_CHECK(param.dim() == 2 && is(squares, sum_type(param), {param.size(0)}) && squares.is_contiguous(),
                  "memcompile: squares must be contiguous [slots] in the dtype of the sums of param");
  const double added = decoupled ? 0 : weight_decay, kept = decoupled ? 1 - lr * weight_decay : 1;
  with_updated_rows(param, master, rows_given, grad, seed, [&]<class Value>(const UpdatedRows<Value>& rows) {
    using S = Sum<Value>;
    S* sums = squares.mutable_data_ptr<S>();
    parallel(rows.count, 2 * rows.dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        update_adagrad(rows[i], rows.dim, sums + rows.rows[i], S(lr), S(eps), S(added), S(kept));
      }
    });
  });
}

void row_sgd(const Tensor& param, Optional master, const Tensor& rows_given, Optional grad, int64_t seed,
             Optional decays_given, double rate) {
  STD_TORCH_CHECK(!decays_given || is(*decays_given, ScalarType::Double, {rows_given.numel()}),
                  "memcompile: decays must be float64 as rows");
  const Optional decays = contiguous(decays_given);
  with_updated_rows(param, master, rows_given, grad, seed, [&]<class Value>(const UpdatedRows<Value>& rows) {
    using S = Sum<Value>;
    const double* decay = decays ? decays->const_data_ptr<double>() : nullptr;
    parallel(rows.count, rows.dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) update_sgd(rows[i], rows.dim, decay ? S(decay[i]) : S(1), S(rate));
    });
  });
}

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
