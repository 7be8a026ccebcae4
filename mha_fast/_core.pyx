# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The algorithm: what is computed for a tile of query rows, block by block of keys.

Around it: _plan.pxi plans a call, _team.pxi shares its tasks out among threads; _question.pxi
makes a question of a call's arguments, _values.pxi and _arrays.pxi C of its values and arrays,
_state.pxi begins and ends between keys, _gradient.pxi goes back, _linear.pxi, _rotary.pxi and
_norm.pxi are what stands around attention; _onnxruntime.pxi serves its sessions; _settings.pxi is
what the process has chosen.
"""

import os
import sys

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.ref cimport Py_DECREF, Py_INCREF
from cython.parallel cimport prange
from libc.math cimport isfinite, sqrt
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

cnp.import_array()

COMPILER = MHA_COMPILER.decode()


# Each block of keys stands alone, for every row of a tile:
#     m' = max S,   P = exp(S - m'),   l' = sum P,   o' = P V
# and merges into the state (m, l, o) of the row, which begins with (-max, 0, 0):
#     M = max(m, m'),   a = exp(m - M),   b = exp(m' - M)
#     m = M,   l = l a + l' b,   o = o a + o' b
# By the same formula the total of all runs before merges into a run of MHA_RUN blocks once it is
# complete. In the end out = o / l and lse = m + log l.


cdef bint attend(call_state *call, idx tile_index, idx chunk) noexcept nogil:
    """One tile of queries over the blocks of keys it can see, as in the paper. False: no memory."""
    cdef idx block, first = call.wave_begin + chunk * call.plan.chunk
    cdef idx last = min(first + call.plan.chunk, call.wave_begin + call.plan.wave)
    cdef bint split = call.plan.chunks > 1
    cdef const mha_kernel *kernel = kernel_of(call, tile_index)
    cdef mha_tile *tile = kernel.begin(call.job, tile_index)    # Q * scale, packed
    if tile == NULL:
        return False
    if not split:
        tile.next_task = tile_index + call.plan.threads    # the team takes tasks in turn
    for block in range(max(first, tile.first_block), min(last, tile.last_block)):
        if kernel.scores_block(tile, block):               # S = Q K^T, masked
            kernel.softmax_block(tile)                     # P = exp(S - max), sums
            kernel.weighted_sum_block(tile)                # O = rescaled O + P V
        if split:
            kernel.save(tile, record_of(call, tile_index, 1 + block - call.wave_begin))
        else:
            end_block(kernel, tile, block)
    if not split or merge_wave(call, kernel, tile, tile_index):
        merge_total(kernel, tile)
        kernel.finish(tile)                                # O / sum, log-sum-exp
        revisit(kernel, tile, 0, call.plan.blocks)         # exp(S - max) / sum
        measure(kernel, tile)
    return True


cdef bint project(call_state *call, idx tile_index, idx chunk) noexcept nogil:
    """One tile of rows times some blocks of keys, or outputs of a linear layer: scores go out."""
    cdef idx first = chunk * call.plan.chunk
    cdef const mha_kernel *kernel = kernel_of(call, tile_index)
    cdef mha_tile *tile = kernel.begin(call.job, tile_index)
    if tile == NULL:
        return False
    revisit(kernel, tile, first, min(first + call.plan.chunk, call.plan.blocks))
    return True


cdef bint attend_part(call_state *call, idx tile_index, idx chunk) noexcept nogil:
    """One tile of one of the call's parts."""
    cdef idx middle, low = 0, high = call.num_parts
    while high - low > 1:               # parts[low].first_tile <= tile_index < parts[high]'s
        middle = (low + high) // 2
        if call.parts[middle].first_tile <= tile_index:
            low = middle
        else:
            high = middle
    return attend(&call.parts[low], tile_index - call.parts[low].first_tile, 0)


cdef void revisit(const mha_kernel *kernel, mha_tile *tile, idx first, idx last) noexcept nogil:
    """Scores of these blocks once more, now that the sums are known, or for the only time."""
    cdef idx block
    for block in range(first, last if tile.writes_scores else first):
        kernel.scores_block(tile, block)
        kernel.write_scores(tile)


cdef void measure(const mha_kernel *kernel, mha_tile *tile) noexcept nogil:
    """The same for statistics."""
    cdef idx block, first = tile.first_block
    for block in range(first, tile.last_block if tile.job.measures.rows != NULL else first):
        if kernel.scores_block(tile, block):
            kernel.measure(tile)


cdef const mha_kernel *kernel_of(call_state *call, idx tile_index) noexcept nogil:
    if call.job.measures.rows != NULL:
        return call.kernels.queries_in_lanes
    return layout_of(call.job.problem, call.kernels, tile_index)


cdef const mha_kernel *layout_of(const mha_problem *p, const mha_kernels *kernels,
                                 idx tile_index) noexcept nogil:
    """Two kernels with the same bits; one is faster for few rows."""
    cdef const mha_kernel *many = kernels.queries_in_lanes
    cdef const mha_kernel *few = kernels.keys_in_lanes
    return few if mha_place_of(p, tile_index, many.lanes).rows <= few.lanes else many


# ---- Runs of blocks, and waves of runs whose blocks are shared out ------------------------------


cdef void end_block(const mha_kernel *kernel, mha_tile *tile, idx block) noexcept nogil:
    """After the last block of a run, the run takes in the total and is the new one."""
    if block % MHA_RUN == MHA_RUN - 1:
        merge_total(kernel, tile)
        keep_total(kernel, tile)


cdef void merge_total(const mha_kernel *kernel, mha_tile *tile) noexcept nogil:
    if tile.state.has_total:
        kernel.merge(tile, tile.state.total)


cdef void keep_total(const mha_kernel *kernel, mha_tile *tile) noexcept nogil:
    kernel.save(tile, tile.state.total)
    tile.state.has_total = True


cdef bint merge_wave(call_state *call, const mha_kernel *kernel, mha_tile *tile,
                     idx tile_index) noexcept nogil:
    """The last chunk of a tile merges all of the wave, in key order. True: the tile is complete."""
    cdef idx block, end = call.wave_begin + call.plan.wave
    if mha_fetch_add(&call.missing[tile_index], -1) > 1:
        return False
    if call.wave_begin > 0:
        kernel.merge(tile, record_of(call, tile_index, 0))
        keep_total(kernel, tile)
    for block in range(max(call.wave_begin, tile.first_block), min(end, tile.last_block)):
        kernel.merge(tile, record_of(call, tile_index, 1 + block - call.wave_begin))
        end_block(kernel, tile, block)
    if end < call.plan.blocks:
        merge_total(kernel, tile)
        kernel.save(tile, record_of(call, tile_index, 0))
    return end >= call.plan.blocks


cdef char *record_of(call_state *call, idx tile_index, idx slot) noexcept nogil:
    return call.records + (tile_index * (1 + call.plan.wave) + slot) * call.plan.record_bytes


include "_settings.pxi"
include "_team.pxi"
include "_plan.pxi"
include "_arrays.pxi"
include "_values.pxi"
include "_question.pxi"
include "_state.pxi"
include "_gradient.pxi"
include "_linear.pxi"
include "_rotary.pxi"
include "_norm.pxi"
include "_onnxruntime.pxi"
