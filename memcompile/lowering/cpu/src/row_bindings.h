// The operators that update rows of tables in place: what they are given is checked here, the loops are in row_updates.h.
#pragma once

#include <optional>
#include <vector>

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

// What every update begins with, checked.
struct RowUpdate {
  Tensor table, rows;                   // what is updated, the master where there is one; int64 [n]
  std::optional<Tensor> rounded, grad;  // the parameter of a master, its nearest bf16; [n, dim] in the type of sums
  int64_t count, dim;
  uint32_t seed;

  RowUpdate(const Tensor& param, const std::optional<Tensor>& master, const Tensor& rows_given,
            const std::optional<Tensor>& grad_given, int64_t seed_given)
      : table(master ? *master : param), rows(torch::stable::contiguous(rows_given)), count(rows_given.numel()),
        dim(param.dim() == 2 ? param.size(1) : 0), seed(uint32_t(seed_given)) {
    const ScalarType type = param.scalar_type();
    STD_TORCH_CHECK(is_table(param, param) && is_floating(param) && type != ScalarType::Half,
                    "memcompile: param must be contiguous [slots, dim] and float32, float64 or bfloat16");
    if (master) {
      STD_TORCH_CHECK(is_table(table, param) && table.scalar_type() == ScalarType::Float && type == ScalarType::BFloat16,
                      "memcompile: master must be float32 as param, which is then bfloat16");
      rounded = param;
    }
    STD_TORCH_CHECK(is_vector(rows, count, ScalarType::Long), "memcompile: rows must be int64 [n]");
    if (grad_given) {
      STD_TORCH_CHECK(grad_given->dim() == 2 && grad_given->size(0) == count && grad_given->size(1) == dim &&
                          grad_given->scalar_type() == sum_type(param),
                      "memcompile: grad must be [n, dim] in the dtype of the sums of param");
      grad = torch::stable::contiguous(*grad_given);
    }
    check_range(rows, param.size(0), "row");
  }
};

// The same as the loops read it.
template <class Value>
struct UpdatedRows {
  Value* x;
  BFloat16* rounded;
  const Sum<Value>* grad;
  const int64_t* rows;
  int64_t dim;
  uint32_t seed;

  explicit UpdatedRows(const RowUpdate& given)
      : x(mutable_data<Value>(given.table)), rounded(given.rounded ? mutable_data<BFloat16>(*given.rounded) : nullptr),
        grad(given.grad ? data<Sum<Value>>(*given.grad) : nullptr), rows(data<int64_t>(given.rows)), dim(given.dim), seed(given.seed) {}

  // Where the i-th row begins in its tables.
  int64_t at(int64_t i) const { return rows[i] * dim; }
  uint32_t key(int64_t i, RowTable table) const { return noise_key(rows[i], seed, table); }
  ValueRow<Value> operator[](int64_t i) const {
    return {x + at(i), rounded ? rounded + at(i) : nullptr, grad ? grad + i * dim : nullptr, key(i, kParam)};
  }
};

// f(Value{}) for the type of the table.
template <class F>
void with_value_type(const Tensor& table, const F& f) {
  with_row_type(table, [&](auto value) {
    if constexpr (!std::is_same_v<decltype(value), Half>) f(value);
  });
}

// f(State{}) for the type of the moments of a table of `Value`: that of their sums, or bf16 beside fp32.
template <class Value, class F>
void with_state_type(const Tensor& state, const F& f) {
  if (state.scalar_type() == sum_type(state) && std::is_same_v<Sum<Value>, double> == (state.scalar_type() == ScalarType::Double)) {
    return f(Sum<Value>{});
  }
  if constexpr (std::is_same_v<Sum<Value>, float>) {
    if (state.scalar_type() == ScalarType::BFloat16) return f(BFloat16{});
  }
  STD_TORCH_CHECK(false, "memcompile: exp_avg must have the dtype of the table's sums, or bfloat16 beside float32");
}

template <class S>
void check_missed_steps(const Tensor& decays, const Tensor& panels) {
  STD_TORCH_CHECK(decays.dim() == 2 && decays.size(1) == 3 && decays.scalar_type() == ScalarType::Double,
                  "memcompile: decays must be float64 [entries, 3]");
  STD_TORCH_CHECK(panels.dim() == 3 && panels.size(0) == decays.size(0) && panels.size(2) == 1 + MissedSteps<S>::kMoments &&
                      panels.scalar_type() == ScalarType::Double,
                  "memcompile: panels must be float64 [entries, panels, ", 1 + MissedSteps<S>::kMoments, "]");
}

// The entries of `decays` [entries, 3] and `panels` [entries, panels, 1 + moments]; `room` gets the panels in the type of sums.
template <class S>
std::vector<MissedSteps<S>> missed_steps_of(const Tensor& decays, const Tensor& panels, std::vector<S>& room) {
  constexpr int64_t size = 1 + MissedSteps<S>::kMoments;
  const int64_t number = decays.size(0), panels_each = panels.size(1);
  const double* from = data<double>(panels);
  room.assign(from, from + panels.numel());
  std::vector<MissedSteps<S>> out(number);
  for (int64_t i = 0; i < number; ++i) {
    const double* decay = data<double>(decays) + 3 * i;
    const double* first = from + i * panels_each * size;
    int64_t count = panels_each;  // those at the end have no moments: other entries have more panels
    while (count > 0 && std::all_of(first + (count - 1) * size + 1, first + count * size, [](double m) { return m == 0; })) --count;
    out[i] = {{S(decay[0]), S(decay[1]), S(decay[2])}, room.data() + i * panels_each * size, count};
  }
  return out;
}

void row_adam(const Tensor& param, std::optional<Tensor> master, const Tensor& rows_given, std::optional<Tensor> grad_given,
              int64_t seed, const Tensor& exp_avg, const Tensor& exp_avg_sq, std::optional<Tensor> missed_given,
              std::optional<Tensor> decays_given, std::optional<Tensor> panels_given, const Tensor& numbers) {
  const RowUpdate given(param, master, rows_given, grad_given, seed);
  STD_TORCH_CHECK(is_table(exp_avg, param), "memcompile: exp_avg must be contiguous and of the shape of param");
  STD_TORCH_CHECK(is_table(exp_avg_sq, param) && exp_avg_sq.scalar_type() == exp_avg.scalar_type(),
                  "memcompile: exp_avg_sq must be as exp_avg");
  STD_TORCH_CHECK(is_vector(numbers, 6, ScalarType::Double) && numbers.is_contiguous(), "memcompile: numbers must be float64 [6]");
  const bool late = missed_given.has_value();
  STD_TORCH_CHECK(late == decays_given.has_value() && late == panels_given.has_value(),
                  "memcompile: missed_steps, decays and panels must be there together");
  with_value_type(given.table, [&](auto value) {
    using Value = decltype(value);
    using S = Sum<Value>;
    std::vector<S> room;
    std::vector<MissedSteps<S>> entries;
    Tensor numbers_of_entries = given.rows;
    if (late) {
      STD_TORCH_CHECK(is_vector(*missed_given, given.count, ScalarType::Long), "memcompile: missed_steps must be int64 as rows");
      check_missed_steps<S>(*decays_given, *panels_given);
      numbers_of_entries = torch::stable::contiguous(*missed_given);
      check_range(numbers_of_entries, decays_given->size(0), "missed_steps");
      entries = missed_steps_of<S>(torch::stable::contiguous(*decays_given), torch::stable::contiguous(*panels_given), room);
    }
    with_state_type<Value>(exp_avg, [&](auto state) {
      using State = decltype(state);
      const AdamUpdate<Value, State> update{AdamNumbers<S>(data<double>(numbers))};
      const UpdatedRows<Value> rows(given);
      State* m = mutable_data<State>(exp_avg);
      State* v = mutable_data<State>(exp_avg_sq);
      const int64_t* entry = data<int64_t>(numbers_of_entries);
      parallel(given.count, 4 * given.dim, [&](int64_t begin, int64_t end) {
        const auto decays_alone = [&](int64_t i) { return late && !rows.grad && entries[entry[i]].is_decay_alone(); };
        for (int64_t i = begin; i < end; ++i) {
          if (decays_alone(i)) {
            update_sgd(rows[i], given.dim, entries[entry[i]].decay[0], S(0));
            continue;
          }
          // What comes next is fetched ahead: of a row that only decays, nothing but the value is read.
          const int64_t after = std::min(i + 1, end - 1), at = rows.at(i), next = rows.at(after);
          const int64_t next_moments = decays_alone(after) ? at : next;
          const uint32_t keys[2] = {rows.key(i, kExpAvg), rows.key(i, kExpAvgSq)};
          update.run(rows[i], m + at, v + at, late ? &entries[entry[i]] : nullptr, given.dim, keys, rows.x + next,
                     m + next_moments, v + next_moments);
        }
      });
    });
  });
}

void row_adagrad(const Tensor& param, std::optional<Tensor> master, const Tensor& rows_given, const Tensor& grad_given,
                 int64_t seed, const Tensor& squares, double lr, double eps, double weight_decay, bool decoupled) {
  const RowUpdate given(param, master, rows_given, grad_given, seed);
  STD_TORCH_CHECK(is_vector(squares, param.size(0), sum_type(param)) && squares.is_contiguous(),
                  "memcompile: squares must be contiguous [slots] in the dtype of the sums of param");
  const double added = decoupled ? 0 : weight_decay, kept = decoupled ? 1 - lr * weight_decay : 1;
  with_value_type(given.table, [&](auto value) {
    using Value = decltype(value);
    using S = Sum<Value>;
    const UpdatedRows<Value> rows(given);
    S* sums = mutable_data<S>(squares);
    parallel(given.count, 2 * given.dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        update_adagrad(rows[i], given.dim, sums + rows.rows[i], S(lr), S(eps), S(added), S(kept));
      }
    });
  });
}

void row_sgd(const Tensor& param, std::optional<Tensor> master, const Tensor& rows_given, std::optional<Tensor> grad_given,
             int64_t seed, std::optional<Tensor> decays_given, double rate) {
  const RowUpdate given(param, master, rows_given, grad_given, seed);
  if (decays_given) {
    STD_TORCH_CHECK(is_vector(*decays_given, given.count, ScalarType::Double), "memcompile: decays must be float64 as rows");
  }
  const Tensor decays = decays_given ? torch::stable::contiguous(*decays_given) : given.table;
  with_value_type(given.table, [&](auto value) {
    using Value = decltype(value);
    using S = Sum<Value>;
    const UpdatedRows<Value> rows(given);
    const double* decay = decays_given ? data<double>(decays) : nullptr;
    parallel(given.count, given.dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) update_sgd(rows[i], given.dim, decay ? S(decay[i]) : S(1), S(rate));
    });
  });
}

}  // namespace
}  // namespace memcompile
