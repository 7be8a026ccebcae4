/* S = Q K^T with keys in the lanes, a panel of keys at a time: K is transposed in registers, read
 * as columns where it is a transposed view, or widened from 16 bits on the way. */

#define PANEL (4 * VLEN)                  /* keys whose scores are computed together */
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
    return t->place.rows == 1 && t->problem->n.head_dim_v <= VALUE_NV(1) * VLEN;
}

/* Add head dims d to d + n - 1 to the scores of VLEN keys from `key` on; v[c] holds dim d + c of
 * these keys. n is a constant VLEN but for the last. */
static ALWAYS_INLINE void FN(add_dims)(const mha_tile *t, const vec *v, idx d, int n, int key,
                                       int row, int rows)
{
    const idx dim = t->problem->n.head_dim;
    const REAL *q = (const REAL *)t->q_panel + row * dim + d;
    REAL *s = (REAL *)t->block.s + row * SCORE_ROW + key;
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
static ALWAYS_INLINE void FN(score_panel)(mha_tile *t, int j, int keys, int dtype)
{
    const idx dim = t->problem->n.head_dim, dim_v = t->problem->n.head_dim_v;
    const idx size = FN(size_of)(dtype), size_v = FN(size_of)(t->block.v.dtype);
    const idx stride = t->block.k.row * size, stride_v = t->block.v.row * size_v;
    const char *value = (const char *)t->block.v.data + j * stride_v, *key[PANEL];
    const int once = FN(values_pass_once)(t);
    for (int i = 0; i < PANEL; i++)
        key[i] = (const char *)t->block.k.data + (j + (i < keys ? i : keys - 1)) * stride;
    for (int row = 0; row < t->place.rows; row++)
        for (int i = 0; i < keys; i += VLEN)
            v_store((REAL *)t->block.s + row * SCORE_ROW + j + i, v_set1(0));
    for (idx d = 0; d < dim; d += VLEN)
        for (int i = 0; i < keys; i += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            vec v[VLEN];
            if (t->ahead.num > 0)
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
                BY_ROWS(t->place.rows, FN(add_dims), t, v, d, VLEN, j + i);
            } else {
                EACH (c, VLEN)
                    v[c] = FN(load_n_as)(key[i + c] + d * size, n, dtype);
                v_transpose(v);
                BY_ROWS(t->place.rows, FN(add_dims), t, v, d, n, j + i);
            }
        }
}

/* Scores of one row and `keys` <= PANEL keys, where K's columns lie side by side, as in a view of a
 * transposed array: no transpose. */
static ALWAYS_INLINE void FN(score_columns)(const mha_tile *t, int row, int j, int keys)
{
    enum { WIDTH = PANEL / VLEN };
    const mha_rows *k = &t->block.k;
    const REAL *q = (const REAL *)t->q_panel + row * t->problem->n.head_dim;
    const REAL *column = (const REAL *)k->data + j;
    vec acc[WIDTH];
    EACH (i, WIDTH)
        acc[i] = v_set1(0);
    for (idx d = 0; d < t->problem->n.head_dim; d++, column += k->col)
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
            v_store((REAL *)t->block.s + row * SCORE_ROW + j + i * VLEN, acc[i]);
}

static NOINLINE void FN(score_panel_columns)(mha_tile *t, int j, int keys)
{
    for (int row = 0; row < t->place.rows; row++)
        if (keys == PANEL)
            FN(score_columns)(t, row, j, PANEL);
        else
            FN(score_columns)(t, row, j, keys);
}

/* One function a dtype, with registers of its own. */
static NOINLINE void FN(score_panel_real)(mha_tile *t, int j, int keys)
{
    FN(score_panel)(t, j, keys, DTYPE);
}

static NOINLINE void FN(score_panel_f16)(mha_tile *t, int j, int keys)
{
    FN(score_panel)(t, j, keys, MHA_F16);
}

static NOINLINE void FN(score_panel_bf16)(mha_tile *t, int j, int keys)
{
    FN(score_panel)(t, j, keys, MHA_BF16);
}
