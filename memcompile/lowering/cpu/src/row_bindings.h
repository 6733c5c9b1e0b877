// The operators that update rows of tables in place: what they are given is checked here, the loops are in row_updates.h.
#pragma once

#include <optional>
#include <vector>

#include "kernels/row_updates.h"
#include "tensors.h"

namespace memcompile {
namespace {

using Optional = std::optional<Tensor>;

bool is_table(const Tensor& table, const Tensor& like) {
  return table.dim() == 2 && has_shape(table, {like.size(0), like.size(1)}) && table.is_contiguous();
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

}  // namespace
}  // namespace memcompile
