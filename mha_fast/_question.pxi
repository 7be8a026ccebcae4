"""The question of a call as one value, and its answers; included by _core.pyx.

What cannot be proved safe and plain here is refused, without a word: `Question.plain` is False, or
`attend` returns NotImplemented. options.py and attention.py then say what is wrong, or make the
arguments plain and ask again.
"""

cdef double LOG2_E = 1.4426950408889634
# Positions and sides of windows beyond this are mistakes, and could overflow.
FARTHEST = 2**53
cdef int64_t farthest = FARTHEST
# Beyond these a float32 score could leave the range of numbers on its way.
cdef double least_softcap = 2.0 ** -64, most_softcap = 2.0 ** 64
cdef enum:
    ARRAYS = 9      # of a question
    ANSWERS = 4     # that are described


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Question:
    """Arrays and options, and the mha_problem that they are if all of them are plain."""
    cdef mha_problem p
    cdef readonly object q, k, v, mask, bias, causal, q_offset, window, kv_lengths, scale
    cdef readonly object softcap, sinks, alibi_slopes, dropout_p, seed
    cdef readonly bint plain
    cdef int ndim, dtype
    cdef idx heads
    cdef int64_t offset, length         # where these are one number for all
    cdef idx *batch                     # the batch shape, and each array's strides along it

    def __dealloc__(self):
        free(self.batch)

    cdef bint set_arrays(self):
        cdef mha_problem *p = &self.p
        cdef mha_sizes *n = &p.n
        if not (is_plain(self.q) and is_plain(self.k) and is_plain(self.v)):
            return False
        self.ndim = max(ndim(self.q), ndim(self.k), ndim(self.v))
        if min(ndim(self.q), ndim(self.k), ndim(self.v)) < 2:
            return False
        if not (set_sizes(n, self.q, self.k, self.v) and self.set_batch()):
            return False
        self.heads = n.kv_heads * n.group_size
        self.dtype = promote(promote(dtype_of(self.q), dtype_of(self.k)), dtype_of(self.v))
        return (describe(n, &p.q, self.q, self.heads, n.seqlen_q, n.head_dim, 3)
                and describe(n, &p.k, self.k, n.kv_heads, n.seqlen_k, n.head_dim, 3)
                and describe(n, &p.v, self.v, n.kv_heads, n.seqlen_k, n.head_dim_v, 3)
                and is_real(p.q.dtype) and is_real(p.k.dtype) and is_real(p.v.dtype))

    cdef bint set_batch(self):
        """The batch shape, and for each array room for its strides."""
        cdef mha_problem *p = &self.p
        cdef mha_array **arrays = [
            &p.q, &p.k, &p.v, &p.spans.q_offset, &p.spans.kv_lengths, &p.scoring.terms[0],
            &p.scoring.terms[1], &p.scoring.slopes, &p.weighing.sinks]
        cdef int i, axes = max(self.ndim - 3, 0)
        p.n.batch_axes = axes
        p.n.batch = 1
        if axes == 0:
            return True
        self.batch = <idx *>malloc((1 + ARRAYS) * axes * sizeof(idx))
        if self.batch == NULL:
            raise MemoryError("no memory for the strides of arrays")
        p.n.batch_shape = self.batch
        for i in range(ARRAYS):
            arrays[i].batch_bytes = self.batch + (1 + i) * axes
        for i in range(axes):
            self.batch[i] = 1
        if not (set_batch(&p.n, self.batch, self.q) and set_batch(&p.n, self.batch, self.k)
                and set_batch(&p.n, self.batch, self.v)):
            return False
        for i in range(axes):
            p.n.batch *= self.batch[i]
        return True

    cdef bint set_spans(self):
        """Who sees whom."""
        cdef mha_spans *spans = &self.p.spans
        cdef int causal = flag(self.causal)
        spans.left = spans.right = MHA_OPEN
        if self.window is not None:
            if type(self.window) is not tuple or len(<tuple>self.window) != 2:
                return False
            if not (side((<tuple>self.window)[0], &spans.left)
                    and side((<tuple>self.window)[1], &spans.right)):
                return False
        if causal == 1:
            spans.right = min(spans.right, 0)
        return (causal >= 0
                and self.set_integers(&spans.q_offset, self.q_offset, &self.offset, -farthest,
                                      farthest)
                and self.set_integers(&spans.kv_lengths, self.kv_lengths, &self.length, 0,
                                      self.p.n.seqlen_k))

    cdef bint set_integers(self, mha_array *a, object x, int64_t *one, int64_t low, int64_t high):
        """One int or an int64 array of the batch axes, checked in a copy of ours."""
        cdef const int64_t *values
        cdef idx i
        if x is None:
            return True
        if integer(x, one):
            a.data = <char *>one
            for i in range(self.p.n.batch_axes):
                (<idx *>a.batch_bytes)[i] = 0
            return low <= one[0] <= high
        if not (is_plain(x) and cnp.PyArray_TYPE(x) == cnp.NPY_INT64
                and cnp.PyArray_ISNOTSWAPPED(x)):
            return False
        x = cnp.PyArray_NewCopy(x, cnp.NPY_CORDER)
        values = <const int64_t *>cnp.PyArray_DATA(x)
        for i in range(cnp.PyArray_SIZE(x)):
            if not low <= values[i] <= high:
                return False
        if a == &self.p.spans.q_offset:
            self.q_offset = x
        else:
            self.kv_lengths = x
        return describe(&self.p.n, a, x, 1, 1, 1, 0)

    cdef bint set_scoring(self):
        """How a product becomes a score."""
        cdef idx head_dim = self.p.n.head_dim
        cdef mha_scoring *scoring = &self.p.scoring
        scoring.scale = 1 / sqrt(head_dim) if head_dim else 1
        if self.scale is not None and not number(self.scale, &scoring.scale):
            return False
        scoring.scale *= LOG2_E
        if self.softcap is not None:
            if not (number(self.softcap, &scoring.softcap)
                    and least_softcap <= scoring.softcap <= most_softcap):
                return False
            scoring.scale *= 2 / scoring.softcap
            scoring.softcap *= LOG2_E
        if not self.set_per_head(&scoring.slopes, self.alibi_slopes):
            return False
        return self.add_term(self.mask, MHA_BOOL) and self.add_term(self.bias, MHA_BOOL + 1)

    cdef bint set_per_head(self, mha_array *a, object x):
        """One number a head, in the compute dtype."""
        if x is None:
            return True
        return (is_plain(x) and describe(&self.p.n, a, x, self.heads, 1, 1, 1)
                and a.dtype == compute_dtype(self.dtype) and cnp.PyArray_ISALIGNED(x))

    cdef bint set_weighing(self):
        """What happens once scores are known."""
        cdef mha_weighing *weighing = &self.p.weighing
        cdef double share = 0
        cdef int64_t seed = 0
        if not (self.dropout_p is not None and number(self.dropout_p, &share) and 0 <= share < 1):
            return False
        if self.seed is not None and not (integer(self.seed, &seed) and seed >= 0):
            return False
        if share > 0 and self.seed is None:
            return False
        # All of 2^16 would leave nothing to divide by.
        weighing.threshold = <uint32_t>min(share * 65536 + 0.5, 65535)
        weighing.seed[0], weighing.seed[1] = seed & 0xffffffff, seed >> 32
        return self.set_per_head(&weighing.sinks, self.sinks)

    cdef bint add_term(self, object term, int first_dtype):
        cdef const mha_sizes *n = &self.p.n
        cdef mha_array *a = &self.p.scoring.terms[self.p.scoring.num_terms]
        if term is None:
            return True
        if not is_plain(term) or not describe(n, a, term, self.heads, n.seqlen_q, n.seqlen_k, 3):
            return False
        self.p.scoring.num_terms += 1
        return a.dtype >= first_dtype

    def attend(self, out=None, return_lse=False, return_weights=False, threads=None,
               heads_of=None, rows_of=None):
        """`out`, or (out, lse, weights), None what is not asked for, or NotImplemented.

        heads_of and rows_of are int64 arrays: the place of each head and row in the weights, -1:
        none. They have been checked by attention.py, as nothing here does.
        """
        cdef const mha_sizes *n = &self.p.n
        cdef mha_job job
        cdef idx batch_bytes[ANSWERS][MHA_MAX_AXES]
        cdef int64_t limit = 0
        cdef int wants_lse = flag(return_lse), wants_weights = flag(return_weights)
        if not self.plain or wants_lse < 0 or wants_weights < 0:
            return NotImplemented
        if threads is not None and not (integer(threads, &limit) and 0 < limit < 1 << 30):
            return NotImplemented
        if out is None:
            out = new_array(n, self.ndim, self.heads, n.head_dim_v, self.dtype)
        elif not self.can_write(out):
            return NotImplemented
        self.begin_job(&job, batch_bytes[0])
        lse = self.set_results(&job, out, wants_lse)
        weights = None
        if wants_weights:
            sums = self.set_sums(&job)
            weights = self.new_scores(&job.scores, MHA_WEIGHTS, heads_of, rows_of)
        if n.batch and self.heads and n.seqlen_q:
            carry_out(&job, kernels_of(self.dtype), attend, <int>limit)
        return (out, lse, weights) if wants_lse or wants_weights else out

    def effective_scale(self):
        """The scale, given or not."""
        cdef double head_dim = self.p.n.head_dim
        return self.scale if self.scale is not None else 1 / sqrt(head_dim) if head_dim else 1.0

    def scores(self, threads=None):
        """What enters the softmax, as one array: -inf where a key is hidden."""
        cdef mha_job job
        cdef idx batch_bytes[ANSWERS][MHA_MAX_AXES]
        self.begin_job(&job, batch_bytes[0])
        scores = self.new_scores(&job.scores, MHA_SCORES, None, None)
        if scores.size:
            carry_out(&job, kernels_of(self.dtype), project, threads or 0)
        return scores

    def measure(self, idx top, threads=None):
        """The lse, and what mha_measures holds: rows, received, top_keys, top_weights."""
        cdef const mha_sizes *n = &self.p.n
        cdef mha_job job
        cdef idx batch_bytes[ANSWERS][MHA_MAX_AXES]
        cdef int axes = max(self.ndim, 3), real = compute_dtype(self.dtype)
        self.begin_job(&job, batch_bytes[0])
        out = new_array(n, self.ndim, self.heads, n.head_dim_v, self.dtype)
        lse, sums = self.set_results(&job, out, True), self.set_sums(&job)
        rows = new_array(n, self.ndim, self.heads, 2, real)
        rows[..., 0], rows[..., 1] = -np.inf, 0
        *outer, seqlen_q = lse.shape
        received = np.zeros((*outer, n.seqlen_k, 2), np.int64)
        top_keys = np.full((*outer, seqlen_q, top), -1, np.int64)
        top_weights = np.zeros((*outer, seqlen_q, top), lse.dtype)
        job.measures.rows = cnp.PyArray_DATA(rows)
        job.measures.received = <int64_t *>cnp.PyArray_DATA(received)
        job.measures.top_keys = <int64_t *>cnp.PyArray_DATA(top_keys)
        job.measures.top_weights = cnp.PyArray_DATA(top_weights)
        job.measures.top = top
        if rows.size:
            carry_out(&job, kernels_of(self.dtype), attend, threads or 0)
        return lse, rows, received, top_keys, top_weights

    def plan(self, threads=None):
        """What `attend` would do, as a dict: nothing is computed but which blocks tiles can see."""
        cdef mha_job job
        cdef Plan plan
        cdef mha_tile *tile
        cdef const mha_kernels *kernels = kernels_of(self.dtype)
        cdef const mha_kernel *kernel
        cdef double work = work_of(&self.p)
        cdef int limit = threads or default_threads()
        cdef idx i, visited = 0, few = 0
        memset(&job, 0, sizeof(job))
        job.problem = &self.p
        if work < 2 * WORK_PER_HOT_THREAD or forked:
            limit = 1
        plan = plan_of(&self.p, kernels, threads_for(work, True, limit), True)
        for i in range(plan.tiles):
            kernel = layout_of(&self.p, kernels, i)
            few += kernel == kernels.keys_in_lanes
            tile = kernel.begin(&job, i)
            if tile == NULL:
                raise MemoryError("no memory for the scratch space of a thread")
            visited += tile.last_block - tile.first_block
        kernel = kernels.keys_in_lanes if few == plan.tiles else kernels.queries_in_lanes
        return {
            "isa": get_isa(),
            "layout": "keys in lanes" if few == plan.tiles else "queries in lanes",
            "rows_per_tile": kernel.lanes,
            "tiles": plan.tiles,
            "tasks": plan.tiles * plan.chunks,
            "threads": plan.threads,
            "scratch_bytes": kernel.tile_bytes(&self.p),
            "record_bytes": <size_t>plan.bytes,
            "blocks": plan.tiles * plan.blocks,
            "blocks_visited": visited,
        }

    cdef void begin_job(self, mha_job *job, idx *batch_bytes) noexcept:
        """A job of this question, with room for its answers' strides."""
        memset(job, 0, sizeof(job[0]))
        job.problem = &self.p
        job.results.out.batch_bytes = batch_bytes
        job.results.lse.batch_bytes = batch_bytes + MHA_MAX_AXES
        job.results.sums.batch_bytes = batch_bytes + 2 * MHA_MAX_AXES
        job.scores.to.batch_bytes = batch_bytes + 3 * MHA_MAX_AXES

    cdef object set_results(self, mha_job *job, cnp.ndarray out, bint wants_lse):
        """Fill in a job; the lse, or None."""
        cdef const mha_sizes *n = &self.p.n
        describe(n, &job.results.out, out, self.heads, n.seqlen_q, n.head_dim_v, 3)
        if not wants_lse:
            return None
        lse = new_array(n, self.ndim, self.heads, -1, compute_dtype(self.dtype))
        describe(n, &job.results.lse, lse, self.heads, n.seqlen_q, 1, 2)
        return lse

    cdef object set_sums(self, mha_job *job):
        cdef const mha_sizes *n = &self.p.n
        sums = new_array(n, max(self.ndim, 3), self.heads, 3, compute_dtype(self.dtype))
        describe(n, &job.results.sums, sums, self.heads, n.seqlen_q, 3, 3)
        return sums

    cdef bint can_write(self, object out):
        """Is it an array of the result's dtype and shape, of memory of its own?"""
        cdef const mha_sizes *n = &self.p.n
        cdef int i
        if not is_plain(out) or dtype_of(out) != self.dtype or not cnp.PyArray_ISWRITEABLE(out):
            return False
        if ndim(out) != n.batch_axes + min(self.ndim, 3):
            return False
        if (axis(out, 1) != n.head_dim_v or axis(out, 2) != n.seqlen_q
                or self.ndim > 2 and axis(out, 3) != self.heads):
            return False
        for i in range(n.batch_axes):
            if cnp.PyArray_DIM(out, i) != n.batch_shape[i]:
                return False
        return not (overlaps_itself(out) or overlap(out, self.q) or overlap(out, self.k)
                    or overlap(out, self.v) or overlap(out, self.mask) or overlap(out, self.bias))

    cdef object new_scores(self, mha_scores_out *scores, int stage, cnp.ndarray heads_of,
                           cnp.ndarray rows_of):
        """An array for the scores or weights of the heads and rows that have a place."""
        cdef const mha_sizes *n = &self.p.n
        cdef idx heads = self.heads, rows = n.seqlen_q
        if heads_of is not None:
            scores.heads_of = <const int64_t *>cnp.PyArray_DATA(heads_of)
            heads = np.count_nonzero(heads_of >= 0)
        if rows_of is not None:
            scores.rows_of = <const int64_t *>cnp.PyArray_DATA(rows_of)
            rows = np.count_nonzero(rows_of >= 0)
        shape = [n.batch_shape[i] for i in range(n.batch_axes)]
        shape += ([heads] if self.ndim > 2 else []) + [rows, n.seqlen_k]
        to = np.empty(shape, np.float64 if self.dtype == MHA_F64 else np.float32)
        scores.stage = stage
        describe(n, &scores.to, to, heads, rows, n.seqlen_k, 3)
        return to


def attend_together(list questions, list outs, bint return_lse, threads):
    """`attend` of many questions of one dtype by one team; outs and the list of lse, or None.

    What attention_varlen makes and has checked: questions are plain and without batch axes.
    """
    cdef idx i, count = len(questions)
    cdef double work = 0
    cdef call_state call
    cdef Question question
    memset(&call, 0, sizeof(call))
    cdef mha_job *jobs = <mha_job *>calloc(count, sizeof(mha_job))
    call.parts = <call_state *>calloc(count, sizeof(call_state))
    call.task = attend_part
    lses = []
    try:
        if count and (jobs == NULL or call.parts == NULL):
            raise MemoryError("no memory for the jobs of sequences")
        call.num_parts = count
        for i in range(count):
            question = questions[i]
            jobs[i].problem = &question.p
            lses.append(question.set_results(&jobs[i], outs[i], return_lse))
            call.parts[i].job, call.parts[i].kernels = &jobs[i], kernels_of(question.dtype)
            work += work_of(&question.p)
        if count:
            run(&call, work, threads or 0)
    finally:
        free(jobs)
        free(call.parts)
    return lses if return_lse else None


def ask(q, k, v, mask=None, *, bias=None, causal=False, q_offset=None, window=None,
        kv_lengths=None, scale=None, softcap=None, sinks=None, alibi_slopes=None, dropout_p=0.0,
        seed=None):
    """The question of `attention`, with its arguments as attributes."""
    cdef Question question = Question.__new__(Question)
    question.q, question.k, question.v = q, k, v
    question.mask, question.bias, question.causal = mask, bias, causal
    question.q_offset, question.window, question.kv_lengths = q_offset, window, kv_lengths
    question.scale, question.softcap = scale, softcap
    question.sinks, question.alibi_slopes = sinks, alibi_slopes
    question.dropout_p, question.seed = dropout_p, seed
    question.plain = (question.set_arrays() and question.set_spans() and question.set_scoring()
                      and question.set_weighing())
    return question
