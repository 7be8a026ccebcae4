/* C = A B, the one inner loop behind scores and weighted sums, by strides. A is read number by
 * number, so any strides are fine; B and C are rows of vectors. Three chains stay apart: scores of
 * keys in the lanes, whose K is transposed in registers and never lies in memory as a B
 * (key_panels.inc.h); the last few columns of them and of values, which are no whole vector; and
 * values where some product must be left out (value_segment_guarded, keys_value_tail). */

typedef struct {
    const REAL *a;
    idx a_row, a_depth;
    const void *b;
    idx b_depth; /* in elements of b's dtype */
    idx depth;
    REAL *c;
    idx c_row;
    /* One a column, in memory: in registers they would displace the operands of the loop. */
    REAL *max;
    const REAL *old_factor, *new_factor;
} FN(product);

/* What becomes of a register tile: c = A B; the same, and `max` takes it in; c += A B, carrying on
 * c's chains; c = c * old_factor + A B * new_factor. */
enum { FN(STORE), FN(STORE_MAX), FN(ADD), FN(MERGE) };

/* acc[i * nv + v] += A B of `rows` rows by nv vectors. b is of `dtype`, all else of the compute
 * dtype. */
static ALWAYS_INLINE void FN(multiply)(vec *acc, const FN(product) * p, idx row, int rows, int nv,
                                       int dtype)
{
    const idx size = FN(size_of)(dtype);
    const REAL *a = p->a + row * p->a_row;
    const char *b = p->b;
    for (idx k = 0; k < p->depth; k++, a += p->a_depth, b += p->b_depth * size) {
        vec bk[8];
        EACH (v, nv)
            bk[v] = FN(load_as)(b + v * VLEN * size, dtype);
        EACH (i, rows) {
            const vec ai = v_set1(a[i * p->a_row]);
            EACH (v, nv)
                acc[i * nv + v] = v_fma(ai, bk[v], acc[i * nv + v]);
        }
    }
}

/* One register tile. */
static ALWAYS_INLINE void FN(product_tile)(const FN(product) * p, idx row, int rows, int nv,
                                           int ending, int dtype)
{
    vec acc[8 * NV], max[NV];
    REAL *c = p->c + row * p->c_row;
    EACH (i, rows)
        EACH (v, nv)
            acc[i * nv + v] = ending == FN(ADD) ? v_load(c + i * p->c_row + v * VLEN) : v_set1(0);
    FN(multiply)(acc, p, row, rows, nv, dtype);
    EACH (v, nv * (ending == FN(STORE_MAX)))
        max[v] = v_load(p->max + v * VLEN);
    EACH (i, rows)
        EACH (v, nv) {
            REAL *to = c + i * p->c_row + v * VLEN;
            vec x = acc[i * nv + v];
            if (ending == FN(MERGE))
                x = v_fma(v_load(to), v_load(p->old_factor + v * VLEN),
                          v_mul(x, v_load(p->new_factor + v * VLEN)));
            v_store(to, x);
            if (ending == FN(STORE_MAX))
                max[v] = v_max(x, max[v]);
        }
    EACH (v, nv * (ending == FN(STORE_MAX)))
        v_store(p->max + v * VLEN, max[v]);
}

/* Rows [row, end) of C by nv vectors; what comes next is fetched between register tiles. */
static ALWAYS_INLINE void FN(product_rows)(mha_tile *t, const FN(product) * p, idx row, idx end,
                                           int nv, int ending)
{
    for (; row + ROWS(nv) <= end; row += ROWS(nv)) {
        FN(product_tile)(p, row, ROWS(nv), nv, ending, DTYPE);
        FN(fetch_ahead)(t);
    }
    for (; row + 2 <= end; row += 2)
        FN(product_tile)(p, row, 2, nv, ending, DTYPE);
    if (row < end)
        FN(product_tile)(p, row, 1, nv, ending, DTYPE);
}
