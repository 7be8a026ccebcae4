/* Few query rows: keys in the lanes. For a panel of keys,
 *     S = Q K^T      rows are queries, read as broadcast scalars; K is transposed in registers
 *     P = exp2(S - m)    along the rows
 *     O (+)= P V     rows are queries; V rows are read as vectors
 * K and V are read once for all heads of a group. Every chain runs over the same numbers in the
 * same order as in prefill.inc.h, so the bits are the same. */

#define PANEL (4 * VLEN)                  /* keys whose scores are computed together */
#define VALUE_RUN 16                      /* keys whose values stay in L1 meanwhile */
#define SCORE_ROW (MHA_KEY_BLOCK + PANEL) /* row stride of S: room for the last panel's tail */

/* Call f with a constant number of rows and the row it starts at. */
#define BY_ROWS(total, f, ...)                                                                     \
    do {                                                                                           \
        int row = 0;                                                                               \
        for (; row + 4 <= (total); row += 4)                                                       \
            f(__VA_ARGS__, row, 4);                                                                \
        if (row + 2 <= (total)) {                                                                  \
            f(__VA_ARGS__, row, 2);                                                                \
            row += 2;                                                                              \
        }                                                                                          \
        if (row < (total))                                                                         \
            f(__VA_ARGS__, row, 1);                                                                \
    } while (0)

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

/* Ask for bytes [at, end) of VLEN rows that come later; what lies past the array is asked for in
 * vain. K is read VLEN rows at once and V in strips of a few lines, which no hardware prefetcher
 * follows; asking piece by piece, as the pieces before are used, keeps the memory evenly busy. */
static ALWAYS_INLINE void FN(prefetch_rows)(const char *row, idx stride, idx at, idx end)
{
    for (at = (at + 63) / 64 * 64; at < end; at += 64) {
        const char *line = row + at;
        for (int i = 0; i < VLEN; i++, line += stride)
            PREFETCH(line);
    }
}

/* One row and few head dims pass over the values once, faster than memory brings them: they are
 * asked for while scores are computed. Else they go in runs of keys that stay in L1, each asked for
 * during the run before it. */
static int FN(values_pass_once)(const mha_tile *t)
{
    return t->rows == 1 && t->problem->head_dim_v <= DECODE_NV(1) * VLEN;
}

/* Add head dims d to d + n - 1 to the scores of VLEN keys from `key` on; v[c] holds dim d + c of
 * these keys. n is a constant VLEN but for the last. */
static ALWAYS_INLINE void FN(decode_score_rows)(const mha_tile *t, const vec *v, idx d, int n,
                                                int key, int row, int rows)
{
    const idx dim = t->problem->head_dim;
    const REAL *q = (const REAL *)t->q_panel + row * dim + d;
    REAL *s = (REAL *)t->s + row * SCORE_ROW + key;
    vec acc[4];
    EACH (i, rows)
        acc[i] = v_load(s + i * SCORE_ROW);
    EACH (c, VLEN)
        if (c < n)
            EACH (i, rows)
                acc[i] = v_fma(v_set1(q[i * dim + c]), v[c], acc[i]);
    EACH (i, rows)
        v_store(s + i * SCORE_ROW, acc[i]);
}

/* Scores of keys j to j + keys - 1 <= PANEL. Each piece of K is used as soon as it is transposed
 * and never stored; the keys of a panel take turns, so their chains over head_dim overlap. Keys
 * past the visible ones are not read: their lanes repeat the last. */
static ALWAYS_INLINE void FN(decode_score_panel)(mha_tile *t, int j, int keys, int dtype)
{
    const idx dim = t->problem->head_dim, dim_v = t->problem->head_dim_v;
    const idx size = FN(size_of)(dtype), size_v = FN(size_of)(t->v_block.dtype);
    const idx stride = t->k_block.row * size, stride_v = t->v_block.row * size_v;
    const char *value = (const char *)t->v_block.data + j * stride_v, *key[PANEL];
    const int once = FN(values_pass_once)(t);
    for (int i = 0; i < PANEL; i++)
        key[i] = (const char *)t->k_block.data + (j + (i < keys ? i : keys - 1)) * stride;
    for (int row = 0; row < t->rows; row++)
        for (int i = 0; i < keys; i += VLEN)
            v_store((REAL *)t->s + row * SCORE_ROW + j + i, v_set1(0));
    for (idx d = 0; d < dim; d += VLEN)
        for (int i = 0; i < keys; i += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            vec v[VLEN];
            if (t->num_ahead > 0)
                FN(fetch_ahead)(t);
            else
                FN(prefetch_rows)(key[i] + PANEL * stride, stride, d * size, (d + n) * size);
            if (once)
                FN(prefetch_rows)(value + i * stride_v, stride_v, d * size_v,
                                  (d + VLEN < dim ? d + n : dim_v) * size_v);
            if (n == VLEN) {
                EACH (c, VLEN)
                    v[c] = FN(load_as)(key[i + c] + d * size, dtype);
                v_transpose(v);
                BY_ROWS(t->rows, FN(decode_score_rows), t, v, d, VLEN, j + i);
            } else {
                EACH (c, VLEN)
                    v[c] = FN(load_n_as)(key[i + c] + d * size, n, dtype);
                v_transpose(v);
                BY_ROWS(t->rows, FN(decode_score_rows), t, v, d, n, j + i);
            }
        }
}

/* Scores of one row and `keys` <= PANEL keys, where K's columns lie side by side, as in a view of a
 * transposed array: no transpose. */
static ALWAYS_INLINE void FN(score_columns)(const mha_tile *t, int row, int j, int keys)
{
    enum { WIDTH = PANEL / VLEN };
    const mha_rows *k = &t->k_block;
    const REAL *q = (const REAL *)t->q_panel + row * t->problem->head_dim;
    const REAL *column = (const REAL *)k->data + j;
    vec acc[WIDTH];
    EACH (i, WIDTH)
        acc[i] = v_set1(0);
    for (idx d = 0; d < t->problem->head_dim; d++, column += k->col)
        EACH (i, WIDTH) {
            const int live = keys - i * VLEN;
            if (live > 0) {
                const vec x =
                    live < VLEN ? v_load_n(column + i * VLEN, live) : v_load(column + i * VLEN);
                acc[i] = v_fma(v_set1(q[d]), x, acc[i]);
            }
        }
    EACH (i, WIDTH)
        if (keys > i * VLEN)
            v_store((REAL *)t->s + row * SCORE_ROW + j + i * VLEN, acc[i]);
}

static NOINLINE void FN(score_panel_columns)(mha_tile *t, int j, int keys)
{
    for (int row = 0; row < t->rows; row++)
        if (keys == PANEL)
            FN(score_columns)(t, row, j, PANEL);
        else
            FN(score_columns)(t, row, j, keys);
}

/* One function a dtype, with registers of its own. */
static NOINLINE void FN(score_panel_real)(mha_tile *t, int j, int keys)
{
    FN(decode_score_panel)(t, j, keys, DTYPE);
}

static NOINLINE void FN(score_panel_f16)(mha_tile *t, int j, int keys)
{
    FN(decode_score_panel)(t, j, keys, MHA_F16);
}

static NOINLINE void FN(score_panel_bf16)(mha_tile *t, int j, int keys)
{
    FN(decode_score_panel)(t, j, keys, MHA_BF16);
}

/* Scores of one row from its products, and their maximum; whether any key of the block is hidden.
 * Lanes past the last key hold NaN meanwhile, which no maximum takes and which is not hidden. */
static ALWAYS_INLINE void FN(score_row)(mha_tile *t, int row, FN(found) * found, int num_terms)
{
    static const REAL ramp[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const FN(rule) rule = FN(rule_of)(t, row, 1);
    const int begin = t->begin[0], end = t->end[0];
    REAL *s = (REAL *)t->s + row * SCORE_ROW;
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

static void FN(decode_score)(mha_tile *t)
{
    int hidden = 0;
    for (int row = 0; row < t->rows; row++) {
        FN(found) found = {v_set1(-LARGEST), v_set1(0)};
        REAL best[VLEN], *m = (REAL *)t->m_block + row;
        BY_TERMS(t->num_mixed, FN(score_row), t, row, &found);
        v_store(best, found.best);
        *m = best[0];
        for (int i = 1; i < VLEN; i++)
            *m = best[i] > *m ? best[i] : *m;
        hidden |= FN(any_nonzero)(found.hidden);
    }
    t->hidden |= hidden;
}

static int FN(decode_scores)(mha_tile *t, idx block)
{
    if (!FN(open_block)(t, block, FN(BY_VECTOR_OR_COLUMN), FN(BY_VECTOR_WIDENED)))
        return 0;
    if (t->k_block.data == t->k_copy) {
        mha_tile_look_to_next_block(t);
        t->ahead_pace = 4; /* rows per step, of which a block takes about 100 */
    }
    void (*const score_panel)(mha_tile *, int, int) =
        t->k_block.col != 1            ? FN(score_panel_columns)
        : t->k_block.dtype == MHA_F16  ? FN(score_panel_f16)
        : t->k_block.dtype == MHA_BF16 ? FN(score_panel_bf16)
                                       : FN(score_panel_real);
    for (int j = t->begin[0]; j < t->end[0]; j += PANEL)
        score_panel(t, j, t->end[0] - j < PANEL ? t->end[0] - j : PANEL);
    FN(decode_score)(t);
    return 1;
}
