"""Arrays to C: shapes, strides and dtypes into mha_array; included by _core.pyx."""

# NumPy's number of each storage dtype. bfloat16 is a type of ml_dtypes, found by its name.
cdef int type_number[MHA_DTYPES]
type_number[MHA_BOOL] = cnp.NPY_BOOL
type_number[MHA_F16] = cnp.NPY_FLOAT16
type_number[MHA_BF16] = -1
type_number[MHA_F32] = cnp.NPY_FLOAT32
type_number[MHA_F64] = cnp.NPY_FLOAT64


cdef int dtype_of(cnp.ndarray array):
    """One of mha.h's dtypes, or -1."""
    cdef int dtype, number = cnp.PyArray_TYPE(array)
    if not cnp.PyArray_ISNOTSWAPPED(array):
        return -1
    for dtype in range(MHA_DTYPES):
        if type_number[dtype] == number:
            return dtype
    if cnp.PyTypeNum_ISUSERDEF(number) and (<object>array).dtype.name == "bfloat16":
        type_number[MHA_BF16] = number
        return MHA_BF16
    return -1


cdef bint is_real(int dtype) noexcept:
    return dtype > MHA_BOOL


cdef int compute_dtype(int dtype) noexcept:
    return MHA_F64 if dtype == MHA_F64 else MHA_F32


cdef int promote(int a, int b) noexcept:
    return a if a == b else MHA_F64 if a == MHA_F64 or b == MHA_F64 else MHA_F32


cdef bint is_plain(object x) noexcept:
    return type(x) is cnp.ndarray


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
                   int core):
    """Fill in an array whose last `core` axes broadcast to the first of (heads, rows, cols), and
    the axes before them to the batch."""
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


cdef bint set_sizes(mha_problem *p, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v,
                    int *ndim) noexcept:
    """Sizes and broadcast batch shape of q, k, v; False where they do not fit."""
    cdef idx n, heads = axis(q, 3)
    cdef int i
    cdef cnp.ndarray array
    ndim[0] = max(cnp.PyArray_NDIM(q), cnp.PyArray_NDIM(k), cnp.PyArray_NDIM(v))
    if min(cnp.PyArray_NDIM(q), cnp.PyArray_NDIM(k), cnp.PyArray_NDIM(v)) < 2:
        return False
    p.batch_axes = max(ndim[0] - 3, 0)
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
            n = axis(array, ndim[0] - i)
            if n != 1 and p.batch_shape[i] != 1 and n != p.batch_shape[i]:
                return False
            if n != 1:
                p.batch_shape[i] = n
        p.batch *= p.batch_shape[i]
    return True


cdef object new_array(mha_problem *p, int ndim, idx heads, idx last, int dtype):
    """An uninitialised (batch..., heads, seqlen_q[, last]) array; two-dimensional inputs have no
    heads axis. `last` < 0: none."""
    cdef cnp.npy_intp shape[MHA_MAX_AXES]
    cdef int i, n = 0
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
    return cnp.PyArray_SimpleNew(n, shape, type_number[dtype])


# ---- Memory that is shared -----------------------------------------------------------------------


cpdef bint overlaps_itself(cnp.ndarray array):
    """Do two of its elements share memory? In order of their strides, each axis must step over all
    that the axes before it reach."""
    cdef int i
    cdef idx reach = cnp.PyArray_ITEMSIZE(array)
    if cnp.PyArray_IS_C_CONTIGUOUS(array) or cnp.PyArray_SIZE(array) == 0:
        return False
    for step, length in sorted([(abs(cnp.PyArray_STRIDE(array, i)), cnp.PyArray_DIM(array, i))
                                for i in range(cnp.PyArray_NDIM(array))]):
        if length > 1 and step < reach:
            return True
        reach += step * (length - 1)
    return False


cpdef bint overlap(cnp.ndarray a, cnp.ndarray b):
    """May the two share memory? None shares nothing."""
    cdef char *first[2]
    cdef char *past[2]
    if b is None or cnp.PyArray_SIZE(a) == 0 or cnp.PyArray_SIZE(b) == 0:
        return False
    bounds(a, &first[0], &past[0])
    bounds(b, &first[1], &past[1])
    if first[0] >= past[1] or first[1] >= past[0]:
        return False
    try:
        return np.shares_memory(a, b, max_work=1000)
    except np.exceptions.TooHardError:
        return True


cdef void bounds(cnp.ndarray array, char **first, char **past) noexcept:
    """The memory of an array that is not empty."""
    cdef int i
    cdef idx reach
    first[0] = cnp.PyArray_BYTES(array)
    past[0] = first[0] + cnp.PyArray_ITEMSIZE(array)
    for i in range(cnp.PyArray_NDIM(array)):
        reach = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        if reach < 0:
            first[0] += reach
        else:
            past[0] += reach
