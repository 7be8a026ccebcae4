/* AVX-512 F, DQ, BW, VL and F16C: 16 floats or 8 doubles, 32 registers. */
#include "../mha.h"
#include "vocabulary.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define NV 4
#define ROWS(nv) ((nv) == 4 ? 6 : 8)
#define VALUE_NV(rows) 4

#define REAL float
#define SUFFIX f32
#define VLEN 16
typedef __m512 vec;

WORD vec v_load(const float *p) { return _mm512_loadu_ps(p); }
WORD void v_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
WORD vec v_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
WORD void v_store_n(float *p, vec a, int n)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a);
}
WORD vec v_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
WORD vec v_load_bf16(const void *p)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
WORD vec v_set1(float x) { return _mm512_set1_ps(x); }
WORD vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
WORD vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
WORD vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
WORD vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
WORD vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
WORD vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
WORD vec v_if_equal(vec a, vec b, vec x, vec y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x);
}
WORD vec v_if_less(vec a, vec b, vec x, vec y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
WORD vec v_pow2(vec t)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t), 23));
}
WORD void v_transpose(vec *v)
{
    vec w[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        w[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) { /* v[i + c]: column c + 4 * (128-bit lane), rows i.. */
        v[i] = _mm512_shuffle_ps(w[i], w[i + 2], 0x44);
        v[i + 1] = _mm512_shuffle_ps(w[i], w[i + 2], 0xee);
        v[i + 2] = _mm512_shuffle_ps(w[i + 1], w[i + 3], 0x44);
        v[i + 3] = _mm512_shuffle_ps(w[i + 1], w[i + 3], 0xee);
    }
    EACH (c, 4) {
        w[c] = _mm512_shuffle_f32x4(v[c], v[c + 4], 0x88);
        w[c + 4] = _mm512_shuffle_f32x4(v[c], v[c + 4], 0xdd);
        w[c + 8] = _mm512_shuffle_f32x4(v[c + 8], v[c + 12], 0x88);
        w[c + 12] = _mm512_shuffle_f32x4(v[c + 8], v[c + 12], 0xdd);
    }
    EACH (c, 4) {
        v[c] = _mm512_shuffle_f32x4(w[c], w[c + 8], 0x88);
        v[c + 8] = _mm512_shuffle_f32x4(w[c], w[c + 8], 0xdd);
        v[c + 4] = _mm512_shuffle_f32x4(w[c + 4], w[c + 12], 0x88);
        v[c + 12] = _mm512_shuffle_f32x4(w[c + 4], w[c + 12], 0xdd);
    }
}

#include "../kernel.inc.h"
#undef REAL
#undef SUFFIX
#undef VLEN

#define REAL double
#define SUFFIX f64
#define VLEN 8
typedef __m512d vec;

WORD vec v_load(const double *p) { return _mm512_loadu_pd(p); }
WORD void v_store(double *p, vec a) { _mm512_storeu_pd(p, a); }
WORD vec v_load_n(const double *p, int n)
{
    return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
WORD void v_store_n(double *p, vec a, int n)
{
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), a);
}
WORD vec v_load_f16(const void *p) { return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(p))); }
WORD vec v_load_bf16(const void *p)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
WORD vec v_set1(double x) { return _mm512_set1_pd(x); }
WORD vec v_add(vec a, vec b) { return _mm512_add_pd(a, b); }
WORD vec v_sub(vec a, vec b) { return _mm512_sub_pd(a, b); }
WORD vec v_mul(vec a, vec b) { return _mm512_mul_pd(a, b); }
WORD vec v_div(vec a, vec b) { return _mm512_div_pd(a, b); }
WORD vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
WORD vec v_max(vec a, vec b) { return _mm512_max_pd(a, b); }
WORD vec v_if_equal(vec a, vec b, vec x, vec y)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ), y, x);
}
WORD vec v_if_less(vec a, vec b, vec x, vec y)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), y, x);
}
WORD vec v_pow2(vec t)
{
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t), 52));
}
WORD void v_transpose(vec *v)
{
    vec w[8];
    UNROLL
    for (int i = 0; i < 8; i += 2) { /* w[i + c]: column c + 2 * (128-bit lane), rows i, i+1 */
        w[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
    }
    EACH (c, 2) {
        v[c] = _mm512_shuffle_f64x2(w[c], w[c + 2], 0x88);
        v[c + 2] = _mm512_shuffle_f64x2(w[c], w[c + 2], 0xdd);
        v[c + 4] = _mm512_shuffle_f64x2(w[c + 4], w[c + 6], 0x88);
        v[c + 6] = _mm512_shuffle_f64x2(w[c + 4], w[c + 6], 0xdd);
    }
    EACH (c, 2) {
        w[c] = _mm512_shuffle_f64x2(v[c], v[c + 4], 0x88);
        w[c + 4] = _mm512_shuffle_f64x2(v[c], v[c + 4], 0xdd);
        w[c + 2] = _mm512_shuffle_f64x2(v[c + 2], v[c + 6], 0x88);
        w[c + 6] = _mm512_shuffle_f64x2(v[c + 2], v[c + 6], 0xdd);
    }
    EACH (i, 8)
        v[i] = w[i];
}

#include "../kernel.inc.h"

const mha_isa mha_isa_avx512 = {"avx512", &kernels_f32, &kernels_f64};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
