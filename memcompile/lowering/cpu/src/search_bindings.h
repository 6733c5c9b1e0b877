// The operators that search: what they are given is checked here, the loops are in search.h and scores.h.
#pragma once

#include <tuple>
#include <vector>

#include "kernels/rows.h"
#include "kernels/scores.h"
#include "kernels/search.h"
#include "tensors.h"

namespace memcompile {
namespace {

void check_top_k(int64_t top_k, int64_t n_keys) {
  STD_TORCH_CHECK(1 <= top_k && top_k <= n_keys && n_keys <= 46340,
                  "memcompile: expected 1 <= top_k <= n_keys <= 46340, got ", top_k, " and ", n_keys);
}

std::tuple<Tensor, Tensor> product_key_topk(const Tensor& scores_given, int64_t top_k) {
  STD_TORCH_CHECK(has_shape(scores_given, {2, kAny, kAny, kAny}), "memcompile: scores must be [2, tokens, heads, n_keys]");
  const ScalarType type = scores_given.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "memcompile: scores must be float32 or float64");
  const int64_t tokens = scores_given.size(1), heads = scores_given.size(2), n_keys = scores_given.size(3);
  check_top_k(top_k, n_keys);
  const Tensor scores = scores_given.stride(3) == 1 || n_keys == 1 ? scores_given : torch::stable::contiguous(scores_given);
  Tensor logits = torch::stable::new_empty(scores, {tokens, heads, top_k}, type);
  Tensor slots = torch::stable::new_empty(scores, {tokens, heads, top_k}, ScalarType::Int);
  const auto run = [&]<class Score>(Score) {
    const Score* all = scores.const_data_ptr<Score>();
    Score* logits_out = logits.mutable_data_ptr<Score>();
    int32_t* slots_out = slots.mutable_data_ptr<int32_t>();
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

// A search as the loops read it.
template <class Row>
struct Search {
  using S = Sum<Row>;
  const Row *query, *half_keys;
  int64_t tokens, heads, n_keys, half_dim, top_k;
  S* weights;
  int32_t* slots;

  Table<Row> keys(int64_t head, int64_t side) const {
    return {half_keys + (side * heads + head) * n_keys * half_dim, half_dim, half_dim};
  }

  // The slots of one token and head, by the scores of both sides.
  void choose(ProductKeySearch<S>& search, const S* first, const S* second, int64_t row) const {
    search.search(first, second, weights + row * top_k, slots + row * top_k);
    softmax(weights + row * top_k, top_k);
  }

  // Scores of a few tokens, every key's by a dot, then the search.
  void run_few() const {
    std::vector<int32_t> numbers(n_keys);
    for (int64_t j = 0; j < n_keys; ++j) numbers[j] = int32_t(j);
    std::vector<S> scores(tokens * heads * 2 * n_keys);
    constexpr int64_t part = 64;  // keys
    const int64_t parts = (n_keys + part - 1) / part;
    parallel(heads * 2 * parts, tokens * part * half_dim, [&](int64_t begin, int64_t end) {
      std::vector<S> sums(half_dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % parts * part, side = i / parts % 2, head = i / parts / 2;
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t bag = (t * heads + head) * 2 + side;
          dots_with_rows(keys(head, side), numbers.data() + first, std::min(part, n_keys - first), n_keys - first,
                         query + bag * half_dim, sums.data(), scores.data() + bag * n_keys + first);
        }
      }
    });
    parallel(tokens * heads, 2 * n_keys, [&](int64_t begin, int64_t end) {
      ProductKeySearch<S> search(n_keys, top_k);
      for (int64_t row = begin; row < end; ++row) {
        const S* first = scores.data() + row * 2 * n_keys;
        choose(search, first, first + n_keys, row);
      }
    });
  }

  // Scores of a tile of tokens at a time, searched while they are in the cache.
  void run_many() const {
    using Tile = ScoreTile<Row>;
    const int64_t tiles = (tokens + Tile::kTokens - 1) / Tile::kTokens;
    parallel(tiles * heads, Tile::kTokens * n_keys * half_dim, [&](int64_t begin, int64_t end) {
      Tile tile(half_dim);
      ProductKeySearch<S> search(n_keys, top_k);
      std::vector<S> scores(2 * Tile::kTokens * n_keys);
      S *firsts = scores.data(), *seconds = firsts + Tile::kTokens * n_keys;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tiles, first = i % tiles * Tile::kTokens, size = std::min(Tile::kTokens, tokens - first);
        const Row* queries = query + (first * heads + head) * 2 * half_dim;
        tile.multiply({queries, heads * 2 * half_dim, half_dim}, size, keys(head, 0), n_keys, firsts);
        tile.multiply({queries + half_dim, heads * 2 * half_dim, half_dim}, size, keys(head, 1), n_keys, seconds);
        for (int64_t t = 0; t < size; ++t) {
          choose(search, firsts + t * n_keys, seconds + t * n_keys, (first + t) * heads + head);
        }
      }
    });
  }
};

// Tokens below which a tile's lanes stay empty, and a dot with each key is faster.
constexpr int64_t kFewTokens = 5;

// The type in which a tile is multiplied: its own, or fp32, which holds the half dtypes exactly.
ScalarType tile_type(const Tensor& query) {
  const ScalarType type = query.scalar_type();
  const bool whole_words = query.size(2) / 2 % Words<BFloat16>::kRows == 0;
  if (type == ScalarType::BFloat16 && kHasTile<BFloat16> && whole_words) return type;
  return type == ScalarType::Double ? type : ScalarType::Float;
}

std::tuple<Tensor, Tensor> product_key_search(const Tensor& query_given, const Tensor& half_keys_given, int64_t top_k) {
  STD_TORCH_CHECK(has_shape(half_keys_given, {2, kAny, kAny, kAny}) &&
                      has_shape(query_given, {kAny, half_keys_given.size(1), 2 * half_keys_given.size(3)}),
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
  with_row_type(query, [&]<class Row>(Row) {
    const Search<Row> search{query.const_data_ptr<Row>(), half_keys.const_data_ptr<Row>(), tokens, heads, n_keys, half_dim,
                             top_k, weights.mutable_data_ptr<Sum<Row>>(), slots.mutable_data_ptr<int32_t>()};
    if (few) {
      search.run_few();
    } else if constexpr (kHasTile<Row>) {
      search.run_many();
    }
  });
  return {weights, slots};
}

}  // namespace
}  // namespace memcompile
