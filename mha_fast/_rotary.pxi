"""Rotary embedding, shared out among the team; included by _core.pyx."""


cdef struct rotation_call:
    mha_rotation rotation
    const mha_kernels *kernels


cdef bint rotate_task(void *subject, idx task) noexcept nogil:
    cdef const rotation_call *call = <const rotation_call *>subject
    return call.kernels.rotate(&call.rotation, task)


def rotate(cnp.ndarray x, cnp.ndarray out, cnp.ndarray cos, cnp.ndarray sin,
           cnp.ndarray positions, bint interleaved, object threads):
    """Turn the rows of x (batch..., heads, rows, head_dim) into out, which may be x, by rows of
    cos and sin (batch..., 1, positions, pairs) of the compute dtype; positions (batch..., 1, rows)
    are int64 and exist there. Plain arrays that fit and were checked."""
    cdef rotation_call call
    cdef mha_rotation *r = &call.rotation
    cdef mha_sizes *n = &r.n
    cdef idx shape[MHA_MAX_AXES]
    cdef idx batch_bytes[5][MHA_MAX_AXES]
    cdef int i
    cdef Team team
    memset(&call, 0, sizeof(call))
    call.kernels = kernels_of(dtype_of(x))
    n.batch, n.batch_axes, n.batch_shape = 1, ndim(x) - 3, shape
    for i in range(n.batch_axes):
        shape[i] = cnp.PyArray_DIM(x, i)
        n.batch *= shape[i]
    n.kv_heads, n.seqlen_q, n.head_dim = axis(x, 3), axis(x, 2), axis(x, 1)
    r.x.batch_bytes, r.out.batch_bytes = batch_bytes[0], batch_bytes[1]
    r.cos.batch_bytes, r.sin.batch_bytes = batch_bytes[2], batch_bytes[3]
    r.positions.batch_bytes = batch_bytes[4]
    r.pairs, r.interleaved = axis(cos, 1), interleaved
    describe(n, &r.x, x, n.kv_heads, n.seqlen_q, n.head_dim, 3)
    describe(n, &r.out, out, n.kv_heads, n.seqlen_q, n.head_dim, 3)
    describe(n, &r.cos, cos, n.kv_heads, axis(cos, 2), r.pairs, 3)
    describe(n, &r.sin, sin, n.kv_heads, axis(sin, 2), r.pairs, 3)
    describe(n, &r.positions, positions, n.kv_heads, n.seqlen_q, 1, 2)
    if x.size == 0:
        return
    team = assemble(rotate_task, &call, 2 * WORK_PER_BYTE * x.nbytes, threads or 0)
    team.tasks = n.batch * ((n.seqlen_q + MHA_ROTARY_ROWS - 1) // MHA_ROTARY_ROWS)
    with nogil:
        work_together(&team)
    dismiss(&team)
    report(&team)
