/* The one kernel text, compiled once per ISA and compute dtype.
 *
 * For a tile of queries (one per lane) and a block of keys:
 *     S^T = K Q^T                 scores_block: rows are keys; K is read as broadcast scalars
 *     m = max S, P = exp2(S - m), l = sum P       softmax_block: straight down the columns
 *     O^T (+)= V^T P^T            weighted_sum_block: rows are head dims; V as broadcast scalars
 *
 * Canonical arithmetic. These rules alone decide the bits of a row; tile shape, lane, thread,
 * ISA, memory layout and batch do not enter:
 *   1. q is multiplied by scale * log2(e), rounded; a score is one FMA chain over head_dim from 0.
 *   2. Each mask or bias term: s = fma(term, log2(e), s), not below -LARGEST; hidden: s = -inf.
 *   3. Keys go in blocks of MHA_KEY_BLOCK, aligned to key 0. Each block stands alone: its max m',
 *      p = exp2(s - m') with one fixed polynomial, its sum l' and its weighted sum o', both chains
 *      from 0 in key order. A hidden key adds exact zeros, whether it is visited or not.
 *   4. Blocks merge in key order: with M = max(m, m'), a = exp2(m - M), b = exp2(m' - M),
 *      l = fma(l, a, l' * b) and o = fma(o, a, o' * b).
 *   5. out = fma(o, 1 / l, +0), or 0 where l is 0.
 */
#include <float.h>

#include "dtype.h"

#define LANES (NV * VLEN)
#define IS_FLOAT (sizeof(REAL) == sizeof(float))
#define DTYPE (IS_FLOAT ? MHA_F32 : MHA_F64)
#define LARGEST ((REAL)(IS_FLOAT ? FLT_MAX : DBL_MAX))
#define LOG2_E 1.4426950408889634

#include "exp2.inc.h"
#include "rows.inc.h"

/* Call f with a constant number of vectors. */
#define BY_WIDTH(width, f, ...)                                                                    \
    do {                                                                                           \
        if ((width) == 1)                                                                          \
            f(__VA_ARGS__, 1);                                                                     \
        else if (NV > 2 && (width) == 2)                                                           \
            f(__VA_ARGS__, 2);                                                                     \
        else if (NV > 3 && (width) == 3)                                                           \
            f(__VA_ARGS__, NV > 3 ? 3 : NV);                                                       \
        else                                                                                       \
            f(__VA_ARGS__, NV);                                                                    \
    } while (0)

/* acc[i][v] += sum over k of a[i * a_row + k * a_depth] * b[k][v], the one inner loop of it all. */
static ALWAYS_INLINE void FN(multiply)(vec acc[][NV], int rows, int nv, idx depth, const REAL *a,
                                       idx a_row, idx a_depth, const REAL *b)
{
    for (idx k = 0; k < depth; k++, a += a_depth, b += LANES) {
        vec bk[NV];
        EACH (v, nv)
            bk[v] = v_load(b + v * VLEN);
        EACH (i, rows) {
            const vec ai = v_set1(a[i * a_row]);
            EACH (v, nv)
                acc[i][v] = v_fma(ai, bk[v], acc[i][v]);
        }
    }
}

/* Scores of `rows` keys from key j on, and their maximum. */
static ALWAYS_INLINE void FN(score_rows)(const mha_tile *t, int rows, int nv, int j, idx lane,
                                         vec *best)
{
    vec acc[8][NV];
    REAL *s = (REAL *)t->s + j * LANES + lane;
    EACH (i, rows)
        EACH (v, nv)
            acc[i][v] = v_set1(0);
    FN(multiply)(acc, rows, nv, t->problem->head_dim, (const REAL *)t->k_block + j * t->k_row,
                 t->k_row, t->k_col, (const REAL *)t->q_panel + lane);
    EACH (i, rows)
        EACH (v, nv) {
            v_store(s + i * LANES + v * VLEN, acc[i][v]);
            best[v] = v_max(acc[i][v], best[v]);
        }
}

static ALWAYS_INLINE void FN(score_segment)(const mha_tile *t, const mha_segment *seg, int nv)
{
    const idx lane = seg->first * VLEN;
    REAL *m = (REAL *)t->m_block + lane;
    vec best[NV];
    int j = seg->begin;
    EACH (v, nv)
        best[v] = v_load(m + v * VLEN);
    for (; j + ROWS(nv) <= seg->end; j += ROWS(nv))
        FN(score_rows)(t, ROWS(nv), nv, j, lane, best);
    for (; j + 2 <= seg->end; j += 2)
        FN(score_rows)(t, 2, nv, j, lane, best);
    if (j < seg->end)
        FN(score_rows)(t, 1, nv, j, lane, best);
    EACH (v, nv)
        v_store(m + v * VLEN, best[v]);
}

#include "terms.inc.h"

static int FN(scores_block)(mha_tile *t, idx block)
{
    const mha_problem *p = t->problem;
    int mixed[MHA_MAX_TERMS], num_mixed = 0;
    idx unused;
    if (!mha_tile_block(t, block, VLEN))
        return 0;
    for (int n = 0; n < p->num_terms; n++) {
        const int effect = FN(term_effect)(t, n);
        if (effect == TERM_HIDES_ALL)
            return 0;
        if (effect == TERM_MIXED)
            mixed[num_mixed++] = n;
    }
    t->k_block = FN(block_rows)(&p->k, t->k + t->key0 * p->k.row, t, p->head_dim, t->k_copy,
                                &t->k_row, &t->k_col, 1);
    t->v_block = FN(block_rows)(&p->v, t->v + t->key0 * p->v.row, t, p->head_dim_v, t->v_copy,
                                &t->v_row, &unused, 0);
    for (int v = 0; v < t->vectors; v++)
        v_store((REAL *)t->m_block + v * VLEN, v_set1(-LARGEST));
    for (int n = 0; n < t->num_segments; n++) {
        const mha_segment *seg = &t->segment[n];
        BY_WIDTH(seg->last - seg->first, FN(score_segment), t, seg);
    }
    for (int n = 0; n < num_mixed; n++)
        FN(add_term)(t, mixed[n]);
    if (num_mixed || t->hidden)
        FN(hide)(t);
    t->hidden |= num_mixed > 0;
    return 1;
}

/* S -> P in place, and the block's row sums. A hidden key becomes -0: it adds nothing to any sum,
 * and its sign tells weighted_sum_guarded that V may not be read for it. */
static void FN(softmax_block)(mha_tile *t)
{
    const vec minus_inf = v_set1(-INFINITY), minus_zero = v_set1((REAL)-0.0);
    for (int g = 0; g < t->vectors; g++) {
        REAL *s = (REAL *)t->s + g * VLEN;
        const vec m = v_load((REAL *)t->m_block + g * VLEN);
        vec sum = v_set1(0);
        if (!t->hidden)
            for (int j = t->begin[g]; j < t->end[g]; j++) {
                const vec p = FN(exp2_vec)(v_sub(v_load(s + j * LANES), m));
                v_store(s + j * LANES, p);
                sum = v_add(sum, p);
            }
        else
            for (int j = t->begin[g]; j < t->end[g]; j++) {
                const vec x = v_load(s + j * LANES), p = FN(exp2_vec)(v_sub(x, m));
                v_store(s + j * LANES, v_if_equal(x, minus_inf, minus_zero, p));
                sum = v_add(sum, p);
            }
        v_store((REAL *)t->l_block + g * VLEN, sum);
    }
}

/* Weighted sums of `rows` head dims from d on over one segment. With factors a and b, [LANES] each
 * in memory (in registers they would displace the operands of the loop), they merge into o at
 * once: the segment is the whole block. Without, they are carried on in o_block. */
static ALWAYS_INLINE void FN(value_rows)(const mha_tile *t, const mha_segment *seg, int rows,
                                         int nv, idx d, const REAL *a, const REAL *b)
{
    vec acc[8][NV];
    const idx lane = seg->first * VLEN;
    REAL *o = (REAL *)t->o + d * LANES + lane, *part = (REAL *)t->o_block + d * LANES + lane;
    EACH (i, rows)
        EACH (v, nv)
            acc[i][v] = a ? v_set1(0) : v_load(part + i * LANES + v * VLEN);
    FN(multiply)(acc, rows, nv, seg->end - seg->begin,
                 (const REAL *)t->v_block + seg->begin * t->v_row + d, 1, t->v_row,
                 (const REAL *)t->s + seg->begin * LANES + lane);
    EACH (i, rows)
        EACH (v, nv) {
            const idx at = i * LANES + v * VLEN;
            if (a)
                v_store(o + at, v_fma(v_load(o + at), v_load(a + lane + v * VLEN),
                                      v_mul(acc[i][v], v_load(b + lane + v * VLEN))));
            else
                v_store(part + at, acc[i][v]);
        }
}

static ALWAYS_INLINE void FN(value_segment)(const mha_tile *t, const mha_segment *seg,
                                            const REAL *a, const REAL *b, int nv)
{
    const idx dim = t->problem->head_dim_v;
    idx d = 0;
    for (; d + ROWS(nv) <= dim; d += ROWS(nv))
        FN(value_rows)(t, seg, ROWS(nv), nv, d, a, b);
    for (; d + 2 <= dim; d += 2)
        FN(value_rows)(t, seg, 2, nv, d, a, b);
    if (d < dim)
        FN(value_rows)(t, seg, 1, nv, d, a, b);
}

/* The same for a block where some lane may not see some key and V holds an Inf or NaN: 0 * Inf is
 * NaN, so the products of hidden keys, marked by -0, are left out one by one. */
static void FN(value_segment_guarded)(const mha_tile *t, const mha_segment *seg)
{
    const vec zero = v_set1(0), one = v_set1(1);
    for (int g = seg->first; g < seg->last; g++)
        for (idx d = 0; d < t->problem->head_dim_v; d++) {
            REAL *part = (REAL *)t->o_block + d * LANES + g * VLEN;
            vec acc = v_load(part);
            for (int j = seg->begin; j < seg->end; j++) {
                const vec p = v_load((const REAL *)t->s + j * LANES + g * VLEN);
                const vec v = v_set1(((const REAL *)t->v_block)[j * t->v_row + d]);
                const vec hidden = v_if_equal(p, zero, v_div(one, p), zero); /* -inf for -0 */
                acc = v_if_less(hidden, zero, acc, v_fma(v, p, acc));
            }
            v_store(part, acc);
        }
}

static int FN(values_finite)(const mha_tile *t)
{
    const int begin = t->segment[0].begin, end = t->segment[t->num_segments - 1].end;
    REAL sum = 0;
    for (int j = begin; j < end; j++) {
        const REAL *row = (const REAL *)t->v_block + j * t->v_row;
        REAL tainted[VLEN] = {0};
        idx d = 0;
        for (; d + VLEN <= t->problem->head_dim_v; d += VLEN)
            for (int i = 0; i < VLEN; i++)
                tainted[i] += row[d + i] * 0;
        for (; d < t->problem->head_dim_v; d++)
            tainted[0] += row[d] * 0;
        for (int i = 0; i < VLEN; i++)
            sum += tainted[i];
    }
    return sum == 0;
}

static void FN(weighted_sum_block)(mha_tile *t)
{
    const int guarded = t->hidden && !FN(values_finite)(t);
    const idx dim = t->problem->head_dim_v;
    REAL *m = t->m, *l = t->l, *o = t->o, *part = t->o_block, *a = t->a, *b = t->b;

    for (int g = 0; g < t->vectors; g++) {
        const vec m_old = v_load(m + g * VLEN), m_block = v_load((REAL *)t->m_block + g * VLEN);
        const vec m_new = v_max(m_old, m_block), l_block = v_load((REAL *)t->l_block + g * VLEN);
        const vec ag = FN(exp2_vec)(v_sub(m_old, m_new));
        const vec bg = FN(exp2_vec)(v_sub(m_block, m_new));
        v_store(a + g * VLEN, ag);
        v_store(b + g * VLEN, bg);
        v_store(m + g * VLEN, m_new);
        v_store(l + g * VLEN, v_fma(v_load(l + g * VLEN), ag, v_mul(l_block, bg)));
    }
    if (t->num_segments == 1 && !guarded) {
        const mha_segment *seg = t->segment;
        BY_WIDTH(seg->last - seg->first, FN(value_segment), t, seg, a, b);
        return;
    }
    memset(part, 0, sizeof(REAL) * (size_t)dim * LANES);
    for (int n = 0; n < t->num_segments; n++) {
        const mha_segment *seg = &t->segment[n];
        if (guarded)
            FN(value_segment_guarded)(t, seg);
        else
            BY_WIDTH(seg->last - seg->first, FN(value_segment), t, seg, NULL, NULL);
    }
    for (idx d = 0; d < dim; d++)
        for (int g = 0; g < t->vectors; g++) {
            const idx at = d * LANES + g * VLEN;
            v_store(o + at, v_fma(v_load(o + at), v_load(a + g * VLEN),
                                  v_mul(v_load(part + at), v_load(b + g * VLEN))));
        }
}

/* Lay the workspace out behind the tile, and put Q into the lanes. */
static mha_tile *FN(begin)(const mha_problem *p, idx task)
{
    const idx dim = p->head_dim, dim_v = p->head_dim_v, wide = dim > dim_v ? dim : dim_v;
    const idx strip = VLEN * (wide > MHA_KEY_BLOCK ? wide : MHA_KEY_BLOCK);
    const idx sizes[] = {dim * LANES,
                         MHA_KEY_BLOCK * LANES,
                         dim_v * LANES,
                         dim_v * LANES,
                         LANES,
                         LANES,
                         LANES,
                         LANES,
                         LANES,
                         LANES,
                         MHA_KEY_BLOCK * dim,
                         MHA_KEY_BLOCK * dim_v,
                         strip};
    enum { BUFFERS = sizeof sizes / sizeof *sizes, LINE = 64 };
    size_t offset[BUFFERS], bytes = (sizeof(mha_tile) + LINE - 1) / LINE * LINE;
    for (int i = 0; i < BUFFERS; i++) {
        offset[i] = bytes;
        bytes += ((size_t)sizes[i] * sizeof(REAL) + LINE - 1) / LINE * LINE;
    }
    char *memory = mha_workspace(bytes);
    if (!memory)
        return NULL;
    mha_tile *t = (mha_tile *)memory;
    void **buffers[BUFFERS] = {&t->q_panel, &t->s,       &t->o,       &t->o_block, &t->m,
                               &t->l,       &t->m_block, &t->l_block, &t->a,       &t->b,
                               &t->k_copy,  &t->v_copy,  &t->strip};
    for (int i = 0; i < BUFFERS; i++)
        *buffers[i] = memory + offset[i];

    mha_tile_begin(t, p, task, LANES, VLEN);
    FN(pack_q)(t, (REAL)(p->scale * LOG2_E));
    memset(t->o, 0, sizeof(REAL) * (size_t)dim_v * LANES);
    for (int i = 0; i < LANES; i++) {
        ((REAL *)t->m)[i] = -LARGEST;
        ((REAL *)t->l)[i] = 0;
    }
    return t;
}

static void FN(finish)(mha_tile *t)
{
    const REAL *m = t->m, *l = t->l;
    REAL inverse[LANES] = {0};
    for (int lane = 0; lane < t->rows; lane++) {
        inverse[lane] = l[lane] == 0 ? 0 : 1 / l[lane];
        if (t->lse_row[lane]) {
            const double lse = m[lane] / LOG2_E + log((double)l[lane]);
            FN(write_row)(t->lse_row[lane], &(REAL){(REAL)lse}, 0, 1, DTYPE);
        }
    }
    FN(unpack_o)(t, inverse);
}

#include "measure.inc.h"

static const mha_kernel FN(kernel) = {
    LANES,      FN(begin),      FN(scores_block), FN(softmax_block), FN(weighted_sum_block),
    FN(finish), FN(exp2_array), FN(fma_chain),    FN(read_all),
};
