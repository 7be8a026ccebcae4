"""The question of a call as one value, and its answers; included by _core.pyx.

What cannot be proved safe and plain here is refused, without a word: `Question.plain` is False, or
`attend` returns NotImplemented. options.py and attention.py then say what is wrong, or make the
arguments plain and ask again.
"""

cdef double LOG2_E = 1.4426950408889634
# Positions and sides of windows beyond this are mistakes, and could overflow.
FARTHEST = 2**53
cdef int64_t farthest = FARTHEST
cdef object np_bool = np.bool_, np_integer = np.integer, np_floating = np.floating


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Question:
    """Arrays and options, and the mha_problem that they are if all of them are plain."""
    cdef mha_problem p
    cdef readonly object q, k, v, mask, bias, causal, q_offset, window, kv_lengths, scale
    cdef readonly bint plain
    cdef int ndim, dtype
    cdef idx heads
    cdef int64_t offset, length         # where these are one number for all

    cdef bint set_arrays(self):
        cdef mha_problem *p = &self.p
        if not (is_plain(self.q) and is_plain(self.k) and is_plain(self.v)):
            return False
        if not set_sizes(p, self.q, self.k, self.v, &self.ndim):
            return False
        self.heads = p.kv_heads * p.group_size
        self.dtype = promote(promote(dtype_of(self.q), dtype_of(self.k)), dtype_of(self.v))
        return (describe(p, &p.q, self.q, self.heads, p.seqlen_q, p.head_dim, 3)
                and describe(p, &p.k, self.k, p.kv_heads, p.seqlen_k, p.head_dim, 3)
                and describe(p, &p.v, self.v, p.kv_heads, p.seqlen_k, p.head_dim_v, 3)
                and is_real(p.q.dtype) and is_real(p.k.dtype) and is_real(p.v.dtype))

    cdef bint set_spans(self):
        """Who sees whom."""
        cdef mha_problem *p = &self.p
        cdef int causal = flag(self.causal)
        p.window_left = p.window_right = MHA_OPEN
        if self.window is not None:
            if type(self.window) is not tuple or len(<tuple>self.window) != 2:
                return False
            if not (side((<tuple>self.window)[0], &p.window_left)
                    and side((<tuple>self.window)[1], &p.window_right)):
                return False
        if causal == 1:
            p.window_right = min(p.window_right, 0)
        return (causal >= 0
                and self.set_integers(&p.q_offset, self.q_offset, &self.offset, -farthest, farthest)
                and self.set_integers(&p.kv_lengths, self.kv_lengths, &self.length, 0, p.seqlen_k))

    cdef bint set_integers(self, mha_array *a, object x, int64_t *one, int64_t low, int64_t high):
        """One int or an int64 array of the batch axes, checked in a copy of ours."""
        cdef const int64_t *values
        cdef idx i
        if x is None:
            return True
        if integer(x, one):
            a.data = <char *>one
            return low <= one[0] <= high
        if not is_plain(x) or cnp.PyArray_TYPE(x) != cnp.NPY_INT64:
            return False
        x = cnp.PyArray_NewCopy(x, cnp.NPY_CORDER)
        values = <const int64_t *>cnp.PyArray_DATA(x)
        for i in range(cnp.PyArray_SIZE(x)):
            if not low <= values[i] <= high:
                return False
        if a == &self.p.q_offset:
            self.q_offset = x
        else:
            self.kv_lengths = x
        return describe(&self.p, a, x, 1, 1, 1, 0)

    cdef bint set_scoring(self):
        """How a product becomes a score."""
        cdef mha_problem *p = &self.p
        p.scale = 1 / sqrt(p.head_dim) if p.head_dim else 1
        if self.scale is not None and not number(self.scale, &p.scale):
            return False
        p.scale *= LOG2_E
        return self.add_term(self.mask, MHA_BOOL) and self.add_term(self.bias, MHA_BOOL + 1)

    cdef bint add_term(self, object term, int first_dtype):
        cdef mha_problem *p = &self.p
        cdef mha_array *a = &p.terms[p.num_terms]
        if term is None:
            return True
        if not is_plain(term) or not describe(p, a, term, self.heads, p.seqlen_q, p.seqlen_k, 3):
            return False
        p.num_terms += 1
        return a.dtype >= first_dtype

    def attend(self, out=None, return_lse=False, return_weights=False, threads=None,
               heads_of=None, rows_of=None):
        """(out, lse, weights), None what is not asked for, or NotImplemented.

        heads_of and rows_of are int64 arrays: the place of each head and row in the weights, -1:
        none. They have been checked by attention.py, as nothing here does.
        """
        cdef mha_problem *p = &self.p
        cdef int64_t limit = default_threads()
        cdef int wants_lse = flag(return_lse), wants_weights = flag(return_weights)
        if not self.plain or wants_lse < 0 or wants_weights < 0:
            return NotImplemented
        if threads is not None and not (integer(threads, &limit) and 0 < limit < 1 << 30):
            return NotImplemented
        if out is None:
            out = new_array(p, self.ndim, self.heads, p.head_dim_v, self.dtype)
        elif not self.can_write(out):
            return NotImplemented
        describe(p, &p.out, out, self.heads, p.seqlen_q, p.head_dim_v, 3)
        lse = weights = None
        if wants_lse:
            lse = new_array(p, self.ndim, self.heads, -1, compute_dtype(self.dtype))
            describe(p, &p.lse, lse, self.heads, p.seqlen_q, 1, 2)
        if wants_weights:
            sums = new_array(p, max(self.ndim, 3), self.heads, 2, compute_dtype(self.dtype))
            describe(p, &p.sums, sums, self.heads, p.seqlen_q, 2, 3)
            weights = self.new_weights(heads_of, rows_of)
        if p.batch and self.heads and p.seqlen_q:
            carry_out(p, kernels_of(self.dtype), attend, <int>limit)
        return out, lse, weights

    cdef bint can_write(self, object out):
        """Is it an array of the result's dtype and shape, of memory of its own?"""
        cdef mha_problem *p = &self.p
        cdef int i, ndim = p.batch_axes + min(self.ndim, 3)
        if not is_plain(out) or dtype_of(out) != self.dtype or not cnp.PyArray_ISWRITEABLE(out):
            return False
        if cnp.PyArray_NDIM(out) != ndim or axis(out, 1) != p.head_dim_v:
            return False
        if axis(out, 2) != p.seqlen_q or axis(out, 3) != self.heads:
            return False
        for i in range(p.batch_axes):
            if cnp.PyArray_DIM(out, i) != p.batch_shape[i]:
                return False
        return not (overlaps_itself(out) or overlap(out, self.q) or overlap(out, self.k)
                    or overlap(out, self.v) or overlap(out, self.mask) or overlap(out, self.bias))

    cdef object new_weights(self, cnp.ndarray heads_of, cnp.ndarray rows_of):
        """An array for the weights of the heads and rows that have a place."""
        cdef mha_problem *p = &self.p
        cdef idx heads = self.heads, rows = p.seqlen_q
        if heads_of is not None:
            p.heads_of = <const int64_t *>cnp.PyArray_DATA(heads_of)
            heads = np.count_nonzero(heads_of >= 0)
        if rows_of is not None:
            p.rows_of = <const int64_t *>cnp.PyArray_DATA(rows_of)
            rows = np.count_nonzero(rows_of >= 0)
        shape = [p.batch_shape[i] for i in range(p.batch_axes)]
        shape += ([heads] if self.ndim > 2 else []) + [rows, p.seqlen_k]
        weights = np.zeros(shape, np.float64 if self.dtype == MHA_F64 else np.float32)
        describe(p, &p.scores, weights, heads, rows, p.seqlen_k, 3)
        return weights


def ask(q, k, v, mask=None, *, bias=None, causal=False, q_offset=None, window=None,
        kv_lengths=None, scale=None):
    """The question of `attention`, with its arguments as attributes."""
    cdef Question question = Question.__new__(Question)
    question.q, question.k, question.v = q, k, v
    question.mask, question.bias, question.causal = mask, bias, causal
    question.q_offset, question.window, question.kv_lengths = q_offset, window, kv_lengths
    question.scale = scale
    question.plain = question.set_arrays() and question.set_spans() and question.set_scoring()
    return question


# ---- Plain values: 1 or True where it is one -----------------------------------------------------


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


# ---- A linear layer ------------------------------------------------------------------------------


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
        carry_out(&p, kernels_of(dtype), project, default_threads() if threads is None else threads)
    return out


cdef const mha_kernels *kernels_of(int dtype) noexcept:
    return isa.f64 if dtype == MHA_F64 else isa.f32
