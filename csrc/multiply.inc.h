/* acc[i * nv + v] += sum over k of a[i * a_row + k * a_depth] * b[k * b_depth + v * VLEN], the one
 * inner loop of it all. b is of `dtype`, a and the sums of the compute dtype. */
static ALWAYS_INLINE void FN(multiply)(vec *acc, int rows, int nv, idx depth, const REAL *a,
                                       idx a_row, idx a_depth, const void *b, idx b_depth,
                                       int dtype)
{
    const idx size = FN(size_of)(dtype);
    const char *bytes = b;
    for (idx k = 0; k < depth; k++, a += a_depth, bytes += b_depth * size) {
        vec bk[8];
        EACH (v, nv)
            bk[v] = FN(load_as)(bytes + v * VLEN * size, dtype);
        EACH (i, rows) {
            const vec ai = v_set1(a[i * a_row]);
            EACH (v, nv)
                acc[i * nv + v] = v_fma(ai, bk[v], acc[i * nv + v]);
        }
    }
}
