/* The vocabulary in plain C, for any REAL and VLEN. It runs anywhere and documents the words. */
typedef struct {
    REAL x[VLEN];
} vec;

#define EACH for (int i = 0; i < VLEN; i++)

static ALWAYS_INLINE vec v_load_n(const REAL *p, int n)
{
    vec r;
    EACH r.x[i] = i < n ? p[i] : 0;
    return r;
}
static ALWAYS_INLINE void v_store_n(REAL *p, vec a, int n)
{
    EACH if (i < n) p[i] = a.x[i];
}
static ALWAYS_INLINE vec v_load(const REAL *p)
{
    return v_load_n(p, VLEN);
}
static ALWAYS_INLINE void v_store(REAL *p, vec a)
{
    v_store_n(p, a, VLEN);
}
static ALWAYS_INLINE vec v_set1(REAL x)
{
    vec r;
    EACH r.x[i] = x;
    return r;
}
static ALWAYS_INLINE vec v_add(vec a, vec b)
{
    EACH a.x[i] += b.x[i];
    return a;
}
static ALWAYS_INLINE vec v_sub(vec a, vec b)
{
    EACH a.x[i] -= b.x[i];
    return a;
}
static ALWAYS_INLINE vec v_mul(vec a, vec b)
{
    EACH a.x[i] *= b.x[i];
    return a;
}
static ALWAYS_INLINE vec v_div(vec a, vec b)
{
    EACH a.x[i] /= b.x[i];
    return a;
}
static ALWAYS_INLINE vec v_fma(vec a, vec b, vec c)
{
    EACH a.x[i] = FMA(a.x[i], b.x[i], c.x[i]);
    return a;
}
static ALWAYS_INLINE vec v_max(vec a, vec b)
{
    EACH a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return a;
}
static ALWAYS_INLINE vec v_if_equal(vec a, vec b, vec x, vec y)
{
    EACH y.x[i] = a.x[i] == b.x[i] ? x.x[i] : y.x[i];
    return y;
}
static ALWAYS_INLINE vec v_if_less(vec a, vec b, vec x, vec y)
{
    EACH y.x[i] = a.x[i] < b.x[i] ? x.x[i] : y.x[i];
    return y;
}
static ALWAYS_INLINE vec v_pow2(vec t)
{
    EACH {
        BITS u;
        memcpy(&u, &t.x[i], sizeof u);
        u <<= MANTISSA;
        memcpy(&t.x[i], &u, sizeof u);
    }
    return t;
}
static ALWAYS_INLINE void v_transpose(vec *v)
{
    for (int j = 0; j < VLEN; j++)
        for (int i = 0; i < j; i++) {
            const REAL x = v[i].x[j];
            v[i].x[j] = v[j].x[i];
            v[j].x[i] = x;
        }
}
#undef EACH
