// The operators that read rows of a table and sum gradients by row: what they are given is checked here, the loops are in
// rows.h, by_slot.h and prefetch.h; those of pairs are in pair_bindings.h.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "kernels/by_slot.h"
#include "kernels/prefetch.h"
#include "kernels/rows.h"
#include "tensors.h"

namespace memcompile {
namespace {

// A table [num_rows, dim] whose rows may be apart: a table is large, and is not copied for its strides.
Tensor with_whole_rows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2, "memcompile: expected rows [num_rows, dim]");
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// f(table, slots) for the types of the rows and of the slots, which are of a table of `num_slots` rows.
template <class F>
void with_rows_and_slots(const Tensor& rows, const Tensor& slots, int64_t num_slots, const F& f) {
  with_row_type(rows, [&]<class Row>(Row) {
    with_slot_type(slots, [&]<class Slot>(Slot) {
      const Slot* numbers = slots.const_data_ptr<Slot>();
      check_range("slot", numbers, slots.numel(), num_slots);
      f(Table<Row>{rows.const_data_ptr<Row>(), rows.stride(0), rows.size(1)}, numbers);
    });
  });
}

Tensor weighted_gather(const Tensor& values_given, const Tensor& slots_given, const Tensor& weights_given) {
  const Tensor values = with_whole_rows(values_given);
  check_weights(slots_given, weights_given);
  const Tensor slots = torch::stable::contiguous(slots_given), weights = as(weights_given, sum_type(values));
  const int64_t tokens = slots.size(0), hits = slots.size(1), dim = values.size(1);
  Tensor out = torch::stable::new_empty(values, {tokens, dim}, values.scalar_type());
  with_rows_and_slots(values, slots, values.size(0), [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
    const Sum<Row>* w = weights.const_data_ptr<Sum<Row>>();
    Row* y = out.mutable_data_ptr<Row>();
    parallel(tokens, hits * dim, [&](int64_t begin, int64_t end) {
      RowSums<Row> sums(dim);
      for (int64_t t = begin; t < end; ++t) {
        sums.weighted_sum(table, s + t * hits, w + t * hits, hits, (end - t) * hits, y + t * dim);
      }
    });
  });
  return out;
}

Tensor gather_dot(const Tensor& values_given, const Tensor& slots_given, const Tensor& grad_given) {
  check_dot(values_given, slots_given, grad_given);
  const Tensor values = with_whole_rows(values_given);
  const Tensor slots = torch::stable::contiguous(slots_given), grad = torch::stable::contiguous(grad_given);
  const int64_t tokens = slots.size(0), hits = slots.size(1), dim = values.size(1);
  Tensor out = torch::stable::new_empty(values, {tokens, hits}, sum_type(values));
  with_rows_and_slots(values, slots, values.size(0), [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
    const Row* u = grad.const_data_ptr<Row>();
    Sum<Row>* dots = out.mutable_data_ptr<Sum<Row>>();
    parallel(tokens, hits * dim, [&](int64_t begin, int64_t end) {
      std::vector<Sum<Row>> copy(dim);
      for (int64_t t = begin; t < end; ++t) {
        dots_with_rows(table, s + t * hits, hits, (end - t) * hits, u + t * dim, copy.data(), dots + t * hits);
      }
    });
  });
  return out;
}

Tensor prefetch_rows(const Tensor& values, const Tensor& slots_given) {
  STD_TORCH_CHECK(values.dim() == 2 && slots_given.dim() == 2,
                  "memcompile: values must be [num_rows, dim] and slots [tokens, hits]");
  const Tensor slots = torch::stable::contiguous(slots_given);
  const int64_t count = slots.numel(), bytes = values.element_size();
  Tensor out = torch::stable::new_empty(slots, {slots.size(0), slots.size(1)}, slots.scalar_type());
  const MappedRows rows(values.const_data_ptr(), values.stride(0) * bytes, values.size(1) * bytes);
  with_slot_type(slots, [&]<class Slot>(Slot) {
    const Slot* numbers = slots.const_data_ptr<Slot>();
    check_range("slot", numbers, count, values.size(0));
    std::copy(numbers, numbers + count, out.mutable_data_ptr<Slot>());
    if (rows.are_there(numbers, count)) return;
    const std::vector<PageRun> runs = rows.pages_of(numbers, count);
    constexpr int64_t elements = 1 << 10;  // that asking for a run costs as much as
    parallel(int64_t(runs.size()), elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows.ask(runs[i]);
    });
  });
  return out;
}

// What sums of rows are made of: each hit's weight [tokens, hits] and each token's gradient, [tokens, columns].
struct Factor {
  Tensor weights, grad;
};

// f(slots, ends, columns, for_each_run): the slots of the sorted hits, where each slot's end, and the columns of all factors, side by
// side. for_each_run(g) is g(run, sum) for every run of hits on the thread that has its first hit, in order; sum(out) writes the run's.
template <class F>
void with_runs(const Tensor& slots_given, std::vector<Factor> factors, int64_t num_slots, const F& f) {
  const Tensor slots = torch::stable::contiguous(slots_given);
  const ScalarType type = factors[0].grad.scalar_type();
  int64_t columns = 0;
  for (Factor& factor : factors) {
    check_weights(slots, factor.weights);
    STD_TORCH_CHECK(factor.grad.scalar_type() == type, "memcompile: gradients must have one dtype");
    factor = {as(factor.weights, sum_type(factor.grad)), with_whole_rows(factor.grad)};
    STD_TORCH_CHECK(factor.grad.size(0) == slots.size(0), "memcompile: grad must be [tokens, value_dim]");
    columns += factor.grad.size(1);
  }
  with_rows_and_slots(factors[0].grad, slots, num_slots, [&]<class Row, class Slot>(const Table<Row>&, const Slot* s) {
    const SortedHits<Slot> sorted =
        sort_by_slot(s, slots.numel(), num_slots, torch::stable::get_num_threads(),
                     [](int64_t begin, int64_t end, const auto& part) { torch::stable::parallel_for(begin, end, 1, part); });
    const std::vector<int64_t> ends = ends_of_runs(sorted.slots.get(), slots.numel());
    f.template operator()<Row>(sorted.slots.get(), ends, columns, [&](const auto& g) {
      parallel(ends.back(), columns, [&](int64_t begin, int64_t end) {
        const auto runs_end = ends.end() - 1, first = std::lower_bound(ends.begin(), runs_end, begin);
        const auto last = std::lower_bound(first, runs_end, end);
        std::vector<HitSums<Row>> sums;
        for (const auto& [weights, grad] : factors) {
          const Table<Row> rows{grad.template const_data_ptr<Row>(), grad.stride(0), grad.size(1)};
          sums.emplace_back(sorted.hits.get(), weights.template const_data_ptr<Sum<Row>>(), slots.size(1), rows, *first, *last);
        }
        for (auto run = first; run < last; ++run) {
          g(run - ends.begin(), [&](Row* out) {
            for (HitSums<Row>& of_factor : sums) {
              of_factor.sum(run[0], run[1], out);
              out += of_factor.dim();
            }
          });
        }
      });
    });
  });
}

// Rows first..last of out, of which a thread owns those that its hits reach and the unhit ones before each.
template <class Row>
void zero_rows(Row* out, int64_t dim, int64_t first, int64_t last) {
  if (first < last) std::memset(static_cast<void*>(out + first * dim), 0, (last - first) * dim * sizeof(Row));
}

// The sums of all slots, [num_slots, columns].
Tensor scatter(const Tensor& slots, const std::vector<Factor>& factors, int64_t num_slots) {
  Tensor out;
  const Tensor& like = factors[0].grad;
  with_runs(slots, factors, num_slots, [&]<class Row>(const auto* slot_of, const auto& ends, int64_t dim, const auto& for_each_run) {
    out = torch::stable::new_empty(like, {num_slots, dim}, like.scalar_type());
    advise_huge_pages(out);
    Row* rows = out.mutable_data_ptr<Row>();
    const int64_t runs = int64_t(ends.size()) - 1;
    if (runs == 0) zero_rows(rows, dim, 0, num_slots);
    for_each_run([&](int64_t run, const auto& sum) {
      const int64_t slot = slot_of[ends[run]];
      zero_rows(rows, dim, run == 0 ? 0 : int64_t(slot_of[ends[run] - 1]) + 1, slot);
      sum(rows + slot * dim);
      if (run + 1 == runs) zero_rows(rows, dim, slot + 1, num_slots);
    });
  });
  return out;
}

Tensor weighted_scatter(const Tensor& slots, const Tensor& weights, const Tensor& grad, int64_t num_slots) {
  return scatter(slots, {{weights, grad}}, num_slots);
}

std::tuple<Tensor, Tensor> row_sums(const Tensor& slots, const Tensor& weights, const Tensor& grad, int64_t num_slots,
                                    const std::optional<Tensor>& more_weights, const std::optional<Tensor>& more_grad) {
  STD_TORCH_CHECK(more_weights.has_value() == more_grad.has_value(), "memcompile: expected more_weights and more_grad, or neither");
  std::vector<Factor> factors{{weights, grad}};
  if (more_weights) factors.push_back({*more_weights, *more_grad});
  Tensor rows, out;
  with_runs(slots, factors, num_slots, [&]<class Row>(const auto* slot_of, const auto& ends, int64_t dim, const auto& for_each_run) {
    const int64_t runs = int64_t(ends.size()) - 1;
    rows = torch::stable::new_empty(grad, {runs}, ScalarType::Long);
    int64_t* row = rows.mutable_data_ptr<int64_t>();
    for (int64_t run = 0; run < runs; ++run) row[run] = slot_of[ends[run]];
    out = torch::stable::new_empty(grad, {runs, dim}, grad.scalar_type());
    advise_huge_pages(out);
    Row* sums = out.mutable_data_ptr<Row>();
    for_each_run([&](int64_t run, const auto& sum) { sum(sums + run * dim); });
  });
  return {rows, out};
}

}  // namespace
}  // namespace memcompile
