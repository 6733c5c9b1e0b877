// The CPU kernels of memcompile's operators, over PyTorch's stable ABI. What each computes is in the Python file of its
// operator; the loops are in the headers beside this file, which know no PyTorch.
#include <tuple>
#include <vector>

#include "kernels/by_slot.h"
#include "lagging_bindings.h"
#include "kernels/prefetch.h"
#include "row_bindings.h"
#include "kernels/rows.h"
#include "kernels/scores.h"
#include "kernels/search.h"
#include "tensors.h"

namespace memcompile {
namespace {

// A table [num_rows, dim] whose rows may be apart: a table is large, and is not copied for its strides.
Tensor with_whole_rows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2, "memcompile: expected rows [num_rows, dim]");
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : torch::stable::contiguous(rows);
}

template <class Row>
Table<Row> table_of(const Tensor& rows) {
  return {data<Row>(rows), rows.stride(0), rows.size(1)};
}

void check_top_k(int64_t top_k, int64_t n_keys) {
  STD_TORCH_CHECK(1 <= top_k && top_k <= n_keys && n_keys <= 46340,
                  "memcompile: expected 1 <= top_k <= n_keys <= 46340, got ", top_k, " and ", n_keys);
}

// f(table, slots) for the types of the rows and of the slots, which are of a table of `num_slots` rows.
template <class F>
void with_rows_and_slots(const Tensor& rows, const Tensor& slots, int64_t num_slots, const F& f) {
  with_row_type(rows, [&](auto row) {
    with_slot_type(slots, [&](auto slot) {
      const auto* numbers = data<decltype(slot)>(slots);
      check_slots(numbers, slots.numel(), num_slots);
      f(table_of<decltype(row)>(rows), numbers);
    });
  });
}

std::tuple<Tensor, Tensor> product_key_topk(const Tensor& scores_given, int64_t top_k) {
  STD_TORCH_CHECK(scores_given.dim() == 4 && scores_given.size(0) == 2, "memcompile: scores must be [2, tokens, heads, n_keys]");
  const ScalarType type = scores_given.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "memcompile: scores must be float32 or float64");
  const int64_t tokens = scores_given.size(1), heads = scores_given.size(2), n_keys = scores_given.size(3);
  check_top_k(top_k, n_keys);
  const Tensor scores = scores_given.stride(3) == 1 || n_keys == 1 ? scores_given : torch::stable::contiguous(scores_given);
  Tensor logits = torch::stable::new_empty(scores, {tokens, heads, top_k}, type);
  Tensor slots = torch::stable::new_empty(scores, {tokens, heads, top_k}, ScalarType::Int);
  const auto run = [&](auto zero) {
    using Score = decltype(zero);
    const Score* all = data<Score>(scores);
    Score* logits_out = mutable_data<Score>(logits);
    int32_t* slots_out = mutable_data<int32_t>(slots);
    parallel(tokens * heads, 2 * n_keys, [&](int64_t begin, int64_t end) {
      ProductKeySearch<Score> search(n_keys, top_k);
      for (int64_t row = begin; row < end; ++row) {
        const Score* first = all + row / heads * scores.stride(1) + row % heads * scores.stride(2);
        search.search(first, first + scores.stride(0), logits_out + row * top_k, slots_out + row * top_k);
      }
    });
  };
  type == ScalarType::Float ? run(float{}) : run(double{});
  return {logits, slots};
}

// Tokens below which a tile's lanes stay empty, and a dot with each key is faster.
constexpr int64_t kFewTokens = 5;

// Scores of a few tokens, every key's by a dot, then the search.
template <class Row>
void search_few(const Row* query, const Row* half_keys, int64_t tokens, int64_t heads, int64_t n_keys, int64_t half_dim,
                int64_t top_k, Sum<Row>* weights, int32_t* slots) {
  using S = Sum<Row>;
  std::vector<int32_t> numbers(n_keys);
  for (int64_t j = 0; j < n_keys; ++j) numbers[j] = int32_t(j);
  std::vector<S> scores(tokens * heads * 2 * n_keys);
  constexpr int64_t part = 64;  // keys
  const int64_t parts = (n_keys + part - 1) / part;
  parallel(heads * 2 * parts, tokens * part * half_dim, [&](int64_t begin, int64_t end) {
    std::vector<S> sums(half_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * part, side = i / parts % 2, head = i / parts / 2;
      const Table<Row> keys{half_keys + (side * heads + head) * n_keys * half_dim, half_dim, half_dim};
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t bag = (t * heads + head) * 2 + side;
        const int64_t count = std::min(part, n_keys - first);
        dots_with_rows(keys, numbers.data() + first, count, n_keys - first, query + bag * half_dim, sums.data(),
                       scores.data() + bag * n_keys + first);
      }
    }
  });
  parallel(tokens * heads, 2 * n_keys, [&](int64_t begin, int64_t end) {
    ProductKeySearch<S> search(n_keys, top_k);
    for (int64_t row = begin; row < end; ++row) {
      const S* first = scores.data() + row * 2 * n_keys;
      search.search(first, first + n_keys, weights + row * top_k, slots + row * top_k);
      softmax(weights + row * top_k, top_k);
    }
  });
}

// Scores of a tile of tokens at a time, searched while they are in the cache.
template <class Row>
void search_many(const Row* query, const Row* half_keys, int64_t tokens, int64_t heads, int64_t n_keys, int64_t half_dim,
                 int64_t top_k, Sum<Row>* weights, int32_t* slots) {
  using S = Sum<Row>;
  using Tile = ScoreTile<Row>;
  const int64_t tiles = (tokens + Tile::kTokens - 1) / Tile::kTokens;
  parallel(tiles * heads, Tile::kTokens * n_keys * half_dim, [&](int64_t begin, int64_t end) {
    Tile tile(half_dim);
    ProductKeySearch<S> search(n_keys, top_k);
    std::vector<S> scores(2 * Tile::kTokens * n_keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / tiles, first = i % tiles * Tile::kTokens, size = std::min(Tile::kTokens, tokens - first);
      for (int64_t side = 0; side < 2; ++side) {
        const Table<Row> queries{query + ((first * heads + head) * 2 + side) * half_dim, heads * 2 * half_dim, half_dim};
        const Table<Row> keys{half_keys + (side * heads + head) * n_keys * half_dim, half_dim, half_dim};
        tile.multiply(queries, size, keys, n_keys, scores.data() + side * Tile::kTokens * n_keys);
      }
      for (int64_t t = 0; t < size; ++t) {
        const int64_t row = (first + t) * heads + head;
        search.search(scores.data() + t * n_keys, scores.data() + (Tile::kTokens + t) * n_keys, weights + row * top_k,
                      slots + row * top_k);
        softmax(weights + row * top_k, top_k);
      }
    }
  });
}

// The type in which a tile is multiplied: its own, or fp32, which holds the half dtypes exactly.
ScalarType tile_type(const Tensor& query) {
  const ScalarType type = query.scalar_type();
  const bool whole_words = query.size(2) / 2 % Words<BFloat16>::kRows == 0;
  if (type == ScalarType::BFloat16 && kHasTile<BFloat16> && whole_words) return type;
  return type == ScalarType::Double ? type : ScalarType::Float;
}

std::tuple<Tensor, Tensor> product_key_search(const Tensor& query_given, const Tensor& half_keys_given, int64_t top_k) {
  STD_TORCH_CHECK(query_given.dim() == 3 && half_keys_given.dim() == 4 && half_keys_given.size(0) == 2 &&
                      query_given.size(1) == half_keys_given.size(1) && query_given.size(2) == 2 * half_keys_given.size(3),
                  "memcompile: query must be [tokens, heads, key_dim] and half_keys [2, heads, n_keys, key_dim / 2]");
  STD_TORCH_CHECK(query_given.scalar_type() == half_keys_given.scalar_type() && is_floating(query_given),
                  "memcompile: query and half_keys must have one floating dtype");
  const int64_t tokens = query_given.size(0);
  const bool few = tokens < kFewTokens;
  const ScalarType type = few ? query_given.scalar_type() : tile_type(query_given);
  const Tensor query = as(query_given, type), half_keys = as(half_keys_given, type);
  const int64_t heads = query.size(1), n_keys = half_keys.size(2), half_dim = half_keys.size(3);
  check_top_k(top_k, n_keys);
  Tensor weights = torch::stable::new_empty(query, {tokens, heads, top_k}, sum_type(query));
  Tensor slots = torch::stable::new_empty(query, {tokens, heads, top_k}, ScalarType::Int);
  with_row_type(query, [&](auto row) {
    using Row = decltype(row);
    const Row* q = data<Row>(query);
    const Row* keys = data<Row>(half_keys);
    Sum<Row>* weights_out = mutable_data<Sum<Row>>(weights);
    int32_t* slots_out = mutable_data<int32_t>(slots);
    if (few) {
      search_few(q, keys, tokens, heads, n_keys, half_dim, top_k, weights_out, slots_out);
    } else if constexpr (kHasTile<Row>) {
      search_many(q, keys, tokens, heads, n_keys, half_dim, top_k, weights_out, slots_out);
    }
  });
  return {weights, slots};
}

Tensor weighted_gather(const Tensor& values_given, const Tensor& slots_given, const Tensor& weights_given) {
  const Tensor values = with_whole_rows(values_given);
  check_weights(slots_given, weights_given);
  const Tensor slots = torch::stable::contiguous(slots_given), weights = as(weights_given, sum_type(values));
  const int64_t tokens = slots.size(0), hits = slots.size(1), dim = values.size(1);
  Tensor out = torch::stable::new_empty(values, {tokens, dim}, values.scalar_type());
  with_rows_and_slots(values, slots, values.size(0), [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
    const Sum<Row>* w = data<Sum<Row>>(weights);
    Row* y = mutable_data<Row>(out);
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
  const Tensor values = with_whole_rows(values_given);
  STD_TORCH_CHECK(grad_given.scalar_type() == values.scalar_type(), "memcompile: grad must have the dtype of values");
  const Tensor slots = torch::stable::contiguous(slots_given), grad = torch::stable::contiguous(grad_given);
  STD_TORCH_CHECK(slots.dim() == 2 && grad.dim() == 2 && grad.size(0) == slots.size(0) && grad.size(1) == values.size(1),
                  "memcompile: slots must be [tokens, hits] and grad [tokens, value_dim]");
  const int64_t tokens = slots.size(0), hits = slots.size(1), dim = values.size(1);
  Tensor out = torch::stable::new_empty(values, {tokens, hits}, sum_type(values));
  with_rows_and_slots(values, slots, values.size(0), [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
    const Row* u = data<Row>(grad);
    Sum<Row>* dots = mutable_data<Sum<Row>>(out);
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
  STD_TORCH_CHECK(values.dim() == 2 && slots_given.dim() == 2, "memcompile: values must be [num_rows, dim] and slots [tokens, hits]");
  const Tensor slots = torch::stable::contiguous(slots_given);
  const int64_t count = slots.numel(), bytes = values.element_size();
  Tensor out = torch::stable::new_empty(slots, {slots.size(0), slots.size(1)}, slots.scalar_type());
  const MappedRows rows(values.const_data_ptr(), values.stride(0) * bytes, values.size(1) * bytes);
  with_slot_type(slots, [&](auto slot) {
    const auto* numbers = data<decltype(slot)>(slots);
    check_slots(numbers, count, values.size(0));
    std::copy(numbers, numbers + count, mutable_data<decltype(slot)>(out));
    if (rows.are_there(numbers, count)) return;
    const std::vector<PageRun> runs = rows.pages_of(numbers, count);
    constexpr int64_t elements = 1 << 10;  // that asking for a run costs as much as
    parallel(int64_t(runs.size()), elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows.ask(runs[i]);
    });
  });
  return out;
}

// The hits sorted by slot, and where each slot's end: f(sorted, ends).
template <class Slot, class F>
void with_runs(const Slot* slots, int64_t count, int64_t num_slots, const F& f) {
  const SortedHits<Slot> sorted =
      sort_by_slot(slots, count, num_slots, torch::stable::get_num_threads(),
                   [](int64_t begin, int64_t end, const auto& part) { torch::stable::parallel_for(begin, end, 1, part); });
  f(sorted, ends_of_runs(sorted.slots.get(), count));
}

// f(run, sums) for every run of hits on the thread that has its first hit, in order; each thread has sums of its own.
template <class Row, class F>
void for_each_run(const WeightedHits<Row>& hits, const std::vector<int64_t>& ends, const F& f) {
  parallel(ends.back(), hits.grad.dim, [&](int64_t begin, int64_t end) {
    const auto first = std::lower_bound(ends.begin(), ends.end() - 1, begin), last = std::lower_bound(first, ends.end() - 1, end);
    HitSums<Row> sums(hits, *first, *last);
    for (auto run = first; run < last; ++run) f(run - ends.begin(), sums);
  });
}

// What was given of hits, checked and as the loops read it.
struct Hits {
  Tensor slots, weights, grad;

  Hits(const Tensor& slots_given, const Tensor& weights_given, const Tensor& grad_given)
      : slots(torch::stable::contiguous(slots_given)), weights(as(weights_given, sum_type(grad_given))),
        grad(with_whole_rows(grad_given)) {
    check_weights(slots, weights_given);
    STD_TORCH_CHECK(grad.size(0) == slots.size(0), "memcompile: grad must be [tokens, value_dim]");
  }

  // f(sorted, hits, ends)
  template <class F>
  void with_runs(int64_t num_slots, const F& f) const {
    with_rows_and_slots(grad, slots, num_slots, [&]<class Row, class Slot>(const Table<Row>& table, const Slot* s) {
      memcompile::with_runs(s, slots.numel(), num_slots, [&](const SortedHits<Slot>& sorted, const std::vector<int64_t>& ends) {
        f(sorted, WeightedHits<Row>{sorted.hits.get(), data<Sum<Row>>(weights), slots.size(1), table}, ends);
      });
    });
  }
};

// Rows first..last of out, of which a thread owns those that its hits reach and the unhit ones before each.
template <class Row>
void zero_rows(Row* out, int64_t dim, int64_t first, int64_t last) {
  if (first < last) std::memset(static_cast<void*>(out + first * dim), 0, (last - first) * dim * sizeof(Row));
}

Tensor weighted_scatter(const Tensor& slots, const Tensor& weights, const Tensor& grad, int64_t num_slots) {
  const Hits given(slots, weights, grad);
  const int64_t dim = grad.size(1);
  Tensor out = torch::stable::new_empty(grad, {num_slots, dim}, grad.scalar_type());
  advise_huge_pages(out);
  given.with_runs(num_slots, [&]<class Slot, class Row>(const SortedHits<Slot>& sorted, const WeightedHits<Row>& hits,
                                                        const std::vector<int64_t>& ends) {
    Row* rows = mutable_data<Row>(out);
    const int64_t runs = int64_t(ends.size()) - 1;
    if (runs == 0) zero_rows(rows, dim, 0, num_slots);
    for_each_run(hits, ends, [&](int64_t run, HitSums<Row>& sums) {
      const int64_t slot = sorted.slots[ends[run]];
      zero_rows(rows, dim, run == 0 ? 0 : int64_t(sorted.slots[ends[run] - 1]) + 1, slot);
      sums.sum(ends[run], ends[run + 1], rows + slot * dim);
      if (run + 1 == runs) zero_rows(rows, dim, slot + 1, num_slots);
    });
  });
  return out;
}

// The slot of each run.
template <class Slot>
Tensor rows_of_runs(const Tensor& like, const SortedHits<Slot>& sorted, const std::vector<int64_t>& ends) {
  const int64_t runs = int64_t(ends.size()) - 1;
  Tensor rows = torch::stable::new_empty(like, {runs}, ScalarType::Long);
  for (int64_t run = 0; run < runs; ++run) mutable_data<int64_t>(rows)[run] = sorted.slots[ends[run]];
  return rows;
}

std::tuple<Tensor, Tensor> row_sums(const Tensor& slots, const Tensor& weights, const Tensor& grad, int64_t num_slots) {
  const Hits given(slots, weights, grad);
  const int64_t dim = grad.size(1);
  std::vector<Tensor> out;
  given.with_runs(num_slots, [&]<class Slot, class Row>(const SortedHits<Slot>& sorted, const WeightedHits<Row>& hits,
                                                        const std::vector<int64_t>& ends) {
    out = {rows_of_runs(grad, sorted, ends), torch::stable::new_empty(grad, {int64_t(ends.size()) - 1, dim}, grad.scalar_type())};
    advise_huge_pages(out[1]);
    Row* sums_out = mutable_data<Row>(out[1]);
    for_each_run(hits, ends, [&](int64_t run, HitSums<Row>& sums) { sums.sum(ends[run], ends[run + 1], sums_out + run * dim); });
  });
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensor> hits_by_row(const Tensor& slots_given, int64_t num_slots) {
  STD_TORCH_CHECK(slots_given.dim() == 2, "memcompile: slots must be [tokens, hits]");
  const Tensor slots = torch::stable::contiguous(slots_given);
  const int64_t count = slots.numel();
  Tensor hits = torch::stable::new_empty(slots, {count}, ScalarType::Long);
  std::vector<Tensor> out;
  with_slot_type(slots, [&](auto slot) {
    const auto* numbers = data<decltype(slot)>(slots);
    check_slots(numbers, count, num_slots);
    with_runs(numbers, count, num_slots, [&](const auto& sorted, const std::vector<int64_t>& ends) {
      std::copy(sorted.hits.get(), sorted.hits.get() + count, mutable_data<int64_t>(hits));
      out = {rows_of_runs(slots, sorted, ends), torch::stable::new_empty(slots, {int64_t(ends.size())}, ScalarType::Long)};
      std::copy(ends.begin(), ends.end(), mutable_data<int64_t>(out[1]));
    });
  });
  return {out[0], out[1], hits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memcompile, CPU, m) {
  m.impl("product_key_search", TORCH_BOX(&product_key_search));
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk));
  m.impl("prefetch_rows", TORCH_BOX(&prefetch_rows));
  m.impl("weighted_gather", TORCH_BOX(&weighted_gather));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("weighted_scatter", TORCH_BOX(&weighted_scatter));
  m.impl("hits_by_row", TORCH_BOX(&hits_by_row));
  m.impl("row_sums", TORCH_BOX(&row_sums));
  m.impl("skipped_steps", TORCH_BOX(&skipped_steps));
  m.impl("lagging_gather", TORCH_BOX(&lagging_gather));
  m.impl("lagging_dot", TORCH_BOX(&lagging_dot));
  m.impl("row_adam", TORCH_BOX(&row_adam));
  m.impl("row_adagrad", TORCH_BOX(&row_adagrad));
  m.impl("row_sgd", TORCH_BOX(&row_sgd));
}

}  // namespace memcompile
