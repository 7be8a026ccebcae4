/* Many queries: one in each lane. For a block of keys,
 *     S^T = K Q^T          rows are keys; K is read as broadcast scalars
 *     P^T = exp2(S^T - m)  straight down the columns
 *     O^T (+)= V^T P^T     rows are head dims; V is read as broadcast scalars
 * so neither K nor V is packed, and only Q and O are transposed, once per tile. */

/* Call f with a constant number of vectors. */
#define BY_WIDTH(width, f, ...)                                                                    \
    do {                                                                                           \
        if ((width) == 1)                                                                          \
            f(__VA_ARGS__, 1);                                                                     \
        else if (NV > 2 && (width) == 2)                                                           \
            f(__VA_ARGS__, 2);                                                                     \
        else if (NV > 3 && (width) == 3)                                                           \
            f(__VA_ARGS__, NV > 3 ? 3 : NV);                                                       \
        else                                                                                       \
            f(__VA_ARGS__, NV);                                                                    \
    } while (0)

/* S^T = K Q^T of one segment: rows are keys. */
static ALWAYS_INLINE void FN(score_segment)(mha_tile *t, const mha_segment *seg, int nv)
{
    const idx lane = seg->first * VLEN;
    const FN(product) p = {.a = t->block.k.data,
                           .a_row = t->block.k.row,
                           .a_depth = t->block.k.col,
                           .b = (const REAL *)t->q_panel + lane,
                           .b_depth = LANES,
                           .depth = t->problem->n.head_dim,
                           .c = (REAL *)t->block.s + lane,
                           .c_row = LANES,
                           .max = (REAL *)t->block.m + lane};
    FN(product_rows)(t, &p, seg->begin, seg->end, nv, FN(STORE_MAX));
}

/* Scores of keys j to j + n - 1 from their products, for VLEN rows; keys count from the first that
 * the vector sees. A term row that all queries share is broadcast. */
static ALWAYS_INLINE void FN(score_chunk)(const FN(rule) * rule, REAL *s, int begin, int j, int n,
                                          int num_terms, FN(found) * found)
{
    enum { AHEAD = 64 }; /* keys; rows lie far apart, so no hardware prefetcher sees a pattern */
    vec v[MHA_MAX_TERMS][VLEN];
    EACH (k, num_terms) {
        const REAL *const *row = rule->term[k];
        if (rule->shared[k]) {
            EACH (i, VLEN)
                v[k][i] = i < n ? v_set1(row[0][j + i]) : v_set1(0);
        } else {
            EACH (i, VLEN) {
                v[k][i] = FN(load_some)(row[i] + j, n);
                PREFETCH(row[i] + j + AHEAD);
            }
            v_transpose(v[k]);
        }
    }
    s += (begin + j) * LANES;
    EACH (i, VLEN)
        if (i < n) {
            const vec key = v_set1((REAL)(begin + j + i));
            vec term[MHA_MAX_TERMS];
            EACH (k, num_terms)
                term[k] = v[k][i];
            v_store(s + i * LANES,
                    FN(score)(rule, v_load(s + i * LANES), key, term, num_terms, found));
        }
}

static ALWAYS_INLINE void FN(score_vector)(mha_tile *t, int g, FN(found) * found, int num_terms)
{
    const FN(rule) rule = FN(rule_of)(t, g * VLEN, VLEN);
    const int begin = t->block.begin[g], keys = t->block.end[g] - begin;
    REAL *s = (REAL *)t->block.s + g * VLEN;
    int j = 0;
    for (; j + VLEN <= keys; j += VLEN)
        FN(score_chunk)(&rule, s, begin, j, VLEN, num_terms, found);
    if (j < keys)
        FN(score_chunk)(&rule, s, begin, j, keys - j, num_terms, found);
}

/* Scores from products, and their maximum anew: that of the products may come from a key that the
 * row does not see. Finds out whether any key of the block is hidden, which a float bias rarely
 * does. A function with registers of its own, apart from the product's. */
static NOINLINE void FN(score_vectors)(mha_tile *t)
{
    int hidden = 0;
    for (int g = 0; g < t->vectors; g++) {
        FN(found) found = {v_set1(-LARGEST), v_set1(0)};
        BY_TERMS(t->block.num_mixed, FN(score_vector), t, g, &found);
        v_store((REAL *)t->block.m + g * VLEN, found.best);
        hidden |= FN(any_nonzero)(found.hidden);
    }
    t->block.hides |= hidden;
}

/* Set out to fetch the next block, or in the last one the next task, evenly while this block is
 * computed. */
static void FN(look_ahead)(mha_tile *t, int last)
{
    const int keys = t->block.last - t->block.first;
    const idx steps = (keys + t->problem->n.head_dim_v) / ROWS(t->vectors) + 1;
    idx rows = 0;
    if (last)
        mha_tile_look_ahead(t, LANES);
    else
        mha_tile_look_to_next_block(t);
    for (int n = 0; n < t->ahead.num; n++)
        rows += t->ahead.stream[n].rows;
    t->ahead.pace = (int)(rows / steps) + 1;
}

static int FN(queries_scores)(mha_tile *t, idx block)
{
    if (!FN(open_block)(t, block, FN(TAKES_NUMBERS), 0))
        return 0;
    FN(look_ahead)(t, block + 1 == t->last_block);
    for (int v = 0; v < t->vectors; v++)
        v_store((REAL *)t->block.m + v * VLEN, v_set1(-LARGEST));
    for (int n = 0; n < t->block.num_segments; n++) {
        const mha_segment *seg = &t->block.segment[n];
        BY_WIDTH(seg->last - seg->first, FN(score_segment), t, seg);
    }
    if (t->block.products) /* whose derivative will be asked for */
        memcpy(t->block.products, t->block.s, sizeof(REAL) * MHA_KEY_BLOCK * LANES);
    if (FN(scores_change)(t))
        FN(score_vectors)(t);
    return 1;
}

/* Drop weights of the block at hand, after their sum was taken. A weight that is zero stays: by its
 * sign, -0 tells that the key is hidden. */
static void FN(queries_drop)(mha_tile *t)
{
    REAL half[FN(PER_DRAW)][FN(DRAWS) * VLEN];
    const vec zero = v_set1(0), threshold = v_set1((REAL)t->problem->weighing.threshold);
    for (int g = 0; g < t->vectors; g++) {
        const int first = t->block.begin[g] / FN(PER_DRAW) * FN(PER_DRAW), end = t->block.end[g];
        REAL *s = (REAL *)t->block.s + g * VLEN;
        FN(draw)(t, g * VLEN, VLEN, first, (end - first + FN(PER_DRAW) - 1) / FN(PER_DRAW), half);
        for (int j = t->block.begin[g]; j < end; j++) {
            const REAL *h = half[j % FN(PER_DRAW)] + (j - first) / FN(PER_DRAW) * VLEN;
            const vec p = v_load(s + j * LANES), dropped = v_if_equal(p, zero, p, zero);
            v_store(s + j * LANES, v_if_less(v_load(h), threshold, dropped, p));
        }
    }
}

/* S -> P in place, and the block's row sums. A hidden key becomes -0: it adds nothing to any sum,
 * and its sign tells value_segment_guarded that V may not be read for it. */
static void FN(queries_softmax)(mha_tile *t)
{
    const vec minus_inf = v_set1(-INFINITY), minus_zero = v_set1((REAL)-0.0);
    for (int g = 0; g < t->vectors; g++) {
        REAL *s = (REAL *)t->block.s + g * VLEN;
        const vec m = v_load((REAL *)t->block.m + g * VLEN);
        vec sum = v_set1(0);
        if (!t->block.hides)
            for (int j = t->block.begin[g]; j < t->block.end[g]; j++) {
                const vec p = FN(exp2_vec)(v_sub(v_load(s + j * LANES), m));
                v_store(s + j * LANES, p);
                sum = v_add(sum, p);
            }
        else
            for (int j = t->block.begin[g]; j < t->block.end[g]; j++) {
                const vec x = v_load(s + j * LANES), p = FN(exp2_vec)(v_sub(x, m));
                v_store(s + j * LANES, v_if_equal(x, minus_inf, minus_zero, p));
                sum = v_add(sum, p);
            }
        v_store((REAL *)t->block.l + g * VLEN, sum);
    }
    if (t->problem->weighing.threshold)
        FN(queries_drop)(t);
}

/* O^T (+)= V^T P^T of one segment: rows are head dims. Merged into o at once where the segment is
 * the whole block, else carried on in the block's o from segment to segment. */
static ALWAYS_INLINE void FN(value_segment)(mha_tile *t, const mha_segment *seg, int ending, int nv)
{
    const idx lane = seg->first * VLEN;
    const mha_rows *v = &t->block.v;
    const FN(product) p = {
        .a = (const REAL *)v->data + seg->begin * v->row,
        .a_row = 1,
        .a_depth = v->row,
        .b = (const REAL *)t->block.s + seg->begin * LANES + lane,
        .b_depth = LANES,
        .depth = seg->end - seg->begin,
        .c = (REAL *)(ending == FN(MERGE) ? t->state.o : t->block.o) + lane,
        .c_row = LANES,
        .old_factor = (const REAL *)t->a + lane,
        .new_factor = (const REAL *)t->b + lane,
    };
    FN(product_rows)(t, &p, 0, t->problem->n.head_dim_v, nv, ending);
}

/* The same for a block where some lane may not see some key and V holds an Inf or NaN: 0 * Inf is
 * NaN, so the products of hidden keys, marked by -0, are left out one by one. */
static void FN(value_segment_guarded)(const mha_tile *t, const mha_segment *seg)
{
    const vec zero = v_set1(0), one = v_set1(1);
    for (int g = seg->first; g < seg->last; g++)
        for (idx d = 0; d < t->problem->n.head_dim_v; d++) {
            REAL *part = (REAL *)t->block.o + d * LANES + g * VLEN;
            vec acc = v_load(part);
            for (int j = seg->begin; j < seg->end; j++) {
                const vec p = v_load((const REAL *)t->block.s + j * LANES + g * VLEN);
                const vec v = v_set1(((const REAL *)t->block.v.data)[j * t->block.v.row + d]);
                const vec hidden = v_if_equal(p, zero, v_div(one, p), zero); /* -inf for -0 */
                acc = v_if_less(hidden, zero, acc, v_fma(v, p, acc));
            }
            v_store(part, acc);
        }
}

/* Merge the partial result `part`, [head_dim_v][LANES], by the factors a and b. */
static void FN(queries_merge_part)(mha_tile *t, const REAL *part)
{
    const REAL *a = t->a, *b = t->b;
    REAL *o = t->state.o;
    for (idx d = 0; d < t->problem->n.head_dim_v; d++)
        for (int v = 0; v < t->vectors; v++) {
            const idx at = d * LANES + v * VLEN;
            v_store(o + at, v_fma(v_load(o + at), v_load(a + v * VLEN),
                                  v_mul(v_load(part + at), v_load(b + v * VLEN))));
        }
}

static void FN(queries_merge)(mha_tile *t, const void *record)
{
    const FN(state) *part = record;
    FN(merge_sums)(t, part->m, part->l, t->vectors);
    FN(queries_merge_part)(t, part->o);
}

static void FN(queries_weighted_sum)(mha_tile *t)
{
    const int guarded =
        t->block.hides && !FN(rows_finite)(t, &t->block.v, t->problem->n.head_dim_v);
    REAL *part = t->block.o;
    FN(merge_sums)(t, t->block.m, t->block.l, t->vectors);
    if (t->block.num_segments == 1 && !guarded) {
        const mha_segment *seg = t->block.segment;
        BY_WIDTH(seg->last - seg->first, FN(value_segment), t, seg, FN(MERGE));
        return;
    }
    memset(part, 0, sizeof(REAL) * (size_t)t->problem->n.head_dim_v * LANES);
    for (int n = 0; n < t->block.num_segments; n++) {
        const mha_segment *seg = &t->block.segment[n];
        if (guarded)
            FN(value_segment_guarded)(t, seg);
        else
            BY_WIDTH(seg->last - seg->first, FN(value_segment), t, seg, FN(ADD));
    }
    FN(queries_merge_part)(t, part);
}

/* The same where rows lie side by side, as in a view of a transposed array: Q^T as it is. */
static void FN(pack_columns)(mha_tile *t, int g, vec scale)
{
    const idx step = t->problem->q.col_bytes / (idx)sizeof(REAL);
    const int left = t->place.rows - g * VLEN, live = left < VLEN ? left : VLEN;
    const REAL *column = (const REAL *)t->row.q[g * VLEN];
    REAL *lanes = (REAL *)t->q_panel + g * VLEN;
    for (idx d = 0; d < t->problem->n.head_dim; d++, column += step)
        v_store(lanes + d * LANES, v_mul(FN(load_some)(column, live), scale));
}

/* Q^T * factor into q_panel. Lanes past the last row repeat it, or are 0. */
static void FN(pack_q)(mha_tile *t, REAL factor)
{
    const mha_array *q = &t->problem->q;
    const idx dim = t->problem->n.head_dim;
    const vec scale = v_set1(factor);
    const int columns = q->row_bytes == sizeof(REAL) && t->problem->n.group_size == 1 && dim > 1 &&
                        FN(in_place)(t->row.q[0], 0, q->col_bytes, q->dtype);

    for (int g = 0; g < t->vectors; g++) {
        const REAL *row[VLEN];
        if (columns) {
            FN(pack_columns)(t, g, scale);
            continue;
        }
        for (int i = 0; i < VLEN; i++) {
            const char *src = t->row.q[g * VLEN + i];
            row[i] = (const REAL *)src;
            if (!FN(in_place)(src, 0, q->col_bytes, q->dtype) || q->col_bytes != sizeof(REAL)) {
                REAL *copy = (REAL *)t->strip + i * dim;
                FN(read_row)(copy, src, q->col_bytes, dim, q->dtype);
                row[i] = copy;
            }
        }
        FN(rows_into_lanes)(row, dim, &scale, (REAL *)t->q_panel + g * VLEN, LANES);
    }
}

/* Rows of out = O^T * (1 / l). */
static void FN(unpack_o)(mha_tile *t, const REAL *inverse)
{
    const mha_array *out = &t->job->results.out;
    const idx dim = t->problem->n.head_dim_v;
    const int direct = FN(in_place)(t->row.out[0], out->row_bytes, out->col_bytes, out->dtype) &&
                       out->head_bytes % (idx)sizeof(REAL) == 0 && out->col_bytes == sizeof(REAL);

    for (int g = 0; g < t->vectors; g++) {
        const vec scale = v_load(inverse + g * VLEN);
        const REAL *lanes = (const REAL *)t->state.o + g * VLEN;
        const int live = t->place.rows - g * VLEN < VLEN ? t->place.rows - g * VLEN : VLEN;
        REAL *row[VLEN];
        for (int i = 0; i < VLEN; i++)
            row[i] = direct ? (REAL *)t->row.out[g * VLEN + i] : (REAL *)t->strip + i * dim;
        idx d = 0;
        for (; d + VLEN <= dim; d += VLEN)
            FN(from_lanes)(lanes + d * LANES, scale, row, d, VLEN, live);
        if (d < dim)
            FN(from_lanes)(lanes + d * LANES, scale, row, d, (int)(dim - d), live);
        for (int i = 0; i < live && !direct; i++)
            FN(write_row)(t->row.out[g * VLEN + i], row[i], out->col_bytes, dim, out->dtype);
    }
}

static FN(shape) FN(queries_shape)(const mha_problem *p)
{
    return (FN(shape)){.q_panel = (p->n.head_dim + VLEN) * LANES, /* room for whole transposes */
                       .s = MHA_KEY_BLOCK * LANES,
                       .o = (p->n.head_dim_v + VLEN) * LANES};
}

static size_t FN(queries_tile_bytes)(const mha_problem *p)
{
    FN(buffer) table[FN(BUFFERS)];
    return FN(lay_out)(p, FN(queries_shape)(p), table);
}

static size_t FN(queries_state_bytes)(const mha_problem *p)
{
    return FN(state_bytes)(FN(queries_shape)(p));
}

static mha_tile *FN(queries_begin)(const mha_job *job, idx task)
{
    const mha_problem *p = job->problem;
    mha_tile *t = FN(open_tile)(job, task, FN(queries_shape)(p));
    if (!t)
        return NULL;
    t->state.o_rows = p->n.head_dim_v;
    t->state.o_stride = LANES;
    t->state.o_live = t->vectors * VLEN;
    FN(begin_state)(t, 1, LANES);
    FN(pack_q)(t, (REAL)p->scoring.scale);
    return t;
}

static void FN(queries_finish)(mha_tile *t)
{
    REAL inverse[LANES] = {0};
    FN(finish_sums)(t, inverse);
    FN(unpack_o)(t, inverse);
}
