/* The state of a tile's online softmax: m, l and o, one piece of memory, so that partial results
 * of a part of the keys can be kept aside and merged later, in key order. */

/* Sizes in elements of the buffers that the two kernels shape differently. */
typedef struct {
    idx q_panel, s, o, o_block;
} FN(shape);

static size_t FN(lines)(idx elements)
{
    enum { LINE = 64 };
    return ((size_t)elements * sizeof(REAL) + LINE - 1) / LINE * LINE;
}

static size_t FN(state_bytes)(const FN(shape) * shape)
{
    return 2 * FN(lines)(LANES) + FN(lines)(shape->o);
}

/* Nothing seen yet: the neutral element of merging. Of o, [o_rows][stride], the live columns. */
static void FN(reset)(mha_tile *t)
{
    const vec zero = v_set1(0);
    for (int i = 0; i < LANES; i += VLEN) {
        v_store((REAL *)t->m + i, v_set1(-LARGEST));
        v_store((REAL *)t->l + i, zero);
    }
    for (idx row = 0; row < t->o_rows; row++)
        for (idx col = 0; col < t->o_live; col += VLEN)
            v_store((REAL *)t->o + row * t->o_stride + col, zero);
}

static void FN(save)(mha_tile *t, void *record)
{
    memcpy(record, t->m, t->state_bytes);
    FN(reset)(t);
}

/* Take the tile and its buffers from this thread's workspace. */
static mha_tile *FN(open_tile)(const mha_problem *p, idx task, const FN(shape) * shape)
{
    const idx wide = p->head_dim > p->head_dim_v ? p->head_dim : p->head_dim_v;
    const idx terms = MHA_MAX_TERMS * MHA_KEY_BLOCK, strip = VLEN * (wide > terms ? wide : terms);
    const idx sizes[] = {
        LANES,
        LANES,
        shape->o,
        LANES,
        LANES,
        LANES,
        LANES,
        shape->q_panel,
        shape->s,
        shape->o_block,
        MHA_KEY_BLOCK * p->head_dim,
        MHA_KEY_BLOCK * p->head_dim_v,
        strip,
        (idx)(FN(state_bytes)(shape) / sizeof(REAL)),
    };
    enum { BUFFERS = sizeof sizes / sizeof *sizes };
    const size_t header = FN(lines)((sizeof(mha_tile) + sizeof(REAL) - 1) / sizeof(REAL));
    size_t bytes = header;
    for (int i = 0; i < BUFFERS; i++)
        bytes += FN(lines)(sizes[i]);
    char *memory = mha_workspace(bytes);
    if (!memory)
        return NULL;
    mha_tile *t = (mha_tile *)memory;
    void **const buffers[BUFFERS] = {
        &t->m,       &t->l, &t->o,       &t->m_block, &t->l_block, &t->a,     &t->b,
        &t->q_panel, &t->s, &t->o_block, &t->k_copy,  &t->v_copy,  &t->strip, &t->total,
    };
    memory += header;
    for (int i = 0; i < BUFFERS; i++) {
        *buffers[i] = memory;
        memory += FN(lines)(sizes[i]);
    }
    t->state_bytes = FN(state_bytes)(shape);
    t->has_total = 0;
    mha_tile_begin(t, p, task, LANES, VLEN);
    return t;
}

/* Rule 4 of the canonical arithmetic for m and l; leaves the factors of o in a and b. */
static void FN(merge_sums)(mha_tile *t, const REAL *m_block, const REAL *l_block, int vectors)
{
    REAL *m = t->m, *l = t->l;
    for (int i = 0; i < vectors * VLEN; i += VLEN) {
        const vec m_old = v_load(m + i), m_add = v_load(m_block + i), m_new = v_max(m_old, m_add);
        const vec a = FN(exp2_vec)(v_sub(m_old, m_new)), b = FN(exp2_vec)(v_sub(m_add, m_new));
        v_store((REAL *)t->a + i, a);
        v_store((REAL *)t->b + i, b);
        v_store(m + i, m_new);
        v_store(l + i, v_fma(v_load(l + i), a, v_mul(v_load(l_block + i), b)));
    }
}

/* 1 / l of each lane, 0 where the row saw nothing; writes the lse and the sums where wanted. */
static void FN(finish_sums)(const mha_tile *t, REAL *inverse)
{
    const REAL *m = t->m, *l = t->l;
    for (int i = 0; i < t->rows; i++) {
        inverse[i] = l[i] == 0 ? 0 : 1 / l[i];
        if (t->sums_row[i]) {
            REAL *sums = (REAL *)t->sums_row[i];
            sums[0] = m[i];
            sums[1] = inverse[i];
        }
        if (t->lse_row[i]) {
            const REAL lse = (REAL)(m[i] / LOG2_E + log((double)l[i]));
            FN(write_row)(t->lse_row[i], &lse, 0, 1, DTYPE);
        }
    }
}

/* Are the visible values of the block finite? 0 * x is NaN where x is not. */
static int FN(values_finite)(const mha_tile *t)
{
    const int begin = t->segment[0].begin, end = t->segment[t->num_segments - 1].end;
    const mha_rows *v = &t->v_block;
    const idx dim = t->problem->head_dim_v, size = FN(size_of)(v->dtype);
    const vec zero = v_set1(0);
    vec taint[2] = {zero, zero};
    for (int j = begin; j < end; j++) {
        const char *row = (const char *)v->data + j * v->row * size;
        idx d = 0;
        for (; d + 2 * VLEN <= dim; d += 2 * VLEN)
            EACH (i, 2)
                taint[i] =
                    v_fma(FN(load_as)(row + (d + i * VLEN) * size, v->dtype), zero, taint[i]);
        for (; d < dim; d += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            taint[0] = v_fma(FN(load_up_to)(row + d * size, n, v->dtype), zero, taint[0]);
        }
    }
    return !FN(any_nonzero)(v_add(taint[0], taint[1]));
}

/* Ask for a few rows of the next task: called between register tiles, so that the memory works
 * while the arithmetic does. */
static void FN(fetch_ahead)(mha_tile *t)
{
    for (int n = 0; t->num_ahead > 0 && n < t->ahead_pace; n++) {
        mha_stream *s = &t->ahead[t->num_ahead - 1];
        for (idx at = 0; at < s->bytes; at += 64)
            PREFETCH(s->row + at);
        s->row += s->stride;
        if (--s->rows == 0)
            t->num_ahead--;
    }
}
