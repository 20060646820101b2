/* Linear layers of few rows: y = x W^T + b at the speed at which W is read. Called by kernels/linear.py and cpu_step.c.
 *
 * W lies row by row, as models store it, and is read once: a tile of a few of its rows is multiplied by all rows of
 * x before the next tile, which is prefetched meanwhile. Sums run along the rows of both, VL lanes at a time.
 *
 * int8 weights meet x as int16, one scale a row: products of pairs are summed exactly in int32 within a group, which
 * takes half the instructions of float multiply-adds, and costs no accuracy to speak of.
 */
#include "cpu_linear.h"

#include "cpu_vectors.h"

enum { GROUP = 32, LINE = 64, PART = 16, SMALL = 1 << 16, SUMS = 12 };

typedef struct {
    const Weight *w;
    const float *x;
    i64 ldx, n;
    float *out;
    i64 ldo;
    const float *bias;
    int add;
    const int16_t *q;   /* int8 weights: x as integers [n][groups * GROUP] */
    const float *units; /* and what one of them is worth [n] */
} Call;

/* ---- sums of many vectors ---------------------------------------------------------------------------------- */

INLINE void sums_of(const int count, const vf *v, float *out) {
    int i = 0;
#if VL == 8 && defined(__AVX2__)
#pragma GCC unroll 4
    for (; i + 4 <= count; i += 4) {
        __m256 ab = _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]), cd = _mm256_hadd_ps((__m256)v[i + 2], (__m256)v[i + 3]);
        __m256 all = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
#endif
#pragma GCC unroll 32
    for (; i < count; i++) out[i] = sum(v[i]);
}

/* ---- float32 and bfloat16 weights --------------------------------------------------------------------------- */

INLINE void prefetch(const char *p, i64 bytes) {
    for (i64 i = 0; i < bytes; i += LINE) __builtin_prefetch(p + i, 0, 3);
}

/* sums[j][r] = x row j times W row r, for X rows of x and R of W; `step` bytes at `ahead` are prefetched for every
 * line that is read of each row of W. */
INLINE void float_tile(const int type, const int R, const int X, const char *w, i64 ldw, const float *x, i64 ldx,
                       i64 cols, const char *ahead, i64 step, float *sums) {
    const int unroll = LINE / (VL * (int)size_of(type)); /* vectors of a line */
    vf acc[SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < X * R; i++) acc[i] = (vf){0};
#define COLUMNS(at)                                                                        \
    {                                                                                      \
        vf y[4];                                                                           \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) y[r] = vector_at(type, w, r * ldw + (at)); \
        _Pragma("GCC unroll 8") for (int j = 0; j < X; j++) {                              \
            vf z = load(x + j * ldx + (at));                                               \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) acc[j * R + r] += z * y[r]; \
        }                                                                                  \
    }
    i64 i = 0;
    for (; i + unroll * VL <= cols; i += unroll * VL, ahead += step) {
        prefetch(ahead, step);
#pragma GCC unroll 4
        for (int u = 0; u < unroll; u++) COLUMNS(i + u * VL)
    }
    for (; i + VL <= cols; i += VL) COLUMNS(i)
#undef COLUMNS
    sums_of(X * R, acc, sums);
    for (; i < cols; i++)
        for (int j = 0; j < X; j++)
            for (int r = 0; r < R; r++) sums[j * R + r] += x[j * ldx + i] * scalar_at(type, w, r * ldw + i);
}

/* ---- int8 weights ------------------------------------------------------------------------------------------- */

typedef int16_t vs __attribute__((vector_size(4 * VL)));
typedef vs vs_at __attribute__((aligned(2), may_alias));
typedef int16_t vq __attribute__((vector_size(2 * VL)));
typedef vq vq_at __attribute__((aligned(2), may_alias));
typedef int8_t vc __attribute__((vector_size(2 * VL)));
typedef vc vc_at __attribute__((aligned(1), may_alias));

/* 2 VL bytes as int16. */
INLINE vs widened(const int8_t *p) {
#if VL == 8 && defined(__AVX2__)
    return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#elif VL == 16 && defined(__AVX512BW__)
    return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#else
    return __builtin_convertvector(*(const vc_at *)p, vs);
#endif
}

/* acc + products of neighbours, summed in pairs. */
INLINE vi add_pairs(vi acc, vs a, vs b) {
#if VL == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif VL == 8 && defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif VL == 16 && defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VL == 8 && defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    vi x = (vi)a, y = (vi)b; /* the odd ones are the upper halves, in either byte order of the pair */
    return acc + (x >> 16) * (y >> 16) + (x << 16 >> 16) * (y << 16 >> 16);
#endif
}

/* The sums of one group: in it, sums are exact. */
INLINE void int8_group(const int R, const int X, const int8_t *w, i64 ld, const char *scales, i64 scales_ld,
                       const int16_t *q, vf *acc) {
    enum { STEPS = GROUP / (2 * VL) };
    vi part[SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < X * R; i++) part[i] = (vi){0};
#pragma GCC unroll 4
    for (int u = 0; u < STEPS; u++) {
        vs y[4];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) y[r] = widened(w + r * ld + u * 2 * VL);
#pragma GCC unroll 8
        for (int j = 0; j < X; j++) {
            vs z = *(const vs_at *)(q + j * ld + u * 2 * VL);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) part[j * R + r] = add_pairs(part[j * R + r], y[r], z);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        vf scale = broadcast(scalar_at(BF16, scales, r * scales_ld));
#pragma GCC unroll 8
        for (int j = 0; j < X; j++) acc[j * R + r] += __builtin_convertvector(part[j * R + r], vf) * scale;
    }
}

/* As float_tile, without the units of x. */
INLINE void int8_tile(const int R, const int X, const int8_t *w, const char *scales, i64 groups, const int16_t *q,
                      const char *ahead, i64 step, float *sums) {
    const i64 ld = groups * GROUP;
    vf acc[SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < X * R; i++) acc[i] = (vf){0};
    i64 g = 0;
    for (; g + 2 <= groups; g += 2, ahead += step) {
        prefetch(ahead, step);
        int8_group(R, X, w + g * GROUP, ld, scales + 2 * g, groups, q + g * GROUP, acc);
        int8_group(R, X, w + (g + 1) * GROUP, ld, scales + 2 * g + 2, groups, q + (g + 1) * GROUP, acc);
    }
    if (g < groups) int8_group(R, X, w + g * GROUP, ld, scales + 2 * g, groups, q + g * GROUP, acc);
    sums_of(X * R, acc, sums);
}

/* One row of x as int16, filled up with zeros to whole groups; returns what 1 is worth. */
static float quantise(const float *x, i64 cols, int16_t *q) {
    vf most = {0};
    i64 i = 0, filled = ROUND_UP(cols, GROUP);
    for (; i + VL <= cols; i += VL) most = vmax(most, vmax(load(x + i), -load(x + i)));
    float top = largest(most);
    for (; i < cols; i++) top = MAX(top, fabsf(x[i]));
    float inverse = top > 0 ? 32767.0f / top : 0.0f;
    const float shift = 12582912.0f; /* 1.5 * 2^23: rounds to an integer, which lies in the low bits */
    for (i = 0; i + VL <= cols; i += VL) {
        vi rounded = (vi)(load(x + i) * inverse + shift) - 0x4B400000;
        *(vq_at *)(q + i) = __builtin_convertvector(rounded, vq);
    }
    for (; i < cols; i++) q[i] = (int16_t)lrintf(x[i] * inverse);
    for (; i < filled; i++) q[i] = 0;
    return top / 32767.0f;
}

/* ---- tiles over a range of rows ----------------------------------------------------------------------------- */

/* What a tile works on: rows of W from `row`, of x from `j`, and what it prefetches meanwhile. */
typedef struct {
    i64 row, j, step;
    const char *ahead;
} At;
typedef void Tile(const Call *c, At at, float *sums);

#define FLOAT_TILE(type, R, X)                                                                                  \
    static __attribute__((noinline)) void type##_##R##_##X(const Call *c, At at, float *sums) {                 \
        const i64 ld = c->w->cols;                                                                              \
        const char *w = (const char *)c->w->data + at.row * ld * size_of(type);                                 \
        float_tile(type, R, X, w, ld, c->x + at.j * c->ldx, c->ldx, ld, at.ahead, at.step, sums);               \
    }
#define F32_TILE(R, X) FLOAT_TILE(F32, R, X)
#define BF16_TILE(R, X) FLOAT_TILE(BF16, R, X)
#define INT8_TILE(R, X)                                                                                         \
    static __attribute__((noinline)) void INT8_##R##_##X(const Call *c, At at, float *sums) {                   \
        const i64 groups = ROUND_UP(c->w->cols, GROUP) / GROUP, ld = groups * GROUP;                            \
        const int8_t *w = (const int8_t *)c->w->data + at.row * ld;                                             \
        const char *scales = (const char *)c->w->scales + at.row * groups * 2;                                  \
        int8_tile(R, X, w, scales, groups, c->q + at.j * ld, at.ahead, at.step, sums);                          \
    }
#define TILES(tile)                                                                                             \
    tile(4, 1) tile(1, 1) tile(4, 2) tile(1, 2) tile(4, 3) tile(1, 3) tile(3, 4) tile(1, 4)
TILES(F32_TILE)
TILES(BF16_TILE)
INT8_TILE(4, 1) INT8_TILE(1, 1) INT8_TILE(3, 2) INT8_TILE(1, 2) INT8_TILE(2, 3) INT8_TILE(1, 3)

typedef struct {
    i64 rows; /* of W */
    Tile *tile, *single;
} Shape;

/* For 1, 2, 3 and 4 rows of x, as many of W as there are registers for sums. */
enum { MOST = 4, BLOCK = 12 };
static const Shape shapes[LINEAR_KINDS][MOST] = {
    {{4, F32_4_1, F32_1_1}, {4, F32_4_2, F32_1_2}, {4, F32_4_3, F32_1_3}, {3, F32_3_4, F32_1_4}},
    {{4, BF16_4_1, BF16_1_1}, {4, BF16_4_2, BF16_1_2}, {4, BF16_4_3, BF16_1_3}, {3, BF16_3_4, BF16_1_4}},
    {{4, INT8_4_1, INT8_1_1}, {3, INT8_3_2, INT8_1_2}, {2, INT8_2_3, INT8_1_3}, {0}},
};

/* Put the sums of a tile where they belong. */
static void finish(const Call *c, At at, i64 rows, i64 count, const float *sums) {
    for (i64 k = 0; k < count; k++) {
        float *out = c->out + (at.j + k) * c->ldo + at.row, unit = c->units ? c->units[at.j + k] : 1.0f;
        for (i64 r = 0; r < rows; r++) {
            float y = sums[k * rows + r] * unit + (c->bias ? c->bias[at.row + r] : 0.0f);
            out[r] = c->add ? out[r] + y : y;
        }
    }
}

/* How many rows of x the next tile takes of `left`: the most, but leaving no lone one. */
static i64 take(i64 left, i64 most) { return left == most + 1 ? most - 1 : MIN(left, most); }

static i64 row_bytes(const Weight *w) {
    return w->kind == LINEAR_F32 ? w->cols * 4 : w->kind == LINEAR_BF16 ? w->cols * 2 : ROUND_UP(w->cols, GROUP);
}

/* Rows `from` to `to` of W: blocks of rows by tiles of x, so that both stay in the first caches. */
static void rows_of(const Call *c, i64 from, i64 to) {
    const Shape *shape = shapes[c->w->kind];
    const i64 most = shape[MOST - 1].tile ? MOST : MOST - 1, passes = (c->n + most - 1) / most;
    const i64 bytes = row_bytes(c->w);
    float sums[SUMS];
    for (i64 row = from; row < to; row += BLOCK) {
        const i64 end = MIN(row + BLOCK, to);
        const char *next = (const char *)c->w->data + end * bytes;
        for (i64 j = 0, count; j < c->n; j += count) {
            count = take(c->n - j, most);
            const Shape *s = &shape[count - 1];
            At at = {row, j, s->rows * LINE / passes, next};
            for (i64 rows; at.row < end; at.row += rows) {
                rows = at.row + s->rows <= end ? s->rows : 1;
                (rows > 1 ? s->tile : s->single)(c, at, sums);
                finish(c, at, rows, count, sums);
                at.ahead += rows * bytes / passes;
            }
            next += (end - row) * bytes / passes;
        }
    }
}

/* ---- entries ------------------------------------------------------------------------------------------------ */

int64_t kvcc_linear_scratch(int64_t cols, int64_t n, int64_t threads) {
    (void)threads;
    return n * (2 * ROUND_UP(cols, GROUP) + 4) + LINE;
}

int kvcc_linear(const Weight *w, const float *x, i64 ldx, i64 n, float *out, i64 ldo, const float *bias, int add,
                int threads, void *scratch) {
    if (w->kind < 0 || w->kind >= LINEAR_KINDS) return 1;
    Call c = {.w = w, .x = x, .ldx = ldx, .n = n, .out = out, .ldo = ldo, .bias = bias, .add = add};
    if (w->kind == LINEAR_INT8) {
        const i64 filled = ROUND_UP(w->cols, GROUP);
        int16_t *q = (int16_t *)(((uintptr_t)scratch + LINE - 1) / LINE * LINE);
        float *units = (float *)(q + n * filled);
        for (i64 i = 0; i < n; i++) units[i] = quantise(x + i * ldx, w->cols, q + i * filled);
        c.q = q, c.units = units;
    }
    const i64 parts = n * row_bytes(w) * w->rows < SMALL ? 1 : MAX(threads, 1);
    const i64 part = ROUND_UP((w->rows + parts - 1) / parts, PART);
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (i64 i = 0; i < parts; i++) rows_of(&c, MIN(i * part, w->rows), MIN((i + 1) * part, w->rows));
    return 0;
}
