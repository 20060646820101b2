/* A decode step as a list of records, run by one call. Each record is one fused operation on float32 activations,
 * whose tensors lie where they lay when the step was captured (runtime/captured.py). Attention and linear layers
 * have files of their own; what is small stays on the calling thread, because a barrier would cost more.
 */
#include "cpu_linear.h"
#include "cpu_vectors.h"

typedef struct Attend Attend;
int kvcc_attend(const Attend *c);

enum { LINEAR, RMS_NORM, LAYER_NORM, ROTATE, GATE, ADD, MULTIPLY, STORE, GATHER, PROJECT, ATTEND, SINK }; /* kernels/step.py */
enum { SILU, GELU_TANH, GELU, RELU };
enum { SMALL = 1 << 14 }; /* elements below which one thread is faster */

typedef struct {
    i64 op, rows, cols, kind;
    const void *in[4];
    void *out;
    i64 stride[8]; /* in elements */
    float number;
    void *scratch;
} Record;

#define FLOATS(p) ((const float *)(p))

/* ---- norms: rows of cols; stride 0 of the input, 1 of the output; in: x, weight or null, bias or null ---------- */

INLINE void scale_row(const float *x, float *out, i64 n, const float *w, const float *b, float offset, float mean,
                      float scale) {
    i64 i = 0;
    for (; i + VL <= n; i += VL) {
        vf y = (load(x + i) - mean) * scale;
        if (w) y *= load(w + i) + offset;
        if (b) y += load(b + i);
        store(out + i, y);
    }
    for (; i < n; i++) out[i] = (x[i] - mean) * scale * (w ? w[i] + offset : 1.0f) + (b ? b[i] : 0.0f);
}

static void norm_row(const Record *c, i64 row, int centred) {
    const float *x = FLOATS(c->in[0]) + row * c->stride[0];
    i64 n = c->cols, i = 0;
    float mean = 0, squares = 0;
    if (centred) {
        vf total = {0};
        for (; i + VL <= n; i += VL) total += load(x + i);
        mean = sum(total);
        for (; i < n; i++) mean += x[i];
        mean /= (float)n;
    }
    vf total = {0};
    for (i = 0; i + VL <= n; i += VL) {
        vf y = load(x + i) - mean;
        total += y * y;
    }
    squares = sum(total);
    for (; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(squares / (float)n + c->number);
    scale_row(x, (float *)c->out + row * c->stride[1], n, c->in[1], c->in[2], (float)c->kind, mean, scale);
}

/* ---- rotary positions: in: x, cos, sin; stride 0-2 of x (row, head), 2-3 of out, 4-5 of cos and sin rows -------- */

static void rotate_row(const Record *c, i64 row, i64 heads) {
    const float *cos = FLOATS(c->in[1]) + row * c->stride[4], *sin = FLOATS(c->in[2]) + row * c->stride[5];
    i64 half_ = c->cols / 2;
    for (i64 h = 0; h < heads; h++) {
        const float *x = FLOATS(c->in[0]) + row * c->stride[0] + h * c->stride[1], *y = x + half_;
        float *to = (float *)c->out + row * c->stride[2] + h * c->stride[3], *high = to + half_;
        i64 i = 0;
        for (; i + VL <= half_; i += VL) {
            vf a = load(x + i), b = load(y + i);
            store(to + i, a * load(cos + i) - b * load(sin + i));
            store(high + i, b * load(cos + half_ + i) + a * load(sin + half_ + i));
        }
        for (; i < half_; i++) {
            float a = x[i], b = y[i];
            to[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[half_ + i] + a * sin[half_ + i];
        }
    }
}

/* ---- elementwise ------------------------------------------------------------------------------------------------ */

INLINE vf activate(const int kind, vf x) {
    if (kind == SILU) return x / (exp2v(vmin(x * -LOG2E, broadcast(126.0f))) + 1.0f);
    if (kind == GELU_TANH) {
        vf inner = (x + x * x * x * 0.044715f) * 0.7978845608f;
        return 0.5f * x * (1.0f + tanhv(vmax(inner, broadcast(-20.0f))));
    }
    if (kind == RELU) return vmax(x, broadcast(0.0f));
    vf y;
    for (int i = 0; i < VL; i++) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
    return y;
}

INLINE void gate_row(const int kind, const float *g, const float *u, float *out, i64 n) {
    i64 i = 0;
    for (; i + VL <= n; i += VL) {
        vf y = activate(kind, load(g + i));
        store(out + i, u ? y * load(u + i) : y);
    }
    if (i < n) {
        vf last = {0};
        memcpy(&last, g + i, sizeof(float) * (n - i));
        last = activate(kind, last);
        for (i64 j = 0; i < n; i++, j++) out[i] = u ? last[j] * u[i] : last[j];
    }
}

/* in: gate, up or null; stride 0-2 of gate, up, out rows */
static void gate(const Record *c, i64 row) {
    const float *g = FLOATS(c->in[0]) + row * c->stride[0];
    const float *u = c->in[1] ? FLOATS(c->in[1]) + row * c->stride[1] : NULL;
    float *out = (float *)c->out + row * c->stride[2];
    if (c->kind == SILU)
        gate_row(SILU, g, u, out, c->cols);
    else if (c->kind == GELU_TANH)
        gate_row(GELU_TANH, g, u, out, c->cols);
    else if (c->kind == GELU)
        gate_row(GELU, g, u, out, c->cols);
    else
        gate_row(RELU, g, u, out, c->cols);
}

static void binary(const Record *c, i64 row) {
    const float *a = FLOATS(c->in[0]) + row * c->stride[0], *b = FLOATS(c->in[1]) + row * c->stride[1];
    float *out = (float *)c->out + row * c->stride[2];
    i64 i = 0;
    if (c->op == ADD) {
        for (; i + VL <= c->cols; i += VL) store(out + i, load(a + i) + load(b + i));
        for (; i < c->cols; i++) out[i] = a[i] + b[i];
    } else {
        for (; i + VL <= c->cols; i += VL) store(out + i, load(a + i) * load(b + i));
        for (; i < c->cols; i++) out[i] = a[i] * b[i];
    }
}

/* ---- the cache: one new token a sequence --------------------------------------------------------------------------- */

static void put(int type, char *to, i64 i, float x) {
    if (type == F32) {
        memcpy(to + 4 * i, &x, 4);
    } else if (type == F16) {
        half h = (half)x;
        memcpy(to + 2 * i, &h, 2);
    } else {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint16_t h = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        memcpy(to + 2 * i, &h, 2);
    }
}

/* in: x, slots (int64); stride 0-1 of x (row, head), 2-4 of the window (row, head, slot), 5: heads; kind: its type */
static void store_row(const Record *c, i64 row) {
    i64 slot = ((const i64 *)c->in[1])[row];
    for (i64 h = 0; h < c->stride[5]; h++) {
        const float *x = FLOATS(c->in[0]) + row * c->stride[0] + h * c->stride[1];
        i64 at = row * c->stride[2] + h * c->stride[3] + slot * c->stride[4];
        char *to = (char *)c->out + at * size_of(c->kind);
        if (c->kind == F32)
            memcpy(to, x, sizeof(float) * c->cols);
        else
            for (i64 d = 0; d < c->cols; d++) put(c->kind, to, d, x[d]);
    }
}

/* Queries as pages want them. in: q, channels (int64 [row or 1][heads][cols]), mean [heads][dim] or null; out
 * [row][heads][cols], scratch: bias [row][heads]; stride 0-1 of q, 2 of channels' rows, 3: heads, 4: dim. */
static void gather_row(const Record *c, i64 row) {
    i64 heads = c->stride[3], dim = c->stride[4];
    for (i64 h = 0; h < heads; h++) {
        const float *q = FLOATS(c->in[0]) + row * c->stride[0] + h * c->stride[1];
        const i64 *chosen = (const i64 *)c->in[1] + row * c->stride[2] + h * c->cols;
        float *out = (float *)c->out + (row * heads + h) * c->cols;
        for (i64 i = 0; i < c->cols; i++) out[i] = q[chosen[i]];
        if (!c->in[2]) continue;
        const float *mean = FLOATS(c->in[2]) + h * dim;
        float total = 0;
        for (i64 d = 0; d < dim; d++) total += q[d] * mean[d];
        ((float *)c->scratch)[row * heads + h] = c->number * total;
    }
}

/* Queries in the basis of pages. in: q, basis [KV heads][dim][cols], mean [KV heads][dim] or null; out and scratch as in
 * gather_row; stride 0-1 of q, 2: query heads of a KV head, 3: heads, 4: dim. */
static void project_row(const Record *c, i64 row) {
    i64 heads = c->stride[3], dim = c->stride[4], cols = c->cols;
    for (i64 h = 0; h < heads; h++) {
        const float *q = FLOATS(c->in[0]) + row * c->stride[0] + h * c->stride[1];
        i64 kv = h / c->stride[2];
        const float *basis = FLOATS(c->in[1]) + kv * dim * cols;
        float *out = (float *)c->out + (row * heads + h) * cols;
        i64 i = 0;
        for (; i + 4 * VL <= cols; i += 4 * VL) {
            vf acc[4] = {{0}, {0}, {0}, {0}};
            for (i64 d = 0; d < dim; d++)
                for (int j = 0; j < 4; j++) acc[j] += q[d] * load(basis + d * cols + i + j * VL);
            for (int j = 0; j < 4; j++) store(out + i + j * VL, acc[j]);
        }
        for (; i < cols; i++) {
            float total = 0;
            for (i64 d = 0; d < dim; d++) total += q[d] * basis[d * cols + i];
            out[i] = total;
        }
        if (!c->in[2]) continue;
        const float *mean = FLOATS(c->in[2]) + kv * dim;
        float total = 0;
        for (i64 d = 0; d < dim; d++) total += q[d] * mean[d];
        ((float *)c->scratch)[row * heads + h] = c->number * total;
    }
}

/* A sink's logit takes its share of the softmax and gives nothing. in: lse [rows][heads], logits [heads];
 * out [rows][heads][cols]; stride 0: heads. */
static void sink_row(const Record *c, i64 row) {
    for (i64 h = 0; h < c->stride[0]; h++) {
        i64 at = row * c->stride[0] + h;
        float share = 1.0f / (1.0f + expf(FLOATS(c->in[1])[h] - FLOATS(c->in[0])[at]));
        float *out = (float *)c->out + at * c->cols;
        for (i64 d = 0; d < c->cols; d++) out[d] *= share;
    }
}

/* ---- running --------------------------------------------------------------------------------------------------------- */

static void row_of(const Record *c, i64 row) {
    switch (c->op) {
    case RMS_NORM: norm_row(c, row, 0); break;
    case LAYER_NORM: norm_row(c, row, 1); break;
    case ROTATE: rotate_row(c, row, c->stride[6]); break;
    case GATE: gate(c, row); break;
    case ADD:
    case MULTIPLY: binary(c, row); break;
    case STORE: store_row(c, row); break;
    case GATHER: gather_row(c, row); break;
    case PROJECT: project_row(c, row); break;
    default: sink_row(c, row);
    }
}

static void by_rows(const Record *c, int threads) {
    i64 heads = c->op == ROTATE ? c->stride[6] : 1;
    if (threads > 1 && c->rows * c->cols * heads > SMALL) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
        for (i64 row = 0; row < c->rows; row++) row_of(c, row);
    } else {
        for (i64 row = 0; row < c->rows; row++) row_of(c, row);
    }
}

/* Returns 0, or 1 + the number of the record for whose scratch memory was short. */
int kvcc_run(const Record *records, i64 count, int threads) {
    for (i64 i = 0; i < count; i++) {
        const Record *c = records + i;
        int failed = 0;
        if (c->op == LINEAR)
            failed = kvcc_linear(c->in[1], c->in[0], c->stride[0], c->rows, c->out, c->stride[1], c->in[2], 0, threads,
                                 c->scratch);
        else if (c->op == ATTEND)
            failed = kvcc_attend(c->in[0]);
        else
            by_rows(c, threads);
        if (failed) return (int)(i + 1);
    }
    return 0;
}
