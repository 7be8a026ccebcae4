/* What changes scores after the product: mask and bias terms, and the interval of visible keys. */

/* One row of term n for a lane, from the first visible key of its vector on. */
static void FN(term_row)(const mha_tile *t, int n, int lane, REAL *row)
{
    const mha_array *term = &t->problem->terms[n];
    const int g = lane / VLEN;
    FN(read_row)(row, t->term_row[n][lane] + (t->key0 + t->begin[g]) * term->col, term->col,
                 t->end[g] - t->begin[g], term->dtype);
}

/* Look before it costs anything: a block that a term hides whole is skipped, and a term that adds
 * nothing takes no mask code. Stops at the first contradiction. */
static int FN(term_effect)(const mha_tile *t, int n)
{
    REAL *row = t->strip;
    int effect = TERM_UNKNOWN;
    for (int lane = 0; lane < t->rows && effect != TERM_MIXED; lane++) {
        const int g = lane / VLEN, keys = t->end[g] - t->begin[g];
        const int new_row = lane % VLEN == 0 || t->term_row[n][lane] != t->term_row[n][lane - 1];
        int zero = 0, hide = 0;
        if (keys == 0 || !new_row)
            continue;
        FN(term_row)(t, n, lane, row);
        for (int j = 0; j < keys; j++) {
            zero += row[j] == 0;
            hide += row[j] == -(REAL)INFINITY;
        }
        const int now = zero == keys   ? TERM_ADDS_NOTHING
                        : hide == keys ? TERM_HIDES_ALL
                                       : TERM_MIXED;
        effect = effect == TERM_UNKNOWN || effect == now ? now : TERM_MIXED;
    }
    return effect;
}

static ALWAYS_INLINE vec FN(with_term)(vec s, vec term)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY);
    const vec sum = v_max(v_set1(-LARGEST), v_fma(term, v_set1((REAL)LOG2_E), s));
    return v_if_equal(term, minus_inf, minus_inf, sum);
}

/* Add term n to the scores. Its rows are queries, so VLEN rows are transposed into the lanes;
 * a row that all queries share is broadcast. */
static void FN(add_term)(mha_tile *t, int n)
{
    const mha_array *term = &t->problem->terms[n];
    const int shared = term->row == 0 && (term->head == 0 || t->problem->group_size == 1);
    REAL *strip = t->strip;

    for (int g = 0; g < t->vectors; g++) {
        const int keys = t->end[g] - t->begin[g];
        REAL *s = (REAL *)t->s + t->begin[g] * LANES + g * VLEN;
        for (int i = 0; i < (shared ? 1 : VLEN); i++)
            FN(term_row)(t, n, g * VLEN + i, strip + i * MHA_KEY_BLOCK);
        for (int j = 0; j < keys; j += VLEN) {
            const int live = keys - j < VLEN ? keys - j : VLEN;
            vec v[VLEN];
            for (int i = 0; i < VLEN; i++)
                v[i] = shared ? v_set1(strip[j + i]) : v_load(strip + i * MHA_KEY_BLOCK + j);
            if (!shared)
                v_transpose(v);
            for (int i = 0; i < live; i++)
                v_store(s + (j + i) * LANES, FN(with_term)(v_load(s + (j + i) * LANES), v[i]));
        }
    }
}

/* Hide what lies outside a lane's interval, and take the maximum anew: that of the product may
 * come from a key that the lane does not see. */
static void FN(hide)(mha_tile *t)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY);
    for (int g = 0; g < t->vectors; g++) {
        REAL *s = (REAL *)t->s + g * VLEN;
        REAL lo[VLEN], hi[VLEN];
        vec best = v_set1(-LARGEST);
        for (int i = 0; i < VLEN; i++) { /* clipped to the block, so exact in REAL */
            const idx a = t->lo[g * VLEN + i] - t->key0, b = t->hi[g * VLEN + i] - t->key0;
            lo[i] = (REAL)(a < 0 ? 0 : a < MHA_KEY_BLOCK ? a : MHA_KEY_BLOCK);
            hi[i] = (REAL)(b < 0 ? 0 : b < MHA_KEY_BLOCK ? b : MHA_KEY_BLOCK);
        }
        const vec first = v_load(lo), past = v_load(hi);
        for (int j = t->begin[g]; j < t->end[g]; j++) {
            const vec key = v_set1((REAL)j);
            vec x = v_load(s + j * LANES);
            if (t->hidden) {
                x = v_if_less(key, past, v_if_less(key, first, minus_inf, x), minus_inf);
                v_store(s + j * LANES, x);
            }
            best = v_max(x, best);
        }
        v_store((REAL *)t->m_block + g * VLEN, best);
    }
}
