"""How a call of attention is cut into tasks, and carried out; included by _core.pyx.

`plan_of` decides and touches nothing; `carry_out` does what the plan says.
"""

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


cdef double work_of(const mha_problem *p) except -1:
    if max(p.n.head_dim, p.n.head_dim_v) > MHA_MAX_DIM:
        raise MemoryError("no memory for a tile of rows that long")
    return operations(p)


cdef double operations(const mha_problem *p) noexcept nogil:
    cdef const mha_sizes *n = &p.n
    cdef double keys = <double>n.batch * n.kv_heads * n.seqlen_k * (n.head_dim + n.head_dim_v)
    return keys * (2.0 * n.group_size * n.seqlen_q + 4 * WORK_PER_BYTE)


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
    return plan


cdef Plan plan_of_parts(call_state *call, int threads) noexcept nogil:
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
    return plan


# ---- Running -------------------------------------------------------------------------------------


ctypedef bint (*tile_task)(call_state *, idx tile_index, idx chunk) noexcept nogil

cdef struct call_state:
    const mha_job *job
    const mha_kernels *kernels
    tile_task task
    Plan plan
    # Only where a call is many jobs of one team; then it has no job itself:
    call_state *parts
    idx num_parts
    idx first_tile          # of a part
    # Only where the results of split keys merge:
    idx wave_begin          # first block of the wave at hand
    char *records
    int64_t *missing        # [tiles] chunks not yet done


cdef int carry_out(const mha_job *job, const mha_kernels *kernels, tile_task task,
                   int limit) except -1:
    """All tasks of a job, on at most `limit` threads; 0: what the process has set."""
    cdef call_state call
    memset(&call, 0, sizeof(call))
    call.job, call.kernels, call.task = job, kernels, task
    return run(&call, work_of(job.problem), limit)


cdef int run(call_state *call, double work, int limit) except -1:
    cdef Team team = assemble(task_of_call, call, work, limit)
    if call.num_parts:
        call.plan = plan_of_parts(call, team.threads)
    else:
        call.plan = plan_of(call.job.problem, call.kernels, team.threads, call.task == attend)
    team.tasks = call.plan.tiles * call.plan.chunks
    try:
        reserve_records(call)
        with nogil:
            while True:
                begin_wave(call)
                work_together(&team)
                call.wave_begin += call.plan.wave
                if call.wave_begin >= call.plan.blocks or has_stopped(&team):
                    break
    finally:
        dismiss(&team)
        free(call.records)
        free(call.missing)
    return report(&team)


cdef bint task_of_call(void *subject, idx task) noexcept nogil:
    cdef call_state *call = <call_state *>subject
    return call.task(call, task // call.plan.chunks, task % call.plan.chunks)


cdef int reserve_records(call_state *call) except -1:
    if call.plan.bytes == 0:
        return 0
    if call.plan.bytes < <double>PY_SSIZE_T_MAX:
        call.records = <char *>malloc(<size_t>call.plan.bytes)
    call.missing = <int64_t *>malloc(call.plan.tiles * sizeof(int64_t))
    if call.records == NULL or call.missing == NULL:
        raise MemoryError("no memory for the partial results of split keys")
    return 0


cdef void begin_wave(call_state *call) noexcept nogil:
    cdef idx tile
    for tile in range(call.plan.tiles if call.missing != NULL else 0):
        call.missing[tile] = call.plan.chunks
