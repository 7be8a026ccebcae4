/* The only interface between the three rooms: the problem, one tile of it, and the kernel table.
 *
 *   problem   what to compute: arrays with byte strides, sizes, the interval rule
 *   tile      LANES query rows of one (batch, KV head), and the state of their online softmax
 *   kernel    the functions that carry one tile through one block of keys, per ISA and dtype
 *
 * Rows of a tile are the (position, head of the group) pairs of one KV head, position-major:
 * row r is position r / group_size, head r % group_size of the group. So K and V are read once
 * for all heads that share them, and positions never decrease from lane to lane.
 */
#ifndef MHA_H
#define MHA_H

#include <stddef.h>
#include <stdint.h>
#if defined(_MSC_VER)
#include <intrin.h>
#endif

typedef ptrdiff_t idx;

enum {
    MHA_MAX_LANES = 64,
    MHA_MAX_VECTORS = 4,
    MHA_MAX_AXES = 64, /* NumPy's own limit */
    MHA_MAX_TERMS = 2,
    /* Bytes between neighbours of a row up to which its lines are worth asking for. */
    MHA_DENSE = 8,
    /* Keys per block, aligned to key 0. Part of the canonical arithmetic: changing it changes
     * bits. 64 lanes x 192 keys x 4 bytes = 48 KiB of scores, well inside L2. */
    MHA_KEY_BLOCK = 192,
    /* Blocks that merge among themselves before they meet those before them, for accuracy: what
     * rounds is the number of merges in a row, 16 + n / 16 for n blocks. Changing it changes bits.
     */
    MHA_RUN = 16,
};

#define MHA_OPEN PTRDIFF_MAX /* a window without an edge on that side */

/* Numbers in a row of Q or V, beyond which the bytes of a tile's workspace, less than 2^13 for each
 * of them, could overflow. Views of stride 0 can be that wide without the memory. */
#define MHA_MAX_DIM (PTRDIFF_MAX >> 14)

enum {
#define MHA_DTYPE(name, bytes, read, write) MHA_##name,
#include "dtype.def"
#undef MHA_DTYPE
    MHA_DTYPES
};

/* What a mask or bias does to a block of scores. */
enum { TERM_UNKNOWN, TERM_HIDES_ALL, TERM_ADDS_NOTHING, TERM_MIXED };

/* Strides are in bytes; an axis that is broadcast has stride 0. data is NULL when absent. */
typedef struct {
    char *data;
    int dtype;
    idx head, row, col;
    idx batch[MHA_MAX_AXES];
} mha_array;

/* With a `scores` array, scores go out too: as weights, where `sums` has what attention found out
 * about each row. Without `out`, nothing else does: as they are, plus `addend`. */
typedef struct {
    mha_array q, k, v, out, lse;
    mha_array scores, sums;            /* sums: max and 1 / sum of each row, in the compute dtype */
    const int64_t *rows_of, *heads_of; /* place in `scores` of a row, head; -1: not wanted */
    const void *addend;                /* [seqlen_k] in the compute dtype, or NULL */
    mha_array terms[MHA_MAX_TERMS];    /* mask and bias, both added to the scores */
    mha_array q_offset, kv_lengths;    /* int64, batch axes only */
    int num_terms, batch_axes;
    idx batch_shape[MHA_MAX_AXES];
    idx batch, kv_heads, group_size, seqlen_q, seqlen_k, head_dim, head_dim_v;
    idx window_left, window_right;
    double scale; /* of the scores in log2 units: includes log2(e) */
} mha_problem;

/* Of some lanes: keys [begin, end) are seen by one of them at least, [all_begin, all_end) by all.
 */
typedef struct {
    idx begin, end, all_begin, all_end;
} mha_reach;

/* Keys [begin, end) of the block at hand are seen by the vectors first .. last-1 of the tile. */
typedef struct {
    int begin, end, first, last;
} mha_segment;

/* Rows of K or V, where the kernel can read them; strides in elements of their dtype. */
typedef struct {
    const void *data;
    idx row, col;
    int dtype;
} mha_rows;

/* Rows of memory to ask for before they are needed. */
typedef struct {
    const char *row;
    idx stride, rows, bytes;
} mha_stream;

typedef struct {
    const mha_problem *problem;
    idx next_task;            /* that this thread will probably do next; -1: unknown */
    int rows, vectors, lanes; /* lanes: of the vectors in use */
    const char *k, *v;        /* of this batch row and KV head */
    idx head[MHA_MAX_LANES], query[MHA_MAX_LANES]; /* of each row */
    char *q_row[MHA_MAX_LANES];
    char *out_row[MHA_MAX_LANES];
    char *lse_row[MHA_MAX_LANES];
    char *scores_row[MHA_MAX_LANES], *sums_row[MHA_MAX_LANES];
    int writes_scores; /* of some row */
    char *term_row[MHA_MAX_TERMS][MHA_MAX_LANES];
    idx lo[MHA_MAX_LANES], hi[MHA_MAX_LANES]; /* keys that a lane may see: [lo, hi) */
    mha_reach reach[MHA_MAX_VECTORS];
    idx first_block, last_block;

    /* The block at hand; keys count from the start of the block. */
    idx key0;
    int begin[MHA_MAX_VECTORS], end[MHA_MAX_VECTORS];
    int num_segments, hidden; /* hidden: some lane may not see some key of its vector's range */
    mha_segment segment[2 * MHA_MAX_VECTORS];
    int num_mixed, mixed[MHA_MAX_TERMS]; /* terms that must be added */
    mha_rows k_block, v_block;

    int num_ahead, ahead_pace; /* streams of the next task, and rows of them to ask for at a time */
    mha_stream ahead[4];

    /* Workspace. Prefill has queries in the lanes, decode has rows of keys and head dims. */
    void *m, *l, *o;    /* the state: running row max (log2 units), row sum, weighted sum */
    size_t state_bytes; /* of the three together */
    void *total;        /* the state of the complete runs before, if has_total */
    int has_total;
    idx o_rows, o_stride, o_live; /* o is [o_rows][o_stride], the first o_live columns in use */
    void *m_block, *l_block;      /* max and sum of the block at hand */
    void *a, *b;                  /* factors of the state and of the block when they merge */
    void *q_panel;                /* Q times scale * log2(e), in the kernel's order */
    void *s;                      /* scores, then probabilities */
    void *o_block;                /* the weighted sum of the block, in pieces */
    void *k_copy, *v_copy; /* [MHA_KEY_BLOCK][head_dim(_v)] of blocks not readable in place */
    void *strip;           /* rows on their way through a transpose or a conversion */
} mha_tile;

typedef struct {
    int lanes;  /* rows of a full tile */
    int vector; /* numbers in a vector */
    size_t (*state_bytes)(const mha_problem *);
    mha_tile *(*begin)(const mha_problem *, idx task); /* NULL: out of memory */
    int (*scores_block)(mha_tile *, idx block);        /* 0: no key of it is visible */
    void (*softmax_block)(mha_tile *);
    void (*weighted_sum_block)(mha_tile *);
    void (*save)(mha_tile *, void *record); /* put the state aside and start a new one */
    void (*merge)(mha_tile *, const void *record);
    void (*finish)(mha_tile *);
    void (*write_scores)(mha_tile *); /* of the block at hand */
} mha_kernel;

typedef struct {
    const mha_kernel *prefill, *decode; /* tiles of many rows, and of decode->lanes at most */
    void (*exp2)(const void *x, void *y, idx n);    /* the exponential, for its tests */
    double (*fma_chain)(idx rounds, double *flops); /* FMA peak, for benchmarks */
    double (*read_all)(const void *x, idx n);       /* read bandwidth, for benchmarks */
} mha_kernels;

typedef struct {
    const char *name;
    const mha_kernels *f32, *f64;
} mha_isa;

/* *count before `step` was added, for threads that share it. */
static inline int64_t mha_fetch_add(int64_t *count, int64_t step)
{
#if defined(_MSC_VER) && !defined(__clang__)
    return _InterlockedExchangeAdd64(count, step);
#else
    return __atomic_fetch_add(count, step, __ATOMIC_ACQ_REL);
#endif
}

/* dispatch.c: the compiled-in ISAs, fastest first; NULL past the last. */
const mha_isa *mha_isa_at(int i);
int mha_isa_usable(int i);

/* tile.c: geometry, free of dtype and ISA. */
idx mha_tile_count(const mha_problem *problem, int lanes);
void mha_tile_begin(mha_tile *tile, const mha_problem *problem, idx task, int lanes, int vlen);
int mha_tile_rows(const mha_problem *problem, idx task, int lanes);
int mha_tile_block(mha_tile *tile, idx block);
int mha_tile_trim(mha_tile *tile, int begin, int end);
void mha_tile_look_ahead(mha_tile *tile, int lanes);
void mha_tile_look_to_next_block(mha_tile *tile);

/* workspace.c: one grow-only buffer per thread, 64-byte aligned, freed when the thread ends. */
void *mha_workspace(size_t bytes);

#endif
