# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The algorithm, and the door between arrays and C.

`forward` refuses (returns NotImplemented) whatever it cannot prove safe and plain; it words no
error. attention.py then says what is wrong, or makes the arguments plain and calls again.
"""

import os

import numpy as np

cimport numpy as cnp
from cpython.pyport cimport PY_SSIZE_T_MAX
from cython.parallel cimport prange
from libc.math cimport isfinite, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cnp.import_array()

OPEN = MHA_OPEN
COMPILER = MHA_COMPILER.decode()


# ---- The algorithm: tasks, blocks of keys, and three steps per block -----------------------------

# Work is counted in floating-point operations; reading a byte of K or V from memory takes a
# thread about as long as two of them.
cdef double WORK_PER_BYTE = 2
# Work per thread below which waking it costs more than it gives. A region whose threads still
# wait from the call before starts within 1 us, 100,000 operations at 100 GFLOP/s: ten times that.
# Threads that sleep need some 50 us.
cdef double WORK_PER_HOT_THREAD = 1e6
cdef double WORK_PER_COLD_THREAD = 8e6
# Seconds since the last call within which nothing else can have needed the cores.
cdef double HOT = 30e-6
# Work between two looks at Ctrl-C: about 20 ms on one thread.
cdef double WORK_PER_SIGNAL_CHECK = 2e9
# Tasks per thread below which keys are split too, so that no thread waits long for the last.
cdef int TASKS_PER_THREAD = 4
# Partial results of split keys that are kept at a time.
cdef idx RECORD_BYTES_PER_THREAD = 1 << 21
cdef double LOG2_E = 1.4426950408889634


cdef struct call_state:
    const mha_problem *problem
    const mha_kernels *kernels
    idx tiles
    idx blocks              # of keys, per tile
    idx chunk               # blocks per task
    idx chunks              # tasks per tile; 1 unless keys are split
    idx signal_interval
    int threads
    int64_t out_of_memory   # how many threads were
    int64_t interrupted
    # Only where keys are split. Blocks go in waves, which bounds the memory of partial results.
    idx wave                # blocks per wave: whole runs, or all
    idx wave_begin          # first block of the wave at hand
    char *records           # [tiles][1 + wave][record_bytes]: the waves before, then each block
    size_t record_bytes
    int64_t *missing        # [tiles] chunks not yet done
    int64_t next_task


cdef bint attend(call_state *call, idx tile_index, idx chunk) noexcept nogil:
    """One tile of queries over the blocks of keys it can see, as in the paper. False: no memory."""
    cdef idx block, first = call.wave_begin + chunk * call.chunk
    cdef idx last = min(first + call.chunk, call.wave_begin + call.wave)
    cdef bint split = call.chunks > 1
    cdef const mha_kernel *kernel = kernel_of(call, tile_index)
    cdef mha_tile *tile = kernel.begin(call.problem, tile_index)    # Q * scale, packed
    if tile == NULL:
        return False
    if not split:
        tile.next_task = tile_index + call.threads         # the team takes tasks in turn
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
        write_scores(kernel, tile, tile.first_block, tile.last_block)   # exp(S - max) / sum
    return True


cdef bint multiply(call_state *call, idx tile_index, idx chunk) noexcept nogil:
    """One tile of rows times some blocks of outputs of a linear layer: scores that go out."""
    cdef idx first = chunk * call.chunk
    cdef const mha_kernel *kernel = kernel_of(call, tile_index)
    cdef mha_tile *tile = kernel.begin(call.problem, tile_index)
    if tile == NULL:
        return False
    write_scores(kernel, tile, first, min(first + call.chunk, tile.last_block))
    return True


cdef void write_scores(const mha_kernel *kernel, mha_tile *tile, idx first,
                       idx last) noexcept nogil:
    """Scores of these blocks once more, now that the sums are known, or for the only time."""
    cdef idx block
    for block in range(first, last if tile.writes_scores else first):
        if kernel.scores_block(tile, block):
            kernel.write_scores(tile)


cdef const mha_kernel *kernel_of(call_state *call, idx tile_index) noexcept nogil:
    """Two kernels with the same bits; one is faster for few rows."""
    cdef int rows = mha_tile_rows(call.problem, tile_index, call.kernels.prefill.lanes)
    return call.kernels.decode if rows <= call.kernels.decode.lanes else call.kernels.prefill


cdef bint merge_wave(call_state *call, const mha_kernel *kernel, mha_tile *tile,
                     idx tile_index) noexcept nogil:
    """The last chunk of a tile merges all of the wave, in key order. True: the tile is complete."""
    cdef idx block, end = call.wave_begin + call.wave
    if mha_fetch_add(&call.missing[tile_index], -1) > 1:
        return False
    if call.wave_begin > 0:
        kernel.merge(tile, record_of(call, tile_index, 0))
        keep_total(kernel, tile)
    for block in range(max(call.wave_begin, tile.first_block), min(end, tile.last_block)):
        kernel.merge(tile, record_of(call, tile_index, 1 + block - call.wave_begin))
        end_block(kernel, tile, block)
    if end < call.blocks:
        merge_total(kernel, tile)
        kernel.save(tile, record_of(call, tile_index, 0))
    return end >= call.blocks


cdef void end_block(const mha_kernel *kernel, mha_tile *tile, idx block) noexcept nogil:
    """After the last block of a run, the run takes in the total and is the new one."""
    if block % MHA_RUN == MHA_RUN - 1:
        merge_total(kernel, tile)
        keep_total(kernel, tile)


cdef void merge_total(const mha_kernel *kernel, mha_tile *tile) noexcept nogil:
    if tile.has_total:
        kernel.merge(tile, tile.total)


cdef void keep_total(const mha_kernel *kernel, mha_tile *tile) noexcept nogil:
    kernel.save(tile, tile.total)
    tile.has_total = True


cdef char *record_of(call_state *call, idx tile_index, idx slot) noexcept nogil:
    return call.records + (tile_index * (1 + call.wave) + slot) * call.record_bytes


cdef int pending_signal() noexcept with gil:
    return PyErr_CheckSignals()


cdef void work_off(call_state *call) noexcept nogil:
    """Tasks, one after another, until none is left: what each member of the team does."""
    cdef idx task
    cdef bint done
    while True:
        task = mha_fetch_add(&call.next_task, 1)
        if task >= call.tiles * call.chunks:
            return
        if call.problem.out.data == NULL:
            done = multiply(call, task // call.chunks, task % call.chunks)
        else:
            done = attend(call, task // call.chunks, task % call.chunks)
        if not done:
            stop(call, &call.out_of_memory)
        if omp_get_thread_num() == 0 and task % call.signal_interval == 0 and pending_signal():
            stop(call, &call.interrupted)


cdef void stop(call_state *call, int64_t *reason) noexcept nogil:
    """Leave no task to begin. Threads may stop at once, for different reasons."""
    mha_fetch_add(reason, 1)
    mha_fetch_add(&call.next_task, call.tiles * call.chunks)


cdef int split_keys(call_state *call, int threads) except -1:
    """Where tiles are too few for the threads, make tasks of runs of key blocks, whose partial
    results merge in key order: the arithmetic is the same, split or not."""
    cdef const mha_problem *p = call.problem
    cdef idx wanted = TASKS_PER_THREAD * threads, affordable
    cdef double bytes
    call.blocks = (p.seqlen_k + MHA_KEY_BLOCK - 1) // MHA_KEY_BLOCK
    call.wave = call.chunk = call.blocks
    call.chunks = 1
    if threads == 1 or call.tiles >= wanted or call.tiles % threads == 0 or call.blocks < 2:
        return 0
    if p.out.data == NULL:
        call.chunk = max(1, call.blocks * call.tiles // wanted)
        call.chunks = (call.blocks + call.chunk - 1) // call.chunk
        return 0
    call.record_bytes = max(call.kernels.prefill.state_bytes(p), call.kernels.decode.state_bytes(p))
    affordable = threads * RECORD_BYTES_PER_THREAD // (call.tiles * call.record_bytes)
    call.wave = (max(wanted // call.tiles, affordable) + MHA_RUN - 1) // MHA_RUN * MHA_RUN
    call.wave = min(call.blocks, call.wave)
    call.chunk = max(1, call.wave * call.tiles // wanted)
    call.chunks = (call.wave + call.chunk - 1) // call.chunk
    if call.chunks == 1:
        return 0
    bytes = <double>call.record_bytes * call.tiles * (1 + call.wave)
    if bytes < PY_SSIZE_T_MAX:
        call.records = <char *>malloc(<size_t>bytes)
    call.missing = <int64_t *>malloc(call.tiles * sizeof(int64_t))
    if call.records == NULL or call.missing == NULL:
        raise MemoryError("no memory for the partial results of split keys")
    return 0


cdef void run_wave(call_state *call, int threads, int team) noexcept nogil:
    cdef idx tile
    cdef int member
    call.next_task = 0
    for tile in range(call.tiles if call.missing != NULL else 0):
        call.missing[tile] = call.chunks
    if threads == 1:
        work_off(call)
        return
    for member in prange(team, schedule="static", chunksize=1, num_threads=team):
        if member < threads:
            work_off(call)


cdef double call_end = 0        # when the last call that was worth two threads ended


cdef int team_of(int threads, bint hot) noexcept nogil:
    """Members of the team. After a region GNU OpenMP's threads spin for 300,000 rounds, about 5 ms,
    on cores that NumPy's BLAS may want next; where there are more of them than CPUs, for 100
    rounds. So a call between other work takes one more, who does nothing."""
    return threads + (MHA_GNU_OPENMP and not hot and threads == omp_get_num_procs())


cdef int worth(double most, int threads) noexcept nogil:
    return 1 if forked or omp_in_parallel() else max(1, min(threads, <int>min(most, 1e6)))


cdef int64_t threads_claimed = 0    # by the large calls that run now


cdef int claim(int threads) noexcept nogil:
    """What the calls of other Python threads leave: two full teams on the same cores take longer
    than one after the other."""
    cdef int64_t others = mha_fetch_add(&threads_claimed, threads)
    cdef int free_cpus = <int>max(1, omp_get_num_procs() - others)
    cdef int given = threads if others == 0 else min(threads, free_cpus)
    mha_fetch_add(&threads_claimed, given - threads)
    return given


cdef void release(int threads) noexcept nogil:
    mha_fetch_add(&threads_claimed, -threads)


cdef int run(const mha_problem *p, const mha_kernels *kernels, int threads) except -1:
    """All tasks. Threads share nothing but the counter of tasks, so they cannot change a bit."""
    global call_end
    cdef call_state call
    cdef double keys = <double>p.batch * p.kv_heads * p.seqlen_k * (p.head_dim + p.head_dim_v)
    cdef double work = keys * (2.0 * p.group_size * p.seqlen_q + 4 * WORK_PER_BYTE), tasks
    if max(p.head_dim, p.head_dim_v) > MHA_MAX_DIM:
        raise MemoryError("no memory for a tile of rows that long")
    memset(&call, 0, sizeof(call))
    call.problem = p
    call.kernels = kernels
    call.tiles = mha_tile_count(p, kernels.prefill.lanes)
    cdef bint hot = omp_get_wtime() - call_end < HOT
    cdef bint large = work >= 2 * WORK_PER_HOT_THREAD
    threads = worth(work / (WORK_PER_HOT_THREAD if hot else WORK_PER_COLD_THREAD), threads)
    cdef int claimed = claim(threads) if large else 1
    threads = claimed
    try:
        split_keys(&call, threads)
        tasks = call.tiles * call.chunks
        call.threads = threads = <int>min(threads, tasks)
        call.signal_interval = <idx>(1 + WORK_PER_SIGNAL_CHECK * tasks / (work + 1))
        with nogil:
            while True:
                run_wave(&call, threads, team_of(threads, hot))
                call.wave_begin += call.wave
                if call.wave_begin >= call.blocks or call.out_of_memory or call.interrupted:
                    break
        if large:
            call_end = omp_get_wtime()
    finally:
        if large:
            release(claimed)
        free(call.records)
        free(call.missing)
    if call.interrupted or call.out_of_memory and PyErr_CheckSignals():
        return -1
    if call.out_of_memory:
        raise MemoryError("no memory for the scratch space of a thread")
    return 0


include "_arrays.pxi"
include "_calls.pxi"
include "_settings.pxi"
