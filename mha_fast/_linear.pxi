"""The products of a linear layer, as scores that go out, or of a packed weight; included by
_core.pyx."""

PANEL = MHA_PANEL


def linear(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, object threads):
    """x (rows, width) @ weight (outputs, width).T + bias, of plain float arrays that fit; bias is
    dense, in the compute dtype, or None. The products are scores of queries x and keys weight."""
    cdef mha_problem p
    cdef mha_sizes *n = &p.n
    cdef mha_job job
    cdef int dtype
    memset(&p, 0, sizeof(p))
    memset(&job, 0, sizeof(job))
    n.batch = n.kv_heads = n.group_size = 1
    n.seqlen_q, n.seqlen_k, n.head_dim = x.shape[0], weight.shape[0], x.shape[1]
    p.spans.left = p.spans.right = MHA_OPEN
    p.scoring.scale = 1
    describe(n, &p.q, x, 1, n.seqlen_q, n.head_dim, 3)
    describe(n, &p.k, weight, 1, n.seqlen_k, n.head_dim, 3)
    p.v = p.k       # head_dim_v is 0: never read, but valid where a tile points at its rows
    dtype = promote(p.q.dtype, p.k.dtype)
    out = new_array(n, 2, 1, n.seqlen_k, dtype)
    job.problem = &p
    job.scores.stage = MHA_PRODUCTS
    describe(n, &job.scores.to, out, 1, n.seqlen_q, n.seqlen_k, 3)
    if bias is not None:
        job.scores.addend = cnp.PyArray_DATA(bias)
    if out.size:
        carry_out(&job, kernels_of(dtype), project, threads or 0)
    return out


cdef struct linear_call:
    mha_linear linear
    const mha_kernels *kernels


cdef bint linear_task(void *subject, idx task) noexcept nogil:
    cdef const linear_call *call = <const linear_call *>subject
    return call.kernels.linear(&call.linear, task)


def linear_packed(cnp.ndarray x, cnp.ndarray panels, idx outputs, cnp.ndarray bias, threads):
    """x (rows, width) times a weight in dense panels (n, width, PANEL), which are of the compute
    dtype or of 16 bits; bias as in `linear`."""
    cdef linear_call call
    cdef mha_linear *p = &call.linear
    cdef mha_sizes n
    cdef Team team
    cdef int dtype
    cdef double work
    memset(&n, 0, sizeof(n))
    memset(&call, 0, sizeof(call))
    p.rows, p.width, p.outputs = x.shape[0], x.shape[1], outputs
    describe(&n, &p.x, x, 1, p.rows, p.width, 3)
    p.panels, p.dtype = cnp.PyArray_BYTES(panels), dtype_of(panels)
    dtype = promote(p.x.dtype, p.dtype)
    n.seqlen_q = p.rows
    out = new_array(&n, 2, 1, outputs, dtype)
    describe(&n, &p.out, out, 1, p.rows, outputs, 3)
    p.bias = NULL if bias is None else cnp.PyArray_DATA(bias)
    call.kernels = kernels_of(dtype)
    if out.size == 0:
        return out
    work = 2.0 * p.rows * p.width * outputs + WORK_PER_BYTE * panels.nbytes
    team = assemble(linear_task, &call, work, threads or 0)
    team.tasks = panels.shape[0] * ((p.rows + MHA_PANEL_ROWS - 1) // MHA_PANEL_ROWS)
    with nogil:
        work_together(&team)
    dismiss(&team)
    report(&team)
    return out


cdef const mha_kernels *kernels_of(int dtype) noexcept:
    return isa.f64 if dtype == MHA_F64 else isa.f32
