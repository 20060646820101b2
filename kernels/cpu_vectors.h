/* What the C kernels share: VL floats to a vector, whatever the processor has; loads that widen; exp2, tanh, sums.
 * Portable C with GCC/Clang vector extensions, intrinsics where compilers do badly without. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef VL
#if defined(__AVX512F__)
#define VL 16
#else
#define VL 8
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

typedef int64_t i64;
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef vf vf_at __attribute__((aligned(4), may_alias)); /* anywhere in memory */
typedef uint8_t vb __attribute__((vector_size(VL)));
typedef int8_t vsb __attribute__((vector_size(VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef vb vb_at __attribute__((aligned(1), may_alias));
typedef vsb vsb_at __attribute__((aligned(1), may_alias));
typedef vh vh_at __attribute__((aligned(1), may_alias));
typedef _Float16 half;

enum { U8, F16, BF16, F32, S8 }; /* element types; kernels/cpu.py numbers them the same */
static const float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

/* ---- loads and stores -------------------------------------------------------------------------------------- */

INLINE i64 size_of(int type) { return type == U8 || type == S8 ? 1 : type == F32 ? 4 : 2; }

INLINE float scalar_at(int type, const char *base, i64 i) {
    if (type == U8) return ((const uint8_t *)base)[i];
    if (type == S8) return ((const int8_t *)base)[i];
    if (type == F16) {
        half h;
        memcpy(&h, base + 2 * i, 2);
        return (float)h;
    }
    if (type == BF16) {
        uint16_t h;
        memcpy(&h, base + 2 * i, 2);
        uint32_t bits = (uint32_t)h << 16;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    float f;
    memcpy(&f, base + 4 * i, 4);
    return f;
}

/* VL bytes as integers. */
INLINE vi bytes_at(const char *base) {
#if VL == 8 && defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)base));
#elif VL == 16 && defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)base));
#else
    return __builtin_convertvector(*(const vb_at *)base, vi);
#endif
}

/* VL bytes with sign as integers. */
INLINE vi signed_bytes_at(const char *base) {
#if VL == 8 && defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)base));
#elif VL == 16 && defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)base));
#else
    return __builtin_convertvector(*(const vsb_at *)base, vi);
#endif
}

INLINE vf vector_at(int type, const char *base, i64 i) {
    if (type == F32) return *(const vf_at *)(base + 4 * i);
    if (type == BF16) {
        vi wide = __builtin_convertvector(*(const vh_at *)(base + 2 * i), vi);
        return (vf)(wide << 16);
    }
#if VL == 8 && defined(__AVX2__) && defined(__F16C__)
    if (type == F16) return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(base + 2 * i)));
#elif VL == 16 && defined(__AVX512F__)
    if (type == F16) return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(base + 2 * i)));
#else
    if (type == F16) {
        vf f;
        for (int j = 0; j < VL; j++) f[j] = scalar_at(F16, base, i + j);
        return f;
    }
#endif
    return __builtin_convertvector(type == S8 ? signed_bytes_at(base + i) : bytes_at(base + i), vf);
}

INLINE vf load(const float *p) { return *(const vf_at *)p; }
INLINE void store(float *p, vf x) { *(vf_at *)p = x; }
INLINE vf broadcast(float x) { return x - (vf){0}; }

INLINE vf vmax(vf a, vf b) {
#if VL == 8 && defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi m = a > b;
    return (vf)(((vi)a & m) | ((vi)b & ~m));
#endif
}

INLINE vf vmin(vf a, vf b) { return -vmax(-a, -b); }

/* For |x| below 2^31. */
INLINE vf floorv(vf x) {
    vf whole = __builtin_convertvector(__builtin_convertvector(x, vi), vf);
    vi above = whole > x; /* all ones, which is -1 */
    return whole + __builtin_convertvector(above, vf);
}

INLINE float sum(vf x) {
#if VL == 8 && defined(__AVX2__)
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#elif VL == 16 && defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int j = 0; j < VL; j++) total += x[j];
    return total;
#endif
}

INLINE float largest(vf x) {
#if VL == 8 && defined(__AVX2__)
    __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
#elif VL == 16 && defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#endif
    float most = x[0];
    for (int j = 1; j < VL; j++) most = MAX(most, x[j]);
    return most;
}

/* 2^x to 2 ulp for x <= 127; 2^-126 where less. A polynomial in the fraction, the integer part in the exponent. */
INLINE vf exp2v(vf x) {
    x = vmax(x, broadcast(-126.0f));
    vf shifted = x + 12582912.0f; /* 1.5 * 2^23: rounds to an integer, which lies in the low bits */
    vf f = x - (shifted - 12582912.0f);
    vf p = broadcast(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}

INLINE vf tanhv(vf x) {
    vf e = exp2v(vmin(x, broadcast(20.0f)) * (2 * LOG2E));
    return 1.0f - 2.0f / (e + 1.0f);
}
