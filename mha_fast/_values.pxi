"""Python values to C: 1 or True where one is plain; included by _core.pyx."""

cdef object np_bool = np.bool_, np_integer = np.integer, np_floating = np.floating


cdef int flag(object x) noexcept:
    """A bool as 0 or 1; -1: it is none."""
    if x is True or x is False:
        return x is True
    return bool(x) if type(x) is np_bool else -1


cdef bint integer(object x, int64_t *value):
    cdef int overflow = 0
    if type(x) is not int:
        if not isinstance(x, np_integer):
            return False
        x = int(x)
    value[0] = PyLong_AsLongLongAndOverflow(x, &overflow)
    return not overflow


cdef bint side(object x, idx *value):
    """One side of a window; None or beyond all positions: it stays open."""
    cdef int64_t given
    if x is None:
        return True
    if not integer(x, &given) or given < 0:
        return False
    if given <= farthest:
        value[0] = given
    return True


cdef bint number(object x, double *value):
    """A finite real number."""
    cdef int64_t whole
    if isinstance(x, float):
        value[0] = x
    elif integer(x, &whole):
        value[0] = <double>whole
    elif isinstance(x, np_floating):
        value[0] = float(x)
    else:
        return False
    return isfinite(value[0])
