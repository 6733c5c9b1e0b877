// The operators that read rows of a table and sum gradients by row: what they are given is checked here, the loops are in
// rows.h, by_slot.h and prefetch.h.
#pragma once

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

// f(slots, ends, for_each_run): the slots of the sorted hits, and where each slot's end. for_each_run(g) is g(run, sums) for
// every run of hits on the thread that has its first hit, in order; each thread has sums of its own.
template <class F>
void with_runs(const Tensor& slots_given, const Tensor& weights_given, const Tensor& grad_given, int64_t num_slots, const F& f) {
  check_weights(slots_given, weights_given);
  const Tensor slots = torch::stable::contiguous(slots_given), weights = as(weights_given, sum_type(grad_given));
  const Tensor grad = with_whole_rows(grad_given);
  STD_TORCH_CHECK(grad.size(0) == slots.size(0), "memcompile: grad must be [tokens, value_dim]");
  with_rows_and_slots(grad, slots, num_slots, [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
    const SortedHits<Slot> sorted =
        sort_by_slot(s, slots.numel(), num_slots, torch::stable::get_num_threads(),
                     [](int64_t begin, int64_t end, const auto& part) { torch::stable::parallel_for(begin, end, 1, part); });
    const std::vector<int64_t> ends = ends_of_runs(sorted.slots.get(), slots.numel());
    const Sum<Row>* weight = weights.const_data_ptr<Sum<Row>>();
    f.template operator()<Row>(sorted.slots.get(), ends, [&](const auto& g) {
      parallel(ends.back(), table.dim, [&](int64_t begin, int64_t end) {
        const auto runs_end = ends.end() - 1, first = std::lower_bound(ends.begin(), runs_end, begin);
        const auto last = std::lower_bound(first, runs_end, end);
        HitSums<Row> sums(sorted.hits.get(), weight, slots.size(1), table, *first, *last);
        for (auto run = first; run < last; ++run) g(run - ends.begin(), sums);
      });
    });
  });
}

// Rows first..last of out, of which a thread owns those that its hits reach and the unhit ones before each.
template <class Row>
void zero_rows(Row* out, int64_t dim, int64_t first, int64_t last) {
  if (first < last) std::memset(static_cast<void*>(out + first * dim), 0, (last - first) * dim * sizeof(Row));
}

Tensor weighted_scatter(const Tensor& slots, const Tensor& weights, const Tensor& grad, int64_t num_slots) {
  Tensor out;
  const int64_t dim = grad.size(1);
  with_runs(slots, weights, grad, num_slots, [&]<class Row>(const auto* slot_of, const auto& ends, const auto& for_each_run) {
    out = torch::stable::new_empty(grad, {num_slots, dim}, grad.scalar_type());
    advise_huge_pages(out);
    Row* rows = out.mutable_data_ptr<Row>();
    const int64_t runs = int64_t(ends.size()) - 1;
    if (runs == 0) zero_rows(rows, dim, 0, num_slots);
    for_each_run([&](int64_t run, HitSums<Row>& sums) {
      const int64_t slot = slot_of[ends[run]];
      zero_rows(rows, dim, run == 0 ? 0 : int64_t(slot_of[ends[run] - 1]) + 1, slot);
      sums.sum(ends[run], ends[run + 1], rows + slot * dim);
      if (run + 1 == runs) zero_rows(rows, dim, slot + 1, num_slots);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> row_sums(const Tensor& slots, const Tensor& weights, const Tensor& grad, int64_t num_slots) {
  Tensor rows, out;
  const int64_t dim = grad.size(1);
  with_runs(slots, weights, grad, num_slots, [&]<class Row>(const auto* slot_of, const auto& ends, const auto& for_each_run) {
    const int64_t runs = int64_t(ends.size()) - 1;
    rows = torch::stable::new_empty(grad, {runs}, ScalarType::Long);
    int64_t* row = rows.mutable_data_ptr<int64_t>();
    for (int64_t run = 0; run < runs; ++run) row[run] = slot_of[ends[run]];
    out = torch::stable::new_empty(grad, {runs, dim}, grad.scalar_type());
    advise_huge_pages(out);
    Row* sums_out = out.mutable_data_ptr<Row>();
    for_each_run([&](int64_t run, HitSums<Row>& sums) { sums.sum(ends[run], ends[run + 1], sums_out + run * dim); });
  });
  return {rows, out};
}

}  // namespace
}  // namespace memcompile
