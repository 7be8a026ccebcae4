/* Few query rows, after the scores of decode_scores.inc.h: softmax, weighted sum, result. */

static void FN(decode_softmax)(mha_tile *t)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), minus_zero = v_set1((REAL)-0.0);
    for (int row = 0; row < t->rows; row++) {
        REAL *s = (REAL *)t->s + row * SCORE_ROW, sum = 0;
        const vec m = v_set1(((REAL *)t->m_block)[row]);
        for (int j = t->begin[0]; j < t->end[0]; j += VLEN) {
            const vec x = v_load(s + j), p = FN(exp2_vec)(v_sub(x, m));
            v_store(s + j, v_if_equal(x, minus_inf, minus_zero, p));
        }
        int j = t->begin[0];
        for (; j + VLEN <= t->end[0]; j += VLEN) /* unrolled: a chain that other work can overlap */
            EACH (i, VLEN)
                sum += s[j + i];
        for (; j < t->end[0]; j++)
            sum += s[j];
        ((REAL *)t->l_block)[row] = sum;
    }
}

/* O += P V for `rows` queries and nv vectors of head dims from d on. */
static ALWAYS_INLINE void FN(decode_value_chunk)(const mha_tile *t, const FN(product) * whole,
                                                 idx d, int rows, int nv, int dtype)
{
    const idx size = FN(size_of)(dtype), stride = whole->b_depth * size;
    FN(product) p = *whole;
    p.b = (const char *)whole->b + d * size;
    p.c += d;
    if (!FN(values_pass_once)(t)) {
        const char *line = (const char *)p.b + p.depth * stride;
        for (idx i = 0; i < p.depth; i++, line += stride)
            for (idx at = 0; at < nv * VLEN * size; at += 64)
                PREFETCH(line + at);
    }
    FN(product_tile)(&p, 0, rows, nv, FN(ADD), dtype, NULL);
}

/* The same for one row and n <= VLEN head dims: the last ones, and all where V holds an Inf or
 * NaN and some key is hidden. Then the keys marked by -0 are left out. */
static void FN(decode_value_tail)(const mha_tile *t, int begin, int end, int row, idx d, int n,
                                  int guarded)
{
    const mha_rows *v = &t->v_block;
    const idx size = FN(size_of)(v->dtype);
    const REAL *p = (const REAL *)t->s + row * SCORE_ROW;
    REAL *part = (REAL *)t->o_block + row * t->problem->head_dim_v + d;
    vec acc = n == VLEN ? v_load(part) : v_load_n(part, n);
    for (int j = begin; j < end; j++)
        if (!guarded || p[j] != 0 || !signbit(p[j]))
            acc = v_fma(
                v_set1(p[j]),
                FN(load_up_to)((const char *)v->data + (j * v->row + d) * size, n, v->dtype), acc);
    if (n == VLEN)
        v_store(part, acc);
    else
        v_store_n(part, acc, n);
}

static ALWAYS_INLINE void FN(decode_value_rows)(const mha_tile *t, int begin, int end, int guarded,
                                                int dtype, int row, int rows)
{
    const int nv = DECODE_NV(rows);
    const idx dim = t->problem->head_dim_v;
    const mha_rows *v = &t->v_block;
    const FN(product) p = {
        .a = (const REAL *)t->s + row * SCORE_ROW + begin,
        .a_row = SCORE_ROW,
        .a_depth = 1,
        .b = (const char *)v->data + begin * v->row * FN(size_of)(dtype),
        .b_depth = v->row,
        .depth = end - begin,
        .c = (REAL *)t->o_block + row * dim,
        .c_row = dim,
    };
    idx d = 0;
    for (; d + nv * VLEN <= dim && !guarded; d += nv * VLEN)
        FN(decode_value_chunk)(t, &p, d, rows, nv, dtype);
    for (; d + VLEN <= dim && !guarded; d += VLEN)
        FN(decode_value_chunk)(t, &p, d, rows, 1, dtype);
    for (; d < dim; d += VLEN)
        for (int i = 0; i < rows; i++)
            FN(decode_value_tail)(t, begin, end, row + i, d, dim - d < VLEN ? (int)(dim - d) : VLEN,
                                  guarded);
}

/* Merge the partial result `part`, [rows][head_dim_v], by the factors a and b. */
static void FN(decode_merge_part)(mha_tile *t, const REAL *part)
{
    const idx dim = t->problem->head_dim_v;
    for (int row = 0; row < t->rows; row++) {
        const vec a = v_set1(((REAL *)t->a)[row]), b = v_set1(((REAL *)t->b)[row]);
        REAL *o = (REAL *)t->o + row * dim;
        const REAL *add = part + row * dim;
        idx d = 0;
        for (; d + VLEN <= dim; d += VLEN)
            v_store(o + d, v_fma(v_load(o + d), a, v_mul(v_load(add + d), b)));
        if (d < dim) {
            const int n = (int)(dim - d);
            v_store_n(o + d, v_fma(v_load_n(o + d, n), a, v_mul(v_load_n(add + d, n), b)), n);
        }
    }
}

static void FN(decode_merge)(mha_tile *t, const void *record)
{
    const char *r = record;
    const idx l = (char *)t->l - (char *)t->m, o = (char *)t->o - (char *)t->m;
    FN(merge_sums)(t, (const REAL *)r, (const REAL *)(r + l), 1);
    FN(decode_merge_part)(t, (const REAL *)(r + o));
}

static ALWAYS_INLINE void FN(decode_values)(mha_tile *t, int guarded, int dtype)
{
    const int run = FN(values_pass_once)(t) ? MHA_KEY_BLOCK : VALUE_RUN;
    for (int j = t->begin[0]; j < t->end[0]; j += run) {
        const int end = t->end[0] - j < run ? t->end[0] : j + run;
        FN(fetch_ahead)(t);
        BY_ROWS(t->rows, FN(decode_value_rows), t, j, end, guarded, dtype);
    }
}

static void FN(decode_weighted_sum)(mha_tile *t)
{
    const int guarded = t->hidden && !FN(values_finite)(t);
    REAL *part = t->o_block;
    FN(merge_sums)(t, t->m_block, t->l_block, 1);
    memset(part, 0, sizeof(REAL) * (size_t)(t->rows * t->problem->head_dim_v));
    BY_DTYPE(t->v_block.dtype, FN(decode_values), t, guarded);
    FN(decode_merge_part)(t, part);
}

static FN(shape) FN(decode_shape)(const mha_problem *p)
{
    const idx o = VLEN * p->head_dim_v;
    return (FN(shape)){VLEN * p->head_dim, VLEN * SCORE_ROW, o, o};
}

static size_t FN(decode_state_bytes)(const mha_problem *p)
{
    const FN(shape) shape = FN(decode_shape)(p);
    return FN(state_bytes)(&shape);
}

static mha_tile *FN(decode_begin)(const mha_problem *p, idx task)
{
    const FN(shape) shape = FN(decode_shape)(p);
    const REAL factor = (REAL)p->scale;
    mha_tile *t = FN(open_tile)(p, task, &shape);
    if (!t)
        return NULL;
    t->o_rows = 1;
    t->o_stride = t->o_live = t->rows * p->head_dim_v;
    FN(reset)(t);
    for (int row = 0; row < t->rows; row++) {
        REAL *q = (REAL *)t->q_panel + row * p->head_dim;
        FN(read_row)(q, t->q_row[row], p->q.col, p->head_dim, p->q.dtype);
        for (idx d = 0; d < p->head_dim; d++)
            q[d] *= factor;
    }
    return t;
}

static void FN(decode_finish)(mha_tile *t)
{
    const mha_array *out = &t->problem->out;
    const idx dim = t->problem->head_dim_v;
    REAL inverse[LANES];
    FN(finish_sums)(t, inverse);
    for (int row = 0; row < t->rows; row++) {
        REAL *o = (REAL *)t->o + row * dim;
        for (idx d = 0; d < dim; d++) /* + 0: see from_lanes */
            o[d] = o[d] * inverse[row] + 0;
        if (out->dtype == DTYPE && out->col == sizeof(REAL))
            memcpy(t->out_row[row], o, sizeof(REAL) * (size_t)dim);
        else
            FN(write_row)(t->out_row[row], o, out->col, dim, out->dtype);
    }
}
