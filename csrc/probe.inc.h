/* What the machine can do, measured with the same vocabulary, and the exponential by itself. */

static void FN(exp2_array)(const void *x, void *y, idx n)
{
    for (idx i = 0; i < n; i += VLEN) {
        const int live = n - i < VLEN ? (int)(n - i) : VLEN;
        if (live == VLEN)
            v_store((REAL *)y + i, FN(exp2_vec)(v_load((const REAL *)x + i)));
        else
            v_store_n((REAL *)y + i, FN(exp2_vec)(v_load_n((const REAL *)x + i, live)), live);
    }
}

static void FN(tanh_array)(const void *z, void *y, idx n)
{
    for (idx i = 0; i < n; i += VLEN) {
        const int live = n - i < VLEN ? (int)(n - i) : VLEN;
        v_store_n((REAL *)y + i, FN(tanh_vec)(v_load_n((const REAL *)z + i, live)), live);
    }
}

static void FN(threefry_words)(uint32_t words[4], const uint32_t key[4])
{
    FN(threefry)(words, key);
}

/* Independent chains of FMA, as many as hide its latency; the result keeps them alive. */
static double FN(fma_chain)(idx rounds, double *flops)
{
    enum { CHAINS = 12 };
    vec acc[CHAINS];
    REAL out[VLEN];
    const vec x = v_set1((REAL)0.999), y = v_set1((REAL)0.001);
    EACH (i, CHAINS)
        acc[i] = v_set1((REAL)i);
    for (idx n = 0; n < rounds; n++)
        EACH (i, CHAINS)
            acc[i] = v_fma(acc[i], x, y);
    for (int i = 1; i < CHAINS; i++)
        acc[0] = v_add(acc[0], acc[i]);
    v_store(out, acc[0]);
    *flops = 2.0 * CHAINS * VLEN * (double)rounds;
    return out[0];
}

static double FN(read_all)(const void *x, idx n)
{
    enum { STEP = 8 };
    vec sum[STEP];
    REAL out[VLEN];
    for (int i = 0; i < STEP; i++)
        sum[i] = v_set1(0);
    for (idx j = 0; j + STEP * VLEN <= n; j += STEP * VLEN)
        EACH (i, STEP)
            sum[i] = v_add(sum[i], v_load((const REAL *)x + j + i * VLEN));
    for (int i = 1; i < STEP; i++)
        sum[0] = v_add(sum[0], sum[i]);
    v_store(out, sum[0]);
    return out[0];
}
