"""Arrays to C: shapes, strides and dtypes into mha_problem, included by _core.pyx."""


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
    """Fill in an array whose last `core` axes broadcast to those of (heads, rows, cols)."""
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


cdef int compute_dtype(int dtype) noexcept:
    return MHA_F64 if dtype == MHA_F64 else MHA_F32


cdef int promote(int a, int b) noexcept:
    return a if a == b else MHA_F64 if a == MHA_F64 or b == MHA_F64 else MHA_F32
