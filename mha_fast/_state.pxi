"""Attention that begins, and ends, between the runs of the keys; included by _core.pyx."""


def attend_from(Question question, tuple total, tuple run, bint complete, threads):
    """(out, lse), or the state (o, sums) of rows that are not complete, after the question's keys.

    `total` and `run` are such states of keys before them, or None: of all runs, and of one run
    after those, beside which the question has no keys. o (..., heads, seqlen_q, head_dim_v) and
    sums (..., heads, seqlen_q, 2), which are m and l, are in the compute dtype.
    """
    cdef mha_job job
    cdef idx batch_bytes[ANSWERS + 4][MHA_MAX_AXES]
    cdef const mha_sizes *n = &question.p.n
    cdef int real = compute_dtype(question.dtype)
    question.begin_job(&job, batch_bytes[0])
    set_partial(question, &job.total, total, batch_bytes[ANSWERS])
    set_partial(question, &job.run, run, batch_bytes[ANSWERS + 2])
    dtype = question.dtype if complete else real
    out = new_array(n, question.ndim, question.heads, n.head_dim_v, dtype)
    sums = question.set_results(&job, out, complete)
    if not complete:
        job.raw = True
        sums = new_array(n, question.ndim, question.heads, 2, real)
        describe(n, &job.results.sums, sums, question.heads, n.seqlen_q, 2, 3)
    if n.batch and question.heads and n.seqlen_q:
        carry_out(&job, kernels_of(question.dtype), attend, threads or 0)
    return out, sums


cdef void set_partial(Question question, mha_partial *to, tuple state, idx *batch_bytes):
    cdef const mha_sizes *n = &question.p.n
    to.o.batch_bytes, to.sums.batch_bytes = batch_bytes, batch_bytes + MHA_MAX_AXES
    if state is not None:
        describe(n, &to.o, state[0], question.heads, n.seqlen_q, n.head_dim_v, 3)
        describe(n, &to.sums, state[1], question.heads, n.seqlen_q, 2, 3)
