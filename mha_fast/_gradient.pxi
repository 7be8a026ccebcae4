"""The backward pass: shares of keys as tasks; included by _core.pyx."""


cdef struct pull_state:
    const mha_job *job
    const mha_kernels *kernels
    idx first_head          # of the (batch, KV head) pairs at hand
    idx heads               # how many
    idx tiles               # of each
    idx tiles_in_group      # of rows
    int64_t *shares_done    # [heads * tiles], in key order
    int64_t failed


cdef bint pull_back(void *subject, idx task) noexcept nogil:
    """dK and dV of a share of the keys of one KV head, and what they add to dQ of all rows that see
    them. The last rows come first: with a causal mask they see every share, so that threads on
    different shares of one head begin together and add to dQ in turn without a wait."""
    cdef pull_state *call = <pull_state *>subject
    cdef idx head = task % call.heads, share = task // call.heads
    cdef idx group = (call.tiles + call.tiles_in_group - 1) // call.tiles_in_group
    cdef bint first = True
    while group > 0:
        group -= 1
        if not pull_group(call, head, share, group, &first):
            mha_fetch_add(&call.failed, 1)
            return False
    return True


cdef bint pull_group(pull_state *call, idx head, idx share, idx group,
                     bint *first_group) noexcept nogil:
    """The same of one group of rows."""
    cdef const mha_kernel *kernel = call.kernels.queries_in_lanes
    cdef const mha_pull *pull = call.kernels.pull
    cdef idx block, first, last, index, first_share, at = group * call.tiles_in_group
    cdef idx end = min(at + call.tiles_in_group, call.tiles)
    cdef bint seen = False
    cdef mha_tile *tile
    for at in range(at, end):
        index = head * call.tiles + call.tiles - 1 - at     # mha_place_of takes the last one first
        tile = pull.begin(call.job, call.first_head * call.tiles + index, share)  # Q, dO, delta
        if tile == NULL:
            return False
        first = max(tile.first_block, share * MHA_SHARE)
        last = min(tile.last_block, (share + 1) * MHA_SHARE)
        if first >= last:
            continue
        if not seen:
            pull.begin_group(tile, share)
            seen = True
        for block in range(first, last):
            if kernel.scores_block(tile, block):            # S = Q K^T, masked
                pull.block(tile)                            # P, dP, dS; dV, dK, dQ
        first_share = tile.first_block // MHA_SHARE
        if share > first_share and not await_share(call, index, share):
            return False
        pull.finish(tile, share == first_share)
        mha_fetch_add(&call.shares_done[index], share + 1 - call.shares_done[index])
    if seen:
        pull.end_group(tile, share, first_group[0])
        first_group[0] = False
    return True


cdef bint await_share(pull_state *call, idx index, idx share) noexcept nogil:
    """Until the share before is in the tile's dQ. Its task began before this one, on a thread that
    waits for none but earlier ones, so somebody always goes on."""
    while mha_fetch_add(&call.shares_done[index], 0) < share:
        if mha_fetch_add(&call.failed, 0):
            return False
        mha_yield()
    return True


def attend_for_gradients(Question question, object threads):
    """(out, lse, sums): what `attend` computes, and what the backward pass needs of it; out in the
    compute dtype, so that no rounding to 16 bits enters the gradients."""
    cdef mha_job job
    cdef idx batch_bytes[ANSWERS][MHA_MAX_AXES]
    cdef const mha_sizes *n = &question.p.n
    question.begin_job(&job, batch_bytes[0])
    cdef int real = compute_dtype(question.dtype)
    out = new_array(n, question.ndim, question.heads, n.head_dim_v, real)
    lse, sums = question.set_results(&job, out, True), question.set_sums(&job)
    if n.batch and question.heads and n.seqlen_q:
        carry_out(&job, kernels_of(question.dtype), attend, threads or 0)
    return out, lse, sums


def pull_back_through(Question question, tuple forward, d_out, d_lse, double scale, object wanted,
                      object threads):
    """A dict of "q", "k", "v", and of "rows" and "keys" what is wanted: arrays in the compute
    dtype, of the whole batch; those of q and k times `scale`. `forward` is what
    attend_for_gradients returned; d_out and d_lse (or None) are arrays of its shapes.
    wanted["scores"], where it is, takes the gradient of the scores, one batch entry at a time: its
    number, and (heads, seqlen_q, seqlen_k)."""
    cdef mha_job job
    cdef mha_gradients *to = &job.gradients
    cdef idx batch_bytes[ANSWERS + 2][MHA_MAX_AXES]
    cdef const mha_sizes *n = &question.p.n
    cdef idx i
    out, lse, sums = forward
    question.begin_job(&job, batch_bytes[0])
    to.scale = scale
    to.d_out.batch_bytes, to.d_lse.batch_bytes = batch_bytes[ANSWERS], batch_bytes[ANSWERS + 1]
    describe(n, &job.results.out, out, question.heads, n.seqlen_q, n.head_dim_v, 3)
    describe(n, &job.results.sums, sums, question.heads, n.seqlen_q, 3, 3)
    describe(n, &to.d_out, d_out, question.heads, n.seqlen_q, n.head_dim_v, 3)
    if d_lse is not None:
        describe(n, &to.d_lse, d_lse, question.heads, n.seqlen_q, 1, 2)
    *batch, seqlen_q = lse.shape        # and heads, if there is such an axis
    keys = [*batch[:n.batch_axes], *([n.kv_heads] if len(batch) > n.batch_axes else []), n.seqlen_k]
    found = {
        "q": np.zeros((*batch, seqlen_q, n.head_dim), lse.dtype),
        "k": np.zeros((*keys, n.head_dim), lse.dtype),
        "v": np.zeros((*keys, n.head_dim_v), lse.dtype),
    }
    to.q, to.k, to.v = data_of(found["q"]), data_of(found["k"]), data_of(found["v"])
    if "rows" in wanted:
        found["rows"] = np.zeros((*batch, seqlen_q, 2), lse.dtype)
        to.of_rows = data_of(found["rows"])
    if "keys" in wanted:
        found["keys"] = np.zeros((*batch, n.seqlen_k))
        to.of_keys = <double *>data_of(found["keys"])
    if not (n.batch and question.heads and n.seqlen_q and n.seqlen_k):
        return found
    if "scores" not in wanted:
        pull_all(&job, kernels_of(question.dtype), 0, n.batch * n.kv_heads, threads or 0)
        return found
    scores = np.empty((question.heads, n.seqlen_q, n.seqlen_k), lse.dtype)
    describe(n, &job.scores.to, scores, question.heads, n.seqlen_q, n.seqlen_k, 3)
    for i in range(n.batch):
        scores.fill(0)
        pull_all(&job, kernels_of(question.dtype), i * n.kv_heads, n.kv_heads, threads or 0)
        wanted["scores"](i, scores)
    return found


cdef void *data_of(cnp.ndarray array) noexcept:
    return cnp.PyArray_DATA(array)


cdef int pull_all(const mha_job *job, const mha_kernels *kernels, idx first_head, idx heads,
                  int limit) except -1:
    """Gradients of some (batch, KV head) pairs."""
    cdef const mha_sizes *n = &job.problem.n
    cdef idx pairs = n.batch * n.kv_heads, keys = MHA_SHARE * MHA_KEY_BLOCK
    cdef pull_state call
    cdef Team team
    memset(&call, 0, sizeof(call))
    call.job, call.kernels, call.first_head, call.heads = job, kernels, first_head, heads
    call.tiles = mha_tile_count(job.problem, kernels.queries_in_lanes.lanes) // pairs
    call.tiles_in_group = MHA_ROW_GROUP // kernels.queries_in_lanes.lanes
    call.shares_done = <int64_t *>calloc(heads * call.tiles, sizeof(int64_t))
    if call.shares_done == NULL:
        raise MemoryError("no memory for the backward pass")
    team = assemble(pull_back, &call, 2.5 * work_of(job.problem) * heads / pairs, limit)
    team.tasks = heads * ((n.seqlen_k + keys - 1) // keys)
    with nogil:
        work_together(&team)
    dismiss(&team)
    free(call.shares_done)
    return report(&team)
