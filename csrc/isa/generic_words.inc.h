/* The vocabulary in plain C, for any REAL and VLEN. It runs anywhere and documents the words. */
typedef struct {
    REAL x[VLEN];
} vec;

WORD vec v_load_n(const REAL *p, int n)
{
    vec r = {{0}};
    memcpy(r.x, p, sizeof(REAL) * (size_t)n);
    return r;
}
WORD void v_store_n(REAL *p, vec a, int n) { memcpy(p, a.x, sizeof(REAL) * (size_t)n); }
WORD vec v_load(const REAL *p) { return v_load_n(p, VLEN); }
WORD void v_store(REAL *p, vec a) { v_store_n(p, a, VLEN); }
WORD vec v_load_f16(const void *p)
{
    vec r;
    EACH (i, VLEN)
        r.x[i] = (REAL)mha_from_f16((const char *)p + 2 * i);
    return r;
}
WORD vec v_load_bf16(const void *p)
{
    vec r;
    EACH (i, VLEN)
        r.x[i] = (REAL)mha_from_bf16((const char *)p + 2 * i);
    return r;
}
WORD vec v_set1(REAL x)
{
    vec r;
    EACH (i, VLEN)
        r.x[i] = x;
    return r;
}
WORD vec v_add(vec a, vec b)
{
    EACH (i, VLEN)
        a.x[i] += b.x[i];
    return a;
}
WORD vec v_sub(vec a, vec b)
{
    EACH (i, VLEN)
        a.x[i] -= b.x[i];
    return a;
}
WORD vec v_mul(vec a, vec b)
{
    EACH (i, VLEN)
        a.x[i] *= b.x[i];
    return a;
}
WORD vec v_div(vec a, vec b)
{
    EACH (i, VLEN)
        a.x[i] /= b.x[i];
    return a;
}
WORD vec v_fma(vec a, vec b, vec c)
{
    EACH (i, VLEN)
        a.x[i] = FMA(a.x[i], b.x[i], c.x[i]);
    return a;
}
WORD vec v_max(vec a, vec b)
{
    EACH (i, VLEN)
        a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return a;
}
WORD vec v_if_equal(vec a, vec b, vec x, vec y)
{
    EACH (i, VLEN)
        y.x[i] = a.x[i] == b.x[i] ? x.x[i] : y.x[i];
    return y;
}
WORD vec v_if_less(vec a, vec b, vec x, vec y)
{
    EACH (i, VLEN)
        y.x[i] = a.x[i] < b.x[i] ? x.x[i] : y.x[i];
    return y;
}
WORD vec v_pow2(vec t)
{
    EACH (i, VLEN) {
        BITS u;
        memcpy(&u, &t.x[i], sizeof u);
        u <<= MANTISSA;
        memcpy(&t.x[i], &u, sizeof u);
    }
    return t;
}
WORD void v_transpose(vec *v)
{
    for (int j = 0; j < VLEN; j++)
        for (int i = 0; i < j; i++) {
            const REAL x = v[i].x[j];
            v[i].x[j] = v[j].x[i];
            v[j].x[i] = x;
        }
}
