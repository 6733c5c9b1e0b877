// One row of a table updated by its gradient, as row_adam.py and row_tables.py have it: a vector at a time,
// everything that it needs read once and written once. Vectors are in the order of the columns, whatever the rows' type; fp32
// is rounded to bf16 stochastically, with the random bits of stochastic_rounding.py.
#pragma once

#include <algorithm>

#include "simd.h"

namespace memcompile {

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));  // one for each lane of fp32

template <class T>  // uint32_t or a vector of them
inline T mixed(T x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

inline constexpr uint32_t kGolden = 0x9e3779b9u, kTable = 0x85ebca6bu;

// The key of a row's random bits in one of a step's tables.
inline uint32_t noise_key(int64_t row, uint32_t seed, uint32_t table) {
  return mixed(uint32_t(row) * kGolden + seed + table * kTable);
}

inline Vector<float> load_lanes(const float* p) { return load(p); }
inline Vector<double> load_lanes(const double* p) { return load(p); }
inline Vector<float> load_lanes(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(halves, Vector<uint32_t>) << 16);
}

inline void store_halves(BFloat16* p, Vector<uint32_t> lower_halves) {
  const Halves halves = __builtin_convertvector(lower_halves, Halves);
  std::memcpy(static_cast<void*>(p), &halves, sizeof halves);
}

// Stores numbers of the columns from `column` on; fp32 into bf16 with the noise of `key`.
inline void store_lanes(float* p, Vector<float> x, uint32_t, int64_t) { store(p, x); }
inline void store_lanes(double* p, Vector<double> x, uint32_t, int64_t) { store(p, x); }
inline void store_lanes(BFloat16* p, Vector<float> x, uint32_t key, int64_t column) {
  Vector<uint32_t> columns;
  for (int64_t i = 0; i < kLanes<float>; ++i) columns[i] = uint32_t(i);
  const Vector<uint32_t> noise = mixed(((columns + uint32_t(column)) * kGolden) ^ key) & 0xffffu;
  const Vector<uint32_t> nan = reinterpret_cast<Vector<uint32_t>>(x != x);
  const Vector<uint32_t> upper = (reinterpret_cast<Vector<uint32_t>>(x) + noise) >> 16;
  store_halves(p, (upper & ~nan) | (nan & 0x7fc0u));
}

inline void store_nearest(BFloat16* p, Vector<float> x) { store_halves(p, rounded_to_upper_half(x) >> 16); }

enum RowTable : uint32_t { kParam, kExpAvg, kExpAvgSq };  // which round apart

// A row of the table, with its rounded copy where there is one, or the end of a row in room for whole vectors.
template <class Value>
struct ValueRow {
  Value* x;
  BFloat16* rounded;
  const Sum<Value>* grad;
  uint32_t key;

  void store(Vector<Sum<Value>> value, int64_t c, int64_t column) const {
    store_lanes(x + c, value, key, column);
    if constexpr (std::is_same_v<Value, float>) {
      if (rounded) store_nearest(rounded + c, value);
    }
  }
};

// Room for the end of one array of a row: its numbers, then zeros; and back.
template <class T>
class Tail {
 public:
  Tail(const T* from, int64_t count) : count_(from ? count : 0) {
    if (from) std::memcpy(static_cast<void*>(room_), from, count * sizeof(T));
  }
  T* data() { return room_; }
  void write(T* to) const { std::memcpy(static_cast<void*>(to), room_, count_ * sizeof(T)); }

 private:
  T room_[kVectorBytes / sizeof(uint16_t)] = {};
  int64_t count_;
};

// f(row, c, column, in_room) for each vector of a row: c is where it is in the row's arrays, `column` in the table's. The
// end of a row that fills no vector is brought to a row of its own, `in_room`.
template <class Value, class F>
inline void for_each_vector(const ValueRow<Value>& row, int64_t dim, const F& f) {
  constexpr int64_t lanes = kLanes<Sum<Value>>;
  const int64_t whole = dim / lanes * lanes;
  for (int64_t c = 0; c < whole; c += lanes) f(row, c, c, std::false_type{});
  if (whole == dim) return;
  Tail<Value> x(row.x + whole, dim - whole);
  Tail<BFloat16> rounded(row.rounded ? row.rounded + whole : nullptr, dim - whole);
  Tail<Sum<Value>> grad(row.grad ? row.grad + whole : nullptr, dim - whole);
  f(ValueRow<Value>{x.data(), row.rounded ? rounded.data() : nullptr, row.grad ? grad.data() : nullptr, row.key}, 0, whole,
    std::true_type{});
  x.write(row.x + whole);
  if (row.rounded) rounded.write(row.rounded + whole);
}

// What the rows that were last touched in one step have missed.
template <class S>
struct MissedSteps {
  static constexpr int64_t kMoments = std::is_same_v<S, double> ? 14 : 7;

  S decay[3];  // of the value and both moments
  const S* panels;  // [count, 1 + kMoments]: centre, moments
  int64_t count;

  // Whether both moments stay as they are.
  bool keeps_moments() const { return decay[1] == 1 && decay[2] == 1; }
  // Whether all that is left is to multiply the value, which needs no moments.
  bool is_decay_alone() const { return count == 0 && keeps_moments(); }
};

// The skipped steps for m = 1 and root = sqrt(v).
template <class S>
__attribute__((always_inline)) inline Vector<S> steps_a_moment(const MissedSteps<S>& missed, Vector<S> root, S eps) {
  Vector<S> total{};
  for (const S* panel = missed.panels; panel < missed.panels + missed.count * (1 + MissedSteps<S>::kMoments); panel += 1 + MissedSteps<S>::kMoments) {
    const Vector<S> scaled = root * panel[0], inverse = S(1) / (scaled + eps), y = scaled * inverse;
    Vector<S> powers = splat(panel[MissedSteps<S>::kMoments]);
    for (int64_t i = MissedSteps<S>::kMoments - 1; i > 0; --i) powers = powers * y + panel[i];
    total += powers * inverse;
  }
  return total;
}

// A row with its moments, what it has missed, or null, and where the tables' rows are that come next.
template <class Value, class State>
struct AdamRow {
  ValueRow<Value> value;
  State *exp_avg, *exp_avg_sq;
  uint32_t avg_key, avg_sq_key;
  const MissedSteps<Sum<Value>>* missed;
  const Value* next;
  const State *next_avg, *next_avg_sq;
};

template <class Value, class State>
class AdamUpdate {
 public:
  using S = Sum<Value>;

  // Of row_adam's numbers; 1 - beta in double, since fp32 of beta2 = 0.999 has an error of 2e-5 of it.
  explicit AdamUpdate(const double* from)
      : decay_(S(from[0])), beta1_(S(from[1])), beta2_(S(from[2])), rate_(S(from[3])), scale_(S(from[4])), eps_(S(from[5])),
        taken1_(S(1 - from[1])), taken2_(S(1 - from[2])) {}

  void run(const AdamRow<Value, State>& row, int64_t dim) const {
    const AdamUpdate copy = *this;  // whose numbers no store can change, so that they stay in registers
    if (!row.value.grad && row.missed && row.missed->keeps_moments()) {
      copy.template run_row<true>(row, dim);
    } else {
      copy.template run_row<false>(row, dim);
    }
  }

 private:
  template <bool keeps_moments>
  __attribute__((always_inline)) void run_row(const AdamRow<Value, State>& row, int64_t dim) const {
    const auto [value, exp_avg, exp_avg_sq, avg_key, avg_sq_key, missed, next, next_avg, next_avg_sq] = row;
    const auto update = [&](const ValueRow<Value>& part, State* avg, State* avg_sq, int64_t c,
                            int64_t column) __attribute__((always_inline)) {
      Vector<S> x = load_lanes(part.x + c), m = load_lanes(avg + c), v = load_lanes(avg_sq + c);
      if (missed) {
        const Vector<S> moved = missed->count ? m * steps_a_moment(*missed, square_root(v), eps_) : Vector<S>{};
        x = x * missed->decay[0] - moved;
        m *= missed->decay[1];
        v *= missed->decay[2];
      }
      if (part.grad) {
        const Vector<S> g = load(part.grad + c);
        // As torch.lerp: from the nearer end, so that what is near m or near g has their precision.
        m = taken1_ < S(0.5) ? m + taken1_ * (g - m) : g + beta1_ * (m - g);
        v = v * beta2_ + taken2_ * (g * g);
        x = x * decay_ - rate_ * m / (square_root(v) * scale_ + eps_);
      }
      part.store(x, c, column);
      if constexpr (keeps_moments) return;
      store_lanes(avg + c, m, avg_key, column);
      store_lanes(avg_sq + c, v, avg_sq_key, column);
    };
    for_each_vector(value, dim, [&](const ValueRow<Value>& part, int64_t c, int64_t column,
                                    auto in_room) __attribute__((always_inline)) {
      if constexpr (!in_room) {
        __builtin_prefetch(next + c, 1, 0);
        __builtin_prefetch(next_avg + c, 1, 0);
        __builtin_prefetch(next_avg_sq + c, 1, 0);
        update(part, exp_avg, exp_avg_sq, c, column);
      } else {
        Tail<State> m(exp_avg + column, dim - column), v(exp_avg_sq + column, dim - column);
        update(part, m.data(), v.data(), c, column);
        if constexpr (keeps_moments) return;
        m.write(exp_avg + column);
        v.write(exp_avg_sq + column);
      }
    });
  }

  S decay_, beta1_, beta2_, rate_, scale_, eps_, taken1_, taken2_;
};

// x = kept * x - lr / (sqrt(squares) + eps) * g with g = grad + added * x, where squares has grown by the mean of g**2.
template <class Value>
inline void update_adagrad(const ValueRow<Value>& row, int64_t dim, Sum<Value>* squares, Sum<Value> lr, Sum<Value> eps,
                           Sum<Value> added, Sum<Value> kept) {
  using S = Sum<Value>;
  Vector<S> sums{};
  const int64_t whole = dim / kLanes<S> * kLanes<S>;
  for (int64_t c = 0; c < whole; c += kLanes<S>) {
    const Vector<S> g = load(row.grad + c) + added * load_lanes(row.x + c);
    sums += g * g;
  }
  S sum = sum_of_lanes<S>(sums);
  for (int64_t c = whole; c < dim; ++c) {
    const S g = row.grad[c] + added * S(row.x[c]);
    sum += g * g;
  }
  if (dim > 0) *squares += sum / S(dim);
  const S step = lr / (std::sqrt(*squares) + eps);
  for_each_vector(row, dim, [&](const ValueRow<Value>& part, int64_t c, int64_t column, auto) __attribute__((always_inline)) {
    const Vector<S> x = load_lanes(part.x + c), g = load(part.grad + c) + added * x;
    part.store(x * kept - step * g, c, column);
  });
}

// x = decay * x - rate * g
template <class Value>
inline void update_sgd(const ValueRow<Value>& row, int64_t dim, Sum<Value> decay, Sum<Value> rate) {
  using S = Sum<Value>;
  for_each_vector(row, dim, [&](const ValueRow<Value>& part, int64_t c, int64_t column, auto) __attribute__((always_inline)) {
    const Vector<S> x = load_lanes(part.x + c) * decay;
    part.store(part.grad ? x - rate * load(part.grad + c) : x, c, column);
  });
}

}  // namespace memcompile
