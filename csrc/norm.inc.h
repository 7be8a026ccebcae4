/* Layer norm and RMS norm of rows, and the way back of the first. Sums over a row are those of
 * FN(dot), so that no vector width enters; rows are of the compute dtype, dense. */

/* out = (x - mean) / spread * weight + bias; mean, which RMS norm takes for 0, and 1 / spread are
 * kept for the way back. */
static void FN(norm_row)(const mha_norm *p, idx row)
{
    const REAL *x = (const REAL *)p->x + row * p->width, *weight = p->weight, *bias = p->bias;
    REAL *out = (REAL *)p->out + row * p->width, *stats = (REAL *)p->stats + row * 2;
    if (p->residual) {
        const REAL *residual = (const REAL *)p->residual + row * p->width;
        REAL *summed = (REAL *)p->summed + row * p->width;
        for (idx c = 0; c < p->width; c++)
            summed[c] = x[c] + residual[c];
        x = summed;
    }
    const REAL mean = p->centred ? (REAL)(FN(sum)(x, p->width) / (double)p->width) : 0;
    for (idx c = 0; c < p->width; c++)
        out[c] = x[c] - mean;
    const double variance = FN(dot)(out, out, p->width) / (double)p->width;
    const REAL inverse = (REAL)(1 / sqrt(variance + p->eps));
    for (idx c = 0; c < p->width; c++)
        out[c] = out[c] * inverse * weight[c];
    for (idx c = 0; bias && c < p->width; c++)
        out[c] += bias[c];
    stats[0] = mean;
    stats[1] = inverse;
}

/* dx = (g - mean(g) - n mean(g n)) / spread, of n = (x - mean) / spread and g = dout weight. */
static void FN(pull_norm_row)(const mha_norm *p, idx row, REAL *normed, REAL *sums)
{
    const REAL *x = (const REAL *)p->x + row * p->width, *weight = p->weight;
    const REAL *d = (const REAL *)p->d_out + row * p->width, *stats = (REAL *)p->stats + row * 2;
    REAL *dx = (REAL *)p->d_x + row * p->width;
    for (idx c = 0; c < p->width; c++) {
        normed[c] = (x[c] - stats[0]) * stats[1];
        dx[c] = d[c] * weight[c];
    }
    const REAL mean = (REAL)(FN(sum)(dx, p->width) / (double)p->width);
    const REAL shared = (REAL)(FN(dot)(dx, normed, p->width) / (double)p->width);
    for (idx c = 0; c < p->width; c++) {
        dx[c] = (dx[c] - mean - normed[c] * shared) * stats[1];
        sums[c] += d[c] * normed[c];
        sums[p->width + c] += d[c];
    }
}

/* MHA_NORM_ROWS rows, one way or the other. 0: no memory. */
static int FN(norm)(const mha_norm *p, idx task)
{
    const idx first = task * MHA_NORM_ROWS, left = p->rows - first;
    const idx last = first + (left < MHA_NORM_ROWS ? left : MHA_NORM_ROWS);
    REAL *sums = p->sums ? (REAL *)p->sums + task * 2 * p->width : NULL;
    REAL *normed = p->d_out ? mha_workspace(sizeof(REAL) * (size_t)p->width) : NULL;
    if (p->d_out && !normed)
        return 0;
    for (idx row = first; row < last; row++)
        if (p->d_out)
            FN(pull_norm_row)(p, row, normed, sums);
        else
            FN(norm_row)(p, row);
    return 1;
}
