/* The Sophia step in one pass over memory of a CPU.
 *
 * The rule is that of update_rule.py in the form of foreach.py:
 *     m <- b1 m + (1 - b1) g;   d = max(gamma h, floor, |u|);   p <- decay p - lr u / d
 * where u = m and floor = eps, or, by the damped rule, u looks a step ahead and the floor is relative to its rms.
 * It reads p, g, m, h and writes p, m: six words a parameter, where AdamW moves seven. It is written once, as a
 * macro, for all dtypes.
 *
 * The tensors are walked through as one long array; a call does the elements [begin, end) of it, so that
 * threads can share the work whatever the sizes of the tensors are. No dependency, not even on OpenMP: two
 * OpenMP runtimes in one process are a known source of trouble, and torch brings its own.
 *
 * Compile with -O3 -fno-trapping-math -fno-math-errno -ffp-contract=off: without contraction the vector loop and
 * its remainder round alike, so the result does not depend on where the work is cut for the threads. (Never
 * with -ffast-math: linking with it makes some compilers switch the whole process to flush-to-zero.)
 */
#include <math.h>
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

/* Numbers of a step, as in fused_cpu.py. Doubles: each span rounds them once, to its own arithmetic. */
typedef struct {
  double beta1;
  double gradient; /* factor of the gradient: 1 - beta1, negative to maximize */
  double lr;
  double decay; /* 1 - lr weight_decay */
  double gamma;
  double eps;
  double ahead;   /* factor of the gradient in u = beta1 m + ahead g, or 0 for u = m */
  double damping; /* of the damped rule: its floor is damping rms(u), at least eps */
} Settings;

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) (void)(address)
#endif

/* ---- numbers in memory ---- */

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

/* rounding.py has the same hash, and says what it is for. */
INLINE uint32_t noise_of(uint64_t key, uint32_t element) {
  uint32_t x = element + (uint32_t)key;
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= (uint32_t)(key >> 32);
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  x ^= x >> 16;
  return x;
}

/* ---- the rule ---- */

#define LINE 16 /* elements; update_rule.py has it too */
#define FEW 128 /* runs whose squares are added up before they go into doubles */

/* NAME: of the loop. REAL: type of the arithmetic. WEIGHT and STATE: of p and g, of m and h, in memory.
 * FROM_*: memory to REAL. TO_*: REAL to memory; the second argument is noise, for stochastic rounding. */
#define SPAN(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                   \
  CLONES static void NAME(WEIGHT *restrict p, const WEIGHT *restrict g, STATE *restrict m,                      \
                          const STATE *restrict h, int64_t n, uint64_t key, double least,                       \
                          const Settings *settings) {                                                           \
    const REAL b1 = (REAL)settings->beta1, a = (REAL)settings->gradient, lr = (REAL)settings->lr;               \
    const REAL decay = (REAL)settings->decay, gamma = (REAL)settings->gamma, ahead = (REAL)settings->ahead;     \
    const REAL bottom = (REAL)least;                                                                            \
    const int looks = settings->ahead != 0; /* the compiler makes a loop for each answer */                     \
    uint32_t element = 0; /* beside i: an index of 64 bits would have to be narrowed in every vector */         \
    for (int64_t i = 0; i < n; ++i) {                                                                           \
      const uint32_t noise = noise_of(key, element++); /* not computed where it is not used */                  \
      const REAL gi = FROM_WEIGHT(g[i]), mi = b1 * FROM_STATE(m[i]) + a * gi;                                   \
      const REAL u = looks ? b1 * mi + ahead * gi : mi;                                                         \
      const REAL size = (REAL)fabs(u);                                                                          \
      REAL d = gamma * FROM_STATE(h[i]);                                                                        \
      d = d > bottom ? d : bottom;                                                                              \
      d = size > d ? size : d;                                                                                  \
      m[i] = TO_STATE(mi, noise & 0xFFFFu);                                                                     \
      p[i] = TO_WEIGHT(decay * FROM_WEIGHT(p[i]) - lr * (u / d), noise >> 16);                                  \
    }                                                                                                           \
  }                                                                                                             \
  /* The sum of u^2 before a step, over every `every`-th run of LINE elements; one accumulator for each place in\
   * a run, so that the sum is the same at every width of vectors. p and h, if given, are fetched for the step. */\
  CLONES static double NAME##_squares(const WEIGHT *p, const WEIGHT *restrict g, const STATE *restrict m,       \
                                      const STATE *h, int64_t n, int64_t every, const Settings *settings) {     \
    const REAL b1 = (REAL)settings->beta1, a = (REAL)settings->gradient, ahead = (REAL)settings->ahead;         \
    double of_place[LINE] = {0}, sum = 0;                                                                       \
    REAL some[LINE];                                                                                            \
    const int64_t runs = n / LINE;                                                                              \
    for (int64_t first = 0; first < runs; first += FEW * every) { /* doubles for every run would take longer */ \
      const int64_t last = first + FEW * every < runs ? first + FEW * every : runs;                             \
      for (int j = 0; j < LINE; ++j) some[j] = 0;                                                               \
      for (int64_t run = first; run < last; run += every) {                                                     \
        if (p) {                                                                                                \
          PREFETCH(p + run * LINE);                                                                             \
          PREFETCH(h + run * LINE);                                                                             \
        }                                                                                                       \
        for (int j = 0; j < LINE; ++j) {                                                                        \
          const int64_t i = run * LINE + j;                                                                     \
          const REAL gi = FROM_WEIGHT(g[i]), mi = b1 * FROM_STATE(m[i]) + a * gi, u = b1 * mi + ahead * gi;     \
          some[j] += u * u;                                                                                     \
        }                                                                                                       \
      }                                                                                                         \
      for (int j = 0; j < LINE; ++j) of_place[j] += (double)some[j];                                            \
    }                                                                                                           \
    for (int64_t i = runs * LINE; i < n && every == 1; ++i) {                                                   \
      const REAL gi = FROM_WEIGHT(g[i]), mi = b1 * FROM_STATE(m[i]) + a * gi, u = b1 * mi + ahead * gi;         \
      of_place[i - runs * LINE] += (double)u * (double)u;                                                       \
    }                                                                                                           \
    for (int j = 0; j < LINE; ++j) sum += of_place[j];                                                          \
    return sum;                                                                                                 \
  }

/* The dtypes it is there for; fused_cpu.py knows them by their numbers. */
#define EACH(DO)                                                                                                \
  DO(0, span_f32, float, float, f32, to_f32, float, f32, to_f32)                                                \
  DO(1, span_f64, double, double, f64, to_f64, double, f64, to_f64)                                             \
  DO(2, span_bf16, float, bfloat16, from_bf16, nearest_bf16, float, f32, to_f32)                                \
  DO(3, span_bf16_sr, float, bfloat16, from_bf16, stochastic_bf16, float, f32, to_f32)                          \
  DO(4, span_f16, float, float16, from_f16, nearest_f16, float, f32, to_f32)                                    \
  DO(5, span_f32_small, float, float, f32, to_f32, bfloat16, from_bf16, stochastic_bf16)                        \
  DO(6, span_bf16_small, float, bfloat16, from_bf16, nearest_bf16, bfloat16, from_bf16, stochastic_bf16)        \
  DO(7, span_bf16_sr_small, float, bfloat16, from_bf16, stochastic_bf16, bfloat16, from_bf16, stochastic_bf16)  \
  DO(8, span_f16_small, float, float16, from_f16, nearest_f16, bfloat16, from_bf16, stochastic_bf16)

EACH(SPAN)

/* ---- the walk ---- */

static double squares(int32_t dtypes, const void *p, const void *g, const void *m, const void *h, int64_t n,
                      int64_t every, const Settings *settings) {
#define SUM(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                    \
  case NUMBER:                                                                                                  \
    return NAME##_squares((const WEIGHT *)p, (const WEIGHT *)g, (const STATE *)m, (const STATE *)h, n, every,   \
                          settings);
  switch (dtypes) {
    EACH(SUM)
  }
  return 0;
}

static double floor_of(double mean_square, const Settings *settings) {
  const double relative = settings->damping * sqrt(mean_square);
  return relative < settings->eps ? settings->eps : relative; /* what is no number stays none */
}

/* What this library and fused_cpu.py must agree on; one higher with each change of it. */
EXPORT int32_t sophia_version(void) { return 3; }

/* dtypes: an index into DTYPES of fused_cpu.py. tensors: how many; length[t]: elements of tensor t; p, g, m, h:
 * their addresses; key[t]: of its noise, or NULL where nothing is rounded stochastically. least[t]: the floor of
 * its denominators, negative where it is to be found here, or NULL where all have eps. */
EXPORT void sophia_step(int32_t dtypes, int64_t tensors, const int64_t *length, void *const *p, void *const *g,
                        void *const *m, void *const *h, const uint64_t *key, const double *least, int64_t begin,
                        int64_t end, const Settings *settings) {
  int64_t first = 0; /* of tensor t, in the long array */
  for (int64_t t = 0; t < tensors && first < end; first += length[t++]) {
    int64_t from = begin > first ? begin - first : 0;
    int64_t to = end - first < length[t] ? end - first : length[t];
    double bottom = least ? least[t] : settings->eps;
    if (bottom < 0) { /* a small tensor: whole, by the thread that has its first element, while in its cache */
      if (from > 0) continue;
      to = length[t];
    }
    if (from >= to) continue;
    if (bottom < 0) bottom = floor_of(squares(dtypes, p[t], g[t], m[t], h[t], to, 1, settings) / (double)to, settings);
    /* The lower word counts the elements, without a carry into the upper. */
    const uint64_t whole = key ? key[t] : 0;
    const uint64_t here = (whole & 0xFFFFFFFF00000000u) | (uint32_t)(whole + (uint64_t)from);
#define CASE(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                   \
  case NUMBER:                                                                                                  \
    NAME((WEIGHT *)p[t] + from, (const WEIGHT *)g[t] + from, (STATE *)m[t] + from, (const STATE *)h[t] + from,   \
         to - from, here, bottom, settings);                                                                    \
    break;
    switch (dtypes) {
      EACH(CASE)
    }
  }
}

/* For pieces [begin, end) of tensors: sum[i] of the squares of u over n[i] elements, as in SPAN. */
EXPORT void sophia_squares(int32_t dtypes, const int64_t *n, void *const *g, void *const *m, int64_t every,
                           double *sum, int64_t begin, int64_t end, const Settings *settings) {
  for (int64_t i = begin; i < end; ++i) sum[i] = squares(dtypes, NULL, g[i], m[i], NULL, n[i], every, settings);
}

/* ---- the average of the curvature ---- */

/* h <- b2 h + (1 - b2) d for h in bfloat16; d in float32, or NULL for zero. */
CLONES static void average(bfloat16 *restrict h, const float *restrict d, int64_t n, uint64_t key, float b2,
                           float rest) {
  for (int64_t i = 0; i < n; ++i)
    h[i] = stochastic_bf16(b2 * from_bf16(h[i]) + rest * d[i], noise_of(key, (uint32_t)i) & 0xFFFFu);
}
CLONES static void decay(bfloat16 *restrict h, int64_t n, uint64_t key, float b2) {
  for (int64_t i = 0; i < n; ++i)
    h[i] = stochastic_bf16(b2 * from_bf16(h[i]), noise_of(key, (uint32_t)i) & 0xFFFFu);
}
EXPORT void sophia_average(void *h, const void *d, int64_t n, uint64_t key, double b2, double rest) {
  if (d)
    average((bfloat16 *)h, (const float *)d, n, key, (float)b2, (float)rest);
  else
    decay((bfloat16 *)h, n, key, (float)b2);
}
