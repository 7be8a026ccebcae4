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
        if (put && stride == (bytes))                                                              \
            for (idx i = 0; i < n; i++)                                                            \
                put(dst + i * (bytes), src[i]);                                                    \
        else                                                                                       \
            for (idx i = 0; put && i < n; i++)                                                     \
                put(dst + i * stride, src[i]);                                                     \
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

/* A vector of numbers stored in the compute dtype or in 16 bits. */
static ALWAYS_INLINE vec FN(load_as)(const char *p, int dtype)
{
    return dtype == MHA_F16    ? v_load_f16(p)
           : dtype == MHA_BF16 ? v_load_bf16(p)
                               : v_load((const REAL *)p);
}

static ALWAYS_INLINE vec FN(load_n_as)(const char *p, int n, int dtype)
{
    char copy[VLEN * sizeof(REAL)] = {0};
    if (dtype == DTYPE)
        return v_load_n((const REAL *)p, n);
    memcpy(copy, p, 2 * (size_t)n);
    return FN(load_as)(copy, dtype);
}

static ALWAYS_INLINE vec FN(load_up_to)(const char *p, int n, int dtype)
{
    return n == VLEN ? FN(load_as)(p, dtype) : FN(load_n_as)(p, n, dtype);
}

static ALWAYS_INLINE idx FN(size_of)(int dtype) { return dtype == DTYPE ? sizeof(REAL) : 2; }

/* n is a constant where it is VLEN: what is masked takes longer. */
static ALWAYS_INLINE vec FN(load_some)(const REAL *p, int n)
{
    return n == VLEN ? v_load(p) : v_load_n(p, n);
}

static ALWAYS_INLINE void FN(store_some)(REAL *p, vec x, int n)
{
    if (n == VLEN)
        v_store(p, x);
    else
        v_store_n(p, x, n);
}

/* One piece of at most VLEN keys by VLEN dims; both constants where they are VLEN. */
static ALWAYS_INLINE void FN(copy_piece)(REAL *copy, idx cols, const char *src, idx stride,
                                         int keys, int dims, int dtype)
{
    vec v[VLEN];
    EACH (i, VLEN) {
        v[i] = FN(load_up_to)(src + (i < dims ? i : 0) * stride, keys, dtype);
        PREFETCH(src + (i < dims ? i : 0) * stride + MHA_KEY_BLOCK * FN(size_of)(dtype));
    }
    v_transpose(v);
    EACH (i, VLEN)
        if (i < keys)
            FN(store_some)(copy + i * cols, v[i], dims);
}

/* Rows whose columns lie side by side, as in a view of a transposed array: by vectors of keys,
 * transposed on the way. Rows of memory are long; asks for them one block ahead. */
static void FN(copy_columns)(REAL *copy, const char *block, const mha_array *a, idx cols, int begin,
                             int end)
{
    const idx size = FN(size_of)(a->dtype);
    for (idx d = 0; d < cols; d += VLEN)
        for (int j = begin; j < end; j += VLEN) {
            const int keys = end - j < VLEN ? end - j : VLEN;
            const int dims = cols - d < VLEN ? (int)(cols - d) : VLEN;
            const char *src = block + d * a->col_bytes + j * size;
            REAL *to = copy + j * cols + d;
            if (keys == VLEN && dims == VLEN && a->dtype == DTYPE)
                FN(copy_piece)(to, cols, src, a->col_bytes, VLEN, VLEN, DTYPE);
            else
                FN(copy_piece)(to, cols, src, a->col_bytes, keys, dims, a->dtype);
        }
}

/* What a reader of K or V can do beside taking vectors of the compute dtype along rows: take single
 * numbers, so that any strides are fine; take vectors along columns; widen 16-bit floats. */
enum { FN(TAKES_NUMBERS) = 1, FN(TAKES_COLUMNS) = 2, FN(WIDENS) = 4 };

/* The block's rows, of `cols` columns, of an array: in place where the reader can read them, else a
 * copy of those that are visible. */
static mha_rows FN(block_rows)(const mha_tile *t, const mha_array *a, const char *head, idx cols,
                               void *copy, int reader)
{
    const char *block = head + t->block.first_key * a->row_bytes;
    const int half = a->dtype == MHA_F16 || a->dtype == MHA_BF16;
    const idx size = half ? 2 : sizeof(REAL);
    const int numbers = half ? reader & FN(WIDENS) && a->row_bytes % 2 == 0
                             : FN(in_place)(block, a->row_bytes, a->col_bytes, a->dtype);
    const int columns = !half && reader & FN(TAKES_COLUMNS) && a->row_bytes == size;
    if (numbers && (a->col_bytes == size || columns || reader & FN(TAKES_NUMBERS)))
        return (mha_rows){block, a->row_bytes / size, a->col_bytes / size, a->dtype};
    const int begin = t->block.first, end = t->block.last;
    const mha_rows rows = {copy, cols, 1, DTYPE};
    if (a->row_bytes == size && a->dtype != MHA_BOOL && (half || a->dtype == DTYPE)) {
        FN(copy_columns)(copy, block, a, cols, begin, end);
        return rows;
    }
    for (int j = begin; j < end; j++) {
        const char *ahead = block + (j + 32) * a->row_bytes;
        for (idx at = 0; a->col_bytes <= MHA_DENSE && at < cols * a->col_bytes; at += 64)
            PREFETCH(ahead + at);
        FN(read_row)((REAL *)copy + j * cols, block + j * a->row_bytes, a->col_bytes, cols,
                     a->dtype);
    }
    return rows;
}

/* VLEN rows of `n` numbers from column d on, transposed into VLEN rows of `lanes` (times `scale`,
 * unless NULL). Columns past n become zeros; n is a constant VLEN but for the last. */
static ALWAYS_INLINE void FN(into_lanes)(const REAL *const *row, idx d, int n, const vec *scale,
                                         REAL *lanes, idx stride)
{
    vec v[VLEN];
    EACH (i, VLEN)
        v[i] = FN(load_some)(row[i] + d, n);
    v_transpose(v);
    EACH (c, VLEN)
        v_store(lanes + c * stride, scale ? v_mul(v[c], *scale) : v[c]);
}

/* All `cols` columns of VLEN rows into lanes[cols][stride]. */
static ALWAYS_INLINE void FN(rows_into_lanes)(const REAL *const *row, idx cols, const vec *scale,
                                              REAL *lanes, idx stride)
{
    idx d = 0;
    for (; d + VLEN <= cols; d += VLEN)
        FN(into_lanes)(row, d, VLEN, scale, lanes + d * stride, stride);
    if (d < cols)
        FN(into_lanes)(row, d, (int)(cols - d), scale, lanes + d * stride, stride);
}

/* The way back: the first `live` rows get n numbers from column d on. Adding +0 turns -0 into +0,
 * so that adding the zeros of hidden keys, which tile shape decides, cannot show in the sign. */
static ALWAYS_INLINE void FN(from_lanes)(const REAL *lanes, vec scale, REAL *const *row, idx d,
                                         int n, int live)
{
    vec v[VLEN];
    EACH (c, VLEN)
        v[c] = v_fma(v_load(lanes + c * LANES), scale, v_set1(0));
    v_transpose(v);
    EACH (i, VLEN)
        if (i < live)
            FN(store_some)(row[i] + d, v[i], n);
}
