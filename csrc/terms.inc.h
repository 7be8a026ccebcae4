/* The terms of a score, mask and bias: what they do to a block, looked at before it costs anything.
 */

/* One row of term n for a lane, from the first visible key of its vector on: in place where it
 * can be, else a copy in `copy`. */
static const REAL *FN(term_row)(const mha_tile *t, int n, int lane, REAL *copy)
{
    const mha_array *term = &t->problem->terms[n];
    const int g = lane / VLEN, keys = t->end[g] - t->begin[g];
    const char *src = t->term_row[n][lane] + (t->key0 + t->begin[g]) * term->col;
    if (FN(in_place)(src, 0, term->col, term->dtype) && term->col == sizeof(REAL))
        return (const REAL *)src;
    FN(read_row)(copy, src, term->col, keys, term->dtype);
    /* The same row of the next block: rows lie far apart, so only we know what comes. */
    for (idx at = 0; term->col <= MHA_DENSE && at < keys * term->col; at += 64)
        PREFETCH(src + MHA_KEY_BLOCK * term->col + at);
    return copy;
}

/* One row that all queries share, such as padding: its hidden ends cost nothing. */
static int FN(is_shared)(const mha_tile *t, int n)
{
    const mha_array *term = &t->problem->terms[n];
    return term->row == 0 && (term->head == 0 || t->problem->group_size == 1);
}

static int FN(trim_to_shared)(mha_tile *t, int n)
{
    const mha_array *term = &t->problem->terms[n];
    const int begin = t->segment[0].begin, end = t->segment[t->num_segments - 1].end;
    REAL *row = t->strip;
    int first = 0, last = end - begin;
    FN(read_row)(row, t->term_row[n][0] + (t->key0 + begin) * term->col, term->col, last,
                 term->dtype);
    while (first < last && row[first] == -(REAL)INFINITY)
        first++;
    while (first < last && row[last - 1] == -(REAL)INFINITY)
        last--;
    return mha_tile_trim(t, begin + first, begin + last);
}

/* What a row of term n does to the keys that its vector sees. */
static int FN(row_effect)(const mha_tile *t, int n, int lane)
{
    const mha_array *term = &t->problem->terms[n];
    const int g = lane / VLEN, keys = t->end[g] - t->begin[g];
    if (term->dtype == MHA_BOOL && term->col == 1) { /* whole words at a time */
        const char *flag = t->term_row[n][lane] + t->key0 + t->begin[g];
        const int same = memcmp(flag, flag + 1, (size_t)keys - 1) == 0;
        return !same ? TERM_MIXED : *flag ? TERM_ADDS_NOTHING : TERM_HIDES_ALL;
    }
    const REAL *row = FN(term_row)(t, n, lane, t->strip);
    int zero = 0, hide = 0;
    for (int j = 0; j < keys; j++) {
        zero += row[j] == 0;
        hide += row[j] == -(REAL)INFINITY;
    }
    return zero == keys ? TERM_ADDS_NOTHING : hide == keys ? TERM_HIDES_ALL : TERM_MIXED;
}

/* Look before it costs anything: a block that a term hides whole is skipped, and a term that adds
 * nothing takes no mask code. Stops at the first contradiction. */
static int FN(term_effect)(const mha_tile *t, int n)
{
    int effect = TERM_UNKNOWN;
    for (int lane = 0; lane < t->rows && effect != TERM_MIXED; lane++) {
        const int g = lane / VLEN, seen = t->begin[g] < t->end[g];
        const int new_row = lane % VLEN == 0 || t->term_row[n][lane] != t->term_row[n][lane - 1];
        if (seen && new_row) {
            const int now = FN(row_effect)(t, n, lane);
            effect = effect == TERM_UNKNOWN || effect == now ? now : TERM_MIXED;
        }
    }
    return effect;
}

static int FN(any_nonzero)(vec x)
{
    REAL lane[VLEN];
    int any = 0;
    v_store(lane, x);
    for (int i = 0; i < VLEN; i++)
        any |= lane[i] != 0;
    return any;
}

/* Set the tile to a block of keys, to be read as `k_reader` and `v_reader` can, and find the terms
 * that must be added. 0 where no key of the block is visible. */
static int FN(open_block)(mha_tile *t, idx block, int k_reader, int v_reader)
{
    const mha_problem *p = t->problem;
    t->num_mixed = 0;
    if (!mha_tile_block(t, block))
        return 0;
    for (int n = 0; n < p->num_terms; n++)
        if (FN(is_shared)(t, n) && !FN(trim_to_shared)(t, n))
            return 0;
    for (int n = 0; n < p->num_terms; n++) {
        const int effect = FN(term_effect)(t, n);
        if (effect == TERM_HIDES_ALL)
            return 0;
        if (effect == TERM_MIXED)
            t->mixed[t->num_mixed++] = n;
    }
    t->k_block = FN(block_rows)(t, &p->k, t->k, p->head_dim, t->k_copy, k_reader);
    t->v_block = FN(block_rows)(t, &p->v, t->v, p->head_dim_v, t->v_copy, v_reader);
    return 1;
}
