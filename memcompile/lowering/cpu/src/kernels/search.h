// The k best of all n * n sums of two lists of n scores: the rule of product_key_topk.py.
#pragma once

#include <cmath>

#include "select.h"

namespace memcompile {

template <class Score>
class ProductKeySearch {
 public:
  ProductKeySearch(int64_t n_keys, int64_t top_k)
      : n_keys_(n_keys), top_k_(top_k), ranks_(candidates(top_k)), halves_(n_keys, top_k), candidates_(ranks_.size(), top_k),
        ranked_{std::vector<int32_t>(top_k), std::vector<int32_t>(top_k)}, hit_(top_k),
        best_{std::vector<Score>(top_k), std::vector<Score>(top_k)}, sums_(ranks_.size()) {}

  // scores of each side [n_keys] -> logits [top_k], slots [top_k].
  void search(const Score* first, const Score* second, Score* logits, int32_t* slots) {
    const Score* scores[2] = {first, second};
    for (int side = 0; side < 2; ++side) {
      halves_.select(scores[side], n_keys_, top_k_, ranked_[side].data());
      for (int64_t r = 0; r < top_k_; ++r) best_[side][r] = scores[side][ranked_[side][r]];
    }
    Score* sum = sums_.data();
    for (int64_t a = 0; a < top_k_; ++a) {
      const int64_t width = top_k_ / (a + 1);
      for (int64_t b = 0; b < width; ++b) sum[b] = best_[0][a] + best_[1][b];
      sum += width;
    }
    candidates_.select(sums_.data(), int64_t(sums_.size()), top_k_, hit_.data());
    for (int64_t r = 0; r < top_k_; ++r) {
      const Ranks pair = ranks_[hit_[r]];
      logits[r] = sums_[hit_[r]];
      slots[r] = int32_t(ranked_[0][pair.first] * n_keys_ + ranked_[1][pair.second]);
    }
  }

 private:
  struct Ranks {
    int32_t first, second;
  };

  // By the first rank, then by the second.
  static std::vector<Ranks> candidates(int64_t top_k) {
    std::vector<Ranks> ranks;
    for (int64_t a = 0; a < top_k; ++a) {
      for (int64_t b = 0; (a + 1) * (b + 1) <= top_k; ++b) ranks.push_back({int32_t(a), int32_t(b)});
    }
    return ranks;
  }

  int64_t n_keys_, top_k_;
  std::vector<Ranks> ranks_;
  Selector<Score> halves_, candidates_;
  std::vector<int32_t> ranked_[2], hit_;
  std::vector<Score> best_[2], sums_;
};

// The softmax of one search's logits, in place. The best stands first, and NaN is the best.
template <class Score>
void softmax(Score* logits, int64_t top_k) {
  const Score peak = logits[0];
  double sum = 0;
  for (int64_t r = 0; r < top_k; ++r) sum += logits[r] = std::exp(logits[r] - peak);
  for (int64_t r = 0; r < top_k; ++r) logits[r] = Score(logits[r] / sum);
}

}  // namespace memcompile
