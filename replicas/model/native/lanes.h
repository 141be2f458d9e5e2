// Sixteen lanes of float, int32 or uint32, and what is done with them lane by lane.
//
// With AVX-512 they are one vector of the compiler's. Elsewhere they are several of the processor's own
// width: GCC keeps a vector wider than its registers in memory, which made a forward 10 times slower.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace triad {

constexpr int LANES = 16;

// A call would hand lanes over in memory.
#define TRIAD_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Units __attribute__((vector_size(64)));

TRIAD_INLINE Floats splat(float x) { return Floats{} + x; }
TRIAD_INLINE Floats fused(Floats acc, Floats a, Floats b) { return acc + a * b; }

#else

template <class E>
struct Parts {
#if defined(__AVX__)
  static constexpr int WIDTH = 8;
#else
  static constexpr int WIDTH = 4;
#endif
  static constexpr int COUNT = LANES / WIDTH;
  typedef E Part __attribute__((vector_size(4 * WIDTH)));
  Part part[COUNT];

  TRIAD_INLINE E operator[](int lane) const { return part[lane / WIDTH][lane % WIDTH]; }

  // The same bits as another type.
  template <class F>
  TRIAD_INLINE explicit operator Parts<F>() const {
    return apply<F>([](Part a) __attribute__((always_inline)) { return (typename Parts<F>::Part)a; }, *this);
  }

  template <class F, class Do, class... More>
  TRIAD_INLINE static Parts<F> apply(const Do& what, const Parts& first, const More&... more) {
    Parts<F> made;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) made.part[i] = what(first.part[i], more.part[i]...);
    return made;
  }

  TRIAD_INLINE static Parts all(E x) {
    Parts made;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) made.part[i] = x - Part{};  // x + 0 would be an addition, for x = -0
    return made;
  }
};

using Floats = Parts<float>;
using Ints = Parts<int32_t>;
using Units = Parts<uint32_t>;

#define TRIAD_BINARY(op)                                                                                               \
  template <class E>                                                                                                   \
  TRIAD_INLINE Parts<E> operator op(Parts<E> a, Parts<E> b) {                                                          \
    return Parts<E>::template apply<E>([](auto x, auto y) __attribute__((always_inline)) { return x op y; }, a, b);    \
  }                                                                                                                    \
  template <class E>                                                                                                   \
  TRIAD_INLINE Parts<E> operator op(Parts<E> a, E b) {                                                                 \
    return a op Parts<E>::all(b);                                                                                      \
  }
TRIAD_BINARY(+)
TRIAD_BINARY(-)
TRIAD_BINARY(*)
TRIAD_BINARY(/)
TRIAD_BINARY(&)
TRIAD_BINARY(|)
#undef TRIAD_BINARY

#define TRIAD_COMPARE(op)                                                                                              \
  template <class E>                                                                                                   \
  TRIAD_INLINE Ints operator op(Parts<E> a, Parts<E> b) {                                                              \
    return Parts<E>::template apply<int32_t>([](auto x, auto y) __attribute__((always_inline)) { return x op y; }, a, b); \
  }
TRIAD_COMPARE(<)
TRIAD_COMPARE(>)
#undef TRIAD_COMPARE

template <class E>
TRIAD_INLINE Parts<E> operator<<(Parts<E> a, int by) {
  return Parts<E>::template apply<E>([by](auto x) __attribute__((always_inline)) { return x << by; }, a);
}

template <class E>
TRIAD_INLINE Parts<E> operator>>(Parts<E> a, int by) {
  return Parts<E>::template apply<E>([by](auto x) __attribute__((always_inline)) { return x >> by; }, a);
}

template <class E>
TRIAD_INLINE Parts<E> operator~(Parts<E> a) {
  return Parts<E>::template apply<E>([](auto x) __attribute__((always_inline)) { return ~x; }, a);
}

TRIAD_INLINE Floats operator-(Floats a) { return Floats{} - a; }
TRIAD_INLINE Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
TRIAD_INLINE Units& operator+=(Units& a, Units b) { return a = a + b; }
TRIAD_INLINE Floats& operator*=(Floats& a, Floats b) { return a = a * b; }

TRIAD_INLINE Floats splat(float x) { return Floats::all(x); }

// acc + a * b, rounded once where the processor can, so that no caller is rounded differently.
TRIAD_INLINE Floats fused(Floats acc, Floats a, Floats b) {
  return Floats::apply<float>(
      [](auto c, auto x, auto y) __attribute__((always_inline)) {
#if defined(__FMA__)
        return (Floats::Part)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)c);
#else
        return c + x * y;
#endif
      },
      acc, a, b);
}

#endif

template <class V>
TRIAD_INLINE V load(const void* from) {
  V v;
#if defined(__AVX512F__)
  std::memcpy(&v, from, sizeof(V));
#else  // part by part: as a whole it would be copied through memory
#pragma GCC unroll 4
  for (int i = 0; i < V::COUNT; i++) {
    std::memcpy(&v.part[i], (const char*)from + i * sizeof v.part[i], sizeof v.part[i]);
  }
#endif
  return v;
}

template <class V>
TRIAD_INLINE void store(void* to, V v) {
#if defined(__AVX512F__)
  std::memcpy(to, &v, sizeof(V));
#else
#pragma GCC unroll 4
  for (int i = 0; i < V::COUNT; i++) {
    std::memcpy((char*)to + i * sizeof v.part[i], &v.part[i], sizeof v.part[i]);
  }
#endif
}

TRIAD_INLINE Ints lane_numbers() {
  alignas(64) static constexpr int32_t numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<Ints>(numbers);
}

// Sixteen int8 codes as floats.
TRIAD_INLINE Floats widen(const int8_t* codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
#elif defined(__AVX2__)
  const __m128i low = _mm_loadu_si128((const __m128i*)codes), high = _mm_srli_si128(low, 8);
  return {{(Floats::Part)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
           (Floats::Part)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))}};
#else
  alignas(64) float wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = codes[i];
  return load<Floats>(wide);
#endif
}

// Sixteen uint16.
TRIAD_INLINE Units widen(const uint16_t* halves) {
#if defined(__AVX512F__)
  return (Units)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)halves));
#elif defined(__AVX2__)
  return {{(Units::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)halves)),
           (Units::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(halves + 8)))}};
#else
  alignas(64) uint32_t wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = halves[i];
  return load<Units>(wide);
#endif
}

// Each below 2^16.
TRIAD_INLINE void narrow(uint16_t* to, Units values) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)values));
#elif defined(__AVX2__)
  const __m256i mixed = _mm256_packus_epi32((__m256i)values.part[0], (__m256i)values.part[1]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(mixed, 0xd8));
#else
  for (int i = 0; i < LANES; i++) to[i] = (uint16_t)values[i];
#endif
}

}  // namespace triad
