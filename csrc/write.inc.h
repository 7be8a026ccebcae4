/* Scores that leave: as weights, exp2(s - m) / l, once attention knows m and l of the whole row, or
 * as the products of a linear layer, x W^T + bias. */

/* Rule 5 of the canonical arithmetic. */
static ALWAYS_INLINE vec FN(weights_of)(vec s, vec m, vec inverse)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), zero = v_set1(0);
    return v_if_equal(s, minus_inf, zero, v_mul(FN(exp2_vec)(v_sub(s, m)), inverse));
}

/* S^T of keys j to j + n - 1 of one vector of rows, to the rows that are wanted. */
static ALWAYS_INLINE void FN(write_chunk)(const REAL *s, const REAL *m, const REAL *inverse,
                                          const REAL *addend, REAL *const *row, int j, int n)
{
    vec v[VLEN];
    EACH (c, VLEN) {
        const vec x = v_load(s + (c < n ? c : 0) * LANES);
        v[c] = m        ? FN(weights_of)(x, v_load(m), v_load(inverse))
               : addend ? v_add(x, v_set1(addend[c < n ? c : 0]))
                        : x;
    }
    v_transpose(v);
    EACH (i, VLEN)
        if (row[i]) {
            if (n == VLEN)
                v_store(row[i] + j, v[i]);
            else
                v_store_n(row[i] + j, v[i], n);
        }
}

/* Where the numbers of a row go: to their place, or to a strip on the way to another dtype. */
static REAL *FN(target)(const mha_tile *t, int lane, int begin, int strip)
{
    const mha_array *a = &t->problem->scores;
    char *row = t->scores_row[lane];
    if (!row)
        return NULL;
    return a->dtype == DTYPE ? (REAL *)row + t->key0 + begin : (REAL *)t->strip + strip;
}

static void FN(convert)(const mha_tile *t, int lane, int begin, int keys, const REAL *from)
{
    const mha_array *a = &t->problem->scores;
    if (a->dtype != DTYPE && t->scores_row[lane])
        FN(write_row)(t->scores_row[lane] + (t->key0 + begin) * a->col, from, a->col, keys,
                      a->dtype);
}

static void FN(prefill_write_scores)(mha_tile *t)
{
    const mha_problem *p = t->problem;
    const REAL *addend = p->addend ? (const REAL *)p->addend + t->key0 : NULL;
    for (int g = 0; g < t->vectors; g++) {
        const int begin = t->begin[g], keys = t->end[g] - begin, live = t->rows - g * VLEN;
        const REAL *s = (const REAL *)t->s + begin * LANES + g * VLEN;
        REAL m[VLEN] = {0}, inverse[VLEN] = {0}, *row[VLEN];
        for (int i = 0; i < VLEN; i++) {
            const int lane = g * VLEN + i;
            row[i] = FN(target)(t, lane, begin, i * MHA_KEY_BLOCK);
            if (p->sums.data && i < live) {
                m[i] = ((const REAL *)t->sums_row[lane])[0];
                inverse[i] = ((const REAL *)t->sums_row[lane])[1];
            }
        }
        for (int j = 0; j < keys; j += VLEN) {
            const REAL *add = addend ? addend + begin + j : NULL;
            const int n = keys - j < VLEN ? keys - j : VLEN;
            if (p->sums.data)
                FN(write_chunk)(s + j * LANES, m, inverse, NULL, row, j, n);
            else
                FN(write_chunk)(s + j * LANES, NULL, NULL, add, row, j, n);
        }
        for (int i = 0; i < VLEN && i < live; i++)
            FN(convert)(t, g * VLEN + i, begin, keys, row[i]);
    }
}

static void FN(decode_write_scores)(mha_tile *t)
{
    const mha_problem *p = t->problem;
    const int begin = t->begin[0], keys = t->end[0] - begin;
    const REAL *addend = p->addend ? (const REAL *)p->addend + t->key0 + begin : NULL;
    for (int lane = 0; lane < t->rows; lane++) {
        const REAL *s = (const REAL *)t->s + lane * SCORE_ROW + begin;
        const REAL *sums = (const REAL *)t->sums_row[lane];
        REAL *row = FN(target)(t, lane, begin, 0);
        for (int j = 0; row && j < keys; j += VLEN) {
            const int n = keys - j < VLEN ? keys - j : VLEN;
            vec x = v_load(s + j);
            if (sums)
                x = FN(weights_of)(x, v_set1(sums[0]), v_set1(sums[1]));
            else if (addend)
                x = v_add(x, v_load_n(addend + j, n));
            v_store_n(row + j, x, n);
        }
        FN(convert)(t, lane, begin, keys, row);
    }
}
