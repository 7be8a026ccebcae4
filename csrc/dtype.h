/* One element of each storage dtype, to and from the compute dtypes. Reads are branch-free, so
 * that compilers vectorise the row loops around them; memcpy allows any alignment. */
#ifndef MHA_DTYPE_H
#define MHA_DTYPE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t mha_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float mha_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline uint16_t mha_read16(const char *p)
{
    uint16_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

static inline float mha_from_bool(const char *p) { return *p ? 0.0f : -INFINITY; }

/* IEEE binary16: place the 15 magnitude bits in a float and move the exponent bias with one exact
 * multiplication; exponent 31 (inf, NaN) is then restored. */
static inline float mha_from_f16(const char *p)
{
    uint32_t h = mha_read16(p), magnitude = (h & 0x7fff) << 13;
    uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0;
    return mha_float(mha_bits(mha_float(magnitude) * 0x1p112f) | special | (h & 0x8000) << 16);
}

/* Round to nearest even. Below 2^-14 the addition of 0.5 rounds at binary16's fixed spacing. */
static inline void mha_to_f16(char *p, double y)
{
    uint32_t u = mha_bits((float)y), sign = u >> 16 & 0x8000;
    uint16_t h;
    u &= 0x7fffffff;
    if (u > 0x7f800000u)
        h = 0x7e00;
    else if (u >= 0x477ff000u)
        h = 0x7c00;
    else if (u < 0x38800000u)
        h = (uint16_t)(mha_bits(mha_float(u) + 0.5f) - mha_bits(0.5f));
    else
        h = (uint16_t)((u + 0xc8000fffu + (u >> 13 & 1)) >> 13);
    h |= (uint16_t)sign;
    memcpy(p, &h, sizeof h);
}

static inline float mha_from_bf16(const char *p)
{
    return mha_float((uint32_t)mha_read16(p) << 16);
}

static inline void mha_to_bf16(char *p, double y)
{
    uint32_t u = mha_bits((float)y);
    int nan = (u & 0x7fffffff) > 0x7f800000u;
    uint16_t h = (uint16_t)(nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
    memcpy(p, &h, sizeof h);
}

static inline float mha_from_f32(const char *p)
{
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void mha_to_f32(char *p, double y)
{
    float x = (float)y;
    memcpy(p, &x, sizeof x);
}

static inline double mha_from_f64(const char *p)
{
    double x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void mha_to_f64(char *p, double y) { memcpy(p, &y, sizeof y); }

#endif
