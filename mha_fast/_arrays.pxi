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


cdef int ndim(cnp.ndarray array) noexcept:
    return cnp.PyArray_NDIM(array)


cdef bint fit(idx have, idx want, idx stride, idx *result) noexcept:
    """The stride of an axis of `have` entries broadcast to `want`."""
    result[0] = 0 if have == 1 else stride
    return have == want or have == 1


cdef idx axis(cnp.ndarray array, int from_end) noexcept:
    """Length of an axis counted from the end; 1 where the array has no such axis."""
    cdef int i = ndim(array) - from_end
    return cnp.PyArray_DIM(array, i) if i >= 0 else 1


cdef idx stride(cnp.ndarray array, int from_end) noexcept:
    cdef int i = ndim(array) - from_end
    return cnp.PyArray_STRIDE(array, i) if i >= 0 else 0


cdef bint describe(const mha_sizes *n, mha_array *a, cnp.ndarray array, idx heads, idx rows,
                   idx cols, int core):
    """Fill in an array whose last `core` axes broadcast to the first of (heads, rows, cols), and
    the axes before them to the batch. `a.batch_bytes` has room for their strides."""
    cdef idx *batch_bytes = <idx *>a.batch_bytes
    cdef int i
    a.data = cnp.PyArray_BYTES(array)
    a.dtype = dtype_of(array)
    a.head_bytes = a.row_bytes = a.col_bytes = 0
    if core >= 1 and not fit(axis(array, core), heads, stride(array, core), &a.head_bytes):
        return False
    if core >= 2 and not fit(axis(array, core - 1), rows, stride(array, core - 1), &a.row_bytes):
        return False
    if core == 3 and not fit(axis(array, 1), cols, stride(array, 1), &a.col_bytes):
        return False
    if ndim(array) > core + n.batch_axes:
        return False
    for i in range(n.batch_axes):
        if not fit(axis(array, core + n.batch_axes - i), n.batch_shape[i],
                   stride(array, core + n.batch_axes - i), &batch_bytes[i]):
            return False
    return True


cdef bint set_sizes(mha_sizes *n, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v) noexcept:
    """Sizes of q, k and v but for the batch; False where they do not fit."""
    cdef idx heads = axis(q, 3)
    n.kv_heads = axis(k, 3)
    n.seqlen_q, n.seqlen_k = axis(q, 2), axis(k, 2)
    n.head_dim, n.head_dim_v = axis(q, 1), axis(v, 1)
    if axis(k, 1) != n.head_dim or axis(v, 2) != n.seqlen_k or axis(v, 3) != n.kv_heads:
        return False
    n.group_size = heads // n.kv_heads if n.kv_heads else 1
    return n.group_size * n.kv_heads == heads


cdef bint set_batch(mha_sizes *n, idx *shape, cnp.ndarray array) noexcept:
    """Broadcast the batch shape with that of an array."""
    cdef idx length
    cdef int i
    for i in range(n.batch_axes):
        length = axis(array, 3 + n.batch_axes - i)
        if length != 1 and shape[i] != 1 and length != shape[i]:
            return False
        if length != 1:
            shape[i] = length
    return True


cdef object new_array(const mha_sizes *n, int ndim, idx heads, idx last, int dtype):
    """An uninitialised (batch..., heads, seqlen_q[, last]) array; two-dimensional inputs have no
    heads axis. `last` < 0: none."""
    cdef cnp.npy_intp shape[MHA_MAX_AXES]
    cdef int i, axes = n.batch_axes
    for i in range(axes):
        shape[i] = n.batch_shape[i]
    if ndim > 2:
        shape[axes] = heads
        axes += 1
    shape[axes] = n.seqlen_q
    axes += 1
    if last >= 0:
        shape[axes] = last
        axes += 1
    return cnp.PyArray_SimpleNew(axes, shape, type_number[dtype])


# ---- Memory that is shared -----------------------------------------------------------------------


cpdef bint overlaps_itself(cnp.ndarray array):
    """Do two of its elements share memory? In order of their strides, each axis must step over all
    that the axes before it reach."""
    cdef int i
    cdef idx reach = cnp.PyArray_ITEMSIZE(array)
    if cnp.PyArray_IS_C_CONTIGUOUS(array) or cnp.PyArray_SIZE(array) == 0:
        return False
    for step, length in sorted([(abs(cnp.PyArray_STRIDE(array, i)), cnp.PyArray_DIM(array, i))
                                for i in range(ndim(array))]):
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
    for i in range(ndim(array)):
        reach = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        if reach < 0:
            first[0] += reach
        else:
            past[0] += reach
