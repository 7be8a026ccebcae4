"""The calls that Python makes: arguments into a problem, and off, included by _core.pyx."""


def forward(object q, object k, object v, object mask=None, object bias=None, object causal=False,
            object scale=None, object threads=None, bint return_lse=False, object out=None,
            object q_offset=None, object kv_lengths=None, object window=None,
            bint return_weights=False, object weights_heads=None, object weights_rows=None):
    """(out, lse, weights) of plain arguments, None what is not asked for, or NotImplemented.

    Plain: q, k, v, mask and bias are exact ndarrays of native float dtypes (mask also bool) that
    fit together, scale is None or a finite float, threads None or a positive int. out, q_offset,
    kv_lengths (int64), window (left, right) and the places (int64, -1: none) of heads and rows in
    the weights have been checked by attention.py.
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
    p.scale *= LOG2_E
    if threads is not None and (type(threads) is not int or not 0 < threads < 1 << 30):
        return NotImplemented

    dtype = promote(promote(p.q.dtype, p.k.dtype), p.v.dtype)
    wanted = default_threads() if threads is None else threads
    if out is None:
        out = new_array(&p, axes, heads, p.head_dim_v, dtype)
    describe(&p, &p.out, out, heads, p.seqlen_q, p.head_dim_v, 3)
    lse = weights = None
    if return_lse:
        lse = new_array(&p, axes, heads, -1, compute_dtype(dtype))
        describe(&p, &p.lse, lse, heads, p.seqlen_q, 1, 2)
    if return_weights:
        sums = new_array(&p, max(axes, 3), heads, 2, compute_dtype(dtype))
        describe(&p, &p.sums, sums, heads, p.seqlen_q, 2, 3)
        weights = new_weights(&p, axes, heads, dtype, weights_heads, weights_rows)
    if p.batch and heads and p.seqlen_q:
        run(&p, kernels_of(dtype), wanted)
    return out, lse, weights


cdef object new_weights(mha_problem *p, int axes, idx heads, int dtype, cnp.ndarray heads_of,
                        cnp.ndarray rows_of):
    """An array for the weights of the heads and rows that have a place: zeros, where a key may be
    hidden and so not visited."""
    cdef idx some_heads = heads, rows = p.seqlen_q
    if heads_of is not None:
        p.heads_of = <const int64_t *>cnp.PyArray_DATA(heads_of)
        some_heads = np.count_nonzero(heads_of >= 0)
    if rows_of is not None:
        p.rows_of = <const int64_t *>cnp.PyArray_DATA(rows_of)
        rows = np.count_nonzero(rows_of >= 0)
    shape = [p.batch_shape[i] for i in range(p.batch_axes)]
    shape += ([some_heads] if axes > 2 else []) + [rows, p.seqlen_k]
    hides = p.num_terms or p.kv_lengths.data != NULL
    hides = hides or p.window_left != MHA_OPEN or p.window_right != MHA_OPEN
    real = np.float64 if dtype == MHA_F64 else np.float32
    weights = (np.zeros if hides else np.empty)(shape, real)
    describe(p, &p.scores, weights, some_heads, rows, p.seqlen_k, 3)
    return weights


def linear(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, object threads):
    """x (rows, width) @ weight (outputs, width).T + bias, of plain float arrays that fit; bias is
    dense, in the compute dtype, or None. The products are scores of queries x and keys weight."""
    cdef mha_problem p
    cdef int dtype
    memset(&p, 0, sizeof(p))
    p.batch = p.kv_heads = p.group_size = 1
    p.seqlen_q, p.seqlen_k, p.head_dim = x.shape[0], weight.shape[0], x.shape[1]
    p.window_left = p.window_right = MHA_OPEN
    p.scale = 1
    describe(&p, &p.q, x, 1, p.seqlen_q, p.head_dim, 3)
    describe(&p, &p.k, weight, 1, p.seqlen_k, p.head_dim, 3)
    p.v = p.k
    dtype = promote(p.q.dtype, p.k.dtype)
    out = new_array(&p, 2, 1, p.seqlen_k, dtype)
    describe(&p, &p.scores, out, 1, p.seqlen_q, p.seqlen_k, 3)
    if bias is not None:
        p.addend = cnp.PyArray_DATA(bias)
    if out.size:
        run(&p, kernels_of(dtype), default_threads() if threads is None else threads)
    return out


cdef const mha_kernels *kernels_of(int dtype) noexcept:
    return isa.f64 if dtype == MHA_F64 else isa.f32
