/* From product to score: rule 2 of the canonical arithmetic, once, for VLEN pairs of a row and a
 * key however they lie in the lanes: a row in each and one key in all (queries in lanes), or one
 * row in all and a key in each (keys in lanes). */

/* What rows bring along to meet a key. Keys count from the start of the block. */
typedef struct {
    vec lo, hi;          /* the spans of the rows, where bounded */
    vec slope, position; /* of the rows, where sloped */
    vec softcap;         /* where capped */
    int bounded;         /* some row does not see some key */
    int sloped, capped;
    int shared[MHA_MAX_TERMS];             /* a term has one row for all queries */
    const REAL *term[MHA_MAX_TERMS][VLEN]; /* rows of the mixed terms */
} FN(rule);

/* What is found out on the way: the maximum, and 1 where a key is hidden. */
typedef struct {
    vec best, hidden;
} FN(found);

/* The span of a row, clipped to the block, so exact in REAL. */
static void FN(span)(const mha_tile *t, int lane, REAL *lo, REAL *hi)
{
    const idx a = t->row.lo[lane] - t->block.first_key, b = t->row.hi[lane] - t->block.first_key;
    *lo = (REAL)(a < 0 ? 0 : a < MHA_KEY_BLOCK ? a : MHA_KEY_BLOCK);
    *hi = (REAL)(b < 0 ? 0 : b < MHA_KEY_BLOCK ? b : MHA_KEY_BLOCK);
}

static void FN(set_slopes)(FN(rule) * rule, const mha_tile *t, int lane, int rows)
{
    REAL slope[VLEN] = {0}, position[VLEN] = {0};
    rule->sloped = t->place.slopes != NULL;
    for (int i = 0; i < VLEN && rule->sloped; i++) {
        const int of = rows == 1 ? lane : lane + i;
        const idx at = t->row.head[of] * t->problem->scoring.slopes.head_bytes;
        slope[i] = *(const REAL *)(t->place.slopes + at) * -(REAL)LOG2_E;
        position[i] = (REAL)(t->row.query[of] + t->place.offset - t->block.first_key);
    }
    rule->slope = v_load(slope);
    rule->position = v_load(position);
}

/* The rule of VLEN rows from `lane` on, or of that one row in all lanes. */
static FN(rule) FN(rule_of)(const mha_tile *t, int lane, int rows)
{
    FN(rule) rule;
    REAL lo[VLEN] = {0}, hi[VLEN] = {0}, *copy = t->strip;
    for (int i = 0; i < VLEN && t->block.hides; i++)
        FN(span)(t, rows == 1 ? lane : lane + i, &lo[i], &hi[i]);
    rule.bounded = t->block.hides;
    rule.capped = t->problem->scoring.softcap != 0;
    rule.softcap = v_set1((REAL)t->problem->scoring.softcap);
    FN(set_slopes)(&rule, t, lane, rows);
    rule.lo = v_load(lo);
    rule.hi = v_load(hi);
    for (int n = 0; n < t->block.num_mixed; n++) {
        rule.shared[n] = FN(is_shared)(t, t->block.mixed[n]);
        for (int i = 0; i < (rule.shared[n] ? 1 : rows); i++, copy += MHA_KEY_BLOCK)
            rule.term[n][i] = FN(term_row)(t, t->block.mixed[n], lane + i, copy);
    }
    return rule;
}

/* The scores of products `s` (the scale is in q), by a vector of each mixed term, in this order; a
 * transform's derivative belongs beside it, step by step in the opposite order. What one term hid
 * stays hidden, whatever the next is. */
static ALWAYS_INLINE vec FN(score)(const FN(rule) * rule, vec s, vec key, const vec *term,
                                   int num_terms, FN(found) * found)
{
    const vec minus_inf = v_set1(-(REAL)INFINITY);
    if (rule->capped)
        s = v_mul(rule->softcap, FN(tanh_vec)(s));
    if (rule->sloped)
        s = v_fma(rule->slope, v_max(v_sub(key, rule->position), v_sub(rule->position, key)), s);
    EACH (n, num_terms) {
        const vec sum = v_max(v_set1(-LARGEST), v_fma(term[n], v_set1((REAL)LOG2_E), s));
        s = v_if_equal(s, minus_inf, s, v_if_equal(term[n], minus_inf, minus_inf, sum));
    }
    if (rule->bounded)
        s = v_if_less(key, rule->hi, v_if_less(key, rule->lo, minus_inf, s), minus_inf);
    found->best = v_max(s, found->best);
    found->hidden = v_if_equal(s, minus_inf, v_set1(1), found->hidden);
    return s;
}

/* Does a block need this stage at all? Else its products are its scores. */
static int FN(scores_change)(const mha_tile *t)
{
    return t->block.num_mixed || t->block.hides || t->problem->scoring.softcap != 0 ||
           t->place.slopes;
}

/* Call f with a constant number of terms. */
#define BY_TERMS(num_terms, f, ...)                                                                \
    do {                                                                                           \
        if ((num_terms) == 0)                                                                      \
            f(__VA_ARGS__, 0);                                                                     \
        else if ((num_terms) == 1)                                                                 \
            f(__VA_ARGS__, 1);                                                                     \
        else                                                                                       \
            f(__VA_ARGS__, MHA_MAX_TERMS);                                                         \
    } while (0)
