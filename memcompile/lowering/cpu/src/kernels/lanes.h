// Vectors of rows in the order of their columns, whatever the rows' type; fp32 is rounded to bf16 stochastically, with
// the random bits of stochastic_rounding.py.
#pragma once

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

}  // namespace memcompile
