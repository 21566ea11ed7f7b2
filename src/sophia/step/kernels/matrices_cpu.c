/* What a step of a hidden matrix does beside its products, in three passes over memory of a CPU: momentum and the
 * squares of its rows and columns; the scaled momentum in bfloat16, which the products take; and the move.
 *
 *     m <- b1 m + a g,   u = b1 m + a g:   rows_i = sum_j u_ij^2,   columns_j = sum_i u_ij^2
 *     y_ij = r_i (lift u_ij) c_j
 *     p_ij <- decay p_ij - r_i d_ij c_j
 *
 * p, g, m are float32, (rows, columns), contiguous; a call does the rows in [begin, end), so that threads can share
 * the work. Sums are of doubles: squares of what is left of an old momentum would be zero in float32. Compile as
 * fused_cpu.c.
 */
#include "numbers.h"

#define LINE 16 /* accumulators of a sum, so that it is the same at every width of vectors */

CLONES static double row_squares(float *restrict m, const float *restrict g, double *restrict sum, int64_t n,
                                 float b1, float a) {
  double some[LINE] = {0}, whole = 0;
  int64_t j = 0;
  for (; j + LINE <= n; j += LINE)
    for (int k = 0; k < LINE; ++k) {
      const float gi = g[j + k], mi = b1 * m[j + k] + a * gi;
      const double u = b1 * mi + a * gi, square = u * u;
      m[j + k] = mi;
      sum[j + k] += square;
      some[k] += square;
    }
  for (; j < n; ++j) {
    const float gi = g[j], mi = b1 * m[j] + a * gi;
    const double u = b1 * mi + a * gi, square = u * u;
    m[j] = mi;
    sum[j] += square;
    some[0] += square;
  }
  for (int k = 0; k < LINE; ++k) whole += some[k];
  return whole;
}

/* column: of this call's rows alone. */
EXPORT void sophia_matrix_squares(float *m, const float *g, int64_t columns, int64_t begin, int64_t end, double b1,
                                  double a, double *row, double *column) {
  memset(column, 0, (size_t)columns * sizeof *column);
  for (int64_t i = begin; i < end; ++i)
    row[i] = row_squares(m + i * columns, g + i * columns, column, columns, (float)b1, (float)a);
}

CLONES static void scaled_row(bfloat16 *restrict y, const float *restrict m, const float *restrict g,
                              const float *restrict c, int64_t n, float b1, float a, float r, float lift) {
  for (int64_t j = 0; j < n; ++j) y[j] = nearest_bf16((b1 * m[j] + a * g[j]) * lift * r * c[j], 0);
}

/* lift: a power of two that brings u to a norm of about 1, first: r would leave the range of float32 with it. */
EXPORT void sophia_matrix_scaled(bfloat16 *y, const float *m, const float *g, int64_t columns, int64_t begin,
                                 int64_t end, double b1, double a, double lift, const float *r, const float *c) {
  for (int64_t i = begin; i < end; ++i)
    scaled_row(y + i * columns, m + i * columns, g + i * columns, c, columns, (float)b1, (float)a, r[i],
               (float)lift);
}

CLONES static double direction_squares(const bfloat16 *restrict d, const float *restrict c, int64_t n) {
  float some[LINE] = {0};
  double whole = 0;
  int64_t j = 0;
  for (; j + LINE <= n; j += LINE)
    for (int k = 0; k < LINE; ++k) {
      const float x = from_bf16(d[j + k]) * c[j + k];
      some[k] += x * x;
    }
  for (; j < n; ++j) {
    const float x = from_bf16(d[j]) * c[j];
    some[0] += x * x;
  }
  for (int k = 0; k < LINE; ++k) whole += (double)some[k];
  return whole;
}

/* row[i]: sum over j of (r_i d_ij c_j)^2. */
EXPORT void sophia_matrix_norms(const bfloat16 *d, int64_t columns, int64_t begin, int64_t end, const float *r,
                                const float *c, double *row) {
  for (int64_t i = begin; i < end; ++i)
    row[i] = (double)r[i] * (double)r[i] * direction_squares(d + i * columns, c, columns);
}

CLONES static void move_row(float *restrict p, const bfloat16 *restrict d, const float *restrict c, int64_t n,
                            float decay, float r) {
  for (int64_t j = 0; j < n; ++j) p[j] = decay * p[j] - r * (from_bf16(d[j]) * c[j]);
}

EXPORT void sophia_matrix_move(float *p, const bfloat16 *d, int64_t columns, int64_t begin, int64_t end,
                               double decay, const float *r, const float *c) {
  for (int64_t i = begin; i < end; ++i)
    move_row(p + i * columns, d + i * columns, c, columns, (float)decay, r[i]);
}
