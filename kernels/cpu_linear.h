/* Linear layers of few rows, y = x W^T + b: weights as they are stored, and the calls that multiply by them. */
#pragma once
#include <stdint.h>

enum { LINEAR_F32, LINEAR_BF16, LINEAR_INT8, LINEAR_KINDS }; /* kinds of weights, as kernels/linear.py numbers them */

/* LINEAR_F32 and LINEAR_BF16: data [rows][cols]. LINEAR_INT8: data [rows][blocks][width] int8, cols filled up by
 * zeros to as few blocks of 256 at most as there may be; scales [rows][blocks][8] bfloat16, column c of a block having
 * scale (c mod 16) / 2. */
typedef struct {
    const void *data;
    const void *scales;
    int64_t rows, cols, kind;
} Weight;

/* out [n][ldo] = (add ? out : 0) + x [n][ldx] W^T + bias (or NULL), on up to `threads` threads; `scratch` has
 * kvcc_linear_scratch(cols, n, threads) bytes. Returns 0, or 1 for an unknown kind. */
int kvcc_linear(const Weight *w, const float *x, int64_t ldx, int64_t n, float *out, int64_t ldo, const float *bias,
                int add, int threads, void *scratch);
int64_t kvcc_linear_scratch(int64_t cols, int64_t n, int64_t threads);
