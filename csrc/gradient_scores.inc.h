/* From S and dP of a block to what their products take, P and dS, and sums of dS: gradients of
 * terms, slopes and a cap. A step's derivative stands in the opposite order of score.inc.h. */

/* What dropout makes of the weights of VLEN rows for the keys from `first` on. */
typedef struct {
    REAL half[FN(PER_DRAW)][FN(DRAWS) * VLEN];
    vec threshold, factor;
    int first;
} FN(kept);

static void FN(draw_kept)(const mha_tile *t, int g, FN(kept) * kept)
{
    const double drawn = 1 << 16, threshold = t->problem->weighing.threshold;
    const int first = t->block.begin[g] / FN(PER_DRAW) * FN(PER_DRAW), end = t->block.end[g];
    kept->threshold = v_set1((REAL)threshold);
    kept->factor = v_set1((REAL)(drawn / (drawn - threshold)));
    kept->first = first;
    FN(draw)(t, g * VLEN, VLEN, first, (end - first + FN(PER_DRAW) - 1) / FN(PER_DRAW), kept->half);
}

static ALWAYS_INLINE vec FN(keep)(const FN(kept) * kept, int j, vec x)
{
    const REAL *half = kept->half[j % FN(PER_DRAW)] + (j - kept->first) / FN(PER_DRAW) * VLEN;
    return v_if_less(v_load(half), kept->threshold, v_set1(0), v_mul(x, kept->factor));
}

/* S -> P, as it was multiplied by V, and dP -> dS in place, of vector g. */
static ALWAYS_INLINE void FN(pull_scores)(mha_tile *t, FN(pull) * pull, int g, int drops)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY), zero = v_set1(0), mark = v_set1((REAL)-0.0);
    const vec delta = v_load(pull->delta + g * VLEN);
    REAL sums[3][VLEN];
    FN(kept) kept;
    FN(gather_sums)(t, g, sums);
    const vec m = v_load(sums[0]), inverse = v_load(sums[1]);
    if (drops)
        FN(draw_kept)(t, g, &kept);
    for (int j = t->block.begin[g]; j < t->block.end[g]; j++) {
        REAL *s_at = (REAL *)t->block.s + j * LANES + g * VLEN;
        REAL *dp_at = pull->dp + j * LANES + g * VLEN;
        const vec s = v_load(s_at), p = FN(weights_of)(s, m, inverse);
        vec dp = v_load(dp_at), used = p;
        if (drops) {
            dp = FN(keep)(&kept, j, dp);
            used = FN(keep)(&kept, j, p);
        }
        v_store(s_at, v_if_equal(s, minus_inf, mark, used));
        v_store(dp_at, v_if_equal(s, minus_inf, zero, v_mul(p, v_sub(dp, delta))));
    }
}

/* Sums of dS over the keys, plain and times the distance: of a term with one column, of slopes. */
static void FN(pull_rows)(const mha_tile *t, FN(pull) * pull, int g)
{
    FN(rule) rule;
    vec bias = v_load(pull->bias + g * VLEN), slope = v_load(pull->slope + g * VLEN);
    FN(set_slopes)(&rule, t, g * VLEN, VLEN);
    for (int j = t->block.begin[g]; j < t->block.end[g]; j++) {
        const vec key = v_set1((REAL)j), ds = v_load(pull->dp + j * LANES + g * VLEN);
        bias = v_add(bias, ds);
        slope = v_fma(v_max(v_sub(key, rule.position), v_sub(rule.position, key)), ds, slope);
    }
    v_store(pull->bias + g * VLEN, bias);
    v_store(pull->slope + g * VLEN, slope);
}

/* Sums of dS over the rows of each head, for a term with one row. */
static void FN(pull_keys)(const mha_tile *t, const FN(pull) * pull)
{
    const mha_sizes *n = &t->problem->n;
    const idx heads = n->kv_heads * n->group_size;
    for (int g = 0; g < t->vectors; g++)
        for (int i = g * VLEN; i < (g + 1) * VLEN && i < t->place.rows; i++) {
            double *key = t->job->gradients.of_keys + t->block.first_key +
                          (t->place.batch * heads + t->row.head[i]) * n->seqlen_k;
            for (int j = t->block.begin[g]; j < t->block.end[g]; j++)
                key[j] += pull->dp[j * LANES + i];
        }
}

/* dS of scores -> dS of products: the derivative of a cap. */
static void FN(pull_cap)(const mha_tile *t, const FN(pull) * pull)
{
    for (int g = 0; g < t->vectors; g++)
        for (int j = t->block.begin[g]; j < t->block.end[g]; j++) {
            REAL *at = pull->dp + j * LANES + g * VLEN;
            const vec x = FN(tanh_vec)(v_load(pull->products + j * LANES + g * VLEN));
            const vec ds = v_load(at), steep = v_mul(ds, v_sub(v_set1(1), v_mul(x, x)));
            v_store(at, v_if_equal(ds, v_set1(0), ds, steep));
        }
}
