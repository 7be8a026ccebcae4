/* Rotary embedding: pairs of a row's first numbers turn by the angles of its position. Products and
 * their sums are rounded apart, as NumPy rounds them, so that any order of work has the same bits.
 */

/* Pairs i to i + n - 1: numbers i and pairs + i, or 2 i and 2 i + 1. y may be x. */
static ALWAYS_INLINE void FN(turn)(const REAL *x, REAL *y, const REAL *cos, const REAL *sin,
                                   idx pairs, int interleaved, int n)
{
    const vec c = FN(load_some)(cos, n), s = FN(load_some)(sin, n);
    REAL first[VLEN] = {0}, second[VLEN] = {0};
    for (int i = 0; i < n && interleaved; i++) {
        first[i] = x[2 * i];
        second[i] = x[2 * i + 1];
    }
    const vec a = interleaved ? v_load(first) : FN(load_some)(x, n);
    const vec b = interleaved ? v_load(second) : FN(load_some)(x + pairs, n);
    const vec p = v_sub(v_mul(a, c), v_mul(b, s)), q = v_add(v_mul(b, c), v_mul(a, s));
    v_store(first, p);
    v_store(second, q);
    for (int i = 0; i < n && interleaved; i++) {
        y[2 * i] = first[i];
        y[2 * i + 1] = second[i];
    }
    if (!interleaved) {
        FN(store_some)(y, p, n);
        FN(store_some)(y + pairs, q, n);
    }
}

static ALWAYS_INLINE void FN(turn_all)(const mha_rotation *r, const REAL *x, REAL *y,
                                       const REAL *cos, const REAL *sin, int interleaved)
{
    const idx step = interleaved ? 2 : 1;
    idx i = 0;
    for (; i + VLEN <= r->pairs; i += VLEN)
        FN(turn)(x + i * step, y + i * step, cos + i, sin + i, r->pairs, interleaved, VLEN);
    if (i < r->pairs)
        FN(turn)(x + i * step, y + i * step, cos + i, sin + i, r->pairs, interleaved,
                 (int)(r->pairs - i));
}

/* Where the rows of one batch entry are, and whether they can be read or written where they lie. */
typedef struct {
    char *data;
    int in_place;
} FN(rows_at);

static FN(rows_at) FN(rows_of)(const mha_rotation *r, const mha_array *a, idx batch)
{
    FN(rows_at) rows = {a->data + mha_batch_offset(&r->n, a, batch), a->col_bytes == sizeof(REAL)};
    rows.in_place &= FN(in_place)(rows.data, a->row_bytes, a->head_bytes, a->dtype);
    return rows;
}

static void FN(rotate_row)(const mha_rotation *r, const REAL *x, REAL *y, const REAL *cos,
                           const REAL *sin)
{
    const idx turned = 2 * r->pairs;
    if (r->interleaved)
        FN(turn_all)(r, x, y, cos, sin, 1);
    else
        FN(turn_all)(r, x, y, cos, sin, 0);
    if (y != x)
        memcpy(y + turned, x + turned, sizeof(REAL) * (size_t)(r->n.head_dim - turned));
}

/* Some rows of one batch entry, of all its heads. 0: no memory. */
static int FN(rotate)(const mha_rotation *r, idx task)
{
    const mha_sizes *n = &r->n;
    const idx blocks = (n->seqlen_q + MHA_ROTARY_ROWS - 1) / MHA_ROTARY_ROWS;
    const idx batch = task / blocks, first = task % blocks * MHA_ROTARY_ROWS;
    const idx left = n->seqlen_q - first, rows = left < MHA_ROTARY_ROWS ? left : MHA_ROTARY_ROWS;
    const FN(rows_at) x = FN(rows_of)(r, &r->x, batch), out = FN(rows_of)(r, &r->out, batch);
    const char *cos = r->cos.data + mha_batch_offset(n, &r->cos, batch);
    const char *sin = r->sin.data + mha_batch_offset(n, &r->sin, batch);
    const char *positions = r->positions.data + mha_batch_offset(n, &r->positions, batch);
    REAL *strip = mha_workspace(sizeof(REAL) * (size_t)n->head_dim);
    if (!strip)
        return 0;
    for (idx head = 0; head < n->kv_heads; head++)
        for (idx i = first; i < first + rows; i++) {
            const char *from = x.data + head * r->x.head_bytes + i * r->x.row_bytes;
            char *to = out.data + head * r->out.head_bytes + i * r->out.row_bytes;
            const idx at = (idx) * (const int64_t *)(positions + i * r->positions.row_bytes);
            if (!x.in_place)
                FN(read_row)(strip, from, r->x.col_bytes, n->head_dim, r->x.dtype);
            FN(rotate_row)(r, x.in_place ? (const REAL *)from : strip,
                           out.in_place ? (REAL *)to : strip,
                           (const REAL *)(cos + at * r->cos.row_bytes),
                           (const REAL *)(sin + at * r->sin.row_bytes));
            if (!out.in_place)
                FN(write_row)(to, strip, r->out.col_bytes, n->head_dim, r->out.dtype);
        }
    return 1;
}
