/* Dropout: which weights are kept is a pure function of the seed and of where a weight stands, so
 * no tile, thread or instruction set can change it, and nothing has to be stored for a gradient.
 *
 * Threefry-4x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011), of the key (seed, 0, 0) and the counter (key / 8, row, head, batch): four words, whose
 * halves belong to 8 keys in turn, the low half first. A weight is dropped where its half is below
 * the threshold. */
enum { FN(PER_DRAW) = 8, FN(DRAWS) = MHA_KEY_BLOCK / 8 };

static ALWAYS_INLINE uint32_t FN(turned)(uint32_t x, int by) { return x << by | x >> (32 - by); }

/* The words of the counter x; one straight run, so that loops around it are vectorised. */
static ALWAYS_INLINE void FN(threefry)(uint32_t x[4], const uint32_t key[4])
{
    static const int turn[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5},
                                   {6, 20},  {17, 11}, {25, 10}, {18, 20}};
    const uint32_t k[5] = {key[0], key[1], key[2], key[3],
                           0x1bd11bdau ^ key[0] ^ key[1] ^ key[2] ^ key[3]};
    EACH (i, 4)
        x[i] += k[i];
    EACH (n, 5) {
        EACH (r, 4) {
            const int *by = turn[(4 * n + r) % 8], b = r % 2 ? 3 : 1, d = r % 2 ? 1 : 3;
            x[0] += x[b];
            x[b] = FN(turned)(x[b], by[0]) ^ x[0];
            x[2] += x[d];
            x[d] = FN(turned)(x[d], by[1]) ^ x[2];
        }
        EACH (i, 4)
            x[i] += k[(n + 1 + i) % 5];
        x[3] += (uint32_t)n + 1;
    }
}

/* Draw for `draws` eights of keys from key `first` of the block on, for `rows` rows from `lane` on:
 * half[key % 8][draw * rows + row], as numbers that compare with the threshold. */
static void FN(draw)(const mha_tile *t, int lane, int rows, int first, int draws,
                     REAL (*half)[FN(DRAWS) * VLEN])
{
    const mha_weighing *w = &t->problem->weighing;
    const uint32_t key[4] = {w->seed[0], w->seed[1], 0, 0}, batch = (uint32_t)t->place.batch;
    const uint32_t count = (uint32_t)((t->block.first_key + first) / FN(PER_DRAW));
    uint32_t counter[3][FN(DRAWS) * VLEN];
    for (int n = 0; n < draws; n++)
        for (int i = 0; i < rows; i++) {
            counter[0][n * rows + i] = count + (uint32_t)n;
            counter[1][n * rows + i] = (uint32_t)t->row.query[lane + i];
            counter[2][n * rows + i] = (uint32_t)t->row.head[lane + i];
        }
    for (int i = 0; i < draws * rows; i++) {
        uint32_t x[4] = {counter[0][i], counter[1][i], counter[2][i], batch};
        FN(threefry)(x, key);
        EACH (n, 4) {
            half[2 * n][i] = (REAL)(int32_t)(x[n] & 0xffff);
            half[2 * n + 1][i] = (REAL)(int32_t)(x[n] >> 16);
        }
    }
}
