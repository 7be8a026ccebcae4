/* Statistics of rows and keys, block by block, once the sums of the rows are known.
 *
 * A row's entropy is a sum of blocks, each a chain over its keys. What a key receives is a sum over
 * rows that threads share, so it is counted in integers, which add up to the same in any order. */

/* Units of received mass: 2^22 rows of weight 1 fit. Rows whose weight is NaN are counted apart. */
#define MASS_UNITS ((REAL)(1ll << 40))

/* The scores of vector g become weights, 0 for keys beyond its reach; its rows take them in. */
static void FN(measure_rows)(mha_tile *t, int g, REAL *const *row)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), zero = v_set1(0);
    REAL sums[3][VLEN], best[VLEN], entropy[VLEN];
    vec most = minus_inf, bits = zero;
    FN(gather_sums)(t, g, sums);
    const vec m = v_load(sums[0]), inverse = v_load(sums[1]), log_inverse = v_load(sums[2]);
    for (int j = t->block.first; j < t->block.last; j++) {
        REAL *at = (REAL *)t->block.s + j * LANES + g * VLEN;
        const int reached = t->block.begin[g] <= j && j < t->block.end[g];
        const vec s = reached ? v_load(at) : minus_inf, w = FN(weights_of)(s, m, inverse);
        const vec log_w = v_add(v_sub(s, m), log_inverse);
        most = v_max(s, most);
        bits = v_if_equal(w, zero, bits, v_fma(w, log_w, bits)); /* 0 log 0 is 0 */
        v_store(at, w);
    }
    v_store(best, most);
    v_store(entropy, bits);
    for (int i = 0; i < VLEN && g * VLEN + i < t->place.rows; i++) {
        row[i][0] = best[i] > row[i][0] ? best[i] : row[i][0];
        row[i][1] -= entropy[i];
    }
}

/* Row `lane` looks for its heaviest keys; of equal ones the first comes first. */
static void FN(measure_top)(const mha_tile *t, int lane, int64_t *keys, REAL *weights)
{
    const idx last = t->job->measures.top - 1;
    for (int j = t->block.first; j < t->block.last; j++) {
        const REAL w = ((const REAL *)t->block.s)[j * LANES + lane];
        if (w > weights[last]) {
            idx at = last;
            for (; at > 0 && w > weights[at - 1]; at--) {
                weights[at] = weights[at - 1];
                keys[at] = keys[at - 1];
            }
            weights[at] = w;
            keys[at] = t->block.first_key + j;
        }
    }
}

/* What keys receive of the rows of one head: of each `step`th lane. */
static void FN(measure_keys)(const mha_tile *t, int lane, int step, int64_t *received)
{
    for (int j = t->block.first; j < t->block.last; j++) {
        const REAL *w = (const REAL *)t->block.s + j * LANES;
        int64_t *of_key = received + 2 * (t->block.first_key + j), mass = 0, unknown = 0;
        for (int i = lane; i < t->place.rows; i += step) {
            const int is_number = w[i] == w[i];
            mass += (int64_t)((is_number ? w[i] : 0) * MASS_UNITS + (REAL)0.5);
            unknown += !is_number;
        }
        mha_fetch_add(of_key, mass);
        if (unknown)
            mha_fetch_add(of_key + 1, unknown);
    }
}

static void FN(queries_measure)(mha_tile *t)
{
    const mha_sizes *n = &t->problem->n;
    const mha_measures *out = &t->job->measures;
    const idx heads = n->kv_heads * n->group_size, first_head = t->place.batch * heads;
    idx index[MHA_MAX_LANES];
    REAL *row[MHA_MAX_LANES];
    for (int i = 0; i < t->lanes; i++) {
        index[i] = (first_head + t->row.head[i]) * n->seqlen_q + t->row.query[i];
        row[i] = (REAL *)out->rows + 2 * index[i];
    }
    for (int g = 0; g < t->vectors; g++)
        FN(measure_rows)(t, g, row + g * VLEN);
    for (int i = 0; i < t->place.rows && out->top; i++)
        FN(measure_top)(t, i, out->top_keys + index[i] * out->top,
                        (REAL *)out->top_weights + index[i] * out->top);
    for (int i = 0; i < t->place.rows && i < n->group_size; i++)
        FN(measure_keys)(t, i, (int)(n->group_size < LANES ? n->group_size : LANES),
                         out->received + 2 * (first_head + t->row.head[i]) * n->seqlen_k);
}
