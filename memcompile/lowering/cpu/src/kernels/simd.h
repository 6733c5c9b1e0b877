// Vectors as GCC and Clang have them on every CPU, and the element types of the rows. What differs between instruction
// sets is in this file alone; -march=native picks it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Sums of rows of half dtypes are kept in fp32.
template <class Row>
using Sum = std::conditional_t<std::is_same_v<Row, double>, double, float>;

template <class T>
struct VectorOf;
#define MEMCOMPILE_VECTOR(T)                                                           \
  template <>                                                                          \
  struct VectorOf<T> {                                                                 \
    typedef T type __attribute__((vector_size(kVectorBytes)));                         \
    typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias)); \
  };
MEMCOMPILE_VECTOR(float)
MEMCOMPILE_VECTOR(double)
MEMCOMPILE_VECTOR(int32_t)
MEMCOMPILE_VECTOR(uint32_t)
MEMCOMPILE_VECTOR(int64_t)
#undef MEMCOMPILE_VECTOR

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

inline float to_sum(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float to_sum(Half x) {
#if defined(MEMCOMPILE_AVX512) || defined(MEMCOMPILE_AVX2)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
#else
  // The exponent moves up by 112; subnormals are scaled by a subtraction, which is exact; infinity and NaN are apart.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t bits = magnitude + (112u << 23);
  if (magnitude >= (31u << 23)) bits += 112u << 23;
  float out;
  if (magnitude < (1u << 23)) {
    bits += 1u << 23;
    std::memcpy(&out, &bits, sizeof out);
    out -= 6.103515625e-05f;
    std::memcpy(&bits, &out, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

inline float to_sum(float x) { return x; }
inline double to_sum(double x) { return x; }

// Round to nearest, ties to even, as PyTorch does; NaN stays NaN.
inline void from_sum(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void from_sum(float x, Half* out) {
#if defined(MEMCOMPILE_AVX512) || defined(MEMCOMPILE_AVX2)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 half = x;
  std::memcpy(out, &half, sizeof half);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t rounded;
  if (bits > 0x7f800000) {
    rounded = 0x7e00;
  } else if (bits >= 0x47800000) {  // 65536 and more: infinity
    rounded = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2**-14: the addition of one half rounds to a multiple of 2**-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&rounded, &magnitude, sizeof rounded);
    rounded -= 0x3f000000;
  } else {
    rounded = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(sign | rounded);
#endif
}

inline void from_sum(float x, float* out) { *out = x; }
inline void from_sum(double x, double* out) { *out = x; }

// Two vectors of sums. Of bfloat16 they are the numbers at even and at odd places, which costs a shift and a mask; what
// is loaded as a pair is stored as one, so the order between matters to none.
template <class S>
struct Pair {
  Vector<S> a, b;
};

template <class Row>
inline constexpr int64_t kPair = 2 * kLanes<Sum<Row>>;  // row elements in a pair

inline Pair<float> load_pair(const float* p) { return {load(p), load(p + kLanes<float>)}; }
inline Pair<double> load_pair(const double* p) { return {load(p), load(p + kLanes<double>)}; }

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
    out.a[i] = to_sum(p[i]);
    out.b[i] = to_sum(p[i + kLanes<float>]);
  }
  return out;
#endif
}

inline void store_pair(float* p, Pair<float> x) {
  store(p, x.a);
  store(p + kLanes<float>, x.b);
}

inline void store_pair(double* p, Pair<double> x) {
  store(p, x.a);
  store(p + kLanes<double>, x.b);
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
    for (int j = 0; j < kLanes<float>; ++j) from_sum(part[i][j], p + i * kLanes<float> + j);
#endif
  }
}

inline Vector<float> square_root(Vector<float> x) {
#if defined(MEMCOMPILE_AVX512)
  return reinterpret_cast<Vector<float>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(MEMCOMPILE_AVX2)
  return reinterpret_cast<Vector<float>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__x86_64__)
  return reinterpret_cast<Vector<float>>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector<float>>(vsqrtq_f32(reinterpret_cast<float32x4_t>(x)));
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline Vector<double> square_root(Vector<double> x) {
#if defined(MEMCOMPILE_AVX512)
  return reinterpret_cast<Vector<double>>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
#elif defined(MEMCOMPILE_AVX2)
  return reinterpret_cast<Vector<double>>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#elif defined(__x86_64__)
  return reinterpret_cast<Vector<double>>(_mm_sqrt_pd(reinterpret_cast<__m128d>(x)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector<double>>(vsqrtq_f64(reinterpret_cast<float64x2_t>(x)));
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
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
