// Scores of a tile of tokens against all half-keys of one head and side: a matrix product whose result never leaves the
// second-level cache. The queries are packed with a token in each lane; the keys are read as they lie in memory.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace memcompile {

// How numbers are multiplied: a word is what one lane takes at a time.
template <class Row>
struct Words {
  using Word = Row;
  static constexpr int64_t kRows = 1;  // numbers in a word; a row must hold whole words
  template <class V>
  static V multiply_add(V query, Row key, V sum) {
    return sum + query * splat(key);
  }
};

// Whether a tile can be multiplied in this type.
template <class Row>
inline constexpr bool kHasTile = std::is_same_v<Row, Sum<Row>>;

#if defined(MEMCOMPILE_AVX512) && defined(__AVX512BF16__)
template <>
inline constexpr bool kHasTile<BFloat16> = true;

// Two products a lane, summed in fp32; products below 2**-126 count as zero.
template <>
struct Words<BFloat16> {
  using Word = uint32_t;
  static constexpr int64_t kRows = 2;
  static Vector<float> multiply_add(Vector<uint32_t> query, uint32_t key, Vector<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)query, (__m512bh)splat(key));
  }
};
#endif

template <class Row>
class ScoreTile {
 public:
  using S = Sum<Row>;
  using Word = typename Words<Row>::Word;
  static constexpr int64_t kLanesOfTokens = kLanes<Word>;
#if defined(MEMCOMPILE_AVX512)
  static constexpr int kVectors = 3, kKeys = 8;  // 24 sums, 3 queries and a key in 32 registers
#elif defined(MEMCOMPILE_AVX2)
  static constexpr int kVectors = 2, kKeys = 6;  // of 16 registers
#else
  static constexpr int kVectors = 2, kKeys = 4;
#endif
  static constexpr int64_t kTokens = kVectors * kLanesOfTokens;  // in a tile

  explicit ScoreTile(int64_t dim) : words_(dim / Words<Row>::kRows), packed_(kTokens * words_), block_(kBlock * kTokens) {}

  // scores[t * n_keys + j] = queries.row(t) . keys.row(j), for t < tokens <= kTokens and j < n_keys.
  void multiply(const Table<Row>& queries, int64_t tokens, const Table<Row>& keys, int64_t n_keys, S* scores) {
    const int64_t vectors = (tokens + kLanesOfTokens - 1) / kLanesOfTokens;
    if (vectors == 1) return multiply<1>(queries, tokens, keys, n_keys, scores);
    if constexpr (kVectors > 2) {
      if (vectors == 2) return multiply<2>(queries, tokens, keys, n_keys, scores);
    }
    multiply<kVectors>(queries, tokens, keys, n_keys, scores);
  }

 private:
  static constexpr int64_t kPart = 256;  // words summed at a time: the roundings of longer sums would add up
  static constexpr int64_t kBlock = kKeys * 2;  // keys whose scores are turned from token last to token first at a time

  template <int vectors>
  void multiply(const Table<Row>& queries, int64_t tokens, const Table<Row>& keys, int64_t n_keys, S* scores) {
    constexpr int64_t width = vectors * kLanesOfTokens;
    for (int64_t t = 0; t < width; ++t) {
      const char* row = reinterpret_cast<const char*>(queries.row(std::min(t, tokens - 1)));
      for (int64_t p = 0; p < words_; ++p) std::memcpy(&packed_[p * width + t], row + p * sizeof(Word), sizeof(Word));
    }
    for (int64_t first = 0; first < n_keys; first += kBlock) {
      const int64_t size = std::min(kBlock, n_keys - first);
      for (int64_t j = 0; j < size; j += kKeys) {
        if (j + kKeys <= size) {
          add_products<vectors, kKeys>(keys, first + j, &block_[j * width]);
        } else {
          for (int64_t r = j; r < size; ++r) add_products<vectors, 1>(keys, first + r, &block_[r * width]);
        }
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < size; ++j) scores[t * n_keys + first + j] = block_[j * width + t];
      }
    }
  }

  template <int vectors, int count>
  void add_products(const Table<Row>& keys, int64_t first, S* out) const {
    const char* key[count];
    for (int r = 0; r < count; ++r) key[r] = reinterpret_cast<const char*>(keys.row(first + r));
    const Word* query = packed_.data();
    for (int64_t first_word = 0; first_word == 0 || first_word < words_; first_word += kPart) {
      Vector<S> sum[count][vectors] = {};
      for (int64_t p = first_word; p < std::min(first_word + kPart, words_); ++p, query += vectors * kLanesOfTokens) {
        Vector<Word> q[vectors];
        for (int v = 0; v < vectors; ++v) q[v] = load(query + v * kLanesOfTokens);
        for (int r = 0; r < count; ++r) {
          Word word;
          std::memcpy(&word, key[r] + p * sizeof(Word), sizeof(Word));
          for (int v = 0; v < vectors; ++v) sum[r][v] = Words<Row>::multiply_add(q[v], word, sum[r][v]);
        }
      }
      for (int r = 0; r < count; ++r) {
        for (int v = 0; v < vectors; ++v) {
          S* total = out + (r * vectors + v) * kLanesOfTokens;
          store(total, first_word == 0 ? sum[r][v] : load(total) + sum[r][v]);
        }
      }
    }
  }

  int64_t words_;
  std::vector<Word> packed_;  // [words, tokens]
  std::vector<S> block_;      // [keys, tokens]
};

}  // namespace memcompile
