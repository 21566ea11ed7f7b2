/* What the compiled kernels share: loops for several widths of vectors, and numbers of 16 bits in memory. */
#ifndef SOPHIA_NUMBERS_H
#define SOPHIA_NUMBERS_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12 /* with 16-bit numbers in its vectors, which avx512f alone has not */
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef uint16_t bfloat16;
typedef uint16_t float16;

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float with_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float f32(float x) { return x; }
INLINE float to_f32(float x, uint32_t noise) { return (void)noise, x; }
INLINE double f64(double x) { return x; }
INLINE double to_f64(double x, uint32_t noise) { return (void)noise, x; }

INLINE float from_bf16(bfloat16 x) { return with_bits((uint32_t)x << 16); }

/* The upper half of a float32 after something was added to the lower: half of it to round to nearest, uniform
 * noise to round up as often as the lower half is large. */
INLINE bfloat16 cut(float x, uint32_t added) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7FC0 : (bfloat16)((bits + added) >> 16);
}
INLINE bfloat16 nearest_bf16(float x, uint32_t noise) {
  (void)noise;
  return cut(x, 0x7FFFu + ((bits_of(x) >> 16) & 1u)); /* ties to even */
}
INLINE bfloat16 stochastic_bf16(float x, uint32_t noise) { return cut(x, noise); }

/* float16 has 5 bits of exponent and 10 of fraction: a normal number is the float32 with the exponent moved by
 * 112 and the fraction by 13 places, a subnormal one is a multiple of 2^-24. */
INLINE float from_f16(float16 x) {
  const uint32_t size = x & 0x7FFFu, sign = (uint32_t)(x & 0x8000u) << 16;
  const uint32_t normal = (size << 13) + (112u << 23);
  const uint32_t above = normal + (size >= 0x7C00u ? 112u << 23 : 0u); /* inf and NaN */
  const uint32_t below = bits_of((float)(int32_t)size * 0x1p-24f);
  return with_bits((size < 0x0400u ? below : above) | sign);
}
INLINE float16 nearest_f16(float x, uint32_t noise) {
  (void)noise;
  const uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  uint32_t normal = (size - (112u << 23) + 0x0FFFu + ((size >> 13) & 1u)) >> 13;
  normal = size >= 0x47800000u ? 0x7C00u : normal;           /* 2^16 and above, inf */
  const float least = with_bits(size) + 0.5f;                 /* its last place is 2^-24 */
  const uint32_t below = bits_of(least) - 0x3F000000u;        /* 0.5f */
  const uint32_t found = size < 0x38800000u ? below : normal; /* 2^-14, the least normal number */
  return (float16)((size > 0x7F800000u ? 0x7E00u : found) | sign);
}

#endif
