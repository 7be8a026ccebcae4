/* The only interface between the three rooms: question, answers, one tile, and the kernel table.
 *
 *   problem   the question: arrays, who sees whom, how a product becomes a score
 *   job       what one call computes of it
 *   tile      LANES query rows of one (batch, KV head), and the state of their online softmax
 *   kernel    the functions that carry one tile through one block of keys, per ISA and dtype
 *
 * Rows of a tile are the (position, head of the group) pairs of one KV head, position-major:
 * row r is position r / group_size, head r % group_size of the group. So K and V are read once
 * for all heads that share them, and positions never decrease from lane to lane.
 *
 * One tile meets one block of keys; here three vectors of two lanes, and a causal edge:
 *
 *              keys of the block
 *     lane 0   x x x . . . . . . .   span of a row: the keys it sees, x
 *          1   x x x x . . . . . .   reach of vector 0: keys 0 to 3
 *          2   x x x x x . . . . .
 *          3   x x x x x x . . . .   reach of vector 1: keys 0 to 5
 *          4   x x x x x x x . . .
 *          5   x x x x x x x x . .   reach of vector 2: keys 0 to 7
 *              |-----| |-| |-|       segments of the block: of vectors 0 to 2, 1 to 2, and 2
 *
 * Register tiles are computed by segments; what a row does not see of its vector's reach is hidden
 * afterwards. Names of strides end in _bytes where they count bytes; the others count elements.
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
    /* Blocks of keys, and rows, whose gradients are one chain. Changing them changes bits. The keys
     * and values of a share and their gradients stay in L2; longer chains round more, and whole
     * tiles make a group of chains. */
    MHA_SHARE = 2,
    MHA_ROW_CHAIN = 96,
    MHA_ROW_GROUP = 192,
    /* Rows per task of a rotation: their angles stay in the cache for all heads. */
    MHA_ROTARY_ROWS = 64,
    /* Rows per task of a norm, whose gradients of the weight are one chain: changing it changes
     * bits. */
    MHA_NORM_ROWS = 64,
    /* Outputs in a panel of a packed weight, for any instruction set: 3 vectors of AVX-512, 6 of
     * AVX2. Rows of a task, which stay in the cache while panels pass, and numbers of the width
     * that many rows take of a panel at a time: 98 KB. */
    MHA_PANEL = 48,
    MHA_PANEL_ROWS = 128,
    MHA_PANEL_DEPTH = 512,
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

/* An axis that is broadcast has stride 0. data is NULL when absent. The caller owns what
 * batch_bytes and batch_shape point to. */
typedef struct {
    char *data;
    int dtype;
    idx head_bytes, row_bytes, col_bytes;
    const idx *batch_bytes; /* [batch_axes] */
} mha_array;

typedef struct {
    int batch_axes;
    const idx *batch_shape;
    idx batch, kv_heads, group_size, seqlen_q, seqlen_k, head_dim, head_dim_v;
} mha_sizes;

/* Who sees whom. Query row i stands at position i + q_offset and sees the keys from position - left
 * to position + right of the first kv_lengths. Absent: the last query is at the last key; all keys.
 */
typedef struct {
    mha_array q_offset, kv_lengths; /* int64, batch axes only */
    idx left, right;
} mha_spans;

/* How a product becomes a score, in this order. Scores are exponents of 2, so scale, softcap and
 * slopes include log2(e). */
typedef struct {
    double scale;                   /* of q; with a softcap, in half units of it: see tanh_vec */
    double softcap;                 /* 0: none */
    mha_array slopes;               /* (heads), in the compute dtype: ALiBi */
    mha_array terms[MHA_MAX_TERMS]; /* mask and bias, both added */
    int num_terms;
} mha_scoring;

/* What happens once scores are known. */
typedef struct {
    mha_array sinks; /* (heads), in the compute dtype: logits of the denominator, without a value */
    uint32_t threshold; /* of 2^16 weights that are dropped; 0: none */
    uint32_t seed[2];
} mha_weighing;

/* The question, shared by every kind of answer. */
typedef struct {
    mha_sizes n;
    mha_array q, k, v;
    mha_spans spans;
    mha_scoring scoring;
    mha_weighing weighing;
} mha_problem;

/* sums: m, 1 / l and log2(1 / l) of each row, in the compute dtype, from which a second pass has
 * the weights and their logarithms. */
typedef struct {
    mha_array out, lse, sums;
} mha_results;

/* The stage after which scores go out: as products, plus the addend; as scores, natural exponents;
 * or as weights, for which the sums must be known. */
enum { MHA_PRODUCTS, MHA_SCORES, MHA_WEIGHTS };

typedef struct {
    mha_array to;
    int stage;
    const int64_t *rows_of, *heads_of; /* place in `to` of a row, head; -1: not wanted; NULL: all */
    const void *addend;                /* [seqlen_k] in the compute dtype, or NULL */
} mha_scores_out;

/* Statistics of rows and keys, in dense arrays; rows are [batch][heads][seqlen_q]. */
typedef struct {
    void *rows;        /* [rows][2] so far: the greatest score, the entropy; both of base 2 */
    int64_t *received; /* [batch][heads][seqlen_k][2]: see measure.inc.h */
    int64_t *top_keys; /* [rows][top], the heaviest first */
    void *top_weights; /* [rows][top] */
    idx top;
} mha_measures;

/* Cotangents, and gradients: dense arrays in the compute dtype that begin with zeros. of_rows and
 * of_keys are sums of dS, or NULL; dS itself goes to mha_scores_out. */
typedef struct {
    mha_array d_out, d_lse;
    double scale;    /* that q and k are multiplied by */
    void *q;         /* [batch][heads][seqlen_q][head_dim] */
    void *k, *v;     /* [batch][kv_heads][seqlen_k][head_dim], [head_dim_v] */
    void *of_rows;   /* [batch][heads][seqlen_q][2]: plain, and times minus the distance */
    double *of_keys; /* [batch][heads][seqlen_k] */
} mha_gradients;

/* The state of rows before they are finished: o, and m and l in `sums`, in the compute dtype, rows
 * of o dense. */
typedef struct {
    mha_array o, sums;
} mha_partial;

/* What one call computes; an answer that is not wanted has no data. */
typedef struct {
    const mha_problem *problem;
    mha_partial total, run; /* of keys before these: the runs before, and one run more */
    int raw;                /* results are a mha_partial: o in `out`, m and l in `sums` */
    mha_results results;
    mha_scores_out scores;
    mha_measures measures;
    mha_gradients gradients;
} mha_job;

/* Rotary embedding of x; rows of cos and sin belong to positions. */
typedef struct {
    mha_sizes n; /* kv_heads are all heads, seqlen_q the rows */
    mha_array x, out;
    mha_array cos, sin;  /* (a position's row, pairs), in the compute dtype, dense rows */
    mha_array positions; /* int64 (rows) */
    idx pairs;
    int interleaved; /* neighbours are pairs, else halves */
} mha_rotation;

/* Layer norm of dense rows in the compute dtype, or RMS norm, or with d_out the way back of the
 * first. */
typedef struct {
    idx rows, width;
    double eps;
    int centred;                   /* rows have their mean taken off */
    const void *x, *weight, *bias; /* bias may be NULL */
    const void *residual;          /* to be added to x before, or NULL */
    void *summed;                  /* then what this gives */
    void *out, *stats;             /* [rows][width]; [rows][2]: mean, 1 / spread */
    const void *d_out;             /* [rows][width] */
    void *d_x, *sums;              /* [rows][width]; [tasks][2][width], of d_weight and d_bias */
} mha_norm;

/* A linear layer with a packed weight: panels of MHA_PANEL outputs, [width][MHA_PANEL] each, the
 * last one filled up with zeros. */
typedef struct {
    idx rows, width, outputs;
    mha_array x, out; /* (rows, width), (rows, outputs) */
    const char *panels;
    int dtype;        /* of the panels: the compute dtype, or 16 bits */
    const void *bias; /* in the compute dtype, or NULL */
} mha_linear;

/* Where a task's tile is: its rows, the keys that exist, the position of query 0, K and V. */
typedef struct {
    idx batch, kv_head, first_row;
    int rows;
    idx length, offset;
    const char *k, *v;          /* of this batch row and KV head */
    const char *slopes, *sinks; /* of this batch row, NULL: none */
} mha_place;

/* Of a vector: keys [begin, end) are seen by one of its rows at least, [all_begin, all_end) by all.
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
    idx stride_bytes, rows, bytes;
} mha_stream;

/* The online softmax of a tile: running row max (log2 units), row sum and weighted sum. The three
 * are one piece of memory, the state of state.inc.h, which can be saved, and merged later. */
typedef struct {
    void *m, *l, *o;
    size_t bytes; /* of the three together */
    void *total;  /* the state of the complete runs before, if has_total */
    int has_total;
    idx o_rows, o_stride, o_live; /* o is [o_rows][o_stride], the first o_live columns in use */
} mha_state;

typedef struct {
    const mha_job *job;
    const mha_problem *problem;
    mha_place place;
    idx next_task;      /* that this thread will probably do next; -1: unknown */
    int vectors, lanes; /* in use; lanes past the last row repeat it */
    int writes_scores;  /* of some row */
    idx first_block, last_block;
    mha_reach reach[MHA_MAX_VECTORS];

    struct {
        idx head[MHA_MAX_LANES], query[MHA_MAX_LANES];
        idx lo[MHA_MAX_LANES], hi[MHA_MAX_LANES]; /* its span */
        char *q[MHA_MAX_LANES], *out[MHA_MAX_LANES], *lse[MHA_MAX_LANES], *sums[MHA_MAX_LANES];
        char *scores[MHA_MAX_LANES]; /* NULL: not wanted */
        char *term[MHA_MAX_TERMS][MHA_MAX_LANES];
    } row; /* of each lane */

    struct {
        idx first_key;                                    /* all other keys count from this one */
        int begin[MHA_MAX_VECTORS], end[MHA_MAX_VECTORS]; /* each vector's reach in the block */
        int first, last;                                  /* of all of them: keys [first, last) */
        int hides; /* some row may not see some key of its vector's reach */
        int num_segments, num_mixed;
        mha_segment segment[2 * MHA_MAX_VECTORS];
        int mixed[MHA_MAX_TERMS]; /* terms that must be added */
        mha_rows k, v;
        void *s;               /* scores, then probabilities */
        void *products;        /* a copy of s before it was scored, or NULL */
        void *m, *l, *o;       /* its max, sum, and weighted sum, in pieces */
        void *k_copy, *v_copy; /* [MHA_KEY_BLOCK][head_dim(_v)] where not readable in place */
    } block;                   /* at hand */

    mha_state state;

    struct {
        int num, pace; /* streams, and rows of them to ask for at a time */
        mha_stream stream[4];
    } ahead; /* what comes next */

    void *a, *b;   /* factors of the state and of the block when they merge */
    void *q_panel; /* Q times the scale, in the layout's order */
    void *strip;   /* rows on their way through a transpose or a conversion */
} mha_tile;

typedef struct {
    int lanes;                                     /* rows of a full tile */
    int vector;                                    /* numbers in a vector */
    size_t (*tile_bytes)(const mha_problem *);     /* scratch memory of a thread */
    size_t (*state_bytes)(const mha_problem *);    /* of a record */
    mha_tile *(*begin)(const mha_job *, idx task); /* NULL: out of memory */
    int (*scores_block)(mha_tile *, idx block);    /* 0: no key of it is visible */
    void (*softmax_block)(mha_tile *);
    void (*weighted_sum_block)(mha_tile *);
    void (*save)(mha_tile *, void *record); /* put the state aside and start a new one */
    void (*merge)(mha_tile *, const void *record);
    void (*finish)(mha_tile *);
    void (*write_scores)(mha_tile *); /* of the block at hand, all its keys */
    void (*measure)(mha_tile *);      /* the same for statistics; NULL: only the other layout can */
} mha_kernel;

/* Gradients of one tile and one share of the keys at a time; scores come from queries_in_lanes. */
typedef struct {
    mha_tile *(*begin)(const mha_job *, idx task, idx share); /* NULL: out of memory */
    void (*block)(mha_tile *);                                /* after scores_block */
    void (*finish)(mha_tile *,
                   int first); /* dQ of the share, the first of its rows or a later one */
    void (*begin_group)(mha_tile *, idx share); /* of MHA_ROW_GROUP rows, at its first tile */
    void (*end_group)(mha_tile *, idx share, int first); /* dK and dV of the share, likewise */
} mha_pull;

/* What tests and benchmarks ask of an ISA. */
typedef struct {
    void (*exp2)(const void *x, void *y, idx n);    /* the exponential by itself */
    double (*fma_chain)(idx rounds, double *flops); /* FMA peak */
    double (*read_all)(const void *x, idx n);       /* read bandwidth */
    void (*tanh)(const void *z, void *y, idx n);    /* of z = 2 log2(e) x */
    void (*threefry)(uint32_t words[4], const uint32_t key[4]);
} mha_probe;

typedef struct {
    const mha_kernel *queries_in_lanes;
    const mha_kernel *keys_in_lanes; /* for tiles of at most its `lanes` rows */
    const mha_pull *pull;
    const mha_probe *probe;
    int (*rotate)(const mha_rotation *, idx task); /* 0: out of memory */
    int (*norm)(const mha_norm *, idx task);
    int (*linear)(const mha_linear *, idx task); /* likewise */
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
idx mha_batch_offset(const mha_sizes *n, const mha_array *a, idx batch);
idx mha_tile_count(const mha_problem *problem, int lanes);
mha_place mha_place_of(const mha_problem *problem, idx task, int lanes);
void mha_tile_begin(mha_tile *tile, const mha_job *job, idx task, int lanes, int vlen);
int mha_tile_block(mha_tile *tile, idx block);
int mha_tile_trim(mha_tile *tile, int begin, int end);
void mha_tile_look_ahead(mha_tile *tile, int lanes);
void mha_tile_look_to_next_block(mha_tile *tile);

/* workspace.c: one grow-only buffer per thread, 64-byte aligned, freed when the thread ends. */
void *mha_workspace(size_t bytes);

#endif
