// The operators of a table of pairs: what they are given is checked here, the loop is in pairs.h.
#pragma once

#include <tuple>

#include "gather_bindings.h"
#include "kernels/pairs.h"

namespace memcompile {
namespace {

void check_pairs(const Tensor& values, const Tensor& slots, const Tensor& weights, const Tensor& x) {
  check_weights(slots, weights);
  STD_TORCH_CHECK(x.scalar_type() == values.scalar_type(), "memcompile: x must have the dtype of values");
  STD_TORCH_CHECK(values.dim() == 2 && has_shape(x, {slots.size(0), kAny}) && x.size(1) <= values.size(1),
                  "memcompile: values must be [num_rows, d + value_dim] and x [tokens, d]");
}

// f(u, v, slots): both halves of the rows as tables, of x with d columns.
template <class F>
void with_pairs_and_slots(const Tensor& values, const Tensor& slots, int64_t d, const F& f) {
  with_rows_and_slots(values, slots, values.size(0), [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
    f(Table<Row>{table.data, table.stride, d}, Table<Row>{table.data + d, table.stride, table.dim - d}, s);
  });
}

std::tuple<Tensor, Tensor> pair_gather(const Tensor& values_given, const Tensor& slots_given, const Tensor& weights_given, const Tensor& x_given) {
  check_pairs(values_given, slots_given, weights_given, x_given);
  const Tensor values = with_whole_rows(values_given), slots = torch::stable::contiguous(slots_given);
  const Tensor weights = as(weights_given, sum_type(values)), x = torch::stable::contiguous(x_given);
  const int64_t tokens = slots.size(0), hits = slots.size(1), d = x.size(1), dim = values.size(1) - d;
  Tensor y = torch::stable::new_empty(values, {tokens, dim}, values.scalar_type());
  Tensor dots = torch::stable::new_empty(values, {tokens, hits}, sum_type(values));
  with_pairs_and_slots(values, slots, d, [&]<class Row, class Slot>(const Table<Row>& u, const Table<Row>& v, const Slot* s) {
    using S = Sum<Row>;
    const S* w = weights.const_data_ptr<S>();
    const Row* tokens_in = x.const_data_ptr<Row>();
    Row* out = y.mutable_data_ptr<Row>();
    S* z = dots.mutable_data_ptr<S>();
    parallel(tokens, hits * values.size(1), [&](int64_t begin, int64_t end) {
      PairSums<Row> sums(u, v);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t * hits;
        const auto weight = [&](int64_t i, S dot) {
          z[at + i] = dot;
          return w[at + i] * Gelu<S>(dot).value;
        };
        sums.weighted_sum(s + at, hits, (end - t) * hits, tokens_in + t * d, weight, out + t * dim);
      }
    });
  });
  return {y, dots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_grads(const Tensor& values_given, const Tensor& slots_given, const Tensor& weights_given,
                                                      const Tensor& x, const Tensor& dots_given, const Tensor& grad_given) {
  check_pairs(values_given, slots_given, weights_given, x);
  const Tensor values = with_whole_rows(values_given), slots = torch::stable::contiguous(slots_given);
  const int64_t tokens = slots.size(0), hits = slots.size(1), d = x.size(1), dim = values.size(1) - d;
  STD_TORCH_CHECK(is(dots_given, sum_type(values), {tokens, hits}), "memcompile: dots must be [tokens, hits] in the dtype of sums");
  STD_TORCH_CHECK(is(grad_given, values.scalar_type(), {tokens, dim}), "memcompile: grad must be [tokens, value_dim] in the dtype of values");
  const Tensor weights = as(weights_given, sum_type(values)), dots = torch::stable::contiguous(dots_given);
  const Tensor grad = torch::stable::contiguous(grad_given);
  Tensor grad_x = torch::stable::new_empty(values, {tokens, d}, values.scalar_type());
  const auto new_dots = [&] { return torch::stable::new_empty(values, {tokens, hits}, sum_type(values)); };
  Tensor grad_weights = new_dots(), into = new_dots(), out = new_dots();
  with_pairs_and_slots(values, slots, d, [&]<class Row, class Slot>(const Table<Row>& u, const Table<Row>& v, const Slot* s) {
    using S = Sum<Row>;
    const S *w = weights.const_data_ptr<S>(), *z = dots.const_data_ptr<S>();
    const Row* g = grad.const_data_ptr<Row>();
    S *of_w = grad_weights.mutable_data_ptr<S>(), *a = into.mutable_data_ptr<S>(), *c = out.mutable_data_ptr<S>();
    Row* of_x = grad_x.mutable_data_ptr<Row>();
    parallel(tokens, hits * values.size(1), [&](int64_t begin, int64_t end) {
      PairSums<Row> sums(v, u);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t at = t * hits;
        const auto weight = [&](int64_t i, S along) {
          const Gelu<S> gelu(z[at + i]);
          of_w[at + i] = gelu.value * along;
          c[at + i] = w[at + i] * gelu.value;
          return a[at + i] = w[at + i] * gelu.slope * along;
        };
        sums.weighted_sum(s + at, hits, (end - t) * hits, g + t * dim, weight, of_x + t * d);
      }
    });
  });
  return {grad_weights, grad_x, into, out};
}

Tensor pair_scatter(const Tensor& slots, const Tensor& into, const Tensor& x, const Tensor& out, const Tensor& grad, int64_t num_slots) {
  return scatter(slots, {{into, x}, {out, grad}}, num_slots);
}

}  // namespace
}  // namespace memcompile
