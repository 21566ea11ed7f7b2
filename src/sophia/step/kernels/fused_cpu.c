/* The Sophia step in one pass over memory of a CPU.
 *
 * The rule is that of update_rule.py in the form of foreach.py:
 *     m <- b1 m + (1 - b1) g;   d = max(gamma h, floor, |u|);   p <- decay p - lr u / d
 * where u = m and floor = eps, or, by the damped rule, u looks a step ahead and the floor is relative to its rms
 * in the step before; the sum of its squares is taken on the way, for the step after. It reads p, g, m, h and writes p, m: six words a parameter, where AdamW moves seven. It is written once, as a
 * macro, for all dtypes.
 *
 * The tensors are walked through as one long array, in pieces; a call does those that begin in [begin, end) of
 * it, so that threads can share the work whatever the sizes of the tensors are. No dependency, not even on OpenMP: two
 * OpenMP runtimes in one process are a known source of trouble, and torch brings its own.
 *
 * Compile with -O3 -fno-trapping-math -fno-math-errno -ffp-contract=off: without contraction the vector loop and
 * its remainder round alike, so the result is the same with every width of vectors. (Never
 * with -ffast-math: linking with it makes some compilers switch the whole process to flush-to-zero.)
 */
#include <math.h>

#include "numbers.h"

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
  double started; /* rms(u) is kept divided by this, which is its own for every step */
} Settings;

/* ---- the noise of rounding ---- */

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

#define PIECE 16384 /* elements that one thread does at a time; fused_cpu.py has it too */
#define LINE 16     /* accumulators of a sum, so that it is the same at every width of vectors */

/* NAME: of the loop. REAL: type of the arithmetic, and of sizes in memory. WEIGHT and STATE: of p and g, of m
 * and h, in memory. FROM_*: memory to REAL. TO_*: REAL to memory; the second argument is noise, for stochastic
 * rounding. */
#define SPAN(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                   \
  typedef struct {                                                                                              \
    REAL b1, a, lr, decay, gamma, ahead, least;                                                                 \
    uint64_t key;                                                                                               \
  } NAME##_numbers;                                                                                             \
  INLINE NAME##_numbers NAME##_rounded(const Settings *s, double least, uint64_t key) {                         \
    return (NAME##_numbers){(REAL)s->beta1, (REAL)s->gradient, (REAL)s->lr,  (REAL)s->decay,                    \
                            (REAL)s->gamma, (REAL)s->ahead,    (REAL)least, key};                               \
  }                                                                                                             \
  /* One element, whose number is the element beside its place i, as an index of 64 bits would have to be       \
   * narrowed in every vector; returns u. */                                                                    \
  INLINE REAL NAME##_at(WEIGHT *restrict p, const WEIGHT *restrict g, STATE *restrict m, const STATE *restrict h, \
                        int64_t i, uint32_t element, const int damped, NAME##_numbers c) {                      \
    const uint32_t noise = noise_of(c.key, element); /* not computed where it is not used */                    \
    const REAL gi = FROM_WEIGHT(g[i]), mi = c.b1 * FROM_STATE(m[i]) + c.a * gi;                                 \
    const REAL u = damped ? c.b1 * mi + c.ahead * gi : mi;                                                      \
    const REAL size = (REAL)fabs(u);                                                                            \
    REAL d = c.gamma * FROM_STATE(h[i]);                                                                        \
    d = d > c.least ? d : c.least;                                                                              \
    d = size > d ? size : d;                                                                                    \
    m[i] = TO_STATE(mi, noise & 0xFFFFu);                                                                       \
    p[i] = TO_WEIGHT(c.decay * FROM_WEIGHT(p[i]) - c.lr * (u / d), noise >> 16);                                \
    return u;                                                                                                   \
  }                                                                                                             \
  CLONES static void NAME(WEIGHT *restrict p, const WEIGHT *restrict g, STATE *restrict m,                      \
                          const STATE *restrict h, int64_t n, uint64_t key, double least,                       \
                          const Settings *settings) {                                                           \
    const NAME##_numbers numbers = NAME##_rounded(settings, least, key);                                        \
    uint32_t element = 0;                                                                                       \
    for (int64_t i = 0; i < n; ++i) NAME##_at(p, g, m, h, i, element++, 0, numbers);                            \
  }                                                                                                             \
  /* A step of the damped rule; returns the sum of u^2. */                                                      \
  CLONES static double NAME##_damped(WEIGHT *restrict p, const WEIGHT *restrict g, STATE *restrict m,           \
                                     const STATE *restrict h, int64_t n, uint64_t key, double least,            \
                                     const Settings *settings) {                                                \
    const NAME##_numbers numbers = NAME##_rounded(settings, least, key);                                        \
    REAL some[LINE] = {0};                                                                                      \
    double sum = 0;                                                                                             \
    int64_t i = 0;                                                                                              \
    for (; i + LINE <= n; i += LINE)                                                                            \
      for (int j = 0; j < LINE; ++j) {                                                                          \
        const REAL u = NAME##_at(p, g, m, h, i + j, (uint32_t)i + (uint32_t)j, 1, numbers);                     \
        some[j] += u * u;                                                                                       \
      }                                                                                                         \
    for (int j = 0; i + j < n; ++j) {                                                                           \
      const REAL u = NAME##_at(p, g, m, h, i + j, (uint32_t)(i + j), 1, numbers);                               \
      some[j] += u * u;                                                                                         \
    }                                                                                                           \
    for (int j = 0; j < LINE; ++j) sum += (double)some[j];                                                      \
    return sum;                                                                                                 \
  }                                                                                                             \
  /* The sum of u^2 before a step: where no step before tells. It happens once, so it need not be fast. */      \
  static double NAME##_squares(const WEIGHT *g, const STATE *m, int64_t n, const Settings *settings) {          \
    const NAME##_numbers c = NAME##_rounded(settings, 0, 0);                                                    \
    double sum = 0;                                                                                             \
    for (int64_t i = 0; i < n; ++i) {                                                                           \
      const REAL gi = FROM_WEIGHT(g[i]), u = c.b1 * (c.b1 * FROM_STATE(m[i]) + c.a * gi) + c.ahead * gi;        \
      sum += (double)u * (double)u;                                                                             \
    }                                                                                                           \
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

/* What this library and fused_cpu.py must agree on; one higher with each change of it. */
EXPORT int32_t sophia_version(void) { return 5; }

/* For the damped rule, before sophia_step: the floor of the denominators of each tensor. size[t]: address of
 * its rms(u) / started in the step before, a number of the arithmetic; 0 if there was none. The rest as below. */
EXPORT void sophia_floors(int32_t dtypes, int64_t tensors, const int64_t *length, void *const *g, void *const *m,
                          void *const *size, double *least, const Settings *settings) {
  for (int64_t t = 0; t < tensors; ++t) {
    double rms = 0;
#define FLOOR(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                  \
  case NUMBER:                                                                                                  \
    rms = (double)*(const REAL *)size[t] * settings->started;                                                   \
    if (!(rms > 0) && length[t])                                                                                \
      rms = sqrt(NAME##_squares((const WEIGHT *)g[t], (const STATE *)m[t], length[t], settings) /               \
                 (double)length[t]);                                                                            \
    break;
    switch (dtypes) {
      EACH(FLOOR)
    }
    rms *= settings->damping;
    least[t] = rms < settings->eps ? settings->eps : rms; /* what is no number stays none */
  }
}

/* dtypes: which of the loops. tensors: how many; length[t]: elements of tensor t; p, g, m, h: their addresses.
 * key[t]: of its noise, or NULL where nothing is rounded stochastically. least[t]: by the damped rule, the floor
 * of its denominators; sum: then of u^2, a number for each piece of all tensors in order. Else both NULL. */
EXPORT void sophia_step(int32_t dtypes, int64_t tensors, const int64_t *length, void *const *p, void *const *g,
                        void *const *m, void *const *h, const uint64_t *key, const double *least, double *sum,
                        int64_t begin, int64_t end, const Settings *settings) {
  int64_t first = 0, pieces = 0; /* before tensor t */
  for (int64_t t = 0; t < tensors && first < end; first += length[t], pieces += (length[t++] + PIECE - 1) / PIECE) {
    for (int64_t piece = begin > first ? (begin - first + PIECE - 1) / PIECE : 0;
         piece * PIECE < length[t] && first + piece * PIECE < end; ++piece) {
      const int64_t from = piece * PIECE, count = length[t] - from < PIECE ? length[t] - from : PIECE;
      /* The lower word counts the elements, without a carry into the upper. */
      const uint64_t whole = key ? key[t] : 0;
      const uint64_t here = (whole & 0xFFFFFFFF00000000u) | (uint32_t)(whole + (uint64_t)from);
#define CASE(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                   \
  case NUMBER: {                                                                                                \
    WEIGHT *const pt = (WEIGHT *)p[t] + from;                                                                   \
    STATE *const mt = (STATE *)m[t] + from;                                                                     \
    const WEIGHT *const gt = (const WEIGHT *)g[t] + from;                                                       \
    const STATE *const ht = (const STATE *)h[t] + from;                                                         \
    if (least)                                                                                                  \
      sum[pieces + piece] = NAME##_damped(pt, gt, mt, ht, count, here, least[t], settings);                     \
    else                                                                                                        \
      NAME(pt, gt, mt, ht, count, here, settings->eps, settings);                                               \
  } break;
      switch (dtypes) {
        EACH(CASE)
      }
    }
  }
}

/* After it: size[t] for the next step. */
EXPORT void sophia_sizes(int32_t dtypes, int64_t tensors, const int64_t *length, void *const *size,
                         const double *sum, const Settings *settings) {
  for (int64_t t = 0; t < tensors; ++t) {
    double squares = 0;
    for (int64_t piece = 0; piece * PIECE < length[t]; ++piece) squares += *sum++;
    const double rms = length[t] ? sqrt(squares / (double)length[t]) / settings->started : 0;
#define SIZE(NUMBER, NAME, REAL, WEIGHT, FROM_WEIGHT, TO_WEIGHT, STATE, FROM_STATE, TO_STATE)                   \
  case NUMBER:                                                                                                  \
    *(REAL *)size[t] = (REAL)rms;                                                                               \
    break;
    switch (dtypes) {
      EACH(SIZE)
    }
  }
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
