# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The algorithm, and the door between arrays and C.

`forward` refuses (returns NotImplemented) whatever it cannot prove safe and plain; it words no
error. attention.py then says what is wrong, or makes the arguments plain and calls again.
"""

import os

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange
from libc.math cimport isfinite, sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cnp.import_array()

OPEN = MHA_OPEN
COMPILER = MHA_COMPILER.decode()


# ---- The algorithm: tasks, blocks of keys, and three steps per block -----------------------------

cdef enum:
    OK
    OUT_OF_MEMORY
    INTERRUPTED

# Work is counted in floating-point operations; reading a byte of K or V from memory takes a
# thread about as long as two of them.
cdef double WORK_PER_BYTE = 2
# Work per thread below which waking it costs more than it gives: a region on two hot threads
# takes about 1 us, 100,000 operations at 100 GFLOP/s. Ten times that.
cdef double WORK_PER_THREAD = 1e6
# Work between two looks at Ctrl-C: about 20 ms on one thread.
cdef double WORK_PER_SIGNAL_CHECK = 2e9
# Tasks per thread below which keys are split too, so that no thread waits long for the last.
cdef int TASKS_PER_THREAD = 4


cdef struct call_state:
    const mha_problem *problem
    const mha_kernels *kernels
    idx tiles
    idx blocks              # of keys, per tile
    idx chunk               # blocks per task; equal to `blocks` unless keys are split
    idx chunks              # tasks per tile
    idx signal_interval
    int status
    # Only where keys are split: the state after each block, and the chunks still missing.
    char *records           # [tiles][blocks][record_bytes]
    size_t record_bytes
    int *missing            # [tiles]


cdef int attend(call_state *call, idx tile_index, idx chunk) noexcept nogil:
    """One tile of queries over the blocks of keys it can see, as in the paper."""
    cdef idx block, first = chunk * call.chunk, last = first + call.chunk
    cdef bint split = call.chunks > 1
    cdef const mha_kernel *kernel = call.kernels.prefill
    if mha_tile_rows(call.problem, tile_index, kernel.lanes) <= call.kernels.decode.lanes:
        kernel = call.kernels.decode                       # the same bits, faster for few rows
    cdef mha_tile *tile = kernel.begin(call.problem, tile_index)    # Q * scale, packed
    if tile == NULL:
        return OUT_OF_MEMORY
    for block in range(max(first, tile.first_block), min(last, tile.last_block)):
        if kernel.scores_block(tile, block):               # S = Q K^T, masked
            kernel.softmax_block(tile)                     # P = exp(S - max), sums
            kernel.weighted_sum_block(tile)                # O = rescaled O + P V
        if split:
            kernel.save(tile, record_of(call, tile_index, block))
    if split:
        if not mha_was_last(&call.missing[tile_index]):
            return OK
        for block in range(tile.first_block, tile.last_block):
            kernel.merge(tile, record_of(call, tile_index, block))  # in key order
    kernel.finish(tile)                                    # O / sum, log-sum-exp
    return OK


cdef char *record_of(call_state *call, idx tile, idx block) noexcept nogil:
    return call.records + (tile * call.blocks + block) * call.record_bytes


cdef int pending_signal() noexcept with gil:
    return PyErr_CheckSignals()     # leaves the exception set; `run` returns -1 for it


cdef void step(call_state *call, idx task) noexcept nogil:
    if call.status != OK:
        return
    cdef int status = attend(call, task // call.chunks, task % call.chunks)
    if status == OK and omp_get_thread_num() == 0 and task % call.signal_interval == 0:
        if pending_signal():
            status = INTERRUPTED
    if status != OK:
        call.status = status


cdef int split_keys(call_state *call, int threads) except -1:
    """Where tiles are too few for the threads, make tasks of runs of key blocks, whose partial
    results merge in key order: the arithmetic is the same, split or not."""
    cdef const mha_problem *p = call.problem
    cdef idx i
    call.blocks = (p.seqlen_k + MHA_KEY_BLOCK - 1) // MHA_KEY_BLOCK
    call.chunks, call.chunk = 1, call.blocks
    if threads > 1 and call.tiles < TASKS_PER_THREAD * threads and call.tiles % threads:
        call.chunks = min(call.blocks, (TASKS_PER_THREAD * threads + call.tiles - 1) // call.tiles)
        call.chunk = (call.blocks + call.chunks - 1) // call.chunks
        call.chunks = (call.blocks + call.chunk - 1) // call.chunk
    if call.chunks == 1:
        return 0
    call.record_bytes = max(call.kernels.prefill.state_bytes(p), call.kernels.decode.state_bytes(p))
    call.records = <char *>malloc(call.tiles * call.blocks * call.record_bytes)
    call.missing = <int *>malloc(call.tiles * sizeof(int))
    if call.records == NULL or call.missing == NULL:
        raise MemoryError("no memory for the partial results of split keys")
    for i in range(call.tiles):
        call.missing[i] = <int>call.chunks
    return 0


cdef int run(const mha_problem *p, const mha_kernels *kernels, int threads) except -1:
    """All tasks. Threads share nothing but the counter of tasks, so they cannot change a bit."""
    cdef call_state call
    cdef idx task, tasks
    cdef double rows = <double>p.batch * p.kv_heads * p.seqlen_k * (p.head_dim + p.head_dim_v)
    cdef double work = rows * (2.0 * p.group_size * p.seqlen_q + 4 * WORK_PER_BYTE)
    memset(&call, 0, sizeof(call))
    call.problem = p
    call.kernels = kernels
    call.tiles = mha_tile_count(p, kernels.prefill.lanes)
    threads = min(threads, <int>min(work / WORK_PER_THREAD, 1e6))
    if forked or omp_in_parallel():
        threads = 1
    try:
        split_keys(&call, threads)
        tasks = call.tiles * call.chunks
        threads = min(threads, <int>min(tasks, 1 << 20))
        call.signal_interval = <idx>(1 + WORK_PER_SIGNAL_CHECK * tasks / (work + 1))
        with nogil:
            if threads <= 1:
                for task in range(tasks):
                    step(&call, task)
            else:
                for task in prange(tasks, schedule="dynamic", chunksize=1, num_threads=threads):
                    step(&call, task)
    finally:
        free(call.records)
        free(call.missing)
    if call.status == OUT_OF_MEMORY:
        raise MemoryError("no memory for the scratch space of a thread")
    return -1 if call.status == INTERRUPTED else 0


# ---- Arrays to C ---------------------------------------------------------------------------------

cdef int bfloat16 = -1      # NumPy's number of ml_dtypes.bfloat16, once somebody has shown us one


cdef int dtype_of(cnp.ndarray array) noexcept:
    cdef int number = cnp.PyArray_TYPE(array)
    if not cnp.PyArray_ISNOTSWAPPED(array):
        return -1
    if number == cnp.NPY_FLOAT32:
        return MHA_F32
    if number == cnp.NPY_FLOAT64:
        return MHA_F64
    if number == cnp.NPY_FLOAT16:
        return MHA_F16
    if number == cnp.NPY_BOOL:
        return MHA_BOOL
    if number == bfloat16:
        return MHA_BF16
    return -1


cdef bint fit(idx have, idx want, idx stride, idx *result) noexcept:
    """The stride of an axis of `have` entries broadcast to `want`."""
    result[0] = 0 if have == 1 else stride
    return have == want or have == 1


cdef idx axis(cnp.ndarray array, int from_end) noexcept:
    """Length of an axis counted from the end; 1 where the array has no such axis."""
    cdef int i = cnp.PyArray_NDIM(array) - from_end
    return cnp.PyArray_DIM(array, i) if i >= 0 else 1


cdef idx stride(cnp.ndarray array, int from_end) noexcept:
    cdef int i = cnp.PyArray_NDIM(array) - from_end
    return cnp.PyArray_STRIDE(array, i) if i >= 0 else 0


cdef bint describe(mha_problem *p, mha_array *a, cnp.ndarray array, idx heads, idx rows, idx cols,
                   int core) noexcept:
    """Fill in an array whose last `core` axes broadcast to (heads, rows, cols), cut from the left."""
    cdef int i
    a.data = cnp.PyArray_BYTES(array)
    a.dtype = dtype_of(array)
    a.head = a.row = a.col = 0
    if core == 3:
        if not (fit(axis(array, 1), cols, stride(array, 1), &a.col)
                and fit(axis(array, 2), rows, stride(array, 2), &a.row)
                and fit(axis(array, 3), heads, stride(array, 3), &a.head)):
            return False
    elif core == 2:
        if not (fit(axis(array, 1), rows, stride(array, 1), &a.row)
                and fit(axis(array, 2), heads, stride(array, 2), &a.head)):
            return False
    if cnp.PyArray_NDIM(array) > core + p.batch_axes:
        return False
    for i in range(p.batch_axes):
        if not fit(axis(array, core + p.batch_axes - i), p.batch_shape[i],
                   stride(array, core + p.batch_axes - i), &a.batch[i]):
            return False
    return True


cdef bint plain(object x) noexcept:
    return type(x) is cnp.ndarray


cdef bint set_sizes(mha_problem *p, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v,
                    int axes) noexcept:
    """Sizes and broadcast batch shape of q, k, v; False where they do not fit."""
    cdef idx n, heads = axis(q, 3)
    cdef int i
    cdef cnp.ndarray array
    p.batch_axes = max(axes - 3, 0)
    p.kv_heads = axis(k, 3)
    p.seqlen_q, p.seqlen_k = axis(q, 2), axis(k, 2)
    p.head_dim, p.head_dim_v = axis(q, 1), axis(v, 1)
    if axis(k, 1) != p.head_dim or axis(v, 2) != p.seqlen_k or axis(v, 3) != p.kv_heads:
        return False
    if heads % p.kv_heads if p.kv_heads else heads:
        return False
    p.group_size = heads // p.kv_heads if p.kv_heads else 1
    p.batch = 1
    for i in range(p.batch_axes):
        p.batch_shape[i] = 1
        for array in (q, k, v):
            n = axis(array, axes - i)
            if n != 1 and p.batch_shape[i] != 1 and n != p.batch_shape[i]:
                return False
            if n != 1:
                p.batch_shape[i] = n
        p.batch *= p.batch_shape[i]
    return True


cdef bint set_terms(mha_problem *p, object mask, object bias, idx heads) noexcept:
    cdef object term
    p.num_terms = 0
    for term in (mask, bias):
        if term is None:
            continue
        if not plain(term) or not describe(p, &p.terms[p.num_terms], term, heads, p.seqlen_q,
                                           p.seqlen_k, 3):
            return False
        if p.terms[p.num_terms].dtype < (MHA_BOOL if term is mask else MHA_F16):
            return False
        p.num_terms += 1
    return True


cdef bint set_integers(mha_problem *p, mha_array *a, object x) noexcept:
    """Batch-shaped int64 values; attention.py has made them so and checked them."""
    return x is None or describe(p, a, x, 1, 1, 1, 0)


cdef object new_array(mha_problem *p, int ndim, idx heads, idx last, int dtype):
    """An uninitialised (batch..., heads, seqlen_q[, last]) array; two-dimensional inputs have no
    heads axis. `last` < 0: none."""
    cdef cnp.npy_intp shape[MHA_MAX_AXES]
    cdef int i, number, n = 0
    for i in range(p.batch_axes):
        shape[n] = p.batch_shape[i]
        n += 1
    if ndim > 2:
        shape[n] = heads
        n += 1
    shape[n] = p.seqlen_q
    n += 1
    if last >= 0:
        shape[n] = last
        n += 1
    number = (cnp.NPY_FLOAT64 if dtype == MHA_F64 else cnp.NPY_FLOAT32 if dtype == MHA_F32
              else cnp.NPY_FLOAT16 if dtype == MHA_F16 else bfloat16)
    return cnp.PyArray_SimpleNew(n, shape, number)


cdef int promote(int a, int b) noexcept:
    return a if a == b else MHA_F64 if a == MHA_F64 or b == MHA_F64 else MHA_F32


def forward(object q, object k, object v, object mask=None, object bias=None, object causal=False,
            object scale=None, object threads=None, bint return_lse=False, object out=None,
            object q_offset=None, object kv_lengths=None, object window=None):
    """attention() of plain arguments, or NotImplemented.

    Plain: q, k, v, mask and bias are exact ndarrays of native float dtypes (mask also bool) that
    fit together, scale is None or a finite float, threads None or a positive int. out, q_offset,
    kv_lengths (int64) and window (left, right) have been checked by attention.py.
    """
    cdef mha_problem p
    cdef idx heads
    cdef int axes, dtype, wanted
    if not (plain(q) and plain(k) and plain(v) and (causal is True or causal is False)):
        return NotImplemented
    axes = max(cnp.PyArray_NDIM(q), cnp.PyArray_NDIM(k), cnp.PyArray_NDIM(v))
    if min(cnp.PyArray_NDIM(q), cnp.PyArray_NDIM(k), cnp.PyArray_NDIM(v)) < 2:
        return NotImplemented
    memset(&p, 0, sizeof(p))
    if not set_sizes(&p, q, k, v, axes):
        return NotImplemented
    heads = p.kv_heads * p.group_size
    if not (describe(&p, &p.q, q, heads, p.seqlen_q, p.head_dim, 3)
            and describe(&p, &p.k, k, p.kv_heads, p.seqlen_k, p.head_dim, 3)
            and describe(&p, &p.v, v, p.kv_heads, p.seqlen_k, p.head_dim_v, 3)
            and min(p.q.dtype, p.k.dtype, p.v.dtype) > MHA_BOOL
            and set_terms(&p, mask, bias, heads)
            and set_integers(&p, &p.q_offset, q_offset)
            and set_integers(&p, &p.kv_lengths, kv_lengths)):
        return NotImplemented
    p.window_left, p.window_right = (MHA_OPEN, MHA_OPEN) if window is None else window
    if causal is True:
        p.window_right = min(p.window_right, 0)
    if scale is None:
        p.scale = 1 / sqrt(p.head_dim) if p.head_dim else 1
    elif type(scale) is float and isfinite(<double>scale):
        p.scale = scale
    else:
        return NotImplemented
    if threads is not None and (type(threads) is not int or not 0 < threads < 1 << 30):
        return NotImplemented

    dtype = promote(promote(p.q.dtype, p.k.dtype), p.v.dtype)
    wanted = default_threads() if threads is None else threads
    if out is None:
        out = new_array(&p, axes, heads, p.head_dim_v, dtype)
    describe(&p, &p.out, out, heads, p.seqlen_q, p.head_dim_v, 3)
    lse = None
    if return_lse:
        lse = new_array(&p, axes, heads, -1, MHA_F64 if dtype == MHA_F64 else MHA_F32)
        describe(&p, &p.lse, lse, heads, p.seqlen_q, 1, 2)
    if p.batch and heads and p.seqlen_q:
        run(&p, isa.f64 if dtype == MHA_F64 else isa.f32, wanted)
    return (out, lse) if return_lse else out


# ---- Instruction set, threads, measurements ------------------------------------------------------

cdef const mha_isa *isa = NULL
cdef bint forked = False
cdef int threads_set = 0                            # set_num_threads or its variable; 0: not set
cdef int threads_quota = 0                          # the cgroup's CPU quota; 0: none
cdef int openmp_threads = omp_get_max_threads()     # at import, before anybody limits it


cdef int default_threads() noexcept:
    """Threads of a call that does not say: ours if set, else OpenMP's, which knows OMP_NUM_THREADS,
    affinity and threadpoolctl. A limit that OpenMP was given since import holds in either case."""
    cdef int now = omp_get_max_threads()
    cdef int count = threads_set or (min(now, threads_quota) if threads_quota else now)
    return min(count, now) if now < openmp_threads else count


def get_threads():
    return default_threads()


def get_threads_set():
    return threads_set


def set_threads(int count):
    global threads_set
    threads_set = count


def set_quota(int count):
    global threads_quota
    threads_quota = count


def after_fork_in_child():
    """GNU OpenMP hangs in a forked child of a process that had a team: stay serial there."""
    global forked
    forked = True


def is_forked():
    return forked


def set_bfloat16(int number):
    global bfloat16
    bfloat16 = number


def isa_names(bint usable=True):
    """Instruction sets that this CPU can run (or, not `usable`, all compiled in), fastest first."""
    cdef int i = 0
    names = []
    while mha_isa_at(i) != NULL:
        if not usable or mha_isa_usable(i):
            names.append(mha_isa_at(i).name.decode())
        i += 1
    return names


def get_isa():
    return isa.name.decode()


def use_isa(name):
    """Compute with this instruction set from now on; None or "" is the fastest usable one."""
    global isa
    cdef int i = 0
    names = isa_names()
    if name and name not in names:
        raise ValueError(f"MHA_FAST_ISA={name!r} is not usable here; usable: {', '.join(names)}")
    while mha_isa_at(i).name.decode() != (name or names[0]):
        i += 1
    isa = mha_isa_at(i)


def openmp_version():
    return MHA_OPENMP_VERSION


def exp2(cnp.ndarray x):
    """The kernel's exponential of a contiguous float32 or float64 array, for its tests."""
    cdef cnp.ndarray y = cnp.PyArray_NewCopy(x, cnp.NPY_CORDER)
    cdef const mha_kernels *kernels = isa.f64 if dtype_of(x) == MHA_F64 else isa.f32
    assert dtype_of(x) >= MHA_F32
    kernels.exp2(cnp.PyArray_DATA(y), cnp.PyArray_DATA(y), y.size)
    return y


def fma_chain(idx rounds):
    """Floating-point operations done by `rounds` of independent float32 FMA, for the peak."""
    cdef double flops = 0
    with nogil:
        isa.f32.fma_chain(rounds, &flops)
    return flops


def read_all(cnp.ndarray x):
    """Read a contiguous float32 array once, for the bandwidth."""
    cdef idx n = x.size
    with nogil:
        isa.f32.read_all(cnp.PyArray_DATA(x), n)


use_isa(os.environ.get("MHA_FAST_ISA"))
os.register_at_fork(after_in_child=after_fork_in_child)
