/* The terms of a score, mask and bias: what they do to a block, looked at before it costs anything.
 */

/* One row of term n for a lane, from the first visible key of its vector on: in place where it
 * can be, else a copy in `copy`. */
static const REAL *FN(term_row)(const mha_tile *t, int n, int lane, REAL *copy)
{
    const mha_array *term = &t->problem->scoring.terms[n];
    const int g = lane / VLEN, keys = t->block.end[g] - t->block.begin[g];
    const char *src =
        t->row.term[n][lane] + (t->block.first_key + t->block.begin[g]) * term->col_bytes;
    if (FN(in_place)(src, 0, term->col_bytes, term->dtype) && term->col_bytes == sizeof(REAL))
        return (const REAL *)src;
    FN(read_row)(copy, src, term->col_bytes, keys, term->dtype);
    /* The same row of the next block: rows lie far apart, so only we know what comes. */
    for (idx at = 0; term->col_bytes <= MHA_DENSE && at < keys * term->col_bytes; at += 64)
        PREFETCH(src + MHA_KEY_BLOCK * term->col_bytes + at);
    return copy;
}

/* One row that all queries share, such as padding: its hidden ends cost nothing. */
static int FN(is_shared)(const mha_tile *t, int n)
{
    const mha_array *term = &t->problem->scoring.terms[n];
    return term->row_bytes == 0 && (term->head_bytes == 0 || t->problem->n.group_size == 1);
}

static int FN(trim_to_shared)(mha_tile *t, int n)
{
    const mha_array *term = &t->problem->scoring.terms[n];
    const int begin = t->block.first, end = t->block.last;
    REAL *row = t->strip;
    int first = 0, last = end - begin;
    FN(read_row)(row, t->row.term[n][0] + (t->block.first_key + begin) * term->col_bytes,
                 term->col_bytes, last, term->dtype);
    while (first < last && row[first] == -(REAL)INFINITY)
        first++;
    while (first < last && row[last - 1] == -(REAL)INFINITY)
        last--;
    return mha_tile_trim(t, begin + first, begin + last);
}

/* What a row of term n does to the keys that its vector sees. */
static int FN(row_effect)(const mha_tile *t, int n, int lane)
{
    const mha_array *term = &t->problem->scoring.terms[n];
    const int g = lane / VLEN, keys = t->block.end[g] - t->block.begin[g];
    if (term->dtype == MHA_BOOL && term->col_bytes == 1) { /* whole words at a time */
        const char *flag = t->row.term[n][lane] + t->block.first_key + t->block.begin[g];
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
    for (int lane = 0; lane < t->place.rows && effect != TERM_MIXED; lane++) {
        const int g = lane / VLEN, seen = t->block.begin[g] < t->block.end[g];
        const int new_row = lane % VLEN == 0 || t->row.term[n][lane] != t->row.term[n][lane - 1];
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
 * that must be added. 0 where no key of it is visible; then no vector reaches any of its keys. */
static int FN(open_block)(mha_tile *t, idx block, int k_reader, int v_reader)
{
    const mha_problem *p = t->problem;
    t->block.num_mixed = 0;
    if (!mha_tile_block(t, block))
        return 0;
    for (int n = 0; n < p->scoring.num_terms; n++)
        if (FN(is_shared)(t, n) && !FN(trim_to_shared)(t, n))
            return 0;
    for (int n = 0; n < p->scoring.num_terms; n++) {
        const int effect = FN(term_effect)(t, n);
        if (effect == TERM_HIDES_ALL)
            return mha_tile_trim(t, 0, 0);
        if (effect == TERM_MIXED)
            t->block.mixed[t->block.num_mixed++] = n;
    }
    t->block.k = FN(block_rows)(t, &p->k, t->place.k, p->n.head_dim, t->block.k_copy, k_reader);
    t->block.v = FN(block_rows)(t, &p->v, t->place.v, p->n.head_dim_v, t->block.v_copy, v_reader);
    return 1;
}
