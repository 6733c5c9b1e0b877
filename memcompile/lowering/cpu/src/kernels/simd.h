// Vectors as GCC and Clang have them on every CPU, and the element types of the rows. What differs between instruction
// sets is in this file alone; -march=native picks it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memcompile {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MEMCOMPILE_AVX512 1
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MEMCOMPILE_AVX2 1
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Sums of rows of half dtypes are kept in fp32.
template <class Row>
using Sum = std::conditional_t<std::is_same_v<Row, double>, double, float>;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};

template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
inline constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};  // which is x for -0.0 too, so that GCC need not compute it
}

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
inline void store(T* p, Vector<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = x;
}

// Two vectors of sums. Of bfloat16 they are the numbers at even and at odd places, which costs a shift and a mask; what
// is loaded as a pair is stored as one, so the order between matters to none.
template <class S>
struct Pair {
  Vector<S> a, b;
};

template <class Row>
inline constexpr int64_t kPair = 2 * kLanes<Sum<Row>>;  // row elements in a pair

template <class S>
inline Pair<S> load_pair(const S* p) {
  return {load(p), load(p + kLanes<S>)};
}

inline Pair<float> load_pair(const BFloat16* p) {
  const Vector<uint32_t> bits = load(reinterpret_cast<const uint32_t*>(p));
  return {reinterpret_cast<Vector<float>>(bits << 16), reinterpret_cast<Vector<float>>(bits & 0xffff0000u)};
}

inline Pair<float> load_pair(const Half* p) {
#if defined(MEMCOMPILE_AVX512)
  const auto half = [&](int i) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i)); };
  return {half(0), half(1)};
#elif defined(MEMCOMPILE_AVX2)
  const auto half = [&](int i) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i)); };
  return {half(0), half(1)};
#else
  Pair<float> out;
  for (int i = 0; i < kLanes<float>; ++i) {
    out.a[i] = p[i];
    out.b[i] = p[i + kLanes<float>];
  }
  return out;
#endif
}

template <class S>
inline void store_pair(S* p, Pair<S> x) {
  store(p, x.a);
  store(p + kLanes<S>, x.b);
}

inline Vector<uint32_t> rounded_to_upper_half(Vector<float> x) {
  const Vector<uint32_t> bits = reinterpret_cast<Vector<uint32_t>>(x);
  const Vector<uint32_t> rounded = bits + 0x7fff + ((bits >> 16) & 1), nan = reinterpret_cast<Vector<uint32_t>>(x != x);
  return (rounded & ~nan) | (nan & 0x7fc00000u);
}

inline void store_pair(BFloat16* p, Pair<float> x) {
  const Vector<uint32_t> even = rounded_to_upper_half(x.a) >> 16, odd = rounded_to_upper_half(x.b) & 0xffff0000u;
  store(reinterpret_cast<uint32_t*>(p), even | odd);
}

inline void store_pair(Half* p, Pair<float> x) {
  const Vector<float> part[2] = {x.a, x.b};
  for (int i = 0; i < 2; ++i) {
#if defined(MEMCOMPILE_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + i, _mm512_cvtps_ph(part[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(MEMCOMPILE_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, _mm256_cvtps_ph(part[i], _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < kLanes<float>; ++j) p[i * kLanes<float> + j] = part[i][j];
#endif
  }
}

// One instruction a vector. GCC makes it of the loop, by -fno-math-errno, but for AVX-512, where it prefers half vectors.
template <class V>
inline V square_root(V x) {
#if defined(MEMCOMPILE_AVX512)
  if constexpr (std::is_same_v<V, Vector<double>>) return reinterpret_cast<V>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
  else return reinterpret_cast<V>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#else
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// The sum of all lanes, halves first: one order on every thread, whatever the compiler likes.
template <class T>
inline T sum_of_lanes(Vector<T> x) {
  T lane[kLanes<T>];
  store(lane, x);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Bit i tells whether keys[i] >= bound, for 64 keys.
template <class Key>
inline uint64_t at_least(const Key* keys, Key bound) {
  uint64_t mask = 0;
#if defined(MEMCOMPILE_AVX512)
  if constexpr (std::is_same_v<Key, int32_t>) {
    const __m512i b = _mm512_set1_epi32(bound);
    for (int i = 0; i < 4; ++i) mask |= uint64_t(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + 16 * i), b)) << (16 * i);
    return mask;
  }
#elif defined(MEMCOMPILE_AVX2)
  if constexpr (std::is_same_v<Key, int32_t>) {
    const __m256i b = _mm256_set1_epi32(bound);
    for (int i = 0; i < 8; ++i) {
      const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
      const int below = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, key)));
      mask |= uint64_t(uint8_t(~below)) << (8 * i);
    }
    return mask;
  }
#endif
  for (int i = 0; i < 64; ++i) mask |= uint64_t(keys[i] >= bound) << i;
  return mask;
}

}  // namespace memcompile
