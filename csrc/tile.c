/* Geometry of tiles and blocks: which rows, which keys. No arithmetic on elements here. */
#include "mha.h"

static idx min(idx a, idx b) { return a < b ? a : b; }

static idx max(idx a, idx b) { return a > b ? a : b; }

static idx clamp(idx x, idx low, idx high) { return min(max(x, low), high); }

/* Every structural mask is this interval: the keys [lo, hi) that the query at `position` sees. */
static void span(const mha_problem *p, idx position, idx length, idx *lo, idx *hi)
{
    *lo = p->spans.left == MHA_OPEN ? 0 : max(0, position - p->spans.left);
    *hi = p->spans.right == MHA_OPEN ? length : min(length, position + p->spans.right + 1);
    *lo = min(*lo, length);
    *hi = max(*hi, *lo);
}

static idx tiles_per_head(const mha_problem *p, int lanes)
{
    return (p->n.group_size * p->n.seqlen_q + lanes - 1) / lanes;
}

idx mha_tile_count(const mha_problem *p, int lanes)
{
    return p->n.batch * p->n.kv_heads * tiles_per_head(p, lanes);
}

/* Byte offset of batch entry `batch` in an array, by its broadcast strides. One batch axis, the
 * common case, takes no division. */
idx mha_batch_offset(const mha_sizes *n, const mha_array *a, idx batch)
{
    idx offset = 0;
    for (int axis = n->batch_axes - 1; axis > 0; axis--) {
        offset += batch % n->batch_shape[axis] * a->batch_bytes[axis];
        batch /= n->batch_shape[axis];
    }
    return n->batch_axes > 0 ? offset + batch * a->batch_bytes[0] : 0;
}

static const char *of_batch(const mha_sizes *n, const mha_array *a, idx batch)
{
    return a->data ? a->data + mha_batch_offset(n, a, batch) : NULL;
}

static idx integer_of(const mha_sizes *n, const mha_array *a, idx batch, idx otherwise)
{
    return a->data ? (idx) * (const int64_t *)(a->data + mha_batch_offset(n, a, batch)) : otherwise;
}

/* Task order: (batch, KV head) outside, so that neighbours in time share K and V in the cache;
 * inside, the last tile first, which sees the most keys when the mask is causal. */
mha_place mha_place_of(const mha_problem *p, idx task, int lanes)
{
    const mha_sizes *n = &p->n;
    const idx tiles = tiles_per_head(p, lanes), outer = task / tiles;
    mha_place at = {.batch = outer / n->kv_heads, .kv_head = outer % n->kv_heads};
    at.first_row = (tiles - 1 - task % tiles) * lanes;
    at.rows = (int)min(lanes, n->group_size * n->seqlen_q - at.first_row);
    at.length = clamp(integer_of(n, &p->spans.kv_lengths, at.batch, n->seqlen_k), 0, n->seqlen_k);
    at.offset = integer_of(n, &p->spans.q_offset, at.batch, at.length - n->seqlen_q);
    at.k = p->k.data + mha_batch_offset(n, &p->k, at.batch) + at.kv_head * p->k.head_bytes;
    at.v = p->v.data + mha_batch_offset(n, &p->v, at.batch) + at.kv_head * p->v.head_bytes;
    at.slopes = of_batch(n, &p->scoring.slopes, at.batch);
    at.sinks = of_batch(n, &p->weighing.sinks, at.batch);
    return at;
}

/* What lanes [first, last) see together, and what each of them sees. */
static mha_reach reach_of(const mha_tile *t, int first, int last)
{
    mha_reach r = {PTRDIFF_MAX, 0, 0, PTRDIFF_MAX};
    for (int lane = first; lane < last; lane++) {
        const idx lo = t->row.lo[lane], hi = t->row.hi[lane];
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
static void point_at_rows(const mha_tile *t, const mha_array *a, char **row)
{
    char *base = a->data ? a->data + mha_batch_offset(&t->problem->n, a, t->place.batch) : NULL;
    for (int lane = 0; lane < t->lanes; lane++)
        row[lane] =
            base ? base + t->row.head[lane] * a->head_bytes + t->row.query[lane] * a->row_bytes
                 : NULL;
}

/* The same for scores, where only some heads and rows may be wanted; whether any is. */
static int point_at_scores(mha_tile *t)
{
    const mha_scores_out *scores = &t->job->scores;
    const mha_array *to = &scores->to;
    char *base = to->data + mha_batch_offset(&t->problem->n, to, t->place.batch);
    int any = 0;
    for (int lane = 0; lane < t->lanes; lane++) {
        const idx h = t->row.head[lane], q = t->row.query[lane];
        const idx head = scores->heads_of ? scores->heads_of[h] : h;
        const idx row = scores->rows_of ? scores->rows_of[q] : q;
        const int wanted = lane < t->place.rows && head >= 0 && row >= 0;
        t->row.scores[lane] = wanted ? base + head * to->head_bytes + row * to->row_bytes : NULL;
        any |= wanted;
    }
    return any;
}

/* What the lanes may see by position, and the blocks that holds. */
static void reach_all(mha_tile *t, int vlen)
{
    idx begin = PTRDIFF_MAX, end = 0;
    for (int lane = 0; lane < t->lanes; lane++)
        span(t->problem, t->row.query[lane] + t->place.offset, t->place.length, &t->row.lo[lane],
             &t->row.hi[lane]);
    for (int g = 0; g < t->vectors; g++) {
        t->reach[g] = reach_of(t, g * vlen, (g + 1) * vlen);
        begin = min(begin, t->reach[g].begin);
        end = max(end, t->reach[g].end);
    }
    t->first_block = begin < end ? begin / MHA_KEY_BLOCK : 0;
    t->last_block = begin < end ? (end + MHA_KEY_BLOCK - 1) / MHA_KEY_BLOCK : 0;
}

void mha_tile_begin(mha_tile *t, const mha_job *job, idx task, int lanes, int vlen)
{
    const mha_problem *p = t->problem = job->problem;
    const mha_place *at = &t->place;
    t->job = job;
    t->place = mha_place_of(p, task, lanes);
    t->next_task = -1;
    t->ahead.num = 0;
    t->block.products = NULL;
    t->state.has_total = 0;
    t->vectors = (at->rows + vlen - 1) / vlen;
    t->lanes = t->vectors * vlen;

    idx query = at->first_row / p->n.group_size, in_group = at->first_row % p->n.group_size;
    for (int lane = 0; lane < t->lanes; lane++) {
        t->row.head[lane] = at->kv_head * p->n.group_size + in_group;
        t->row.query[lane] = query;
        /* Lanes past the last row repeat it, so they never make a block look partly hidden. */
        if (lane < at->rows - 1 && ++in_group == p->n.group_size) {
            in_group = 0;
            query++;
        }
    }
    point_at_rows(t, &p->q, t->row.q);
    point_at_rows(t, &job->results.out, t->row.out);
    point_at_rows(t, &job->results.lse, t->row.lse);
    point_at_rows(t, &job->results.sums, t->row.sums);
    for (int n = 0; n < p->scoring.num_terms; n++)
        point_at_rows(t, &p->scoring.terms[n], t->row.term[n]);
    reach_all(t, vlen);
    t->writes_scores = job->scores.to.data && point_at_scores(t);
}

/* Cut the keys of the block where the set of vectors that see them changes. The contract of all
 * that fills t->row.query: positions never decrease over lanes, so neither end of a span does, and
 * that set is a contiguous run of vectors. */
static void cut_segments(mha_tile *t)
{
    t->block.first = MHA_KEY_BLOCK;
    t->block.last = 0;
    for (int g = 0; g < t->vectors; g++)
        if (t->block.begin[g] < t->block.end[g]) {
            t->block.first = (int)min(t->block.first, t->block.begin[g]);
            t->block.last = (int)max(t->block.last, t->block.end[g]);
        }
    t->block.num_segments = 0;
    for (int position = t->block.first; position < t->block.last;) {
        mha_segment s = {position, t->block.last, t->vectors, 0};
        for (int g = 0; g < t->vectors; g++) {
            if (t->block.begin[g] > position && t->block.begin[g] < t->block.end[g])
                s.end = (int)min(s.end, t->block.begin[g]);
            if (t->block.end[g] > position && t->block.begin[g] <= position) {
                s.end = (int)min(s.end, t->block.end[g]);
                s.first = (int)min(s.first, g);
                s.last = g + 1;
            }
        }
        if (s.first < s.last)
            t->block.segment[t->block.num_segments++] = s;
        position = s.end;
    }
}

static int in_block(const mha_tile *t, idx key)
{
    return (int)clamp(key - t->block.first_key, 0, MHA_KEY_BLOCK);
}

/* Set the tile to key block `block`; 0 when no lane may see any key of it. */
int mha_tile_block(mha_tile *t, idx block)
{
    t->block.first_key = block * MHA_KEY_BLOCK;
    t->block.hides = 0;
    for (int g = 0; g < t->vectors; g++) {
        const mha_reach *r = &t->reach[g];
        t->block.begin[g] = in_block(t, r->begin);
        t->block.end[g] = (int)max(t->block.begin[g], in_block(t, r->end));
        t->block.hides |=
            t->block.begin[g] < t->block.end[g] && (in_block(t, r->all_begin) > t->block.begin[g] ||
                                                    in_block(t, r->all_end) < t->block.end[g]);
    }
    cut_segments(t);
    return t->block.num_segments > 0;
}

/* Leave out the block's keys outside [begin, end), which no row sees; 0 when none is left. */
int mha_tile_trim(mha_tile *t, int begin, int end)
{
    for (int g = 0; g < t->vectors; g++) {
        t->block.begin[g] = (int)max(t->block.begin[g], begin);
        t->block.end[g] = (int)max(t->block.begin[g], min(t->block.end[g], end));
    }
    cut_segments(t);
    return t->block.num_segments > 0;
}

/* Set out to fetch `rows` rows of `cols` columns of an array, from `row` on. */
static void add_stream(mha_tile *t, const mha_array *a, const char *row, idx rows, idx cols)
{
    const idx bytes = cols * a->col_bytes;
    if (rows > 0 && bytes > 0 && a->col_bytes <= MHA_DENSE)
        t->ahead.stream[t->ahead.num++] = (mha_stream){row, a->row_bytes, rows, bytes};
}

/* The same for the rows of a place, where each is a query of its own. */
static void add_rows_of(mha_tile *t, const mha_place *at, const mha_array *a, idx cols)
{
    const char *head =
        a->data + mha_batch_offset(&t->problem->n, a, at->batch) + at->kv_head * a->head_bytes;
    add_stream(t, a, head + at->first_row * a->row_bytes, at->rows, cols);
}

/* The next task's Q and out, and its first keys and values where they are another head's. No
 * hardware prefetcher can know them, and in short sequences they are much of the traffic. */
void mha_tile_look_ahead(mha_tile *t, int lanes)
{
    const mha_problem *p = t->problem;
    const mha_sizes *n = &p->n;
    t->ahead.num = 0;
    if (t->next_task < 0 || t->next_task >= mha_tile_count(p, lanes))
        return;
    const mha_place next = mha_place_of(p, t->next_task, lanes);
    const idx keys = min(n->seqlen_k, MHA_KEY_BLOCK);
    if (n->group_size == 1) {
        add_rows_of(t, &next, &t->job->results.out, n->head_dim_v);
        add_rows_of(t, &next, &p->q, n->head_dim);
    }
    if (next.v != t->place.v)
        add_stream(t, &p->v, next.v, keys, n->head_dim_v);
    if (next.k != t->place.k)
        add_stream(t, &p->k, next.k, keys, n->head_dim);
}

/* The next block's keys and values, for a kernel that reads them only through copies. */
void mha_tile_look_to_next_block(mha_tile *t)
{
    const mha_problem *p = t->problem;
    const idx next = t->block.first_key + MHA_KEY_BLOCK;
    const idx keys = min(p->n.seqlen_k - next, MHA_KEY_BLOCK);
    t->ahead.num = 0;
    add_stream(t, &p->v, t->place.v + next * p->v.row_bytes, keys, p->n.head_dim_v);
    add_stream(t, &p->k, t->place.k + next * p->k.row_bytes, keys, p->n.head_dim);
}
