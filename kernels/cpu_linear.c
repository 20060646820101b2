/* Linear layers of few rows: y = x W^T + b at the speed at which W is read. Called by kernels/linear.py and cpu_step.c.
 *
 * W lies row by row, as models store it. Four of its rows at a time meet up to three rows of x, so that every sum has
 * a register; sums run along the rows, VL lanes at a time. While these four rows are used, the next are prefetched.
 * x is put in the order in which it is read, once a call.
 *
 * bfloat16: a vector of 2 VL weights is two of float32 by a shift and a mask, the even columns and the odd ones, and
 * x is parted likewise.
 * int8: x is rounded to int16, with one scale a row, and products of neighbours are summed exactly in int32. That
 * takes fewer instructions than float32, and loses a thousandth of what int8 weights lose. A lane is a group: the
 * weights of a block that meet in one of 8 lanes share a scale, so that one vector of scales serves a whole block.
 */
#include "cpu_linear.h"

#include "cpu_vectors.h"

enum {
    ROWS = 4,            /* of W in a tile */
    MOST = 3,            /* rows of x in a tile */
    CHUNK = 2 * VL,      /* columns read at a time */
    LANES = 8,           /* groups of a block of int8 weights */
    BLOCK = 256,         /* most columns of such a block, */
    STEP = 32,           /* which are a multiple of this */
    SPAN = 3 * BLOCK,    /* columns after which rows of x change: what is read stays in the first cache */
    TURN = 96,           /* rows of x that all meet W before the others do: they stay in the second cache */
    WORTH_WIDENING = 3,  /* tiles of x from which bfloat16 weights are widened once for all of them */
    LINE = 64,           /* bytes of a cache line */
    SMALL = 1 << 16,     /* weights times rows of x below which one thread is faster */
};

typedef int16_t vs __attribute__((vector_size(4 * VL)));
typedef int8_t vc __attribute__((vector_size(2 * VL)));
typedef int16_t vq __attribute__((vector_size(2 * VL)));
typedef float v4 __attribute__((vector_size(16)));
typedef vc vc_at __attribute__((aligned(1), may_alias));
typedef vi vi_at __attribute__((aligned(1), may_alias));
typedef vq vq_at __attribute__((aligned(2), may_alias));
typedef v4 v4_at __attribute__((aligned(4), may_alias));

typedef struct {
    const Weight *w;
    const float *x;
    i64 ldx, n;
    float *out;
    i64 ldo;
    const float *bias;
    int add;
    i64 filled;   /* columns of `packed` */
    i64 width;    /* of a block; the columns of a line for floats */
    i64 passes;   /* tiles that cover x */
    char *packed; /* x in the order of use: tiles of rows, chunks, rows, elements */
    float *units; /* int8: what 1 is worth in a row of x [n] */
} Call;

/* How many rows of x the tile at row j takes: the most, but of 4 two, so that none is alone. */
INLINE i64 taken(const Call *c, i64 j) { return c->n - j == 4 ? 2 : MIN(c->n - j, MOST); }

/* ---- x as tiles read it ------------------------------------------------------------------------------------- */

/* Rows `first` up to first + X of x. */
static void pack_floats(const Call *c, i64 first, i64 X) {
    float *to = (float *)(c->packed + first * c->filled * 4);
    const int parted = c->w->kind == LINEAR_BF16;
    for (i64 at = 0; at < c->filled; at += CHUNK)
        for (i64 j = 0; j < X; j++) {
            const float *from = c->x + (first + j) * c->ldx + at;
            float *low = to + at * X + j * VL, *high = low + X * VL, last[CHUNK] = {0};
            if (at + CHUNK > c->w->cols) {
                memcpy(last, from, 4 * MAX(c->w->cols - at, 0));
                from = last;
            }
            for (int i = 0; i < VL; i++) {
                low[i] = from[parted ? 2 * i : i];
                high[i] = from[parted ? 2 * i + 1 : VL + i];
            }
        }
}

static void pack_integers(const Call *c, i64 first, i64 X) {
    int16_t *to = (int16_t *)(c->packed + first * c->filled * 2);
    for (i64 j = 0; j < X; j++) {
        const float *x = c->x + (first + j) * c->ldx;
        const i64 cols = c->w->cols;
        vf most = {0};
        i64 i = 0;
        for (; i + VL <= cols; i += VL) most = vmax(most, vmax(load(x + i), -load(x + i)));
        float top = largest(most);
        for (; i < cols; i++) top = MAX(top, fabsf(x[i]));
        const float inverse = top > 0 ? 32767.0f / top : 0.0f, shift = 12582912.0f; /* 1.5 * 2^23 rounds to an integer */
        c->units[first + j] = top / 32767.0f;
        for (i64 at = 0; at < c->filled; at += VL) {
            vf y = {0};
            if (at + VL <= cols)
                y = load(x + at);
            else
                memcpy(&y, x + at, 4 * MAX(cols - at, 0));
            vi rounded = (vi)(y * inverse + shift) - 0x4B400000;
            *(vq_at *)(to + at / CHUNK * CHUNK * X + j * CHUNK + at % CHUNK) = __builtin_convertvector(rounded, vq);
        }
    }
}

/* ---- tiles -------------------------------------------------------------------------------------------------- */

/* acc += a * b. Compilers spill sums when they may choose which operand to overwrite. */
#if defined(__x86_64__) && defined(__FMA__) && (VL == 8 || defined(__AVX512F__))
#define MULTIPLY_ADD(acc, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b))
#else
#define MULTIPLY_ADD(acc, a, b) acc += (a) * (b)
#endif

INLINE void prefetch(const char *p, i64 bytes) {
    for (i64 i = 0; i < bytes; i += LINE) __builtin_prefetch(p + i, 0, 3);
}

/* Column `at` and those after it of a row of bytes; zeros after `left` bytes. */
INLINE vi raw(const int whole, const char *p, i64 left) {
    if (whole) return *(const vi_at *)p;
    vi x = {0};
    memcpy(&x, p, MAX(MIN(left, (i64)sizeof x), 0));
    return x;
}

INLINE void float_chunk(const int kind, const int R, const int X, const int whole, const char *w, i64 ld,
                        const float *x, i64 left, vf *acc) {
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        vf z[MOST];
#pragma GCC unroll 4
        for (int j = 0; j < X; j++) z[j] = load(x + (part * X + j) * VL);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vf y;
            if (kind == LINEAR_F32)
                y = (vf)raw(whole, w + r * ld + part * 4 * VL, left - part * 4 * VL);
            else if (part)
                y = (vf)(raw(whole, w + r * ld, left) & (int32_t)0xffff0000);
            else
                y = (vf)(raw(whole, w + r * ld, left) << 16);
#pragma GCC unroll 4
            for (int j = 0; j < X; j++) MULTIPLY_ADD(acc[j * R + r], z[j], y);
        }
    }
}

/* acc[j * R + r] = sums of x row j times W row r, for X rows of x and R of W; `step` bytes of `ahead` a chunk are
 * prefetched. */
INLINE void float_tile(const int kind, const int R, const int X, const char *w, i64 ld, const float *x, i64 cols,
                       const char *ahead, i64 step, vf *acc) {
    const i64 size = kind == LINEAR_F32 ? 4 : 2;
#pragma GCC unroll 16
    for (int i = 0; i < X * R; i++) acc[i] = (vf){0};
    i64 i = 0;
    for (; i + CHUNK <= cols; i += CHUNK, ahead += step) {
        prefetch(ahead, step);
        float_chunk(kind, R, X, 1, w + i * size, ld, x + i * X, 0, acc);
    }
    if (i < cols) float_chunk(kind, R, X, 0, w + i * size, ld, x + i * X, (cols - i) * size, acc);
}

/* 2 VL bytes as int16. */
INLINE vs widened(const char *p) {
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
    vi x = (vi)a, y = (vi)b;
    return acc + (x >> 16) * (y >> 16) + (x << 16 >> 16) * (y << 16 >> 16);
#endif
}

/* The 8 scales of a block, as often as there are lanes. */
INLINE vf scales_at(const char *p) {
#if VL == 8
    return vector_at(BF16, p, 0);
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = scalar_at(BF16, p, i % LANES);
    return x;
#endif
}

/* As float_tile, of whole blocks; without the units of x. */
INLINE void int8_tile(const int R, const int X, const char *w, i64 ld, const char *scales, i64 scales_ld,
                      const int16_t *x, i64 cols, i64 width, const char *ahead, i64 step, vf *acc) {
#pragma GCC unroll 16
    for (int i = 0; i < X * R; i++) acc[i] = (vf){0};
    for (; cols > 0; cols -= width, scales += 2 * LANES) {
        vi part[MOST * ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < X * R; i++) part[i] = (vi){0};
        for (i64 i = 0; i < width; i += CHUNK, w += CHUNK, x += CHUNK * X, ahead += step) {
            prefetch(ahead, step);
            vs z[MOST];
#pragma GCC unroll 4
            for (int j = 0; j < X; j++) memcpy(&z[j], x + j * CHUNK, sizeof z[j]);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                vs y = widened(w + r * ld);
#pragma GCC unroll 4
                for (int j = 0; j < X; j++) part[j * R + r] = add_pairs(part[j * R + r], y, z[j]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            vf scale = scales_at(scales + r * scales_ld);
#pragma GCC unroll 4
            for (int j = 0; j < X; j++) acc[j * R + r] += __builtin_convertvector(part[j * R + r], vf) * scale;
        }
    }
}

/* ---- out of the tiles --------------------------------------------------------------------------------------- */

INLINE v4 sums_of_4(const vf *v) {
#if VL == 8 && defined(__AVX2__)
    __m256 ab = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    __m256 all = _mm256_hadd_ps(ab, cd);
    return (v4)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    return (v4){sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
#endif
}

/* Where a tile is: rows of W and x, columns, and what it prefetches. */
typedef struct {
    const char *w; /* floats: the tile, rows `ld` bytes apart */
    i64 ld, row, j, from, cols, step;
    const char *ahead;
} At;

INLINE void finish(const Call *c, const At *at, const int R, const int X, const vf *acc) {
    const int add = c->add || at->from > 0;
    const float *bias = c->bias && at->from == 0 ? c->bias + at->row : NULL;
#pragma GCC unroll 4
    for (int j = 0; j < X; j++) {
        float *out = c->out + (at->j + j) * c->ldo + at->row;
        const float unit = c->w->kind == LINEAR_INT8 ? c->units[at->j + j] : 1.0f;
        if (R == 4) {
            v4 y = sums_of_4(acc + j * R) * unit;
            if (bias) y += *(const v4_at *)bias;
            if (add) y += *(const v4_at *)out;
            *(v4_at *)out = y;
        } else {
            *out = sum(acc[j]) * unit + (bias ? *bias : 0.0f) + (add ? *out : 0.0f);
        }
    }
}

typedef void Tile(const Call *c, const At *at);

#define FLOAT_TILE(kind, R, X)                                                                             \
    static __attribute__((noinline)) void kind##_##R##_##X(const Call *c, const At *at) {                  \
        const float *x = (const float *)c->packed + at->j * c->filled + at->from * X;                      \
        vf acc[X * R];                                                                                     \
        float_tile(kind, R, X, at->w, at->ld, x, at->cols, at->ahead, at->step, acc);                      \
        finish(c, at, R, X, acc);                                                                          \
    }
#define F32_TILE(R, X) FLOAT_TILE(LINEAR_F32, R, X)
#define BF16_TILE(R, X) FLOAT_TILE(LINEAR_BF16, R, X)
#define INT8_TILE(R, X)                                                                                    \
    static __attribute__((noinline)) void LINEAR_INT8_##R##_##X(const Call *c, const At *at) {             \
        const i64 scales_ld = c->filled / c->width * 2 * LANES;                                            \
        const char *s = (const char *)c->w->scales + at->row * scales_ld + at->from / c->width * 2 * LANES; \
        const int16_t *x = (const int16_t *)c->packed + at->j * c->filled + at->from * X;                  \
        vf acc[X * R];                                                                                     \
        int8_tile(R, X, at->w, at->ld, s, scales_ld, x, at->cols, c->width, at->ahead, at->step, acc);     \
        finish(c, at, R, X, acc);                                                                          \
    }
#define TILES(tile) tile(4, 1) tile(4, 2) tile(4, 3) tile(1, 1) tile(1, 2) tile(1, 3)
TILES(F32_TILE)
TILES(BF16_TILE)
TILES(INT8_TILE)
#define TABLE(kind) {{kind##_4_1, kind##_4_2, kind##_4_3}, {kind##_1_1, kind##_1_2, kind##_1_3}}
static Tile *const tiles[LINEAR_KINDS][2][MOST] = {TABLE(LINEAR_F32), TABLE(LINEAR_BF16), TABLE(LINEAR_INT8)};

/* bfloat16 rows as float32, in the order of x. */
static void widen(const char *w, i64 ld, i64 cols, float *wide) {
    for (i64 r = 0; r < ROWS; r++, w += ld, wide += SPAN)
        for (i64 i = 0; i < cols; i += CHUNK) {
            vi pairs = raw(i + CHUNK <= cols, w + 2 * i, 2 * (cols - i));
            store(wide + i, (vf)(pairs << 16));
            store(wide + i + VL, (vf)(pairs & (int32_t)0xffff0000));
        }
}

/* Rows `from` to `to` of W. */
static void multiply(const Call *c, i64 from, i64 to) {
    const int kind = c->w->kind;
    const i64 size = kind == LINEAR_F32 ? 4 : kind == LINEAR_BF16 ? 2 : 1;
    const i64 cols = kind == LINEAR_INT8 ? c->filled : c->w->cols, ld = cols * size;
    const i64 span = c->passes == 1 ? cols : c->width * MAX(SPAN / c->width, 1);
    float wide[ROWS * SPAN];
    for (i64 row = from, rows; row < to; row += rows) {
        rows = row + ROWS <= to ? ROWS : 1;
        const char *w = (const char *)c->w->data + row * ld;
        const int widening = kind == LINEAR_BF16 && c->passes >= WORTH_WIDENING && rows == ROWS;
        At at = {.ld = widening ? SPAN * 4 : ld, .row = row, .ahead = w + rows * ld, .step = rows * CHUNK * size / c->passes};
        for (; at.from < cols; at.from += span) {
            const i64 here = MIN(cols - at.from, span);
            if (widening) widen(w + at.from * size, ld, here, wide);
            at.w = widening ? (const char *)wide : w + at.from * size;
            at.cols = widening ? ROUND_UP(here, CHUNK) : here;
            at.j = 0;
            for (i64 count; at.j < c->n; at.j += count) {
                count = taken(c, at.j);
                tiles[widening ? LINEAR_F32 : kind][rows == 1][count - 1](c, &at);
                at.ahead += here / CHUNK * at.step;
            }
        }
    }
}

/* ---- entries ------------------------------------------------------------------------------------------------ */

static i64 blocks_of(i64 cols) { return (cols + BLOCK - 1) / BLOCK; }
static i64 width_of(i64 cols) { return ROUND_UP((cols + blocks_of(cols) - 1) / blocks_of(cols), STEP); }

int64_t kvcc_linear_scratch(int64_t cols, int64_t n, int64_t threads) {
    (void)threads;
    return MIN(n, TURN) * 4 * (MAX(ROUND_UP(cols, CHUNK), blocks_of(cols) * width_of(cols)) + 1) + LINE;
}

/* Tile i of x. */
static void pack_x(const Call *c, i64 i) {
    i64 first = i * MOST;
    if (first > 0 && first == c->n - 1) first--; /* the last two tiles share four rows */
    (c->w->kind == LINEAR_INT8 ? pack_integers : pack_floats)(c, first, taken(c, first));
}

static void turn(Call *c, i64 parts) {
    const i64 rows = c->w->rows, part = ROUND_UP((rows + parts - 1) / parts, LINE / 4);
    c->passes = (c->n + MOST - 1) / MOST;
    const int together = c->n > 4; /* all threads order x */
    for (i64 i = 0; i < c->passes && !together; i++) pack_x(c, i);
#pragma omp parallel num_threads(parts) if (parts > 1)
    {
        if (together) {
#pragma omp for schedule(static)
            for (i64 i = 0; i < c->passes; i++) pack_x(c, i);
        }
#pragma omp for schedule(static, 1)
        for (i64 i = 0; i < parts; i++) multiply(c, MIN(i * part, rows), MIN((i + 1) * part, rows));
    }
}

int kvcc_linear(const Weight *w, const float *x, i64 ldx, i64 n, float *out, i64 ldo, const float *bias, int add,
                int threads, void *scratch) {
    if (w->kind < 0 || w->kind >= LINEAR_KINDS) return 1;
    const int integers = w->kind == LINEAR_INT8;
    Call c = {.w = w, .x = x, .ldx = ldx, .out = out, .ldo = ldo, .bias = bias, .add = add};
    c.filled = integers ? blocks_of(w->cols) * width_of(w->cols) : ROUND_UP(w->cols, CHUNK);
    c.width = integers ? width_of(w->cols) : CHUNK;
    c.packed = (char *)(((uintptr_t)scratch + LINE - 1) / LINE * LINE);
    c.units = (float *)(c.packed + MIN(n, TURN) * c.filled * (integers ? 2 : 4));
    const i64 parts = n * w->rows * w->cols < SMALL ? 1 : MAX(threads, 1);
    for (i64 done = 0; done < n; done += c.n, c.x += c.n * ldx, c.out += c.n * ldo) {
        c.n = MIN(n - done, TURN);
        turn(&c, parts);
    }
    return 0;
}
