/* Few query rows: keys in the lanes. For a panel of keys,
 *     S = Q K^T      rows are queries, read as broadcast scalars; K is transposed in registers
 *     P = exp2(S - m)    along the rows
 *     O (+)= P V     rows are queries; V rows are read as vectors
 * K and V are read once for all heads of a group. Every chain runs over the same numbers in the
 * same order as in queries_in_lanes.inc.h, so the bits are the same. */

#define VALUE_RUN 16 /* keys whose values stay in L1 meanwhile */

/* Call f with a constant storage dtype. */
#define BY_DTYPE(dtype, f, ...)                                                                    \
    do {                                                                                           \
        if ((dtype) == MHA_F16)                                                                    \
            f(__VA_ARGS__, MHA_F16);                                                               \
        else if ((dtype) == MHA_BF16)                                                              \
            f(__VA_ARGS__, MHA_BF16);                                                              \
        else                                                                                       \
            f(__VA_ARGS__, DTYPE);                                                                 \
    } while (0)

/* Scores of one row from its products. Lanes past the last key hold NaN meanwhile, which no maximum
 * takes and which is not hidden. */
static ALWAYS_INLINE void FN(score_row)(mha_tile *t, int row, FN(found) * found, int num_terms)
{
    static const REAL ramp[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const FN(rule) rule = FN(rule_of)(t, row, 1);
    const int begin = t->block.begin[0], end = t->block.end[0];
    REAL *s = (REAL *)t->block.s + row * SCORE_ROW;
    vec key = v_add(v_set1((REAL)begin), v_load(ramp)), term[MHA_MAX_TERMS];
    v_store(s + end, v_set1((REAL)NAN));
    for (int j = begin; j < end; j += VLEN) {
        const int live = end - j < VLEN ? end - j : VLEN;
        EACH (n, num_terms)
            term[n] = FN(load_up_to)((const char *)(rule.term[n][0] + j - begin), live, DTYPE);
        v_store(s + j, FN(score)(&rule, v_load(s + j), key, term, num_terms, found));
        key = v_add(key, v_set1(VLEN));
    }
    v_store(s + end, v_set1(-(REAL)INFINITY)); /* softmax works on whole vectors */
}

static void FN(score_rows)(mha_tile *t)
{
    int hidden = 0;
    for (int row = 0; row < t->place.rows; row++) {
        FN(found) found = {v_set1(-LARGEST), v_set1(0)};
        REAL best[VLEN], *m = (REAL *)t->block.m + row;
        BY_TERMS(t->block.num_mixed, FN(score_row), t, row, &found);
        v_store(best, found.best);
        *m = best[0];
        for (int i = 1; i < VLEN; i++)
            *m = best[i] > *m ? best[i] : *m;
        hidden |= FN(any_nonzero)(found.hidden);
    }
    t->block.hides |= hidden;
}

static int FN(keys_scores)(mha_tile *t, idx block)
{
    if (!FN(open_block)(t, block, FN(WIDENS) | FN(TAKES_COLUMNS), FN(WIDENS)))
        return 0;
    if (t->block.k.data == t->block.k_copy) {
        mha_tile_look_to_next_block(t);
        t->ahead.pace = 4; /* rows per step, of which a block takes about 100 */
    }
    void (*const score_panel)(mha_tile *, int, int) =
        t->block.k.col != 1            ? FN(score_panel_columns)
        : t->block.k.dtype == MHA_F16  ? FN(score_panel_f16)
        : t->block.k.dtype == MHA_BF16 ? FN(score_panel_bf16)
                                       : FN(score_panel_real);
    for (int j = t->block.begin[0]; j < t->block.end[0]; j += PANEL)
        score_panel(t, j, t->block.end[0] - j < PANEL ? t->block.end[0] - j : PANEL);
    FN(score_rows)(t);
    return 1;
}

static void FN(keys_drop)(mha_tile *t)
{
    REAL half[FN(PER_DRAW)][FN(DRAWS) * VLEN];
    const REAL threshold = (REAL)t->problem->weighing.threshold;
    const int begin = t->block.begin[0], end = t->block.end[0];
    const int first = begin / FN(PER_DRAW) * FN(PER_DRAW);
    for (int row = 0; row < t->place.rows; row++) {
        REAL *s = (REAL *)t->block.s + row * SCORE_ROW;
        FN(draw)(t, row, 1, first, (end - first + FN(PER_DRAW) - 1) / FN(PER_DRAW), half);
        for (int j = begin; j < end; j++)
            if (half[j % FN(PER_DRAW)][(j - first) / FN(PER_DRAW)] < threshold && s[j] != 0)
                s[j] = 0;
    }
}

static void FN(keys_softmax)(mha_tile *t)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), minus_zero = v_set1((REAL)-0.0);
    for (int row = 0; row < t->place.rows; row++) {
        REAL *s = (REAL *)t->block.s + row * SCORE_ROW, sum = 0;
        const vec m = v_set1(((REAL *)t->block.m)[row]);
        for (int j = t->block.begin[0]; j < t->block.end[0]; j += VLEN) {
            const vec x = v_load(s + j), p = FN(exp2_vec)(v_sub(x, m));
            v_store(s + j, v_if_equal(x, minus_inf, minus_zero, p));
        }
        int j = t->block.begin[0];
        for (; j + VLEN <= t->block.end[0]; j += VLEN)
            EACH (i, VLEN) /* unrolled: a chain that other work can overlap */
                sum += s[j + i];
        for (; j < t->block.end[0]; j++)
            sum += s[j];
        ((REAL *)t->block.l)[row] = sum;
    }
    if (t->problem->weighing.threshold)
        FN(keys_drop)(t);
}

/* O += P V for `rows` queries and nv vectors of head dims from d on. */
static ALWAYS_INLINE void FN(keys_value_chunk)(const mha_tile *t, const FN(product) * whole, idx d,
                                               int rows, int nv, int dtype)
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
    FN(product_tile)(&p, 0, rows, nv, FN(ADD), dtype);
}

/* The same for one row and n <= VLEN head dims: the last ones, and all where V holds an Inf or
 * NaN and some key is hidden. Then the keys marked by -0 are left out. */
static void FN(keys_value_tail)(const mha_tile *t, int begin, int end, int row, idx d, int n,
                                int guarded)
{
    const mha_rows *v = &t->block.v;
    const idx size = FN(size_of)(v->dtype);
    const REAL *p = (const REAL *)t->block.s + row * SCORE_ROW;
    REAL *part = (REAL *)t->block.o + row * t->problem->n.head_dim_v + d;
    vec acc = FN(load_some)(part, n);
    for (int j = begin; j < end; j++)
        if (!guarded || p[j] != 0 || !signbit(p[j]))
            acc = v_fma(
                v_set1(p[j]),
                FN(load_up_to)((const char *)v->data + (j * v->row + d) * size, n, v->dtype), acc);
    FN(store_some)(part, acc, n);
}

static ALWAYS_INLINE void FN(keys_value_rows)(const mha_tile *t, int begin, int end, int guarded,
                                              int dtype, int row, int rows)
{
    const int nv = VALUE_NV(rows);
    const idx dim = t->problem->n.head_dim_v;
    const mha_rows *v = &t->block.v;
    const FN(product) p = {.a = (const REAL *)t->block.s + row * SCORE_ROW + begin,
                           .a_row = SCORE_ROW,
                           .a_depth = 1,
                           .b = (const char *)v->data + begin * v->row * FN(size_of)(dtype),
                           .b_depth = v->row,
                           .depth = end - begin,
                           .c = (REAL *)t->block.o + row * dim,
                           .c_row = dim};
    idx d = 0;
    for (; d + nv * VLEN <= dim && !guarded; d += nv * VLEN)
        FN(keys_value_chunk)(t, &p, d, rows, nv, dtype);
    for (; d + VLEN <= dim && !guarded; d += VLEN)
        FN(keys_value_chunk)(t, &p, d, rows, 1, dtype);
    for (; d < dim; d += VLEN)
        for (int i = 0; i < rows; i++)
            FN(keys_value_tail)(t, begin, end, row + i, d, dim - d < VLEN ? (int)(dim - d) : VLEN,
                                guarded);
}

/* Merge the partial result `part`, [rows][head_dim_v], by the factors a and b. */
static void FN(keys_merge_part)(mha_tile *t, const REAL *part)
{
    const idx dim = t->problem->n.head_dim_v;
    for (int row = 0; row < t->place.rows; row++) {
        const vec a = v_set1(((REAL *)t->a)[row]), b = v_set1(((REAL *)t->b)[row]);
        REAL *o = (REAL *)t->state.o + row * dim;
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

static void FN(keys_merge)(mha_tile *t, const void *record)
{
    const FN(state) *part = record;
    FN(merge_sums)(t, part->m, part->l, 1);
    FN(keys_merge_part)(t, part->o);
}

static ALWAYS_INLINE void FN(keys_values)(mha_tile *t, int guarded, int dtype)
{
    const int run = FN(values_pass_once)(t) ? MHA_KEY_BLOCK : VALUE_RUN;
    for (int j = t->block.begin[0]; j < t->block.end[0]; j += run) {
        const int end = t->block.end[0] - j < run ? t->block.end[0] : j + run;
        FN(fetch_ahead)(t);
        BY_ROWS(t->place.rows, FN(keys_value_rows), t, j, end, guarded, dtype);
    }
}

static void FN(keys_weighted_sum)(mha_tile *t)
{
    const int guarded =
        t->block.hides && !FN(rows_finite)(t, &t->block.v, t->problem->n.head_dim_v);
    REAL *part = t->block.o;
    FN(merge_sums)(t, t->block.m, t->block.l, 1);
    memset(part, 0, sizeof(REAL) * (size_t)(t->place.rows * t->problem->n.head_dim_v));
    BY_DTYPE(t->block.v.dtype, FN(keys_values), t, guarded);
    FN(keys_merge_part)(t, part);
}

static FN(shape) FN(keys_shape)(const mha_problem *p)
{
    return (FN(shape)){
        .q_panel = VLEN * p->n.head_dim, .s = VLEN * SCORE_ROW, .o = VLEN * p->n.head_dim_v};
}

static size_t FN(keys_tile_bytes)(const mha_problem *p)
{
    FN(buffer) table[FN(BUFFERS)];
    return FN(lay_out)(p, FN(keys_shape)(p), table);
}

static size_t FN(keys_state_bytes)(const mha_problem *p)
{
    return FN(state_bytes)(FN(keys_shape)(p));
}

static mha_tile *FN(keys_begin)(const mha_job *job, idx task)
{
    const mha_problem *p = job->problem;
    const REAL factor = (REAL)p->scoring.scale;
    mha_tile *t = FN(open_tile)(job, task, FN(keys_shape)(p));
    if (!t)
        return NULL;
    t->state.o_rows = 1;
    t->state.o_stride = t->state.o_live = t->place.rows * p->n.head_dim_v;
    FN(begin_state)(t, p->n.head_dim_v, 1);
    for (int row = 0; row < t->place.rows; row++) {
        REAL *q = (REAL *)t->q_panel + row * p->n.head_dim;
        FN(read_row)(q, t->row.q[row], p->q.col_bytes, p->n.head_dim, p->q.dtype);
        for (idx d = 0; d < p->n.head_dim; d++)
            q[d] *= factor;
    }
    return t;
}

static void FN(keys_finish)(mha_tile *t)
{
    const mha_array *out = &t->job->results.out;
    const idx dim = t->problem->n.head_dim_v;
    REAL inverse[LANES];
    FN(finish_sums)(t, inverse);
    for (int row = 0; row < t->place.rows; row++) {
        REAL *o = (REAL *)t->state.o + row * dim;
        for (idx d = 0; d < dim; d++) /* + 0: see from_lanes */
            o[d] = o[d] * inverse[row] + 0;
        if (out->dtype == DTYPE && out->col_bytes == sizeof(REAL))
            memcpy(t->row.out[row], o, sizeof(REAL) * (size_t)dim);
        else
            FN(write_row)(t->row.out[row], o, out->col_bytes, dim, out->dtype);
    }
}
