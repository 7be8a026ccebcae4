"""The products of a linear layer, as scores that go out; included by _core.pyx."""


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


cdef const mha_kernels *kernels_of(int dtype) noexcept:
    return isa.f64 if dtype == MHA_F64 else isa.f32
