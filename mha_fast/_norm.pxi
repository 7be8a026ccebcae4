"""Layer norm and RMS norm, shared out among the team; included by _core.pyx."""


cdef struct norm_call:
    mha_norm norm
    const mha_kernels *kernels


cdef bint norm_task(void *subject, idx task) noexcept nogil:
    cdef const norm_call *call = <const norm_call *>subject
    return call.kernels.norm(&call.norm, task)


def norm_rows(cnp.ndarray x, cnp.ndarray residual, cnp.ndarray weight, cnp.ndarray bias, double eps,
              bint centred, object threads):
    """Of dense x and residual (or None), (rows, width), and (width,) arrays of the compute dtype:
    out, x + residual (or x), and what the way back needs of each row."""
    cdef norm_call call
    memset(&call, 0, sizeof(call))
    out, stats = np.empty_like(x), np.empty((x.shape[0], 2), x.dtype)
    summed = x if residual is None else np.empty_like(x)
    call.norm.bias = NULL if bias is None else cnp.PyArray_DATA(bias)
    call.norm.residual = NULL if residual is None else cnp.PyArray_DATA(residual)
    call.norm.summed = data_of(summed)
    call.norm.eps, call.norm.centred = eps, centred
    call.norm.out, call.norm.stats = data_of(out), data_of(stats)
    norm_all(&call, x, weight, threads or 0)
    return out, summed, stats


def pull_back_norm(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray stats, cnp.ndarray d_out,
                   object threads):
    """Gradients of x, weight and bias of norm_rows, of arrays like those."""
    cdef norm_call call
    cdef idx tasks = (x.shape[0] + MHA_NORM_ROWS - 1) // MHA_NORM_ROWS
    memset(&call, 0, sizeof(call))
    d_x, sums = np.empty_like(x), np.zeros((tasks, 2, x.shape[1]), x.dtype)
    call.norm.stats = cnp.PyArray_DATA(stats)
    call.norm.d_out = cnp.PyArray_DATA(d_out)
    call.norm.d_x, call.norm.sums = data_of(d_x), data_of(sums)
    norm_all(&call, x, weight, threads or 0)
    d_weight, d_bias = sums.sum(axis=0)
    return d_x, d_weight, d_bias


cdef int norm_all(norm_call *call, cnp.ndarray x, cnp.ndarray weight, int limit) except -1:
    cdef Team team
    call.kernels = kernels_of(dtype_of(x))
    call.norm.rows, call.norm.width = x.shape[0], x.shape[1]
    call.norm.x, call.norm.weight = cnp.PyArray_DATA(x), cnp.PyArray_DATA(weight)
    if x.size == 0:
        return 0
    team = assemble(norm_task, call, 3 * WORK_PER_BYTE * x.nbytes, limit)
    team.tasks = (x.shape[0] + MHA_NORM_ROWS - 1) // MHA_NORM_ROWS
    with nogil:
        work_together(&team)
    dismiss(&team)
    return report(&team)
