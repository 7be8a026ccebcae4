"""How a call is cut into tasks and shared out among threads; included by _core.pyx.

`plan_of` decides and touches nothing; `carry_out` does what the plan says. Threads share nothing
but the counter of tasks, so they cannot change a bit.
"""

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


cdef struct Plan:
    int threads
    idx tiles
    idx blocks              # of keys, per tile
    idx chunk               # blocks per task
    idx chunks              # tasks per tile and wave; 1 unless keys are split
    idx wave                # blocks per wave: whole runs, or all. Bounds the memory of records
    size_t record_bytes     # the state of one tile after one block
    double bytes            # of all records: [tiles][1 + wave], the waves before, then each block
    idx signal_interval     # tasks between two looks at Ctrl-C


cdef double work_of(const mha_problem *p) except -1:
    if max(p.n.head_dim, p.n.head_dim_v) > MHA_MAX_DIM:
        raise MemoryError("no memory for a tile of rows that long")
    return operations(p)


cdef double operations(const mha_problem *p) noexcept nogil:
    cdef const mha_sizes *n = &p.n
    cdef double keys = <double>n.batch * n.kv_heads * n.seqlen_k * (n.head_dim + n.head_dim_v)
    return keys * (2.0 * n.group_size * n.seqlen_q + 4 * WORK_PER_BYTE)


cdef int threads_for(double work, bint hot, int limit) noexcept nogil:
    """Threads that are worth waking."""
    cdef double most = work / (WORK_PER_HOT_THREAD if hot else WORK_PER_COLD_THREAD)
    return max(1, min(limit, <int>min(most, 1e6)))


cdef Plan plan_of(const mha_problem *p, const mha_kernels *kernels, int threads,
                  bint merges) noexcept nogil:
    """Tiles are tasks. Where they are too few for the threads, tasks are runs of key blocks, whose
    partial results merge in key order, if the results of blocks merge at all: the arithmetic is
    the same, split or not."""
    cdef Plan plan
    cdef idx wanted = TASKS_PER_THREAD * threads, affordable
    memset(&plan, 0, sizeof(plan))
    plan.tiles = mha_tile_count(p, kernels.queries_in_lanes.lanes)
    plan.blocks = (p.n.seqlen_k + MHA_KEY_BLOCK - 1) // MHA_KEY_BLOCK
    plan.wave = plan.chunk = plan.blocks
    plan.chunks = 1
    if threads > 1 and plan.tiles < wanted and plan.tiles % threads and plan.blocks > 1:
        plan.record_bytes = max(kernels.queries_in_lanes.state_bytes(p),
                                kernels.keys_in_lanes.state_bytes(p))
        if merges:
            affordable = threads * RECORD_BYTES_PER_THREAD // (plan.tiles * plan.record_bytes)
            plan.wave = max(wanted // plan.tiles, affordable)
            plan.wave = min(plan.blocks, (plan.wave + MHA_RUN - 1) // MHA_RUN * MHA_RUN)
        plan.chunk = max(1, plan.wave * plan.tiles // wanted)
        plan.chunks = (plan.wave + plan.chunk - 1) // plan.chunk
        if merges and plan.chunks > 1:
            plan.bytes = <double>plan.record_bytes * plan.tiles * (1 + plan.wave)
    plan.threads = <int>min(threads, plan.tiles * plan.chunks)
    plan.signal_interval = <idx>(
        1 + WORK_PER_SIGNAL_CHECK * plan.tiles * plan.chunks / (operations(p) + 1))
    return plan


cdef Plan plan_of_parts(call_state *call, int threads, double work) noexcept nogil:
    """Tiles of all parts, one after another; keys are not split."""
    cdef Plan plan
    cdef idx i
    memset(&plan, 0, sizeof(plan))
    for i in range(call.num_parts):
        call.parts[i].plan = plan_of(call.parts[i].job.problem, call.parts[i].kernels, 1, True)
        call.parts[i].plan.threads = threads
        call.parts[i].first_tile = plan.tiles
        plan.tiles += call.parts[i].plan.tiles
    plan.blocks = plan.wave = plan.chunk = plan.chunks = 1
    plan.threads = <int>min(threads, plan.tiles)
    plan.signal_interval = <idx>(1 + WORK_PER_SIGNAL_CHECK * plan.tiles / (work + 1))
    return plan


# ---- Running -------------------------------------------------------------------------------------


ctypedef bint (*task_function)(call_state *, idx tile_index, idx chunk) noexcept nogil

cdef struct call_state:
    const mha_job *job
    const mha_kernels *kernels
    task_function task
    Plan plan
    # Only where a call is many jobs of one team; then it has no job itself:
    call_state *parts
    idx num_parts
    idx first_tile          # of a part
    # Only where the results of split keys merge:
    idx wave_begin          # first block of the wave at hand
    char *records
    int64_t *missing        # [tiles] chunks not yet done
    # What threads write stands a cache line apart from what they read all the time.
    char apart[64]
    int64_t next_task
    int64_t out_of_memory   # how many threads were
    int64_t interrupted


cdef double call_end = 0            # when the last call that was worth two threads ended
cdef int64_t threads_claimed = 0    # by the large calls that run now


cdef int carry_out(const mha_job *job, const mha_kernels *kernels, task_function task,
                   int limit) except -1:
    """All tasks of a job, on at most `limit` threads; 0: what the process has set."""
    cdef call_state call
    memset(&call, 0, sizeof(call))
    call.job, call.kernels, call.task = job, kernels, task
    return run(&call, work_of(job.problem), limit)


cdef int run(call_state *call, double work, int limit) except -1:
    global call_end
    cdef bint large = work >= 2 * WORK_PER_HOT_THREAD, hot = False
    cdef int threads = 1
    if large:
        hot = omp_get_wtime() - call_end < HOT
        limit = limit or default_threads()
        threads = 1 if forked or omp_in_parallel() else threads_for(work, hot, limit)
        threads = claim(threads)
    if call.num_parts:
        call.plan = plan_of_parts(call, threads, work)
    else:
        call.plan = plan_of(call.job.problem, call.kernels, threads, call.task == attend)
    try:
        reserve_records(call)
        with nogil:
            while True:
                run_wave(call, team_of(call.plan.threads, hot))
                call.wave_begin += call.plan.wave
                if call.wave_begin >= call.plan.blocks or call.out_of_memory or call.interrupted:
                    break
        if large:
            call_end = omp_get_wtime()
    finally:
        if large:
            release(threads)
        free(call.records)
        free(call.missing)
    if call.interrupted or call.out_of_memory and PyErr_CheckSignals():
        return -1
    if call.out_of_memory:
        raise MemoryError("no memory for the scratch space of a thread")
    return 0


cdef int reserve_records(call_state *call) except -1:
    if call.plan.bytes == 0:
        return 0
    if call.plan.bytes < <double>PY_SSIZE_T_MAX:
        call.records = <char *>malloc(<size_t>call.plan.bytes)
    call.missing = <int64_t *>malloc(call.plan.tiles * sizeof(int64_t))
    if call.records == NULL or call.missing == NULL:
        raise MemoryError("no memory for the partial results of split keys")
    return 0


cdef void run_wave(call_state *call, int team) noexcept nogil:
    cdef idx tile
    cdef int member
    call.next_task = 0
    for tile in range(call.plan.tiles if call.missing != NULL else 0):
        call.missing[tile] = call.plan.chunks
    if call.plan.threads == 1:
        work_off(call)
        return
    for member in prange(team, schedule="static", chunksize=1, num_threads=team):
        if member < call.plan.threads:
            work_off(call)


cdef void work_off(call_state *call) noexcept nogil:
    """Tasks, one after another, until none is left: what each member of the team does."""
    cdef idx task
    while True:
        task = mha_fetch_add(&call.next_task, 1)
        if task >= call.plan.tiles * call.plan.chunks:
            return
        if not call.task(call, task // call.plan.chunks, task % call.plan.chunks):
            stop(call, &call.out_of_memory)
        if omp_get_thread_num() == 0 and task % call.plan.signal_interval == 0:
            if pending_signal():
                stop(call, &call.interrupted)


cdef void stop(call_state *call, int64_t *reason) noexcept nogil:
    """Leave no task to begin. Threads may stop at once, for different reasons."""
    mha_fetch_add(reason, 1)
    mha_fetch_add(&call.next_task, call.plan.tiles * call.plan.chunks)


cdef int pending_signal() noexcept with gil:
    return PyErr_CheckSignals()


cdef int team_of(int threads, bint hot) noexcept nogil:
    """Members of the team. After a region GNU OpenMP's threads spin for 300,000 rounds, about 5 ms,
    on cores that NumPy's BLAS may want next; where there are more of them than CPUs, for 100
    rounds. So a call between other work takes one more, who does nothing."""
    return threads + (MHA_GNU_OPENMP and not hot and threads == omp_get_num_procs())


# ---- Calls of several Python threads ------------------------------------------------------------


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


def claim_threads(int threads):
    """Claim them, or give them back where negative, as a large call does, for its tests."""
    if threads < 0:
        release(-threads)
        return threads
    return claim(threads)
