/* Scores that go out, of every key of the block: weights, exp2(s - m) / l, once the sums of the
 * whole row are known, or scores, or products, such as those of a linear layer, x W^T + bias. */

/* Rule 5 of the canonical arithmetic. */
static ALWAYS_INLINE vec FN(weights_of)(vec s, vec m, vec inverse)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), zero = v_set1(0);
    return v_if_equal(s, minus_inf, zero, v_mul(FN(exp2_vec)(v_sub(s, m)), inverse));
}

static ALWAYS_INLINE vec FN(at_stage)(int stage, vec s, vec m, vec inverse)
{
    if (stage == MHA_WEIGHTS)
        return FN(weights_of)(s, m, inverse);
    return stage == MHA_SCORES ? v_mul(s, v_set1((REAL)(1 / LOG2_E))) : s;
}

/* S^T of keys j to j + n - 1 of one vector of rows, as `stage` says, to the rows that are wanted.
 * sums: m and 1 / l of each row. */
static ALWAYS_INLINE void FN(write_chunk)(int stage, const REAL *s, REAL (*sums)[VLEN],
                                          const REAL *addend, REAL *const *row, int j, int n)
{
    vec v[VLEN];
    EACH (c, VLEN) {
        const int key = j + (c < n ? c : 0);
        v[c] = FN(at_stage)(stage, v_load(s + key * LANES), v_load(sums[0]), v_load(sums[1]));
        if (addend)
            v[c] = v_add(v[c], v_set1(addend[key]));
    }
    v_transpose(v);
    EACH (i, VLEN)
        if (row[i])
            FN(store_some)(row[i] + j, v[i], n);
}

static int FN(keys_of_block)(const mha_tile *t)
{
    const idx left = t->problem->n.seqlen_k - t->block.first_key;
    return left < MHA_KEY_BLOCK ? (int)left : MHA_KEY_BLOCK;
}

/* Where the block's scores of a row go: to their place, or to a strip on the way to another dtype.
 * Where they are not the scores of vector g's reach they are those of hidden keys. */
static REAL *FN(target)(const mha_tile *t, int g, int lane, REAL *strip)
{
    const int keys = FN(keys_of_block)(t);
    REAL *row = (REAL *)t->row.scores[lane];
    if (!row)
        return NULL;
    row = t->job->scores.to.dtype == DTYPE ? row + t->block.first_key : strip;
    if (t->block.end[g] - t->block.begin[g] < keys)
        for (int j = 0; j < keys; j++)
            row[j] = t->job->scores.stage == MHA_SCORES ? -(REAL)INFINITY : 0;
    return row;
}

static void FN(convert)(const mha_tile *t, int lane, const REAL *from)
{
    const mha_array *to = &t->job->scores.to;
    if (to->dtype != DTYPE && t->row.scores[lane])
        FN(write_row)(t->row.scores[lane] + t->block.first_key * to->col_bytes, from, to->col_bytes,
                      FN(keys_of_block)(t), to->dtype);
}

/* m, 1 / l and log2(1 / l) of the rows of vector g; 0 where there are none. */
static void FN(gather_sums)(const mha_tile *t, int g, REAL (*sums)[VLEN])
{
    for (int i = 0; i < VLEN; i++) {
        const int lane = g * VLEN + i;
        const REAL *from = lane < t->place.rows ? (const REAL *)t->row.sums[lane] : NULL;
        for (int n = 0; n < 3; n++)
            sums[n][i] = from ? from[n] : 0;
    }
}

static void FN(queries_write_scores)(mha_tile *t)
{
    const mha_scores_out *out = &t->job->scores;
    const REAL *addend = out->addend ? (const REAL *)out->addend + t->block.first_key : NULL;
    for (int g = 0; g < t->vectors; g++) {
        const int end = t->block.end[g], live = t->place.rows - g * VLEN;
        const REAL *s = (const REAL *)t->block.s + g * VLEN;
        REAL sums[3][VLEN], *row[VLEN];
        for (int i = 0; i < VLEN; i++) {
            const int lane = g * VLEN + i;
            row[i] = FN(target)(t, g, lane, (REAL *)t->strip + i * MHA_KEY_BLOCK);
        }
        FN(gather_sums)(t, g, sums);
        for (int j = t->block.begin[g]; j < end; j += VLEN) {
            const int n = end - j < VLEN ? end - j : VLEN;
            FN(write_chunk)(out->stage, s, sums, addend, row, j, n);
        }
        for (int i = 0; i < VLEN && i < live; i++)
            FN(convert)(t, g * VLEN + i, row[i]);
    }
}

static void FN(keys_write_scores)(mha_tile *t)
{
    const mha_scores_out *out = &t->job->scores;
    const REAL *addend = out->addend ? (const REAL *)out->addend + t->block.first_key : NULL;
    const int end = t->block.end[0];
    for (int lane = 0; lane < t->place.rows; lane++) {
        const REAL *s = (const REAL *)t->block.s + lane * SCORE_ROW;
        const REAL *sums = (const REAL *)t->row.sums[lane];
        const vec m = v_set1(sums ? sums[0] : 0), inverse = v_set1(sums ? sums[1] : 0);
        REAL *row = FN(target)(t, 0, lane, t->strip);
        for (int j = t->block.begin[0]; row && j < end; j += VLEN) {
            const int n = end - j < VLEN ? end - j : VLEN;
            vec x = FN(at_stage)(out->stage, v_load(s + j), m, inverse);
            if (addend)
                x = v_add(x, v_load_n(addend + j, n));
            v_store_n(row + j, x, n);
        }
        FN(convert)(t, lane, row);
    }
}
