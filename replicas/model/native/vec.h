// The two element types of weights, activations and K/V, and functions of sixteen lanes.
//
// Everything multiplied is kept in units of 4 bytes along the axis summed over: one float, or two
// bfloat16. One multiply-accumulate takes 16 units of one operand and one unit of the other, so every
// kernel is written once for both types. Weights may be int8 codes instead, which are exact in both.
#pragma once

#include <cmath>

#include "lanes.h"

namespace triad {

TRIAD_INLINE Floats select(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }
TRIAD_INLINE Floats max(Floats a, Floats b) { return select(a > b, a, b); }

TRIAD_INLINE float max_lane(Floats v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

TRIAD_INLINE float sum_lanes(Floats v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

// e^x to about 2 ulp; exactly 0 below -87, which is where masked scores (-inf) are.
TRIAD_INLINE Floats exp(Floats x) {
  const Ints keep = x > splat(-87.0f);
  x = select(keep, x, splat(-87.0f));
  x = select(x < splat(88.0f), x, splat(88.0f));
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);  // Cephes' expf polynomial
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
  return (Floats)((Ints)(p * (Floats)exponent) & keep);
}

struct Float32 {
  using Element = float;
  static constexpr int PER_UNIT = 1;

  TRIAD_INLINE static Floats mac(Floats acc, Units w, uint32_t x) {
    float value;
    std::memcpy(&value, &x, 4);
    return fused(acc, (Floats)w, splat(value));
  }
  TRIAD_INLINE static Units units(const int8_t* codes) { return (Units)widen(codes); }
  TRIAD_INLINE static Floats read(const Element* from) { return load<Floats>(from); }
  TRIAD_INLINE static void write(Element* to, Floats v) { store(to, v); }
  TRIAD_INLINE static float read(Element x) { return x; }
  TRIAD_INLINE static Element round(float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int PER_UNIT = 2;

  TRIAD_INLINE static Floats mac(Floats acc, Units w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    const Units both = Units{} + x;
    acc = fused(acc, (Floats)(w << 16), (Floats)(both << 16));
    return fused(acc, (Floats)(w & 0xffff0000u), (Floats)(both & 0xffff0000u));
#endif
  }
  // codes: of the sixteen units' first elements, then of their second.
  TRIAD_INLINE static Units units(const int8_t* codes) { return (Units)widen(codes) >> 16 | (Units)widen(codes + LANES); }
  TRIAD_INLINE static Floats read(const Element* from) { return (Floats)(widen(from) << 16); }
  TRIAD_INLINE static void write(Element* to, Floats v) {
    const Units bits = (Units)v;
    narrow(to, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  TRIAD_INLINE static float read(Element x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  TRIAD_INLINE static Element round(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (Element)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace triad
