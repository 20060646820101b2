/* The cpu backend: sealing pages and attending over them. Built by kernels/build.py, called by kernels/cpu.py.
 *
 * Portable C with GCC/Clang vector extensions: VL floats to a vector, whatever the processor has. Pages are read
 * once per KV head: the codes of one page are spread to bytes in scratch (a few KB, first-level cache), scales are
 * folded into the other operand, so that a code costs one conversion and one multiply-add per query head.
 *
 * Two products serve everything. With W stored [runs][length]:
 *   nn: out[r][x]   += sum over runs of a[r][run] * W[run][x]    (K by channel, V by token, window V)
 *   nt: out[r][run] += sum over x    of a[r][x]   * W[run][x]    (K by token, V by channel, window K)
 */
#include "cpu_vectors.h"

enum { TILE_ROWS = 48, FUSED_ROWS = 4, WINDOW_CHUNK = 64, MIN_PAGES = 4 };

typedef struct {
    i64 bits, channels, first, by_token, group, codes, scales, zeros, steps, levels, clip;
} Section;

enum { ADAPTIVE, SCALED, UNIT };          /* steps */
enum { UNIFORM, NORMAL, E2M1, E4M3 };     /* levels; kernels/levels.py numbers them the same */

typedef struct Layout {
    const Section *sections; /* of head h, side s (0: K, 1: V): index[2h + s] up to index[2h + s + 1] */
    const i64 *index;
    const i64 *token_scales; /* of head h, side s: where a page has them, at 2h + s; -1: nowhere */
    i64 tokens; /* of a page; 0: no pages */
    i64 half;   /* element type of 16-bit planes */
    i64 page_tokens;           /* of all classes of tokens */
    const struct Layout *rest; /* of the tokens behind the first `tokens` of a page, or null */
    const i64 *page_means;     /* of head h's K: where a page has them, at 2h, and of how many channels, at 2h + 1 */
    const float *mean_steps;   /* what their codes count: [kv heads][mean_channels] */
    i64 mean_channels;         /* of the head that has most */
} Layout;

typedef struct {
    const char *data;
    i64 stride[4]; /* in elements */
    i64 type;
} Array;

/* ---- the two products -------------------------------------------------------------------------------------- */

INLINE void nn_tile(const int rows, const int vecs, const int type, const float *a, i64 a_row, i64 a_run,
                    const char *w, i64 ldw, i64 runs, float *out, i64 out_row) {
    vf acc[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vecs; v++) acc[r][v] = (vf){0};
    for (i64 run = 0; run < runs; run++) {
        const char *here = w + run * ldw * size_of(type);
#pragma GCC unroll 8
        for (int v = 0; v < vecs; v++) {
            vf x = vector_at(type, here, v * VL);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) acc[r][v] += a[r * a_row + run * a_run] * x;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vecs; v++) {
            float *to = out + r * out_row + v * VL;
            store(to, load(to) + acc[r][v]);
        }
}

/* Instances are functions of their own, which keeps their accumulators in registers. */
typedef void NnTile(const float *a, i64 a_row, i64 a_run, const char *w, i64 ldw, i64 runs, float *out, i64 out_row);
#define NN_TILE(rows, vecs, type)                                                                                   \
    static __attribute__((noinline)) void nn_##rows##_##vecs##_##type(const float *a, i64 a_row, i64 a_run,         \
                                                                      const char *w, i64 ldw, i64 runs, float *out, \
                                                                      i64 out_row) {                                \
        nn_tile(rows, vecs, type, a, a_row, a_run, w, ldw, runs, out, out_row);                                     \
    }
#define NN_TILES(type)                                                                                              \
    NN_TILE(1, 8, type) NN_TILE(1, 4, type) NN_TILE(1, 2, type) NN_TILE(1, 1, type)                                 \
    NN_TILE(2, 4, type) NN_TILE(2, 2, type) NN_TILE(2, 1, type)                                                     \
    NN_TILE(3, 4, type) NN_TILE(3, 2, type) NN_TILE(3, 1, type)                                                     \
    NN_TILE(4, 2, type) NN_TILE(4, 1, type)
NN_TILES(U8) NN_TILES(F16) NN_TILES(BF16) NN_TILES(F32)

/* By rows - 1 and log2(vecs); NULL where the accumulators would not fit in 16 registers. */
#define NN_TABLE(type)                                                                                              \
    {{nn_1_1_##type, nn_1_2_##type, nn_1_4_##type, nn_1_8_##type},                                                  \
     {nn_2_1_##type, nn_2_2_##type, nn_2_4_##type, NULL},                                                           \
     {nn_3_1_##type, nn_3_2_##type, nn_3_4_##type, NULL},                                                           \
     {nn_4_1_##type, nn_4_2_##type, NULL, NULL}}
static NnTile *const nn_tiles[4][4][4] = {NN_TABLE(U8), NN_TABLE(F16), NN_TABLE(BF16), NN_TABLE(F32)};

static float element_at(int type, const char *w, i64 i) {
    return type == U8     ? scalar_at(U8, w, i)
           : type == F16  ? scalar_at(F16, w, i)
           : type == BF16 ? scalar_at(BF16, w, i)
                          : scalar_at(F32, w, i);
}

static void nn(int type, i64 rows, const float *a, i64 a_row, i64 a_run, const char *w, i64 ldw, i64 runs, i64 length,
               float *out, i64 out_row) {
    for (i64 take; rows > 0; a += take * a_row, out += take * out_row, rows -= take) {
        take = rows == 4 ? 4 : MIN(rows, 3);
        NnTile *const *tiles = nn_tiles[type][take - 1];
        i64 x = 0;
        for (int wide = 3; wide >= 0; wide--)
            for (i64 n = VL << wide; tiles[wide] && x + n <= length; x += n)
                tiles[wide](a, a_row, a_run, w + x * size_of(type), ldw, runs, out + x, out_row);
        for (; x < length; x++)
            for (i64 r = 0; r < take; r++)
                for (i64 run = 0; run < runs; run++)
                    out[r * out_row + x] += a[r * a_row + run * a_run] * element_at(type, w, run * ldw + x);
    }
}

INLINE void nt_tile(const int rows, const int runs, const int type, const float *a, i64 a_row, const char *w, i64 ldw,
                    i64 length, float *out, i64 out_row) {
    vf acc[3][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < runs; j++) acc[r][j] = (vf){0};
    i64 x = 0;
    for (; x + VL <= length; x += VL)
        for (int j = 0; j < runs; j++) {
            vf y = vector_at(type, w, j * ldw + x);
            for (int r = 0; r < rows; r++) acc[r][j] += load(a + r * a_row + x) * y;
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < runs; j++) {
            float total = sum(acc[r][j]);
            for (i64 i = x; i < length; i++) total += a[r * a_row + i] * scalar_at(type, w, j * ldw + i);
            out[r * out_row + j] += total;
        }
}

INLINE void nt_rows(const int rows, const int type, const float *a, i64 a_row, const char *w, i64 ldw, i64 runs,
                    i64 length, float *out, i64 out_row) {
    i64 run = 0;
    for (; run + 4 <= runs; run += 4)
        nt_tile(rows, 4, type, a, a_row, w + run * ldw * size_of(type), ldw, length, out + run, out_row);
    for (; run < runs; run++)
        nt_tile(rows, 1, type, a, a_row, w + run * ldw * size_of(type), ldw, length, out + run, out_row);
}

INLINE void nt_type(const int type, i64 rows, const float *a, i64 a_row, const char *w, i64 ldw, i64 runs, i64 length,
                    float *out, i64 out_row) {
    for (; rows >= 3; rows -= 3, a += 3 * a_row, out += 3 * out_row)
        nt_rows(3, type, a, a_row, w, ldw, runs, length, out, out_row);
    for (; rows > 0; rows--, a += a_row, out += out_row)
        nt_rows(1, type, a, a_row, w, ldw, runs, length, out, out_row);
}

static void nt(int type, i64 rows, const float *a, i64 a_row, const char *w, i64 ldw, i64 runs, i64 length, float *out,
               i64 out_row) {
    if (type == F16)
        nt_type(F16, rows, a, a_row, w, ldw, runs, length, out, out_row);
    else if (type == BF16)
        nt_type(BF16, rows, a, a_row, w, ldw, runs, length, out, out_row);
    else if (type == S8)
        nt_type(S8, rows, a, a_row, w, ldw, runs, length, out, out_row);
    else
        nt_type(F32, rows, a, a_row, w, ldw, runs, length, out, out_row);
}

/* ---- packed runs ------------------------------------------------------------------------------------------- */

typedef uint64_t words4 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint64_t words2 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint64_t words1 __attribute__((aligned(1), may_alias));

/* Strip j of a run of width b: codes j*m up to (j+1)*m, from bits b*j of its m bytes. Bytes are shifted many at a
 * time: what a byte receives from its neighbour lies above the mask. */
#define UNPACK_STRIPS(words)                                                                                        \
    for (i64 i = 0; i < m; i += sizeof(words)) {                                                                    \
        words x = *(const words *)(src + i);                                                                        \
        for (int j = 0; j < 8 / width; j++) *(words *)(dst + j * m + i) = (x >> (width * j)) & mask;                \
    }

INLINE void unpack_strips(const int width, const i64 m, const uint8_t *src, uint8_t *dst) {
    const uint64_t mask = 0x0101010101010101u * ((1 << width) - 1);
    if (m % 32 == 0) {
        UNPACK_STRIPS(words4)
    } else if (m % 16 == 0) {
        UNPACK_STRIPS(words2)
    } else if (m % 8 == 0) {
        UNPACK_STRIPS(words1)
    } else {
        for (i64 i = 0; i < m; i++)
            for (int j = 0; j < 8 / width; j++) dst[j * m + i] = (src[i] >> (width * j)) & (uint8_t)mask;
    }
}

/* Width 3: codes j*2n up to (j+1)*2n have their low bits in strip j of width 2, and their third bits in strips 2j
 * and 2j+1 of the n bytes after it. */
#define UNPACK_THIRDS(words, one)                                                                                   \
    for (i64 i = 0; i < n; i += sizeof(words))                                                                      \
        for (int odd = 0; odd < 2; odd++) {                                                                         \
            words low = *(const words *)(src + odd * n + i), high = *(const words *)(src + 2 * n + i);              \
            for (int j = 0; j < 4; j++)                                                                             \
                *(words *)(dst + j * 2 * n + odd * n + i) =                                                         \
                    ((low >> (2 * j)) & (3 * one)) | (((high >> (2 * j + odd)) & one) << 2);                        \
        }

/* Strips of the bits above `low`, to codes that hold these already: widths 5 and 6. */
#define ADD_STRIPS(words)                                                                                           \
    for (i64 i = 0; i < m; i += sizeof(words)) {                                                                    \
        words x = *(const words *)(src + i);                                                                        \
        for (int j = 0; j < 8 / width; j++) *(words *)(dst + j * m + i) |= ((x >> (width * j)) & mask) << low;      \
    }

INLINE void add_strips(const int width, const int low, const i64 m, const uint8_t *src, uint8_t *dst) {
    const uint64_t mask = 0x0101010101010101u * ((1 << width) - 1);
    if (m % 16 == 0) {
        ADD_STRIPS(words2)
    } else if (m % 8 == 0) {
        ADD_STRIPS(words1)
    } else {
        for (i64 i = 0; i < m; i++)
            for (int j = 0; j < 8 / width; j++) dst[j * m + i] |= ((src[i] >> (width * j)) & (uint8_t)mask) << low;
    }
}

INLINE void unpack_run(const int bits, const i64 length, const uint8_t *src, uint8_t *dst) {
    const uint64_t ones = 0x0101010101010101u;
    const i64 n = length / 8;
    if (bits == 5 || bits == 6) {
        unpack_strips(4, 4 * n, src, dst);
        add_strips(bits - 4, 4, (bits - 4) * n, src + 4 * n, dst);
    } else if (bits != 3) {
        unpack_strips(bits, length * bits / 8, src, dst);
    } else if (n == 8) { /* a page of 64 tokens: both halves of a strip in one vector */
        words2 low = *(const words2 *)src;
        uint64_t high = *(const words1 *)(src + 16);
        words2 both = {high, high >> 1};
        for (int j = 0; j < 4; j++)
            *(words2 *)(dst + 16 * j) = ((low >> (2 * j)) & (3 * ones)) | (((both >> (2 * j)) & ones) << 2);
    } else if (n % 16 == 0) {
        UNPACK_THIRDS(words2, ones)
    } else if (n % 8 == 0) {
        UNPACK_THIRDS(words1, ones)
    } else {
        UNPACK_THIRDS(uint8_t, 1)
    }
}

INLINE void unpack_runs(const int bits, const i64 length, i64 runs, const uint8_t *src, uint8_t *dst) {
    for (i64 run = 0; run < runs; run++) unpack_run(bits, length, src + run * (length * bits / 8), dst + run * length);
}

/* The usual lengths as constants: their loops unroll. */
INLINE void unpack_width(const int bits, i64 length, i64 runs, const uint8_t *src, uint8_t *dst) {
    if (length == 64)
        unpack_runs(bits, 64, runs, src, dst);
    else if (length == 128)
        unpack_runs(bits, 128, runs, src, dst);
    else if (length == 32)
        unpack_runs(bits, 32, runs, src, dst);
    else
        unpack_runs(bits, length, runs, src, dst);
}

/* Codes of `runs` runs as bytes: in `scratch`, or where they lie. */
static const char *unpack(int bits, i64 length, i64 runs, const char *src, char *scratch) {
    const uint8_t *from = (const uint8_t *)src;
    uint8_t *to = (uint8_t *)scratch;
    if (bits == 8) return src;
    if (bits == 4)
        unpack_width(4, length, runs, from, to);
    else if (bits == 5)
        unpack_width(5, length, runs, from, to);
    else if (bits == 6)
        unpack_width(6, length, runs, from, to);
    else if (bits == 3)
        unpack_width(3, length, runs, from, to);
    else if (bits == 2)
        unpack_width(2, length, runs, from, to);
    else
        unpack_width(1, length, runs, from, to);
    return scratch;
}

/* A section's codes as bytes, in `scratch` or where they lie: runs packed one by one, or as one. */
static const char *unpack_section(const Section *s, const char *page, i64 runs, i64 length, char *scratch) {
    int flat = s->steps == UNIT && s->by_token;
    return unpack((int)s->bits, flat ? runs * length : length, flat ? 1 : runs, page + s->codes, scratch);
}

/* `width` bits of codes, those from bit `low` on; returns what follows the bytes that were written. */
INLINE uint8_t *pack_strips(const int width, const int low, i64 length, const uint8_t *restrict codes,
                            uint8_t *restrict dst) {
    const int mask = (1 << width) - 1;
    const i64 m = length * width / 8;
    for (i64 i = 0; i < m; i++) {
        int byte = 0;
        for (int j = 0; j < 8 / width; j++) byte |= (codes[j * m + i] >> low & mask) << (width * j);
        dst[i] = byte;
    }
    return dst + m;
}

INLINE void pack_run(const int bits, i64 length, const uint8_t *restrict codes, uint8_t *restrict dst) {
    const int low = bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits;
    dst = pack_strips(low, 0, length, codes, dst);
    if (bits > low) pack_strips(bits - low, low, length, codes, dst);
}

/* ---- a page's section times queries or weights -------------------------------------------------------------- */

typedef struct { /* one thread's memory */
    float *q, *q_pages; /* [rows][dk], [rows][k_channels], scaled */
    float *logits, *out; /* [rows][ld], [rows][dv] */
    float *most, *total; /* [rows] */
    float *q_means;      /* [classes of tokens][rows][mean_channels]: q_pages times steps of page means */
    float *shared;       /* [rows]: what logits of a page's tokens have in common */
    float *wide; /* one section of one page, dequantised */
    float *scales, *zeros;  /* metadata of one section */
    float *folded, *bias;   /* [FUSED_ROWS][metadata] */
    char *codes;
} Scratch;

static void to_floats(const char *src, i64 n, float *dst) {
    i64 i = 0;
    for (; i + VL <= n; i += VL) store(dst + i, vector_at(F16, src, i));
    for (; i < n; i++) dst[i] = scalar_at(F16, src, i);
}

/* Lane l of the k-th vector of x's elements taken ng times each. */
INLINE vf repeated(const int ng, const int k, vf x) {
    if (ng == 1) return x;
#if defined(__GNUC__) && !defined(__clang__)
    vi from = {0};
    for (int l = 0; l < VL; l++) from[l] = (k * VL + l) / ng;
    return __builtin_shuffle(x, from);
#else
    vf y = {0};
    for (int l = 0; l < VL; l++) y[l] = x[(k * VL + l) / ng];
    return y;
#endif
}

/* folded[r][i*ng + g] = a[r][i] * scale[i*ng + g]; bias[r][g] = sum over i of a[r][i] * zero[i*ng + g] */
INLINE void fold(const int rows, const int ng, i64 runs, const float *a, i64 a_row, const char *scales,
                 const char *zeros, float *folded, i64 folded_row, float *bias) {
    vf sums[FUSED_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sums[r] = (vf){0};
    i64 i = 0;
    for (; i + VL <= runs; i += VL)
#pragma GCC unroll 4
        for (int k = 0; k < ng; k++) {
            i64 at = i * ng + k * VL;
            vf scale = vector_at(F16, scales, at), zero = vector_at(F16, zeros, at);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                vf x = repeated(ng, k, load(a + r * a_row + i));
                store(folded + r * folded_row + at, x * scale);
                sums[r] += x * zero;
            }
        }
    for (int r = 0; r < rows; r++) {
        for (int g = 0; g < ng; g++) bias[r * ng + g] = 0;
        if (ng == 1)
            bias[r] = sum(sums[r]);
        else
#pragma GCC unroll 16
            for (int l = 0; l < VL; l++) bias[r * ng + l % ng] += sums[r][l];
    }
    for (; i < runs; i++)
        for (int r = 0; r < rows; r++)
            for (int g = 0; g < ng; g++) {
                folded[r * folded_row + i * ng + g] = a[r * a_row + i] * scalar_at(F16, scales, i * ng + g);
                bias[r * ng + g] += a[r * a_row + i] * scalar_at(F16, zeros, i * ng + g);
            }
}

INLINE void fold_groups(const int rows, i64 ng, i64 runs, const float *a, i64 a_row, const char *scales,
                        const char *zeros, float *folded, i64 folded_row, float *bias) {
    if (ng == 1)
        fold(rows, 1, runs, a, a_row, scales, zeros, folded, folded_row, bias);
    else if (ng == 2)
        fold(rows, 2, runs, a, a_row, scales, zeros, folded, folded_row, bias);
    else if (ng == 4)
        fold(rows, 4, runs, a, a_row, scales, zeros, folded, folded_row, bias);
    else /* ng need not divide VL: group by group */
        for (i64 g = 0; g < ng; g++)
            for (int r = 0; r < rows; r++) {
                float total = 0;
                for (i64 i = 0; i < runs; i++) {
                    folded[r * folded_row + i * ng + g] = a[r * a_row + i] * scalar_at(F16, scales, i * ng + g);
                    total += a[r * a_row + i] * scalar_at(F16, zeros, i * ng + g);
                }
                bias[r * ng + g] = total;
            }
}

/* nn over 2-bit codes as they lie. A byte holds one code of each of a run's four strips: widened once, it gives VL codes
 * of every strip by shift and mask. Wider codes are better spread to bytes first: see docs/performance.md. */
typedef struct {
    const uint8_t *codes;
    i64 runs, length;
    const float *a[4]; /* per strip: element [row][run] at row * a_row + run * a_run */
    i64 a_row, a_run, out_row;
    float *out;
} Strips;

INLINE void strips_tile(const int rows, const int same, const Strips *c, i64 at) {
    const i64 strip = c->length / 4;
    vf acc[3][4];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[r][j] = (vf){0};
    for (i64 run = 0; run < c->runs; run++) {
        vi bytes = bytes_at((const char *)c->codes + run * strip + at);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf x = __builtin_convertvector(j < 3 ? bytes >> (2 * j) & 3 : bytes >> 6, vf);
            const float *a = c->a[same ? 0 : j] + run * c->a_run;
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) acc[r][j] += a[r * c->a_row] * x;
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float *to = c->out + r * c->out_row + j * strip + at;
            store(to, load(to) + acc[r][j]);
        }
}

typedef void StripsTile(const Strips *c, i64 at);
#define STRIPS_TILE(rows, same)                                                                        \
    static __attribute__((noinline)) void strips_##rows##_##same(const Strips *c, i64 at) { strips_tile(rows, same, c, at); }
STRIPS_TILE(1, 0) STRIPS_TILE(1, 1) STRIPS_TILE(2, 0) STRIPS_TILE(2, 1) STRIPS_TILE(3, 0) STRIPS_TILE(3, 1)
static StripsTile *const strips_tiles[3][2] = {{strips_1_0, strips_1_1}, {strips_2_0, strips_2_1}, {strips_3_0, strips_3_1}};

static void nn_strips(const Section *s, const char *page, i64 rows, const float *a, i64 a_row, i64 runs, i64 length,
                      float *out, i64 out_row) {
    i64 ng = length / s->group, strip = length / 4;
    for (i64 take; rows > 0; rows -= take, a += take * a_row, out += take * out_row) {
        take = rows == 4 ? 2 : MIN(rows, 3);
        Strips c = {(const uint8_t *)page + s->codes, runs, length, {0}, a_row, ng, out_row, out};
        for (i64 at = 0; at < strip; at += VL) {
            for (i64 j = 0; j < 4; j++) c.a[j] = a + (j * strip + at) / s->group;
            strips_tiles[take - 1][c.a[0] == c.a[3]](&c, at);
        }
    }
}

/* What code 0 of unit steps stands for. */
static float unit_zero(const Section *s) { return 0.5f - (float)(1 << (s->bits - 1)); }

/* nn over a section of unit steps: codes take a as it is, and what code 0 stands for is the same everywhere. */
static void nn_unit(const Section *s, const char *page, Scratch *t, i64 rows, const float *a, i64 a_row, i64 runs,
                    i64 length, float *out, i64 out_row) {
    for (i64 r = 0; r < rows; r++) {
        const float *from = a + r * a_row;
        float *to = out + r * out_row;
        vf totals = {0};
        i64 run = 0, x = 0;
        for (; run + VL <= runs; run += VL) totals += load(from + run);
        float total = sum(totals);
        for (; run < runs; run++) total += from[run];
        total *= unit_zero(s);
        for (; x + VL <= length; x += VL) store(to + x, load(to + x) + total);
        for (; x < length; x++) to[x] += total;
    }
    if (s->bits == 2 && !s->by_token && length / 4 % VL == 0) {
        Section whole = *s;
        whole.group = length;
        nn_strips(&whole, page, rows, a, a_row, runs, length, out, out_row);
        return;
    }
    const char *codes = unpack_section(s, page, runs, length, t->codes);
    nn(U8, rows, a, a_row, 1, codes, length, runs, length, out, out_row);
}

/* nn over a quantised section without dequantising it: a [rows <= 4][runs], groups of a multiple of VL along length */
static void nn_folded(const Section *s, const char *page, Scratch *t, i64 rows, const float *a, i64 a_row, i64 runs,
                      i64 length, float *out, i64 out_row) {
    i64 ng = length / s->group, meta = runs * ng;
    const char *scales = page + s->scales, *zeros = page + s->zeros;
    float *folded = t->folded, *bias = t->bias;
    if (rows == 1)
        fold_groups(1, ng, runs, a, a_row, scales, zeros, folded, meta, bias);
    else if (rows == 2)
        fold_groups(2, ng, runs, a, a_row, scales, zeros, folded, meta, bias);
    else if (rows == 3)
        fold_groups(3, ng, runs, a, a_row, scales, zeros, folded, meta, bias);
    else
        fold_groups(4, ng, runs, a, a_row, scales, zeros, folded, meta, bias);
    for (i64 r = 0; r < rows; r++)
        for (i64 g = 0; g < ng; g++)
            for (i64 x = g * s->group; x < (g + 1) * s->group; x += VL) {
                float *to = out + r * out_row + x;
                store(to, load(to) + bias[r * ng + g]);
            }
    if (s->bits == 2 && length / 4 % VL == 0) {
        nn_strips(s, page, rows, folded, meta, runs, length, out, out_row);
        return;
    }
    const char *codes = unpack(s->bits, length, runs, page + s->codes, t->codes);
    for (i64 g = 0; g < ng; g++)
        nn(U8, rows, folded + g, meta, ng, codes + g * s->group, length, runs, s->group, out + g * s->group, out_row);
}

/* ---- levels: a sign and the index of a magnitude; see kernels/levels.py ------------------------------------------ */

static const float NORMAL_1[] = {0.7978846f}, NORMAL_2[] = {0.4527800f, 1.5104176f},
                   NORMAL_3[] = {0.2450942f, 0.7560053f, 1.3439093f, 2.1519457f},
                   NORMAL_4[] = {0.1283950f, 0.3880483f, 0.6567591f, 0.9423404f,
                                 1.2562312f, 1.6180464f, 2.0690172f, 2.7325896f},
                   SIZES_E2M1[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

static const float *magnitudes(i64 levels, i64 bits) {
    static const float *const normal[] = {NORMAL_1, NORMAL_2, NORMAL_3, NORMAL_4};
    return levels == E2M1 ? SIZES_E2M1 : normal[bits - 1];
}

/* Eight bits of e4m3 lie in a float's as they are, but for the exponent's bias. */
INLINE vf e4m3_values(vi codes) { return (vf)((codes & 128) << 24 | (codes & 127) << 20) * 0x1p120f; }

static float e4m3_value(uint8_t code) {
    uint32_t bits = (uint32_t)(code & 128) << 24 | (uint32_t)(code & 127) << 20;
    float x;
    memcpy(&x, &bits, 4);
    return x * 0x1p120f;
}

/* To the nearest, halves to even; 448 where x is larger. */
static uint8_t e4m3_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 24 & 128, size = bits & 0x7fffffff;
    float a = fabsf(x);
    if (a >= 448.0f) return (uint8_t)(sign | 126);
    if (a < 0x1p-6f) return (uint8_t)(sign | (uint32_t)(int32_t)rintf(a * 512.0f));
    return (uint8_t)(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

static void level_values(const Section *s, const char *codes, i64 n, float *to) {
    i64 i = 0;
    if (s->levels == E4M3) {
        for (; i + VL <= n; i += VL) store(to + i, e4m3_values(bytes_at(codes + i)));
        for (; i < n; i++) to[i] = e4m3_value((uint8_t)codes[i]);
        return;
    }
    const float *sizes = magnitudes(s->levels, s->bits);
    float all[16];
    int half_ = 1 << (s->bits - 1);
    for (int code = 0; code < 2 * half_; code++) all[code] = code < half_ ? sizes[code] : -sizes[code - half_];
    for (; i < n; i++) to[i] = all[(uint8_t)codes[i]];
}

static void dequantise(const Section *s, const char *page, Scratch *t, i64 runs, i64 length) {
    if (s->levels != UNIFORM) {
        level_values(s, unpack_section(s, page, runs, length, t->codes), runs * length, t->wide);
        for (i64 i = 0; s->steps == SCALED && i < runs * length / s->group; i++) {
            float scale = s->levels == E2M1 ? e4m3_value((uint8_t)page[s->scales + i]) : scalar_at(F16, page + s->scales, i);
            for (i64 x = i * s->group; x < (i + 1) * s->group; x++) t->wide[x] *= scale;
        }
        return;
    }
    if (s->steps == UNIT) {
        const char *steps = unpack_section(s, page, runs, length, t->codes);
        float zero = unit_zero(s);
        i64 x = 0, end = runs * length;
        for (; x + VL <= end; x += VL) store(t->wide + x, vector_at(U8, steps, x) + zero);
        for (; x < end; x++) t->wide[x] = scalar_at(U8, steps, x) + zero;
        return;
    }
    i64 ng = length / s->group, group = s->group;
    to_floats(page + s->scales, runs * ng, t->scales);
    to_floats(page + s->zeros, runs * ng, t->zeros);
    const char *codes = unpack(s->bits, length, runs, page + s->codes, t->codes);
    for (i64 i = 0; i < runs * ng; i++) {
        float scale = t->scales[i], zero = t->zeros[i];
        i64 x = i * group, end = x + group;
        for (; x + VL <= end; x += VL) store(t->wide + x, vector_at(U8, codes, x) * scale + zero);
        for (; x < end; x++) t->wide[x] = scalar_at(U8, codes, x) * scale + zero;
    }
}

/* 2^((code - 3) / 3) */
static const float scale_of_code[16] = {0.5f, 0.62996052f, 0.79370053f, 1.0f, 1.25992105f, 1.58740105f, 2.0f,
    2.51984210f, 3.17480210f, 4.0f, 5.03968420f, 6.34960421f, 8.0f, 10.0793684f, 12.6992084f, 16.0f};

/* Token i's scale, of a packed run of 4-bit codes. */
INLINE float token_scale(const char *codes, i64 tokens, i64 i) {
    uint8_t byte = (uint8_t)codes[i % (tokens / 2)];
    return scale_of_code[i < tokens / 2 ? byte & 15 : byte >> 4];
}

/* Logits, or weights, [rows][ld] times the scale that each token of a page has for this side, where it has one. */
static void times_token_scales(const Layout *layout, i64 head, int side, const char *page, i64 rows, float *x, i64 ld) {
    i64 at = layout->token_scales[2 * head + side];
    if (at < 0) return;
    i64 half_ = layout->tokens / 2, i = 0;
    for (; i + VL <= half_; i += VL) { /* a byte has the codes of two tokens, half a page apart */
        vi codes = bytes_at(page + at + i);
        vf low = exp2v((__builtin_convertvector(codes & 15, vf) - 3.0f) * (1.0f / 3.0f));
        vf high = exp2v((__builtin_convertvector(codes >> 4, vf) - 3.0f) * (1.0f / 3.0f));
        for (i64 r = 0; r < rows; r++) {
            float *to = x + r * ld + i;
            store(to, load(to) * low);
            store(to + half_, load(to + half_) * high);
        }
    }
    for (; i < half_; i++)
        for (i64 r = 0; r < rows; r++) {
            x[r * ld + i] *= token_scale(page + at, layout->tokens, i);
            x[r * ld + half_ + i] *= token_scale(page + at, layout->tokens, half_ + i);
        }
}

/* K (side 0): out[r][token] += q . k over the section's channels. V (side 1): out[r][channel] += sum of p * v. */
static void section_product(const Layout *layout, int side, const Section *s, const char *page, Scratch *t, i64 rows,
                            const float *a, i64 a_row, float *out, i64 out_row) {
    i64 runs = s->by_token ? layout->tokens : s->channels, length = s->by_token ? s->channels : layout->tokens;
    int runs_summed = side == (int)s->by_token;
    if (side == 0)
        a += s->first;
    else
        out += s->first;
    if (s->steps == UNIT && s->levels == UNIFORM && runs_summed && rows <= FUSED_ROWS) {
        nn_unit(s, page, t, rows, a, a_row, runs, length, out, out_row);
        return;
    }
    if (s->bits < 16 && s->steps == ADAPTIVE && runs_summed && rows <= FUSED_ROWS && s->group % VL == 0) {
        nn_folded(s, page, t, rows, a, a_row, runs, length, out, out_row);
        return;
    }
    const char *w = page + s->codes;
    int type = s->bits == 16 ? (int)layout->half : F32;
    if (s->bits < 16) {
        dequantise(s, page, t, runs, length);
        w = (const char *)t->wide;
    }
    if (runs_summed)
        nn(type, rows, a, a_row, 1, w, length, runs, length, out, out_row);
    else
        nt(type, rows, a, a_row, w, length, runs, length, out, out_row);
}

/* ---- attention ----------------------------------------------------------------------------------------------- */

typedef struct Attend {
    Layout layout;
    i64 batch, n, q_heads, kv_heads, dk, dv, k_channels, slots, sinks;
    Array q, q_pages;           /* [batch][n][q_heads][channels] */
    Array window_k, window_v;   /* [batch][kv_heads][slots][channels] */
    const int32_t *lengths, *sealed;
    const i64 *table; /* [batch][table_stride] page ids */
    i64 table_stride;
    const i64 *addresses; /* by page id */
    const float *bias;    /* [batch][n][q_heads], or null */
    float scale, softcap;
    float *out, *lse; /* [batch][n][q_heads][dv], [batch][n][q_heads] */
    i64 threads;
    i64 max_section, max_metadata; /* codes of the largest section of a page; its scales */
} Attend;

typedef struct { /* rows of one KV head over some pages of one sequence */
    i64 batch, head, first_row, rows, first_page, pages, split, splits, part;
} Unit;

INLINE char *element(const Array *x, i64 i, i64 j, i64 k) {
    i64 at = i * x->stride[0] + j * x->stride[1] + k * x->stride[2];
    return (char *)x->data + at * size_of(x->type);
}

/* Row i of a KV head is query i / group of head kv_head * group + i % group. */
static void gather_queries(const Attend *c, const Unit *u, const Array *q, i64 channels, float *dst) {
    i64 group = c->q_heads / c->kv_heads;
    float factor = c->softcap > 0 ? c->scale : c->scale * LOG2E;
    for (i64 r = 0; r < u->rows; r++) {
        i64 row = u->first_row + r;
        const char *from = element(q, u->batch, row / group, u->head * group + row % group);
        for (i64 d = 0; d < channels; d++)
            dst[r * channels + d] = factor * scalar_at(q->type, from, d * q->stride[3]);
    }
}

/* Logits [rows][ld] of `count` tokens, plus `shared` [rows] or null, become weights; older totals and outputs are
 * rescaled to the new maximum. */
static void online_softmax(const Attend *c, const Unit *u, Scratch *t, i64 count, i64 ld, const float *shared) {
    i64 padded = ROUND_UP(count, VL);
    for (i64 r = 0; r < u->rows; r++) {
        float *x = t->logits + r * ld;
        float bias = shared ? shared[r] : 0;
        for (i64 i = count; i < padded; i++) x[i] = -INFINITY;
        if (c->softcap > 0) {
            for (i64 i = 0; i < count; i += VL)
                store(x + i, tanhv((load(x + i) + bias) / c->softcap) * (c->softcap * LOG2E));
            for (i64 i = count; i < padded; i++) x[i] = -INFINITY;
            bias = 0;
        }
        vf top = load(x);
        for (i64 i = VL; i < padded; i += VL) top = vmax(top, load(x + i));
        float most = MAX(t->most[r], largest(top) + bias);
        vf added = {0};
        for (i64 i = 0; i < padded; i += VL) {
            vf p = exp2v(load(x + i) + (bias - most));
            store(x + i, p);
            added += p;
        }
        if (most > t->most[r]) {
            float keep = exp2f(t->most[r] - most);
            t->total[r] *= keep;
            t->most[r] = most;
            for (i64 d = 0; d < c->dv; d++) t->out[r * c->dv + d] *= keep;
        }
        t->total[r] += sum(added);
    }
}

static void attend_window(const Attend *c, const Unit *u, Scratch *t, i64 first, i64 count, i64 ld) {
    const char *k = element(&c->window_k, u->batch, u->head, first);
    const char *v = element(&c->window_v, u->batch, u->head, first);
    memset(t->logits, 0, sizeof(float) * u->rows * ld);
    nt(c->window_k.type, u->rows, t->q, c->dk, k, c->window_k.stride[2], count, c->dk, t->logits, ld);
    online_softmax(c, u, t, count, ld, NULL);
    nn(c->window_v.type, u->rows, t->logits, ld, 1, v, c->window_v.stride[2], count, c->dv, t->out, c->dv);
}

/* Queries times what codes of K's page means count, for all pages of a class of tokens: [rows][mean_channels]. */
static void times_mean_steps(const Attend *c, const Layout *layout, const Unit *u, const float *q, float *to) {
    i64 count = layout->page_means[2 * u->head + 1];
    if (!count) return;
    const float *steps = layout->mean_steps + u->head * layout->mean_channels;
    for (i64 r = 0; r < u->rows; r++)
        for (i64 d = 0; d < count; d++) to[r * layout->mean_channels + d] = q[r * c->k_channels + d] * steps[d];
}

/* What logits of a page's tokens have in common, [rows], or null for nothing: bias, and queries times means of K. */
static const float *shared_logits(const Attend *c, const Layout *layout, const Unit *u, Scratch *t, const char *page,
                                  const float *q_means) {
    i64 place = layout->page_means[2 * u->head], count = layout->page_means[2 * u->head + 1];
    if (!count && !c->bias) return NULL;
    i64 group = c->q_heads / c->kv_heads;
    float factor = c->softcap > 0 ? 1.0f : LOG2E;
    for (i64 r = 0; r < u->rows; r++) {
        i64 row = u->first_row + r, at = (u->batch * c->n + row / group) * c->q_heads + u->head * group + row % group;
        t->shared[r] = c->bias ? c->bias[at] * factor : 0;
    }
    if (count) nt(S8, u->rows, q_means, layout->mean_channels, page + place, count, 1, count, t->shared, 1);
    return t->shared;
}

static void attend_page(const Attend *c, const Layout *layout, const Unit *u, Scratch *t, const char *page,
                        const float *q_means, i64 ld) {
    const i64 *index = layout->index + 2 * u->head;
    const Section *sections = layout->sections;
    memset(t->logits, 0, sizeof(float) * u->rows * ld);
    for (int side = 0; side < 2; side++) {
        const Section *first = sections + index[side], *last = sections + index[side + 1];
        for (const Section *s = first; s < last; s++) {
            if (side == 0)
                section_product(layout, 0, s, page, t, u->rows, t->q_pages, c->k_channels, t->logits, ld);
            else
                section_product(layout, 1, s, page, t, u->rows, t->logits, ld, t->out, c->dv);
        }
        if (side == 0) {
            times_token_scales(layout, u->head, 0, page, u->rows, t->logits, ld);
            const float *shared = shared_logits(c, layout, u, t, page, q_means);
            online_softmax(c, u, t, layout->tokens, ld, shared);
            times_token_scales(layout, u->head, 1, page, u->rows, t->logits, ld);
        }
    }
}

/* Contiguous stretches of a ring or of the sinks, in chunks. */
static void attend_slots(const Attend *c, const Unit *u, Scratch *t, i64 first, i64 count, i64 ld) {
    for (i64 done = 0; done < count; done += WINDOW_CHUNK)
        attend_window(c, u, t, first + done, MIN(count - done, WINDOW_CHUNK), ld);
}

static void attend_recent(const Attend *c, const Unit *u, Scratch *t, i64 ld) {
    i64 length = c->lengths[u->batch], sealed = c->sealed[u->batch], ring = c->slots - c->sinks;
    attend_slots(c, u, t, 0, MIN(length, c->sinks), ld);
    i64 recent = length - c->sinks - sealed;
    if (recent <= 0) return;
    i64 first = sealed % ring, straight = MIN(recent, ring - first);
    attend_slots(c, u, t, c->sinks + first, straight, ld);
    attend_slots(c, u, t, c->sinks, recent - straight, ld);
}

static void write_rows(const Attend *c, const Unit *u, const float *out, const float *most, const float *total) {
    i64 group = c->q_heads / c->kv_heads;
    for (i64 r = 0; r < u->rows; r++) {
        i64 row = u->first_row + r;
        i64 to = (u->batch * c->n + row / group) * c->q_heads + u->head * group + row % group;
        float share = total[r] > 0 ? 1.0f / total[r] : 0.0f;
        for (i64 d = 0; d < c->dv; d++) c->out[to * c->dv + d] = out[r * c->dv + d] * share;
        c->lse[to] = total[r] > 0 ? (most[r] + log2f(total[r])) * LN2 : -INFINITY;
    }
}

/* Where a head's sections lie in a page. */
static void head_record(const Layout *layout, i64 head, i64 *first, i64 *bytes) {
    const Section *s = layout->sections + layout->index[2 * head], *end = layout->sections + layout->index[2 * head + 2];
    i64 means = layout->page_means[2 * head], count = layout->page_means[2 * head + 1];
    *first = *bytes = 0;
    if (s == end && !count) return;
    i64 last = means + count;
    *first = s == end ? means : count ? MIN(means, s->codes) : s->codes;
    for (; s < end; s++) {
        i64 codes = layout->tokens * s->channels, metadata = s->group ? 2 * codes / s->group : 0;
        i64 ends = s->bits >= 16 || s->steps == UNIT ? s->codes + codes * s->bits / 8
                   : s->steps == SCALED              ? s->scales + metadata
                                                     : s->zeros + metadata;
        last = MAX(last, ends);
    }
    for (int side = 0; side < 2; side++)
        last = MAX(last, layout->token_scales[2 * head + side] + layout->tokens);
    *bytes = last - *first;
}

/* Pages lie anywhere, which the processor's own prefetching cannot follow. */
static void prefetch(const char *p, i64 bytes) {
    for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

static void attend_unit(const Attend *c, const Unit *u, Scratch *t, float *parts, i64 ld) {
    gather_queries(c, u, &c->q, c->dk, t->q);
    if (c->layout.tokens) gather_queries(c, u, &c->q_pages, c->k_channels, t->q_pages);
    for (i64 r = 0; r < u->rows; r++) t->most[r] = -INFINITY, t->total[r] = 0;
    memset(t->out, 0, sizeof(float) * u->rows * c->dv);
    if (u->split == 0) attend_recent(c, u, t, ld);
    const i64 *ids = c->table + u->batch * c->table_stride + u->first_page;
    i64 first = 0, bytes = 0;
    if (u->pages) head_record(&c->layout, u->head, &first, &bytes);
    float *q_means = t->q_means;
    for (const Layout *part = &c->layout; part && u->pages; q_means += u->rows * part->mean_channels, part = part->rest)
        times_mean_steps(c, part, u, t->q_pages, q_means);
    for (i64 p = 0; p < u->pages; p++) {
        if (p + 1 < u->pages) prefetch((const char *)c->addresses[ids[p + 1]] + first, bytes);
        q_means = t->q_means;
        for (const Layout *part = &c->layout; part; q_means += u->rows * part->mean_channels, part = part->rest)
            attend_page(c, part, u, t, (const char *)c->addresses[ids[p]], q_means, ld);
    }
    if (u->splits == 1) {
        write_rows(c, u, t->out, t->most, t->total);
        return;
    }
    float *part = parts + u->part * TILE_ROWS * (c->dv + 2);
    memcpy(part, t->most, sizeof(float) * u->rows);
    memcpy(part + TILE_ROWS, t->total, sizeof(float) * u->rows);
    memcpy(part + 2 * TILE_ROWS, t->out, sizeof(float) * u->rows * c->dv);
}

/* The partial results of u and of the units after it that have the same rows, added up in u's. */
static void merge_unit(const Attend *c, const Unit *u, float *parts) {
    i64 size = TILE_ROWS * (c->dv + 2);
    float *first = parts + u->part * size;
    for (i64 r = 0; r < u->rows; r++) {
        float most = -INFINITY, total = 0, *out = first + 2 * TILE_ROWS + r * c->dv;
        for (i64 s = 0; s < u->splits; s++) most = MAX(most, first[s * size + r]);
        for (i64 s = 0; s < u->splits; s++) {
            const float *part = first + s * size;
            float share = part[r] == -INFINITY ? 0 : exp2f(part[r] - most);
            total += share * part[TILE_ROWS + r];
            for (i64 d = 0; d < c->dv; d++)
                out[d] = (s ? out[d] : 0) + share * part[2 * TILE_ROWS + r * c->dv + d];
        }
        first[r] = most, first[TILE_ROWS + r] = total;
    }
    write_rows(c, u, first + 2 * TILE_ROWS, first, first + TILE_ROWS);
}

/* The work in pieces of `chunk` pages or fewer; units == NULL only counts. `parts` counts pieces that need merging. */
static i64 list_units(const Attend *c, i64 chunk, Unit *units, i64 *parts) {
    i64 rows = c->n * (c->q_heads / c->kv_heads), count = 0;
    *parts = 0;
    for (i64 b = 0; b < c->batch; b++) {
        i64 pages = c->layout.tokens ? c->sealed[b] / c->layout.page_tokens : 0;
        i64 splits = MAX(1, (pages + chunk - 1) / chunk);
        for (i64 h = 0; h < c->kv_heads; h++)
            for (i64 row = 0; row < rows; row += TILE_ROWS)
                for (i64 s = 0; s < splits; s++, count++) {
                    i64 from = pages * s / splits, to = pages * (s + 1) / splits;
                    if (units)
                        units[count] = (Unit){b, h, row, MIN(rows - row, TILE_ROWS), from, to - from, s, splits, *parts};
                    *parts += splits > 1;
                }
    }
    return count;
}

static i64 page_chunk(const Attend *c) {
    i64 rows = c->n * (c->q_heads / c->kv_heads), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, pages = 0;
    for (i64 b = 0; b < c->batch && c->layout.tokens; b++) pages += c->sealed[b] / c->layout.page_tokens;
    return MAX(MIN_PAGES, (pages * c->kv_heads * tiles + 8 * c->threads - 1) / (8 * c->threads));
}

/* The most channels with page means of a head, added up over classes of tokens. */
static i64 mean_channels(const Layout *layout) {
    i64 total = 0;
    for (; layout; layout = layout->rest) total += layout->mean_channels;
    return total;
}

static i64 aligned_floats(i64 n) { return ROUND_UP(n, 16) + 16; }

/* All of a thread's scratch in one block, whose first address is `codes`; zero sizes are fine. */
static int scratch_make(const Attend *c, Scratch *t, i64 rows, i64 ld) {
    i64 sizes[] = {aligned_floats((c->max_section + 3) / 4), aligned_floats(rows * c->dk),
                   aligned_floats(rows * c->k_channels), aligned_floats(rows * ld), aligned_floats(rows * c->dv),
                   aligned_floats(rows), aligned_floats(rows), aligned_floats(c->max_section),
                   aligned_floats(c->max_metadata), aligned_floats(c->max_metadata),
                   aligned_floats(FUSED_ROWS * c->max_metadata), aligned_floats(FUSED_ROWS * c->max_metadata),
                   aligned_floats(rows * mean_channels(&c->layout)), aligned_floats(rows)};
    i64 total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) total += sizes[i];
    float *p = aligned_alloc(64, ROUND_UP(total * sizeof(float), 64));
    if (!p) return 0;
    float *at[sizeof sizes / sizeof *sizes];
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) at[i] = p, p += sizes[i];
    *t = (Scratch){.codes = (char *)at[0], .q = at[1], .q_pages = at[2], .logits = at[3], .out = at[4], .most = at[5],
                   .total = at[6], .wide = at[7], .scales = at[8], .zeros = at[9], .folded = at[10], .bias = at[11],
                   .q_means = at[12], .shared = at[13]};
    return 1;
}

/* Returns 0, or 1 when memory is short. */
int kvcc_attend(const Attend *c) {
    i64 chunk = page_chunk(c), parts_count;
    i64 count = list_units(c, chunk, NULL, &parts_count);
    i64 rows = MIN(TILE_ROWS, c->n * (c->q_heads / c->kv_heads));
    i64 ld = ROUND_UP(MAX(c->layout.page_tokens, WINDOW_CHUNK), VL);
    Unit *units = malloc(sizeof(Unit) * MAX(count, 1));
    float *parts = malloc(sizeof(float) * MAX(parts_count * TILE_ROWS * (c->dv + 2), 1));
    int failed = !units || !parts;
    if (!failed) {
        list_units(c, chunk, units, &parts_count);
#ifdef _OPENMP
#pragma omp parallel num_threads(MIN(c->threads, MAX(count, 1)))
#endif
        {
            Scratch t;
            int made = scratch_make(c, &t, rows, ld);
            if (!made) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
                failed = 1;
            }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
            for (i64 i = 0; i < count; i++)
                if (made) attend_unit(c, units + i, &t, parts, ld);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
            for (i64 i = 0; i < count; i++)
                if (units[i].splits > 1 && units[i].split == 0 && !failed) merge_unit(c, units + i, parts);
            if (made) free(t.codes);
        }
    }
    free(units);
    free(parts);
    return failed;
}

/* ---- sealing ---------------------------------------------------------------------------------------------- */

typedef struct {
    Layout layout;
    i64 pages, kv_heads;
    Array k, v;           /* [pages][kv_heads][tokens][channels] */
    const i64 *addresses; /* [pages] */
    i64 threads, max_section;
} Seal;

typedef struct { /* one thread's memory */
    float *x, *token_scales, *means; /* [max_section], [page_tokens], [mean_channels] */
    uint8_t *codes;                  /* [max_section] */
} SealScratch;

/* A side's tokens and channels of one section as floats [runs][length]. */
INLINE void gather_type(const int type, const Section *s, i64 tokens, const char *from, i64 stride_t, i64 stride_c,
                        float *restrict x) {
    for (i64 t = 0; t < tokens; t++)
        for (i64 d = 0; d < s->channels; d++) {
            float value = scalar_at(type, from, t * stride_t + (s->first + d) * stride_c);
            x[s->by_token ? t * s->channels + d : d * tokens + t] = value;
        }
}

static void gather(int type, const Section *s, i64 tokens, const char *from, i64 stride_t, i64 stride_c, float *x) {
    if (type == F32)
        gather_type(F32, s, tokens, from, stride_t, stride_c, x);
    else if (type == F16)
        gather_type(F16, s, tokens, from, stride_t, stride_c, x);
    else
        gather_type(BF16, s, tokens, from, stride_t, stride_c, x);
}

static void quantise_group(const float *x, i64 n, int levels, float clip, half *scale, half *zero, uint8_t *codes) {
    float low = x[0], high = x[0];
    i64 i = 0;
    if (n >= VL) {
        vf lows = load(x), highs = lows;
        for (; i + VL <= n; i += VL) {
            vf y = load(x + i);
            lows = vmin(lows, y), highs = vmax(highs, y);
        }
        low = -largest(-lows), high = largest(highs);
    }
    for (; i < n; i++) low = MIN(low, x[i]), high = MAX(high, x[i]);
    low *= clip, high *= clip;
    const half floor = (half)1e-6f; /* a constant group must not divide by zero */
    half z = (half)low, s = (half)((high - (float)z) / (float)levels);
    if (s < floor) s = floor;
    *zero = z, *scale = s;
    float zf = (float)z, sf = (float)s;
    for (i = 0; i < n; i++) {
        float step = (x[i] - zf) / sf;
        step = step < 0.0f ? 0.0f : step > (float)levels ? (float)levels : step;
        codes[i] = (uint8_t)(int32_t)rintf(step); /* to the nearest, halves to even */
    }
}

static void quantise_unit(const float *x, i64 n, int bits, uint8_t *codes) {
    float half_range = (float)(1 << (bits - 1)), most = 2 * half_range - 1;
    for (i64 i = 0; i < n; i++) {
        float code = floorf(x[i]) + half_range;
        codes[i] = (uint8_t)(int32_t)(code < 0.0f ? 0.0f : code > most ? most : code);
    }
}

static uint8_t nearest_level(const Section *s, float x) {
    if (s->levels == E4M3) return e4m3_of(x);
    const float *sizes = magnitudes(s->levels, s->bits);
    int half_ = 1 << (s->bits - 1), index = 0;
    float size = fabsf(x);
    for (int i = 0; i + 1 < half_; i++) index += size > (sizes[i] + sizes[i + 1]) / 2;
    return (uint8_t)(x < 0 ? index | half_ : index);
}

/* Codes of a group of n values and its scale, for the i-th group. */
static void quantise_scaled(const Section *s, const float *x, i64 n, i64 i, char *scales, uint8_t *codes) {
    if (s->levels == E2M1) {
        float most = 0;
        for (i64 j = 0; j < n; j++) most = MAX(most, fabsf(x[j]));
        uint8_t scale = e4m3_of(MIN(MAX(most / 6.0f, 0x1p-9f), 448.0f));
        for (i64 j = 0; j < n; j++) codes[j] = nearest_level(s, x[j] / e4m3_value(scale));
        scales[i] = (char)scale;
        return;
    }
    const float *sizes = magnitudes(s->levels, s->bits);
    double squares = 0, length = 0; /* in which the order of summation shows in no half */
    int half_ = 1 << (s->bits - 1);
    for (i64 j = 0; j < n; j++) squares += (double)x[j] * x[j];
    float spread = (float)sqrt(squares / (double)n);
    spread = (float)(half)MIN(MAX(spread, 1e-6f), 65504.0f);
    for (i64 j = 0; j < n; j++) {
        codes[j] = nearest_level(s, x[j] / spread);
        float size = sizes[codes[j] & (half_ - 1)];
        length += (double)size * size;
    }
    half scale = (half)MIN((float)sqrt(squares / length), 65504.0f);
    memcpy(scales + 2 * i, &scale, 2);
}

static void seal_raw(int type, const float *x, i64 n, char *to) {
    for (i64 i = 0; i < n; i++) {
        if (type == F32) {
            memcpy(to + 4 * i, x + i, 4);
        } else if (type == F16) {
            half h = (half)x[i];
            memcpy(to + 2 * i, &h, 2);
        } else {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            int nan = (bits & 0x7fffffff) > 0x7f800000;
            uint16_t h = nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            memcpy(to + 2 * i, &h, 2);
        }
    }
}

static void zero_tail(char *page, i64 end) { memset(page + end, 0, ROUND_UP(end, 16) - end); }

static void seal_section(const Layout *layout, const Section *s, const float *x, uint8_t *codes, char *page) {
    i64 runs = s->by_token ? layout->tokens : s->channels, length = s->by_token ? s->channels : layout->tokens;
    i64 bytes = runs * length * s->bits / 8, ng = length / MAX(s->group, 1);
    zero_tail(page, s->codes + bytes);
    if (s->bits >= 16) {
        seal_raw(s->bits == 16 ? (int)layout->half : F32, x, runs * length, page + s->codes);
        return;
    }
    half *scales = (half *)(page + s->scales), *zeros = (half *)(page + s->zeros);
    if (s->steps == UNIT && s->levels == UNIFORM) quantise_unit(x, runs * length, (int)s->bits, codes);
    for (i64 i = 0; s->steps == UNIT && s->levels != UNIFORM && i < runs * length; i++) codes[i] = nearest_level(s, x[i]);
    for (i64 i = 0; s->steps != UNIT && i < runs * ng; i++) {
        const float *group = x + i * s->group;
        if (s->steps == SCALED)
            quantise_scaled(s, group, s->group, i, page + s->scales, codes + i * s->group);
        else
            quantise_group(group, s->group, (1 << s->bits) - 1, (float)s->clip / 100.0f, scales + i, zeros + i,
                           codes + i * s->group);
    }
    if (s->steps == UNIT && s->by_token) length *= runs, runs = 1;
    for (i64 run = 0; run < runs; run++) {
        uint8_t *to = (uint8_t *)page + s->codes + run * (length * s->bits / 8);
        const uint8_t *from = codes + run * length;
        if (s->bits == 2)
            pack_run(2, length, from, to);
        else if (s->bits == 3)
            pack_run(3, length, from, to);
        else if (s->bits == 4)
            pack_run(4, length, from, to);
        else if (s->bits == 5)
            pack_run(5, length, from, to);
        else if (s->bits == 6)
            pack_run(6, length, from, to);
        else if (s->bits == 1)
            pack_run(1, length, from, to);
        else
            memcpy(to, from, length);
    }
    if (s->steps == UNIT) return;
    zero_tail(page, s->scales + (s->levels == E2M1 ? 1 : 2) * runs * ng);
    if (s->steps == ADAPTIVE) zero_tail(page, s->zeros + 2 * runs * ng);
}

/* Squared distances of x from the middles of unit steps, or from the nearest of the magnitudes `sizes`. */
INLINE vf distances(vf x, float half_range, const float *sizes) {
    if (!sizes) {
        vf inside = vmax(vmin(x, broadcast(half_range - 0.5f)), broadcast(-half_range));
        vf off = floorv(inside) + 0.5f - x;
        return off * off;
    }
    vf size = vmax(x, -x), nearest = broadcast(INFINITY);
    for (int j = 0; j < (int)half_range; j++) nearest = vmin(nearest, (size - sizes[j]) * (size - sizes[j]));
    return nearest;
}

INLINE float distance(float x, float half_range, const float *sizes) {
    if (!sizes) {
        float low = floorf(x);
        float off = (low < -half_range ? -half_range : low > half_range - 1 ? half_range - 1 : low) + 0.5f - x;
        return off * off;
    }
    float size = fabsf(x), nearest = INFINITY;
    for (int j = 0; j < (int)half_range; j++) nearest = MIN(nearest, (size - sizes[j]) * (size - sizes[j]));
    return nearest;
}

/* `distances` of x[0 … n-1] over each candidate scale, times the scale squared. */
INLINE void add_errors_from(const float *x, i64 n, float half_range, const float *sizes, float errors[16]) {
    for (int code = 0; code < 16; code++) {
        float inverse = 1.0f / scale_of_code[code], scale = scale_of_code[code];
        vf total = {0};
        float rest = 0;
        i64 i = 0;
        for (; i + VL <= n; i += VL) total += distances(load(x + i) * inverse, half_range, sizes);
        for (; i < n; i++) rest += distance(x[i] * inverse, half_range, sizes);
        errors[code] += (sum(total) + rest) * scale * scale;
    }
}

static void add_errors(const Section *s, const float *x, float errors[16]) {
    float half_range = (float)(1 << (s->bits - 1));
    if (s->levels == NORMAL)
        add_errors_from(x, s->channels, half_range, magnitudes(s->levels, s->bits), errors);
    else
        add_errors_from(x, s->channels, half_range, NULL, errors);
}

/* Means of the first `count` channels over tokens, added up in double: no order of summation shows in a code. */
INLINE void means_type(const int type, i64 tokens, i64 count, const char *from, i64 stride_t, i64 stride_c, float *means) {
    for (i64 first = 0, n; first < count; first += n) {
        double totals[64] = {0};
        n = MIN(count - first, 64);
        for (i64 t = 0; t < tokens; t++)
            for (i64 d = 0; d < n; d++) totals[d] += scalar_at(type, from, t * stride_t + (first + d) * stride_c);
        for (i64 d = 0; d < n; d++) means[first + d] = (float)(totals[d] / (double)tokens);
    }
}

/* Store codes of a head's page means of K; see kernels/page_means.py. Returns what they stand for, or null for none. */
static const float *seal_means(const Seal *c, const Layout *layout, i64 first_token, i64 n, i64 h, float *means) {
    i64 place = layout->page_means[2 * h], count = layout->page_means[2 * h + 1];
    if (!count) return NULL;
    const float *steps = layout->mean_steps + h * layout->mean_channels;
    const char *from = element(&c->k, n, h, first_token);
    i64 stride_t = c->k.stride[2], stride_c = c->k.stride[3];
    if (c->k.type == F32)
        means_type(F32, layout->tokens, count, from, stride_t, stride_c, means);
    else if (c->k.type == F16)
        means_type(F16, layout->tokens, count, from, stride_t, stride_c, means);
    else
        means_type(BF16, layout->tokens, count, from, stride_t, stride_c, means);
    char *page = (char *)c->addresses[n];
    int8_t *to = (int8_t *)page + place;
    for (i64 d = 0; d < count; d++) {
        float code = rintf(means[d] / steps[d]); /* to the nearest, halves to even */
        code = code < -127.0f ? -127.0f : code > 127.0f ? 127.0f : code;
        to[d] = (int8_t)(int32_t)code;
        means[d] = code * steps[d];
    }
    zero_tail(page, place + count);
    return means;
}

/* A section's channels of `tokens` tokens, as gathered, less means of the side's first `count`. */
static void less_means(const Section *s, i64 tokens, const float *means, i64 count, float *x) {
    i64 some = MIN(s->channels, count - s->first);
    for (i64 d = 0; d < some && !s->by_token; d++)
        for (i64 t = 0; t < tokens; t++) x[d * tokens + t] -= means[s->first + d];
    for (i64 t = 0; t < tokens && s->by_token; t++)
        for (i64 d = 0; d < some; d++) x[t * s->channels + d] -= means[s->first + d];
}

/* Choose and store the scales of a head's tokens, for one side of a page; see kernels/token_scales.py. */
static void seal_token_scales(const Seal *c, const Layout *layout, i64 first_token, int side, i64 n, i64 h,
                              const float *means, float *x, float *scales) {
    const Array *from = side ? &c->v : &c->k;
    i64 tokens = layout->tokens, first = layout->index[2 * h + side], last = layout->index[2 * h + side + 1];
    char *page = (char *)c->addresses[n];
    uint8_t *to = (uint8_t *)page + layout->token_scales[2 * h + side];
    memset(to, 0, tokens / 2);
    zero_tail(page, layout->token_scales[2 * h + side] + tokens / 2);
    for (i64 t = 0; t < tokens; t++) {
        float errors[16] = {0};
        const char *row = element(from, n, h, first_token + t);
        for (i64 j = first; j < last; j++) {
            const Section *s = layout->sections + j;
            for (i64 d = 0; d < s->channels; d++) x[d] = element_at(from->type, row, (s->first + d) * from->stride[3]);
            if (means) less_means(s, 1, means, layout->page_means[2 * h + 1], x);
            add_errors(s, x, errors);
        }
        int best = first < last ? 0 : 3;
        for (int code = 1; code < 16 && first < last; code++)
            if (errors[code] < errors[best]) best = code;
        scales[t] = scale_of_code[best];
        to[t % (tokens / 2)] |= (uint8_t)(t < tokens / 2 ? best : best << 4);
    }
}

static void over_scales(const Section *s, i64 tokens, const float *scales, float *x) {
    for (i64 t = 0; t < tokens; t++)
        for (i64 d = 0; d < s->channels; d++) x[s->by_token ? t * s->channels + d : d * tokens + t] /= scales[t];
}

/* One side of a head, of the tokens of one class. */
static void seal_side(const Seal *c, const Layout *layout, i64 first_token, int side, i64 n, i64 h, SealScratch *t) {
    const Array *from = side ? &c->v : &c->k;
    const float *means = side ? NULL : seal_means(c, layout, first_token, n, h, t->means), *scales = NULL;
    if (layout->token_scales[2 * h + side] >= 0) {
        seal_token_scales(c, layout, first_token, side, n, h, means, t->x, t->token_scales);
        scales = t->token_scales;
    }
    for (i64 j = layout->index[2 * h + side]; j < layout->index[2 * h + side + 1]; j++) {
        const Section *s = layout->sections + j;
        gather(from->type, s, layout->tokens, element(from, n, h, first_token), from->stride[2], from->stride[3], t->x);
        if (means) less_means(s, layout->tokens, means, layout->page_means[2 * h + 1], t->x);
        if (scales) over_scales(s, layout->tokens, scales, t->x);
        seal_section(layout, s, t->x, t->codes, (char *)c->addresses[n]);
    }
}

/* Returns 0, or 1 when memory is short. */
int kvcc_seal(const Seal *c) {
    int failed = 0;
    i64 count = c->pages * c->kv_heads;
#ifdef _OPENMP
#pragma omp parallel num_threads(MIN(c->threads, MAX(count, 1)))
#endif
    {
        SealScratch t = {.x = malloc(sizeof(float) * MAX(c->max_section, 1)),
                         .token_scales = malloc(sizeof(float) * MAX(c->layout.page_tokens, 1)),
                         .means = malloc(sizeof(float) * MAX(mean_channels(&c->layout), 1)),
                         .codes = malloc(MAX(c->max_section, 1))};
        int made = t.x && t.token_scales && t.means && t.codes;
        if (!made) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
            failed = 1;
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (i64 i = 0; i < count; i++) {
            if (!made) continue;
            i64 n = i / c->kv_heads, h = i % c->kv_heads;
            i64 first_token = 0;
            for (const Layout *part = &c->layout; part; first_token += part->tokens, part = part->rest)
                for (int side = 0; side < 2; side++)
                    seal_side(c, part, first_token, side, n, h, &t);
        }
        free(t.x);
        free(t.token_scales);
        free(t.means);
        free(t.codes);
    }
    return failed;
}
