/* Sums over a row whose order no vector width enters: doubles, in 8 chains of every eighth number
 * that pair up at the end. A compiler can put the chains into vectors. */

static double FN(sum)(const REAL *a, idx n)
{
    double chain[8] = {0};
    idx i = 0;
    for (; i + 8 <= n; i += 8)
        for (int c = 0; c < 8; c++)
            chain[c] += a[i + c];
    for (int c = 0; i + c < n; c++)
        chain[c] += a[i + c];
    return ((chain[0] + chain[4]) + (chain[2] + chain[6])) +
           ((chain[1] + chain[5]) + (chain[3] + chain[7]));
}

static double FN(dot)(const REAL *a, const REAL *b, idx n)
{
    double chain[8] = {0};
    idx i = 0;
    for (; i + 8 <= n; i += 8)
        for (int c = 0; c < 8; c++)
            chain[c] += (double)a[i + c] * b[i + c];
    for (int c = 0; i + c < n; c++)
        chain[c] += (double)a[i + c] * b[i + c];
    return ((chain[0] + chain[4]) + (chain[2] + chain[6])) +
           ((chain[1] + chain[5]) + (chain[3] + chain[7]));
}
