/* AVX2, FMA and F16C: 8 floats or 4 doubles, 16 registers. */
#include "../mha.h"
#include "vocabulary.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#define NV 3
#define ROWS(nv) ((nv) == 3 ? 4 : (nv) == 2 ? 6 : 8)
#define VALUE_NV(rows) ((rows) == 4 ? 3 : 8 / (rows))

/* Lane i is all ones where i < n: the masks of the partial loads and stores. */
static ALWAYS_INLINE __m256i first32(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static ALWAYS_INLINE __m256i first64(int n)
{
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

#define REAL float
#define SUFFIX f32
#define VLEN 8
typedef __m256 vec;

WORD vec v_load(const float *p) { return _mm256_loadu_ps(p); }
WORD void v_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
WORD vec v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, first32(n)); }
WORD void v_store_n(float *p, vec a, int n) { _mm256_maskstore_ps(p, first32(n), a); }
WORD vec v_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
WORD vec v_load_bf16(const void *p)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
WORD vec v_set1(float x) { return _mm256_set1_ps(x); }
WORD vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
WORD vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
WORD vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
WORD vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
WORD vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
WORD vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
WORD vec v_if_equal(vec a, vec b, vec x, vec y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
WORD vec v_if_less(vec a, vec b, vec x, vec y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
WORD vec v_pow2(vec t)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
}
WORD void v_transpose(vec *v)
{
    vec w[8];
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        w[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        w[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) { /* v[i + c]: column c + 4 * (128-bit lane), rows i.. */
        v[i] = _mm256_shuffle_ps(w[i], w[i + 2], 0x44);
        v[i + 1] = _mm256_shuffle_ps(w[i], w[i + 2], 0xee);
        v[i + 2] = _mm256_shuffle_ps(w[i + 1], w[i + 3], 0x44);
        v[i + 3] = _mm256_shuffle_ps(w[i + 1], w[i + 3], 0xee);
    }
    EACH (c, 4) {
        w[c] = _mm256_permute2f128_ps(v[c], v[c + 4], 0x20);
        w[c + 4] = _mm256_permute2f128_ps(v[c], v[c + 4], 0x31);
    }
    EACH (i, 8)
        v[i] = w[i];
}

#include "../kernel.inc.h"
#undef REAL
#undef SUFFIX
#undef VLEN

#define REAL double
#define SUFFIX f64
#define VLEN 4
typedef __m256d vec;

WORD vec v_load(const double *p) { return _mm256_loadu_pd(p); }
WORD void v_store(double *p, vec a) { _mm256_storeu_pd(p, a); }
WORD vec v_load_n(const double *p, int n) { return _mm256_maskload_pd(p, first64(n)); }
WORD void v_store_n(double *p, vec a, int n) { _mm256_maskstore_pd(p, first64(n), a); }
WORD vec v_load_f16(const void *p) { return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(p))); }
WORD vec v_load_bf16(const void *p)
{
    const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(p));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(wide, 16)));
}
WORD vec v_set1(double x) { return _mm256_set1_pd(x); }
WORD vec v_add(vec a, vec b) { return _mm256_add_pd(a, b); }
WORD vec v_sub(vec a, vec b) { return _mm256_sub_pd(a, b); }
WORD vec v_mul(vec a, vec b) { return _mm256_mul_pd(a, b); }
WORD vec v_div(vec a, vec b) { return _mm256_div_pd(a, b); }
WORD vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
WORD vec v_max(vec a, vec b) { return _mm256_max_pd(a, b); }
WORD vec v_if_equal(vec a, vec b, vec x, vec y)
{
    return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_EQ_OQ));
}
WORD vec v_if_less(vec a, vec b, vec x, vec y)
{
    return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LT_OQ));
}
WORD vec v_pow2(vec t)
{
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t), 52));
}
WORD void v_transpose(vec *v)
{
    const vec a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
    const vec c = _mm256_unpacklo_pd(v[2], v[3]), d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20);
    v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

#include "../kernel.inc.h"

const mha_isa mha_isa_avx2 = {"avx2", &kernels_f32, &kernels_f64};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
