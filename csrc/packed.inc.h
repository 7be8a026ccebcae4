/* A linear layer whose weight was packed: outputs in the lanes, rows of x as broadcast numbers.
 * Each output is one FMA chain over the width from 0 (rule 7), as of a weight that was not. */

/* Vectors of a register tile: they share a panel out among passes. */
enum { FN(PANEL_NV) = MHA_PANEL / VLEN % NV ? 3 : NV, FN(PASS) = FN(PANEL_NV) * VLEN };

_Static_assert(MHA_PANEL % FN(PASS) == 0, "whole passes make a panel");

/* Some rows times one pass of a panel, carrying on chains that are in c unless they begin. */
static ALWAYS_INLINE void FN(packed_rows)(const FN(product) * p, idx rows, int begins, int dtype)
{
    const int ending = begins ? FN(STORE) : FN(ADD), tile = ROWS(FN(PANEL_NV));
    idx row = 0;
    for (; row + tile <= rows; row += tile)
        FN(product_tile)(p, row, tile, FN(PANEL_NV), ending, dtype);
    for (; row + 4 <= rows; row += 4)
        FN(product_tile)(p, row, 4, FN(PANEL_NV), ending, dtype);
    for (; row + 2 <= rows; row += 2)
        FN(product_tile)(p, row, 2, FN(PANEL_NV), ending, dtype);
    if (row < rows)
        FN(product_tile)(p, row, 1, FN(PANEL_NV), ending, dtype);
}

/* c[rows][MHA_PANEL] = x times a panel. Of more rows than one register tile the width goes in
 * parts, whose share of the panel stays in the cache. */
static void FN(times_panel)(const mha_linear *call, const mha_rows *x, const char *panel, REAL *c,
                            idx rows)
{
    const idx size = FN(size_of)(call->dtype), part = rows > 8 ? MHA_PANEL_DEPTH : call->width;
    for (idx d = 0; d < call->width; d += part)
        for (idx col = 0; col < MHA_PANEL; col += FN(PASS)) {
            const FN(product) p = {.a = (const REAL *)x->data + d * x->col,
                                   .a_row = x->row,
                                   .a_depth = x->col,
                                   .b = panel + (d * MHA_PANEL + col) * size,
                                   .b_depth = MHA_PANEL,
                                   .depth = call->width - d < part ? call->width - d : part,
                                   .c = c + col,
                                   .c_row = MHA_PANEL};
            BY_DTYPE(call->dtype, FN(packed_rows), &p, rows, d == 0);
        }
}

/* One row of c, plus the bias, to its place in `out`. */
static void FN(finish_outputs)(const mha_linear *call, const REAL *c, char *to, idx first)
{
    const idx left = call->outputs - first, outputs = left < MHA_PANEL ? left : MHA_PANEL;
    const REAL *bias = call->bias ? (const REAL *)call->bias + first : NULL;
    REAL strip[MHA_PANEL], *row = call->out.dtype == DTYPE ? (REAL *)to : strip;
    for (idx i = 0; i < outputs; i += VLEN) {
        const int n = outputs - i < VLEN ? (int)(outputs - i) : VLEN;
        vec y = v_load(c + i);
        if (bias)
            y = v_add(y, FN(load_some)(bias + i, n));
        FN(store_some)(row + i, y, n);
    }
    if (row == strip)
        FN(write_row)(to, strip, call->out.col_bytes, outputs, call->out.dtype);
}

/* MHA_PANEL_ROWS rows of x times one panel; panels of the same rows follow each other. 0: no
 * memory.
 */
static int FN(linear)(const mha_linear *call, idx task)
{
    const idx panels = (call->outputs + MHA_PANEL - 1) / MHA_PANEL, panel = task % panels;
    const idx first = task / panels * MHA_PANEL_ROWS, left = call->rows - first;
    const idx rows = left < MHA_PANEL_ROWS ? left : MHA_PANEL_ROWS;
    const idx size = FN(size_of)(call->dtype);
    const mha_array *x = &call->x;
    const char *from = x->data + first * x->row_bytes;
    const int direct = FN(in_place)(from, x->row_bytes, x->col_bytes, x->dtype);
    REAL *c =
        mha_workspace(sizeof(REAL) * (size_t)(rows * (MHA_PANEL + (direct ? 0 : call->width))));
    if (!c)
        return 0;
    REAL *copy = c + rows * MHA_PANEL;
    for (idx i = 0; i < rows && !direct; i++)
        FN(read_row)(copy + i * call->width, from + i * x->row_bytes, x->col_bytes, call->width,
                     x->dtype);
    const mha_rows in_rows = direct ? (mha_rows){from, x->row_bytes / (idx)sizeof(REAL),
                                                 x->col_bytes / (idx)sizeof(REAL), DTYPE}
                                    : (mha_rows){copy, call->width, 1, DTYPE};
    if (call->width == 0)
        memset(c, 0, sizeof(REAL) * (size_t)(rows * MHA_PANEL));
    FN(times_panel)(call, &in_rows, call->panels + panel * call->width * MHA_PANEL * size, c, rows);
    for (idx i = 0; i < rows; i++)
        FN(finish_outputs)(call, c + i * MHA_PANEL,
                           call->out.data + (first + i) * call->out.row_bytes +
                               panel * MHA_PANEL * call->out.col_bytes,
                           panel * MHA_PANEL);
    return 1;
}
