/* The state of a tile's online softmax: m, l and o, one piece of memory, so that partial results
 * of a part of the keys can be kept aside and merged later, in key order. */
typedef struct {
    REAL m[LANES], l[LANES], o[];
} FN(state);

/* Sizes in elements of the buffers that the two layouts shape differently. */
typedef struct {
    idx q_panel, s, o;
} FN(shape);

static size_t FN(whole_lines)(size_t bytes)
{
    enum { LINE = 64 };
    return (bytes + LINE - 1) / LINE * LINE;
}

static size_t FN(state_bytes)(FN(shape) shape)
{
    return FN(whole_lines)(sizeof(FN(state)) + sizeof(REAL) * (size_t)shape.o);
}

static const char *FN(row_at)(const mha_tile *t, const mha_array *a, int lane)
{
    return a->data + mha_batch_offset(&t->problem->n, a, t->place.batch) +
           t->row.head[lane] * a->head_bytes + t->row.query[lane] * a->row_bytes;
}

/* Nothing seen yet: the neutral element of merging. Of o, [o_rows][stride], the live columns. */
static void FN(reset)(mha_tile *t)
{
    const mha_state *state = &t->state;
    const vec zero = v_set1(0);
    for (int i = 0; i < LANES; i += VLEN) {
        v_store((REAL *)state->m + i, v_set1(-LARGEST));
        v_store((REAL *)state->l + i, zero);
    }
    for (idx row = 0; row < state->o_rows; row++)
        for (idx col = 0; col < state->o_live; col += VLEN)
            v_store((REAL *)state->o + row * state->o_stride + col, zero);
}

/* Rows of a partial result, as a state. Rows of o are o_row apart, its columns o_col. */
static void FN(take)(mha_tile *t, const mha_partial *from, FN(state) * state, idx o_row, idx o_col)
{
    for (int i = 0; i < t->place.rows; i++) {
        const REAL *sums = (const REAL *)FN(row_at)(t, &from->sums, i);
        const REAL *o = (const REAL *)FN(row_at)(t, &from->o, i);
        state->m[i] = sums[0];
        state->l[i] = sums[1];
        for (idx d = 0; d < t->problem->n.head_dim_v; d++)
            state->o[i * o_row + d * o_col] = o[d];
    }
}

/* The state that a tile begins with. */
static void FN(begin_state)(mha_tile *t, idx o_row, idx o_col)
{
    const mha_job *job = t->job;
    FN(reset)(t);
    if (job->total.o.data) {
        memcpy(t->state.total, t->state.m, t->state.bytes); /* for lanes past the last row */
        FN(take)(t, &job->total, t->state.total, o_row, o_col);
        t->state.has_total = 1;
    }
    if (job->run.o.data)
        FN(take)(t, &job->run, t->state.m, o_row, o_col);
}

static void FN(save)(mha_tile *t, void *record)
{
    memcpy(record, t->state.m, t->state.bytes);
    FN(reset)(t);
}

/* A buffer of a tile: the offset of its pointer in mha_tile, and of the buffer itself behind it. */
typedef struct {
    size_t pointer, at;
} FN(buffer);

enum { FN(BUFFERS) = 12 };

/* The one table of a tile's buffers. Returns the bytes of all, tile included. */
static size_t FN(lay_out)(const mha_problem *p, FN(shape) shape, FN(buffer) table[FN(BUFFERS)])
{
    const idx dim = p->n.head_dim, dim_v = p->n.head_dim_v, wide = dim > dim_v ? dim : dim_v;
    const idx terms = MHA_MAX_TERMS * MHA_KEY_BLOCK;
    const idx state = (idx)(FN(state_bytes)(shape) / sizeof(REAL));
    const struct {
        size_t pointer;
        idx elements;
    } buffers[FN(BUFFERS)] = {
        {offsetof(mha_tile, state.m), state},
        {offsetof(mha_tile, state.total), state},
        {offsetof(mha_tile, block.m), LANES},
        {offsetof(mha_tile, block.l), LANES},
        {offsetof(mha_tile, block.o), shape.o},
        {offsetof(mha_tile, block.s), shape.s},
        {offsetof(mha_tile, block.k_copy), MHA_KEY_BLOCK * dim},
        {offsetof(mha_tile, block.v_copy), MHA_KEY_BLOCK * dim_v},
        {offsetof(mha_tile, a), LANES},
        {offsetof(mha_tile, b), LANES},
        {offsetof(mha_tile, q_panel), shape.q_panel},
        {offsetof(mha_tile, strip), VLEN * (wide > terms ? wide : terms)},
    };
    size_t at = FN(whole_lines)(sizeof(mha_tile));
    for (int i = 0; i < FN(BUFFERS); i++) {
        table[i] = (FN(buffer)){buffers[i].pointer, at};
        at += FN(whole_lines)(sizeof(REAL) * (size_t)buffers[i].elements);
    }
    return at;
}

/* Take the tile and its buffers from this thread's workspace. */
static mha_tile *FN(open_tile)(const mha_job *job, idx task, FN(shape) shape)
{
    FN(buffer) table[FN(BUFFERS)];
    mha_tile *t = mha_workspace(FN(lay_out)(job->problem, shape, table));
    if (!t)
        return NULL;
    for (int i = 0; i < FN(BUFFERS); i++)
        *(void **)((char *)t + table[i].pointer) = (char *)t + table[i].at;
    FN(state) *state = t->state.m;
    t->state.l = state->l;
    t->state.o = state->o;
    t->state.bytes = FN(state_bytes)(shape);
    mha_tile_begin(t, job, task, LANES, VLEN);
    return t;
}

/* Rule 4 of the canonical arithmetic for m and l; leaves the factors of o in a and b. */
static void FN(merge_sums)(mha_tile *t, const REAL *m_block, const REAL *l_block, int vectors)
{
    REAL *m = t->state.m, *l = t->state.l;
    for (int i = 0; i < vectors * VLEN; i += VLEN) {
        const vec m_old = v_load(m + i), m_add = v_load(m_block + i), m_new = v_max(m_old, m_add);
        const vec a = FN(exp2_vec)(v_sub(m_old, m_new)), b = FN(exp2_vec)(v_sub(m_add, m_new));
        v_store((REAL *)t->a + i, a);
        v_store((REAL *)t->b + i, b);
        v_store(m + i, m_new);
        v_store(l + i, v_fma(v_load(l + i), a, v_mul(v_load(l_block + i), b)));
    }
}

/* A sink merges like a block of one key that has no value. */
static void FN(merge_sinks)(mha_tile *t)
{
    REAL *m = t->block.m, *l = t->block.l;
    for (int i = 0; i < t->lanes; i++) {
        const idx at = t->row.head[i] * t->problem->weighing.sinks.head_bytes;
        m[i] = *(const REAL *)(t->place.sinks + at) * (REAL)LOG2_E;
        l[i] = 1;
    }
    FN(merge_sums)(t, m, l, t->vectors);
}

/* The sums as they are, and o too. */
static void FN(finish_raw)(mha_tile *t, REAL *factor)
{
    for (int i = 0; i < t->place.rows; i++) {
        REAL *sums = (REAL *)t->row.sums[i];
        sums[0] = ((const REAL *)t->state.m)[i];
        sums[1] = ((const REAL *)t->state.l)[i];
        factor[i] = 1;
    }
}

/* What o is multiplied by for out, 0 where the row saw nothing; writes the lse and the sums where
 * wanted. */
static void FN(finish_sums)(mha_tile *t, REAL *factor)
{
    const double drawn = 1 << 16, kept = drawn - t->problem->weighing.threshold;
    const int sinks = t->place.sinks != NULL, drops = kept < drawn;
    const REAL *m = t->state.m, *l = t->state.l;
    if (t->job->raw) {
        FN(finish_raw)(t, factor);
        return;
    }
    if (sinks)
        FN(merge_sinks)(t);
    for (int i = 0; i < t->place.rows; i++) {
        factor[i] = l[i] == 0 ? 0 : 1 / l[i];
        if (t->row.sums[i]) {
            REAL *sums = (REAL *)t->row.sums[i];
            sums[0] = m[i];
            sums[1] = factor[i];
            sums[2] = (REAL)log2((double)factor[i]);
        }
        if (sinks)
            factor[i] *= ((const REAL *)t->a)[i];
        if (drops)
            factor[i] *= (REAL)(drawn / kept);
        if (t->row.lse[i]) {
            const REAL lse = (REAL)(m[i] / LOG2_E + log((double)l[i]));
            FN(write_row)(t->row.lse[i], &lse, 0, 1, DTYPE);
        }
    }
}

/* Are the block's rows, of `dim` numbers side by side, finite? 0 * x is NaN where x is not. */
static int FN(rows_finite)(const mha_tile *t, const mha_rows *rows, idx dim)
{
    const idx size = FN(size_of)(rows->dtype);
    const vec zero = v_set1(0);
    vec taint[2] = {zero, zero};
    for (int j = t->block.first; j < t->block.last; j++) {
        const char *row = (const char *)rows->data + j * rows->row * size;
        idx d = 0;
        for (; d + 2 * VLEN <= dim; d += 2 * VLEN)
            EACH (i, 2)
                taint[i] =
                    v_fma(FN(load_as)(row + (d + i * VLEN) * size, rows->dtype), zero, taint[i]);
        for (; d < dim; d += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            taint[0] = v_fma(FN(load_up_to)(row + d * size, n, rows->dtype), zero, taint[0]);
        }
    }
    return !FN(any_nonzero)(v_add(taint[0], taint[1]));
}

/* Ask for a few rows of the next task: called between register tiles, so that the memory works
 * while the arithmetic does. */
static void FN(fetch_ahead)(mha_tile *t)
{
    for (int n = 0; t->ahead.num > 0 && n < t->ahead.pace; n++) {
        mha_stream *s = &t->ahead.stream[t->ahead.num - 1];
        for (idx at = 0; at < s->bytes; at += 64)
            PREFETCH(s->row + at);
        s->row += s->stride_bytes;
        if (--s->rows == 0)
            t->ahead.num--;
    }
}
