// The operators that update rows of tables in place: what they are given is checked here, the loops are in row_updates.h.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/by_slot.h"
#include "kernels/row_updates.h"
#include "tensors.h"

namespace memcompile {
namespace {

bool is_table(const Tensor& table, const Tensor& like) {
  return table.dim() == 2 && table.size(0) == like.size(0) && table.size(1) == like.size(1) && table.is_contiguous();
}

bool is_vector(const Tensor& tensor, int64_t size, ScalarType type) {
  return tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == type;
}

void check_rows(const Tensor& values, const std::optional<Tensor>& rounded, const Tensor& rows) {
  const ScalarType type = values.scalar_type();
  STD_TORCH_CHECK(is_table(values, values) && is_floating(values) && type != ScalarType::Half,
                  "memcompile: values must be contiguous [slots, dim] and float32, float64 or bfloat16");
  if (rounded) {
    STD_TORCH_CHECK(is_table(*rounded, values) && rounded->scalar_type() == ScalarType::BFloat16 && type == ScalarType::Float,
                    "memcompile: rounded must be bfloat16 as values, which are then float32");
  }
  STD_TORCH_CHECK(is_vector(rows, rows.numel(), ScalarType::Long), "memcompile: rows must be int64 [n]");
}

void check_range(const Tensor& numbers, int64_t end, const char* name) {
  const int64_t* first = data<int64_t>(numbers);
  int64_t lowest = 0, highest = 0;
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    lowest = std::min(lowest, first[i]);
    highest = std::max(highest, first[i]);
  }
  STD_TORCH_CHECK(numbers.numel() == 0 || (lowest >= 0 && highest < end), "memcompile: ", name, " ",
                  lowest < 0 ? lowest : highest, " is out of range: there are ", end);
}

// The gradients of an update's rows: none; [n, dim] in the type of the values' sums; or in factors, which are then
// [tokens, dim] with the weights [tokens, hits] of hits, of which row i has those from ends[i] to ends[i + 1].
class Gradients {
 public:
  Gradients(const Tensor& values, const Tensor& rows, const std::optional<Tensor>& grad, const std::optional<Tensor>& ends,
            const std::optional<Tensor>& hits, const std::optional<Tensor>& weights) {
    const int64_t count = rows.size(0);
    STD_TORCH_CHECK(ends.has_value() == hits.has_value() && ends.has_value() == weights.has_value() && (grad || !ends),
                    "memcompile: ends, hits and weights must be there together, and then grad");
    if (!grad) return;
    STD_TORCH_CHECK(grad->dim() == 2 && grad->size(1) == values.size(1) && is_floating(*grad) && sum_type(*grad) == sum_type(values),
                    "memcompile: grad must have the columns of values, and sums of their dtype");
    grad_ = torch::stable::contiguous(*grad);
    if (!ends) {
      STD_TORCH_CHECK(grad->size(0) == count && grad->scalar_type() == sum_type(values),
                      "memcompile: grad must be [n, dim] in the dtype of the values' sums");
      return;
    }
    STD_TORCH_CHECK(is_vector(*ends, count + 1, ScalarType::Long), "memcompile: ends must be int64 [n + 1]");
    STD_TORCH_CHECK(is_vector(*hits, hits->numel(), ScalarType::Long), "memcompile: hits must be int64 [number of hits]");
    STD_TORCH_CHECK(weights->dim() == 2 && weights->size(0) == grad->size(0) && is_floating(*weights),
                    "memcompile: weights must be [tokens, hits], and grad [tokens, dim]");
    ends_ = torch::stable::contiguous(*ends);
    hits_ = torch::stable::contiguous(*hits);
    weights_ = as(*weights, sum_type(*grad));
    const int64_t* end = data<int64_t>(*ends_);
    STD_TORCH_CHECK(end[0] >= 0 && std::is_sorted(end, end + count + 1) && end[count] <= hits->numel(),
                    "memcompile: ends must rise from 0 to the number of hits");
    check_range(*hits_, weights->numel(), "hit");
  }

  // What tells one thread, of each row from begin to end in turn, its gradient: in the caller's memory or its own.
  template <class S>
  std::function<const S*(int64_t)> of_rows(int64_t begin, int64_t end) const {
    if (!grad_) return [](int64_t) -> const S* { return nullptr; };
    if (!ends_) return [first = data<S>(*grad_), dim = grad_->size(1)](int64_t i) { return first + i * dim; };
    std::function<const S*(int64_t)> of_row;
    with_row_type(*grad_, [&](auto row) {
      using Row = decltype(row);
      if constexpr (std::is_same_v<Sum<Row>, S>) of_row = sums_of<Row>(begin, end);
    });
    return of_row;
  }

 private:
  // They are rounded to the type of the gradient, as row_sums has them.
  template <class Row>
  std::function<const Sum<Row>*(int64_t)> sums_of(int64_t begin, int64_t end) const {
    const int64_t dim = grad_->size(1), *ends = data<int64_t>(*ends_);
    const WeightedHits<Row> all{data<int64_t>(*hits_), data<Sum<Row>>(*weights_), weights_->size(1), {data<Row>(*grad_), dim, dim}};
    struct Room {
      HitSums<Row> sums;
      std::vector<Row> row;
      std::vector<Sum<Row>> sum;
    };
    const auto room = std::make_shared<Room>(Room{HitSums<Row>(all, ends[begin], ends[end]), std::vector<Row>(dim), {}});
    if constexpr (!std::is_same_v<Row, Sum<Row>>) room->sum.resize(dim);
    return [room, ends](int64_t i) -> const Sum<Row>* {
      room->sums.sum(ends[i], ends[i + 1], room->row.data());
      if constexpr (std::is_same_v<Row, Sum<Row>>) return room->row.data();
      else {
        std::transform(room->row.begin(), room->row.end(), room->sum.begin(), [](Row x) { return to_sum(x); });
        return room->sum.data();
      }
    };
  }

  std::optional<Tensor> grad_, ends_, hits_, weights_;
};

// f(Value{}) for the type of the values.
template <class F>
void with_value_type(const Tensor& values, const F& f) {
  with_row_type(values, [&](auto value) {
    if constexpr (!std::is_same_v<decltype(value), Half>) f(value);
  });
}

// f(State{}) for the type of the moments of these values: that of their sums, or bf16 beside fp32.
template <class Value, class F>
void with_state_type(const Tensor& state, const F& f) {
  if (state.scalar_type() == sum_type(state) && std::is_same_v<Sum<Value>, double> == (state.scalar_type() == ScalarType::Double)) {
    return f(Sum<Value>{});
  }
  if constexpr (std::is_same_v<Sum<Value>, float>) {
    if (state.scalar_type() == ScalarType::BFloat16) return f(BFloat16{});
  }
  STD_TORCH_CHECK(false, "memcompile: exp_avg must have the dtype of the values' sums, or bfloat16 beside float32");
}

template <class Value>
ValueRow<Value> row_of(Value* values, BFloat16* rounded, const Sum<Value>* grad, int64_t dim, int64_t row, uint32_t seed) {
  return {values + row * dim, rounded ? rounded + row * dim : nullptr, grad, noise_key(row, seed, kValues)};
}

template <class S>
void check_plans(const Tensor& decays, const Tensor& panels) {
  STD_TORCH_CHECK(decays.dim() == 2 && decays.size(1) == 3 && decays.scalar_type() == ScalarType::Double,
                  "memcompile: decays must be float64 [plans, 3]");
  STD_TORCH_CHECK(panels.dim() == 3 && panels.size(0) == decays.size(0) && panels.size(2) == 1 + Plan<S>::kMoments &&
                      panels.scalar_type() == ScalarType::Double,
                  "memcompile: panels must be float64 [plans, panels, ", 1 + Plan<S>::kMoments, "]");
}

// The plans of `decays` [plans, 3] and `panels` [plans, panels, 1 + moments]; `room` gets the panels in the type of sums.
template <class S>
std::vector<Plan<S>> plans_of(const Tensor& decays, const Tensor& panels, std::vector<S>& room) {
  constexpr int64_t size = 1 + Plan<S>::kMoments;
  const int64_t number = decays.size(0), panels_each = panels.size(1);
  const double* from = data<double>(panels);
  room.assign(from, from + panels.numel());
  std::vector<Plan<S>> plans(number);
  for (int64_t i = 0; i < number; ++i) {
    const double* decay = data<double>(decays) + 3 * i;
    const double* first = from + i * panels_each * size;
    int64_t count = panels_each;  // those at the end have no moments: other plans have more panels
    while (count > 0 && std::all_of(first + (count - 1) * size + 1, first + count * size, [](double m) { return m == 0; })) --count;
    plans[i] = {{S(decay[0]), S(decay[1]), S(decay[2])}, room.data() + i * panels_each * size, count};
  }
  return plans;
}

void row_adam(const Tensor& values, std::optional<Tensor> rounded, const Tensor& exp_avg, const Tensor& exp_avg_sq,
              const Tensor& rows_given, std::optional<Tensor> grad_given, std::optional<Tensor> plan_of_row,
              std::optional<Tensor> decays_given, std::optional<Tensor> panels_given, const Tensor& numbers, int64_t seed,
              std::optional<Tensor> ends, std::optional<Tensor> hits, std::optional<Tensor> weights) {
  check_rows(values, rounded, rows_given);
  const Gradients gradients(values, rows_given, grad_given, ends, hits, weights);
  STD_TORCH_CHECK(is_table(exp_avg, values), "memcompile: exp_avg must be contiguous and of the shape of values");
  STD_TORCH_CHECK(is_table(exp_avg_sq, values) && exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
                  "memcompile: exp_avg_sq must be as exp_avg");
  STD_TORCH_CHECK(is_vector(numbers, 6, ScalarType::Double) && numbers.is_contiguous(), "memcompile: numbers must be float64 [6]");
  const bool late = plan_of_row.has_value();
  STD_TORCH_CHECK(late == decays_given.has_value() && late == panels_given.has_value(),
                  "memcompile: plan_of_row, decays and panels must be there together");
  const int64_t count = rows_given.size(0), dim = values.size(1);
  const Tensor rows = torch::stable::contiguous(rows_given);
  check_range(rows, values.size(0), "row");
  with_value_type(values, [&](auto value) {
    using Value = decltype(value);
    using S = Sum<Value>;
    std::vector<S> room;
    std::vector<Plan<S>> plans;
    Tensor plan_numbers = rows;
    if (late) {
      STD_TORCH_CHECK(is_vector(*plan_of_row, count, ScalarType::Long), "memcompile: plan_of_row must be int64 as rows");
      check_plans<S>(*decays_given, *panels_given);
      plan_numbers = torch::stable::contiguous(*plan_of_row);
      check_range(plan_numbers, decays_given->size(0), "plan_of_row");
      plans = plans_of<S>(torch::stable::contiguous(*decays_given), torch::stable::contiguous(*panels_given), room);
    }
    with_state_type<Value>(exp_avg, [&](auto state) {
      using State = decltype(state);
      const AdamUpdate<Value, State> update{AdamNumbers<S>(data<double>(numbers))};
      Value* x = mutable_data<Value>(values);
      BFloat16* copy = rounded ? mutable_data<BFloat16>(*rounded) : nullptr;
      State* m = mutable_data<State>(exp_avg);
      State* v = mutable_data<State>(exp_avg_sq);
      const int64_t* row = data<int64_t>(rows);
      const int64_t* plan = data<int64_t>(plan_numbers);
      parallel(count, 4 * dim, [&](int64_t begin, int64_t end) {
        const auto grad = gradients.of_rows<S>(begin, end);
        const auto decays_alone = [&](int64_t i) { return late && !grad_given && plans[plan[i]].is_decay_alone(); };
        for (int64_t i = begin; i < end; ++i) {
          const ValueRow<Value> to = row_of(x, copy, grad(i), dim, row[i], uint32_t(seed));
          if (decays_alone(i)) {
            update_sgd(to, dim, plans[plan[i]].decay[0], S(0));
            continue;
          }
          // What comes next is fetched ahead: of a row that only decays, nothing but the value is read.
          const int64_t after = std::min(i + 1, end - 1), at = row[i] * dim, next = row[after] * dim;
          const int64_t next_moments = decays_alone(after) ? at : next;
          const uint32_t keys[2] = {noise_key(row[i], uint32_t(seed), kExpAvg), noise_key(row[i], uint32_t(seed), kExpAvgSq)};
          update.run(to, m + at, v + at, late ? &plans[plan[i]] : nullptr, dim, keys, x + next, m + next_moments, v + next_moments);
        }
      });
    });
  });
}

void row_adagrad(const Tensor& values, std::optional<Tensor> rounded, const Tensor& squares, const Tensor& rows_given,
                 const Tensor& grad_given, double lr, double eps, double weight_decay, bool decoupled, int64_t seed,
                 std::optional<Tensor> ends, std::optional<Tensor> hits, std::optional<Tensor> weights) {
  check_rows(values, rounded, rows_given);
  const Gradients gradients(values, rows_given, grad_given, ends, hits, weights);
  STD_TORCH_CHECK(is_vector(squares, values.size(0), sum_type(values)) && squares.is_contiguous(),
                  "memcompile: squares must be contiguous [slots] in the dtype of the values' sums");
  const Tensor rows = torch::stable::contiguous(rows_given);
  check_range(rows, values.size(0), "row");
  const int64_t dim = values.size(1);
  const double added = decoupled ? 0 : weight_decay, kept = decoupled ? 1 - lr * weight_decay : 1;
  with_value_type(values, [&](auto value) {
    using Value = decltype(value);
    using S = Sum<Value>;
    Value* x = mutable_data<Value>(values);
    BFloat16* copy = rounded ? mutable_data<BFloat16>(*rounded) : nullptr;
    S* sum = mutable_data<S>(squares);
    const int64_t* row = data<int64_t>(rows);
    parallel(rows.size(0), 2 * dim, [&](int64_t begin, int64_t end) {
      const auto grad = gradients.of_rows<S>(begin, end);
      for (int64_t i = begin; i < end; ++i) {
        const ValueRow<Value> to = row_of(x, copy, grad(i), dim, row[i], uint32_t(seed));
        update_adagrad(to, dim, sum + row[i], S(lr), S(eps), S(added), S(kept));
      }
    });
  });
}

void row_sgd(const Tensor& values, std::optional<Tensor> rounded, const Tensor& rows_given, std::optional<Tensor> grad_given,
             std::optional<Tensor> decays_given, double rate, int64_t seed, std::optional<Tensor> ends,
             std::optional<Tensor> hits, std::optional<Tensor> weights) {
  check_rows(values, rounded, rows_given);
  const Gradients gradients(values, rows_given, grad_given, ends, hits, weights);
  if (decays_given) {
    STD_TORCH_CHECK(is_vector(*decays_given, rows_given.size(0), ScalarType::Double), "memcompile: decays must be float64 as rows");
  }
  const Tensor rows = torch::stable::contiguous(rows_given);
  const Tensor decays = decays_given ? torch::stable::contiguous(*decays_given) : values;
  check_range(rows, values.size(0), "row");
  const int64_t dim = values.size(1);
  with_value_type(values, [&](auto value) {
    using Value = decltype(value);
    using S = Sum<Value>;
    Value* x = mutable_data<Value>(values);
    BFloat16* copy = rounded ? mutable_data<BFloat16>(*rounded) : nullptr;
    const double* decay = decays_given ? data<double>(decays) : nullptr;
    const int64_t* row = data<int64_t>(rows);
    parallel(rows.size(0), dim, [&](int64_t begin, int64_t end) {
      const auto grad = gradients.of_rows<S>(begin, end);
      for (int64_t i = begin; i < end; ++i) {
        update_sgd(row_of(x, copy, grad(i), dim, row[i], uint32_t(seed)), dim, decay ? S(decay[i]) : S(1), S(rate));
      }
    });
  });
}

}  // namespace
}  // namespace memcompile
