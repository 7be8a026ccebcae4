/* The one kernel text, compiled once per ISA and compute dtype. Two kernels with the same bits:
 * queries_in_lanes.inc.h, and for tiles of few rows keys_in_lanes.inc.h.
 *
 * Canonical arithmetic. These rules alone decide the bits of a row; tile shape, lane, thread,
 * ISA, memory layout and batch do not enter:
 *   1. q is multiplied by scale * log2(e), rounded; a product is one FMA chain over head_dim from
 * 0.
 *   2. A score s is the product, and then, where asked for: softcap * log2(e) * tanh(s / softcap),
 * for which q is multiplied by 2 * scale * log2(e) / softcap instead; fma(-slope * log2(e),
 * distance, s) of the positions; for each mask or bias term fma(term, log2(e), s), not below
 * -LARGEST. Hidden: s = -inf.
 *   3. Keys go in blocks of MHA_KEY_BLOCK, aligned to key 0. Each block stands alone: its max m',
 *      p = exp2(s - m') with one fixed polynomial, its sum l' and its weighted sum o', both chains
 *      from 0 in key order. A hidden key adds exact zeros, whether it is visited or not.
 *   4. Blocks merge in key order: with M = max(m, m'), a = exp2(m - M), b = exp2(m' - M),
 *      l = fma(l, a, l' * b) and o = fma(o, a, o' * b). After MHA_RUN blocks, counted from key 0,
 *      the total of the runs before merges into the run by the same formula: that is the new
 *      total, and a new run starts. A run that sees nothing changes nothing.
 *   5. A sink merges after all blocks like one of m' = sink * log2(e), l' = 1, o' = 0, but o's
 * factor a waits: out = fma(o, 1 / l * a, +0), or 0 where l is 0. A weight is exp2(s - m) * (1 /
 * l), 0 if hidden.
 *   6. With dropout, p of rule 3 becomes +0 where drop.inc.h says so, after the sum was taken, and
 *      o's factor is multiplied by 1 / (share that is kept).
 *   7. A linear layer's output is such a score, of scale 1, plus its bias.
 */
#include <float.h>

#include "dtype.h"

#define LANES (NV * VLEN)
#define IS_FLOAT (sizeof(REAL) == sizeof(float))
#define DTYPE (IS_FLOAT ? MHA_F32 : MHA_F64)
#define LARGEST ((REAL)(IS_FLOAT ? FLT_MAX : DBL_MAX))
#define LOG2_E 1.4426950408889634

#include "exp2.inc.h"
#include "rows.inc.h"
#include "terms.inc.h"
#include "score.inc.h"
#include "state.inc.h"
#include "product.inc.h"
#include "drop.inc.h"
#include "queries_in_lanes.inc.h"
#include "key_panels.inc.h"
#include "keys_in_lanes.inc.h"
#include "write.inc.h"
#include "measure.inc.h"
#include "sums.inc.h"
#include "gradient.inc.h"
#include "rotary.inc.h"
#include "norm.inc.h"
#include "packed.inc.h"
#include "probe.inc.h"

static const mha_kernel FN(queries_in_lanes) = {
    LANES,
    VLEN,
    FN(queries_tile_bytes),
    FN(queries_state_bytes),
    FN(queries_begin),
    FN(queries_scores),
    FN(queries_softmax),
    FN(queries_weighted_sum),
    FN(save),
    FN(queries_merge),
    FN(queries_finish),
    FN(queries_write_scores),
    FN(queries_measure),
};

static const mha_kernel FN(keys_in_lanes) = {
    (VLEN + 1) / 2, /* rows up to which keys in the lanes cost less, in cache as from DRAM */
    VLEN,
    FN(keys_tile_bytes),
    FN(keys_state_bytes),
    FN(keys_begin),
    FN(keys_scores),
    FN(keys_softmax),
    FN(keys_weighted_sum),
    FN(save),
    FN(keys_merge),
    FN(keys_finish),
    FN(keys_write_scores),
    NULL,
};

static const mha_probe FN(probe) = {
    FN(exp2_array), FN(fma_chain), FN(read_all), FN(tanh_array), FN(threefry_words),
};
static const mha_kernels FN(kernels) = {
    &FN(queries_in_lanes),
    &FN(keys_in_lanes),
    &FN(gradient),
    &FN(probe),
    FN(rotate),
    FN(norm),
    FN(linear),
};
