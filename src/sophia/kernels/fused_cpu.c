/* The Sophia step in one pass over memory, for float32 on a CPU.
 *
 * The rule is that of update_rule.py in the form of foreach.py:
 *     m <- b1 m + (1 - b1) g;   d = max(gamma h, eps, |m|);   p <- decay p - lr m / d
 * It reads p, g, m, h and writes p, m: six words a parameter, where AdamW moves seven.
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

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

CLONES static void span(float *restrict p, const float *restrict g, float *restrict m, const float *restrict h,
                        int64_t n, float sign, float b1, float lr, float decay, float gamma, float eps) {
  const float a = sign * (1.0f - b1);
  for (int64_t i = 0; i < n; ++i) {
    const float mi = b1 * m[i] + a * g[i];
    const float size = fabsf(mi);
    float d = gamma * h[i];
    d = d > eps ? d : eps;
    d = d > size ? d : size;
    m[i] = mi;
    p[i] = decay * p[i] - lr * (mi / d);
  }
}

/* tensors: how many; length[t]: elements of tensor t; p, g, m, h: their addresses. */
EXPORT void sophia_step(int64_t tensors, const int64_t *length, float *const *p, float *const *g, float *const *m,
                        float *const *h, int64_t begin, int64_t end, float sign, float b1, float lr, float decay,
                        float gamma, float eps) {
  int64_t first = 0; /* of tensor t, in the long array */
  for (int64_t t = 0; t < tensors && first < end; first += length[t++]) {
    const int64_t from = begin > first ? begin - first : 0;
    const int64_t to = end - first < length[t] ? end - first : length[t];
    if (from < to)
      span(p[t] + from, g[t] + from, m[t] + from, h[t] + from, to - from, sign, b1, lr, decay, gamma, eps);
  }
}
