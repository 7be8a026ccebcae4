/* Gradients of a tile of query rows and a block of keys, by five products:
 *     S^T = K Q^T       P^T = exp2(S^T - m) / l, as in the forward pass      rows are keys
 *     dP^T = V dO^T     dS^T = P^T (dP^T - delta)                            rows are keys
 *     dV += P^T dO      dK += dS^T Q                                         rows are keys
 *     dQ^T += K^T dS^T                                                       rows are head dims
 * with delta = dO . O - d_lse of each row. What a row does not see adds nothing: its S is -inf, its
 * P a marked zero, its dS zero, and neither Inf nor NaN of a hidden slot enters a product.
 *
 * Canonical order, the rest of it in kernel.inc.h:
 *   8. delta is a sum of doubles, in 8 chains of every eighth column that pair up at the end.
 *   9. dV and dK of a key: one FMA chain from 0 over each MHA_ROW_CHAIN rows, counted from row 0
 *      (position, head of the group); chains add up from 0, the last rows first, by
 *      fma(chain, scale, sum), where the scale of dV is 1.
 *  10. dQ of a row: one FMA chain from 0 over the keys of MHA_SHARE blocks, counted from key 0;
 *      these shares add up likewise from 0 in key order. */

/* What a thread has beside its tile. Rows are padded with zeros to whole vectors. */
typedef struct {
    idx q_pad, v_pad;
    REAL *dp, *products;        /* [MHA_KEY_BLOCK][LANES]: dP, then dS; S before the score stage */
    REAL *g_panel;              /* dO^T [head_dim_v][LANES] */
    REAL *q_rows, *g_rows;      /* [LANES][pad]: Q without Inf and NaN, dO */
    REAL *dq;                   /* [head_dim][LANES] */
    REAL *dk, *dv;              /* [chain of the group][keys of a share][pad] */
    REAL *delta, *bias, *slope; /* [LANES]; sums of dS, and of dS times the distance */
    int finite;                 /* dO is */
} FN(pull);

/* to[key][pad] += left[key][lane] rows[lane][pad], summed over lanes [begin, end). */
typedef struct {
    const REAL *left, *rows;
    REAL *to;
    idx pad;
    int begin, end;
} FN(outer);

enum { FN(CHAINS) = MHA_ROW_GROUP / MHA_ROW_CHAIN, FN(SHARE_KEYS) = MHA_SHARE * MHA_KEY_BLOCK };

_Static_assert(MHA_ROW_GROUP % LANES == 0, "whole tiles make a group");

static idx FN(padded)(idx dim) { return (dim + VLEN - 1) / VLEN * VLEN; }

/* Lay out the buffers from `at` on, which may be NULL; returns their bytes. */
static size_t FN(lay_out_pull)(const mha_problem *p, FN(pull) * pull, char *at)
{
    const idx dim = p->n.head_dim, dim_v = p->n.head_dim_v, keys = FN(CHAINS) * FN(SHARE_KEYS);
    const idx q_pad = FN(padded)(dim), v_pad = FN(padded)(dim_v);
    const struct {
        REAL **pointer;
        idx elements;
    } buffers[] = {
        {&pull->dp, MHA_KEY_BLOCK * LANES},
        {&pull->products, MHA_KEY_BLOCK * LANES},
        {&pull->g_panel, (v_pad + VLEN) * LANES},
        {&pull->dq, (q_pad + VLEN) * LANES},
        {&pull->q_rows, LANES * q_pad},
        {&pull->g_rows, LANES * v_pad},
        {&pull->dk, keys * q_pad},
        {&pull->dv, keys * v_pad},
        {&pull->delta, LANES},
        {&pull->bias, LANES},
        {&pull->slope, LANES},
    };
    size_t bytes = 0;
    pull->q_pad = q_pad;
    pull->v_pad = v_pad;
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        *buffers[i].pointer = at ? (REAL *)(at + bytes) : NULL;
        bytes += FN(whole_lines)(sizeof(REAL) * (size_t)buffers[i].elements);
    }
    return bytes;
}

static FN(pull) * FN(pull_of)(mha_tile *t)
{
    return (FN(pull) *)((char *)t + FN(queries_tile_bytes)(t->problem));
}

/* Read a row and pad it with zeros. Is it finite? If not, and `tamed`, what is not becomes 0. */
static int FN(read_padded)(REAL *row, const char *from, const mha_array *a, idx dim, idx pad,
                           int tamed)
{
    int wild = 0;
    FN(read_row)(row, from, a->col_bytes, dim, a->dtype);
    for (idx c = 0; c < dim; c++)
        wild += !(row[c] - row[c] == 0);
    for (idx c = 0; tamed && wild && c < dim; c++)
        row[c] = row[c] - row[c] == 0 ? row[c] : 0;
    for (idx c = dim; c < pad; c++)
        row[c] = 0;
    return !wild;
}

/* Rows of Q and dO, dO^T, and delta. */
static void FN(pack_rows)(mha_tile *t, FN(pull) * pull)
{
    const mha_problem *p = t->problem;
    const mha_gradients *to = &t->job->gradients;
    const mha_array *out = &t->job->results.out;
    const idx dim = p->n.head_dim, dim_v = p->n.head_dim_v;
    REAL *o = t->strip;
    pull->finite = 1;
    for (int lane = 0; lane < t->lanes; lane++) {
        REAL *g = pull->g_rows + lane * pull->v_pad, d_lse = 0;
        FN(read_padded)(pull->q_rows + lane * pull->q_pad, t->row.q[lane], &p->q, dim, pull->q_pad,
                        1);
        pull->finite &=
            FN(read_padded)(g, FN(row_at)(t, &to->d_out, lane), &to->d_out, dim_v, pull->v_pad, 0);
        FN(read_row)(o, t->row.out[lane], out->col_bytes, dim_v, out->dtype);
        if (to->d_lse.data)
            FN(read_row)(&d_lse, FN(row_at)(t, &to->d_lse, lane), 0, 1, to->d_lse.dtype);
        pull->delta[lane] = (REAL)(FN(dot)(g, o, dim_v) - d_lse);
        pull->bias[lane] = pull->slope[lane] = 0;
    }
    for (int g = 0; g < t->vectors; g++) {
        const REAL *row[VLEN];
        for (int i = 0; i < VLEN; i++)
            row[i] = pull->g_rows + (g * VLEN + i) * pull->v_pad;
        FN(rows_into_lanes)(row, dim_v, NULL, pull->g_panel + g * VLEN, LANES);
    }
    memset(pull->dq, 0, sizeof(REAL) * (size_t)dim * LANES);
}

/* A tile of rows, ready for the keys of one share if it sees any of them. NULL: no memory. */
static mha_tile *FN(pull_begin)(const mha_job *job, idx task, idx share)
{
    const mha_problem *p = job->problem;
    const size_t behind = FN(whole_lines)(sizeof(FN(pull)));
    FN(pull) sizes;
    if (!mha_workspace(FN(queries_tile_bytes)(p) + behind + FN(lay_out_pull)(p, &sizes, NULL)))
        return NULL;
    mha_tile *t = FN(open_tile)(job, task, FN(queries_shape)(p));
    FN(pull) *pull = FN(pull_of)(t);
    FN(lay_out_pull)(p, pull, (char *)pull + behind);
    if (p->scoring.softcap != 0)
        t->block.products = pull->products;
    if (share * MHA_SHARE < t->last_block && t->first_block < (share + 1) * MHA_SHARE) {
        FN(pack_q)(t, (REAL)p->scoring.scale);
        FN(pack_rows)(t, pull);
    }
    return t;
}

#include "gradient_scores.inc.h"

/* ---- One block ------------------------------------------------------------------------------- */

/* Hidden keys may hold Inf or NaN. Where a row sees one, its P is NaN already. */
static void FN(tame_keys)(mha_tile *t)
{
    const idx dim = t->problem->n.head_dim;
    const mha_rows *k = &t->block.k;
    REAL *copy = t->block.k_copy;
    for (int j = t->block.first; j < t->block.last; j++)
        for (idx c = 0; c < dim; c++) {
            const REAL x = ((const REAL *)k->data)[j * k->row + c * k->col];
            copy[j * dim + c] = x - x == 0 ? x : 0;
        }
    t->block.k = (mha_rows){copy, dim, 1, DTYPE};
}

/* The lanes of a segment that an outer product takes. */
static int FN(first_lane)(const FN(outer) * o, const mha_segment *seg)
{
    return seg->first * VLEN > o->begin ? seg->first * VLEN : o->begin;
}

static int FN(past_lane)(const FN(outer) * o, const mha_segment *seg)
{
    return seg->last * VLEN < o->end ? seg->last * VLEN : o->end;
}

/* dP^T = V dO^T of one segment. */
static ALWAYS_INLINE void FN(pull_weights)(mha_tile *t, const FN(pull) * pull,
                                           const mha_segment *seg, int nv)
{
    const idx lane = seg->first * VLEN;
    const FN(product) p = {.a = t->block.v.data,
                           .a_row = t->block.v.row,
                           .a_depth = t->block.v.col,
                           .b = pull->g_panel + lane,
                           .b_depth = LANES,
                           .depth = t->problem->n.head_dim_v,
                           .c = pull->dp + lane,
                           .c_row = LANES};
    FN(product_rows)(t, &p, seg->begin, seg->end, nv, FN(STORE));
}

/* dQ^T += K^T dS^T of one segment. */
static ALWAYS_INLINE void FN(pull_queries)(mha_tile *t, const FN(pull) * pull,
                                           const mha_segment *seg, int nv)
{
    const idx lane = seg->first * VLEN;
    const mha_rows *k = &t->block.k;
    const FN(product) p = {.a = (const REAL *)k->data + seg->begin * k->row,
                           .a_row = k->col,
                           .a_depth = k->row,
                           .b = pull->dp + seg->begin * LANES + lane,
                           .b_depth = LANES,
                           .depth = seg->end - seg->begin,
                           .c = pull->dq + lane,
                           .c_row = LANES};
    FN(product_rows)(t, &p, 0, t->problem->n.head_dim, nv, FN(ADD));
}

/* dV += P^T dO, or dK += dS^T Q, of one segment: columns [column, column + nv * VLEN). */
static ALWAYS_INLINE void FN(pull_columns)(mha_tile *t, const FN(outer) * o, const mha_segment *seg,
                                           idx column, int nv)
{
    const int lane = FN(first_lane)(o, seg);
    const FN(product) p = {.a = o->left + lane,
                           .a_row = LANES,
                           .a_depth = 1,
                           .b = o->rows + lane * o->pad + column,
                           .b_depth = o->pad,
                           .depth = FN(past_lane)(o, seg) - lane,
                           .c = o->to + column,
                           .c_row = o->pad};
    FN(product_rows)(t, &p, seg->begin, seg->end, nv, FN(ADD));
}

static void FN(pull_outer)(mha_tile *t, const FN(outer) * o)
{
    for (int n = 0; n < t->block.num_segments; n++) {
        const mha_segment *seg = &t->block.segment[n];
        for (idx c = 0; c < o->pad && FN(first_lane)(o, seg) < FN(past_lane)(o, seg);
             c += NV * VLEN) {
            const idx left = (o->pad - c) / VLEN;
            BY_WIDTH(left < NV ? left : NV, FN(pull_columns), t, o, seg, c);
        }
    }
}

/* The same where dO has an Inf or NaN, which may not reach keys that its row does not see. */
static void FN(pull_outer_guarded)(mha_tile *t, const FN(outer) * o)
{
    for (int n = 0; n < t->block.num_segments; n++) {
        const mha_segment *seg = &t->block.segment[n];
        for (int j = seg->begin; j < seg->end; j++)
            for (int i = FN(first_lane)(o, seg); i < FN(past_lane)(o, seg); i++) {
                const REAL p = o->left[j * LANES + i];
                if (p == 0 && signbit(p))
                    continue;
                for (idx c = 0; c < o->pad; c += VLEN) {
                    REAL *to = o->to + j * o->pad + c;
                    v_store(to, v_fma(v_set1(p), v_load(o->rows + i * o->pad + c), v_load(to)));
                }
            }
    }
}

/* dV and dK of the block, by the chains that the tile's rows belong to. */
static void FN(pull_keys_and_values)(mha_tile *t, const FN(pull) * pull)
{
    const idx key = t->block.first_key % FN(SHARE_KEYS);
    const int guarded = t->block.hides && !pull->finite;
    const int row = (int)(t->place.first_row % MHA_ROW_GROUP);
    for (int chain = 0, begin = 0; begin < t->place.rows; chain++) {
        const int past = (chain + 1) * MHA_ROW_CHAIN - row;
        const int end = past < t->place.rows ? past : t->place.rows;
        const idx at = chain * FN(SHARE_KEYS) + key;
        if (end <= begin)
            continue;
        const FN(outer)
            dv = {t->block.s, pull->g_rows, pull->dv + at * pull->v_pad, pull->v_pad, begin, end};
        const FN(outer)
            dk = {pull->dp, pull->q_rows, pull->dk + at * pull->q_pad, pull->q_pad, begin, end};
        if (guarded)
            FN(pull_outer_guarded)(t, &dv);
        else
            FN(pull_outer)(t, &dv);
        FN(pull_outer)(t, &dk);
        begin = end;
    }
}

static void FN(pull_block)(mha_tile *t)
{
    FN(pull) *pull = FN(pull_of)(t);
    const mha_gradients *to = &t->job->gradients;
    const idx dim = t->problem->n.head_dim;
    for (int n = 0; n < t->block.num_segments; n++) {
        const mha_segment *seg = &t->block.segment[n];
        BY_WIDTH(seg->last - seg->first, FN(pull_weights), t, pull, seg);
    }
    for (int g = 0; g < t->vectors; g++)
        if (t->problem->weighing.threshold)
            FN(pull_scores)(t, pull, g, 1);
        else
            FN(pull_scores)(t, pull, g, 0);
    for (int g = 0; g < t->vectors && to->of_rows; g++)
        FN(pull_rows)(t, pull, g);
    if (to->of_keys)
        FN(pull_keys)(t, pull);
    if (t->writes_scores) {
        REAL *s = t->block.s;
        t->block.s = pull->dp;
        FN(queries_write_scores)(t);
        t->block.s = s;
    }
    if (t->problem->scoring.softcap != 0)
        FN(pull_cap)(t, pull);
    if (t->block.hides && (t->block.k.col != 1 || !FN(rows_finite)(t, &t->block.k, dim)))
        FN(tame_keys)(t);
    FN(pull_keys_and_values)(t, pull);
    for (int n = 0; n < t->block.num_segments; n++) {
        const mha_segment *seg = &t->block.segment[n];
        BY_WIDTH(seg->last - seg->first, FN(pull_queries), t, pull, seg);
    }
}

/* ---- Results --------------------------------------------------------------------------------- */

static idx FN(row_index)(const mha_tile *t, int lane)
{
    const mha_sizes *n = &t->problem->n;
    const idx head = t->place.batch * n->kv_heads * n->group_size + t->row.head[lane];
    return head * n->seqlen_q + t->row.query[lane];
}

/* What the tile's rows get from the share: dQ, and sums of dS. The first one is stored, not added:
 * memory that is read before it is written costs a second page fault. */
static void FN(pull_finish)(mha_tile *t, int first)
{
    const FN(pull) *pull = FN(pull_of)(t);
    const mha_gradients *to = &t->job->gradients;
    const idx dim = t->problem->n.head_dim;
    const vec scale = v_set1((REAL)to->scale);
    for (int g = 0; g < t->vectors; g++)
        for (idx d = 0; d < dim; d += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            vec v[VLEN];
            EACH (c, VLEN)
                v[c] = v_load(pull->dq + (d + c) * LANES + g * VLEN);
            v_transpose(v);
            for (int i = 0; i < VLEN && g * VLEN + i < t->place.rows; i++) {
                REAL *row = (REAL *)to->q + FN(row_index)(t, g * VLEN + i) * dim + d;
                const vec before = first ? v_set1(0) : FN(load_some)(row, n);
                FN(store_some)(row, v_fma(v[i], scale, before), n);
            }
        }
    for (int i = 0; i < t->place.rows && to->of_rows; i++) {
        ((REAL *)to->of_rows)[2 * FN(row_index)(t, i)] += pull->bias[i];
        ((REAL *)to->of_rows)[2 * FN(row_index)(t, i) + 1] -= pull->slope[i];
    }
}

static idx FN(keys_of_share)(const mha_sizes *n, idx share)
{
    const idx left = n->seqlen_k - share * FN(SHARE_KEYS);
    return left < FN(SHARE_KEYS) ? left : FN(SHARE_KEYS);
}

static void FN(pull_begin_group)(mha_tile *t, idx share)
{
    const FN(pull) *pull = FN(pull_of)(t);
    const size_t column = sizeof(REAL) * (size_t)FN(keys_of_share)(&t->problem->n, share);
    for (idx at = 0; at < FN(CHAINS) * FN(SHARE_KEYS); at += FN(SHARE_KEYS)) {
        memset(pull->dk + at * pull->q_pad, 0, column * (size_t)pull->q_pad);
        memset(pull->dv + at * pull->v_pad, 0, column * (size_t)pull->v_pad);
    }
}

static void FN(add_keys)(REAL *to, const REAL *part, idx keys, idx dim, idx pad, REAL factor,
                         int first)
{
    const vec scale = v_set1(factor);
    for (idx j = 0; j < keys; j++, to += dim, part += pad)
        for (idx c = 0; c < dim; c += VLEN) {
            const int n = dim - c < VLEN ? (int)(dim - c) : VLEN;
            const vec before = first ? v_set1(0) : FN(load_some)(to + c, n);
            FN(store_some)(to + c, v_fma(v_load(part + c), scale, before), n);
        }
}

static void FN(pull_end_group)(mha_tile *t, idx share, int first)
{
    const FN(pull) *pull = FN(pull_of)(t);
    const mha_sizes *n = &t->problem->n;
    const idx keys = FN(keys_of_share)(n, share), key = share * FN(SHARE_KEYS);
    const idx at = (t->place.batch * n->kv_heads + t->place.kv_head) * n->seqlen_k + key;
    const mha_gradients *to = &t->job->gradients;
    REAL *dk = (REAL *)to->k + at * n->head_dim, *dv = (REAL *)to->v + at * n->head_dim_v;
    for (int chain = FN(CHAINS) - 1; chain >= 0; chain--, first = 0) {
        const REAL *k_part = pull->dk + chain * FN(SHARE_KEYS) * pull->q_pad;
        const REAL *v_part = pull->dv + chain * FN(SHARE_KEYS) * pull->v_pad;
        FN(add_keys)(dk, k_part, keys, n->head_dim, pull->q_pad, (REAL)to->scale, first);
        FN(add_keys)(dv, v_part, keys, n->head_dim_v, pull->v_pad, 1, first);
    }
}

static const mha_pull FN(gradient) = {
    FN(pull_begin), FN(pull_block), FN(pull_finish), FN(pull_begin_group), FN(pull_end_group),
};
