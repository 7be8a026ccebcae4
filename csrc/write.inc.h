/* Scores that go out, of every key of the block: weights, exp2(s - m) / l, once the sums of the
 * whole row are known, or products, such as those of a linear layer, x W^T + bias. */

/* Rule 5 of the canonical arithmetic. */
static ALWAYS_INLINE vec FN(weights_of)(vec s, vec m, vec inverse)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), zero = v_set1(0);
    return v_if_equal(s, minus_inf, zero, v_mul(FN(exp2_vec)(v_sub(s, m)), inverse));
}

/* S^T of keys j to j + n - 1 of one vector of rows, as `stage` says, to the rows that are wanted.
 * sums: m and 1 / l of each row. */
static ALWAYS_INLINE void FN(write_chunk)(int stage, const REAL *s, REAL (*sums)[VLEN],
                                          const REAL *addend, REAL *const *row, int j, int n)
{
    vec v[VLEN];
    EACH (c, VLEN) {
        const int key = j + (c < n ? c : 0);
        v[c] = v_load(s + key * LANES);
        if (stage == MHA_WEIGHTS)
            v[c] = FN(weights_of)(v[c], v_load(sums[0]), v_load(sums[1]));
        else if (addend)
            v[c] = v_add(v[c], v_set1(addend[key]));
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

static int FN(keys_of_block)(const mha_tile *t)
{
    const idx left = t->problem->n.seqlen_k - t->block.first_key;
    return left < MHA_KEY_BLOCK ? (int)left : MHA_KEY_BLOCK;
}

/* Where the block's scores of a row go: to their place, or to a strip on the way to another dtype.
 * Zeros, where they are not the scores of vector g's reach. */
static REAL *FN(target)(const mha_tile *t, int g, int lane, REAL *strip)
{
    const int keys = FN(keys_of_block)(t);
    REAL *row = (REAL *)t->row.scores[lane];
    if (!row)
        return NULL;
    row = t->job->scores.to.dtype == DTYPE ? row + t->block.first_key : strip;
    if (t->block.end[g] - t->block.begin[g] < keys)
        memset(row, 0, sizeof(REAL) * (size_t)keys);
    return row;
}

static void FN(convert)(const mha_tile *t, int lane, const REAL *from)
{
    const mha_array *to = &t->job->scores.to;
    if (to->dtype != DTYPE && t->row.scores[lane])
        FN(write_row)(t->row.scores[lane] + t->block.first_key * to->col_bytes, from, to->col_bytes,
                      FN(keys_of_block)(t), to->dtype);
}

static void FN(queries_write_scores)(mha_tile *t)
{
    const mha_scores_out *out = &t->job->scores;
    const REAL *addend = out->addend ? (const REAL *)out->addend + t->block.first_key : NULL;
    for (int g = 0; g < t->vectors; g++) {
        const int end = t->block.end[g], live = t->place.rows - g * VLEN;
        const REAL *s = (const REAL *)t->block.s + g * VLEN;
        REAL sums[2][VLEN] = {0}, *row[VLEN];
        for (int i = 0; i < VLEN; i++) {
            const int lane = g * VLEN + i;
            row[i] = FN(target)(t, g, lane, (REAL *)t->strip + i * MHA_KEY_BLOCK);
            if (out->stage == MHA_WEIGHTS && i < live) {
                sums[0][i] = ((const REAL *)t->row.sums[lane])[0];
                sums[1][i] = ((const REAL *)t->row.sums[lane])[1];
            }
        }
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
        REAL *row = FN(target)(t, 0, lane, t->strip);
        for (int j = t->block.begin[0]; row && j < end; j += VLEN) {
            const int n = end - j < VLEN ? end - j : VLEN;
            vec x = v_load(s + j);
            if (out->stage == MHA_WEIGHTS)
                x = FN(weights_of)(x, v_set1(sums[0]), v_set1(sums[1]));
            else if (addend)
                x = v_add(x, v_load_n(addend + j, n));
            v_store_n(row + j, x, n);
        }
        FN(convert)(t, lane, row);
    }
}
