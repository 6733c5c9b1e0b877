// Runs one kernel on numbers that are the same every time, for callgrind to count its instructions: those of the
// function `measured` and of what it calls.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/by_slot.h"
#include "kernels/pairs.h"
#include "kernels/row_updates.h"
#include "kernels/rows.h"
#include "kernels/scores.h"
#include "kernels/search.h"
#include "kernels/stale_rows.h"

using namespace memcompile;

namespace {

constexpr int64_t kTokens = 48, kKeys = 1024, kHalfDim = 256, kTopK = 32, kHits = 128, kSlots = 4096, kDim = 1024;

uint64_t state = 1;
float random_number() {  // a sum of uniform numbers: near enough to normal for scores
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    sum += float(state >> 40) / float(1 << 24) - 0.5f;
  }
  return sum;
}

template <class Row>
std::vector<Row> random_rows(int64_t count) {
  std::vector<Row> out(count);
  for (Row& x : out) x = Row(random_number());
  return out;
}

std::vector<int32_t> random_slots() {
  std::vector<int32_t> out(kTokens * kHits);
  for (int32_t& slot : out) {
    random_number();
    slot = int32_t((state >> 33) % kSlots);
  }
  return out;
}

}  // namespace

template <class F>
__attribute__((noinline)) void measured(const F& f) {
  f();
}

template <class Row>
void gather() {
  const std::vector<Row> values = random_rows<Row>(kSlots * kDim);
  const std::vector<float> weights = random_rows<float>(kTokens * kHits);
  const std::vector<int32_t> slots = random_slots();
  RowSums<Row> sums(kDim);
  std::vector<Row> out(kDim);
  const Table<Row> table{values.data(), kDim, kDim};
  measured([&] {
    for (int64_t t = 0; t < kTokens; ++t) sums.weighted_sum(table, &slots[t * kHits], &weights[t * kHits], kHits, kHits, out.data());
  });
}

void dots() {
  const std::vector<float> values = random_rows<float>(kSlots * kDim), grad = random_rows<float>(kDim);
  const std::vector<int32_t> slots = random_slots();
  std::vector<float> copy(kDim), out(kHits);
  measured([&] {
    for (int64_t t = 0; t < kTokens; ++t) {
      dots_with_rows(Table<float>{values.data(), kDim, kDim}, &slots[t * kHits], kHits, kHits, grad.data(), copy.data(), out.data());
    }
  });
}

// Rows of pairs, half of their numbers each; the weight of a forward.
template <class Row>
void pairs() {
  const std::vector<Row> values = random_rows<Row>(kSlots * kDim), x = random_rows<Row>(kDim / 2);
  const std::vector<float> weights = random_rows<float>(kTokens * kHits);
  const std::vector<int32_t> slots = random_slots();
  const Table<Row> u{values.data(), kDim, kDim / 2}, v{values.data() + kDim / 2, kDim, kDim / 2};
  PairSums<Row> sums(u, v);
  std::vector<Row> out(kDim / 2);
  measured([&] {
    for (int64_t t = 0; t < kTokens; ++t) {
      const float* w = &weights[t * kHits];
      sums.weighted_sum(&slots[t * kHits], kHits, kHits, x.data(), [&](int64_t i, float dot) { return w[i] * Gelu<float>(dot).value; }, out.data());
    }
  });
}

void search() {
  const std::vector<float> scores = random_rows<float>(2 * kTokens * kKeys);
  ProductKeySearch<float> search(kKeys, kTopK);
  std::vector<float> logits(kTopK);
  std::vector<int32_t> slots(kTopK);
  measured([&] {
    for (int64_t t = 0; t < kTokens; ++t) search.search(&scores[2 * t * kKeys], &scores[(2 * t + 1) * kKeys], logits.data(), slots.data());
  });
}

void scores() {
  const std::vector<float> queries = random_rows<float>(kTokens * kHalfDim), keys = random_rows<float>(kKeys * kHalfDim);
  std::vector<float> out(kTokens * kKeys);
  measured([&] {
    for (int64_t first = 0; first < kTokens; first += ScoreTile<float>::kTokens) {
      ScoreTile<float> tile(kHalfDim);
      tile.multiply({&queries[first * kHalfDim], kHalfDim, kHalfDim}, ScoreTile<float>::kTokens, {keys.data(), kHalfDim, kHalfDim},
                    kKeys, &out[first * kKeys]);
    }
  });
}

void sort() {
  const std::vector<int32_t> slots = random_slots();
  measured([&] {
    sort_by_slot(slots.data(), int64_t(slots.size()), kSlots, 1, [](int64_t begin, int64_t end, const auto& f) { f(begin, end); });
  });
}

// Sums of the rows that are hit, most of them once or twice.
void sums() {
  const std::vector<float> grad = random_rows<float>(kTokens * kDim), weights = random_rows<float>(kTokens * kHits);
  const std::vector<int32_t> slots = random_slots();
  const SortedHits<int32_t> sorted = sort_by_slot(slots.data(), int64_t(slots.size()), kSlots, 1,
                                                  [](int64_t begin, int64_t end, const auto& f) { f(begin, end); });
  std::vector<float> out(kDim);
  measured([&] {
    const std::vector<int64_t> ends = ends_of_runs(sorted.slots.get(), int64_t(slots.size()));
    HitSums<float> sum(sorted.hits.get(), weights.data(), kHits, {grad.data(), kDim, kDim}, 0, ends.back());
    for (size_t run = 0; run + 1 < ends.size(); ++run) sum.sum(ends[run], ends[run + 1], out.data());
  });
}

// Adam of a row; `panels` of what it has missed.
template <class State>
void adam(int64_t panels) {
  std::vector<float> x = random_rows<float>(kDim);
  const std::vector<float> grad = random_rows<float>(kDim), terms = random_rows<float>(panels * (1 + MissedSteps<float>::kMoments));
  std::vector<State> m = random_rows<State>(kDim), v(kDim);
  for (int64_t c = 0; c < kDim; ++c) v[c] = State(float(m[c]) * float(m[c]));
  const double numbers[6] = {1, 0.9, 0.999, 1e-3, 1, 1e-8};
  const AdamUpdate<float, State> update(numbers);
  const MissedSteps<float> missed{{1, 0.9f, 0.999f}, terms.data(), panels};
  measured([&] {
    for (int64_t t = 0; t < kTokens; ++t) {
      const ValueRow<float> row{x.data(), nullptr, grad.data(), noise_key(t, 0, kParam)};
      update.run({row, m.data(), v.data(), noise_key(t, 0, kExpAvg), noise_key(t, 0, kExpAvgSq), panels ? &missed : nullptr,
                  x.data(), m.data(), v.data()}, kDim);
    }
  });
}

// A token's rows, each of which has missed steps of one panel, and their sum.
void stale() {
  const std::vector<float> values = random_rows<float>(kSlots * kDim), weights = random_rows<float>(kTokens * kHits);
  const std::vector<float> terms = random_rows<float>(1 + MissedSteps<float>::kMoments);
  std::vector<float> v(kSlots * kDim);
  for (size_t i = 0; i < v.size(); ++i) v[i] = values[i] * values[i];
  const std::vector<int32_t> slots = random_slots();
  const std::vector<int64_t> missed_steps(slots.size());
  const MissedSteps<float> missed{{1, 0.9f, 0.999f}, terms.data(), 1};
  const StaleRows<float, float> rows(values.data(), values.data(), v.data(), kDim, &missed, 1e-8f);
  std::vector<float> part(kDim), sums(kDim);
  measured([&] {
    for (int64_t t = 0; t < kTokens; ++t) {
      rows.weighted_sum(&slots[t * kHits], &missed_steps[t * kHits], &weights[t * kHits], kHits, kHits, part.data(), sums.data());
    }
  });
}

int main(int, char** arguments) {
  const char* kernel = arguments[1];
  if (!std::strcmp(kernel, "gather fp32")) gather<float>();
  else if (!std::strcmp(kernel, "gather bf16")) gather<BFloat16>();
  else if (!std::strcmp(kernel, "dots")) dots();
  else if (!std::strcmp(kernel, "pairs fp32")) pairs<float>();
  else if (!std::strcmp(kernel, "pairs bf16")) pairs<BFloat16>();
  else if (!std::strcmp(kernel, "search")) search();
  else if (!std::strcmp(kernel, "scores")) scores();
  else if (!std::strcmp(kernel, "sort")) sort();
  else if (!std::strcmp(kernel, "sums")) sums();
  else if (!std::strcmp(kernel, "adam")) adam<float>(0);
  else if (!std::strcmp(kernel, "adam late")) adam<float>(1);
  else if (!std::strcmp(kernel, "adam bf16 state")) adam<BFloat16>(0);
  else if (!std::strcmp(kernel, "stale gather")) stale();
  else return 1;
  std::printf("%d\n", int(kTokens));
}
