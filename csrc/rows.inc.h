/* Rows between storage and compute dtype, and between row-major and lane-major order. */

static void FN(read_row)(REAL *dst, const char *src, idx stride, idx n, int dtype)
{
    switch (dtype) {
#define MHA_DTYPE(name, bytes, read, write)                                                        \
    case MHA_##name:                                                                               \
        if (stride == (bytes))                                                                     \
            for (idx i = 0; i < n; i++)                                                            \
                dst[i] = (REAL)read(src + i * (bytes));                                            \
        else                                                                                       \
            for (idx i = 0; i < n; i++)                                                            \
                dst[i] = (REAL)read(src + i * stride);                                             \
        break;
#include "dtype.def"
#undef MHA_DTYPE
    }
    /* A float64 mask on float32 scores: what is finite must stay finite, or it would hide keys. */
    if (dtype == MHA_F64 && sizeof(REAL) < sizeof(double))
        for (idx i = 0; i < n; i++)
            if (isinf(dst[i]) && !isinf(mha_from_f64(src + i * stride)))
                dst[i] = dst[i] < 0 ? -LARGEST : LARGEST;
}

static void FN(write_row)(char *dst, const REAL *src, idx stride, idx n, int dtype)
{
    switch (dtype) {
#define MHA_DTYPE(name, bytes, read, write)                                                        \
    case MHA_##name: {                                                                             \
        void (*put)(char *, double) = write;                                                       \
        for (idx i = 0; put && i < n; i++)                                                         \
            put(dst + i * stride, src[i]);                                                         \
        break;                                                                                     \
    }
#include "dtype.def"
#undef MHA_DTYPE
    }
}

/* Can the kernel read this array where it lies? */
static int FN(in_place)(const char *data, idx row, idx col, int dtype)
{
    const idx size = sizeof(REAL);
    return dtype == DTYPE && (uintptr_t)data % size == 0 && row % size == 0 && col % size == 0;
}

/* Rows [begin, end) of a block as REAL: the block itself where it can be read in place with unit
 * stride along the columns (or with any, if `any_col`), else a copy. Strides are in elements. */
static const void *FN(block_rows)(const mha_array *a, const char *block, const mha_tile *t,
                                  idx cols, void *copy, idx *row, idx *col, int any_col)
{
    const idx size = sizeof(REAL);
    if (FN(in_place)(block, a->row, a->col, a->dtype) && (any_col || a->col == size)) {
        *row = a->row / size;
        *col = a->col / size;
        return block;
    }
    int begin = t->segment[0].begin, end = t->segment[t->num_segments - 1].end;
    for (int j = begin; j < end; j++)
        FN(read_row)((REAL *)copy + j * cols, block + j * a->row, a->col, cols, a->dtype);
    *row = cols;
    *col = 1;
    return copy;
}

/* Q into the lanes: panel[head_dim][LANES] = Q^T * factor, zero in lanes past the last row. */
static void FN(pack_q)(mha_tile *t, REAL factor)
{
    const mha_array *q = &t->problem->q;
    const idx dim = t->problem->head_dim;
    REAL *panel = t->q_panel, *strip = t->strip;
    const vec scale = v_set1(factor);

    for (int g = 0; g < t->vectors; g++) {
        const REAL *row[VLEN];
        const int live = t->rows - g * VLEN < VLEN ? t->rows - g * VLEN : VLEN;
        for (int i = 0; i < live; i++) {
            const char *src = t->q_row[g * VLEN + i];
            row[i] = (const REAL *)src;
            if (!FN(in_place)(src, 0, q->col, q->dtype) || q->col != sizeof(REAL)) {
                row[i] = strip + i * dim;
                FN(read_row)(strip + i * dim, src, q->col, dim, q->dtype);
            }
        }
        for (idx d = 0; d < dim; d += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            vec v[VLEN];
            for (int i = 0; i < live; i++)
                v[i] = n == VLEN ? v_load(row[i] + d) : v_load_n(row[i] + d, n);
            for (int i = live; i < VLEN; i++)
                v[i] = v_set1(0);
            v_transpose(v);
            for (int c = 0; c < n; c++)
                v_store(panel + (d + c) * LANES + g * VLEN, v_mul(v[c], scale));
        }
    }
}

/* O out of the lanes: out rows = O^T * (1 / l). Adding +0 turns -0 into +0, so that adding the
 * zeros of hidden keys, which tile shape decides, cannot show in the sign of a zero. */
static void FN(unpack_o)(mha_tile *t, const REAL *inverse)
{
    const mha_array *out = &t->problem->out;
    const idx dim = t->problem->head_dim_v;
    const REAL *o = t->o;
    REAL *strip = t->strip;

    for (int g = 0; g < t->vectors; g++) {
        const vec scale = v_load(inverse + g * VLEN);
        const int live = t->rows - g * VLEN < VLEN ? t->rows - g * VLEN : VLEN;
        const int direct = FN(in_place)(t->out_row[g * VLEN], out->row, out->col, out->dtype) &&
                           out->head % (idx)sizeof(REAL) == 0 && out->col == sizeof(REAL);
        for (idx d = 0; d < dim; d += VLEN) {
            const int n = dim - d < VLEN ? (int)(dim - d) : VLEN;
            vec v[VLEN];
            for (int c = 0; c < n; c++)
                v[c] = v_fma(v_load(o + (d + c) * LANES + g * VLEN), scale, v_set1(0));
            for (int c = n; c < VLEN; c++)
                v[c] = v_set1(0);
            v_transpose(v);
            for (int i = 0; i < live; i++) {
                REAL *row = direct ? (REAL *)t->out_row[g * VLEN + i] : strip + i * dim;
                if (n == VLEN)
                    v_store(row + d, v[i]);
                else
                    v_store_n(row + d, v[i], n);
            }
        }
        for (int i = 0; i < live && !direct; i++)
            FN(write_row)(t->out_row[g * VLEN + i], strip + i * dim, out->col, dim, out->dtype);
    }
}
