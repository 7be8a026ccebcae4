/* Geometry of tiles and blocks: which rows, which keys. No arithmetic on elements here. */
#include "mha.h"

static idx min(idx a, idx b)
{
    return a < b ? a : b;
}

static idx max(idx a, idx b)
{
    return a > b ? a : b;
}

static idx clamp(idx x, idx low, idx high)
{
    return min(max(x, low), high);
}

/* Every structural mask is this interval: the keys [lo, hi) that the query at `position` sees. */
static void span(const mha_problem *p, idx position, idx length, idx *lo, idx *hi)
{
    *lo = p->window_left == MHA_OPEN ? 0 : max(0, position - p->window_left);
    *hi = p->window_right == MHA_OPEN ? length : min(length, position + p->window_right + 1);
    *lo = min(*lo, length);
    *hi = max(*hi, *lo);
}

static idx tiles_per_head(const mha_problem *p, int lanes)
{
    return (p->group_size * p->seqlen_q + lanes - 1) / lanes;
}

idx mha_tile_count(const mha_problem *p, int lanes)
{
    return p->batch * p->kv_heads * tiles_per_head(p, lanes);
}

static idx first_row(const mha_problem *p, idx task, int lanes)
{
    const idx tiles = tiles_per_head(p, lanes);
    return (tiles - 1 - task % tiles) * lanes;
}

int mha_tile_rows(const mha_problem *p, idx task, int lanes)
{
    return (int)min(lanes, p->group_size * p->seqlen_q - first_row(p, task, lanes));
}

/* Byte offset of batch entry `batch` in an array, by its broadcast strides. */
static idx batch_offset(const mha_problem *p, const mha_array *a, idx batch)
{
    idx offset = 0;
    for (int axis = p->batch_axes - 1; axis >= 0; axis--) {
        offset += batch % p->batch_shape[axis] * a->batch[axis];
        batch /= p->batch_shape[axis];
    }
    return offset;
}

static idx integer_of(const mha_problem *p, const mha_array *a, idx batch, idx otherwise)
{
    return a->data ? (idx) * (const int64_t *)(a->data + batch_offset(p, a, batch)) : otherwise;
}

/* What lanes [first, last) see together, and what each of them sees. */
static mha_reach reach_of(const mha_tile *t, int first, int last)
{
    mha_reach r = {PTRDIFF_MAX, 0, 0, PTRDIFF_MAX};
    for (int lane = first; lane < last; lane++) {
        const idx lo = t->lo[lane], hi = t->hi[lane];
        if (lo < hi) {
            r.begin = min(r.begin, lo);
            r.end = max(r.end, hi);
        }
        r.all_begin = max(r.all_begin, lo);
        r.all_end = min(r.all_end, hi);
    }
    return r;
}

/* Where the tile's rows are in an array; NULL where there is no array. */
static void point_at_rows(const mha_tile *t, const mha_array *a, idx batch, char **row)
{
    char *base = a->data ? a->data + batch_offset(t->problem, a, batch) : NULL;
    for (int lane = 0; lane < t->lanes; lane++)
        row[lane] = base ? base + t->head[lane] * a->head + t->query[lane] * a->row : NULL;
}

/* The same for scores, where only some heads and rows may be wanted; whether any is. */
static int point_at_scores(mha_tile *t, idx batch)
{
    const mha_problem *p = t->problem;
    int any = 0;
    for (int lane = 0; lane < t->lanes; lane++) {
        const idx head = p->heads_of ? p->heads_of[t->head[lane]] : t->head[lane];
        const idx row = p->rows_of ? p->rows_of[t->query[lane]] : t->query[lane];
        const int wanted = lane < t->rows && head >= 0 && row >= 0;
        char *base = p->scores.data + batch_offset(p, &p->scores, batch);
        t->scores_row[lane] = wanted ? base + head * p->scores.head + row * p->scores.row : NULL;
        any |= wanted;
    }
    return any;
}

/* What the lanes may see by position, and the blocks that holds. */
static void reach_all(mha_tile *t, idx offset, idx length, int vlen)
{
    idx begin = PTRDIFF_MAX, end = 0;
    for (int lane = 0; lane < t->lanes; lane++)
        span(t->problem, t->query[lane] + offset, length, &t->lo[lane], &t->hi[lane]);
    for (int g = 0; g < t->vectors; g++) {
        t->reach[g] = reach_of(t, g * vlen, (g + 1) * vlen);
        begin = min(begin, t->reach[g].begin);
        end = max(end, t->reach[g].end);
    }
    t->first_block = begin < end ? begin / MHA_KEY_BLOCK : 0;
    t->last_block = begin < end ? (end + MHA_KEY_BLOCK - 1) / MHA_KEY_BLOCK : 0;
}

/* Task order: (batch, KV head) outside, so that neighbours in time share K and V in the cache;
 * inside, the last tile first, which sees the most keys when the mask is causal. */
void mha_tile_begin(mha_tile *t, const mha_problem *p, idx task, int lanes, int vlen)
{
    const idx tiles = tiles_per_head(p, lanes), first = first_row(p, task, lanes);
    const idx kv_head = task / tiles % p->kv_heads, batch = task / tiles / p->kv_heads;
    const idx length = clamp(integer_of(p, &p->kv_lengths, batch, p->seqlen_k), 0, p->seqlen_k);
    t->problem = p;
    t->next_task = -1;
    t->num_ahead = 0;
    t->k = p->k.data + batch_offset(p, &p->k, batch) + kv_head * p->k.head;
    t->v = p->v.data + batch_offset(p, &p->v, batch) + kv_head * p->v.head;
    t->rows = mha_tile_rows(p, task, lanes);
    t->vectors = (t->rows + vlen - 1) / vlen;
    t->lanes = t->vectors * vlen;

    idx query = first / p->group_size, in_group = first % p->group_size;
    for (int lane = 0; lane < t->lanes; lane++) {
        t->head[lane] = kv_head * p->group_size + in_group;
        t->query[lane] = query;
        /* Lanes past the last row repeat it, so they never make a block look partly hidden. */
        if (lane < t->rows - 1 && ++in_group == p->group_size) {
            in_group = 0;
            query++;
        }
    }
    point_at_rows(t, &p->q, batch, t->q_row);
    point_at_rows(t, &p->out, batch, t->out_row);
    point_at_rows(t, &p->lse, batch, t->lse_row);
    point_at_rows(t, &p->sums, batch, t->sums_row);
    for (int n = 0; n < p->num_terms; n++)
        point_at_rows(t, &p->terms[n], batch, t->term_row[n]);
    reach_all(t, integer_of(p, &p->q_offset, batch, length - p->seqlen_q), length, vlen);
    t->writes_scores = p->scores.data && point_at_scores(t, batch);
}

/* Cut the keys of the block where the set of vectors that see them changes. Positions do not
 * decrease over lanes, so that set is always a contiguous run of vectors. */
static void cut_segments(mha_tile *t)
{
    int position = MHA_KEY_BLOCK, end = 0;
    for (int g = 0; g < t->vectors; g++)
        if (t->begin[g] < t->end[g]) {
            position = (int)min(position, t->begin[g]);
            end = (int)max(end, t->end[g]);
        }
    t->num_segments = 0;
    while (position < end) {
        mha_segment s = {position, end, t->vectors, 0};
        for (int g = 0; g < t->vectors; g++) {
            if (t->begin[g] > position && t->begin[g] < t->end[g])
                s.end = (int)min(s.end, t->begin[g]);
            if (t->end[g] > position && t->begin[g] <= position) {
                s.end = (int)min(s.end, t->end[g]);
                s.first = (int)min(s.first, g);
                s.last = g + 1;
            }
        }
        if (s.first < s.last)
            t->segment[t->num_segments++] = s;
        position = s.end;
    }
}

static int in_block(const mha_tile *t, idx key)
{
    return (int)clamp(key - t->key0, 0, MHA_KEY_BLOCK);
}

/* Set the tile to key block `block`; 0 when no lane may see any key of it. */
int mha_tile_block(mha_tile *t, idx block)
{
    t->key0 = block * MHA_KEY_BLOCK;
    t->hidden = 0;
    for (int g = 0; g < t->vectors; g++) {
        const mha_reach *r = &t->reach[g];
        t->begin[g] = in_block(t, r->begin);
        t->end[g] = (int)max(t->begin[g], in_block(t, r->end));
        t->hidden |= t->begin[g] < t->end[g] && (in_block(t, r->all_begin) > t->begin[g] ||
                                                 in_block(t, r->all_end) < t->end[g]);
    }
    cut_segments(t);
    return t->num_segments > 0;
}

/* Leave out the block's keys outside [begin, end), which no lane sees. */
int mha_tile_trim(mha_tile *t, int begin, int end)
{
    for (int g = 0; g < t->vectors; g++) {
        t->begin[g] = (int)max(t->begin[g], begin);
        t->end[g] = (int)max(t->begin[g], min(t->end[g], end));
    }
    cut_segments(t);
    return t->num_segments > 0;
}

static void add_stream(mha_tile *t, const char *row, idx stride, idx rows, idx cols, idx col)
{
    const idx bytes = cols * col;
    if (rows > 0 && bytes > 0 && col <= MHA_DENSE)
        t->ahead[t->num_ahead++] = (mha_stream){row, stride, rows, bytes};
}

/* The next task's Q and out, and its first keys and values where they are another head's. No
 * hardware prefetcher can know them, and in short sequences they are much of the traffic. */
void mha_tile_look_ahead(mha_tile *t, int lanes)
{
    const mha_problem *p = t->problem;
    const idx tiles = tiles_per_head(p, lanes), task = t->next_task;
    t->num_ahead = 0;
    if (task < 0 || task >= mha_tile_count(p, lanes))
        return;
    const idx kv_head = task / tiles % p->kv_heads, batch = task / tiles / p->kv_heads;
    const idx keys = min(p->seqlen_k, MHA_KEY_BLOCK), rows = mha_tile_rows(p, task, lanes);
    const char *k = p->k.data + batch_offset(p, &p->k, batch) + kv_head * p->k.head;
    const char *v = p->v.data + batch_offset(p, &p->v, batch) + kv_head * p->v.head;
    if (p->group_size == 1) {
        const idx first = first_row(p, task, lanes);
        const char *q = p->q.data + batch_offset(p, &p->q, batch) + kv_head * p->q.head;
        const char *out = p->out.data + batch_offset(p, &p->out, batch) + kv_head * p->out.head;
        add_stream(t, out + first * p->out.row, p->out.row, rows, p->head_dim_v, p->out.col);
        add_stream(t, q + first * p->q.row, p->q.row, rows, p->head_dim, p->q.col);
    }
    if (v != t->v)
        add_stream(t, v, p->v.row, keys, p->head_dim_v, p->v.col);
    if (k != t->k)
        add_stream(t, k, p->k.row, keys, p->head_dim, p->k.col);
}

/* The next block's keys and values, for a kernel that reads them only through copies. */
void mha_tile_look_to_next_block(mha_tile *t)
{
    const mha_problem *p = t->problem;
    const idx next = t->key0 + MHA_KEY_BLOCK, keys = min(p->seqlen_k - next, MHA_KEY_BLOCK);
    t->num_ahead = 0;
    add_stream(t, t->v + next * p->v.row, p->v.row, keys, p->head_dim_v, p->v.col);
    add_stream(t, t->k + next * p->k.row, p->k.row, keys, p->head_dim, p->k.col);
}
